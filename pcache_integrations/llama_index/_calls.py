"""One call of the LLM: what it asks the engine for, answers of a given form included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel

from pcache_core import Grammar, Prompt, SamplingParams, Tool, ToolFormat
from pcache_core.errors import OptionError
from pcache_core.grammar import close_objects
from pcache_core.params import ReuseMode
from pcache_integrations._engines import Engine
from pcache_integrations._options import call_options
from pcache_integrations.llama_index._responses import ChatAnswer, CompletionAnswer
from pcache_integrations.llama_index._tools import ToolChoice, as_choice, as_core

_MOST_CALLS = 8
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_PLACE = "a call of PromptCacheLLM"
# Code written for any LLM passes these; a call changes nothing about the server, if there is one.
_OF_HOSTED_MODELS = ("extra_headers", "extra_query", "timeout", "max_retries", "user")


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What the call of any method may ask for beside sampling, as OpenAI has it."""

    response_format: object = None
    logprobs: object = None
    top_logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives of each token to report; None for no report at all.

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

    tools: LlamaIndex's, or mappings of OpenAI's shape. tool_choice: `auto`, `required`, `none`, a
    tool's name or a mapping that names one. tool_required: what no choice means. A call that is
    demanded is made, and is valid for the tool's schema, whatever the model.
    parallel_tool_calls: whether an answer may hold several; by default where none is demanded.
    """

    tools: Sequence[Any] | None = None
    tool_choice: ToolChoice = None
    tool_required: bool = False
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call that is ready to run.

    form, tools: of the tool calls that the answer may hold, none where it may not.
    """

    prompt: Prompt
    params: SamplingParams
    reuse: ReuseMode
    form: ToolFormat | None = None
    tools: Sequence[Tool] = ()
    most_calls: int = 0

    def completion(self) -> CompletionAnswer:
        """For its answer."""
        return CompletionAnswer()

    def chat(self) -> ChatAnswer:
        """For its answer."""
        return ChatAnswer(self.form, self.tools, self.most_calls)


@dataclass(frozen=True, slots=True)
class CallOptions:
    """All options of a call, checked.

    schema: that its answer must follow; None for free text. unstopped: the sampling parameters
    for an answer that must be whole to be of use, which the LLM's own stop strings don't end.

    Raises: OptionError: an unknown name, a value out of range.
    """

    params: SamplingParams
    unstopped: SamplingParams
    reuse: ReuseMode
    schema: Mapping[str, Any] | None
    tools: ToolOptions = ToolOptions()

    @classmethod
    def of_completion(cls, own: Mapping[str, Any], given: Mapping[str, Any]) -> CallOptions:
        """own: the LLM's. given: the call's, which go before these."""
        answer, others = _taken(AnswerOptions, given)
        meant = {name: v for name, v in others.items() if name not in _OF_HOSTED_MODELS}
        params, reuse = call_options(own, meant, _PLACE)
        if answer.num_logprobs is not None:
            params = replace(params, logprobs=answer.num_logprobs)
        # A grammar that was given goes before a format.
        schema = None if params.grammar else schema_of(answer.response_format)
        unstopped = params if meant.get("stop") else replace(params, stop=())
        return cls(params, unstopped, reuse, schema)

    @classmethod
    def of_chat(cls, own: Mapping[str, Any], given: Mapping[str, Any]) -> CallOptions:
        """As `of_completion`, tools included."""
        tools, others = _taken(ToolOptions, given)
        return replace(cls.of_completion(own, others), tools=tools)

    def plain_call(self, prompt: Prompt) -> Call:
        """A call without tools."""
        params = self.params
        if self.schema is not None:
            params = replace(self.unstopped, grammar=Grammar.json(self.schema))
        return Call(prompt, params, self.reuse)

    def call_with_tools(self, prompt: Prompt, engine: Engine) -> Call:
        """The call of a chat; `prompt` tells of the tools.

        Raises: OptionError: a choice that names no tool, a tool that can't be called.
        """
        tools = self.core_tools()
        options = self.tools
        choice = as_choice(options.tool_choice, tools, is_required=options.tool_required)
        if not tools and choice == "any":
            raise OptionError("a tool call is required, but no tools were given")
        if not tools:
            return self.plain_call(prompt)
        several = options.parallel_tool_calls
        if several is None:
            several = choice == "auto"
        most_calls = _MOST_CALLS if several else 1
        params = self.params if choice in ("auto", "none") else self.unstopped
        form = engine.tool_format
        if params.grammar is None:
            grammar = form.grammar(tools, choice, most_calls, self.schema)
            params = replace(params, grammar=grammar)
        if choice == "none":
            return Call(prompt, params, self.reuse)
        return Call(prompt, params, self.reuse, form, tools, most_calls)

    def core_tools(self) -> list[Tool]:
        """The tools in the engine's terms. Raises: OptionError: something else was given."""
        return as_core(self.tools.tools or ())


def _taken(kind: type[Any], given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The options of a kind, and the ones that are left."""
    own = {name: given[name] for name in kind.__slots__ if given.get(name) is not None}
    return kind(**own), {name: v for name, v in given.items() if name not in kind.__slots__}


def format_of(output_cls: Any) -> dict[str, Any]:
    """A `response_format` whose answers are objects of a pydantic class."""
    wanted = {"name": output_cls.__name__, "schema": output_cls.model_json_schema()}
    return {"type": "json_schema", "json_schema": wanted}


def schema_of(response_format: object) -> Mapping[str, Any] | None:
    """The JSON schema that an answer must follow; None for free text.

    response_format: as OpenAI takes it, or a pydantic class.
    Raises: OptionError: neither of these.
    """
    if response_format is None:
        return None
    if isinstance(response_format, type) and issubclass(response_format, BaseModel):
        return _closed(response_format.model_json_schema())
    if not isinstance(response_format, Mapping):
        raise OptionError(
            f"response_format must be a mapping or a pydantic class, got {response_format!r}"
        )
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    wanted = response_format.get("json_schema")
    schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        raise OptionError(
            f"response_format={dict(response_format)!r} is none; use {{'type': 'json_schema', "
            "'json_schema': {'name': ..., 'schema': {...}}}, {'type': 'json_object'} or a class"
        )
    assert isinstance(wanted, Mapping)
    return schema if wanted.get("strict") is False else _closed(schema)


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    closed: Mapping[str, Any] = close_objects(schema)
    return closed
