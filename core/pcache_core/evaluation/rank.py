"""Documents ranked by attention and by BM25, and answers from the best: `pcache eval --rank`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import bm25s
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from pcache_core.engine import PromptCacheEngine
from pcache_core.errors import OptionError
from pcache_core.evaluation.data import Item, QuestionSet
from pcache_core.evaluation.metrics import contains
from pcache_core.evaluation.prompts import Layout, fit
from pcache_core.lm import CausalLM
from pcache_core.params import SamplingParams
from pcache_core.picture import shown

_ATTENTION, _BM25, _ALL = "attention", "BM25", "all documents"
_EXPLAINED = (
    "first, among 3: questions for which a document that holds the answer is ranked so, in percent",
    "contains: answers from the kept documents with the right one in them, in percent",
    "rank: time to rank, TTFT: time to the answer's first token; medians, all documents known",
)


@dataclass(frozen=True, slots=True)
class RankRow:
    """One way to choose documents, over all questions.

    documents: how many an answer is given from. first, among_three: the share of questions for
    which a document with the right answer in it is the first, or one of the first three; None where
    nothing is ranked. contains: the share of answers that hold the right one.
    rank_p50_ms: to rank the documents; ttft_p50_ms: to the answer's first token; medians.
    """

    ranking: str
    documents: int
    first: float | None
    among_three: float | None
    contains: float
    rank_p50_ms: float
    ttft_p50_ms: float


@dataclass(frozen=True, slots=True)
class RankEvaluation:
    """A finished evaluation: `print` it with rich, or take `as_json()`.

    left_out: questions whose answer none of their documents holds.
    """

    model: str
    set_description: str
    questions: int
    left_out: int
    rows: tuple[RankRow, ...]

    def as_json(self) -> dict[str, Any]:
        """One object; shares from 0 to 1, times in milliseconds."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        asked_of = f"{self.model}: {self.questions} questions of {self.set_description}"
        yield Text(shown(f"{asked_of}, documents ranked\n"))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("ranking", no_wrap=True)
        for header in ("documents", "first", "among 3", "contains", "rank ms", "TTFT ms"):
            table.add_column(header, justify="right", no_wrap=True)
        for row in self.rows:
            ranked = ["" if s is None else f"{100 * s:.1f}" for s in (row.first, row.among_three)]
            times = [f"{time_ms:.0f}" if time_ms else "" for time_ms in (row.rank_p50_ms,)]
            answered = f"{100 * row.contains:.1f}"
            documents = str(row.documents)
            table.add_row(
                row.ranking, documents, *ranked, answered, *times, f"{row.ttft_p50_ms:.0f}"
            )
        yield table
        yield Text()
        left_out = f"{self.left_out} questions left out: no document of theirs holds the answer"
        for note in (*_EXPLAINED, *([left_out] if self.left_out else [])):
            yield Text(note, style="dim")


@dataclass(frozen=True, slots=True)
class _Ranked:
    """One question's documents in one order. place: of the best that holds the answer, from 0."""

    place: int
    is_right: float
    rank_ms: float
    ttft_ms: float


def evaluate_ranking(
    lm: CausalLM,
    questions: QuestionSet,
    *,
    keep: int = 8,
    layout: Layout | None = None,
    max_tokens: int = 32,
) -> RankEvaluation:
    """Rank each question's documents, and answer from the best `keep` and from all of them.

    The kept documents stand in the prompt in the order that they have in the set, so that the
    choice alone differs. Answers are greedy, in the default mode; all documents are encoded ahead.

    Raises: OptionError: keep is less than 1; no document of any question holds its answer.
        ModelError: the model's attention can't be observed.
    """
    if keep < 1:
        raise OptionError(f"keep={keep} is out of range; keep 1 document or more")
    if layout is None:
        layout = "chat" if lm.text.marks_roles() else "completion"
    items = [item for item in questions.items if any(_holding(item))]
    if not items:
        raise OptionError(
            f"no document of {questions.description} holds the answer to its question, so that "
            "there is no right one to rank first; choose another set"
        )
    engine = PromptCacheEngine(lm)
    outcomes: dict[str, list[_Ranked]] = {_ATTENTION: [], _BM25: [], _ALL: []}
    for item in tqdm(items, desc="questions", disable=None):
        engine.encode(list(item.contexts), progress=False)
        for ranking, results in outcomes.items():
            started = time.perf_counter()
            order = _order(engine, ranking, item)
            rank_ms = 1000 * (time.perf_counter() - started) if ranking != _ALL else 0.0
            kept = order if ranking == _ALL else sorted(order[:keep])
            chosen = Item(item.question, tuple(item.contexts[i] for i in kept), item.answers)
            prompt = fit(engine, chosen, layout, max_tokens).prompt
            answer = engine.generate(prompt, SamplingParams(max_tokens=max_tokens, stop=["\n"]))
            holding = list(_holding(item))
            place = next(place for place, index in enumerate(order) if holding[index])
            right = contains(answer.text, item.answers)
            results.append(_Ranked(place, right, rank_ms, answer.report.ttft_ms))
    rows = tuple(_row(ranking, results, items, keep) for ranking, results in outcomes.items())
    left_out = len(questions.items) - len(items)
    return RankEvaluation(lm.name, questions.description, len(items), left_out, rows)


def _holding(item: Item) -> Iterator[bool]:
    """Whether each document holds a right answer."""
    return (bool(contains(text, item.answers)) for text in item.contexts)


def _order(engine: PromptCacheEngine, ranking: str, item: Item) -> list[int]:
    """Return the documents' indices, the best first."""
    indices = list(range(len(item.contexts)))
    if ranking == _ALL:
        return indices
    attended = ranking == _ATTENTION
    scores = engine.rank(item.question, item.contexts) if attended else _bm25(item)
    return sorted(indices, key=scores.__getitem__, reverse=True)


def _bm25(item: Item) -> Sequence[float]:
    """Score an item's documents by the words that they share with the question."""
    index = bm25s.BM25()
    index.index(_words(list(item.contexts)), show_progress=False)
    asked = _words([item.question], return_ids=False)[0]
    return list(index.get_scores(asked))


def _words(texts: list[str], *, return_ids: bool = True) -> Any:
    return bm25s.tokenize(texts, stopwords="en", return_ids=return_ids, show_progress=False)


def _row(ranking: str, results: Sequence[_Ranked], items: Sequence[Item], keep: int) -> RankRow:
    most = max(len(item.contexts) for item in items)
    is_ranked = ranking != _ALL
    return RankRow(
        ranking=ranking,
        documents=min(keep, most) if is_ranked else most,
        first=fmean(each.place == 0 for each in results) if is_ranked else None,
        among_three=fmean(each.place < 3 for each in results) if is_ranked else None,
        contains=fmean(each.is_right for each in results),
        rank_p50_ms=median(each.rank_ms for each in results),
        ttft_p50_ms=median(each.ttft_ms for each in results),
    )
