"""Admission: a state is loaded where that takes no longer than computing its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pcache_core import (
    CausalLM,
    DiskStore,
    MemoryStore,
    OptionError,
    Prompt,
    PromptCacheEngine,
    SamplingParams,
    Segment,
    TieredStore,
)
from pcache_core.admission import Always, Declined, Measured
from pcache_core.key import ModuleKey
from pcache_core.store import Admits, Offer, Opened, Tier

OPENING = Segment("Answer from the notes.\n", "literal")
BEES = Segment("Ann keeps bees in Oslo, and sells honey.", "document", "bees")
MILL = Segment("The mill by the lake burned down in May.", "document", "mill")
PROMPT = Prompt([OPENING, BEES, MILL, Segment("\nWho sells honey? A:")])
SLOW_DISK = {"bytes_per_s": {"disk": 1e3}, "tokens_per_s": 1e6}
FAST_DISK = {"bytes_per_s": {"disk": 1e12}, "tokens_per_s": 10.0}


def offer(tokens: int, nbytes: int, tier: Tier = "disk") -> Offer:
    return Offer(ModuleKey("0" * 64, tuple(range(tokens))), tier, nbytes)


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm()


@pytest.fixture
def folder(lm: CausalLM, tmp_path: Path) -> Path:
    engine = PromptCacheEngine(lm, DiskStore(tmp_path))
    engine.encode([BEES.text, MILL.text], OPENING.text, progress=False)
    return tmp_path


def sources(report: Any) -> list[str]:
    return [segment.source for segment in report.segments if segment.kind == "document"]


def test_the_faster_way_is_taken_and_both_times_are_told() -> None:
    speeds = Measured({"disk": 1e6}, tokens_per_s=1000)  # 1 MB against 1,000 tokens a second
    assert speeds.declines(offer(500, 400_000)) is None
    declined = speeds.declines(offer(400, 500_000))
    assert declined is not None
    assert (declined.tier, declined.nbytes) == ("disk", 500_000)
    assert (declined.load_ms, declined.compute_ms) == pytest.approx((500, 400))
    assert str(declined) == (
        "not loaded from disk: 500,000 bytes would take about 500 ms, computing 400 ms"
    )


def test_what_is_in_memory_or_not_yet_measured_or_no_matter_is_loaded() -> None:
    slow = Measured({"disk": 1.0}, tokens_per_s=1e9)
    assert slow.declines(offer(10, 10**9, "memory")) is None
    assert slow.declines(offer(10, 10**9, "remote")) is None
    assert Measured({"disk": 1.0}).declines(offer(10, 10**9)) is None
    assert Measured(tokens_per_s=1e9).declines(offer(10, 10**9)) is None
    assert Measured({"disk": 1e6}, 1e6).declines(offer(1, 900)) is None  # not a millisecond
    assert Always().declines(offer(10, 10**9)) is None


def test_a_tier_that_was_slow_gets_a_chance_now_and_then_and_can_use_it() -> None:
    speeds = Measured({"disk": 1e3}, tokens_per_s=1e6)
    answers = [speeds.declines(offer(10, 10**6)) is None for _ in range(96)]
    assert [n for n, admitted in enumerate(answers, 1) if admitted] == [32, 64, 96]
    for _ in range(200):
        speeds.loaded("disk", 10**6, 0.1)
    assert speeds.declines(offer(1000, 10**6)) is None


def test_a_hiccup_of_a_quick_disk_keeps_nothing_from_being_loaded() -> None:
    speeds = Measured(tokens_per_s=1e6)
    for _ in range(100):
        speeds.loaded("disk", 1000, 4.0)
        assert speeds.declines(offer(10, 10**6)) is None
    speeds.loaded("disk", 1000, 60.0)
    assert speeds.declines(offer(10, 10**6)) is not None


def test_speeds_follow_what_is_measured_and_few_tokens_tell_nothing() -> None:
    speeds = Measured()
    speeds.loaded("disk", 10**6, 1000)
    speeds.computed(15, 1.0)
    assert speeds.declines(offer(100, 10**6)) is None, "nothing is known of the model"
    speeds.computed(1000, 1000)
    assert speeds.declines(offer(100, 10**6)) is not None
    for _ in range(100):
        speeds.computed(20, 2000)  # another program wants the processor
    assert speeds.declines(offer(100, 10**6)) is None


@pytest.mark.parametrize("bad", [{"bytes_per_s": {"disk": 0}}, {"bytes_per_s": {"memory": 1.0}},
                                 {"bytes_per_s": {"tape": 1.0}}, {"tokens_per_s": "fast"},
                                 {"tokens_per_s": float("inf")}])  # fmt: skip
def test_bad_speeds_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Measured(**bad)


class LoadsAll:
    """An admission of the caller's own."""

    def declines(self, offer: Offer) -> Declined | None:
        return None

    def loaded(self, tier: Tier, nbytes: int, elapsed_ms: float) -> None: ...

    def computed(self, num_tokens: int, elapsed_ms: float) -> None: ...


def test_an_engine_takes_a_word_or_an_object(lm: CausalLM) -> None:
    for good in ("measured", "always", Measured(), Always(), LoadsAll()):
        PromptCacheEngine(lm, admission=good)
    for bad in ("never", 3, Measured):
        with pytest.raises(OptionError, match="admission="):
            PromptCacheEngine(lm, admission=bad)  # type: ignore[arg-type]


def test_a_state_that_is_slow_to_load_is_computed_and_the_report_says_so(
    lm: CausalLM, folder: Path
) -> None:
    store = DiskStore(folder)
    slow = PromptCacheEngine(lm, store, "fast", admission=Measured(**SLOW_DISK))
    prefill = slow.prefill(PROMPT)
    report = prefill.report
    assert sources(report) == ["computed"] * 2
    assert (report.cached_tokens, report.encoded_tokens) == (0, 0)
    assert report.not_loaded_tokens == report.prompt_tokens - lm.count_tokens(
        PROMPT.segments[-1].text
    )
    bees = report.segments[1]
    assert bees.note.startswith("not loaded from disk: ")
    assert report.segments[-1].note == ""
    assert f"bees: {bees.note}" in " ".join(str(report).split())
    assert "not loaded from disk" in report._repr_html_()
    exact = PromptCacheEngine(lm).prefill(PROMPT, reuse="off").logits
    torch.testing.assert_close(prefill.logits, exact, rtol=0, atol=1e-4)
    stats = slow.stats()
    assert (stats.declined, stats.hits, stats.misses) == (3, 0, 0)
    assert stats.not_loaded_tokens == report.not_loaded_tokens


def test_a_state_that_is_fast_to_load_is_loaded(lm: CausalLM, folder: Path) -> None:
    fast = PromptCacheEngine(lm, DiskStore(folder), "fast", admission=Measured(**FAST_DISK))
    report = fast.prefill(PROMPT).report
    assert sources(report) == ["disk"] * 2
    assert report.not_loaded_tokens == 0
    assert {segment.note for segment in report.segments} == {""}


def test_a_slow_disk_behind_memory_does_not_keep_memory_from_serving(
    lm: CausalLM, folder: Path
) -> None:
    store = TieredStore([MemoryStore(), DiskStore(folder)])
    PromptCacheEngine(lm, store, "fast", admission="always").prefill(PROMPT)
    report = PromptCacheEngine(lm, store, "fast", admission=Measured(**SLOW_DISK)).prefill(PROMPT)
    assert sources(report.report) == ["memory"] * 2


def test_what_one_tier_has_and_is_not_worth_it_is_asked_of_no_later_one(
    lm: CausalLM, folder: Path, tmp_path: Path
) -> None:
    later = DiskStore(folder)
    store = TieredStore([MemoryStore(), DiskStore(folder), later])
    report = PromptCacheEngine(lm, store, "fast", admission=Measured(**SLOW_DISK)).prefill(PROMPT)
    assert sources(report.report) == ["computed"] * 2
    assert (later.stats().declined, later.stats().misses) == (0, 0)
    assert store.stats().misses == 0


def test_missing_documents_are_still_encoded_beside_declined_ones(
    lm: CausalLM, folder: Path
) -> None:
    new = Segment("Di moved to the coast with her two dogs.", "document", "di")
    engine = PromptCacheEngine(lm, DiskStore(folder), "fast", admission=Measured(**SLOW_DISK))
    report = engine.prefill(Prompt([OPENING, BEES, new, Segment("\nWho? A:")])).report
    assert sources(report) == ["computed", "encoded"]


class SlowDisk(DiskStore):
    """A disk that takes a third of a second for each state it is asked to read."""

    def open_many(self, keys: Sequence[ModuleKey], admits: Admits) -> list[Opened | None]:
        opened = super().open_many(keys, admits)
        time.sleep(0.3 * sum(each is not None for each in opened))
        return opened


def test_a_really_slow_store_is_tried_once_and_then_left_alone(lm: CausalLM, folder: Path) -> None:
    """Measured, with nothing injected: the first request learns what the second goes by."""
    store = SlowDisk(folder)
    first = PromptCacheEngine(lm, store, "fast", admission=(speeds := Measured()))
    params = SamplingParams(max_tokens=1)
    assert sources(first.generate(PROMPT, params).report) == ["disk"] * 2
    first.prefill(Prompt([Segment("one two three four five six seven eight nine ten. " * 4)]))
    again = PromptCacheEngine(lm, store, "fast", admission=speeds)
    assert sources(again.generate(PROMPT, params).report) == ["computed"] * 2
