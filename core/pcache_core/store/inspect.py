"""Looking at a store's states, and clearing a folder of them, without a model."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from pcache_core.errors import OptionError, StateMismatchError, StoreError
from pcache_core.kv.key import KeySpace, ModuleKey
from pcache_core.store import serde
from pcache_core.store.base import ModuleStore
from pcache_core.store.disk import DiskStore
from pcache_core.store.folder import Entry, StateFolder, open_file
from pcache_core.store.memory import MemoryStore
from pcache_core.store.record import Record
from pcache_core.store.tiered import TieredStore


@dataclass(frozen=True, slots=True)
class StoredState:
    """Something in a store's folder.

    record: what its header says; None if it has none. The numbers after the header are not read:
        only `get` finds damage there.
    trouble: why there is no record: damage, another version, or that it is not a state at all.
    is_state: whether it is a state's file, whole or damaged; what is not is never removed.
    age_s: since it was written; without a record, since it was last used.
    idle_s: since it was last used.
    hits: look-ups it served, by any process; 999 means that many or more.
    """

    path: Path
    nbytes: int
    record: Record | None
    age_s: float
    idle_s: float
    hits: int
    trouble: str = ""
    is_state: bool = True


@dataclass(frozen=True, slots=True)
class Selection:
    """Which states; a field that is None selects any.

    model: its name as it was loaded, or the first characters (8 or more) of its fingerprint.
    document: the first words of the text, or the first characters (8 or more) of the key.
    older_than_s: seconds since it was written.
    A file whose header can't be read is selected by age alone, or by an empty selection.
    """

    model: str | None = None
    namespace: str | None = None
    document: str | None = None
    older_than_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("model", "namespace", "document"):
            if getattr(self, name) == "":
                raise OptionError(f"{name}='' would select everything; leave it out for that")
        if self.older_than_s is not None and self.older_than_s < 0:
            raise OptionError(f"older_than_s={self.older_than_s!r} must be 0 or more seconds")

    def covers(self, state: StoredState) -> bool:
        """Return whether the state is selected."""
        if self.older_than_s is not None and state.age_s < self.older_than_s:
            return False
        wanted = (self.model, self.namespace, self.document)
        record = state.record
        if record is None:
            return wanted == (None, None, None)
        return (
            (self.model is None or _is_model(self.model, record))
            and (self.namespace is None or self.namespace == record.namespace)
            and (self.document is None or _is_document(self.document, record))
        )


def stored_states(path: str | Path, selection: Selection | None = None) -> Iterator[StoredState]:
    """List what a folder holds, in no order. Only headers are read.

    Raises: StoreError: there is no such folder, or it can't be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise StoreError(
            f"there is no folder of states at {str(folder)!r}; give the one that store= names"
        )
    now_s = time.time()
    selection = selection or Selection()
    try:
        entries = list(StateFolder(folder).listing())
    except OSError as error:
        raise StoreError(f"{str(folder)!r} can't be read: {error.strerror or error}") from error
    for entry in entries:
        state = _read(entry, now_s)
        if state is not None and selection.covers(state):
            yield state


def clear_states(path: str | Path, selection: Selection) -> Sequence[StoredState]:
    """Remove the selected states; return those that are gone.

    A process that is using one keeps what it has loaded, in its memory tier as well.
    Raises: StoreError: the folder is not there, or states can't be removed; the others are.
    """
    folder = StateFolder(Path(path).expanduser())
    removed, failed = [], []
    for state in list(stored_states(path, selection)):
        if state.is_state:
            try:
                if folder.remove(state.path):
                    removed.append(state)
            except OSError as error:
                failed.append(f"{state.path.name} can't be removed: {error.strerror or error}")
    if failed:
        more = f" and {len(failed) - 1} more can't" if failed[1:] else ""
        raise StoreError(f"{failed[0]}{more}; {len(removed)} others were")
    return removed


def find_stored(
    store: ModuleStore, space: KeySpace, texts: Container[tuple[int, ...]] | None = None
) -> Iterator[ModuleKey]:
    """Find the states of these token sequences, or all, in a store's memory, queue and folders.

    They may have been written by any process, after any preamble: they say what they are. Servers
    are not searched. Reads every file's header once.

    Raises: StoreError: a folder can't be read.
    """
    for key in store.held_keys() if isinstance(store, MemoryStore | TieredStore) else ():
        if key.space == space and (texts is None or key.token_ids in texts):
            yield key
    if isinstance(store, TieredStore):
        for tier in store.tiers:
            yield from find_stored(tier, space, texts)
    elif isinstance(store, DiskStore) and store.path.is_dir():  # it may have been removed meanwhile
        for state in stored_states(
            store.path, Selection(model=space.model, namespace=space.namespace)
        ):
            record = state.record
            if record is not None and (texts is None or record.token_ids in texts):
                yield ModuleKey(record.digest, record.token_ids)


def _read(entry: Entry, now_s: float) -> StoredState | None:
    """Return None if the file went away meanwhile."""
    record, trouble = None, entry.trouble
    if not trouble:
        try:
            with open_file(entry.path) as file:
                record = serde.read_layout(serde.read_header(file), entry.nbytes).record
        except FileNotFoundError:
            return None
        except OSError as error:
            trouble = f"it can't be read: {error.strerror or error}"
        except StateMismatchError as error:
            trouble = str(error)
    idle_s = max(0.0, now_s - entry.used_us / 1e6)
    age_s = idle_s if record is None else max(0.0, now_s - record.created)
    return StoredState(
        entry.path, entry.nbytes, record, age_s, idle_s, entry.uses, trouble, not entry.trouble
    )


_MIN_DIGITS = 8


def _is_model(wanted: str, record: Record) -> bool:
    return wanted == record.model_name or _is_start(wanted, record.model)


def _is_document(wanted: str, record: Record) -> bool:
    words, text = _plain(wanted.rstrip("…")), _plain(record.text)
    by_text = bool(text) and (text.startswith(words) or words.startswith(text))
    return by_text or _is_start(wanted, record.digest)


def _plain(text: str) -> str:
    """Return a text's words, however they are spaced and their letters composed."""
    return " ".join(normalize("NFC", text.rstrip("\ufffd")).split())


def _is_start(wanted: str, digest: str) -> bool:
    return len(wanted) >= _MIN_DIGITS and digest.startswith(wanted)
