"""Encoding nodes while they are ingested, as the last transformation of a pipeline."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr, ValidationError
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.core.settings import Settings

from pcache_core import Segment
from pcache_core.base_engine import Engine
from pcache_core.errors import BudgetError, ContextLengthError, OptionError
from pcache_integrations._engines import ENGINE_OPTIONS, EngineHandle, EngineOptions
from pcache_integrations.calls import check_names
from pcache_integrations.llama_index.llm import PromptCacheLLM
from pcache_integrations.llama_index.nodes import encode_documents, given_to
from pcache_integrations.llama_index.watch import install_handler, node_text

_logger = logging.getLogger(__name__)
# A forked worker has another: torch's threads do not survive a fork, so it must not run a model.
_process_id = os.getpid()


class PromptCachePrecompute(TransformComponent):
    """Encodes the nodes that pass through it, so that the first question finds their states.

    Put it last: what changes nodes after it makes their states useless. Nodes pass untouched.

    ```python
    llm = PromptCacheLLM(model="path/or/hub-id")
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(), embed_model, PromptCachePrecompute(llm=llm)]
    )
    ```

    llm: whose states these are; `Settings.llm` if nothing is given. Or the options of one: `model`,
    `store`, `dtype`, `device`, `namespace`. Without `llm` the store must be a folder or a server:
    no other object sees this one's memory.

    With `num_workers` above 1 each worker process loads the model itself and encodes into the store
    that both share; where the store is memory, or an engine's own, workers encode nothing and the
    nodes are encoded here when the run has ended. So are nodes that come out of the pipeline's
    cache, for which no transformation is called.

    A text too long for the model is left out, with a warning. A text without a state is no error
    either: it is encoded when a prompt holds it for the first time.

    Raises: OptionError: an unknown option, both `llm` and an option that it has settled, or
        neither a PromptCacheLLM nor a store that lasts.
    """

    model: str = Field(description="A built-in model, path or hub id.")
    store: str = Field(description="Where states are kept.")
    dtype: str = Field(default="auto", description="The model's number format.")
    device: str = Field(default="auto", description="Where the model runs.", exclude=True)
    namespace: str = Field(default="default", description="States are shared only inside of it.")
    progress: bool = Field(default=True, description="Show a progress bar.", exclude=True)
    fingerprint: str | None = Field(
        default=None, description="Of the model's weights; part of pipeline cache keys."
    )

    _handle: EngineHandle = PrivateAttr()
    _is_elsewhere: bool = PrivateAttr(default=False)

    def __init__(self, llm: PromptCacheLLM | None = None, **options: Any) -> None:
        check_names(options, type(self).model_fields, "PromptCachePrecompute")
        options.pop("fingerprint", None)  # In what `to_dict` gave; this model has its own.
        handle = _handle_of(llm, options)
        settled = {name: getattr(handle.options, name) for name in _OPTIONS}
        try:
            super().__init__(**{**options, **settled})
        except ValidationError as error:
            raise OptionError(f"PromptCachePrecompute: {error}") from error
        self._handle = handle
        install_handler()

    @classmethod
    def class_name(cls) -> str:
        """Return the name in traces and pipeline cache keys."""
        return "PromptCachePrecompute"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Encode the nodes; returns them as they are. Raises: ModelError: no such model."""
        if not self._is_elsewhere:
            self._encode(nodes)
        elif self.store == "memory" or os.getpid() != _process_id:
            _logger.warning(
                "PromptCachePrecompute encodes nothing in this worker process, as %s; the nodes "
                "are encoded when the run ends. To work in parallel, %s",
                *(_NOT_SHARED if self.store == "memory" else _FORKED),
            )
        else:
            # Worker processes are killed when they have handed in their nodes.
            self._encode(nodes).flush()
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As a call, without blocking the event loop."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    def catch_up(self, nodes: Sequence[BaseNode]) -> None:
        """Encode those nodes that never came through here, in this process."""
        if not nodes:
            return
        known = given_to(self._settled().get())
        missed = [node for node in nodes if node_text(node) and node_text(node) not in known]
        if missed:
            self._encode(missed)

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The options that decide which states are made; pipeline cache keys are made of them.

        Loads the model for its fingerprint.
        """
        if self.fingerprint is None:
            self.fingerprint = self._settled().get().fingerprint
        return super().to_dict(**kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how to build the engine, not its weights and states."""
        return _unpickled, (self._settled(), self.progress, self.to_dict()["fingerprint"])

    def _settled(self) -> EngineHandle:
        """Hold the engine that the fields describe, however they came to their values."""
        own = {name: getattr(self, name) for name in _OPTIONS}
        self._handle = self._handle.for_options(replace(self._handle.options, **own))
        return self._handle

    def _encode(self, nodes: Sequence[BaseNode]) -> Engine:
        engine = self._settled().get()
        try:
            encode_documents(engine, nodes, progress=self.progress)
        except (ContextLengthError, BudgetError):
            most = _most_tokens(engine, nodes)
            fitting = [node for node in nodes if _count_tokens(engine, node_text(node)) <= most]
            _logger.warning(
                "%d of %d nodes have more than the %d tokens that can have a state, and are left "
                "out; split the documents into smaller nodes",
                len(nodes) - len(fitting),
                len(nodes),
                most,
            )
            encode_documents(engine, fitting, progress=self.progress)
        return engine


# Why a worker process encodes nothing, and what to do.
_NOT_SHARED = (
    "memory is not shared",
    "give the language model a store that lasts, such as store='./states', and call run(), "
    "not arun()",
)
_FORKED = ("it was forked", "call run(), not arun()")

_OPTIONS = ("model", "store", "dtype", "device", "namespace")


def _handle_of(llm: object, options: dict[str, Any]) -> EngineHandle:
    """Return the engine of a language model, or one of these options."""
    given = [name for name in _OPTIONS if name in options]
    if llm is None and not given:
        llm = Settings._llm  # The property would make an LLM of another provider.
    if isinstance(llm, PromptCacheLLM):
        if given:
            raise OptionError(f"llm= brings its own {', '.join(given)}; leave them out")
        return llm._settle()
    if llm is not None or "model" not in options or options.get("store", "memory") == "memory":
        raise OptionError(
            "PromptCachePrecompute needs to know whose states it makes: give llm=, a "
            "PromptCacheLLM, or its model= and a store= that both share, such as './states'; "
            + (f"got {type(llm).__name__}" if llm is not None else f"got {options}")
        )
    defaults = {name: PromptCacheLLM.model_fields[name].default for name in ENGINE_OPTIONS}
    chosen = {**defaults, **{name: options[name] for name in given}}
    return EngineHandle(EngineOptions(**chosen, reuse=PromptCacheLLM.model_fields["reuse"].default))


def _unpickled(handle: EngineHandle, progress: bool, fingerprint: str) -> PromptCachePrecompute:  # noqa: FBT001
    """Make a copy, for example in a worker process: with an engine of its own, or none."""
    copy = PromptCachePrecompute.model_construct(
        **{name: getattr(handle.options, name) for name in _OPTIONS},
        progress=progress,
        fingerprint=fingerprint,
    )
    copy._handle = handle
    copy._is_elsewhere = True
    return copy


def _count_tokens(engine: Engine, text: str) -> int:
    return len(engine.lm.text.ids(Segment(text, "document")))


def _most_tokens(engine: Engine, nodes: Sequence[BaseNode]) -> int:
    """Tokens of the longest text that fits after each node's preamble and can be kept."""
    limit = engine.lm.context_length
    limits = [sys.maxsize]
    if limit is not None:
        preambles = (engine.preamble_for(node_text(node)) for node in nodes)
        limits.append(limit - max(map(len, preambles)))
    if engine.most_state_tokens is not None:
        limits.append(engine.most_state_tokens)
    return min(limits)
