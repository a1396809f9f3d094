"""What the connector's scheduler side decides, without a server."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from pcache_core import CausalLM, DiskStore
from pcache_core.errors import ModelError
from pcache_core.kv.key import KeySpace
from pcache_core.kv.state import KVState, LayerShape, stack_layers
from pcache_core.lm.relocation import Rotation
from pcache_integrations.vllm.connector_plan import Planner
from pcache_integrations.vllm.model_card import ModelCard
from pcache_integrations.vllm.protocol import (
    LOAD,
    SAVE,
    Description,
    ProtocolError,
    Run,
    cover,
    exact_salt,
    fast_salt,
    parse_runs,
    preambles_digest,
)

SPACE = KeySpace("model", "torch.float32", "team")
PREAMBLES = {"": (), "opening": (1, 2), "en": (1, 2, 3, 4, 5), "de": (1, 2, 6, 7)}
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
        key = SPACE.key(PREAMBLES[run.preamble], [*PROMPT[run.start : run.end], *run.tail], None)
        rows = torch.zeros(1, 1, len(key.token_ids), 2)
        state = KVState(stacks, (rows,), (rows,), key.token_ids, len(PREAMBLES[run.preamble]))
        assert store.put(key, state)
    return store


def run(start: int, end: int, preamble: str = "", tail: tuple[int, ...] = ()) -> Run:
    """Of the prompt, as an honest client asks for it."""
    key = SPACE.key(PREAMBLES[preamble], [*PROMPT[start:end], *tail], None)
    return Run(start, end, key.digest, preamble, tail)


def description(*, saves: bool = True) -> Description:
    own = (SPACE.model, SPACE.dtype, SPACE.namespace)
    return Description(*own, preambles_digest(PREAMBLES), 2048, saves, {})


def planner(store: DiskStore, *, saves: bool = True) -> Planner:
    return Planner(store, description(saves=saves), PREAMBLES, 16)


def test_a_prompt_is_covered_up_to_the_first_gap(tmp_path: Path) -> None:
    runs = [run(0, 10), run(10, 40, "opening"), run(40, 59, "en"), run(60, 90, "de")]
    plan = planner(store_with(tmp_path, *runs))
    request = Request({LOAD: [one.as_list() for one in runs]})
    assert plan.matched(request, 0) == 59
    plan.allocated(request, [7, 8, 9, 10, 11], 59)
    (load,), _ = plan.take_step()
    assert load.block_ids == (7, 8, 9, 10)  # of 16 tokens
    filled = [(f.start, f.stop, f.first) for f in load.fillings]
    assert filled == [(0, 10, 0), (10, 40, 0), (40, 59, 0)]


def test_what_the_servers_own_cache_holds_is_not_loaded_again(tmp_path: Path) -> None:
    runs = [run(0, 10), run(10, 40, "opening"), run(40, 64, "en")]
    plan = planner(store_with(tmp_path, *runs[1:]))
    request = Request({LOAD: [one.as_list() for one in runs]})
    assert plan.matched(request, 16) == 48
    plan.allocated(request, [1, 2, 3, 4], 48)
    (load,), _ = plan.take_step()
    assert [(f.start, f.stop, f.first) for f in load.fillings] == [(16, 40, 6), (40, 64, 0)]


def test_a_request_that_waits_is_planned_anew_when_the_servers_cache_has_less(
    tmp_path: Path,
) -> None:
    runs = [run(0, 10), run(10, 64, "opening")]
    plan = planner(store_with(tmp_path, *runs))
    request = Request({LOAD: [one.as_list() for one in runs]})
    assert plan.matched(request, 32) == 32
    assert plan.matched(request, 0) == 64
    plan.allocated(request, [1, 2, 3, 4], 64)
    (load,), _ = plan.take_step()
    assert [(f.start, f.stop) for f in load.fillings] == [(0, 10), (10, 64)]


def test_the_last_token_is_always_computed(tmp_path: Path) -> None:
    runs = [run(0, 96)]
    plan = planner(store_with(tmp_path, *runs))
    request = Request({LOAD: [runs[0].as_list()]}, prompt_token_ids=PROMPT[:96])
    assert plan.matched(request, 0) == 95


def test_rows_that_the_prompt_has_no_use_for_are_left_out(tmp_path: Path) -> None:
    longer = run(0, 32, "opening", tail=(7, 7))
    plan = planner(store_with(tmp_path, longer))
    request = Request({LOAD: [longer.as_list()]})
    assert plan.matched(request, 0) == 32
    plan.allocated(request, [1, 2], 32)
    (load,), _ = plan.take_step()
    (filling,) = load.fillings
    assert (filling.stop, filling.token_ids[32:]) == (32, (7, 7))


@pytest.mark.parametrize(
    "request_",
    [
        Request({LOAD: [run(0, 64).as_list()]}, cache_salt=None),
        Request({LOAD: [run(0, 64).as_list()]}, cache_salt=fast_salt("other")),
        Request({LOAD: [run(0, 64).as_list()]}, cache_salt=exact_salt("team")),
        Request({LOAD: [run(0, 64).as_list()]}, lora_request="adapter"),
        Request({LOAD: [run(0, 64).as_list()]}, mm_features=("image",)),
        Request({LOAD: [Run(0, 64, "f" * 64, "").as_list()]}),
        Request({LOAD: [[0, 64, run(0, 63).key, ""]]}),
        Request({LOAD: [[0, 64, run(0, 64).key, "opening"]]}),
        Request({LOAD: [[0, 64, run(0, 64).key, 0]]}),  # as version 1 has it
        Request({LOAD: [[0, 101, "f" * 64, ""]]}),
        Request({LOAD: [[0, 64, "../../etc/passwd", ""]]}),
        Request({LOAD: "all of it"}),
    ],
)
def test_what_can_not_be_trusted_is_computed_and_counted(tmp_path: Path, request_: Request) -> None:
    plan = planner(store_with(tmp_path, run(0, 64)))
    assert plan.matched(request_, 0) == 0
    assert sum(plan.describe().refused.values()) == 1


def test_a_state_is_kept_when_its_last_token_is_computed(tmp_path: Path) -> None:
    """The preamble is the server's own, and the state's first position is the one after it."""
    plan = planner(DiskStore(tmp_path))
    ids = [*PREAMBLES["en"], *PROMPT[5:]]
    key = SPACE.key(PREAMBLES["en"], ids[5:40], None).digest
    wish = Run(5, 40, key, "en").as_list()
    plan.add(Request({SAVE: wish}, cache_salt=exact_salt("team"), prompt_token_ids=ids))
    plan.computed("r", 32, [1, 2])
    assert plan.take_step() == ([], [])
    plan.computed("r", 40, [1, 2, 3])
    _, (save,) = plan.take_step()
    assert (save.start, save.token_ids, save.block_ids) == (5, tuple(ids[:40]), (1, 2, 3))


@pytest.mark.parametrize(
    ("wish", "salt", "saves"),
    [
        (run(5, 40, "en"), exact_salt("team"), True),  # the prompt does not begin with it
        (run(2, 40, "opening"), exact_salt("team"), True),
        (run(0, 40, "opening"), exact_salt("team"), True),
        (Run(0, 40, "f" * 64, ""), exact_salt("team"), True),
        (run(0, 40, "", tail=(7,)), exact_salt("team"), True),
        (run(0, 40), fast_salt("team"), True),
        (run(0, 40), exact_salt("team"), False),
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
    places = [(0, 5, "a"), (0, 9, "b"), (5, 20, "c"), (9, 12, "d")]
    runs = [Run(*place, "") for place in places]
    assert [one.key for one in cover(runs, 0)] == ["b", "c"]
    assert [one.key for one in cover([runs[3], *runs[:2]], 0)] == ["b", "d"]
    assert [one.key for one in cover(runs, 3)] == ["b", "c"]
    assert cover(runs, 20) == []


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ANYTHING = (
    None, True, False, -1, 65, 2**31, 2**63, 10**5000, 0.0, 0.5, math.nan, math.inf, "", "0", "en ",
    "F" * 64, "../../etc/passwd", b"", [], ["en"], [-1], [2**31], [2**63], [0.5], [True], [None],
    [[7]], [7] * 65, {}, {"0": 1}, nested(100_000),
)  # fmt: skip
FITTING = [(3, ""), (4, [])]  # what `run(0, 64)` has there


def hostile_runs() -> list[Any]:
    """A run of the prompt with one item exchanged, and things that are not runs."""
    good = [*run(0, 64).as_list(), ()]
    runs: list[Any] = [
        [*good[:place], value, *good[place + 1 :]]
        for place, value in product(range(5), ANYTHING)
        if (place, value) not in FITTING
    ]
    far = [[start, end, good[2], "en"] for start, end in ((9, 5), (0, 101), (100, 101))]
    version_1 = [4, 9, good[2], 4]
    unopened = [4, 9, good[2], ""]  # only what opens the prompt is encoded after nothing
    return [*runs, *far, version_1, unopened, good[:2], [*good, 1], *ANYTHING]


def test_no_parameters_raise_and_what_is_refused_is_counted(tmp_path: Path) -> None:
    """An error in one request's plan would end vLLM's scheduler, and with it all others'."""
    plan = planner(store_with(tmp_path, run(0, 64)))
    hostile = hostile_runs()
    for number, wish in enumerate(hostile):
        assert plan.matched(Request({LOAD: [wish]}, request_id=str(number)), 0) == 0
        plan.add(Request({SAVE: wish}, cache_salt=exact_salt("team")))
        assert not plan.waits_for("r")
    counts = plan.describe().refused.values()  # one key is well written, but of 64 tokens, not 65
    assert sorted(counts) == [1, len(hostile) - 1, len(hostile)]
    assert plan.matched(Request({LOAD: [run(0, 64).as_list()]}), 0) == 64


@pytest.mark.parametrize("value", [value for value in ANYTHING if value != []], ids=type)
def test_parameters_of_another_kind_are_computed_and_counted(tmp_path: Path, value: Any) -> None:
    plan = planner(DiskStore(tmp_path))
    assert plan.matched(Request({LOAD: value}), 0) == 0
    assert sum(plan.describe().refused.values()) == 1
    assert plan.matched(Request(value, request_id="all"), 0) == 0
    assert plan.finished(Request(value, request_id="all")) is None


def test_what_runs_may_cover_is_bounded_by_the_prompt() -> None:
    """An honest client reads a place three times at most; each run counts as eight tokens."""
    whole = [0, 100, "f" * 64, "en"]
    one = [5, 6, "f" * 64, "en"]
    assert len(parse_runs([whole] * 5, 100, PREAMBLES)) == 5  # 500 of 528 tokens
    assert len(parse_runs([one] * 66, 100, PREAMBLES)) == 66
    assert len(parse_runs([[*one, [7] * 64]] * 7, 100, PREAMBLES)) == 7
    for most, runs in (
        (528, [whole] * 6), (528, [one] * 67), (528, [[*one, [7] * 64]] * 8),
        (400_128, [[start, 100_000, "f" * 64, "en"] for start in range(5)]),
    ):  # fmt: skip
        with pytest.raises(ProtocolError, match=f"at most {most} "):
            parse_runs(runs, max(run[1] for run in runs) if most > 528 else 100, PREAMBLES)
    with pytest.raises(ProtocolError, match="at most 4096 runs"):
        parse_runs([one] * 4097, 10**6, PREAMBLES)


@pytest.mark.parametrize("kind", ["overlapping", "identical", "one after the other"])
def test_a_request_of_many_runs_takes_the_scheduler_no_time(tmp_path: Path, kind: str) -> None:
    """What is refused costs nothing; what is not is read once. (It took 8 to 33 seconds.)"""
    length = 50_000
    runs = {
        "overlapping": [[start, length, "f" * 64, "en"] for start in range(4096)],
        "identical": [[0, length, "f" * 64, "en"]] * 4096,
        "one after the other": [[start, start + 8, "f" * 64, "en"] for start in range(4096)],
    }[kind]
    plan = planner(DiskStore(tmp_path))
    request = Request({LOAD: runs}, prompt_token_ids=list(range(length)))
    started = time.process_time()
    assert plan.matched(request, 0) == 0
    assert time.process_time() - started < 2
    assert sum(plan.describe().refused.values()) == (4096 if kind == "one after the other" else 1)


def test_runs_cover_as_far_as_any_choice_of_them_does() -> None:
    rng = random.Random(0)
    for _ in range(300):
        places = [sorted(rng.sample(range(30), 2)) for _ in range(rng.randrange(12))]
        runs = [Run(start, end, "f" * 64, "en") for start, end in places]
        begin = rng.randrange(10)
        reachable = {begin}
        for _ in runs:
            reachable |= {
                place for run in runs for place in range(run.start, run.end + 1)
                if any(run.start <= reached <= run.end for reached in reachable)
            }  # fmt: skip
        chosen = cover(runs, begin)
        assert max([begin, *(run.end for run in chosen)]) == max(reachable)
        ends = [begin, *(run.end for run in chosen)]
        assert all(run.start <= end < run.end for run, end in zip(chosen, ends, strict=False))


def test_a_description_travels_as_json_and_another_version_is_named() -> None:
    sent = json.loads(json.dumps(description().as_dict()))
    assert Description.parse(sent) == description()
    assert Description.parse({"other_connector": {}}) is None
    version_1 = {"version": 1, "model": "m", "dtype": "d", "namespace": "n", "saves": True}
    with pytest.raises(ProtocolError, match="version 1 .*this client version 2; install the same"):
        Description.parse({LOAD: {**version_1, "refused": {}}})


def test_preambles_that_differ_in_one_token_or_name_have_another_digest() -> None:
    same = dict(reversed(PREAMBLES.items()))
    assert preambles_digest(same) == preambles_digest(PREAMBLES)
    renamed = {"fr" if name == "de" else name: ids for name, ids in PREAMBLES.items()}
    for other in (PREAMBLES | {"en": (1, 2, 3, 4)}, renamed, PREAMBLES | {"fr": ()}):
        assert preambles_digest(other) != preambles_digest(PREAMBLES)


def test_a_model_card_travels_as_json(tiny: CausalLM) -> None:
    card = ModelCard.of(tiny)
    read = ModelCard.from_dict(card.as_dict())
    assert (read.model, read.dtype, read.stacks) == (tiny.fingerprint, "float32", tiny.stacks)
    assert read.context_length == tiny.context_length == 2048
    for mine, own in zip(read.rotations, tiny.support.rotations or (), strict=True):
        assert isinstance(mine, Rotation)
        assert isinstance(own, Rotation)
        assert torch.equal(mine.frequencies, own.frequencies)
        assert mine.identity[:1] + mine.identity[2:] == own.identity[:1] + own.identity[2:]
    with pytest.raises(ModelError, match="pcache serve"):
        ModelCard.from_dict({"name": "x"})
