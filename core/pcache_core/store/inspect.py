"""Looking at a folder of states, and clearing it, without a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pcache_core.errors import OptionError, StateMismatchError, StoreError
from pcache_core.store import serde
from pcache_core.store.folder import Entry, StateFolder
from pcache_core.store.record import Record


@dataclass(frozen=True, slots=True)
class StoredState:
    """A file of a store.

    record: what its header says; None if it is damaged or of another version. The numbers behind
        the header are not read: only `get` finds damage there.
    age_s: since it was written; for a damaged file, since it was last used.
    idle_s: since it was last used.
    hits: look-ups it served, by any process; 999 means that many or more.
    """

    path: Path
    nbytes: int
    record: Record | None
    age_s: float
    idle_s: float
    hits: int


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
        """Whether the state is selected."""
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
    """The states in a folder, in no order. Only headers are read.

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
        for entry in StateFolder(folder).entries():
            state = _read(entry, now_s)
            if state is not None and selection.covers(state):
                yield state
    except OSError as error:
        raise StoreError(f"{str(folder)!r} can't be read: {error.strerror or error}") from error


def clear_states(path: str | Path, selection: Selection) -> Sequence[StoredState]:
    """Remove the selected states; returns those that are gone.

    A process that is using one keeps what it has loaded, in its memory tier as well.
    Raises: StoreError: the folder is not there, or a file can't be removed.
    """
    folder = StateFolder(Path(path).expanduser())
    removed = []
    for state in list(stored_states(path, selection)):
        try:
            if folder.remove(state.path):
                removed.append(state)
        except OSError as error:
            raise StoreError(
                f"{state.path.name} can't be removed: {error.strerror or error}; "
                f"{len(removed)} others were"
            ) from error
    return removed


def _read(entry: Entry, now_s: float) -> StoredState | None:
    """None if the file went away meanwhile."""
    try:
        with open(entry.path, "rb") as file:
            prefix = file.read(serde.PREFIX_BYTES)
            length = serde.header_nbytes(prefix)
            header = prefix + file.read(min(length, entry.nbytes) - len(prefix))
        record = serde.read_layout(header, entry.nbytes).record
    except FileNotFoundError:
        return None
    except StateMismatchError:
        record = None
    idle_s = max(0.0, now_s - entry.used_us / 1e6)
    age_s = idle_s if record is None else max(0.0, now_s - record.created)
    return StoredState(entry.path, entry.nbytes, record, age_s, idle_s, entry.uses)


_MIN_DIGITS = 8


def _is_model(wanted: str, record: Record) -> bool:
    return wanted == record.model_name or _is_start(wanted, record.model)


def _is_document(wanted: str, record: Record) -> bool:
    words, text = wanted.strip(), record.text.strip()
    by_text = bool(text) and (text.startswith(words) or words.startswith(text))
    return by_text or _is_start(wanted, record.digest)


def _is_start(wanted: str, digest: str) -> bool:
    return len(wanted) >= _MIN_DIGITS and digest.startswith(wanted)
