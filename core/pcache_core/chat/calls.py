"""Tools that a model may call, the calls that it makes, and how they are read from an answer."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pcache_core.errors import OptionError

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may ask for.

    parameters: a JSON schema of the arguments, an object.

    Raises: OptionError: a name that can't be written in a call, parameters that are no schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {}}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise OptionError(
                f"a tool's name must be letters, digits and _.:- (at most 128), got {self.name!r}"
            )
        if not isinstance(self.parameters, Mapping):
            raise OptionError(
                f"tool {self.name!r}: parameters must be a JSON schema, "
                f"got {type(self.parameters).__name__}"
            )

    def as_function(self) -> dict[str, Any]:
        """Return the tool as chat templates take it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": dict(self.parameters),
            },
        }


def new_call_id() -> str:
    """Return an id that every chat template takes: nine letters and digits."""
    return secrets.token_hex(5)[:9]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model makes. id: which its result is to name."""

    name: str
    arguments: Mapping[str, Any]
    id: str = field(default_factory=new_call_id)

    @property
    def arguments_text(self) -> str:
        """The arguments as chat templates write them."""
        return json.dumps(dict(self.arguments), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """What was meant as a call and is none. text: as written, markup included."""

    text: str
    reason: str
    name: str | None = None
    id: str = field(default_factory=new_call_id)


class ToolAnswer(NamedTuple):
    """An answer, or a piece of one, taken apart."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    invalid: tuple[InvalidToolCall, ...] = ()


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
