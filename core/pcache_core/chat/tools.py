"""How a model is told of tools and how it calls them: in the form that its chat template uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pcache_core.chat.calls import Tool, ToolAnswer, ToolCall, ToolReader
from pcache_core.chat.messages import Message, Spelled, render_chat
from pcache_core.errors import ChatTemplateError, OptionError
from pcache_core.grammar import Grammar, close_objects, json_rule
from pcache_core.prompt import Prompt, Segment

ApplyToolTemplate = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]
MOST_CALLS = 8
_TEXT = r"TEXT: /(.|\n)*/"
_TEXT_WITHOUT_BRACE = r"TEXT: /([^{](.|\n)*)?/"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The form of calls in an answer.

    marker: what calls begin with, empty if nothing. opening, closing: around each call, after
    the marker. around: what a list of calls is written in; empty where each has its own marker.
    arguments: what a call names them. is_native: whether the chat template renders tools and calls
    by itself; otherwise messages say it in words. marker_is_shown: whether answers show the
    marker, which a special token is not.
    """

    name: str
    marker: str
    opening: str = ""
    closing: str = ""
    around: tuple[str, str] = ("", "")
    arguments: str = "arguments"
    is_native: bool = True
    marker_is_shown: bool = True

    def reader(self, tools: Sequence[Tool]) -> ToolReader:
        """For an answer that comes in pieces."""
        return ToolReader(self.marker, self.closing, [tool.name for tool in tools])

    def read(self, text: str, tools: Sequence[Tool]) -> ToolAnswer:
        """Take a whole answer apart: content, calls, and what was meant as a call."""
        reader = self.reader(tools)
        first, last = reader.add(text), reader.finish()
        content = first.content + last.content
        calls, invalid = first.calls + last.calls, first.invalid + last.invalid
        return ToolAnswer(content.strip() if calls or invalid else content, calls, invalid)

    def parse(self, text: str, tools: Sequence[Tool]) -> tuple[str, tuple[ToolCall, ...]]:
        """Take a whole answer apart: content and calls; a call that is not valid stays content."""
        answer = self.read(text, tools)
        if not answer.invalid:
            return answer.content, answer.calls
        junk = "\n".join(call.text for call in answer.invalid)
        return "\n".join(part for part in (answer.content, junk) if part), answer.calls

    def write(self, calls: Sequence[ToolCall]) -> str:
        """Calls as a model writes them."""
        written = [
            f'{self.opening}{{"name": {json.dumps(call.name)}, "{self.arguments}": '
            f"{call.arguments_text}}}{self.closing}"
            for call in calls
        ]
        if self.around[0]:
            return self.marker + self.around[0] + ", ".join(written) + self.around[1]
        return "\n".join(self.marker + text for text in written)

    def grammar(
        self,
        tools: Sequence[Tool],
        choice: str = "auto",
        most_calls: int = MOST_CALLS,
        answer: Mapping[str, Any] | None = None,
    ) -> Grammar | None:
        """Return what an answer may be, or None for anything.

        choice: `none`; `auto`: text, calls or both, where a call that is begun is a valid one;
            `any` or `required`: calls and nothing else; a tool's name: one call of it.
        answer: a JSON schema that an answer without calls must follow.
        Raises: OptionError: no such tool; parameters or `answer` are no JSON schema.
        """
        by_name = {tool.name: tool for tool in tools}
        is_free = choice in ("none", "auto") and choice not in by_name
        if is_free and (choice == "none" or not tools):
            return None if answer is None else Grammar.json(answer)
        if is_free and answer is None:
            return self._auto(tools, most_calls)
        if not is_free and choice not in by_name and choice not in ("any", "required"):
            raise OptionError(
                f"tool_choice={choice!r} names no tool; known are {', '.join(by_name) or 'none'}. "
                "Or use auto, any, required or none"
            )
        if not tools:
            raise OptionError(f"tool_choice={choice!r} needs tools, and none were given")
        named = [by_name[choice]] if choice in by_name else list(tools)
        most_calls = 1 if choice in by_name else most_calls
        start, rules = self._forced(named, most_calls)
        if is_free and answer is not None:
            return _lark(f"({start}) | answer_", [*rules, f"answer_: {json_rule(answer)}"])
        return _lark(start, rules)

    def _forced(self, tools: Sequence[Tool], most_calls: int) -> tuple[str, list[str]]:
        """Calls and nothing else: how to start, and the rules for that."""
        marker = self.marker if self.marker_is_shown else ""
        if self.around[0]:
            start = f"{_text(marker + self.around[0])} {self._several(', ', most_calls)} "
            return start + _text(self.around[1]), self._bodies(tools, "")
        if not marker:
            return "call_", self._bodies(tools, "")
        return self._several("\n", most_calls), self._bodies(tools, marker)

    def _auto(self, tools: Sequence[Tool], most_calls: int) -> Grammar | None:
        """Free text until a marker, a valid call after it."""
        if not self.marker_is_shown:
            return None
        if not self.marker:
            return _lark("call_ | TEXT", [*self._bodies(tools, ""), _TEXT_WITHOUT_BRACE])
        head = f"head_[lazy]: TEXT {_text(self.marker)}"
        rules = [head, *self._bodies(tools, ""), _TEXT]
        if self.around[0]:
            calls = f"{_text(self.around[0])} {self._several(', ', most_calls)}"
            return _lark(f"TEXT | head_ {calls} {_text(self.around[1])}", rules)
        return _lark(f"(head_ call_){{0,{most_calls}}} TEXT", rules)

    def _several(self, between: str, most_calls: int) -> str:
        """Return a rule for one or more calls."""
        return (
            f"call_ ({_text(between)} call_){{0,{most_calls - 1}}}" if most_calls > 1 else "call_"
        )

    def _bodies(self, tools: Sequence[Tool], marker: str) -> list[str]:
        """Return a rule `call_`, and one for each tool."""
        rules = [f"call_: {' | '.join(f'call_{index}' for index in range(len(tools)))}"]
        for index, tool in enumerate(tools):
            start = f'{marker}{self.opening}{{"name": {json.dumps(tool.name)}, "{self.arguments}": '
            schema = json_rule(close_objects(_object(tool)))
            rules.append(f"call_{index}: {_text(start)} {schema} {_text('}' + self.closing)}")
        return rules


def _object(tool: Tool) -> Mapping[str, Any]:
    """The tool's parameters; anything is possible where nothing is said but that it's an object."""
    if not tool.parameters:
        return {"type": "object", "properties": {}}
    return {"type": "object", **tool.parameters}


def _text(text: str) -> str:
    return json.dumps(text)


def _lark(start: str, rules: Sequence[str]) -> Grammar:
    return Grammar.lark("\n".join([f"start: {start}", *rules]))


FORMATS = (
    ToolFormat("hermes", "<tool_call>", "\n", "\n</tool_call>"),
    ToolFormat("mistral", "[TOOL_CALLS]", around=(" [", "]")),
    ToolFormat("llama", "", arguments="parameters"),
)
PLAIN = ToolFormat("plain", "<tool_call>", "\n", "\n</tool_call>", is_native=False)
"""For templates that know no tools."""

_PROBE = Tool("probe_q7", "Probe.", {"type": "object", "properties": {"v": {"type": "integer"}}})
_CALL_ID = "probe0q7x"


def tool_format(apply: ApplyToolTemplate, is_special: Callable[[str], bool]) -> ToolFormat:
    """Find out the form that a chat template writes calls in, by having it write one.

    apply: renders messages and tools. is_special: whether a text is a special token.
    """
    written = _probe_text(apply)
    if written is None:
        return PLAIN
    for form in FORMATS:
        if (form.marker or f'"{form.arguments}"') in written:
            return replace(form, marker_is_shown=not is_special(form.marker))
    return PLAIN


def _probe_text(apply: ApplyToolTemplate) -> str | None:
    """Return what a template makes of a call; None if it renders no tools or no calls."""
    question = {"role": "user", "content": "q"}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": _CALL_ID,
                "type": "function",
                "function": {"name": _PROBE.name, "arguments": {"v": 1}},
            }
        ],
    }
    result = {"role": "tool", "content": "r", "name": _PROBE.name, "tool_call_id": _CALL_ID}
    try:
        if _PROBE.name not in apply([question], [_PROBE.as_function()]):
            return None
        chat = apply([question, call, result], [])
    except ChatTemplateError:
        return None
    return chat if _PROBE.name in chat else None


_ID_LENGTH = 9
_RESULT = ("<tool_response>\n", "\n</tool_response>")


def render_tool_chat(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    form: ToolFormat,
    apply: ApplyToolTemplate,
    spelled: Spelled,
) -> Prompt:
    """Render messages and tools; what tools are there is template text.

    Raises: PromptError: no messages. ChatTemplateError: the template refuses them.
    """
    if form.is_native:
        described = [tool.as_function() for tool in tools]
        named = [_with_short_ids(message) for message in messages]
        return render_chat(named, lambda chat: apply(chat, described), spelled)
    plain = [_in_words(message, form) for message in messages]
    return _with_listing(plain, tools, form, lambda chat: apply(chat, []), spelled)


def _with_short_ids(message: Message) -> Message:
    """Return the message with ids of nine letters and digits: some templates refuse any other."""
    calls = [replace(call, id=_short_id(call.id)) for call in message.tool_calls]
    answered = message.tool_call_id
    return replace(
        message,
        tool_calls=calls,
        tool_call_id=answered if answered is None else _short_id(answered),
    )


def _short_id(call_id: str) -> str:
    if len(call_id) == _ID_LENGTH and call_id.isalnum() and call_id.isascii():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_ID_LENGTH]


def _with_listing(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    form: ToolFormat,
    apply: Callable[[list[dict[str, object]]], str],
    spelled: Spelled,
) -> Prompt:
    """Tell of the tools in the system message, or in the first where there can be none."""
    if not tools or not messages:
        return render_chat(messages, apply, spelled)
    listing = Segment(_listing(tools, form), "literal")
    first, *others = messages
    in_first = replace(first, segments=[listing, Segment("\n\n", "literal"), *first.segments])
    if first.role == "system":
        return render_chat([in_first, *others], apply, spelled)
    try:
        return render_chat([Message("system", [listing]), *messages], apply, spelled)
    except ChatTemplateError:
        return render_chat([in_first, *others], apply, spelled)


def _listing(tools: Sequence[Tool], form: ToolFormat) -> str:
    described = [json.dumps(tool.as_function()["function"], ensure_ascii=False) for tool in tools]
    opening, closing = form.marker + form.opening, form.closing
    example = f'{opening}{{"name": "<name>", "{form.arguments}": {{...}}}}{closing}'
    return "\n".join(["You may call these tools:", *described, "To call one, write:", example])


def _in_words(message: Message, form: ToolFormat) -> Message:
    """Return the message without fields that only templates with tools know."""
    if message.role == "tool":
        opening, closing = (Segment(text, "literal") for text in _RESULT)
        return Message("user", [opening, *message.segments, closing])
    if not message.tool_calls:
        return Message(message.role, message.segments)
    # Arguments are a model's words and may hold anything that a user said.
    written = [Segment(form.write([call]), "argument") for call in message.tool_calls]
    between = Segment("\n", "literal")
    parts = [[*message.segments]] if message.text else []
    parts += [[segment] for segment in written]
    joined = [segment for part in parts for segment in (*part, between)][:-1]
    return Message(message.role, joined)
