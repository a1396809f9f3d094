"""Ways to use an LLM through LlamaIndex, each asking about the same nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from llama_index.core import PromptTemplate, SummaryIndex, get_response_synthesizer
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.evaluation import FaithfulnessEvaluator
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.llms.llm import LLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import LLMRerank, MetadataReplacementPostProcessor
from llama_index.core.prompts import RichPromptTemplate
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool, RetrieverTool
from llama_index.core.workflow import Context, Event, StartEvent, StopEvent, Workflow, step
from pydantic import BaseModel

from llama_index_parts import FixedRetriever, nodes
from pcache_integrations.llama_index import PromptCacheLLM

QUESTION = "Who is the mayor of Trudabad?"
FIRST_QUESTION = "Which people are in the register?"
FOUND = nodes(file="register.txt")[1:4]

READ = PromptTemplate("As {who}, read this:\n{context_str}\nNow tell me: {query_str}\nWell:")
LOOP = RichPromptTemplate(
    "You know only this.\n{% for c in context_str.split('\n\n') %}<doc>{{ c }}</doc>\n{% endfor %}"
    "{% if query_str %}You were asked: {{ query_str }}{% else %}Nothing was asked.{% endif %}\n"
)
TURNS = RichPromptTemplate(
    "{% chat role='system' %}You know only this.\n{{ context_str }}{% endchat %}"
    "{% chat role='user' %}You were asked: {{ query_str }}{% endchat %}"
)
BY_HAND = "Found in the archive:\n{found}\nReply to this question: {asked}\nReply:"


def texts_of(some: list[TextNode]) -> dict[str, str]:
    """What prompts may hold of nodes, and their ids."""
    modes = (MetadataMode.LLM, MetadataMode.NONE)
    return {n.get_content(metadata_mode=mode).strip(): n.node_id for n in some for mode in modes}


class Prompted(PromptCacheLLM):
    """The LLM, which says what it is told to, where an engine must be able to read its answer.

    otherwise: what it says when it is told nothing more; the model's own words if None.
    """

    answers: list[str | None] = []
    otherwise: str | None = None

    def _told(self, response: Any) -> Any:
        answer = self.answers.pop(0) if self.answers else None
        answer = self.otherwise if answer is None else answer
        if answer is not None and isinstance(response, CompletionResponse):
            response.text = response.delta = answer
        elif answer is not None and not response.message.additional_kwargs.get("tool_calls"):
            response.message.content = response.delta = answer
        return response

    def complete(self, *args: Any, **kwargs: Any) -> CompletionResponse:
        return self._told(super().complete(*args, **kwargs))

    def chat(self, *args: Any, **kwargs: Any) -> ChatResponse:
        return self._told(super().chat(*args, **kwargs))

    async def acomplete(self, *args: Any, **kwargs: Any) -> CompletionResponse:
        return self._told(await super().acomplete(*args, **kwargs))

    async def achat(self, *args: Any, **kwargs: Any) -> ChatResponse:
        return self._told(await super().achat(*args, **kwargs))

    def stream_complete(self, *args: Any, **kwargs: Any) -> Any:
        return self._last(super().stream_complete(*args, **kwargs))

    def stream_chat(self, *args: Any, **kwargs: Any) -> Any:
        return self._last(super().stream_chat(*args, **kwargs))

    async def astream_complete(self, *args: Any, **kwargs: Any) -> Any:
        return self._alast(await super().astream_complete(*args, **kwargs))

    async def astream_chat(self, *args: Any, **kwargs: Any) -> Any:
        return self._alast(await super().astream_chat(*args, **kwargs))

    def _last(self, stream: Any) -> Any:
        yield self._told(_as_one([*stream][-1]))

    async def _alast(self, stream: Any) -> Any:
        yield self._told(_as_one([part async for part in stream][-1]))


def _as_one(last: Any) -> Any:
    """The last piece of a stream as its only one."""
    text = last.text if isinstance(last, CompletionResponse) else last.message.content
    return last.model_copy(update={"delta": text or ""})


@dataclass(frozen=True)
class Case:
    """What is asked about which nodes."""

    question: str
    found: list[TextNode]


ABOUT_THE_MAYOR = Case(QUESTION, FOUND)
Use = Callable[[Prompted, Case], Awaitable[Any]]


def query_engine(
    llm: LLM, case: Case, mode: str = "compact", **options: Any
) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(
        FixedRetriever(case.found), llm=llm, response_mode=ResponseMode(mode), **options
    )


def knowing(llm: LLM, case: Case, name: str) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(
        query_engine(llm, case), name=name, description=f"Knows the {name} of everybody."
    )


async def sync(engine: Any, question: str) -> None:
    await asyncio.to_thread(engine.query, question)


async def asynchronous(engine: Any, question: str) -> None:
    await engine.aquery(question)


async def stream(engine: Any, question: str) -> None:
    response = await asyncio.to_thread(engine.query, question)
    await asyncio.to_thread(lambda: "".join(response.response_gen))


async def async_stream(engine: Any, question: str) -> None:
    response = await engine.aquery(question)
    async for _ in response.async_response_gen():
        pass


HOWS = [sync, asynchronous, stream, async_stream]
# calls for three nodes
MODES = {
    "compact": 1, "refine": 3, "tree_summarize": 1, "accumulate": 3, "compact_accumulate": 1,
    "simple_summarize": 1, "generation": 1,
}  # fmt: skip
CAN_STREAM = ("compact", "refine", "tree_summarize", "simple_summarize", "generation")


async def chat(engine: Any, question: str) -> None:
    await asyncio.to_thread(engine.chat, question)


async def achat(engine: Any, question: str) -> None:
    await engine.achat(question)


async def stream_chat(engine: Any, question: str) -> None:
    response = await asyncio.to_thread(engine.stream_chat, question)
    await asyncio.to_thread(lambda: "".join(response.response_gen))


async def astream_chat(engine: Any, question: str) -> None:
    response = await engine.astream_chat(question)
    async for _ in response.async_response_gen():
        pass


# calls for two questions, and how many of them have the nodes
CHAT_ENGINES = {
    SimpleChatEngine: (2, 0),
    ContextChatEngine: (2, 2),
    CondenseQuestionChatEngine: (3, 2),
    CondensePlusContextChatEngine: (3, 2),
}


def chat_engine(kind: Any, llm: LLM, case: Case) -> Any:
    options: dict[str, Any] = {"memory": ChatMemoryBuffer.from_defaults(token_limit=1500)}
    if kind is CondenseQuestionChatEngine:
        options["query_engine"] = query_engine(llm, case)
    else:
        options["system_prompt"] = "Be kind and never guess."
    if kind in (ContextChatEngine, CondensePlusContextChatEngine):
        options["retriever"] = FixedRetriever(case.found)
    return kind.from_defaults(llm=llm, **options)


SUB_QUESTIONS = (
    '```json\n{"items": [{"sub_question": "Who works there?", "tool_name": "register"}, '
    '{"sub_question": "Who was born there?", "tool_name": "atlas"}]}\n```'
)
USE_A_TOOL = (
    "Thought: I need to use a tool.\nAction: register\n"
    'Action Input: {"input": "Who is the mayor of Trudabad?"}'
)
DONE = "Thought: I can answer without using any more tools.\nAnswer: Somebody."


async def sub_questions(llm: Prompted, case: Case) -> list[TextNode]:
    """The answers to them become nodes, too."""
    llm.answers = [SUB_QUESTIONS]
    response = await SubQuestionQueryEngine.from_defaults(
        [knowing(llm, case, "register"), knowing(llm, case, "atlas")],
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
        verbose=False,
    ).aquery(case.question)
    return [scored.node for scored in response.source_nodes]


async def router(llm: Prompted, case: Case) -> None:
    llm.answers = ['[{"choice": 2, "reason": "it says so"}]']
    await RouterQueryEngine.from_defaults(
        [knowing(llm, case, "register"), knowing(llm, case, "atlas")],
        llm=llm,
        selector=LLMSingleSelector.from_defaults(llm=llm),
    ).aquery(case.question)


async def react_agent(llm: Prompted, case: Case) -> None:
    llm.answers = [USE_A_TOOL, None, DONE]
    await ReActAgent(tools=[knowing(llm, case, "register")], llm=llm).run(case.question)


async def agent_that_retrieves(llm: Prompted, case: Case) -> None:
    llm.answers = [USE_A_TOOL, DONE]
    tool = RetrieverTool.from_defaults(
        FixedRetriever(case.found), name="register", description="Finds people."
    )
    await AgentWorkflow.from_tools_or_functions([tool], llm=llm).run(case.question)


async def function_agent(llm: Prompted, case: Case) -> None:
    """The first answer is a call that is demanded."""
    tool = RetrieverTool.from_defaults(
        FixedRetriever(case.found), name="register", description="Finds people."
    )
    caller = llm.model_copy(update={"is_function_calling_model": True, "max_tokens": 80})
    await FunctionAgent(
        tools=[tool],
        llm=caller,
        system_prompt="Be kind and never guess.",
        initial_tool_choice="register",
    ).run(case.question)


class Retrieved(Event):
    context: str


class TwoSteps(Workflow):
    """Retrieval and answer in steps of their own."""

    llm: Any = None
    case: Any = None

    @step
    async def retrieve(self, context: Context, event: StartEvent) -> Retrieved:
        found = await FixedRetriever(self.case.found).aretrieve(self.case.question)
        return Retrieved(context="\n\n".join(scored.node.get_content() for scored in found))

    @step
    async def answer(self, context: Context, event: Retrieved) -> StopEvent:
        template = PromptTemplate(BY_HAND)
        return StopEvent(
            result=await self.llm.apredict(template, found=event.context, asked=self.case.question)
        )


async def workflow(llm: Prompted, case: Case) -> None:
    flow = TwoSteps()
    flow.llm, flow.case = llm, case
    await flow.run()


async def citations(llm: Prompted, case: Case) -> list[TextNode]:
    engine = CitationQueryEngine.from_args(
        SummaryIndex(case.found), llm=llm, retriever=FixedRetriever(case.found)
    )
    return [scored.node for scored in (await engine.aquery(case.question)).source_nodes]


async def reranked(llm: Prompted, case: Case) -> None:
    llm.answers = ["Doc: 1, Relevance: 9\nDoc: 2, Relevance: 8\nDoc: 3, Relevance: 7"]
    engine = query_engine(llm, case, node_postprocessors=[LLMRerank(llm=llm, top_n=2)])
    await asyncio.to_thread(engine.query, case.question)


async def fused_queries(llm: Prompted, case: Case) -> None:
    llm.answers = ["one more query\nanother query"]
    retriever = QueryFusionRetriever(
        [FixedRetriever(case.found)], llm=llm, num_queries=3, use_async=False
    )
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
    await asyncio.to_thread(engine.query, case.question)


async def hypothetical_document(llm: Prompted, case: Case) -> None:
    engine = TransformQueryEngine(query_engine(llm, case), HyDEQueryTransform(llm=llm))
    await asyncio.to_thread(engine.query, case.question)


async def summary_index(llm: Prompted, case: Case) -> None:
    engine = SummaryIndex(case.found).as_query_engine(llm=llm, response_mode="tree_summarize")
    await engine.aquery(case.question)


async def evaluation(llm: Prompted, case: Case) -> list[TextNode]:
    """An evaluator makes documents of its own from the texts that it is given."""
    contexts = [node.text for node in case.found]
    await FaithfulnessEvaluator(llm=llm).aevaluate(
        query=case.question, response="Somebody is.", contexts=contexts
    )
    named = [s for s in llm.engine.reports[-1].segments if s.kind == "document"]
    return [TextNode(text=segment.text, id_=str(segment.name)) for segment in named]


class Place(BaseModel):
    """A place."""

    mayor: str


def structured(mode: str) -> Use:
    async def use(llm: Prompted, case: Case) -> None:
        await query_engine(llm, case, mode, output_cls=Place).aquery(case.question)

    return use


async def wrapped_llm(llm: Prompted, case: Case) -> None:
    await query_engine(llm.as_structured_llm(Place), case).aquery(case.question)


async def answers_filtered(llm: Prompted, case: Case) -> None:
    llm.answers = ['{"answer": "x", "query_satisfied": true}'] * 3
    synthesizer = get_response_synthesizer(
        llm=llm, response_mode=ResponseMode.REFINE, structured_answer_filtering=True
    )
    await RetrieverQueryEngine(FixedRetriever(case.found), response_synthesizer=synthesizer).aquery(
        case.question
    )


def templated(template: Any) -> Use:
    async def use(llm: Prompted, case: Case) -> None:
        await query_engine(llm, case, text_qa_template=template).aquery(case.question)

    return use


BULLETS = PromptTemplate(
    READ.template,
    function_mappings={
        "context_str": lambda **values: "\n".join(
            f"- {part}" for part in values["context_str"].split("\n\n")
        )
    },
).partial_format(who="an owl")
RENAMED = PromptTemplate(
    "As {who}, read this:\n{facts}\nNow tell me: {asked}\nWell:",
    template_var_mappings={"context_str": "facts", "query_str": "asked"},
).partial_format(who="an owl")


async def sentence_windows(llm: Prompted, case: Case) -> list[TextNode]:
    found = [
        TextNode(
            text=node.text.split(".")[0],
            id_=f"s{number}",
            metadata={"window": node.text},
            excluded_llm_metadata_keys=["window"],
        )
        for number, node in enumerate(case.found)
    ]
    replacing = MetadataReplacementPostProcessor(target_metadata_key="window")
    await RetrieverQueryEngine.from_args(
        FixedRetriever(found), llm=llm, node_postprocessors=[replacing]
    ).aquery(case.question)
    return [TextNode(text=node.text, id_=f"s{i}") for i, node in enumerate(case.found)]


async def formatted_by_hand(llm: Prompted, case: Case) -> None:
    found = await FixedRetriever(case.found).aretrieve(case.question)
    context = "\n\n".join(scored.node.get_content() for scored in found)
    await llm.acomplete(f"{context}\n\nWell. {case.question}\n")


SHAPES: dict[str, Use] = {
    "sub-questions": sub_questions,
    "router": router,
    "ReAct agent": react_agent,
    "agent that retrieves": agent_that_retrieves,
    "function agent": function_agent,
    "workflow": workflow,
    "citations": citations,
    "reranked": reranked,
    "fused queries": fused_queries,
    "hypothetical document": hypothetical_document,
    "summary index": summary_index,
    "evaluation": evaluation,
    "objects, compact": structured("compact"),
    "objects, refine": structured("refine"),
    "objects, tree_summarize": structured("tree_summarize"),
    "objects, accumulate": structured("accumulate"),
    "objects, simple_summarize": structured("simple_summarize"),
    "wrapped LLM": wrapped_llm,
    "answers filtered": answers_filtered,
    "partly filled": templated(READ.partial_format(who="an owl")),
    "Jinja loop": templated(LOOP),
    "Jinja turns": templated(TURNS),
    "function mapping": templated(BULLETS),
    "renamed variables": templated(RENAMED),
    "sentence windows": sentence_windows,
    "formatted by hand": formatted_by_hand,
}


def answered(mode: str, how: Callable[[Any, str], Awaitable[None]]) -> Use:
    async def use(llm: Prompted, case: Case) -> None:
        streaming = "stream" in how.__name__
        await how(query_engine(llm, case, mode, streaming=streaming), case.question)

    return use


def conversed(kind: Any, how: Callable[[Any, str], Awaitable[None]]) -> Use:
    async def use(llm: Prompted, case: Case) -> None:
        engine = chat_engine(kind, llm, case)
        for question in (FIRST_QUESTION, case.question):
            await how(engine, question)

    return use


MODE_USES: dict[str, Use] = {
    f"{mode}, {how.__name__}": answered(mode, how)
    for mode in MODES
    for how in HOWS
    if mode in CAN_STREAM or how in (sync, asynchronous)
}
CHAT_USES: dict[str, Use] = {kind.__name__: conversed(kind, chat) for kind in CHAT_ENGINES}
