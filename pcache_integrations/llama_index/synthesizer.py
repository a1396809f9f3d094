"""A response synthesizer that writes nodes into a prompt the way their states are of most use."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llama_index.core.base.llms.generic_utils import messages_to_prompt as joined_with_roles
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import (
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    QueryType,
    TextNode,
)
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index.core.utils import get_tokenizer

from pcache_core.errors import ContextLengthError, OptionError
from pcache_integrations.llama_index.llm import PromptCacheLLM

_logger = logging.getLogger(__name__)

NodeOrder = Literal["retrieved", "stable"]

# What LlamaIndex's own synthesizers put between nodes, and say for an answer without text.
_SEPARATOR = "\n\n"
_EMPTY = "Empty Response"

# Parts of a prompt are tokenised apart, which takes a token more here and there.
_SPARE_TOKENS = 8
_BETWEEN_NODES = 3


class PromptCacheSynthesizer(BaseSynthesizer):
    """One prompt, in which every node stands whole.

    The built-in modes join all nodes and cut the text wherever the context ends; what is left of a
    cut node can't use its state. Here the lowest-ranked nodes are left out instead, until the rest
    fits; which, is in the response's `metadata["prompt_cache"]`. They are not among its sources.

    ```python
    engine = index.as_query_engine(llm=llm, response_synthesizer=PromptCacheSynthesizer(llm=llm))
    ```

    llm: `Settings.llm` if not given. Any will do; the cache is that of PromptCacheLLM.
    order: of the nodes in the prompt. `retrieved`: as they come. `stable`: by document and place in
        it, so that prompts about the same nodes begin alike and more of them is an exact prefix of
        an earlier one. The reuse modes `exact` and `fast` gain from that; `balanced` and `high`
        start from the nodes' states in any order. The best node may stand in the middle.
    metadata_mode: which metadata a node is written with. States that were encoded ahead of time are
        those of `MetadataMode.LLM`.
    output_cls: answers are objects of this class; can't be streamed.

    The template is `text_qa_template`, as elsewhere, with `{context_str}` and `{query_str}`.

    Raises: OptionError: unknown order or mode; `streaming` together with `output_cls`.
    """

    def __init__(  # noqa: PLR0913 (what the built-in synthesizers take)
        self,
        llm: LLM | None = None,
        *,
        order: NodeOrder = "retrieved",
        metadata_mode: MetadataMode = MetadataMode.LLM,
        text_qa_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        output_cls: type[BaseModel] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if order not in get_args(NodeOrder):
            raise OptionError(
                f"unknown order {order!r}; use one of {', '.join(get_args(NodeOrder))}"
            )
        if not isinstance(metadata_mode, MetadataMode):
            raise OptionError(f"metadata_mode must be a MetadataMode, got {metadata_mode!r}")
        if streaming and output_cls is not None:
            raise OptionError("an object can't be streamed; leave out streaming= or output_cls=")
        super().__init__(
            llm=llm,
            callback_manager=callback_manager,
            streaming=streaming,
            output_cls=output_cls,
        )
        self._order = order
        self._metadata_mode = metadata_mode
        self._text_qa_template = text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        if "text_qa_template" in prompts:
            self._text_qa_template = prompts["text_qa_template"]

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer from the nodes. Raises: ContextLengthError: not even the best of them fits."""
        if not nodes:
            return super().synthesize(query, nodes, additional_source_nodes, **response_kwargs)
        chosen = self._choose(query, nodes)
        response = super().synthesize(query, list(chosen.blocks), **response_kwargs)
        return _with_sources(response, chosen, additional_source_nodes or ())

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer as `synthesize` does, without blocking the event loop."""
        if not nodes:
            given = additional_source_nodes
            return await super().asynthesize(query, nodes, given, **response_kwargs)
        chosen = await asyncio.to_thread(self._choose, query, nodes)
        response = await super().asynthesize(query, list(chosen.blocks), **response_kwargs)
        return _with_sources(response, chosen, additional_source_nodes or ())

    def get_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Answer from texts, all in one prompt, none of them cut."""
        args = {"context_str": _joined(text_chunks), "query_str": query_str, **response_kwargs}
        template = self._text_qa_template
        answer: RESPONSE_TEXT_TYPE
        if self._output_cls is not None:
            # Completion models' programs leave their output parser in the template.
            answer = self._llm.structured_predict(self._output_cls, deepcopy(template), **args)
        elif self._streaming:
            answer = self._llm.stream(template, **args)
        else:
            answer = self._llm.predict(template, **args) or _EMPTY
        return answer

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Answer as `get_response` does, without blocking the event loop."""
        args = {"context_str": _joined(text_chunks), "query_str": query_str, **response_kwargs}
        template = self._text_qa_template
        answer: RESPONSE_TEXT_TYPE
        if self._output_cls is not None:
            given = deepcopy(template)
            answer = await self._llm.astructured_predict(self._output_cls, given, **args)
        elif self._streaming:
            answer = await self._llm.astream(template, **args)
        else:
            answer = await self._llm.apredict(template, **args) or _EMPTY
        return answer

    def _choose(self, query: QueryType, nodes: Sequence[NodeWithScore]) -> _Chosen:
        """Choose the best nodes that fit, and how the prompt holds them."""
        query_str = query.query_str if isinstance(query, QueryBundle) else query
        count = _counter(self._llm)
        template = self._text_qa_template
        room = _room_for_context(self._llm, template, query_str, self._output_cls, count)
        texts = [n.node.get_content(metadata_mode=self._metadata_mode).strip() for n in nodes]
        ranked = _ranked(nodes)
        num_kept = _num_fitting(texts, ranked, room, count)
        if not num_kept:
            raise ContextLengthError(
                f"node {nodes[ranked[0]].node.node_id!r} takes {count(texts[ranked[0]])} tokens, "
                f"the prompt has room for {max(0, room - _BETWEEN_NODES)} beside its template, the "
                "question and an answer; cut documents into smaller nodes, lower max_tokens, or "
                "use the response mode 'compact', which splits nodes"
            )
        kept, left_out = sorted(ranked[:num_kept]), sorted(ranked[num_kept:])
        if left_out:
            text = "%d of %d nodes are left out of the prompt, the context is full"
            _logger.warning(text, len(left_out), len(nodes))
        written = list(kept)
        if self._order == "stable":
            written.sort(key=lambda index: _place_in_corpus(nodes[index]))
        return _Chosen(
            blocks=tuple(_block(nodes[index], texts[index]) for index in written),
            sources=tuple(nodes[index] for index in kept),
            left_out=tuple(nodes[index].node.node_id for index in left_out),
        )


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Nodes as the prompt holds them, in its order; as they were retrieved; ids of the others."""

    blocks: tuple[NodeWithScore, ...]
    sources: tuple[NodeWithScore, ...]
    left_out: tuple[str, ...]


def _block(scored: NodeWithScore, text: str) -> NodeWithScore:
    """Return a node that every metadata mode writes as `text`."""
    source = scored.node.source_node
    relationships = {} if source is None else {NodeRelationship.SOURCE: source}
    node = TextNode(id_=scored.node.node_id, text=text, relationships=relationships)
    return NodeWithScore(node=node, score=scored.score)


def _place_in_corpus(scored: NodeWithScore) -> tuple[str, int, str]:
    node = scored.node
    start = getattr(node, "start_char_idx", None)
    return node.ref_doc_id or node.node_id, start or 0, node.node_id


def _joined(texts: Sequence[str]) -> str:
    return _SEPARATOR.join(text for text in texts if text)


def _with_sources(
    response: RESPONSE_TYPE, chosen: _Chosen, additional: Sequence[NodeWithScore]
) -> RESPONSE_TYPE:
    """Give a response the nodes as they were retrieved, and a note on what was left out."""
    response.source_nodes = [*chosen.sources, *additional]
    metadata: dict[str, Any] = {n.node.node_id: n.node.metadata for n in response.source_nodes}
    if chosen.left_out:
        metadata["prompt_cache"] = {
            "left_out_node_ids": list(chosen.left_out),
            "reason": "the context is full; the lowest-ranked nodes are left out",
        }
    response.metadata = metadata
    return response


def _num_fitting(
    texts: Sequence[str], ranked: Sequence[int], room: int, count: Callable[[str], int]
) -> int:
    """Return how many of the ranked texts fit into so many tokens; none is cut."""
    for place, index in enumerate(ranked):
        room -= count(texts[index]) + _BETWEEN_NODES
        if room < 0:
            return place
    return len(ranked)


def _room_for_context(
    llm: LLM,
    template: BasePromptTemplate,
    query_str: str,
    output_cls: type[BaseModel] | None,
    count: Callable[[str], int],
) -> int:
    """Count the tokens that are left of the model's context."""
    used = count(_without_context(llm, template, query_str)) + count(llm.system_prompt or "")
    if output_cls is not None:
        used += count(json.dumps(output_cls.model_json_schema()))
    metadata = llm.metadata
    return metadata.context_window - max(metadata.num_output, 0) - used - _SPARE_TOKENS


def _counter(llm: LLM) -> Callable[[str], int]:
    """Count by the model's own tokenizer if it is ours, else by LlamaIndex's."""
    inner = llm.llm if isinstance(llm, StructuredLLM) else llm
    if isinstance(inner, PromptCacheLLM):
        return inner.engine.lm.count_tokens
    tokenizer = get_tokenizer()
    return lambda text: len(tokenizer(text))


def _without_context(llm: LLM, template: BasePromptTemplate, query_str: str) -> str:
    """Write the prompt as LlamaIndex does, with an empty context."""
    args = {"context_str": "", "query_str": query_str}
    if llm.metadata.is_chat_model:
        to_prompt = llm.messages_to_prompt or joined_with_roles
        return to_prompt(template.format_messages(llm=llm, **args))
    return template.format(
        llm=llm,
        messages_to_prompt=llm.messages_to_prompt,
        completion_to_prompt=llm.completion_to_prompt,
        **args,
    )


def _ranked(nodes: Sequence[NodeWithScore]) -> list[int]:
    """Return the indices of the nodes, the best first, or as they come if one has no score."""
    scores = [node.score for node in nodes]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return list(range(len(nodes)))
    return sorted(range(len(nodes)), key=lambda index: -known[index])
