"""Prompts as sequences of segments, and as token ids: the words every other part speaks in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pcache_core.errors import PromptError

_LEAD_TOKENS = 32

SegmentKind = Literal["literal", "document", "argument", "text"]
SEGMENT_KINDS: tuple[SegmentKind, ...] = get_args(SegmentKind)


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of the prompt's text.

    kind: `literal` is template text, `document` a retrieved document, `argument` a filled variable,
        `text` anything else. Special tokens written out in a `literal` or `text` count as special
        tokens; in a `document` or `argument` they are plain characters, so that data can't forge a
        role mark.
    name: what reports call the segment, for example a document's id.
    """

    text: str
    kind: SegmentKind = "text"
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise PromptError(f"a segment's text must be str, got {type(self.text).__name__}")
        if self.name is not None and not isinstance(self.name, str):
            raise PromptError(f"a segment's name must be str, got {type(self.name).__name__}")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"a segment's text holds half a surrogate pair at character {error.start}; "
                "decode its source with errors='replace'"
            ) from None
        if self.kind not in SEGMENT_KINDS:
            raise PromptError(
                f"unknown segment kind {self.kind!r}; use one of {', '.join(SEGMENT_KINDS)}"
            )

    @property
    def is_markup(self) -> bool:
        """Whether special tokens written out in the text are special tokens."""
        return self.kind in ("literal", "text")


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens that become one state.

    token_ids: all that are encoded.
    offsets: how far each stands after the first, ascending; empty where they follow each other.
    stand_ins: which of them, by index, only stand where an argument will: the others see them,
        but they are no part of the state.
    """

    token_ids: tuple[int, ...]
    offsets: tuple[int, ...] = ()
    stand_ins: tuple[int, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the tokens that are part of the state."""
        dropped = set(self.stand_ins)
        return tuple(index for index in range(len(self.token_ids)) if index not in dropped)

    @property
    def kept_ids(self) -> tuple[int, ...]:
        """The tokens of the state."""
        if not self.stand_ins:
            return self.token_ids
        return tuple(self.token_ids[index] for index in self.kept)

    @property
    def extent(self) -> int:
        """Positions from the first token to after the last."""
        return self.offsets[-1] + 1 if self.offsets else len(self.token_ids)

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """What the state is a function of beside its own tokens; empty for a plain text."""
        if not self.offsets and not self.stand_ins:
            return ()
        return (self.token_ids, self.offsets, self.stand_ins)

    def positions(self, first: int) -> Sequence[int]:
        """Of every token, the first one's given."""
        if not self.offsets:
            return range(first, first + len(self.token_ids))
        return [first + offset for offset in self.offsets]


@dataclass(frozen=True, slots=True)
class Unit:
    """Text of a schema that is encoded together.

    segments: which of the prompt's segments it is, by index, in the order of the passage.
    position: where the schema puts the passage's first token.
    """

    segments: tuple[int, ...]
    passage: Passage
    position: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a schema puts the segments of a prompt, for one model.

    token_ids: of each segment. starts: position of each segment's first token; the others follow.
    opening: how many segments open every prompt of the schema.
    model: fingerprint of the model whose tokens these are.
    """

    token_ids: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    opening: int
    units: tuple[Unit, ...]
    model: str


class Prompt:
    """An immutable sequence of segments. Its text is the plain concatenation of theirs.

    placement: what a schema says about the segments; None for a flat prompt, whose tokens stand
        one after the other.
    fallback_reason: why less can be reused than was asked for, for the report; None if nothing is
        lost.

    Raises: PromptError: no segment holds any text.
    """

    __slots__ = ("fallback_reason", "placement", "segments")
    segments: tuple[Segment, ...]
    placement: Placement | None
    fallback_reason: str | None

    def __init__(
        self,
        segments: Iterable[Segment],
        placement: Placement | None = None,
        fallback_reason: str | None = None,
    ) -> None:
        if isinstance(segments, str) or not isinstance(segments, Iterable):
            raise PromptError(
                f"Prompt takes a list of segments, got {type(segments).__name__}; "
                "for a flat string use Prompt.from_text(...)"
            )
        kept = tuple(segments)
        for segment in kept:
            if not isinstance(segment, Segment):
                raise PromptError(
                    f"Prompt takes Segment objects, got {type(segment).__name__}; "
                    "for a flat string use Prompt.from_text(...)"
                )
        kept = tuple(segment for segment in kept if segment.text)
        if not kept:
            raise PromptError("the prompt is empty; give at least one character of text")
        assert placement is None or len(placement.starts) == len(kept)
        object.__setattr__(self, "segments", kept)
        object.__setattr__(self, "placement", placement)
        object.__setattr__(self, "fallback_reason", fallback_reason)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Prompt is immutable; can't set {name!r}")

    @classmethod
    def from_text(cls, text: str) -> Prompt:
        """Return a prompt without known structure: one `text` segment."""
        return cls([Segment(text, "text")])

    @property
    def text(self) -> str:
        """What the model reads, without a beginning-of-sequence token."""
        return "".join(segment.text for segment in self.segments)

    @property
    def opening(self) -> tuple[Segment, ...]:
        """The constant opening: the `literal` segments before the first one of another kind.

        In a prompt of a schema: what opens every prompt of that schema.
        """
        if self.placement is not None:
            return self.segments[: self.placement.opening]
        length = 0
        while length < len(self.segments) and self.segments[length].kind == "literal":
            length += 1
        return self.segments[:length]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Prompt)
            and self.segments == other.segments
            and self.placement == other.placement
        )

    def __hash__(self) -> int:
        return hash(self.segments)

    def __repr__(self) -> str:
        return f"Prompt({list(self.segments)!r})"


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment's tokens and their place: rows `start … stop` of the prompt."""

    segment: Segment
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """The prompt's ids: a beginning-of-sequence token if the model has one, then the segments'.

    A flat prompt whose markup begins with that token gets no second one.

    token_ids: every segment tokenised alone, joined; the same for every reuse mode.
    positions: of each token. In a flat prompt the token's row; a schema may leave gaps, and let
        tokens share a position. Rows say who sees whom, positions what the model is told.
    opening: how many of them are the constant opening, a beginning-of-sequence token included.
    num_bos: 1 if the first id is a beginning-of-sequence token, else 0.
    units: texts of a schema that are encoded together, by piece; None for a flat prompt.
    """

    token_ids: tuple[int, ...]
    positions: Sequence[int]
    pieces: tuple[Piece, ...]
    opening: int
    num_bos: int
    units: tuple[Unit, ...] | None = None

    @property
    def end(self) -> int:
        """One after the largest position."""
        return max(self.positions, default=-1) + 1

    @property
    def question(self) -> tuple[int, int]:
        """Where the words before the question begin, and where it does itself, as rows.

        The question is the last filled-in or free text behind all documents and modules, and what
        follows it; without such text, all that stands behind them.
        """
        modules = {index for unit in self.units or () for index in unit.segments}
        behind, asked = 0, None
        for index, piece in reversed(list(enumerate(self.pieces))):
            if piece.segment.kind == "document" or index in modules:
                behind = piece.stop
                break
            if asked is None and piece.segment.kind != "literal" and piece.segment.text.strip():
                asked = piece.start
        asked = behind if asked is None else asked
        return max(behind, asked - _LEAD_TOKENS), asked


def tokenise(
    prompt: Prompt, ids_of: Callable[[Segment], Sequence[int]], bos_ids: Sequence[int]
) -> TokenisedPrompt:
    """Tokenise a prompt segment by segment (invariant 2 of the design).

    A text that begins with the beginning-of-sequence token gets no second one.
    """
    placement = prompt.placement
    ids = list(map(ids_of, prompt.segments)) if placement is None else placement.token_ids
    if placement is None and next((tuple(own[:1]) for own in ids if own), None) == tuple(bos_ids):
        bos_ids = ()
    token_ids = list(bos_ids)
    pieces = []
    for segment, own in zip(prompt.segments, ids, strict=True):
        start = len(token_ids)
        token_ids.extend(own)
        pieces.append(Piece(segment, start, len(token_ids)))
    num_opening = len(prompt.opening)
    opening = pieces[num_opening - 1].stop if num_opening else len(bos_ids)
    positions = range(len(token_ids)) if placement is None else _positions(placement, len(bos_ids))
    units = None if placement is None else placement.units
    return TokenisedPrompt(tuple(token_ids), positions, tuple(pieces), opening, len(bos_ids), units)


def _positions(placement: Placement, num_bos: int) -> tuple[int, ...]:
    placed = zip(placement.starts, placement.token_ids, strict=True)
    own = (position for start, ids in placed for position in range(start, start + len(ids)))
    return (*range(num_bos), *own)
