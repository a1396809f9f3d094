"""LlamaIndex: `PromptCacheLLM` takes the place of any other `llm`.

Templates and retrieved nodes find their modules by themselves.
"""

from pcache_integrations.llama_index.ingest import PromptCachePrecompute
from pcache_integrations.llama_index.llm import PromptCacheLLM
from pcache_integrations.llama_index.nodes import PruneReport
from pcache_integrations.llama_index.rerank import PromptCacheRerank
from pcache_integrations.llama_index.responses import CallRefusedError
from pcache_integrations.llama_index.synthesizer import PromptCacheSynthesizer

__all__ = [
    "CallRefusedError",
    "PromptCacheLLM",
    "PromptCachePrecompute",
    "PromptCacheRerank",
    "PromptCacheSynthesizer",
    "PruneReport",
]
