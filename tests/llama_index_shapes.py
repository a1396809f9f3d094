"""Ways to use an LLM through LlamaIndex, each asking about the same nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from llama_index.core import PromptTemplate, SummaryIndex, get_response_synthesizer
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from llama_index.core.chat_engine import condense_plus_context, condense_question
from llama_index.core.evaluation import FaithfulnessEvaluator
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.llms.llm import LLM
from llama_index.core.postprocessor import LLMRerank, MetadataReplacementPostProcessor
from llama_index.core.prompts import RichPromptTemplate, chat_prompts, default_prompts
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
from prompt_painter import pieces_of_templates

QUESTION = "Who is the mayor of Trudabad?"
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

SOURCES = [
    *(value for name, value in vars(default_prompts).items() if name.endswith("_TMPL")),
    *(
        message.content or ""
        for template in vars(chat_prompts).values()
        for message in getattr(template, "message_templates", ())
    ),
    condense_question.DEFAULT_TEMPLATE,
    condense_plus_context.DEFAULT_CONTEXT_PROMPT_TEMPLATE,
    condense_plus_context.DEFAULT_CONTEXT_REFINE_PROMPT_TEMPLATE,
    condense_plus_context.DEFAULT_CONDENSE_PROMPT_TEMPLATE,
    "Use the context information below to assist the user.",
    READ.template,
    LOOP.template_str,
    BY_HAND,
    "You are designed to help with a variety of tasks",
    "Here's a JSON schema to follow:",
    "Output a valid JSON object but do not repeat the schema.",
    "Be kind and never guess.",
]
TEMPLATES = pieces_of_templates(source for source in SOURCES if isinstance(source, str))


def texts_of(some: list[TextNode]) -> dict[str, str]:
    """What prompts may hold of nodes, and their ids."""
    modes = (MetadataMode.LLM, MetadataMode.NONE)
    return {n.get_content(metadata_mode=mode).strip(): n.node_id for n in some for mode in modes}


class Prompted(PromptCacheLLM):
    """The LLM, which says what it is told to, where an engine must be able to read its answer."""

    answers: list[str | None] = []

    def _told(self, response: Any) -> Any:
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None and isinstance(response, CompletionResponse):
            response.text = answer
        elif answer is not None:
            response.message.content = answer
        return response

    def complete(self, *args: Any, **kwargs: Any) -> CompletionResponse:
        return self._told(super().complete(*args, **kwargs))

    def chat(self, *args: Any, **kwargs: Any) -> ChatResponse:
        return self._told(super().chat(*args, **kwargs))

    async def acomplete(self, *args: Any, **kwargs: Any) -> CompletionResponse:
        return self._told(await super().acomplete(*args, **kwargs))

    async def achat(self, *args: Any, **kwargs: Any) -> ChatResponse:
        return self._told(await super().achat(*args, **kwargs))

    async def astream_chat(self, *args: Any, **kwargs: Any) -> Any:
        stream = await super().astream_chat(*args, **kwargs)

        async def last() -> Any:
            response = [part async for part in stream][-1]
            yield self._told(response)

        return last()


Use = Callable[[Prompted], Awaitable[Any]]


def query_engine(llm: LLM, mode: str = "compact", **options: Any) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(
        FixedRetriever(FOUND), llm=llm, response_mode=ResponseMode(mode), **options
    )


def knowing(llm: LLM, name: str) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(
        query_engine(llm), name=name, description=f"Knows the {name} of everybody."
    )


SUB_QUESTIONS = (
    '```json\n{"items": [{"sub_question": "Who works there?", "tool_name": "register"}, '
    '{"sub_question": "Who was born there?", "tool_name": "atlas"}]}\n```'
)
USE_A_TOOL = (
    "Thought: I need to use a tool.\nAction: register\n"
    'Action Input: {"input": "Who is the mayor of Trudabad?"}'
)
DONE = "Thought: I can answer without using any more tools.\nAnswer: Somebody."


async def sub_questions(llm: Prompted) -> list[TextNode]:
    """The answers to them become nodes, too."""
    llm.answers = [SUB_QUESTIONS]
    response = await SubQuestionQueryEngine.from_defaults(
        [knowing(llm, "register"), knowing(llm, "atlas")],
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
        verbose=False,
    ).aquery(QUESTION)
    return [scored.node for scored in response.source_nodes]


async def router(llm: Prompted) -> None:
    llm.answers = ['[{"choice": 2, "reason": "it says so"}]']
    await RouterQueryEngine.from_defaults(
        [knowing(llm, "register"), knowing(llm, "atlas")],
        llm=llm,
        selector=LLMSingleSelector.from_defaults(llm=llm),
    ).aquery(QUESTION)


async def react_agent(llm: Prompted) -> None:
    llm.answers = [USE_A_TOOL, None, DONE]
    await ReActAgent(tools=[knowing(llm, "register")], llm=llm).run(QUESTION)


async def agent_that_retrieves(llm: Prompted) -> None:
    llm.answers = [USE_A_TOOL, DONE]
    tool = RetrieverTool.from_defaults(
        FixedRetriever(FOUND), name="register", description="Finds people."
    )
    await AgentWorkflow.from_tools_or_functions([tool], llm=llm).run(QUESTION)


async def function_agent(llm: Prompted) -> None:
    """The first answer is a call that is demanded."""
    tool = RetrieverTool.from_defaults(
        FixedRetriever(FOUND), name="register", description="Finds people."
    )
    caller = llm.model_copy(update={"is_function_calling_model": True, "max_tokens": 80})
    await FunctionAgent(
        tools=[tool],
        llm=caller,
        system_prompt="Be kind and never guess.",
        initial_tool_choice="register",
    ).run(QUESTION)


class Retrieved(Event):
    context: str


class TwoSteps(Workflow):
    """Retrieval and answer in steps of their own."""

    llm: Any = None

    @step
    async def retrieve(self, context: Context, event: StartEvent) -> Retrieved:
        found = await FixedRetriever(FOUND).aretrieve(QUESTION)
        return Retrieved(context="\n\n".join(scored.node.get_content() for scored in found))

    @step
    async def answer(self, context: Context, event: Retrieved) -> StopEvent:
        template = PromptTemplate(BY_HAND)
        return StopEvent(
            result=await self.llm.apredict(template, found=event.context, asked=QUESTION)
        )


async def workflow(llm: Prompted) -> None:
    flow = TwoSteps()
    flow.llm = llm
    await flow.run()


async def citations(llm: Prompted) -> list[TextNode]:
    engine = CitationQueryEngine.from_args(
        SummaryIndex(FOUND), llm=llm, retriever=FixedRetriever(FOUND)
    )
    return [scored.node for scored in (await engine.aquery(QUESTION)).source_nodes]


async def reranked(llm: Prompted) -> None:
    llm.answers = ["Doc: 1, Relevance: 9\nDoc: 2, Relevance: 8\nDoc: 3, Relevance: 7"]
    engine = query_engine(llm, node_postprocessors=[LLMRerank(llm=llm, top_n=2)])
    await asyncio.to_thread(engine.query, QUESTION)


async def fused_queries(llm: Prompted) -> None:
    llm.answers = ["one more query\nanother query"]
    retriever = QueryFusionRetriever(
        [FixedRetriever(FOUND)], llm=llm, num_queries=3, use_async=False
    )
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
    await asyncio.to_thread(engine.query, QUESTION)


async def hypothetical_document(llm: Prompted) -> None:
    engine = TransformQueryEngine(query_engine(llm), HyDEQueryTransform(llm=llm))
    await asyncio.to_thread(engine.query, QUESTION)


async def summary_index(llm: Prompted) -> None:
    engine = SummaryIndex(FOUND).as_query_engine(llm=llm, response_mode="tree_summarize")
    await engine.aquery(QUESTION)


async def evaluation(llm: Prompted) -> list[TextNode]:
    """An evaluator makes documents of its own from the texts that it is given."""
    contexts = [node.text for node in FOUND]
    await FaithfulnessEvaluator(llm=llm).aevaluate(
        query=QUESTION, response="Somebody is.", contexts=contexts
    )
    named = [s for s in llm.engine.reports[-1].segments if s.kind == "document"]
    return [TextNode(text=segment.text, id_=str(segment.name)) for segment in named]


class Place(BaseModel):
    """A place."""

    mayor: str


def structured(mode: str) -> Use:
    async def use(llm: Prompted) -> None:
        await query_engine(llm, mode, output_cls=Place).aquery(QUESTION)

    return use


async def wrapped_llm(llm: Prompted) -> None:
    await query_engine(llm.as_structured_llm(Place)).aquery(QUESTION)


async def answers_filtered(llm: Prompted) -> None:
    llm.answers = ['{"answer": "x", "query_satisfied": true}'] * 3
    synthesizer = get_response_synthesizer(
        llm=llm, response_mode=ResponseMode.REFINE, structured_answer_filtering=True
    )
    await RetrieverQueryEngine(FixedRetriever(FOUND), response_synthesizer=synthesizer).aquery(
        QUESTION
    )


def templated(template: Any) -> Use:
    async def use(llm: Prompted) -> None:
        await query_engine(llm, text_qa_template=template).aquery(QUESTION)

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


async def sentence_windows(llm: Prompted) -> list[TextNode]:
    found = [
        TextNode(
            text=node.text.split(".")[0],
            id_=f"s{number}",
            metadata={"window": node.text},
            excluded_llm_metadata_keys=["window"],
        )
        for number, node in enumerate(FOUND)
    ]
    replacing = MetadataReplacementPostProcessor(target_metadata_key="window")
    await RetrieverQueryEngine.from_args(
        FixedRetriever(found), llm=llm, node_postprocessors=[replacing]
    ).aquery(QUESTION)
    return [TextNode(text=node.text, id_=f"s{i}") for i, node in enumerate(FOUND)]


async def formatted_by_hand(llm: Prompted) -> None:
    found = await FixedRetriever(FOUND).aretrieve(QUESTION)
    context = "\n\n".join(scored.node.get_content() for scored in found)
    await llm.acomplete(f"{context}\n\nWell. {QUESTION}\n")


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
