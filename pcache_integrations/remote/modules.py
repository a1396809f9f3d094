"""Which states may stand for which tokens of a prompt that a server answers. Pure.

A server's scheduler fills the beginning of a prompt from states, up to the first token that none
covers. So what stands between two documents belongs to the one before it: state and separator are
encoded together, and whatever comes next, the part that agrees with the prompt is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pcache_core.key import KeySpace
from pcache_core.plan import TokenisedPrompt
from pcache_core.prompt import Prompt, Segment
from pcache_integrations.vllm.protocol import Run

USUAL_SEPARATOR = "\n\n"
"""What documents are encoded with before any prompt shows how it separates them."""

_MOST_SEPARATOR_CHARACTERS = 32
_MOST_TAIL_TOKENS = 64
_MIN_LITERAL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Module:
    """Tokens that are encoded behind an anchor; both begin a prompt of their own.

    used: how many of the prompt's tokens there are when all of it is used.
    """

    anchor_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    used: int = 0


@dataclass(frozen=True, slots=True)
class Joined:
    """A prompt whose documents end in the separator behind them.

    separators: what was joined to each segment; empty for the others.
    """

    prompt: Prompt
    separators: tuple[str, ...]


def join_separators(prompt: Prompt, holds_special: Callable[[str], bool]) -> Joined:
    """Join what separates two documents to the first of them.

    holds_special: whether a text spells a special token, which in a document would be plain text.
    """
    segments: list[Segment] = []
    separators: list[str] = []
    waiting = list(prompt.segments)
    while waiting:
        segment = waiting.pop(0)
        separator = ""
        if segment.kind == "document":
            separator = _separator(waiting)
            if holds_special(separator):
                separator = ""
            while separator and waiting[0].kind != "document":
                waiting.pop(0)
        segments.append(replace(segment, text=segment.text + separator))
        separators.append(separator)
    return Joined(Prompt(segments), tuple(separators))


def _separator(following: Sequence[Segment]) -> str:
    """The text up to the next document, if it is no more than a separator."""
    text = ""
    for segment in following:
        if segment.kind == "document":
            return text
        text += segment.text
        is_separator = segment.kind == "literal" or not any(map(str.isalnum, segment.text))
        if not is_separator or len(text) > _MOST_SEPARATOR_CHARACTERS:
            return ""
    return ""


class PromptModules:
    """The states that a prompt could use.

    tokens: of the joined prompt. ids_of: of a segment alone.
    """

    def __init__(
        self,
        joined: Joined,
        tokens: TokenisedPrompt,
        ids_of: Callable[[Segment], Sequence[int]],
        min_module_tokens: int,
    ) -> None:
        self._joined = joined
        self._tokens = tokens
        self._ids_of = ids_of
        self._least = min_module_tokens

    def runs(self, space: KeySpace) -> list[Run]:
        """What to ask the server for, best first."""
        tokens = self._tokens
        runs = []
        if tokens.opening:
            key = space.key((), tokens.anchor_ids, None)
            runs.append(Run(0, tokens.opening, key.digest, 0))
        anchors = tuple(dict.fromkeys((tokens.anchor_ids, tokens.bos_ids)))
        for start, choices in self._choices():
            for ids in choices:
                agreed = self._agreed(start, ids)
                if agreed < self._least or len(ids) - agreed > _MOST_TAIL_TOKENS:
                    continue
                for anchor_ids in anchors:
                    key = space.key(anchor_ids, ids, None)
                    behind = len(anchor_ids)
                    runs.append(Run(start, start + agreed, key.digest, behind, ids[agreed:]))
        return runs

    def modules(self) -> list[Module]:
        """What to have encoded where the server lacks it: the opening, then each document."""
        anchor_ids = self._tokens.anchor_ids
        own = [Module((), anchor_ids, len(anchor_ids))] if anchor_ids else []
        for start, choices in self._choices():
            if len(choices[0]) >= self._least:
                used = start + self._agreed(start, choices[0])
                own.append(Module(anchor_ids, choices[0], used))
        return own

    def _choices(self) -> list[tuple[int, list[tuple[int, ...]]]]:
        """For each document and long literal its first token's place, and ids of its states."""
        found = []
        usual = next((text for text in self._joined.separators if text), USUAL_SEPARATOR)
        pieces = zip(self._tokens.pieces, self._joined.separators, strict=True)
        for piece, separator in pieces:
            segment = piece.segment
            if segment.kind == "document":
                bare = segment.text.removesuffix(separator) if separator else segment.text
                texts = dict.fromkeys(
                    bare + end for end in (separator or usual, USUAL_SEPARATOR, "")
                )
                ids = [tuple(self._ids_of(replace(segment, text=text))) for text in texts]
                found.append((piece.start, ids))
            elif segment.kind == "literal" and piece.start >= self._tokens.opening:
                own = self._tokens.token_ids[piece.start : piece.stop]
                if len(own) >= _MIN_LITERAL_TOKENS:
                    found.append((piece.start, [own]))
        return found

    def _agreed(self, start: int, ids: Sequence[int]) -> int:
        """How many of these tokens stand in the prompt from `start` on, its last one left out."""
        pairs = zip(ids, self._tokens.token_ids[start:-1], strict=False)
        return next(
            (index for index, (own, other) in enumerate(pairs) if own != other),
            min(len(ids), len(self._tokens.token_ids) - 1 - start),
        )
