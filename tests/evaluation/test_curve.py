"""A plot of given rows: the same file for the same rows, and what it takes to draw one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pcache_core import OptionError
from pcache_core.evaluation.curve import check_plot, plot, sweep
from pcache_core.evaluation.data import Item, QuestionSet
from pcache_core.evaluation.table import Evaluation, Row

ROW = Row("fast", 0.6, 0.1, 0.5, 0.5, None, 0.5, 0.1, 0.2, 3.0, 200.0, 0.0, 20.0, 10.0, 12.0)
EVALUATION = Evaluation(
    "a model",
    QuestionSet("a made-up set", (Item("Who?", ("x",), ("x",)),), "whole"),
    (
        replace(ROW, reuse="off", cached_tokens=0.0, computed_tokens=220.0),
        ROW,
        replace(ROW, reuse="balanced", repaired_tokens=20.0),
        *(replace(ROW, reuse=way.name, repaired_tokens=5.0) for way in sweep()),
    ),
    answers=({},),
    layout="completion",
    max_tokens=8,
    shortened=0,
    unasked=0,
    environment={},
    notes=(),
)


def test_a_drawing_names_its_lines_and_marks_and_is_the_same_for_the_same_rows(
    tmp_path: Path,
) -> None:
    first, second, picture = (tmp_path / name for name in ("a.svg", "b.svg", "c.png"))
    for file in (first, second, picture):
        plot(EVALUATION, file)
    text = first.read_text("utf-8")
    for words in (
        "balanced",
        "fast",
        "off",
        "what the question attends to",
        "tokens computed again",
        "a made-up set",
        "divergence from off, nats",
        "TTFT p50, ms",
    ):
        assert words in text
    assert first.read_bytes() == second.read_bytes()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_drawing_needs_its_library_and_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="has no folder to go to"):
        check_plot(tmp_path / "none" / "curve.svg")
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(OptionError, match="can't be written"):
        plot(EVALUATION, tmp_path / "taken.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"pip install 'pcache-integrations\[eval\]'"):
        check_plot(tmp_path / "curve.svg")
