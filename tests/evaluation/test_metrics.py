"""Scores against values worked out by hand."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from pcache_core.evaluation.metrics import contains, exact_match, normalise, rouge_l, token_f1
from pcache_core.evaluation.run import kl_divergence


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's, a hat!", "cats hat"),
        ("an Apple\n\tA day", "apple day"),
        ("theatre band", "theatre band"),
        ("  ", ""),
        ("U.S.A.", "usa"),
    ],
)
def test_squad_normalisation(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_normalised_match_forgives_case_articles_and_punctuation_whole_match_none() -> None:
    assert exact_match(" the Exeter College. ", ["exeter college"], "normalised") == 1
    assert exact_match(" the Exeter College. ", ["exeter college"], "whole") == 0
    assert exact_match(" Exeter College.\n", ["Oriel.", "Exeter College."], "whole") == 1
    assert exact_match("Exeter College", ["Exeter College."], "whole") == 0
    assert exact_match("Exeter", ["Exeter College"], "normalised") == 0


@pytest.mark.parametrize(
    ("answer", "references", "f1"),
    [
        ("the cat sat on a mat", ["cat sat there"], 4 / 7),  # 2 of 4, 2 of 3
        ("dog dog cat", ["dog cat cat"], 2 / 3),  # each word counts as often as both have it
        ("cat", ["dog", "a cat", "cat and dog"], 1.0),
        ("cat", ["dog"], 0.0),
        ("", ["dog"], 0.0),
        ("the", ["a"], 1.0),
    ],
)
def test_token_f1_is_the_best_over_the_references(
    answer: str, references: list[str], f1: float
) -> None:
    assert token_f1(answer, references) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("the cat sat on the mat", ["the cat lay on a mat"], 2 / 3),  # the cat on mat: 4 of 6
        ("on the mat the cat sat", ["the cat sat"], 2 / 3),  # 3 of 6, 3 of 3
        ("sat cat the", ["the cat sat"], 1 / 3),  # order counts
        ("cat", ["dog", "Cat!"], 1.0),
        ("улица Пушкина", ["Улица пушкина."], 1.0),
        ("", ["dog"], 0.0),
    ],
)
def test_rouge_l_is_the_best_over_the_references(
    answer: str, references: list[str], score: float
) -> None:
    assert rouge_l(answer, references) == pytest.approx(score, abs=1e-6)


def test_rouge_l_is_unknown_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert rouge_l("cat", ["cat"]) is None


def test_kl_divergence_is_in_nats_and_from_the_first_to_the_second() -> None:
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert kl_divergence(p + 3, q - 1) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(q, p) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert kl_divergence(p, p) == 0


def test_kl_divergence_of_what_can_not_come_is_nothing() -> None:
    certain = torch.tensor([0.0, -math.inf])
    assert kl_divergence(certain, torch.tensor([0.0, 0.0])) == pytest.approx(math.log(2))
    assert kl_divergence(certain, certain) == 0


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The keeper was Osvald Trine, I think.", ["osvald trine"], 1),
        ("It ripens for 14 months.", ["fourteen months", "14 months"], 1),
        ("It is 2,310 metres high.", ["2310"], 1),
        ("The keeper was Osvald.", ["Osvald Trine"], 0),
        ("", ["Osvald Trine"], 0),
    ],
)
def test_an_answer_contains_a_value_whatever_stands_around_it(
    answer: str, references: list[str], expected: float
) -> None:
    assert contains(answer, references) == expected
