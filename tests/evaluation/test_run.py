"""Every mode meets every question under the same conditions, and `exact` is `off`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pcache_core import CausalLM, OptionError, PromptCacheEngine, SamplingParams
from pcache_core.evaluation.data import Item, QuestionSet, WorldOptions, tiny_world
from pcache_core.evaluation.evaluate import evaluate
from pcache_core.evaluation.prompts import make_prompt
from pcache_core.evaluation.run import Outcomes, Way, measure
from pcache_core.params import REUSE_MODES


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return CausalLM.from_pretrained("builtin:tiny-rag")


@pytest.fixture(scope="module")
def outcomes(lm: CausalLM) -> list[Outcomes]:
    engine = PromptCacheEngine(lm)
    # The first question twice: what was asked before must not serve what is asked now.
    items = tiny_world(WorldOptions(split=True), 4).items
    prompts = [
        make_prompt(engine, item.question, item.contexts, "completion")
        for item in (items[0], *items)
    ]
    ways = [Way(mode, mode) for mode in REUSE_MODES]
    return list(measure(lm, prompts, ways, SamplingParams(max_tokens=16, stop=["\n"])))


def test_exact_is_off_to_the_last_digit(outcomes: list[Outcomes]) -> None:
    for each in outcomes:
        assert each["exact"].answer == each["off"].answer
        assert each["exact"].kl == 0


def test_no_request_continues_another_and_no_state_is_encoded_while_the_clock_runs(
    outcomes: list[Outcomes],
) -> None:
    for each in outcomes:
        assert tuple(sorted(each)) == tuple(sorted(REUSE_MODES))
        for mode, outcome in each.items():
            report = outcome.report
            assert (report.reuse, report.encoded_tokens) == (mode, 0)
            assert report.cached_tokens + report.computed_tokens == report.prompt_tokens
            assert "prefix" not in {segment.source for segment in report.segments}
            assert report.ttft_ms > 0
        assert each["off"].report.cached_tokens == each["exact"].report.cached_tokens == 0
        cached = {each[mode].report.cached_tokens for mode in REUSE_MODES[2:]}
        assert len(cached) == 1
        assert min(cached) > each["off"].report.prompt_tokens / 2


def test_reuse_without_repair_moves_the_first_token(outcomes: list[Outcomes]) -> None:
    assert max(each["fast"].kl for each in outcomes) > 0.01


def test_the_order_of_the_modes_changes_from_question_to_question(
    outcomes: list[Outcomes],
) -> None:
    first = [next(iter(each)) for each in outcomes]
    assert set(first) == set(REUSE_MODES)


def test_off_is_always_asked_and_the_guesser_is_the_mean_chance(lm: CausalLM) -> None:
    questions = tiny_world(WorldOptions(documents=4, seed=5), 3)
    result = evaluate(lm, questions, modes=["fast"], max_tokens=8)
    assert [row.reuse for row in result.rows] == ["off", "fast"]
    expected = sum(item.guess or 0 for item in questions.items) / 3
    assert result.as_json()["guesser"] == pytest.approx(expected)


def test_what_had_to_be_left_out_is_said(tiny_lm: Callable[..., CausalLM]) -> None:
    items = (Item("Who?", ("a" * 90,) * 9, ("x",)), Item("Who?", ("b" * 90,), ("x",)))
    questions = QuestionSet("made up", items, "normalised")
    result = evaluate(tiny_lm(), questions, modes=["off"], max_tokens=4)
    assert result.shortened == result.as_json()["shortened"] == 1
    assert "1 of 2 questions left out 5 documents" in " ".join(result.notes)


def test_a_model_that_can_not_reuse_says_so(tiny_lm: Callable[..., CausalLM]) -> None:
    with pytest.warns(UserWarning, match="can't be reused"):
        lm = tiny_lm("mamba")
    questions = QuestionSet("made up", (Item("Who?", ("Ann is here.",), ("x",)),), "normalised")
    result = evaluate(lm, questions, modes=["fast"], max_tokens=4)
    assert result.rows[1].agreement == 1
    assert any(note.startswith("fast fell back for 1 of 1 questions: ") for note in result.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": 3}, "hops=3"),
        ({"hops": 2, "split": True}, "hops=2 and split are sets of their own"),
        ({"absent": True, "split": True}, "split and absent"),
        ({"documents": 0}, "documents=0 is out of range; single questions .* 1 to 64"),
        ({"documents": 2, "hops": 2}, "two-hop questions of the tiny world take 3 to 64"),
        ({"documents": 2, "split": True}, "split questions of the tiny world take 3 to 64"),
        ({"documents": 65}, "documents=65"),
    ],
)
def test_what_the_tiny_world_can_not_be_asked(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tiny_world(WorldOptions(**options), 1)  # type: ignore[arg-type]


def test_no_questions_are_refused() -> None:
    with pytest.raises(OptionError, match="questions=0"):
        tiny_world(WorldOptions(), 0)
