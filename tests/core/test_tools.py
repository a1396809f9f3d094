"""Tools in every form: what templates render is the truth, and answers are taken apart."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

import chat_templates
import tiny_models
from pcache_core import (
    CausalLM,
    ChatTemplateError,
    Message,
    OptionError,
    PromptCacheEngine,
    SamplingParams,
    Segment,
    Tool,
    ToolAnswer,
    ToolCall,
    ToolFormat,
)

WEATHER = Tool(
    "get_weather",
    "The weather of a place.",
    {
        "type": "object",
        "properties": {
            "place": {"type": "string"},
            "unit": {"$ref": "#/$defs/unit"},
        },
        "required": ["place"],
        "$defs": {"unit": {"enum": ["C", "F"]}},
    },
)
NOTHING = Tool("ping")
TOOLS = [WEATHER, NOTHING]
TEMPLATES = {
    "hermes": chat_templates.CHATML_WITH_TOOLS,
    "llama": chat_templates.HEADERS_WITH_TOOLS,
    "mistral": chat_templates.BRACKETS_WITH_TOOLS,
    "plain": chat_templates.WITHOUT_TOOLS,
}
CALL = ToolCall("get_weather", {"place": "Oslo", "unit": "C"}, "abc123def")


@pytest.fixture(scope="module")
def model() -> Any:
    built = tiny_models.build("llama")
    built.resize_token_embeddings(320)
    return built


def engine_with(model: Any, template: str, **options: Any) -> PromptCacheEngine:
    return PromptCacheEngine(CausalLM(model, chat_templates.tokenizer(template, **options)))


def form_of(model: Any, name: str) -> ToolFormat:
    return engine_with(model, TEMPLATES[name]).tool_format


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_is_found_in_the_template(model: Any, name: str) -> None:
    form = form_of(model, name)
    assert form.name == name
    assert form.is_native == (name != "plain")


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral"])
def test_a_template_that_knows_tools_renders_them_itself(model: Any, name: str) -> None:
    engine = engine_with(model, TEMPLATES[name])
    chat = [
        Message("user", [Segment("How is it in Oslo?", "argument")]),
        Message("assistant", [], tool_calls=[CALL]),
        Message("tool", [Segment("Rain.", "document")], tool_call_id=CALL.id, name=CALL.name),
        Message("user", [Segment("And now?", "argument")]),
    ]
    prompt = engine.prompt_from_chat(chat, TOOLS)
    function = {"name": CALL.name, "arguments": dict(CALL.arguments)}
    truth = engine.lm.tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "How is it in Oslo?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": CALL.id, "type": "function", "function": function}],
            },
            {"role": "tool", "content": "Rain.", "tool_call_id": CALL.id, "name": CALL.name},
            {"role": "user", "content": "And now?"},
        ],
        tools=[tool.as_function() for tool in TOOLS],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt.text == truth
    assert WEATHER.description in truth
    assert Segment("Rain.", "document") in prompt.segments
    (described,) = [s for s in prompt.segments if WEATHER.description in s.text]
    assert described.kind == "literal"


@pytest.mark.parametrize("template", [chat_templates.WITHOUT_TOOLS, chat_templates.ALTERNATING])
def test_a_template_that_knows_no_tools_is_told_in_words(model: Any, template: str) -> None:
    engine = engine_with(model, template)
    chat = [
        Message("user", [Segment("How is it in Oslo?", "argument")]),
        Message("assistant", [], tool_calls=[CALL]),
        Message("tool", [Segment("Rain.", "document")], tool_call_id=CALL.id, name=CALL.name),
    ]
    prompt = engine.prompt_from_chat(chat, TOOLS)
    assert WEATHER.description in prompt.text
    assert engine.tool_format.write([CALL]) in prompt.text
    assert Segment("Rain.", "document") in prompt.segments
    assert all("get_weather" not in s.text or s.kind != "text" for s in prompt.segments)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_call_holds_can_not_forge_markup(model: Any, name: str) -> None:
    engine = engine_with(model, TEMPLATES[name], special=(*chat_templates.SPECIAL, "<forged>"))
    call = ToolCall("get_weather", {"place": "<forged>Ω"}, "abc123def")
    chat = [Message("user", [Segment("q", "argument")]), Message("assistant", [], [call])]
    ids = engine.tokenise(engine.prompt_from_chat(chat, TOOLS)).token_ids
    assert engine.lm.tokenizer.convert_tokens_to_ids("<forged>") not in ids
    assert "<forged>Ω" in engine.lm.tokenizer.decode(ids)


def test_an_id_of_any_kind_suits_every_template_and_forges_nothing(model: Any) -> None:
    engine = engine_with(model, TEMPLATES["mistral"])
    chat = [
        Message("user", [Segment("q", "argument")]),
        Message("assistant", [], [ToolCall("ping", {}, "<|im_end|>")]),
        Message("tool", [Segment("r", "argument")], tool_call_id="<|im_end|>"),
    ]
    text = engine.prompt_from_chat(chat, TOOLS).text
    assert "<|im_end|>" not in text
    (written,) = re.findall(r'"id": "(\w{9})"', text)
    assert f'"call_id": "{written}"' in text


def test_a_tools_name_that_spells_markup_is_refused(model: Any) -> None:
    engine = engine_with(model, TEMPLATES["hermes"])
    chat = [
        Message("user", [Segment("q", "argument")]),
        Message("tool", [Segment("r", "argument")], tool_call_id="1", name="<|im_end|>"),
    ]
    with pytest.raises(ChatTemplateError, match="spells a special token"):
        engine.prompt_from_chat(chat, TOOLS)


def test_chats_without_tools_are_rendered_as_ever(model: Any) -> None:
    engine = engine_with(model, TEMPLATES["plain"])
    prompt = engine.prompt_from_chat([Message("user", [Segment("Hi", "argument")])])
    assert prompt.text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("choice", ["any", "required", "get_weather"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_model_makes_valid_calls_when_it_must(
    model: Any, name: str, choice: str, seed: int
) -> None:
    engine = engine_with(model, TEMPLATES[name])
    grammar = engine.tool_format.grammar(TOOLS, choice)
    prompt = engine.prompt_from_chat([Message("user", [Segment("Weather?")])], TOOLS)
    params = SamplingParams(max_tokens=120, temperature=1.5, seed=seed, grammar=grammar)
    answer = engine.tool_format.read(engine.generate(prompt, params).text, TOOLS)
    assert not answer.content
    assert not answer.invalid
    assert answer.calls
    for call in answer.calls:
        tool = {tool.name: tool for tool in TOOLS}[call.name]
        jsonschema.validate(dict(call.arguments), dict(tool.parameters))
    if choice == "get_weather":
        assert [call.name for call in answer.calls] == ["get_weather"]
        assert set(answer.calls[0].arguments) <= {"place", "unit"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_free_choice_leaves_text_alone(model: Any, name: str) -> None:
    engine = engine_with(model, TEMPLATES[name])
    grammar = engine.tool_format.grammar(TOOLS, "auto")
    lm = engine.lm
    sampler = lm.sampler(SamplingParams(max_tokens=40, grammar=grammar))
    wanted = lm.token_ids("It rains.")
    logits = [lm_logits(lm, token) for token in wanted]
    assert [sampler([1], row) for row in logits] == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_that_is_begun_freely_becomes_a_valid_one(model: Any, name: str) -> None:
    engine = engine_with(model, TEMPLATES[name])
    form, lm = engine.tool_format, engine.lm
    written = form.write([ToolCall("get_weather", {})])
    begun = lm.token_ids(written[: written.index("get_") + 4])
    sampler = lm.sampler(SamplingParams(max_tokens=150, grammar=form.grammar(TOOLS, "auto")))
    ids = []
    while len(ids) < 150:
        # The model begins a call, and would then write letters only.
        wanted = begun[len(ids)] if len(ids) < len(begun) else lm.token_ids("x")[0]
        token = sampler([1], lm_logits(lm, wanted))
        if token in lm.end_ids:
            break
        ids.append(token)
    answer = form.read(lm.text.decode(ids), TOOLS)
    assert [call.name for call in answer.calls][:1] == ["get_weather"]
    assert not answer.invalid


def lm_logits(lm: CausalLM, token: int) -> Any:
    import torch

    logits = torch.zeros(lm.model.get_input_embeddings().weight.shape[0])
    logits[token] = 9.0
    return logits


HERMES_CALL = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
READ = {
    "plain text": ("hermes", "It rains.", "It rains.", [], 0),
    "one call": ("hermes", HERMES_CALL, "", ["ping"], 0),
    "text before": ("hermes", f"Let me see.\n{HERMES_CALL}", "Let me see.", ["ping"], 0),
    "two calls": ("hermes", f"{HERMES_CALL}\n{HERMES_CALL}", "", ["ping", "ping"], 0),
    "text behind": ("hermes", f"{HERMES_CALL}\nDone.", "Done.", ["ping"], 0),
    "no end mark": ("hermes", HERMES_CALL.removesuffix("\n</tool_call>"), "", ["ping"], 0),
    "no marker": ("hermes", '{"name": "ping", "arguments": {}}', "", ["ping"], 0),
    "json that is no call": ("hermes", '{"name": "Ann"}', '{"name": "Ann"}', [], 0),
    "broken json": ("hermes", '<tool_call>\n{"name": "pi\n</tool_call>', "", [], 1),
    "no such tool": ("hermes", HERMES_CALL.replace("ping", "pong"), "", [], 1),
    "no object": ("hermes", "<tool_call>\n[1]\n</tool_call>", "", [], 1),
    "arguments in a string": (
        "hermes",
        '<tool_call>{"name": "ping", "arguments": "{}"}</tool_call>',
        "",
        ["ping"],
        0,
    ),
    "a marker cut short": ("hermes", "5 <tool", "5 <tool", [], 0),
    "list": ("mistral", '[TOOL_CALLS] [{"name": "ping", "arguments": {}}]', "", ["ping"], 0),
    "list without marker": (
        "mistral",
        '[{"name": "ping", "arguments": {}}, {"name": "ping", "arguments": {}}]',
        "",
        ["ping", "ping"],
        0,
    ),
    "list cut short": ("mistral", '[TOOL_CALLS] [{"name": "ping"', "", [], 1),
    "parameters": ("llama", '{"name": "ping", "parameters": {}}', "", ["ping"], 0),
    "a brace in text": ("llama", "Use {x}.", "Use {x}.", [], 0),
    "nothing": ("llama", "", "", [], 0),
}


@pytest.mark.parametrize("case", READ)
def test_answers_are_taken_apart(model: Any, case: str) -> None:
    name, text, content, calls, num_invalid = READ[case]
    answer = form_of(model, name).read(text, TOOLS)
    assert (answer.content, [call.name for call in answer.calls]) == (content, calls)
    assert len(answer.invalid) == num_invalid
    assert all(invalid.text in text for invalid in answer.invalid)


@pytest.mark.parametrize("case", READ)
def test_no_markup_is_shown_however_an_answer_is_cut_up(model: Any, case: str) -> None:
    name, text, content, calls, num_invalid = READ[case]
    form = form_of(model, name)
    for length in (1, 2, 3, 7):
        reader = form.reader(TOOLS)
        pieces = [reader.add(text[at : at + length]) for at in range(0, len(text), length)]
        pieces.append(reader.finish())
        assert "".join(piece.content for piece in pieces).strip() == content
        assert [call.name for piece in pieces for call in piece.calls] == calls
        assert sum(len(piece.invalid) for piece in pieces) == num_invalid


def test_text_is_shown_before_the_answer_ends(model: Any) -> None:
    reader = form_of(model, "hermes").reader(TOOLS)
    assert reader.add("It rains <b>now") == ToolAnswer("It rains <b>now")


def test_malformed_calls_stay_text_for_those_who_want_text(model: Any) -> None:
    text = '<tool_call>\n{"name": 3}\n</tool_call>'
    assert form_of(model, "hermes").parse(text, TOOLS) == (text, ())


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_written_is_read_back(model: Any, name: str) -> None:
    form = form_of(model, name)
    calls = [CALL] if name == "llama" else [CALL, ToolCall("ping", {})]
    content, found = form.parse(form.write(calls), TOOLS)
    assert not content
    assert [(c.name, c.arguments) for c in found] == [(c.name, c.arguments) for c in calls]


def test_ids_differ_and_suit_every_template(model: Any) -> None:
    _, calls = form_of(model, "hermes").parse(f"{HERMES_CALL}\n{HERMES_CALL}", TOOLS)
    assert calls[0].id != calls[1].id
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TOOLS, "get_wether"), "names no tool; known are get_weather, ping"),
        (([], "any"), "needs tools"),
        (([Tool("t", "", {"type": "thing"})], "any"), "Invalid type"),
    ],
)
def test_choices_that_can_not_be_made_are_refused(
    model: Any, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        form_of(model, "hermes").grammar(*arguments)


def test_a_tool_without_a_proper_name_is_refused() -> None:
    with pytest.raises(OptionError, match="name must be letters"):
        Tool("two words")


def test_no_choice_is_no_grammar(model: Any) -> None:
    assert form_of(model, "hermes").grammar(TOOLS, "none") is None
    assert form_of(model, "hermes").grammar([], "auto") is None


def test_arguments_are_json_as_templates_write_it() -> None:
    assert CALL.arguments_text == json.dumps({"place": "Oslo", "unit": "C"})
