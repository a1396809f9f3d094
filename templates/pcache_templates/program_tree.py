"""A generator function's syntax tree made a template tree. Nothing of the function runs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from pcache_core.errors import TemplateError
from pcache_templates.program_source import FunctionSource, Yield, pieces_of, yields_in
from pcache_templates.tree import MAX_NODES, Node, Path, ValueKind, are_too_many, xml_name

_OPERATORS = {">=": "gteq", "<=": "lteq", "==": "eq", "!=": "ne", ">": "gt", "<": "lt"}


# From a called expression and the place of the call to the module that the program called makes
# there; to None if the expression means no program.
Find = Callable[[ast.expr, Path], Node | None]


@dataclass(frozen=True)
class _Scope:
    """Where the walk is. path: of the calls that led here."""

    source: FunctionSource
    find: Find
    path: Path
    # Variables that hold one of the things that a loop goes through.
    items: frozenset[str] = frozenset()


def program_tree(source: FunctionSource, find: Find, path: Path) -> list[Node]:
    """Make the tree of a program. find: of the programs that it calls.

    Raises: TemplateError: it yields from within a statement that no schema can express.
    """
    made = _visit_all(source.tree.body, _Scope(source, find, path))
    if are_too_many(made):
        raise TemplateError(f"{source.label} has over {MAX_NODES:,} parts; call less in it")
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
        called = scope.find(value.func, path) if isinstance(value, ast.Call) else None
        # What isn't a program may yield anything, any number of times.
        return [called or Node("slot", xml_name(["from", _words(value)]), origin=path)]
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
