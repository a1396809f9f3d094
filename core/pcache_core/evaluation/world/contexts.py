"""Contexts of the tiny world: short documents that bind names to facts, drawn anew each time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pcache_core.evaluation.world import names
from pcache_core.evaluation.world.attributes import ATTRIBUTES, KINDS, OF_KIND, Attribute, Kind
from pcache_core.evaluation.world.names import Cast

_PLAIN_VERBS_NOT = ("is ", "was ", "can ", "has ")
_LEAD_SHARE = 0.6
_APART = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSpec:
    """How contexts are drawn; ranges are inclusive, the other numbers probabilities.

    persons, companies: shares of the kinds of subjects (the rest are cities). cut: a subject's
    text is cut into chunks, of which the later ones name it by "She" or "The company" only.
    alike: all subjects of a kind share an attribute. uniform: all subjects are of one kind.
    shared: a person shares a name with another. asides: one more sentence that tells nothing.
    pronouns, first_names: a later sentence's subject. joined: two sentences made one.
    wordings: how many of an attribute's statements are used.
    """

    documents: tuple[int, int] = (1, 8)
    facts: tuple[int, int] = (2, 4)
    persons: float = 0.5
    companies: float = 0.32
    cut: float = 0.0
    alike: float = 0.1
    uniform: float = 0.0
    shared: float = 0.2
    asides: float = 0.3
    pronouns: float = 0.25
    first_names: float = 0.15
    joined: float = 0.3
    linked: float = 0.6
    wordings: int = 9


@dataclass(frozen=True, slots=True)
class Fact:
    """A subject has a value. later: it is told in a chunk that doesn't name the subject."""

    subject: str
    attribute: Attribute
    value: str
    later: bool


@dataclass(frozen=True, slots=True)
class Context:
    """Documents in the order of the prompt, the facts that they tell, and who they are about."""

    documents: tuple[str, ...]
    facts: tuple[Fact, ...]
    subjects: dict[str, Kind]
    cast: Cast


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A document. mentions: subjects named in it, in order. refers: named by what stood before."""

    text: str
    kind: Kind
    subject: str
    mentions: tuple[tuple[Kind, str], ...]
    refers: bool


def make_context(
    rng: random.Random, spec: WorldSpec, *, held_out: bool, documents: int | None = None
) -> Context:
    """Draw a context. Persons are all held-out pairs of names, or none (`names.is_held_out`)."""
    cast = Cast(rng, held_out=held_out, shared=spec.shared)
    chunks: list[list[_Chunk]] = []
    facts: list[Fact] = []
    subjects: dict[str, Kind] = {}
    open_links: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    count = documents or rng.randint(*spec.documents)
    for kind, parts, attributes in _outline(rng, spec, count):
        subject = _subject(rng, cast, kind, open_links[kind])
        subjects[subject] = kind
        told = [(a, a.draw(cast, rng)) for a in attributes]
        for attribute, value in told:
            if attribute.name in ("employer", "home") and attribute.names:
                open_links[attribute.names].append(value)
        cuts = _cut(rng, told, parts)
        facts += [Fact(subject, a, v, i > 0) for i, part in enumerate(cuts) for a, v in part]
        chunks.append(
            [_write(rng, spec, kind, subject, part, refers=i > 0) for i, part in enumerate(cuts)]
        )
    texts = tuple(chunk.text for chunk in _order(rng, chunks))
    return Context(texts, tuple(facts), subjects, cast)


def _outline(
    rng: random.Random, spec: WorldSpec, count: int
) -> list[tuple[Kind, int, list[Attribute]]]:
    """Kind, number of chunks and attributes of each subject; the chunks add up to `count`."""
    alike = rng.random() < spec.alike
    only: Kind | None = None
    if rng.random() < spec.uniform:
        only, alike = rng.choice(KINDS), True
    common = {kind: rng.choice(OF_KIND[kind]) for kind in KINDS}
    outline = []
    while count > 0:
        kind = only or _kind(rng, spec)
        number = min(len(OF_KIND[kind]), rng.randint(*spec.facts))
        parts = 1
        if count > 1 and rng.random() < spec.cut:
            parts = 3 if count > 2 and number > 2 and rng.random() < 0.15 else 2
            number = max(number, parts)
        chosen = rng.sample(OF_KIND[kind], min(number, len(OF_KIND[kind])))
        if alike and common[kind] not in chosen:
            chosen[-1] = common[kind]
        links = {"employer", "home"}
        if kind == "person" and rng.random() < spec.linked and not links & set(chosen):
            chosen[0] = rng.choice(sorted(links))
        parts = min(parts, len(chosen))
        outline.append((kind, parts, [ATTRIBUTES[name] for name in chosen]))
        count -= parts
    return sorted(outline, key=lambda entry: KINDS.index(entry[0]))


def _kind(rng: random.Random, spec: WorldSpec) -> Kind:
    share = rng.random()
    if share < spec.persons:
        return "person"
    return "company" if share < spec.persons + spec.companies else "city"


def _subject(rng: random.Random, cast: Cast, kind: Kind, linked: list[str]) -> str:
    """Draw a new name; mostly one that a person's employer or home has, so that facts chain."""
    if kind == "person":
        return cast.person()
    if linked and rng.random() < 0.9:
        return linked.pop(rng.randrange(len(linked)))
    return cast.fresh(names.COMPANIES if kind == "company" else names.CITIES)


def _cut(
    rng: random.Random, told: list[tuple[Attribute, str]], parts: int
) -> list[list[tuple[Attribute, str]]]:
    """Split the facts at random places into `parts` runs, none empty.

    The last attribute, the one that others share, stays last.
    """
    bounds = [0, *sorted(rng.sample(range(1, len(told)), parts - 1)), len(told)]
    return [told[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _write(
    rng: random.Random,
    spec: WorldSpec,
    kind: Kind,
    subject: str,
    told: Sequence[tuple[Attribute, str]],
    *,
    refers: bool,
) -> _Chunk:
    """Put facts into sentences."""
    reference = {"person": names.pronoun(subject), "company": "The company", "city": "The city"}
    it = reference[kind] if kind == "person" else "It"
    called = reference[kind] if refers else subject
    sentences = []
    for position, (attribute, value) in enumerate(told):
        who = called
        if position and not refers:
            dice = rng.random()
            if dice < spec.pronouns:
                who = it
            elif dice < spec.pronouns + spec.first_names and kind == "person":
                who = subject.split()[0]
        elif position:
            who = it
        statement = rng.choice(attribute.statements[: spec.wordings])
        if refers and not position and not statement[4:].startswith(_PLAIN_VERBS_NOT):
            who += rng.choice((" also", ""))
        sentences.append((who, statement[4:].format(v=value)))
    if len(sentences) > 1 and rng.random() < spec.joined:
        (who, first), (_, second), *rest = sentences
        sentences = [(who, f"{first[:-1]} and {second}"), *rest]
    lines = [f"{who} {what}" for who, what in sentences]
    while rng.random() < spec.asides:
        lines.insert(rng.randint(1, len(lines)), rng.choice(names.ASIDES))
    if not refers and rng.random() < _LEAD_SHARE:
        lines.insert(0, rng.choice(names.LEADS))
    mentions = [] if refers else [(kind, subject)]
    mentions += [(a.names, value) for a, value in told if a.names]
    return _Chunk(" ".join(lines), kind, subject, tuple(mentions), refers)


def _order(rng: random.Random, chunks: list[list[_Chunk]]) -> list[_Chunk]:
    """Shuffle the texts into each other such that every reference finds its subject.

    A chunk that names its subject by "She" or "The company" stands where the subject is the last
    of its kind that was named.
    """
    for _ in range(20):
        if (order := _interleave(rng, chunks)) is not None:
            return order
    together = list(chunks)
    rng.shuffle(together)
    return [chunk for text in together for chunk in text]


def _interleave(rng: random.Random, chunks: list[list[_Chunk]]) -> list[_Chunk] | None:
    waiting = [list(text) for text in chunks]
    pending: dict[Kind, str] = {}
    order: list[_Chunk] = []
    while waiting:
        free = [text for text in waiting if _may_follow(text[0], len(text), pending)]
        if not free:
            return None
        apart = [text for text in free if order and text[0].subject != order[-1].subject]
        text = rng.choice(apart if apart and rng.random() < _APART else free)
        chunk = text.pop(0)
        order.append(chunk)
        if text:
            pending[chunk.kind] = chunk.subject
            continue
        if chunk.refers:
            del pending[chunk.kind]
        waiting = [text for text in waiting if text]
    return order


def _may_follow(chunk: _Chunk, left: int, pending: dict[Kind, str]) -> bool:
    """Return whether the chunk would leave every reference that is still to come at its subject."""
    still = dict(pending)
    if still.setdefault(chunk.kind, chunk.subject) != chunk.subject:
        return False
    if left == 1:
        del still[chunk.kind]
    named = [mention for mention in chunk.mentions if mention != (chunk.kind, chunk.subject)]
    return all(still.get(kind, name) == name for kind, name in named)
