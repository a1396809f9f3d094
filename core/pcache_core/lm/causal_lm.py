"""A loaded model and its tokenizer, and what the engine may do with them."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pcache_core.errors import ModelError
from pcache_core.kv.sequence import KVBuffers
from pcache_core.kv.state import LayerShape, Stack, stack_layers
from pcache_core.lm.batch import Batch
from pcache_core.lm.fingerprint import fingerprint
from pcache_core.lm.forward_queue import ForwardQueue, IsCancelled
from pcache_core.lm.loading import full_name, load
from pcache_core.lm.packed import leave_file, num_weights, pack, packed_layers, unpack
from pcache_core.lm.probe import Support, probe
from pcache_core.lm.sampling import Sampler
from pcache_core.lm.stock import StockRun, own_cache_works
from pcache_core.lm.structure import context_length
from pcache_core.lm.tokenizer import TextModel
from pcache_core.lm.weights import Weights
from pcache_core.params import SamplingParams
from pcache_core.threads import fork_safe

if TYPE_CHECKING:
    from pcache_core.lm.constraint import GrammarCompiler

_LARGE_ON_CPU = 2_000_000_000  # weights; more take seconds for 512 tokens

_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_locks_lock = fork_safe(threading.Lock())


def _lock_of(model: PreTrainedModel) -> threading.RLock:
    """Return the lock of a model, the same for all `CausalLM` objects that run it."""
    with _locks_lock:
        if model not in _locks:
            _locks[model] = fork_safe(threading.RLock())
        return _locks[model]


def _part_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens of a prompt one forward reads, while running answers wait for a step.

    A matter of the model and its device, never of measured speed, so that answers stand still.
    """
    if model.device.type == "cuda":
        return 2048
    return 512 if num_weights(model) < _LARGE_ON_CPU else 128


class CausalLM(TextModel):
    """An unmodified transformers model, tested when it is loaded.

    support: what the self-test found. context_length: most positions, None without a limit.
    A model that can't reuse modules still runs, with one warning that says why.

    Raises: ModelError: the objects given are not a causal language model and a tokenizer.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None
    ) -> None:
        if (
            not isinstance(model, PreTrainedModel)
            or model.get_output_embeddings() is None
            or model.config.is_encoder_decoder
        ):
            raise ModelError(
                f"CausalLM takes a transformers causal language model, got {type(model).__name__}"
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ModelError(
                f"model {type(model).__name__} needs its tokenizer, got "
                f"{type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained"
            )
        path = getattr(model.config, "_name_or_path", "")
        super().__init__(tokenizer, name or path or type(model).__name__, context_length(model))
        self.model: PreTrainedModel = model.eval()
        with _lock_of(model), torch.inference_mode(mode=False):
            self.support: Support = probe(model)
        self._lock = _lock_of(model)
        self._weights = Weights(model)
        self._named: tuple[int, str] | None = None
        self._forwards = ForwardQueue(self._compute, self._joins, _part_tokens(model))
        self._compiler: GrammarCompiler | None = None
        if not self.support.reuses_modules:
            warnings.warn(
                f"{self.name}: documents can't be reused, only "
                f"{'nothing' if self.support.kind == 'no-cache' else 'exact prefixes'} will be: "
                f"{self.support.reason}",
                stacklevel=2,
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        dtype: str = "auto",
        device: str = "auto",
        gguf_file: str | os.PathLike[str] | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> CausalLM:
        """Load a model: `builtin:smollm2`, a directory, a hub id, a GGUF file or `ollama:NAME`.

        dtype: float32, float16 or bfloat16; auto is as saved, and for a GGUF file bfloat16 where
        the device computes in it, else float32. device: auto, cpu, cuda, cuda:1 … gguf_file: the
        file's name in the directory or on the hub. trust_remote_code: run Python code that comes
        with the model; nothing of it is run otherwise, and nobody is asked.
        Raises: ModelError: it can't be loaded. OptionError: unknown dtype or device.
            DependencyError: a GGUF file, and a package that reads it is not installed.
        """
        name = full_name(name, gguf_file)
        lm = cls(*load(name, dtype, device, trust_remote_code=trust_remote_code), name=name)
        lm.pack()
        if any(packed_layers(lm.model)):
            leave_file(lm.model)
        return lm

    def __repr__(self) -> str:
        packed = list(packed_layers(self.model))
        copies = [layer.packed for layer in packed if layer._parameters["weight"] is not None]
        text = f"CausalLM({self.name!r}, {self.dtype}, {self.device}"
        if packed:
            text += f", {len(packed)} linear layers packed"
        if copies:
            nbytes = sum(copy.numel() * copy.element_size() for copy in copies)
            text += f", {nbytes:,} bytes of them beside the embeddings"
        return f"{text})"

    def pack(self) -> None:
        """Lay linear layers' weights out for this CPU, as `from_pretrained` does; same results.

        Nothing happens on a GPU, to other dtypes than bfloat16, or where torch can't. A layer whose
        weight is read or changed later is unpacked by that. Packed layers have no gradients.
        """
        with self._lock:
            self._weights.let_go()
            pack(self.model)

    def unpack(self) -> None:
        """Undo `pack`: the model has its weights again, bit for bit."""
        with self._lock:
            self._weights.let_go()
            unpack(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model's embeddings are."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and states."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def num_parameters(self) -> int:
        """Of weights; those that two parts share count once."""
        return num_weights(self.model)

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """Shapes of what each caching layer keeps."""
        return self.support.layers

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """How states hold the caching layers."""
        return stack_layers(self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes a state holds for one token."""
        return sum(layer.elements_per_token for layer in self.layers) * self.dtype.itemsize

    @property
    def encodes_many(self) -> bool:
        """Whether one forward may hold several spans that don't see each other."""
        return self.support.forward is not None and self.support.forward.takes_many_spans

    @property
    def lends(self) -> bool:
        """Whether a batch may have states on loan."""
        return self.support.forward is not None and self.support.forward.lends

    @property
    def watches(self) -> bool:
        """Whether a batch's `attention` is filled by a forward."""
        return self.encodes_many

    @property
    def weights_version(self) -> int:
        """A number of the weights as they are now; looking costs a millisecond or less.

        It is another one after a training step, after adapters were loaded, set or merged, and
        after modules or parameters were replaced or changed in place.
        """
        return self._weights.version()

    @property
    def fingerprint(self) -> str:
        """Digest of configuration and weights; reads every weight, again only if some changed."""
        with self._lock:
            while self._named is None or self._named[0] != self.weights_version:
                version = self.weights_version
                self._named = version, fingerprint(self.model)
            return self._named[1]

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        config = getattr(self.model, "generation_config", None)
        found = [getattr(config, "eos_token_id", None), self.tokenizer.eos_token_id]
        ids: set[int] = set()
        for value in found:
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
        return frozenset(ids)

    def new_buffers(self, capacity: int) -> KVBuffers:
        """Fresh buffers for `capacity` tokens."""
        return KVBuffers(self.stacks, capacity, dtype=self.dtype, device=self.device)

    def sampler(self, params: SamplingParams) -> Sampler:
        """Return a token chooser for one request."""
        if params.grammar is None:
            return Sampler(params, self.device)
        constraint = self._grammars.constraint(params.grammar, params.max_tokens)
        return Sampler(params, self.device, constraint)

    def check_grammar(self, params: SamplingParams) -> None:
        """Raises: OptionError: an answer that follows `params.grammar` needs more tokens.

        ModelError: the tokenizer is not of a kind that grammars can be followed with.
        """
        if params.grammar is not None:
            self._grammars.check(params.grammar, params.max_tokens)

    @property
    def _grammars(self) -> GrammarCompiler:
        """One for all requests; made when the first grammar comes."""
        from pcache_core.lm.constraint import GrammarCompiler

        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(self.tokenizer, self.end_ids, self.name)
            return self._compiler

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute a batch's tokens, filling their rows; logits [num_logits, vocab] fp32.

        May be called from several threads at once, and then computes their batches together.

        Raises: RequestCancelledError: inside `cancelled_by`, when it says so. ModelError: the
            logits are no numbers.
        """
        return self._checked(self._forwards.run(batch))

    def _checked(self, logits: torch.Tensor) -> torch.Tensor:
        """Raises: ModelError: a logit is not a number, or infinite."""
        # What is not a number is the largest of all; minus infinity forbids a token.
        if not bool(logits.amax() < torch.inf):
            raise ModelError(
                f"{self.name} gives logits that are NaN or infinite: its weights are damaged, or "
                f"overflow in {self.dtype}; load it again, or with dtype='float32'"
            )
        return logits

    def cancelled_by(self, is_cancelled: IsCancelled) -> AbstractContextManager[None]:
        """Inside, this thread's forwards are given up when `is_cancelled` says so."""
        return self._forwards.cancelled_by(is_cancelled)

    def check_cancelled(self) -> None:
        """Raises: RequestCancelledError: inside `cancelled_by`, when it says so."""
        self._forwards.check_cancelled()

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises: ModelError: an id beyond the model's embeddings."""
        embeddings: Any = self.model.get_input_embeddings()
        known = embeddings.weight.shape[0]
        if token_ids and max(token_ids) >= known:
            raise ModelError(
                f"the tokenizer gives id {max(token_ids)}, {self.name} has embeddings for {known}; "
                "call model.resize_token_embeddings(len(tokenizer)), or use its own tokenizer"
            )

    def _joins(self, batch: Batch) -> bool:
        """Return whether a batch may be cut, and share a forward with others."""
        forward = self.support.forward
        return (
            forward is not None and forward.merges and not self.support.is_beyond_stable(batch.end)
        )

    def _compute(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        forward = self.support.forward
        assert forward is not None, "a model without a cache has no buffers"
        with self._lock:
            if any(self.support.is_beyond_stable(batch.end) for batch in batches):
                # Dynamic NTK keeps the frequencies of the longest prompt so far until a short one
                # comes, so without this an answer would depend on what else is asked.
                forward([Batch.of_rows(self.new_buffers(1), [0], [0], [0])])
            return forward(batches)

    @cached_property
    def _own_cache_works(self) -> bool:
        return own_cache_works(self.model, self._lock, self.token_ids("a b c d e f")[:6])

    def stock_run(self) -> Callable[[Sequence[int]], torch.Tensor]:
        """Begin a request through the model's own forward, for models without rows per token."""
        run = StockRun(self.model, self._lock, use_cache=self._own_cache_works)
        return lambda token_ids: self._checked(run(token_ids))
