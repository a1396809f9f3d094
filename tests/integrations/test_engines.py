"""The engine that answers is the one that a language model's fields describe, and it is kept."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import ConfigurableField
from llama_index.core.schema import TextNode

from pcache_core import CausalLM, DiskStore, MemoryStore, Preamble, PromptCacheEngine, TieredStore
from pcache_core.errors import DeadlineExceededError, ModelError, OptionError
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import ChatPromptCache
from pcache_integrations.langchain import PromptCacheLLM as LangChainLLM
from pcache_integrations.llama_index import PromptCacheLLM as LlamaIndexLLM
from pcache_integrations.llama_index import PromptCachePrecompute

TOY = "builtin:tiny-rag"
CLASSES = [LangChainLLM, ChatPromptCache, LlamaIndexLLM]
COMPANY = Preamble(company=["Tea is warm."])


@pytest.fixture(params=CLASSES)
def llm(request: pytest.FixtureRequest) -> Any:
    return request.param(model=TOY, max_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse": "warp"}, "unknown reuse mode 'warp'"),
        ({"stop": [""]}, "stop strings must be non-empty"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"timeout": 0}, "timeout"),
        ({"store": "nosuch://localhost"}, "can't be a store"),
        ({"store": "memroy"}, "did you mean 'memory'"),
        ({"max_token": 5}, "did you mean 'max_tokens'"),
    ],
)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_bad_option_is_refused_at_construction(
    kind: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        kind(**options)


@pytest.mark.parametrize("kind", CLASSES)
def test_construction_does_not_load_the_model(kind: Any) -> None:
    started = time.process_time()
    for _ in range(10):
        kind(model="no/such/model", temperature=0.5, stop=["x"])
    assert time.process_time() - started < 1


@pytest.mark.parametrize("kind", CLASSES)
def test_a_shared_engine_brings_its_own_options_and_copies_share_it(kind: Any) -> None:
    engine = PromptCacheEngine(load_lm(TOY))
    llm = kind(engine=engine)
    assert (llm.engine, llm.model, llm.reuse) == (engine, TOY, engine.reuse)
    with pytest.raises(OptionError, match="brings its own model, store; leave them out"):
        kind(model="other", engine=engine, store="memory")
    assert copy.deepcopy(llm).engine is llm.model_copy(update={"max_tokens": 3}).engine is engine


def test_a_pickle_is_small_and_makes_an_equal_one(
    llm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llm.stop, llm.temperature = ["x"], 0.5
    with caplog.at_level("WARNING"):
        saved = pickle.dumps(llm)
    assert not caplog.records
    assert len(saved) < 10_000
    again = pickle.loads(saved)
    assert again.model_dump() == llm.model_dump()
    assert again.engine is llm.engine


def test_threads_get_one_engine(llm: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len({id(engine) for engine in pool.map(lambda _: llm.engine, range(4))}) == 1


def test_what_is_no_list_of_documents_is_refused(llm: Any) -> None:
    own = TextNode(text="a") if isinstance(llm, LlamaIndexLLM) else Document("a")
    for one in ("one text", own, 3):
        with pytest.raises(OptionError, match="put it in a list"):
            llm.cache_documents(one)
    with pytest.raises(OptionError, match="got int"):
        llm.cache_documents([3])


def _what_runs(engine: Any) -> dict[str, Any]:
    """The options that an engine shows in what it is, not in what it was told."""
    store = engine.store
    lasting = store.tiers[-1] if isinstance(store, TieredStore) else store
    return {
        "model": engine.lm.name,
        "dtype": str(engine.lm.dtype).removeprefix("torch."),
        "device": engine.lm.device.type,
        "namespace": engine.namespace,
        "preamble": engine.preamble,
        "repair": engine.repair,
        "store": type(lasting),
        "storage_dtype": getattr(lasting, "storage_dtype", "auto"),
    }


CHANGES = [
    ({"namespace": "tenant-b"}, {"namespace": "tenant-b"}),
    ({"dtype": "float16"}, {"dtype": "float16"}),
    ({"preamble": COMPANY}, {"preamble": COMPANY}),
    ({"repair": 7}, {"repair": 7}),
    ({"store": "states"}, {"store": DiskStore}),
    ({"store": "states", "storage_dtype": "int8"}, {"store": DiskStore, "storage_dtype": "int8"}),
]
WAYS = {
    "model_copy": lambda llm, options: llm.model_copy(update=options),
    "deep model_copy": lambda llm, options: llm.model_copy(update=options, deep=True),
    "assigned": lambda llm, options: [setattr(llm, *each) for each in options.items()] and llm,
    "copied and assigned": lambda llm, options: WAYS["assigned"](copy.copy(llm), options),
    "deepcopied and assigned": lambda llm, options: WAYS["assigned"](copy.deepcopy(llm), options),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("options", "expected"), CHANGES, ids=lambda each: ",".join(each))
def test_options_that_change_change_the_engine(
    llm: Any,
    way: str,
    options: dict[str, Any],
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = llm.engine
    usual = _what_runs(before)
    other = WAYS[way](llm, options)
    assert _what_runs(other.engine) == {**usual, **expected}
    assert other.engine is not before
    if other is not llm:
        assert llm.engine is before
    assert pickle.loads(pickle.dumps(other)).engine is other.engine


def test_a_model_that_cant_be_loaded_never_answers_by_another(llm: Any) -> None:
    assert llm.engine.lm.name == TOY
    other = llm.model_copy(update={"model": "no/such-model"})
    with pytest.raises(ModelError, match="no/such-model"):
        _ = other.engine
    llm.model = "no/such-model"
    with pytest.raises(ModelError, match="no/such-model"):
        _ = llm.engine
    llm.model = TOY
    assert llm.engine.lm.name == TOY


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", "memoy"),
        ("namespace", 7),
        ("namespace", "a b"),
        ("model", None),
        ("repair", -1),
        ("reuse", "most"),
    ],
)
def test_a_value_that_no_engine_can_have_is_refused_at_once(
    llm: Any, name: str, value: object
) -> None:
    before = getattr(llm, name)
    with pytest.raises(OptionError, match=name if name != "store" else "did you mean"):
        setattr(llm, name, value)
    assert getattr(llm, name) == before
    with pytest.raises(OptionError):
        llm.model_copy(update={name: value})


def test_a_server_that_is_named_later_is_asked(llm: Any) -> None:
    llm.base_url = "http://127.0.0.1:9/v1"
    with pytest.raises(ModelError, match="http://127.0.0.1:9 gives no answer"):
        _ = llm.engine
    llm.base_url = None
    assert isinstance(llm.engine, PromptCacheEngine)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_answer_may_take_no_longer_than_its_timeout(kind: Any) -> None:
    ask = "complete" if kind is LlamaIndexLLM else "invoke"
    hasty = kind(model=TOY, max_tokens=400, timeout=0.001)
    with pytest.raises(DeadlineExceededError):
        getattr(hasty, ask)("Where does Ada live?")
    assert getattr(hasty, ask)("Where does Ada live?", timeout=60)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_namespace_beside_a_given_engine_has_its_model_and_store(kind: Any) -> None:
    engine = PromptCacheEngine(CausalLM.from_pretrained(TOY), MemoryStore(), namespace="tenant-a")
    llm = kind(engine=engine, max_tokens=1)
    other = llm.model_copy(update={"namespace": "tenant-b"})
    assert other.engine.namespace == "tenant-b"
    assert (other.engine.lm, other.engine.store) == (engine.lm, engine.store)
    assert llm.engine is engine
    for option in ({"model": "other"}, {"store": "states"}, {"dtype": "float16"}):
        with pytest.raises(OptionError, match="handed over"):
            llm.model_copy(update=option)
    llm.close()
    assert llm.engine is engine


def test_langchains_configurable_fields_choose_the_engine() -> None:
    llm = LangChainLLM(model=TOY, max_tokens=1).configurable_fields(
        namespace=ConfigurableField("tenant")
    )
    chosen, _ = llm.prepare({"configurable": {"tenant": "b"}})
    assert chosen.engine.namespace == "b"  # type: ignore[attr-defined]


def test_llama_indexs_messages_are_rendered_by_the_model_that_answers(tmp_path: Path) -> None:
    llm = LlamaIndexLLM(model=TOY)
    other = llm.model_copy(update={"namespace": "b"})
    assert other.messages_to_prompt is not llm.messages_to_prompt
    own = LlamaIndexLLM(model=TOY, messages_to_prompt=str)
    assert own.model_copy(update={"namespace": "b"}).messages_to_prompt is str


def test_a_precompute_step_that_is_changed_encodes_for_what_it_says() -> None:
    llm = LlamaIndexLLM(model=TOY, namespace="a")
    step = PromptCachePrecompute(llm)
    step.namespace = "b"
    before = llm.engine.stats().encoded_tokens
    step([TextNode(text="Brindlewick sells umbrellas in the town of Ostermouth.")])
    assert llm.engine.stats().encoded_tokens == before
    assert LlamaIndexLLM(model=TOY, namespace="b").engine.stats().encoded_tokens > 0


@pytest.mark.parametrize("kind", CLASSES)
def test_a_language_model_made_anew_finds_its_engine(kind: Any) -> None:
    """A notebook's cell that is run again, and a handler that makes its own and drops it."""

    def make() -> Any:
        return kind(model=TOY, namespace=f"anew-{kind.__module__}-{kind.__name__}")

    llm = make()
    llm.cache_documents(["Wolmer lives in the old mill near Ostermouth."], progress=False)
    encoded = llm.engine.stats().encoded_tokens
    llm = make()
    assert llm.engine.stats().encoded_tokens == encoded > 0
    del llm
    gc.collect()
    assert make().engine.stats().encoded_tokens == encoded
    make().close()
    assert make().engine.stats().encoded_tokens == 0


def test_one_is_made_while_the_weights_of_another_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = CausalLM.from_pretrained
    loads, may_go_on = threading.Event(), threading.Event()

    def waiting(*given: Any, **options: Any) -> CausalLM:
        loads.set()
        may_go_on.wait(20)
        return load(*given, **options)

    monkeypatch.setattr(CausalLM, "from_pretrained", waiting)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(lambda: LangChainLLM(model=TOY, dtype="bfloat16").engine)
        assert loads.wait(20)
        try:
            assert pool.submit(LangChainLLM, model=TOY).result(5)
        finally:
            may_go_on.set()


def test_one_set_of_weights_at_most_stays_without_an_owner() -> None:
    kept = [weakref.ref(LangChainLLM(model=TOY, namespace=str(n)).engine) for n in range(12)]
    gc.collect()
    alive = [ref() for ref in kept if ref() is not None]
    assert 0 < len(alive) < len(kept)
    weights = weakref.ref(LangChainLLM(model=TOY).engine.lm)
    del alive
    other = LangChainLLM(model=TOY, dtype="float16").engine  # dropped before this one was loaded
    assert weights() is None
    assert not any(ref() for ref in kept)
    assert str(other.lm.dtype) == "torch.float16"


def test_weights_with_an_owner_stay() -> None:
    owner = LangChainLLM(model=TOY, namespace="owner")
    engine = owner.engine
    with LangChainLLM(model=TOY, dtype="float16") as other:
        half = weakref.ref(other.engine.lm)
    del other
    gc.collect()
    assert half() is None
    assert owner.engine is engine


@pytest.mark.parametrize("kind", CLASSES)
def test_drafts_are_turned_off_for_an_object_or_for_a_call(kind: Any) -> None:
    engine = PromptCacheEngine(CausalLM.from_pretrained(TOY))
    repeating = {"engine": engine, "max_tokens": 24, "repetition_penalty": 0.3}
    on, off = kind(**repeating), kind(**repeating, speculative=False)

    def drafted(llm: Any, **options: Any) -> int:
        ask = llm.complete if kind is LlamaIndexLLM else llm.invoke
        ask("Rhea enjoys kayaking. Rhea works as a painter.", **options)
        return int(engine.reports[-1].drafted_tokens)

    assert drafted(on) > 0
    assert drafted(on, speculative=False) == 0
    assert drafted(off) == 0
    assert drafted(off, speculative=True) > 0
