"""Every way to write a chain is mapped: documents, template text and question, each as such.

The oracle knows the texts and nothing of how they are found: it paints the prompt with them, in
the order in which the shape says that they stand.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from langchain_core._api import LangChainDeprecationWarning
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage

from corpus import QUESTIONS
from langchain_chains import text_of
from langchain_shapes import CHAT_SHAPES, COMPLETION_SHAPES, Shape
from pcache_core import PromptCacheEngine, Report
from pcache_integrations._engines import load_lm
from pcache_integrations._mapping import DocumentIndex
from pcache_integrations._recurring import RecurringText
from pcache_integrations.langchain import ChatPromptCache, PromptCacheLLM
from pcache_integrations.langchain._provenance import PROVENANCE

QUESTION = next(iter(QUESTIONS))
OTHERS = [*list(QUESTIONS)[1:], QUESTION]


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(load_lm("builtin:tiny-rag"))


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one shape has taught must not help the next one."""
    monkeypatch.setattr(PROVENANCE, "documents", DocumentIndex())
    monkeypatch.setattr(PROVENANCE, "_layouts", OrderedDict())
    monkeypatch.setattr(PROVENANCE, "recurring", RecurringText())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LangChainDeprecationWarning)
        yield


@pytest.fixture(scope="module")
def tally() -> Iterator[list[str]]:
    """Names of the shapes that were fully mapped; their number is printed."""
    names: list[str] = []
    yield names
    print(f"\n{len(names)} shapes fully mapped")


def _ids(shapes: Sequence[Shape]) -> list[str]:
    return [shape.name for shape in shapes]


class Given(BaseCallbackHandler):
    """Keeps what LangChain hands to the model."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.chats: list[list[BaseMessage]] = []

    def on_llm_start(self, serialized: Any, prompts: list[str], **_: Any) -> None:
        self.prompts += prompts

    def on_chat_model_start(
        self, serialized: Any, messages: list[list[BaseMessage]], **_: Any
    ) -> None:
        self.chats += messages


@pytest.mark.parametrize("shape", COMPLETION_SHAPES, ids=_ids(COMPLETION_SHAPES))
def test_a_completion_models_prompt_is_fully_mapped(
    engine: PromptCacheEngine, shape: Shape, tally: list[str]
) -> None:
    given = Given()
    report = _last_report(PromptCacheLLM(engine=engine, max_tokens=1, callbacks=[given]), shape)
    assert text_of(report) == given.prompts[-1]
    _assert_mapped(report, shape)
    tally.append(shape.name)


@pytest.mark.parametrize("shape", CHAT_SHAPES, ids=_ids(CHAT_SHAPES))
def test_a_chat_models_messages_are_fully_mapped(
    engine: PromptCacheEngine, shape: Shape, tally: list[str]
) -> None:
    given = Given()
    report = _last_report(ChatPromptCache(engine=engine, max_tokens=1, callbacks=[given]), shape)
    roles = {"human": "user", "ai": "assistant", "system": "system"}
    chat = [{"role": roles[m.type], "content": str(m.text)} for m in given.chats[-1]]
    rendered = engine.lm.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert text_of(report) == rendered.removeprefix(engine.lm.tokenizer.bos_token)
    _assert_mapped(report, shape)
    tally.append(f"{shape.name}, as a chat")


def _last_report(model: Any, shape: Shape) -> Report:
    model.engine.reports.clear()
    for number in range(shape.rounds):
        shape.run(model, OTHERS[number % len(OTHERS)])
    shape.run(model, QUESTION)
    report: Report = model.engine.reports[-1]
    return report


def _assert_mapped(report: Report, shape: Shape) -> None:
    text = text_of(report)
    kinds = [part.kind for part in report.segments for _ in part.text]
    for document in shape.texts(QUESTION):
        assert _kinds_at(document[: shape.cut], text, kinds) == {"document"}
    for literal in shape.literals:
        assert _kinds_at(literal, text, kinds) == {"literal"}
    if shape.asks:
        assert _kinds_at(QUESTION, text, kinds) <= {"argument", "text"}
    expected = {shape_text[: shape.cut] for shape_text in shape.texts(QUESTION)}
    assert {part.text for part in report.segments if part.kind == "document"} == expected


def _kinds_at(part: str, text: str, kinds: Sequence[str]) -> set[str]:
    """Kinds of the characters of `part`, where it stands in the text; white space apart."""
    start = text.index(part)
    return {
        kind
        for char, kind in zip(part, kinds[start : start + len(part)], strict=True)
        if not char.isspace()
    }
