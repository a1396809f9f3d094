"""Check reuse on a CUDA device and time it, on a Llama with random weights.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --layers 2 --hidden 64 --documents 4 --tokens 20

Two checks in float32, then times to the first token in `--dtype`. Runs from a checkout that is not
installed, with torch, transformers and two small packages. Downloads nothing.
Exit status: 0: the checks passed. 1: one did not. 2: they could not run; one line says why.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))

try:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from pcache_core import CausalLM, Prompt, PromptCacheEngine, Segment
except ImportError as error:
    print(f"{error}; pip install torch transformers lxml rich xxhash", file=sys.stderr)
    raise SystemExit(2) from None

VOCAB_SIZE = 8192
TOLERANCE = 1e-4  # of the largest logit, in float32
QUESTION_TOKENS = 32


def main() -> int:
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is there; --device cpu runs it here, in small", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    model, tokenizer = random_llama(args).to(args.device), word_tokenizer()
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    size = model.num_parameters() / 1e6
    print(f"{name}, torch {torch.__version__}, {size:.1f}M weights, {args.documents} documents")
    documents = [words(seed, args.tokens) for seed in range(args.documents)]
    passed = check(CausalLM(model, tokenizer), documents)
    model = model.to(getattr(torch, args.dtype))
    times(CausalLM(model, tokenizer), documents, args)
    return 0 if passed else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=896, help="a multiple of 64")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=300, help="of each document")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def random_llama(args: argparse.Namespace) -> LlamaForCausalLM:
    """A model whose attention is peaky, so that a wrong mask or position shows in its logits."""
    heads = max(args.hidden // 64, 2)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 4,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else heads,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.0 if "embed" in name else 1.6 * weight.shape[1] ** -0.5)
    model.eval().requires_grad_(False)
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, without BOS."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def words(seed: int, count: int) -> str:
    chance = random.Random(seed)
    return "".join(f"w{chance.randrange(2, VOCAB_SIZE)} " for _ in range(count))


def prompt_of(documents: Sequence[str], seed: int) -> Prompt:
    """Documents, then a question that no other seed asks."""
    question = words(1_000_000 + seed, QUESTION_TOKENS)
    return Prompt([*(Segment(text, "document") for text in documents), Segment(question, "text")])


def check(lm: CausalLM, documents: Sequence[str]) -> bool:
    """`off` against plain transformers, and `fast` against the masked forward."""
    prompt = prompt_of(documents, 0)
    engine = PromptCacheEngine(lm)
    read = {mode: engine.prefill(prompt, reuse=mode) for mode in ("off", "fast")}
    found = {mode: each.logits for mode, each in read.items()}
    before = [
        engine.preamble_for(segment.text)[: segment.preamble_tokens]
        for segment in read["fast"].report.segments
    ]
    expected = {"off": plain_logits(lm, prompt), "fast": masked_logits(lm, prompt, before)}
    passed = True
    for mode, logits in found.items():
        error = float((logits - expected[mode]).abs().max() / expected[mode].abs().max())
        is_right = error <= TOLERANCE
        passed &= is_right
        print(f"{mode:>6}: relative error {error:.1e}: {'right' if is_right else 'WRONG'}")
    apart = float((expected["fast"] - expected["off"]).abs().max() / expected["off"].abs().max())
    print(f"        the two expected results differ by {apart:.1e}")
    return passed


@torch.no_grad()
def plain_logits(lm: CausalLM, prompt: Prompt) -> torch.Tensor:
    """Logits of the token after the prompt by transformers alone, [vocab] fp32."""
    ids = torch.tensor([lm.token_ids(prompt.text)], device=lm.device)
    logits: torch.Tensor = lm.model(input_ids=ids, logits_to_keep=1).logits[0, -1]
    return logits.float()


@torch.no_grad()
def masked_logits(
    lm: CausalLM, prompt: Prompt, encoded_after: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The same by one forward without a cache, in which every document sees itself alone.

    And what it was encoded after, which stands directly before it as rows that nothing else sees.
    encoded_after: these ids, of each segment.
    """
    ids: list[int] = []
    positions: list[int] = []
    groups: list[int] = []  # 0: seen by all that follow; a document: its number; copies: minus that
    place = 0
    pairs = zip(prompt.segments, encoded_after, strict=True)
    for number, (segment, before) in enumerate(pairs, start=1):
        own = lm.token_ids(segment.text)
        is_document = segment.kind == "document"
        ids += [*before, *own]
        positions += range(place - len(before), place + len(own))
        groups += [-number] * len(before) + [number if is_document else 0] * len(own)
        place += len(own)
    group = torch.tensor(groups, device=lm.device)
    is_computed = group == 0
    seen = torch.where(
        is_computed[:, None], group[None, :] >= 0, group.abs()[:, None] == group.abs()[None, :]
    )
    seen &= torch.ones_like(seen).tril()
    mask = torch.zeros(seen.shape, dtype=lm.dtype, device=lm.device)
    mask.masked_fill_(~seen, torch.finfo(lm.dtype).min)
    moved = torch.tensor([positions], device=lm.device) - min(positions)  # distances count
    logits: torch.Tensor = lm.model(
        input_ids=torch.tensor([ids], device=lm.device),
        position_ids=moved,
        attention_mask=mask[None, None],
        use_cache=False,
        logits_to_keep=1,
    ).logits[0, -1]
    return logits.float()


def times(lm: CausalLM, documents: Sequence[str], args: argparse.Namespace) -> None:
    """Print medians over rounds, each with the documents in another order and a new question."""
    engine = PromptCacheEngine(lm)
    engine.encode(documents, progress=False)
    runs: dict[str, Callable[[Prompt], torch.Tensor]] = {
        "transformers": lambda prompt: plain_logits(lm, prompt),
        "off": lambda prompt: engine.prefill(prompt, reuse="off").logits,
        "fast": lambda prompt: engine.prefill(prompt, reuse="fast").logits,
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        shuffled = random.Random(number).sample(documents, len(documents))
        prompt = prompt_of(shuffled, number)
        for name, run in runs.items():
            started = time.perf_counter()
            int(run(prompt).argmax())  # waits for the device
            if number:  # the first round warms up
                found[name].append((time.perf_counter() - started) * 1000)
    tokens = args.documents * args.tokens + QUESTION_TOKENS
    print(f"\ntime to the first token, {tokens} tokens, {args.dtype}, median of {args.rounds}")
    for name, each in found.items():
        ratio = median(found["transformers"]) / median(each)
        print(f"{name:>12} {median(each):9.1f} ms {ratio:6.1f} times as fast")


if __name__ == "__main__":
    sys.exit(main())
