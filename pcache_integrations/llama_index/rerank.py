"""Re-ranking retrieved nodes by the attention that a question pays to them."""

from __future__ import annotations

from llama_index.core.bridge.pydantic import Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from pcache_core.errors import PromptError
from pcache_integrations.llama_index.llm import PromptCacheLLM
from pcache_integrations.llama_index.watch import node_text


class PromptCacheRerank(BaseNodePostprocessor):
    """Keeps the nodes that the question attends to most, the first one the best.

    For `node_postprocessors` of a query engine. Each node that is kept has its score set: see
    `PromptCacheEngine.rank`. States of nodes that are made here serve prompts as well.
    """

    llm: PromptCacheLLM = Field(description="Whose model reads the question.")
    top_n: int = Field(default=4, description="How many nodes to keep.", ge=1)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex stores it by."""
        return "PromptCacheRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        if query_bundle is None:
            raise PromptError("PromptCacheRerank needs the question; give query_str")
        texts = [node_text(node.node) for node in nodes]
        scores = self.llm.engine.rank(query_bundle.query_str, texts)
        order = sorted(range(len(nodes)), key=scores.__getitem__, reverse=True)[: self.top_n]
        return [NodeWithScore(node=nodes[index].node, score=scores[index]) for index in order]
