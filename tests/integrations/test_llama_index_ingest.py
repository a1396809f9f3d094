"""Nodes that are encoded while a pipeline ingests them, and every way around it."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import pickle
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings, StorageContext, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, Document, MetadataMode, TextNode, TransformComponent
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from corpus import DOCUMENTS, QUESTIONS
from pcache_core import MemoryStore, OptionError, PromptCacheEngine, Segment
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import PromptCacheLLM, PromptCachePrecompute

EMBEDDING = MockEmbedding(embed_dim=2)
QUESTION = "What does Monddyne make?"


def documents() -> list[Document]:
    return [
        Document(
            text=text,
            id_=f"doc{number}",
            metadata={"file": f"{number}.txt", "date": "today"},
            excluded_llm_metadata_keys=["date"],
        )
        for number, text in enumerate(DOCUMENTS)
    ]


def llm_of(store: MemoryStore | None = None) -> PromptCacheLLM:
    """A model with a store of its own, which reuses even texts as short as these."""
    engine = PromptCacheEngine(load_lm("builtin:tiny-rag"), store=store, reuse="fast")
    return PromptCacheLLM(engine=engine, max_tokens=12, reuse="fast")


def pipeline(*last: TransformComponent, **options: Any) -> IngestionPipeline:
    return IngestionPipeline(transformations=[SentenceSplitter(), EMBEDDING, *last], **options)


def ask(llm: PromptCacheLLM, nodes: Sequence[BaseNode], top_k: int = 2) -> dict[str, str]:
    """Put a question to an index of the nodes; where those that it found came from, by text."""
    index = VectorStoreIndex(list(nodes), embed_model=EMBEDDING)
    response = index.as_query_engine(llm=llm, similarity_top_k=top_k).query(QUESTION)
    assert len(response.source_nodes) == top_k
    segments = llm.engine.reports[-1].segments
    return {part.text: part.source for part in segments if part.kind == "document"}


def num_texts(llm: PromptCacheLLM) -> int:
    """How many texts the store has both states of: for the first place, and for the others."""
    count = llm.engine.stats().states
    assert count is not None
    assert count % 2 == 0
    return count // 2


class TestInAPipeline:
    def test_the_first_question_finds_its_nodes_encoded(self) -> None:
        llm = llm_of()
        nodes = pipeline(PromptCachePrecompute(llm)).run(documents=documents())
        found = ask(llm, nodes, top_k=3)
        assert set(found.values()) == {"memory"}
        assert len(found) == 3
        assert all("file:" in text and "today" not in text for text in found)
        # Only a template's opening may be new.
        later = llm.engine.reports[-1].segments[1:]
        assert [part.text for part in later if part.source == "encoded"] == []

    def test_nodes_pass_untouched(self) -> None:
        precompute = PromptCachePrecompute(llm_of(), progress=False)
        nodes = SentenceSplitter()(documents())
        before = [(node.node_id, node.hash, node.to_dict()) for node in nodes]
        assert precompute(nodes) is nodes
        assert [(node.node_id, node.hash, node.to_dict()) for node in nodes] == before

    def test_empty_texts_and_equal_texts_cost_nothing(self) -> None:
        llm = llm_of()
        texts = [DOCUMENTS[0], "", "  \n", DOCUMENTS[0] + "\n", DOCUMENTS[1]]
        PromptCachePrecompute(llm)([TextNode(text=text) for text in texts])
        assert num_texts(llm) == 2
        PromptCachePrecompute(llm)([])
        assert num_texts(llm) == 2

    def test_it_works_in_an_indexs_own_transformations(self) -> None:
        llm = llm_of()
        steps = [SentenceSplitter(), PromptCachePrecompute(llm)]
        index = VectorStoreIndex.from_documents(
            documents()[:2], embed_model=EMBEDDING, transformations=steps
        )
        assert num_texts(llm) == 2
        index.insert(documents()[2])
        assert num_texts(llm) == 3

    def test_a_text_too_long_for_the_model_is_left_out(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        llm = llm_of()
        most = 2048 - len(llm.engine.preamble_for(DOCUMENTS[0]))
        count = len(llm.engine.lm.text.ids(Segment("word " * 100, "document")))
        # Too long after a preamble, though not for the model alone.
        long = "word " * (2040 * 100 // count)
        nodes = [TextNode(text=long), TextNode(text="word " * 3000), TextNode(text=DOCUMENTS[0])]
        with caplog.at_level(logging.WARNING):
            PromptCachePrecompute(llm)(nodes)
        assert f"2 of 3 nodes have more than the {most} tokens" in caplog.text
        assert num_texts(llm) == 1

    def test_a_text_too_long_for_the_store_is_left_out(self) -> None:
        small = MemoryStore(budget_bytes=60 * load_lm("builtin:tiny-rag").bytes_per_token)
        llm = llm_of(small)
        PromptCachePrecompute(llm)([TextNode(text="word " * 100), TextNode(text=DOCUMENTS[5])])
        assert num_texts(llm) == 1

    def test_texts_that_change_after_it_are_encoded_when_the_run_ends(self) -> None:
        class Title(TransformComponent):
            def __call__(self, nodes: Sequence[BaseNode], **_: Any) -> Sequence[BaseNode]:
                for node in nodes:
                    node.metadata["title"] = f"About {node.node_id}"
                return nodes

        llm = llm_of()
        nodes = pipeline(PromptCachePrecompute(llm), Title()).run(documents=documents())
        assert set(ask(llm, nodes).values()) == {"memory"}


class TestAsync:
    async def test_arun_encodes_and_the_loop_goes_on(self) -> None:
        llm = llm_of()
        threads: list[str] = []
        encode = llm.engine.encode

        def slow(*args: Any, **options: Any) -> Any:
            threads.append(threading.current_thread().name)
            time.sleep(0.3)
            return encode(*args, **options)

        llm.engine.encode = slow  # type: ignore[method-assign]
        run = asyncio.ensure_future(
            pipeline(PromptCachePrecompute(llm)).arun(documents=documents())
        )
        ticks = 0
        while not run.done():
            await asyncio.sleep(0.01)
            ticks += bool(threads) and not run.done()
        assert ticks >= 5
        assert threading.main_thread().name not in threads
        nodes = await run
        assert num_texts(llm) == len(nodes)

    async def test_nodes_from_the_cache_are_encoded_behind_arun(self) -> None:
        first = llm_of()
        cached = pipeline(PromptCachePrecompute(first))
        nodes = await cached.arun(documents=documents())
        second = llm_of()
        again = pipeline(PromptCachePrecompute(second), cache=cached.cache)
        assert len(await again.arun(documents=documents())) == len(nodes)
        for _ in range(200):
            if second.engine.stats().states == 2 * len(nodes):  # odd while a text is at work
                break
            await asyncio.sleep(0.02)
        assert num_texts(second) == len(nodes)


class TestPipelineCache:
    def test_a_loaded_cache_and_an_empty_store(self, tmp_path: Path) -> None:
        first = llm_of()
        written = pipeline(PromptCachePrecompute(first))
        written.run(documents=documents())
        written.persist(str(tmp_path))
        second = llm_of()
        loaded = pipeline(PromptCachePrecompute(second))
        loaded.load(str(tmp_path))
        assert num_texts(second) == 0
        nodes = loaded.run(documents=documents())
        assert num_texts(second) == len(nodes)
        assert set(ask(second, nodes).values()) == {"memory"}

    def test_states_that_are_lost_after_it_are_made_again_when_asked_for(self) -> None:
        llm = llm_of()
        nodes = pipeline(PromptCachePrecompute(llm)).run(documents=documents())
        llm.engine.forget([node.get_content(MetadataMode.LLM) for node in nodes])
        answer = set(ask(llm, nodes).values())
        assert answer == {"encoded"}

    def test_a_run_from_the_cache_encodes_nothing_that_is_there(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        llm = llm_of()
        steps = pipeline(PromptCachePrecompute(llm))
        steps.run(documents=documents())
        before = llm.engine.stats()
        steps.run(documents=documents())
        assert llm.engine.stats() == before

    def test_keys_are_the_models_and_the_stores(self, tmp_path: Path) -> None:
        nodes = [TextNode(text="text")]

        def key(step: PromptCachePrecompute) -> str:
            return str(get_transformation_hash(nodes, step))

        base = {"model": "builtin:tiny-rag", "store": str(tmp_path)}
        one = key(PromptCachePrecompute(**base))
        assert one == key(PromptCachePrecompute(**base, progress=False, device="cpu"))
        assert one == key(PromptCachePrecompute(PromptCacheLLM(**base, temperature=0.5)))
        assert one == key(pickle.loads(pickle.dumps(PromptCachePrecompute(**base))))
        assert one == key(PromptCachePrecompute.from_dict(PromptCachePrecompute(**base).to_dict()))
        assert one != key(PromptCachePrecompute(**base, namespace="other"))
        assert one != key(PromptCachePrecompute(**{**base, "store": str(tmp_path / "other")}))
        fingerprint = load_lm("builtin:tiny-rag").fingerprint
        assert PromptCachePrecompute(**base).to_dict()["fingerprint"] == fingerprint


class TestDocumentStores:
    def test_upserts_skip_what_is_unchanged_and_encode_what_is_new(self) -> None:
        llm = llm_of()
        steps = pipeline(
            PromptCachePrecompute(llm),
            docstore=SimpleDocumentStore(),
            vector_store=SimpleVectorStore(),
        )
        steps.run(documents=documents()[:3])
        assert num_texts(llm) == 3
        changed = documents()[:3]
        changed[1].set_content(DOCUMENTS[7])
        assert len(steps.run(documents=changed)) == 1
        assert num_texts(llm) == 4

    def test_duplicates_are_encoded_once(self) -> None:
        llm = llm_of()
        steps = pipeline(PromptCachePrecompute(llm))
        twice = [*documents()[:2], *documents()[:2]]
        assert len(steps.run(documents=twice)) == 4
        assert num_texts(llm) == 2

    def test_what_upserts_skip_is_encoded_from_the_index(self) -> None:
        stores = StorageContext.from_defaults()
        VectorStoreIndex.from_documents(documents(), embed_model=EMBEDDING, storage_context=stores)
        (struct,) = stores.index_store.index_structs()
        llm = llm_of()
        index = VectorStoreIndex(index_struct=struct, storage_context=stores, embed_model=EMBEDDING)
        report = llm.cache_documents(index, progress=False)
        assert (report.texts, report.encoded) == (len(DOCUMENTS), len(DOCUMENTS))
        assert llm.cache_documents(stores.docstore, progress=False).already_stored == len(DOCUMENTS)


class TestWorkers:
    def test_workers_encode_into_a_folder_and_leave_memory_to_this_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Real processes: each costs seconds, so both kinds of store are in one run."""
        here = llm_of()
        there = PromptCacheLLM(
            model="builtin:tiny-rag", store=str(tmp_path / "states"), max_tokens=4, reuse="fast"
        )
        memory, folder = PromptCachePrecompute(here), PromptCachePrecompute(there)
        catch_up = PromptCachePrecompute.catch_up
        monkeypatch.setattr(
            PromptCachePrecompute,
            "catch_up",
            lambda step, nodes: None if step is folder else catch_up(step, nodes),
        )
        # No splitter: LlamaIndex's own can't be sent to another process.
        pipeline = IngestionPipeline(transformations=[EMBEDDING, memory, folder])
        nodes = pipeline.run(documents=documents()[:4], num_workers=2)
        assert len(nodes) == 4
        assert "encodes nothing in this worker process, as memory" in capfd.readouterr().err
        assert num_texts(here) == num_texts(there) == 4
        assert set(ask(here, nodes).values()) == {"memory"}
        assert set(ask(there, nodes).values()) == {"disk"}

    def test_a_copy_shares_no_memory(self, caplog: pytest.LogCaptureFixture) -> None:
        llm = llm_of()
        step = PromptCachePrecompute(llm)
        away = pickle.loads(pickle.dumps(step))
        nodes = [TextNode(text=DOCUMENTS[0])]
        with caplog.at_level(logging.WARNING):
            assert away(nodes) is nodes
        assert "memory is not shared" in caplog.text
        assert num_texts(llm) == 0
        copy.deepcopy(step)(nodes)
        assert num_texts(llm) == 1

    def test_a_forked_copy_is_not_told_to_have_a_store_that_it_has(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm = PromptCacheLLM("builtin:tiny-rag", store=str(tmp_path))
        away = pickle.loads(pickle.dumps(PromptCachePrecompute(llm)))
        monkeypatch.setattr(os, "getpid", lambda: 0)  # as after a fork
        with caplog.at_level(logging.WARNING):
            away([TextNode(text=DOCUMENTS[0])])
        assert "it was forked" in caplog.text
        assert "call run(), not arun()" in caplog.text
        assert "store that lasts" not in caplog.text


class TestOptions:
    def test_the_default_is_the_settings_llm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        llm = llm_of()
        monkeypatch.setattr(Settings, "_llm", llm)
        PromptCachePrecompute()([TextNode(text=DOCUMENTS[0])])
        assert num_texts(llm) == 1

    def test_a_folder_is_shared_with_a_model_object_of_the_same_options(
        self, tmp_path: Path
    ) -> None:
        base = {"model": "builtin:tiny-rag", "store": str(tmp_path)}
        step = PromptCachePrecompute(**base)
        step([TextNode(text=text) for text in DOCUMENTS])
        llm = PromptCacheLLM(**base, max_tokens=4)
        llm.engine.store.flush()  # type: ignore[attr-defined]
        assert llm.cache_documents(DOCUMENTS, progress=False).already_stored == len(DOCUMENTS)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"model": "builtin:tiny-rag"},
            {"model": "builtin:tiny-rag", "store": "memory"},
            {"store": "./states"},
            {"llm": "gpt"},
            {"llm": MockEmbedding(embed_dim=2)},
        ],
    )
    def test_without_a_model_that_others_read_from_it_is_refused(
        self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Settings, "_llm", None)
        with pytest.raises(OptionError, match="needs to know whose states it makes"):
            PromptCachePrecompute(**options)

    def test_a_model_object_and_its_options_are_refused(self) -> None:
        with pytest.raises(OptionError, match="brings its own model, store; leave them out"):
            PromptCachePrecompute(llm_of(), model="x", store="./states")

    def test_unknown_options_are_refused(self) -> None:
        with pytest.raises(OptionError, match="did you mean 'namespace'"):
            PromptCachePrecompute(llm_of(), namespaces="x")

    def test_making_one_loads_no_model(self, tmp_path: Path) -> None:
        PromptCachePrecompute(model="no/such/model", store=str(tmp_path))


def test_every_question_of_the_corpus_is_read_from_precomputed_nodes() -> None:
    llm = llm_of()
    nodes = pipeline(PromptCachePrecompute(llm)).run(documents=documents())
    index = VectorStoreIndex(nodes, embed_model=EMBEDDING)
    for question in QUESTIONS:
        index.as_query_engine(llm=llm, similarity_top_k=3).query(question)
        # Only a template's opening may be new.
        later = llm.engine.reports[-1].segments[1:]
        assert [part.text for part in later if part.source == "encoded"] == []
