"""What every LLM of LlamaIndex's must do, for each method, its stream and its async twin."""

from __future__ import annotations

import asyncio
import doctest
import json
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Document, PromptTemplate, SummaryIndex
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import MessageRole
from llama_index.core.callbacks import CallbackManager
from llama_index.core.extractors import DocumentContextExtractor
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.schema import NodeRelationship, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

import chat_templates
import tiny_models
from corpus import DOCUMENTS
from llama_index_parts import (
    ALL,
    CHATS,
    COMPLETIONS,
    MESSAGES,
    TEXT,
    Ask,
    achat,
    acomplete,
    answer,
    chat_lm,
    documents_of,
    text_of,
)
from llama_index_watch import Callbacks, watched
from open_streams import Watched, eventually
from pcache_core import CausalLM, Grammar, PromptCacheEngine
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import CallRefusedError, PromptCacheLLM

pytestmark = pytest.mark.usefixtures("closed_loops")

READ = PromptTemplate("Read {text} now.")


async def predict(llm: LLM) -> None:
    llm.predict(READ, text=TEXT)


async def apredict(llm: LLM) -> None:
    await llm.apredict(READ, text=TEXT)


async def stream(llm: LLM) -> None:
    list(llm.stream(READ, text=TEXT))


async def astream(llm: LLM) -> None:
    async for _ in await llm.astream(READ, text=TEXT):
        pass


@pytest.fixture(scope="module", params=["completion", "chat"])
def engine(request: pytest.FixtureRequest) -> PromptCacheEngine:
    is_chat = request.param == "chat"
    return PromptCacheEngine(chat_lm() if is_chat else load_lm("builtin:tiny-rag"))


@pytest.fixture
def llm(engine: PromptCacheEngine) -> PromptCacheLLM:
    return PromptCacheLLM(engine=engine, max_tokens=6)


def test_it_has_its_place_in_the_hierarchy() -> None:
    names = [base.__name__ for base in PromptCacheLLM.__mro__]
    for base in (BaseLLM, LLM, FunctionCallingLLM):
        assert base.__name__ in names
        assert issubclass(PromptCacheLLM, base)
    assert PromptCacheLLM.class_name() == "PromptCacheLLM"


def test_the_examples_of_the_docstring_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    tests = doctest.DocTestFinder(recurse=False).find(PromptCacheLLM)
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert [result.failed for result in results] == [0] * len(results)
    assert sum(result.attempted for result in results) > 10


class TestTwins:
    @pytest.mark.parametrize("asks", [COMPLETIONS, CHATS], ids=["completion", "chat"])
    async def test_a_method_its_stream_and_their_async_twins_say_the_same(
        self, llm: PromptCacheLLM, asks: list[Ask]
    ) -> None:
        parts = [await ask(llm, reuse="off") for ask in asks]
        assert len({answer(of_one) for of_one in parts}) == 1
        usages = [of_one[-1].raw["usage"] for of_one in parts]
        assert usages == [usages[0]] * 4
        assert 0 < usages[0]["completion_tokens"] <= 6
        reasons = {of_one[-1].additional_kwargs["finish_reason"] for of_one in parts}
        assert reasons in ({"length"}, {"stop"})

    @pytest.mark.parametrize("ask", ALL)
    async def test_what_comes_raw_can_be_written_as_json(
        self, llm: PromptCacheLLM, ask: Ask
    ) -> None:
        parts = await ask(llm)
        assert json.loads(json.dumps(parts[-1].raw)) == parts[-1].raw
        for part in parts:
            json.loads(part.model_dump_json())

    @pytest.mark.parametrize("ask", ALL)
    async def test_log_probabilities_are_of_the_tokens_that_were_said(
        self, llm: PromptCacheLLM, ask: Ask
    ) -> None:
        parts = await ask(llm, logprobs=True, top_logprobs=2)
        found = [alternatives for part in parts for alternatives in part.logprobs or ()]
        assert "".join(alternatives[0].token for alternatives in found) == answer(parts)
        for chosen, *others in found:
            assert chosen.logprob <= 0
            assert bytes(chosen.bytes).decode() == chosen.token
            assert all(other.logprob <= chosen.logprob for other in others)  # greedy
        assert all(part.logprobs is None for part in await ask(llm))
        with pytest.raises(CallRefusedError, match="True with top_logprobs"):
            await ask(llm, top_logprobs=2)


class TestInstrumentation:
    @pytest.mark.parametrize("ask", ALL)
    async def test_events_and_spans_come_once_per_call(self, llm: PromptCacheLLM, ask: Ask) -> None:
        llm.metadata  # noqa: B018 - what loading announces does not count
        with watched() as seen:
            parts = await ask(llm)
        kind = "Chat" if ask in CHATS else "Completion"
        steps = len(parts) if len(parts) > 1 else 0
        assert seen.names("LLM") == [
            f"LLM{kind}StartEvent", *[f"LLM{kind}InProgressEvent"] * steps, f"LLM{kind}EndEvent",
        ]  # fmt: skip
        assert seen.spans("PromptCacheLLM") == [f"PromptCacheLLM.{ask.__name__}"]
        end = seen.events[-1]
        assert end.response == parts[-1]  # type: ignore[attr-defined]

    @pytest.mark.parametrize("ask", [predict, apredict, stream, astream])
    async def test_a_prediction_is_one_span_around_one_call(
        self, llm: PromptCacheLLM, ask: Callable[[LLM], Awaitable[None]]
    ) -> None:
        with watched() as seen:
            await ask(llm)
        outer, inner = seen.spans("PromptCacheLLM")
        assert outer == f"PromptCacheLLM.{ask.__name__}"
        method = "chat" if llm.metadata.is_chat_model else "complete"
        wanted = ask.__name__.replace("predict", method)
        wanted = wanted if method in wanted else f"{wanted}_{method}"
        assert inner == f"PromptCacheLLM.{wanted}"

    @pytest.mark.parametrize("ask", ALL)
    async def test_callbacks_start_and_end_once(self, llm: PromptCacheLLM, ask: Ask) -> None:
        callbacks = Callbacks()
        llm.callback_manager = CallbackManager([callbacks])
        parts = await ask(llm)
        assert (len(callbacks.started), len(callbacks.ended)) == (1, 1)
        assert parts[-1] in callbacks.ended[0].values()

    @pytest.mark.parametrize("ask", [a for a in ALL if "stream" not in a.__name__])
    async def test_a_failure_ends_the_callback_too(self, llm: PromptCacheLLM, ask: Ask) -> None:
        callbacks = Callbacks()
        llm.callback_manager = CallbackManager([callbacks])
        with pytest.raises(CallRefusedError):
            await ask(llm, temperature=-1)
        assert len(callbacks.ended) == 1
        assert isinstance(callbacks.ended[0]["exception"], CallRefusedError)


class TestGivingUp:
    ENDLESS = Grammar.lark("start: /[a-z ]{150,}/")

    @pytest.fixture
    def llm(self) -> PromptCacheLLM:
        return PromptCacheLLM(engine=Watched(load_lm("builtin:tiny-rag")), max_tokens=400)

    @pytest.mark.parametrize("ask", [acomplete, achat])
    async def test_a_cancelled_task_frees_its_slot(self, llm: Any, ask: Ask) -> None:
        task = asyncio.create_task(ask(llm, grammar=self.ENDLESS))
        await eventually(lambda: llm.engine.open_streams == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: llm.engine.open_streams == 0)
        assert not llm.engine.reports
        assert llm.complete(TEXT, max_tokens=2).text

    @pytest.mark.parametrize("method", ["astream_complete", "astream_chat"])
    async def test_an_async_stream_that_is_left_frees_its_slot(self, llm: Any, method: str) -> None:
        prompt: Any = TEXT if "complete" in method else MESSAGES
        parts: AsyncIterator[Any] = await getattr(llm, method)(prompt, grammar=self.ENDLESS)
        await anext(parts)
        assert llm.engine.open_streams == 1
        await parts.aclose()  # type: ignore[attr-defined]
        del parts
        await eventually(lambda: llm.engine.open_streams == 0)

    @pytest.mark.parametrize("method", ["stream_complete", "stream_chat"])
    def test_a_stream_that_is_closed_frees_its_slot(self, llm: Any, method: str) -> None:
        prompt: Any = TEXT if "complete" in method else MESSAGES
        parts = getattr(llm, method)(prompt, grammar=self.ENDLESS)
        next(parts)
        assert llm.engine.open_streams == 1
        parts.close()
        assert llm.engine.open_streams == 0


class TestMetadata:
    @pytest.mark.parametrize(
        ("template", "calls", "role"),
        [
            (chat_templates.CHATML_WITH_TOOLS, True, MessageRole.SYSTEM),
            (chat_templates.BRACKETS_WITH_TOOLS, True, MessageRole.USER),
            (chat_templates.WITHOUT_TOOLS, False, MessageRole.SYSTEM),
            (chat_templates.ALTERNATING, False, MessageRole.USER),
        ],
    )
    def test_it_is_true_to_the_chat_template(
        self, template: str, calls: bool, role: MessageRole
    ) -> None:
        lm = CausalLM(tiny_models.build("llama"), chat_templates.tokenizer(template))
        metadata = PromptCacheLLM(engine=PromptCacheEngine(lm)).metadata
        assert metadata.is_chat_model
        assert metadata.is_function_calling_model is calls
        assert metadata.system_role is role
        wordy = PromptCacheLLM(engine=PromptCacheEngine(lm), is_function_calling_model=True)
        assert wordy.metadata.is_function_calling_model

    def test_what_messages_to_prompt_does_is_not_known(self) -> None:
        lm = CausalLM(
            tiny_models.build("llama"), chat_templates.tokenizer(chat_templates.CHATML_WITH_TOOLS)
        )
        llm = PromptCacheLLM(
            engine=PromptCacheEngine(lm), messages_to_prompt=lambda messages: str(messages)
        )
        assert not llm.metadata.is_function_calling_model

    def test_one_line_has_llama_index_count_in_the_models_tokens(
        self, llm: PromptCacheLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
        llm.set_global_tokenizer()
        counts = llama_index.core.global_tokenizer
        assert counts is not None
        assert counts(TEXT) == llm.engine.lm.token_ids(TEXT)
        assert pickle.loads(pickle.dumps(counts))("Hello") == counts("Hello")

    def test_nodes_that_fit_are_not_cut(
        self, llm: PromptCacheLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cramped = PromptCacheLLM(engine=llm.engine, max_tokens=2, context_window=1000)
        prompts = {}
        for by_model in (False, True):
            monkeypatch.setattr(llama_index.core, "global_tokenizer", list)  # by letters
            if by_model:
                cramped.set_global_tokenizer()
            llm.engine.reports.clear()
            index = SummaryIndex([TextNode(text=text) for text in DOCUMENTS])
            index.as_query_engine(llm=cramped).query("Who?")
            prompts[by_model] = len(llm.engine.reports)
        assert prompts[True] == 1 < prompts[False]


async def test_the_context_extractor_of_an_ingestion_reads_each_document_once(
    llm: PromptCacheLLM,
) -> None:
    """It marks the document in its messages, and sends headers that only a server understands."""
    texts = [f"Chapter {i}: the ferry of Extracton sank, was raised and sank again." for i in "12"]
    source = Document(text=" ".join(texts), id_="whole")
    docstore = SimpleDocumentStore()
    docstore.add_documents([source])
    chunks = [
        TextNode(text=text, relationships={NodeRelationship.SOURCE: source.as_related_node_info()})
        for text in texts
    ]
    llm.engine.reports.clear()
    extractor = DocumentContextExtractor(docstore=docstore, llm=llm, max_output_tokens=3)
    for chunk in chunks:
        (metadata,) = await extractor.aextract([chunk])
        assert metadata
    first, second = llm.engine.reports
    for report in (first, second):
        (marked,) = [s for s in report.segments if s.kind == "document"]
        assert marked.text == f"<document>{source.text}</document>"
        assert text_of(report).count(source.text) == 1
    assert len(documents_of(second)) == 1
    assert {s.source for s in second.segments if s.kind == "document"} <= {
        "memory", "prefix", "repaired",
    }  # fmt: skip
