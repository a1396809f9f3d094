"""Offline encoding: module tokens to states, many in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pcache_core.kv.key import ModuleTokens, RowRange
from pcache_core.kv.sequence import KVBuffers
from pcache_core.kv.state import KVState
from pcache_core.lm import Batch, CausalLM, Span, place

# Activations of more tokens than this fall out of a CPU's cache; a GPU wants more work at once.
_TOKENS_ON_CPU = 1024
_TOKENS_ON_GPU = 8192


def encode_modules(
    lm: CausalLM, preamble: Sequence[KVState], modules: Sequence[ModuleTokens]
) -> Iterator[tuple[ModuleTokens, KVState]]:
    """Encode modules, each seeing its preamble and itself; yields as batches finish.

    preamble: the states of its parts, one after the other from position 0 on; every module's
        `preamble_ids` are its tokens. Its rows are attended to and dropped.

    Modules of similar length share a forward, laid end to end without padding.
    """
    for batch in _batches(lm, modules):
        yield from zip(batch, _encode_batch(lm, preamble, batch), strict=True)


def _batches(lm: CausalLM, modules: Sequence[ModuleTokens]) -> Iterator[list[ModuleTokens]]:
    most = _TOKENS_ON_CPU if lm.device.type == "cpu" else _TOKENS_ON_GPU
    batch: list[ModuleTokens] = []
    tokens = 0
    for module in sorted(modules, key=lambda module: module.num_tokens):
        full = tokens + module.num_tokens > most
        if batch and (full or not lm.encodes_many):
            yield batch
            batch, tokens = [], 0
        batch.append(module)
        tokens += module.num_tokens
    if batch:
        yield batch


def _encode_batch(
    lm: CausalLM, preamble: Sequence[KVState], modules: Sequence[ModuleTokens]
) -> list[KVState]:
    """Encode in one forward: the buffers hold the preamble, then module after module."""
    before = sum(part.num_tokens for part in preamble)
    buffers = lm.new_buffers(before + sum(module.num_tokens for module in modules))
    for part in preamble:
        place(buffers, part.position, part, (None,) * len(lm.layers))
    input_ids: list[int] = []
    positions: list[int] = []
    spans = []
    for module in modules:
        start, stop = len(input_ids), len(input_ids) + module.num_tokens
        spans.append(Span(start, stop, _visible(before, (before + start, before + stop))))
        input_ids.extend(module.passage.token_ids)
        positions.extend(module.passage.positions(module.position))
    rows = range(before, before + len(input_ids))
    lm.forward(Batch(buffers, input_ids, rows, positions, spans))
    return [
        _state(buffers, before + span.start, module)
        for span, module in zip(spans, modules, strict=True)
    ]


def _state(buffers: KVBuffers, start: int, module: ModuleTokens) -> KVState:
    """Copy a module's rows out, without those that only stood in for others."""
    passage = module.passage
    rows = [start + index for index in passage.kept]
    first = passage.positions(module.position)[passage.kept[0]]
    return buffers.state(rows, passage.kept_ids, first)


def _visible(preamble_tokens: int, own: RowRange) -> tuple[RowRange, ...]:
    """Return the module's preamble and its own rows, as few ranges as possible."""
    if preamble_tokens == 0:
        return (own,)
    if own[0] == preamble_tokens:
        return ((0, own[1]),)
    return ((0, preamble_tokens), own)
