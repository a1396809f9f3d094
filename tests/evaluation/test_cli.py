"""`pcache eval`: what it prints, and what it refuses before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pcache_core import OptionError
from pcache_core.params import REUSE_MODES
from pcache_integrations.cli import app
from pcache_integrations.cli.options import TOY


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["eval", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_json_is_all_there_is_on_standard_output() -> None:
    asked = ("--documents", "3", "--seed", "0", "--questions", "3", "--max-tokens", "8")
    figures = json.loads(run(*asked, "--json"))
    assert figures["model"] == "builtin:tiny-rag"
    assert (figures["questions"], figures["seed"]) == (3, 0)
    rows = {row["reuse"]: row for row in figures["rows"]}
    assert tuple(rows) == REUSE_MODES
    assert rows["exact"]["agreement"] == 1
    assert rows["exact"]["kl_max"] == 0
    assert rows["exact"]["exact_match"] == rows["off"]["exact_match"]
    assert set(figures["environment"]) >= {"device", "dtype", "torch", "transformers", "threads"}


def test_the_table_has_a_row_for_each_mode_and_the_guesser() -> None:
    lines = run("--split", "--questions", "2", "--modes", "fast, exact", "--seed", "9").splitlines()
    assert lines[0] == (
        "builtin:tiny-rag: 2 questions of the tiny world, split, 8 documents, seed 9"
    )
    first_words = [line.split()[0] for line in lines if line.split()]
    assert first_words[3:7] == ["guesser", "off", "fast", "exact"]


def test_answers_are_shown_when_asked_for() -> None:
    asked = ("--split", "--questions", "2", "--modes", "fast", "--max-tokens", "4")
    lines = run(*asked, "--show", "1").splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["expected:", lines[1].split()[1]], [lines[2].split()[0], "off"],
        [lines[3].split()[0], "fast"],
    ]  # fmt: skip
    (shown,) = json.loads(run(*asked, "--show", "1", "--json"))["answers"]
    assert set(shown["answers"]) == {"off", "fast"}


def test_rankings_are_compared_and_answered_from() -> None:
    asked = ("--rank", "--documents", "6", "--keep", "2", "--questions", "8", "--max-tokens", "8")
    figures = json.loads(run(*asked, "--seed", "1", "--json"))
    by_name = {row["ranking"]: row for row in figures["rows"]}
    assert list(by_name) == ["attention", "BM25", "all documents"]
    assert [row["documents"] for row in figures["rows"]] == [2, 2, 6]
    for name in ("attention", "BM25"):
        assert 1 >= by_name[name]["among_three"] >= by_name[name]["first"] > 0.5
        assert by_name[name]["rank_p50_ms"] > 0
    assert by_name["all documents"]["first"] is None
    assert figures["questions"] == 8


def test_a_ranking_is_judged_by_the_documents_that_hold_the_answer(tmp_path: Path) -> None:
    told = "The tower of Primmouth was built in 1868 by Edgar Holm."
    others = [f"Firm number {number} sells lamps in the town of Widheim." for number in range(5)]
    asked = {"question": "Who built the tower of Primmouth?", "contexts": [*others, told]}
    file = tmp_path / "questions.jsonl"
    answers = (["Edgar Holm"], ["Nobody"])
    file.write_text("".join(json.dumps({**asked, "answers": each}) + "\n" for each in answers))
    figures = json.loads(
        run("--rank", "--data", str(file), "--model", TOY, "--keep", "1", "--json")
    )
    assert (figures["questions"], figures["left_out"]) == (1, 1)
    assert [row["first"] for row in figures["rows"]][1:] == [1, None]
    lines = run("--rank", "--data", str(file), "--model", TOY, "--keep", "1").splitlines()
    assert [line.split()[1:4] for line in lines if line.startswith("BM25")] == [
        ["1", "100.0", "100.0"]
    ]
    assert lines[-1].startswith("1 questions left out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--modes", "fast", "--warm"), "leave out --modes, --warm"),
        (("--absent",), "no document of the tiny world, absent, 32 documents holds the answer"),
    ],
)
def test_what_rankings_have_no_use_for_is_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run("--rank", "--questions", "2", *options)


@pytest.mark.usefixtures("real_lm")
def test_the_corpus_is_asked_of_a_real_model() -> None:
    figures = json.loads(
        run("--documents", "2", "--questions", "1", "--modes", "fast", "--warm", "--json")
    )
    assert figures["model"].startswith("builtin:smollm2")
    assert (figures["set"], figures["layout"]) == ("corpus, 2 documents", "chat")
    assert figures["rows"][0]["contains"] == 1
    assert "all documents were encoded ahead" in figures["notes"]


def test_a_file_is_asked_in_the_models_chat(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    record = {"question": "Who?", "contexts": ["Ann is here today, as ever."], "answers": ["Ann"]}
    file.write_text(json.dumps(record))
    asked = ("--model", TOY, "--data", str(file), "--modes", "off", "--max-tokens", "4", "--json")
    for option, layout in (((), "completion"), (("--chat",), "chat"), (("--raw",), "completion")):
        figures = json.loads(run(*asked, *option))
        assert figures["layout"] == layout
        assert (figures["set"], figures["seed"]) == ("questions.jsonl", None)
        assert (figures["guesser"], figures["match"]) == (None, "normalised")


def test_states_can_be_kept_in_fewer_bits_between_encoding_and_use() -> None:
    asked = ("--model", TOY, "--questions", "2", "--modes", "fast", "--max-tokens", "4", "--json")
    kept = {
        dtype: json.loads(run(*asked, *(("--storage-dtype", dtype) if dtype else ())))
        for dtype in (None, "float32", "int8")
    }
    kl = {dtype: figures["rows"][1]["kl_mean"] for dtype, figures in kept.items()}
    assert kl["float32"] == pytest.approx(kl[None], rel=1e-3)
    assert kl["int8"] != pytest.approx(kl[None], rel=1e-6)
    assert kl["int8"] == pytest.approx(kl[None], rel=0.2)
    assert kept["int8"]["rows"][1]["cached_tokens"] == kept[None]["rows"][1]["cached_tokens"] > 0
    assert "files that keep them as int8" in " ".join(kept["int8"]["notes"])


def test_a_curve_repairs_growing_numbers_of_tokens(tmp_path: Path) -> None:
    file = tmp_path / "curve.svg"
    asked = ("--model", TOY, "--questions", "1", "--modes", "fast", "--max-tokens", "2", "--json")
    figures = json.loads(run(*asked, "--curve", str(file)))
    assert "tokens computed again" in file.read_text("utf-8")
    rows = {row["reuse"]: row for row in figures["rows"]}
    repaired = {
        int(name.removeprefix("repair ")): row["repaired_tokens"]
        for name, row in rows.items()
        if name.startswith("repair ")
    }
    assert list(repaired) == [8, 16, 32, 64, 128, 256]
    reused = rows["fast"]["cached_tokens"]
    for budget, count in repaired.items():
        # Half of what states gave or more: all are computed, and none is repaired. Some of what is
        # reused is the opening, which no state of a module gave.
        possible = {0} if budget >= reused / 2 else {0, budget} if budget > reused / 3 else {budget}
        assert count in possible


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--curve", "curve.txt"), r"must end in \.png or \.svg"),
        (("--curve", "no/such/curve.svg"), "make no/such first"),
        (("--data", "q.json", "--documents", "8"), "--documents is for questions without --data"),
        (("--data", "q.json", "--split", "--seed", "0"), "--split, --seed is for questions"),
        (("--data", "missing.json"), r"missing\.json can't be read"),
        (("--split", "--hops", "2"), "hops=2 and split"),
        (("--storage-dtype", "int4"), "storage_dtype='int4'"),
        (("--documents", "0"), "documents=0 is out of range; a question of corpus takes 2 to 56"),
        (("--documents", "0", "--seed", "1"), "documents=0 is out of range; single questions"),
        (("--modes", "off,best"), "unknown reuse mode 'best'"),
        (("--modes", ""), "unknown reuse mode ''"),
        (("--model", TOY, "--questions", "1", "--device", "tpu7"), "device"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run(*arguments)


def test_options_out_of_range_are_a_usage_error() -> None:
    assert CliRunner().invoke(app, ["eval", "--questions", "0"]).exit_code == 2
    assert CliRunner().invoke(app, ["eval", "--max-tokens", "0"]).exit_code == 2
