"""The figures of an evaluation: a row for each reuse mode, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pcache_core.evaluation.data import Item, QuestionSet
from pcache_core.evaluation.metrics import contains, exact_match, rouge_l, token_f1
from pcache_core.evaluation.prompts import Layout
from pcache_core.evaluation.run import Outcome, Outcomes
from pcache_core.picture import shown

_MATCH = {
    "whole": "exact match compares whole answers, case and punctuation included",
    "normalised": "exact match compares after SQuAD's normalisation",
}
_HEADERS = (
    "con-\ntains", "\nempty", "exact\nmatch", "\nF1", "agree\noff", "gold\nNLL", "KL\nmean",
    "tokens\nreused", "re-\npaired", "TTFT\np50", "TTFT\np95",
)  # fmt: skip
_UNITS = (
    "contains: answers with the right one in them; scores, empty answers and agreement in percent",
    "gold NLL: of the right answer's tokens, and KL(off ‖ mode) of the next token: in nats",
    "tokens of a prompt; TTFT in ms; --json also has ROUGE-L, the largest KL and computed tokens",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One reuse mode, or one repair, over all questions.

    contains, exact_match, f1, rouge_l: means from 0 to 1; `contains` is the share of answers that
    hold a right one. agreement: the share of answers equal to those of `off`, letter by letter.
    empty: the share of answers without text. kl_mean, kl_max: of the first token of the answer from
    `off`, in nats. gold_nll: mean negative log likelihood of a token of the right answer, in nats;
    the mean over the questions. cached, repaired and computed tokens: means over the requests.
    rouge_l: None where the library for it is missing.
    """

    reuse: str
    contains: float
    empty: float
    exact_match: float
    f1: float
    rouge_l: float | None
    agreement: float
    kl_mean: float
    kl_max: float
    gold_nll: float
    cached_tokens: float
    repaired_tokens: float
    computed_tokens: float
    ttft_p50_ms: float
    ttft_p95_ms: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A finished evaluation: `print` it with rich, or take `as_json()`.

    questions: that were asked. answers: to each of them, by the rows' names. max_tokens: of an
    answer. shortened: questions that had to leave out documents to fit the model. unasked: how many
    more there were when it was interrupted. environment: hardware and versions. notes: what a
    reader has to know beside the figures.
    """

    model: str
    questions: QuestionSet
    rows: tuple[Row, ...]
    answers: tuple[dict[str, str], ...]
    layout: Layout
    max_tokens: int
    shortened: int
    unasked: int
    environment: dict[str, str | int]
    notes: tuple[str, ...]

    def as_json(self, show: int = 0) -> dict[str, Any]:
        """One object; shares from 0 to 1, times in milliseconds. show: how many answers to add."""
        return {
            "model": self.model,
            "set": self.questions.description,
            "seed": self.questions.seed,
            "questions": len(self.questions.items),
            "unasked": self.unasked,
            "layout": self.layout,
            "max_tokens": self.max_tokens,
            "match": self.questions.match,
            "guesser": self.questions.guesser,
            "shortened": self.shortened,
            "environment": self.environment,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
            "answers": [
                {"question": item.question, "expected": list(item.answers), "answers": answers}
                for item, answers in self._first(show)
            ],
        }

    def transcript(self, show: int) -> Text:
        """Return the answers to the first questions, as text to print."""
        text = Text()
        for item, answers in self._first(show):
            text.append(f"{shown(item.question)}\n", style="bold")
            text.append(f"  expected: {shown(' | '.join(item.answers))}\n", style="dim")
            for name, answer in answers.items():
                mark = ("✓", "green") if contains(answer, item.answers) else ("✗", "red")
                text.append_text(
                    Text.assemble("  ", mark, f" {name:9}{shown(answer.strip()) or '–'}\n")
                )
        return text

    def _first(self, count: int) -> Iterator[tuple[Item, dict[str, str]]]:
        return islice(zip(self.questions.items, self.answers, strict=True), count)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seed = "" if self.questions.seed is None else f", seed {self.questions.seed}"
        count = len(self.questions.items)
        asked_of = shown(f"{self.model}: {count} questions of {self.questions.description}{seed}")
        yield Text(f"{asked_of}\n")
        yield self._table()
        yield Text()
        if self.unasked:
            yield Text(f"interrupted: {self.unasked} more questions were not asked", style="bold")
        asked = "through the model's chat template" if self.layout == "chat" else "as plain text"
        for note in (*_UNITS, _MATCH[self.questions.match], f"asked {asked}", *self.notes):
            yield Text(shown(note), style="dim")
        versions = (f"{name} {value}" for name, value in self.environment.items())
        yield Text(shown(", ".join(versions)), style="dim")

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("\nreuse", no_wrap=True)
        for header in _HEADERS:
            table.add_column(header, justify="right", no_wrap=True)
        if self.questions.guesser is not None:
            table.add_row("guesser", "", "", _percent(self.questions.guesser))
        for row in self.rows:
            table.add_row(*_cells(row))
        return table


def summarise(
    questions: QuestionSet, outcomes: Sequence[Outcomes], names: Sequence[str]
) -> tuple[Row, ...]:
    """Return a row for each way of asking; `outcomes` are in the order of the questions."""
    return tuple(_row(name, questions, outcomes) for name in names)


def _row(name: str, questions: QuestionSet, outcomes: Sequence[Outcomes]) -> Row:
    def mean(figure: Callable[[Outcome], float]) -> float:
        return float(np.mean([figure(each[name]) for each in outcomes]))

    pairs = list(zip(questions.items, (each[name].answer for each in outcomes), strict=True))
    rouge = [rouge_l(answer, item.answers) for item, answer in pairs]
    ttft_ms = [each[name].report.ttft_ms for each in outcomes]
    return Row(
        reuse=name,
        contains=float(np.mean([contains(answer, item.answers) for item, answer in pairs])),
        empty=float(np.mean([not answer.strip() for _, answer in pairs])),
        exact_match=float(
            np.mean([exact_match(answer, item.answers, questions.match) for item, answer in pairs])
        ),
        f1=float(np.mean([token_f1(answer, item.answers) for item, answer in pairs])),
        rouge_l=_mean_of_known(rouge),
        agreement=float(np.mean([each[name].answer == each["off"].answer for each in outcomes])),
        kl_mean=mean(lambda outcome: outcome.kl),
        kl_max=max(each[name].kl for each in outcomes),
        gold_nll=mean(lambda outcome: outcome.gold_nll),
        cached_tokens=mean(lambda outcome: outcome.report.cached_tokens),
        repaired_tokens=mean(lambda outcome: outcome.report.repaired_tokens),
        computed_tokens=mean(lambda outcome: outcome.report.computed_tokens),
        ttft_p50_ms=float(np.percentile(ttft_ms, 50)),
        ttft_p95_ms=float(np.percentile(ttft_ms, 95)),
    )


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cells(row: Row) -> list[str]:
    return [
        row.reuse,
        *map(_percent, (row.contains, row.empty, row.exact_match, row.f1, row.agreement)),
        *map(_nats, (row.gold_nll, row.kl_mean)),
        *(f"{tokens:.0f}" for tokens in (row.cached_tokens, row.repaired_tokens)),
        *map(_ms, (row.ttft_p50_ms, row.ttft_p95_ms)),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _nats(figure: float) -> str:
    return f"{figure:.0e}" if 0 < figure < 0.001 else f"{figure:.3f}"


def _ms(time_ms: float) -> str:
    return f"{time_ms:.1f}" if time_ms < 100 else f"{time_ms:.0f}"
