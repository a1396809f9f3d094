"""From a question to a prompt that fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pcache_core import CausalLM, ChatTemplateError, ContextLengthError, PromptCacheEngine
from pcache_core.evaluation.data import Item
from pcache_core.evaluation.prompts import fit, make_prompt


@pytest.fixture(scope="module")
def engine() -> PromptCacheEngine:
    return PromptCacheEngine(CausalLM.from_pretrained("builtin:tiny-rag"))


def test_a_completion_ends_where_the_answer_begins(engine: PromptCacheEngine) -> None:
    prompt = make_prompt(engine, "Who?", ["One.", "Two."], "completion")
    assert prompt.text == (
        "Answer the question from the documents.\n\nOne.\n\nTwo.\n\nQuestion: Who?\nAnswer:"
    )
    documents = [segment.text for segment in prompt.segments if segment.kind == "document"]
    assert documents == ["One.", "Two."]
    assert [segment.text for segment in prompt.opening] == [
        "Answer the question from the documents.\n\n"
    ]


def test_a_special_token_in_a_question_stays_text(engine: PromptCacheEngine) -> None:
    bos = engine.lm.tokenizer.bos_token
    prompt = make_prompt(engine, f"Who is {bos}?", ["One."], "completion")
    ids = engine.tokenise(prompt).token_ids
    assert ids.count(engine.lm.tokenizer.bos_token_id) == 1


def test_a_chat_goes_through_the_models_template(engine: PromptCacheEngine) -> None:
    engine.lm.tokenizer.chat_template, own = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>",
        engine.lm.tokenizer.chat_template,
    )
    try:
        prompt = make_prompt(engine, "Who?", ["One.", "Two."], "chat")
    finally:
        engine.lm.tokenizer.chat_template = own
    assert prompt.text == (
        "<user>Answer the question from the documents.\n\nOne.\n\nTwo.\n\nQuestion: Who?"
        "</><assistant>"
    )
    assert [s.text for s in prompt.segments if s.kind == "document"] == ["One.", "Two."]


def test_a_model_without_a_template_has_no_chat(tiny_lm: Callable[..., CausalLM]) -> None:
    with pytest.raises(ChatTemplateError):
        make_prompt(PromptCacheEngine(tiny_lm()), "Who?", ["One."], "chat")


def test_documents_are_left_out_from_the_middle_until_the_answer_fits(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    engine = PromptCacheEngine(tiny_lm())  # 512 tokens, about one a character
    contexts = tuple(letter * 90 for letter in "abcdefg")
    fitted = fit(engine, Item("Who?", contexts, ("x",)), "completion", max_tokens=100)
    kept = [segment.text[0] for segment in fitted.prompt.segments if segment.kind == "document"]
    assert (kept[0], kept[-1], len(kept) + fitted.left_out) == ("a", "g", 7)
    used = len(engine.tokenise(fitted.prompt).token_ids)
    assert used + 100 - 1 <= 512 < used + 92 + 100 - 1
    whole = fit(engine, Item("Who?", contexts[:2], ("x",)), "completion", max_tokens=100)
    assert whole.left_out == 0


def test_a_document_that_is_longer_than_the_context_is_refused(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    engine = PromptCacheEngine(tiny_lm())
    with pytest.raises(
        ContextLengthError, match=r"question 'Who\?' with one document .* holds 512"
    ):
        fit(engine, Item("Who?", ("a" * 600, "b" * 600), ("x",)), "completion", max_tokens=8)


def test_the_right_answer_begins_with_a_space_unless_the_prompt_ends_with_white_space(
    engine: PromptCacheEngine,
) -> None:
    item = Item("Who?", ("One is here today.",), ("Zoe Barton", "Zoe"))
    tokenizer = engine.lm.tokenizer
    own = tokenizer.chat_template
    for ending, text in (("<answer>", " Zoe Barton"), ("{{ '\\n' }}", "Zoe Barton")):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + ending
        try:
            fitted = fit(engine, item, "chat", max_tokens=4)
        finally:
            tokenizer.chat_template = own
        assert list(fitted.gold_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_there_is_room_for_the_right_answer(tiny_lm: Callable[..., CausalLM]) -> None:
    engine = PromptCacheEngine(tiny_lm())  # 512 tokens, about one a character
    item = Item("Who?", tuple(letter * 90 for letter in "abcde"), ("x" * 200,))
    fitted = fit(engine, item, "completion", max_tokens=4)
    used = len(engine.tokenise(fitted.prompt).token_ids)
    assert fitted.left_out > 0
    assert used + len(fitted.gold_ids) - 1 <= 512
