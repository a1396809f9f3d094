"""Loading a GGUF file's model through transformers, its weights dequantised."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pcache_core.errors import DependencyError, ModelError
from pcache_core.lm.gguf_config import complete_config, complete_tokenizer, ends_of_turn
from pcache_core.lm.gguf_file import Header, long_list, read_header

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
_PACKAGES = ("gguf", "accelerate")
# Rotary frequencies, which are computed, and what predicts further tokens, which isn't used.
_NOT_WEIGHTS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
_told: set[str] = set()


def load_gguf(
    path: Path, name: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer of a GGUF file.

    dtype: of the weights; None for bfloat16 where the device computes in it, else float32.
    Raises: ModelError: it can't be loaded. DependencyError: a package it needs is not installed.
    """
    header = _header(path)
    tokenizer = load_gguf_tokenizer(path, name)
    with _reading(header, name) as options, _read_once():
        config = AutoConfig.from_pretrained(**options)
        complete_config(config, header, ends_of_turn(tokenizer))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **options,
            config=config,
            dtype=dtype or (torch.bfloat16 if _computes_bfloat16(device) else torch.float32),
            output_loading_info=True,
            **_dense(),
        )
    model, found = loaded
    _check_complete(header, model, found)
    # These name the file's folder, and say nothing of the weights as they are now.
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    _tell_size(header, model, name)
    return model.eval().to(device), tokenizer


def load_gguf_tokenizer(path: Path, name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone. Raises: as `load_gguf`."""
    header = _header(path)
    with _reading(header, name) as options:
        # Not by way of AutoTokenizer, which reads the file once more, for a class to choose by.
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(**options)
        unknown = complete_tokenizer(tokenizer, header)
    if len(tokenizer) == 0:
        raise ModelError(f"model {name!r} has no tokenizer: its vocabulary is empty")
    if unknown is not None:
        logger.warning(
            "%s splits text in a way (%s) that is unknown here, so it is split as GPT-2 does: some "
            "text may get other tokens than the model was trained with",
            name,
            unknown,
        )
    return tokenizer


def _header(path: Path) -> Header:
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise DependencyError(
            f"{path.name} is a GGUF file, which needs {' and '.join(missing)}: "
            "pip install 'pcache-integrations[gguf]'"
        )
    return read_header(path)


def _dense() -> dict[str, Any]:
    """Have weights unpacked: otherwise layers are exchanged where `kernels` is installed."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def _reading(header: Header, name: str) -> Iterator[dict[str, Any]]:
    """Give `from_pretrained` the file and an empty folder, so that nothing beside is read.

    Errors of transformers become one that names the architecture.
    """
    try:
        with TemporaryDirectory() as folder:
            yield {
                "pretrained_model_name_or_path": folder,
                "gguf_file": str(header.path.absolute()),
                "trust_remote_code": False,
            }
    except ModelError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = lines[0].rstrip(".")[:300] if lines else type(error).__name__
        raise ModelError(
            f"model {name!r} can't be loaded: transformers {transformers.__version__} does not "
            f"read this GGUF file of architecture {header.architecture!r} ({said}); take a newer "
            "transformers, or the model in safetensors"
        ) from error


@contextmanager
def _read_once() -> Iterator[None]:
    """Have transformers' reader parse a file once instead of twice, with a bar on terminals alone.

    It builds the table of names for each of the model's modules, too, and an array for each token
    of the vocabulary, of which nothing is needed here but their number. Of a large vocabulary, all
    this takes most of a minute.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reader

    class Reader(gguf.GGUFReader):
        """Keeps the lengths of long lists alone."""

        def _get_field_parts(
            self, orig_offs: int, raw_type: int
        ) -> tuple[int, list[Any], list[int], list[Any]]:
            found = long_list(self.data.data, orig_offs, raw_type)
            if found is None:
                return super()._get_field_parts(orig_offs, raw_type)
            count, num_bytes = found
            return num_bytes, [np.array([count])], [0] * count, [gguf.GGUFValueType.UINT64]

    changes: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", lru_cache(1)(Reader)),
        (gguf, "get_tensor_name_map", lru_cache(1)(gguf.get_tensor_name_map)),
        (reader, "tqdm", partial(tqdm, disable=None)),
    ]
    with ExitStack() as undo:
        for module, attribute, value in changes:
            undo.callback(setattr, module, attribute, getattr(module, attribute))
            setattr(module, attribute, value)
        yield


def _check_complete(header: Header, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raises: ModelError: some of the model is not in the file, or some of the file not in it."""
    absent = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    if absent:
        raise ModelError(
            f"{header.path} can't be loaded: transformers finds no {absent[0]} in this file of "
            f"architecture {header.architecture!r} ({len(absent)} weights are missing); take the "
            "model in safetensors"
        )
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    in_file = sum(
        tensor.elements
        for tensor in header.tensors.values()
        if not tensor.name.startswith(_NOT_WEIGHTS) and not tensor.name.startswith(f"blk.{layers}.")
    )
    weights = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if in_file > sum(weights.values()):
        raise ModelError(
            f"{header.path} can't be loaded: it has {in_file:,} weights, of which transformers "
            f"reads {sum(weights.values()):,}, so its answers would be wrong; take the model in "
            "safetensors"
        )


def _tell_size(header: Header, model: PreTrainedModel, name: str) -> None:
    """Say once what the weights take in memory, which is several times the file's size."""
    if str(header.path) in _told:
        return
    _told.add(str(header.path))
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    logger.warning(
        "%s: the weights take %.2f GB of memory as %s (%.2f GB in the file)",
        name,
        sum(weights.values()) / 1e9,
        str(model.dtype).removeprefix("torch."),
        header.path.stat().st_size / 1e9,
    )


def _computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 itself, instead of by way of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    names = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
    found = [
        getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")
    ]
    return any(able.get(name) for name in names) or any(check() for check in found if check)
