"""Weights that change in place: what was computed before is neither used nor misnamed after that.

The oracle is a model that never had other weights, with an engine and a store of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny_models
from pcache_core import (
    CausalLM,
    DiskStore,
    MemoryStore,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
    TieredStore,
)

DOCUMENTS = ["Ann keeps bees in Oslo on the hill.", "Ben sold a red boat to a friend of hers."]
PROMPT = Prompt(
    [
        Segment("Answer.\n"),
        *(Segment(document, "document") for document in DOCUMENTS),
        Segment("\nWho sold it?"),
    ]
)


class LowRank(nn.Module):
    """A linear layer with adapters, as peft's layers are: they note which adapter acts."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.adapters = nn.ModuleDict(
            {name: nn.Linear(base.in_features, base.out_features, bias=False) for name in "ab"}
        )
        for number, adapter in enumerate(self.adapters.values()):
            nn.init.normal_(adapter.weight, std=0.1 + 0.1 * number)
        self.requires_grad_(False)
        self._active_adapter = ["a"]
        self._disable_adapters = False
        self.scaling = {"a": 1.0, "b": 1.0}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.base_layer(inputs)
        for name in () if self._disable_adapters else self._active_adapter:
            outputs = outputs + self.scaling[name] * self.adapters[name](inputs)
        return outputs


def _layer(model: Any) -> Any:
    return model.model.layers[1].self_attn


def add_adapters(model: Any) -> None:
    _layer(model).v_proj = LowRank(_layer(model).v_proj)


def set_adapter(model: Any) -> None:
    _layer(model).v_proj._active_adapter = ["b"]


def disable_adapters(model: Any) -> None:
    _layer(model).v_proj._disable_adapters = True


def scale_adapter(model: Any) -> None:
    _layer(model).v_proj.scaling["a"] = 3.0


def merge_adapter(model: Any) -> None:
    layer = _layer(model).v_proj
    layer.base_layer.weight.data += layer.adapters["b"].weight.data  # "a" did act
    _layer(model).v_proj = layer.base_layer


def add_in_place(model: Any) -> None:
    with torch.no_grad():
        _layer(model).k_proj.weight.add_(0.2)


def add_to_data(model: Any) -> None:
    _layer(model).k_proj.weight.data += 0.2


def add_to_one_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight.data[5] += 2.0


def give_other_data(model: Any) -> None:
    weight = _layer(model).q_proj.weight
    weight.data = torch.randn_like(weight)


def replace_parameter(model: Any) -> None:
    weight = _layer(model).v_proj.weight
    _layer(model).v_proj.weight = nn.Parameter(torch.randn_like(weight), requires_grad=False)


def replace_module(model: Any) -> None:
    old = _layer(model).o_proj
    _layer(model).o_proj = nn.Linear(old.in_features, old.out_features, bias=False)


def load_weights(model: Any) -> None:
    model.load_state_dict(tiny_models.build("llama", seed=7).state_dict())


def train_a_step(model: Any) -> None:
    model.requires_grad_(True).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor([[5, 9, 100, 40, 77, 23]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    model.requires_grad_(False).eval()


CHANGES = {
    "adapters are added": (None, add_adapters),
    "another adapter is set": (add_adapters, set_adapter),
    "adapters are disabled": (add_adapters, disable_adapters),
    "an adapter is scaled": (add_adapters, scale_adapter),
    "another adapter is merged": (add_adapters, merge_adapter),
    "in place": (None, add_in_place),
    "in place, past the version counter": (None, add_to_data),
    "one number, past the version counter": (None, add_to_one_norm),
    "a parameter has other data": (None, give_other_data),
    "a parameter is replaced": (None, replace_parameter),
    "a module is replaced": (None, replace_module),
    "weights are loaded": (None, load_weights),
    "a training step": (None, train_a_step),
}


def loaded(change: Callable[[Any], None] | None = None) -> CausalLM:
    model = tiny_models.build("llama")
    if change is not None:
        torch.manual_seed(3)
        change(model)
    return CausalLM(model, tiny_models.tiny_tokenizer())


def logits_of_a_copy(lm: CausalLM, mode: Any) -> torch.Tensor:
    """What a model answers that always had these weights."""
    own = CausalLM(copy.deepcopy(lm.model), lm.tokenizer)
    return PromptCacheEngine(own, reuse=mode, repair=8).prefill(PROMPT).logits


@pytest.mark.parametrize(("before", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_after_a_change_a_prompt_has_the_logits_of_the_new_weights(
    before: Any, change: Callable[[Any], None]
) -> None:
    lm = loaded(before)
    engine = PromptCacheEngine(lm)
    old = engine.prefill(PROMPT, "exact").logits
    name = lm.fingerprint
    change(lm.model)
    new = engine.prefill(PROMPT, "exact")
    assert lm.fingerprint != name
    assert (new.logits - old).abs().max() > 0.05, "the change changes nothing: this shows nothing"
    assert new.report.cached_tokens == 0
    torch.testing.assert_close(new.logits, logits_of_a_copy(lm, "off"))
    engine.prefill(Prompt.from_text("Something else."))
    assert engine.prefill(PROMPT, "exact").report.cached_tokens > 0, "nothing is reused any more"


@pytest.mark.parametrize("mode", ["fast", "balanced"])
@pytest.mark.parametrize("change", [add_adapters, add_to_data], ids=["adapters", "data"])
def test_after_a_change_no_state_of_the_old_weights_is_used(
    mode: Any, change: Callable[[Any], None]
) -> None:
    lm = loaded()
    engine = PromptCacheEngine(lm, reuse=mode, repair=8)
    engine.prefill(PROMPT)
    change(lm.model)
    new = engine.prefill(PROMPT)
    assert new.report.encoded_tokens > 0
    torch.testing.assert_close(new.logits, logits_of_a_copy(lm, mode))


@pytest.mark.parametrize(
    ("before", "change"), [(None, add_to_data), (add_adapters, set_adapter)], ids=["data", "set"]
)
def test_states_made_after_a_change_are_not_found_by_a_model_without_it(
    tmp_path: Path, before: Any, change: Callable[[Any], None]
) -> None:
    lm = loaded(before)
    engine = PromptCacheEngine(lm, DiskStore(tmp_path), reuse="fast")
    change(lm.model)
    engine.encode(DOCUMENTS, progress=False)
    other = PromptCacheEngine(loaded(before), DiskStore(tmp_path), reuse="fast")
    found = other.prefill(PROMPT)
    assert found.report.cached_tokens == 0
    torch.testing.assert_close(found.logits, logits_of_a_copy(other.lm, "fast"))
    same = PromptCacheEngine(
        CausalLM(copy.deepcopy(lm.model), lm.tokenizer), DiskStore(tmp_path), reuse="fast"
    )
    assert same.prefill(PROMPT).report.cached_tokens > 0


@pytest.mark.parametrize("forward", range(1, 4))
def test_what_was_encoded_while_weights_changed_is_stored_under_no_name(
    tmp_path: Path, forward: int
) -> None:
    lm = loaded()
    engine = PromptCacheEngine(lm, DiskStore(tmp_path), reuse="fast")
    calls = 0

    def change(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == forward:
            add_to_data(lm.model)

    with lm.model.register_forward_hook(change):
        engine.prefill(PROMPT)
    assert calls >= forward, "it never changed: this shows nothing"
    changed = engine.prefill(PROMPT).logits
    torch.testing.assert_close(changed, logits_of_a_copy(lm, "fast"))
    plain = PromptCacheEngine(loaded(), DiskStore(tmp_path), reuse="fast")
    torch.testing.assert_close(plain.prefill(PROMPT).logits, logits_of_a_copy(plain.lm, "fast"))


def test_a_prompt_asked_for_before_a_change_is_read_with_the_weights_after_it() -> None:
    lm = loaded()
    engine = PromptCacheEngine(lm, reuse="fast")
    engine.prefill(PROMPT)
    asked = engine.stream(PROMPT, SamplingParams(max_tokens=4))
    add_in_place(lm.model)
    answer = [token for chunk in asked for token in chunk.token_ids]
    own = PromptCacheEngine(CausalLM(copy.deepcopy(lm.model), lm.tokenizer), reuse="fast")
    assert tuple(answer) == own.generate(PROMPT, SamplingParams(max_tokens=4)).token_ids


def test_an_answer_that_weights_changed_under_leaves_no_prefix() -> None:
    lm = loaded()
    engine = PromptCacheEngine(lm, reuse="exact")
    running = engine.stream(PROMPT, SamplingParams(max_tokens=8))
    next(running)
    add_to_data(lm.model)
    list(running)
    torch.testing.assert_close(
        engine.prefill(PROMPT).logits, logits_of_a_copy(lm, "exact"), atol=1e-4, rtol=1e-4
    )


def test_states_of_weights_that_come_back_are_found_again() -> None:
    lm = loaded(add_adapters)
    engine = PromptCacheEngine(lm, reuse="fast")
    first = engine.prefill(PROMPT).logits
    name = lm.fingerprint
    set_adapter(lm.model)
    engine.prefill(PROMPT)
    _layer(lm.model).v_proj._active_adapter = ["a"]
    assert lm.fingerprint == name
    again = engine.prefill(PROMPT)
    assert again.report.encoded_tokens == 0
    torch.testing.assert_close(again.logits, first)


def test_a_model_in_training_mode_answers_as_in_evaluation_mode() -> None:
    lm = CausalLM(tiny_models.build("llama", attention_dropout=0.5), tiny_models.tiny_tokenizer())
    lm.model.model.embed_tokens.register_module("noise", nn.Dropout())  # stays in training mode
    engine = PromptCacheEngine(lm, reuse="fast")
    expected = engine.prefill(PROMPT, "off").logits
    lm.model.train()
    lm.model.model.norm.eval()
    torch.testing.assert_close(engine.prefill(PROMPT, "off").logits, expected)
    torch.testing.assert_close(engine.prefill(PROMPT).logits, logits_of_a_copy(lm, "fast"))
    assert lm.model.training
    assert not lm.model.model.norm.training


def test_looking_takes_no_notice_of_what_changes_nothing() -> None:
    lm = loaded()
    engine = PromptCacheEngine(lm, reuse="exact")
    engine.prefill(PROMPT)
    version = lm.weights_version
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([[5, 9, 100]]))
    lm.model.train().eval()
    engine.generate(PROMPT, SamplingParams(max_tokens=4))
    assert lm.weights_version == version
    assert engine.prefill(PROMPT).report.computed_tokens == 1


def test_clear_drops_what_the_engine_has_also_of_weights_before(tmp_path: Path) -> None:
    lm = loaded()
    memory, disk = MemoryStore(), DiskStore(tmp_path)
    engine = PromptCacheEngine(lm, TieredStore([memory, disk]), reuse="fast")
    engine.prefill(PROMPT)
    add_in_place(lm.model)
    engine.encode(DOCUMENTS, progress=False)
    running = engine.stream(PROMPT, SamplingParams(max_tokens=4))
    next(running)
    engine.clear()
    list(running)
    assert memory.stats().nbytes == 0
    assert not list(tmp_path.rglob("*.safetensors"))
    report = engine.prefill(PROMPT).report
    assert report.cached_tokens == 0
    assert report.encoded_tokens > 0
