"""Asking every question in every reuse mode, so that the modes can be compared.

Each request runs in an engine of its own, over the same model and one store for a question's
states. No slot of an earlier request can serve it then: an engine continues prompts that it has
just read, and the second mode to be asked would look like a prefix cache. So `exact` computes the
whole prompt here, which is what it does for a question that meets its documents for the first time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch

from pcache_core.engine import PromptCacheEngine
from pcache_core.lm import CausalLM
from pcache_core.params import ReuseMode, SamplingParams
from pcache_core.prompt import Prompt
from pcache_core.report import Report
from pcache_core.store import DiskStore, MemoryStore, ModuleStore
from pcache_core.store.record import StorageDtype


@dataclass(frozen=True, slots=True)
class Way:
    """How to ask: a reuse mode, with a repair of its own or the mode's."""

    name: str
    mode: ReuseMode
    repair: float | None = None


BASELINE = Way("off", "off")
_ENCODING = Way("fast", "fast")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question asked in one way.

    kl: of the distribution of the token after the prompt from that of `off`, KL(off ‖ way), in
        nats. report: of the request that gave the answer.
    """

    answer: str
    kl: float
    report: Report


Outcomes = dict[str, Outcome]
"""One question in every way, by the ways' names."""


def measure(
    lm: CausalLM,
    prompts: Sequence[Prompt],
    ways: Sequence[Way],
    params: SamplingParams,
    storage_dtype: StorageDtype | None = None,
) -> Iterator[Outcomes]:
    """Ask each prompt in every way; yields as they finish, in the prompts' order.

    ways: `BASELINE` among them, each name once. The first prompt is asked once more before,
    uncounted: first calls pay for memory and kernels. The order of the ways changes from prompt to
    prompt, so that none always goes first.

    storage_dtype: how files keep the states between being encoded and being used; None: they stay
        in memory as they were encoded.
    """
    _measure(lm, prompts[0], ways, params, storage_dtype)
    for number, prompt in enumerate(prompts):
        turn = number % len(ways)
        yield _measure(lm, prompt, [*ways[turn:], *ways[:turn]], params, storage_dtype)


def _measure(
    lm: CausalLM,
    prompt: Prompt,
    ways: Sequence[Way],
    params: SamplingParams,
    storage_dtype: StorageDtype | None,
) -> Outcomes:
    """Logits first, without looking at the clock, which also encodes every state; then answers."""
    with _store_for(lm, prompt, storage_dtype) as store:

        def new_engine(way: Way) -> PromptCacheEngine:
            return PromptCacheEngine(lm, store, way.mode, repair=way.repair)

        if storage_dtype is not None:
            new_engine(_ENCODING).prefill(prompt)  # what is encoded is used without being stored
        logits = {way.name: new_engine(way).prefill(prompt).logits.cpu() for way in ways}
        outcomes = {}
        for way in ways:
            answer = new_engine(way).generate(prompt, params)
            kl = kl_divergence(logits[BASELINE.name], logits[way.name])
            outcomes[way.name] = Outcome(answer.text, kl, answer.report)
        return outcomes


@contextmanager
def _store_for(
    lm: CausalLM, prompt: Prompt, storage_dtype: StorageDtype | None
) -> Iterator[ModuleStore]:
    """Room for all states of the prompt's parts."""
    if storage_dtype is not None:
        with TemporaryDirectory(prefix="pcache-eval-") as folder:
            yield DiskStore(folder, storage_dtype=storage_dtype)
        return
    tokens = len(PromptCacheEngine(lm).tokenise(prompt).token_ids)
    yield MemoryStore(budget_bytes=max(1, 3 * tokens * lm.bytes_per_token))


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """KL(reference ‖ other) of two distributions given by logits [vocab], in nats."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (reference, other))
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return max(0.0, float(terms.sum()))  # rounding may bring it just below
