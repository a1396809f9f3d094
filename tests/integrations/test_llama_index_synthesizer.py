"""The synthesizer that keeps nodes whole: what prompts hold, in which order, and what it tells."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.response.schema import (
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.prompts import PromptTemplate, RichPromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import Document, MetadataMode, NodeWithScore, QueryBundle, TextNode

from corpus import DOCUMENTS, OPENING, QUESTIONS
from llama_index_parts import (
    QA_TEMPLATE,
    FixedRetriever,
    RecordingLLM,
    argument_of,
    chat_lm,
    documents_of,
    nodes,
    pieces_of,
    text_of,
)
from pcache_core import ContextLengthError, OptionError, PromptCacheEngine
from pcache_core.params import ReuseMode
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import PromptCacheLLM, PromptCacheSynthesizer

pytestmark = pytest.mark.usefixtures("closed_loops")

TEMPLATE = PromptTemplate(QA_TEMPLATE)
QUESTION = "Where was Jerome Fertden born?"


def llm_of(reuse: ReuseMode = "fast", **options: Any) -> PromptCacheLLM:
    engine = PromptCacheEngine(load_lm("builtin:tiny-rag"))
    return PromptCacheLLM(engine=engine, max_tokens=8, **{"reuse": reuse, **options})


def scored(some: Sequence[TextNode], scores: Sequence[float | None] = ()) -> list[NodeWithScore]:
    best_first = scores or [1 - place / 100 for place in range(len(some))]
    return [NodeWithScore(node=n, score=s) for n, s in zip(some, best_first, strict=True)]


def synthesizer(llm: Any, **options: Any) -> PromptCacheSynthesizer:
    return PromptCacheSynthesizer(llm, **{"text_qa_template": TEMPLATE, **options})


class TestThePrompt:
    def test_nodes_are_documents_the_query_an_argument_the_template_literals(self) -> None:
        llm = llm_of()
        engine = RetrieverQueryEngine(FixedRetriever(nodes()[4:7]), synthesizer(llm))
        assert str(engine.query(QUESTION)).strip() == QUESTIONS[QUESTION][0]
        report = llm.engine.reports[-1]
        assert pieces_of(report) == [
            ("literal", None),
            ("document", "d4"),
            ("argument", "context_str"),
            ("document", "d5"),
            ("argument", "context_str"),
            ("document", "d6"),
            ("literal", None),
            ("argument", "query_str"),
            ("literal", None),
        ]
        assert argument_of(report, "query_str") == QUESTION
        joined = "\n\n".join(DOCUMENTS[4:7])
        assert text_of(report) == QA_TEMPLATE.format(context_str=joined, query_str=QUESTION)

    def test_it_takes_the_place_of_an_engines_synthesizer(self) -> None:
        llm = llm_of()
        index = VectorStoreIndex(nodes(), embed_model=MockEmbedding(embed_dim=2))
        engine = index.as_query_engine(
            llm=llm, similarity_top_k=3, response_synthesizer=synthesizer(llm)
        )
        response = engine.query(QUESTION)
        assert documents_of(llm.engine.reports[-1]) == [n.node_id for n in response.source_nodes]

    def test_the_prompt_is_that_of_the_compact_mode_where_all_fits(self) -> None:
        llm = llm_of()
        index = VectorStoreIndex(nodes(), embed_model=MockEmbedding(embed_dim=2))
        answers = []
        for options in ({"response_mode": "compact"}, {"response_synthesizer": None}):
            if "response_synthesizer" in options:
                options["response_synthesizer"] = PromptCacheSynthesizer(llm)  # type: ignore
            answers.append(str(index.as_query_engine(llm=llm, **options).query(QUESTION)))
        compact, ours = list(llm.engine.reports)[-2:]
        assert text_of(ours) == text_of(compact)
        assert answers[0] == answers[1]

    def test_messages_of_a_chat_model(self) -> None:
        llm = PromptCacheLLM(engine=PromptCacheEngine(chat_lm()), max_tokens=2, reuse="fast")
        PromptCacheSynthesizer(llm).synthesize(QUESTION, scored(nodes()[:2]))
        assert documents_of(llm.engine.reports[-1]) == ["d0", "d1"]
        assert argument_of(llm.engine.reports[-1], "query_str") == QUESTION

    def test_precomputed_nodes_with_metadata_are_found(self) -> None:
        llm = llm_of()
        known = nodes(file="x.txt")
        llm.cache_documents(known, progress=False)
        synthesizer(llm).synthesize(QueryBundle(QUESTION), scored(known[:3]))
        report = llm.engine.reports[-1]
        assert {s.source for s in report.segments if s.kind == "document"} == {"memory"}
        assert text_of(report).count("file: x.txt") == 3

    @pytest.mark.parametrize(
        ("mode", "shown"),
        [
            (MetadataMode.LLM, ["file: x"]),
            (MetadataMode.ALL, ["file: x", "date: 1"]),
            (MetadataMode.NONE, []),
        ],
    )
    def test_metadata_modes(self, mode: MetadataMode, shown: list[str]) -> None:
        llm = llm_of()
        node = TextNode(
            text=DOCUMENTS[0],
            id_="n",
            metadata={"file": "x", "date": "1"},
            excluded_llm_metadata_keys=["date"],
        )
        response = synthesizer(llm, metadata_mode=mode).synthesize(QUESTION, scored([node]))
        read = text_of(llm.engine.reports[-1])
        assert [entry for entry in ("file: x", "date: 1") if entry in read] == shown
        assert documents_of(llm.engine.reports[-1]) == ["n"]
        assert response.source_nodes[0].node is node
        assert response.metadata == {"n": node.metadata}

    def test_nodes_without_text_are_sources_only(self) -> None:
        llm = llm_of()
        some = [nodes()[0], TextNode(text=" \n", id_="empty"), nodes()[1]]
        response = synthesizer(llm).synthesize(QUESTION, scored(some))
        assert f"{DOCUMENTS[0]}\n\n{DOCUMENTS[1]}" in text_of(llm.engine.reports[-1])
        assert [n.node_id for n in response.source_nodes] == ["d0", "empty", "d1"]


class TestEveryKindOfAnswer:
    async def test_sync_async_and_streams_say_the_same(self) -> None:
        some = scored(nodes()[4:7])
        plain = synthesizer(llm_of()).synthesize(QUESTION, some)
        assert isinstance(plain, Response)
        later = await synthesizer(llm_of()).asynthesize(QUESTION, some)
        assert isinstance(later, Response)
        stream = synthesizer(llm_of(), streaming=True).synthesize(QUESTION, some)
        assert isinstance(stream, StreamingResponse)
        pieces = list(stream.response_gen)
        astream = await synthesizer(llm_of(), streaming=True).asynthesize(QUESTION, some)
        assert isinstance(astream, AsyncStreamingResponse)
        apieces = [piece async for piece in astream.response_gen]
        assert len(pieces) > 1
        assert {"".join(pieces), "".join(apieces), str(plain), str(later)} == {str(plain)}
        assert str(plain).strip() == QUESTIONS[QUESTION][0]
        for response in (plain, later, stream, astream):
            assert [n.node_id for n in response.source_nodes] == ["d4", "d5", "d6"]

    async def test_the_loop_goes_on(self) -> None:
        synth = synthesizer(llm_of())
        questions = [synth.asynthesize(q, scored(nodes()[:4])) for q in QUESTIONS]
        run = asyncio.ensure_future(asyncio.gather(*questions))
        ticks = 0
        while not run.done():
            await asyncio.sleep(0)
            ticks += 1
        assert ticks > len(QUESTIONS)
        assert len(await run) == len(QUESTIONS)

    async def test_objects(self) -> None:
        class Place(BaseModel):
            city: str

        answer = '{"city": "Gluvmouth"}'
        llm = RecordingLLM(answers=[answer, answer])
        synth = synthesizer(llm, output_cls=Place)
        some = scored(nodes()[4:7])
        for response in (
            synth.synthesize(QUESTION, some),
            await synth.asynthesize(QUESTION, some),
        ):
            assert isinstance(response, PydanticResponse)
            assert response.response == Place(city="Gluvmouth")
        assert all(DOCUMENTS[6] in prompt for prompt in llm.prompts)
        assert TEMPLATE.output_parser is None

    def test_a_structured_llm(self) -> None:
        class Place(BaseModel):
            city: str

        llm = RecordingLLM(answers=['{"city": "Gluvmouth"}'])
        structured = llm.as_structured_llm(Place)
        response = synthesizer(structured).synthesize(QUESTION, scored(nodes()[4:7]))
        assert isinstance(response, PydanticResponse)
        assert response.response == Place(city="Gluvmouth")

    def test_no_nodes_and_no_words(self) -> None:
        llm = RecordingLLM(answers=[""])
        assert str(synthesizer(llm).synthesize(QUESTION, [])) == "Empty Response"
        assert llm.prompts == []
        assert str(synthesizer(llm).synthesize(QUESTION, scored(nodes()[:1]))) == "Empty Response"

    def test_additional_sources_are_sources(self) -> None:
        first, second = scored(nodes()[:2])
        response = synthesizer(llm_of()).synthesize(QUESTION, [first], [second])
        assert response.source_nodes == [first, second]
        assert set(response.metadata or ()) == {"d0", "d1"}
        assert DOCUMENTS[1] not in text_of(synthesizer_report(response, first))


def synthesizer_report(response: Any, first: NodeWithScore) -> Any:
    llm = llm_of()
    synthesizer(llm).synthesize(QUESTION, [first], response.source_nodes[1:])
    return llm.engine.reports[-1]


class TestOrder:
    def test_stable_order_makes_more_of_shuffled_retrievals_an_exact_prefix(self) -> None:
        shuffled = []
        for seed in range(6):
            some = nodes()[:6]
            random.Random(seed).shuffle(some)
            shuffled.append(some)
        prefixes = {}
        for order in ("retrieved", "stable"):
            llm = llm_of("exact")
            for number, some in enumerate(shuffled):
                question = f"What is number {number}?"
                synthesizer(llm, order=order).synthesize(question, scored(some))
            sources = [part for r in llm.engine.reports for part in r.segments]
            prefixes[order] = sum(p.num_tokens for p in sources if p.source == "prefix")
        context = sum(load_lm("builtin:tiny-rag").count_tokens(text) for text in DOCUMENTS[:6])
        assert prefixes["stable"] >= 5 * context
        assert prefixes["retrieved"] < prefixes["stable"] / 3

    @pytest.mark.parametrize("reuse", ["exact", "fast", "balanced"])
    def test_answers_are_those_of_the_same_order_given_by_hand(self, reuse: ReuseMode) -> None:
        for question in QUESTIONS:
            by_hand = synthesizer(llm_of(reuse)).synthesize(question, scored(nodes()))
            some = scored(nodes())
            random.Random(question).shuffle(some)
            ours = synthesizer(llm_of(reuse), order="stable").synthesize(question, some)
            assert str(ours) == str(by_hand)
            assert ours.source_nodes == some

    def test_nodes_of_a_document_stand_as_they_stand_there(self) -> None:
        llm = llm_of()
        texts = {"b": " ".join(DOCUMENTS[:4]), "a": " ".join(DOCUMENTS[4:])}
        cut = TokenTextSplitter(chunk_size=40, chunk_overlap=0)(
            [Document(text=text, id_=name) for name, text in texts.items()]
        )
        assert len(cut) > 4
        expected = [n.node_id for name in "ab" for n in cut if n.ref_doc_id == name]
        some = scored(cut)  # type: ignore[arg-type]
        random.Random(3).shuffle(some)
        synthesizer(llm, order="stable").synthesize(QUESTION, some)
        assert documents_of(llm.engine.reports[-1]) == expected


class TestWhatDoesNotFit:
    def fill(self, count: int, **options: Any) -> tuple[PromptCacheLLM, int]:
        """A model with room for just so many of eight equally long nodes."""
        llm = llm_of(**options)
        each = llm.engine.lm.count_tokens(EQUAL[0].text) + 3
        rest = llm.engine.lm.count_tokens(QA_TEMPLATE.format(context_str="", query_str=QUESTION))
        llm.context_window = count * each + rest + llm.max_tokens + 8
        return llm, each

    @pytest.mark.parametrize("count", [1, 5, 8])
    def test_the_lowest_ranked_are_left_out_whole(
        self, count: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        llm, _ = self.fill(count)
        scores = [0.1, 0.9, 0.3, 0.8, 0.5, 0.2, 0.7, 0.6]
        with caplog.at_level(logging.WARNING):
            response = synthesizer(llm).synthesize(QUESTION, scored(EQUAL, scores))
        best = sorted(range(8), key=lambda place: -scores[place])
        kept = [f"e{place}" for place in sorted(best[:count])]
        left_out = [f"e{place}" for place in sorted(best[count:])]
        report = llm.engine.reports[-1]
        assert documents_of(report) == kept == [n.node_id for n in response.source_nodes]
        assert all(EQUAL[int(name[1])].text in text_of(report) for name in kept)
        note = (response.metadata or {}).get("prompt_cache")
        if count == 8:
            assert note is None
            assert not caplog.records
        else:
            assert note is not None
            assert note["left_out_node_ids"] == left_out
            assert f"{8 - count} of 8 nodes are left out" in caplog.text
        assert report.prompt_tokens + llm.max_tokens <= (llm.context_window or 0)

    def test_without_scores_the_last_are_left_out(self) -> None:
        llm, _ = self.fill(3)
        synthesizer(llm).synthesize(QUESTION, scored(EQUAL, [None, 0.1, *[0.9] * 6]))
        assert documents_of(llm.engine.reports[-1]) == ["e0", "e1", "e2"]

    def test_a_system_prompt_takes_room(self) -> None:
        llm, each = self.fill(5)
        llm.system_prompt = "Monday and Monday"
        assert 1 < llm.engine.lm.count_tokens(llm.system_prompt) < each
        synthesizer(llm).synthesize(QUESTION, scored(EQUAL))
        assert len(documents_of(llm.engine.reports[-1])) == 4

    async def test_if_not_even_the_best_fits_it_says_so(self) -> None:
        llm, _ = self.fill(1)
        llm.context_window = (llm.context_window or 0) - 4
        with pytest.raises(ContextLengthError, match="node 'e0' takes .* room for"):
            synthesizer(llm).synthesize(QUESTION, scored(EQUAL))
        with pytest.raises(ContextLengthError, match="node 'e0' takes .* room for"):
            await synthesizer(llm).asynthesize(QUESTION, scored(EQUAL))
        llm.max_tokens = 10 * llm.context_window
        with pytest.raises(ContextLengthError, match="room for 0 beside"):
            synthesizer(llm).synthesize(QUESTION, scored(EQUAL))
        assert not llm.engine.reports

    def test_other_models_are_counted_for_as_well(self) -> None:
        llm = RecordingLLM(answers=["x"], window=200, num_output=50)
        response = synthesizer(llm).synthesize(QUESTION, scored(nodes()))
        (prompt,) = llm.prompts
        whole = [text for text in DOCUMENTS if text in prompt]
        assert 0 < len(whole) < len(DOCUMENTS)
        assert prompt.startswith(OPENING + "\n\n".join(whole) + "\n\nQuestion")
        assert len(response.source_nodes) == len(whole)


EQUAL = [
    TextNode(
        text=f"Note {place}: the meeting was moved to Monday and the doors close.", id_=f"e{place}"
    )
    for place in range(8)
]


class TestPromptsAndOptions:
    def test_prompts_can_be_read_and_changed(self) -> None:
        llm = llm_of()
        engine = RetrieverQueryEngine(FixedRetriever(nodes()[:2]), PromptCacheSynthesizer(llm))
        key = "response_synthesizer:text_qa_template"
        assert set(engine.get_prompts()) == {key}
        rich = RichPromptTemplate("Read:\n{{ context_str }}\n\nThen say: {{ query_str }}\n")
        engine.update_prompts({key: rich})
        engine.query(QUESTION)
        assert text_of(llm.engine.reports[-1]).startswith(f"Read:\n{DOCUMENTS[0]}\n\n")
        assert documents_of(llm.engine.reports[-1]) == ["d0", "d1"]

    def test_the_default_is_the_settings_llm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        llm = llm_of()
        monkeypatch.setattr(Settings, "_llm", llm)
        PromptCacheSynthesizer().synthesize(QUESTION, scored(nodes()[:1]))
        assert len(llm.engine.reports) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"order": "sorted"}, "unknown order 'sorted'; use one of retrieved, stable"),
            ({"metadata_mode": "all"}, "must be a MetadataMode, got 'all'"),
            ({"streaming": True, "output_cls": BaseModel}, "can't be streamed"),
        ],
    )
    def test_wrong_options_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            PromptCacheSynthesizer(llm_of(), **options)
