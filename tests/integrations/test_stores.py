"""`store=` of the language models: what is encoded once is there for the next process."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corpus import DOCUMENTS
from pcache_core import DiskStore, MemoryStore, OptionError, StoreError, TieredStore
from pcache_core.store.object import ObjectStore
from pcache_core.store.redis import RedisStore
from pcache_integrations._stores import build_store, check_store
from pcache_integrations.langchain import PromptCacheLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM
from redis_server import Server

PROMPT = f"Answer the question from the documents.\n\n{DOCUMENTS[1]}\n\nQuestion: Who?\nAnswer:"


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    server = Server(tmp_path)
    yield server.url
    server.kill()


def tiers(spec: str) -> list[type]:
    store = build_store(spec)
    return [type(tier) for tier in store.tiers] if isinstance(store, TieredStore) else [type(store)]


def test_a_word_a_path_and_a_url_name_stores(tmp_path: Path) -> None:
    assert tiers("memory") == [MemoryStore]
    assert tiers(str(tmp_path / "states")) == [MemoryStore, DiskStore]
    assert tiers("redis://127.0.0.1:1/0") == [MemoryStore, RedisStore]
    assert tiers("memory://bucket") == [MemoryStore, ObjectStore]


def test_checking_a_path_makes_nothing(tmp_path: Path) -> None:
    check_store(str(tmp_path / "states"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spec", ["", " ", None, 3, "memroy", "Memory", "redis://host:port", "nosuch://x"]
)
def test_what_names_no_store_is_refused(spec: Any) -> None:
    with pytest.raises(OptionError):
        check_store(spec)


def test_a_path_that_can_be_no_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        build_store(str(tmp_path / "file"))


@pytest.mark.parametrize("spec", ["PATH", "redis://127.0.0.1:1/0", "memory://bucket"])
def test_what_lasts_is_kept_as_asked(tmp_path: Path, spec: str) -> None:
    store = build_store(spec.replace("PATH", str(tmp_path)), "int8")
    assert isinstance(store, TieredStore)
    assert getattr(store.tiers[1], "storage_dtype") == "int8"  # noqa: B009 (each has it)


def test_an_unknown_storage_dtype_is_refused_before_anything_is_loaded() -> None:
    for model in (PromptCacheLLM, LlamaIndexLLM):
        with pytest.raises(OptionError, match="storage_dtype='int4'"):
            model(storage_dtype="int4")


@pytest.mark.parametrize("kind", ["path", "redis", "object"])
def test_documents_that_one_model_object_cached_serve_another(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The first is gone, and its engine with it: the second has its own."""
    if kind == "redis":
        spec = request.getfixturevalue("redis_url")
    else:
        spec = str(tmp_path) if kind == "path" else f"memory://{uuid.uuid4().hex}"

    def llm() -> PromptCacheLLM:
        return PromptCacheLLM(model="builtin:tiny-rag", store=spec, max_tokens=4, reuse="fast")

    first = llm()
    first.cache_documents(list(DOCUMENTS))
    answer = first.invoke(PROMPT)
    assert isinstance(first.engine.store, TieredStore)
    gone = weakref.ref(first.engine)
    first.close()
    assert gone() is None
    second = llm()
    report = second.cache_documents(list(DOCUMENTS))
    assert (report.encoded, report.already_stored) == (0, len(DOCUMENTS))
    assert second.invoke(PROMPT) == answer
    read = second.engine.reports[-1]
    assert read.encoded_tokens == 0
    sources = {segment.source for segment in read.segments if segment.kind == "document"}
    assert sources == {"disk" if kind == "path" else "remote"}
