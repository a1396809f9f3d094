"""LlamaIndex: `PromptCacheLLM` takes the place of any other `llm`.

Templates and retrieved nodes find their modules by themselves.
"""

from pcache_integrations.llama_index.llm import PromptCacheLLM

__all__ = ["PromptCacheLLM"]
