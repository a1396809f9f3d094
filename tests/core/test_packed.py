"""Packed linear layers: the same model, as far as anybody can tell. The oracle is the plain one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny_models
from pcache_core import CausalLM, DiskStore, ModelError, Prompt, PromptCacheEngine, Segment
from pcache_core.lm.packed import PackedLinear, pack, packed_layers, unpack
from pcache_core.params import ReuseMode

PROMPT = Prompt(
    [
        Segment("Answer.\n"),
        Segment("Ann keeps bees in Oslo on the hill.", "document"),
        Segment("Ben sold a red boat to a friend of hers.", "document"),
        Segment("\nWho sold it?"),
    ]
)
IDS = torch.tensor([[1, 5, 9, 100, 40, 77, 23, 200, 8]])


def plain(name: str = "llama", **overrides: Any) -> PreTrainedModel:
    model = tiny_models.build(name, **overrides)
    model.bfloat16()
    return model


def packed(name: str = "llama", **overrides: Any) -> CausalLM:
    lm = CausalLM(plain(name, **overrides), tiny_models.tiny_tokenizer())
    lm.pack()
    if not any(packed_layers(lm.model)):
        pytest.skip("this build of torch packs no weights on this machine")
    return lm


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    saved, wanted = found.state_dict(), expected.state_dict()
    assert list(saved) == list(wanted)
    assert all(torch.equal(saved[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_a_packed_model_gives_its_own_logits_and_is_restored_bit_for_bit(name: str) -> None:
    model, untouched = plain(name), plain(name)
    for each in (model, untouched):
        each.get_output_embeddings().requires_grad_(True)
    expected = logits(untouched)
    pack(model)
    assert any(packed_layers(model))
    torch.testing.assert_close(logits(model), expected, atol=0.03, rtol=0.03)
    assert_same_weights(model, untouched)
    assert any(packed_layers(model)), "saving has unpacked it"
    unpack(model)
    assert list(map(type, model.modules())) == list(map(type, untouched.modules()))
    assert_same_weights(model, untouched)
    assert _trainable(model) == _trainable(untouched)
    assert torch.equal(logits(model), expected)


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def test_modes_promise_the_same_of_a_packed_model() -> None:
    lm = packed()
    reference = PromptCacheEngine(CausalLM(plain(), lm.tokenizer), reuse="off")
    expected = reference.prefill(PROMPT).logits
    engine = PromptCacheEngine(lm, repair=1.0)
    modes: tuple[ReuseMode, ...] = ("exact", "exact", "balanced")
    for mode in modes:
        found = engine.prefill(PROMPT, mode).logits
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_packed_and_plain_share_fingerprint_and_states(tmp_path: Path) -> None:
    lm = packed()
    other = CausalLM(plain(), lm.tokenizer)
    assert lm.fingerprint == other.fingerprint
    PromptCacheEngine(other, DiskStore(tmp_path), reuse="fast").prefill(PROMPT)
    report = PromptCacheEngine(lm, DiskStore(tmp_path), reuse="fast").prefill(PROMPT).report
    assert report.encoded_tokens == 0
    assert report.cached_tokens > 0


def test_what_is_loaded_is_packed_and_what_is_handed_over_is_not(tmp_path: Path) -> None:
    lm = packed()
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(stock, plain())
    loaded = CausalLM.from_pretrained(tmp_path)
    assert all(type(layer) is PackedLinear for layer in _linear(loaded.model))
    assert not any(packed_layers(CausalLM(stock, lm.tokenizer).model))
    other = CausalLM.from_pretrained(tmp_path, dtype="float32")
    assert not any(packed_layers(other.model))
    assert loaded.fingerprint == CausalLM(stock, lm.tokenizer).fingerprint


def _linear(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def add_in_place(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.weight.data += 0.2


def replace_parameter(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(torch.full((96, 64), 0.1, dtype=torch.bfloat16))


def add_to_a_bias(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.bias.data += 1.0


def add_to_embeddings(model: Any) -> None:
    model.model.embed_tokens.weight.data[:, :8] *= 2.0


def load_others(model: Any) -> None:
    model.load_state_dict(plain("qwen2", seed=7, tie_word_embeddings=True).state_dict())


def convert(model: Any) -> None:
    model.half().bfloat16()
    add_in_place(model)


@pytest.mark.parametrize(
    "change",
    [add_in_place, replace_parameter, add_to_a_bias, add_to_embeddings, load_others, convert],
)
def test_a_change_of_a_packed_model_is_a_change(change: Callable[[Any], None]) -> None:
    lm, model = packed("qwen2", tie_word_embeddings=True), plain("qwen2", tie_word_embeddings=True)
    engine = PromptCacheEngine(lm, reuse="exact")
    before = engine.prefill(PROMPT).logits
    change(lm.model)
    change(model)
    other = CausalLM(model, lm.tokenizer)
    expected = PromptCacheEngine(other, reuse="off").prefill(PROMPT).logits
    assert (expected - before).abs().max() > 0.2, "the change changes nothing: this shows nothing"
    torch.testing.assert_close(engine.prefill(PROMPT).logits, expected, atol=0.05, rtol=0.05)
    assert lm.fingerprint == other.fingerprint


def test_a_head_that_is_the_embeddings_is_a_copy_and_says_its_bytes() -> None:
    lm = packed(tie_word_embeddings=True)
    assert f"{2 * 64 * tiny_models.VOCAB_SIZE:,} bytes" in repr(lm)
    embeddings: Any = lm.model.get_input_embeddings()
    head: Any = lm.model.get_output_embeddings()
    assert head.weight is embeddings.weight
    assert "bytes" not in repr(packed())
    assert "packed" not in repr(CausalLM(plain(), lm.tokenizer))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_plain_model(again: Callable[[Any], Any]) -> None:
    model = packed(tie_word_embeddings=True).model
    other = again(model)
    assert any(packed_layers(model))
    assert not any(packed_layers(other))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert_same_weights(other, plain(tie_word_embeddings=True))


def test_training_a_packed_model_is_refused() -> None:
    model = packed().model.requires_grad_(True)
    with pytest.raises(ModelError, match=r"unpack\(\)"):
        model(IDS, labels=IDS).loss.backward()
