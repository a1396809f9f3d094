"""The model: unmodified transformers, run over buffers. The only package that imports it."""

from pcache_core.lm.batch import Batch, Span
from pcache_core.lm.causal_lm import CausalLM
from pcache_core.lm.loading import context_length_on_disk
from pcache_core.lm.relocation import place
from pcache_core.lm.tokenizer import TextModel

__all__ = [
    "Batch",
    "CausalLM",
    "Span",
    "TextModel",
    "context_length_on_disk",
    "place",
]
