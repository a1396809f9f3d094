"""Chat messages to segments, through the model's own chat template."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pcache_core.chat.calls import ToolCall
from pcache_core.errors import ChatTemplateError, PromptError
from pcache_core.prompt import Prompt, Segment, SegmentKind

_MARK = re.compile(r"\ue0f0[0-9a-f]{16}\ue0f1")
_THOUGHTS = ("<think>", "</think>")
ApplyTemplate = Callable[[list[dict[str, Any]]], str]


Spelled = Callable[[str], "Sequence[str] | bool"]
"""The control tokens that a text spells; True where they are not told, and none or False."""


def _nothing(text: str) -> Sequence[str]:
    return ()


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
        """Return the message as chat templates take it, with another content."""
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
    messages: Sequence[Message], apply_template: ApplyTemplate, spelled: Spelled = _nothing
) -> Prompt:
    """Render messages so that markup becomes `literal` and their segments stay as they are.

    What calls hold is a part of the markup, unless it spells control tokens.

    The template is rendered twice: with the real contents, which is the truth, and with a unique
    mark in place of each content, which shows where contents go. A content that the template
    rewrites becomes `text`, between those of its documents that it left as they are; the whole
    prompt does where it can't be told where one ends. Documents that are lost so are counted in the
    prompt's `fallback_reason`. Where such a text would spell control tokens, the template gets
    marks in place of those in messages, and each is put back as an `argument`; so is a content that
    spells them all the same, because the template changes its letters.

    spelled: the control tokens that a text spells, which must not become such.
    Raises: PromptError: no messages. ChatTemplateError: the template refuses them, an id or a name
        spells a control token, or a token that is not told stands where it would become one.
    """
    if not messages:
        raise PromptError("the chat has no messages; give at least one")
    _check_names(messages, spelled)
    said = [message.text for message in messages]
    said += [call.arguments_text for message in messages for call in message.tool_calls]
    tokens = [token for text in said for token in _tokens(spelled(text))]
    with suppress(_SpelledError):
        return _render(messages, apply_template, spelled)
    veil = Veil(tokens)
    veiled = [veil.message(message) for message in messages]
    prompt = _render(veiled, apply_template, spelled, forged="argument")
    lifted = [part for segment in prompt.segments for part in veil.lifted(segment)]
    return Prompt(lifted, fallback_reason=prompt.fallback_reason)


class _SpelledError(ChatTemplateError):
    """Text of a message would become a control token."""

    def __init__(self) -> None:
        super().__init__(
            "the chat template rewrites its messages, and one of them spells a special token, "
            "which can't be told from the template's own; remove it from the message"
        )


def _render(
    messages: Sequence[Message],
    apply_template: ApplyTemplate,
    spelled: Spelled,
    forged: SegmentKind | None = None,
) -> Prompt:
    """Render once; see `render_chat`.

    forged: what a rewritten content becomes that spells control tokens; None for an error.
    Raises: _SpelledError: text of a message would become a control token.
    """
    truth = apply_template([message.as_dict(message.text) for message in messages])
    # Templates ask whether there is a content, so that an empty one stays empty.
    marks = [f"\ue0f0{secrets.token_hex(8)}\ue0f1" if m.text else "" for m in messages]
    marked = apply_template([m.as_dict(mark) for m, mark in zip(messages, marks, strict=True)])
    # Some templates write the system message into the last of the user's.
    contents = [(mark, m) for mark, m in zip(marks, messages, strict=True) if mark]
    places = {found[0]: found.start() for found in _MARK.finditer(marked)}
    contents.sort(key=lambda pair: places.get(pair[0], -1))
    segments = _fill(marked, contents, truth, spelled, forged)
    calls = [call for message in messages for call in message.tool_calls]
    spoken = [call.arguments_text for call in calls if spelled(call.arguments_text)]
    segments = segments and _set_apart(segments, spoken)
    given = [segment for message in messages for segment in message.segments]
    if segments is None:
        if spoken or any(spelled(message.text) for message in messages):
            raise _SpelledError
        segments = _documents_in(truth, given)
    return Prompt(segments, fallback_reason=_lost(given, segments))


def _documents_in(text: str, given: Sequence[Segment], kind: SegmentKind = "text") -> list[Segment]:
    """Cut the documents that a template kept out of a text that it rewrote, in their order.

    kind: of what stands between them.
    """
    parts: list[Segment] = []
    position = 0
    for document in given:
        found = text.find(document.text, position) if document.kind == "document" else -1
        if found >= 0:
            parts += [Segment(text[position:found], kind), document]
            position = found + len(document.text)
    return [*parts, Segment(text[position:], kind)]


def _lost(given: Sequence[Segment], segments: Sequence[Segment]) -> str | None:
    """Say how many of the documents that were given are none in the prompt's segments."""
    had, has = (
        sum(s.kind == "document" and not s.text.isspace() for s in each if s.text)
        for each in (given, segments)
    )
    if has >= had:
        return None
    return f"the chat template rewrites its messages, which hid {had - has} of {had} documents"


def _tokens(found: Sequence[str] | bool) -> Sequence[str]:  # noqa: FBT001 (what a caller says)
    return () if isinstance(found, bool) else found


class Veil:
    """Marks in place of control tokens, which no template takes for anything.

    tokens: to be hidden.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        salt = f"{secrets.randbelow(10**16):016}"
        ordered = sorted(set(tokens), key=len, reverse=True)
        self._marks = {t: f"\ue0f2{salt}{n}\ue0f3" for n, t in enumerate(ordered)}
        self._tokens = {mark: token for token, mark in self._marks.items()}

    def message(self, message: Message) -> Message:
        """Return the message with its contents and the arguments of its calls hidden."""
        return replace(
            message,
            segments=[replace(s, text=self._hidden(s.text)) for s in message.segments],
            tool_calls=[
                replace(call, arguments=self._hidden(dict(call.arguments)))
                for call in message.tool_calls
            ],
        )

    def lifted(self, segment: Segment) -> Iterator[Segment]:
        """Yield what a segment was: its tokens are data."""
        parts = [segment.text]
        if self._tokens:
            parts = re.split(f"({'|'.join(self._tokens)})", segment.text)
        if not segment.is_markup:
            yield replace(segment, text="".join(self._tokens.get(part, part) for part in parts))
            return
        for number, part in enumerate(parts):
            if number % 2:
                yield Segment(self._tokens[part], "argument")
            elif part:
                yield replace(segment, text=part)

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            for token, mark in self._marks.items():
                value = value.replace(token, mark)
            return value
        if isinstance(value, dict):
            return {self._hidden(name): self._hidden(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._hidden(each) for each in value]
        return value


def _check_names(messages: Sequence[Message], spelled: Spelled) -> None:
    """Raises: ChatTemplateError: an id or a name spells a control token."""
    for message in messages:
        ids = [call.id for call in message.tool_calls]
        for name in (*ids, message.tool_call_id, message.name):
            if name and spelled(name):
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
    """Return the segments of `text.strip()`: many templates trim their contents."""
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
    contents: Sequence[tuple[str, Message]],
    truth: str,
    spelled: Spelled,
    forged: SegmentKind | None,
) -> list[Segment] | None:
    """Put contents where their marks stand, as they are or stripped, whichever gives the truth.

    A content that neither fits ends where the template's own text after it begins.

    contents: messages, each after its mark, in the order of the text.

    None if a mark does not stand there once and in order, or a content that is rewritten has no
    text of the template's after it.

    Raises: _SpelledError: a content that is rewritten spells control tokens.
    """
    literals = list(_between(marked, [mark for mark, _ in contents]))
    if len(literals) <= len(contents) or not truth.startswith(literals[0]):
        return None
    segments = [Segment(literals[0], "literal")]
    position = len(literals[0])
    pairs = zip(contents, literals[1:], strict=True)
    for number, ((_, message), after) in enumerate(pairs, start=1):
        for variant in (message.segments, strip_segments(message.segments)):
            text = "".join(segment.text for segment in variant)
            if truth.startswith(text + after, position):
                break
        else:
            is_last = number == len(contents)
            end = len(truth) - len(after) if is_last else after and truth.find(after, position)
            if not end or end < position:
                return None
            text = truth[position:end]
            is_forged = _is_forged(text, message, spelled)
            if is_forged and (forged is None or isinstance(spelled(text), bool)):
                raise _SpelledError
            kind = forged if is_forged and forged else "text"
            variant = _documents_in(text, message.segments, kind)
        segments += [*variant, Segment(after, "literal")]
        position += len(text) + len(after)
    return segments if "".join(segment.text for segment in segments) == truth else None


def _is_forged(text: str, message: Message, spelled: Spelled) -> bool:
    """Say whether a rewritten content spells control tokens, other than of an answer's thoughts."""
    found = spelled(text)
    if isinstance(found, bool):
        return bool(spelled(message.text))
    if message.role == "assistant":
        found = [token for token in found if token not in _THOUGHTS]
    return bool(found)


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
