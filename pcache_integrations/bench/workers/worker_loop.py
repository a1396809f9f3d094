"""The loop of a worker: one JSON object a line in, one a line out.

A worker runs in the interpreter that has its peer, which need not have this project, so this file
and the workers import the standard library and the peer alone. Requests are
`{"op": "hello" | "load" | "run" | "reset", ...arguments}`; replies hold what the operation returns,
or `error`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, Protocol


class LoadOptions(NamedTuple):
    """How to load.

    model: a folder that `save_pretrained` wrote, or a GGUF file. context_tokens: the longest prompt
    and its answer. kv_bytes: room for the keys and values of a few such prompts.
    """

    model: str
    threads: int
    dtype: str
    device: str
    context_tokens: int
    kv_bytes: int


class Peer(Protocol):
    """What a worker script implements. modules: imported by it. packages: that may hold them."""

    modules: tuple[str, ...]
    packages: tuple[str, ...]

    def load(self, options: LoadOptions) -> None:
        """Bring the model into memory."""

    def run(self, prompt_ids: list[int], text: str, max_tokens: int) -> dict[str, Any]:
        """Answer a prompt greedily with exactly `max_tokens` tokens; see `reply`."""

    def reset(self) -> None:
        """Forget every earlier prompt."""


def reply(
    started: float,
    arrivals: list[float],
    tokens: list[int],
    *,
    prompt_tokens: int,
    cached_tokens: int,
) -> dict[str, Any]:
    """What `run` returns. arrivals: when each token was known, by `time.perf_counter`."""
    elapsed = arrivals[-1] - arrivals[0]
    return {
        "ttft_ms": (arrivals[0] - started) * 1000,
        "decode_tokens_per_s": (len(arrivals) - 1) / elapsed if elapsed else None,
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
    }


def common_prefix(mine: list[int], theirs: list[int]) -> int:
    """How many first tokens are the same."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))


def serve(peer: Peer) -> None:
    """Answer requests until standard input ends.

    Libraries print; what they print goes to standard error, so that replies stay alone.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(peer, request.pop("op"), request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=replies)


def _answer(peer: Peer, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if op == "hello":
        missing = [name for name in peer.modules if importlib.util.find_spec(name) is None]
        return {"missing": missing, "version": next(_versions(peer.packages), "")}
    if op == "load":
        peer.load(LoadOptions(**arguments))
        return {}
    if op == "reset":
        peer.reset()
        return {}
    return peer.run(**arguments)


def _versions(packages: tuple[str, ...]) -> Iterator[str]:
    for package in packages:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


class Arrivals:
    """Notes when each token is known."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []

    def note(self) -> None:
        """A token is known now."""
        self.times.append(time.perf_counter())
