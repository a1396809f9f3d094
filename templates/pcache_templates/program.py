"""Prompts as Python programs: generator functions that yield the prompt's text."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial, update_wrapper
from types import GeneratorType
from typing import Any, Generic, ParamSpec, overload

from pcache_core.errors import TemplateError
from pcache_core.prompt import Prompt, Segment
from pcache_templates import trace
from pcache_templates.align import Part, align
from pcache_templates.base import Schematic
from pcache_templates.program_source import FunctionSource, Piece, pieces_of
from pcache_templates.program_tree import program_tree
from pcache_templates.trace import Traced
from pcache_templates.tree import Node, Path, xml_name

P = ParamSpec("P")


class PromptProgram(Schematic, Generic[P]):
    """A prompt written as a generator function. Made by `prompt_program`.

    The schema is read from the function's source; nothing runs. A prompt comes from running the
    function as it is. Called, a program gives an iterator, so that others may `yield from` it.
    """

    def __init__(
        self,
        function: Callable[P, Iterator[str]],
        name: str | None,
        lengths: Mapping[str, int] | None,
    ) -> None:
        super().__init__(name or xml_name(function.__name__), lengths)
        if not inspect.isgeneratorfunction(function):
            raise TemplateError(
                f"prompt_program takes a generator function; {function!r} yields nothing"
            )
        self._function = function
        self.label: str = function.__qualname__
        self._source = FunctionSource(function, self.label)
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[str]:
        """Run: the prompt's text piece by piece."""
        generator = self._function(*args, **kwargs)
        assert isinstance(generator, GeneratorType)
        return (self._trace(text, generator) for text in generator)

    def segments(self, *args: P.args, **kwargs: P.kwargs) -> list[Segment]:
        """Run, cut where the schema is; none if nothing was yielded."""
        return self._segments(trace.concat(self(*args, **kwargs)))

    def render(self, *args: P.args, **kwargs: P.kwargs) -> Prompt:
        """Run: a prompt. Raises: PromptError: nothing was yielded."""
        return Prompt(self.segments(*args, **kwargs))

    def prompt_pml(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Run: a prompt as PML. Raises: TemplateError: there is no schema or it does not fit."""
        return self._prompt_pml(trace.concat(self(*args, **kwargs)))

    def _trace(self, text: object, generator: GeneratorType[Any, Any, Any]) -> Traced:
        """Trace what the function has just yielded.

        Raises: TemplateError: that is not text.
        """
        frame = generator.gi_frame
        assert frame is not None, "it has just yielded"
        if not isinstance(text, str):
            raise TemplateError(
                f"{self.label}, line {frame.f_lineno}: yields {type(text).__name__}; yield str"
            )
        node = self._source.yield_at(frame)
        if node is None:
            return Traced(text, [trace.Span(len(text), "text")])
        path = self._source.place_of(node)
        if isinstance(text, Traced):
            return trace.value(path, text)
        if isinstance(node, ast.YieldFrom):
            return trace.value(path, text, "document")
        known = _known_values(node, frame.f_locals)
        parts = [_part(piece, known) for piece in pieces_of(node.value)]
        return Traced(text, align(parts, text, path))

    def raw_nodes(self) -> list[Node]:
        """As the base class."""
        return self._nodes(())

    def _nodes(self, path: Path, stack: tuple[PromptProgram[Any], ...] = ()) -> list[Node]:
        """Make the tree, its places inside of `path`. stack: the programs that call this one."""
        return program_tree(self._source, partial(self._find, (*stack, self)), path)

    def _find(
        self, stack: tuple[PromptProgram[Any], ...], expression: ast.expr, path: Path
    ) -> Node | None:
        """Make a module of the program that is called; None of one that is being read already."""
        found = self._source.look_up(expression)
        if not isinstance(found, PromptProgram) or found in stack:
            return None
        name = xml_name(["call", found._function.__name__])
        return Node("module", name, tuple(found._nodes(path, stack)))


@overload
def prompt_program(function: Callable[P, Iterator[str]], /) -> PromptProgram[P]: ...


@overload
def prompt_program(
    *, name: str | None = None, lengths: Mapping[str, int] | None = None
) -> Callable[[Callable[P, Iterator[str]]], PromptProgram[P]]: ...


def prompt_program(
    function: Callable[P, Iterator[str]] | None = None,
    /,
    *,
    name: str | None = None,
    lengths: Mapping[str, int] | None = None,
) -> PromptProgram[P] | Callable[[Callable[P, Iterator[str]]], PromptProgram[P]]:
    """Make a generator function a prompt program.

    `if` becomes a module, `if`/`else` and `match` a union, a loop a slot, a value in an f-string a
    parameter, and `yield from` another program a module around that one's.

    name: of the schema, the function's if not given. lengths: the most tokens of each parameter.

    ```python
    @prompt_program(lengths={"city": 8})
    def trip(city: str, premium: bool = False) -> Iterator[str]:
        yield f"Plan a trip to {city}."
        if premium:
            yield " Use the best hotels."


    trip.pml
    trip.render("Paris", premium=True).segments
    ```

    Raises: TemplateError: not a generator function.
    """
    if function is not None:
        return PromptProgram(function, name, lengths)
    return lambda decorated: PromptProgram(decorated, name, lengths)


def _known_values(node: ast.Yield, variables: Mapping[str, object]) -> dict[str, str]:
    """Return the texts of variables that a `yield` has written, if nothing changed them since."""
    for below in ast.walk(node):
        if isinstance(below, ast.Call | ast.NamedExpr | ast.Await):
            return {}
    return {name: str(v) for name, v in variables.items() if type(v) in (str, int, float, bool)}


def _part(piece: Piece, known: Mapping[str, str]) -> Part:
    match piece:
        case str():
            return Part("literal", piece)
        case (
            ast.Name(id=name)
            | ast.FormattedValue(value=ast.Name(id=name), conversion=-1, format_spec=None)
        ):
            return Part("argument", known.get(name))
        case _:
            return Part("argument", None)
