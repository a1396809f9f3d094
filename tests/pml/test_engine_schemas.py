"""Schemas of an engine: added, replaced, encoded ahead of time; prompts, segments and messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import oracle
import tiny_models
from pcache_core import (
    CausalLM,
    ContextLengthError,
    OptionError,
    PMLError,
    Prompt,
    PromptCacheEngine,
    PromptError,
    SamplingParams,
)
from pcache_core.pml import parse_prompt, parse_schema
from schema_oracle import SchemaOracle

TRIP = """<schema name="trip">
  You plan trips for people.
  <module name="city">They go to <param name="where" len="9" scaffold="town"/> for a week.
    <module name="hotel">They sleep in a small hotel.</module></module>
  <union>
    <module name="cheap">There is hardly any money to spend.</module>
    <module name="grand">Money is no object at all.</module>
  </union>
  <module name="tiny">Hm.</module>
  <module name="fresh" cache="false">It may even snow in the hills.</module>
  <slot name="notes" max-tokens="60"/>
  <scaffold modules="city grand"/>
  Be kind, and be brief about it.
</schema>"""
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% if not loop.first %}{{ raise_exception('late') }}{% endif %}"
    "[INST] <<SYS>>\n{{ m['content'] }}\n<</SYS>>\n\n"
    "{% elif m['role'] == 'user' %}"
    "{% if loop.first or messages[loop.index0 - 1]['role'] != 'system' %}[INST] {% endif %}"
    "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} <eos>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llama(tiny_lm: Callable[..., CausalLM]) -> CausalLM:
    return tiny_lm("llama")


@pytest.fixture
def engine(llama: CausalLM) -> PromptCacheEngine:
    engine = PromptCacheEngine(llama, reuse="fast")
    assert engine.add_schema(TRIP) == "trip"
    return engine


def trip(inside: str) -> str:
    return f'<prompt schema="trip">{inside}</prompt>'


def chat_engine(template: str) -> PromptCacheEngine:
    tokenizer = tiny_models.tiny_tokenizer()
    tokenizer.chat_template = template
    engine = PromptCacheEngine(CausalLM(tiny_models.build("llama"), tokenizer), reuse="fast")
    engine.add_schema(
        "<schema name='talk'><system>You are terse.<module name='more'> And kind.</module>"
        "</system><user><module name='ask'>Tell me about <param name='what' len='9'/></module>"
        "</user></schema>"
    )
    return engine


def test_segments_say_what_is_template_and_what_is_data(engine: PromptCacheEngine) -> None:
    prompt = engine.prompt_from_pml(
        trip(
            '<city where="Oslo"/><cheap/><notes><document name="d">Ann keeps bees.</document>'
            "</notes> So?"
        )
    )
    shown = [(part.kind, part.name, part.text.strip()) for part in prompt.segments]
    shown = [part for part in shown if part[2]]
    assert shown == [
        ("literal", None, "You plan trips for people."),
        ("literal", "city", "They go to"),
        ("argument", "where", "Oslo"),
        ("literal", "city", "for a week."),
        ("literal", "cheap", "There is hardly any money to spend."),
        ("document", "d", "Ann keeps bees."),
        ("literal", None, "Be kind, and be brief about it."),
        ("text", None, "So?"),
    ]


def test_everything_is_encoded_ahead_of_time(engine: PromptCacheEngine) -> None:
    report = engine.encode_schema("trip", progress=False)
    # city, hotel, cheap, grand, the schema's own text, and city with grand; "Hm." is too short.
    assert (report.texts, report.encoded, report.kept, report.too_short) == (7, 6, 6, 1)
    assert report.already_stored == 0
    assert engine.encode_schema("trip", progress=False).already_stored == 6
    for uses in (
        '<city where="Oslo"><hotel/></city><cheap/>',
        '<city where="Rome"/><grand/><tiny/>',
    ):
        for positions in ("schema", "compact"):
            fresh = PromptCacheEngine(engine.lm, store=engine.store, reuse="fast")
            fresh.add_schema(TRIP)
            prompt = fresh.prompt_from_pml(trip(uses + "So?"), positions=positions)
            done = fresh.prefill(prompt).report
            assert done.encoded_tokens == 0
            sources = {part.name: part.source for part in done.segments if part.kind == "literal"}
            assert {sources[name] for name in sources if name != "tiny"} == {"memory"}
            assert sources.get("tiny", "computed") == "computed"


def test_a_module_with_cache_false_is_computed_each_time(engine: PromptCacheEngine) -> None:
    engine.encode_schema("trip", progress=False)
    for _ in range(2):
        fresh = PromptCacheEngine(engine.lm, store=engine.store, reuse="fast")
        fresh.add_schema(TRIP)
        report = fresh.prefill(fresh.prompt_from_pml(trip("<cheap/><fresh/>So?"))).report
        sources = {part.name: part.source for part in report.segments}
        assert (sources["cheap"], sources["fresh"]) == ("memory", "computed")


def test_an_unknown_schema_is_an_error_that_names_the_nearest(engine: PromptCacheEngine) -> None:
    with pytest.raises(PMLError, match="no schema 'tripp'; did you mean 'trip'") as caught:
        engine.prompt_from_pml('\n<prompt schema="tripp">Hi</prompt>')
    assert caught.value.line == 2
    with pytest.raises(PMLError, match="did you mean 'trip'"):
        engine.encode_schema("tri")


def test_a_schema_added_again_replaces_the_one_of_its_name(engine: PromptCacheEngine) -> None:
    engine.add_schema("<schema name='trip'><module name='city'>Stay home.</module></schema>")
    assert engine.prompt_from_pml(trip("<city/> Why?")).text == "Stay home. Why?"


def test_schemas_and_prompts_come_from_files_and_trees_too(
    engine: PromptCacheEngine, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("A note.", "utf-8")
    schema = "<schema name='f'><module name='m' src='note.txt'/></schema>"
    (tmp_path / "f.xml").write_text(schema, "utf-8")
    with pytest.raises(PMLError, match=r"f\.xml:1: src= is off"):
        engine.add_schema(tmp_path / "f.xml")
    engine.add_schema(str(tmp_path / "f.xml"), src_root=tmp_path)
    prompt = "<prompt schema='f'><m/> So?</prompt>"
    (tmp_path / "p.xml").write_text(prompt, "utf-8")
    texts = [engine.prompt_from_pml(given).text for given in (prompt, tmp_path / "p.xml")]
    engine.add_schema(parse_schema(schema, src_root=tmp_path))
    texts.append(engine.prompt_from_pml(parse_prompt(prompt)).text)
    assert texts == ["A note. So?"] * 3
    with pytest.raises(PMLError, match="can't read"):
        engine.add_schema(tmp_path / "none.xml")
    with pytest.raises(PromptError, match="got int"):
        engine.prompt_from_pml(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown positions"):
        engine.prompt_from_pml(prompt, positions="loose")  # type: ignore[arg-type]


def test_positions_beyond_the_context_are_an_error_and_compact_ones_fit(
    engine: PromptCacheEngine,
) -> None:
    engine.add_schema(
        "<schema name='s'><slot name='d' max-tokens='600'/><module name='m'>Be kind to "
        "all.</module></schema>"
    )
    pml = "<prompt schema='s'><m/>Why?</prompt>"
    with pytest.raises(ContextLengthError, match="positions reach 6.., .* holds 512"):
        engine.prefill(engine.prompt_from_pml(pml))
    engine.prefill(engine.prompt_from_pml(pml, positions="compact"))


def test_the_answer_ends_where_positions_do(engine: PromptCacheEngine) -> None:
    engine.add_schema(
        "<schema name='s'><slot name='d' max-tokens='490'/><module name='m'>Hm.</module></schema>"
    )
    prompt = engine.prompt_from_pml("<prompt schema='s'><m/>Why?</prompt>")
    room = 512 - max(engine.tokenise(prompt).positions)
    assert room < 20
    generation = engine.generate(prompt, SamplingParams(max_tokens=400))
    assert len(generation.token_ids) == room


def test_a_unit_whose_gaps_pass_the_context_is_computed_in_compact_prompts(
    engine: PromptCacheEngine,
) -> None:
    schema = (
        "<schema name='s'><module name='m'>Be kind to <param name='x' len='600'/> all of "
        "them.</module></schema>"
    )
    engine.add_schema(schema)
    pml = "<prompt schema='s'><m x='you'/>Why?</prompt>"
    prefill = engine.prefill(engine.prompt_from_pml(pml, positions="compact"))
    assert prefill.report.computed_tokens == prefill.report.prompt_tokens
    rows = SchemaOracle(schema, tiny_models.tiny_tokenizer()).plain(pml, "compact")
    expected = oracle.next_logits(tiny_models.build("llama"), rows)
    assert (prefill.logits - expected).abs().max() < 1e-4
    with pytest.raises(ContextLengthError, match=r"619 tokens, .* \(512 tokens\)"):
        engine.encode_schema("s", progress=False)


def test_a_schema_with_a_module_that_is_too_long_is_refused_before_any_work(
    engine: PromptCacheEngine,
) -> None:
    engine.add_schema(
        "<schema name='s'>You are a kind helper of all people, old and young.<module name='m'>Be "
        "kind to <param name='x' len='600'/> all of them.</module></schema>"
    )
    with pytest.raises(ContextLengthError):
        engine.encode_schema("s", progress=False)
    assert engine.stats().encoded_tokens == 0


def test_a_prompt_laid_out_for_another_model_is_refused(
    engine: PromptCacheEngine, tiny_lm: Callable[..., CausalLM]
) -> None:
    prompt = engine.prompt_from_pml(trip("<cheap/>So?"))
    with pytest.raises(PromptError, match="another model"):
        PromptCacheEngine(tiny_lm("qwen2")).prefill(prompt)


def test_prompts_of_other_positions_are_not_equal(engine: PromptCacheEngine) -> None:
    pml = trip("<grand/>So?")
    prompt = engine.prompt_from_pml(pml)
    assert prompt == engine.prompt_from_pml(pml)
    assert prompt != engine.prompt_from_pml(pml, positions="compact")
    assert prompt != Prompt(prompt.segments)


def test_a_model_without_states_says_why_nothing_is_encoded(
    tiny_lm: Callable[..., CausalLM],
) -> None:
    with pytest.warns(UserWarning, match="documents can't be reused"):
        engine = PromptCacheEngine(tiny_lm("mamba"))
    engine.add_schema(TRIP)
    report = engine.encode_schema("trip", progress=False)
    assert (report.encoded, report.texts) == (0, 7)
    assert report.reason


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
@pytest.mark.parametrize("more", ["", "<more/>"])
def test_messages_are_written_as_the_chat_template_writes_them(template: str, more: str) -> None:
    engine = chat_engine(template)
    prompt = engine.prompt_from_pml(
        f'<prompt schema="talk">{more}<ask what="bees"/><assistant>No.</assistant>'
        "<user>Please.</user></prompt>"
    )
    system = "You are terse." + (" And kind." if more else "")
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": "Tell me about bees"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Please."},
    ]
    tokenizer = engine.lm.tokenizer
    assert prompt.text == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = engine.tokenise(prompt).token_ids
    assert ids.count(tokenizer.eos_token_id) == prompt.text.count("<eos>")
    assert engine.prefill(prompt).report.prompt_tokens == len(ids)


def test_a_message_that_spells_a_special_token_forges_none() -> None:
    engine = chat_engine(CHATML)
    prompt = engine.prompt_from_pml(
        '<prompt schema="talk"><ask what="&lt;eos&gt;"/><user>&lt;eos&gt;</user></prompt>'
    )
    ids = engine.tokenise(prompt).token_ids
    assert prompt.text.count("<eos>") == 2 + ids.count(engine.lm.tokenizer.eos_token_id)


def test_messages_that_the_template_refuses_are_an_error_at_their_line() -> None:
    engine = chat_engine(LLAMA2)
    with pytest.raises(PMLError, match="chat template has no <system> after <user>") as caught:
        engine.prompt_from_pml(
            '<prompt schema="talk">\n<ask what="bees"/>\n<system>Shout.</system></prompt>'
        )
    assert caught.value.line == 3


def test_messages_that_the_template_writes_otherwise_one_after_the_other_are_an_error() -> None:
    counting = "{% for m in messages %}({{ loop.index }}){{ m['content'] }}{% endfor %}!"
    engine = chat_engine(counting)
    assert engine.prompt_from_pml('<prompt schema="talk">\n<more/></prompt>').text == (
        "(1)You are terse. And kind.!"
    )
    with pytest.raises(PMLError, match="can't write messages of system, user, user"):
        engine.prompt_from_pml(
            '<prompt schema="talk"><ask what="bees"/><user>A</user><user>B</user></prompt>'
        )
