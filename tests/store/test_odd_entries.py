"""Whatever stands in a store's folder: every call goes on, and `inspect` says what it is."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from typer.testing import CliRunner

from pcache_core import CausalLM, DiskStore, PromptCacheEngine
from pcache_core.store.inspect import Selection, clear_states, stored_states
from pcache_integrations.cli.commands import app
from stored_states import as_nobody, holds, make

T = TypeVar("T")


BEES = "Ann keeps bees in Oslo."


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to(path.name)


def full_folder(path: Path) -> None:
    (path / "kept").mkdir(parents=True)


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def empty(path: Path) -> None:
    path.touch()


def garbage(path: Path) -> None:
    path.write_bytes(b"no state" * 1000)


def of_the_future(path: Path) -> None:
    path.write_bytes(b"no state" * 1000)
    os.utime(path, (time.time() + 10**8,) * 2)


KINDS = [fifo, link, full_folder, listener, empty, garbage, of_the_future]
NAMES = ["ab/x.safetensors", "ab/" + "ab" * 32 + ".safetensors", "readme", "ab/notes.txt", "cd"]


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns; fails if it takes longer."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "it hangs, or raised"
    return results[0]


@pytest.fixture(scope="module")
def lm(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_odd_entry_stops_nothing_and_is_named(
    tmp_path: Path,
    lm: CausalLM,
    kind: Callable[[Path], None],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "states"
    engine = PromptCacheEngine(lm, DiskStore(folder))
    engine.encode([BEES], progress=False)
    odd = folder / name
    odd.parent.mkdir(exist_ok=True)
    kind(odd)
    listed = within(10, lambda: list(stored_states(folder)))
    assert [state.path for state in listed if state.record is None] == [
        odd / "kept" if name == "cd" and kind is full_folder else odd  # a folder like our own
    ]
    assert all(state.trouble for state in listed if state.record is None)
    assert sum(state.record is not None for state in listed) == 1
    assert within(10, lambda: engine.forget([BEES])).states == 1
    again = within(10, lambda: DiskStore(folder))
    assert again.stats().failures == 0
    key, state = make(1, 2)
    assert within(10, lambda: again.put(key, state))
    assert within(10, lambda: len(clear_states(folder, Selection()))) in (1, 2)
    assert not again.contains(key)
    assert within(10, lambda: again.stats().states) == 0
    is_damaged_state = "abab" in name and kind in (empty, garbage, of_the_future)
    assert os.path.lexists(odd) != is_damaged_state


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_a_states_place_is_a_miss_and_goes(
    tmp_path: Path, kind: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key, state = make(1, 2)
    store = DiskStore(tmp_path / "states")
    place = tmp_path / "states" / key.digest[:2] / f"{key.digest}.safetensors"
    place.parent.mkdir()
    kind(place)
    assert within(10, lambda: store.get(key)) is None
    if kind is full_folder:
        assert not within(10, lambda: store.put(key, state)), "somebody's files are not ours"
        return
    assert within(10, lambda: store.put(key, state))
    assert holds(store, key, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_kept_beside_an_odd_entry(
    tmp_path: Path, kind: Callable[[Path], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    probe = DiskStore(tmp_path / "probe")
    probe.put(*make(100, 100))
    one = probe.stats().nbytes or 0
    folder = tmp_path / "states"
    store = DiskStore(folder, budget_bytes=4 * one + one // 2)
    odd = folder / name
    odd.parent.mkdir(exist_ok=True)
    kind(odd)
    pairs = [make(n, n) for n in range(100, 112)]
    assert all(within(10, lambda p=pair: store.put(*p)) for pair in pairs)
    present = [store.contains(key) for key, _ in pairs]
    assert present[-3:] == [True] * 3
    nbytes = sum(s.nbytes for s in stored_states(folder) if s.is_state)
    assert nbytes <= 4 * one + one // 2


@pytest.mark.parametrize("what", ["file", "shard"])
def test_what_may_not_be_read_is_named_and_the_rest_goes_on(
    lm: CausalLM, nobodys_folder: Path, what: str
) -> None:
    closed, state = make(1, 2)
    with as_nobody():
        store = DiskStore(nobodys_folder, budget_bytes=10**6)
        engine = PromptCacheEngine(lm, store)
        engine.encode([BEES], progress=False)
        assert store.put(closed, state)
        path = nobodys_folder / closed.digest[:2] / f"{closed.digest}.safetensors"
        path = path if what == "file" else path.parent
        path.chmod(0)
        listed = list(stored_states(nobodys_folder))
        assert [s.trouble for s in listed if s.path == path] == [
            "it can't be read: Permission denied"
        ]
        assert engine.forget([BEES]).states == 1
        other = make(5, 6)
        assert store.put(*other)
        assert store.contains(other[0])
        assert store.get(closed) is None
        path.chmod(0o700)


def test_the_command_line_names_them_and_goes_on(tmp_path: Path) -> None:
    DiskStore(tmp_path).put(*make(1, 2))
    (tmp_path / "ab").mkdir()
    os.mkfifo(tmp_path / "ab" / "x.safetensors")
    runner = CliRunner()
    listed = runner.invoke(app, ["inspect", str(tmp_path)], env={"COLUMNS": "160"})
    assert listed.exit_code == 0
    assert "(not a state) x.safetensors: it is a pipe" in listed.output
    assert "1 states" in listed.output
    rows = runner.invoke(app, ["inspect", str(tmp_path), "--json"]).output.splitlines()
    assert [json.loads(row)["trouble"] for row in rows].count("it is a pipe") == 1
    cleared = runner.invoke(app, ["clear", str(tmp_path), "--all", "--yes"])
    assert cleared.exit_code == 0
    assert "removed 1 states" in cleared.output
    assert (tmp_path / "ab" / "x.safetensors").exists()


def test_a_state_that_claims_the_future_goes_first(tmp_path: Path) -> None:
    probe = DiskStore(tmp_path / "probe")
    probe.put(*make(1, 1))
    one = probe.stats().nbytes or 0
    store = DiskStore(tmp_path / "states", budget_bytes=3 * one)
    (future, state), *others = [make(n, n) for n in range(4)]
    store.put(future, state)
    (path,) = (tmp_path / "states").rglob("*.safetensors")
    os.utime(path, (time.time() + 3600,) * 2)
    for pair in others:
        assert store.put(*pair)
    assert [store.contains(key) for key, _ in [(future, state), *others]] == [False] + [True] * 3


def test_a_shard_that_is_a_link_or_a_file_is_written_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    store = DiskStore(tmp_path / "states", budget_bytes=10**6)
    (key, state), (other, other_state) = make(1, 2), make(3, 4)
    (tmp_path / "states" / key.digest[:2]).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "states" / other.digest[:2]).write_text("a file")
    assert not store.put(key, state)
    assert not store.put(other, other_state)
    assert store.get(key) is None
    assert store.get(other) is None
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert sorted(state.trouble for state in stored_states(tmp_path / "states")) == [
        "it has not the name of a state",
        "it is a symbolic link",
    ]
