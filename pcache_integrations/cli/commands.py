"""The commands of `pcache`, each in a file of its own, and what is said when one fails."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from pcache_core.picture import shown
from pcache_integrations.cli.bench import bench
from pcache_integrations.cli.demo import demo
from pcache_integrations.cli.encode import encode
from pcache_integrations.cli.errors import EXIT_STATUSES, INTERRUPTED, USER_ERROR, explain
from pcache_integrations.cli.evaluate import evaluate
from pcache_integrations.cli.schema import schema
from pcache_integrations.cli.serve import serve
from pcache_integrations.cli.store import clear, inspect

_PACKAGES = ("pcache-integrations", "torch", "transformers")

app: typer.Typer = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prompt Cache: reuse of attention states of prompt parts, for LangChain and LlamaIndex.",
    epilog=EXIT_STATUSES,
)


def _print_versions(asked: bool) -> None:
    if asked:
        print(*(f"{package} {version(package)}" for package in _PACKAGES), sep="\n")
        raise typer.Exit


@app.callback()
def _every_command(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_versions,
            help="Print the versions of this and of what computes.",
        ),
    ] = False,
) -> None:
    """Prompt Cache: reuse of attention states of prompt parts, for LangChain and LlamaIndex."""


for name, command, example in (
    ("demo", demo, "--model Qwen/Qwen2.5-0.5B-Instruct --top-k 6"),
    ("eval", evaluate, "--documents 12 --modes fast,balanced --warm"),
    ("bench", bench, "--model builtin:smollm2 --cached 1k,4k"),
    ("encode", encode, "handbook/ faq.jsonl --store ./states"),
    ("inspect", inspect, "~/states --namespace default --limit 20"),
    ("clear", clear, "~/states --model builtin:tiny-rag --older-than 30d"),
    ("schema", schema, "prompt.j2 --len question=32"),
    ("serve", serve, "--model Qwen/Qwen2.5-0.5B-Instruct --store ./states --run"),
):
    app.command(name, epilog=f"Example: pcache {name} {example}")(command)


def main() -> None:
    """Run a command; what went wrong is a sentence on standard error, and an exit status."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        Console(stderr=True).print("[red]error:[/] ", end="")
        print(shown(message), file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
