"""The completion model: options, generation, streaming, async, figures, serialisation."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import PromptTemplate

from corpus import DOCUMENTS, QUESTIONS, TEMPLATE
from langchain_chains import documents_of, rag_chain, text_of
from pcache_core import Prompt, PromptCacheEngine, SamplingParams
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import PromptCacheLLM

PROMPT = PromptTemplate.from_template(TEMPLATE)
QUESTION = "Where was Jerome Fertden born?"
TEXT = TEMPLATE.format(context=DOCUMENTS[6], question=QUESTION)


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(load_lm("builtin:tiny-rag"))


@pytest.fixture
def llm(engine: PromptCacheEngine) -> PromptCacheLLM:
    return PromptCacheLLM(engine=engine, max_tokens=8)


class TestOptions:
    def test_options_of_hosted_models_have_nothing_to_apply_to(self) -> None:
        PromptCacheLLM(api_key="x", timeout=3, max_retries=2, base_url=None)

    def test_models_with_equal_options_share_one_engine(self) -> None:
        one, two = (
            PromptCacheLLM(model="builtin:tiny-rag"),
            PromptCacheLLM(model="builtin:tiny-rag", reuse="off", max_tokens=3),
        )
        assert one.engine is two.engine
        other = PromptCacheLLM(model="builtin:tiny-rag", namespace="apart")
        assert other.engine is not one.engine
        assert other.engine.lm is one.engine.lm

    def test_an_engine_that_is_closed_is_freed(self) -> None:
        with PromptCacheLLM(model="builtin:tiny-rag", namespace="short-lived", max_tokens=2) as llm:
            llm.invoke("Hello")
            engine = weakref.ref(llm.engine)
        assert engine() is None

    def test_saved_options_make_an_equal_model_and_leave_the_engine_out(
        self, engine: PromptCacheEngine
    ) -> None:
        llm = PromptCacheLLM(engine=engine, temperature=0.5, stop=["."], seed=1)
        saved = json.loads(llm.model_dump_json())
        assert not [name for name in saved if "engine" in name]
        assert PromptCacheLLM(**saved).asdict() == llm.asdict()
        assert "engine" not in repr(llm)


class TestGeneration:
    @pytest.mark.parametrize("reuse", ["off", "exact", "fast"])
    @pytest.mark.parametrize("question", QUESTIONS)
    def test_answers_are_right_with_and_without_reuse(
        self, llm: PromptCacheLLM, question: str, reuse: str
    ) -> None:
        answer = rag_chain(PROMPT, llm.bind(reuse=reuse)).invoke(question)
        assert answer.strip() == QUESTIONS[question][0]
        assert llm.engine.reports[-1].reuse == reuse

    def test_the_models_own_reuse_mode_is_the_default(self, engine: PromptCacheEngine) -> None:
        PromptCacheLLM(engine=engine, reuse="off").invoke(TEXT)
        assert engine.reports[-1].reuse == "off"
        assert engine.reports[-1].cached_tokens == 0

    def test_the_answer_is_the_engines(self, llm: PromptCacheLLM) -> None:
        params = SamplingParams(max_tokens=8, temperature=0.9, top_k=5, seed=3)
        expected = llm.engine.generate(Prompt.from_text(TEXT), params).text
        assert llm.invoke(TEXT, temperature=0.9, top_k=5, seed=3) == expected

    def test_options_of_the_model_reach_the_engine(self, engine: PromptCacheEngine) -> None:
        options: dict[str, Any] = {
            "max_tokens": 12,
            "temperature": 1.5,
            "top_p": 0.9,
            "top_k": 50,
            "min_p": 0.01,
            "repetition_penalty": 1.3,
            "seed": 5,
        }
        expected = engine.generate(Prompt.from_text("Note:"), SamplingParams(**options)).text
        assert PromptCacheLLM(engine=engine, **options).invoke("Note:") == expected

    def test_the_calls_stop_strings_replace_the_models(self, engine: PromptCacheEngine) -> None:
        llm = PromptCacheLLM(engine=engine, max_tokens=8, stop=["mouth"])
        assert llm.invoke(TEXT) == " Gluv"
        assert llm.invoke(TEXT, stop=["."]) == " Gluvmouth"
        assert llm.invoke(TEXT, stop=[]) == " Gluvmouth."
        assert "".join(llm.bind(stop=["v"]).stream(TEXT)) == " Glu"

    def test_messages_given_to_a_completion_model_are_its_prompt(self, llm: PromptCacheLLM) -> None:
        llm.invoke([SystemMessage("Be brief."), HumanMessage("Hello")])
        assert text_of(llm.engine.reports[-1]) == "System: Be brief.\nHuman: Hello"


class TestCacheDocuments:
    def test_cached_documents_are_reused_by_the_first_question(self) -> None:
        llm = PromptCacheLLM(model="builtin:tiny-rag", reuse="fast", max_tokens=8)
        report = llm.cache_documents(
            [Document(text, id=f"d{n}") for n, text in enumerate(DOCUMENTS)], progress=False
        )
        assert (report.texts, report.encoded) == (8, 8)
        rag_chain(PROMPT, llm).invoke(QUESTION)
        first = llm.engine.reports[-1]
        assert documents_of(first) == ["d6", "d5"]
        assert {s.source for s in first.segments if s.kind == "document"} == {"memory"}
        encoded = {s.kind for s in first.segments if s.source == "encoded"}
        assert encoded <= {"literal"}  # the opening

    def test_strings_are_documents_and_are_recognised_in_flat_text(self) -> None:
        llm = PromptCacheLLM(model="builtin:tiny-rag", reuse="fast", max_tokens=1)
        text = "Nobody has been told: Vantage sells umbrellas. Vantage is run by Ann Nash."
        llm.cache_documents([f"\n{text} "], progress=False)
        llm.invoke(f"Read this.\n\n{text}\n\nQuestion: What?\nAnswer:")
        sources = [s.source for s in llm.engine.reports[-1].segments if s.kind == "document"]
        assert sources == ["memory"]
