"""Train `builtin:tiny-rag` from scratch: `python examples/tiny_rag/train.py --minutes 45`."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lessons import KINDS, STAGES, Lesson, Stage, StageChoice, Teacher
from network import Shape, TinyLlama, to_llama
from start import structured_start
from vocabulary import Vocabulary, build

from pcache_core.evaluation.world.contexts import WorldSpec

TEST = Stage(WorldSpec(alike=0.9, asides=0.65), 16, 0.2, 0.3)
SPLIT = Stage(WorldSpec(alike=0.9, asides=0.65), 16, cut=1.0)
WARM_UP_STEPS = 50
SAVE_EVERY_S = 150
ALIAS_SCALE = 0.999


def main() -> None:
    options = _options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    vocabulary = build()
    device = torch.device(options.device)
    network = TinyLlama(Shape(vocabulary=(len(vocabulary.tokenizer) + 15) // 16 * 16))
    structured_start(network, vocabulary.groups, options.seed)
    if options.resume:
        network.load_state_dict(torch.load(options.resume / "weights.pt", weights_only=True))
    network.to(device)
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"{count:,} weights, {len(vocabulary.tokenizer)} tokens", flush=True)
    Training(network, vocabulary, options).run()
    save(network, vocabulary, options.out)


class Training:
    """The loop: curriculum, learning rates, the first steps with the fetching layers frozen."""

    def __init__(
        self, network: TinyLlama, vocabulary: Vocabulary, options: argparse.Namespace
    ) -> None:
        self._network, self._vocabulary, self._options = network, vocabulary, options
        self._rng = random.Random(options.seed)
        self._teacher = Teacher(vocabulary)
        self._stage = StageChoice(self._rng)
        self._stage.current = options.stage
        self._optimizers = [
            torch.optim.Muon(network.matrices(), lr=options.lr, weight_decay=0.01),
            torch.optim.AdamW(
                network.others(), lr=options.lr / 4, betas=(0.9, 0.98), weight_decay=0.0
            ),
        ]
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]
        self._device = next(network.parameters()).device

    def run(self) -> None:
        """Train until the minutes are over."""
        options, network = self._options, self._network
        batches = self._teacher.batches(self._rng, self._stage, options.tokens)
        start = saved = told = time.time()
        step = tokens = 0
        losses: list[float] = []
        self._train_fetching(options.freeze == 0)
        while (done := (time.time() - start) / (60 * options.minutes)) < 1:
            if step == options.freeze:
                self._train_fetching(True)
            self._set_rates(step, done)
            batch = next(batches).to(self._device)
            loss = F.cross_entropy(network(batch), batch.targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for optimizer in self._optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + batch.num_tokens
            losses.append(loss.item())
            if time.time() - told > options.report_s:
                told = time.time()
                self._report(step, tokens, told - start, losses)
                losses = []
            if time.time() - saved > SAVE_EVERY_S:
                saved = time.time()
                save(network, self._vocabulary, options.out)

    def _train_fetching(self, trained: bool) -> None:
        """Whether the embedding and the layers that carry names from word to word learn."""
        fetching = [self._network.embedding]
        fetching += [p for block in self._network.blocks[:2] for p in block.parameters()]
        for parameter in fetching:
            parameter.requires_grad_(trained)

    def _set_rates(self, step: int, done: float) -> None:
        decay = self._options.decay
        scale = min(1.0, (step + 1) / WARM_UP_STEPS)
        scale *= 1.0 if done < 1 - decay else max(0.02, (1 - done) / decay)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale

    def _report(self, step: int, tokens: int, seconds: float, losses: list[float]) -> None:
        """Print the exact answers on held-out pairs, and move on when the stage is learnt."""
        here = self._accuracy(STAGES[self._stage.current], 40, None, seed=step)
        line = {
            "s": round(seconds), "step": step, "tokens": tokens, "stage": self._stage.current,
            "tokens_per_s": round(tokens / seconds), "loss": round(sum(losses) / len(losses), 3),
            "here": here, "eight": self._accuracy(TEST, 12, 8, seed=step),
            "split": self._accuracy(SPLIT, 12, 8, seed=step)["split"],
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        learnt = here["single"] > 0.93 and (self._stage.current == 0 or here["two-hop"] > 0.83)
        if learnt and self._stage.current + 1 < len(STAGES):
            self._stage.current += 1

    @torch.no_grad()
    def _accuracy(
        self, stage: Stage, contexts: int, documents: int | None, seed: int
    ) -> dict[str, float]:
        """Share of answers whose every token is the most likely one, by kind of question."""
        rng = random.Random(seed)
        drawn = [
            self._teacher.lesson(rng, stage, held_out=True, documents=documents)
            for _ in range(contexts)
        ]
        lessons = sorted(
            (lesson for lesson in drawn if lesson), key=lambda lesson: len(lesson.documents)
        )
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for start in range(0, len(lessons), 8):
            self._mark(lessons[start : start + 8], right)
        return {kind: round(sum(v) / max(1, len(v)), 3) for kind, v in right.items()}

    def _mark(self, lessons: list[Lesson], right: dict[str, list[bool]]) -> None:
        batch = self._teacher.collate(lessons).to(self._device)
        good = (self._network(batch).argmax(-1) == batch.targets).tolist()
        answers: dict[tuple[int, int], bool] = {}
        for hit, pair, kind in zip(good, batch.pairs.tolist(), batch.kinds.tolist(), strict=True):
            answers[pair, kind] = answers.get((pair, kind), True) and hit
        for (_, kind), hit in answers.items():
            right[KINDS[kind]].append(hit)


def save(network: TinyLlama, vocabulary: Vocabulary, folder: Path) -> None:
    """Write weights to resume from, and the model and tokenizer as transformers loads them."""
    tokenizer = vocabulary.tokenizer
    names = ("bos", "eos", "pad")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    llama = to_llama(network, special)
    with torch.no_grad():
        rows = llama.model.embed_tokens.weight
        for alias, common in vocabulary.aliases.items():
            rows[alias] = rows[common] * ALIAS_SCALE
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.save(network.state_dict(), folder / "weights.pt")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--out", type=Path, default=Path("tiny-rag"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--lr", type=float, default=0.008, help="Muon's; AdamW has a quarter")
    parser.add_argument("--decay", type=float, default=0.5, help="last share of the time")
    parser.add_argument("--freeze", type=int, default=150, help="steps with layers 0-1 frozen")
    parser.add_argument("--stage", type=int, default=0, help="stage of the curriculum to begin at")
    parser.add_argument("--resume", type=Path, help="a folder that an earlier run wrote")
    parser.add_argument("--report-s", type=float, default=40)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
