"""What a request returns, beside its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from pcache_core.report import Report

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the log probability that the model gave it.

    token: its text; those of an answer's tokens join to the answer, so a token that ends inside a
        character has none, and the one that completes it has the character.
    top: the likeliest tokens in its place, likeliest first; as many as were asked for.
    """

    token_id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer. Only the last one has `finish_reason` and `report`.

    text: never ends inside a character, never holds a part of a stop string; may be empty.
    token_ids: the tokens generated since the chunk before. logprobs: of each of them; none unless
        asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    report: Report | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. logprobs: of each of its tokens; none unless asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    report: Report
    logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Generation:
        """Return the answer that a finished stream's chunks make up."""
        last = chunks[-1]
        assert last.finish_reason is not None, "the stream has not finished"
        assert last.report is not None
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=last.finish_reason,
            report=last.report,
            logprobs=tuple(record for chunk in chunks for record in chunk.logprobs),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """The state after reading a prompt.

    logits: [vocab], fp32, of the token after the prompt. logprobs: of the continuation's tokens, in
        nats, each given the prompt and the tokens before it; none unless one was given.
    """

    logits: torch.Tensor
    report: Report
    logprobs: tuple[float, ...] = ()
