"""The README of the templates says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pcache_core.pml import parse_schema

README = (Path(__file__).parents[2] / "templates" / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_the_examples_print_what_is_written_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "readme.py"  # programs are read from their files
    path.write_text("".join(blocks("python")), "utf-8")
    exec(compile(path.read_text("utf-8"), str(path), "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    (schema,) = blocks("xml")
    assert printed.startswith(schema)
    assert parse_schema(schema).name == "answer"
    expected = re.findall(r"^# (.*)", "".join(blocks("python")), flags=re.MULTILINE)
    assert len(expected) == 2
    assert all(f"{line}\n" in printed for line in expected)
