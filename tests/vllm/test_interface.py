"""What vLLM's sources say of what the connector uses: a test that fails names what has moved."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_server import ROOT, interpreter

_BASE = "distributed/kv_transfer/kv_connector/v1/base.py"
USED = {
    (_BASE, "KVConnectorBase_V1"): (
        "_vllm_config _kv_transfer_config _kv_cache_manager _get_connector_metadata"
    ),
    (_BASE, ""): "KVConnectorMetadata KVConnectorRole",
    ("config/kv_transfer.py", "KVTransferConfig"): (
        "kv_connector kv_connector_module_path kv_role kv_load_failure_policy "
        "kv_connector_extra_config"
    ),
    ("config/compilation.py", "CompilationConfig"): "static_forward_context",
    ("config/cache.py", "CacheConfig"): "block_size",
    ("config/scheduler.py", "SchedulerConfig"): "disable_hybrid_kv_cache_manager",
    ("config/vllm.py", "VllmConfig"): "structured_outputs_config kv_transfer_config",
    ("distributed/parallel_state.py", ""): "get_tensor_model_parallel_rank",
    ("model_executor/models/utils.py", ""): "extract_layer_index",
    ("model_executor/layers/attention/attention.py", "Attention"): (
        "num_kv_heads head_size kv_cache impl"
    ),
    ("v1/core/kv_cache_manager.py", "KVCacheManager"): "get_block_ids",
    ("v1/core/kv_cache_manager.py", "KVCacheBlocks"): "get_block_ids",
    ("v1/core/sched/output.py", "SchedulerOutput"): (
        "num_scheduled_tokens scheduled_new_reqs scheduled_cached_reqs"
    ),
    ("v1/core/sched/output.py", "NewRequestData"): "req_id num_computed_tokens",
    ("v1/core/sched/output.py", "CachedRequestData"): "req_ids num_computed_tokens",
    ("v1/request.py", "Request"): (
        "request_id prompt_token_ids num_prompt_tokens kv_transfer_params cache_salt mm_features "
        "lora_request"
    ),
    ("entrypoints/openai/completion/protocol.py", "CompletionRequest"): (
        "prompt cache_salt kv_transfer_params return_token_ids return_tokens_as_token_ids "
        "structured_outputs stop_token_ids top_k min_p repetition_penalty"
    ),
}


@pytest.fixture(scope="module")
def sources() -> Path:
    """The package's folder, from which nothing is imported."""
    found = Path(interpreter()).parent.parent.glob("lib/python3*/site-packages/vllm")
    return next(found)


def body(file: Path, name: str) -> ast.Module | ast.ClassDef:
    """A module's syntax tree, or that of a class in it; empty where there is none."""
    tree = ast.parse(file.read_text("utf-8") if file.is_file() else "")
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return next(classes, ast.Module([], [])) if name else tree


def names_in(tree: ast.Module | ast.ClassDef) -> Iterator[str]:
    """What a module or a class defines, and what a class's methods set."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def methods(tree: ast.Module | ast.ClassDef) -> dict[str, tuple[list[str], bool]]:
    """Each method's parameters, and whether it is abstract."""
    return {
        node.name: (
            [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)],
            any("abstractmethod" in ast.unparse(each) for each in node.decorator_list),
        )
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def moved(sources: Path) -> list[str]:
    """What the connector uses of vLLM and is no longer there, in words."""
    found = [
        f"{file}: {'no ' + name if name else 'nothing'} that has {used}"
        for (file, name), names in USED.items()
        for used in sorted(set(names.split()) - set(names_in(body(sources / file, name))))
    ]
    base = methods(body(sources / _BASE, "KVConnectorBase_V1"))
    connector = ROOT / "pcache_integrations/vllm/connector.py"
    ours = methods(body(connector, "PromptCacheConnector"))
    for name, (parameters, _) in ours.items():
        theirs, _ = base.get(name, (None, False))
        if theirs != parameters:
            found.append(f"{_BASE}: {name} takes {theirs}, the connector's {parameters}")
    missing = [name for name, (_, is_abstract) in base.items() if is_abstract and name not in ours]
    found += [f"{_BASE}: {name} is asked of connectors, and ours has none" for name in missing]
    backends = list((sources / "v1/attention/backends").glob("*_attn.py"))
    updates = [
        (f"{file.name}: {node.name}", methods(node)["do_kv_cache_update"][0])
        for file in backends
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and "do_kv_cache_update" in methods(node)
    ]
    wanted = ["self", "layer", "key", "value", "kv_cache", "slot_mapping"]
    if not any(name.startswith("cpu_attn.py") for name, _ in updates):
        found.append("v1/attention/backends/cpu_attn.py: no do_kv_cache_update")
    found += [f"{name} takes {taken} to write" for name, taken in updates if taken != wanted]
    return found


def test_what_the_connector_uses_of_vllm_is_where_it_was(sources: Path) -> None:
    version = re.search(r"version = '([^']+)'", (sources / "_version.py").read_text("utf-8"))
    assert version is not None
    assert moved(sources) == [], f"the connector interface of vLLM {version[1]} has moved"


def test_what_has_moved_is_named(tmp_path: Path, sources: Path) -> None:
    base = tmp_path / _BASE
    base.parent.mkdir(parents=True)
    text = (sources / _BASE).read_text("utf-8").replace("num_computed_tokens", "computed")
    base.write_text(text.replace("self._kv_cache_manager", "self._manager"), "utf-8")
    said = "\n".join(moved(tmp_path))
    assert "get_num_new_matched_tokens takes ['self', 'request', 'computed'], the conn" in said
    assert "no KVConnectorBase_V1 that has _kv_cache_manager" in said
    assert "v1/request.py: no Request that has cache_salt" in said
