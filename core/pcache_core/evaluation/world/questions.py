"""Questions about a context, their answers, and how often a guesser would be right."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pcache_core.evaluation.world import names
from pcache_core.evaluation.world.attributes import ATTRIBUTES, HOPS, OF_KIND, Attribute, Kind
from pcache_core.evaluation.world.contexts import Context, WorldSpec, make_context

QuestionSet = Literal["single", "two-hop", "absent", "split"]

OPENING = "Answer the question from the documents.\n\n"
SEPARATOR = "\n\n"
ABSENT = "I don't know."


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the whole expected answer.

    choices: how many values the asked attribute has in the documents. A guesser, who knows the
    attribute but not the subject, is right once in so many times, and never if the answer is
    absent although there are values to take.
    """

    kind: QuestionSet
    text: str
    answer: str
    choices: int

    @property
    def guess(self) -> float:
        """The guesser's chance."""
        if self.kind == "absent":
            return float(self.choices == 0)
        return 1 / self.choices


@dataclass(frozen=True, slots=True)
class Example:
    """One question over the documents of one context."""

    documents: tuple[str, ...]
    question: Question


def question_text(question: str) -> str:
    """Return the prompt's last part, up to where the answer begins."""
    return f"Question: {question}\nAnswer:"


def questions(rng: random.Random, context: Context) -> dict[QuestionSet, list[Question]]:
    """Every fact asked once, every chain of two facts once, and some questions without answer."""
    asked: dict[QuestionSet, list[Question]] = {
        "single": [], "two-hop": _chains(rng, context), "absent": _absent(rng, context), "split": []
    }  # fmt: skip
    for fact in context.facts:
        kind: QuestionSet = "split" if fact.later else "single"
        text = fact.attribute.ask(rng, fact.subject)
        choices = _choices(context, fact.attribute)
        asked[kind].append(Question(kind, text, f"{fact.value}.", choices))
    return asked


def draw(
    kind: QuestionSet, documents: int, count: int, seed: int, *, held_out: bool = True
) -> Iterator[Example]:
    """`count` examples of one set, each over a context of its own; the same for the same seed.

    Every question's attribute has at least two values in the documents, so that finding the
    attribute is not enough. Persons are pairs of names never seen in training.
    """
    rng = random.Random(f"{kind}/{documents}/{seed}")
    spec = WorldSpec(cut=0.75 if kind == "split" else 0.0, alike=0.9, asides=0.65)
    least = 1 if kind == "absent" else 2
    for _ in range(count):
        while True:
            context = make_context(rng, spec, held_out=held_out, documents=documents)
            fair = [q for q in questions(rng, context)[kind] if q.choices >= min(least, documents)]
            if fair:
                break
        yield Example(context.documents, rng.choice(fair))


def _choices(context: Context, attribute: Attribute) -> int:
    return len({fact.value for fact in context.facts if fact.attribute is attribute})


def _chains(rng: random.Random, context: Context) -> list[Question]:
    by_subject = {(fact.subject, fact.attribute.name): fact for fact in context.facts}
    chains = []
    for hop in HOPS:
        for fact in context.facts:
            second = by_subject.get((fact.value, hop.second))
            if fact.attribute.name != hop.first or second is None:
                continue
            answer = second.attribute.statements[0].format(s=fact.value, v=second.value)
            choices = _choices(context, second.attribute)
            chains.append(Question("two-hop", hop.ask(rng, fact.subject), answer, choices))
    return chains


def _absent(rng: random.Random, context: Context) -> list[Question]:
    told = {(fact.subject, fact.attribute.name) for fact in context.facts}
    asked: dict[str, Question] = {}
    for _ in range(8):
        if rng.random() < 0.5:
            subject = rng.choice(list(context.subjects))
            kind = context.subjects[subject]
        else:
            kind = rng.choice(("person", "person", "company", "city"))
            subject = _stranger(context, kind)
        missing = [name for name in OF_KIND[kind] if (subject, name) not in told]
        present = [name for name in missing if _choices(context, ATTRIBUTES[name])]
        if present and rng.random() < 0.6:
            missing = present
        if missing:
            attribute = ATTRIBUTES[rng.choice(missing)]
            text = attribute.ask(rng, subject)
            asked[text] = Question("absent", text, ABSENT, _choices(context, attribute))
    return list(asked.values())


def _stranger(context: Context, kind: Kind) -> str:
    if kind == "person":
        return context.cast.person()
    return context.cast.fresh(names.COMPANIES if kind == "company" else names.CITIES)
