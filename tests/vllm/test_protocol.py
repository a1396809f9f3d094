"""What the connector's scheduler side decides, without a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pcache_core import CausalLM, DiskStore
from pcache_core.errors import ModelError
from pcache_core.key import KeySpace
from pcache_core.kv import KVState, LayerShape, stack_layers
from pcache_core.lm.relocation import Rotation
from pcache_integrations.vllm.model_card import ModelCard
from pcache_integrations.vllm.planner import Planner
from pcache_integrations.vllm.protocol import (
    LOAD,
    SAVE,
    ProtocolError,
    Run,
    cover,
    exact_salt,
    fast_salt,
    parse_runs,
)

SPACE = KeySpace("model", "torch.float32", "team")
PROMPT = list(range(100, 200))


@dataclass
class Request:
    """As much of vLLM's request as a connector reads."""

    kv_transfer_params: Any
    cache_salt: str | None = fast_salt("team")
    request_id: str = "r"
    prompt_token_ids: list[int] = field(default_factory=lambda: list(PROMPT))
    mm_features: tuple[Any, ...] = ()
    lora_request: Any = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


def store_with(folder: Path, *runs: Run) -> DiskStore:
    store = DiskStore(folder)
    stacks = stack_layers([LayerShape(1, 2, 1, 2)])
    for run in runs:
        key = run.module_key(PROMPT, SPACE)
        rows = torch.zeros(1, 1, len(key.token_ids), 2)
        assert store.put(key, KVState(stacks, (rows,), (rows,), key.token_ids, run.anchor))
    return store


def run(start: int, end: int, anchor: int = 0, tail: tuple[int, ...] = ()) -> Run:
    unnamed = Run(start, end, "", anchor, tail)
    return Run(start, end, unnamed.module_key(PROMPT, SPACE).digest, anchor, tail)


def planner(store: DiskStore, *, saves: bool = True) -> Planner:
    return Planner(store, SPACE, 16, saves=saves)


def test_a_prompt_is_covered_up_to_the_first_gap(tmp_path: Path) -> None:
    runs = [run(0, 10), run(10, 40, 10), run(40, 59, 10), run(60, 90, 10)]
    plan = planner(store_with(tmp_path, *runs))
    request = Request({LOAD: [one.as_list() for one in runs]})
    assert plan.matched(request, 0) == 59
    plan.allocated(request, [7, 8, 9, 10, 11], 0, 59)
    (load,) = plan.take_step().loads
    assert load.block_ids == (7, 8, 9, 10)  # of 16 tokens
    filled = [(f.start, f.stop, f.first) for f in load.fillings]
    assert filled == [(0, 10, 0), (10, 40, 0), (40, 59, 0)]


def test_what_the_servers_own_cache_holds_is_not_loaded_again(tmp_path: Path) -> None:
    runs = [run(0, 10), run(10, 40, 10), run(40, 64, 10)]
    plan = planner(store_with(tmp_path, *runs[1:]))
    request = Request({LOAD: [one.as_list() for one in runs]})
    assert plan.matched(request, 16) == 48
    plan.allocated(request, [1, 2, 3, 4], 16, 48)
    (load,) = plan.take_step().loads
    assert [(f.start, f.stop, f.first) for f in load.fillings] == [(16, 40, 6), (40, 64, 0)]


def test_a_request_that_waits_is_planned_anew_when_the_servers_cache_has_less(
    tmp_path: Path,
) -> None:
    runs = [run(0, 10), run(10, 64, 10)]
    plan = planner(store_with(tmp_path, *runs))
    request = Request({LOAD: [one.as_list() for one in runs]})
    assert plan.matched(request, 32) == 32
    assert plan.matched(request, 0) == 64
    plan.allocated(request, [1, 2, 3, 4], 0, 64)
    (load,) = plan.take_step().loads
    assert [(f.start, f.stop) for f in load.fillings] == [(0, 10), (10, 64)]


def test_the_last_token_is_always_computed(tmp_path: Path) -> None:
    runs = [run(0, 96)]
    plan = planner(store_with(tmp_path, *runs))
    request = Request({LOAD: [runs[0].as_list()]}, prompt_token_ids=PROMPT[:96])
    assert plan.matched(request, 0) == 95


def test_rows_that_the_prompt_has_no_use_for_are_left_out(tmp_path: Path) -> None:
    longer = run(0, 32, 0, tail=(7, 7))
    plan = planner(store_with(tmp_path, longer))
    request = Request({LOAD: [longer.as_list()]})
    assert plan.matched(request, 0) == 32
    plan.allocated(request, [1, 2], 0, 32)
    ((filling,),) = (load.fillings for load in plan.take_step().loads)
    assert (filling.stop, filling.token_ids[32:]) == (32, (7, 7))


@pytest.mark.parametrize(
    "request_",
    [
        Request({LOAD: [run(0, 64).as_list()]}, cache_salt=None),
        Request({LOAD: [run(0, 64).as_list()]}, cache_salt=fast_salt("other")),
        Request({LOAD: [run(0, 64).as_list()]}, cache_salt=exact_salt("team")),
        Request({LOAD: [run(0, 64).as_list()]}, lora_request="adapter"),
        Request({LOAD: [run(0, 64).as_list()]}, mm_features=("image",)),
        Request({LOAD: [Run(0, 64, "f" * 64, 0).as_list()]}),
        Request({LOAD: [[0, 64, run(0, 63).key, 0]]}),
        Request({LOAD: [[0, 101, "f" * 64, 0]]}),
        Request({LOAD: [[0, 64, "../../etc/passwd", 0]]}),
        Request({LOAD: "all of it"}),
    ],
)
def test_what_can_not_be_trusted_is_computed_and_counted(tmp_path: Path, request_: Request) -> None:
    plan = planner(store_with(tmp_path, run(0, 64)))
    assert plan.matched(request_, 0) == 0
    assert sum(plan.describe().refused.values()) == 1


def test_a_state_is_kept_when_its_last_token_is_computed(tmp_path: Path) -> None:
    plan = planner(DiskStore(tmp_path))
    request = Request({SAVE: run(10, 40, 10).as_list()}, cache_salt=exact_salt("team"))
    plan.add(request)
    plan.computed("r", 32, [1, 2])
    assert plan.take_step().saves == []
    plan.computed("r", 40, [1, 2, 3])
    (save,) = plan.take_step().saves
    assert (save.start, save.token_ids, save.block_ids) == (10, tuple(PROMPT[:40]), (1, 2, 3))


@pytest.mark.parametrize(
    ("wish", "salt", "saves"),
    [
        (run(10, 40, 0), exact_salt("team"), True),  # not behind all that stands before it
        (Run(10, 40, "f" * 64, 10), exact_salt("team"), True),
        (run(10, 40, 10), fast_salt("team"), True),
        (run(10, 40, 10), exact_salt("team"), False),
    ],
)
def test_a_state_that_is_not_what_its_key_says_is_not_kept(
    tmp_path: Path, wish: Run, salt: str, *, saves: bool
) -> None:
    plan = planner(DiskStore(tmp_path), saves=saves)
    plan.add(Request({SAVE: wish.as_list()}, cache_salt=salt))
    assert not plan.waits_for("r")
    assert sum(plan.describe().refused.values()) == 1


def test_of_several_runs_the_one_that_reaches_furthest_goes_on() -> None:
    runs = [Run(0, 5, "a", 0), Run(0, 9, "b", 0), Run(5, 20, "c", 0), Run(9, 12, "d", 0)]
    assert [one.key for one in cover(runs, 0, lambda one: True)] == ["b", "c"]
    assert [one.key for one in cover(runs, 0, lambda one: one.key != "c")] == ["b", "d"]
    assert cover(runs, 20, lambda one: True) == []


def test_runs_that_are_none_are_refused() -> None:
    for value in ([[0, 5]], [[5, 5, "f" * 64, 0]], [[4, 9, "f" * 64, 5]], [[0, 5, "F" * 64, 0]]):
        with pytest.raises(ProtocolError):
            parse_runs(value, 100)


def test_a_model_card_travels_as_json(tiny: CausalLM) -> None:
    card = ModelCard.of(tiny)
    read = ModelCard.from_dict(card.as_dict())
    assert (read.model, read.dtype, read.stacks) == (tiny.fingerprint, "float32", tiny.stacks)
    for mine, own in zip(read.rotations, tiny.support.rotations or (), strict=True):
        assert isinstance(mine, Rotation)
        assert isinstance(own, Rotation)
        assert torch.equal(mine.frequencies, own.frequencies)
        assert mine.identity[:1] + mine.identity[2:] == own.identity[:1] + own.identity[2:]
    with pytest.raises(ModelError, match="pcache serve"):
        ModelCard.from_dict({"name": "x"})
