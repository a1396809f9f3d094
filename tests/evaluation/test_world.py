"""What the tiny world promises, checked by reading its texts as a person would.

The reader here knows names and wordings, as the model must, and nothing of how texts are drawn:
it takes each sentence apart and finds out itself who "She" or "The company" is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from pcache_core.evaluation.world import names
from pcache_core.evaluation.world.attributes import ATTRIBUTES, HOPS, Attribute, Kind
from pcache_core.evaluation.world.questions import Example, QuestionSet, draw

KINDS: tuple[QuestionSet, ...] = ("single", "two-hop", "absent", "split")
FULL_NAME = re.compile(r"\b(?!The )([A-Z][a-z]+) ([A-Z][a-z]+)\b")
REFERENCES: dict[str, Kind] = {
    "She": "person", "He": "person", "The company": "company", "The city": "city"
}  # fmt: skip
FIRST_NAMES, SURNAMES = set(names.FIRST_NAMES), set(names.SURNAMES)
KIND_OF_NAME: dict[str, Kind] = dict.fromkeys(names.COMPANIES, "company")
KIND_OF_NAME |= dict.fromkeys(names.CITIES, "city")
VALUE = r"(?P<value>[\w-]+(?: [\w-]+)?)"


def persons_in(text: str) -> list[str]:
    """Pairs of a first name and a surname, in order."""
    pairs = [match.groups() for match in FULL_NAME.finditer(text)]
    return [f"{first} {last}" for first, last in pairs if first in FIRST_NAMES and last in SURNAMES]


def subjects_in(text: str) -> Iterator[tuple[Kind, str]]:
    """Every subject that is named, in order."""
    for match in re.finditer(r"[A-Z][a-z]+(?: [A-Z][a-z]+)?", text):
        for name in (match.group(), *match.group().split()):
            if name in KIND_OF_NAME:
                yield KIND_OF_NAME[name], name
            elif persons_in(name):
                yield "person", name


def predicate(statement: str) -> str:
    return re.escape(statement.removeprefix("{s} ").removesuffix(".")).replace(r"\{v\}", VALUE)


PREDICATES: list[tuple[Attribute, re.Pattern[str]]] = [
    (attribute, re.compile(predicate(statement)))
    for attribute in ATTRIBUTES.values()
    for statement in attribute.statements
]


def told(kind: Kind, text: str) -> list[tuple[Attribute, str]]:
    """The facts in what a sentence says of a subject of this kind: one, or two joined by "and"."""
    for parts in ([text], text.split(" and ")):
        found = []
        for part in parts:
            for attribute, pattern in PREDICATES:
                match = pattern.fullmatch(part)
                if match and attribute.kind == kind:
                    found.append((attribute, match["value"]))
                    break
        if len(found) == len(parts):
            return found
    raise AssertionError(f"what is said here? {text!r}")


class Reader:
    """Reads documents in order; `facts` are what they tell, by subject and attribute.

    `distances`: for each document that names its subject by a reference, how many documents stand
    between it and the one that named the subject last.
    """

    def __init__(self, documents: tuple[str, ...]) -> None:
        self.facts: dict[tuple[str, str], str] = {}
        self.referred: set[tuple[str, str]] = set()
        self.distances: list[int] = []
        self._last: dict[Kind, tuple[str, int]] = {}
        for number, document in enumerate(documents):
            self._read(number, document)

    def values(self, attribute: str) -> list[str]:
        return [value for (_, name), value in self.facts.items() if name == attribute]

    def _read(self, number: int, document: str) -> None:
        text = document
        for lead in names.LEADS:
            text = text.removeprefix(f"{lead} ")
        for aside in names.ASIDES:
            text = text.replace(aside, "")
        sentences = [s for s in re.split(r"(?<=\.)\s+", text.strip()) if s]
        kind, subject = self._subject(sentences[0], number)
        refers = sentences[0].startswith(tuple(REFERENCES))
        for sentence in sentences:
            for attribute, value in told(kind, self._said(sentence, subject)):
                assert (subject, attribute.name) not in self.facts
                self.facts[subject, attribute.name] = value
                if refers:
                    self.referred.add((subject, attribute.name))
        for named_kind, name in subjects_in(text):
            self._last[named_kind] = (name, number)

    def _subject(self, sentence: str, number: int) -> tuple[Kind, str]:
        for reference, kind in REFERENCES.items():
            if sentence.startswith(f"{reference} "):
                name, where = self._last[kind]
                if kind == "person":
                    is_woman = name.split()[0] in names.WOMEN
                    assert is_woman == (reference == "She"), f"{reference} for {name}"
                self.distances.append(number - where - 1)
                return kind, name
        kind, name = next(subjects_in(sentence))
        assert sentence.startswith(name)
        return kind, name

    @staticmethod
    def _said(sentence: str, subject: str) -> str:
        for who in (subject, *REFERENCES, "It", subject.split()[0]):
            if sentence.startswith(f"{who} "):
                said = sentence.removeprefix(f"{who} ").removesuffix(".")
                return said.removeprefix("also ")
        raise AssertionError(f"who is this about? {sentence!r}, not {subject}")


def answer(question: str, reader: Reader) -> str | None:
    """The answer that the facts give; None if they don't."""
    for hop in HOPS:
        if (subject := _asked(question, hop.questions)) is not None:
            between = reader.facts[subject, hop.first]
            second = ATTRIBUTES[hop.second]
            value = reader.facts[between, hop.second]
            return second.statements[0].format(s=between, v=value)
    for attribute in ATTRIBUTES.values():
        if (subject := _asked(question, attribute.questions)) is not None:
            value = reader.facts.get((subject, attribute.name))
            return None if value is None else f"{value}."
    raise AssertionError(f"what is asked here? {question!r}")


def asked_attribute(question: str) -> str:
    for hop in HOPS:
        if _asked(question, hop.questions) is not None:
            return hop.second
    return next(a.name for a in ATTRIBUTES.values() if _asked(question, a.questions) is not None)


def _asked(question: str, wordings: tuple[str, ...]) -> str | None:
    for wording in wordings:
        pattern = re.escape(wording).replace(r"\{s\}", "(.+)").replace(r"\{S\}", "(.+)'s")
        match = re.fullmatch(pattern, question)
        if match and (persons_in(match[1]) == [match[1]] or match[1] in KIND_OF_NAME):
            return match[1]
    return None


@pytest.fixture(scope="module", params=KINDS)
def examples(request: pytest.FixtureRequest) -> list[Example]:
    return list(draw(request.param, 8, 150, seed=41))


def test_every_answer_follows_from_the_documents_alone(examples: list[Example]) -> None:
    for example in examples:
        found = answer(example.question.text, Reader(example.documents))
        assert example.question.answer == (found or "I don't know."), example


def test_what_is_asked_has_two_values_or_more_and_the_guesser_one_chance(
    examples: list[Example],
) -> None:
    alike = 0
    for example in examples:
        question = example.question
        values = Reader(example.documents).values(asked_attribute(question.text))
        if len(set(values)) < len(values):
            alike += 1  # years and extensions are drawn freely, so two may be the same
        elif question.kind == "absent":
            assert len(values) >= 1
            assert question.guess == 0
        else:
            assert len(values) >= 2
            assert question.guess == pytest.approx(1 / len(values))
    assert alike < 0.05 * len(examples)


def test_a_split_fact_stands_in_a_chunk_that_does_not_name_its_subject() -> None:
    distances: list[int] = []
    for example in draw("split", 8, 150, seed=42):
        reader = Reader(example.documents)
        distances += reader.distances
        subject = next(s for _, s in subjects_in(example.question.text.replace("'s", "")))
        assert (subject, asked_attribute(example.question.text)) in reader.referred
    assert sum(distance > 0 for distance in distances) > len(distances) / 3


def test_the_documents_are_as_many_as_asked_for_and_no_two_alike() -> None:
    for kind in KINDS:
        for documents in (3, 8, 64):
            for example in draw(kind, documents, 5, seed=1):
                assert len(set(example.documents)) == len(example.documents) == documents


def test_the_same_seed_draws_the_same_and_another_seed_other_examples() -> None:
    for kind in KINDS:
        first = list(draw(kind, 8, 20, seed=7))
        assert first == list(draw(kind, 8, 20, seed=7))
        assert not set(first) & set(draw(kind, 8, 20, seed=8))


def test_persons_asked_about_are_pairs_that_training_never_sees() -> None:
    def pairs(*, held_out: bool) -> set[str]:
        return {
            name
            for kind in KINDS
            for example in draw(kind, 12, 150, seed=5, held_out=held_out)
            for text in (*example.documents, example.question.text)
            for name in persons_in(text)
        }

    kept, trained = pairs(held_out=True), pairs(held_out=False)
    assert len(kept) > 1000
    assert len(trained) > 2000
    assert not kept & trained
