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
from pcache_integrations.llama_index._blocks import Piece, joined, with_borders
from pcache_integrations.llama_index._capture import Capture
from pcache_integrations.llama_index._marks import Marked, mark_deeply, read_marks

pytestmark = pytest.mark.usefixtures("closed_loops", "nothing_captured")

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


@given(values, values, st.text(max_size=10))
def test_marks_read_back_give_the_formatted_text(a: str, b: str, between: str) -> None:
    template = f"{{a}}{between.replace('{', '').replace('}', '')}{{b}}"
    marked = {name: Marked(value, name, "n0nce") for name, value in (("a", a), ("b", b))}
    segments = read_marks(template.format(**marked), "n0nce")
    assert "".join(s.text for s in segments) == template.format(a=a, b=b)
    assert "".join(s.text for s in segments if s.name == "a") == a


@given(st.text(max_size=60), st.integers(0, 200), st.integers(0, 200))
def test_a_stretch_of_a_context_is_cut_without_loss(question: str, start: int, stop: int) -> None:
    capture = Capture()
    capture.add_nodes(FOUND)
    capture.add_context(FOUND)
    joined = "\n\n".join(f"file: a.txt\n\n{node.text}" for node in FOUND)
    stretch = joined[start : start + 50 + stop]
    for text in (stretch, question, question + stretch):
        capture.add_plan([Segment("Q: ", "literal"), Segment(text, "argument", "x")])
        for found in (capture.segments("Q: " + text, "text"), capture.segments(text, "argument")):
            assert "".join(segment.text for segment in found).endswith(text)


def test_a_node_cut_off_after_a_few_letters_is_no_document() -> None:
    capture = Capture()
    capture.add_context(FOUND)
    whole = f"file: a.txt\n\n{FOUND[0].text}"
    for letters, expected in ((23, ["d0", "x"]), (24, ["d0", "x", "d1"])):
        text = f"{whole}\n\n{f'file: a.txt{chr(10) * 2}{FOUND[1].text}'[:letters]}"
        found = capture.segments(text, "argument")
        named = [segment.name for segment in found]
        assert [name or "x" for name in named] == expected


def test_a_mark_survives_what_templates_do_to_values() -> None:
    marked = mark_deeply({"docs": ["  one  "]}, "v", "n")["docs"][0]
    assert marked == "  one  "
    assert read_marks(f"<{marked.strip()}>", "n") == [
        Segment("<", "literal"),
        Segment("one", "argument", "v.docs[0]"),
        Segment(">", "literal"),
    ]
    assert f"{marked:>9}" == "    one  "


OUT_OF_SIGHT = "Read what was found:\n{found}\nReply to this: {asked}\nReply:"


@given(values, values, st.text(max_size=5))
def test_a_text_read_by_a_template_is_not_changed(found: str, asked: str, behind: str) -> None:
    capture = Capture()
    capture.add_templates([OUT_OF_SIGHT, "{a}{b} has nothing between its variables at all."])
    text = OUT_OF_SIGHT.replace("{asked}", asked).replace("{found}", found)
    segments = capture.segments(text, "text")
    assert "".join(segment.text for segment in segments) == text
    assert segments[0] == Segment("Read what was found:\n", "literal")
    assert segments[-1] == Segment("\nReply:", "literal")
    if behind and not behind.endswith("Reply:"):
        assert capture.segments(text + behind, "text") == [Segment(text + behind, "text")]


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
