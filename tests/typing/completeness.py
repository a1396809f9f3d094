"""Checks that every public symbol has a type that all type checkers agree on.

`basedpyright --verifytypes` looks at every symbol of a package whose name has no underscore. Public
here are those that `__all__` of a module below names, and their members; of the rest only what
their own annotations need is judged.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = (
    "pcache_core",
    "pcache_core.pml",
    "pcache_core.store",
    "pcache_templates",
    "pcache_integrations.langchain",
    "pcache_integrations.llama_index",
)
ALONE = (
    "pcache_core.errors",
    "pcache_core.metrics.EngineCollector",
    "pcache_core.metrics.register",
    "pcache_core.store.object.ObjectStore",
    "pcache_core.store.redis.RedisStore",
    "pcache_core.base_engine.EngineStats",
)
# Said of a symbol whose own annotation is complete and names one that is not.
_OF_ANOTHER = "is partially unknown"


def main() -> None:
    """Print what is incomplete. Exit status 1 if anything is."""
    owners = set(_owners())
    found = [
        (symbol["name"], diagnostic["message"])
        for package in ("pcache_core", "pcache_templates", "pcache_integrations")
        for symbol in _symbols(package)
        if not owners.isdisjoint(_prefixes(symbol["name"]))
        for diagnostic in symbol["diagnostics"]
        if diagnostic["severity"] == "error" and _OF_ANOTHER not in diagnostic["message"]
    ]
    for name, message in found:
        print(f"{name}: {message.splitlines()[0]}")
    print(f"{len(owners)} public classes and functions, {len(found)} symbols without a type")
    sys.exit(bool(found))


def _owners() -> Iterator[str]:
    """Full names of public classes, functions and constants, where they are defined."""
    yield from ALONE
    for name in MODULES:
        module = importlib.import_module(name)
        for exported in module.__all__:
            value = getattr(module, exported)
            defined_in = getattr(value, "__module__", None) or name
            yield f"{defined_in}.{getattr(value, '__qualname__', exported)}"
            yield f"{name}.{exported}"


def _symbols(package: str) -> list[dict[str, Any]]:
    tools = Path(sys.executable).parent
    done = subprocess.run(
        [tools / "basedpyright", "--ignoreexternal", "--outputjson", "--verifytypes", package],
        env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    symbols: list[dict[str, Any]] = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    assert len(symbols) > 50, f"basedpyright found only {len(symbols)} symbols in {package}"
    return symbols


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


if __name__ == "__main__":
    main()
