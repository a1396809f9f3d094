"""The decode loop: one token at a time, text that is safe to show, stops that don't leak."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch

from pcache_core.report import Chunk, FinishReason, TokenLogprob

_MOST_BYTES = 3  # of a character that is not complete
_MOST_WAITING = 8  # tokens whose text is not out yet

Step = Callable[[int], torch.Tensor]
"""Appends one token; logits of the next, [vocab]."""

Choose = Callable[[Sequence[int], torch.Tensor], int]
"""Picks a token from the text so far and the logits."""

Score = Callable[[int, torch.Tensor], tuple[TokenLogprob, ...]]
"""What is reported of a token, from the logits it was picked from."""


class AnswerText:
    """Turns tokens into text piece by piece.

    A piece never ends inside a character and never holds a part of a stop string: what may still
    become one waits until it can't. Of bytes that are no characters, a few tokens wait at most.
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
        """Return the text that is certain now that this token has come; often empty."""
        self._token_ids.append(token_id)
        new = self._new_text()
        if not new or new.endswith("\ufffd"):
            return self._release_settled() if self._num_waiting > _MOST_WAITING else ""
        self._note_shown(len(self._token_ids))
        return self._release(new)

    def peek(self, token_id: int) -> str:
        """Return what `token_id` and the tokens that wait for it would add to the text."""
        return self._new_text(token_id)

    def finish(self) -> str:
        """Return the rest, when no token will follow."""
        text = self._release(self._new_text())
        self._note_shown(len(self._token_ids))
        if self.stopped:
            return text
        text, self._waiting = text + self._waiting, ""
        return text

    @property
    def _num_waiting(self) -> int:
        return len(self._token_ids) - self._shown

    def _new_text(self, *more: int, end: int | None = None) -> str:
        """Return the text of the tokens that wait, up to `end`, and of some more."""
        before = self._decode(self._token_ids[self._context : self._shown])
        text = self._decode([*self._token_ids[self._context : end], *more])
        if text.startswith(before):
            return text[len(before) :]
        # A tokenizer of bytes may take a whole run for broken where one of them is.
        return self._decode([*self._token_ids[self._shown : end], *more])

    def _note_shown(self, end: int) -> None:
        """Note that the text of the tokens before `end` is out."""
        if end > self._shown:
            self._context, self._shown = self._shown, end

    def _release_settled(self) -> str:
        """Return the text that tokens to come can't change: all but that of the last few tokens.

        A character that is not complete yet has three bytes at most, so it began no earlier. Where
        one was completed by the last tokens, the text before it is cut one token earlier.
        """
        new, last = self._new_text(), len(self._token_ids)
        for end in range(last - _MOST_BYTES, self._shown, -1):
            settled = self._new_text(end=end)
            if not settled:
                del self._token_ids[self._shown : end]  # special tokens, which have no text
                return ""
            if new.startswith(settled):
                self._note_shown(end)
                return self._release(settled)
        return ""

    def _release(self, new: str) -> str:
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
        self._text = AnswerText(decode, ())
        self._count = count

    def __call__(self, token_id: int, logits: torch.Tensor) -> tuple[TokenLogprob, ...]:
        """Record the next token, if that is wanted. logits: [vocab], fp32, it was chosen from."""
        if self._count is None:
            return ()
        logprobs = torch.log_softmax(logits, dim=-1)
        values, ids = logprobs.topk(min(self._count, logprobs.shape[-1]))
        likeliest = zip(ids.tolist(), values.tolist(), strict=True)
        return (self.record(token_id, float(logprobs[token_id]), likeliest),)

    def record(
        self, token_id: int, logprob: float, likeliest: Iterable[tuple[int, float]]
    ) -> TokenLogprob:
        """Record the next token from known figures. likeliest: ids, log probabilities."""
        peek = self._text.peek
        top = tuple(TokenLogprob(number, peek(number), value) for number, value in likeliest)
        return TokenLogprob(token_id, self._text.add(token_id), logprob, top)
