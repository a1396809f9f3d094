"""How many tokens of context fit into a prompt, and which nodes these are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_index.core.base.llms.generic_utils import messages_to_prompt as joined_with_roles
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import NodeWithScore
from llama_index.core.utils import get_tokenizer

from pcache_core.errors import ContextLengthError
from pcache_integrations.llama_index.llm import PromptCacheLLM

# Parts of a prompt are tokenised apart, which takes a token more here and there.
_SPARE_TOKENS = 8
_BETWEEN_NODES = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """Indices of the nodes that fit, and of those that are left out; both in the given order."""

    kept: tuple[int, ...]
    left_out: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Room:
    """Tokens that a prompt has for its context, beside template, question and answer."""

    num_tokens: int
    count: Callable[[str], int]

    def fit(self, nodes: Sequence[NodeWithScore], texts: Sequence[str]) -> Fit:
        """Leave the lowest-ranked out until the rest fits. None is cut.

        Ranks are the scores', or where a node has none, the places of all in the list.

        Raises: ContextLengthError: not even the first fits.
        """
        left = self.num_tokens
        ranked = _ranked(nodes)
        for place, index in enumerate(ranked):
            needed = self.count(texts[index]) + _BETWEEN_NODES
            if needed > left and place == 0:
                raise ContextLengthError(
                    f"node {nodes[index].node.node_id!r} takes {needed} tokens, the prompt has "
                    f"room for {left} beside its template, the question and an answer; cut "
                    "documents into smaller nodes, lower max_tokens, or use the response mode "
                    "'compact', which splits nodes"
                )
            if needed > left:
                return Fit(tuple(sorted(ranked[:place])), tuple(sorted(ranked[place:])))
            left -= needed
        return Fit(tuple(sorted(ranked)), ())


def room_for_context(
    llm: LLM, template: BasePromptTemplate, query_str: str, output_cls: type[BaseModel] | None
) -> Room:
    """What is left of the model's context, counted by its own tokenizer if it is ours."""
    count = _counter(llm)
    used = count(_without_context(llm, template, query_str)) + count(llm.system_prompt or "")
    if output_cls is not None:
        used += count(json.dumps(output_cls.model_json_schema()))
    metadata = llm.metadata
    answer = max(metadata.num_output, 0)
    return Room(metadata.context_window - answer - used - _SPARE_TOKENS, count)


def _counter(llm: LLM) -> Callable[[str], int]:
    inner = llm.llm if isinstance(llm, StructuredLLM) else llm
    if isinstance(inner, PromptCacheLLM):
        return inner.engine.lm.count_tokens
    tokenizer = get_tokenizer()
    return lambda text: len(tokenizer(text))


def _without_context(llm: LLM, template: BasePromptTemplate, query_str: str) -> str:
    """The prompt as LlamaIndex writes it, with an empty context."""
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
    """Indices of the nodes, the best first."""
    scores = [node.score for node in nodes]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return list(range(len(nodes)))
    return sorted(range(len(nodes)), key=lambda index: -known[index])
