"""What LangChain expects of a completion model, as its suites for chat models check it.

LangChain has none for completion models, so this is one of our own: every method with its async,
streaming and batch twins, and what callbacks, tracers, caches and wrappers get from them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.messages import HumanMessage
from langchain_core.outputs import GenerationChunk, LLMResult
from langchain_core.prompt_values import ChatPromptValue, StringPromptValue
from langchain_core.runnables import ConfigurableField
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from corpus import DOCUMENTS, QUESTIONS, TEMPLATE
from pcache_core import (
    Generation,
    OptionError,
    Prompt,
    PromptCacheEngine,
    PromptError,
    SamplingParams,
)
from pcache_core.errors import ContextLengthError, ModelError
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import PromptCacheLLM

TEXTS = [
    TEMPLATE.format(context=DOCUMENTS[numbers[0]], question=question)
    for question, (_, numbers) in QUESTIONS.items()
]
ANSWERS = [answer for answer, _ in QUESTIONS.values()]
TEXT, ANSWER = TEXTS[0], ANSWERS[0]


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(load_lm("builtin:tiny-rag"))


@pytest.fixture
def llm(engine: PromptCacheEngine) -> PromptCacheLLM:
    engine.reports.clear()
    return PromptCacheLLM(engine=engine, max_tokens=8)


@pytest.fixture
def too_long(engine: PromptCacheEngine) -> str:
    assert engine.lm.context_length is not None
    return "x y " * engine.lm.context_length


async def _joined(pieces: Any) -> str:
    return "".join([piece async for piece in pieces])


async def _completed(pieces: Any) -> str:
    ((_, answer),) = [piece async for piece in pieces]
    return str(answer)


# Every way to ask for one answer: (model, prompt, options) → answer.
METHODS: dict[str, Callable[..., Any]] = {
    "invoke": lambda m, x, **k: m.invoke(x, **k),
    "ainvoke": lambda m, x, **k: asyncio.run(m.ainvoke(x, **k)),
    "stream": lambda m, x, **k: "".join(m.stream(x, **k)),
    "astream": lambda m, x, **k: asyncio.run(_joined(m.astream(x, **k))),
    "batch": lambda m, x, **k: m.batch([x], **k)[0],
    "abatch": lambda m, x, **k: asyncio.run(m.abatch([x], **k))[0],
    "batch_as_completed": lambda m, x, **k: next(m.batch_as_completed([x], **k))[1],
    "abatch_as_completed": lambda m, x, **k: asyncio.run(
        _completed(m.abatch_as_completed([x], **k))
    ),
    "transform": lambda m, x, **k: "".join(m.transform(iter([x]), **k)),
    "generate_prompt": lambda m, x, **k: (
        m.generate_prompt([m._convert_input(x)], **k).generations[0][0].text
    ),
    "agenerate_prompt": lambda m, x, **k: (
        asyncio.run(m.agenerate_prompt([m._convert_input(x)], **k)).generations[0][0].text
    ),
}
every_method = pytest.mark.parametrize("ask", METHODS.values(), ids=METHODS)


class Seen(BaseCallbackHandler):
    """Everything that a handler is told, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.starts: list[dict[str, Any]] = []
        self.tokens: list[str] = []
        self.chunks: list[Any] = []
        self.results: dict[UUID, LLMResult] = {}
        self.errors: list[BaseException] = []

    def on_llm_start(self, serialized: Any, prompts: list[str], **rest: Any) -> None:
        self.events.append("start")
        self.starts.append({"prompts": prompts, **rest})

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **_: Any) -> None:
        self.events.append("token")
        self.tokens.append(token)
        self.chunks.append(chunk)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **_: Any) -> None:
        self.events.append("end")
        self.results[run_id] = response

    def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.events.append("error")
        self.errors.append(error)


class AsyncSeen(AsyncCallbackHandler):
    """The tokens, told in the event loop."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.ended = 0

    async def on_llm_new_token(self, token: str, **_: Any) -> None:
        await asyncio.sleep(0)
        self.tokens.append(token)

    async def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        self.ended += 1


class TestAnswers:
    @every_method
    def test_every_method_gives_the_same_answer(self, llm: PromptCacheLLM, ask: Any) -> None:
        assert ask(llm, TEXT).strip() == ANSWER

    @every_method
    def test_every_method_takes_stop_strings(self, llm: PromptCacheLLM, ask: Any) -> None:
        assert ask(llm, TEXT, stop=["Bar"]).strip() == "Zoe"

    @every_method
    def test_every_method_takes_options_of_a_call(self, llm: PromptCacheLLM, ask: Any) -> None:
        ask(llm, TEXT, max_tokens=2, reuse="off")
        assert (llm.engine.reports[-1].generated_tokens, llm.engine.reports[-1].reuse) == (2, "off")

    @every_method
    @pytest.mark.parametrize(
        "value",
        [StringPromptValue(text=TEXT), ChatPromptValue(messages=[HumanMessage(TEXT)]), [TEXT]],
        ids=["string", "chat", "messages"],
    )
    def test_every_method_takes_every_kind_of_prompt(
        self, llm: PromptCacheLLM, ask: Any, value: Any
    ) -> None:
        assert isinstance(ask(llm, value), str)
        assert "".join(s.text for s in llm.engine.reports[-1].segments).endswith(TEXT)

    @every_method
    def test_hints_of_other_providers_change_nothing(self, llm: PromptCacheLLM, ask: Any) -> None:
        hints = {
            "cache_control": {"type": "ephemeral", "ttl": "1h"},
            "prompt_cache_key": "k",
            "prompt_cache_retention": "24h",
            "prompt_cache_options": {"mode": "x"},
            "cached_content": "c",
        }
        assert ask(llm, TEXT, **hints).strip() == ANSWER

    @every_method
    def test_an_unknown_option_is_refused_by_name(self, llm: PromptCacheLLM, ask: Any) -> None:
        with pytest.raises(OptionError, match="'temprature'; did you mean 'temperature'"):
            ask(llm, TEXT, temprature=2)

    @every_method
    def test_an_empty_prompt_is_refused(self, llm: PromptCacheLLM, ask: Any) -> None:
        with pytest.raises(PromptError, match="empty"):
            ask(llm, "")

    @every_method
    def test_a_prompt_longer_than_the_context_is_refused(
        self, llm: PromptCacheLLM, ask: Any, too_long: str
    ) -> None:
        with pytest.raises(ContextLengthError):
            ask(llm, too_long)
        assert ask(llm, TEXT).strip() == ANSWER

    @pytest.mark.parametrize("value", [3, None, {"text": "x"}])
    def test_what_is_no_prompt_is_refused(self, llm: PromptCacheLLM, value: Any) -> None:
        with pytest.raises(ValueError, match="Invalid input type"):
            llm.invoke(value)

    def test_a_seed_makes_every_method_repeatable(self, llm: PromptCacheLLM) -> None:
        sampled = llm.bind(temperature=2.0, seed=11)
        expected = sampled.invoke(TEXT)
        assert {ask(sampled, TEXT) for name, ask in METHODS.items() if "generate" not in name} == {
            expected
        }
        assert sampled.batch([TEXT] * 3) == [expected] * 3


class TestBatches:
    def test_answers_come_in_the_order_of_the_prompts(self, llm: PromptCacheLLM) -> None:
        assert [answer.strip() for answer in llm.batch(TEXTS)] == ANSWERS
        assert [answer.strip() for answer in asyncio.run(llm.abatch(TEXTS))] == ANSWERS

    def test_no_prompts_give_no_answers(self, llm: PromptCacheLLM) -> None:
        assert llm.batch([]) == asyncio.run(llm.abatch([])) == []
        assert llm.generate([]).generations == []

    def test_a_limit_of_concurrency_is_kept(self, llm: PromptCacheLLM) -> None:
        limited = llm.batch(TEXTS, {"max_concurrency": 3})
        assert [answer.strip() for answer in limited] == ANSWERS

    def test_a_bad_prompt_costs_the_others_nothing_if_errors_are_returned(
        self, llm: PromptCacheLLM, too_long: str
    ) -> None:
        prompts = [TEXTS[0], too_long, TEXTS[1], ""]
        for answers in (
            llm.batch(prompts, return_exceptions=True),
            asyncio.run(llm.abatch(prompts, return_exceptions=True)),
        ):
            assert [str(answers[0]).strip(), str(answers[2]).strip()] == ANSWERS[:2]
            assert isinstance(answers[1], ContextLengthError)
            assert isinstance(answers[3], PromptError)

    def test_a_bad_prompt_is_an_error_otherwise(self, llm: PromptCacheLLM, too_long: str) -> None:
        with pytest.raises(ContextLengthError):
            llm.batch([TEXT, too_long, TEXT])
        with pytest.raises(ContextLengthError):
            asyncio.run(llm.abatch([TEXT, too_long, TEXT]))

    def test_all_prompts_are_with_the_engine_at_once(self) -> None:
        engine = _Meeting(load_lm("builtin:tiny-rag"))
        engine.all_here = threading.Barrier(len(TEXTS))
        llm = PromptCacheLLM(engine=engine, max_tokens=8)
        assert [answer.strip() for answer in llm.batch(TEXTS)] == ANSWERS
        assert [answer.strip() for answer in asyncio.run(llm.abatch(TEXTS))] == ANSWERS

    def test_each_prompt_has_its_own_config(self, llm: PromptCacheLLM) -> None:
        for run in (llm.batch, lambda *args: asyncio.run(llm.abatch(*args))):
            handlers = [Seen() for _ in TEXTS]
            run(
                TEXTS,
                [
                    {"callbacks": [handler], "tags": [f"t{n}"], "metadata": {"n": n}}
                    for n, handler in enumerate(handlers)
                ],
            )
            for number, handler in enumerate(handlers):
                (start,) = handler.starts
                assert start["prompts"] == [TEXTS[number]]
                assert f"t{number}" in start["tags"]
                assert start["metadata"]["n"] == number
                (result,) = handler.results.values()
                assert result.generations[0][0].text.strip() == ANSWERS[number]

    def test_sampling_differs_between_prompts_without_a_seed(self, llm: PromptCacheLLM) -> None:
        assert len(set(llm.batch(["Note:"] * 5, temperature=3.0))) > 1


class _Meeting(PromptCacheEngine):
    """An engine that begins to answer when everybody has asked."""

    all_here: threading.Barrier

    def generate(self, *args: Any, **options: Any) -> Generation:
        self.all_here.wait(timeout=20)
        return super().generate(*args, **options)

    async def agenerate(self, *args: Any, **options: Any) -> Generation:
        await asyncio.to_thread(self.all_here.wait, 20)
        return await super().agenerate(*args, **options)


class TestCallbacks:
    @every_method
    def test_every_method_tells_handlers_of_start_and_end(
        self, engine: PromptCacheEngine, ask: Any
    ) -> None:
        seen = Seen()
        ask(PromptCacheLLM(engine=engine, max_tokens=8, callbacks=[seen]), TEXT)
        assert [event for event in seen.events if event != "token"] == ["start", "end"]
        assert seen.starts[0]["prompts"] == [TEXT]
        assert seen.starts[0]["invocation_params"]["model"] == "builtin:tiny-rag"
        assert seen.starts[0]["invocation_params"]["reuse"] == "balanced"
        (result,) = seen.results.values()
        assert result.generations[0][0].text.strip() == ANSWER

    @every_method
    def test_every_method_tells_handlers_of_an_error(
        self, engine: PromptCacheEngine, ask: Any, too_long: str
    ) -> None:
        seen = Seen()
        with pytest.raises(ContextLengthError):
            ask(PromptCacheLLM(engine=engine, callbacks=[seen]), too_long)
        assert seen.events == ["start", "error"]

    @pytest.mark.parametrize("name", ["stream", "astream"])
    def test_streams_tell_of_every_token(self, llm: PromptCacheLLM, name: str) -> None:
        seen = Seen()
        answer = METHODS[name](llm, TEXT, config={"callbacks": [seen]})
        assert "".join(seen.tokens) == answer
        assert all(isinstance(chunk, GenerationChunk) for chunk in seen.chunks)
        assert len(seen.tokens) > 2
        assert seen.events == ["start", *["token"] * len(seen.tokens), "end"]
        (result,) = seen.results.values()
        assert result.generations[0][0].generation_info["finish_reason"] == "stop"

    def test_the_chunks_of_a_stream_add_up_to_the_answer(self, llm: PromptCacheLLM) -> None:
        seen = Seen()
        list(llm.stream(TEXT, {"callbacks": [seen]}, logprobs=1))
        report, whole = llm.engine.reports[-1], llm.generate([TEXT], logprobs=1).generations[0][0]
        first, *others = seen.chunks
        for other in others:
            assert "prompt_cache" not in first.generation_info  # the last one alone has figures
            first += other
        assert first.text == whole.text
        assert first.generation_info["finish_reason"] == whole.generation_info["finish_reason"]
        assert first.generation_info["prompt_cache"]["prompt_tokens"] == report.prompt_tokens
        streamed, at_once = (x.generation_info["logprobs"] for x in (first, whole))
        assert streamed["tokens"] == at_once["tokens"]
        assert streamed["text_offset"] == at_once["text_offset"]

    async def test_async_handlers_are_awaited(self, llm: PromptCacheLLM) -> None:
        seen = AsyncSeen()
        answer = await _joined(llm.astream(TEXT, {"callbacks": [seen]}))
        assert "".join(seen.tokens) == answer
        await llm.ainvoke(TEXT, {"callbacks": [seen]})
        assert seen.ended == 2

    @every_method
    def test_tracers_see_the_run_as_a_model(self, engine: PromptCacheEngine, ask: Any) -> None:
        tracer = RunCollectorCallbackHandler()
        ask(PromptCacheLLM(engine=engine, max_tokens=8, callbacks=[tracer]), TEXT)
        (run,) = tracer.traced_runs
        assert (run.run_type, run.error) == ("llm", None)
        assert run.outputs is not None
        assert run.outputs["generations"][0][0]["text"].strip() == ANSWER
        assert run.extra["invocation_params"]["model"] == "builtin:tiny-rag"

    def test_tracers_see_who_answers(self, llm: PromptCacheLLM) -> None:
        tracer = RunCollectorCallbackHandler()
        llm.invoke(TEXT, {"callbacks": [tracer]}, stop=["x"], temperature=0.3)
        (run,) = tracer.traced_runs
        expected = {
            "ls_provider": "pcache",
            "ls_model_type": "llm",
            "ls_model_name": "builtin:tiny-rag",
            "ls_temperature": 0.3,
            "ls_max_tokens": 8,
            "ls_stop": ["x"],
        }
        assert expected.items() <= run.extra["metadata"].items()

    def test_a_run_id_is_kept(self, llm: PromptCacheLLM) -> None:
        tracer, run_id = RunCollectorCallbackHandler(), uuid4()
        llm.invoke(TEXT, {"callbacks": [tracer], "run_id": run_id, "run_name": "named"})
        (run,) = tracer.traced_runs
        assert (run.id, run.name) == (run_id, "named")

    async def test_events_are_streamed(self, llm: PromptCacheLLM) -> None:
        events = [event async for event in llm.astream_events(TEXT, version="v2")]
        names = [event["event"] for event in events]
        assert names[0] == "on_llm_start"
        assert names[-1] == "on_llm_end"
        pieces = [e["data"]["chunk"] for e in events if e["event"] == "on_llm_stream"]
        assert "".join(getattr(piece, "text", piece) for piece in pieces).strip() == ANSWER


class TestFigures:
    @pytest.mark.parametrize("is_async", [False, True])
    def test_usage_counts_all_prompts_of_a_call(self, llm: PromptCacheLLM, is_async: bool) -> None:
        result = asyncio.run(llm.agenerate(TEXTS)) if is_async else llm.generate(TEXTS)
        reports = list(llm.engine.reports)
        assert result.llm_output is not None
        usage = result.llm_output["token_usage"]
        assert usage["prompt_tokens"] == sum(report.prompt_tokens for report in reports)
        assert usage["completion_tokens"] == sum(report.generated_tokens for report in reports)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert result.llm_output["model_name"] == "builtin:tiny-rag"

    def test_each_answer_says_how_much_was_reused(self, llm: PromptCacheLLM) -> None:
        llm.generate(TEXTS)
        figures = [
            generations[0].generation_info["prompt_cache"]
            for generations in llm.generate(TEXTS).generations
        ]
        prompts = [llm.engine.prefill(Prompt.from_text(text)).report for text in TEXTS]
        for figure, report in zip(figures, prompts, strict=True):
            assert figure["prompt_tokens"] == report.prompt_tokens
            assert 0 < figure["cached_tokens"] < figure["prompt_tokens"]
            assert figure["prompt_tokens"] == (
                figure["cached_tokens"] + figure["encoded_tokens"] + figure["computed_tokens"]
            )


class TestLogprobs:
    @pytest.mark.parametrize("is_async", [False, True])
    def test_they_have_the_shape_of_openais_completions(
        self, llm: PromptCacheLLM, is_async: bool
    ) -> None:
        asked = {"prompts": [TEXT], "logprobs": 3}
        result = asyncio.run(llm.agenerate(**asked)) if is_async else llm.generate(**asked)
        answer = result.generations[0][0]
        logprobs = answer.generation_info["logprobs"]
        assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
        assert len({len(values) for values in logprobs.values()}) == 1
        assert "".join(logprobs["tokens"]) == answer.text
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert answer.text[offset : offset + len(token)] == token
        for token, value, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == value == max(top.values())
            assert len(top) == 3
            assert value <= 0

    def test_they_are_the_engines(self, llm: PromptCacheLLM) -> None:
        answer = llm.generate(["Note:"], logprobs=0, reuse="off").generations[0][0]
        params = SamplingParams(max_tokens=8, logprobs=0)
        records = llm.engine.generate(Prompt.from_text("Note:"), params, reuse="off").logprobs
        values = [record.logprob for record in records]
        found = answer.generation_info["logprobs"]["token_logprobs"]
        assert found == pytest.approx(values, abs=1e-4)

    def test_nobody_who_has_not_asked_gets_them(self, llm: PromptCacheLLM) -> None:
        assert "logprobs" not in llm.generate([TEXT]).generations[0][0].generation_info

    @pytest.mark.parametrize("logprobs", [21, -1, True])
    def test_an_impossible_number_is_refused(self, llm: PromptCacheLLM, logprobs: Any) -> None:
        with pytest.raises(OptionError, match="logprobs"):
            llm.invoke(TEXT, logprobs=logprobs)


class TestCaches:
    @pytest.mark.parametrize("name", ["invoke", "ainvoke", "batch", "abatch"])
    def test_a_response_that_is_known_is_not_made_again(
        self, engine: PromptCacheEngine, name: str
    ) -> None:
        llm = PromptCacheLLM(engine=engine, max_tokens=8, cache=InMemoryCache())
        engine.reports.clear()
        answers = {METHODS[name](llm, TEXT) for _ in range(3)}
        assert {answer.strip() for answer in answers} == {ANSWER}
        assert len(engine.reports) == 1

    def test_a_batch_makes_only_what_is_missing(self, engine: PromptCacheEngine) -> None:
        llm = PromptCacheLLM(engine=engine, max_tokens=8, cache=InMemoryCache())
        llm.invoke(TEXTS[1])
        engine.reports.clear()
        assert [answer.strip() for answer in llm.batch(TEXTS)] == ANSWERS
        assert len(engine.reports) == len(TEXTS) - 1

    def test_the_global_cache_is_used(self, engine: PromptCacheEngine) -> None:
        set_llm_cache(InMemoryCache())
        try:
            engine.reports.clear()
            for _ in range(2):
                PromptCacheLLM(engine=engine, max_tokens=8).invoke(TEXT)
            assert len(engine.reports) == 1
        finally:
            set_llm_cache(None)

    def test_what_answers_depend_on_tells_responses_apart(self, engine: PromptCacheEngine) -> None:
        cache = InMemoryCache()
        engine.reports.clear()
        for options in [{}, {"reuse": "high"}, {"temperature": 0.1}, {"max_tokens": 3}] * 2:
            PromptCacheLLM(engine=engine, cache=cache, **{"max_tokens": 8, **options}).invoke(TEXT)
        assert len(engine.reports) == 4

    @pytest.mark.parametrize("is_global", [False, True])
    @pytest.mark.parametrize("name", METHODS)
    def test_so_does_what_a_call_asks_for(
        self, engine: PromptCacheEngine, name: str, is_global: bool
    ) -> None:
        """The oracle is the same model without a cache."""
        asked = [
            {"max_tokens": 1}, {}, {"temperature": 2.0, "seed": 1}, {"temperature": 2.0, "seed": 2},
            {"stop": [ANSWER[:3]]}, {"repetition_penalty": 50.0}, {"top_k": 1, "max_tokens": 2},
        ]  # fmt: skip
        plain = PromptCacheLLM(engine=engine, max_tokens=8, reuse="off")
        expected = [METHODS[name](plain, TEXT, **options) for options in asked]
        cache = InMemoryCache()
        llm = PromptCacheLLM(
            engine=engine, max_tokens=8, reuse="off", cache=None if is_global else cache
        )
        set_llm_cache(cache if is_global else None)
        try:
            for _ in range(2):
                assert [METHODS[name](llm, TEXT, **options) for options in asked] == expected
        finally:
            set_llm_cache(None)

    def test_reuse_modes_and_log_probabilities_of_calls_are_told_apart(
        self, engine: PromptCacheEngine
    ) -> None:
        llm = PromptCacheLLM(engine=engine, max_tokens=8, cache=InMemoryCache())
        engine.reports.clear()
        for reuse in ("off", "fast", "off", "fast"):
            llm.invoke(TEXT, reuse=reuse)
        assert [report.reuse for report in engine.reports] == ["off", "fast"]
        assert "logprobs" not in llm.generate([TEXT]).generations[0][0].generation_info
        assert "logprobs" in llm.generate([TEXT], logprobs=2).generations[0][0].generation_info

    def test_an_option_that_is_the_models_own_anyway_is_the_same_call(
        self, engine: PromptCacheEngine
    ) -> None:
        llm = PromptCacheLLM(engine=engine, max_tokens=8, cache=InMemoryCache())
        engine.reports.clear()
        for options in ({}, {"max_tokens": 8}, {"temperature": None}):
            llm.invoke(TEXT, **options)
        assert len(engine.reports) == 1


class TestWrappers:
    def test_a_model_that_can_not_be_loaded_falls_back(self, llm: PromptCacheLLM) -> None:
        broken = PromptCacheLLM(model="no/such/model")
        with pytest.raises(ModelError):
            broken.invoke(TEXT)
        safe = broken.with_fallbacks([llm])
        assert safe.invoke(TEXT).strip() == ANSWER
        assert asyncio.run(safe.ainvoke(TEXT)).strip() == ANSWER
        assert "".join(safe.stream(TEXT)).strip() == ANSWER
        assert [answer.strip() for answer in safe.batch(TEXTS)] == ANSWERS

    def test_retries_try_again_and_give_up_with_the_error(
        self, engine: PromptCacheEngine, too_long: str
    ) -> None:
        seen = Seen()
        llm = PromptCacheLLM(engine=engine, callbacks=[seen])
        retried = llm.with_retry(wait_exponential_jitter=False, stop_after_attempt=3)
        with pytest.raises(ContextLengthError):
            retried.invoke(too_long)
        assert seen.events == ["start", "error"] * 3

    def test_options_can_be_chosen_by_configuration(self, llm: PromptCacheLLM) -> None:
        chosen = llm.configurable_fields(max_tokens=ConfigurableField(id="most"))
        chosen.invoke(TEXT, {"configurable": {"most": 2}})
        assert llm.engine.reports[-1].generated_tokens == 2
        other = llm.configurable_alternatives(
            ConfigurableField(id="which"), brief=PromptCacheLLM(engine=llm.engine, max_tokens=1)
        )
        other.with_config(configurable={"which": "brief"}).invoke(TEXT)
        assert llm.engine.reports[-1].generated_tokens == 1

    def test_tokens_are_counted_without_a_network(self, llm: PromptCacheLLM) -> None:
        expected = len(llm.engine.lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
        assert llm.get_num_tokens(TEXT) == expected
        assert llm.get_num_tokens_from_messages([HumanMessage(TEXT)]) >= expected
