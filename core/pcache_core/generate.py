"""The decode loop: one token at a time, text that is safe to show, stops that don't leak."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch

from pcache_core.results import Chunk, FinishReason, TokenLogprob

_CONTEXT_TOKENS = 4  # decoded again before a token, for spaces between words
_CHARACTER_BYTES = 4
_MOST_HELD = 8  # tokens that may be waiting to become a character

Step = Callable[[int], torch.Tensor]
"""Appends one token; logits of the next, [vocab]."""

Choose = Callable[[Sequence[int], torch.Tensor], int]
"""Picks a token from the text so far and the logits."""

Score = Callable[[int, torch.Tensor], tuple[TokenLogprob, ...]]
"""What is reported of a token, from the logits it was picked from."""


class AnswerText:
    """Turns tokens into text piece by piece.

    A piece never ends inside a character and never holds a part of a stop string: what may still
    become one waits until it can't.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._context = 0  # first token that is decoded again, for spaces between words
        self._shown = 0  # first token whose text is not out yet
        self._waiting = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that is certain now that this token has come; often empty."""
        self._token_ids.append(token_id)
        new = self._new_text()
        if not new.endswith("\ufffd"):
            return self._release(new, len(self._token_ids))
        if len(self._token_ids) - self._shown < _MOST_HELD:
            return ""
        # Broken bytes, or the character itself: no character has more bytes than are kept here.
        text = self._decode(self._token_ids[self._context :])
        for end in range(len(self._token_ids) - _CHARACTER_BYTES, self._shown, -1):
            sure = self._decode(self._token_ids[self._context : end])
            if text.startswith(sure):
                return self._release(sure[len(text) - len(new) :], end)
        return ""

    def finish(self) -> str:
        """The rest, when no token will follow."""
        text = self._release(self._new_text(), len(self._token_ids))
        if self.stopped:
            return text
        text, self._waiting = text + self._waiting, ""
        return text

    def _new_text(self) -> str:
        before = self._decode(self._token_ids[self._context : self._shown])
        return self._decode(self._token_ids[self._context :])[len(before) :]

    def _release(self, new: str, end: int) -> str:
        """Give out `new`, the text of the tokens before `end` that is not out yet."""
        if new:
            self._context, self._shown = self._shown, end
        text = self._waiting + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._waiting = ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, shorter than `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def decode_loop(  # noqa: PLR0913 (each is one collaborator)
    prompt_ids: Sequence[int],
    logits: torch.Tensor,
    *,
    step: Step,
    choose: Choose,
    text: AnswerText,
    end_ids: Collection[int],
    max_tokens: int,
    score: Score,
) -> Iterator[Chunk]:
    """Generate until an end id, a stop string or `max_tokens`; a chunk a token.

    logits: [vocab], of the first token after the prompt. The last chunk has a `finish_reason`.
    """
    token_ids = list(prompt_ids)
    for count in range(1, max_tokens + 1):
        token = choose(token_ids, logits)
        if token in end_ids:
            yield Chunk(text.finish(), (), "stop")
            return
        token_ids.append(token)
        scores = score(token, logits)
        new = text.add(token)
        if text.stopped:
            yield Chunk(new, (token,), "stop", logprobs=scores)
            return
        if count == max_tokens:
            tail = text.finish()
            reason: FinishReason = "stop" if text.stopped else "length"
            yield Chunk(new + tail, (token,), reason, logprobs=scores)
            return
        yield Chunk(new, (token,), logprobs=scores)
        logits = step(token)


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
        if text.endswith("\ufffd") and len(self._waiting) < _MOST_HELD:
            return ""
        self._shown = (self._shown + self._waiting)[-_CONTEXT_TOKENS:]
        self._waiting = []
        return text

    def _text(self, token_id: int) -> str:
        before = self._decode(self._shown)
        return self._decode([*self._shown, *self._waiting, token_id])[len(before) :]
