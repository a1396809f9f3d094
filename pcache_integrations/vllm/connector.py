"""The KV connector that vLLM loads: `kv_connector_module_path` names this module.

Nothing of vLLM is patched. The scheduler asks how much of a prompt states cover, the workers fill
the blocks before the forward that needs them. Blocks that can't be filled are reported, and vLLM
computes them (`kv_load_failure_policy: recompute`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from pcache_core.errors import OptionError
from pcache_core.kv.key import KeySpace
from pcache_core.library.preamble import Preamble, PreambleIds
from pcache_core.lm.loading import load_tokenizer
from pcache_core.lm.tokenizer import SegmentTokenizer
from pcache_integrations._stores import lasting_store
from pcache_integrations.vllm.connector_plan import Load, Planner, Save
from pcache_integrations.vllm.connector_worker import PagedLayer, StateWorker
from pcache_integrations.vllm.model_card import ModelCard
from pcache_integrations.vllm.protocol import (
    Description,
    Preambles,
    named_preambles,
    preambles_digest,
)


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What workers do beside one forward: loads before it, saves after it."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


class PromptCacheConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Fills the leading part of prompts from the states of a store.

    `kv_connector_extra_config`: `store`, `namespace`, `model_card` and, where modules are encoded
    after another preamble than the model's own, `preamble`; as `pcache serve` writes them.
    Raises: OptionError, ModelError: they are missing, or of another model.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
            raise OptionError(
                "kv_load_failure_policy must be 'recompute', so that a state that is gone is "
                "computed, and the answer not wrong"
            )
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._card = ModelCard.from_dict(extra.get("model_card") or {})
        self._space = KeySpace(
            self._card.model,
            f"torch.{self._card.dtype}",
            extra.get("namespace", "default"),
            model_name=self._card.name,
        )
        self._store = lasting_store(extra.get("store"))
        self._block_tokens = vllm_config.cache_config.block_size
        self._failed_blocks: set[int] = set()
        if role == KVConnectorRole.SCHEDULER:
            preambles = _preambles(vllm_config, self._card, extra.get("preamble"))
            description = Description(
                self._space.model,
                self._space.dtype,
                self._space.namespace,
                preambles_digest(preambles),
                self._card.context_length,
                saves=vllm_config.parallel_config.world_size == 1,
                refused={},
            )
            self._planner = Planner(self._store, description, preambles, self._block_tokens)

    # The scheduler's side.

    def on_new_request(self, request: Any) -> None:
        """Take note of a request that comes in."""
        self._planner.add(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Say how much of the prompt states cover; they are loaded within the step."""
        return self._planner.matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Load what a request's blocks are to hold, in the step that is being made."""
        (block_ids,) = blocks.get_block_ids()
        self._planner.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Tell the workers what they do in this step."""
        scheduled = scheduler_output.num_scheduled_tokens
        cached = scheduler_output.scheduled_cached_reqs
        before = {
            new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs
        }
        before |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for request_id in filter(self._planner.waits_for, before):
            assert self._kv_cache_manager is not None
            (block_ids,) = self._kv_cache_manager.get_block_ids(request_id)
            tokens = before[request_id] + scheduled[request_id]
            self._planner.computed(request_id, tokens, block_ids)
        return StepMetadata(*self._planner.take_step())

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return the answer's parameters."""
        return False, self._planner.finished(request)

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take over this worker's layers."""
        modules = self._vllm_config.compilation_config.static_forward_context
        layers = {
            extract_layer_index(name): PagedLayer(name, modules[name], self._block_tokens)
            for name in kv_caches
        }
        self._worker = StateWorker(
            self._store,
            self._card,
            self._space,
            layers,
            self._block_tokens,
            rank=get_tensor_model_parallel_rank(),
            size=self._vllm_config.parallel_config.tensor_parallel_size,
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fill blocks, before the forward that reads them."""
        for load in self._get_connector_metadata().loads:
            self._failed_blocks |= self._worker.load(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: `start_load_kv` returns when all is there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: blocks are read when the forward is done."""

    def wait_for_save(self) -> None:
        """Keep what the forward has computed, where that was asked for."""
        for save in self._get_connector_metadata().saves:
            self._worker.save(save)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Name the blocks that vLLM has to compute after all."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed


def _preambles(vllm_config: VllmConfig, card: ModelCard, chosen: Any) -> Preambles:
    """Make the very ones that the engine makes, from the same tokenizer. Raises: OptionError."""
    source = vllm_config.model_config.tokenizer
    text = SegmentTokenizer(load_tokenizer(card.name, source))
    preamble = None if chosen is None else Preamble(**chosen)
    return named_preambles(PreambleIds(text, card.context_length, preamble))
