"""The README says what is so: its snippets run, and it is short enough to be read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pcache_core import CausalLM

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MODELS = (ROOT / "docs" / "models.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["langchain", "llama_index"])
def test_each_snippet_runs_as_it_stands_and_answers(
    snippet: str,
    real_lm: CausalLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
    assert "Thimble" in capsys.readouterr().out.splitlines()[0]


def test_it_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 200
    for snippet in SNIPPETS:
        lines = [line for line in snippet.splitlines() if line and not line.startswith("from ")]
        assert len(lines) < 10


def test_every_link_and_picture_is_there() -> None:
    targets = re.findall(r"""(?:\]\(|src(?:set)?=")([^)"#]+)""", README)
    inside = [target for target in targets if not target.startswith("https://")]
    assert {"docs/prompt-light.png", "docs/prompt-dark.png", "docs/choosing.md"} <= set(inside)
    for target in inside:
        assert (ROOT / target).exists(), target


def test_the_table_of_families_is_the_one_the_code_prints() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "equivalence"))
    try:
        import table
    finally:
        sys.path.pop(0)
    printed = [row.split("|")[1:3] for row in table.rows()]
    _, _, below = MODELS.partition(table.HEADER)
    written = [line.split("|")[1:3] for line in below.strip().split("\n\n")[0].splitlines()]
    assert written == printed
