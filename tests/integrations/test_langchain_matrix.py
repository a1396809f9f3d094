"""Every way to write a chain is mapped: its documents are found and reused, its text is the same.

The oracle knows the texts and nothing of how they are found: it searches the prompt for them.
`langchain_reuse.json` holds, for each shape, how many tokens were reused and a digest of the token
ids when prompts were mapped with full knowledge of how their templates were written.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core._api import LangChainDeprecationWarning
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage

from corpus import QUESTIONS
from langchain_chains import UNHEARD, marked, text_of
from langchain_shapes import CHAT_SHAPES, COMPLETION_SHAPES, Shape
from pcache_core import CausalLM, PromptCacheEngine, Report
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import ChatPromptCache, PromptCacheLLM

RECORDED = json.loads((Path(__file__).parents[1] / "langchain_reuse.json").read_text())
# Nobody tells of this one's documents; its prompts are reused as far as they begin alike.
UNANNOUNCED = "nothing known at all"


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return load_lm("builtin:tiny-rag")


@pytest.fixture
def engine(lm: CausalLM) -> PromptCacheEngine:
    return PromptCacheEngine(lm, reuse="fast")


@pytest.fixture(autouse=True)
def _deprecated_ways_too() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LangChainDeprecationWarning)
        yield


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
def test_a_completion_models_prompt_is_mapped_and_reused(
    engine: PromptCacheEngine, shape: Shape
) -> None:
    given = Given()
    model = PromptCacheLLM(engine=engine, max_tokens=1, callbacks=[given])
    report = _last_report(model, shape, shape.name)
    assert text_of(report) == given.prompts[-1]
    _assert_mapped(report, shape, shape.name)
    _assert_reused(engine, report, shape.name)


@pytest.mark.parametrize("shape", CHAT_SHAPES, ids=_ids(CHAT_SHAPES))
def test_a_chat_models_messages_are_mapped_and_reused(
    engine: PromptCacheEngine, shape: Shape
) -> None:
    given = Given()
    name = f"{shape.name}, as a chat"
    model = ChatPromptCache(engine=engine, max_tokens=1, callbacks=[given])
    report = _last_report(model, shape, name)
    roles = {"human": "user", "ai": "assistant", "system": "system"}
    chat = [{"role": roles[m.type], "content": str(m.text)} for m in given.chats[-1]]
    rendered = engine.lm.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert text_of(report) == rendered.removeprefix(engine.lm.tokenizer.bos_token)
    _assert_mapped(report, shape, name)
    _assert_reused(engine, report, name)


def test_no_shape_knows_another_ones_documents() -> None:
    marks = [_asked(name) for name in RECORDED]
    assert len(set(marks)) == len(marks) == len(COMPLETION_SHAPES) + len(CHAT_SHAPES)


def _asked(name: str, question: str = next(iter(QUESTIONS))) -> str:
    """A question whose documents are the shape's alone, so that it must announce them itself."""
    own = UNHEARD if name == UNANNOUNCED else str(10_000 + zlib.crc32(name.encode()) % 90_000)
    return marked(question, own)


def _last_report(model: Any, shape: Shape, name: str) -> Report:
    first, *others = (_asked(name, question) for question in QUESTIONS)
    for question in [*others, first, *others, first][: shape.rounds]:
        shape.run(model, question)
    model.engine.reports.clear()
    shape.run(model, first)
    report: Report = model.engine.reports[-1]
    if shape.is_told:  # one prompt, maybe for several models or asked several times
        parts = {tuple((s.kind, s.text) for s in each.segments) for each in model.engine.reports}
        assert len(parts) == 1
    return report


def _assert_mapped(report: Report, shape: Shape, name: str) -> None:
    text, question = text_of(report), _asked(name)
    kinds = [part.kind for part in report.segments for _ in part.text]
    expected = {document[: shape.cut] for document in shape.texts(question)}
    assert all(document in text for document in expected)
    found = {part.text for part in report.segments if part.kind == "document"}
    assert found == (set() if name == UNANNOUNCED else expected)
    parts = [*((part, "literal") for part in shape.literals), (question, "argument")]
    for part, kind in parts if shape.asks else parts[:-1]:
        start = text.index(part)
        found_kinds = set(kinds[start : start + len(part)])
        assert found_kinds == {kind} if shape.is_told else "document" not in found_kinds


def _assert_reused(engine: PromptCacheEngine, report: Report, name: str) -> None:
    reused, digest = RECORDED[name]
    assert report.cached_tokens + report.encoded_tokens >= reused
    ids = [i for part in report.segments for i in engine.lm.token_ids(part.text)]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8] == digest
