"""Constrained decoding: only tokens that a grammar allows, and that leave room for an end."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pcache_core.errors import ModelError, OptionError
from pcache_core.grammar import Grammar
from pcache_core.lm.closing import (
    OpenBrackets,
    Plan,
    Vocabulary,
    next_plan,
    shortest_plan,
    token_mask,
)
from pcache_core.threads import fork_safe

Pick = Callable[[torch.Tensor], int]
"""Chooses a token by its score, [vocab]; those of -inf are out."""

_KEPT_GRAMMARS = 64
_TRIES = 4
# Texts of formats that the search for a short end does not find by itself.
_FORMATS = {
    "email": "a@b.co",
    "idn-email": "a@b.co",
    "date": "2000-01-01",
    "date-time": "2000-01-01T00:00:00Z",
}
_MOST_DIGITS = 1000  # in a row; Python reads no integer of more than 4,300


@dataclass(frozen=True, slots=True, eq=False)
class CompiledGrammar:
    """A grammar for one tokenizer.

    start: the state to begin in. plan: a short text that is complete. hints: what its strings may
    have to hold.
    """

    start: LLMatcher
    plan: Plan
    hints: tuple[Plan, ...]


class GrammarCompiler:
    """Compiles grammars for one model's tokenizer; remembers recent ones. Thread-safe.

    end_ids: what ends an answer.

    Raises: ModelError: the tokenizer is not of a kind that grammars can be followed with.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int], name: str
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ModelError(
                f"{name} has a {type(tokenizer).__name__}, and grammars need a fast tokenizer; "
                "save it with a tokenizer.json"
            )
        if not end_ids:
            raise ModelError(f"{name} has no end-of-sequence token, which ends a grammar's text")
        self.name = name
        self.end_ids = sorted(end_ids)
        self.tokenizer: LLTokenizer = from_tokenizer(tokenizer, eos_token=self.end_ids)
        self.vocabulary = Vocabulary.of(self.tokenizer)
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock = fork_safe(threading.Lock())

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Return the grammar for this tokenizer. Raises: OptionError: no text can follow it."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is None:
                found = self._compiled[grammar] = self._compile(grammar)
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > _KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return found

    def check(self, grammar: Grammar, max_tokens: int) -> None:
        """Raises: OptionError: no text of the grammar has so few tokens."""
        plan = self.compile(grammar).plan
        if len(plan) > max_tokens:
            raise OptionError(
                f"the shortest text of the grammar has {len(plan)} tokens with {self.name}, and "
                f"{max_tokens} may be generated; raise max_tokens or shorten the prompt"
            )

    def constraint(self, grammar: Grammar, max_tokens: int) -> Constraint:
        """Return the constraint of one request."""
        return Constraint(self, self.compile(grammar), max_tokens)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        start = LLMatcher(self.tokenizer, grammar.source, log_level=0)
        if start.is_error():
            raise OptionError(f"{self.name} can't follow the grammar: {start.get_error()}")
        if not token_mask(start, self.tokenizer.vocab_size).any():
            raise OptionError(f"{self.name} has no tokens that begin a text of the grammar")
        texts = [text for name, text in _FORMATS.items() if f'"{name}"' in grammar.source]
        hints = tuple(tuple(self.tokenizer.tokenize_str(text)) for text in texts)
        plan = shortest_plan(start, self.vocabulary, hints)
        if plan is None:
            raise OptionError(
                f"no short text that follows the grammar was found for {self.name}, so that a "
                "complete answer can't be promised; write each `pattern` of the schema with ^ and $"
                " around it, simplify it, or list the values as an `enum`"
            )
        return CompiledGrammar(start, plan, hints)


class Constraint:
    """Chooses one request's tokens so that the answer is complete when its tokens run out."""

    def __init__(
        self, compiler: GrammarCompiler, compiled: CompiledGrammar, max_tokens: int
    ) -> None:
        self._compiler = compiler
        self._hints = compiled.hints
        self._matcher = compiled.start.deep_copy()
        self._plan = compiled.plan
        self._left = max_tokens
        self._opened = OpenBrackets()
        self._digits = 0

    def choose(self, logits: torch.Tensor, pick: Pick) -> int:
        """Choose the next token. logits: [vocab], of which `pick` gets those that are allowed."""
        if len(self._plan) >= self._left:
            self._left -= 1
            return self._follow_plan()
        mask = token_mask(self._matcher, len(logits))
        scores = logits.masked_fill(~torch.from_numpy(mask).to(logits.device), -torch.inf)
        self._left -= 1
        for _ in range(_TRIES):
            token = pick(scores)
            if token in self._compiler.end_ids or self._take(token):
                return token
            scores[token] = -torch.inf
            if torch.isneginf(scores).all():
                break
        return self._follow_plan()

    def _take(self, token: int) -> bool:
        """Go on with a token, unless no end could be reached after it."""
        following = self._matcher.deep_copy()
        text = self._compiler.vocabulary.texts[token]
        opened, digits = self._opened.after(text), self._digits_after(text)
        if digits > _MOST_DIGITS or not following.consume_token(token):
            return False
        plan = self._plan_after(following, token, opened)
        if plan is None or len(plan) > self._left:
            return False
        self._matcher, self._plan = following, plan
        self._opened, self._digits = opened, digits
        return True

    def _digits_after(self, text: bytes) -> int:
        """Return how many digits the answer ends in with this text."""
        ending = len(text) - len(text.rstrip(b"0123456789"))
        return self._digits + ending if ending == len(text) else ending

    def _plan_after(self, following: LLMatcher, token: int, opened: OpenBrackets) -> Plan | None:
        if self._plan and token == self._plan[0]:
            return self._plan[1:]
        return next_plan(following, self._compiler.vocabulary, opened, self._plan, self._hints)

    def _follow_plan(self) -> int:
        """Return the token that leads to the end that is known."""
        if not self._plan:
            return self._compiler.end_ids[0]
        token, self._plan = self._plan[0], self._plan[1:]
        text = self._compiler.vocabulary.texts[token]
        self._opened, self._digits = self._opened.after(text), self._digits_after(text)
        self._matcher.consume_token(token)
        return token
