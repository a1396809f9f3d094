"""The command `pcache schema`: a template file's schema as PML."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pcache_core.errors import OptionError, TemplateError
from pcache_core.picture import shown
from pcache_templates import (
    BraceTemplate,
    FormatTemplate,
    JinjaTemplate,
    MustacheTemplate,
    PromptTemplate,
)
from pcache_templates.jinja import read_template


class TemplateFormat(StrEnum):
    """The languages that a template file may be written in."""

    JINJA2 = "jinja2"
    F_STRING = "f-string"
    MUSTACHE = "mustache"
    LLAMA_INDEX = "llama-index"


_SUFFIXES = {
    ".j2": TemplateFormat.JINJA2,
    ".jinja": TemplateFormat.JINJA2,
    ".jinja2": TemplateFormat.JINJA2,
    ".mustache": TemplateFormat.MUSTACHE,
    ".txt": TemplateFormat.F_STRING,
}


def schema(
    file: Annotated[Path, typer.Argument(help="A template. Its own folder is where it includes.")],
    template_format: Annotated[
        TemplateFormat | None,
        typer.Option("--format", help="Known by .j2, .jinja, .jinja2, .mustache and .txt."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the schema; the file's if not given.")
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            "--len",
            metavar="NAME=TOKENS",
            help="The most tokens of a parameter or of a loop's slot.",
        ),
    ] = None,
) -> None:
    """Print the schema of a prompt template as PML."""
    pml = template_of(file, template_format, name, _lengths(length or ())).pml
    typer.echo(shown(pml) if sys.stdout.isatty() else pml, nl=False)


def template_of(
    file: Path,
    template_format: TemplateFormat | None = None,
    name: str | None = None,
    lengths: Mapping[str, int] | None = None,
) -> PromptTemplate:
    """Read a template file. Raises: TemplateError: it can't be read or its format is unknown."""
    template_format = template_format or _format_of(file)
    name = name or file.name.partition(".")[0]
    if template_format is TemplateFormat.JINJA2:
        return JinjaTemplate.from_file(file, name=name, lengths=lengths)
    source = read_template(file)
    if template_format is TemplateFormat.MUSTACHE:
        from langchain_core.utils import mustache

        return MustacheTemplate(mustache.tokenize(source), name=name, lengths=lengths)
    if template_format is TemplateFormat.LLAMA_INDEX:
        return BraceTemplate(source, name=name, lengths=lengths)
    return FormatTemplate(source, name=name, lengths=lengths)


def _format_of(file: Path) -> TemplateFormat:
    try:
        return _SUFFIXES[file.suffix.lower()]
    except KeyError:
        raise TemplateError(
            f"{file}: {file.suffix or 'no suffix'!r} tells no template format; give --format, "
            f"one of {', '.join(TemplateFormat)}"
        ) from None


def _lengths(given: Sequence[str]) -> dict[str, int]:
    lengths = {}
    for option in given:
        name, _, tokens = option.partition("=")
        if not name or not tokens.isdecimal():
            raise OptionError(f"--len takes NAME=TOKENS, got {option!r}; for example --len city=8")
        lengths[name] = int(tokens)
    return lengths
