"""The README says what is so: its snippets run, its table is the one that the code prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "snippet", SNIPPETS, ids=["langchain", "llama_index", "engine", "schema", "repair"]
)
def test_each_snippet_runs_as_it_stands_and_answers(
    snippet: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip().startswith("kayaking.")


def test_integration_snippets_are_under_ten_lines_beside_imports() -> None:
    for snippet in SNIPPETS[:2]:
        lines = [line for line in snippet.splitlines() if line and not line.startswith("from ")]
        assert len(lines) < 10


def test_every_picture_is_there() -> None:
    pictures = re.findall(r"""(?:!\[[^]]*\]\(|src(?:set)?=")([^)"]+)[)"]""", README)
    assert {"docs/prompt-light.png", "docs/prompt-dark.png"} <= set(pictures)
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture


def test_the_table_of_families_is_the_one_the_code_prints() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "equivalence"))
    try:
        import table
    finally:
        sys.path.pop(0)
    printed = [row.split("|")[1:3] for row in table.rows()]
    _, _, below = README.partition(table.HEADER)
    written = [line.split("|")[1:3] for line in below.strip().split("\n\n")[0].splitlines()]
    assert written == printed
