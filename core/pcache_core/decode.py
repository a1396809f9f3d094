"""Appending tokens to a prompt that was read, several in one forward where they can be foreseen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from pcache_core.kv.sequence import KVSequence
from pcache_core.lm import Batch, CausalLM
from pcache_core.lookup import PromptLookup
from pcache_core.params import SamplingParams

# Of one forward, for all requests together: a CPU computes them in about twice the time of a few.
_MOST_ROWS = 32
_FEWEST_ROWS = 4  # of one request; for fewer there is no drafting


class Decoder:
    """Appends one answer's tokens, and returns the logits of the token after each.

    Speculative decoding by prompt lookup: a draft of what follows is computed together with the
    token before it. Its tokens count one by one, each when it is the one that is appended next, so
    nothing about how tokens are chosen changes.

    num_running: how many requests share forwards. drafted_tokens, accepted_tokens: how many tokens
        were tried, and how many of them came.
    """

    def __init__(
        self,
        lm: CausalLM,
        sequence: KVSequence,
        params: SamplingParams,
        num_running: Callable[[], int],
    ) -> None:
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self._lm = lm
        self._sequence = sequence
        self._left = params.max_tokens
        self._num_running = num_running
        self._ahead: deque[tuple[int, torch.Tensor]] = deque()  # drafted tokens, logits after each
        drafts = params.speculative and sequence.stock is None
        self._lookup = PromptLookup(sequence.token_ids) if drafts else None

    def __call__(self, token_id: int) -> torch.Tensor:
        """Append a token; return the logits of the next, [vocab] fp32."""
        self._left -= 1
        if self._lookup is not None:
            self._lookup.add(token_id)
        if self._ahead and self._ahead[0][0] == token_id:
            self.accepted_tokens += 1
            self._sequence.append(token_id, self._sequence.end)
            return self._ahead.popleft()[1]
        draft = [] if self._lookup is None else self._lookup.draft(self._room())
        logits, *others = append_token(self._lm, self._sequence, token_id, draft).unbind()
        self.drafted_tokens += len(draft)
        self._ahead = deque(zip(draft, others, strict=True))
        return logits

    def _room(self) -> int:
        """Return how many tokens may be drafted after the next one."""
        rows = _MOST_ROWS // max(self._num_running(), 1)
        room = self._left - 1 if rows >= _FEWEST_ROWS else 0
        stable = self._lm.support.stable_length
        if stable is not None:
            room = min(room, stable - self._sequence.end - 1)
        return min(room, rows - 1)


def follow(
    lm: CausalLM, sequence: KVSequence, logits: torch.Tensor, token_ids: Sequence[int]
) -> Iterator[float]:
    """Yield log probabilities of given tokens, each after those before it.

    logits: [vocab], of the first.
    """
    for number, token_id in enumerate(token_ids, 1):
        yield float(logits.log_softmax(-1)[token_id])
        if number < len(token_ids):
            [logits] = append_token(lm, sequence, token_id)


def append_token(
    lm: CausalLM, sequence: KVSequence, token_id: int, draft: Sequence[int] = ()
) -> torch.Tensor:
    """Append a token, and compute what may follow it.

    draft: tokens whose rows are filled but not noted. `sequence.append` notes one that does follow;
        whatever is computed next takes the place of the others.

    Returns: logits of the token after each, [1 + draft, vocab] fp32.
    """
    if sequence.stock is not None:
        return sequence.stock([token_id])[None]
    token_ids, first, position = [token_id, *draft], len(sequence.token_ids), sequence.end
    positions = list(range(position, position + len(token_ids)))
    if position == lm.support.stable_length:
        # With this token every rotary frequency changes: no row fits any longer.
        token_ids, first = [*sequence.token_ids, *token_ids], 0
        positions = [*sequence.positions, *positions]
    rows = range(first, first + len(token_ids))
    sequence.is_filled = False
    sequence.reserve(rows.stop)
    batch = Batch.of_rows(sequence.buffers, token_ids, rows, positions, num_logits=1 + len(draft))
    logits = lm.forward(batch)
    sequence.append(token_id, position)
    sequence.is_filled = True
    return logits
