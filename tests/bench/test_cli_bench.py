"""`pcache bench` from end to end on a tiny random model: what it measures, prints and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bench.conftest import bench
from pcache_core import OptionError
from redis_server import Server

_SPREAD = {
    "type": "object",
    "required": ["p50", "min", "max"],
    "properties": {name: {"type": "number", "exclusiveMinimum": 0} for name in ("p50", "min")},
}
_ROW = {
    "type": "object",
    "properties": {
        "cached_size": {"enum": [96, 128, 192]},
        "order": {"enum": ["cold", "same", "new", "floor"]},
        "way": {"type": "string"},
        "kind": {"enum": ["ours", "floor", "peer"]},
        "prompt_tokens": {"type": "integer"},
        "cached_tokens": {"type": "number"},
        "ttft_ms": _SPREAD,
        "speedup": {"type": "number", "exclusiveMinimum": 0},
        "above_floor": {"type": "number", "exclusiveMinimum": 0},
        "decode_tokens_per_s": {"anyOf": [_SPREAD, {"type": "null"}]},
        "agreement": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "parts_ms": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
    },
    "additionalProperties": False,
}
_ROW["required"] = list(_ROW["properties"])
_LISTS = ("rows", "encoding", "concurrency", "growth", "peers", "notes")
_SCHEMA = {
    "type": "object",
    "properties": {
        "rows": {"type": "array", "items": _ROW},
        "environment": {"type": "object", "required": ["cpu", "threads", "torch", "dtype"]},
        "options": {"type": "object", "required": ["seed", "rounds", "documents", "tier"]},
    },
    "required": [*_LISTS, "model", "parameters", "environment", "options", "kv_bytes_per_token"],
}


def rows_by_name(figures: dict[str, Any], size: int) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["way"], r["order"]): r for r in figures["rows"] if r["cached_size"] == size}


def test_the_json_has_every_way_at_every_size(figures: dict[str, Any]) -> None:
    jsonschema.validate(figures, _SCHEMA)
    known = {"exact", "fast", "balanced", "fast, 7 other states", "transformers generate"}
    for size in (96, 128, 192):
        assert set(rows_by_name(figures, size)) == {
            ("off", "cold"),
            ("transformers generate", "cold"),
            *((way, order) for way in known for order in ("same", "new")),
            ("forward, K/V in place", "floor"),
            ("forward, no K/V", "floor"),
        }


def test_each_way_reuses_what_it_can(figures: dict[str, Any]) -> None:
    rows = rows_by_name(figures, 192)
    opening = 10  # with the beginning-of-sequence token
    documents = opening + 192
    assert rows["off", "cold"]["cached_tokens"] == 0
    assert rows["transformers generate", "cold"]["cached_tokens"] == 0
    for way in ("exact", "transformers generate"):
        assert rows[way, "new"]["cached_tokens"] < opening + 48
        # Behind the documents stand the two newlines and "Question:" of every prompt.
        assert documents <= rows[way, "same"]["cached_tokens"] < documents + 8
    for way in ("fast", "fast, 7 other states"):
        assert rows[way, "new"]["cached_tokens"] >= documents
    assert rows["forward, K/V in place", "floor"]["cached_tokens"] == documents
    assert len({row["prompt_tokens"] for row in rows.values()}) == 1


def test_transformers_and_off_answer_alike(figures: dict[str, Any]) -> None:
    for size in (96, 128, 192):
        row = rows_by_name(figures, size)["transformers generate", "cold"]
        assert row["agreement"] == 1
        assert row["decode_tokens_per_s"]["p50"] > 0


def test_a_peer_that_is_missing_or_dies_has_a_line_and_the_others_their_rows(
    figures: dict[str, Any],
) -> None:
    problems = {peer["name"]: peer["problem"] for peer in figures["peers"]}
    assert problems["transformers generate"] is None
    assert "not installed" in problems["llama.cpp"]
    assert "pip install llama-cpp-python" in problems["llama.cpp"]
    assert problems["vLLM"] == "its process ended in run: out of luck"
    assert {row["way"] for row in figures["rows"]}.isdisjoint({"llama.cpp", "vLLM"})


def test_parts_of_the_time_are_no_more_than_the_whole(figures: dict[str, Any]) -> None:
    row = rows_by_name(figures, 192)["fast", "new"]
    assert set(row["parts_ms"]) >= {"look up and load", "copy and rotate", "forward", "other"}
    assert 0 < sum(row["parts_ms"].values()) <= 1.01 * row["ttft_ms"]["max"]


def test_encoding_concurrency_and_growth_are_measured(figures: dict[str, Any]) -> None:
    assert [each["cached_size"] for each in figures["encoding"]] == [96, 128, 192]
    assert all(each["forward_batch"] in (1, 4) for each in figures["encoding"])
    assert [each["requests"] for each in figures["concurrency"]] == [3, 3, 3]
    assert {line["way"] for line in figures["growth"]} == {"fast", "forward, K/V in place"}
    # Two layers of two heads with 32 dimensions, keys and values, four bytes each.
    assert figures["kv_bytes_per_token"] == figures["stored_bytes_per_token"] == 2 * 2 * 32 * 2 * 4


def test_the_table_names_ways_orders_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "bench.svg"
    text = bench("--no-peers", "--rounds", "1", "--tier", "disk", "--plot", str(file))
    for words in ("nothing known", "same order", "new order", "balanced", "forward, K/V in place",
                  "growth of TTFT, fast", "of the model's best plain forward", "seed 0",
                  "tier disk", "float32", "AVX" if sys.platform == "linux" else ""):  # fmt: skip
        assert words in text
    drawing = file.read_text("utf-8")
    for words in ("fast, new order", "exact, same order", "copy and rotate", "random llama-tiny"):
        assert words in drawing


def test_states_may_be_on_a_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        address = server.url.replace("://", "://:secret@")
        tier = ("--tier", address, "--modes", "fast", "--order", "new", "--rounds", "1")
        figures = json.loads(bench("--no-peers", *tier, "--json"))
    finally:
        server.kill()
    assert rows_by_name(figures, 192)["fast", "new"]["cached_tokens"] >= 202
    assert figures["stored_bytes_per_token"] is None
    assert "secret" not in json.dumps(figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cached", "1m"), "is no list of token counts"),
        (("--cached", "32"), "makes 4 documents of 8 tokens"),
        (("--random", "llama-1t"), "no random model 'llama-1t'"),
        (("--dtype", "int3"), "unknown dtype 'int3'"),
        (("--model", "builtin:tiny-rag"), "name two models"),
        (("--order", "old"), "unknown --order 'old'"),
        (("--tier", "tape"), "unknown --tier 'tape'"),
        (("--peer", "psychic"), "no peer 'psychic'"),
        (("--peer", "vllm=/nowhere/python"), "/nowhere/python is no program"),
        (("--peer", "vllm", "--no-peers"), "give one of them"),
        (("--gguf-type", "q1"), "unknown --gguf-type 'q1'"),
        (("--plot", "/nowhere/bench.svg"), "has no folder to go to"),
        (("--plot", "bench.txt"), r"must end in \.png or \.svg"),
    ],
)
def test_what_can_not_be_measured_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bench(*arguments, *(() if "--peer" in arguments else ("--no-peers",)))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_an_interrupt_leaves_no_worker_behind() -> None:
    command = [sys.executable, "-c", "from pcache_integrations.cli import main; main()", "bench"]
    command += ["--random", "llama-tiny", "--peer", "transformers", "--rounds", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        worker = _child(process.pid)
        assert worker is not None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()
    assert not Path(f"/proc/{worker}").exists()


def _child(pid: int) -> int | None:
    """The worker that a process started, once it has."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
                words = Path(f"/proc/{name}/cmdline").read_text()
            except (OSError, ValueError):
                continue
            if parent == pid and "transformers_worker.py" in words:
                return int(name)
        time.sleep(0.1)
    return None
