"""The scheduler's side: which leading part of a prompt comes from states, and what is kept."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from pcache_core.kv.key import ModuleKey
from pcache_core.store import ModuleStore
from pcache_integrations.vllm.protocol import (
    LOAD,
    SAVE,
    Description,
    Preambles,
    ProtocolError,
    Run,
    cover,
    fast_salt,
    parse_run,
    parse_runs,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Filling:
    """Tokens `start … stop` of a prompt, and the state that they come from.

    token_ids: of the whole state. first: which of them stands at `start`.
    """

    start: int
    stop: int
    key: str
    token_ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens `start … stop` of a request, which are in these blocks, come from states."""

    start: int
    stop: int
    block_ids: tuple[int, ...]
    fillings: tuple[Filling, ...]


@dataclass(frozen=True, slots=True)
class Save:
    """What is computed for the last of `token_ids`, from `start` on, is to be kept as `key`."""

    start: int
    key: str
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...] = ()


_AT_ONCE = 8
_FOREIGN = "the key is not that of these tokens, this model, preamble and namespace"


class Planner:
    """Decides for each request, from what its client sent and what the store has.

    A request's parameters are never trusted: a key must be the one that the prompt's own tokens
    make, with this model and namespace and one of these preambles. Whatever else they hold is
    counted, and the prompt computed: nothing raises here, as an error would end vLLM's scheduler.

    description: of the connector, as clients get it, with nothing refused yet.
    """

    def __init__(
        self,
        store: ModuleStore,
        description: Description,
        preambles: Preambles,
        block_tokens: int,
    ) -> None:
        self._store = store
        self._description = description
        self._space = description.key_space
        self._preambles = preambles
        self._block_tokens = block_tokens
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pcache-ask")
        self._refused: Counter[str] = Counter()
        # What covers a request's prompt after so many computed tokens, without a gap.
        self._plans: dict[str, tuple[int, list[Run]]] = {}
        self._wanted: dict[str, Save] = {}
        self._loads: list[Load] = []
        self._saves: list[Save] = []

    def add(self, request: Any) -> None:
        """Take note of what a new request wants to be kept."""
        params = _params(request)
        if SAVE not in params:
            return
        try:
            run = self._checked_save(request, params)
        except ProtocolError as error:
            refuse(self._refused, "a state that can't be kept was asked for", str(error))
            return
        ids = tuple(request.prompt_token_ids[: run.end])
        self._wanted[request.request_id] = Save(run.start, run.key, ids)

    def matched(self, request: Any, computed: int) -> int:
        """Count the tokens after the first `computed` that states cover."""
        start, runs = self._plans.get(request.request_id, (-1, []))
        if start != computed:
            runs = self._plan(request, computed)
            self._plans[request.request_id] = (computed, runs)
        reached = runs[-1].end if runs else computed
        # The last token is always computed, for its logits.
        limit: int = min(reached, request.num_prompt_tokens - 1)
        return max(0, limit - computed)

    def allocated(self, request: Any, block_ids: Sequence[int], tokens: int) -> None:
        """Load the first `tokens` of what was matched in the next step; they have these blocks."""
        start, runs = self._plans.pop(request.request_id, (0, []))
        if tokens:
            stop = start + tokens
            blocks = tuple(block_ids[: -(-stop // self._block_tokens)])
            fillings = tuple(_fillings(runs, request.prompt_token_ids, start, stop))
            self._loads.append(Load(start, stop, blocks, fillings))

    def computed(self, request_id: str, tokens: int, block_ids: Sequence[int]) -> None:
        """Note that a request's first `tokens` will be computed by the end of this step."""
        save = self._wanted.get(request_id)
        if save is not None and tokens >= len(save.token_ids):
            del self._wanted[request_id]
            self._saves.append(replace(save, block_ids=tuple(block_ids)))

    def waits_for(self, request_id: str) -> bool:
        """Return whether `computed` wants to hear of it."""
        return request_id in self._wanted

    def take_step(self) -> tuple[list[Load], list[Save]]:
        """Take what workers load before the next forward, and what they keep after it."""
        step = self._loads, self._saves
        self._loads, self._saves = [], []
        return step

    def finished(self, request: Any) -> dict[str, Any] | None:
        """Return the parameters of a request's answer."""
        self._plans.pop(request.request_id, None)
        self._wanted.pop(request.request_id, None)
        return self.describe().as_dict() if LOAD in _params(request) else None

    def describe(self) -> Description:
        """Return what clients have to know."""
        return replace(self._description, refused=self._refused)

    def _plan(self, request: Any, computed: int) -> list[Run]:
        params = _params(request)
        if LOAD not in params or params[LOAD] == []:
            return []
        try:
            runs = parse_runs(params[LOAD], request.num_prompt_tokens, self._preambles)
            salt = fast_salt(self._space.namespace)
            if request.cache_salt != salt:
                raise ProtocolError(f"the request's cache_salt must be {salt!r}")
            _check_plain(request)
        except ProtocolError as error:
            reason = "states were asked for in a way that is not understood"
            refuse(self._refused, reason, str(error))
            return []
        useful = [run for run in runs if run.end > computed]
        return cover(self._there(self._keys(useful, request.prompt_token_ids)), computed)

    def _checked_save(self, request: Any, params: Mapping[str, Any]) -> Run:
        run = parse_run(params[SAVE], request.num_prompt_tokens, self._preambles)
        _check_plain(request)
        if not self._description.saves:
            raise ProtocolError("this server keeps no states; several workers share a model")
        if request.cache_salt == fast_salt(self._space.namespace) or LOAD in params:
            raise ProtocolError("what was made of states is not kept as one")
        before = tuple(request.prompt_token_ids[: run.start])
        if before != self._preambles[run.preamble] or run.tail:
            raise ProtocolError("a state is encoded right after a preamble of this server")
        if run.module_key(request.prompt_token_ids, self._preambles, self._space).digest != run.key:
            raise ProtocolError(_FOREIGN)
        return run

    def _keys(self, runs: Sequence[Run], prompt_ids: Sequence[int]) -> dict[Run, ModuleKey]:
        """Make the runs' keys; leave out those that name another's."""
        keys = {run: run.module_key(prompt_ids, self._preambles, self._space) for run in runs}
        for run in [run for run, key in keys.items() if key.digest != run.key]:
            del keys[run]
            refuse(self._refused, "a state was asked for by a wrong key", _FOREIGN)
        return keys

    def _there(self, keys: Mapping[Run, ModuleKey]) -> list[Run]:
        """Return the runs whose states the store has; none is read, several are asked for at once.

        A store that can't be asked has none.
        """
        answers = self._threads.map(self._store.contains, keys.values())
        return [run for run, is_there in zip(keys, answers, strict=True) if is_there]


def refuse(counts: Counter[str], reason: str, detail: str) -> None:
    """Count what was not done as asked; log the 1st, 10th, 100th … of a reason.

    reason: the same for all of a kind. detail: of this one.
    """
    counts[reason] += 1
    if str(counts[reason]).strip("0") == "1":
        logger.warning(
            "prompt cache: %s (%s); computed as usual, %d so far", reason, detail, counts[reason]
        )


def _params(request: Any) -> Mapping[str, Any]:
    params = request.kv_transfer_params
    return params if isinstance(params, Mapping) else {}


def _check_plain(request: Any) -> None:
    """Raises: ProtocolError: the prompt is not text for the model that the states are of."""
    if request.prompt_token_ids is None or request.mm_features:
        raise ProtocolError("the prompt is not token ids alone")
    if request.lora_request is not None:
        raise ProtocolError("states are of the model without an adapter")


def _fillings(
    runs: Sequence[Run], prompt_ids: Sequence[int], start: int, stop: int
) -> list[Filling]:
    """Return what fills tokens `start … stop`; runs may reach beyond both."""
    fillings = []
    for run in runs:
        first, last = max(run.start, start), min(run.end, stop)
        if first < last:
            ids = (*prompt_ids[run.start : run.end], *run.tail)
            fillings.append(Filling(first, last, run.key, ids, first - run.start))
            start = last
    return fillings
