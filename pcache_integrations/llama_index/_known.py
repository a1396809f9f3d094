"""Which nodes, and which documents, the texts came from that an engine has met."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from pcache_integrations._engines import Engine


@dataclass(frozen=True, slots=True)
class Owner:
    """A node, and the document that it was cut from: itself, if it was not cut."""

    node_id: str
    document_id: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """Texts by what became of them: still owned, or not."""

    kept: dict[str, frozenset[Owner]]
    dropped: frozenset[str]


class KnownTexts:
    """Texts and all their owners: equal texts of several nodes are one.

    Holds at most `max_texts`; the one that was added longest ago goes first. Thread-safe.
    """

    def __init__(self, max_texts: int = 200_000) -> None:
        self._max_texts = max_texts
        self._owners: OrderedDict[str, frozenset[Owner]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, text: object) -> bool:
        return text in self._owners

    def add(self, text: str, owner: Owner) -> None:
        """Remember a text of a node."""
        if not text:
            return
        with self._lock:
            self._owners[text] = self._owners.get(text, frozenset()) | {owner}
            self._owners.move_to_end(text)
            if len(self._owners) > self._max_texts:
                self._owners.popitem(last=False)

    def node_ids(self) -> set[str]:
        """Of all owners."""
        with self._lock:
            return {owner.node_id for owners in self._owners.values() for owner in owners}

    def without_document(self, document_id: str) -> Sweep:
        """What were left of this document's texts if it were gone; other documents' not included.

        A text that another document has, too, is kept.
        """
        with self._lock:
            mine = {
                text: frozenset(owner for owner in owners if owner.document_id != document_id)
                for text, owners in self._owners.items()
                if any(owner.document_id == document_id for owner in owners)
            }
        return _sweep(mine)

    def with_owners(self, owners_of: Callable[[str, Iterable[Owner]], Iterable[Owner]]) -> Sweep:
        """What were left if the owners of each text were those that `owners_of` says."""
        with self._lock:
            known = dict(self._owners)
        return _sweep({text: frozenset(owners_of(text, was)) for text, was in known.items()})

    def apply(self, sweep: Sweep) -> None:
        """Forget what is dropped, and take over the owners of what is kept."""
        with self._lock:
            for text in sweep.dropped:
                self._owners.pop(text, None)
            for text, owners in sweep.kept.items():
                if text in self._owners:
                    self._owners[text] = owners


def _sweep(owners: dict[str, frozenset[Owner]]) -> Sweep:
    kept = {text: left for text, left in owners.items() if left}
    return Sweep(kept, frozenset(owners) - frozenset(kept))


_by_engine: WeakKeyDictionary[Engine, KnownTexts] = WeakKeyDictionary()
_lock = threading.Lock()


def known_texts(engine: Engine) -> KnownTexts:
    """What is known of an engine's texts, for all language model objects that share it."""
    with _lock:
        return _by_engine.setdefault(engine, KnownTexts())
