"""The command `pcache schema`."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pcache_core import OptionError, TemplateError
from pcache_core.pml import parse_schema
from pcache_integrations.cli.schema import schema

app = typer.Typer()
app.command()(schema)


@pytest.mark.parametrize(
    ("file", "source", "options"),
    [
        ("trip.pml.j2", "Go to {{ city }}{% if x %} now{% endif %}.", []),
        ("trip.txt", "Go to {city}.", []),
        ("trip.mustache", "Go to {{city}}.", []),
        ("trip.md", "Go to {city} {}.", ["--format", "llama-index"]),
    ],
)
def test_a_file_is_printed_as_pml(
    tmp_path: Path, file: str, source: str, options: list[str]
) -> None:
    (tmp_path / file).write_text(source)
    arguments = [str(tmp_path / file), "--len", "city=8", *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert parse_schema(result.stdout).name == "trip"
    assert 'Go to <param name="city" len="8"/>' in result.stdout
    named = CliRunner().invoke(app, [*arguments, "--name", "other"], catch_exceptions=False)
    assert parse_schema(named.stdout).name == "other"


@pytest.mark.parametrize(
    ("file", "options", "error", "message"),
    [
        ("x.md", [], TemplateError, "'.md' tells no template format; give --format, one of jinja2"),
        ("x.j2", ["--len", "city"], OptionError, "--len takes NAME=TOKENS, got 'city'"),
        ("x.j2", ["--len", "b=3"], OptionError, "'b', which is no parameter"),
        ("none.j2", [], TemplateError, "No such file"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, file: str, options: list[str], error: type[Exception], message: str
) -> None:
    if file != "none.j2":
        (tmp_path / file).write_text("a {{ a }}")
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, [str(tmp_path / file), *options], catch_exceptions=False)
