"""From a question and its documents to a prompt that fits the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pcache_core.chat.messages import Message
from pcache_core.engine import PromptCacheEngine
from pcache_core.errors import ContextLengthError
from pcache_core.evaluation.data import Item
from pcache_core.evaluation.world.questions import OPENING, SEPARATOR, question_text
from pcache_core.prompt import Prompt, Segment

Layout = Literal["completion", "chat"]
"""`completion`: the text ends in "Answer:" and the model goes on. `chat`: the same opening,
documents and question as a user's message in the model's own chat template."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt, and how many of the item's documents had to be left out of it.

    gold_ids: of the first of the right answers, tokenised alone, as the model would begin it: after
        a space where the prompt ends without white space.
    """

    prompt: Prompt
    left_out: int
    gold_ids: tuple[int, ...]


def fit(engine: PromptCacheEngine, item: Item, layout: Layout, max_tokens: int) -> Fitted:
    """Build an item's prompt; where it would not fit, leave out documents from the middle.

    max_tokens: of an answer; there is always room for the right one.

    What LongBench does with long texts: their beginning and their end are kept.

    Raises: ContextLengthError: not even one document fits. ChatTemplateError: the model has none.
    """
    contexts = list(item.contexts)
    limit = engine.lm.context_length
    while True:
        prompt = make_prompt(engine, item.question, contexts, layout)
        space = "" if prompt.text[-1].isspace() else " "
        gold_ids = tuple(engine.lm.token_ids(space + item.answers[0]))
        answer_tokens = max(max_tokens, len(gold_ids))
        needed = len(engine.tokenise(prompt).token_ids) + answer_tokens - 1
        if limit is None or needed <= limit:
            return Fitted(prompt, len(item.contexts) - len(contexts), gold_ids)
        if len(contexts) == 1:
            raise ContextLengthError(
                f"question {item.question[:60]!r} with one document and an answer takes {needed} "
                f"tokens, {engine.lm.name} holds {limit}; use shorter documents or max_tokens"
            )
        del contexts[len(contexts) // 2]


def make_prompt(
    engine: PromptCacheEngine, question: str, contexts: Sequence[str], layout: Layout
) -> Prompt:
    """Lay out a constant opening, the documents and the question."""
    segments = [Segment(OPENING, "literal")]
    for number, text in enumerate(contexts, 1):
        segments.append(Segment(text, "document", f"document {number}"))
        segments.append(Segment(SEPARATOR, "literal"))
    if layout == "completion":
        # The last separator and the question are one text, as the tiny model was taught.
        segments[-1] = Segment(SEPARATOR + question_text(question), "argument", "question")
        return Prompt(segments)
    segments.append(Segment(f"Question: {question}", "argument", "question"))
    return engine.prompt_from_chat([Message("user", segments)])
