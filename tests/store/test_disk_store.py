"""The disk store: what is damaged is dropped, what can't be read or written is done without."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pcache_core import BudgetError, DiskStore, OptionError, StoreError
from pcache_core.kv.key import ModuleKey
from stored_states import as_nobody, holds, make, same


def files(folder: Path, pattern: str = "*.safetensors") -> list[Path]:
    return sorted(folder.rglob(pattern))


def only_file(folder: Path) -> Path:
    (path,) = files(folder)
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_bytes_are_the_files(tmp_path: Path) -> None:
    store = DiskStore(str(tmp_path))
    store.put(*make(1, 2, 3))
    assert (store.stats().states, store.stats().nbytes) == (1, only_file(tmp_path).stat().st_size)


def test_a_loaded_state_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    key, state = make(1, 2)
    store.put(key, state)
    hit = store.get(key)
    assert hit is not None
    hit.state.keys[0].zero_()
    assert holds(store, key, state)


def test_nobody_else_may_read_what_is_stored(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        DiskStore(tmp_path / "store").put(*make(1, 2))
    finally:
        os.umask(mask)
    path = only_file(tmp_path)
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "store", path.parent, path)]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, "1GB"])
def test_a_bad_budget_is_refused(tmp_path: Path, budget: Any) -> None:
    with pytest.raises(BudgetError, match="budget_bytes"):
        DiskStore(tmp_path, budget_bytes=budget)


@pytest.mark.parametrize(
    "arguments", [{"path": 3}, {"path": ""}, {"path": "x", "storage_dtype": "int4"}]
)
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        DiskStore(**arguments)


def test_a_path_that_is_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="no folder for states"):
            DiskStore(path)


def test_a_digest_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    _, state = make(1)
    for digest in ("../../etc/passwd", "/etc/passwd", "", "a\0b"):
        with pytest.raises(StoreError, match="name a file"):
            DiskStore(tmp_path).put(ModuleKey(digest, (1,)), state)


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_is_no_regular_file_is_dropped(tmp_path: Path, kind: str) -> None:
    store = DiskStore(tmp_path / "store")
    key, state = make(1, 2)
    store.put(key, state)
    path = only_file(tmp_path)
    if kind == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        os.mkfifo(path)
    assert store.get(key) is None
    assert not os.path.lexists(path)


# --- outages ------------------------------------------------------------------------------------


def test_a_file_that_may_not_be_read_is_a_miss_with_one_warning(
    nobodys_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, state = make(1, 2)
    with as_nobody():
        store = DiskStore(nobodys_folder)
        store.put(key, state)
        only_file(nobodys_folder).chmod(0o000)
        assert [store.get(key) for _ in range(3)] == [None] * 3
    assert len(warnings(caplog)) == 1
    assert "reading states" in warnings(caplog)[0]


def test_a_folder_that_can_not_be_made_is_an_error_of_ours(nobodys_folder: Path) -> None:
    with as_nobody():
        nobodys_folder.chmod(0o500)
        with pytest.raises(StoreError, match="Permission denied"):
            DiskStore(nobodys_folder / "store")


def test_a_folder_that_comes_and_goes_under_several_threads_fails_no_call(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store", budget_bytes=20_000)
    pairs = [make(n, n + 1) for n in range(8)]
    until = time.monotonic() + 1.5

    def work(index: int) -> None:
        while time.monotonic() < until:
            for key, state in pairs[index:] + pairs[:index]:
                store.put(key, state)
                hit = store.get(key)
                assert hit is None or same(hit.state, state)
                store.stats()

    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(work, index) for index in range(4)]
        while time.monotonic() < until:
            shutil.rmtree(tmp_path / "store", ignore_errors=True)
            time.sleep(0.05)
        for job in jobs:
            job.result()


# --- budget -------------------------------------------------------------------------------------


def file_bytes(tmp_path: Path, *token_ids: int) -> int:
    probe = DiskStore(tmp_path / "probe")
    probe.put(*make(*token_ids))
    nbytes = probe.stats().nbytes
    assert nbytes is not None
    return nbytes


def test_the_least_recently_used_file_goes_first(tmp_path: Path) -> None:
    one = file_bytes(tmp_path, 1, 1)
    store = DiskStore(tmp_path / "store", budget_bytes=2 * one)
    (a, state_a), (b, state_b), (c, state_c) = make(1, 1), make(2, 2), make(3, 3)
    store.put(a, state_a)
    store.put(b, state_b)
    assert store.get(a) is not None
    assert store.put(c, state_c)
    assert [store.contains(key) for key in (a, b, c)] == [True, False, True]
    stats = store.stats()
    assert (stats.states, stats.nbytes, stats.evictions) == (2, 2 * one, 1)


def test_a_state_larger_than_the_budget_evicts_nothing_and_is_not_kept(tmp_path: Path) -> None:
    one = file_bytes(tmp_path, 1, 1)
    store = DiskStore(tmp_path / "store", budget_bytes=one)
    small, state = make(1, 1)
    assert store.put(small, state)
    assert not store.put(*make(4, 5, copies=40))
    assert store.contains(small)


def test_stores_of_one_folder_keep_one_budget_together(tmp_path: Path) -> None:
    one = file_bytes(tmp_path, 10, 10)
    stores = [DiskStore(tmp_path / "store", budget_bytes=5 * one) for _ in range(3)]
    for number in range(10, 40):
        assert stores[number % 3].put(*make(number, number))
        nbytes = stores[(number + 1) % 3].stats().nbytes
        assert nbytes is not None
        assert nbytes <= 5 * one
    last = [make(number, number)[0] for number in range(35, 40)]
    assert all(stores[0].contains(key) for key in last)
    assert sum(store.stats().evictions for store in stores) == 25


def test_a_state_written_again_counts_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for _ in range(4):
        assert store.put(*make(1, 2))
    assert (store.stats().states, store.stats().evictions) == (1, 0)


def test_leftovers_of_killed_writers_are_swept_and_those_of_live_ones_are_not(
    tmp_path: Path,
) -> None:
    store = DiskStore(tmp_path)
    key, state = make(1, 2)
    store.put(key, state)
    shard = only_file(tmp_path).parent
    old, young = shard / "x.1.aa.tmp", shard / "x.2.bb.tmp"
    old.write_bytes(b"left")
    young.write_bytes(b"being written")
    os.utime(old, (time.time() - 3600,) * 2)
    assert store.stats().states == 1
    assert files(tmp_path, "*.tmp") == [young]
    os.utime(young, (time.time() - 3600,) * 2)
    store.stats()
    assert files(tmp_path, "*.tmp") == []


# --- storage dtype ------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "share"), [("int8", 0.25), ("bfloat16", 0.5), ("float32", 1)])
def test_states_are_kept_as_asked_and_come_back_in_the_models_dtype(
    tmp_path: Path, storage: Any, share: float
) -> None:
    key, state = make(3, 4, 5, 6, copies=250)
    store = DiskStore(tmp_path, storage_dtype=storage)
    assert store.put(key, state)
    nbytes = store.stats().nbytes
    assert nbytes is not None
    assert nbytes == pytest.approx(share * state.nbytes, rel=0.1, abs=20_000)
    hit = store.get(key)
    assert hit is not None
    hit.state.check(state.stacks, torch.float32)
    bound = {"int8": 0.5 / 127 + 1e-6, "bfloat16": 2**-8, "float32": 0}[storage]
    for got, exact in zip(
        (*hit.state.keys, *hit.state.values), (*state.keys, *state.values), strict=True
    ):
        largest = exact.abs().amax(dim=2, keepdim=True)  # [layers, heads, 1, dim]
        assert ((got - exact).abs() <= bound * largest).all()


def test_a_store_does_not_serve_what_another_kept_with_fewer_bits(tmp_path: Path) -> None:
    key, state = make(1, 2)
    DiskStore(tmp_path, storage_dtype="int8").put(key, state)
    exact = DiskStore(tmp_path)
    assert exact.get(key) is None
    assert exact.put(key, state)
    assert holds(exact, key, state)


def test_channels_of_zeros_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, storage_dtype="int8")
    key, state = make(1, 2)
    state.keys[0][:, :, :, 3] = 0
    assert store.put(key, state)
    hit = store.get(key)
    assert hit is not None
    assert (hit.state.keys[0][:, :, :, 3] == 0).all()
    state.values[1][0, 0, 0, 0] = float("nan")
    assert not store.put(key, state)


def test_an_hmac_key_is_asked_for_by_a_store_that_has_one(tmp_path: Path) -> None:
    key, state = make(1, 2)
    secret = b"0123456789abcdef"
    keyed = DiskStore(tmp_path, hmac_key=secret)
    DiskStore(tmp_path).put(key, state)
    assert keyed.get(key) is None
    assert keyed.put(key, state)
    assert DiskStore(tmp_path, hmac_key=secret).get(key) is not None


def test_a_look_up_lists_no_folder(nobodys_folder: Path) -> None:
    """It can't slow down with the number of files: they are found by name alone."""
    key, state = make(1, 2)
    with as_nobody():
        store = DiskStore(nobodys_folder)
        store.put(key, state)
        for folder in (only_file(nobodys_folder).parent, nobodys_folder):
            folder.chmod(0o300)  # may be entered, not listed
        with pytest.raises(PermissionError):
            os.listdir(nobodys_folder)
        assert store.get(key) is not None
        nobodys_folder.chmod(0o700)
