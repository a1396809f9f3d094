"""Check reuse on a CUDA device and time it, on a Llama with random weights, beside transformers.

    python benchmarks/gpu.py                  # 7B in bfloat16: a few minutes, eight at most
    python benchmarks/gpu.py --device cpu --layers 2 --hidden 64 --cached 60,90 --documents 3

First the checks, on a model of four layers in float32: `off` and its answers are those of plain
transformers, `fast` is one forward under the mask it implies, repairing everything is `off`, states
that were on disk serve like those that stayed on the device, requests at once are answered as one
by one. Then times to the first token, decoding, requests at once and peak memory, in `--dtype`.
What doesn't begin within `--minutes` is left out, and said. Runs from a checkout that is not
installed, with torch, transformers and a few small packages. Downloads nothing.
Exit status: 0: the checks passed. 1: one did not. 2: they could not run; one line says why.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "core"))

try:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )

    from pcache_core import (
        CausalLM,
        DiskStore,
        MemoryStore,
        Prompt,
        PromptCacheEngine,
        ReuseMode,
        SamplingParams,
        Segment,
        TieredStore,
    )
except ImportError as error:
    print(f"{error}; pip install torch transformers lxml rich xxhash", file=sys.stderr)
    raise SystemExit(2) from None

VOCAB_SIZE = 8192
TOLERANCE = 1e-4  # of the largest logit, in float32
QUESTION_TOKENS = 32


MODES: tuple[ReuseMode, ...] = ("off", "exact", "fast", "balanced")


def main() -> int:
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is there; --device cpu runs it here, in small", file=sys.stderr)
        return 2
    ends = time.perf_counter() + args.minutes * 60
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    small = random_llama(args.device, min(args.layers, 4), min(args.hidden, 512), torch.float32)
    passed = check(CausalLM(small, word_tokenizer()))
    del small
    model = random_llama(args.device, args.layers, args.hidden, getattr(torch, args.dtype))
    print(
        f"\n{model.num_parameters() / 1e9:.2f}G weights, {args.dtype}, {args.documents} documents"
    )
    bench = Bench(CausalLM(model, word_tokenizer()), args)
    steps = [*(lambda size=size: bench.first_tokens(size) for size in sorted(args.cached))]
    for step in (*steps, bench.decode, bench.at_once):
        if time.perf_counter() > ends:
            print(f"\nthe rest is left out: --minutes {args.minutes:g} have passed")
            break
        step()
    return 0 if passed else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 64")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument(
        "--cached",
        type=lambda text: [int(size) for size in text.split(",")],
        default=[3000, 8000],
        help="tokens of all documents, by commas",
    )
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=16, help="at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=7, help="nothing begins after them")
    return parser.parse_args()


def random_llama(device: str, layers: int, hidden: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose attention is peaky, so that a wrong mask or position shows in its logits."""
    dim = 128 if hidden % 512 == 0 else 64 if hidden % 128 == 0 else 32
    heads = hidden // dim
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        head_dim=dim,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,  # answers have the length that was asked for
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):  # random numbers for 7B take minutes elsewhere
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.0 if "embed" in name else 1.6 * weight.shape[1] ** -0.5)
    found: PreTrainedModel = model.eval().requires_grad_(False)
    return found


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; nothing begins or ends a text."""
    vocabulary = {"<unk>": 0, **{f"w{i}": i for i in range(1, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def words(seed: int, count: int) -> str:
    chance = random.Random(seed)
    return "".join(f"w{chance.randrange(1, VOCAB_SIZE)} " for _ in range(count))


def prompt_of(documents: Sequence[str], seed: int) -> Prompt:
    """Documents, then a question that no other seed asks."""
    question = words(1_000_000 + seed, QUESTION_TOKENS)
    return Prompt([*(Segment(text, "document") for text in documents), Segment(question, "text")])


def check(lm: CausalLM) -> bool:
    """Compare with plain transformers, and with itself after every way that states may go."""
    documents = [words(seed, 90) for seed in range(6)]
    prompt = prompt_of(documents, 0)
    engine = PromptCacheEngine(lm)
    off, fast = (engine.prefill(prompt, reuse=mode) for mode in ("off", "fast"))
    before = [
        engine.preamble_for(segment.text)[: segment.preamble_tokens]
        for segment in fast.report.segments
    ]
    plain, masked = plain_logits(lm, prompt), masked_logits(lm, prompt, before)
    whole = PromptCacheEngine(lm).prefill(prompt, reuse="high", repair=1.0)
    passed = [
        is_near("off is plain transformers", off.logits, plain),
        is_near("fast is one masked forward", fast.logits, masked),
        is_near("repairing all is off", whole.logits, plain),
        is_near("states from disk are those from the device", from_disk(lm, prompt), fast.logits),
    ]
    print(f"        (the masked forward differs from the plain one by {apart(masked, plain):.1e})")
    lengths = SamplingParams(max_tokens=12)
    ours = engine.generate(prompt, lengths, reuse="off").token_ids
    passed.append(is_so("answers are those of generate", list(ours) == generate(lm, prompt, 12)))
    prompts = [prompt_of(random.Random(n).sample(documents, 4), n) for n in range(8)]
    for mode in ("off", "fast", "balanced"):
        answer = partial(PromptCacheEngine.generate, params=lengths, reuse=mode)
        alone = [answer(PromptCacheEngine(lm), each).token_ids for each in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = pool.map(partial(answer, PromptCacheEngine(lm)), prompts)
        together = [answer.token_ids for answer in found]
        passed.append(is_so(f"{mode}: at once as one by one", alone == together))
    return all(passed)


def from_disk(lm: CausalLM, prompt: Prompt) -> torch.Tensor:
    """Logits in `fast`, its states read by an engine that never had them on the device."""
    with TemporaryDirectory() as folder:
        store = TieredStore([MemoryStore(), DiskStore(folder)])
        PromptCacheEngine(lm, store).prefill(prompt, reuse="fast")
        store.close()
        read = PromptCacheEngine(lm, DiskStore(folder)).prefill(prompt, reuse="fast")
    assert read.report.encoded_tokens == 0, "everything is on disk"
    return read.logits


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def is_near(what: str, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Print whether logits are those expected, and return it."""
    error = apart(found, expected)
    return is_so(f"{what} (relative error {error:.1e})", error <= TOLERANCE)


def is_so(what: str, right: bool) -> bool:
    """Print a check's outcome, and return it."""
    print(f"{'right' if right else 'WRONG'}: {what}")
    return right


@torch.no_grad()
def generate(lm: CausalLM, prompt: Prompt, count: int) -> list[int]:
    """Return the likeliest `count` tokens after the prompt, by transformers alone."""
    ids = torch.tensor([lm.token_ids(prompt.text)], device=lm.device)
    found = lm.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return [int(number) for number in found[0, ids.shape[1] :]]


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


class Bench:
    """Times, each printed as soon as it is known."""

    def __init__(self, lm: CausalLM, args: argparse.Namespace) -> None:
        self.lm = lm
        self.args = args
        self.device = lm.device
        self.baseline_bytes = self.allocated()

    def documents(self, size: int) -> list[str]:
        """Return documents of `size` tokens together."""
        bounds = [size * n // self.args.documents for n in range(self.args.documents + 1)]
        return [words(size + n, b - a) for n, (a, b) in enumerate(pairwise(bounds))]

    def engine(self, documents: Sequence[str]) -> PromptCacheEngine:
        """Return one that knows the documents, and nothing else."""
        engine = PromptCacheEngine(self.lm, MemoryStore(8 * 2**30), prefix_budget_bytes=4 * 2**30)
        engine.encode(documents, progress=False)
        return engine

    def allocated(self) -> int:
        """Return the bytes on the device now, and begin a new peak; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def timed(self, run: Callable[[], object]) -> tuple[float, float]:
        """Return the milliseconds a run takes, and the GiB beyond the weights at its peak."""
        self.allocated()
        started = time.perf_counter()
        run()
        if self.device.type != "cuda":
            return (time.perf_counter() - started) * 1000, 0.0
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - self.baseline_bytes
        return (time.perf_counter() - started) * 1000, peak / 2**30

    def first_tokens(self, size: int) -> None:
        """Print times to the first token: documents in a new order each round (`exact`: the same).

        Medians; the first round warms up.
        """
        documents = self.documents(size)
        encoding_ms, _ = self.timed(lambda: self.engine(documents))
        print(f"\nfirst token, {size} known tokens (encoding them: {encoding_ms:.0f} ms)")
        engines = {mode: self.engine(documents) for mode in MODES}
        found: dict[str, list[tuple[float, float]]] = {}
        for number in range(self.args.rounds + 1):
            shuffled = random.Random(number).sample(documents, len(documents))
            new, same = prompt_of(shuffled, number), prompt_of(documents, number)
            runs: dict[str, Callable[[], object]] = {"generate": partial(generate, self.lm, new, 1)}
            for mode, engine in engines.items():
                prompt = same if mode == "exact" else new
                runs[mode] = partial(engine.prefill, prompt, reuse=mode)
            for name, run in runs.items():
                timed = self.timed(run)
                if number:
                    found.setdefault(name, []).append(timed)
        base = median(ms for ms, _ in found["generate"])
        for name, each in found.items():
            ms, peak = median(ms for ms, _ in each), max(gib for _, gib in each)
            print(f"{name:>12} {ms:9.1f} ms {base / ms:7.1f} times as fast {peak:6.2f} GiB")

    def decode(self) -> None:
        """Print tokens a second after the first, beyond the longest prompt."""
        size, count = max(self.args.cached), self.args.answer_tokens
        documents = self.documents(size)
        prompt, engine = prompt_of(documents, 0), self.engine(documents)
        ways: dict[str, Callable[[int], object]] = {
            "generate": partial(generate, self.lm, prompt),
            "fast": partial(answer, engine, prompt, "fast"),
        }
        print(f"\ntokens a second after the first, {size} tokens of prompt, {count} of answer")
        for name, run in ways.items():
            run(1)
            first, whole = (
                median(self.timed(partial(run, n))[0] for _ in range(3)) for n in (1, count)
            )
            print(f"{name:>12} {(count - 1) * 1000 / max(whole - first, 1e-3):9.1f}")

    def at_once(self) -> None:
        """Print how long requests over the same documents take, at once and one after another."""
        size, requests, count = min(self.args.cached), self.args.requests, self.args.answer_tokens
        documents = self.documents(size)
        print(f"\n{requests} requests, {size} tokens of documents, {count} of answer")
        orders = [random.Random(n).sample(documents, len(documents)) for n in range(2 * requests)]
        prompts = [prompt_of(order, number) for number, order in enumerate(orders)]
        for mode in ("off", "fast", "balanced"):
            engine = self.engine(documents)
            answer(engine, prompt_of(documents, -1), mode, count)
            run = partial(answer_all, engine, mode, count)
            one_by_one, _ = self.timed(partial(run, prompts[:requests], 1))
            together, peak = self.timed(partial(run, prompts[requests:], requests))
            print(
                f"{mode:>12} {together:9.0f} ms at once, {one_by_one:9.0f} ms one by one: "
                f"{one_by_one / together:.1f} times {peak:6.2f} GiB"
            )


def answer(engine: PromptCacheEngine, prompt: Prompt, reuse: ReuseMode, count: int) -> object:
    """Return an answer of `count` tokens."""
    return engine.generate(prompt, SamplingParams(max_tokens=count), reuse=reuse)


def answer_all(
    engine: PromptCacheEngine, reuse: ReuseMode, count: int, prompts: Sequence[Prompt], threads: int
) -> None:
    """Answer prompts, so many at once."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda prompt: answer(engine, prompt, reuse, count), prompts))


if __name__ == "__main__":
    sys.exit(main())
