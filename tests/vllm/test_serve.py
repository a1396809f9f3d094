"""`pcache serve` prints a command that can be run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gguf_models
import tiny_models
from pcache_core import CausalLM, Segment
from pcache_core.errors import ModelError, OptionError
from pcache_integrations.cli import app
from pcache_integrations.vllm.model_card import ModelCard


def serve(*options: str) -> list[str]:
    result = CliRunner().invoke(app, ["serve", "--model", "builtin:tiny-rag", *options])
    if result.exception is not None:
        raise result.exception
    assert "Writing" not in result.stderr  # no bar where there is no terminal
    return shlex.split(result.stdout)


def test_the_command_names_the_store_and_describes_the_model(
    tiny: CausalLM, tmp_path: Path
) -> None:
    command = serve("--store", str(tmp_path), "--port", "8123", "--", "--max-model-len", "512")
    assert command[-2:] == ["--max-model-len", "512"]
    options = dict(zip(command, command[1:], strict=False))
    assert (options["--port"], options["--dtype"]) == ("8123", "float32")
    assert options["--served-model-name"] == "builtin:tiny-rag"
    assert (Path(options["--model"]) / "config.json").is_file()
    transfer = json.loads(options["--kv-transfer-config"])
    assert transfer["kv_load_failure_policy"] == "recompute"
    extra = transfer["kv_connector_extra_config"]
    assert (extra["store"], extra["namespace"]) == (str(tmp_path), "default")
    assert ModelCard.from_dict(extra["model_card"]).model == tiny.fingerprint


def test_a_folder_is_named_from_the_root_on() -> None:
    command = serve("--store", "states")
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["store"] == str(Path("states").absolute())


def test_a_preamble_of_a_file_goes_to_the_connector(tmp_path: Path) -> None:
    chosen = {"opening": "Look here.\n", "company": ["A text of some length."]}
    file = tmp_path / "preamble.json"
    file.write_text(json.dumps(chosen))
    command = serve("--store", str(tmp_path), "--preamble", str(file))
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["preamble"] == chosen
    file.write_text('["Look here."]')
    with pytest.raises(OptionError, match=r"preamble.json holds no preamble: .*; write"):
        serve("--store", str(tmp_path), "--preamble", str(file))


def test_a_gguf_file_is_written_once_as_a_folder_of_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = gguf_models.write(gguf_models.build("qwen2"), tmp_path / "model.gguf")
    written = []
    for _ in range(2):
        command = serve("--store", str(tmp_path), "--model", str(file), "--dtype", "float32")
        options = dict(zip(command, command[1:], strict=False))
        weights = Path(options["--model"]) / "model.safetensors"
        written.append((weights, weights.stat().st_mtime_ns))
    assert written[0] == written[1]
    packed = CausalLM.from_pretrained(str(file), dtype="float32")
    plain = CausalLM.from_pretrained(options["--model"], dtype="float32")
    transfer = json.loads(options["--kv-transfer-config"])["kv_connector_extra_config"]
    assert transfer["model_card"]["model"] == packed.fingerprint
    assert options["--served-model-name"] == str(file)
    text = packed.text.apply_chat_template([{"role": "user", "content": "Who?"}])
    markup = Segment(text, "literal")
    assert plain.text.ids(markup) == packed.text.ids(markup)
    ids = torch.tensor([packed.text.ids(markup)])
    assert torch.equal(plain.model(ids).logits, packed.model(ids).logits)
    assert plain.text.bos_ids == packed.text.bos_ids
    for name in ("end_ids", "context_length"):
        assert getattr(plain, name) == getattr(packed, name)
    assert list(Path(options["--model"]).parent.iterdir()) == [Path(options["--model"])]


def test_memory_is_no_store_of_another_process() -> None:
    with pytest.raises(OptionError, match="'memory' is no other process's"):
        serve("--store", "memory")


def test_a_model_whose_states_can_not_be_moved_is_refused(tmp_path: Path) -> None:
    tiny_models.build("gpt2").save_pretrained(tmp_path)
    tiny_models.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="vLLM can't be served states of this model"):
        serve("--store", str(tmp_path), "--model", str(tmp_path))


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="/no/python can't be run"):
        serve("--store", "states", "--python", "/no/python", "--run")
