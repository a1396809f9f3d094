"""The paper's use cases: their schemas and prompts give what one masked forward gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import schema_oracle
import tiny_models
from pcache_core import CausalLM, PMLError, Preamble, PromptCacheEngine
from pcache_core.lm.loading import resolve
from pcache_core.pml import Positions
from pcache_templates.use_cases import NAMES, render
from schema_oracle import SchemaOracle
from subjects import PREAMBLE

if TYPE_CHECKING:
    from types import ModuleType

EXAMPLES = Path(__file__).parent.parent / "examples" / "use_cases"
TOLERANCE = 1e-4
VISIBLE_DIFFERENCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def _examples_can_be_imported() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """That of the built-in model, without its chat template: messages follow each other bare."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(resolve("builtin:tiny-rag")))
    tokenizer.chat_template = None
    return tokenizer


def random_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        tiny_models.excite(model, seed=0)
    return model.requires_grad_(False)


def case_of(name: str) -> Any:
    module: ModuleType = __import__(name)
    return module.CASE


@pytest.mark.parametrize("positions", ["schema", "compact"])
@pytest.mark.parametrize("name", NAMES)
def test_schema_and_prompts_give_the_logits_of_one_masked_forward(
    name: str, positions: Positions, tokenizer: PreTrainedTokenizerFast
) -> None:
    case = case_of(name)
    model = random_model(tokenizer)
    lm = CausalLM(model, tokenizer)
    # Two, as what was computed in full would serve the next prompt instead of states.
    engine, other = (
        PromptCacheEngine(lm, reuse="fast", preamble=Preamble(*PREAMBLE)) for _ in "ab"
    )
    other.add_schema(case.schema, src_root=case.src_root)
    schema = engine.add_schema(case.schema, src_root=case.src_root)
    assert engine.encode_schema(schema, progress=False).encoded >= 5
    oracle = SchemaOracle(case.schema, tokenizer, preamble=PREAMBLE, src_root=case.src_root)
    for pml in case.prompts[:2]:
        prompt = engine.prompt_from_pml(pml, positions=positions)
        prefill = engine.prefill(prompt)
        assert prefill.report.encoded_tokens == 0
        assert prefill.report.cached_share > 0.8
        expected = schema_oracle.next_logits(model, oracle.rows(pml, positions))
        plain = schema_oracle.next_logits(model, oracle.plain(pml, positions))
        assert float((prefill.logits - expected).abs().max()) < TOLERANCE
        assert float((plain - expected).abs().max()) > VISIBLE_DIFFERENCE
        repaired = other.prefill(prompt, reuse="balanced", repair=1.0)
        assert float((repaired.logits - plain).abs().max()) < TOLERANCE


@pytest.mark.parametrize("positions", ["schema", "compact"])
@pytest.mark.parametrize("name", NAMES)
def test_the_example_prints_the_papers_figures_beside_its_own(
    name: str, positions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = case_of(name)
    import measure

    threads = torch.get_num_threads()
    arguments = f"--model builtin:tiny-rag --rounds 1 --positions {positions} --dtype float32"
    measure.main(case, [*arguments.split(), "--threads", str(threads)])
    shown = capsys.readouterr().out
    assert "builtin:tiny-rag, 3.5M parameters, float32" in shown
    for figure in (*case.paper_gpu_ms, *case.paper_cpu_ms):
        assert f" {figure:.0f} " in shown
    assert "here, balanced" in shown
    assert "fallback" not in shown


def test_a_code_base_reads_as_its_files_one_after_the_other(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    files = {"a.py": "if a < 1 and b:\n    pass\n", "sub/b.py": "x = '<eos></module>'\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    engine = PromptCacheEngine(CausalLM(random_model(tokenizer), tokenizer))
    engine.add_schema(render("code_generation", files=list(files)), src_root=tmp_path)
    prompt = engine.prompt_from_pml(
        "<prompt schema='code-generation'><a.py/><sub.b.py/>Go.</prompt>"
    )
    assert prompt.text.endswith("The files: " + "".join(files.values()) + "Go.")
    with pytest.raises(PMLError, match="src= is off"):
        engine.add_schema(render("code_generation", files=list(files)))


def test_unknown_use_cases_are_refused() -> None:
    with pytest.raises(ValueError, match="use one of code_generation, personalisation"):
        render("poetry")
