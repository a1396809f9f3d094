"""The command line: `pcache`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pcache_core.errors import PromptCacheError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prompt Cache: reuse of attention states of prompt parts, for LangChain and LlamaIndex.",
)


@app.callback()
def _commands() -> None:
    """Keeps `demo` a command of its own while it is the only one."""


@app.command(epilog="Example: pcache demo --model Qwen/Qwen2.5-0.5B-Instruct --top-k 6")
def demo(
    model: Annotated[
        str, typer.Option(help="A built-in model, a directory or a hub id.")
    ] = "builtin:tiny-rag",
    corpus: Annotated[
        Path | None, typer.Option(help="A folder of .txt files and questions.tsv.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Documents retrieved for a question.")] = 8,
) -> None:
    """Ask questions over a small corpus through LangChain and LlamaIndex, reuse off and on."""
    from pcache_core import CausalLM
    from pcache_integrations.demo.corpus import Corpus, default_folder
    from pcache_integrations.demo.run import run_demo

    documents = Corpus(corpus or default_folder())
    run_demo(CausalLM.from_pretrained(model), documents, top_k=top_k, console=Console())


def main() -> None:
    """Run a command. Our own errors are a line on standard error and exit status 2."""
    try:
        app()
    except PromptCacheError as error:
        Console(stderr=True).print(f"[red]error:[/] {type(error).__name__}: ", end="")
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
