"""Text that comes back is cut out, at second sight, and never at the cost of other token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import tiny_models
from corpus import DOCUMENTS, OPENING
from pcache_core import CausalLM, Segment
from pcache_core.lm.tokenizer import SegmentTokenizer
from pcache_integrations import _recurring
from pcache_integrations._mapping import DocumentIndex
from pcache_integrations._recurring import RecurringText

Parts = list[tuple[str, str]]


@pytest.fixture(scope="module")
def text() -> SegmentTokenizer:
    return CausalLM.from_pretrained("builtin:tiny-rag").text


def prompt_of(numbers: Sequence[int], question: str, opening: str = OPENING) -> str:
    context = "\n\n".join(DOCUMENTS[number] for number in numbers)
    return f"{opening}{context}\n\nQuestion: {question}\nAnswer:"


def seen(recurring: RecurringText, tokens: SegmentTokenizer, *prompts: str) -> Parts:
    """(kind, text) of the last prompt's parts, when the others came before."""
    for prompt in prompts:
        parts = recurring.split([Segment(prompt, "text")], tokens.ids)
        assert "".join(part.text for part in parts) == prompt
    return [(part.kind, part.text) for part in parts]


def test_a_prompt_seen_for_the_first_time_is_left_alone(text: SegmentTokenizer) -> None:
    prompt = prompt_of((0, 1, 2), "Who paints?")
    assert seen(RecurringText(), text, prompt) == [("text", prompt)]


def test_blocks_that_came_before_are_documents_and_what_prompts_share_is_template_text(
    text: SegmentTokenizer,
) -> None:
    first, second = prompt_of((0, 1), "Who paints?"), prompt_of((3, 0), "Who is the mayor?")
    assert seen(RecurringText(), text, first, second) == [
        ("literal", OPENING),
        ("text", DOCUMENTS[3] + "\n\n"),
        ("document", DOCUMENTS[0]),
        ("literal", "\n\nQuestion:"),
        ("text", " Who is the mayor?"),
        ("literal", "\nAnswer:"),
    ]


def test_a_question_asked_again_is_neither_document_nor_template_text(
    text: SegmentTokenizer,
) -> None:
    question = "Where does the painter who was born in Trudville live now?"
    prompts = [prompt_of(numbers, question) for numbers in ((0, 1), (2, 1), (3, 1))]
    parts = seen(RecurringText(), text, *prompts)
    assert [kind for kind, part in parts if question in part] == ["text"]
    assert seen(RecurringText(), text, *[question] * 3) == [("text", question)]


def test_a_long_question_in_paragraphs_of_its_own_is_stored_at_no_first_sight(
    text: SegmentTokenizer,
) -> None:
    private = (
        "My number is 4711 and my name is Ann.\n\nI live at the mill by the old lake.\n\nWho am I?"
    )
    assert seen(RecurringText(), text, prompt_of((0,), "Who?"), private) == [("text", private)]


def test_the_value_of_a_variable_is_cut_only_between_blocks(text: SegmentTokenizer) -> None:
    recurring = RecurringText()
    context = Segment(f"{DOCUMENTS[0]}\n\n{DOCUMENTS[1]}", "argument", "context")
    question = Segment("Who in all of Trudabad would know?", "argument", "question")
    for _ in range(2):
        parts = recurring.split([Segment("Read: ", "literal"), context, question], text.ids)
    assert [(part.kind, part.name) for part in parts] == [
        ("literal", None),
        ("document", None),
        ("argument", "context"),
        ("document", None),
        ("argument", "question"),
    ]


def test_a_message_keeps_its_special_tokens_plain(text: SegmentTokenizer) -> None:
    recurring = RecurringText()
    for number in range(3):
        message = f"Obey <eos> the user:\n\n{DOCUMENTS[0]}\n\n{DOCUMENTS[number]}"
        (whole,) = given_message = [Segment(message, "argument")]
        parts = recurring.split(given_message, text.ids)
        assert [i for p in parts for i in text.ids(p)] == list(text.ids(whole))
        assert not [p for p in parts if "<eos>" in p.text and p.kind == "literal"]
    assert "document" in {part.kind for part in parts}


def _tokenizers() -> Iterator[PreTrainedTokenizerFast]:
    yield tiny_models.tiny_tokenizer()
    for pattern in (
        # How GPT-2, Llama 3 and Qwen treat newlines: alone, or behind punctuation.
        r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ):
        yield _with_newlines(pattern)


def _with_newlines(pattern: str) -> PreTrainedTokenizerFast:
    """Bytes, and merges that join newlines with each other and with a full stop."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (".", "ĊĊ"), (".", "Ċ"), ("?", "Ċ"), (":", "Ċ")]
    tokens = [*letters, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("tokenizer", list(_tokenizers()), ids=["bytes", "gpt-2", "llama-3"])
def test_ids_are_those_of_the_uncut_prompt_whatever_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens, recurring = SegmentTokenizer(tokenizer), RecurringText()
    kinds: set[str] = set()
    for numbers in ((0, 1), (1, 2), (2, 0), (0, 1)):
        prompt = prompt_of(numbers, f"Who is number {numbers[0]}?")
        parts = recurring.split([Segment(prompt, "text")], tokens.ids)
        kinds |= {part.kind for part in parts}
        joined = [i for part in parts for i in tokens.ids(part)]
        assert joined == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert kinds == {"literal", "document", "text"}


_words = st.sampled_from(
    [*DOCUMENTS[:3], OPENING, "Question: ", "\n\n", "\n", "Who?", " ", "<eos>"]
)


@given(st.lists(st.lists(_words, min_size=1, max_size=7).map("".join), max_size=8))
def test_no_sequence_of_prompts_changes_a_text_or_its_ids(prompts: list[str]) -> None:
    tokens = SegmentTokenizer(tiny_models.tiny_tokenizer())
    recurring, documents = RecurringText(), DocumentIndex()
    documents.add(DOCUMENTS[2])
    for number, prompt in enumerate(prompts):
        kind = "text" if number % 2 else "argument"
        given_parts = documents.split(prompt, kind)
        parts = recurring.split(given_parts, tokens.ids)
        assert "".join(part.text for part in parts) == prompt
        ids = [i for part in given_parts for i in tokens.ids(part)]
        assert [i for part in parts for i in tokens.ids(part)] == ids


def test_what_is_remembered_is_bounded(
    text: SegmentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_recurring, "_MAX_BLOCKS", 10)
    monkeypatch.setattr(_recurring, "_MAX_ENDS", 5)
    recurring = RecurringText()
    for number in range(30):
        seen(
            recurring, text, f"Family {number}.\n\n" + prompt_of((number % 8,), f"Who is {number}?")
        )
    assert len(recurring._blocks) <= 10
    assert len(recurring._ends) <= 5
