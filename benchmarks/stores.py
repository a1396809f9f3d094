"""Loading states from disk against copying the same bytes, and look-ups among many states.

Every round measures each way once, in one process, in turn; median and best of each are shown.
Files are in the page cache. Loading is what a request does: `DiskStore.open_many`, then one pass
over the file that checks every byte and copies into a request's rows (`--moved`: and turns the
keys to another position). The yardstick is numpy copying as many bytes, from memory to memory. CPU
time is this thread's own, whatever else runs on the machine.

    python benchmarks/stores.py --tokens 1000 --states 100000
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from pcache_core import DiskStore
from pcache_core.kv.key import KeySpace, ModuleKey
from pcache_core.kv.sequence import KVBuffers
from pcache_core.kv.state import KVState, LayerShape, stack_layers
from pcache_core.lm import place
from pcache_core.lm.relocation import Rotation
from pcache_core.params import check_storage_dtype
from pcache_core.store.base import ms_since

SPACE = KeySpace("0" * 64, "torch.bfloat16", "benchmark")
STACKS = stack_layers([LayerShape(4, 64, 4, 64)] * 24)  # 24 layers, 24 KiB a token in bfloat16
FREQUENCIES = 10_000.0 ** -(torch.arange(32) / 32)
ROTATION = Rotation("keys", FREQUENCIES, "half", 0, 1)


def make(tokens: int, seed: int) -> tuple[ModuleKey, KVState]:
    generator = torch.Generator().manual_seed(seed)
    shape = (24, 4, tokens, 64)
    keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    ids = tuple(range(seed, seed + tokens))
    return SPACE.key((), ids, None), KVState(STACKS, (keys,), (values,), ids, 0)


@dataclass
class Times:
    """Milliseconds of each call: by the clock on the wall, and of this thread on a processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, call: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        call()
        self.wall.append((time.perf_counter() - wall) * 1000)
        self.cpu.append((time.thread_time() - cpu) * 1000)


def load(store: DiskStore, key: ModuleKey, buffers: KVBuffers, position: int) -> None:
    (opened,) = store.open_many([key])
    assert opened is not None
    started = time.perf_counter()
    place(buffers, 0, opened.rows, (ROTATION,) * 24, position)
    opened.settle(ms_since(started), None)


def measure_loading(folder: Path, arguments: argparse.Namespace) -> None:
    store = DiskStore(folder, storage_dtype=check_storage_dtype(arguments.storage_dtype))
    pairs = [make(arguments.tokens, seed) for seed in range(arguments.documents)]
    for key, state in pairs:
        assert store.put(key, state)
    capacity = max(arguments.capacity, arguments.tokens)
    buffers = KVBuffers(STACKS, capacity, dtype=torch.bfloat16, device=torch.device("cpu"))
    nbytes = pairs[0][1].nbytes
    source = [np.random.default_rng(s).bytes(nbytes) for s in range(arguments.documents)]
    target = np.empty(nbytes, np.uint8)
    load(store, pairs[0][0], buffers, 0)
    loaded = buffers.keys[0][:, :, : arguments.tokens]
    assert torch.equal(loaded, pairs[0][1].keys[0]) or arguments.storage_dtype != "auto"
    position = 777 if arguments.moved else 0
    loads, copies = Times(), Times()
    for number in range(arguments.rounds * arguments.documents):
        index = number % arguments.documents
        loads.measure(partial(load, store, pairs[index][0], buffers, position))
        copies.measure(partial(np.copyto, target, np.frombuffer(source[index], np.uint8)))
    for clock in ("wall", "cpu"):
        for name, pick in (("median", median), ("best", min)):
            load_ms, copy_ms = pick(getattr(loads, clock)), pick(getattr(copies, clock))
            print(
                f"{nbytes / 1e6:.1f} MB a state, {clock} time, {name}: load into buffers "
                f"{nbytes / load_ms / 1e6:.2f} GB/s, numpy copy {nbytes / copy_ms / 1e6:.2f} GB/s, "
                f"ratio {copy_ms / load_ms:.2f}"
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
    times = {name: Times() for name in ways}
    for _ in range(200):
        for name, call in ways.items():
            times[name].measure(call)
    shown = ", ".join(f"{name} {median(each.wall):.3f} ms" for name, each in times.items())
    print(f"{arguments.states:,} states in the store: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--states", type=int, default=100_000)
    parser.add_argument("--storage-dtype", default="auto")
    parser.add_argument("--capacity", type=int, default=0, help="rows of the buffers, if more")
    parser.add_argument("--moved", action="store_true", help="to another position")
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
