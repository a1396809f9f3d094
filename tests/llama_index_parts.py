"""Retrievers, indexes and recording models for the LlamaIndex tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.llm import LLM
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent

from corpus import DOCUMENTS, OPENING, QUESTIONS
from pcache_core import CausalLM, Report

# The template that the built-in model was trained on, in LlamaIndex's variables.
QA_TEMPLATE = OPENING + "{context_str}\n\nQuestion: {query_str}\nAnswer:"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<eos>{{ m['role'] }}\n{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<eos>assistant\n{% endif %}"
)


def nodes(**metadata: str) -> list[TextNode]:
    """The corpus as nodes `d0` … `d7`."""
    return [
        TextNode(text=text, id_=f"d{number}", metadata=dict(metadata))
        for number, text in enumerate(DOCUMENTS)
    ]


class FixedRetriever(BaseRetriever):
    """Finds the same nodes for every question."""

    def __init__(self, found: Sequence[TextNode]) -> None:
        super().__init__()
        self.found = found

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=node, score=1.0) for node in self.found]


class AnswerRetriever(BaseRetriever):
    """Finds the documents that the corpus lists for a question."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        _, numbers = QUESTIONS[query_bundle.query_str]
        known = nodes()
        return [NodeWithScore(node=known[number], score=1.0) for number in numbers]


def vector_index(some: Sequence[TextNode]) -> VectorStoreIndex:
    """A real index; all its embeddings are equal, so it finds any of its nodes."""
    return VectorStoreIndex(list(some), embed_model=MockEmbedding(embed_dim=2))


def chat_lm() -> CausalLM:
    """The built-in model with a chat template that marks roles, by a special token."""
    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    lm.tokenizer.chat_template = CHAT_TEMPLATE
    return lm


class _Answers(BaseEventHandler):
    texts: list[str] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if isinstance(event, LLMCompletionEndEvent):
            self.texts.append(event.response.text)
        elif isinstance(event, LLMChatEndEvent) and event.response is not None:
            self.texts.append(event.response.message.content or "")


@contextmanager
def heard_answers() -> Iterator[list[str]]:
    """The texts of every LLM's answers inside the block, as LlamaIndex announces them."""
    root = get_dispatcher()
    listener = _Answers()
    root.event_handlers.append(listener)
    try:
        yield listener.texts
    finally:
        root.event_handlers.remove(listener)


class RecordingLLM(CustomLLM):
    """A plain LLM: keeps what LlamaIndex gives to it, and replays answers."""

    chats: bool = False
    window: int = 2048
    num_output: int = 256
    prompts: list[str] = Field(default_factory=list)
    conversations: list[list[ChatMessage]] = Field(default_factory=list)
    answers: list[str] = Field(default_factory=list)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=self.window, num_output=self.num_output, is_chat_model=self.chats
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:
        self.prompts.append(prompt)
        return CompletionResponse(text=self.answers.pop(0))

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **_: Any
    ) -> CompletionResponseGen:
        response = self.complete(prompt)
        response.delta = response.text
        return (part for part in (response,))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **_: Any) -> ChatResponse:
        self.conversations.append(list(messages))
        return ChatResponse(message=ChatMessage(self.answers.pop(0), role="assistant"))


def text_of(report: Report) -> str:
    """The prompt that a report describes."""
    return "".join(segment.text for segment in report.segments)


def documents_of(report: Report) -> list[str | None]:
    """Names of the documents in a prompt, in its order."""
    return [segment.name for segment in report.segments if segment.kind == "document"]


def pieces_of(report: Report) -> list[tuple[str, str | None]]:
    """Kinds and names of a prompt's parts."""
    return [(segment.kind, segment.name) for segment in report.segments]


def argument_of(report: Report, name: str) -> str:
    """The text that a variable was filled with, as far as it is no document."""
    parts = [s.text for s in report.segments if (s.kind, s.name) == ("argument", name)]
    return "".join(parts).strip()


# Every way to ask for one answer: what is handed out, one part or many.

TEXT = f"{OPENING}{DOCUMENTS[6]}\n\nQuestion: Where was Jerome Fertden born?\nAnswer:"
MESSAGES = [ChatMessage(TEXT.removesuffix("\nAnswer:"))]
Ask = Callable[..., Awaitable[list[Any]]]


async def complete(llm: LLM, text: str = TEXT, **options: Any) -> list[Any]:
    return [llm.complete(text, **options)]


async def stream_complete(llm: LLM, text: str = TEXT, **options: Any) -> list[Any]:
    return list(llm.stream_complete(text, **options))


async def acomplete(llm: LLM, text: str = TEXT, **options: Any) -> list[Any]:
    return [await llm.acomplete(text, **options)]


async def astream_complete(llm: LLM, text: str = TEXT, **options: Any) -> list[Any]:
    return [part async for part in await llm.astream_complete(text, **options)]


async def chat(llm: LLM, messages: Any = MESSAGES, **options: Any) -> list[Any]:
    return [llm.chat(messages, **options)]


async def stream_chat(llm: LLM, messages: Any = MESSAGES, **options: Any) -> list[Any]:
    return list(llm.stream_chat(messages, **options))


async def achat(llm: LLM, messages: Any = MESSAGES, **options: Any) -> list[Any]:
    return [await llm.achat(messages, **options)]


async def astream_chat(llm: LLM, messages: Any = MESSAGES, **options: Any) -> list[Any]:
    return [part async for part in await llm.astream_chat(messages, **options)]


COMPLETIONS = [complete, stream_complete, acomplete, astream_complete]
CHATS = [chat, stream_chat, achat, astream_chat]
ALL = [*COMPLETIONS, *CHATS]
ASYNC = [acomplete, astream_complete, achat, astream_chat]


def answer(parts: list[Any]) -> str:
    last = parts[-1]
    return str(last.message.content if hasattr(last, "message") else last.text)
