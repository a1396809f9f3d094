"""Rows worked out by hand from answers and reports, and their two forms."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from pcache_core import Report
from pcache_core.evaluation.data import Item, QuestionSet
from pcache_core.evaluation.run import Outcome, Outcomes
from pcache_core.evaluation.table import Evaluation, summarise

QUESTIONS = QuestionSet(
    "a made-up set",
    (
        Item("Who?", ("x",), ("Ann Lee.",), guess=0.5),
        Item("Where?", ("x",), ("Rome.", "Roma."), guess=0.25),
        Item("When?", ("x",), ("1900.",), guess=0.0),
        Item("What?", ("x",), ("drills.",), guess=0.25),
    ),
    "whole",
    seed=3,
)


def outcome(
    answer: str, kl: float, counts: tuple[int, int, int], ttft_ms: float, gold_nll: float = 2.0
) -> Outcome:
    cached, repaired, computed = counts
    report = Report((), cached + computed, cached, 0, computed, "fast", ttft_ms=ttft_ms)
    report.repaired_tokens = repaired
    return Outcome(answer, kl, gold_nll, report)


OFF = [outcome(text, 0.0, (0, 0, 100), 50.0) for text in (" Ann Lee.", " Roma.", " 1900.", " x.")]
FAST = [
    outcome(" Ann Lee.", 0.1, (80, 8, 20), 10.0, 0.5),
    outcome(" roma", 0.3, (60, 0, 40), 20.0, 1.5),
    outcome(" ", 1.2, (70, 4, 30), 30.0, 2.5),
    outcome(" x.", 0.0, (90, 8, 10), 40.0, 4.5),
]
OUTCOMES: list[Outcomes] = [{"off": a, "fast": b} for a, b in zip(OFF, FAST, strict=True)]


@pytest.fixture
def evaluation() -> Evaluation:
    rows = summarise(QUESTIONS, OUTCOMES, ("off", "fast"))
    answers = tuple({name: each[name].answer for name in each} for each in OUTCOMES)
    return Evaluation(
        "a model", QUESTIONS, rows, answers, "chat", 32, 1, 0, {"device": "cpu"}, ("a note",)
    )


def test_rows_are_means_over_the_questions(evaluation: Evaluation) -> None:
    off, fast = evaluation.rows
    assert (off.exact_match, off.agreement, off.kl_max) == (0.75, 1.0, 0.0)
    assert (off.contains, off.empty, off.gold_nll) == (0.75, 0.0, 2.0)
    assert (fast.contains, fast.empty, fast.gold_nll) == (0.5, 0.25, 2.25)
    assert fast.exact_match == 0.25  # "roma" is another text
    assert fast.f1 == 0.5  # but not other words
    assert fast.rouge_l == pytest.approx(0.5)
    assert fast.agreement == 0.5
    assert fast.kl_mean == pytest.approx(0.4)
    assert fast.kl_max == 1.2
    assert (fast.cached_tokens, fast.repaired_tokens, fast.computed_tokens) == (75, 5, 25)
    assert fast.ttft_p50_ms == 25.0
    assert fast.ttft_p95_ms == pytest.approx(38.5)  # 95% of the way over three gaps of 10 ms


def test_json_has_the_published_keys(evaluation: Evaluation) -> None:
    figures = json.loads(json.dumps(evaluation.as_json(), allow_nan=False))
    assert {"model", "set", "seed", "questions", "guesser", "environment", "rows"} <= set(figures)
    assert (figures["questions"], figures["seed"], figures["guesser"]) == (4, 3, 0.25)
    assert [row["reuse"] for row in figures["rows"]] == ["off", "fast"]
    for row in figures["rows"]:
        assert set(row) == {
            "reuse", "contains", "empty", "exact_match", "f1", "rouge_l", "agreement", "kl_mean",
            "kl_max", "gold_nll", "cached_tokens", "repaired_tokens", "computed_tokens",
            "ttft_p50_ms", "ttft_p95_ms",
        }  # fmt: skip


def test_the_table_fits_eighty_columns_and_says_what_it_counts(evaluation: Evaluation) -> None:
    console = Console(width=80)
    with console.capture() as printed:
        console.print(evaluation)
    lines = printed.get().splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    assert rows["guesser"] == ["25.0"]
    fast = "50.0 25.0 25.0 50.0 50.0 2.250 0.400 75 5 25.0 38.5"
    assert rows["fast"] == fast.split()
    assert "asked through the model's chat template" in lines
    assert lines[0] == "a model: 4 questions of a made-up set, seed 3"
    assert "a note" in lines
    assert "…" not in "".join(lines)


def test_answers_are_printed_with_what_was_expected(evaluation: Evaluation) -> None:
    lines = evaluation.transcript(3).plain.splitlines()
    assert lines[4:8] == [
        "Where?",
        "  expected: Rome. | Roma.",
        "  ✓ off      Roma.",
        "  ✓ fast     roma",
    ]
    assert lines[8:] == ["When?", "  expected: 1900.", "  ✓ off      1900.", "  ✗ fast     –"]
    assert evaluation.as_json()["answers"] == []
    assert evaluation.as_json(show=1)["answers"] == [
        {
            "question": "Who?",
            "expected": ["Ann Lee."],
            "answers": {"off": " Ann Lee.", "fast": " Ann Lee."},
        }
    ]


def test_an_interrupted_one_says_how_many_were_not_asked(evaluation: Evaluation) -> None:
    console = Console(width=80)
    with console.capture() as printed:
        console.print(replace(evaluation, unasked=7))
    assert "interrupted: 7 more questions were not asked" in printed.get()
    assert "interrupted" not in str(evaluation.as_json())
