"""A tiny random Llama in fp32, and one benchmark of it, shared by the tests that look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pcache_core import CausalLM
from pcache_integrations.bench.models import random_llama
from pcache_integrations.cli import app

SMALL = (
    *("--random", "llama-tiny", "--dtype", "float32", "--cached", "96,128,192"),
    *("--documents", "4", "--question-tokens", "8", "--answer-tokens", "3", "--rounds", "2"),
)


def bench(*arguments: str) -> str:
    """What `pcache bench` prints."""
    result = CliRunner().invoke(app, ["bench", *SMALL, *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def program(file: Path, *lines: str) -> Path:
    """A shell script in the place of an interpreter."""
    file.write_text("\n".join(("#!/bin/sh", *lines, "")))
    file.chmod(0o755)
    return file


@pytest.fixture(scope="session")
def tiny_llama() -> CausalLM:
    return random_llama(
        "llama-tiny", dtype=torch.float32, device="cpu", context_tokens=1024, seed=0
    )


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A benchmark with everything in it: a peer that runs, one that is missing, one that dies."""
    folder = tmp_path_factory.mktemp("peers")
    missing = program(folder / "missing", 'read line; echo \'{"missing": ["llama_cpp"], '
                      '"version": ""}\'; read line')  # fmt: skip
    dying = program(
        folder / "dying",
        'read line; echo \'{"missing": [], "version": "dying 1.0"}\'',
        "read line; echo '{}'",
        'read line; echo "out of luck" >&2; exit 3',
    )
    peers = ("transformers", f"llama-cpp={missing}", f"vllm={dying}")
    arguments = [part for peer in peers for part in ("--peer", peer)]
    found: dict[str, Any] = json.loads(
        bench(*arguments, "--batch", "3", "--store-states", "7", "--json")
    )
    return found
