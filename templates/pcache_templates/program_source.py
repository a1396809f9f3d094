"""What can be known of a generator function without running it, and of where it stands."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from types import CellType, FrameType, FunctionType, ModuleType

from pcache_core.errors import TemplateError
from pcache_templates.tree import Path

Yield = ast.Yield | ast.YieldFrom
# Of what one `yield` yields: text that is always the same, or an expression.
Piece = str | ast.expr


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
