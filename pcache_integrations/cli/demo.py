"""`pcache demo`: questions over a small corpus, through both frameworks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pcache_core.errors import ModelError
from pcache_core.params import DEFAULT_MODEL
from pcache_core.picture import shown
from pcache_integrations.cli.errors import INTERRUPTED, explain
from pcache_integrations.cli.options import CORPUS_DOCUMENTS, MODEL_HELP, TOY, AsJson

if TYPE_CHECKING:
    from pcache_core import CausalLM


def demo(
    model: Annotated[
        str | None,
        typer.Option(help=MODEL_HELP, show_default=DEFAULT_MODEL),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="A folder of .txt files and questions.tsv.", show_default="the project's own"
        ),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many of the corpus's first.")] = 12,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Documents retrieved for a question.", show_default="12, tiny model: 8"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask questions over a small corpus through LangChain and LlamaIndex, reuse off and on.

    Without the default model it runs the tiny one. Interrupted by ctrl-C, it sums up what there
    is.
    """
    from pcache_integrations.demo.corpus import Corpus, shipped
    from pcache_integrations.demo.run import run_demo

    console = Console(quiet=as_json, highlight=False)
    lm = _demo_model(model)
    is_toy = lm.name == TOY
    documents = Corpus(corpus or shipped("corpus_toy" if is_toy else "corpus"))
    chosen = documents.questions[:questions]
    found = top_k or (8 if is_toy else CORPUS_DOCUMENTS)
    done = run_demo(lm, documents, chosen, top_k=found, console=console)
    if as_json:
        asked = [each.as_json() for each in done.asked]
        encoded_s = {name: report.seconds for name, report in done.encoded.items()}
        figures = {"model": lm.name, "encoded_s": encoded_s, "interrupted": done.interrupted}
        print(json.dumps({**figures, "questions": asked}))
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)


def _demo_model(name: str | None) -> CausalLM:
    """Load the model that was named; else the default one, or, without that, the tiny one.

    Raises: ModelError: the one that was named can't be loaded.
    """
    from pcache_integrations._engines import load_lm

    if name is not None:
        return load_lm(name)
    try:
        return load_lm(DEFAULT_MODEL)
    except ModelError as error:
        stderr = Console(stderr=True)
        stderr.print(shown(explain(error) or ""), markup=False, highlight=False)
        stderr.print(f"The demo goes on with {TOY}, which needs no download.\n", style="bold")
        return load_lm(TOY)
