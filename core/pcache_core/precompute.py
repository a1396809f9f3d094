"""Encoding a corpus ahead of time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from pcache_core.encode import Module
from pcache_core.errors import BudgetError, ContextLengthError, PromptError
from pcache_core.key import ModuleKey
from pcache_core.library import ModuleLibrary
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
    for token_ids in modules:
        _check_fits(library, len(anchor_ids), len(token_ids))
    wanted = {library.key(anchor_ids, m, 0): Module(m, len(anchor_ids)) for m in modules}
    missing = {key: module for key, module in wanted.items() if not library.contains(key)}
    tokens = _encode(library, anchor_ids, missing, progress=progress)
    kept = sum(library.contains(key) for key in missing)
    if kept < len(missing):
        logger.warning(
            "the store kept %d of %d states; raise its budget to keep all", kept, len(missing)
        )
    return EncodeReport(
        texts=len(documents),
        encoded=len(missing),
        kept=kept,
        already_stored=len(modules) - len(missing),
        too_short=len(documents) - len(modules),
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
    total = sum(len(module.token_ids) for module in modules.values())
    anchor = library.anchor(anchor_ids) if modules else None
    disable = None if progress else True  # None: only on a terminal
    with tqdm(total=total, desc="encoding", unit="tok", unit_scale=True, disable=disable) as bar:
        for key, _ in library.encode(anchor, modules):
            bar.update(len(key.token_ids))
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


def _check_fits(library: ModuleLibrary, anchor_tokens: int, tokens: int) -> None:
    """Raises: ContextLengthError, BudgetError: the state can never be used, or never be kept."""
    limit = library.lm.context_length
    if limit is not None and anchor_tokens + tokens >= limit:
        raise ContextLengthError(
            f"a text has {tokens} tokens behind an anchor of {anchor_tokens}, {library.lm.name} "
            f"holds {limit}; split it into shorter documents"
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
