"""`pcache serve`: a vLLM server that fills prompts from module states."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Annotated

import typer

from pcache_core.errors import ModelError
from pcache_core.params import DEFAULT_MODEL
from pcache_core.picture import shown
from pcache_integrations.cli.options import MODEL_HELP, Dtype, PreambleFile


def serve(  # noqa: PLR0913 (each is an option of the command)
    store: Annotated[
        str, typer.Option(help="A folder or a server's URL, where states are kept and found.")
    ],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = DEFAULT_MODEL,
    namespace: Annotated[str, typer.Option(help="Whose states are used.")] = "default",
    preamble: PreambleFile = None,
    dtype: Dtype = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    python: Annotated[
        str, typer.Option(help="An interpreter that has both vLLM and this package.")
    ] = sys.executable,
    more: Annotated[
        list[str] | None, typer.Argument(help="Options of vLLM's own, after `--`.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Run the command, too.")] = False,
) -> None:
    """Print the command that starts vLLM with the prompt cache connector; with --run, run it.

    The model is loaded for it, as the connector has to know its fingerprint and how states turn.
    """
    from pcache_integrations.vllm.serve import server_options

    command = [
        python,
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--host", host),
        *("--port", str(port)),
        *server_options(model, dtype, store, namespace, preamble),
        *(more or ()),
    ]
    print(shown(shlex.join(command)), flush=True)
    if run:
        try:
            os.execvp(python, command)
        except OSError as error:
            raise ModelError(
                f"{python} can't be run ({error.strerror}); name with --python an interpreter "
                "that has vLLM"
            ) from error
