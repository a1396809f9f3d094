"""Models in Ollama's local store: found by name, read where they lie."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcache_core.errors import ModelError

OLLAMA_PREFIX = "ollama:"
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
# A user's own, then where the service keeps them.
_FOLDERS = (
    "~/.ollama/models",
    "/usr/share/ollama/.ollama/models",
    "/var/lib/ollama/.ollama/models",
)
_MODEL = "application/vnd.ollama.image.model"
_ADAPTER = "application/vnd.ollama.image.adapter"
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class _Manifest:
    """file: `manifests/host/namespace/model/tag` inside of the store's folder."""

    file: Path

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(part.casefold() for part in self.file.parts[-4:])

    @property
    def shown(self) -> str:
        """The name as one says it to Ollama."""
        host, namespace, model, tag = self.file.parts[-4:]
        place = "" if host == _HOST else f"{host}/"
        owner = "" if (host, namespace) == (_HOST, _NAMESPACE) else f"{namespace}/"
        return f"{place}{owner}{model}:{tag}"

    @property
    def store(self) -> Path:
        return self.file.parents[4]


def ollama_file(name: str) -> Path:
    """Return the GGUF file of `ollama:NAME[:TAG]`. Starts nothing and downloads nothing.

    Looks into OLLAMA_MODELS, else into the usual folders.
    Raises: ModelError: there is no such model, or the store is damaged.
    """
    wanted = _key(name.removeprefix(OLLAMA_PREFIX))
    folders = _folders()
    # Names are compared with what is there and never made a path of, so none leads elsewhere.
    found = [m for folder in folders for m in _manifests(folder)]
    for manifest in found:
        if manifest.key == wanted:
            return _blob(manifest)
    there = ", ".join(sorted({manifest.shown for manifest in found})) or "no model"
    raise ModelError(
        f"Ollama has no model {name.removeprefix(OLLAMA_PREFIX)!r} in "
        f"{' or '.join(map(str, folders))}; there is {there}. Get it with `ollama pull`, or name "
        "the store's folder in OLLAMA_MODELS"
    )


def _key(name: str) -> tuple[str, ...]:
    path, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        path, tag = name, _TAG
    parts = path.split("/")
    defaults = [_HOST, _NAMESPACE]
    return tuple(part.casefold() for part in (*defaults[: max(3 - len(parts), 0)], *parts, tag))


def _folders() -> list[Path]:
    given = os.environ.get("OLLAMA_MODELS")
    return [Path(folder).expanduser() for folder in ((given,) if given else _FOLDERS)]


def _manifests(folder: Path) -> list[_Manifest]:
    files = sorted((folder / "manifests").glob("*/*/*/*"))
    return [_Manifest(file) for file in files if file.is_file() and not file.name.startswith(".")]


def _blob(manifest: _Manifest) -> Path:
    layers = _layers(manifest)
    kinds = [layer.get("mediaType") for layer in layers]
    if _ADAPTER in kinds:
        raise ModelError(
            f"Ollama's model {manifest.shown} is changed by an adapter, which is not applied here; "
            "merge it into the model"
        )
    models = [layer for layer, kind in zip(layers, kinds, strict=True) if kind == _MODEL]
    if len(models) != 1:
        raise ModelError(
            f"Ollama's model {manifest.shown} has {len(models)} files of weights, and one is "
            "expected; take a model in one GGUF file"
        )
    digest = _DIGEST.fullmatch(str(models[0].get("digest")))
    if digest is None:
        raise _damaged(manifest, "it names no SHA-256 of the weights")
    file = manifest.store / "blobs" / f"sha256-{digest[1]}"
    if not file.is_file():
        raise _damaged(manifest, f"{file} is not there")
    size = models[0].get("size")
    if isinstance(size, int) and file.stat().st_size != size:
        raise _damaged(manifest, f"{file} has {file.stat().st_size:,} bytes instead of {size:,}")
    return file


def _layers(manifest: _Manifest) -> list[dict[str, Any]]:
    try:
        layers = json.loads(manifest.file.read_bytes())["layers"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(manifest, "it can't be read, or is not a manifest") from error
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise _damaged(manifest, "it lists no layers")
    return layers


def _damaged(manifest: _Manifest, reason: str) -> ModelError:
    return ModelError(
        f"Ollama's manifest {manifest.file} is damaged: {reason}; get the model again with "
        f"`ollama pull {manifest.shown}`"
    )
