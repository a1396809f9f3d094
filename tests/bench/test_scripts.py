"""`benchmarks/`: the scripts behind docs/speed.md and the soak run, on a tiny model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import throughput

ROOT = Path(throughput.__file__).parent.parent


def test_throughput_measures_what_the_page_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs" / "speed.md").read_text("utf-8")
    (command,) = re.findall(
        r"^\$ python benchmarks/throughput.py((?:.*\\\n)*.*)$", page, flags=re.M
    )
    named = shlex.split(command.replace("\\\n", ""))
    small = (
        *("--random", "llama-tiny", "--dtype", "float32", "--cached", "96", "--documents", "4"),
        *("--question-tokens", "8", "--answer-tokens", "3", "--requests", "2", "--threads", "1"),
    )
    throughput.main([*named, *small])
    printed = capsys.readouterr().out
    encoding = re.search(r"encoding ahead: ([\d,]+) tokens/s, (\d+)% of the model's best", printed)
    requests = re.search(
        r"2 requests in fast: ([\d.]+) tokens/s one after another, ([\d.]+) at once, .* (\d+)% of",
        printed,
    )
    assert encoding is not None
    assert requests is not None
    assert all(
        float(figure.replace(",", "")) > 0 for figure in encoding.groups() + requests.groups()
    )


def test_a_short_soak_finds_nothing_wrong_and_nothing_lost() -> None:
    soak = [sys.executable, "benchmarks/soak.py", "--minutes", "0.05", "--questions", "1"]
    done = subprocess.run(soak, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("nothing wrong, nothing lost\n"), done.stdout + done.stderr
    assert done.returncode == 0
    assert re.search(r"\d answers", done.stdout)
