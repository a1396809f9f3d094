"""What a vLLM server is started with, so that it fills prompts from module states."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pcache_core.errors import ModelError, OptionError

if TYPE_CHECKING:
    from pcache_core import CausalLM

logger = logging.getLogger(__name__)


def server_options(
    model: str, dtype: str, store: str, namespace: str, preamble: Path | None
) -> list[str]:
    """Return options of vLLM's, the connector's among them.

    Raises: ModelError: vLLM can't be served this model's states. OptionError: no such store, or no
        preamble in the file.
    """
    from pcache_core import CausalLM, Preamble
    from pcache_core.kv.key import KeySpace
    from pcache_core.lm.loading import resolve
    from pcache_integrations._stores import check_store
    from pcache_integrations.vllm.model_card import ModelCard

    if store == "memory":
        raise OptionError("store='memory' is no other process's; give a folder or a server's URL")
    check_store(store)
    KeySpace("", "", namespace)  # refuses a name that is none
    chosen = {} if preamble is None else {"preamble": asdict(Preamble.of_file(preamble))}
    lm = CausalLM.from_pretrained(model, dtype=dtype, device="cpu")
    card = ModelCard.of(lm)
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
        source = str(_as_folder(lm))
    return [
        *("--model", source),
        *("--served-model-name", model),
        *("--dtype", card.dtype),
        "--disable-hybrid-kv-cache-manager",
        "--enable-prompt-tokens-details",
        *("--structured-outputs-config", json.dumps({"backend": "guidance"})),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]


def _as_folder(lm: CausalLM) -> Path:
    """Write a GGUF file's model as a folder into the user's cache, once; return the folder.

    vLLM would compute with the file's packed weights, in another way than states are encoded.

    Raises: ModelError: it can't be written.
    """
    from pcache_core.lm.loading import save

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    dtype = str(lm.dtype).removeprefix("torch.")
    folder = cache / "pcache-integrations" / "models" / f"{lm.fingerprint}-{dtype}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as unfinished:
            made = Path(unfinished, "model")
            save(lm.model, lm.tokenizer, made)
            made.rename(folder)
    except OSError as error:
        if folder.is_dir():  # another process was sooner
            return folder
        raise ModelError(
            f"{lm.name} can't be written to {folder} for vLLM ({error.strerror}); make room there, "
            "or name another cache directory by XDG_CACHE_HOME"
        ) from error
    logger.warning("%s was written to %s, as vLLM reads it", lm.name, folder)
    return folder
