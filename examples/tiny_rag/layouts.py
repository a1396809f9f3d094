"""How documents and a question become a prompt: the project's own layout and a few common ones."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pcache_core.evaluation.world.questions import OPENING, SEPARATOR, question_text

_ASIDE_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Layout:
    """opening + documents joined by blank lines + closing; `{q}` stands for the question."""

    opening: str
    closing: str


OWN = Layout(OPENING, SEPARATOR + question_text("{q}"))
_FRAMEWORKS = (
    Layout(
        "Context information is below.\n---------------------\n",
        "\n---------------------\nGiven the context information and not prior knowledge, "
        "answer the query.\nQuery: {q}\nAnswer: ",
    ),
    Layout(
        "Use the following pieces of context to answer the question at the end. If you don't know "
        "the answer, just say that you don't know, don't try to make up an answer.\n\n",
        "\n\nQuestion: {q}\nHelpful Answer:",
    ),
    Layout(
        "Use the following pieces of context to answer the user's question. \nIf you don't know "
        "the answer, just say that you don't know, don't try to make up an answer.\n"
        "----------------\n",
        "\n{q}\nAnswer:",
    ),
    Layout(OPENING, "\n\n{q}\nAnswer:"),
)
ALL = (OWN, *_FRAMEWORKS)


def draw_layout(rng: random.Random) -> Layout:
    """The project's own layout four times out of five, else one the frameworks ship."""
    return rng.choice(_FRAMEWORKS) if rng.random() < _ASIDE_SHARE else OWN
