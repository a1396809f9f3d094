"""Constrained decoding: whatever a model would like to write, the answer follows the grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jsonschema
import pytest
import torch

from pcache_core import CausalLM, Grammar, OptionError, Prompt, PromptCacheEngine, SamplingParams
from pcache_core.lm.constraint import GrammarCompiler

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
    "required": ["x", "y"],
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "child": {"$ref": "#/$defs/node"},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                "value": {"type": "integer"},
            },
            "required": ["value"],
        }
    },
    "$ref": "#/$defs/node",
}
CAT = {
    "type": "object",
    "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "maximum": 9}},
    "required": ["kind", "lives"],
}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]}
SWITCH = {"enum": ["aa", "bb", "cc", "dd"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "enum": {"enum": ["red", "green", 3, None, {"a": [1]}]},
    "closed": {**POINT, "additionalProperties": False},
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": ["number", "null"]}},
    },
    "nested": {
        "type": "object",
        "properties": {
            "p": {
                "type": "object",
                "properties": {"q": {"type": "array", "minItems": 2, "items": POINT}},
                "required": ["q"],
            }
        },
        "required": ["p"],
    },
    "any of": {"anyOf": [CAT, DOG, {"type": "null"}]},
    "all of": {"allOf": [CAT, POINT]},
    "references": {
        "$defs": {"point": POINT},
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "minItems": 1,
    },
    "recursive": TREE,
    "recursive pairs": {
        "$defs": {
            "pair": {
                "anyOf": [
                    {"type": "null"},
                    {"type": "array", "items": {"$ref": "#/$defs/pair"}, "minItems": 2},
                ]
            }
        },
        "$ref": "#/$defs/pair",
    },
    "strings": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-F]{3}-[0-9]{4}$"},
            "call": {"type": "string", "pattern": "^\\d{3}-\\d{4}$"},
            "day": {"type": "string", "format": "date"},
            "mail": {"type": "string", "format": "email"},
            "word": {"type": "string", "minLength": 5, "maxLength": 9},
        },
        "required": ["id", "call", "day", "mail", "word"],
    },
    "numbers": {
        "type": "array",
        "prefixItems": [
            {"type": "integer", "minimum": 1000, "maximum": 99999},
            {"type": "number", "exclusiveMinimum": 0.5},
            {"type": "integer", "multipleOf": 7},
        ],
        "minItems": 3,
    },
    "dictionary": {"type": "object", "additionalProperties": {"type": "array"}},
    "many choices": {
        "type": "object",
        "properties": {f"f{i}": SWITCH for i in range(12)},
        "required": [f"f{i}" for i in range(12)],
    },
    "string": {"type": "string"},
    "integer": {"type": "integer"},
}


FORMATS = [
    "date",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uri",
    "uuid",
]


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return CausalLM.from_pretrained("builtin:tiny-rag")


def answer(lm: CausalLM, grammar: Grammar, seed: int, **options: Any) -> tuple[str, list[int]]:
    """What a model with random logits writes, and its tokens."""
    params = SamplingParams(seed=seed, grammar=grammar, **options)
    sampler = lm.sampler(params)
    generator = torch.Generator().manual_seed(seed)
    # Some tokens are always liked: such a model writes on and on.
    liked = torch.randn(lm.model.config.vocab_size + 13, generator=generator) * 4
    ids: list[int] = []
    while len(ids) < params.max_tokens:
        token = sampler([1, *ids], liked + torch.randn(liked.shape, generator=generator))
        if token in lm.end_ids:
            break
        ids.append(token)
    return lm.text.decode(ids), ids


def shortest(lm: CausalLM, grammar: Grammar) -> int:
    """Fewest tokens that a request of this grammar may ask for."""
    engine = PromptCacheEngine(lm)
    for max_tokens in range(1, 400):
        try:
            engine.stream(Prompt.from_text("q"), SamplingParams(max_tokens, grammar=grammar))
        except OptionError:
            continue
        return max_tokens
    raise AssertionError("no text is short enough")


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("model", ["trained tokenizer", "bytes"])
def test_every_answer_is_valid_however_few_tokens_are_left(
    name: str, model: str, lm: CausalLM, tiny_lm: Callable[..., CausalLM]
) -> None:
    lm = lm if model == "trained tokenizer" else tiny_lm()
    grammar = Grammar.json(SCHEMAS[name])
    validator = jsonschema.Draft202012Validator(
        SCHEMAS[name], format_checker=jsonschema.FormatChecker()
    )
    fewest = shortest(lm, grammar)
    for seed, temperature in enumerate([0.0, 1.0, 3.0]):
        for extra in (0, 7, 60):
            text, ids = answer(
                lm, grammar, seed, max_tokens=fewest + extra, temperature=temperature
            )
            validator.validate(json.loads(text))
            assert len(ids) <= fewest + extra


@pytest.mark.parametrize("pattern", ["abc", '^[^"\\s]+:(ja|no)+$'])
def test_a_pattern_without_a_known_short_text_is_refused(lm: CausalLM, pattern: str) -> None:
    grammar = Grammar.json({"type": "string", "pattern": pattern})
    with pytest.raises(OptionError, match=r"`pattern`.*`enum`"):
        lm.check_grammar(SamplingParams(grammar=grammar))


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_kept(name: str, lm: CausalLM) -> None:
    schema = {"type": "string", "format": name}
    grammar = Grammar.json(schema)
    for seed in range(4):
        text, _ = answer(lm, grammar, seed, max_tokens=60, temperature=1.0)
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize(
    "options", [{"top_p": 0.3}, {"top_k": 2}, {"min_p": 0.5}, {"repetition_penalty": 1.8}]
)
def test_sampling_options_choose_among_what_is_allowed(
    lm: CausalLM, options: dict[str, Any]
) -> None:
    grammar = Grammar.json(POINT)
    text, _ = answer(lm, grammar, 1, max_tokens=60, temperature=1.5, **options)
    jsonschema.validate(json.loads(text), POINT)


def test_a_model_decides_where_the_grammar_leaves_a_choice(lm: CausalLM) -> None:
    texts = {
        answer(lm, Grammar.json(SWITCH), seed, max_tokens=9, temperature=1.0)[0]
        for seed in range(40)
    }
    assert texts == {'"aa"', '"bb"', '"cc"', '"dd"'}


def test_integers_stay_readable(lm: CausalLM) -> None:
    grammar = Grammar.json({"type": "integer"})
    sampler = lm.sampler(SamplingParams(max_tokens=6000, grammar=grammar))
    digits = lm.token_ids("7")
    logits = torch.zeros(lm.model.config.vocab_size)
    logits[digits] = 9.0
    ids = []
    while (token := sampler([1], logits)) not in lm.end_ids:
        ids.append(token)
    assert json.loads(lm.text.decode(ids)) > 0


def test_a_request_follows_the_grammar_of_its_parameters(lm: CausalLM) -> None:
    engine = PromptCacheEngine(lm, reuse="off")
    params = SamplingParams(max_tokens=70, grammar=Grammar.json(SCHEMAS["nested"]))
    done = engine.generate(Prompt.from_text("Where?"), params)
    jsonschema.validate(json.loads(done.text), SCHEMAS["nested"])
    assert len(done.token_ids) <= 70


def test_an_answer_ends_where_the_grammar_does(lm: CausalLM) -> None:
    params = SamplingParams(max_tokens=70, grammar=Grammar.lark('start: "Yes." | "No."'))
    done = PromptCacheEngine(lm).generate(Prompt.from_text("Is it?"), params)
    assert done.text in ("Yes.", "No.")
    assert done.finish_reason == "stop"


def test_a_stop_string_still_ends_the_answer(lm: CausalLM) -> None:
    params = SamplingParams(max_tokens=70, grammar=Grammar.lark('start: "one, two"'), stop=[","])
    done = PromptCacheEngine(lm).generate(Prompt.from_text("Count."), params)
    assert (done.text, done.finish_reason) == ("one", "stop")


def test_free_text_before_a_fixed_end_leaves_room_for_it(lm: CausalLM) -> None:
    grammar = Grammar.lark('start: /[a-z ]+/ "|done|"')
    text, _ = answer(lm, grammar, 3, max_tokens=30, temperature=1.0)
    assert re.fullmatch(r"[a-z ]+\|done\|", text)


def test_two_threads_share_one_compiled_tokenizer(
    tiny_lm: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, made = tiny_lm(), []
    begin = GrammarCompiler.__init__

    def counted(*args: Any) -> None:
        made.append(args)
        begin(*args)

    monkeypatch.setattr(GrammarCompiler, "__init__", counted)
    with ThreadPoolExecutor(4) as threads:
        ask = partial(answer, lm, Grammar.json(TREE), max_tokens=60)
        texts = [text for text, *_ in threads.map(ask, range(4))]
    assert len(made) == 1
    for text in texts:
        jsonschema.validate(json.loads(text), TREE)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nothing"}, "Invalid type: nothing"),
        ({"$ref": "#/missing"}, "does not exist"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems.*a list for a set"),
        ({"type": "string", "format": "binary"}, "binary.*str for bytes"),
        ({"const": {1, 2}}, "what JSON can't"),
        ([], "must be a mapping, got list"),
    ],
)
def test_a_schema_that_can_not_be_promised_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        Grammar.json(schema)


def test_a_lark_grammar_that_can_not_be_read_is_refused() -> None:
    with pytest.raises(OptionError, match="can't be followed"):
        Grammar.lark("start: missing_rule")


def test_a_grammar_of_another_kind_is_refused() -> None:
    with pytest.raises(OptionError, match="must be a Grammar, got dict"):
        SamplingParams(grammar={"type": "object"})


def test_fewer_tokens_than_any_answer_has_are_refused_before_any_work(lm: CausalLM) -> None:
    engine = PromptCacheEngine(lm)
    params = SamplingParams(max_tokens=5, grammar=Grammar.json(POINT))
    with pytest.raises(OptionError, match=r"has \d+ tokens.* and 5 may be generated"):
        engine.stream(Prompt.from_text("Where?"), params)
    assert not engine.reports


def test_equal_schemas_make_equal_grammars() -> None:
    assert Grammar.json(POINT) == Grammar.json(dict(POINT))
    assert len({Grammar.json(), Grammar.json({"type": "object"})}) == 1
