"""Reading an answer that may hold tool calls, as it comes in."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from pcache_core.chat.calls import InvalidToolCall, ToolAnswer, ToolCall

_DECODER = json.JSONDecoder()
_BARE = re.compile(r"\s*(\{|\[\s*\{)")
_SPACE = re.compile(r"\s*")
_MAY_BECOME_BARE = re.compile(r"\s*(\[\s*)?")


class ToolReader:
    """Takes an answer apart: text that is sure to be content, calls that are complete.

    marker: what a call begins with, empty for formats that have nothing before it. closing: what
    ends a marked call, may be empty. names: of the tools there are.

    An answer that is nothing but a call without its marker is a call, too: markers may be special
    tokens, which answers don't show.
    """

    def __init__(self, marker: str, closing: str, names: Collection[str]) -> None:
        self._marker = marker
        self._closing = closing
        self._names = frozenset(names)
        self._held = ""
        self._at = 0  # how far what is held was read
        self._in_call = False
        self._shown = False  # content has begun, so that no bare call can follow
        self._had_call = False
        self._shown_since_call = False

    def add(self, text: str) -> ToolAnswer:
        """Return what is certain now that this piece has come."""
        self._held = self._held[self._at :] + text
        self._at = 0
        return _joined(self._steps())

    def finish(self) -> ToolAnswer:
        """Return the rest, when nothing will follow."""
        answers = list(self._steps())
        held, self._held, self._at = self._held[self._at :], "", 0
        if self._in_call:
            answers.append(self._call(held.removesuffix(self._closing.strip()), held))
        elif _BARE.match(held) and not self._shown:
            answers.append(self._bare(held))
        elif held.strip() or not self._had_call:
            answers.append(ToolAnswer(held))
        return _joined(iter(answers))

    def _steps(self) -> Iterator[ToolAnswer]:
        while True:
            before = (self._at, self._in_call)
            yield self._step_in_call() if self._in_call else self._step_in_text()
            if (self._at, self._in_call) == before:
                return

    def _step_in_text(self) -> ToolAnswer:
        """Return content up to the next marker, less what may yet become one."""
        found = self._held.find(self._marker, self._at) if self._marker else -1
        if found >= 0:
            content = self._held[self._at : found]
            self._at = found + len(self._marker)
            self._in_call = True
            return self._content(content.rstrip())
        rest = self._held[self._at :]
        if not self._shown and (_BARE.match(rest) or _MAY_BECOME_BARE.fullmatch(rest)):
            return ToolAnswer("")
        keep = _overlap(rest, self._marker)
        content = rest[: len(rest) - keep]
        # Space before a marker belongs to neither.
        content = content.rstrip() if keep or self._marker else content
        self._at += len(content)
        return self._content(content)

    def _content(self, text: str) -> ToolAnswer:
        if self._had_call and not self._shown_since_call:
            text = text.lstrip()
        if text.strip():
            self._shown = self._shown_since_call = True
        return ToolAnswer(text)

    def _step_in_call(self) -> ToolAnswer:
        """Read a call, if its end is there."""
        closing = self._closing.strip()
        if closing:
            end = self._held.find(closing, self._at)
            stop = end + len(closing)
        else:
            end = stop = _json_end(self._held, self._at)
        if end < 0:
            return ToolAnswer("")
        text, raw = self._held[self._at : end], self._held[self._at : stop]
        self._at, self._in_call = stop, False
        return self._call(text, raw)

    def _call(self, text: str, raw: str) -> ToolAnswer:
        """Read the call in `text`, or say its fault. raw: the same, with what ends it."""
        self._had_call, self._shown_since_call = True, False
        written = self._marker + raw
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return ToolAnswer("", invalid=(InvalidToolCall(written, f"no JSON: {error}"),))
        return self._judged(value, written)

    def _bare(self, text: str) -> ToolAnswer:
        """A whole answer that looks like a call; content unless it is one of a known tool."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return ToolAnswer(text)
        answer = self._judged(value, text)
        return answer if answer.calls and not answer.invalid else ToolAnswer(text)

    def _judged(self, value: Any, written: str) -> ToolAnswer:
        calls: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        for item in value if isinstance(value, list) else [value]:
            call = _as_call(item, written, self._names)
            (calls if isinstance(call, ToolCall) else invalid).append(call)  # type: ignore[arg-type]
        return ToolAnswer("", tuple(calls), tuple(invalid))


def _as_call(item: Any, written: str, names: Collection[str]) -> ToolCall | InvalidToolCall:
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(name, str):
        return InvalidToolCall(written, "no object with a name")
    arguments = item.get("arguments", item.get("parameters"))
    if isinstance(arguments, str):  # some models write JSON in a string
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return InvalidToolCall(written, "its arguments are no JSON", name)
    if not isinstance(arguments, dict):
        return InvalidToolCall(written, "its arguments are no object", name)
    if name not in names:
        return InvalidToolCall(written, f"there is no tool {name!r}", name)
    return ToolCall(name, arguments)


def _json_end(text: str, start: int) -> int:
    """Find where the JSON value ends that begins at `start`; -1 if it has not ended."""
    space = _SPACE.match(text, start)
    try:
        return _DECODER.raw_decode(text, space.end() if space else start)[1]
    except (ValueError, RecursionError):
        return -1


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`, shorter than `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _joined(answers: Iterator[ToolAnswer]) -> ToolAnswer:
    found = list(answers)
    return ToolAnswer(
        "".join(answer.content for answer in found),
        tuple(call for answer in found for call in answer.calls),
        tuple(call for answer in found for call in answer.invalid),
    )
