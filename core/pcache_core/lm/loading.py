"""Loading models and tokenizers, with errors that say what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from pcache_core.errors import ModelError, OptionError

BUILTIN_PREFIX = "builtin:"
_BUILTIN_ROOT = Path(__file__).parent.parent / "models"
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_LONGEST_NAME = 1024
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer. Raises: ModelError, OptionError."""
    source = resolve(name)
    torch_dtype = _dtype(dtype)
    torch_device = _device(device)
    if not Path(source).is_dir():
        _check_hub(name)
    tokenizer = load_tokenizer(name, source)
    try:
        with _bar_on_terminals_only():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype)
        return model.eval().to(torch_device), tokenizer
    except Exception as error:
        raise ModelError(
            f"model {name!r} can't be loaded: {_first_line(error)}. Give a causal language model: "
            f"a directory written by save_pretrained, a hub id, or {_builtin_names()}"
        ) from error


@contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """Silence transformers' loading bar where it would end up in a log."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def resolve(name: str) -> str:
    """The directory of a built-in model or of a path, or the hub id as it is.

    Raises: ModelError: no such built-in model; a directory without configuration or weights.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME:
        raise ModelError(
            f"model {name!r} is not a name; give a path, a hub id or {_builtin_names()}"
        )
    if name.startswith(BUILTIN_PREFIX):
        folder = _BUILTIN_ROOT / name.removeprefix(BUILTIN_PREFIX)
        if folder.parent != _BUILTIN_ROOT or not (folder / "config.json").is_file():
            raise ModelError(f"unknown built-in model {name!r}; there is {_builtin_names()}")
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_directory(folder)
        return str(folder)
    if folder.exists() or name.startswith((".", "/", "~")):
        raise ModelError(f"model path {name!r} is not a directory; give the folder it was saved to")
    return name


def _check_directory(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json, so it holds no model; give the folder that "
            "save_pretrained wrote"
        )
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        raise ModelError(
            f"{folder} has a configuration but no weights (*.safetensors); copy the weights there "
            "or save the model again"
        )


def _check_hub(name: str) -> None:
    """Raises: ModelError: neither the hub nor its local copies have the model.

    Asked once and first, because loading retries for a minute where there is no network.
    """
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=20)
    except Exception as error:
        raise ModelError(
            f"model {name!r} is neither a directory here nor a model that the hub gives: "
            f"{_first_line(error)}. Give a path, a hub id or {_builtin_names()}"
        ) from error


def load_tokenizer(name: str, source: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, from where its name was resolved to. Raises: ModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ModelError(
            f"model {name!r} has no tokenizer that can be loaded: {_first_line(error)}. Save it "
            "there with tokenizer.save_pretrained, or use CausalLM(model, tokenizer)"
        ) from error
    if len(tokenizer) == 0:
        raise ModelError(
            f"model {name!r} has no tokenizer: its vocabulary is empty. Save one there with "
            "tokenizer.save_pretrained, or pass both to CausalLM(model, tokenizer)"
        )
    return tokenizer


def _dtype(name: str) -> torch.dtype | str:
    if name == "auto":
        return "auto"
    if name not in _DTYPES:
        raise OptionError(f"unknown dtype {name!r}; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"unknown device {name!r}; use auto, cpu or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {name!r} asked for, but torch finds no GPU; use auto or cpu")
    return device


def _builtin_names() -> str:
    names = sorted(folder.parent.name for folder in _BUILTIN_ROOT.glob("*/config.json"))
    return ", ".join(f"{BUILTIN_PREFIX}{name}" for name in names)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__
