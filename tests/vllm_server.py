"""vLLM servers of the tests' own, on loopback and free ports, from an environment of their own."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from pcache_core import Generation
from pcache_integrations.vllm.client import Address, RemoteEngine
from redis_server import Server

ROOT = Path(__file__).parent.parent
_UP_S = 600


def interpreter() -> str:
    """The Python that has vLLM: of `PCACHE_VLLM_PYTHON`, or where `.ci/install-vllm` puts it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    default = cache / "pcache-integrations" / "vllm" / "bin" / "python"
    python = os.environ.get("PCACHE_VLLM_PYTHON") or str(default)
    if not Path(python).is_file():
        pytest.skip(f"no vLLM at {python}; run .ci/install-vllm, or set PCACHE_VLLM_PYTHON")
    return python


class VllmServer:
    """A server that `pcache serve` gives the command for; runs from `start` to `stop`.

    name: that clients know the model by. options: of vLLM's own. preamble: a file, for one that is
    not the model's own.
    """

    def __init__(
        self, folder: Path, model: str, store: str, *options: str, preamble: Path | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.name = model
        self.log = folder / f"vllm-{self.port}.log"
        self._store = store
        self._options = options
        self._preamble = () if preamble is None else ("--preamble", str(preamble))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        command = self._command()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self._environment(),
                cwd=self.log.parent,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + _UP_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", timeout=1).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End it and the engine that it started, which outlives one that is still starting."""
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def metric(self, name: str) -> float:
        """A sum of the server's own metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def _command(self) -> list[str]:
        printed = subprocess.run(
            [
                *(sys.executable, "-c", "from pcache_integrations.cli import main; main()"),
                *("serve", "--model", self.name, "--store", self._store),
                *("--port", str(self.port), "--python", interpreter(), *self._preamble, "--"),
                *("--enforce-eager", "--max-num-seqs", "8", *self._options),
            ],
            env=self._environment(),
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        return shlex.split(printed)

    @staticmethod
    def _environment() -> dict[str, str]:
        packages = (ROOT, ROOT / "core", ROOT / "templates")
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, packages)),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }


@dataclass(frozen=True)
class Cluster:
    """first, second: replicas of the tiny model; the second has blocks for 1,536 tokens only.

    random: serves a random model in bfloat16, with grouped heads and normed keys, over a folder,
    and with a preamble of its own.
    """

    redis: Server
    first: VllmServer
    second: VllmServer
    random: VllmServer
    random_store: Path
    random_preamble: Path


def client(server: VllmServer, **options: Any) -> RemoteEngine:
    return RemoteEngine(Address(server.url), server.name, **{"reuse": "fast", **options})


def post(server: VllmServer, ids: Sequence[int], **fields: Any) -> dict[str, Any]:
    body = {"model": server.name, "prompt": list(ids), "max_tokens": 4, "temperature": 0, **fields}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def first_distance(a: Generation, b: Generation) -> float:
    """How far the first token's log probabilities are apart, over those that both report."""
    ours = {record.token_id: record.logprob for record in a.logprobs[0].top}
    theirs = {record.token_id: record.logprob for record in b.logprobs[0].top}
    common = ours.keys() & theirs.keys()
    assert len(common) >= 3
    return max(abs(ours[token] - theirs[token]) for token in common)
