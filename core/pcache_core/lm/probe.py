"""What can this loaded model do? Found out by running it, never guessed from its class.

The checks, each against the model's own plain forward or against encoding elsewhere:
1. rows per token: every layer caches keys and values (structure), and their shapes;
2. native: a prompt run through buffers, with the middle filled last, gives the model's own logits;
3. position: layer 0, which knows no context, sees a token's position and nothing else;
4. fit: one rotation a layer explains encoding at another position, near and at the far end;
5. lend: two requests that share a state where it lies get the logits of those with copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from pcache_core.kv.sequence import KVBuffers, Loan
from pcache_core.kv.state import KVState, LayerShape, stack_layers
from pcache_core.lm.batch import Batch
from pcache_core.lm.forward import Forward, ModelCall, RaggedForward, SequentialForward, fill
from pcache_core.lm.relocation import (
    Rotations,
    fit,
    misfit,
    place,
    relative_error,
    rotary_frequencies,
)
from pcache_core.lm.structure import (
    CacheStructure,
    cache_structure,
    context_length,
    has_window,
    stable_length,
    text_config,
)

SupportKind = Literal["relocatable", "position-free", "fixed-positions", "exact-only", "no-cache"]

_TOKENS = 12
_SHIFT = 29
_LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, slots=True, eq=False)
class Support:
    """What the load-time self-test found.

    kind: `relocatable`: states move anywhere (rotary embeddings). `position-free`: states don't
        depend on positions (ALiBi). `fixed-positions`: states are good at the position they were
        encoded at (learned embeddings). `exact-only`: only prefixes are reused. `no-cache`:
        nothing is reused.
    reason: why not more, in words for the user; empty for `relocatable` and `position-free`.
    layers: shapes of what each caching layer keeps; empty for `no-cache`.
    rotations: one for each caching layer; None unless states can be moved.
    forward: how the model is run over buffers; None for `no-cache`.
    stable_length: a longer prompt reuses nothing; None where any length may.
    takes_positions: positions may leave gaps and need not be the rows'.
    """

    kind: SupportKind
    reason: str = ""
    layers: tuple[LayerShape, ...] = ()
    rotations: Rotations | None = None
    forward: Forward | None = None
    stable_length: int | None = None
    takes_positions: bool = False

    @property
    def reuses_modules(self) -> bool:
        """Whether states of modules can be used, not only prefixes."""
        return self.kind in ("relocatable", "position-free", "fixed-positions")

    def is_beyond_stable(self, length: int) -> bool:
        """Return whether a prompt of `length` tokens changes the model's rotary frequencies."""
        return self.stable_length is not None and length > self.stable_length


def probe(model: PreTrainedModel) -> Support:
    """Test the model: about a dozen forwards of at most 36 tokens."""
    structure = cache_structure(model)
    if structure.refusal is not None:
        return Support("no-cache", structure.refusal)
    ids = _token_ids(model, min(3 * _TOKENS, context_length(model) or 3 * _TOKENS))
    try:
        layers, native = _native(model, ids)
    except Exception as error:
        return Support("no-cache", f"the model's own cache could not be read ({_brief(error)})")
    forward, reason = _find_forward(model, structure, layers, (ids, native))
    if forward is None:
        return Support("no-cache", reason, layers)
    limit = stable_length(model)
    if structure.is_chunked:
        reason = "attention within fixed chunks of the context ties states to their place"
        return Support("exact-only", reason, layers, None, forward, limit)
    support = _positions(model, _Encoder(model, layers, forward), limit)
    return replace(support, takes_positions=_takes_positions(support, text_config(model)))


def _takes_positions(support: Support, config: Any) -> bool:
    """Return whether masks and biases follow positions wherever rows don't.

    Our attention masks by position. A model's own counts columns of the cache for windows and for
    distance biases; without either, rotary and learned embeddings take what they are told.
    """
    if support.forward is None or not support.reuses_modules:
        return False
    if support.forward.windows_by_position:
        return True
    return support.kind != "position-free" and not has_window(config)


def _positions(model: PreTrainedModel, encoder: _Encoder, limit: int | None) -> Support:
    """Checks 3 and 4."""
    ids = _token_ids(model, _TOKENS)
    layers, forward = encoder.layers, encoder.forward
    end = (limit or context_length(model) or 2048) - _TOKENS
    try:
        here, after = encoder(ids, 0), encoder.after(ids, ids[:5])
        there = encoder(ids, min(_SHIFT, end))
        far = encoder(ids, end)
    except Exception as error:
        reason = f"encoding at another position failed ({_brief(error)})"
        return Support("exact-only", reason, layers, None, forward, limit)
    rotations = fit(rotary_frequencies(model), here, there)
    reason = misfit(rotations, here, there)
    if reason:
        if _same_first_layer(encoder(ids, 5), after):
            return Support("fixed-positions", reason, layers, None, forward, limit)
        return Support("exact-only", reason, layers, None, forward, limit)
    if not _same_first_layer(encoder.moved(here, 5, rotations), after):
        reason = "the model takes positions from the cache's length, not from position_ids"
        return Support("exact-only", reason, layers, None, forward, limit)
    reason = misfit(rotations, here, far)
    if reason:
        return Support("exact-only", reason, layers, None, forward, limit)
    if limit is None:
        _try_lending(encoder, here, rotations)
    free = all(rotation is None for rotation in rotations)
    kind: SupportKind = "position-free" if free else "relocatable"
    return Support(kind, "", layers, rotations, forward, limit)


class _Encoder:
    """Encodes tokens alone, or after others, at a chosen position."""

    def __init__(
        self, model: PreTrainedModel, layers: tuple[LayerShape, ...], forward: Forward
    ) -> None:
        self.layers = layers
        self.forward = forward
        self.dtype = model.dtype
        self._model = model
        self._slot = self._new_buffers()

    def _new_buffers(self) -> KVBuffers:
        return _new_buffers(self._model, self.layers, 2 * _TOKENS)

    def __call__(self, ids: list[int], position: int) -> KVState:
        """Return the state of `ids` alone, first token at `position`."""
        rows = range(len(ids))
        positions = range(position, position + len(ids))
        self.forward([Batch.of_rows(self._slot, ids, rows, positions)])
        return self._slot.state(rows, ids, position)

    def after(self, ids: list[int], others: list[int]) -> KVState:
        """Return the state of `ids` directly after `others`, which start at position 0."""
        fill(self.forward, self._slot, others, 0)
        fill(self.forward, self._slot, ids, len(others))
        rows = range(len(others), len(others) + len(ids))
        return self._slot.state(rows, ids, rows.start)

    def moved(self, state: KVState, position: int, rotations: Rotations) -> KVState:
        """Return the state relocated to `position`."""
        place(self._slot, position, state, rotations)
        rows = range(position, position + state.num_tokens)
        return self._slot.state(rows, state.token_ids, position)

    def around(self, state: KVState, start: int, rotations: Rotations, *, lent: bool) -> Batch:
        """Tokens before and after a state that stands at row `start`, copied or on loan."""
        buffers = self._new_buffers()
        if lent:
            buffers.loans = [Loan(state, start, start)]
        else:
            place(buffers, start, state, rotations)
        stop = start + state.num_tokens
        rows = [*range(start), stop, stop + 1]
        return Batch.of_rows(buffers, state.token_ids[: len(rows)], rows, rows)


def _try_lending(encoder: _Encoder, state: KVState, rotations: Rotations) -> None:
    """Let the forward lend states if two requests at once get what copies give (check 5)."""
    forward = encoder.forward
    if not isinstance(forward, RaggedForward) or not forward.may_lend(rotations):
        return
    with_copies = [encoder.around(state, start, rotations, lent=False) for start in (3, 7)]
    forward.layers.rotations = rotations
    try:
        expected = forward(with_copies)
        found = forward([encoder.around(state, start, rotations, lent=True) for start in (3, 7)])
    except Exception:
        forward.layers.rotations = None
        return
    errors = map(relative_error, found, expected)
    if max(errors) > _LOGITS_TOLERANCE.get(encoder.dtype, 1e-4):
        forward.layers.rotations = None


def _same_first_layer(actual: KVState, expected: KVState) -> bool:
    pairs = zip(actual.layers()[0], expected.layers()[0], strict=True)
    return all(relative_error(a, e) <= _LOGITS_TOLERANCE.get(a.dtype, 1e-4) for a, e in pairs)


def _find_forward(
    model: PreTrainedModel,
    structure: CacheStructure,
    layers: tuple[LayerShape, ...],
    sample: tuple[list[int], torch.Tensor],
) -> tuple[Forward | None, str]:
    """The first way of running the model over buffers that gives its own logits (check 2)."""
    makers: list[Callable[[PreTrainedModel, CacheStructure], Forward]] = [SequentialForward]
    if not structure.is_chunked:
        makers.insert(0, RaggedForward)
    reason = ""
    ids, native = sample
    for maker in makers:
        try:
            forward = maker(model, structure)
            buffers = _new_buffers(model, layers, len(ids))
            error = _native_error(forward, buffers, ids, native)
        except Exception as failure:
            reason = f"the model can't run over buffers ({_brief(failure)})"
            continue
        if error <= _LOGITS_TOLERANCE.get(native.dtype, 1e-4):
            forward.merges = forward.merges and _merges(forward, model, layers, sample)
            return forward, ""
        reason = f"a run over buffers differs from the model's own forward (by {error:.1e})"
    return None, reason


def _native_error(
    forward: Forward, buffers: KVBuffers, ids: list[int], native: torch.Tensor
) -> float:
    """Relative error of the last logits: all at once, then with a hole that is filled later."""
    third = len(ids) // 3
    at_once = fill(forward, buffers, ids, 0)
    # The middle third keeps its rows; the first and last are computed again around it.
    rows = [*range(third), *range(2 * third, len(ids))]
    [with_hole] = forward([Batch.of_rows(buffers, [ids[row] for row in rows], rows, rows)])
    by_token = fill(forward, buffers, ids[-1:], len(ids) - 1)
    expected = native.float()
    return max(relative_error(logits, expected) for logits in (at_once, with_hole, by_token))


def _merges(
    forward: Forward,
    model: PreTrainedModel,
    layers: tuple[LayerShape, ...],
    sample: tuple[list[int], torch.Tensor],
) -> bool:
    """Whether two requests in one forward, one at its last token, get the model's own logits."""
    ids, native = sample
    buffers = [_new_buffers(model, layers, len(ids)) for _ in range(2)]
    fill(forward, buffers[0], ids[:-1], 0)
    last, rows = len(ids) - 1, range(len(ids))
    try:
        found = forward(
            [
                Batch.of_rows(buffers[0], ids[-1:], [last], [last]),
                Batch.of_rows(buffers[1], ids, rows, rows),
            ]
        )
    except Exception:
        return False
    errors = [relative_error(logits, native.float()) for logits in found]
    return max(errors) <= _LOGITS_TOLERANCE.get(native.dtype, 1e-4)


def _native(model: PreTrainedModel, ids: list[int]) -> tuple[tuple[LayerShape, ...], torch.Tensor]:
    """Shapes of the model's own cache after a plain forward, and its last logits, [vocab]."""
    input_ids = torch.tensor([ids], device=model.device)
    last = torch.tensor([len(ids) - 1], device=model.device)
    output = ModelCall(model)(last, input_ids=input_ids)
    shapes = []
    for layer in output.past_key_values.layers:
        if layer.keys is not None:
            _, key_heads, _, key_dim = layer.keys.shape
            _, value_heads, _, value_dim = layer.values.shape
            shapes.append(LayerShape(key_heads, key_dim, value_heads, value_dim))
    return tuple(shapes), output.logits[0, -1]


def _new_buffers(model: PreTrainedModel, layers: tuple[LayerShape, ...], rows: int) -> KVBuffers:
    return KVBuffers(stack_layers(layers), rows, dtype=model.dtype, device=model.device)


def _token_ids(model: PreTrainedModel, count: int) -> list[int]:
    vocabulary = text_config(model).vocab_size
    generator = torch.Generator().manual_seed(7)
    low = min(3, vocabulary - 1)
    return torch.randint(low, vocabulary, (count,), generator=generator).tolist()


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
