"""Time to first token of a vLLM server, documents in a new order: stock, and with module states.

A random Llama of about half a billion parameters is served twice, one server after the other: by
`pcache serve`, and by the same command without the connector. Both get the same prompts, ten
documents in an order that nobody saw and a question, over HTTP. Run it on an idle machine: vLLM's
CPU build binds its threads to cores.

    python benchmarks/vllm_ttft.py --python ~/.cache/pcache-integrations/vllm/bin/python
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import torch

from pcache_core import Prompt, Report, SamplingParams, Segment
from pcache_integrations.bench.models import random_llama
from pcache_integrations.bench.workload import OPENING, Words
from pcache_integrations.vllm.client import RemoteEngine
from pcache_integrations.vllm.client_http import Address

ROOT = Path(__file__).parent.parent
_ONE_TOKEN = SamplingParams(max_tokens=1)
_UP_S = 600
_CONTEXT_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="an interpreter that has vLLM")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--document-tokens", type=int, default=300)
    parser.add_argument("--question-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtype = getattr(torch, args.dtype)
        lm = random_llama("llama-0.5b", dtype, context_tokens=_CONTEXT_TOKENS, seed=0)
        lm.model.save_pretrained(folder / "model")
        lm.tokenizer.save_pretrained(folder / "model")
        print(
            f"{lm.num_parameters / 1e9:.2f}B parameters, {args.dtype}, "
            f"{os.cpu_count()} cores, {platform.machine()} "
            f"{torch.backends.cpu.get_cpu_capability()}"
        )
        rng = random.Random(0)
        words = Words(lm, rng)
        del lm
        documents = [words.text(args.document_tokens) for _ in range(args.documents)]
        orders = [rng.sample(documents, len(documents)) for _ in range(args.rounds + 1)]
        questions = [words.text(args.question_tokens) for _ in orders]
        prompts = [_prompt(order, text) for order, text in zip(orders, questions, strict=True)]
        command = _command(args.python, folder)
        with _server(command, folder) as engine:
            print(engine.encode(documents, progress=False))
            engine.generate(prompts[0], _ONE_TOKEN)  # warms up; has the opening encoded
            engine.flush()
            states = [engine.generate(prompt, _ONE_TOKEN).report for prompt in prompts[1:]]
        with _server(_without_connector(command), folder) as engine:
            engine.generate(prompts[0], _ONE_TOKEN)
            stock = [engine.generate(prompt, _ONE_TOKEN).report for prompt in prompts[1:]]
    _show(stock, states)


def _show(stock: list[Report], states: list[Report]) -> None:
    for report in states:
        documents = sum(s.num_tokens for s in report.segments if s.kind == "document")
        assert report.cached_tokens >= 0.9 * documents, report
    print(f"\n{'':14}{'prompt':>8}{'cached':>8}{'TTFT p50':>12}  each, ms")
    for name, reports in (("stock vLLM", stock), ("module states", states)):
        times = [report.ttft_ms for report in reports]
        cached = median(report.cached_tokens for report in reports)
        each = " ".join(f"{ms:.0f}" for ms in times)
        print(f"{name:14}{reports[0].prompt_tokens:8}{cached:8.0f}{median(times):9.0f} ms  {each}")
    ratio = median(r.ttft_ms for r in stock) / median(r.ttft_ms for r in states)
    print(f"{ratio:.1f} times shorter")


def _prompt(documents: list[str], question: str) -> Prompt:
    segments = [Segment(OPENING, "literal")]
    for document in documents:
        segments += [Segment(document, "document"), Segment("\n\n", "literal")]
    segments[-1] = Segment(f"\n\nQuestion:{question}\nAnswer:", "argument")
    return Prompt(segments)


def _command(python: str, folder: Path) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [sys.executable, "-c", "from pcache_integrations.cli import main; main()", "serve"]
    serve += ["--model", str(folder / "model"), "--store", str(folder / "states")]
    serve += ["--port", str(port), "--python", python, "--", "--enforce-eager"]
    printed = subprocess.run(serve, check=True, capture_output=True, text=True).stdout
    return shlex.split(printed)


def _without_connector(command: list[str]) -> list[str]:
    at = command.index("--kv-transfer-config")
    return [*command[:at], *command[at + 2 :]]


@contextmanager
def _server(command: list[str], folder: Path) -> Iterator[RemoteEngine]:
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    packages = os.pathsep.join(map(str, (ROOT, ROOT / "core", ROOT / "templates")))
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "PYTHONPATH": packages,
    }
    with (folder / "vllm.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + _UP_S
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((folder / "vllm.log").read_text()[-3000:])
            time.sleep(0.5)
        yield RemoteEngine(Address(url), str(folder / "model"), reuse="fast")
    finally:
        process.terminate()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    main()
