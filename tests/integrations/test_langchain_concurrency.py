"""Hundreds of calls at once, from threads and tasks: each is mapped to its own documents."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.prompts import PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable

from corpus import QUESTIONS, TEMPLATE
from langchain_chains import documents_of, join, rag_chain, text_of
from pcache_core import CausalLM, Generation, PromptCacheEngine, Report
from pcache_integrations._engines import load_lm
from pcache_integrations.langchain import PromptCacheLLM

_CALLS = 500
_AT_ONCE = 250  # the engine keeps the reports of 256
_OPENING = "The mill by the old lake "
# Many begin alike, some are the beginning of others, and some are there twice under other names.
_STEMS = [f"{_OPENING}{what}." for what in ("burned", "burned down", "was sold", "is new")]
CORPUS = [*_STEMS, *(f"{stem} Ask {name}." for stem in _STEMS for name in ("Ann", "Bo"))]
PROMPT = PromptTemplate.from_template("Read.\n\n{context}\n\nQ: {question}\nA:")


class Numbered(BaseRetriever):
    """Finds what a question's number stands for."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [
            Document(text, id=f"{place}-{query}") for place, text in enumerate(texts_for(query))
        ]


def texts_for(question: str) -> list[str]:
    """Two or three documents; the same one may come twice."""
    chosen = random.Random(question)
    return chosen.choices(CORPUS, k=chosen.choice((2, 3)))


def chain_of(llm: Any) -> Runnable[str, Any]:
    return {"context": Numbered() | join, "question": lambda question: question} | PROMPT | llm


async def drain(pieces: Any) -> None:
    async for _ in pieces:
        pass


IN_THREADS: list[Callable[[Any, str], Any]] = [
    lambda chain, question: chain.invoke(question),
    lambda chain, question: list(chain.stream(question)),
    lambda chain, question: chain.batch([question]),
]
IN_TASKS: list[Callable[[Any, str], Any]] = [
    lambda chain, question: chain.ainvoke(question),
    lambda chain, question: drain(chain.astream(question)),
    lambda chain, question: chain.abatch([question]),
]


def ask_in_threads(chain: Any, questions: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        jobs = [
            pool.submit(IN_THREADS[number % 3], chain, question)
            for number, question in enumerate(questions)
        ]
        for job in jobs:
            job.result()


def ask_in_tasks(chain: Any, questions: list[str]) -> None:
    async def ask() -> None:
        calls = (IN_TASKS[number % 3](chain, q) for number, q in enumerate(questions))
        await asyncio.gather(*calls)

    asyncio.run(ask())


def test_every_call_is_mapped_to_its_own_documents(tiny_lm: Callable[..., CausalLM]) -> None:
    engine = PromptCacheEngine(tiny_lm("llama"), reuse="fast")
    chain = chain_of(PromptCacheLLM(engine=engine, max_tokens=1))
    questions = [f"Who owns number {number}?" for number in range(_CALLS)]
    reports: dict[str, Report] = {}
    for start in range(0, _CALLS, _AT_ONCE):
        engine.reports.clear()
        asked = questions[start : start + _AT_ONCE]
        with ThreadPoolExecutor(2) as both:
            threads = both.submit(ask_in_threads, chain, asked[::2])
            tasks = both.submit(ask_in_tasks, chain, asked[1::2])
            threads.result()
            tasks.result()
        assert len(engine.reports) == len(asked)
        for report in engine.reports:
            question = text_of(report).partition("Q: ")[2].partition("\n")[0]
            reports[question] = report
    assert sorted(reports) == sorted(questions)
    for question, report in reports.items():
        texts = texts_for(question)
        context = "\n\n".join(texts)
        assert text_of(report) == f"Read.\n\n{context}\n\nQ: {question}\nA:"
        found = [part.text for part in report.segments if part.kind == "document"]
        assert found == texts, question
        kinds = [part.kind for part in report.segments]
        assert (kinds[0], *kinds[-3:]) == ("literal", "literal", "argument", "literal")


class Instant(PromptCacheEngine):
    """Gives its first answer again, so that what is left is the integration's own time."""

    answer: Generation | None = None

    def generate(self, *args: Any, **options: Any) -> Generation:
        self.answer = self.answer or super().generate(*args, **options)
        return self.answer


def test_watching_and_mapping_a_call_takes_less_than_five_milliseconds() -> None:
    engine = Instant(load_lm("builtin:tiny-rag"))
    chain = rag_chain(
        PromptTemplate.from_template(TEMPLATE), PromptCacheLLM(engine=engine, max_tokens=1)
    )
    spent_ms = []
    for _ in range(40):
        started = time.process_time()
        chain.invoke(next(iter(QUESTIONS)))  # all of LangChain's own work counts, too
        spent_ms.append((time.process_time() - started) * 1000)
    assert statistics.median(spent_ms) < 5
    assert documents_of(engine.reports[0]) == ["d1", "d4"]
