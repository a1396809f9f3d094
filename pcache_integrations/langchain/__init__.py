"""LangChain: `PromptCacheLLM` and `ChatPromptCache` take the place of any other model.

Templates and retrieved documents find their modules by themselves.
"""

from pcache_integrations.langchain._tracking import track
from pcache_integrations.langchain.chat import ChatPromptCache
from pcache_integrations.langchain.llm import PromptCacheLLM

__all__ = ["ChatPromptCache", "PromptCacheLLM", "track"]
