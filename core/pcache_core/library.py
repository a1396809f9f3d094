"""The model's states: found in the store, checked, or encoded and put there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pcache_core.admission import Admission, Declined
from pcache_core.encode import Module, encode_modules
from pcache_core.errors import StateMismatchError
from pcache_core.key import KeySpace, ModuleKey
from pcache_core.kv import KVState, Rows
from pcache_core.ledger import Ledger
from pcache_core.lm import CausalLM
from pcache_core.passage import Passage
from pcache_core.report import Report, Source
from pcache_core.store import ModuleStore, Offer, Opened, open_many
from pcache_core.store.search import find_in_folders

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A state, where it came from, and the digest that names it.

    opened: how a store has it that was not read yet; None for a state in memory. opening_ms: what
        that took so far.
    """

    state: Rows
    source: Source
    digest: str
    opened: Opened | None = None
    opening_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """How much a library encoded since it was made."""

    tokens: int = 0
    elapsed_ms: float = 0.0


class ModuleLibrary:
    """States of one model in one namespace.

    A state is looked up behind the prompt's own anchor first, then behind the beginning-of-sequence
    token alone, so that what was encoded before any template was known is found as well.

    admission: decides which states are loaded and which are computed although they are there.
    """

    def __init__(
        self, lm: CausalLM, store: ModuleStore, namespace: str, admission: Admission
    ) -> None:
        self.lm = lm
        self.encoded = Encoded()
        self._store = store
        self._ledger = Ledger()
        self._admission = admission
        self._lock = threading.Lock()
        self._encoding: dict[ModuleKey, threading.Event] = {}
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

    def find_all(self, wishes: Sequence[Sequence[ModuleKey]]) -> list[Found | Declined | None]:
        """For each wish the state of the first of its keys that is there; none is read yet.

        The store is asked once for the first key of all wishes, then once for the second key of
        those that are still open. Declined: it is there, and computing it takes less.
        """
        found: list[Found | Declined | None] = [None] * len(wishes)
        for choice in range(max(map(len, wishes), default=0)):
            asked = {
                index: keys[choice]
                for index, keys in enumerate(wishes)
                if found[index] is None and choice < len(keys)
            }
            answers = self._open(list(dict.fromkeys(asked.values())))
            for index, key in asked.items():
                found[index] = answers.get(key)
        return found

    def read(self, found: Found, use: Callable[[Rows], None]) -> bool:
        """Let `use` read a state, once and whole; False if it was damaged, and is dropped."""
        if found.opened is None:
            use(found.state)
            return True
        started = time.perf_counter()
        error = None
        try:
            use(found.state)
        except StateMismatchError as mismatch:
            error = mismatch
        reading_ms = _ms_since(started)
        found.opened.settle(reading_ms, error)
        if error is None:
            opened = found.opened
            self._admission.loaded(opened.tier, opened.nbytes, found.opening_ms + reading_ms)
        return error is None

    def whole(self, found: Found) -> Found | None:
        """The same with its state in memory; None if it was damaged, and is dropped."""
        states: list[KVState] = []
        if not self.read(found, lambda rows: states.append(rows.whole())):
            return None
        return Found(states[0], found.source, found.digest)

    def _open(self, keys: Sequence[ModuleKey]) -> dict[ModuleKey, Found | Declined]:
        if not keys:
            return {}
        answers: dict[ModuleKey, Found | Declined] = {}

        def admits(offer: Offer) -> bool:
            declined = self._admission.declines(offer)
            if declined is not None:
                answers[offer.key] = declined
            return declined is None

        started = time.perf_counter()
        pairs = list(zip(keys, open_many(self._store, keys, admits), strict=True))
        elapsed_ms = _ms_since(started)
        to_read = sum(each.nbytes for _, each in pairs if each and each.tier != "memory")
        for key, opened in pairs:
            if opened is not None and self._fits(key, opened):
                share_ms = elapsed_ms * opened.nbytes / max(to_read, 1)
                answers[key] = _found(key, opened, share_ms)
        return answers

    def _fits(self, key: ModuleKey, opened: Opened) -> bool:
        """Whether it is what was asked for; if not, the store drops it."""
        try:
            opened.rows.check(self.lm.stacks, self.lm.dtype)
            _check_identity(opened.rows, key)
        except StateMismatchError as error:
            logger.warning("dropped a stored state: %s", error)
            opened.settle(0.0, error)
            return False
        self._ledger.note(key)
        return True

    def _find(self, key: ModuleKey) -> Found | None:
        """A state, read; also one that computing would take less time for."""
        (opened,) = open_many(self._store, [key], lambda offer: True)
        if opened is None or not self._fits(key, opened):
            return None
        return self.whole(_found(key, opened, 0.0))

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
        passage = Passage(tuple(anchor_ids))
        key = self.key((), passage, 0)
        found = self._find(key)
        if found is None:
            ((_, found),) = self.encode(None, {key: Module(passage, 0)})
        return found

    def encode(
        self,
        anchor: Found | None,
        modules: Mapping[ModuleKey, Module],
    ) -> Iterator[tuple[ModuleKey, Found]]:
        """Encode modules behind the anchor and put them in the store; yields as they are made.

        What another thread is encoding is waited for instead. A state that the store can't keep is
        still returned.
        """
        with self._lock:
            own = {key: module for key, module in modules.items() if key not in self._encoding}
            others = {key: self._encoding[key] for key in modules if key not in own}
            done = threading.Event()
            self._encoding.update(dict.fromkeys(own, done))
            claimed = list(own)
        try:
            for key in claimed:
                # Another request may have encoded it since it was looked up.
                found = self._find(key) if key in self._ledger else None
                if found is not None:
                    del own[key]
                    yield key, found
            yield from self._encode(anchor, own)
        finally:
            with self._lock:
                for key in claimed:
                    del self._encoding[key]
            done.set()
        for key, encoded in others.items():
            encoded.wait()
            found = self._find(key)
            if found is None:
                yield from self.encode(anchor, {key: modules[key]})
            else:
                yield key, found

    def _encode(
        self, anchor: Found | None, modules: Mapping[ModuleKey, Module]
    ) -> Iterator[tuple[ModuleKey, Found]]:
        keys = {module: key for key, module in modules.items()}
        state = anchor.state.whole() if anchor else None
        elapsed_ms, tokens = 0.0, 0
        started = time.perf_counter()
        for module, encoded in encode_modules(self.lm, state, list(keys)):
            if encoded.keys[0].device.type != "cpu":
                encoded.keys[0].flatten()[-1].item()  # wait until it is computed
            elapsed_ms += _ms_since(started)
            tokens += module.num_tokens
            yield keys[module], self._keep(keys[module], encoded)
            started = time.perf_counter()
        self._admission.computed(tokens, elapsed_ms)
        with self._lock:
            done = self.encoded
            self.encoded = Encoded(done.tokens + tokens, done.elapsed_ms + elapsed_ms)

    def learn(self, report: Report) -> None:
        """Note how fast the model computed a request's tokens."""
        elapsed_ms = report.prefill_ms
        if self.lm.device.type != "cpu":
            # Work was only asked for then; it is certain to be done when a token is there.
            if not report.generated_tokens:
                return
            elapsed_ms = max(elapsed_ms, report.ttft_ms - report.load_ms - report.assemble_ms)
        repaired = 0 if report.repair_ms else report.repaired_tokens  # else a forward of their own
        self._admission.computed(report.computed_tokens + repaired, elapsed_ms)

    def _keep(self, key: ModuleKey, state: KVState) -> Found:
        if self._store.put(key, state):
            self._ledger.note(key)
        else:
            logger.info("a state of %d bytes does not fit the store", state.nbytes)
        return Found(state, "encoded", key.digest)


def _found(key: ModuleKey, opened: Opened, opening_ms: float) -> Found:
    if opened.tier == "memory":
        opened.settle(0.0, None)
        return Found(opened.rows, "memory", key.digest)
    return Found(opened.rows, opened.tier, key.digest, opened, opening_ms)


def _check_identity(state: Rows, key: ModuleKey) -> None:
    """Raises: StateMismatchError: the store gave the state of other tokens."""
    if state.token_ids != key.token_ids:
        raise StateMismatchError(
            f"the state holds other tokens than asked for ({state.num_tokens}, not "
            f"{len(key.token_ids)}, or other ids)"
        )


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
