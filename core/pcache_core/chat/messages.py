"""Chat messages to segments, through the model's own chat template."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pcache_core.chat.calls import ToolCall
from pcache_core.errors import ChatTemplateError, PromptError
from pcache_core.prompt import Prompt, Segment

ApplyTemplate = Callable[[list[dict[str, Any]]], str]


def _nothing(text: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; its content is given in segments.

    tool_calls: that an assistant's message makes. tool_call_id, name: of the call and the tool
    that a tool's message is the result of.
    """

    role: str
    segments: Sequence[Segment]
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.segments, str):
            raise PromptError(
                "a message holds segments, got str; "
                f"use [Segment({self.segments[:20]!r}, 'argument')]"
            )

    @property
    def text(self) -> str:
        """The content as plain text."""
        return "".join(segment.text for segment in self.segments)

    def as_dict(self, content: str) -> dict[str, Any]:
        """The message as chat templates take it, with another content."""
        fields: dict[str, Any] = {"role": self.role, "content": content}
        if self.tool_calls:
            fields["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            fields["name"] = self.name
        return fields


def render_chat(
    messages: Sequence[Message],
    apply_template: ApplyTemplate,
    holds_special: Callable[[str], bool] = _nothing,
) -> Prompt:
    """Render messages so that markup becomes `literal` and their segments stay as they are.

    What calls hold is a part of the markup, unless it spells special tokens.

    The template is rendered twice: with the real contents, which is the truth, and with a unique
    mark in place of each content, which shows where contents go. A content that the template
    rewrites becomes one `text`; the whole prompt does where it can't be told where one ends.

    holds_special: whether a text spells a special token, which must not become one.
    Raises: PromptError: no messages. ChatTemplateError: a template rewrites contents that spell
        special tokens; an id or a name spells one.
    """
    if not messages:
        raise PromptError("the chat has no messages; give at least one")
    _check_names(messages, holds_special)
    truth = apply_template([message.as_dict(message.text) for message in messages])
    # Templates ask whether there is a content, so that an empty one stays empty.
    marks = [f"\ue0f0{secrets.token_hex(8)}\ue0f1" if m.text else "" for m in messages]
    marked = apply_template([m.as_dict(mark) for m, mark in zip(messages, marks, strict=True)])
    contents = [message.segments for message in messages if message.text]
    segments = _fill(marked, [mark for mark in marks if mark], contents, truth, holds_special)
    calls = [call for message in messages for call in message.tool_calls]
    spoken = [call.arguments_text for call in calls if holds_special(call.arguments_text)]
    segments = segments and _set_apart(segments, spoken)
    if segments is not None:
        return Prompt(segments)
    if spoken or any(holds_special(message.text) for message in messages):
        raise ChatTemplateError(
            "the chat template rewrites its messages, and one of them spells a special token, "
            "which can't be told from the template's own; remove it from the message"
        )
    return Prompt.from_text(truth)


def _check_names(messages: Sequence[Message], holds_special: Callable[[str], bool]) -> None:
    """Raises: ChatTemplateError: an id or a name spells a special token."""
    for message in messages:
        ids = [call.id for call in message.tool_calls]
        for name in (*ids, message.tool_call_id, message.name):
            if name and holds_special(name):
                raise ChatTemplateError(
                    f"the id or name {name!r} in a message spells a special token; use another"
                )


def _set_apart(segments: Sequence[Segment], data: Sequence[str]) -> list[Segment] | None:
    """The segments with texts that a model wrote cut out of the markup; None if one isn't there."""
    done: list[Segment] = []
    todo = list(segments)
    for text in data:
        while todo:
            segment = todo.pop(0)
            before, found, after = segment.text.partition(text)
            if segment.kind == "literal" and found:
                done += [Segment(before, "literal"), Segment(text, "argument")]
                todo.insert(0, Segment(after, "literal"))
                break
            done.append(segment)
        else:
            return None
    return done + todo


def strip_segments(segments: Sequence[Segment]) -> list[Segment]:
    """The segments of `text.strip()`: many templates trim their contents."""
    kept = list(segments)
    while kept and not kept[0].text.lstrip():
        kept.pop(0)
    while kept and not kept[-1].text.rstrip():
        kept.pop()
    if kept:
        kept[0] = Segment(kept[0].text.lstrip(), kept[0].kind, kept[0].name)
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].kind, kept[-1].name)
    return kept


def _fill(
    marked: str,
    marks: Sequence[str],
    contents: Sequence[Sequence[Segment]],
    truth: str,
    holds_special: Callable[[str], bool],
) -> list[Segment] | None:
    """Put contents where their marks stand, as they are or stripped, whichever gives the truth.

    A content that neither fits ends where the template's own text after it begins.

    None if a mark does not stand there once and in order, or a content that is rewritten spells
    special tokens or has no text of the template's after it.
    """
    literals = list(_between(marked, marks))
    if len(literals) <= len(marks) or not truth.startswith(literals[0]):
        return None
    segments = [Segment(literals[0], "literal")]
    position = len(literals[0])
    for number, (content, after) in enumerate(zip(contents, literals[1:], strict=True), start=1):
        for variant in (content, strip_segments(content)):
            text = "".join(segment.text for segment in variant)
            if truth.startswith(text + after, position):
                break
        else:
            is_last = number == len(contents)
            end = len(truth) - len(after) if is_last else after and truth.find(after, position)
            spelled = "".join(segment.text for segment in content)
            if not end or end < position or holds_special(spelled):
                return None
            text = truth[position:end]
            variant = [Segment(text)]
        segments += [*variant, Segment(after, "literal")]
        position += len(text) + len(after)
    return segments if "".join(segment.text for segment in segments) == truth else None


def _between(text: str, marks: Sequence[str]) -> Iterator[str]:
    """Yield the text before each mark and after the last, up to a mark that is missing."""
    position = 0
    for mark in marks:
        found = text.find(mark, position)
        if found < 0:
            return
        yield text[position:found]
        position = found + len(mark)
    yield text[position:]
