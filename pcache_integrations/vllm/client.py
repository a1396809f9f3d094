"""An engine whose model runs on a vLLM server: the same calls, answered over HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any

from pcache_core.base_engine import Engine, EngineStats
from pcache_core.errors import ModelError, OptionError, PromptError
from pcache_core.library.preamble import Preamble
from pcache_core.lm import TextModel
from pcache_core.params import DEFAULT_REUSE, REPAIR, ReuseMode, SamplingParams
from pcache_core.prompt import Prompt, Segment, TokenisedPrompt
from pcache_core.report import Chunk, EncodeReport, ForgetReport, StoreStats
from pcache_integrations.vllm.client_http import Address, Server
from pcache_integrations.vllm.client_keeper import Keeper
from pcache_integrations.vllm.client_modules import (
    USUAL_SEPARATOR,
    ModuleMaker,
    PromptModules,
    join_separators,
)
from pcache_integrations.vllm.client_request import Answer, ServedRequest
from pcache_integrations.vllm.protocol import (
    LEAST_MODULE_TOKENS,
    LOAD,
    Description,
    ProtocolError,
    preambles_digest,
)

__all__ = ["Address", "RemoteEngine"]

logger = logging.getLogger(__name__)

_AS_THEY_ARE = "a vLLM server uses states as they are, and repairs nothing"
_NO_SOURCES = "a vLLM server does not show its attention, so that answers name no sources"
_NO_GAPS = "a vLLM server places tokens one after the other, without the gaps of a schema"
_NO_CONNECTOR = "the server has no prompt cache connector; start it with `pcache serve`"
_SHARED = (
    "several workers share the server's model; encode documents with the engine, into the store "
    "that they read"
)
_OTHER_PREAMBLES = (
    "the server's states are encoded after other preambles than this client's; give both the same "
    "one (`pcache serve --preamble FILE`, preamble=Preamble.of_file(FILE) here), and the same "
    "tokenizer and version of pcache-integrations"
)


@dataclass(frozen=True, slots=True)
class _Connection:
    """What a server said of itself.

    maker: makes the modules that its connector knows. reason: why its states are of no use here.
    """

    connector: Description | None
    maker: ModuleMaker
    reason: str | None


class RemoteEngine(Engine):
    """Answers prompts by a vLLM server, which fills what it can from module states.

    The server is the one that `pcache serve` starts; one without the connector gets plain prompts,
    and its own prefix cache is all that is reused. Documents that the server has no state of are
    encoded there after the first answer that needed them, in the background.

    model: whose tokenizer to use; also the name that the server knows it by.
    reuse: `off`, `exact` or `fast`; `balanced` and `high` run as `fast`.

    What else has no counterpart on a server: attention, so no sources and no `rank`; the gaps that
    a schema leaves between positions, so its prompts stand without. All of it is logged here, once,
    and `fallback_reason` of each report says what its request asked for in vain.

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
    ) -> None:
        self._server = Server(address)
        super().__init__(_served_model(self._server, model), reuse, namespace, preamble)
        self.address = address
        self._preamble = Preamble.of_folder(self.lm.text.folder) if preamble is None else preamble
        self._keeper = Keeper(self._server, model)
        self._connection: _Connection | None = None
        self._connecting = threading.Lock()
        level = logging.WARNING if self.reuse in REPAIR else logging.INFO
        lost = "; ".join((_AS_THEY_ARE, _NO_SOURCES, _NO_GAPS))
        logger.log(level, "balanced and high run as 'fast' (reuse=%r): %s", self.reuse, lost)

    @property
    def preamble(self) -> Preamble:
        """What modules are encoded after."""
        return self._preamble

    @property
    def connector(self) -> Description | None:
        """The server's connector; None if it has none, or one of another version."""
        return self._connected().connector

    @property
    def fingerprint(self) -> str:
        """Of the server's model; its name where the server has no connector to say it."""
        return self.connector.model if self.connector else self.lm.name

    @property
    def most_state_tokens(self) -> None:
        """What the server's store holds is not known here."""

    def settings(self) -> dict[str, Any]:
        """Return what the engine was made of, by the names of a language model's options."""
        address = self.address
        return {
            **super().settings(),
            "base_url": address.base_url,
            "api_key": address.api_key,
            "timeout": address.timeout_s,
            "max_retries": address.max_retries,
        }

    def preamble_for(self, text: str) -> tuple[int, ...]:
        """Return the ids that a module of this text is encoded after."""
        return self._connected().maker.preambles.ids_for(text)

    def tokenise(self, prompt: Prompt) -> TokenisedPrompt:
        """Return the prompt's token ids, the same for every reuse mode.

        A document is tokenised together with what separates it from the next.
        """
        return self._tokenise(prompt)[0]

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> ServedRequest:
        """Check a request, and say what the server will be asked; errors as for `stream`."""
        params = params or SamplingParams()
        mode = self._mode(reuse, repair)
        self._check_types(prompt, params)
        tokens, separators = self._tokenise(prompt)
        self._check_length(tokens)
        if prompt.placement is not None and prompt.placement.model != self.fingerprint:
            raise PromptError(
                "the prompt's schema was laid out for another model than the server says it has "
                f"({self.fingerprint}); make it with prompt_from_pml of an engine of the same "
                "weights, and start the server with `pcache serve`"
            )
        reason = _lost(prompt, tokens, params, mode)
        if mode == "off":
            return ServedRequest(tokens, params, mode, reason, None)
        found = self._connected()
        if found.reason is not None or found.connector is None:
            return ServedRequest(tokens, params, "exact", found.reason, None)
        connector = found.connector
        if mode == "exact":
            return ServedRequest(tokens, params, mode, reason, connector.namespace)
        modules = PromptModules(tokens, separators, found.maker)
        runs = modules.runs(connector.key_space)
        return ServedRequest(
            tokens, params, "fast", reason, connector.namespace, runs, modules.modules()
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer piece by piece. The last chunk has `finish_reason` and `report`.

        Raises: ContextLengthError, PromptError, OptionError: before the server is asked.
            ModelError: it can't be reached, or fails. DeadlineExceededError: `params.timeout_s` has
            passed.
        """
        started = time.perf_counter()
        request = self.request(prompt, params, reuse, repair)
        return self._run(request, request.body(self.lm), started)

    async def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        reuse: ReuseMode | None = None,
        repair: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Answer as `stream` does, without blocking the event loop."""
        started = time.perf_counter()
        request = await asyncio.to_thread(self.request, prompt, params, reuse, repair)
        answer = Answer(request, self.lm, started)
        events = self._server.astream(request.body(self.lm), request.params.timeout_s)
        async with aclosing(events):
            async for event in events:
                for chunk in answer.chunks(event):
                    yield chunk
        yield self._finished(answer)

    def encode(
        self,
        texts: Sequence[str],
        progress: bool = True,  # noqa: FBT001, FBT002 (the published signature)
    ) -> EncodeReport:
        """Have the server encode documents, each together with a blank line after it.

        Raises: PromptError: `texts` is one string. ContextLengthError: a text is longer than the
            server reads at once. ModelError: the server can't be reached.
        """
        if isinstance(texts, str):
            raise PromptError("encode takes a list of texts, got one str; put it in a list")
        found = self._connected()
        connector, reason = found.connector, found.reason
        if connector is not None and not connector.saves:
            reason = reason or _SHARED
        if connector is None or reason is not None:
            return EncodeReport(len(texts), 0, 0, 0, 0, 0, 0.0, reason)
        documents = [Segment(text + USUAL_SEPARATOR, "document") for text in texts]
        long = [d for d in documents if len(self.lm.text.ids(d)) >= LEAST_MODULE_TOKENS]
        modules = [found.maker.encodable(document) for document in long]
        return self._keeper.encode(connector, modules, len(texts), progress=progress)

    def rank(self, question: str, documents: Sequence[str]) -> list[float]:
        """Refuse: a server does not show its attention. Raises: OptionError, always."""
        raise OptionError(
            "documents are ranked by attention, which a server does not show; "
            "use a model in this process: leave out base_url"
        )

    def forget(self, texts: Iterable[str]) -> ForgetReport:
        """Refuse: states are dropped where they are kept. Raises: OptionError, always."""
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
        tokens, elapsed_ms = self._keeper.tokens, self._keeper.elapsed_ms
        return EngineStats.of(unknown, self.reports, encoded_tokens=tokens, encode_ms=elapsed_ms)

    def _tokenise(self, prompt: Prompt) -> tuple[TokenisedPrompt, tuple[str, ...]]:
        """Return the tokens, and the separator that was joined to each piece, mostly empty."""
        if prompt.placement is not None:
            return super().tokenise(prompt), ("",) * len(prompt.segments)
        joined, separators = join_separators(prompt, self.lm.text.holds_special)
        return super().tokenise(joined), separators

    def _run(
        self, request: ServedRequest, body: dict[str, Any], started: float
    ) -> Generator[Chunk, None, None]:
        answer = Answer(request, self.lm, started)
        with closing(self._server.stream(body, request.params.timeout_s)) as events:
            for event in events:
                yield from answer.chunks(event)
        yield self._finished(answer)

    def _finished(self, answer: Answer) -> Chunk:
        last = answer.last()
        assert last.report is not None
        self.reports.append(last.report)
        connector = self._connected().connector
        if connector is not None:
            self._keeper.learn(connector, answer.request.modules, last.report.cached_tokens)
        return last

    def _connected(self) -> _Connection:
        """Ask the server what it is, once."""
        with self._connecting:
            if self._connection is None:
                self._connection = self._connect()
            return self._connection

    def _connect(self) -> _Connection:
        connector, reason = None, _NO_CONNECTOR
        try:
            connector = self._described()
        except ProtocolError as error:
            reason = str(error)
        length = self.lm.context_length if connector is None else connector.context_length
        maker = ModuleMaker(self.lm, self.preamble, length)
        if connector is not None and connector.namespace != self.namespace:
            reason = (
                f"the server's states are of namespace {connector.namespace!r}, this engine's is "
                f"{self.namespace!r}"
            )
        elif connector is not None and connector.preambles != preambles_digest(maker.by_name):
            reason = _OTHER_PREAMBLES
        elif connector is not None:
            return _Connection(connector, maker, None)
        logger.warning("no states are reused: %s", reason)
        return _Connection(connector, maker, reason)

    def _described(self) -> Description | None:
        """Ask for a prompt of one token, whose answer describes the connector.

        Raises: ProtocolError: the connector speaks another version.
        """
        lm = self.lm
        first = lm.text.bos_ids or tuple(lm.token_ids("a")[:1])
        body = {"model": lm.name, "prompt": list(first), "max_tokens": 1, "temperature": 0}
        try:
            answer = self._server.complete({**body, "kv_transfer_params": {LOAD: []}})
        except PromptError:  # it takes no such parameters
            return None
        return Description.parse(answer.get("kv_transfer_params"))


def _lost(
    prompt: Prompt, tokens: TokenisedPrompt, params: SamplingParams, mode: ReuseMode
) -> str | None:
    """Return what a request asks for in vain; None if nothing."""
    has_gaps = prompt.placement is not None and any(
        row != position for row, position in enumerate(tokens.positions)
    )
    reasons = (
        prompt.fallback_reason,
        _AS_THEY_ARE if mode in REPAIR else None,
        _NO_SOURCES if params.sources else None,
        _NO_GAPS if has_gaps else None,
    )
    return "; ".join(filter(None, reasons)) or None


def _served_model(server: Server, name: str) -> TextModel:
    """Return the server's model of this name, with its tokenizer.

    Raises: ModelError: the server has none of that name, or can't be reached; no tokenizer.
    """
    models = server.models()
    found = next((each for each in models if each.get("id") == name), None)
    if found is None:
        names = ", ".join(str(each.get("id")) for each in models) or "none"
        raise ModelError(
            f"{server.address.base_url} has no model {name!r}, but {names}; start it with "
            f"--served-model-name {name}, or name one of these"
        )
    length = found.get("max_model_len")
    return TextModel.without_weights(name, length if isinstance(length, int) else None)
