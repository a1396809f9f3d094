"""What can be said and asked about the tiny world's persons, companies and cities."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pcache_core.evaluation.world import names
from pcache_core.evaluation.world.names import Cast

Kind = Literal["person", "company", "city"]
KINDS: tuple[Kind, ...] = ("person", "company", "city")


@dataclass(frozen=True, slots=True)
class Attribute:
    """A property of one kind of subject.

    names: the kind of subject its values are, if they are subjects themselves.
    draw: a value nobody has yet. statements: with `{s}` subject and `{v}` value.
    questions: with `{s}` subject or `{S}` its genitive.
    """

    name: str
    kind: Kind
    names: Kind | None
    draw: Callable[[Cast, random.Random], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]

    def ask(self, rng: random.Random, subject: str) -> str:
        """Return a question about a subject, in one of several wordings."""
        return _about(rng.choice(self.questions), subject)


@dataclass(frozen=True, slots=True)
class Hop:
    """A question whose answer is an attribute of an attribute's value."""

    first: str
    second: str
    questions: tuple[str, ...]

    def ask(self, rng: random.Random, subject: str) -> str:
        """Return the two-hop question about a subject."""
        return _about(rng.choice(self.questions), subject)


def _about(question: str, subject: str) -> str:
    return question.format(s=subject, S=f"{subject}'s")


def _pool(pool: list[str]) -> Callable[[Cast, random.Random], str]:
    return lambda cast, _rng: cast.fresh(pool)


def _number(low: int, high: int) -> Callable[[Cast, random.Random], str]:
    return lambda _cast, rng: str(rng.randint(low, high))


def _person(cast: Cast, _rng: random.Random) -> str:
    return cast.person()


def _code(_cast: Cast, rng: random.Random) -> str:
    return f"{rng.choice('BCDFGHJKLMNPQRSTVWXZ')}{rng.randint(10, 99)}-{rng.randint(10, 99)}"


_ALL = (
    Attribute(
        "employer",
        "person",
        "company",
        _pool(names.COMPANIES),
        (
            "{s} works for {v}.",
            "{s} is employed by {v}.",
            "{s} has a job at {v}.",
            "{s} joined {v} last year.",
            "{s} is on the staff of {v}.",
        ),
        (
            "Which company does {s} work for?",
            "Who employs {s}?",
            "Where does {s} work?",
            "What is the name of {S} employer?",
        ),
    ),
    Attribute(
        "home",
        "person",
        "city",
        _pool(names.CITIES),
        (
            "{s} lives in {v}.",
            "{s} has a house in {v}.",
            "{s} resides in {v}.",
            "{s} moved to {v} last year.",
            "{s} rents a flat in {v}.",
        ),
        ("Where does {s} live?", "In which city does {s} live?", "What is {S} home city?"),
    ),
    Attribute(
        "birthplace",
        "person",
        "city",
        _pool(names.CITIES),
        ("{s} was born in {v}.", "{s} grew up in {v}.", "{s} comes from {v}."),
        ("Where was {s} born?", "In which city was {s} born?", "Where does {s} come from?"),
    ),
    Attribute(
        "job",
        "person",
        None,
        _pool(names.JOBS),
        (
            "{s} is a {v}.",
            "{s} earns a living as a {v}.",
            "{s} was trained as a {v}.",
            "{s} works as a {v}.",
        ),
        ("What is {S} job?", "What does {s} do for a living?", "What is the profession of {s}?"),
    ),
    Attribute(
        "hobby",
        "person",
        None,
        _pool(names.HOBBIES),
        (
            "{s} enjoys {v}.",
            "{s} spends weekends on {v}.",
            "{s} is fond of {v}.",
            "{s} took up {v} last year.",
        ),
        ("What is {S} hobby?", "What does {s} do for fun?", "What does {s} enjoy?"),
    ),
    Attribute(
        "extension",
        "person",
        None,
        _number(1000, 9999),
        (
            "{s} uses extension {v}.",
            "{s} can be reached at extension {v}.",
            "{s} answers the phone at extension {v}.",
        ),
        ("What is {S} extension?", "At which extension can {s} be reached?"),
    ),
    Attribute(
        "badge",
        "person",
        None,
        _code,
        ("{s} carries badge {v}.", "{s} holds badge {v}."),
        ("What is {S} badge?", "Which badge does {s} carry?"),
    ),
    Attribute(
        "headquarters",
        "company",
        "city",
        _pool(names.CITIES),
        (
            "{s} is based in {v}.",
            "{s} has its headquarters in {v}.",
            "{s} runs its main office in {v}.",
            "{s} operates from {v}.",
        ),
        (
            "Where is {s} based?",
            "In which city is {s} based?",
            "Where are the headquarters of {s}?",
        ),
    ),
    Attribute(
        "founded",
        "company",
        None,
        _number(1850, 2019),
        (
            "{s} was founded in {v}.",
            "{s} opened its doors in {v}.",
            "{s} started trading in {v}.",
            "{s} dates back to {v}.",
        ),
        (
            "When was {s} founded?",
            "In which year was {s} founded?",
            "In which year did {s} start trading?",
        ),
    ),
    Attribute(
        "product",
        "company",
        None,
        _pool(names.PRODUCTS),
        ("{s} makes {v}.", "{s} sells {v}.", "{s} is known for its {v}.", "{s} exports {v}."),
        ("What does {s} make?", "What is {s} known for?", "What does {s} sell?"),
    ),
    Attribute(
        "director",
        "company",
        "person",
        _person,
        (
            "{s} is run by {v}.",
            "{s} has a director named {v}.",
            "{s} is managed by {v}.",
            "{s} is headed by {v}.",
        ),
        ("Who runs {s}?", "Who is the director of {s}?", "Who manages {s}?"),
    ),
    Attribute(
        "river",
        "city",
        None,
        _pool(names.RIVERS),
        (
            "{s} lies on the river {v}.",
            "{s} was built along the river {v}.",
            "{s} is crossed by the river {v}.",
        ),
        ("On which river does {s} lie?", "Which river runs through {s}?"),
    ),
    Attribute(
        "mayor",
        "city",
        "person",
        _person,
        ("{s} has a mayor named {v}.", "{s} is governed by {v}.", "{s} elected {v} as mayor."),
        ("Who is the mayor of {s}?", "Who governs {s}?"),
    ),
)
ATTRIBUTES = {attribute.name: attribute for attribute in _ALL}
OF_KIND: dict[Kind, list[str]] = {
    kind: [attribute.name for attribute in _ALL if attribute.kind == kind] for kind in KINDS
}

HOPS = (
    Hop(
        "employer",
        "headquarters",
        (
            "Where is {S} employer based?",
            "In which city is the employer of {s} based?",
            "Where is the company that employs {s} based?",
        ),
    ),
    Hop(
        "employer",
        "founded",
        (
            "When was {S} employer founded?",
            "In which year was the employer of {s} founded?",
            "When was the company that employs {s} founded?",
        ),
    ),
    Hop(
        "employer",
        "product",
        ("What does {S} employer make?", "What does the employer of {s} make?"),
    ),
    Hop(
        "employer",
        "director",
        (
            "Who runs {S} employer?",
            "Who is the director of the employer of {s}?",
            "Who runs the company that employs {s}?",
        ),
    ),
    Hop(
        "home",
        "river",
        (
            "On which river does {S} home city lie?",
            "Which river runs through the home city of {s}?",
            "Which river runs through the city where {s} lives?",
        ),
    ),
    Hop(
        "home",
        "mayor",
        (
            "Who is the mayor of {S} home city?",
            "Who governs the home city of {s}?",
            "Who is the mayor of the city where {s} lives?",
        ),
    ),
)
