"""The chat model: messages, usage, streaming, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
)
from langchain_core.prompts import ChatPromptTemplate

from corpus import DOCUMENTS, OPENING, QUESTIONS
from langchain_chains import rag_chain, text_of
from pcache_core import CausalLM, OptionError, PromptCacheEngine, PromptError
from pcache_core.errors import ChatTemplateError
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import ChatPromptCache

QUESTION = "Where was Jerome Fertden born?"
MESSAGES: list[BaseMessage] = [HumanMessage(f"{OPENING}{DOCUMENTS[6]}\n\nQuestion: {QUESTION}\n")]
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + MARKED
)
USER_AND_ASSISTANT = (
    "{% for m in messages %}{% if m.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}{% endfor %}" + MARKED
)


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(load_lm("builtin:tiny-rag"))


@pytest.fixture
def chat(engine: PromptCacheEngine) -> ChatPromptCache:
    return ChatPromptCache(engine=engine, max_tokens=8)


@pytest.fixture(scope="module")
def random_lm(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm()


@pytest.fixture
def with_template(random_lm: CausalLM) -> Callable[[str | None], ChatPromptCache]:
    """A random model with a chat template of the test's own."""

    def make(template: str | None) -> ChatPromptCache:
        random_lm.tokenizer.chat_template = template
        return ChatPromptCache(engine=PromptCacheEngine(random_lm), max_tokens=2)

    return make


class TestMessages:
    def test_roles_are_rendered_by_the_models_own_template(
        self, with_template: Callable[..., ChatPromptCache]
    ) -> None:
        chat = with_template(MARKED)
        chat.invoke(
            [
                SystemMessage("be kind"),
                HumanMessage("hi", name="ann"),
                AIMessage("hello"),
                ChatMessage("so", role="user"),
            ]
        )
        assert text_of(chat.engine.reports[-1]) == (
            "<system>be kind<user>hi<assistant>hello<user>so<assistant>"
        )

    def test_neighbours_of_one_role_stay_apart_where_the_template_allows_it(
        self, with_template: Callable[..., ChatPromptCache]
    ) -> None:
        chat = with_template(MARKED)
        chat.invoke([HumanMessage("a"), HumanMessage("b")])
        assert text_of(chat.engine.reports[-1]) == "<user>a<user>b<assistant>"

    def test_neighbours_of_one_role_are_one_message_where_roles_must_alternate(
        self, with_template: Callable[..., ChatPromptCache]
    ) -> None:
        chat = with_template(ALTERNATING)
        chat.invoke([HumanMessage("a"), HumanMessage("b"), AIMessage("c"), HumanMessage("d")])
        assert text_of(chat.engine.reports[-1]) == "<user>a\n\nb<assistant>c<user>d<assistant>"

    @pytest.mark.parametrize(
        ("messages", "prompt"),
        [
            (
                [SystemMessage("be kind"), HumanMessage("hi")],
                "<user>be kind\n\nhi<assistant>",
            ),
            (
                [SystemMessage("be kind"), AIMessage("welcome"), HumanMessage("hi")],
                "<user>be kind<assistant>welcome<user>hi<assistant>",
            ),
            (
                [AIMessage("welcome"), HumanMessage("hi")],
                "<user><assistant>welcome<user>hi<assistant>",
            ),
            (
                [
                    HumanMessage("hi"),
                    AIMessage("yes?"),
                    SystemMessage("be kind"),
                    HumanMessage("a"),
                ],
                "<user>hi<assistant>yes?<user>be kind\n\na<assistant>",
            ),
        ],
    )
    def test_a_template_for_user_and_assistant_alone_gets_nothing_else(
        self,
        with_template: Callable[..., ChatPromptCache],
        messages: list[BaseMessage],
        prompt: str,
    ) -> None:
        """As Gemma 2's and the first Mistral's: no system, and the user begins."""
        chat = with_template(USER_AND_ASSISTANT)
        chat.invoke(messages)
        assert text_of(chat.engine.reports[-1]) == prompt

    def test_text_blocks_are_the_messages_text(
        self, with_template: Callable[..., ChatPromptCache]
    ) -> None:
        chat = with_template(MARKED)
        hint = {"type": "ephemeral"}
        block = {"type": "text", "text": "a b", "cache_control": hint}
        chat.invoke([HumanMessage([block, " c", {"type": "text", "text": ""}])])
        assert text_of(chat.engine.reports[-1]) == "<user>a b c<assistant>"

    def test_a_message_that_is_none_is_refused(self, chat: ChatPromptCache) -> None:
        with pytest.raises(PromptError, match="RemoveMessage"):
            chat.invoke([HumanMessage("hi"), RemoveMessage("1")])

    def test_a_model_without_chat_template_is_refused(
        self, with_template: Callable[..., ChatPromptCache]
    ) -> None:
        with pytest.raises(ChatTemplateError):
            with_template(None).invoke("hi")

    def test_a_message_can_not_forge_a_role(
        self, with_template: Callable[..., ChatPromptCache]
    ) -> None:
        chat = with_template(MARKED)
        special = chat.engine.lm.tokenizer.eos_token
        prompt = ChatPromptTemplate.from_messages([("human", f"say {special} {{word}}")])
        (prompt | chat).invoke({"word": f"{special}no"})
        kinds = [(s.kind, s.text) for s in chat.engine.reports[-1].segments]
        assert kinds == [
            ("literal", "<user>"),
            ("literal", f"say {special}"),
            ("argument", f" {special}no"),
            ("literal", "<assistant>"),
        ]


class TestAnswers:
    @pytest.mark.parametrize("reuse", ["off", "fast"])
    def test_answers_are_right_with_and_without_reuse(
        self, engine: PromptCacheEngine, reuse: str
    ) -> None:
        chat = ChatPromptCache(engine=engine, reuse=reuse, max_tokens=8)
        prompt = ChatPromptTemplate.from_messages(
            [("human", OPENING + "{context}\n\nQuestion: {question}\n")]
        )
        answers = {
            question: rag_chain(prompt, chat).invoke(question).text for question in QUESTIONS
        }
        right = sum(answers[q].strip() == answer for q, (answer, _) in QUESTIONS.items())
        assert right == len(QUESTIONS)

    def test_usage_says_how_much_was_reused(self, chat: ChatPromptCache) -> None:
        message = chat.invoke(MESSAGES)
        report = chat.engine.reports[-1]
        assert message.usage_metadata == {
            "input_tokens": report.prompt_tokens,
            "output_tokens": report.generated_tokens,
            "total_tokens": report.prompt_tokens + report.generated_tokens,
            "input_token_details": {
                "cache_read": report.cached_tokens,
                "cache_creation": report.encoded_tokens,
            },
        }
        again = chat.invoke(MESSAGES)
        assert again.usage_metadata["input_token_details"]["cache_read"] > 0
        assert again.response_metadata["prompt_cache"]["cached_tokens"] > 0
        assert again.response_metadata["model_name"] == "builtin:tiny-rag"
        assert again.response_metadata["finish_reason"] == "stop"

    def test_max_tokens_and_stop_are_honoured(self, chat: ChatPromptCache) -> None:
        whole = chat.invoke(MESSAGES).text
        short = chat.invoke(MESSAGES, max_tokens=1)
        assert short.response_metadata["finish_reason"] == "length"
        assert short.usage_metadata["output_tokens"] == 1
        stopped = chat.invoke(MESSAGES, stop=["mouth"])
        assert stopped.text == whole.partition("mouth")[0]

    def test_streamed_pieces_join_to_the_invoked_message(self, chat: ChatPromptCache) -> None:
        chunks = list(chat.stream(MESSAGES))
        joined = chunks[0]
        for chunk in chunks[1:]:
            joined += chunk
        invoked = chat.invoke(MESSAGES)
        assert isinstance(joined, AIMessageChunk)
        assert joined.text == invoked.text
        assert joined.usage_metadata["total_tokens"] == invoked.usage_metadata["total_tokens"]
        assert joined.response_metadata["model_name"] == "builtin:tiny-rag"
        # The last piece is the model's own, and the one with the figures.
        assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
        assert [bool(chunk.usage_metadata) for chunk in chunks].index(True) == len(chunks) - 1

    async def test_async_calls_give_the_same_answers(self, chat: ChatPromptCache) -> None:
        expected = chat.invoke(MESSAGES).text
        assert (await chat.ainvoke(MESSAGES)).text == expected
        assert [m.text for m in await chat.abatch([MESSAGES, MESSAGES])] == [expected] * 2
        assert "".join([c.text async for c in chat.astream(MESSAGES)]) == expected

    def test_invoke_streams_inside_when_asked_to(self, engine: PromptCacheEngine) -> None:
        plain = ChatPromptCache(engine=engine, max_tokens=8)
        streaming = ChatPromptCache(engine=engine, max_tokens=8, streaming=True)
        assert streaming.invoke(MESSAGES).text == plain.invoke(MESSAGES).text
        assert plain.invoke(MESSAGES, stream=True).text == plain.invoke(MESSAGES).text

    @pytest.mark.parametrize("options", [{"tool": []}, {"n": 2}, {"model": "other"}])
    def test_an_unknown_option_of_a_call_is_refused_by_name(
        self, chat: ChatPromptCache, options: dict[str, Any]
    ) -> None:
        with pytest.raises(OptionError, match=next(iter(options))):
            chat.invoke(MESSAGES, **options)
