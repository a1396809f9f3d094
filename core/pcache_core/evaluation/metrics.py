"""How right an answer is: contained, exact match, token F1, ROUGE-L; each from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

MatchRule = Literal["whole", "normalised"]
"""When an answer matches: `whole`, case and punctuation included, as the tiny world's answers have
one form; `normalised`, as SQuAD compares, where the references were written by people."""

ROUGE_HINT = "ROUGE-L needs torchmetrics: pip install 'pcache-integrations[eval]'"

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT_LETTERS = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str], rule: MatchRule) -> float:
    """1 if the answer equals one of the references under the rule, else 0."""
    form = str.strip if rule == "whole" else normalise
    return float(form(answer) in {form(reference) for reference in references})


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if one of the references stands in the answer, both normalised, else 0."""
    return float(any(normalise(reference) in normalise(answer) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over normalised words; the best of the references."""
    return max(_f1(normalise(answer).split(), normalise(r).split()) for r in references)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference))


def has_rouge() -> bool:
    """Return whether torchmetrics is installed."""
    return find_spec("torchmetrics") is not None


def rouge_l(answer: str, references: Sequence[str]) -> float | None:
    """F-measure of the longest common subsequence of words; the best of the references.

    None where torchmetrics is not installed (`ROUGE_HINT` says how to).
    """
    if not has_rouge():
        return None
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(
        [answer], [list(references)], accumulate="best", normalizer=_words, rouge_keys="rougeL"
    )
    return float(scores["rougeL_fmeasure"])


def _words(text: str) -> str:
    """ROUGE's usual normalisation, with the letters of every script instead of `a-z` alone."""
    return _NOT_LETTERS.sub(" ", text.lower())
