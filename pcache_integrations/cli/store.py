"""`pcache inspect` and `pcache clear`: folders of states."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from pcache_core.errors import OptionError
from pcache_core.picture import shown
from pcache_integrations.cli.options import AsJson

if TYPE_CHECKING:
    from pcache_core.store.inspect import StoredState

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_MOST_HITS = 999

Folder = Annotated[Path, typer.Argument(help="The folder that a DiskStore was given.")]
Model = Annotated[
    str | None, typer.Option(help="Only this model's: its name, or how its fingerprint starts.")
]
Namespace = Annotated[str | None, typer.Option(help="Only this namespace's.")]
Document = Annotated[
    str | None, typer.Option(help="Only this document's: its first words, or its key's start.")
]
OlderThan = Annotated[
    str | None, typer.Option(help="Only what was written longer ago, such as 90s, 30m, 12h, 7d.")
]


def inspect(  # noqa: PLR0913 (one parameter an option)
    path: Folder,
    model: Model = None,
    namespace: Namespace = None,
    document: Document = None,
    older_than: OlderThan = None,
    limit: Annotated[int, typer.Option(min=1, help="States to show, latest used first.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List the states in a folder: text, tokens, bytes, age and hits."""
    from pcache_core.store.inspect import Selection, stored_states

    _check_folder(path)
    selection = Selection(model, namespace, document, _seconds(older_than))
    states = sorted(stored_states(path, selection), key=lambda state: state.idle_s)
    if as_json:
        for state in states[:limit]:
            print(json.dumps(_row(state)))
        return
    console = Console(highlight=False)
    for line in _table(states[:limit], console.width):
        console.print(Text(line, no_wrap=True))  # text of documents is never markup
    console.print(_summary(states) + _unshown(len(states), limit))


def clear(  # noqa: PLR0913 (one parameter an option)
    path: Folder,
    model: Model = None,
    namespace: Namespace = None,
    document: Document = None,
    older_than: OlderThan = None,
    everything: Annotated[bool, typer.Option("--all", help="Every state in the folder.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove states from a folder, by model, namespace, document or age."""
    from pcache_core.store.inspect import Selection, clear_states, stored_states

    _check_folder(path)
    selection = Selection(model, namespace, document, _seconds(older_than))
    if everything == (selection != Selection()):
        raise OptionError(
            "say which states: --model, --namespace, --document, --older-than, or --all alone"
        )
    states = [state for state in stored_states(path, selection) if state.is_state]
    if states and not yes:
        typer.confirm(f"Remove {_summary(states)}?", abort=True, err=as_json)
    removed = clear_states(path, selection)
    nbytes = sum(state.nbytes for state in removed)
    if as_json:
        print(json.dumps({"removed": len(removed), "bytes": nbytes}))
    else:
        print(f"removed {len(removed)} states, {decimal(nbytes)}")


def _check_folder(path: Path) -> None:
    if re.match(r"[a-z0-9]+:/", str(path)):  # a URL's second slash is gone from a path
        raise OptionError(
            f"{str(path)!r} is not a folder: inspect and clear work on folders. What a server "
            "keeps has names that begin with 'pcache:', and goes by its own time limits and tools"
        )


_NAMES = ("text", "model", "namespace")
_NUMBERS = ("tokens", "bytes", "age", "hits")
_MOST_MODEL, _MOST_NAMESPACE = 24, 16


def _table(states: Sequence[StoredState], width: int) -> Iterator[str]:
    """Lay out lines of `width` columns. Numbers stay whole, text is cut to what they leave."""
    rows = [(*_NAMES, *_NUMBERS), *map(_cells, states)]
    widest = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    numbers = widest[len(_NAMES) :]
    room = max(width - sum(numbers) - 2 * (len(widest) - 1), 3)
    model = min(widest[1], _MOST_MODEL, room // 3)
    namespace = min(widest[2], _MOST_NAMESPACE, room // 5 + 1)
    text = min(widest[0], room - model - namespace)
    for row in rows:
        if any(row[1 : len(_NAMES)]):
            names = "  ".join(map(_fitted, row, (text, model, namespace)))
        else:  # what is wrong with an entry takes all the room there is
            names = _fitted(row[0], text + model + namespace + 4)
        yield "  ".join((names, *map(str.rjust, row[len(_NAMES) :], numbers)))


def _cells(state: StoredState) -> tuple[str, ...]:
    record = state.record
    if record is None:
        what = "unreadable" if state.is_state else "not a state"
        names = (f"({what}) {state.path.name}: {state.trouble}", "", "")
        tokens = ""
    else:
        text = " ".join(record.text.split()) or record.digest[:16]
        names = (text, record.model_name or record.model[:12], record.namespace)
        tokens = str(len(record.token_ids))
    hits = f"{state.hits}+" if state.hits == _MOST_HITS else str(state.hits)
    own = (" ".join(shown(name).split()) for name in names)
    return (*own, tokens, decimal(state.nbytes), _age(state.age_s), hits)


def _fitted(text: str, columns: int) -> str:
    """Cut or fill a text to so many columns of a terminal, of which some letters take two."""
    if cell_len(text) > columns:
        text = set_cell_size(text, columns - 1) + "…"
    return text + " " * (columns - cell_len(text))


def _row(state: StoredState) -> dict[str, object]:
    record = state.record
    return {
        "key": record and record.digest,
        "text": record and record.text,
        "model": record and (record.model_name or record.model),
        "namespace": record and record.namespace,
        "storage": record and record.storage,
        "tokens": record and len(record.token_ids),
        "bytes": state.nbytes,
        "age_s": round(state.age_s, 3),
        "idle_s": round(state.idle_s, 3),
        "hits": state.hits,
        "path": str(state.path),
        "trouble": state.trouble or None,
    }


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise OptionError(
            f"--older-than {text!r} is not a length of time; use one like 90s, 30m, 12h, 7d, 4w"
        )
    return float(match[1]) * _UNITS[match[2]]


def _summary(found: Sequence[StoredState]) -> str:
    states = [state.nbytes for state in found if state.is_state]
    others = len(found) - len(states)
    text = f"{len(states)} states, {decimal(sum(states))}"
    return f"{text}; {others} entries that are not states" if others else text


def _unshown(states: int, limit: int) -> str:
    return f"; {limit} shown, --limit shows more" if states > limit else ""


def _age(seconds: float) -> str:
    for unit, length in reversed(_UNITS.items()):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
