"""Which states may stand for which tokens of a prompt that a server answers. Pure.

A server's scheduler fills the beginning of a prompt from states, up to the first token that none
covers. So what stands between two documents belongs to the one before it: state and separator are
encoded together, and whatever comes next, the part that agrees with the prompt is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from pcache_core.errors import ContextLengthError
from pcache_core.kv.key import KeySpace
from pcache_core.library.preamble import Preamble, PreambleIds
from pcache_core.lm import TextModel
from pcache_core.prompt import Prompt, Segment, TokenisedPrompt
from pcache_integrations.vllm.protocol import (
    LEAST_MODULE_TOKENS,
    MOST_TAIL_TOKENS,
    Run,
    named_preambles,
)

USUAL_SEPARATOR = "\n\n"
"""What documents are encoded with before any prompt shows how it separates them."""

_MOST_SEPARATOR_CHARACTERS = 32
_MIN_LITERAL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Module:
    """Tokens that are encoded after a preamble; both make a prompt of their own.

    preamble: its name. used: how many of the prompt's tokens there are when all of it is used.
    """

    preamble: str
    preamble_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    used: int = 0

    @property
    def end(self) -> int:
        """Tokens of that prompt."""
        return len(self.preamble_ids) + len(self.token_ids)

    def key(self, space: KeySpace) -> str:
        """Return the digest that names its state."""
        return space.key(self.preamble_ids, self.token_ids, None).digest


class ModuleMaker:
    """Says what the states of a server's model are encoded after, as the engine does.

    context_length: the model's most positions, None without a limit; the server may take fewer.
    """

    def __init__(self, lm: TextModel, preamble: Preamble, context_length: int | None) -> None:
        self.preambles = PreambleIds(lm.text, context_length, preamble)
        self.by_name = named_preambles(self.preambles)
        self._lm = lm
        self._context_length = context_length

    def module(self, segment: Segment, *, is_first: bool) -> Module | None:
        """Make a module, as `ModuleLibrary` does; None where it does not fit after its preamble."""
        name = "opening" if is_first else self.preambles.name_for(segment.text)
        module = Module(name, self.by_name[name], tuple(self._lm.text.ids(segment)))
        limit = self._context_length
        return module if limit is None or module.end <= limit else None

    def modules(self, segment: Segment) -> list[Module]:
        """Make those that prompts may want, first and later ones, and the server can encode."""
        both = (self.module(segment, is_first=is_first) for is_first in (True, False))
        most = self._lm.context_length
        return [each for each in both if each and (most is None or each.end < most)]

    def encodable(self, segment: Segment) -> list[Module]:
        """Make `modules`, at least one. Raises: ContextLengthError: the server can encode none."""
        found = self.modules(segment)
        if not found:
            raise ContextLengthError(
                f"a text has {len(self._lm.text.ids(segment))} tokens, which don't fit after a "
                f"preamble of {len(self.by_name['opening'])} into what the server reads at once "
                f"({self._lm.context_length} tokens); split it into shorter documents"
            )
        return found


def join_separators(
    prompt: Prompt, holds_special: Callable[[str], bool]
) -> tuple[Prompt, tuple[str, ...]]:
    """Join what separates two documents to the first of them.

    holds_special: whether a text spells a special token, which in a document would be plain text.
    Returns: the prompt, and what was joined to each of its segments, empty for most.
    """
    segments: list[Segment] = []
    separators: list[str] = []
    given, start = prompt.segments, 0
    while start < len(given):
        segment, stop, separator = given[start], start + 1, ""
        if segment.kind == "document":
            separator = _separator(given, stop)
            if holds_special(separator):
                separator = ""
            while separator and given[stop].kind != "document":
                stop += 1
        segments.append(replace(segment, text=segment.text + separator))
        separators.append(separator)
        start = stop
    return Prompt(segments), tuple(separators)


def _separator(segments: Sequence[Segment], start: int) -> str:
    """Return the text up to the next document, if it is no more than a separator."""
    text = ""
    for segment in islice(segments, start, None):
        if segment.kind == "document":
            return text
        text += segment.text
        is_separator = segment.kind == "literal" or not any(map(str.isalnum, segment.text))
        if not is_separator or len(text) > _MOST_SEPARATOR_CHARACTERS:
            return ""
    return ""


class PromptModules:
    """The states that a prompt could use.

    tokens, separators: of the joined prompt.
    """

    def __init__(
        self, tokens: TokenisedPrompt, separators: Sequence[str], maker: ModuleMaker
    ) -> None:
        self._tokens = tokens
        self._separators = separators
        self._maker = maker

    def runs(self, space: KeySpace) -> list[Run]:
        """Name what to ask the server for, best first."""
        runs = [Run(0, own.used, own.key(space), own.preamble) for own in self._opening()]
        for start, is_first, segments in self._candidates():
            for segment in segments:
                module = self._maker.module(segment, is_first=is_first)
                if module is None:
                    continue
                agreed = self._agreed(start, module)
                tail = module.token_ids[agreed:]
                if agreed >= LEAST_MODULE_TOKENS and len(tail) <= MOST_TAIL_TOKENS:
                    stop = start + agreed
                    runs.append(Run(start, stop, module.key(space), module.preamble, tail))
        return runs

    def modules(self) -> list[Module]:
        """Name what to have encoded where the server lacks it: the opening, then each document.

        A document comes first in another prompt, and what is missing there leaves nothing to
        reuse after it. So both of its states are made.
        """
        own = self._opening()
        for start, _, segments in self._candidates():
            for module in self._maker.modules(segments[0]):
                own.append(replace(module, used=start + self._agreed(start, module)))
        return own

    def _opening(self) -> list[Module]:
        """Make the constant opening's, however short: what a prompt begins with must not lack."""
        count = self._tokens.opening
        return [Module("", (), self._tokens.token_ids[:count], count)] if count else []

    def _candidates(self) -> Iterator[tuple[int, bool, list[Segment]]]:
        """Yield each module's place, if it is the first, and texts that its state may be of."""
        usual = next((text for text in self._separators if text), USUAL_SEPARATOR)
        is_first = True
        for piece, separator in zip(self._tokens.pieces, self._separators, strict=True):
            segment, count = piece.segment, piece.stop - piece.start
            segments = [segment]
            if segment.kind == "document":
                bare = segment.text.removesuffix(separator)
                ends = dict.fromkeys((separator or usual, USUAL_SEPARATOR, ""))
                segments = [replace(segment, text=bare + end) for end in ends]
            elif segment.kind != "literal" or piece.start < self._tokens.opening:
                continue
            least = LEAST_MODULE_TOKENS if segment.kind == "document" else _MIN_LITERAL_TOKENS
            if count >= least and self._maker.module(segment, is_first=is_first):
                yield piece.start, is_first, segments
                is_first = False

    def _agreed(self, start: int, module: Module) -> int:
        """Count its tokens that stand in the prompt from `start` on, the last one left out."""
        here = self._tokens.token_ids[start:-1]
        pairs = zip(module.token_ids, here, strict=False)
        return next(
            (index for index, (own, other) in enumerate(pairs) if own != other),
            min(len(module.token_ids), len(here)),
        )
