"""`benchmarks/`: other libraries read the same ids and answer as the model, or have a line."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import peers
import worker
from gguf_file import write_gguf
from pcache_core import CausalLM, OptionError, PromptCacheEngine
from pcache_integrations.bench.workload import Workload

_SMALL = (
    *("--random", "llama-tiny", "--dtype", "float32", "--cached", "96", "--modes", "fast"),
    *("--documents", "4", "--question-tokens", "8", "--answer-tokens", "3", "--rounds", "2"),
)
_HEADS, _KV_HEADS, _HEAD_DIM, _HIDDEN = 4, 2, 32, 128


def program(file: Path, *lines: str) -> Path:
    """A shell script in the place of an interpreter."""
    file.write_text("\n".join(("#!/bin/sh", *lines, "")))
    file.chmod(0o755)
    return file


def greedy(lm: CausalLM, prompt_ids: list[int], count: int) -> list[int]:
    """By the whole model over the whole text, token by token."""
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(count):
            logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def test_what_runs_has_rows_and_what_is_missing_or_dies_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = program(tmp_path / "missing", 'read line; echo \'{"missing": ["llama_cpp"], '
                      '"version": ""}\'; read line')  # fmt: skip
    dying = program(
        tmp_path / "dying",
        'read line; echo \'{"missing": [], "version": "dying 1.0"}\'',
        "read line; echo '{}'",
        'read line; echo "out of luck" >&2; exit 3',
    )
    named = ("transformers", f"llama-cpp={missing}", f"vllm={dying}")
    plot = tmp_path / "bench.svg"
    peers.main([*_SMALL, *(f"--peer={peer}" for peer in named), f"--plot={plot}", "--json"])
    figures = json.loads(capsys.readouterr().out)
    theirs = {row["order"]: row for row in figures["rows"] if row["kind"] == "peer"}
    assert {row["way"] for row in theirs.values()} == {"transformers generate"}
    opening, documents = 10, 106  # the opening has the beginning-of-sequence token
    assert theirs["cold"]["cached_tokens"] == 0
    assert theirs["new"]["cached_tokens"] < opening + 24
    assert documents <= theirs["same"]["cached_tokens"] < documents + 8
    assert len({row["prompt_tokens"] for row in figures["rows"]}) == 1
    ran, absent, dead = figures["peers"]
    assert (ran["problem"], ran["note"]) == (None, "the first token of off in 3 of 3 short prompts")
    assert "not installed; pip install llama-cpp-python" in absent["problem"]
    assert dead["problem"] == "its process ended in run: out of luck"
    assert "transformers generate, same order" in plot.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peer", "psychic"], "no peer 'psychic'; there is transformers"),
        (["--peer", "vllm=/nowhere/python"], "/nowhere/python is not a program"),
        (["--gguf", "/nowhere/model.gguf"], "/nowhere/model.gguf is not a file"),
        (["--gguf-type", "q1"], "invalid choice: 'q1'"),
        (["--plot", "bench.txt"], "must be an .svg or .png"),
        (["--plot", "/nowhere/bench.svg"], "in a folder that is there"),
    ],
)
def test_what_can_not_be_compared_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        peers.parse_arguments(arguments)
    assert said in capsys.readouterr().err


def test_the_commands_of_the_docs_are_understood() -> None:
    page = (Path(peers.__file__).parent.parent / "docs" / "speed.md").read_text("utf-8")
    commands = re.findall(r"^\$ python benchmarks/peers.py((?:.*\\\n)*.*)$", page, flags=re.M)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(re.sub(r"\\\n|docs/", "", command).replace("PYTHON", sys.executable))
        assert set(peers.parse_arguments(words).interpreters) == {
            "transformers",
            "vllm",
            "llama-cpp",
        }


@pytest.fixture
def folder(tiny_llama: CausalLM, tmp_path: Path) -> Path:
    tiny_llama.model.save_pretrained(tmp_path)
    tiny_llama.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(params=list(worker.LIBRARIES))
def peer(request: pytest.FixtureRequest) -> Iterator[peers.Peer]:
    with peers.started({request.param: sys.executable}) as (found,):
        if found.problem is not None:
            pytest.skip(f"{request.param} is not installed here")
        yield found


def test_a_library_reads_the_same_prompt_and_answers_as_the_model(
    peer: peers.Peer, tiny_llama: CausalLM, folder: Path
) -> None:
    model = folder
    if peer.package.gguf:
        model = folder / "model.gguf"
        write_gguf(tiny_llama, model, "f32")
    peer.load(worker.LoadOptions(str(model), 1, "float32", "cpu", 512, 2**26))
    engine = PromptCacheEngine(tiny_llama)
    prompts = Workload(tiny_llama, 0, documents=4, document_tokens=48, question_tokens=9).round()
    for prompt, cached in ((prompts.first, 0), (prompts.same, 202), (prompts.new, 10)):
        ids = list(engine.tokenise(prompt).token_ids)
        answer = peer.run(ids, prompt.text, 4)
        if peer.package.takes_ids:
            assert answer["tokens"] == greedy(tiny_llama, ids, 4)
        if peer.package.keeps_prefix:
            assert cached - 128 < answer["cached_tokens"] < cached + 8  # vLLM counts in blocks
        assert answer["ttft_ms"] > 0
        assert answer["decode_tokens_per_s"] > 0
    peer.reset()
    assert peer.run(ids, prompt.text, 1)["cached_tokens"] == 0


def test_a_failure_is_said_and_the_worker_goes_on(folder: Path) -> None:
    with peers.started({"transformers": sys.executable}) as (peer,):
        with pytest.raises(peers.PeerError, match="load failed: OSError"):
            peer.load(worker.LoadOptions(str(folder / "none"), 1, "float32", "cpu", 512, 0))
        peer.load(worker.LoadOptions(str(folder), 1, "float32", "cpu", 512, 0))
        assert peer.run(range(5, 105), "", 1)["prompt_tokens"] == 100


@pytest.mark.parametrize(("name", "most"), [("transformers", 100), ("langchain", 102)])
def test_another_number_of_tokens_does_not_compare(name: str, most: int, tmp_path: Path) -> None:
    replies = ({"missing": [], "version": ""}, {"prompt_tokens": most}, {"prompt_tokens": most + 1})
    lines = (f"read line; echo '{json.dumps(reply)}'" for reply in replies)
    with peers.started({name: str(program(tmp_path / "python", *lines))}) as (peer,):
        assert peer.run(range(100), "", 1) == {"prompt_tokens": most}
        with pytest.raises(peers.PeerError, match=f"read {most + 1} tokens of a prompt of 100"):
            peer.run(range(100), "", 1)


def test_a_worker_is_ended_once_as_its_number_may_be_anothers_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda *of: (ended.append(of[0]), kill(*of)))
    with peers.started({"langchain": sys.executable}) as (peer,):
        peer.close()
    assert ended == [peer.pid]


def test_an_interrupt_leaves_no_worker_behind() -> None:
    pids = []

    def interrupted() -> None:
        with peers.started({"vllm": sys.executable, "langchain": sys.executable}) as found:
            pids.extend(peer.pid for peer in found)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_worker_imports_only_libraries_and_the_standard_library() -> None:
    nodes = list(ast.walk(ast.parse(Path(worker.__file__).read_text("utf-8"))))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    known = {name for library in worker.LIBRARIES.values() for name in library.modules}
    assert {name.partition(".")[0] for name in names} <= known | set(sys.stdlib_module_names)


# --- the GGUF file --------------------------------------------------------------------------------


def read(file: Path) -> dict[str, NDArray[np.float32]]:
    """Tensors by name, in fp32."""
    tensors = gguf.GGUFReader(file).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}


def rotate_pairs(rows: NDArray[np.float64], position: int) -> NDArray[np.float64]:
    """llama.cpp's layout: dimensions 2i and 2i + 1 are turned together. [heads, head_dim]."""
    angles = position * 10_000.0 ** (-np.arange(0, _HEAD_DIM, 2) / _HEAD_DIM)
    pairs = rows[:, 0::2] + 1j * rows[:, 1::2]
    turned = pairs * np.exp(1j * angles)
    return np.stack((turned.real, turned.imag), -1).reshape(rows.shape)


def test_attention_scores_are_those_of_the_model(tiny_llama: CausalLM, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "model.gguf", "f32")
    tensors = read(tmp_path / "model.gguf")
    x = np.random.default_rng(0).standard_normal((2, _HIDDEN))
    positions = (3, 11)
    layer = tiny_llama.model.model.layers[1].self_attn
    with torch.no_grad():
        hidden = torch.tensor(x, dtype=torch.float32)[None]
        query = layer.q_proj(hidden).view(1, 2, _HEADS, _HEAD_DIM).transpose(1, 2)
        key = layer.k_proj(hidden).view(1, 2, _KV_HEADS, _HEAD_DIM).transpose(1, 2)
        cos, sin = tiny_llama.model.model.rotary_emb(hidden, torch.tensor([positions]))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        expected = query[0, :, 1] @ key[0, 0, 0]
    key_rows = (tensors["blk.1.attn_k.weight"] @ x[0]).reshape(_KV_HEADS, _HEAD_DIM)
    query_rows = (tensors["blk.1.attn_q.weight"] @ x[1]).reshape(_HEADS, _HEAD_DIM)
    scores = rotate_pairs(query_rows, positions[1]) @ rotate_pairs(key_rows, positions[0])[0]
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("gguf_type", "error"), [("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2)]
)
def test_every_weight_is_there_as_precisely_as_asked(
    tiny_llama: CausalLM, tmp_path: Path, gguf_type: str, error: float
) -> None:
    write_gguf(tiny_llama, tmp_path / "model.gguf", gguf_type)
    tensors = read(tmp_path / "model.gguf")
    parameters = dict(tiny_llama.model.named_parameters())
    assert sum(t.size for t in tensors.values()) == sum(p.numel() for p in parameters.values())
    for name, parameter in {
        "token_embd.weight": parameters["model.embed_tokens.weight"],
        "output.weight": parameters["lm_head.weight"],
        "blk.0.ffn_down.weight": parameters["model.layers.0.mlp.down_proj.weight"],
        "blk.1.attn_output.weight": parameters["model.layers.1.self_attn.o_proj.weight"],
        "blk.1.ffn_norm.weight": parameters["model.layers.1.post_attention_layernorm.weight"],
    }.items():
        expected = parameter.detach().numpy()
        difference = np.linalg.norm(tensors[name] - expected) / np.linalg.norm(expected)
        assert difference <= error, name
    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    llama = {n.removeprefix("llama."): v for n, v in fields.items() if n.startswith("llama.")}
    assert llama == {
        "vocab_size": 32_000,
        "context_length": 1024,
        "embedding_length": _HIDDEN,
        "block_count": 2,
        "feed_forward_length": 256,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": _KV_HEADS,
        "attention.key_length": _HEAD_DIM,
        "attention.value_length": _HEAD_DIM,
        "rope.dimension_count": _HEAD_DIM,
        "rope.freq_base": 10_000.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }


def test_what_is_not_a_plain_llama_is_refused(tmp_path: Path) -> None:
    lm = CausalLM.from_pretrained("builtin:tiny-rag")
    lm.model.config.rope_parameters["rope_type"] = "linear"
    with pytest.raises(OptionError, match="give a file of it: --gguf FILE"):
        write_gguf(lm, tmp_path / "model.gguf", "q8_0")
