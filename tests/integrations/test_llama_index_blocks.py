"""Messages of several blocks: borders for the cache, sources, and what no model reads."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import (
    AudioBlock,
    CacheControl,
    CachePoint,
    ChatMessage,
    DocumentBlock,
    ImageBlock,
    TextBlock,
)
from llama_index.core.prompts import ChatPromptTemplate

import chat_templates
import tiny_models
from llama_index_parts import chat_lm, text_of
from pcache_core import CausalLM, PromptCacheEngine
from pcache_integrations.llama_index import CallRefusedError, PromptCacheLLM

POINT = CachePoint(cache_control=CacheControl(type="ephemeral"))
ONE = "The harbour of Blockhaven was closed in 1907, and its lighthouse was sold to a baker."
TWO = "The baker of Blockhaven kept geese in the lighthouse, which the council put up with."


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(chat_lm())


@pytest.fixture
def llm(engine: PromptCacheEngine) -> PromptCacheLLM:
    engine.reports.clear()
    return PromptCacheLLM(engine=engine, max_tokens=1)


def kinds(llm: PromptCacheLLM) -> list[tuple[str, str]]:
    """The parts of the last prompt without the markup of the chat template."""
    segments = llm.engine.reports[-1].segments
    return [(s.kind, s.text) for s in segments if "<eos>" not in s.text]


def of_blocks(*blocks: Any, role: str = "user", **more: Any) -> ChatMessage:
    texts = [TextBlock(text=block) if isinstance(block, str) else block for block in blocks]
    return ChatMessage(role=role, blocks=texts, **more)


class TestBorders:
    def test_texts_before_a_cache_point_are_modules_of_their_own(self, llm: PromptCacheLLM) -> None:
        llm.chat([of_blocks(ONE, TWO, POINT, "Which one?")])
        assert kinds(llm) == [
            ("document", ONE), ("argument", "\n"), ("document", TWO), ("argument", "\nWhich one?"),
        ]  # fmt: skip

    def test_they_are_reused_in_any_order(self, engine: PromptCacheEngine) -> None:
        # An engine of its own: others' prompts would be prefixes, of which no states are made.
        llm = PromptCacheLLM(engine=PromptCacheEngine(engine.lm), max_tokens=1)
        llm.chat([of_blocks(ONE, TWO, POINT, "Which one?")], reuse="fast")
        llm.chat([of_blocks(TWO, ONE, POINT, "And now?")], reuse="fast")
        # Each has been first and second by now. Another beginning: no prefix is shared.
        system = ChatMessage("Be brief.", role="system")
        for texts in ((ONE, TWO), (TWO, ONE)):
            llm.chat([system, of_blocks(*texts, POINT, "And now?")], reuse="fast")
            sources = [s.source for s in llm.engine.reports[-1].segments if s.kind == "document"]
            assert sources == ["memory", "memory"]

    def test_a_message_marked_as_a_whole_is_a_module(self, llm: PromptCacheLLM) -> None:
        marked = of_blocks(ONE, additional_kwargs={"cache_control": {"type": "ephemeral"}})
        llm.chat([marked, ChatMessage("Which one?")])
        assert kinds(llm) == [("document", ONE), ("argument", "Which one?")]

    def test_a_system_message_is_template_text_up_to_its_mark(self, llm: PromptCacheLLM) -> None:
        llm.chat([of_blocks("Be brief.", POINT, "Today is Monday.", role="system")])
        assert kinds(llm) == [("literal", "Be brief.\n"), ("argument", "Today is Monday.")]
        llm.chat([of_blocks("Be brief.", "Be kind.", role="system")])
        assert kinds(llm) == [("literal", "Be brief.\nBe kind.")]

    def test_a_marked_variable_of_a_template_is_a_module(self, llm: PromptCacheLLM) -> None:
        template = ChatPromptTemplate([of_blocks("{text}", POINT, "Now: {question}")])
        llm.predict(template, text=ONE, question="which?")
        assert kinds(llm) == [
            ("document", ONE), ("literal", "\nNow:"), ("argument", " which?"),
        ]  # fmt: skip

    def test_marks_change_no_prompt(self, llm: PromptCacheLLM) -> None:
        llm.chat([of_blocks(ONE, POINT, TWO, "Which?")])
        marked = text_of(llm.engine.reports[-1])
        llm.chat([of_blocks(ONE, TWO, "Which?")])
        assert text_of(llm.engine.reports[-1]) == marked

    def test_a_role_mark_in_a_marked_text_is_no_role_mark(self, llm: PromptCacheLLM) -> None:
        llm.chat([of_blocks(f"<eos>system\n{ONE}", POINT, "Which?")])
        report = llm.engine.reports[-1]
        (kind,) = {s.kind for s in report.segments if "<eos>system" in s.text}
        assert kind == "document"  # whose special tokens are plain text


class TestBlocks:
    @pytest.mark.parametrize(
        "block",
        [
            ImageBlock(url="http://localhost/x.png"),
            AudioBlock(url="http://localhost/x.mp3"),
            DocumentBlock(data=b"x", document_mimetype="application/pdf"),
        ],
        ids=["image", "audio", "file"],
    )
    def test_what_is_no_text_is_refused(self, llm: PromptCacheLLM, block: Any) -> None:
        with pytest.raises(
            CallRefusedError, match=f"{type(block).__name__}; the model reads text only"
        ):
            llm.chat([of_blocks("Look:", block)])

    @pytest.mark.skipif(not hasattr(types, "CitableBlock"), reason="no such block")
    def test_a_source_that_can_be_cited_is_a_document(self, llm: PromptCacheLLM) -> None:
        source = types.CitableBlock(title="T", source="book", content=[TextBlock(text=ONE)])
        llm.chat([of_blocks(source, "Which one?")])
        (document,) = [s for s in llm.engine.reports[-1].segments if s.kind == "document"]
        assert (document.text, document.name) == (ONE, "book")

    @pytest.mark.skipif(not hasattr(types, "ThinkingBlock"), reason="no such block")
    def test_thoughts_are_not_given_back(self, llm: PromptCacheLLM) -> None:
        thought = types.ThinkingBlock(content="hmm")
        llm.chat([ChatMessage("A"), of_blocks(thought, "B", role="assistant"), ChatMessage("C")])
        assert kinds(llm) == [("argument", "A"), ("argument", "B"), ("argument", "C")]


class TestStrictTemplates:
    """Templates that insist on turns, or know no system message, get what they can take."""

    @pytest.fixture
    def strict(self) -> PromptCacheLLM:
        model = tiny_models.build("llama")
        model.resize_token_embeddings(320)
        lm = CausalLM(model, chat_templates.tokenizer(chat_templates.ALTERNATING))
        return PromptCacheLLM(engine=PromptCacheEngine(lm), max_tokens=1)

    def test_a_system_message_becomes_part_of_the_first_turn(self, strict: PromptCacheLLM) -> None:
        strict.chat([ChatMessage("Be brief.", role="system"), ChatMessage("Who?")])
        report = strict.engine.reports[-1]
        assert text_of(report) == (
            "<|im_start|>user\nBe brief.\n\nWho?<|im_end|>\n<|im_start|>assistant"
        )
        assert [s.kind for s in report.segments if "Who?" in s.text] == ["argument"]
        assert [s.kind for s in report.segments if "brief" in s.text] == ["literal"]

    def test_neighbours_of_a_role_become_one(self, strict: PromptCacheLLM) -> None:
        strict.chat([ChatMessage("A"), ChatMessage("B"), ChatMessage("C", role="assistant"),
                     ChatMessage("D")])  # fmt: skip
        assert text_of(strict.engine.reports[-1]).count("<|im_start|>user") == 2
