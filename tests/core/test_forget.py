"""`engine.forget`: no state of a text is left, whatever it was encoded after and by whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pcache_core import (
    CausalLM,
    DiskStore,
    MemoryStore,
    ModuleStore,
    Preamble,
    Prompt,
    PromptCacheEngine,
    PromptError,
    Segment,
    StoreError,
    TieredStore,
)
from pcache_core.kv.key import ModuleKey
from pcache_core.kv.state import KVState
from pcache_core.store.inspect import stored_states
from subjects import PREAMBLE

BEES, BOAT = "Ann keeps bees in Oslo.", "Ben sold a red boat to a friend."
OPENINGS = ("Answer from the notes.\n", "You are given this:\n")


def new_engine(
    lm: CausalLM, store: ModuleStore | None = None, namespace: str = "default"
) -> PromptCacheEngine:
    """With company: a text has one state for where it comes first, and one for elsewhere."""
    return PromptCacheEngine(lm, store, namespace=namespace, preamble=Preamble(*PREAMBLE))


def ask(engine: PromptCacheEngine, opening: str, *documents: str) -> dict[str, str]:
    """Where the documents came from."""
    segments = [Segment(opening, "literal"), *(Segment(text, "document") for text in documents)]
    prompt = Prompt([*segments, Segment("\nWho? A:", "argument")])
    report = engine.prefill(prompt, reuse="fast").report
    return {part.text: part.source for part in report.segments if part.kind == "document"}


def states(engine: PromptCacheEngine) -> int:
    count = engine.stats().states
    assert count is not None
    return count


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


def test_both_states_of_a_text_go_whatever_preamble_they_have_and_other_texts_stay(
    llama: CausalLM,
) -> None:
    engine = new_engine(llama)
    for opening in OPENINGS:
        ask(engine, opening, BOAT, BEES)
    engine.encode([BEES], progress=False)
    PromptCacheEngine(llama, engine.store, preamble=Preamble.none()).encode([BEES], progress=False)
    before = engine.stats()
    report = engine.forget([BEES, BEES])
    assert (report.texts, report.states) == (1, 3)
    per_state = llama.count_tokens(BEES) * llama.bytes_per_token
    assert report.freed_bytes == 3 * per_state
    assert before.nbytes is not None
    assert engine.stats().nbytes == before.nbytes - 3 * per_state
    other = new_engine(llama, engine.store)  # without the prefixes of this one
    assert ask(other, OPENINGS[0], BOAT, BEES) == {BOAT: "memory", BEES: "encoded"}
    assert ask(other, OPENINGS[1], BEES, BOAT) == {BEES: "encoded", BOAT: "encoded"}


def test_forgetting_again_or_what_was_never_met_is_nothing(llama: CausalLM) -> None:
    engine = new_engine(llama)
    engine.encode([BEES], progress=False)
    assert engine.forget([BEES]).states == 2
    assert engine.forget([BEES, BOAT, ""]).states == 0
    assert engine.forget([]).texts == 0


def test_states_at_every_position_go_where_none_can_be_moved(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    engine = new_engine(tiny_lm("gpt2"))
    ask(engine, OPENINGS[0], BEES, BOAT)
    ask(engine, OPENINGS[0], BOAT, BEES)
    before = states(engine)
    assert engine.forget([BEES]).states == 2
    assert states(engine) == before - 2


def test_in_a_folder_the_states_of_other_processes_go_too(llama: CausalLM, tmp_path: Path) -> None:
    longer = BEES + " And wasps."
    for namespace in ("default", "other"):
        writer = new_engine(llama, DiskStore(tmp_path), namespace)
        ask(writer, OPENINGS[1], BEES, longer)
    writer.encode([BEES], progress=False)
    other = PromptCacheEngine(llama, DiskStore(tmp_path), preamble=Preamble.none())
    other.encode([BEES], progress=False)
    reader = new_engine(llama, TieredStore([MemoryStore(), DiskStore(tmp_path)]))
    assert ask(reader, OPENINGS[1], BEES)[BEES] == "disk"
    report = reader.forget([BEES])
    assert report.states == 2  # where it came first, and the one after another preamble
    assert report.freed_bytes > 0
    left = [(s.record.namespace, s.record.token_ids) for s in stored_states(tmp_path) if s.record]
    bees, wasps = (tuple(llama.token_ids(text)) for text in (BEES, longer))
    assert ("default", bees) not in left
    assert ("default", wasps) in left
    assert ("other", bees) in left
    fresh = new_engine(llama, reader.store)
    assert ask(fresh, OPENINGS[1], BEES)[BEES] == "encoded"


def test_a_folder_that_was_removed_holds_nothing(llama: CausalLM, tmp_path: Path) -> None:
    engine = PromptCacheEngine(llama, DiskStore(tmp_path / "states"))
    (tmp_path / "states").rmdir()
    assert engine.forget([BEES]).states == 0


def test_nothing_is_forgotten_when_the_folder_cant_be_read(
    llama: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PromptCacheEngine(llama, TieredStore([MemoryStore(), DiskStore(tmp_path)]))
    ask(engine, OPENINGS[0], BEES)
    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", _refuse)
        with pytest.raises(StoreError, match="can't be read"):
            engine.forget([BEES])
    assert engine.forget([BEES]).states == 1


def _refuse(path: object) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_clearing_drops_every_state_and_prefix_of_this_model_and_namespace_alone(
    llama: CausalLM, tmp_path: Path
) -> None:
    store = TieredStore([MemoryStore(), DiskStore(tmp_path)])
    other = new_engine(llama, store, "other")
    other.encode([BEES], progress=False)
    engine = new_engine(llama, store)
    first = ask(engine, OPENINGS[0], BEES, BOAT)
    store.flush()
    engine.clear()
    assert ask(engine, OPENINGS[0], BEES, BOAT) == first == {BEES: "encoded", BOAT: "encoded"}
    assert engine.reports[-1].cached_tokens == 0
    assert other.encode([BEES], progress=False).already_stored == 1


def test_clearing_drops_what_left_memory_and_waits_to_be_written(
    llama: CausalLM, tmp_path: Path
) -> None:
    may_write = threading.Event()

    class SlowStore(DiskStore):
        def put(self, key: ModuleKey, state: KVState) -> bool:
            assert may_write.wait(20)
            return super().put(key, state)

    room_for_one = llama.count_tokens(BOAT) * llama.bytes_per_token
    store = TieredStore([MemoryStore(room_for_one), SlowStore(tmp_path)])
    engine = new_engine(llama, store)
    engine.encode([BEES, BOAT], progress=False)
    threading.Timer(0.2, may_write.set).start()  # what is being written is waited for
    engine.clear()
    engine.flush()
    assert list(stored_states(tmp_path)) == []


def test_a_single_text_is_refused(llama: CausalLM) -> None:
    with pytest.raises(PromptError, match="list of texts, got str"):
        PromptCacheEngine(llama).forget(BEES)
