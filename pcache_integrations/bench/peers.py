"""Other libraries, each in a process and, where that is asked for, an interpreter of its own.

A peer's script in `workers/` speaks JSON lines over standard input and output. One process computes
at a time; the others wait for their next line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pcache_core import OptionError, PromptCacheError
from pcache_integrations.bench.figures import PeerState, Sample

_WORKERS = Path(__file__).parent / "workers"
_LAST_WORDS = 300  # characters of what a dead worker wrote
_TEXT_TOLERANCE = 0.02  # of the token count, for peers that tokenise the text as a whole


class PeerError(PromptCacheError):
    """A peer can't be started, or failed."""


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """A library that is compared with.

    label: in tables. install: what its users install. weights: the kind of model files it reads.
    keeps_prefix: whether it keeps anything between requests. takes: token ids, or text.
    """

    name: str
    label: str
    script: str
    install: str
    weights: Literal["folder", "gguf"] = "folder"
    keeps_prefix: bool = True
    takes: Literal["ids", "text"] = "ids"


PEERS = {
    spec.name: spec
    for spec in (
        PeerSpec("transformers", "transformers generate", "transformers_worker.py", "transformers"),
        PeerSpec(
            "langchain",
            "LangChain HuggingFacePipeline",
            "langchain_worker.py",
            "langchain-huggingface",
            keeps_prefix=False,
            takes="text",
        ),
        PeerSpec(
            "llama-cpp", "llama.cpp", "llama_cpp_worker.py", "llama-cpp-python", weights="gguf"
        ),
        PeerSpec("vllm", "vLLM", "vllm_worker.py", "vllm"),
    )
}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a worker's `load` is told.

    context_tokens: longest prompt and its answer. kv_bytes: room for the keys and values of a few
    such prompts.
    """

    threads: int
    dtype: str
    device: str
    context_tokens: int
    kv_bytes: int


def chosen_peers(options: Sequence[str]) -> dict[str, str]:
    """Interpreters by peer, from `NAME` or `NAME=PYTHON`; all peers in this one if none is named.

    Raises: OptionError: no such peer, no such interpreter.
    """
    if not options:
        return dict.fromkeys(PEERS, sys.executable)
    chosen = {}
    for option in options:
        name, _, python = option.partition("=")
        if name not in PEERS:
            raise OptionError(f"no peer {name!r} in --peer; there is {', '.join(PEERS)}")
        if python and not os.access(python, os.X_OK):
            raise OptionError(
                f"--peer {option!r}: {python} is no program; give the python of the environment "
                f"that has {PEERS[name].install}"
            )
        chosen[name] = python or sys.executable
    return chosen


class Peer:
    """A worker process. problem: why it can't be asked; None as long as it can."""

    def __init__(self, spec: PeerSpec, python: str) -> None:
        self.spec = spec
        self.version = ""
        self.problem: str | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python, str(_WORKERS / spec.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # an interrupt at the terminal is for us; we end the worker
        )

    def greet(self) -> None:
        """Find out whether the library is there; gives up if not."""
        try:
            hello = self._call("hello")
            self.version = hello["version"]
            if hello["missing"]:
                raise PeerError(
                    f"not installed; pip install {self.spec.install}, or name the python of an "
                    f"environment that has it: --peer {self.spec.name}=PYTHON"
                )
        except PeerError as error:
            self.give_up(str(error))

    def load(self, weights: Path, options: LoadOptions) -> None:
        """Raises: PeerError."""
        self._call("load", model=str(weights), **asdict(options))

    def run(self, prompt_ids: Sequence[int], text: str, max_tokens: int) -> Sample:
        """Raises: PeerError: it failed, or read another number of tokens."""
        found = self._call("run", prompt_ids=list(prompt_ids), text=text, max_tokens=max_tokens)
        self._check_length(found["prompt_tokens"], len(prompt_ids))
        return Sample(
            ttft_ms=found["ttft_ms"],
            prompt_tokens=found["prompt_tokens"],
            cached_tokens=found["cached_tokens"],
            first_token=next(iter(found["tokens"]), -1),
            decode_tokens_per_s=found["decode_tokens_per_s"],
        )

    def reset(self) -> None:
        """Forget every earlier prompt. Raises: PeerError."""
        self._call("reset")

    def give_up(self, problem: str) -> None:
        """Ask no more, and say why."""
        self.problem = problem
        self.close()

    def close(self) -> None:
        """End the process and what it started."""
        if not self._log.closed:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._log):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()

    @property
    def state(self) -> PeerState:
        """For the report."""
        return PeerState(self.spec.label, self.version, self.problem)

    def _check_length(self, counted: int, wanted: int) -> None:
        tolerance = _TEXT_TOLERANCE * wanted if self.spec.takes == "text" else 0
        if abs(counted - wanted) > tolerance:
            raise PeerError(
                f"read {counted} tokens of a prompt of {wanted}, so its times don't compare"
            )

    def _call(self, op: str, **arguments: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise PeerError(f"its process ended in {op}: {self._last_words()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"answered {line[:_LAST_WORDS]!r} to {op}, not JSON") from None
        if "error" in answer:
            raise PeerError(f"{op} failed: {answer['error'][:_LAST_WORDS]}")
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip()
        return words[-_LAST_WORDS:].splitlines()[-1] if words else f"exit status {status}"
