"""The model's states: found in the store, checked, or encoded and put there."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pcache_core.encode import Module, encode_anchor, encode_modules
from pcache_core.errors import StateMismatchError
from pcache_core.key import KeySpace, ModuleKey
from pcache_core.kv import KVState
from pcache_core.ledger import Ledger
from pcache_core.lm import CausalLM
from pcache_core.passage import Passage
from pcache_core.report import Source
from pcache_core.store import ModuleStore
from pcache_core.store.search import find_in_folders

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A state, where it came from, and the digest that names it."""

    state: KVState
    source: Source
    digest: str


class ModuleLibrary:
    """States of one model in one namespace.

    A state is looked up behind the prompt's own anchor first, then behind the beginning-of-sequence
    token alone, so that what was encoded before any template was known is found as well.
    """

    def __init__(self, lm: CausalLM, store: ModuleStore, namespace: str) -> None:
        self.lm = lm
        self._store = store
        self._ledger = Ledger()
        self._keys = KeySpace(
            lm.fingerprint, str(lm.dtype), namespace, model_name=lm.name, decode=lm.text.decode
        )

    @property
    def budget_bytes(self) -> int | None:
        """The store's budget; None without one."""
        return self._store.stats().budget_bytes

    @property
    def nbytes(self) -> int:
        """What the store holds, in bytes; 0 where it can't know."""
        return self._store.stats().nbytes or 0

    @property
    def _is_fixed(self) -> bool:
        return self.lm.support.kind == "fixed-positions"

    def key(self, anchor_ids: Sequence[int], passage: Passage, position: int) -> ModuleKey:
        """The key of a passage that is to stand at `position`."""
        fixed = position if self._is_fixed else None
        return self._keys.key(anchor_ids, passage.kept_ids, fixed, passage.shape)

    def encoding_position(self, anchor_tokens: int, position: int) -> int:
        """Where to encode what is to stand at `position`: there if it can't move later."""
        return position if self._is_fixed else anchor_tokens

    def can_encode(self, anchor_tokens: int, passage: Passage, position: int) -> bool:
        """Whether a passage with its gaps lies within the positions that the model knows."""
        if not passage.offsets:
            return True
        end = self.encoding_position(anchor_tokens, position) + passage.extent
        limit = self.lm.context_length
        return (limit is None or end <= limit) and not self.lm.support.is_beyond_stable(end)

    def contains(self, key: ModuleKey) -> bool:
        """Whether the store has it."""
        return self._store.contains(key)

    def find(self, keys: Sequence[ModuleKey]) -> Found | None:
        """The first state that is there and whole; a state that does not fit is dropped."""
        for key in keys:
            hit = self._store.get(key)
            if hit is None:
                continue
            try:
                hit.state.check(self.lm.stacks, self.lm.dtype)
                _check_identity(hit.state, key)
            except StateMismatchError as error:
                logger.warning("dropped a stored state: %s", error)
                self._store.delete(key)
                continue
            self._ledger.note(key)
            return Found(hit.state, hit.tier, key.digest)
        return None

    def drop(self, texts: Collection[tuple[int, ...]]) -> int:
        """Delete every state of these token sequences that can be known; returns how many.

        Those that this process met, those behind the beginning-of-sequence token, and those in
        folders, whoever wrote them.
        Raises: StoreError: a folder can't be read.
        """
        keys = set(find_in_folders(self._store, self._keys, texts))
        keys |= {key for ids in texts for key in self._ledger.take(ids)}
        keys |= {self.key(self.lm.text.bos_ids, Passage(ids), 0) for ids in texts}
        present = [key for key in keys if self._store.contains(key)]
        for key in present:
            self._store.delete(key)
        return len(present)

    def anchor(self, anchor_ids: Sequence[int]) -> Found | None:
        """The state of an anchor, encoded if it is new; None for an empty one."""
        if not anchor_ids:
            return None
        key = self.key((), Passage(tuple(anchor_ids)), 0)
        found = self.find([key])
        if found is None:
            found = self._keep(key, encode_anchor(self.lm, anchor_ids))
        return found

    def encode(
        self,
        anchor: Found | None,
        modules: Mapping[ModuleKey, Module],
    ) -> Iterator[tuple[ModuleKey, Found]]:
        """Encode modules behind the anchor and put them in the store; yields as they are made.

        A state that the store can't keep is still returned.
        """
        keys = {module: key for key, module in modules.items()}
        state = anchor.state if anchor else None
        for module, encoded in encode_modules(self.lm, state, list(keys)):
            yield keys[module], self._keep(keys[module], encoded)

    def _keep(self, key: ModuleKey, state: KVState) -> Found:
        if self._store.put(key, state):
            self._ledger.note(key)
        else:
            logger.info("a state of %d bytes does not fit the store", state.nbytes)
        return Found(state, "encoded", key.digest)


def _check_identity(state: KVState, key: ModuleKey) -> None:
    """Raises: StateMismatchError: the store gave the state of other tokens."""
    if state.token_ids != key.token_ids:
        raise StateMismatchError(
            f"the state holds other tokens than asked for ({state.num_tokens}, not "
            f"{len(key.token_ids)}, or other ids)"
        )
