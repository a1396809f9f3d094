"""The names in the tiny world: closed pools, each name one token of `builtin:tiny-rag`."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from importlib import resources

_POOLS: dict[str, list[str]] = json.loads(
    resources.files(__package__).joinpath("names.json").read_text("utf-8")
)
WOMEN, MEN = _POOLS["women"], _POOLS["men"]
FIRST_NAMES = WOMEN + MEN
SURNAMES = _POOLS["surnames"]
COMPANIES, CITIES, RIVERS = _POOLS["companies"], _POOLS["cities"], _POOLS["rivers"]
JOBS, HOBBIES, PRODUCTS = _POOLS["jobs"], _POOLS["hobbies"], _POOLS["products"]
ASIDES, LEADS = _POOLS["asides"], _POOLS["leads"]

_WOMEN = frozenset(WOMEN)
_HELD_OUT_PERCENT = 10


def pronoun(person: str) -> str:
    """`She` or `He`, by the first name."""
    return "She" if person.split()[0] in _WOMEN else "He"


def is_held_out(first: str, surname: str) -> bool:
    """Whether a pair of names is kept from training: a tenth of all pairs, by their CRC-32."""
    return zlib.crc32(f"{first}/{surname}".encode()) % 100 < _HELD_OUT_PERCENT


class Cast:
    """Draws names for one context, none twice.

    Persons are either all held-out pairs or none. With probability `shared`, a person shares the
    first name or the surname of one drawn before, so that half a name is not enough to find them.
    """

    def __init__(self, rng: random.Random, *, held_out: bool, shared: float) -> None:
        self._rng, self._held_out, self._shared = rng, held_out, shared
        self._used: set[str] = set()
        self._firsts: list[str] = []
        self._surnames: list[str] = []

    def fresh(self, pool: Sequence[str]) -> str:
        """Return a name of the pool that was not drawn yet."""
        while (name := self._rng.choice(pool)) in self._used:
            pass
        self._used.add(name)
        return name

    def person(self) -> str:
        """First name and surname of somebody new."""
        attempts = 0
        while True:
            attempts += 1
            first, surname = self._rng.choice(FIRST_NAMES), self._rng.choice(SURNAMES)
            if self._firsts and attempts < 30 and self._rng.random() < self._shared:
                if self._rng.random() < 0.5:
                    first = self._rng.choice(self._firsts)
                else:
                    surname = self._rng.choice(self._surnames)
            elif first in self._used or surname in self._used:
                continue
            name = f"{first} {surname}"
            if is_held_out(first, surname) == self._held_out and name not in self._used:
                break
        self._used.update((name, first, surname))
        self._firsts.append(first)
        self._surnames.append(surname)
        return name
