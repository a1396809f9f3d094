"""Retrievers, chains and recording models for the LangChain tests."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel
from langchain_core.language_models.llms import LLM
from langchain_core.prompts import BasePromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnablePassthrough
from pydantic import Field

from corpus import DOCUMENTS, QUESTIONS
from pcache_core import Report

UNHEARD = "unheard"  # the mark of documents that nobody may announce


def marked(question: str, mark: str) -> str:
    """A question of the corpus whose documents nobody else's question has; `mark` tells whose."""
    return f"{question} ({mark})"


def corpus_for(question: str) -> tuple[str, ...]:
    """The corpus in the words of a question: a marked one's documents bear its mark.

    Unheard ones read backwards: no document that any test announces stands in them.
    """
    mark = question.partition(" (")[2].removesuffix(")")
    if mark == UNHEARD:
        return tuple(" ".join(reversed(text.split())) for text in DOCUMENTS)
    return tuple(f"Note {mark}. {text}" if mark else text for text in DOCUMENTS)


def numbers_for(question: str) -> tuple[int, ...]:
    """Which documents of its corpus a question takes."""
    return QUESTIONS[question.partition(" (")[0]][1]


def found(question: str) -> list[Document]:
    """What the retriever finds, without asking it."""
    texts = corpus_for(question)
    return [Document(texts[number], id=f"d{number}") for number in numbers_for(question)]


class AnswerRetriever(BaseRetriever):
    """Finds the documents that the corpus lists for a question."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return found(query)


class RecordingLLM(LLM):
    """Keeps the exact prompts that LangChain gives to a completion model."""

    prompts: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "recording"

    def _call(self, prompt: str, stop: list[str] | None = None, *_: Any, **__: Any) -> str:
        self.prompts.append(prompt)
        return "ok"


def join(documents: list[Document]) -> str:
    """What LangChain's tutorials call `format_docs`."""
    return "\n\n".join(document.page_content for document in documents)


def rag_chain(prompt: BasePromptTemplate[Any], model: BaseLanguageModel[Any]) -> Runnable[str, Any]:
    """The chain of LangChain's tutorials."""
    return {"context": AnswerRetriever() | join, "question": RunnablePassthrough()} | prompt | model


def text_of(report: Report) -> str:
    """The prompt that a report is about."""
    return "".join(segment.text for segment in report.segments)


def documents_of(report: Report) -> list[str | None]:
    """The names of the documents in a report, in the prompt's order."""
    return [segment.name for segment in report.segments if segment.kind == "document"]
