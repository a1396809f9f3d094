"""Code that comes with a model is run when the caller says so, and nobody is asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import tiny_models
from pcache_core import CausalLM, ModelError
from pcache_integrations.langchain import PromptCacheLLM as LangChainLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(params=["config.json", "tokenizer_config.json"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose configuration names classes in a file beside it, which notes that it ran."""
    folder = tmp_path / "model"
    tiny_models.build("llama").save_pretrained(folder)
    tiny_models.tiny_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    path = folder / request.param
    settings = json.loads(path.read_text())
    if request.param == "config.json":
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        settings |= {"model_type": "own", "auto_map": auto_map}
    else:
        settings |= {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        settings["tokenizer_class"] = "OwnTokenizer"
    path.write_text(json.dumps(settings))
    return folder


class Asked:
    """A terminal where somebody would say yes."""

    def __init__(self) -> None:
        self.count = 0

    def readline(self, *_: object) -> str:
        self.count += 1
        return "y\n"


def test_no_code_of_a_model_is_run_and_the_error_names_the_option(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked()
    monkeypatch.setattr(sys, "stdin", asked)
    for load in (
        lambda: CausalLM.from_pretrained(folder),
        lambda: LangChainLLM(model=str(folder)).engine,
        lambda: LlamaIndexLLM(model=str(folder)).engine,
    ):
        with pytest.raises(ModelError, match="trust_remote_code=True"):
            load()
    assert asked.count == 0
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_is_run_where_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    lm = CausalLM.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "ran").read_text() == "ran"
    assert "Own" in f"{type(lm.model).__name__} {type(lm.tokenizer).__name__}"
