"""Nothing that a document, a model or a file is called reaches a terminal as a control sequence."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from pcache_core import DiskStore, Report
from pcache_core.evaluation.data import Item, QuestionSet
from pcache_core.evaluation.table import Evaluation
from pcache_core.kv.key import KeySpace
from pcache_core.picture import shown
from pcache_core.report import SegmentReport
from pcache_integrations.cli.commands import app, main
from stored_states import make

EVIL = "\x1b]0;owned\x07\x1b[2Ja\rb\x9b31m\u202egnp.exe\u2066x\u2069\x7f"
CONTROLS = [*map(chr, range(10)), *map(chr, range(11, 32)), "\x7f", *map(chr, range(0x80, 0xA0))]
CONTROLS += [
    "\u202a",
    "\u202b",
    "\u202c",
    "\u202d",
    "\u202e",
    "\u2066",
    "\u2067",
    "\u2068",
    "\u2069",
]


def controls_in(text: str) -> list[str]:
    return [character for character in CONTROLS if character in text]


def store(folder: Path, text: str, model: str = "a/model", namespace: str = "default") -> None:
    space = KeySpace("c" * 64, "d", namespace, model_name=model, decode=lambda ids: text)
    DiskStore(folder).put(*make(*range(1, 40), space=space))


def inspect(folder: Path, *options: str, columns: int = 80) -> str:
    result = CliRunner().invoke(
        app, ["inspect", str(folder), *options], env={"COLUMNS": str(columns), "TERM": "dumb"}
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_every_control_character_is_shown_as_another() -> None:
    text = "".join(CONTROLS) + "\ud800" + "plain\ttext\n"
    assert controls_in(shown(text)) == ["\t"]
    assert shown(text).endswith("plain\ttext\n")
    shown(text).encode()


def test_inspect_prints_none(tmp_path: Path) -> None:
    store(tmp_path, EVIL, EVIL)
    (tmp_path / ("x" + EVIL)).write_text("a file with such a name")
    (tmp_path / os.fsdecode(b"not-utf8-\xff")).write_text("and one without")
    output = inspect(tmp_path)
    assert controls_in(output) == []
    assert "owned" in output
    assert "not-utf8" in output
    assert "\ufffd: it has not" in output
    (row, *_) = (json.loads(line) for line in inspect(tmp_path, "--json").splitlines())
    assert json.loads(json.dumps(row)) == row


def test_what_an_evaluation_prints_has_none() -> None:
    items = (Item(EVIL, (EVIL,), (EVIL,)),)
    questions = QuestionSet(EVIL, items, "whole")
    done = Evaluation(
        EVIL, questions, (), ({"off": EVIL},), "completion", 1, 0, 0, {"cpu": EVIL}, (EVIL,)
    )
    console = Console(color_system=None, width=120)
    with console.capture() as capture:
        console.print(done.transcript(1))
        console.print(done)
    assert controls_in(capture.get()) == []
    assert "owned" in capture.get()


def test_a_report_prints_none() -> None:
    parts = (SegmentReport("document", EVIL, EVIL, 3, "memory"),)
    assert controls_in(str(Report(parts, 3, 3, 0, 0, "fast", fallback_reason=EVIL))) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", EVIL],
        ["clear", EVIL, "--all"],
        ["schema", EVIL],
        ["encode", EVIL, "--store", "x"],
        ["eval", "--data", EVIL],
        ["eval", "--model", "./" + EVIL],
        ["demo", "--model", "./" + EVIL],
    ],
)
def test_an_error_that_quotes_what_was_given_prints_none(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pcache", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "owned" in said.err
    assert controls_in(said.out + said.err) == []


# --- the table ----------------------------------------------------------------------------------

TEXTS = {
    "latin": "The quick brown fox jumps over the lazy dog and runs far away from everything. " * 3,
    "chinese": "\u6587\u4e66\u7684\u5185\u5bb9" * 30,
    "arabic": "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643\u0645 " * 20,
    "emoji": "\U0001f41d" * 60,
}


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("language", TEXTS)
def test_lines_fit_and_numbers_are_whole(tmp_path: Path, language: str, columns: int) -> None:
    store(tmp_path, TEXTS[language], "some-organisation/a-model-with-a-very-long-name-7b-instruct")
    store(tmp_path, "short", "b", "a-namespace-that-is-long-as-well")
    (folder,) = {path.parent.parent for path in tmp_path.rglob("*.safetensors")}
    lines = inspect(folder, columns=columns).splitlines()
    assert max(map(cell_len, lines)) <= columns
    assert len(lines) == 4, "a line a state, the head and the sum"
    for line in lines[1:3]:
        tokens, number, unit, age, age_unit, hits = line.split()[-6:]
        assert (tokens, hits) == ("39", "0")
        assert float(number) > 1
        assert unit == "kB"
        assert (int(age) < 60, age_unit) == (True, "s")
    assert len({cell_len(line) for line in lines[:3]}) == 1, "columns stand below each other"


@pytest.mark.parametrize("language", TEXTS)
def test_a_document_is_found_by_its_text_as_it_is_shown(tmp_path: Path, language: str) -> None:
    text = TEXTS[language]
    store(tmp_path, text.replace(" ", "\n", 2))
    found = json.loads(inspect(tmp_path, "--json", "--document", text[:11]))
    assert found["tokens"] == 39
    shown_text = inspect(tmp_path, columns=90).splitlines()[1].partition("  ")[0]
    assert shown_text.endswith("\u2026")
    for words in (text, shown_text):
        assert json.loads(inspect(tmp_path, "--json", "--document", words)) == found | {
            "age_s": pytest.approx(found["age_s"], abs=30),
            "idle_s": pytest.approx(found["idle_s"], abs=30),
        }
    assert inspect(tmp_path, "--json", "--document", f"x{text[:11]}") == ""


def test_a_document_is_found_however_its_letters_are_composed(tmp_path: Path) -> None:
    store(tmp_path, "Zu\u0308rich liegt am See")
    assert inspect(tmp_path, "--json", "--document", "Z\u00fcrich liegt") != ""


def test_a_text_that_ends_inside_a_character_is_found(tmp_path: Path) -> None:
    store(tmp_path, "\u6587\u4e66\ufffd")
    assert inspect(tmp_path, "--json", "--document", "\u6587\u4e66\u7684\u5185") != ""
