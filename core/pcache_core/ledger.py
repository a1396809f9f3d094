"""What became of texts: the keys under which this process has put or found states of them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

from pcache_core.key import ModuleKey, pack_ids


class Ledger:
    """Digests of keys by the tokens that they are of, whatever those were encoded behind.

    max_texts: how many different token sequences are remembered; the one that was noted longest
        ago goes first.

    A text has a state for every opening that it was encoded behind, and none of their digests can
    be told from the text alone. Holds hashes, no tokens. Thread-safe.
    """

    def __init__(self, max_texts: int = 200_000) -> None:
        self._max_texts = max_texts
        self._digests: OrderedDict[bytes, set[str]] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, key: ModuleKey) -> None:
        """There is, or was, a state under this key."""
        name = _name(key.token_ids)
        with self._lock:
            self._digests.setdefault(name, set()).add(key.digest)
            self._digests.move_to_end(name)
            if len(self._digests) > self._max_texts:
                self._digests.popitem(last=False)

    def __contains__(self, key: ModuleKey) -> bool:
        """Whether it was noted."""
        with self._lock:
            return key.digest in self._digests.get(_name(key.token_ids), ())

    def take(self, token_ids: Sequence[int]) -> list[ModuleKey]:
        """The keys of these tokens, which are forgotten."""
        with self._lock:
            digests = self._digests.pop(_name(token_ids), set())
        return [ModuleKey(digest, tuple(token_ids)) for digest in digests]


def _name(token_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(pack_ids(token_ids), digest_size=16).digest()
