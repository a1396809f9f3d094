"""Question sets: what is asked, over which documents, and what the right answers are."""

from __future__ import annotations

from dataclasses import dataclass

from pcache_core.errors import OptionError
from pcache_core.evaluation.metrics import MatchRule
from pcache_core.evaluation.world.questions import QuestionSet as WorldKind
from pcache_core.evaluation.world.questions import draw

# Fewer documents can't hold two values of the asked attribute beside what leads to them; more
# would use up the world's names.
_LEAST_DOCUMENTS: dict[WorldKind, int] = {"single": 1, "absent": 1, "two-hop": 3, "split": 3}
_MOST_DOCUMENTS = 64


@dataclass(frozen=True, slots=True)
class Item:
    """One question over its documents.

    answers: any of them is right. guess: the chance of somebody who knows what is asked for but
    not of whom, None where nobody has worked it out.
    """

    question: str
    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    guess: float | None = None


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions that belong to one table.

    match: when an answer counts as an exact match. seed: what drew them, None for a file.
    """

    description: str
    items: tuple[Item, ...]
    match: MatchRule
    seed: int | None = None

    @property
    def guesser(self) -> float | None:
        """The share of right answers that a guesser would reach; None if unknown."""
        guesses = [item.guess for item in self.items if item.guess is not None]
        return sum(guesses) / len(guesses) if guesses else None


@dataclass(frozen=True, slots=True)
class WorldOptions:
    """What to ask of the tiny world; a question of one fact where nothing else is chosen.

    hops: 2 for chains of two facts. split: facts told in chunks that name their subject only by
    what stood before. absent: facts that no document tells. seed: draws everything.

    Raises: OptionError: two kinds at once; too few or too many documents for the kind.
    """

    documents: int = 8
    hops: int = 1
    split: bool = False
    absent: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hops not in (1, 2):
            raise OptionError(f"hops={self.hops} is out of range; the tiny world has 1 and 2")
        chosen = {"hops=2": self.hops == 2, "split": self.split, "absent": self.absent}
        names = [name for name, is_chosen in chosen.items() if is_chosen]
        if len(names) > 1:
            raise OptionError(f"{' and '.join(names)} are sets of their own; choose one of them")
        least = _LEAST_DOCUMENTS[self.kind]
        if not least <= self.documents <= _MOST_DOCUMENTS:
            raise OptionError(
                f"documents={self.documents} is out of range; {self.kind} questions of the tiny "
                f"world take {least} to {_MOST_DOCUMENTS}"
            )

    @property
    def kind(self) -> WorldKind:
        """The set that the options name."""
        if self.hops == 2:
            return "two-hop"
        if self.split:
            return "split"
        return "absent" if self.absent else "single"


def tiny_world(options: WorldOptions, count: int) -> QuestionSet:
    """Draw questions of the tiny world: held-out pairs of names, the documents shuffled.

    Raises: OptionError: no questions.
    """
    check_count(count)
    kind, documents, seed = options.kind, options.documents, options.seed
    items = tuple(
        Item(
            question=example.question.text,
            contexts=example.documents,
            answers=(example.question.answer,),
            guess=example.question.guess,
        )
        for example in draw(kind, documents, count, seed)
    )
    return QuestionSet(f"the tiny world, {kind}, {documents} documents", items, "whole", seed)


def check_count(count: int) -> None:
    """Raises: OptionError: fewer than one question."""
    if count < 1:
        raise OptionError(f"questions={count} is out of range; ask 1 or more")
