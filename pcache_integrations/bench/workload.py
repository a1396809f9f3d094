"""Prompts of a wanted length over the same documents, in chosen orders."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pcache_core import CausalLM, OptionError, Prompt, Segment

OPENING = "Answer the question from the documents.\n\n"
_MOST_WORDS = 2000
_FEWEST_WORDS = 20
_WORD_MARKS = ("Ġ", "▁")


class Words:
    """Draws text of a wanted number of tokens: words that are one token each."""

    def __init__(self, lm: CausalLM, rng: random.Random) -> None:
        self._rng = rng
        vocabulary = sorted(lm.tokenizer.get_vocab())
        marked = [word[1:] for word in vocabulary if word.startswith(_WORD_MARKS)]
        plain = [word for word in marked if word.isascii() and word.isalpha()]
        drawn = rng.sample(plain, min(len(plain), _MOST_WORDS))
        self._words = [word for word in drawn if lm.count_tokens(f" {word}") == 1]
        if len(self._words) < _FEWEST_WORDS:
            raise OptionError(
                f"the tokenizer of {lm.name} has {len(self._words)} words of one token, the "
                f"benchmark's documents are made of {_FEWEST_WORDS} or more; use another model"
            )

    def text(self, tokens: int) -> str:
        """Draw that many words, each after a space."""
        return "".join(f" {word}" for word in self._rng.choices(self._words, k=tokens))


@dataclass(frozen=True, slots=True)
class Round:
    """The prompts of one round.

    first: documents in an order that no recent prompt had. same: the same documents in the same
    order, another question. new: the same documents in yet another order.
    """

    first: Prompt
    same: Prompt
    new: Prompt


class Workload:
    """Documents of `document_tokens` each, and prompts over them.

    The documents take turns at the first place, so that recent prompts have no more than the
    opening in common.
    """

    def __init__(
        self, lm: CausalLM, seed: int, *, documents: int, document_tokens: int, question_tokens: int
    ) -> None:
        self._rng = random.Random(seed)
        self._words = Words(lm, self._rng)
        self._document_tokens = document_tokens
        self._question_tokens = question_tokens
        self._orders = 0
        self.documents = self.fresh_documents(documents)

    def fresh_documents(self, count: int) -> list[str]:
        """Draw documents of the same length that no prompt has."""
        return [self._words.text(self._document_tokens) for _ in range(count)]

    def round(self) -> Round:
        """Draw the next round."""
        order = self._order()
        return Round(self._prompt(order), self._prompt(order), self._prompt(self._order()))

    def _order(self) -> list[str]:
        first = self._orders % len(self.documents)
        self._orders += 1
        others = self.documents[:first] + self.documents[first + 1 :]
        return [self.documents[first], *self._rng.sample(others, len(others))]

    def _prompt(self, order: Sequence[str]) -> Prompt:
        question = f"\n\nQuestion:{self._words.text(self._question_tokens)}\nAnswer:"
        documents = (Segment(text, "document") for text in order)
        return Prompt([Segment(OPENING, "literal"), *documents, Segment(question, "argument")])
