"""One call of the chat model: what it asks the engine for, and what it makes of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from pcache_core import (
    Chunk,
    Generation,
    Grammar,
    Prompt,
    Report,
    SamplingParams,
    Tool,
    ToolAnswer,
    ToolFormat,
)
from pcache_core.errors import OptionError
from pcache_core.params import ReuseMode
from pcache_core.results import FinishReason
from pcache_integrations._engines import Engine
from pcache_integrations.langchain._messages import chat_prompt
from pcache_integrations.langchain._results import chat_logprobs, generation_info, usage_metadata
from pcache_integrations.langchain._structured import format_schema
from pcache_integrations.langchain._tools import (
    AnyTool,
    ToolChoice,
    as_choice,
    as_core,
    call_chunks,
    message_calls,
)

_MOST_CALLS = 8


@dataclass(frozen=True, slots=True)
class TurnOptions:
    """What a call of a chat model may ask for beside what any model takes.

    tools, tool_choice, response_format: as LangChain and OpenAI have them. parallel_tool_calls:
    whether an answer may hold several calls; where calls are demanded only if it is True.
    logprobs, top_logprobs: as OpenAI has them.
    """

    tools: Sequence[AnyTool] = ()
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    response_format: object = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @classmethod
    def taken_from(cls, given: Mapping[str, Any]) -> tuple[TurnOptions, dict[str, Any]]:
        """These options, and the ones that are left.

        `stream` LangChain passes on after acting upon it; `strict` is always so.
        """
        own = {name: given[name] for name in cls.__slots__ if given.get(name) is not None}
        known = (*cls.__slots__, "stream", "strict")
        return cls(**own), {name: v for name, v in given.items() if name not in known}

    @property
    def needs_whole_answer(self) -> bool:
        """Whether a call or a format is demanded, of which a part would be of no use."""
        if format_schema(self.response_format) is not None:
            return True
        return bool(self.tools) and as_choice(self.tool_choice, as_core(self.tools)) not in (
            "auto",
            "none",
        )

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives of each token to report; None for no report at all.

        Raises: OptionError: `logprobs` is a number, or missing.
        """
        if self.logprobs is not None and not isinstance(self.logprobs, bool):
            raise OptionError(
                f"logprobs={self.logprobs!r} must be True or False; how many alternatives are "
                "reported is top_logprobs"
            )
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise OptionError(f"top_logprobs={self.top_logprobs!r} needs logprobs=True")
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A call that is ready to run.

    tools: that the answer may call, none where it may not.
    """

    model_name: str
    prompt: Prompt
    params: SamplingParams
    reuse: ReuseMode
    form: ToolFormat | None
    tools: Sequence[Tool]

    def result(self, answer: Generation) -> ChatResult:
        """The whole answer as a message."""
        parts = self.form.read(answer.text, self.tools) if self.form else ToolAnswer(answer.text)
        message = AIMessage(
            content=parts.content,
            usage_metadata=usage_metadata(answer.report),
            response_metadata=self.metadata(
                answer.finish_reason, answer.report, has_calls=bool(parts.calls)
            ),
            **message_calls(parts),
        )
        if answer.logprobs:
            message.response_metadata["logprobs"] = chat_logprobs(answer.logprobs)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def pieces(self) -> TurnPieces:
        """For an answer that is streamed."""
        return TurnPieces(self)

    def metadata(
        self, finish_reason: FinishReason, report: Report, *, has_calls: bool
    ) -> dict[str, Any]:
        """Why the answer ended, and what it was made with."""
        info = generation_info(finish_reason, report)
        if has_calls:
            info["finish_reason"] = "tool_calls"
        return {"model_name": self.model_name, "model_provider": "pcache", **info}


class TurnPieces:
    """Turns the engine's chunks into LangChain's. Counts and names come once, with the last."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._reader = turn.form.reader(turn.tools) if turn.form else None
        self._num_calls = 0
        self._has_calls = False

    def next(self, piece: Chunk) -> ChatGenerationChunk:
        """One piece of the answer."""
        parts = [ToolAnswer(piece.text)]
        if self._reader is not None:
            parts = [self._reader.add(piece.text)]
            if piece.finish_reason is not None:
                parts.append(self._reader.finish())
        calls = []
        for part in parts:
            calls += call_chunks(part, self._num_calls)
            self._num_calls += len(part.calls) + len(part.invalid)
            self._has_calls |= bool(part.calls)
        fields: dict[str, Any] = {
            "content": "".join(part.content for part in parts),
            "tool_call_chunks": calls,
        }
        metadata: dict[str, Any] = {}
        if piece.logprobs:
            metadata["logprobs"] = chat_logprobs(piece.logprobs)
        if piece.finish_reason is not None and piece.report is not None:
            fields |= {"chunk_position": "last", "usage_metadata": usage_metadata(piece.report)}
            metadata |= self._turn.metadata(
                piece.finish_reason, piece.report, has_calls=self._has_calls
            )
        return ChatGenerationChunk(message=AIMessageChunk(**fields, response_metadata=metadata))


def make_turn(
    engine: Engine,
    messages: Sequence[BaseMessage],
    options: TurnOptions,
    params: SamplingParams,
    reuse: ReuseMode,
    *,
    model_name: str,
) -> Turn:
    """Check a call and render its prompt.

    Raises: OptionError, PromptError, ChatTemplateError: it can't be made.
    """
    tools = as_core(options.tools)
    choice = as_choice(options.tool_choice, tools)
    schema = format_schema(options.response_format)
    form = engine.tool_format if tools else None
    grammar = params.grammar
    if form is not None and grammar is None:
        several = options.parallel_tool_calls
        if several is None:
            several = choice == "auto"
        grammar = form.grammar(tools, choice, _MOST_CALLS if several else 1, schema)
    elif schema is not None and grammar is None:
        grammar = Grammar.json(schema)
    params = replace(params, grammar=grammar, logprobs=options.num_logprobs)
    prompt = chat_prompt(engine, messages, tools)
    is_callable = form if choice != "none" else None
    return Turn(model_name, prompt, params, reuse, is_callable, tools)
