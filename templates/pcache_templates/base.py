"""What every kind of template can do, alone or as a chat's turns: give its schema, and render."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from pcache_core.errors import TemplateError
from pcache_core.pml.nodes import Schema
from pcache_core.prompt import Prompt, Segment
from pcache_templates import trace
from pcache_templates.pml import to_pml, to_prompt_pml
from pcache_templates.schema import Settled, settle
from pcache_templates.trace import Traced, segments_of
from pcache_templates.tree import Node, Path, Place, xml_name


class Schematic(ABC):
    """A family of prompts.

    name: of the schema; made of the content when not given.
    lengths: the most tokens that a parameter or a slot may have, by name. Not given, a parameter
        has 64, a slot no limit.
    """

    def __init__(self, name: str | None, lengths: Mapping[str, int] | None) -> None:
        self._name = name
        self._lengths = dict(lengths or {})

    @abstractmethod
    def raw_nodes(self) -> Iterable[Node]:
        """Return the template's tree. Raises: TemplateError: it can't be expressed."""

    @property
    def schema(self) -> Schema:
        """The tree of modules, unions, parameters and slots; `engine.add_schema` takes it.

        Raises: TemplateError: the template does what a schema can't express.
        Raises: OptionError: a length is for no parameter and no slot.
        """
        return self._settled.schema

    @cached_property
    def _settled(self) -> Settled:
        try:
            return settle(self._name, self.raw_nodes(), self._lengths)
        except RecursionError:
            raise TemplateError("the template nests too deeply for a schema") from None

    @property
    def pml(self) -> str:
        """The schema as PML. Raises: as `schema` does."""
        return to_pml(self.schema)

    @cached_property
    def _places(self) -> Mapping[Path, Place]:
        """Names for rendered parts; none if there is no schema, which stops no rendering."""
        try:
            return self._settled.places
        except TemplateError:
            return {}

    def _segments(self, traced: Traced) -> list[Segment]:
        return segments_of(traced, self._places)

    def _prompt_pml(self, traced: Traced) -> str:
        return to_prompt_pml(*self._settled, traced)


class PromptTemplate(Schematic):
    """A template that is rendered with named values."""

    @abstractmethod
    def trace(self, values: Mapping[str, object]) -> Traced:
        """Render. Raises: TemplateError: a value is missing or the template fails."""

    def segments(self, /, **values: object) -> list[Segment]:
        """Render, cut where the schema is; none if nothing was written. Raises: as `trace` does."""
        return self._segments(self.trace(values))

    def render(self, /, **values: object) -> Prompt:
        """Render a prompt.

        Raises: TemplateError: a value is missing or the template fails.
        Raises: PromptError: nothing was written.
        """
        return Prompt(self.segments(**values))

    def prompt_pml(self, /, **values: object) -> str:
        """Render a prompt as PML: the schema's modules that it uses, with their arguments.

        Raises: TemplateError: as `trace` and `schema` do, or the prompt does not fit the schema.
        """
        return self._prompt_pml(self.trace(values))


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
