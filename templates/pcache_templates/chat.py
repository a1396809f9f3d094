"""Chats made of templates: some turns are templates, others are given with the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from pcache_core.prompt import Segment
from pcache_templates import trace
from pcache_templates.base import PromptTemplate, Schematic
from pcache_templates.names import xml_name
from pcache_templates.schema import Module, Node, Param, Path, Role, Slot, Text, Union


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

    def raw_nodes(self) -> Iterable[Node]:
        """As the base class."""
        for number, turn in enumerate(self._turns):
            if isinstance(turn, GivenTurns):
                yield Slot(xml_name(["messages", turn.name]), origin=(number,))
                continue
            children = [
                _moved(node, (number, position))
                for position, template in enumerate(turn.texts)
                for node in template.raw_nodes()
            ]
            yield Role(turn.role, tuple(children))


def _moved(node: Node, path: Path) -> Node:
    """The same tree, its places inside of `path`."""
    match node:
        case Text() | Param():
            return replace(node, origin=path + node.origin)
        case Slot():
            body = tuple(_moved(child, path) for child in node.body)
            return replace(node, body=body, origin=path + node.origin)
        case Module() | Role():
            return replace(node, children=tuple(_moved(child, path) for child in node.children))
        case Union():
            members = [
                replace(m, children=tuple(_moved(c, path) for c in m.children))
                for m in node.members
            ]
            return Union(tuple(members))
