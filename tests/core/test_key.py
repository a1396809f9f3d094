"""Keys: everything a state is a function of changes its name, and nothing else does."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest

from pcache_core import OptionError
from pcache_core.kv.key import KeySpace, digest
from pcache_core.prompt import Passage


def test_the_digest_is_sha256_over_length_prefixed_fields() -> None:
    expected = hashlib.sha256(struct.pack("<Q", 2) + b"ab" + struct.pack("<Q", 1) + b"c")
    assert digest([b"ab", b"c"]) == expected.hexdigest()
    assert digest([b"a", b"bc"]) != digest([b"ab", b"c"])


def test_every_part_of_the_identity_is_in_the_digest() -> None:
    def name(
        model: str = "m",
        dtype: str = "d",
        namespace: str = "n",
        ids: tuple[Any, ...] = ((1, 2), (3, 4), None),
    ) -> str:
        return KeySpace(model, dtype, namespace).key(*ids).digest

    variants = {
        name(),
        name(model="x"),
        name(dtype="x"),
        name(namespace="x"),
        name(ids=((1,), (2, 3, 4), None)),
        name(ids=((), (1, 2, 3, 4), None)),
        name(ids=((1, 2), (4, 3), None)),
        name(ids=((1, 2), (3, 4), 0)),
        name(ids=((1, 2), (3, 4), 7)),
        name(ids=((1, 2), (3, 4), None, Passage((3, 4), (0, 2)).shape)),
        name(ids=((1, 2), (3, 4), None, Passage((3, 4), (0, 5)).shape)),
        name(ids=((1, 2), (3, 4), None, Passage((3, 9, 4), (), (1,)).shape)),
        name(ids=((1, 2), (3, 4), None, Passage((3, 8, 4), (), (1,)).shape)),
        name(ids=((1, 2), (3, 4), None, Passage((9, 3, 4), (), (0,)).shape)),
    }
    assert len(variants) == 14
    assert name(ids=((1, 2), (3, 4), None, Passage((3, 4)).shape)) == name()
    assert name() == name()


@pytest.mark.parametrize(
    "bad", ["", " ", "a b", "../x", "a/b", ".x", "x" * 65, "é", "a\n", 3, None]
)
def test_a_namespace_of_other_characters_is_refused(bad: object) -> None:
    with pytest.raises(OptionError, match="namespace"):
        KeySpace("m", "d", bad)  # type: ignore[arg-type]
