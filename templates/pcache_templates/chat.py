"""Chats made of templates: some turns are templates, others are given with the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pcache_core.prompt import Segment
from pcache_templates import trace
from pcache_templates.base import PromptTemplate, Schematic
from pcache_templates.tree import Node, xml_name


class TurnTemplate(NamedTuple):
    """A turn whose texts are templates. role: `system`, `user` or `assistant`."""

    role: str
    texts: Sequence[PromptTemplate]


class GivenTurns(NamedTuple):
    """A place for turns that come with the prompt. name: of the variable that holds them."""

    name: str


class ChatTemplate(Schematic):
    """A chat. Its schema has a role for each turn, and a slot wherever turns are given."""

    def __init__(
        self,
        turns: Iterable[TurnTemplate | GivenTurns],
        *,
        name: str | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(name, lengths)
        self._turns = tuple(turns)

    def segments(self, turn: int, text: int, values: Mapping[str, object]) -> list[Segment]:
        """Render the text of that number in the turn of that number.

        Raises: TemplateError: a value is missing or the template fails.
        """
        template = self._turns[turn]
        assert isinstance(template, TurnTemplate)
        traced = template.texts[text].trace(values)
        return self._segments(trace.value((turn, text), traced))

    def raw_nodes(self) -> Iterator[Node]:
        """As the base class."""
        for number, turn in enumerate(self._turns):
            if isinstance(turn, GivenTurns):
                yield Node("slot", xml_name(["messages", turn.name]), origin=(number,))
                continue
            parts = [
                part.moved((number, position))
                for position, template in enumerate(turn.texts)
                for part in template.raw_nodes()
            ]
            yield Node("role", turn.role, tuple(parts))
