"""Prompt Cache: reuse of attention states of prompt parts, in any order (arXiv 2311.04934)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pcache_core.chat.calls import InvalidToolCall, Tool, ToolAnswer, ToolCall
from pcache_core.chat.messages import Message
from pcache_core.chat.tools import ToolFormat
from pcache_core.errors import (
    AnswerError,
    BudgetError,
    ChatTemplateError,
    ContextLengthError,
    DeadlineExceededError,
    DependencyError,
    ModelError,
    OptionError,
    OverloadedError,
    PMLError,
    PromptCacheError,
    PromptError,
    RequestCancelledError,
    StateMismatchError,
    StoreError,
    TemplateError,
)
from pcache_core.grammar import Grammar
from pcache_core.library.preamble import Preamble
from pcache_core.params import ReuseMode, SamplingParams
from pcache_core.prompt import Prompt, Segment
from pcache_core.report import (
    Chunk,
    DocumentShare,
    EncodeReport,
    ForgetReport,
    Generation,
    Prefill,
    Report,
    SegmentReport,
    TokenLogprob,
)

if TYPE_CHECKING:
    from pcache_core.engine import PromptCacheEngine
    from pcache_core.lm import CausalLM
    from pcache_core.store import DiskStore, MemoryStore, ModuleStore, TieredStore

__all__ = [
    "AnswerError",
    "BudgetError",
    "CausalLM",
    "ChatTemplateError",
    "Chunk",
    "ContextLengthError",
    "DeadlineExceededError",
    "DependencyError",
    "DiskStore",
    "DocumentShare",
    "EncodeReport",
    "ForgetReport",
    "Generation",
    "Grammar",
    "InvalidToolCall",
    "MemoryStore",
    "Message",
    "ModelError",
    "ModuleStore",
    "OptionError",
    "OverloadedError",
    "PMLError",
    "Preamble",
    "Prefill",
    "Prompt",
    "PromptCacheEngine",
    "PromptCacheError",
    "PromptError",
    "Report",
    "RequestCancelledError",
    "ReuseMode",
    "SamplingParams",
    "Segment",
    "SegmentReport",
    "StateMismatchError",
    "StoreError",
    "TemplateError",
    "TieredStore",
    "TokenLogprob",
    "Tool",
    "ToolAnswer",
    "ToolCall",
    "ToolFormat",
]

# Imported when they are first used: torch and transformers take seconds.
_HOMES = {
    "CausalLM": "lm",
    "DiskStore": "store",
    "MemoryStore": "store",
    "ModuleStore": "store",
    "PromptCacheEngine": "engine",
    "TieredStore": "store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
