"""`pcache serve`: a vLLM server that fills prompts from module states."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pcache_core.errors import ModelError, OptionError
from pcache_integrations.cli.options import TOY, Dtype, PreambleFile


def serve(  # noqa: PLR0913 (each is an option of the command)
    store: Annotated[
        str, typer.Option(help="A folder or a server's URL, where states are kept and found.")
    ],
    model: Annotated[str, typer.Option(help="A built-in model, a directory or a hub id.")] = TOY,
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
    command = [
        python,
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--host", host),
        *("--port", str(port)),
        *_options(model, dtype, store, namespace, preamble),
        *(more or ()),
    ]
    print(shlex.join(command), flush=True)
    if run:
        try:
            os.execvp(python, command)
        except OSError as error:
            raise ModelError(
                f"{python} can't be run ({error.strerror}); name with --python an interpreter "
                "that has vLLM"
            ) from error


def _options(
    model: str, dtype: str, store: str, namespace: str, preamble: Path | None
) -> list[str]:
    """Options of vLLM's, the connector's among them.

    Raises: ModelError: vLLM can't be served this model's states. OptionError: no such store, or no
        preamble in the file.
    """
    from pcache_core import CausalLM, Preamble
    from pcache_core.kv.key import KeySpace
    from pcache_core.lm.loading import resolve
    from pcache_integrations._engines import check_store
    from pcache_integrations.vllm.model_card import ModelCard

    if store == "memory":
        raise OptionError("store='memory' is no other process's; give a folder or a server's URL")
    check_store(store)
    KeySpace("", "", namespace)  # refuses a name that is none
    chosen = {} if preamble is None else {"preamble": asdict(Preamble.of_file(preamble))}
    card = ModelCard.of(CausalLM.from_pretrained(model, dtype=dtype, device="cpu"))
    transfer = {
        "kv_connector": "PromptCacheConnector",
        "kv_connector_module_path": "pcache_integrations.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "store": store if "://" in store else str(Path(store).expanduser().absolute()),
            "namespace": namespace,
            "model_card": card.as_dict(),
            **chosen,
        },
    }
    source = resolve(model)
    if Path(source).is_file():
        raise ModelError(
            f"{source} is a GGUF file, whose weights vLLM would compute with in another way than "
            "they were encoded with; give a directory or a hub id"
        )
    return [
        *("--model", source),
        *("--served-model-name", model),
        *("--dtype", card.dtype),
        "--disable-hybrid-kv-cache-manager",
        "--enable-prompt-tokens-details",
        *("--structured-outputs-config", json.dumps({"backend": "guidance"})),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
