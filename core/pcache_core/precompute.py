"""Encoding a corpus ahead of time, and dropping what was encoded."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from pcache_core.errors import BudgetError, ContextLengthError, PromptError
from pcache_core.kv.key import ModuleTokens
from pcache_core.library.states import ModuleLibrary
from pcache_core.plan import opening_module, passages_of
from pcache_core.prompt import Passage, Segment, TokenisedPrompt
from pcache_core.report import EncodeReport, ForgetReport

logger = logging.getLogger(__name__)

T = TypeVar("T")


def precompute(
    library: ModuleLibrary, texts: Sequence[str], min_module_tokens: int, *, progress: bool
) -> EncodeReport:
    """Encode the texts that the store doesn't have; see `PromptCacheEngine.encode`."""
    started = time.perf_counter()
    lm = library.lm
    library.follow_weights()
    texts = _checked(texts, "encode")
    if lm.support.kind not in ("relocatable", "position-free"):
        return _nothing(len(texts), started, lm.support.reason)
    wanted: dict[Passage, list[ModuleTokens]] = {}
    too_short = 0
    for text in texts:
        passage = Passage(tuple(lm.text.ids(Segment(text, "document"))))
        lm.check_ids(passage.token_ids)
        if len(passage.token_ids) < min_module_tokens:
            too_short += 1
        elif passage not in wanted:
            wanted[passage] = _fitting(library, passage, text, 0)
    return _encode_missing(library, wanted, len(texts), too_short, started, progress=progress)


def precompute_units(
    library: ModuleLibrary,
    prompts: Iterable[TokenisedPrompt],
    min_module_tokens: int,
    *,
    progress: bool,
) -> EncodeReport:
    """Encode the units of a schema's prompts; see `PromptCacheEngine.encode_schema`."""
    started = time.perf_counter()
    library.follow_weights()
    wanted: dict[tuple[Passage, int], list[ModuleTokens]] = {}
    short: set[Passage] = set()
    openings: set[ModuleTokens] = set()
    for tokens in prompts:
        opening = opening_module(tokens, min_module_tokens)
        openings |= {opening} if opening is not None else set()
        for passage, text, position in passages_of(tokens):
            if len(passage.kept_ids) < min_module_tokens:
                short.add(passage)
            elif library.lm.support.reuses_modules:
                modules = _fitting(library, passage, text, position)
                wanted[passage, modules[0].position] = modules
            else:
                wanted[passage, 0] = []
    if not library.lm.support.reuses_modules:
        return _nothing(len(wanted) + len(short), started, library.lm.support.reason)
    constant = {opening: [opening] for opening in openings}
    _encode_missing(library, constant, 0, 0, started, progress=False)
    texts = len(wanted) + len(short)
    return _encode_missing(library, wanted, texts, len(short), started, progress=progress)


def forget(library: ModuleLibrary, texts: Iterable[str]) -> ForgetReport:
    """Drop the states of texts; see `PromptCacheEngine.forget`."""
    different = {text for text in _checked(texts, "forget") if text}
    before = library.nbytes
    by_ids = {tuple(library.lm.text.ids(Segment(t, "document"))): t for t in different}
    dropped = library.drop({ids: text for ids, text in by_ids.items() if ids})
    return ForgetReport(len(different), dropped, max(0, before - library.nbytes))


def _encode_missing(
    library: ModuleLibrary,
    wanted: Mapping[T, Sequence[ModuleTokens]],
    texts: int,
    too_short: int,
    started: float,
    *,
    progress: bool,
) -> EncodeReport:
    """Encode what the store doesn't have; counts are of texts, each with all of its states.

    texts, too_short, started: for the report.
    """
    keys = {text: [library.key(module) for module in wanted[text]] for text in wanted}
    modules = {
        key: module
        for text in wanted
        for key, module in zip(keys[text], wanted[text], strict=True)
        if not library.contains(key)
    }
    total = sum(module.num_tokens for module in modules.values())
    disable = None if progress else True  # None: only on a terminal
    with (
        torch.inference_mode(mode=False),
        tqdm(total=total, desc="encoding", unit="tok", unit_scale=True, disable=disable) as bar,
    ):
        for key, *_ in library.encode(modules):
            bar.update(modules[key].num_tokens)
    encoded = [text for text in wanted if any(key in modules for key in keys[text])]
    kept = sum(all(map(library.contains, keys[text])) for text in encoded)
    if kept < len(encoded):
        logger.warning(
            "the store kept the states of %d of %d texts; raise its budget to keep all",
            kept,
            len(encoded),
        )
    stored = texts - too_short - len(encoded)
    seconds = time.perf_counter() - started
    return EncodeReport(texts, len(encoded), kept, stored, too_short, total, seconds)


def _checked(texts: Iterable[str], name: str) -> list[str]:
    """Raises: PromptError: one string, or something else than strings."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise PromptError(f"{name} takes a list of texts, got {type(texts).__name__}")
    found = list(texts)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise PromptError(f"texts[{index}] must be str, got {type(text).__name__}")
    return found


def _fitting(
    library: ModuleLibrary, passage: Passage, text: str, position: int
) -> list[ModuleTokens]:
    """Return the states that prompts may want of a passage.

    Raises: ContextLengthError, BudgetError: none can ever be used, or one can never be kept.
    """
    modules = library.modules(passage, text, position)
    if not modules:
        raise ContextLengthError(
            f"a text has {passage.extent} tokens, which don't fit after a preamble of "
            f"{len(library.preambles.opening)} into what {library.lm.name} reads at once "
            f"({library.lm.context_length} tokens); split it into shorter documents"
        )
    budget = library.budget_bytes
    needed = len(passage.kept_ids) * library.lm.bytes_per_token
    if budget is not None and needed > budget:
        raise BudgetError(
            f"the state of a text of {len(passage.kept_ids)} tokens takes {needed:,} bytes, the "
            f"store's budget is {budget:,}; raise budget_bytes or split the text"
        )
    return modules


def _nothing(texts: int, started: float, reason: str | None) -> EncodeReport:
    return EncodeReport(texts, 0, 0, 0, 0, 0, time.perf_counter() - started, reason)
