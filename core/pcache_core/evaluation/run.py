"""Asking every question in every reuse mode, so that the modes can be compared.

Each request runs in an engine of its own, over the same model and one store for a question's
states, or for those of all questions where they are encoded ahead. No prefix of an earlier request
can serve it then: an engine continues prompts that it has just read, and the second mode to be
asked would look like a prefix cache. So `exact` computes the whole prompt here, which is what it
does for a question that meets its documents for the first time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from tempfile import TemporaryDirectory

import torch

from pcache_core.engine import PromptCacheEngine
from pcache_core.evaluation.prompts import Fitted
from pcache_core.lm import CausalLM
from pcache_core.params import ReuseMode, SamplingParams, StorageDtype
from pcache_core.report import Report
from pcache_core.store import DiskStore, MemoryStore, ModuleStore


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
        nats. gold_nll: mean negative log likelihood of the right answer's tokens, each given the
        prompt and the right tokens before it, in nats. report: of the request that gave the answer.
    """

    answer: str
    kl: float
    gold_nll: float
    report: Report


Outcomes = dict[str, Outcome]
"""One question in every way, by the ways' names."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which all questions are asked.

    params: of the answers. storage_dtype: how files keep the states between being encoded and being
    used; None: they stay in memory as they were encoded. warm: whether all documents are encoded
    ahead, as `engine.encode` does, instead of by the first question that has them.
    """

    params: SamplingParams
    storage_dtype: StorageDtype | None = None
    warm: bool = False


def measure(
    lm: CausalLM,
    asked: Sequence[Fitted],
    ways: Sequence[Way],
    conditions: Conditions,
    answered: Callable[[], object] = lambda: None,
) -> Iterator[Outcomes]:
    """Ask each prompt in every way; yields as they finish, in the prompts' order.

    ways: `BASELINE` among them, each name once. The first prompt is asked once more before,
    uncounted: first calls pay for memory and kernels. The order of the ways changes from prompt to
    prompt, so that none always goes first. answered: called after each answer that counts.
    """
    with _store_for(lm, asked if conditions.warm else (), conditions) as shared:
        if conditions.warm:
            _encode_documents(lm, shared, asked)

        def ask(each: Fitted, order: Sequence[Way], answered: Callable[[], object]) -> Outcomes:
            with _store_for(lm, (each,), conditions) as own:
                store = shared if conditions.warm else own
                return _measure(lm, store, each, order, conditions, answered)

        ask(asked[0], ways, lambda: None)
        for number, each in enumerate(asked):
            turn = number % len(ways)
            yield ask(each, [*ways[turn:], *ways[:turn]], answered)


def _encode_documents(lm: CausalLM, store: ModuleStore, asked: Sequence[Fitted]) -> None:
    """Encode each document of the prompts once."""
    texts = dict.fromkeys(
        segment.text
        for each in asked
        for segment in each.prompt.segments
        if segment.kind == "document"
    )
    PromptCacheEngine(lm, store).encode(list(texts), progress=sys.stderr.isatty())


def _measure(
    lm: CausalLM,
    store: ModuleStore,
    asked: Fitted,
    ways: Sequence[Way],
    conditions: Conditions,
    answered: Callable[[], object],
) -> Outcomes:
    """Logits first, without looking at the clock, which also encodes every state; then answers."""

    def new_engine(way: Way) -> PromptCacheEngine:
        return PromptCacheEngine(lm, store, way.mode, repair=way.repair)

    prompt = asked.prompt
    if conditions.storage_dtype is not None:
        new_engine(_ENCODING).prefill(prompt)  # what is encoded is used without being stored
    read = {way.name: new_engine(way).prefill(prompt, continuation=asked.gold_ids) for way in ways}
    logits = {name: prefill.logits.cpu() for name, prefill in read.items()}
    outcomes = {}
    for way in ways:
        answer = new_engine(way).generate(prompt, conditions.params)
        outcomes[way.name] = Outcome(
            answer=answer.text,
            kl=kl_divergence(logits[BASELINE.name], logits[way.name]),
            gold_nll=-fmean(read[way.name].logprobs),
            report=answer.report,
        )
        answered()
    return outcomes


@contextmanager
def _store_for(
    lm: CausalLM, asked: Sequence[Fitted], conditions: Conditions
) -> Iterator[ModuleStore]:
    """Room for all states of the prompts' parts."""
    if conditions.storage_dtype is not None:
        with TemporaryDirectory(prefix="pcache-eval-") as folder:
            yield DiskStore(folder, storage_dtype=conditions.storage_dtype)
        return
    engine = PromptCacheEngine(lm)
    tokens = sum(len(engine.tokenise(each.prompt).token_ids) for each in asked)
    yield MemoryStore(budget_bytes=max(1, (3 * tokens + 1) * lm.bytes_per_token))


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """KL(reference ‖ other) of two distributions given by logits [vocab], in nats."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (reference, other))
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return max(0.0, float(terms.sum()))  # rounding may bring it just below
