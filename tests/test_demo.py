"""`pcache demo`: prints what it promises, and refuses what it can't use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pcache_core import CausalLM, OptionError
from pcache_integrations import cli
from pcache_integrations.demo.corpus import Corpus, default_folder
from pcache_integrations.demo.run import run_demo


def test_every_question_is_asked_through_both_frameworks_and_compared() -> None:
    corpus = Corpus(default_folder())
    console = Console(record=True, width=200, quiet=True)
    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    with console.capture():
        results = run_demo(lm, corpus, top_k=8, console=console)
    assert len(results) == 2 * len(corpus.questions)
    assert all(result.answer_on == result.answer_off for result in results)
    right = sum(result.answer_on == result.expected for result in results)
    assert right >= 0.9 * len(results)
    for result in results:
        documents = [part for part in result.on.segments if part.kind == "document"]
        assert len(documents) == 8
        assert {part.source for part in documents} <= {"memory", "prefix", "repaired"}
        assert result.off.cached_tokens == 0
        assert result.on.prompt_tokens == result.off.prompt_tokens


def test_the_command_prints_answers_counts_and_a_line_that_sums_up() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from pcache_integrations.cli import main; main()", "demo"],
        capture_output=True,
        text=True,
        check=True,
        env={"HF_HUB_OFFLINE": "1", "COLUMNS": "300", "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    lines = done.stdout.strip().splitlines()
    assert sum(bool(re.search(r"tokens reused, \d+ computed; first token", x)) for x in lines) == 28
    assert re.match(r"28 questions: 28 answers the same with reuse", lines[-1])
    assert "Traceback" not in done.stderr


def test_a_folder_without_questions_or_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not a folder"):
        Corpus(tmp_path / "missing")
    with pytest.raises(OptionError, match=r"no \.txt file"):
        Corpus(tmp_path)
    (tmp_path / "a.txt").write_text("A document.")
    with pytest.raises(OptionError, match=r"questions\.tsv"):
        Corpus(tmp_path)
    (tmp_path / "questions.tsv").write_text("answer\nx\n")
    with pytest.raises(OptionError, match="column 'question'"):
        Corpus(tmp_path)


def test_our_errors_are_a_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pcache", "demo", "--model", "builtin:none"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "unknown built-in model 'builtin:none'" in capsys.readouterr().err
