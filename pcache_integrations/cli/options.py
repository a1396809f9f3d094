"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TOY = "builtin:tiny-rag"
CORPUS_DOCUMENTS = 12  # of the corpus, in a prompt: about 1,150 tokens
MODEL_HELP = "A built-in model, a directory, a hub id, a .gguf file or ollama:NAME."

Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1 …")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
PreambleFile = Annotated[
    Path | None,
    typer.Option(
        help='A JSON file of what documents are encoded after, {"opening": "...", "company": '
        '["...", ...]}, instead of the model\'s own: the same one for whoever uses the store.'
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
