"""Random Llamas of known sizes: speed does not depend on what weights say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from pcache_core import CausalLM, OptionError
from pcache_core.lm.loading import resolve
from pcache_integrations.bench.memory import check_memory
from pcache_integrations.bench.options import BenchOptions

_DTYPES = {
    "auto": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_VOCABULARY = 32_000
# Not a multiple of any row's length, so that no two rows of a matrix are alike.
_POOL_NUMBERS = 2**24 + 43
# Small, so that what comes out depends on the whole prompt and not on its last token alone.
_EMBEDDING_STD = 0.1


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama's dimensions; `head_dim` is `hidden / heads`."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def parameters(self) -> int:
        """Numbers in all matrices; embeddings and output are two of them."""
        attention = self.hidden * self.hidden * 2 * (self.heads + self.kv_heads) // self.heads
        per_layer = attention + 3 * self.hidden * self.feed_forward
        return self.layers * per_layer + 2 * _VOCABULARY * self.hidden

    @property
    def cached_numbers_per_token(self) -> int:
        """Keys and values of every layer."""
        return self.layers * 2 * self.kv_heads * self.hidden // self.heads


SIZES = {
    "llama-tiny": Size(128, 256, 2, 4, 2),
    "llama-115m": Size(768, 1728, 12, 12, 4),
    "llama-0.5b": Size(1024, 5120, 24, 16, 4),
    "llama-1b": Size(2048, 5632, 22, 32, 4),
    "llama-7b": Size(4096, 11008, 32, 32, 32),
}


def size_of(name: str) -> Size:
    """The dimensions of a named size. Raises: OptionError."""
    try:
        return SIZES[name]
    except KeyError:
        raise OptionError(f"no random model {name!r}; there is {', '.join(SIZES)}") from None


class ModelSource(Protocol):
    """A model that is to be measured."""

    def load(self, options: BenchOptions, peers: int) -> CausalLM:
        """Load it, after seeing whether it and `peers` copies will fit into memory.

        Raises: MemoryNeededError, ModelError, OptionError.
        """


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A built-in model, a directory or a hub id."""

    name: str
    dtype: str
    device: str

    def load(self, options: BenchOptions, peers: int) -> CausalLM:
        """What it needs is known when it is there, so it is compared then."""
        lm = CausalLM.from_pretrained(self.name, dtype=self.dtype, device=self.device)
        needed = options.needed_nbytes(
            weights=sum(parameter.nbytes for parameter in lm.model.parameters()),
            kv_per_token=lm.bytes_per_token,
            peers=peers,
        )
        del needed["weights"]
        check_memory(needed, str(lm.device))
        return lm


@dataclass(frozen=True, slots=True)
class RandomModel:
    """One of `SIZES`, with random weights. dtype, device: as for `CausalLM.from_pretrained`."""

    name: str
    dtype: str
    device: str

    def load(self, options: BenchOptions, peers: int) -> CausalLM:
        """Raises: OptionError: unknown size or dtype. MemoryNeededError."""
        size, dtype = size_of(self.name), _DTYPES.get(self.dtype)
        if dtype is None:
            raise OptionError(f"unknown dtype {self.dtype!r}; use one of {', '.join(_DTYPES)}")
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        needed = options.needed_nbytes(
            weights=size.parameters * dtype.itemsize,
            kv_per_token=size.cached_numbers_per_token * dtype.itemsize,
            peers=peers,
        )
        check_memory(needed, device)
        return random_llama(
            self.name,
            dtype=dtype,
            device=device,
            context_tokens=options.context_tokens,
            seed=options.seed,
        )


def random_llama(
    name: str, *, dtype: torch.dtype, device: str, context_tokens: int, seed: int
) -> CausalLM:
    """A random Llama with the built-in tokenizer.

    Matrices are drawn in `dtype` with a standard deviation of 1/√inputs, so that attention is not
    uniform and a wrong mask or position shows in what comes out. Raises: OptionError: unknown size.
    """
    size = size_of(name)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=context_tokens,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    rotary = type(model.model.rotary_emb)(config)  # stays in fp32, as a loaded model's does
    model = model.to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)
    _draw(model, seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(resolve("builtin:tiny-rag")))
    return CausalLM(model.eval(), tokenizer, name=f"random {name}")


@torch.no_grad()
def _draw(model: PreTrainedModel, seed: int) -> None:
    """Fill matrices from one pool of random numbers, each from where the last one ended."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL_NUMBERS, generator=generator).to(model.dtype).to(model.device)
    offset = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1)
            continue
        flat, start = parameter.view(-1), 0
        while start < flat.numel():
            count = min(flat.numel() - start, _POOL_NUMBERS - offset)
            flat[start : start + count] = pool[offset : offset + count]
            start, offset = start + count, (offset + count) % _POOL_NUMBERS
        is_embedding = "embed" in name
        parameter.mul_(_EMBEDDING_STD if is_embedding else 1 / math.sqrt(parameter.shape[1]))


def save(lm: CausalLM, folder: Path) -> None:
    """As `save_pretrained` writes it, tokenizer included."""
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    if shows_bars:
        logging.enable_progress_bar()


def parameter_count(lm: CausalLM) -> int:
    """Numbers in all of a model's weights."""
    return sum(parameter.numel() for parameter in lm.model.parameters())
