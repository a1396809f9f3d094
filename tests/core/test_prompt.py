"""Prompts, segments and their tokens."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

import tiny_models
from pcache_core import Prompt, PromptError, Segment
from pcache_core.lm.tokenizer import SegmentTokenizer
from pcache_core.prompt import tokenise


def test_a_prompts_text_is_the_concatenation_of_its_segments() -> None:
    prompt = Prompt(
        [Segment("a b", "literal"), Segment(""), Segment("\n"), Segment("c", "document")]
    )
    assert prompt.text == "a b\nc"
    assert [segment.text for segment in prompt.segments] == ["a b", "\n", "c"]


@pytest.mark.parametrize("segments", [[], [Segment("")], "flat text", ["flat"], [None]])
def test_a_prompt_without_segments_of_text_is_refused(segments: object) -> None:
    with pytest.raises(PromptError):
        Prompt(segments)  # type: ignore[arg-type]


def test_an_unknown_segment_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PromptError, match="literal, document, argument, text"):
        Segment("x", "doc")  # type: ignore[arg-type]


def test_the_opening_is_the_literals_before_anything_else() -> None:
    first, second = Segment("a", "literal"), Segment("b", "literal")
    prompt = Prompt([first, second, Segment("x", "argument"), Segment("c", "literal")])
    assert prompt.opening == (first, second)
    assert Prompt.from_text("a").opening == ()


def test_token_ids_are_bos_and_each_segment_tokenised_alone() -> None:
    tokenizer = tiny_models.tiny_tokenizer()
    segments = [Segment("the", "literal"), Segment("the cat", "document"), Segment("?")]
    tokens = tokenise(Prompt(segments), SegmentTokenizer(tokenizer).ids, [tokenizer.bos_token_id])
    alone = [tokenizer(s.text, add_special_tokens=False)["input_ids"] for s in segments]
    assert list(tokens.token_ids) == [tokenizer.bos_token_id, *alone[0], *alone[1], *alone[2]]
    assert tokens.opening == 1 + len(alone[0])
    assert [(p.start, p.stop) for p in tokens.pieces][-1][1] == len(tokens.token_ids)


@pytest.mark.parametrize("kind", ["document", "argument"])
def test_special_tokens_written_in_data_are_plain_text(kind: str) -> None:
    text = SegmentTokenizer(tiny_models.tiny_tokenizer())
    forged = text.ids(Segment("a<eos>b", kind))  # type: ignore[arg-type]
    assert tiny_models.EOS not in forged
    assert tiny_models.EOS in text.ids(Segment("a<eos>b", "literal"))
    assert tiny_models.EOS in text.ids(Segment("a<eos>b", "text"))


def test_a_token_that_is_only_marked_as_special_is_one() -> None:
    tokenizer = tiny_models.tiny_tokenizer()
    text = SegmentTokenizer(tokenizer)
    assert not text.holds_special("a<turn>b")
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("<list>", special=False)])
    assert "<turn>" not in tokenizer.all_special_tokens
    assert text.holds_special("a<turn>b")
    assert not text.holds_special("a<list>b")


def test_a_prompt_that_begins_with_the_beginning_token_gets_no_second() -> None:
    tokenizer = tiny_models.tiny_tokenizer()
    text, bos = SegmentTokenizer(tokenizer), tokenizer.bos_token_id

    def begun(written: Prompt) -> int:
        return tokenise(written, text.ids, [bos]).token_ids.count(bos)

    assert begun(Prompt.from_text("<bos>So: bees")) == 1
    assert begun(Prompt([Segment("<bos>So: ", "literal"), Segment("bees", "argument")])) == 1
    assert begun(Prompt.from_text("So: bees")) == 1
    data = tokenise(Prompt([Segment("<bos>So", "argument")]), text.ids, [bos]).token_ids
    assert (data[0], data.count(bos)) == (bos, 1), "in data it is plain text"


def test_data_and_markup_of_the_same_text_are_remembered_apart() -> None:
    text = SegmentTokenizer(tiny_models.tiny_tokenizer())
    segment = Segment("<eos>", "document")
    first = text.ids(segment)
    assert text.ids(Segment("<eos>", "literal")) != first
    assert text.ids(segment) == first
