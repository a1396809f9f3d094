"""Mapping never changes a prompt: the model reads what a plain LLM would be given."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.llms.llm import LLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import ChatPromptTemplate, RichPromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode

from llama_index_parts import (
    CHAT_TEMPLATE,
    FixedRetriever,
    RecordingLLM,
    chat_lm,
    heard_answers,
    nodes,
    text_of,
)
from pcache_core import CausalLM, PromptCacheEngine, Segment
from pcache_integrations._engines import load_lm
from pcache_integrations.llama_index import PromptCacheLLM
from pcache_integrations.llama_index.messages import Piece, joined, with_borders
from pcache_integrations.llama_index.templates import segments_of, tell, telling
from pcache_integrations.llama_index.watch import remember

pytestmark = pytest.mark.usefixtures("closed_loops")

QUESTION = "Which <eos> river {context_str} \ue0f4 runs through Trudabad?"
FOUND = nodes(file="a.txt")[:3]
Use = Callable[[LLM], Any]


@pytest.fixture(scope="module", params=["completion", "chat"])
def lm(request: pytest.FixtureRequest) -> CausalLM:
    return load_lm("builtin:tiny-rag") if request.param == "completion" else chat_lm()


def rendered(lm: CausalLM, messages: list[ChatMessage]) -> str:
    """What transformers makes of messages, without the token that the tokenizer adds itself."""
    turns = [{"role": m.role.value, "content": m.content} for m in messages]
    text = lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return str(text).removeprefix("<bos>")


def read_and_recorded(lm: CausalLM, use: Use, **options: Any) -> tuple[list[str], list[str]]:
    """The prompts that the model read for a use, and those a plain LLM is given for it."""
    llm = PromptCacheLLM(engine=PromptCacheEngine(lm), max_tokens=4, **options)
    with heard_answers() as answers:
        use(llm)
    plain = RecordingLLM(
        chats=lm.tokenizer.chat_template == CHAT_TEMPLATE,
        num_output=4,
        answers=list(answers),
        messages_to_prompt=lambda messages: rendered(lm, list(messages)),
        **options,
    )
    use(plain)
    recorded = plain.prompts or [rendered(lm, messages) for messages in plain.conversations]
    return [text_of(report) for report in llm.engine.reports], recorded


def ask(mode: str) -> Use:
    def use(llm: LLM) -> None:
        RetrieverQueryEngine.from_args(
            FixedRetriever(FOUND), llm=llm, response_mode=ResponseMode(mode)
        ).query(QUESTION)

    return use


def converse(llm: LLM) -> None:
    engine = ContextChatEngine.from_defaults(
        retriever=FixedRetriever(FOUND),
        llm=llm,
        memory=ChatMemoryBuffer.from_defaults(token_limit=1000),
        system_prompt="Be kind.",
    )
    engine.chat("What about {query_str}?")
    engine.chat(QUESTION)


def predict(template: Any, **values: Any) -> Use:
    def use(llm: LLM) -> None:
        llm.predict(template, **values)

    return use


USES = {
    "compact": ask("compact"),
    "refine": ask("refine"),
    "tree_summarize": ask("tree_summarize"),
    "accumulate": ask("accumulate"),
    "simple_summarize": ask("simple_summarize"),
    "conversation": converse,
    "missing variable": predict(PromptTemplate("A {b} {c}"), b="x"),
    "number": predict(PromptTemplate("A {b}."), b=3),
    "jinja": predict(
        RichPromptTemplate("{% for d in ds %}{{ loop.index }}. {{ d | upper }}\n{% endfor %}"),
        ds=["one", "two"],
    ),
    "jinja chat": predict(
        RichPromptTemplate('{% chat role="user" %}Say {{ x[:3] ~ y }}{% endchat %}'),
        x="abcd",
        y="e",
    ),
    "few shots": predict(
        ChatPromptTemplate.from_messages([("system", "S"), ("user", "{a}"), ("assistant", "B")]),
        a="  spaced  ",
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_the_model_reads_what_a_plain_llm_is_given(lm: CausalLM, use: Use) -> None:
    read, recorded = read_and_recorded(lm, use)
    assert read == recorded
    assert read


@pytest.mark.parametrize("use", [USES["compact"], USES["conversation"]])
def test_so_it_does_with_a_system_prompt(lm: CausalLM, use: Use) -> None:
    read, recorded = read_and_recorded(lm, use, system_prompt="Never guess.")
    assert read == recorded
    assert all("Never guess." in text for text in read)


def test_so_it_does_with_a_wrapper_of_the_users_own() -> None:
    lm = load_lm("builtin:tiny-rag")
    wrap = "[{}]".format
    read, recorded = read_and_recorded(lm, ask("compact"), completion_to_prompt=wrap)
    assert read == recorded
    assert read[0].startswith("[Context information")


values = st.text(max_size=20) | st.sampled_from(["{b}", "{{", "}", "\ue0f4", "<bos>", " "])


def texts_told(template: Any, **args: Any) -> list[list[tuple[str, str]]]:
    """What a completion model that writes nothing of its own is told of a template."""
    told = tell(RecordingLLM(), template, args)
    return [[(s.text, s.kind) for s in segments] for segments in told.values()]


@given(values, values, st.text(max_size=10))
def test_what_is_told_is_the_formatted_text_and_no_value_is_template_text(
    a: str, b: str, between: str
) -> None:
    template = PromptTemplate("{a}" + between.replace("{", "").replace("}", "") + "{b}")
    expected = template.format(a=a, b=b)
    (segments,) = texts_told(template, a=a, b=b) if expected else ([],)
    assert "".join(text for text, _ in segments) == expected
    assert "".join(text for text, kind in segments if kind == "argument") == a + b


def test_values_are_told_apart_in_every_kind_of_template() -> None:
    plain = PromptTemplate("From {city}, {number}, {missing}: {shout}").partial_format(city="X")
    plain.function_mappings = {"shout": lambda **given: f"{given['number']}!"}
    assert texts_told(plain, number=3) == [[
        ("From ", "literal"), ("X", "argument"), (", ", "literal"), ("3", "argument"),
        (", {missing}: ", "literal"), ("3!", "argument"),
    ]]  # fmt: skip
    renamed = PromptTemplate("To {goal}", template_var_mappings={"city": "goal"})
    assert texts_told(renamed, city="Y") == [[("To ", "literal"), ("Y", "argument")]]
    loop = RichPromptTemplate("{% for d in ds %}- {{ d | upper }}\n{% endfor %}")
    assert texts_told(loop, ds=["one"]) == [[
        ("- ", "literal"), ("ONE", "argument"), ("\n", "literal"),
    ]]  # fmt: skip


def test_a_tag_that_calls_a_model_is_not_run_to_read_a_template() -> None:
    template = RichPromptTemplate('{% completion model="m" %}hi{% endcompletion %}')
    assert texts_told(template) == []


@given(st.text(max_size=60), st.integers(0, 200), st.integers(0, 200))
def test_a_stretch_of_a_context_is_cut_without_loss(question: str, start: int, stop: int) -> None:
    remember(FOUND)
    joined = "\n\n".join(f"file: a.txt\n\n{node.text}" for node in FOUND)
    stretch = joined[start : start + 50 + stop]
    for text in (stretch, question, question + stretch):
        told = tell(RecordingLLM(), PromptTemplate("Q: {x}"), {"x": text})
        with telling(told):
            for whole in ("Q: " + text, text):
                found = segments_of(whole, "text")
                assert "".join(segment.text for segment in found) == whole


def test_what_is_told_of_one_call_is_nothing_to_the_next() -> None:
    told = tell(RecordingLLM(), PromptTemplate("Say {x}."), {"x": "yes"})
    with telling(told):
        assert len(segments_of("Say yes.", "text")) == 3
        assert segments_of("Say no.", "text") == [Segment("Say no.")]
    assert segments_of("Say yes.", "text") == [Segment("Say yes.")]


@given(
    st.lists(st.tuples(st.text(max_size=6), st.booleans()), max_size=4),
    st.lists(st.integers(0, 30), max_size=4),
)
def test_borders_lose_no_letter(blocks: list[tuple[str, bool]], cuts: list[int]) -> None:
    pieces = [Piece(text, is_module=is_module) for text, is_module in blocks]
    whole = joined(pieces)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    segments = [
        Segment(whole[start:stop], "literal" if start % 2 else "argument")
        for start, stop in itertools.pairwise(places)
    ]
    for kind in ("literal", "argument"):
        found = with_borders(segments, pieces, kind)
        assert "".join(segment.text for segment in found) == whole
