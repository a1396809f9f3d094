"""Every mode meets every question under the same conditions, and `exact` is `off`."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tqdm import tqdm

from pcache_core import CausalLM, OptionError, PromptCacheEngine, SamplingParams
from pcache_core.evaluation.data import Item, QuestionSet, WorldOptions, tiny_world
from pcache_core.evaluation.evaluate import evaluate
from pcache_core.evaluation.prompts import fit, make_prompt
from pcache_core.evaluation.run import Conditions, Outcomes, Way, measure
from pcache_core.params import REUSE_MODES


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return CausalLM.from_pretrained("builtin:tiny-rag")


@pytest.fixture(scope="module")
def outcomes(lm: CausalLM) -> list[Outcomes]:
    engine = PromptCacheEngine(lm)
    # The first question twice: what was asked before must not serve what is asked now.
    items = tiny_world(WorldOptions(split=True), 4).items
    asked = [fit(engine, item, "completion", 16) for item in (items[0], *items)]
    ways = [Way(mode, mode) for mode in REUSE_MODES]
    conditions = Conditions(SamplingParams(max_tokens=16, stop=["\n"]))
    return list(measure(lm, asked, ways, conditions))


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


def test_the_right_answer_is_as_likely_as_a_plain_forward_says(lm: CausalLM) -> None:
    """Over the same ids, teacher-forced; `exact` is `off`, and reuse moves it a little."""
    questions = tiny_world(WorldOptions(documents=4, seed=7), 2)
    result = evaluate(lm, questions, modes=["exact", "fast"], max_tokens=4)
    engine, expected = PromptCacheEngine(lm), []
    for item in questions.items:
        prompt = make_prompt(engine, item.question, item.contexts, "completion")
        ids = list(engine.tokenise(prompt).token_ids)
        gold = lm.tokenizer(" " + item.answers[0], add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = lm.model(torch.tensor([ids + gold])).logits[0, len(ids) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(gold))
        expected.append(float(loss))
    off, exact, fast = result.rows
    assert off.gold_nll == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert exact.gold_nll == off.gold_nll
    assert fast.gold_nll != pytest.approx(off.gold_nll, abs=1e-6)
    assert fast.gold_nll == pytest.approx(off.gold_nll, abs=1.0)


def test_documents_that_are_encoded_ahead_are_encoded_once(lm: CausalLM) -> None:
    documents = tiny_world(WorldOptions(documents=4, seed=7), 1).items[0].contexts
    names = ("Who?", "When?", "Where?")
    items = tuple(Item(name, documents, ("Nobody.",)) for name in names)
    questions = QuestionSet("made up", items, "normalised")
    computed = {}
    for warm in (False, True):
        with counted_tokens(lm) as counts:
            result = evaluate(lm, questions, modes=["fast"], max_tokens=1, warm=warm)
        computed[warm] = sum(counts)
        assert ("all documents were encoded ahead" in result.notes) == warm
    tokens = sum(map(lm.count_tokens, documents))
    # Each of the questions, and the one that is asked before, would have encoded them all.
    assert computed[False] - computed[True] >= 2 * tokens


def test_a_chat_model_is_asked_through_its_template_unless_told_otherwise(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    lm = tiny_lm()
    lm.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    items = (Item("Who?", ("Ann is here.",), ("x",)),)
    questions = QuestionSet("made up", items, "normalised")
    assert evaluate(lm, questions, modes=[], max_tokens=1).layout == "chat"
    plain = evaluate(lm, questions, modes=[], layout="completion", max_tokens=1)
    assert plain.layout == "completion"
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert evaluate(lm, questions, modes=[], max_tokens=1).layout == "completion"


def test_a_bar_shows_how_far_it_is_and_an_interrupt_keeps_what_was_asked(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        """Where somebody presses ctrl-C when the bar has come to the third answer or further."""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            found = re.search(r"answers: .*\b(\d+)/40 ", text)
            if found and int(found[1]) > 2 and not self.getvalue().endswith("pressed"):
                super().write("pressed")
                raise KeyboardInterrupt
            return super().write(text) if not self.getvalue().endswith("pressed") else len(text)

    # The interrupt comes while the bar holds its lock, which then nobody else may wait for.
    monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    questions = tiny_world(WorldOptions(documents=2), 20)
    result = evaluate(lm, questions, modes=["fast"], max_tokens=16)
    asked = len(result.questions.items)
    assert terminal.getvalue().endswith("pressed")
    assert 1 <= asked < 20
    assert (result.unasked, len(result.answers)) == (20 - asked, asked)
    assert result.questions.items == questions.items[:asked]
    assert [row.reuse for row in result.rows] == ["off", "fast"]


@contextmanager
def counted_tokens(lm: CausalLM) -> Iterator[list[int]]:
    """How many tokens each forward computes."""
    counts: list[int] = []
    hook = lm.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: counts.append(inputs[0].numel())
    )
    try:
        yield counts
    finally:
        hook.remove()


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
