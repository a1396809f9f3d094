"""The model's states: found in the store, checked, or encoded and put there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakValueDictionary

from pcache_core.errors import StateMismatchError
from pcache_core.kv.key import KeySpace, ModuleKey, ModuleTokens, PlannedState
from pcache_core.kv.sequence import KVSequence, Loan
from pcache_core.kv.state import KVState, StateSource
from pcache_core.library.encode import encode_modules
from pcache_core.library.preamble import Preamble, PreambleIds
from pcache_core.lm import CausalLM, place
from pcache_core.prompt import Passage
from pcache_core.report import Source
from pcache_core.store import ModuleStore, Opened, open_many
from pcache_core.store.base import ms_since
from pcache_core.store.inspect import find_stored
from pcache_core.threads import Flag, renew_in_child

logger = logging.getLogger(__name__)

_FEWEST_LENT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Loaded:
    """Where the states of a prompt came from, by digest, and what that took.

    load_ms: finding, reading and encoding. assemble_ms: copying and moving into place.
    shared_tokens: whose keys and values stay on loan, and nobody has a copy of.
    """

    sources: Mapping[str, Source]
    load_ms: float
    assemble_ms: float
    shared_tokens: int


_PreambleStates = dict[tuple[tuple[int, ...], tuple[int, ...]], KVState]


@dataclass(frozen=True, slots=True)
class _Names:
    """What states are called as long as the model's weights stay as they are.

    preambles: keys and values of preambles' parts, by the ids before them and their own.
    """

    weights: int
    keys: KeySpace
    preambles: _PreambleStates = field(default_factory=dict)


class ModuleLibrary:
    """States of one model in one namespace, each encoded after the preamble of its text."""

    def __init__(
        self, lm: CausalLM, store: ModuleStore, namespace: str, preamble: Preamble | None
    ) -> None:
        self.lm = lm
        self.preambles = PreambleIds(lm.text, lm.context_length, preamble)
        self.encoded_tokens, self.encode_ms = 0, 0.0  # since it was made
        self._store = store
        self.renew()
        renew_in_child(self)
        self._made: WeakValueDictionary[str, KVState] = WeakValueDictionary()
        self._namespace = namespace
        self._now = self._names()
        self._all_keys = {self._now.keys}  # also of weights that the model had before

    def renew(self) -> None:
        """Forget what others are encoding: in a forked child, nobody is."""
        self._lock = threading.Lock()
        self._encoding: dict[ModuleKey, Flag] = {}  # set when it is done, or given up

    def follow_weights(self) -> int:
        """From now on, name states by the model's weights as they are; return their version."""
        version = self.lm.weights_version
        if version != self._now.weights:
            self._now = self._names()
            self._all_keys.add(self._now.keys)
        return version

    def _names(self) -> _Names:
        lm = self.lm
        version = lm.weights_version
        keys = KeySpace(
            lm.fingerprint,
            str(lm.dtype),
            self._namespace,
            model_name=lm.name,
            decode=lm.text.decode,
        )
        return _Names(version, keys)

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

    def module(
        self, passage: Passage, text: str, position: int, *, is_first: bool
    ) -> ModuleTokens | None:
        """Say what the state of a passage is encoded after, and where.

        text: of the passage, which chooses the preamble's language. position: where the passage is
            to stand, for models whose states can't move.
        is_first: whether it is the first module of its prompt, which has no company.
        Returns: None where the passage does not fit after its preamble.
        """
        preamble_ids = self.preambles.opening if is_first else self.preambles.ids_for(text)
        if self._is_fixed:
            module = ModuleTokens(passage, preamble_ids[:position], position)
        else:
            module = ModuleTokens(passage, preamble_ids, len(preamble_ids))
        limit, end = self.lm.context_length, module.end
        fits = (limit is None or end <= limit) and not self.lm.support.is_beyond_stable(end)
        return module if fits else None

    def modules(self, passage: Passage, text: str, position: int) -> list[ModuleTokens]:
        """All states of a passage that a prompt may want: as its first module, and as a later one.

        Arguments as for `module`.
        """
        both = (self.module(passage, text, position, is_first=first) for first in (True, False))
        return list(dict.fromkeys(module for module in both if module is not None))

    def key(self, module: ModuleTokens) -> ModuleKey:
        """Name the state of a module."""
        passage = module.passage
        fixed = module.position if self._is_fixed else None
        return self._now.keys.key(module.preamble_ids, passage.kept_ids, fixed, passage.shape)

    def contains(self, key: ModuleKey) -> bool:
        """Return whether the store has it."""
        return self._store.contains(key)

    def load(self, states: Sequence[PlannedState], sequence: KVSequence, rows: int) -> Loaded:
        """Bring states into a sequence that is to hold `rows` rows; encode those that are missing.

        A state that is not in memory is read right into its rows, or into memory where it stays on
        loan: damage shows then, and what is damaged is encoded with the missing.
        """
        started = time.perf_counter()
        found = self._open(list(dict.fromkeys(planned.key for planned in states)))
        sources: dict[str, Source] = {}
        in_memory: dict[str, KVState] = {}
        for planned in states:
            stored = found.get(planned.key)
            if stored is None:
                continue
            sources[planned.key.digest] = stored.tier
            if not self._read(planned, stored, sequence, in_memory):
                del found[planned.key]
        missing = {s.key: s.module for s in states if s.key not in found}
        for key, state, source in self.encode(missing) if missing else ():
            in_memory[key.digest] = state
            sources[key.digest] = source
        load_ms = ms_since(started)
        started = time.perf_counter()
        shared_tokens = self._place_all(states, in_memory, sequence, rows)
        return Loaded(sources, load_ms, ms_since(started), shared_tokens)

    def encode(
        self, modules: Mapping[ModuleKey, ModuleTokens]
    ) -> Iterator[tuple[ModuleKey, KVState, Source]]:
        """Encode modules and put their states in the store; yield them as they are made.

        What another thread is encoding is waited for instead, and comes from memory. A state that
        the store can't keep is still returned.
        """
        done = Flag()
        try:
            with self._lock:
                encoding = {key: flag for key, flag in self._encoding.items() if not flag.is_set}
                others = {key: encoding[key] for key in modules if key in encoding}
                own = {key: module for key, module in modules.items() if key not in others}
                claimed = list(own)
                self._encoding = encoding | dict.fromkeys(claimed, done)
            for key in claimed:
                # Another request may have encoded it since it was looked up.
                state = self._made.get(key.digest)
                if state is not None and self._store.contains(key):
                    del own[key]
                    yield key, state, "memory"
            for key, state in self._encode(own):
                yield key, state, "encoded"
        finally:
            done.is_set = True
            done.set()
        for key, encoded in others.items():
            encoded.wait()
            state = self._made.get(key.digest) or self._find(key)
            if state is None:
                yield from self.encode({key: modules[key]})
            else:
                yield key, state, "memory"

    def drop(self, texts: Mapping[tuple[int, ...], str]) -> int:
        """Delete every state of these texts that can be known; return how many.

        texts: by their token ids. Known are those in memory and in folders, whoever made them, and
        elsewhere those after this library's own preambles.
        Raises: StoreError: a folder can't be read.
        """
        self.follow_weights()
        keys = {key for own in self._all_keys for key in find_stored(self._store, own, texts)}
        for token_ids, text in texts.items():
            keys |= {self.key(module) for module in self.modules(Passage(token_ids), text, 0)}
        present = [key for key in keys if self._store.contains(key)]
        for key in present:
            self._store.delete(key)
        return len(present)

    def clear(self) -> None:
        """Delete every state of this model and namespace in memory and in folders."""
        self._now.preambles.clear()
        for keys in self._all_keys:
            for key in list(find_stored(self._store, keys)):
                self._store.delete(key)

    def _open(self, keys: Sequence[ModuleKey]) -> dict[ModuleKey, Opened]:
        """Look states up together; those that are not what was asked for, the store drops."""
        pairs = zip(keys, open_many(self._store, keys), strict=True)
        return {key: stored for key, stored in pairs if stored and self._fits(key, stored)}

    def _fits(self, key: ModuleKey, stored: Opened) -> bool:
        try:
            stored.rows.check(self.lm.stacks, self.lm.dtype)
            if stored.rows.token_ids != key.token_ids:
                raise StateMismatchError(
                    f"the state holds other tokens than asked for ({stored.rows.num_tokens}, not "
                    f"{len(key.token_ids)}, or other ids)"
                )
        except StateMismatchError as error:
            logger.warning("dropped a stored state: %s", error)
            stored.settle(0.0, error)
            return False
        return True

    def _read(
        self,
        planned: PlannedState,
        stored: Opened,
        sequence: KVSequence,
        in_memory: dict[str, KVState],
    ) -> bool:
        """Read a state into its rows, or into memory if it is or may stay there.

        Returns: whether it was whole; the store drops what is damaged.
        """
        digest = planned.key.digest
        if stored.tier == "memory" or sequence.lender is not None:
            state = in_memory.get(digest) or (sequence.lender and sequence.lender.get(digest))
            if state:  # another of the prompt's documents, or another request, has it
                stored.settle(0.0, None)
            else:
                state = stored.whole()
            if state:
                in_memory[digest] = state
            return state is not None
        return stored.read(partial(self._place, planned, sequence)) is not None

    def _find(self, key: ModuleKey) -> KVState | None:
        stored = self._open([key]).get(key)
        return None if stored is None else stored.whole()

    def _place_all(
        self,
        states: Sequence[PlannedState],
        in_memory: Mapping[str, KVState],
        sequence: KVSequence,
        rows: int,
    ) -> int:
        """Lend or copy the states that are in memory; return how many tokens are on loan."""
        copied = []
        for planned in sorted(states, key=lambda planned: planned.start):
            state = in_memory.get(planned.key.digest)
            if state is None:
                continue  # it was read into its rows
            if sequence.lender is not None and _may_stay(planned, state, sequence):
                state = sequence.lender.setdefault(planned.key.digest, state)
                sequence.buffers.loans.append(Loan(state, planned.start, planned.position))
            else:
                copied.append((planned, state))
        sequence.reserve(rows)
        for planned, state in copied:
            self._place(planned, sequence, state)
        return sum(loan.state.num_tokens for loan in sequence.buffers.loans)

    def _place(self, planned: PlannedState, sequence: KVSequence, state: StateSource) -> bool:
        """Copy a state into its rows, moved to their positions.

        Raises: StateMismatchError: it was damaged where it is kept.
        """
        rotations = self.lm.support.rotations or (None,) * len(self.lm.layers)
        for part, row, position in _parts(planned, state):
            place(sequence.buffers, sequence.buffers.index(row), part, rotations, position)
        return True

    def _encode(
        self, modules: Mapping[ModuleKey, ModuleTokens]
    ) -> Iterator[tuple[ModuleKey, KVState]]:
        """Encode modules, those after the same preamble together.

        What was encoded while the weights changed has no right name and is not stored.
        """
        now = self._now
        by_preamble: dict[tuple[int, ...], dict[ModuleTokens, ModuleKey]] = {}
        for key, module in modules.items():
            by_preamble.setdefault(module.preamble_ids, {})[module] = key
        for preamble_ids, keys in by_preamble.items():
            preamble = self._preamble(preamble_ids, now.preambles)
            started = time.perf_counter()
            for module, state in encode_modules(self.lm, preamble, list(keys)):
                if state.keys[0].device.type != "cpu":
                    state.keys[0].flatten()[-1].item()  # wait until it is computed
                with self._lock:
                    self.encoded_tokens += module.num_tokens
                    self.encode_ms += ms_since(started)
                key = keys[module]
                if key.space != now.keys or self.lm.weights_version != now.weights:
                    logger.warning("weights changed during a request; a state was not stored")
                else:
                    self._made[key.digest] = state
                    if not self._store.put(key, state):
                        logger.info("a state of %d bytes does not fit the store", state.nbytes)
                yield key, state
                started = time.perf_counter()

    def _preamble(self, token_ids: tuple[int, ...], known: _PreambleStates) -> list[KVState]:
        """Keys and values of a preamble's opening and of its company, computed once a process.

        known: those that were computed before, to which these are added.
        """
        if not token_ids:
            return []
        opening_ids = self.preambles.opening
        opening = self._preamble_part((), opening_ids, known).part(0, len(token_ids), 0)
        if len(token_ids) <= len(opening_ids):
            return [opening]
        company_ids = token_ids[len(opening_ids) :]
        return [opening, self._preamble_part(opening_ids, company_ids, known)]

    def _preamble_part(
        self, before: tuple[int, ...], token_ids: tuple[int, ...], known: _PreambleStates
    ) -> KVState:
        state = known.get((before, token_ids))
        if state is None:
            module = ModuleTokens(Passage(token_ids), before, len(before))
            ((_, state),) = encode_modules(self.lm, self._preamble(before, known), [module])
            known[before, token_ids] = state
        return state


def _may_stay(planned: PlannedState, state: KVState, sequence: KVSequence) -> bool:
    """Return whether a state is one run of rows, long enough to be worth a product of its own."""
    return (
        not planned.is_opening
        and len(planned.runs) == 1
        and not planned.module.passage.shape
        and state.num_tokens >= _FEWEST_LENT_TOKENS
        and state.keys[0].device == sequence.buffers.positions.device
    )


def _parts(planned: PlannedState, rows: StateSource) -> Iterator[tuple[StateSource, int, int]]:
    """Yield a state's runs, each without a gap, with the first row and position of each."""
    passage = planned.module.passage
    if len(planned.runs) == 1:
        yield rows, planned.start, planned.position
        return
    state = rows.whole()
    # Where the tokens stood that are kept, the first of them where the state says.
    offsets = [passage.positions(0)[index] for index in passage.kept]
    first = state.position - offsets[0]
    done = 0
    for (start, stop), position in zip(planned.runs, planned.positions, strict=True):
        yield state.part(done, done + stop - start, first + offsets[done]), start, position
        done += stop - start
