"""The LLM itself: its eight methods, options, usage, serialisation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    MessageRole,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.schema import Document

from corpus import DOCUMENTS
from llama_index_parts import (
    ALL,
    ASYNC,
    CHATS,
    COMPLETIONS,
    MESSAGES,
    TEXT,
    Ask,
    answer,
    chat_lm,
    text_of,
)
from pcache_core import (
    CausalLM,
    Prompt,
    PromptCacheEngine,
    PromptCacheError,
    SamplingParams,
)
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import CallRefusedError, PromptCacheLLM


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(load_lm("builtin:tiny-rag"))


@pytest.fixture(scope="module")
def chat_engine() -> PromptCacheEngine:
    return PromptCacheEngine(chat_lm())


@pytest.fixture
def llm(engine: PromptCacheEngine) -> PromptCacheLLM:
    return PromptCacheLLM(engine=engine, max_tokens=12)


class TestEveryMethod:
    @pytest.mark.parametrize("ask", ALL)
    async def test_answers_what_the_engine_answers(self, llm: PromptCacheLLM, ask: Ask) -> None:
        text = TEXT if ask in COMPLETIONS else text_of(await _report_of(llm, ask))
        params = SamplingParams(max_tokens=12)
        expected = llm.engine.generate(Prompt.from_text(text), params, reuse="off").text
        assert expected.strip()
        assert answer(await ask(llm)) == expected

    @pytest.mark.parametrize("ask", [f for f in ALL if "stream" in f.__name__])
    async def test_deltas_sum_to_the_text_of_each_part(self, llm: PromptCacheLLM, ask: Ask) -> None:
        parts = await ask(llm)
        assert len(parts) > 1
        for count in range(1, len(parts) + 1):
            assert "".join(part.delta for part in parts[:count]) == answer(parts[:count])

    @pytest.mark.parametrize("ask", ALL)
    async def test_usage_is_in_the_last_part_in_openais_shape(
        self, llm: PromptCacheLLM, ask: Ask
    ) -> None:
        await ask(llm)
        parts = await ask(llm)
        assert all(part.raw is None for part in parts[:-1])
        usage, report = parts[-1].raw["usage"], llm.engine.reports[-1]
        tokens = len(llm.engine.lm.token_ids(text_of(report))) + 1  # and <bos>
        assert usage["prompt_tokens"] == pytest.approx(tokens, abs=2)  # pieces split words apart
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
        assert parts[-1].raw["prompt_cache"]["reuse"] == "balanced"
        assert parts[-1].additional_kwargs["finish_reason"] in ("stop", "length")

    @pytest.mark.parametrize("ask", ALL)
    async def test_token_counters_count_every_call_once(
        self, llm: PromptCacheLLM, ask: Ask
    ) -> None:
        counter = TokenCountingHandler(tokenizer=lambda text: [])
        llm.callback_manager = CallbackManager([counter])
        usage = (await ask(llm))[-1].raw["usage"]
        assert len(counter.llm_token_counts) == 1
        assert counter.prompt_llm_token_count == usage["prompt_tokens"]
        assert counter.completion_llm_token_count == usage["completion_tokens"]

    @pytest.mark.parametrize("ask", ALL)
    async def test_stop_and_max_tokens_of_the_call_are_honoured(
        self, llm: PromptCacheLLM, ask: Ask
    ) -> None:
        whole = answer(await ask(llm))
        word = whole.split()[0][2:]
        assert answer(await ask(llm, stop=[word])) == whole[: whole.index(word)]
        last = (await ask(llm, max_tokens=1))[-1]
        assert last.raw["usage"]["completion_tokens"] == 1
        assert last.additional_kwargs["finish_reason"] == "length"

    @pytest.mark.parametrize("ask", ALL)
    async def test_sampling_options_of_the_call_are_honoured(
        self, llm: PromptCacheLLM, ask: Ask
    ) -> None:
        seeded = [answer(await ask(llm, temperature=40.0, seed=7)) for _ in range(2)]
        assert seeded[0] == seeded[1] != answer(await ask(llm))
        assert answer(await ask(llm, temperature=40.0, seed=7, top_k=1)) == answer(await ask(llm))

    @pytest.mark.parametrize("ask", ALL)
    async def test_reuse_of_the_call_is_honoured(self, llm: PromptCacheLLM, ask: Ask) -> None:
        await ask(llm)
        assert (await ask(llm, reuse="off"))[-1].raw["prompt_cache"]["cached_tokens"] == 0

    @pytest.mark.parametrize("ask", ALL)
    async def test_unknown_options_are_refused_and_cache_hints_are_not(
        self, llm: PromptCacheLLM, ask: Ask
    ) -> None:
        with pytest.raises(CallRefusedError, match=r"'max_token'; did you mean 'max_tokens'"):
            await ask(llm, max_token=3)
        with pytest.raises(CallRefusedError, match="doesn't know the option 'tool'"):
            await ask(llm, tool=[])
        hints = {
            "cache_control": {"type": "ephemeral"}, "prompt_cache_key": "x", "cache_idx": 1,
            "extra_headers": {"anthropic-beta": "prompt-caching"}, "timeout": 300,
        }  # fmt: skip
        assert answer(await ask(llm, **hints)) == answer(await ask(llm))

    @pytest.mark.parametrize("ask", ALL)
    async def test_the_system_prompt_is_honoured_once(
        self, engine: PromptCacheEngine, chat_engine: PromptCacheEngine, ask: Ask
    ) -> None:
        for shared in (engine, chat_engine):
            llm = PromptCacheLLM(engine=shared, max_tokens=1, system_prompt="Be brief.")
            await ask(llm)
            read = text_of(shared.reports[-1])
            assert read.count("Be brief.") == 1
            assert read.index("Be brief.") < read.index(DOCUMENTS[6])

    @pytest.mark.parametrize("ask", COMPLETIONS)
    async def test_completion_to_prompt_is_honoured_unless_formatted(
        self, engine: PromptCacheEngine, ask: Ask
    ) -> None:
        llm = PromptCacheLLM(
            engine=engine, max_tokens=1, completion_to_prompt="<<{}>>".format, system_prompt="S"
        )
        await ask(llm, "some words")
        assert text_of(engine.reports[-1]) == "S\n\n<<some words>>"
        await ask(llm, "some words", formatted=True)
        assert text_of(engine.reports[-1]) == "some words"

    @pytest.mark.parametrize("ask", CHATS)
    async def test_messages_to_prompt_is_honoured(
        self, chat_engine: PromptCacheEngine, ask: Ask
    ) -> None:
        def joined(messages: Any) -> str:
            return " | ".join(f"{m.role.value}: {m.content}" for m in messages) + " | assistant:"

        llm = PromptCacheLLM(engine=chat_engine, max_tokens=1, messages_to_prompt=joined)
        await ask(llm, [ChatMessage("S", role="system"), ChatMessage("user")])
        report = chat_engine.reports[-1]
        assert text_of(report) == "system: S | user: user | assistant:"
        (argument,) = [s.text.strip() for s in report.segments if s.kind == "argument"]
        assert argument == "user"

    @pytest.mark.parametrize("ask", CHATS)
    async def test_messages_are_read_in_the_models_own_markup(
        self, chat_engine: PromptCacheEngine, ask: Ask
    ) -> None:
        llm = PromptCacheLLM(engine=chat_engine, max_tokens=1)
        await ask(llm, [ChatMessage("A", role="developer"), ChatMessage("B"),
                        ChatMessage("C", role="chatbot"), ChatMessage("D")])  # fmt: skip
        assert text_of(chat_engine.reports[-1]) == (
            "<eos>system\nA\n<eos>user\nB\n<eos>assistant\nC\n<eos>user\nD\n<eos>assistant\n"
        )

    @pytest.mark.parametrize("ask", COMPLETIONS)
    async def test_a_bare_text_is_a_users_message_to_a_chat_model(
        self, chat_engine: PromptCacheEngine, ask: Ask
    ) -> None:
        llm = PromptCacheLLM(engine=chat_engine, max_tokens=1)
        await ask(llm, "Hello")
        assert text_of(chat_engine.reports[-1]) == "<eos>user\nHello\n<eos>assistant\n"

    @pytest.mark.parametrize("ask", ASYNC)
    async def test_the_event_loop_keeps_turning(self, llm: PromptCacheLLM, ask: Ask) -> None:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turner = asyncio.create_task(turn())
        await ask(llm, max_tokens=4)
        turner.cancel()
        assert turns > 4  # at least once for each token

    @pytest.mark.parametrize("ask", ALL)
    async def test_an_empty_prompt_is_refused(self, llm: PromptCacheLLM, ask: Ask) -> None:
        with pytest.raises(CallRefusedError):
            await ask(llm, "" if ask in COMPLETIONS else [])


async def _report_of(llm: PromptCacheLLM, ask: Ask) -> Any:
    await ask(llm, max_tokens=1)
    return llm.engine.reports[-1]


class TestStreams:
    def test_a_bad_call_fails_before_the_stream_is_consumed(self, llm: PromptCacheLLM) -> None:
        with pytest.raises(PromptCacheError):
            llm.stream_complete("word " * 5000)
        with pytest.raises(CallRefusedError):
            llm.stream_chat(MESSAGES, temperature=-1)

    def test_nothing_runs_before_the_stream_is_consumed(self, llm: PromptCacheLLM) -> None:
        before = len(llm.engine.reports)
        stream = llm.stream_complete(TEXT)
        assert len(llm.engine.reports) == before
        list(stream)
        assert len(llm.engine.reports) == before + 1


class TestMessages:
    def test_the_answers_message_carries_text_only(self, llm: PromptCacheLLM) -> None:
        """What a memory keeps of it is written into later prompts."""
        message = llm.chat(MESSAGES).message
        assert message.role == MessageRole.ASSISTANT
        assert message.additional_kwargs == {}

    def test_a_model_without_chat_template_gets_plain_turns(
        self, tiny_lm: Callable[..., CausalLM]
    ) -> None:
        llm = PromptCacheLLM(engine=PromptCacheEngine(tiny_lm()), max_tokens=1)
        assert not llm.metadata.is_chat_model
        llm.chat([ChatMessage("Be brief.", role="system"), ChatMessage("Hello")])
        assert text_of(llm.engine.reports[-1]) == "system: Be brief.\nuser: Hello\nassistant: "


class TestOptions:
    def test_options_of_the_object_hold_for_every_call(self, engine: PromptCacheEngine) -> None:
        llm = PromptCacheLLM(engine=engine, max_tokens=2, reuse="off", stop="zzz")
        raw = llm.complete(TEXT).raw
        assert raw["usage"]["completion_tokens"] == 2
        assert raw["prompt_cache"]["reuse"] == "off"

    @pytest.mark.parametrize(
        "options",
        [{}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"repetition_penalty": 9.0}],
        ids=str,
    )
    def test_sampling_options_mean_the_same_for_the_object_and_for_a_call(
        self, engine: PromptCacheEngine, options: dict[str, Any]
    ) -> None:
        hot = {"temperature": 40.0, "seed": 7, **options}
        ours = PromptCacheLLM(engine=engine, max_tokens=6, **hot).complete(TEXT).text
        params = SamplingParams(max_tokens=6, **hot)
        assert ours == engine.generate(Prompt.from_text(TEXT), params, reuse="off").text

    def test_metadata_is_true_to_the_model(
        self, engine: PromptCacheEngine, chat_engine: PromptCacheEngine
    ) -> None:
        metadata = PromptCacheLLM(engine=engine, max_tokens=7).metadata
        assert metadata.context_window == 2048
        assert metadata.num_output == 7
        assert metadata.model_name == "builtin:tiny-rag"
        assert not metadata.is_function_calling_model
        assert PromptCacheLLM(engine=engine, context_window=100).metadata.context_window == 100
        assert PromptCacheLLM(engine=engine, is_chat_model=True).metadata.is_chat_model

    def test_only_a_template_that_marks_roles_makes_a_chat_model(
        self, engine: PromptCacheEngine, chat_engine: PromptCacheEngine
    ) -> None:
        assert engine.lm.tokenizer.chat_template
        assert not PromptCacheLLM(engine=engine).metadata.is_chat_model
        assert PromptCacheLLM(engine=chat_engine).metadata.is_chat_model

    def test_a_template_that_refuses_a_role_knows_roles(self) -> None:
        lm = chat_lm()
        lm.tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}"
            "{{ raise_exception('begin with the user') }}{% endif %}{{ m['content'] }}{% endfor %}"
        )
        assert PromptCacheLLM(engine=PromptCacheEngine(lm)).metadata.is_chat_model

    @pytest.mark.parametrize(
        "given", [{"is_chat_model": False}, {"is_chat_model": True, "is_function_calling_model": 1}]
    )
    def test_metadata_that_is_all_given_does_not_load_the_model(
        self, given: dict[str, Any]
    ) -> None:
        metadata = PromptCacheLLM("no/such/model", context_window=100, **given).metadata
        assert metadata.is_chat_model is given["is_chat_model"]


class TestDocuments:
    def test_documents_nodes_and_strings_are_encoded(self, engine: PromptCacheEngine) -> None:
        llm = PromptCacheLLM(engine=PromptCacheEngine(engine.lm), reuse="fast")
        document = Document(
            text=DOCUMENTS[0],
            metadata={"year": "1990", "path": "hidden"},
            excluded_llm_metadata_keys=["path"],
        )
        report = llm.cache_documents([document, DOCUMENTS[1] + "\n"], progress=False)
        assert report.encoded == 2
        llm.complete(f"Read.\n\nyear: 1990\n\n{DOCUMENTS[0]}\n\n{DOCUMENTS[1]}\n\nWell:")
        sources = [s.source for s in engine_segments(llm) if s.kind == "document"]
        assert sources == ["memory", "memory"]


def engine_segments(llm: PromptCacheLLM) -> Any:
    return llm.engine.reports[-1].segments


class TestCopies:
    def test_a_dictionary_of_it_makes_an_equal_one(self) -> None:
        llm = PromptCacheLLM(
            model="builtin:tiny-rag", max_tokens=3, seed=5, system_prompt="Be brief."
        )
        again = PromptCacheLLM.from_dict(llm.to_dict())
        assert again.to_dict() == llm.to_dict()
        assert again.system_prompt == "Be brief."
