"""`pcache bench` from end to end on a tiny random model: what it measures, prints and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from pcache_core import OptionError
from pcache_integrations.cli import app
from redis_server import Server

_SMALL = (
    *("--random", "llama-tiny", "--dtype", "float32", "--cached", "96,192"),
    *("--documents", "4", "--question-tokens", "8", "--answer-tokens", "3", "--rounds", "2"),
)
_SPREAD = {
    "type": "object",
    "required": ["p50", "min", "max"],
    "properties": {name: {"type": "number", "exclusiveMinimum": 0} for name in ("p50", "min")},
}
_ROW = {
    "type": "object",
    "properties": {
        "cached_size": {"enum": [96, 192]},
        "order": {"enum": ["cold", "same", "new", "floor"]},
        "way": {"type": "string"},
        "kind": {"enum": ["ours", "floor"]},
        "prompt_tokens": {"type": "integer"},
        "cached_tokens": {"type": "number"},
        "ttft_ms": _SPREAD,
        "speedup": {"type": "number", "exclusiveMinimum": 0},
        "above_floor": {"type": "number", "exclusiveMinimum": 0},
        "decode_tokens_per_s": {"anyOf": [_SPREAD, {"type": "null"}]},
    },
    "additionalProperties": False,
}
_ROW["required"] = list(_ROW["properties"])
_SCHEMA = {
    "type": "object",
    "properties": {
        "rows": {"type": "array", "items": _ROW},
        "environment": {"type": "object", "required": ["cpu", "threads", "torch", "dtype"]},
        "options": {"type": "object", "required": ["seed", "rounds", "documents", "tier"]},
    },
    "required": ["rows", "model", "parameters", "environment", "options", "kv_bytes_per_token"],
}


def bench(*arguments: str) -> str:
    """What `pcache bench` prints."""
    result = CliRunner().invoke(app, ["bench", *_SMALL, *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bench("--modes", "exact,fast,balanced,high", "--json"))
    return found


def rows_by_name(figures: dict[str, Any], size: int) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["way"], r["order"]): r for r in figures["rows"] if r["cached_size"] == size}


def test_the_json_has_every_way_at_every_size(figures: dict[str, Any]) -> None:
    jsonschema.validate(figures, _SCHEMA)
    for size in (96, 192):
        assert set(rows_by_name(figures, size)) == {
            ("off", "cold"),
            *((w, o) for w in ("exact", "fast", "balanced", "high") for o in ("same", "new")),
            ("forward, K/V in place", "floor"),
        }
    # Two layers of two heads with 32 dimensions, keys and values, four bytes each.
    assert figures["kv_bytes_per_token"] == 2 * 2 * 32 * 2 * 4


def test_each_way_reuses_what_it_can(figures: dict[str, Any]) -> None:
    rows = rows_by_name(figures, 192)
    opening = 10  # with the beginning-of-sequence token
    documents = opening + 192
    assert rows["off", "cold"]["cached_tokens"] == 0
    assert rows["exact", "new"]["cached_tokens"] < opening + 48
    # After the documents stand the two newlines and "Question:" of every prompt.
    assert documents <= rows["exact", "same"]["cached_tokens"] < documents + 8
    assert rows["fast", "new"]["cached_tokens"] >= documents
    assert rows["forward, K/V in place", "floor"]["cached_tokens"] == documents
    assert len({row["prompt_tokens"] for row in rows.values()}) == 1


def test_the_table_names_ways_orders_and_environment() -> None:
    text = bench("--rounds", "1", "--tier", "disk")
    for words in ("nothing known", "same order", "new order", "balanced", "forward, K/V in place",
                  "seed 0", "tier disk", "float32",
                  "AVX" if sys.platform == "linux" else ""):  # fmt: skip
        assert words in text


def test_states_may_be_on_a_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        address = server.url.replace("://", "://:secret@")
        tier = ("--tier", address, "--modes", "fast", "--order", "new", "--rounds", "1")
        figures = json.loads(bench(*tier, "--json"))
    finally:
        server.kill()
    assert rows_by_name(figures, 192)["fast", "new"]["cached_tokens"] >= 202
    assert figures["options"]["tier"] == "redis"
    assert "secret" not in json.dumps(figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cached", "1m"), "is not a list of token counts"),
        (("--cached", "32"), "makes 4 documents of 8 tokens"),
        (("--random", "llama-1t"), "no random model 'llama-1t'"),
        (("--dtype", "int3"), "unknown dtype 'int3'"),
        (("--model", "builtin:tiny-rag"), "name two models"),
        (("--order", "old"), "unknown --order 'old'"),
        (("--tier", "tape"), "unknown --tier 'tape'"),
        (("--modes", "quick"), "unknown reuse mode 'quick'"),
    ],
)
def test_what_can_not_be_measured_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bench(*arguments)
