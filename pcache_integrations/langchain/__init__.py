"""LangChain: `PromptCacheLLM` and `ChatPromptCache` take the place of any other model.

Templates and retrieved documents find their modules by themselves.
"""

from pcache_integrations.langchain.chat import ChatPromptCache
from pcache_integrations.langchain.llm import PromptCacheLLM
from pcache_integrations.langchain.rerank import PromptCacheReranker
from pcache_integrations.langchain.tracking import track

__all__ = ["ChatPromptCache", "PromptCacheLLM", "PromptCacheReranker", "track"]
