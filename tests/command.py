"""Runs `pcache` as a user does: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MAIN = "from pcache_integrations.cli import main; main()"


def environment(**more: str) -> dict[str, str]:
    """Without a network, a terminal or more than one thread."""
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}
    return {**os.environ, **fixed, **more}


def pcache(
    *arguments: str | Path, before: str = "", answer: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """The finished command. before: Python code that the process runs first."""
    return subprocess.run(
        [sys.executable, "-c", f"{before}\n{MAIN}", *map(str, arguments)],
        env=environment(**variables),
        input=answer,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
