"""Loading states from disk against copying the same bytes, and look-ups among many states.

Every round measures each way once, in one process, in turn; median and best of each are shown.
Files are in the page cache. Loading is `DiskStore.get` (every byte checked) and copying into a
slot's rows; the yardstick is numpy copying as many bytes, from memory to memory.

    python examples/benchmarks/stores.py --tokens 1000 --states 100000
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from pcache_core import DiskStore
from pcache_core.key import KeySpace, ModuleKey
from pcache_core.kv import KVState, LayerShape, Slot, stack_layers
from pcache_core.store.packing import check_storage_dtype

SPACE = KeySpace("0" * 64, "torch.bfloat16", "benchmark")
STACKS = stack_layers([LayerShape(4, 64, 4, 64)] * 24)  # 24 layers, 24 KiB a token in bfloat16


def make(tokens: int, seed: int) -> tuple[ModuleKey, KVState]:
    generator = torch.Generator().manual_seed(seed)
    shape = (24, 4, tokens, 64)
    keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    ids = tuple(range(seed, seed + tokens))
    return SPACE.key((), ids, None), KVState(STACKS, (keys,), (values,), ids, 0)


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def load(store: DiskStore, key: ModuleKey, slot: Slot) -> None:
    hit = store.get(key)
    assert hit is not None
    for mine, theirs in zip(
        (*slot.keys, *slot.values), (*hit.state.keys, *hit.state.values), strict=True
    ):
        mine[:, :, : hit.state.num_tokens].copy_(theirs)


def measure_loading(folder: Path, arguments: argparse.Namespace) -> None:
    store = DiskStore(folder, storage_dtype=check_storage_dtype(arguments.storage_dtype))
    pairs = [make(arguments.tokens, seed) for seed in range(arguments.documents)]
    for key, state in pairs:
        assert store.put(key, state)
    slot = Slot(STACKS, arguments.tokens, dtype=torch.bfloat16, device=torch.device("cpu"))
    nbytes = pairs[0][1].nbytes
    source = [np.random.default_rng(s).bytes(nbytes) for s in range(arguments.documents)]
    target = np.empty(nbytes, np.uint8)
    load(store, pairs[0][0], slot)
    assert torch.equal(slot.keys[0], pairs[0][1].keys[0]) or arguments.storage_dtype != "auto"
    loads, copies = [], []
    for number in range(arguments.rounds * arguments.documents):
        index = number % arguments.documents
        loads.append(milliseconds(lambda i=index: load(store, pairs[i][0], slot)))
        copies.append(
            milliseconds(lambda i=index: np.copyto(target, np.frombuffer(source[i], np.uint8)))
        )
    for name, pick in (("median", median), ("best", min)):
        load_ms, copy_ms = pick(loads), pick(copies)
        print(
            f"{nbytes / 1e6:.1f} MB a state, {name}: load into a slot {nbytes / load_ms / 1e6:.2f} "
            f"GB/s, numpy copy {nbytes / copy_ms / 1e6:.2f} GB/s, ratio {copy_ms / load_ms:.2f}"
        )


def measure_look_up(folder: Path, arguments: argparse.Namespace) -> None:
    """The files' contents do not matter but for the one that is looked up."""
    store = DiskStore(folder)
    key, state = make(16, 10**6)
    store.put(key, state)
    for number in range(arguments.states):
        digest = SPACE.key((), (number,), None).digest
        shard = folder / digest[:2]
        shard.mkdir(exist_ok=True)
        os.close(os.open(shard / f"{digest}.safetensors", os.O_CREAT))
    absent = SPACE.key((), (10**9,), None)
    ways: dict[str, Callable[[], object]] = {
        "hit": lambda: store.get(key),
        "miss": lambda: store.get(absent),
        "contains": lambda: store.contains(key),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(200):
        for name, call in ways.items():
            times[name].append(milliseconds(call))
    shown = ", ".join(f"{name} {median(each):.3f} ms" for name, each in times.items())
    print(f"{arguments.states:,} states in the store: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--states", type=int, default=100_000)
    parser.add_argument("--storage-dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{platform.machine()}, torch {torch.__version__}, {arguments.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        measure_loading(Path(folder), arguments)
    with tempfile.TemporaryDirectory() as folder:
        measure_look_up(Path(folder), arguments)


if __name__ == "__main__":
    main()
