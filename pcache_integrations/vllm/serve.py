"""What a vLLM server is started with, so that it fills prompts from module states."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pcache_core.errors import ModelError, OptionError


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
