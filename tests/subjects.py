"""Models under test and prompts to test them with, for tests that compare with the oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

import oracle
import tiny_models
from pcache_core import CausalLM, Preamble, Prefill, Prompt, PromptCacheEngine, Segment

TOLERANCE = 1e-4
VISIBLE_DIFFERENCE = 1e-2

POSITION_FREE = ["falcon/alibi", "mpt", "bloom"]
FIXED = ["gpt2", "gpt_bigcode", "gpt_neo", "opt", "biogpt"]
TOO_LONG = ["llama/dynamic-beyond", "phi3/longrope-beyond"]  # relocatable in shorter prompts
EXACT_ONLY = ["ministral3", "llama4"]
NO_CACHE = ["deepseek_v32", "mamba", "mamba2", "jamba", "qwen3_next", "lfm2", "bamba"]
VERDICTS = {
    **dict.fromkeys(tiny_models.ARCHITECTURES, "relocatable"),
    **dict.fromkeys(POSITION_FREE, "position-free"),
    **dict.fromkeys(FIXED, "fixed-positions"),
    **dict.fromkeys(EXACT_ONLY, "exact-only"),
    **dict.fromkeys(NO_CACHE, "no-cache"),
}
# Models that run through their own attention, run by run.
SEQUENTIAL = {
    # attention is not called through transformers' AttentionInterface
    *("gptj", "codegen", "falcon/rotary", "falcon/rotary-grouped", "falcon/alibi", "mpt", "bloom"),
    # the caller's arguments do not reach the attention function
    *("stablelm", "nemotron"),
    # layers that share states compute the last token only; windows are not in the cache's layers
    *("gemma4", "gpt_neo"),
    # fixed chunks of the context
    "llama4",
}
REUSING = [name for name in VERDICTS if name not in (*TOO_LONG, *EXACT_ONLY, *NO_CACHE)]
DIVERSE = ["llama", "gemma3", "deepseek_v3", "gpt_oss", "mixtral", "gpt_neox", "mpt", "gpt2"]

# Short: a preamble takes an eighth of the context at most.
PREAMBLE = ("Read.\n", ("Tea is warm.",))
OPENING = Segment("Answer from the notes.\n", "literal")
BEES = Segment("Ann keeps bees in Oslo.", "document", name="bees")
BOAT = Segment("Ben sold a red boat.", "document", name="boat")
MILL = Segment("The mill by the lake burned.", "document", name="mill")
SHORT = Segment("Yes.", "document", name="short")  # fewer tokens than a module needs
MODULES = ("bees", "boat", "mill")
FIRST = Prompt([OPENING, BEES, Segment("\n\n"), MILL, SHORT, BOAT, Segment("\nWho? A:")])
SECOND = Prompt(
    [
        OPENING,
        Segment("Old: ", "text"),
        BOAT,
        Segment("\nbut ", "argument"),
        MILL,
        SHORT,
        Segment("\n--\n", "literal"),
        BEES,
        Segment("\nQ? A:", "text"),
    ]
)
LONGER = Prompt([*FIRST.segments, Segment(" Ann.\nWhere? A:")])
# No opening, documents side by side, one of them twice, and one that ends the prompt: the last
# token is always computed, so that one is too.
LAST = Segment("Di left it.", "document", name="last")
CROWDED = Prompt([BOAT, BEES, BOAT, Segment("; "), LAST])


@dataclass(frozen=True)
class Subject:
    """A model under test; `twin` is a fresh unmodified copy, which only the oracle runs."""

    name: str
    seed: int
    lm: CausalLM

    def engine(self) -> PromptCacheEngine:
        """A new one for every test, so that none continues another's buffers."""
        return PromptCacheEngine(self.lm, reuse="fast", preamble=Preamble(*PREAMBLE))

    def twin(self) -> PreTrainedModel:
        return tiny_models.build(self.name, seed=self.seed)

    def rows(self, prompt: Prompt, repaired: Collection[int] = ()) -> oracle.Rows:
        encoded = "in place" if self.name in FIXED else "anywhere"
        return oracle.lay_out(
            self.lm.tokenizer, prompt, preamble=PREAMBLE, encoded=encoded, repaired=repaired
        )

    def expected(self, prompt: Prompt, repaired: Collection[int] = ()) -> torch.Tensor:
        """Logits of one masked forward."""
        return oracle.next_logits(self.twin(), self.rows(prompt, repaired))


def make_subject(name: str, seed: int, tiny_lm: Callable[..., CausalLM]) -> Subject:
    if name in EXACT_ONLY or name in NO_CACHE:
        warned = pytest.warns(UserWarning, match="documents can't be reused")
    else:
        warned = contextlib.nullcontext()
    with warned:
        return Subject(name, seed, tiny_lm(name, seed=seed))


def error(prefill: Prefill, expected: torch.Tensor) -> float:
    return float((prefill.logits - expected).abs().max())


def module_tokens(subject: Subject) -> int:
    return sum(subject.lm.count_tokens(document.text) for document in (BEES, BOAT, MILL))
