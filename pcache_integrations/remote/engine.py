"""An engine whose model runs on a vLLM server: the same calls, answered over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from functools import cached_property
from typing import Any

from pcache_core.chat.messages import Message, render_chat
from pcache_core.chat.tool_chat import render_tool_chat
from pcache_core.chat.tools import Tool, ToolFormat, tool_format
from pcache_core.errors import OptionError, PromptError
from pcache_core.library.preamble import Preamble
from pcache_core.params import DEFAULT_REUSE, ReuseMode, SamplingParams, check_repair, check_reuse
from pcache_core.precompute import ForgetReport
from pcache_core.prompt import Prompt, Segment
from pcache_core.report import EncodeReport
from pcache_core.results import Chunk, Generation
from pcache_core.store import StoreStats
from pcache_core.tokens import TokenisedPrompt, tokenise
from pcache_core.totals import EngineStats, Reports
from pcache_integrations.remote.keeper import Keeper
from pcache_integrations.remote.link import Link, served_model
from pcache_integrations.remote.modules import (
    USUAL_SEPARATOR,
    Joined,
    PromptModules,
    join_separators,
)
from pcache_integrations.remote.request import Answer, RemoteRequest
from pcache_integrations.remote.server import Address, Server
from pcache_integrations.vllm.protocol import Description

_AS_THEY_ARE = "a vLLM server uses states as they are, and repairs nothing"


class RemoteEngine:
    """Answers prompts by a vLLM server, which fills what it can from module states.

    The server is the one that `pcache serve` starts; one without the connector gets plain prompts,
    and its own prefix cache is all that is reused. Documents that the server has no state of are
    encoded there after the first answer that needed them, in the background.

    model: whose tokenizer to use; also the name that the server knows it by.
    reuse: `off`, `exact` or `fast`; `balanced` and `high` run as `fast`, and reports say so.
    namespace, preamble: as the server was started with. One that was started with others answers
        without states, and reports say so.

    Raises: ModelError: the server can't be reached; no tokenizer. OptionError: unknown mode.
    """

    def __init__(
        self,
        address: Address,
        model: str,
        *,
        reuse: ReuseMode = DEFAULT_REUSE,
        namespace: str = "default",
        preamble: Preamble | None = None,
        min_module_tokens: int = 8,
    ) -> None:
        if preamble is not None and not isinstance(preamble, Preamble):
            raise OptionError(
                f"preamble must be a Preamble, got {type(preamble).__name__}; "
                "for example Preamble.of_file(...), as given to `pcache serve`"
            )
        self.address = address
        self.reuse = check_reuse(reuse)
        self.namespace = namespace
        self.min_module_tokens = min_module_tokens
        self.repair: float | None = None
        self._server = Server(address)
        self.lm = served_model(self._server, model)
        self.preamble = Preamble.of_folder(self.lm.text.folder) if preamble is None else preamble
        self._link = Link(self._server, self.lm, namespace, self.preamble)
        self._keeper = Keeper(self._server, model)
        self.reports = Reports()

    @property
    def connector(self) -> Description | None:
        """The server's connector; None if it has none. It is asked once."""
        return self._link.connector

    @property
    def fingerprint(self) -> str:
        """Of the server's model; its name where the server has no connector to say it."""
        return self.connector.model if self.connector else self.lm.name

    def preamble_for(self, text: str) -> tuple[int, ...]:
        """As `PromptCacheEngine.preamble_for`."""
        return self._link.maker.preambles.ids_for(text)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model is told of tools and how it calls them."""
        return tool_format(self.lm.text.apply_chat_template, self.lm.text.holds_special)

    def prompt_from_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
        """As `PromptCacheEngine.prompt_from_chat`."""
        text = self.lm.text
        if not tools and not any(m.tool_calls or m.role == "tool" for m in messages):
            return render_chat(messages, text.apply_chat_template, text.holds_special)
        return render_tool_chat(
            messages, tools, self.tool_format, text.apply_chat_template, text.holds_special
        )

    def tokenise(self, prompt: Prompt) -> TokenisedPrompt:
        """The prompt's token ids, the same for every reuse mode.

        A document is tokenised together with what separates it from the next.
        """
        return self._joined(prompt)[1]

    def rank(self, question: str, documents: Sequence[str]) -> list[float]:
        """Refuse. Raises: OptionError: always, as a server does not show its attention."""
        raise OptionError(
            "documents are ranked by attention, which a server does not show; "
            "use a model in this process: leave out base_url"
        )

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> Generation:
        """The whole answer at once; arguments and errors as for `stream`."""
        return Generation.of(list(self.stream(prompt, params, reuse, repair)))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> Generator[Chunk, None, None]:
        """The answer piece by piece. The last chunk has `finish_reason` and `report`.

        Raises: ContextLengthError, PromptError, OptionError: before the server is asked.
            ModelError: it can't be reached, or fails. DeadlineExceededError: `params.timeout_s` has
            passed.
        """
        started = time.perf_counter()
        request = self._request(prompt, params or SamplingParams(), reuse, repair)
        return self._run(request, request.body(self.lm), started)

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> Generation:
        """`generate` without blocking the event loop."""
        chunks = self.astream(prompt, params, reuse, repair)
        return Generation.of([chunk async for chunk in chunks])

    async def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` without blocking the event loop."""
        started = time.perf_counter()
        request = await asyncio.to_thread(
            self._request, prompt, params or SamplingParams(), reuse, repair
        )
        answer = Answer(request, self.lm)
        async with aclosing(
            self._server.astream(request.body(self.lm), request.params.timeout_s)
        ) as events:
            async for event in events:
                chunk = answer.chunk(event, _ms_since(started))
                if chunk is not None:
                    yield chunk
        yield self._finished(answer)

    def encode(
        self,
        texts: Sequence[str],
        progress: bool = True,  # noqa: FBT001, FBT002 (as `PromptCacheEngine.encode`)
    ) -> EncodeReport:
        """Have the server encode documents, each together with a blank line after it.

        Raises: PromptError: `texts` is one string. ContextLengthError: a text is longer than the
            server reads at once. ModelError: the server can't be reached.
        """
        if isinstance(texts, str):
            raise PromptError("encode takes a list of texts, got one str; put it in a list")
        connector = self._link.usable()
        if isinstance(connector, str):
            return EncodeReport(len(texts), 0, 0, 0, 0, 0, 0.0, connector)
        documents = [Segment(text + USUAL_SEPARATOR, "document") for text in texts]
        long = [d for d in documents if len(self.lm.text.ids(d)) >= self.min_module_tokens]
        modules = [self._link.maker.encodable(document) for document in long]
        return self._keeper.encode(connector, modules, len(texts), progress=progress)

    def forget(self, texts: object) -> ForgetReport:
        """States on a server are dropped where they are kept. Raises: OptionError, always."""
        raise OptionError(
            "states that a server uses are dropped in its store, by `pcache clear` or by expiry, "
            "not through the server"
        )

    def flush(self) -> None:
        """Wait until the server has encoded what earlier answers lacked."""
        self._keeper.flush()

    def stats(self) -> EngineStats:
        """Tokens saved and computed; what the server's store holds is not known here."""
        unknown = StoreStats("remote", None, None, None, hits=0, misses=0, evictions=0)
        encoded = self._keeper.encoded
        return EngineStats.of(unknown, self.reports, encoded.tokens, encoded.elapsed_ms)

    def _run(
        self, request: RemoteRequest, body: dict[str, Any], started: float
    ) -> Generator[Chunk, None, None]:
        answer = Answer(request, self.lm)
        with closing(self._server.stream(body, answer.request.params.timeout_s)) as events:
            for event in events:
                chunk = answer.chunk(event, _ms_since(started))
                if chunk is not None:
                    yield chunk
        yield self._finished(answer)

    def _finished(self, answer: Answer) -> Chunk:
        last = answer.last()
        assert last.report is not None
        self.reports.append(last.report)
        connector = self._link.usable()
        if not isinstance(connector, str):
            self._keeper.learn(connector, answer.request.modules, answer.cached_tokens)
        return last

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        reuse: ReuseMode | None,
        repair: float | None,
    ) -> RemoteRequest:
        if prompt.placement is not None:
            raise PromptError(
                "prompts of a schema need a model in this process; leave out base_url"
            )
        mode = self.reuse if reuse is None else check_reuse(reuse)
        joined, tokens = self._joined(prompt)
        if not tokens.token_ids:
            raise PromptError("the prompt has no tokens; give at least one character of text")
        if mode == "off":
            return RemoteRequest(tokens, params, mode, None, None)
        connector = self._link.usable()
        if isinstance(connector, str):
            return RemoteRequest(tokens, params, "exact", connector, None)
        if mode == "exact":
            return RemoteRequest(tokens, params, mode, None, connector.namespace)
        asks_repair = mode != "fast" or check_repair(repair) is not None
        modules = PromptModules(joined, tokens, self._link.maker, self.min_module_tokens)
        return RemoteRequest(
            tokens,
            params,
            "fast",
            _AS_THEY_ARE if asks_repair else None,
            connector.namespace,
            modules.runs(connector.key_space),
            modules.modules(),
        )

    def _joined(self, prompt: Prompt) -> tuple[Joined, TokenisedPrompt]:
        joined = join_separators(prompt, self.lm.text.holds_special)
        return joined, tokenise(joined.prompt, self.lm.text.ids, self.lm.text.bos_ids)


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
