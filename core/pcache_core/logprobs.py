"""Log probabilities of an answer's tokens, as the model gave them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from pcache_core.results import TokenLogprob

_CONTEXT_TOKENS = 4  # decoded again before a token, for spaces between words


class TokenScorer:
    """Reports the tokens of one answer, each with its likeliest alternatives.

    count: how many alternatives; None reports nothing at all.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], count: int | None) -> None:
        self._decode = decode
        self._count = count
        self._shown: list[int] = []
        self._waiting: list[int] = []  # tokens that end inside a character

    def __call__(self, token_id: int, logits: torch.Tensor) -> tuple[TokenLogprob, ...]:
        """The next token. logits: [vocab], fp32, that it was chosen from."""
        if self._count is None:
            return ()
        logprobs = torch.log_softmax(logits, dim=-1)
        values, ids = logprobs.topk(min(self._count, logprobs.shape[-1]))
        likeliest = zip(ids.tolist(), values.tolist(), strict=True)
        return (self.record(token_id, float(logprobs[token_id]), likeliest),)

    def record(
        self, token_id: int, logprob: float, likeliest: Iterable[tuple[int, float]]
    ) -> TokenLogprob:
        """The next token, with what is known of it already. likeliest: ids, log probabilities."""
        top = tuple(TokenLogprob(number, self._text(number), value) for number, value in likeliest)
        return TokenLogprob(token_id, self._add(token_id), logprob, top)

    def _add(self, token_id: int) -> str:
        text = self._text(token_id)
        self._waiting.append(token_id)
        if text.endswith("\ufffd"):
            return ""
        self._shown = (self._shown + self._waiting)[-_CONTEXT_TOKENS:]
        self._waiting = []
        return text

    def _text(self, token_id: int) -> str:
        before = self._decode(self._shown)
        return self._decode([*self._shown, *self._waiting, token_id])[len(before) :]
