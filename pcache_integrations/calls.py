"""One call of a language model, for both integrations: what is asked, and what came back.

Both frameworks pass on what OpenAI's API has: sampling, tools, a format of the answer, log
probabilities. Here that becomes what the engine takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from pcache_core import (
    Chunk,
    Grammar,
    Message,
    Prompt,
    Report,
    SamplingParams,
    Segment,
    Tool,
    ToolAnswer,
    ToolFormat,
)
from pcache_core.base_engine import Engine
from pcache_core.chat.tools import MOST_CALLS
from pcache_core.errors import ChatTemplateError, OptionError
from pcache_core.grammar import close_objects
from pcache_core.params import ReuseMode, check_reuse

SAMPLING = tuple(field.name for field in fields(SamplingParams))
OF_A_CALL = (
    "reuse", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
    "speculative", "stop",
)  # fmt: skip
"""Options of a language model that a call may say otherwise, by the same name."""

ToolChoice = str | bool | Mapping[str, Any] | None

_NAMES = {"timeout": "timeout_s"}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_MEANINGS = {"any": "any", "required": "any", "auto": "auto", "none": "none"}
_REUSE_FIGURES = (
    "reuse", "prompt_tokens", "cached_tokens", "encoded_tokens", "repaired_tokens",
    "computed_tokens", "ttft_ms", "fallback_reason",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What a call may ask for beside sampling, as OpenAI has it.

    response_format: a mapping. logprobs, top_logprobs: whether each token's log probability is
    reported, and those of how many alternatives.
    """

    response_format: object = None
    logprobs: object = None
    top_logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Return how many alternatives of each token to report; None for no report at all.

        Raises: OptionError: `logprobs` is a number, or missing.
        """
        if self.logprobs is True:
            return self.top_logprobs or 0
        if self.logprobs in (None, False) and self.top_logprobs is None:
            return None
        raise OptionError(
            f"logprobs={self.logprobs!r}, top_logprobs={self.top_logprobs!r}: logprobs must be "
            "True or False, and True with top_logprobs, which says how many alternatives to report"
        )


@dataclass(frozen=True, slots=True)
class ToolOptions:
    """What the call of a chat may ask for beside that.

    tools: in OpenAI's shape. tool_choice: `auto`, `any` or `required` (or True), `none`, a tool's
    name, or a mapping that names one. tool_required: what no choice means. A call that is demanded
    is made, and is valid for the tool's schema, whatever the model. parallel_tool_calls: whether
    an answer may hold several calls; by default where none is demanded.
    """

    tools: Sequence[Any] = ()
    tool_choice: ToolChoice = None
    tool_required: bool = False
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call, checked.

    tools: that the prompt tells of. choice: `auto`, `any`, `none` or a tool's name. most_calls:
    that the answer may hold. schema: that an answer without calls follows. form: of the calls that
    the answer may hold; None where it may hold none, and before `on`.
    """

    params: SamplingParams
    reuse: ReuseMode
    schema: Mapping[str, Any] | None = None
    tools: Sequence[Tool] = ()
    choice: str = "auto"
    most_calls: int = 0
    form: ToolFormat | None = None

    def on(self, engine: Engine) -> Call:
        """Constrain the answer to the schema, and to calls in the form of the engine's model.

        Raises: OptionError: a schema that can't be followed.
        """
        form = engine.tool_format if self.tools else None
        grammar = self.params.grammar
        if grammar is None and form is not None:
            grammar = form.grammar(self.tools, self.choice, self.most_calls, self.schema)
        elif grammar is None and self.schema is not None:
            grammar = Grammar.json(self.schema)
        return replace(
            self,
            params=replace(self.params, grammar=grammar),
            form=None if self.choice == "none" else form,
        )

    def read(self, text: str) -> ToolAnswer:
        """Take a whole answer apart into its text and its calls."""
        return self.form.read(text, self.tools) if self.form else ToolAnswer(text)


class AnswerReader:
    """Takes a streamed answer apart into its text and its calls."""

    def __init__(self, call: Call) -> None:
        self._reader = call.form.reader(call.tools) if call.form else None

    def parts(self, chunk: Chunk) -> Iterator[ToolAnswer]:
        """Yield what is known once this chunk has come."""
        if self._reader is None:
            yield ToolAnswer(chunk.text)
            return
        yield self._reader.add(chunk.text)
        if chunk.finish_reason is not None:
            yield self._reader.finish()


def make_call(
    own: Mapping[str, Any], given: Mapping[str, Any], place: str, *, takes_tools: bool
) -> Call:
    """Check the options of one call.

    own: the language model's. given: the call's, which go before these.
    Raises: OptionError: an unknown name, a value out of range, a tool or choice that is none.
    """
    answer, others = _taken(AnswerOptions, given)
    asked, others = _taken(ToolOptions, others) if takes_tools else (ToolOptions(), others)
    params, reuse = call_options(own, others, place)
    if answer.num_logprobs is not None:
        params = replace(params, logprobs=answer.num_logprobs)
    # A grammar that was given goes before a format.
    schema = None if params.grammar else schema_of(answer.response_format)
    tools = [core_tool(tool) for tool in asked.tools]
    choice = as_choice(asked.tool_choice, tools, is_required=asked.tool_required)
    if choice == "any" and not tools:
        raise OptionError("a tool call is required, but no tools were given; give tools=")
    is_demanded = choice not in ("auto", "none")
    if (schema is not None or is_demanded) and others.get("stop") is None:
        # The model's own stop strings are meant for text; a part of a call or an object is useless.
        params = replace(params, stop=())
    several = asked.parallel_tool_calls
    most_calls = MOST_CALLS if (not is_demanded if several is None else several) else 1
    return Call(params, reuse, schema, tools, choice, most_calls)


def call_options(
    own: Mapping[str, Any], given: Mapping[str, Any], place: str
) -> tuple[SamplingParams, ReuseMode]:
    """Check a call's sampling and reuse: what is given for it, else the language model's own.

    `timeout` is what the frameworks call `timeout_s`. Names with `cache` in them are other
    providers' hints about what to cache. What can be reused is found without them, so they are
    accepted and have no effect.

    Raises: OptionError: an unknown name; a value out of range.
    """
    meant = {_NAMES.get(n, n): v for n, v in given.items() if "cache" not in n.lower()}
    check_names(meant, (*SAMPLING, "reuse"), place)
    chosen = {**own, **{name: value for name, value in meant.items() if value is not None}}
    reuse = check_reuse(chosen.pop("reuse"))
    chosen["stop"] = chosen["stop"] or ()
    return SamplingParams(**chosen), reuse


def check_names(given: Collection[str], known: Collection[str], place: str) -> None:
    """Refuse names that nothing would read. Raises: OptionError."""
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise OptionError(f"{place} doesn't know the option {name!r}; {remedy}")


def core_tool(tool: Any) -> Tool:
    """Return a tool of OpenAI's shape as the engine takes it.

    Raises: OptionError: it is not a function.
    """
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise OptionError(
            "a tool must be one of the framework's or {'type': 'function', 'function': {'name': "
            f"...}}}}, and not one that a server runs; got {tool!r}"
        )
    parameters = function.get("parameters") or _NO_PARAMETERS
    return Tool(function["name"], function.get("description") or "", parameters)


def as_choice(choice: ToolChoice, tools: Sequence[Tool], *, is_required: bool = False) -> str:
    """Return a choice in any of the shapes providers have as `auto`, `any`, `none` or a name.

    is_required: what None means. Raises: OptionError: no such tool, or no such shape.
    """
    if choice is None or choice is True or choice is False:
        return "any" if is_required or choice is True else "auto"
    if isinstance(choice, Mapping):  # of OpenAI's or of Anthropic's
        function = choice.get("function")
        named = function.get("name") if isinstance(function, Mapping) else choice.get("name")
        choice = named or choice.get("type")
    names = [tool.name for tool in tools]
    if isinstance(choice, str) and choice in names:
        return choice
    if not isinstance(choice, str) or choice not in _MEANINGS:
        raise OptionError(
            f"tool_choice={choice!r} names no tool that was given; known are "
            f"{', '.join(names) or 'none'}. It must be a tool's name, auto, any (or required), "
            "none, or {'type': 'function', 'function': {'name': ...}}"
        )
    return _MEANINGS[choice]


def format_of(name: str, schema: Mapping[str, Any], *, strict: bool = True) -> dict[str, Any]:
    """Return a `response_format` whose answers follow a JSON schema."""
    wanted = {"name": name, "schema": schema, "strict": strict}
    return {"type": "json_schema", "json_schema": wanted}


def schema_of(response_format: object) -> Mapping[str, Any] | None:
    """Return the JSON schema that an answer must follow; None for free text.

    response_format: as OpenAI takes it. Objects have no more properties than the schema names,
        unless `strict` is False.
    Raises: OptionError: it is not a format.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    wanted = response_format.get("json_schema") if isinstance(response_format, Mapping) else None
    schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        raise OptionError(
            f"response_format={response_format!r} is not a format; use {{'type': 'json_schema', "
            "'json_schema': {'name': ..., 'schema': {...}}}, {'type': 'json_object'}, "
            "{'type': 'text'} or a class"
        )
    assert isinstance(wanted, Mapping)
    closed: Mapping[str, Any] = schema if wanted.get("strict") is False else close_objects(schema)
    return closed


def prompt_from_turns(
    engine: Engine, turns: Sequence[Message], tools: Sequence[Tool] = ()
) -> Prompt:
    """Render messages with the model's own chat template.

    Templates that insist on alternating roles, or know no system message, get neighbours of the
    same role as one message, and the system message at the beginning of the user's. One that wants
    the user to begin gets an empty message of the user's before the assistant's greeting.

    Raises: PromptError: no messages. ChatTemplateError: the template refuses all of that.
    """
    try:
        return engine.prompt_from_chat(turns, tools)
    except ChatTemplateError:
        merged = _merged(_without_system(turns))
        ways = [_merged(turns), merged]
        if merged[0].role == "assistant":
            ways.append([Message("user", []), *merged])
        for gentler in ways:
            try:
                return engine.prompt_from_chat(gentler, tools)
            except ChatTemplateError:
                continue
        raise


def _merged(turns: Sequence[Message]) -> list[Message]:
    """Merge neighbours of one role; results of calls stay apart."""
    merged: list[Message] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if last is None or last.role != turn.role or turn.role == "tool":
            merged.append(turn)
            continue
        between = [Segment("\n\n", "literal")] if last.text and turn.text else []
        merged[-1] = replace(
            last,
            segments=[*last.segments, *between, *turn.segments],
            tool_calls=[*last.tool_calls, *turn.tool_calls],
        )
    return merged


def _without_system(turns: Sequence[Message]) -> list[Message]:
    return [replace(turn, role="user") if turn.role == "system" else turn for turn in turns]


def reuse_figures(report: Report) -> dict[str, Any]:
    """Return how much of a prompt was reused, and which documents the answer drew on."""
    sources = [{"id": found.name, "share": found.share} for found in report.documents]
    return {**{name: getattr(report, name) for name in _REUSE_FIGURES}, "sources": sources}


def usage(reports: Sequence[Report]) -> dict[str, Any]:
    """Count the tokens of several requests together, in OpenAI's shape."""
    prompt = sum(report.prompt_tokens for report in reports)
    completion = sum(report.generated_tokens for report in reports)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(report.cached_tokens for report in reports)},
    }


def _taken(kind: type[Any], given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the options of a kind, and the ones that are left."""
    own = {name: given[name] for name in kind.__slots__ if given.get(name) is not None}
    return kind(**own), {name: v for name, v in given.items() if name not in kind.__slots__}
