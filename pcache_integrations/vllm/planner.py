"""The scheduler's side: which leading part of a prompt comes from states, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
from pcache_integrations.vllm.tally import Tally


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

    request_id: str
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


@dataclass(slots=True)
class Step:
    """What the workers do beside one forward: loads before it, saves after it."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What covers a prompt after its first `start` tokens, without a gap."""

    start: int
    runs: list[Run]


_AT_ONCE = 8
_FOREIGN = "the key is not that of these tokens, this model, preamble and namespace"


class Planner:
    """Decides for each request, from what its client sent and what the store has.

    A request's parameters are never trusted: a key must be the one that the prompt's own tokens
    make, with this model and namespace and one of these preambles.

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
        self._tally = Tally()
        self._plans: dict[str, _Plan] = {}
        self._wanted: dict[str, Save] = {}
        self._step = Step()

    def add(self, request: Any) -> None:
        """Take note of what a new request wants to be kept."""
        wish = _params(request).get(SAVE)
        if wish is None:
            return
        try:
            run = self._checked_save(request, wish)
        except ProtocolError as error:
            self._tally.add("a state that can't be kept was asked for", str(error))
            return
        ids = tuple(request.prompt_token_ids[: run.end])
        self._wanted[request.request_id] = Save(run.start, run.key, ids)

    def matched(self, request: Any, computed: int) -> int:
        """How many tokens after the first `computed` states cover."""
        plan = self._plans.get(request.request_id)
        if plan is None or plan.start != computed:
            plan = _Plan(computed, self._plan(request, computed))
            self._plans[request.request_id] = plan
        reached = max((run.end for run in plan.runs), default=computed)
        # The last token is always computed, for its logits.
        limit: int = min(reached, request.num_prompt_tokens - 1)
        return max(0, limit - computed)

    def allocated(self, request: Any, block_ids: Sequence[int], computed: int, tokens: int) -> None:
        """Load `tokens` after the first `computed` in the next step; they have these blocks."""
        plan = self._plans.pop(request.request_id, None)
        if plan is None or not tokens:
            return
        assert plan.start == computed, "the scheduler asks before it allocates"
        stop = computed + tokens
        blocks = tuple(block_ids[: -(-stop // self._block_tokens)])
        fillings = tuple(_fillings(plan.runs, request.prompt_token_ids, computed, stop))
        self._step.loads.append(Load(request.request_id, computed, stop, blocks, fillings))

    def computed(self, request_id: str, tokens: int, block_ids: Sequence[int]) -> None:
        """Know that a request's first `tokens` will be computed by the end of this step."""
        save = self._wanted.get(request_id)
        if save is not None and tokens >= len(save.token_ids):
            del self._wanted[request_id]
            self._step.saves.append(replace(save, block_ids=tuple(block_ids)))

    def waits_for(self, request_id: str) -> bool:
        """Whether `computed` wants to hear of it."""
        return request_id in self._wanted

    def take_step(self) -> Step:
        """What the workers do in this step."""
        step, self._step = self._step, Step()
        return step

    def finished(self, request: Any) -> dict[str, Any] | None:
        """The parameters of a request's answer."""
        self._plans.pop(request.request_id, None)
        self._wanted.pop(request.request_id, None)
        if LOAD not in _params(request):
            return None
        return self.describe().as_dict()

    def describe(self) -> Description:
        """What clients have to know."""
        return replace(self._description, refused=self._tally.counts)

    def _plan(self, request: Any, computed: int) -> list[Run]:
        wish = _params(request).get(LOAD)
        if not wish:
            return []
        try:
            runs = self._checked_runs(request, wish)
        except ProtocolError as error:
            self._tally.add("states were asked for in a way that is not understood", str(error))
            return []
        useful = [run for run in runs if run.end > computed]
        there = self._there(self._keys(useful, request.prompt_token_ids))
        return cover(useful, computed, lambda run: run in there)

    def _checked_runs(self, request: Any, wish: object) -> tuple[Run, ...]:
        runs = parse_runs(wish, request.num_prompt_tokens, self._preambles)
        salt = fast_salt(self._space.namespace)
        if request.cache_salt != salt:
            raise ProtocolError(f"the request's cache_salt must be {salt!r}")
        _check_plain(request)
        return runs

    def _checked_save(self, request: Any, wish: object) -> Run:
        run = parse_run(wish, request.num_prompt_tokens, self._preambles)
        _check_plain(request)
        if not self._description.saves:
            raise ProtocolError("this server keeps no states; several workers share a model")
        if request.cache_salt == fast_salt(self._space.namespace) or LOAD in _params(request):
            raise ProtocolError("what was made of states is not kept as one")
        before = tuple(request.prompt_token_ids[: run.start])
        if before != self._preambles[run.preamble] or run.tail:
            raise ProtocolError("a state is encoded right after a preamble of this server")
        if run.module_key(request.prompt_token_ids, self._preambles, self._space).digest != run.key:
            raise ProtocolError(_FOREIGN)
        return run

    def _keys(self, runs: Sequence[Run], prompt_ids: Sequence[int]) -> dict[Run, ModuleKey]:
        """The runs' keys; runs that name another's are left out."""
        keys = {run: run.module_key(prompt_ids, self._preambles, self._space) for run in runs}
        foreign = [run for run, key in keys.items() if key.digest != run.key]
        for run in foreign:
            del keys[run]
            self._tally.add("a state was asked for by a wrong key", _FOREIGN)
        return keys

    def _there(self, keys: Mapping[Run, ModuleKey]) -> set[Run]:
        """The runs whose states the store has; nothing is read, several are asked for at once."""
        answers = self._threads.map(self._store.contains, keys.values())
        return {run for run, is_there in zip(keys, answers, strict=True) if is_there}


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
    """What fills tokens `start … stop`; runs may reach beyond both."""
    fillings = []
    for run in runs:
        first, last = max(run.start, start), min(run.end, stop)
        if first < last:
            ids = (*prompt_ids[run.start : run.end], *run.tail)
            fillings.append(Filling(first, last, run.key, ids, first - run.start))
            start = last
    return fillings
