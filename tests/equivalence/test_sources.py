"""Whose documents the question attends to, and documents ranked by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest

import oracle
from pcache_core import CausalLM, Prompt, PromptCacheEngine, Report, SamplingParams, Segment
from pcache_core.errors import ContextLengthError, ModelError, PromptError
from subjects import BOAT, SECOND, Subject, make_subject

WATCHING = ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"]
OPENING = "Answer the question from the documents.\n\n"
DOCUMENTS = [
    "Shaltsoft is run by Tobias Brumpool. Shaltsoft is based in Primmouth.",
    "Monddyne operates from Widheim. Monddyne is known for its drills.",
    "Rhea Thaswright enjoys kayaking and works as a painter in Glidhaven.",
]
QUESTIONS = [
    "Where is Shaltsoft based?",
    "What is Monddyne known for?",
    "What does Rhea Thaswright do for fun?",
]


@pytest.fixture(scope="module", params=WATCHING)
def subject(request: pytest.FixtureRequest, tiny_lm: Callable[..., CausalLM]) -> Subject:
    return make_subject(request.param, 0, tiny_lm)


@pytest.fixture
def trained() -> PromptCacheEngine:
    return PromptCacheEngine(CausalLM.from_pretrained("builtin:tiny-rag"))


def test_a_segments_attention_is_the_models_own(subject: Subject) -> None:
    assert subject.engine().prefill(SECOND).report.documents == ()
    report = _assert_attention(subject, SECOND, oracle.asking(subject.rows(SECOND)))
    _assert_shares(report)


def _assert_attention(
    subject: Subject, prompt: Prompt, weights: tuple[dict[int, float], dict[int, float]]
) -> Report:
    report, rows = subject.engine().prefill(prompt, sources=True).report, subject.rows(prompt)
    paid = []
    for each in weights:
        by_place = oracle.attention_paid(subject.twin(), rows, each)
        places = iter(range(len(subject.lm.text.bos_ids), rows[-1].place + 1))
        paid.append(
            [sum(by_place[next(places)] for _ in range(s.num_tokens)) for s in report.segments]
        )
    documents = [i for i, s in enumerate(report.segments) if s.kind == "document"]
    ratio = sum(paid[0][i] for i in documents) / sum(paid[1][i] for i in documents)
    expected = [max(0.0, a - 0.5 * min(1.0, ratio) * r) for a, r in zip(*paid, strict=True)]
    shares = [segment.attention for segment in report.segments]
    assert shares == pytest.approx([own / sum(expected) for own in expected], rel=1e-3, abs=1e-6)
    return report


@pytest.mark.parametrize("mode", ["balanced", "high"])
def test_modes_that_repair_report_it_unasked(subject: Subject, mode: str) -> None:
    engine = subject.engine()
    chunks = list(engine.stream(SECOND, SamplingParams(max_tokens=2), reuse=mode))  # type: ignore[arg-type]
    assert chunks[-1].report is not None
    _assert_shares(chunks[-1].report)


@pytest.mark.parametrize("mode", ["off", "exact", "fast"])
def test_other_modes_report_it_when_asked(subject: Subject, mode: str) -> None:
    params = SamplingParams(max_tokens=1, sources=True)
    report = subject.engine().generate(SECOND, params, reuse=mode).report  # type: ignore[arg-type]
    assert report is not None
    _assert_shares(report)


def _assert_shares(report: Report) -> None:
    shares = [document.share for document in report.documents]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    attention = {s.name: s.attention for s in report.segments if s.kind == "document"}
    ordered = sorted(attention, key=lambda name: -(attention[name] or 0))
    assert [document.name for document in report.documents] == ordered


def test_a_templates_text_before_the_question_does_not_ask(subject: Subject) -> None:
    segments = [
        Segment("\n--\nSay: ", "literal"),
        Segment("Who?", "argument"),
        Segment("\nA:", "literal"),
    ]
    prompt = Prompt([*SECOND.segments[:-1], *segments])
    rows = subject.rows(prompt)
    behind = max(row.place for row in rows if row.role == "module") + 1
    asked = range(behind + subject.lm.count_tokens(segments[0].text), rows[-1].place + 1)
    reference = dict.fromkeys(range(behind, behind + 3), 1 / 3)
    _assert_attention(subject, prompt, (dict.fromkeys(asked, 1 / len(asked)), reference))


def test_a_prompt_that_differs_in_its_last_token_has_sources_of_its_own(
    trained: PromptCacheEngine,
) -> None:
    documents = [Segment(text + "\n\n", "document", text[:4]) for text in DOCUMENTS]
    asked = [
        trained.prefill(
            Prompt([Segment(OPENING, "literal"), *documents, Segment(text, "argument")]),
            "high",
            0.9,
        ).report
        for text in (QUESTIONS[1], QUESTIONS[1][:-1] + "!")
    ]
    assert asked[1].computed_tokens == 1
    assert asked[1].documents != asked[0].documents


@pytest.mark.parametrize("mode", ["balanced", "high"])
def test_the_same_prompt_again_has_the_same_sources(
    trained: PromptCacheEngine, mode: Literal["balanced", "high"]
) -> None:
    documents = [Segment(text + "\n\n", "document", text[:4]) for text in DOCUMENTS * 3]
    prompt = Prompt([Segment(OPENING, "literal"), *documents, Segment(QUESTIONS[1], "argument")])
    first, again = (trained.prefill(prompt, mode, 8).report for _ in range(2))
    assert again.computed_tokens == 1
    assert again.documents == first.documents
    other = Prompt([*prompt.segments[:-1], Segment(QUESTIONS[0], "argument")])
    assert trained.prefill(other, mode, 8).report.documents != first.documents


@pytest.mark.parametrize("index", range(3))
def test_the_document_that_answers_is_the_best(trained: PromptCacheEngine, index: int) -> None:
    scores = trained.rank(QUESTIONS[index], DOCUMENTS)
    assert max(scores) == scores[index]
    assert all(0 <= score <= 1 for score in scores)
    assert sum(scores) <= 1


def test_ranked_documents_are_encoded_once_and_serve_prompts(trained: PromptCacheEngine) -> None:
    trained.rank(QUESTIONS[0], DOCUMENTS)
    trained.rank(QUESTIONS[1], DOCUMENTS)
    assert trained.reports[-1].encoded_tokens == 0
    documents = [Segment(text, "document") for text in DOCUMENTS]
    prompt = Prompt([Segment(OPENING, "literal"), *documents, Segment(f"\n\n{QUESTIONS[2]}")])
    report = trained.generate(prompt, SamplingParams(max_tokens=1), reuse="fast").report
    assert report is not None
    assert {s.source for s in report.segments if s.kind == "document"} == {"memory"}


def test_more_documents_than_the_context_holds_are_ranked_in_parts(
    trained: PromptCacheEngine,
) -> None:
    others = [f"Firm number {number} sells lamps in the town of Widheim." for number in range(200)]
    scores = trained.rank(QUESTIONS[2], [*others, DOCUMENTS[2]])
    assert len(scores) == 201
    assert max(scores) == scores[200]
    sizes = [report.prompt_tokens for report in trained.reports]
    assert 1 < len(sizes) < 5
    assert max(sizes) < 1.5 * min(sizes)


def test_nothing_is_ranked_without_documents(trained: PromptCacheEngine) -> None:
    assert trained.rank(QUESTIONS[0], []) == []


@pytest.mark.parametrize(
    ("question", "documents", "message"),
    [
        ("", DOCUMENTS, "question must be a text that asks something, got ''"),
        (None, DOCUMENTS, "got None"),
        ("Who?", "one text", "put it in a list"),
        ("Who?", [BOAT], "got Segment"),
    ],
)
def test_what_cant_be_ranked_is_refused(
    trained: PromptCacheEngine, question: str, documents: list[str], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        trained.rank(question, documents)


def test_a_document_longer_than_the_context_is_refused(trained: PromptCacheEngine) -> None:
    with pytest.raises(ContextLengthError, match="holds 2048"):
        trained.rank("Who?", ["word " * 3000])


def test_a_model_that_does_not_show_its_attention_ranks_nothing(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    engine = PromptCacheEngine(tiny_lm("gptj", seed=0))
    with pytest.raises(ModelError, match="doesn't show its attention"):
        engine.rank("Who?", DOCUMENTS)
    with pytest.raises(ModelError):
        engine.rank("Who?", [])
    params = SamplingParams(max_tokens=1, sources=True)
    report = engine.generate(SECOND, params).report
    assert report is not None
    assert report.documents == ()
