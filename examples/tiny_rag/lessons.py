"""Training data: contexts with many questions each, packed into batches of about equal size."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from layouts import OWN, Layout, draw_layout
from network import MAX_POSITIONS, Inputs
from vocabulary import Vocabulary

from pcache_core.evaluation.world.contexts import WorldSpec, make_context
from pcache_core.evaluation.world.questions import SEPARATOR, Question, questions

KINDS = ("single", "two-hop", "absent", "split")
_MASKED = -30000.0
_CUT_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of the curriculum: the world's spec and the mix of questions.

    cut: the share of contexts that hold chunks cut from longer texts. max_questions: for one
    context. absent, chains: shares among the questions, where the context has such.
    """

    spec: WorldSpec
    max_questions: int
    absent: float = 0.0
    chains: float = 0.0
    cut: float = 0.0
    other_layouts: bool = False

    def draw_spec(self, rng: random.Random) -> WorldSpec:
        """The spec of the next context."""
        if rng.random() >= self.cut:
            return self.spec
        changed = {name: getattr(self.spec, name) for name in WorldSpec.__slots__}
        changed["facts"] = (max(2, self.spec.facts[0]), max(2, self.spec.facts[1]))
        changed["documents"] = (max(2, self.spec.documents[0]), self.spec.documents[1])
        return WorldSpec(**changed | {"cut": _CUT_SHARE})


_MIX = {"absent": 0.2, "chains": 0.3, "cut": 0.4, "other_layouts": True}
STAGES = (
    Stage(
        WorldSpec(
            documents=(1, 4), facts=(1, 1), alike=0.5, uniform=0.2, shared=0.0, asides=0.0,
            pronouns=0.0, first_names=0.0, joined=0.0, wordings=1,
        ),
        max_questions=6,
    ),
    Stage(
        WorldSpec(
            documents=(1, 4), facts=(1, 2), alike=0.4, uniform=0.35, shared=0.05, asides=0.1,
            pronouns=0.1, first_names=0.0,
        ),
        max_questions=8, absent=0.06, chains=0.3, cut=0.15,
    ),
    Stage(
        WorldSpec(
            documents=(1, 6), facts=(1, 3), alike=0.4, uniform=0.35, shared=0.15, asides=0.2,
            pronouns=0.2, first_names=0.1,
        ),
        max_questions=12, absent=0.12, chains=0.3, cut=0.3,
    ),
    Stage(WorldSpec(documents=(1, 9), alike=0.4, uniform=0.25), max_questions=16, **_MIX),
    Stage(WorldSpec(documents=(2, 12), alike=0.4, uniform=0.15), max_questions=20, **_MIX),
    Stage(WorldSpec(documents=(2, 40), alike=0.4, asides=0.4), max_questions=40, **_MIX),
    Stage(
        WorldSpec(documents=(2, 24), alike=0.6, asides=0.65),
        max_questions=30, absent=0.2, chains=0.25, cut=0.5, other_layouts=True,
    ),
)  # fmt: skip


@dataclass(slots=True)
class Lesson:
    """A context in tokens. pairs: tokens of question and answer, where the answer's prediction
    begins, the answer's tokens, and the kind's index."""

    documents: list[int]
    pairs: list[tuple[list[int], int, list[int], int]] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """About how many tokens a forward runs for it."""
        return len(self.documents) + sum(len(pair[0]) for pair in self.pairs)


class Teacher:
    """Draws lessons; the same ones for the same generator."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        tokenizer = vocabulary.tokenizer
        self._pad, self._bos = tokenizer.pad_token_id, tokenizer.bos_token_id
        self._eos = tokenizer.eos_token_id

    def lesson(
        self, rng: random.Random, stage: Stage, *, held_out: bool, documents: int | None = None
    ) -> Lesson | None:
        """One context with questions; None if it asks nothing, or is too long to fit."""
        layout = draw_layout(rng) if stage.other_layouts else OWN
        context = make_context(rng, stage.draw_spec(rng), held_out=held_out, documents=documents)
        encode = self._vocabulary.encode
        ids = [self._bos, *encode(layout.opening)]
        for position, document in enumerate(context.documents):
            ids += encode(SEPARATOR) * (position > 0) + encode(document)
        lesson = Lesson(ids)
        for question in _pick(rng, stage, questions(rng, context)):
            lesson.pairs.append(self._pair(layout, question))
        longest = max((len(pair[0]) for pair in lesson.pairs), default=MAX_POSITIONS)
        return lesson if len(ids) + longest <= MAX_POSITIONS else None

    def _pair(self, layout: Layout, question: Question) -> tuple[list[int], int, list[int], int]:
        encode = self._vocabulary.encode
        asked = encode(layout.closing.replace("{q}", question.text))
        answer = [*encode(f" {question.answer}"), self._eos]
        return asked + answer[:-1], len(asked) - 1, answer, KINDS.index(question.kind)

    def batches(self, rng: random.Random, choose: StageChoice, tokens: int) -> Iterator[Inputs]:
        """Endless batches of about `tokens` tokens, of lessons alike in size."""
        while True:
            pool: list[Lesson] = []
            while sum(lesson.cost for lesson in pool) < tokens * 8:
                lesson = self.lesson(rng, choose(), held_out=False)
                if lesson is not None:
                    pool.append(lesson)
            pool.sort(key=lambda lesson: (len(lesson.pairs) // 4, len(lesson.documents)))
            groups = _group(pool, tokens)
            rng.shuffle(groups)
            for group in groups:
                yield self.collate(group)

    def collate(self, lessons: Sequence[Lesson]) -> Inputs:
        """Pad lessons to a batch."""
        width = (max(len(lesson.documents) for lesson in lessons) + 7) // 8 * 8
        count = max(len(lesson.pairs) for lesson in lessons)
        length = max(len(pair[0]) for lesson in lessons for pair in lesson.pairs)
        documents = torch.full((len(lessons), width), self._pad)
        padding = torch.full((len(lessons), 1, 1, width), _MASKED)
        asked = torch.full((len(lessons), count, length), self._pad)
        starts = torch.tensor([len(lesson.documents) for lesson in lessons])
        rows, targets, kinds, pairs = [], [], [], []
        for index, lesson in enumerate(lessons):
            size = len(lesson.documents)
            documents[index, :size] = torch.tensor(lesson.documents)
            padding[index, ..., :size] = 0.0
            for number, (ids, start, answer, kind) in enumerate(lesson.pairs):
                asked[index, number, : len(ids)] = torch.tensor(ids)
                base = (index * count + number) * length + start
                rows += range(base, base + len(answer))
                targets += answer
                kinds += [kind] * len(answer)
                pairs += [index * count + number] * len(answer)
        positions = starts[:, None, None] + torch.arange(length)
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        return Inputs(
            documents, torch.arange(width).expand(len(lessons), -1), asked.flatten(1),
            positions.expand(-1, count, -1).flatten(1), padding,
            torch.zeros(length, length).masked_fill(ahead, _MASKED), torch.tensor(rows),
            torch.tensor(targets), torch.tensor(kinds), torch.tensor(pairs),
            sum(lesson.cost for lesson in lessons),
        )  # fmt: skip


class StageChoice:
    """The stage of the next lesson: mostly the current one, some of the next, some older."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self.current = rng, 0

    def __call__(self) -> Stage:
        dice = self._rng.random()
        if dice > 0.88:
            return STAGES[self._rng.randrange(self.current + 1)]
        ahead = dice > 0.75 and self.current + 1 < len(STAGES)
        return STAGES[self.current + ahead]


def _pick(rng: random.Random, stage: Stage, asked: dict[str, list[Question]]) -> list[Question]:
    direct = asked["single"] + asked["split"]
    chosen = []
    for _ in range(stage.max_questions):
        dice = rng.random()
        if dice < stage.absent:
            pool = asked["absent"]
        elif dice < stage.absent + stage.chains:
            pool = asked["two-hop"]
        else:
            pool = direct
        pool = pool or direct
        if pool:
            chosen.append(pool.pop(rng.randrange(len(pool))))
    return chosen


def _group(pool: Sequence[Lesson], tokens: int) -> list[list[Lesson]]:
    groups: list[list[Lesson]] = [[]]
    cost = 0
    for lesson in pool:
        if groups[-1] and cost + lesson.cost > tokens:
            groups.append([])
            cost = 0
        groups[-1].append(lesson)
        cost += lesson.cost
    return groups
