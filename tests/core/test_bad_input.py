"""What bad input gets: one clear error that says what, got, limit and remedy, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

import pcache_core
from pcache_core import (
    BudgetError,
    CausalLM,
    ChatTemplateError,
    ContextLengthError,
    MemoryStore,
    Message,
    ModelError,
    OptionError,
    Prompt,
    PromptCacheEngine,
    PromptCacheError,
    PromptError,
    Segment,
)

BUILTIN = Path(pcache_core.__file__).parent / "models" / "tiny-rag"


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.fixture
def engine(llama: CausalLM) -> PromptCacheEngine:
    return PromptCacheEngine(llama)


def copy_of_builtin(target: Path, *without: str) -> Path:
    """The built-in model's directory, less some files."""
    target.mkdir()
    for file in BUILTIN.iterdir():
        if file.name not in without:
            shutil.copy(file, target)
    return target


@pytest.mark.parametrize(
    "name", ["builtin:nothing", "builtin:", "builtin:../tiny-rag", "/no/such/folder", "", "no-such"]
)
def test_an_unknown_model_is_an_error_that_names_the_built_in_one(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        CausalLM.from_pretrained(name)
    assert repr(name) in str(caught.value)
    assert "builtin:tiny-rag" in str(caught.value) or "folder" in str(caught.value)


def test_a_directory_without_weights_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = copy_of_builtin(tmp_path / "m", "model.safetensors")
    with pytest.raises(ModelError, match=r"no weights \(\*\.safetensors\)"):
        CausalLM.from_pretrained(str(folder))


def test_a_directory_without_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        CausalLM.from_pretrained(str(tmp_path))


def test_a_directory_without_tokenizer_is_an_error_that_says_so(tmp_path: Path) -> None:
    folder = copy_of_builtin(tmp_path / "m", "tokenizer.json", "tokenizer_config.json")
    with pytest.raises(ModelError, match="no tokenizer"):
        CausalLM.from_pretrained(str(folder))


def test_truncated_weights_are_a_model_error(tmp_path: Path) -> None:
    folder = copy_of_builtin(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be loaded"):
        CausalLM.from_pretrained(str(folder))


def test_a_configuration_of_no_known_model_is_a_model_error(tmp_path: Path) -> None:
    folder = copy_of_builtin(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "never-heard-of"}))
    with pytest.raises(ModelError):
        CausalLM.from_pretrained(str(folder))


@pytest.mark.parametrize(
    "option", [{"dtype": "float8"}, {"device": "abacus"}, {"device": "cuda:0"}]
)
def test_an_unknown_dtype_or_device_is_an_error(option: dict[str, str]) -> None:
    with pytest.raises(OptionError):
        CausalLM.from_pretrained("builtin:tiny-rag", **option)


def test_objects_that_are_no_model_and_tokenizer_are_refused(llama: CausalLM) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        CausalLM(llama.model, None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="causal language model"):
        CausalLM("gpt2", llama.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="causal language model"):
        CausalLM(llama.model.model, llama.tokenizer)


def test_a_prompt_over_the_context_is_an_error_before_any_work(engine: PromptCacheEngine) -> None:
    prompt = Prompt([Segment("word " * 3000, "document"), Segment("?")])
    for call in (engine.prefill, engine.generate, engine.stream):
        with pytest.raises(ContextLengthError, match=r"has \d+ tokens, .* holds 512"):
            call(prompt)
    assert engine.store.stats().states == 0
    assert not engine.reports


@pytest.mark.parametrize("prompt", ["flat", None, [Segment("x")]])
def test_what_is_no_prompt_is_refused(engine: PromptCacheEngine, prompt: object) -> None:
    with pytest.raises(PromptError, match="from_text"):
        engine.generate(prompt)  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match="empty"):
        Prompt.from_text("")


@pytest.mark.parametrize("mode", ["turbo", "", "FAST", 3])
def test_an_unknown_reuse_mode_is_refused(engine: PromptCacheEngine, mode: object) -> None:
    with pytest.raises(OptionError, match="unknown reuse mode"):
        PromptCacheEngine(engine.lm, reuse=mode)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown reuse mode"):
        engine.generate(Prompt.from_text("x"), reuse=mode)  # type: ignore[arg-type]


def test_a_budget_smaller_than_one_state_is_an_error_that_says_what_is_needed(
    llama: CausalLM,
) -> None:
    needed = llama.bytes_per_token
    with pytest.raises(BudgetError, match=f"{needed:,} bytes"):
        PromptCacheEngine(llama, MemoryStore(budget_bytes=needed - 1))


def test_a_text_whose_state_exceeds_the_budget_is_an_error_before_any_work(
    llama: CausalLM,
) -> None:
    engine = PromptCacheEngine(llama, MemoryStore(budget_bytes=12 * llama.bytes_per_token))
    with pytest.raises(BudgetError, match="raise budget_bytes"):
        engine.encode(["0123456789", "x" * 100], progress=False)
    assert engine.store.stats().states == 0


def test_a_text_over_the_context_is_refused_before_any_work(engine: PromptCacheEngine) -> None:
    with pytest.raises(ContextLengthError, match="split it"):
        engine.encode(["0123456789", "x " * 600], progress=False)
    assert engine.store.stats().states == 0


@pytest.mark.parametrize("texts", ["one string", [None], [b"bytes"]])
def test_texts_that_are_no_list_of_strings_are_refused(
    engine: PromptCacheEngine, texts: object
) -> None:
    with pytest.raises(PromptError):
        engine.encode(texts, progress=False)  # type: ignore[arg-type]


def test_a_chat_for_a_model_without_template_is_an_error(engine: PromptCacheEngine) -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        engine.prompt_from_chat([Message("user", [Segment("hi", "argument")])])


def test_every_error_is_one_of_ours() -> None:
    for name in pcache_core.__all__:
        value = getattr(pcache_core, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, PromptCacheError)


def test_half_a_surrogate_pair_is_a_prompt_error(engine: PromptCacheEngine) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        Segment("bad \ud800 text", "document")
    with pytest.raises(PromptError, match="surrogate"):
        engine.encode(["bad \ud800 text"], progress=False)


def test_a_token_beyond_the_embeddings_is_an_error_before_any_work(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    lm = tiny_lm("llama")
    lm.tokenizer.add_tokens(["ZZZZ"])
    engine = PromptCacheEngine(lm)
    with pytest.raises(ModelError, match="embeddings for 288"):
        engine.generate(Prompt.from_text("a ZZZZ b"))
    with pytest.raises(ModelError, match="embeddings for 288"):
        engine.encode(["a ZZZZ b, and then some more"], progress=False)


def test_an_encoder_decoder_is_refused(llama: CausalLM) -> None:
    config = transformers.T5Config(
        vocab_size=288, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ModelError, match="causal language model"):
        CausalLM(model, llama.tokenizer)


@pytest.mark.parametrize(
    "options", [{"store": "memory"}, {"min_module_tokens": "8"}, {"min_module_tokens": 0}]
)
def test_an_engine_of_other_parts_is_refused(llama: CausalLM, options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        PromptCacheEngine(llama, **options)  # type: ignore[arg-type]


def test_parameters_that_are_no_sampling_params_are_refused(engine: PromptCacheEngine) -> None:
    with pytest.raises(OptionError, match="SamplingParams"):
        engine.generate(Prompt.from_text("x"), {"max_tokens": 3})  # type: ignore[arg-type]


def test_a_message_of_bare_text_is_refused() -> None:
    with pytest.raises(PromptError, match="segments"):
        Message("user", "hello")  # type: ignore[arg-type]
