"""What is returned: answers, what happened to each part of a prompt, what stores did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult

from pcache_core.picture import Picture, Run, Time, html, shown, terminal
from pcache_core.picture import Source as Source  # part of what reports are made of

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
Tier = Literal["memory", "disk", "remote"]
_LISTED = 8
"""Lines of a kind that a picture shows, of which a long prompt may have thousands."""
_LABEL_CHARS, _LINE_CHARS = 32, 300


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One segment of the prompt and where most of its tokens came from.

    repaired_tokens: how many of them were reused and then computed again.
    preamble_tokens: how many of its preamble's first ids its state was encoded after; 0 if it has
        no state.
    attention: its share of the attention that the question pays, less half of what the first
        tokens behind the documents pay, which don't know yet what is asked; None where that was not
        observed.
    """

    kind: str
    name: str | None
    text: str
    num_tokens: int
    source: Source
    repaired_tokens: int = 0
    preamble_tokens: int = 0
    attention: float | None = None


@dataclass(frozen=True, slots=True)
class DocumentShare:
    """A document, and its share of the attention that the question pays to all documents."""

    name: str | None
    share: float


@dataclass(slots=True)
class Report:
    """One request.

    `prompt_tokens` counts every token of the prompt, a beginning-of-sequence token included, and
    is the sum of `cached_tokens` (served from a prefix or from states that were there before),
    `encoded_tokens` (modules encoded during this call) and `computed_tokens`. `repaired_tokens`
    counts those of the cached and encoded ones that were then computed again (`repaired_rows` says
    which tokens of the prompt they are). `shared_tokens` counts
    the cached and encoded ones whose keys and values other running requests use as well, and nobody
    has a copy of. `drafted_tokens` of the answer were tried ahead, and `accepted_tokens` of these
    were right: see `SamplingParams.speculative`.

    reuse: the mode that ran.
    fallback_reason: why it is not the one that was asked for, or why documents can't be reused.
    ttft_ms: from the call to the first token (or to the logits, for a prefill alone); holds
        `load_ms` (states fetched or encoded), `assemble_ms` (copied and moved into place),
        `prefill_ms` (the forward over the computed tokens) and `repair_ms` (the choice of tokens
        to repair and the forward over them; 0 where nothing had to be chosen, and one forward did
        both).
    """

    segments: tuple[SegmentReport, ...]
    prompt_tokens: int
    cached_tokens: int
    encoded_tokens: int
    computed_tokens: int
    reuse: str
    ttft_ms: float = 0.0
    load_ms: float = 0.0
    assemble_ms: float = 0.0
    prefill_ms: float = 0.0
    generated_tokens: int = 0
    fallback_reason: str | None = None
    repaired_tokens: int = 0
    repaired_rows: tuple[int, ...] = ()
    repair_ms: float = 0.0
    shared_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def cached_share(self) -> float:
        """Share of the prompt's tokens that were served from a prefix or from states."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def documents(self) -> tuple[DocumentShare, ...]:
        """The prompt's documents, the one with most of the question's attention first.

        The shares add up to 1. Empty where attention was not observed: in modes that don't
        repair, unless the request asked for `sources`, and with models that don't show it.
        Attention is evidence of where an answer comes from, not a proof.
        """
        found = [
            (segment.name, segment.attention)
            for segment in self.segments
            if segment.kind == "document" and segment.attention is not None
        ]
        total = _attention_to_documents(self.segments)
        shares = [DocumentShare(name, attention / total) for name, attention in found if total]
        return tuple(sorted(shares, key=lambda document: -document.share))

    def __str__(self) -> str:
        """Return the prompt part by part, marked by source, and figures; long texts are cut."""
        console = Console(force_jupyter=False)  # which would show it beside what is returned
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from terminal.draw(self._picture(), console, options)

    def _repr_html_(self) -> str:
        """Return the prompt coloured by source, for notebooks; readable on dark and light pages."""
        return html.draw(self._picture())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001 (IPython's)
        """What IPython shows where there is no HTML."""
        printer.text(str(self))

    def _picture(self) -> Picture:
        repaired = f", {self.repaired_tokens:,} repaired" if self.repaired_tokens else ""
        return Picture(
            headline=f"{self.cached_tokens:,} of {self.prompt_tokens:,} tokens reused",
            details=f"{self.encoded_tokens:,} encoded, {self.computed_tokens:,} computed{repaired}",
            reuse=self.reuse,
            runs=_runs(self.segments),
            ttft_ms=self.ttft_ms,
            times=(
                Time("load", self.load_ms),
                Time("assemble", self.assemble_ms),
                Time("prefill", self.prefill_ms),
                Time("repair", self.repair_ms),
            ),
            fallback=self.fallback_reason and shown(self.fallback_reason),
        )


def _attention_to_documents(segments: Sequence[SegmentReport]) -> float:
    return sum(segment.attention or 0 for segment in segments if segment.kind == "document")


def _runs(segments: Sequence[SegmentReport]) -> tuple[Run, ...]:
    """Neighbours of one source are drawn as one; but documents and modules stay apart."""
    groups: list[list[SegmentReport]] = []
    for segment in segments:
        if groups and _belongs(segment, groups[-1]):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    total = _attention_to_documents(segments)
    return tuple(_run(group, total) for group in groups)


def _belongs(segment: SegmentReport, group: Sequence[SegmentReport]) -> bool:
    first = group[0]
    if segment.source != first.source or "document" in (segment.kind, first.kind):
        return False
    if segment.kind == "argument":
        return True
    # Template text has the name of its module; arguments stand within modules.
    text = next((part for part in group if part.kind != "argument"), None)
    return text is None or text.name == segment.name


def _run(group: Sequence[SegmentReport], attention: float) -> Run:
    """attention: of the question to all documents; 0 if it was not observed."""
    first = group[0]
    name = next((segment.name for segment in group if segment.name), first.kind)
    is_weighed = attention and first.kind == "document"
    return Run(
        label=_cut(name, _LABEL_CHARS),
        source=first.source,
        text="".join(segment.text for segment in group),
        num_tokens=sum(segment.num_tokens for segment in group),
        repaired_tokens=sum(segment.repaired_tokens for segment in group),
        title="\n".join(_first_few([_title(segment) for segment in group])),
        share=(first.attention or 0) / attention if is_weighed else None,
    )


def _title(segment: SegmentReport) -> str:
    name = f" {segment.name}" if segment.name else ""
    repaired = f", {segment.repaired_tokens} repaired" if segment.repaired_tokens else ""
    return f"{segment.kind}{name}: {segment.num_tokens} tokens, {segment.source}{repaired}"


def _first_few(lines: Sequence[str]) -> Iterator[str]:
    for line in islice(lines, _LISTED):
        yield _cut(line, _LINE_CHARS)
    if len(lines) > _LISTED:
        yield f"… and {len(lines) - _LISTED} more"


def _cut(text: str, chars: int) -> str:
    """Return the text, its end left out where it is longer."""
    text = shown(text)
    return text if len(text) <= chars else text[: chars - 1] + "…"


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What `engine.encode` did.

    texts: how many were given; `encoded` were computed now, `kept` of those are still in the store
    (its budget may be too small for all), `already_stored` were there before,
    `too_short` have fewer tokens than a module needs and are computed in line when they occur.
    tokens: tokens encoded now. seconds: wall time.
    reason: why this model can't have states ahead of time; None where it can.
    """

    texts: int
    encoded: int
    kept: int
    already_stored: int
    too_short: int
    tokens: int
    seconds: float
    reason: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Encoding speed; 0 when nothing was encoded."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        if self.reason is not None:
            return f"nothing encoded: {self.reason}"
        return (
            f"{self.encoded} of {self.texts} texts encoded ({self.tokens} tokens in "
            f"{self.seconds:.1f} s, {self.tokens_per_second:.0f} tokens/s), "
            f"{self.kept} of them kept, {self.already_stored} already stored, "
            f"{self.too_short} too short to store"
        )


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


@dataclass(frozen=True, slots=True)
class ForgetReport:
    """What `engine.forget` did.

    texts: how many different ones were given. states: how many states of them were dropped; a text
    has two, one for where it comes first in a prompt. freed_bytes: by how much the store shrank,
    all tiers together; what a server holds is not counted.
    """

    texts: int
    states: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A store's contents and its history since it was made.

    states, nbytes: None where counting them would mean asking a server for every key.
    budget_bytes: None where the store has no limit of its own.
    damaged: entries that were dropped because they were altered, cut or another model's.
    failures: calls that failed because the store could not be reached, read or written.
    load_ms: time spent in look-ups that hit.
    loaded_nbytes: read by look-ups that hit, as kept; 0 where nothing is read.
    tiers: of a tiered store, each tier's own.
    """

    tier: Tier
    states: int | None
    nbytes: int | None
    budget_bytes: int | None
    hits: int
    misses: int
    evictions: int
    damaged: int = 0
    failures: int = 0
    load_ms: float = 0.0
    tiers: tuple[StoreStats, ...] = ()
    loaded_nbytes: int = 0
