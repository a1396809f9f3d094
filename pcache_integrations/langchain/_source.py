r"""Template text that stands in the source of whoever calls the model.

`llm.invoke(f"From:\n{context}\n\nQ: {question}")` renders its template before LangChain sees
anything of it. What the f-string says is still there, in the caller's source, as are strings that
the caller may have formatted. A prompt that one of them explains was most likely made of it.
"""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterator
from functools import lru_cache
from string import Formatter
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

from langchain_core.runnables import RunnableLambda, RunnableSequence

from pcache_integrations.langchain._layouts import Layout, Span
from pcache_templates.align import Part, align

_MAX_FRAMES = 64
_MAX_CALLERS = 4
_MAX_LINES = 5_000
# Less explains a text by accident.
_MIN_LITERAL_CHARS = 8
_MAX_TEMPLATE_CHARS = 20_000
_NOT_CALLERS = {
    "langchain", "langchain_classic", "langchain_community", "langchain_core", "langgraph",
    "langsmith", "pcache_integrations", "asyncio", "concurrent", "contextvars", "threading",
}  # fmt: skip

# Template text, and None where a value goes.
Pieces = tuple[str | None, ...]


class _Source(NamedTuple):
    """A function's code and what its global names stand for."""

    code: CodeType
    names: dict[str, Any]


def source_layout(text: str) -> Layout | None:
    """How one of the functions that led to this call made `text`, if its source tells."""
    fitting = [
        layout
        for source in _sources()
        for pieces in _templates(source)
        if (layout := _aligned(pieces, text)) is not None
    ]
    return max(fitting, key=_literal_chars, default=None)


def _sources() -> Iterator[_Source]:
    """The functions that use LangChain and led here, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    found = 0
    for _ in range(_MAX_FRAMES):
        if frame is None or found == _MAX_CALLERS:
            return
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_CALLERS:
            found += 1
            # Not its locals: asking for them would keep them alive until the function returns.
            yield _Source(frame.f_code, frame.f_globals)
        elif "self" in frame.f_code.co_varnames:
            yield from _functions_of(frame.f_locals.get("self"))
        frame = frame.f_back


def _functions_of(chain: object) -> Iterator[_Source]:
    """The functions among a chain's steps, one of which may have made the model's input."""
    steps = chain.steps if isinstance(chain, RunnableSequence) else ()
    for step in steps:
        function = getattr(step, "func", None) if isinstance(step, RunnableLambda) else None
        if isinstance(function, FunctionType):
            yield _Source(function.__code__, function.__globals__)


def _templates(source: _Source) -> Iterator[Pieces]:
    code, names = source
    yield from _f_strings(code, names)
    named = (names.get(name) for name in code.co_names)
    for value in (*code.co_consts, *named):
        if isinstance(value, str) and "{" in value and len(value) <= _MAX_TEMPLATE_CHARS:
            yield _format_pieces(value)


@lru_cache(maxsize=512)
def _format_pieces(template: str) -> Pieces:
    pieces: list[str | None] = []
    try:
        for literal, field, _, _ in Formatter().parse(template):
            pieces += [literal] if field is None else [literal, None]
    except ValueError:  # braces that are no fields
        return ()
    return tuple(pieces)


def _f_strings(code: CodeType, names: dict[str, Any]) -> Iterator[Pieces]:
    lines = [line for _, _, line in code.co_lines() if line]
    first, last = min(lines, default=0), max(lines, default=0)
    linecache.lazycache(code.co_filename, names)
    for line, pieces in _f_strings_of_file(code.co_filename):
        if first <= line <= last:
            yield pieces


@lru_cache(maxsize=64)
def _f_strings_of_file(filename: str) -> tuple[tuple[int, Pieces], ...]:
    """The f-strings of a source file, each with its line."""
    lines = linecache.getlines(filename)
    if len(lines) > _MAX_LINES:
        return ()
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:  # a notebook's cell with commands of its own
        return ()
    found = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    return tuple((node.lineno, _f_string_pieces(node)) for node in found)


def _f_string_pieces(node: ast.JoinedStr) -> Pieces:
    return tuple(
        part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None
        for part in node.values
    )


def _aligned(pieces: Pieces, text: str) -> Layout | None:
    known = sum(len(piece) for piece in pieces if piece)
    if known < _MIN_LITERAL_CHARS or None not in pieces:
        return None
    parts = [Part("argument" if piece is None else "literal", piece) for piece in pieces]
    spans = align(parts, text, ())
    layout = tuple(
        Span("rest" if span.kind == "literal" else "text", None, span.chars) for span in spans
    )
    return layout if _literal_chars(layout) >= _MIN_LITERAL_CHARS else None


def _literal_chars(layout: Layout) -> int:
    return sum(span.chars for span in layout if span.kind == "rest")
