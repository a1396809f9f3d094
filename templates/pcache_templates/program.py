"""Prompts as Python programs: generator functions that yield the prompt's text."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, update_wrapper
from types import CellType, FrameType, FunctionType, GeneratorType, ModuleType
from typing import Any, Generic, ParamSpec, overload

from pcache_core.errors import TemplateError
from pcache_core.prompt import Prompt, Segment
from pcache_templates import trace
from pcache_templates.align import Part, align
from pcache_templates.base import Schematic
from pcache_templates.trace import Traced
from pcache_templates.tree import MAX_NODES, Node, Path, ValueKind, are_too_many, xml_name

Yield = ast.Yield | ast.YieldFrom
# Of what one `yield` yields: text that is always the same, or an expression.
Piece = str | ast.expr


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
        return _tree(self, ())


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


_OPERATORS = {">=": "gteq", "<=": "lteq", "==": "eq", "!=": "ne", ">": "gt", "<": "lt"}


@dataclass(frozen=True)
class _Scope:
    """Where the walk is. path: of the calls that led here. calling: the programs that make them."""

    source: FunctionSource
    path: Path
    calling: tuple[PromptProgram[Any], ...]
    # Variables that hold one of the things that a loop goes through.
    items: frozenset[str] = frozenset()


def _tree(
    program: PromptProgram[Any], path: Path, calling: tuple[PromptProgram[Any], ...] = ()
) -> list[Node]:
    """Make the tree of a program, its places inside of `path`. Nothing of the function runs.

    Raises: TemplateError: it yields from within a statement that no schema can express.
    """
    source = program._source
    made = _visit_all(source.tree.body, _Scope(source, path, (*calling, program)))
    if are_too_many(made):
        raise TemplateError(f"{program.label} has over {MAX_NODES:,} parts; call less in it")
    return made


def _visit_all(body: Iterable[ast.stmt], scope: _Scope) -> list[Node]:
    return [made for node in body for made in _visit(node, scope)]


def _visit(node: ast.stmt, scope: _Scope) -> list[Node]:
    if not any(True for _ in yields_in([node])):
        return [_BREAK] if _may_leave(node) else []
    match node:
        case ast.If():
            return [Node("union", parts=tuple(_branches(node, scope)))]
        case ast.Match():
            return [Node("union", parts=tuple(_cases(node, scope)))]
        case ast.For():
            return [*_loop(node, node.target, scope), *_else(node.orelse, scope)]
        case ast.While():
            return [*_loop(node, node.test, scope), *_else(node.orelse, scope)]
        case ast.With():
            return _visit_all(node.body, scope)
        case ast.Expr() | ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.Return():
            return [made for found in yields_in([node]) for made in _yield(found, scope)]
        case _:
            statement = type(node).__name__.lower()
            raise scope.source.error(
                node, f"a yield inside of {statement!r} can't be expressed; yield after it"
            )


# Ends a run of text: what follows may be missing where what stands before is not.
_BREAK = Node("module", "break")


def _may_leave(node: ast.stmt) -> bool:
    """Tell whether a statement may end the program, or the loop that it is in."""
    return any(isinstance(n, ast.Return | ast.Break | ast.Continue) for n in ast.walk(node))


def _branches(node: ast.If, scope: _Scope) -> Iterator[Node]:
    yield _module(["if", _words(node.test)], node.body, scope)
    match node.orelse:
        case [ast.If() as other]:
            yield from _branches(other, scope)
        case other_body:
            yield from _else(other_body, scope)


def _cases(node: ast.Match, scope: _Scope) -> Iterator[Node]:
    for case in node.cases:
        is_else = isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None
        words = ["else"] if is_else and case.guard is None else ["case", _words(case.pattern)]
        yield _module(words, case.body, scope)


def _else(body: list[ast.stmt], scope: _Scope) -> list[Node]:
    return [_module("else", body, scope)] if body else []


def _module(words: str | list[str], body: Iterable[ast.stmt], scope: _Scope) -> Node:
    return Node("module", xml_name(words), tuple(_visit_all(body, scope)))


def _loop(node: ast.For | ast.While, named_by: ast.expr, scope: _Scope) -> list[Node]:
    items = _names_in(node.target) if isinstance(node, ast.For) else frozenset()
    body = _visit_all(node.body, replace(scope, items=scope.items | items))
    word = "for" if isinstance(node, ast.For) else "while"
    name = xml_name([word, _words(named_by)])
    return [Node("slot", name, tuple(body), (*scope.path, ("loop", node.lineno)))]


def _yield(node: Yield, scope: _Scope) -> list[Node]:
    path = (*scope.path, *scope.source.place_of(node))
    if isinstance(node, ast.YieldFrom):
        value = node.value
        called = scope.source.look_up(value.func) if isinstance(value, ast.Call) else None
        if isinstance(called, PromptProgram) and called not in scope.calling:
            name = xml_name(["call", called._function.__name__])
            return [Node("module", name, tuple(_tree(called, path, scope.calling)))]
        # What isn't a program may yield anything, any number of times.
        return [Node("slot", xml_name(["from", _words(value)]), origin=path)]
    made: list[Node] = []
    for number, piece in enumerate(pieces_of(node.value)):
        origin = (*path, number)
        if isinstance(piece, str):
            made.append(Node("text", piece, origin=origin))
            continue
        kind: ValueKind = "document" if _names_in(piece) & scope.items else "argument"
        inner = piece.value if isinstance(piece, ast.FormattedValue) else piece
        made.append(Node("param", xml_name(_words(inner)), (), origin, kind))
    return made


def _words(node: ast.AST) -> str:
    """Return the source of an expression, as far as it can be part of a name."""
    source = ast.unparse(node)
    for operator, word in _OPERATORS.items():
        source = source.replace(operator, f"-{word}-")
    return source


def _names_in(node: ast.AST) -> frozenset[str]:
    return frozenset(name.id for name in ast.walk(node) if isinstance(name, ast.Name))


class FunctionSource:
    """A function's syntax tree, and the objects that its names mean.

    label: what errors call the function.
    """

    def __init__(self, function: Callable[..., Iterator[str]], label: str) -> None:
        unwrapped = inspect.unwrap(function)
        assert isinstance(unwrapped, FunctionType)
        self._function = unwrapped
        self.label = label

    @cached_property
    def tree(self) -> ast.FunctionDef:
        """The syntax tree. Raises: TemplateError: the source is not to be had."""
        return _syntax_tree(self._function, self.label)

    def error(self, node: ast.AST, message: str) -> TemplateError:
        """Make an error that says where in the program it is."""
        return TemplateError(f"{self.label}, line {getattr(node, 'lineno', '?')}: {message}")

    def place_of(self, node: Yield) -> Path:
        """Return the place of a `yield` in this program."""
        return ((self.label, node.lineno, node.col_offset),)

    def yield_at(self, frame: FrameType) -> Yield | None:
        """Return the `yield` that a suspended frame stands at; None without a source."""
        try:
            yields = self._yields
        except TemplateError:
            return None
        return yields.get(self._positions[frame.f_lasti // 2])  # two bytes an instruction

    def look_up(self, expression: ast.expr) -> object:
        """Return what a name means, or an attribute of a module; None for anything else."""
        if isinstance(expression, ast.Attribute):
            module = self.look_up(expression.value)
            return vars(module).get(expression.attr) if isinstance(module, ModuleType) else None
        if not isinstance(expression, ast.Name):
            return None
        code = self._function.__code__
        if expression.id in code.co_freevars:
            cells = dict(zip(code.co_freevars, self._function.__closure__ or (), strict=True))
            return _contents(cells[expression.id])
        if expression.id in (*code.co_varnames, *code.co_cellvars):
            return None
        return self._function.__globals__.get(expression.id)

    @cached_property
    def _positions(self) -> list[tuple[int | None, int | None]]:
        """Line and column of every instruction."""
        positions = self._function.__code__.co_positions()
        return [(line, column) for line, _, column, _ in positions]

    @cached_property
    def _yields(self) -> dict[tuple[int | None, int | None], Yield]:
        return {(y.lineno, y.col_offset): y for y in yields_in(self.tree.body)}


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _syntax_tree(function: FunctionType, label: str) -> ast.FunctionDef:
    """Parse a function's source; places are those in its file."""
    try:
        lines, first = inspect.getsourcelines(function)
        # An indented function keeps its columns, and its texts, if it has something to be inside.
        inside = ["if True:\n"] if lines[0][:1].isspace() else []
        tree = ast.parse("".join([*inside, *lines]))
    except (OSError, TypeError, SyntaxError) as error:
        raise TemplateError(
            f"{label}: its source can't be read ({error}); define it in a file"
        ) from error
    ast.increment_lineno(tree, first - 1 - len(inside))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    if not found:
        raise TemplateError(f"{label}: its source holds no function definition")
    return found[0]


def yields_in(body: Iterable[ast.AST]) -> Iterator[Yield]:
    """Yield the yields in statements, those of functions defined there left out."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Yield | ast.YieldFrom):
            yield node
        yield from yields_in(ast.iter_child_nodes(node))


def pieces_of(node: ast.expr | None) -> list[Piece]:
    """Cut a yielded expression where f-strings and `+` join text and values."""
    match node:
        case ast.Constant(value=str() as text):
            return [text]
        case ast.JoinedStr():
            return [piece for part in node.values for piece in pieces_of(part)]
        case ast.BinOp(op=ast.Add()):
            return [*pieces_of(node.left), *pieces_of(node.right)]
        case _:
            return [] if node is None else [node]
