"""Measuring a use case: time to first token without reuse and with it, in one process.

Modes take turns, each prompt differs from the one before, the first round warms up and does not
count. Every mode runs through the same attention function.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from pcache_core import CausalLM, PromptCacheEngine, ReuseMode, SamplingParams
from pcache_core.lm.loading import resolve
from pcache_core.pml import Positions

MODES: tuple[ReuseMode, ...] = ("off", "fast", "balanced")


@dataclass(frozen=True)
class UseCase:
    """schema: its PML. prompts: PML of prompts that differ. src_root: for `src=`.

    paper_ms: of the paper, without and with its cache, on a GPU (RTX 4090) and on a CPU.
    """

    title: str
    schema: str
    prompts: Sequence[str]
    paper_gpu_ms: tuple[float, float]
    paper_cpu_ms: tuple[float, float]
    src_root: Path | None = None


def random_llama(dtype: torch.dtype) -> CausalLM:
    """Half a billion random parameters: speed does not depend on what weights say."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=5120,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(resolve("builtin:tiny-rag")))
    return CausalLM(model, tokenizer, name="random Llama")


def median_ttft_ms(
    lm: CausalLM, case: UseCase, *, rounds: int, positions: Positions
) -> dict[ReuseMode, float]:
    """Median time to first token of each mode, states encoded ahead of time."""
    engine = PromptCacheEngine(lm)
    name = engine.add_schema(case.schema, src_root=case.src_root)
    print(engine.encode_schema(name))
    prompts = [engine.prompt_from_pml(pml, positions=positions) for pml in case.prompts]
    times: dict[ReuseMode, list[float]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        for turn, mode in enumerate(MODES[number % 3 :] + MODES[: number % 3]):
            # Far enough apart that no mode continues what another left behind.
            prompt = prompts[(number + turn * len(prompts) // 3) % len(prompts)]
            report = engine.generate(prompt, SamplingParams(max_tokens=1), reuse=mode).report
            if number:
                times[mode].append(report.ttft_ms)
                print(
                    f"{mode:8} {report.prompt_tokens} tokens, {report.cached_tokens} reused, "
                    f"{report.repaired_tokens} repaired: {report.ttft_ms:8.1f} ms"
                )
    if report.fallback_reason:
        print(f"fallback: {report.fallback_reason}")
    return {mode: median(values) for mode, values in times.items()}


def table(case: UseCase, measured: dict[ReuseMode, float]) -> str:
    """The paper's figures beside ours, milliseconds to the first token."""
    off = measured["off"]
    rows = [
        ("paper, RTX 4090", *case.paper_gpu_ms),
        ("paper, CPU", *case.paper_cpu_ms),
        *((f"here, {mode}", off, measured[mode]) for mode in MODES[1:]),
    ]
    lines = [f"{case.title}: time to first token", f"{'':18} without   cached"]
    lines += [
        f"{name:18} {without:7.0f}  {cached:7.0f} ms  {without / cached:5.1f}x"
        for name, without, cached in rows
    ]
    return "\n".join(lines)


def main(case: UseCase, arguments: Sequence[str] | None = None) -> None:
    """Measure a use case as the command line says, and print it beside the paper's figures."""
    parser = argparse.ArgumentParser(description=case.title)
    parser.add_argument("--model", default="random", help="random, builtin:…, a folder or a hub id")
    parser.add_argument("--positions", default="schema", choices=["schema", "compact"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    is_random = args.model == "random"
    dtype = getattr(torch, args.dtype)
    lm = random_llama(dtype) if is_random else CausalLM.from_pretrained(args.model, args.dtype)
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    where = platform.machine() if lm.device.type == "cpu" else torch.cuda.get_device_name(lm.device)
    print(
        f"{lm.name}, {parameters / 1e6:.1f}M parameters, {args.dtype}, {where}, {args.threads} "
        f"threads, torch {torch.__version__}"
    )
    measured = median_ttft_ms(lm, case, rounds=args.rounds, positions=args.positions)
    print(table(case, measured))
