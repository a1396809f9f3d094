"""Ways to write the same RAG chain with LangChain: about all that its documentation shows.

A shape takes a model and a question, and asks. The oracle is plain text: which documents the chain
was bound to find, what its template says, and the prompt that another model got from it.
"""

from __future__ import annotations

import asyncio
import operator
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypedDict

from langchain.agents import create_agent
from langchain.agents.middleware import dynamic_prompt
from langchain_classic.chains import (
    ConversationalRetrievalChain,
    LLMChain,
    RetrievalQA,
    create_history_aware_retriever,
    create_retrieval_chain,
)
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.chains.combine_documents.map_reduce import MapReduceDocumentsChain
from langchain_classic.chains.combine_documents.reduce import ReduceDocumentsChain
from langchain_classic.chains.combine_documents.refine import RefineDocumentsChain
from langchain_classic.chains.combine_documents.stuff import StuffDocumentsChain
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotPromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
    StringPromptTemplate,
)
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
    chain,
)
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.vectorstores import InMemoryVectorStore
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode

from corpus import OPENING, TEMPLATE
from langchain_chains import AnswerRetriever, corpus_for, found, join, numbers_for
from pcache_integrations.langchain import track

Run = Callable[[Any, str], Any]
LITERALS = (OPENING, "Question:", "Answer:")
PROMPT = PromptTemplate.from_template(TEMPLATE)
CHAT = ChatPromptTemplate.from_messages(
    [("system", OPENING + "{context}"), ("human", "Question: {question}\nAnswer:")]
)
INPUT_PROMPT = PromptTemplate.from_template(TEMPLATE.replace("{question}", "{input}"))
HISTORY = [HumanMessage("Where does she live now?"), AIMessage("In Trudabad, by the river.")]


@dataclass(frozen=True)
class Shape:
    """One way to write the chain.

    run: asks a model a question. literals: what the template says, in the prompt's order.
    rounds: how many questions are asked before.
    documents: what the last prompt holds for a question, by number.
    cut: how many characters of each document.
    asks: whether the question is in the prompt.
    is_told: whether LangChain tells of the template, so that its text and its values are known.
    """

    name: str
    run: Run
    literals: Sequence[str] = LITERALS
    rounds: int = 2
    documents: Callable[[str], Sequence[int]] = numbers_for
    cut: int | None = None
    asks: bool = True
    is_told: bool = False

    def texts(self, question: str) -> list[str]:
        """The documents' texts."""
        texts = corpus_for(question)
        return [texts[number] for number in self.documents(question)]


def context_of(question: str) -> str:
    return join(found(question))


def rag(prompt: Any, model: Any, format_docs: Any = join) -> Runnable[str, Any]:
    steps = {"context": AnswerRetriever() | format_docs, "question": RunnablePassthrough()}
    return steps | prompt | model | StrOutputParser()


def rag_for(model: Any, asked: Any = None) -> Runnable[str, Any]:
    """The chain with a template of the model's kind. asked: the model in what is put around it."""
    return rag(prompt_for(model), asked or model)


async def drain(pieces: Any) -> None:
    async for _ in pieces:
        pass


def prompt_for(model: Any) -> Any:
    return CHAT if isinstance(model, BaseChatModel) else PROMPT


# -- entry points -------------------------------------------------------------------------------


def in_threads(model: Any, question: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rag_for(model).invoke, [question, question]))


def in_a_thread(model: Any, question: str) -> None:
    thread = threading.Thread(target=rag_for(model).invoke, args=(question,))
    thread.start()
    thread.join()


def in_tasks(model: Any, question: str) -> None:
    async def gather() -> None:
        ask = rag_for(model).ainvoke
        await asyncio.gather(*(asyncio.create_task(ask(question)) for _ in range(3)))

    asyncio.run(gather())


def in_a_task_group(model: Any, question: str) -> None:
    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(drain(rag_for(model).astream(question)))

    asyncio.run(grouped())


ENTRY_POINTS = [
    Shape("invoke", lambda m, q: rag_for(m).invoke(q)),
    Shape("ainvoke", lambda m, q: asyncio.run(rag_for(m).ainvoke(q))),
    Shape("stream", lambda m, q: list(rag_for(m).stream(q))),
    Shape("astream", lambda m, q: asyncio.run(drain(rag_for(m).astream(q)))),
    Shape(
        "astream_events",
        lambda m, q: asyncio.run(drain(rag_for(m).astream_events(q, version="v2"))),
    ),
    Shape("astream_log", lambda m, q: asyncio.run(drain(rag_for(m).astream_log(q)))),
    Shape("batch", lambda m, q: rag_for(m).batch([q, q])),
    Shape("batch, limited", lambda m, q: rag_for(m).batch([q] * 3, {"max_concurrency": 2})),
    Shape("batch of exceptions", lambda m, q: rag_for(m).batch([q], return_exceptions=True)),
    Shape("abatch", lambda m, q: asyncio.run(rag_for(m).abatch([q, q]))),
    Shape("batch_as_completed", lambda m, q: list(rag_for(m).batch_as_completed([q, q]))),
    Shape("a pool of threads", in_threads),
    Shape("a thread", in_a_thread),
    Shape("gathered tasks", in_tasks),
    Shape("a task group", in_a_task_group),
    Shape("transform", lambda m, q: list(rag_for(m).transform(iter([q])))),
]

# -- what is put around the model ---------------------------------------------------------------

WRAPPERS = [
    Shape("bind", lambda m, q: rag_for(m, m.bind(stop=["\n"])).invoke(q)),
    Shape("with_retry", lambda m, q: rag_for(m, m.with_retry()).invoke(q)),
    Shape("with_fallbacks", lambda m, q: rag_for(m, m.with_fallbacks([m])).invoke(q)),
    Shape("with_config", lambda m, q: rag_for(m, m.with_config(tags=["a"])).invoke(q)),
    Shape(
        "with_listeners",
        lambda m, q: rag_for(m, m.with_listeners(on_end=lambda run: None)).invoke(q),
    ),
    Shape("configurable", lambda m, q: rag_for(m, configurable(m)).invoke(q)),
    Shape("parallel", lambda m, q: rag_for(m, RunnableParallel(a=m, b=m) | str).invoke(q)),
    Shape(
        "a function",
        lambda m, q: rag_for(m, RunnableLambda(lambda p: m.invoke(p))).invoke(q),
    ),
    Shape(
        "an async function",
        lambda m, q: asyncio.run(rag_for(m, RunnableLambda(async_calling(m))).ainvoke(q)),
    ),
    Shape(
        "a branch",
        lambda m, q: rag_for(m, RunnableBranch((lambda p: bool(p), m), m)).invoke(q),
    ),
    Shape(
        "the prompt as a string",
        lambda m, q: rag_for(m, RunnableLambda(lambda p: p.to_string()) | m).invoke(q),
    ),
    Shape(
        "the prompt stripped",
        lambda m, q: rag(
            PromptTemplate.from_template(f"\n{TEMPLATE}\n"),
            RunnableLambda(lambda p: p.to_string().strip()) | m,
        ).invoke(q),
    ),
    Shape("a decorated chain", lambda m, q: decorated(m).invoke(q)),
    Shape("pick and assign", lambda m, q: assigned(m).invoke({"question": q})),
]


TOLD = [replace(shape, is_told=True) for shape in (*ENTRY_POINTS, *WRAPPERS)]


def configurable(model: Any) -> Any:
    from langchain_core.runnables import ConfigurableField

    field = ConfigurableField(id="tokens")
    return model.configurable_fields(max_tokens=field).with_config(configurable={"tokens": 2})


def async_calling(model: Any) -> Any:
    async def call(prompt: Any) -> Any:
        return await model.ainvoke(prompt)

    return call


def decorated(model: Any) -> Any:
    @chain
    def ask(question: str) -> Any:
        context = join(AnswerRetriever().invoke(question))
        return model.invoke(prompt_for(model).invoke({"context": context, "question": question}))

    return ask


def assigned(model: Any) -> Any:
    retrieve = RunnableLambda(operator.itemgetter("question")) | AnswerRetriever()
    answer = (
        RunnablePassthrough.assign(context=lambda x: join(x["documents"]))
        | prompt_for(model)
        | model
    )
    return RunnablePassthrough.assign(documents=retrieve).assign(answer=answer).pick("answer")


# -- templates ----------------------------------------------------------------------------------


class OwnTemplate(StringPromptTemplate):
    """A template class of a user's own."""

    def format(self, **values: Any) -> str:
        return f"{OPENING}{values['context']}\n\nQuestion: {values['question']}\nAnswer:"


def mustache() -> PromptTemplate:
    return PromptTemplate.from_template(
        TEMPLATE.replace("{context}", "{{{context}}}").replace("{question}", "{{{question}}}"),
        template_format="mustache",
    )


def jinja(source: str) -> PromptTemplate:
    return PromptTemplate.from_template(source, template_format="jinja2")


def few_shot() -> FewShotPromptTemplate:
    return FewShotPromptTemplate(
        examples=[{"q": "Who paints?", "a": "Rhea."}],
        example_prompt=PromptTemplate.from_template("Question: {q}\nAnswer: {a}"),
        prefix="Answer as in the example.",
        suffix="{context}\n\nQuestion: {question}\nAnswer:",
        input_variables=["context", "question"],
    )


JINJA_LOOP = (
    OPENING
    + "{% for d in docs %}- {{ d.page_content }}\n{% endfor %}\nQuestion: {{ question }}\nAnswer:"
)
SOURCES = PromptTemplate.from_template("[{source}]\n{page_content}")


def with_sources(model: Any, question: str) -> Any:
    documents = [Document(d.page_content, metadata={"source": d.id}) for d in found(question)]
    stuff = create_stuff_documents_chain(model, PROMPT, document_prompt=SOURCES)
    return stuff.invoke({"context": documents, "question": question})


TEMPLATES = [
    Shape(
        "f-string, question first",
        lambda m, q: rag(
            PromptTemplate.from_template(
                "Question: {question}\n\nDocuments:\n{context}\n\nAnswer:"
            ),
            m,
        ).invoke(q),
        ("Question:", "Documents:", "Answer:"),
    ),
    Shape("mustache", lambda m, q: rag(mustache(), m).invoke(q)),
    Shape(
        "jinja2",
        lambda m, q: rag(jinja(TEMPLATE.replace("{", "{{ ").replace("}", " }}")), m).invoke(q),
    ),
    Shape(
        "jinja2 with a loop",
        lambda m, q: (
            {"docs": AnswerRetriever(), "question": RunnablePassthrough()} | jinja(JINJA_LOOP) | m
        ).invoke(q),
    ),
    Shape(
        "few-shot",
        lambda m, q: rag(few_shot(), m).invoke(q),
        (
            "Answer as in the example.\n\nQuestion: Who paints?\nAnswer: Rhea.",
            "Question:",
            "Answer:",
        ),
    ),
    Shape(
        "partial",
        lambda m, q: rag(
            PromptTemplate.from_template("Be {mood}.\n" + TEMPLATE).partial(mood="brief"), m
        ).invoke(q),
        ("Be ", *LITERALS),
    ),
    Shape(
        "partial by a function",
        lambda m, q: rag(
            PromptTemplate.from_template("Today: {day}\n" + TEMPLATE).partial(day=lambda: "Monday"),
            m,
        ).invoke(q),
        ("Today:", *LITERALS),
    ),
    Shape("document_prompt", with_sources),
    Shape(
        "templates added",
        lambda m, q: rag(
            PromptTemplate.from_template(OPENING) + TEMPLATE[len(OPENING) :], m
        ).invoke(q),
    ),
    Shape(
        "a template class of one's own",
        lambda m, q: rag(OwnTemplate(input_variables=["context", "question"]), m).invoke(q),
    ),
    Shape(
        "template.format",
        lambda m, q: m.invoke(PROMPT.format(context=join(AnswerRetriever().invoke(q)), question=q)),
    ),
]

# -- retrievers ---------------------------------------------------------------------------------


class FirstSentences(BaseDocumentTransformer):
    """Leaves the beginning of each document."""

    def transform_documents(self, documents: Sequence[Document], **_: Any) -> list[Document]:
        return [d.model_copy(update={"page_content": d.page_content}) for d in documents]


def retrieving(retriever: Any) -> Run:
    def run(model: Any, question: str) -> Any:
        steps = {"context": retriever | join, "question": RunnablePassthrough()}
        return (steps | PROMPT | model).invoke(question)

    return run


def history_aware(model: Any, question: str) -> Any:
    rephrase = ChatPromptTemplate.from_messages(
        [MessagesPlaceholder("chat_history"), ("human", "{input}")]
    )
    asked = RunnableLambda(lambda _: question)
    retriever = create_history_aware_retriever(asked, AnswerRetriever(), rephrase)
    stuff = create_stuff_documents_chain(model, INPUT_PROMPT)
    return create_retrieval_chain(retriever, stuff).invoke(
        {"input": question, "chat_history": HISTORY}
    )


RETRIEVERS = [
    Shape(
        "a retriever in a lambda", retrieving(RunnableLambda(lambda q: AnswerRetriever().invoke(q)))
    ),
    Shape("documents from a function", retrieving(RunnableLambda(found))),
    Shape(
        "ensemble",
        retrieving(EnsembleRetriever(retrievers=[AnswerRetriever()] * 2, weights=[0.5, 0.5])),
    ),
    Shape(
        "contextual compression",
        retrieving(
            ContextualCompressionRetriever(
                base_retriever=AnswerRetriever(),
                base_compressor=DocumentCompressorPipeline(transformers=[FirstSentences()]),
            )
        ),
    ),
    Shape(
        "reranked",
        retrieving(AnswerRetriever() | RunnableLambda(lambda d: d[::-1])),
        documents=lambda q: numbers_for(q)[::-1],
    ),
    Shape("history-aware", history_aware),
    Shape(
        "create_retrieval_chain",
        lambda m, q: create_retrieval_chain(
            AnswerRetriever(), create_stuff_documents_chain(m, INPUT_PROMPT)
        ).invoke({"input": q}),
    ),
    Shape(
        "documents given by hand",
        lambda m, q: create_stuff_documents_chain(m, PROMPT).invoke(
            {"context": found(q), "question": q}
        ),
    ),
    Shape(
        "documents cut short",
        lambda m, q: rag(
            PROMPT, m, lambda ds: "\n\n".join(d.page_content[:100] for d in ds)
        ).invoke(q),
        cut=100,
    ),
    Shape(
        "documents stripped",
        lambda m, q: rag(
            PROMPT, m, lambda ds: "\n".join(f"* {d.page_content.strip()}" for d in ds)
        ).invoke(q),
    ),
    Shape(
        "documents in XML",
        lambda m, q: rag(
            PROMPT,
            m,
            lambda ds: "\n".join(f"<doc id='{n}'>{d.page_content}</doc>" for n, d in enumerate(ds)),
        ).invoke(q),
    ),
]

# -- classic chains -----------------------------------------------------------------------------

MAP = PromptTemplate.from_template("Read this:\n{context}\nWhat does it say?")
REDUCE = PromptTemplate.from_template("Answers:\n{context}\n\nQuestion: {question}\nAnswer:")


def map_reduce(model: Any, question: str) -> Any:
    reduce = StuffDocumentsChain(
        llm_chain=LLMChain(llm=model, prompt=REDUCE), document_variable_name="context"
    )
    return MapReduceDocumentsChain(
        llm_chain=LLMChain(llm=model, prompt=MAP),
        reduce_documents_chain=ReduceDocumentsChain(combine_documents_chain=reduce),
        document_variable_name="context",
    ).invoke({"input_documents": found(question), "question": question})


def refine(model: Any, question: str) -> Any:
    again = "Answer so far: {so_far}\nMore:\n{context}\n\nQuestion: {question}\nAnswer:"
    return RefineDocumentsChain(
        initial_llm_chain=LLMChain(llm=model, prompt=PROMPT),
        refine_llm_chain=LLMChain(llm=model, prompt=PromptTemplate.from_template(again)),
        document_variable_name="context",
        initial_response_name="so_far",
    ).invoke({"input_documents": found(question), "question": question})


def conversational(model: Any, question: str) -> Any:
    qa = {"prompt": PROMPT}
    chain = ConversationalRetrievalChain.from_llm(
        model, AnswerRetriever(), combine_docs_chain_kwargs=qa
    )
    return chain.invoke({"question": question, "chat_history": []})


CLASSIC = [
    Shape(
        "LLMChain",
        lambda m, q: LLMChain(llm=m, prompt=PROMPT).invoke(
            {"context": join(AnswerRetriever().invoke(q)), "question": q}
        ),
    ),
    Shape(
        "RetrievalQA",
        lambda m, q: RetrievalQA.from_chain_type(
            m, retriever=AnswerRetriever(), chain_type_kwargs={"prompt": PROMPT}
        ).invoke(q),
    ),
    Shape(
        "RetrievalQA, its own prompt",
        lambda m, q: RetrievalQA.from_chain_type(m, retriever=AnswerRetriever()).invoke(q),
        ("Use the following pieces of context", "Question:", "Helpful Answer:"),
    ),
    Shape(
        "RetrievalQA, async",
        lambda m, q: asyncio.run(
            RetrievalQA.from_chain_type(
                m, retriever=AnswerRetriever(), chain_type_kwargs={"prompt": PROMPT}
            ).ainvoke(q)
        ),
    ),
    Shape("ConversationalRetrievalChain", conversational),
    Shape(
        "StuffDocumentsChain",
        lambda m, q: StuffDocumentsChain(
            llm_chain=LLMChain(llm=m, prompt=PROMPT), document_variable_name="context"
        ).invoke({"input_documents": found(q), "question": q}),
    ),
    Shape("map_reduce", map_reduce, ("Answers:", "Question:", "Answer:"), documents=lambda q: ()),
    Shape(
        "refine",
        refine,
        ("Answer so far:", "More:", "Question:", "Answer:"),
        documents=lambda q: numbers_for(q)[1:],
    ),
]

# -- where no callback tells of anything --------------------------------------------------------


def vector_store(question: str) -> InMemoryVectorStore:
    """A store of the question's corpus."""
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    texts = corpus_for(question)
    store.add_documents([Document(text, id=f"d{number}") for number, text in enumerate(texts)])
    return store


def searched(question: str) -> list[int]:
    """What the store finds: its embeddings are the same every time."""
    documents = vector_store(question).similarity_search(question, k=2)
    return [corpus_for(question).index(document.page_content) for document in documents]


def searching(model: Any, question: str, watch: Callable[[Any], Any] = lambda store: store) -> Any:
    documents = watch(vector_store(question)).similarity_search(question, k=2)
    return model.invoke(TEMPLATE.format(context=join(documents), question=question))


async def asearching(model: Any, question: str) -> Any:
    documents = await track(vector_store(question)).asimilarity_search(question, k=2)
    return await model.ainvoke(TEMPLATE.format(context=join(documents), question=question))


def scored(model: Any, question: str) -> Any:
    store = track(vector_store(question))
    documents = [d for d, _ in store.similarity_search_with_score(question, k=2)]
    return rag(PROMPT, model, lambda _: join(documents)).invoke(question)


def formatted(question: str) -> str:
    context = join(AnswerRetriever().invoke(question))
    return TEMPLATE.format(context=context, question=question)


def f_string(question: str) -> str:
    context = join(AnswerRetriever().invoke(question))
    return f"{OPENING}{context}\n\nQuestion: {question}\nAnswer:"


def question_first(question: str) -> str:
    context = join(AnswerRetriever().invoke(question))
    return f"Question: {question}\n\nDocuments:\n{context}\n\nAnswer:"


def cached(model: Any, question: str) -> Any:
    if hasattr(model, "cache_documents"):
        model.cache_documents(map(Document, corpus_for(question)), progress=False)
    return searching(model, question)


def f_string_in_place(model: Any, question: str) -> Any:
    context = join(AnswerRetriever().invoke(question))
    return model.invoke(f"Read these documents.\n\n{context}\n\nQuestion: {question}\nAnswer:")


def format_in_place(model: Any, question: str) -> Any:
    context = join(AnswerRetriever().invoke(question))
    return model.invoke(TEMPLATE.format(context=context, question=question))


async def awaited_f_string(model: Any, question: str) -> Any:
    context = join(await AnswerRetriever().ainvoke(question))
    prompt = f"Read these documents.\n\n{context}\n\nQuestion: {question}\nAnswer:"
    return [piece async for piece in model.astream(prompt)]


def f_string_in_a_step(model: Any, question: str) -> Any:
    step = RunnableLambda(lambda documents: f"Read this.\n\n{join(documents)}\n\nWhat is it?")
    return (AnswerRetriever() | step | model).invoke(question)


READ = ("Read these documents.", "Question:", "Answer:")

IN_SOURCE = [
    Shape("an f-string in place", f_string_in_place, READ),
    Shape("TXT.format in place", format_in_place),
    Shape("an f-string, awaited", lambda m, q: asyncio.run(awaited_f_string(m, q)), READ),
    Shape("an f-string in a step", f_string_in_a_step, ("Read this.", "What is it?"), asks=False),
    Shape(
        "an f-string in a batch, in place",
        lambda m, q: m.batch([f"Look here:\n\n{context_given(q)}\n\nNow, {q} Your answer:"]),
        ("Look here:", "Now,", "Your answer:"),
    ),
]


def context_given(question: str) -> str:
    return join(AnswerRetriever().invoke(question))


SILENT = [
    Shape("TXT.format", lambda m, q: m.invoke(formatted(q))),
    Shape("an f-string", lambda m, q: m.invoke(f_string(q))),
    Shape("an f-string in a batch", lambda m, q: m.batch([f_string(q)])),
    Shape("an f-string in a lambda", lambda m, q: (RunnableLambda(f_string) | m).invoke(q)),
    Shape(
        "an f-string, question first",
        lambda m, q: m.invoke(question_first(q)),
        ("Question:", "Documents:", "Answer:"),
    ),
    Shape("an f-string, streamed", lambda m, q: list(m.stream(f_string(q)))),
    Shape("a tracked store", lambda m, q: searching(m, q, track), documents=searched),
    Shape("a tracked store, async", lambda m, q: asyncio.run(asearching(m, q)), documents=searched),
    Shape("a tracked store, with scores", scored, documents=searched),
    Shape("cached documents", cached, documents=searched),
    Shape("nothing known at all", searching, rounds=8, documents=searched),
]

# -- messages -----------------------------------------------------------------------------------


@tool(response_format="content_and_artifact")
def look_up(query: str) -> tuple[str, list[Document]]:
    """Find documents."""
    return join(found(query)), found(query)


retriever_tool = create_retriever_tool(AnswerRetriever(), "find", "Find documents.")


def flat_messages(model: Any, question: str) -> Any:
    system = SystemMessage(OPENING + join(AnswerRetriever().invoke(question)))
    return model.invoke([system, HumanMessage(question)])


def chat_in_llm_chain(model: Any, question: str) -> Any:
    context = join(AnswerRetriever().invoke(question))
    return LLMChain(llm=model, prompt=CHAT).invoke({"context": context, "question": question})


IN_ROLES = ("System: " + OPENING, "Human: Question:", "Answer:")


CHAT_INTO_LLM = [
    Shape("a chat template for a completion model", lambda m, q: rag(CHAT, m).invoke(q), IN_ROLES),
    Shape("a chat template, streamed", lambda m, q: list(rag(CHAT, m).stream(q)), IN_ROLES),
    Shape("messages for a completion model", flat_messages, ("System: ", "Human: ")),
    Shape("a chat template in LLMChain", chat_in_llm_chain, IN_ROLES),
]

# -- chats, graphs and agents -------------------------------------------------------------------


def graph_of(answer: Any, checkpointer: Any = None) -> Any:
    """Two nodes: documents are found and put into the state, then the model answers."""
    builder = StateGraph(GraphState)
    builder.add_node("retrieve", lambda state: {"documents": found(state["question"])})
    builder.add_node("answer", answer)
    builder.add_edge(START, "retrieve")
    builder.add_edge("retrieve", "answer")
    builder.add_edge("answer", END)
    return builder.compile(checkpointer=checkpointer)


class GraphState(TypedDict, total=False):
    question: str
    documents: list[Document]
    messages: Annotated[list[Any], add_messages]
    answer: Any


def answering(model: Any) -> Any:
    def answer(state: GraphState) -> Any:
        values = {"context": join(state["documents"]), "question": state["question"]}
        return {"answer": model.invoke(prompt_for(model).invoke(values))}

    return answer


def checkpointed(model: Any, question: str) -> Any:
    graph = graph_of(answering(model), InMemorySaver())
    return graph.invoke({"question": question}, {"configurable": {"thread_id": "1"}})


def resumed(model: Any, question: str) -> Any:
    """What a tool found lies in a checkpoint, which another process reads back."""
    message = ToolMessage(
        context_of(question),
        tool_call_id="1",
        artifact=[
            {"type": "Document", "page_content": d.page_content, "id": d.id}
            for d in found(question)
        ],
    )
    builder = StateGraph(GraphState)
    builder.add_node("answer", answering_from_messages(model))
    builder.add_edge(START, "answer")
    return builder.compile().invoke({"question": question, "messages": [message]})


def answering_from_messages(model: Any) -> Any:
    def answer(state: GraphState) -> Any:
        values = {"context": state["messages"][-1].text, "question": state["question"]}
        return {"answer": model.invoke(prompt_for(model).invoke(values))}

    return answer


def calling_a_tool(used: Any, argument: str) -> Run:
    """A node runs a tool as agents do; the model reads what it returned."""

    def run(model: Any, question: str) -> Any:
        call = {"name": used.name, "args": {argument: question}, "id": "1", "type": "tool_call"}
        builder = StateGraph(GraphState)
        builder.add_node("tools", ToolNode([used]))
        builder.add_node("answer", answering_from_messages(model))
        builder.add_edge(START, "tools")
        builder.add_edge("tools", "answer")
        start = [AIMessage("", tool_calls=[call])]
        return builder.compile().invoke({"question": question, "messages": start})

    return run


GRAPHS = [
    Shape("a graph", lambda m, q: graph_of(answering(m)).invoke({"question": q})),
    Shape(
        "a graph, async", lambda m, q: asyncio.run(graph_of(answering(m)).ainvoke({"question": q}))
    ),
    Shape("a graph, streamed", lambda m, q: list(graph_of(answering(m)).stream({"question": q}))),
    Shape("a graph with checkpoints", checkpointed),
    Shape("documents from a checkpoint", resumed),
    Shape("a tool with an artifact", calling_a_tool(look_up, "query")),
    Shape("a retriever tool", calling_a_tool(retriever_tool, "query")),
]

COMPLETION_SHAPES = [
    *TOLD,
    *TEMPLATES,
    *RETRIEVERS,
    *CLASSIC,
    *IN_SOURCE,
    *SILENT,
    *CHAT_INTO_LLM,
    *GRAPHS,
]


def by_hand(model: Any, question: str) -> Any:
    system = SystemMessage(OPENING + join(AnswerRetriever().invoke(question)))
    return model.invoke([system, HumanMessage(question)])


def with_history(model: Any, question: str) -> Any:
    prompt = ChatPromptTemplate.from_messages(
        [("system", OPENING + "{context}"), MessagesPlaceholder("history"), ("human", "{question}")]
    )
    steps = {
        "context": AnswerRetriever() | join,
        "question": RunnablePassthrough(),
        "history": lambda _: HISTORY,
    }
    return (steps | prompt | model).invoke(question)


def in_blocks(model: Any, question: str) -> Any:
    prompt = ChatPromptTemplate.from_messages(
        [
            (
                "human",
                [
                    {"type": "text", "text": OPENING + "{context}", "cache_control": {"type": "x"}},
                    {"type": "text", "text": "Question: {question}"},
                ],
            )
        ]
    )
    return rag(prompt, model).invoke(question)


def stuffed(model: Any, question: str) -> Any:
    prompt = ChatPromptTemplate.from_messages(
        [("system", OPENING + "{context}"), ("human", "Question: {input}")]
    )
    stuff = create_stuff_documents_chain(model, prompt)
    return create_retrieval_chain(AnswerRetriever(), stuff).invoke({"input": question})


def agent_with_documents(model: Any, question: str) -> Any:
    """The tutorial's agent: a prompt that searches the store by itself."""

    @dynamic_prompt
    def with_context(request: Any) -> str:
        return OPENING + join(track(vector_store(question)).similarity_search(question, k=2))

    agent = create_agent(model, tools=[], middleware=[with_context])
    return agent.invoke({"messages": [HumanMessage(question)]})


SYSTEM_ONLY = (OPENING,)
ASKED = (OPENING, "Question:")


CHAT_SHAPES = [
    # A chat's turns written out are one text.
    *(shape for shape in TOLD if "the prompt" not in shape.name),
    Shape("messages by hand", by_hand, SYSTEM_ONLY),
    Shape("a template with history", with_history, SYSTEM_ONLY),
    Shape("content blocks", in_blocks, ASKED),
    Shape("a completion template", lambda m, q: rag(PROMPT, m).invoke(q)),
    Shape("create_retrieval_chain", stuffed, ASKED),
    Shape("LLMChain", chat_in_llm_chain),
    Shape("ConversationalRetrievalChain", conversational),
    Shape("an agent that searches", agent_with_documents, SYSTEM_ONLY, documents=searched),
    *GRAPHS,
]
