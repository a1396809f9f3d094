"""Looking at a folder of states and clearing it, as a library and from the command line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pcache_core import DiskStore, OptionError, StoreError
from pcache_core.kv.key import KeySpace
from pcache_core.store.inspect import Selection, clear_states, stored_states
from pcache_integrations.cli import app
from stored_states import SPACE, make

OTHER_MODEL = KeySpace("b" * 64, "torch.float32", "default", model_name="other/model")
TENANT = KeySpace(SPACE.model, "torch.float32", "tenant", model_name="random")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three readable states and one that is not."""
    store = DiskStore(tmp_path)
    store.put(*make(1, 2, 3))
    store.put(*make(4, 5, space=OTHER_MODEL))
    store.put(*make(6, 7, 8, 9, space=TENANT))
    for _ in range(3):
        store.get(make(1, 2, 3)[0])
    broken = tmp_path / "ff" / ("f" * 64 + ".safetensors")
    broken.parent.mkdir()
    broken.write_bytes(b"broken")
    return tmp_path


def tokens(folder: Path, selection: Selection) -> list[int]:
    found = stored_states(folder, selection)
    return sorted(len(state.record.token_ids) if state.record else 0 for state in found)


def test_every_file_is_listed_with_what_its_header_says(folder: Path) -> None:
    states = {state.path.stem: state for state in stored_states(folder)}
    assert len(states) == 4
    state = states[make(1, 2, 3)[0].digest]
    assert state.record is not None
    assert state.record.text == "w1 w2 w3"
    assert (state.record.model_name, state.record.namespace) == ("random", "default")
    assert state.nbytes == state.path.stat().st_size
    assert state.hits == 3
    assert 0 <= state.idle_s <= state.age_s + 1 < 30
    assert states["f" * 64].record is None


def test_hits_stop_counting_at_999(folder: Path) -> None:
    key, _ = make(1, 2, 3)
    (path,) = folder.rglob(f"{key.digest}*")
    stamp = path.stat().st_mtime_ns // 1000 * 1000
    os.utime(path, ns=(stamp, stamp + 998))
    for _ in range(3):
        DiskStore(folder).get(key)
    (state,) = stored_states(folder, Selection(document=key.digest))
    assert state.hits == 999


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), [0, 2, 3, 4]),
        (Selection(model="random"), [3, 4]),
        (Selection(model="b" * 12), [2]),
        (Selection(model="b"), []),
        (Selection(namespace="tenant"), [4]),
        (Selection(model="random", namespace="default"), [3]),
        (Selection(document="w1 w2"), [3]),
        (Selection(document="w1 w2 w3 and a great deal more"), [3]),
        (Selection(document="w2"), []),
        (Selection(document=make(1, 2, 3)[0].digest[:10]), [3]),
        (Selection(older_than_s=3600), []),
        (Selection(older_than_s=0), [0, 2, 3, 4]),
    ],
)
def test_a_selection_holds_what_it_says(
    folder: Path, selection: Selection, expected: list[int]
) -> None:
    assert tokens(folder, selection) == expected
    removed = clear_states(folder, selection)
    assert len(removed) == len(expected)
    assert len(tokens(folder, Selection())) == 4 - len(expected)


def test_age_is_since_the_writing_not_the_last_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(time, "time_ns", lambda: int(later * 1e9))
    DiskStore(folder).get(make(1, 2, 3)[0])
    (state,) = stored_states(folder, Selection(document="w1 w2 w3"))
    assert state.idle_s < 60 < 7000 < state.age_s


def test_an_empty_word_or_a_negative_age_is_refused() -> None:
    for name in ("model", "namespace", "document"):
        with pytest.raises(OptionError, match="would select everything"):
            Selection(**{name: ""})
    with pytest.raises(OptionError, match="older_than_s"):
        Selection(older_than_s=-1)


def test_no_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no folder of states"):
        list(stored_states(tmp_path / "nowhere"))


# --- the command line ---------------------------------------------------------------------------


def run(*arguments: str, answer: str | None = None) -> tuple[int, str]:
    environment = {"COLUMNS": "160", "TERM": "dumb"}
    result = CliRunner().invoke(app, list(arguments), input=answer, env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_inspect_draws_a_table(folder: Path) -> None:
    code, output = run("inspect", str(folder))
    assert code == 0
    row = next(line for line in output.splitlines() if "w1 w2 w3" in line)
    assert row.split()[3:6] == ["random", "default", "3"]
    assert row.split()[-1] == "3"
    assert "(unreadable)" in output
    assert "4 states" in output


def test_inspect_speaks_json(folder: Path) -> None:
    code, output = run("inspect", str(folder), "--json", "--namespace", "tenant")
    assert code == 0
    (row,) = map(json.loads, output.splitlines())
    assert (row["tokens"], row["namespace"], row["hits"]) == (4, "tenant", 0)


def test_text_of_documents_is_not_taken_for_markup(tmp_path: Path) -> None:
    space = KeySpace("c" * 64, "d", "n", decode=lambda ids: "[bold]not bold[/] \n[/red] x")
    DiskStore(tmp_path).put(*make(1, 2, space=space))
    assert "[bold]not bold[/] [/red] x" in run("inspect", str(tmp_path))[1]


def test_clear_asks_and_says_what_it_did(folder: Path) -> None:
    code, _ = run("clear", str(folder), "--model", "random", answer="n\n")
    assert code == 1
    assert len(tokens(folder, Selection())) == 4
    code, output = run("clear", str(folder), "--model", "random", answer="y\n")
    assert code == 0
    assert "removed 2 states" in output
    assert tokens(folder, Selection()) == [0, 2]
    assert "removed 2 states" in run("clear", str(folder), "--all", "--yes")[1]


def test_clear_wants_to_know_what(folder: Path) -> None:
    for arguments in ((), ("--all", "--model", "random")):
        with pytest.raises(OptionError, match="which states"):
            run("clear", str(folder), "--yes", *arguments)
    with pytest.raises(OptionError, match="not a length of time"):
        run("clear", str(folder), "--yes", "--older-than", "soon")
    assert len(tokens(folder, Selection())) == 4
