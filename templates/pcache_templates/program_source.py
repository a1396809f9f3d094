"""What can be known of a generator function without running it, and of where it stands."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from types import CellType, FrameType, FunctionType, ModuleType

from pcache_core.errors import TemplateError
from pcache_templates.program_tree import Code, Yield, yields_in


class FunctionSource:
    """A function's syntax tree, and the objects that its names mean.

    label: what errors call the function.
    """

    def __init__(self, function: Callable[..., Iterator[str]], label: str) -> None:
        unwrapped = inspect.unwrap(function)
        assert isinstance(unwrapped, FunctionType)
        self._function = unwrapped
        self._label = label

    @cached_property
    def code(self) -> Code:
        """The syntax tree. Raises: TemplateError: the source is not to be had."""
        return Code.of(_syntax_tree(self._function, self._label), self._label)

    def yield_at(self, frame: FrameType) -> Yield | None:
        """The `yield` that a suspended frame stands at; None if the source is not to be had."""
        try:
            yields = self._yields
        except TemplateError:
            return None
        return yields.get(self._positions[frame.f_lasti // 2])  # two bytes an instruction

    def look_up(self, expression: ast.expr) -> object:
        """What a name means, or an attribute of a module; None for anything else."""
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
        return {(y.lineno, y.col_offset): y for y in yields_in(self.code.function.body)}


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
