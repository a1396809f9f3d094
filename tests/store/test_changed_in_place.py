"""A file that is rewritten or cut while it is read: what is served is what was checked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pcache_core import CausalLM, DiskStore, Prompt, PromptCacheEngine, Segment, StateMismatchError
from pcache_core.kv.state import KVState
from pcache_core.store import Opened
from stored_states import make, same

KEYS = [None, b"0123456789abcdef"]


def stored(folder: Path, hmac_key: bytes | None) -> tuple[DiskStore, Path, KVState]:
    store = DiskStore(folder, hmac_key=hmac_key)
    key, state = make(1, 2, copies=20_000)
    assert store.put(key, state)
    (path,) = folder.rglob("*.safetensors")
    return store, path, state


def opened(store: DiskStore) -> Opened:
    (found,) = store.open_many([make(1, 2, copies=20_000)[0]])
    assert found is not None
    return found


def overwrite(path: Path, *, start: int = 200_000) -> None:
    """Other numbers from `start` on, in the same file."""
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(path.stat().st_size - start))


@pytest.mark.parametrize("hmac_key", KEYS)
@pytest.mark.parametrize("left", [0, 5, 1000, 300_000])
def test_a_file_cut_after_it_was_opened_is_a_miss(
    tmp_path: Path, hmac_key: bytes | None, left: int
) -> None:
    store, path, _ = stored(tmp_path, hmac_key)
    found = opened(store)
    os.truncate(path, left)
    with pytest.raises(StateMismatchError):
        found.rows.whole()
    with pytest.raises(StateMismatchError):
        for _ in found.rows.blocks():
            pass


@pytest.mark.parametrize("hmac_key", KEYS)
def test_a_state_that_was_served_does_not_change_with_its_file(
    tmp_path: Path, hmac_key: bytes | None
) -> None:
    store, path, state = stored(tmp_path, hmac_key)
    hit = store.get(make(1, 2, copies=20_000)[0])
    overwrite(path)
    os.truncate(path, 10)
    assert hit is not None
    assert same(hit.state, state)


@pytest.mark.parametrize("hmac_key", KEYS)
@pytest.mark.parametrize("harm", [overwrite, lambda path: os.truncate(path, 250_000)])
def test_numbers_that_change_while_they_are_read_are_never_taken_for_whole(
    tmp_path: Path, hmac_key: bytes | None, harm: Callable[[Path], None]
) -> None:
    store, path, _ = stored(tmp_path, hmac_key)
    blocks = opened(store).rows.blocks()
    next(blocks)
    harm(path)
    with pytest.raises(StateMismatchError):
        for _ in blocks:
            pass


def test_a_block_that_was_handed_out_does_not_change_with_the_file(tmp_path: Path) -> None:
    store, path, state = stored(tmp_path, None)
    block = next(opened(store).rows.blocks())
    overwrite(path, start=0)
    assert torch.equal(block.rows, state.keys[block.stack][block.layers])


def test_a_file_that_another_process_wrote_again_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, state = stored(tmp_path, None)
    found = opened(store)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 2e9)  # so that its header differs
        DiskStore(tmp_path).put(*make(1, 2, copies=20_000))
    assert same(found.rows.whole(), state)


def test_a_file_that_was_evicted_meanwhile_is_a_miss_and_no_damage(tmp_path: Path) -> None:
    store, path, _ = stored(tmp_path, None)
    found = opened(store)
    path.unlink()
    with pytest.raises(StateMismatchError) as raised:
        found.rows.whole()
    found.settle(0.0, raised.value)
    stats = store.stats()
    assert (stats.misses, stats.damaged, stats.failures) == (1, 0, 0)


@pytest.mark.parametrize("hmac_key", KEYS)
def test_a_request_is_answered_right_whenever_its_file_changes(
    tmp_path: Path, tiny_lm: Callable[..., CausalLM], hmac_key: bytes | None
) -> None:
    lm = tiny_lm()
    text = "The river runs past the mill, and on to the sea. " * 3
    prompt = Prompt([Segment("Notes:\n", "literal"), Segment(text, "document"), Segment("\nQ?")])
    right = PromptCacheEngine(lm, reuse="fast").prefill(prompt).logits
    for harm in (lambda p: os.truncate(p, 4096), lambda p: overwrite(p, start=3000)):
        PromptCacheEngine(lm, DiskStore(tmp_path, hmac_key=hmac_key)).encode([text], progress=False)
        (path,) = tmp_path.rglob("*.safetensors")
        harm(path)
        store = DiskStore(tmp_path, hmac_key=hmac_key)
        prefill = PromptCacheEngine(lm, store, "fast").prefill(prompt)
        torch.testing.assert_close(prefill.logits, right, rtol=0, atol=1e-4)
        assert store.stats().damaged == 1
