"""Encoding a corpus ahead of time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from tqdm import tqdm

from pcache_core.encode import Module
from pcache_core.errors import BudgetError, ContextLengthError, PromptError
from pcache_core.key import ModuleKey
from pcache_core.library import ModuleLibrary
from pcache_core.passage import Passage
from pcache_core.plan import TokenisedPrompt
from pcache_core.prompt import Segment
from pcache_core.report import EncodeReport

logger = logging.getLogger(__name__)


def precompute(
    library: ModuleLibrary,
    texts: Sequence[str],
    *,
    anchor: str,
    min_module_tokens: int,
    progress: bool,
) -> EncodeReport:
    """Encode the texts that the store doesn't have; see `PromptCacheEngine.encode`."""
    started = time.perf_counter()
    lm = library.lm
    documents = [_document(text) for text in _checked(texts)]
    if lm.support.kind not in ("relocatable", "position-free"):
        reason = lm.support.reason
        return EncodeReport(len(documents), 0, 0, 0, 0, 0, _since(started), reason)
    anchor_ids = lm.text.bos_ids + (lm.text.ids(Segment(anchor, "literal")) if anchor else ())
    ids = [lm.text.ids(document) for document in documents if document is not None]
    modules = [token_ids for token_ids in ids if len(token_ids) >= min_module_tokens]
    lm.check_ids((*anchor_ids, *(token_id for m in modules for token_id in m)))
    passages = [Passage(token_ids) for token_ids in modules]
    for passage in passages:
        _check_fits(library, len(anchor_ids), passage)
    wanted = {library.key(anchor_ids, p, 0): Module(p, len(anchor_ids)) for p in passages}
    report = _encode_missing(library, anchor_ids, wanted, progress=progress)
    return replace(
        report,
        texts=len(documents),
        already_stored=len(modules) - report.encoded,
        too_short=len(documents) - len(modules),
        seconds=_since(started),
    )


def precompute_units(
    library: ModuleLibrary,
    prompts: Iterable[TokenisedPrompt],
    *,
    min_module_tokens: int,
    progress: bool,
) -> EncodeReport:
    """Encode the units of a schema's prompts; see `PromptCacheEngine.encode_schema`."""
    started = time.perf_counter()
    by_anchor: dict[tuple[int, ...], dict[ModuleKey, Module]] = {}
    short: set[ModuleKey] = set()
    for tokens in prompts:
        anchor_ids, passages = tokens.anchor_ids, tokens.units or ()
        for unit in passages:
            passage, position = unit.passage, unit.position
            key = library.key(anchor_ids, passage, position)
            if len(passage.kept_ids) < min_module_tokens:
                short.add(key)
                continue
            _check_fits(library, len(anchor_ids), passage)
            encoded_at = library.encoding_position(len(anchor_ids), position)
            by_anchor.setdefault(anchor_ids, {})[key] = Module(passage, encoded_at)
    if not library.lm.support.reuses_modules:
        texts = sum(map(len, by_anchor.values())) + len(short)
        reason = library.lm.support.reason
        return EncodeReport(texts, 0, 0, 0, 0, 0, _since(started), reason)
    reports = [
        _encode_missing(library, anchor_ids, modules, progress=progress)
        for anchor_ids, modules in by_anchor.items()
    ]
    return EncodeReport(
        texts=sum(report.texts for report in reports) + len(short),
        encoded=sum(report.encoded for report in reports),
        kept=sum(report.kept for report in reports),
        already_stored=sum(report.already_stored for report in reports),
        too_short=len(short),
        tokens=sum(report.tokens for report in reports),
        seconds=_since(started),
    )


def _encode_missing(
    library: ModuleLibrary,
    anchor_ids: tuple[int, ...],
    wanted: dict[ModuleKey, Module],
    *,
    progress: bool,
) -> EncodeReport:
    """Encode the modules that the store doesn't have."""
    started = time.perf_counter()
    missing = {key: module for key, module in wanted.items() if not library.contains(key)}
    tokens = _encode(library, anchor_ids, missing, progress=progress)
    kept = sum(library.contains(key) for key in missing)
    if kept < len(missing):
        logger.warning(
            "the store kept %d of %d states; raise its budget to keep all", kept, len(missing)
        )
    return EncodeReport(
        texts=len(wanted),
        encoded=len(missing),
        kept=kept,
        already_stored=len(wanted) - len(missing),
        too_short=0,
        tokens=tokens,
        seconds=_since(started),
    )


def _encode(
    library: ModuleLibrary,
    anchor_ids: tuple[int, ...],
    modules: dict[ModuleKey, Module],
    *,
    progress: bool,
) -> int:
    """Encode with a bar that vanishes when the output is not a terminal; returns the tokens."""
    total = sum(module.num_tokens for module in modules.values())
    anchor = library.anchor(anchor_ids) if modules else None
    disable = None if progress else True  # None: only on a terminal
    with tqdm(total=total, desc="encoding", unit="tok", unit_scale=True, disable=disable) as bar:
        for key, _ in library.encode(anchor, modules):
            bar.update(modules[key].num_tokens)
    return total


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise PromptError(f"encode takes a list of texts, got {type(texts).__name__}")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"texts[{index}] must be str, got {type(text).__name__}")
    return texts


def _document(text: str) -> Segment | None:
    return Segment(text, "document") if text else None


def _check_fits(library: ModuleLibrary, anchor_tokens: int, passage: Passage) -> None:
    """Raises: ContextLengthError, BudgetError: the state can never be used, or never be kept."""
    limit = library.lm.context_length
    tokens = len(passage.kept_ids)
    if limit is not None and anchor_tokens + passage.extent >= limit:
        raise ContextLengthError(
            f"a text has {passage.extent} tokens behind an anchor of {anchor_tokens}, "
            f"{library.lm.name} holds {limit}; split it into shorter documents"
        )
    budget = library.budget_bytes
    needed = tokens * library.lm.bytes_per_token
    if budget is not None and needed > budget:
        raise BudgetError(
            f"the state of a text of {tokens} tokens takes {needed:,} bytes, the store's budget "
            f"is {budget:,}; raise budget_bytes or split the text"
        )


def _since(started: float) -> float:
    return time.perf_counter() - started
