"""Time to first token here and in other libraries, on the same token ids.

    python benchmarks/peers.py --random llama-0.5b --cached 5000 --documents 16 --threads 2 \\
        --peer transformers --peer vllm=PYTHON --peer llama-cpp=PYTHON

`NAME=PYTHON` names the interpreter that has the library; without `--peer`, those that are installed
here are measured. All answer in turn, round by round, with as many threads; one process computes at
a time. `--plot` needs matplotlib, llama.cpp the package gguf.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from pcache_core import CausalLM, Prompt, PromptCacheEngine, PromptCacheError
from pcache_integrations.bench.measure import BenchOptions, measure
from pcache_integrations.bench.models import load_model
from pcache_integrations.bench.results import Order, Sample, Way
from pcache_integrations.bench.workload import Workload
from pcache_integrations.cli.bench import parse_modes, parse_orders, parse_sizes
from worker import LIBRARIES, LoadOptions

WORKER = Path(__file__).with_name("worker.py")
LAST_WORDS = 300  # characters of what a dead worker wrote
TEXT_TOLERANCE = 0.02  # of the token count, for libraries that tokenise the text as a whole
PROMPTS_KEPT = 4  # that a library has room for
# Threads of numerical libraries spin for a while after their work, and would take time of the
# process that comes next.
PAUSE_S = 0.3


class PeerError(PromptCacheError):
    """A peer can't be asked, or failed."""


class Peer:
    """A library in a process of its own. problem: why it can't be asked; None while it can."""

    def __init__(self, name: str, python: str = sys.executable) -> None:
        self.name = name
        self.package = LIBRARIES[name]
        self.version = ""
        self.note = ""
        self.problem: str | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python, str(WORKER), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # an interrupt at the terminal is for us; we end the worker
        )
        self.pid = self._process.pid

    def greet(self) -> None:
        """Find out whether the library is there. Raises: PeerError."""
        hello = self._call("hello")
        self.version = hello["version"]
        if hello["missing"]:
            raise PeerError(
                f"not installed; pip install {self.package.install}, or name the python of an "
                f"environment that has it: --peer {self.name}=PYTHON"
            )

    def load(self, options: LoadOptions) -> None:
        """Load the model. Raises: PeerError."""
        self._call("load", **options._asdict())

    def run(self, prompt_ids: Sequence[int], text: str, max_tokens: int) -> dict[str, Any]:
        """Answer a prompt. Raises: PeerError: it failed, or read another number of tokens."""
        found = self._call("run", prompt_ids=list(prompt_ids), text=text, max_tokens=max_tokens)
        wanted, counted = len(prompt_ids), found["prompt_tokens"]
        if abs(counted - wanted) > (0 if self.package.takes_ids else TEXT_TOLERANCE * wanted):
            raise PeerError(
                f"read {counted} tokens of a prompt of {wanted}, so its times don't compare"
            )
        return found

    def reset(self) -> None:
        """Forget every earlier prompt. Raises: PeerError."""
        self._call("reset")

    def close(self) -> None:
        """End the process and what it started; again, it does nothing: the id may be another's."""
        if self._log.closed:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what fails as the problem, and ask no more."""
        try:
            yield
        except PromptCacheError as error:
            self.problem = str(error)
            self.close()

    def _call(self, op: str, **arguments: Any) -> dict[str, Any]:
        pipe, replies = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert replies is not None
        line = b""
        with suppress(BrokenPipeError):
            pipe.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            pipe.flush()
            line = replies.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            words = self._log.read().decode(errors="replace").strip()[-LAST_WORDS:]
            last = words.splitlines()[-1] if words else f"exit status {status}"
            raise PeerError(f"its process ended in {op}: {last}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"answered {line[:LAST_WORDS]!r} to {op}, not JSON") from None
        if "error" in answer:
            raise PeerError(f"{op} failed: {answer['error'][:LAST_WORDS]}")
        return answer


@contextmanager
def started(interpreters: Mapping[str, str]) -> Iterator[list[Peer]]:
    """Start these peers; none is left when this ends, however it ends."""
    peers: list[Peer] = []
    try:
        for name, python in interpreters.items():
            peers.append(Peer(name, python))
        for peer in peers:
            with peer.noting():
                peer.greet()
        yield peers
    finally:
        for peer in peers:
            peer.close()


def load(
    peer: Peer,
    engine: PromptCacheEngine,
    options: BenchOptions,
    model: Path,
    prompts: Sequence[Prompt],
) -> None:
    """Load the model, and compare first tokens with those of `off`.

    Raises: PeerError.
    """
    lm = engine.lm
    peer.load(
        LoadOptions(
            model=str(model),
            threads=torch.get_num_threads(),
            dtype=str(lm.dtype).removeprefix("torch."),
            device=lm.device.type,
            context_tokens=options.context_tokens,
            kv_bytes=PROMPTS_KEPT * options.context_tokens * lm.bytes_per_token,
        )
    )
    alike = []
    for prompt in prompts:
        expected = int(engine.prefill(prompt, reuse="off").logits.argmax())
        found = peer.run(engine.tokenise(prompt).token_ids, prompt.text, options.answer_tokens)
        alike.append(found["tokens"][:1] == [expected])
    if peer.package.takes_ids:
        peer.note = f"the first token of off in {sum(alike)} of {len(alike)} short prompts"


def way_of(peer: Peer, engine: PromptCacheEngine, options: BenchOptions) -> Way:
    """Return how it is asked; a library that keeps nothing finds every prompt cold."""

    def ask(prompt: Prompt) -> Sample | None:
        if peer.problem is None:
            with peer.noting():
                ids = engine.tokenise(prompt).token_ids
                found = peer.run(ids, prompt.text, options.answer_tokens)
                time.sleep(PAUSE_S)
                return Sample(
                    found["ttft_ms"],
                    found["prompt_tokens"],
                    found["cached_tokens"],
                    found["decode_tokens_per_s"],
                )
        return None

    def reset() -> None:
        time.sleep(PAUSE_S)
        if peer.problem is None:
            with peer.noting():
                peer.reset()

    orders: tuple[Order, ...] = (
        ("cold", *options.orders) if peer.package.keeps_prefix else ("cold",)
    )
    return Way(peer.package.label, "peer", orders, ask, reset)


class Files:
    """The model as files, written when the first peer asks for them."""

    def __init__(self, lm: CausalLM, folder: Path, gguf_type: str, gguf_file: Path | None) -> None:
        self._lm = lm
        self._folder = folder
        self._gguf_type = gguf_type
        self._gguf_file = gguf_file

    @cached_property
    def weights(self) -> Path:
        """As `save_pretrained` writes it, tokenizer included."""
        logging.disable_progress_bar()
        self._lm.model.save_pretrained(self._folder)
        self._lm.tokenizer.save_pretrained(self._folder)
        return self._folder

    @cached_property
    def gguf(self) -> Path:
        """The user's file, or one of the same weights. Raises: PromptCacheError."""
        if self._gguf_file is not None:
            return self._gguf_file
        try:
            from gguf_file import write_gguf
        except ImportError:
            raise PeerError("no GGUF file was written; pip install gguf, or give --gguf") from None
        file = self._folder / "model.gguf"
        write_gguf(self._lm, file, self._gguf_type)
        return file


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    known = BenchOptions()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a built-in model, a directory or a hub id")
    parser.add_argument("--random", help="a random model instead, such as llama-0.5b")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cached", default="1k,2k,4k", help="tokens of all documents, by commas")
    parser.add_argument("--modes", default=",".join(known.modes))
    parser.add_argument("--order", default=",".join(known.orders))
    parser.add_argument("--tier", default=known.tier)
    for name in ("documents", "question_tokens", "answer_tokens", "rounds", "seed"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(known, name))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each")
    parser.add_argument("--peer", action="append", metavar="NAME[=PYTHON]", default=[],
                        help=f"only this library, of {', '.join(LIBRARIES)}")  # fmt: skip
    parser.add_argument("--gguf", type=Path, help="the model as a GGUF file")
    parser.add_argument("--gguf-type", default="q8_0", choices=["q8_0", "f16", "bf16", "f32"])
    parser.add_argument("--plot", type=Path, help="into this .svg or .png")
    parser.add_argument("--json", action="store_true")
    found = parser.parse_args(arguments)
    found.interpreters = dict.fromkeys(() if found.peer else LIBRARIES, sys.executable)
    for peer in found.peer:
        name, _, python = peer.partition("=")
        if name not in LIBRARIES:
            parser.error(f"no peer {name!r}; there is {', '.join(LIBRARIES)}")
        if python and not os.access(python, os.X_OK):
            parser.error(f"--peer {peer}: {python} is not a program; give an interpreter")
        found.interpreters[name] = python or sys.executable
    if found.gguf is not None and not found.gguf.is_file():
        parser.error(f"--gguf {found.gguf} is not a file")
    if found.plot is not None:
        if found.plot.suffix not in (".svg", ".png") or not found.plot.parent.is_dir():
            parser.error(f"--plot {found.plot} must be an .svg or .png in a folder that is there")
        if find_spec("matplotlib") is None:
            parser.error("--plot needs matplotlib: pip install matplotlib")
    return found


def main(arguments: Sequence[str]) -> None:
    args = parse_arguments(arguments)
    options = BenchOptions(
        sizes=parse_sizes(args.cached),
        documents=args.documents,
        question_tokens=args.question_tokens,
        answer_tokens=args.answer_tokens,
        modes=parse_modes(args.modes),
        orders=parse_orders(args.order),
        tier=args.tier,
        rounds=args.rounds,
        seed=args.seed,
    )
    torch.set_num_threads(args.threads)
    lm = load_model(
        args.model,
        args.random,
        args.dtype,
        args.device,
        context_tokens=options.context_tokens,
        seed=options.seed,
    )
    engine = PromptCacheEngine(lm)
    short = Workload(lm, options.seed, documents=2, document_tokens=48, question_tokens=8).round()
    with tempfile.TemporaryDirectory() as folder, started(args.interpreters) as peers:
        files = Files(lm, Path(folder), args.gguf_type, args.gguf)
        for peer in peers:
            if peer.problem is None:
                with peer.noting():
                    model = files.gguf if peer.package.gguf else files.weights
                    load(peer, engine, options, model, (short.first, short.same, short.new))
        running = [way_of(peer, engine, options) for peer in peers if peer.problem is None]
        result = measure(lm, options, running)
    states = [
        {"name": p.package.label, "version": p.version, "note": p.note, "problem": p.problem}
        for p in peers
    ]
    if args.json:
        print(json.dumps(asdict(result) | {"peers": states}, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(result)
        for peer in peers:
            said = peer.problem or ", ".join(filter(None, (peer.version, peer.note)))
            print(f"{peer.package.label}: {said}")
    if args.plot is not None:
        from plot import plot

        plot(result, args.plot)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PromptCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
