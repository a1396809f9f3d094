"""Models in Ollama's store are found by name; nothing else in it is ever opened."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import gguf_models
from pcache_core import CausalLM, ModelError
from pcache_core.lm.loading import resolve

MODEL = "application/vnd.ollama.image.model"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_models.write(
        gguf_models.build("llama"), tmp_path_factory.mktemp("weights") / "m.gguf"
    )


class Store:
    """A store in Ollama's layout, with blobs by digest and a manifest for each name."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.folder = folder
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        self.blob = folder / "blobs" / f"sha256-{digest}"
        self.blob.parent.mkdir(parents=True)
        shutil.copy(weights, self.blob)
        self.layer = {
            "mediaType": MODEL, "digest": f"sha256:{digest}", "size": self.blob.stat().st_size,
        }  # fmt: skip

    def add(self, place: str, layers: Any = None) -> Path:
        file = self.folder / "manifests" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        parameters = {"mediaType": "application/vnd.ollama.image.params", "digest": "sha256:0"}
        manifest = {"schemaVersion": 2, "layers": layers or [parameters, self.layer]}
        file.write_text(json.dumps(manifest))
        return file


@pytest.fixture
def store(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    made = Store(tmp_path / "models", weights)
    made.add("registry.ollama.ai/library/tiny/latest")
    made.add("registry.ollama.ai/library/tiny/1b-q4")
    made.add("registry.ollama.ai/someone/tiny/latest")
    made.add("hf.co/user/repo-GGUF/Q4_K_M")
    return made


def test_a_model_loads_and_keeps_the_name_it_was_asked_by(store: Store) -> None:
    lm = CausalLM.from_pretrained("ollama:tiny")
    assert lm.name == "ollama:tiny"
    assert lm.tokenizer.chat_template == gguf_models.CHAT_TEMPLATE
    assert lm.fingerprint == CausalLM.from_pretrained(store.blob, dtype="auto").fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "tiny", "tiny:latest", "Tiny:LATEST", "tiny:1b-q4", "library/tiny", "someone/tiny",
        "hf.co/user/repo-GGUF:Q4_K_M", "registry.ollama.ai/library/tiny:latest",
    ],
)  # fmt: skip
def test_every_way_to_say_a_name_is_understood(store: Store, name: str) -> None:
    assert resolve(f"ollama:{name}") == str(store.blob)


def test_without_the_variable_the_users_own_folder_is_looked_into(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ollama").mkdir()
    store.folder.rename(tmp_path / ".ollama" / "models")
    assert Path(resolve("ollama:tiny")).parent == tmp_path / ".ollama" / "models" / "blobs"


@pytest.mark.parametrize(
    "name",
    ["other", "tiny:2b", "", ":", "../../blobs/x", "library/../tiny", "tiny:../latest", "/tiny"],
)
def test_an_unknown_name_is_an_error_that_lists_what_is_there(store: Store, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(f"ollama:{name}")
    listed = "hf.co/user/repo-GGUF:Q4_K_M, someone/tiny:latest, tiny:1b-q4, tiny:latest"
    assert f"there is {listed}" in str(caught.value)


def test_an_empty_store_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    with pytest.raises(ModelError, match="there is no model"):
        resolve("ollama:tiny")


@pytest.mark.parametrize(
    "digest", ["sha256:../../../etc/passwd", "sha256:" + "0" * 64, "md5:0", "", None]
)
def test_a_digest_that_names_no_blob_is_refused(store: Store, digest: str | None) -> None:
    store.add("registry.ollama.ai/library/tiny/latest", [{**store.layer, "digest": digest}])
    with pytest.raises(ModelError, match="manifest .* is damaged: .* pull tiny:latest"):
        resolve("ollama:tiny")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"layers": 3}', b'{"layers": [1]}'])
def test_a_damaged_manifest_is_an_error(store: Store, content: bytes) -> None:
    store.add("registry.ollama.ai/library/tiny/latest").write_bytes(content)
    with pytest.raises(ModelError, match="manifest .* is damaged"):
        resolve("ollama:tiny")


def test_weights_of_another_size_are_refused(store: Store) -> None:
    store.blob.write_bytes(store.blob.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"has [\d,]+ bytes instead of [\d,]+"):
        resolve("ollama:tiny")


def test_a_model_with_an_adapter_or_in_parts_is_refused(store: Store) -> None:
    adapter = {**store.layer, "mediaType": "application/vnd.ollama.image.adapter"}
    store.add("registry.ollama.ai/library/tiny/latest", [store.layer, adapter])
    with pytest.raises(ModelError, match="changed by an adapter"):
        resolve("ollama:tiny")
    store.add("registry.ollama.ai/library/tiny/latest", [store.layer, store.layer])
    with pytest.raises(ModelError, match="has 2 files of weights"):
        resolve("ollama:tiny")
