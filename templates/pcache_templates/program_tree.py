"""A generator function's syntax tree made a raw schema tree. Nothing of the function runs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from pcache_core.errors import TemplateError
from pcache_templates.names import xml_name
from pcache_templates.schema import (
    MAX_NODES,
    Module,
    Node,
    Param,
    Path,
    Slot,
    Text,
    Union,
    ValueKind,
    are_too_many,
)

Yield = ast.Yield | ast.YieldFrom

_OPERATORS = {">=": "gteq", "<=": "lteq", "==": "eq", "!=": "ne", ">": "gt", "<": "lt"}


class Piece(NamedTuple):
    """A part of what one `yield` yields: text that is always the same, or an expression."""

    text: str | None
    expression: ast.expr | None = None


@dataclass(frozen=True)
class Code:
    """The syntax tree of a function. number: of every `yield` in it, by place in the source."""

    function: ast.FunctionDef
    label: str
    number: dict[tuple[int, int], int]

    @classmethod
    def of(cls, function: ast.FunctionDef, label: str) -> Code:
        """Number the function's own yields."""
        places = sorted((node.lineno, node.col_offset) for node in yields_in(function.body))
        return cls(function, label, {place: number for number, place in enumerate(places)})

    def error(self, node: ast.AST, message: str) -> TemplateError:
        """An error that says where in the program it is."""
        return TemplateError(f"{self.label}, line {getattr(node, 'lineno', '?')}: {message}")


def yields_in(body: Iterable[ast.AST]) -> Iterator[Yield]:
    """The yields in statements, those of functions defined there left out."""
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
            return [Piece(text)]
        case ast.JoinedStr():
            return [piece for part in node.values for piece in pieces_of(part)]
        case ast.FormattedValue():
            return [Piece(None, node)]
        case ast.BinOp(op=ast.Add()):
            return [*pieces_of(node.left), *pieces_of(node.right)]
        case _:
            return [Piece(None, node)]


class Called(NamedTuple):
    """A program that another one calls. nodes: its raw tree, with places inside of a path."""

    name: str
    nodes: Callable[[Path], list[Node]]


Find = Callable[[ast.expr], Called | None]


@dataclass(frozen=True)
class _Scope:
    """Where the walk is. path: of the calls that led here."""

    code: Code
    find: Find
    path: Path
    # Variables that hold one of the things that a loop goes through.
    items: frozenset[str] = frozenset()

    def path_of(self, node: Yield) -> Path:
        number = self.code.number[node.lineno, node.col_offset]
        return (*self.path, (self.code.label, number))


def program_nodes(code: Code, find: Find, path: Path) -> list[Node]:
    """The raw tree of a program. find: the program that a called expression means.

    Raises: TemplateError: it yields from within a statement that no schema can express.
    """
    made = _visit_all(code.function.body, _Scope(code, find, path))
    if are_too_many(made):
        raise TemplateError(f"{code.label} has over {MAX_NODES:,} parts; call less in it")
    return made


def _visit_all(body: Iterable[ast.stmt], scope: _Scope) -> list[Node]:
    return [made for node in body for made in _visit(node, scope)]


def _visit(node: ast.stmt, scope: _Scope) -> list[Node]:
    if not any(True for _ in yields_in([node])):
        return [_BREAK] if _may_leave(node) else []
    match node:
        case ast.If():
            return [Union(tuple(_branches(node, scope)))]
        case ast.Match():
            return [Union(tuple(_cases(node, scope)))]
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
            raise scope.code.error(
                node, f"a yield inside of {statement!r} can't be expressed; yield after it"
            )


# Ends a run of text: what follows may be missing where what stands before is not.
_BREAK = Module("break", ())


def _may_leave(node: ast.stmt) -> bool:
    """Whether a statement may end the program, or the loop that it is in."""
    return any(isinstance(n, ast.Return | ast.Break | ast.Continue) for n in ast.walk(node))


def _branches(node: ast.If, scope: _Scope) -> Iterator[Module]:
    name = xml_name(["if", _words(node.test)])
    yield Module(name, tuple(_visit_all(node.body, scope)))
    match node.orelse:
        case [ast.If() as other]:
            yield from _branches(other, scope)
        case other_body:
            yield from _else(other_body, scope)


def _cases(node: ast.Match, scope: _Scope) -> Iterator[Module]:
    for case in node.cases:
        body = tuple(_visit_all(case.body, scope))
        is_else = isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None
        if is_else and case.guard is None:
            yield Module("else", body)
        else:
            yield Module(xml_name(["case", _words(case.pattern)]), body)


def _else(body: list[ast.stmt], scope: _Scope) -> list[Module]:
    return [Module("else", tuple(_visit_all(body, scope)))] if body else []


def _loop(node: ast.For | ast.While, named_by: ast.expr, scope: _Scope) -> list[Node]:
    items = _names_in(node.target) if isinstance(node, ast.For) else frozenset()
    body = _visit_all(node.body, replace(scope, items=scope.items | items))
    word = "for" if isinstance(node, ast.For) else "while"
    return [
        Slot(xml_name([word, _words(named_by)]), tuple(body), (*scope.path, ("loop", node.lineno)))
    ]


def _yield(node: Yield, scope: _Scope) -> list[Node]:
    path = scope.path_of(node)
    if isinstance(node, ast.YieldFrom):
        return _yield_from(node.value, path, scope)
    made: list[Node] = []
    for number, piece in enumerate(pieces_of(node.value)):
        place = (*path, number)
        if piece.text is not None:
            made.append(Text(piece.text, place))
        elif piece.expression is not None:
            made.append(_param(piece.expression, place, scope))
    return made


def _param(node: ast.expr, path: Path, scope: _Scope) -> Param:
    kind: ValueKind = "document" if _names_in(node) & scope.items else "argument"
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    return Param(xml_name(_words(inner)), kind=kind, origin=path)


def _yield_from(node: ast.expr, path: Path, scope: _Scope) -> list[Node]:
    called = scope.find(node.func) if isinstance(node, ast.Call) else None
    if called is None:
        # Anything may be yielded there, any number of times.
        return [Slot(xml_name(["from", _words(node)]), (), path)]
    return [Module(xml_name(["call", called.name]), tuple(called.nodes(path)))]


def _words(node: ast.AST) -> str:
    """The source of an expression, as far as it can be part of a name."""
    source = ast.unparse(node)
    for operator, word in _OPERATORS.items():
        source = source.replace(operator, f"-{word}-")
    return source


def _names_in(node: ast.AST) -> frozenset[str]:
    return frozenset(name.id for name in ast.walk(node) if isinstance(name, ast.Name))
