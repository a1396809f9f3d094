"""Time to first token with documents in a new order, reuse off and on, in one process.

A random Llama of about half a billion parameters reads ten documents and a question; speed does not
depend on what weights say. All modes run through the same attention function. The documents'
order changes for every request, so a prefix cache would find next to nothing.

    python examples/benchmarks/ttft.py --threads 2
"""

from __future__ import annotations

import argparse
import platform
import random
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from pcache_core import CausalLM, Prompt, PromptCacheEngine, SamplingParams, Segment
from pcache_core.lm.loading import resolve

OPENING = "Answer the question from the documents.\n\n"
MODES = ["off", "fast", "balanced"]


def random_llama(dtype: torch.dtype) -> LlamaForCausalLM:
    """24 layers, 0.5 billion parameters, grouped-query attention."""
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
    rotary_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(rotary_dtype)
    return model


def words(tokenizer: PreTrainedTokenizerFast, rng: random.Random, count: int) -> str:
    """`count` tokens of text: each a word of the tokenizer's vocabulary."""
    vocabulary = [word[1:] for word in tokenizer.get_vocab() if word.startswith("Ġ")]
    return "".join(f" {rng.choice(vocabulary)}" for _ in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--document-tokens", type=int, default=300)
    parser.add_argument("--question-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()

    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(resolve("builtin:tiny-rag")))
    lm = CausalLM(random_llama(getattr(torch, args.dtype)), tokenizer, name="random Llama")
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    print(
        f"{parameters / 1e9:.2f}B parameters, {args.dtype}, {args.threads} threads, "
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    rng = random.Random(0)
    documents = [words(tokenizer, rng, args.document_tokens) for _ in range(args.documents)]
    engine = PromptCacheEngine(lm)
    print(engine.encode(documents, anchor=OPENING))

    def prompt() -> Prompt:
        shuffled = rng.sample(documents, len(documents))
        question = words(tokenizer, rng, args.question_tokens)
        return Prompt(
            [
                Segment(OPENING, "literal"),
                *(Segment(text, "document") for text in shuffled),
                Segment(f"\n\nQuestion:{question}\nAnswer:", "argument"),
            ]
        )

    ttft_ms: dict[str, list[float]] = {mode: [] for mode in MODES}
    for round_number in range(args.rounds + 1):  # the first round warms up and does not count
        turn = round_number % len(MODES)
        for mode in MODES[turn:] + MODES[:turn]:
            report = engine.generate(prompt(), SamplingParams(max_tokens=1), reuse=mode).report
            if round_number:
                ttft_ms[mode].append(report.ttft_ms)
                print(
                    f"{mode:8} {report.prompt_tokens} tokens, {report.cached_tokens} reused, "
                    f"{report.repaired_tokens} repaired: {report.ttft_ms:8.1f} ms (load "
                    f"{report.load_ms:.1f}, assemble {report.assemble_ms:.1f}, prefill "
                    f"{report.prefill_ms:.1f}, repair {report.repair_ms:.1f})"
                )
    off = median(ttft_ms["off"])
    medians = [
        f"{mode} {median(ms):.0f} ms ({off / median(ms):.1f}x)" for mode, ms in ttft_ms.items()
    ]
    print(f"median time to first token: {', '.join(medians)}")


if __name__ == "__main__":
    main()
