"""The command line as a newcomer meets it: its help, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from command import pcache
from pcache_core import ModelError, PromptCacheError, StoreError
from pcache_integrations import cli
from pcache_integrations.cli.errors import explain

ROOT = Path(__file__).parent.parent
COMMANDS = [str(command.name) for command in cli.app.registered_commands]


TINY = ("--model", "builtin:tiny-rag")


def run(*arguments: str | Path) -> tuple[int, str]:
    """In this process: the exit status, and what is printed or, for our own errors, said."""
    done = CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(done.exception, PromptCacheError):
        return 2, str(explain(done.exception))
    if not isinstance(done.exception, SystemExit | None):
        raise done.exception
    return done.exit_code, done.output


def test_help_names_every_command_and_the_exit_statuses() -> None:
    status, text = run("--help")
    assert status == 0
    assert set(COMMANDS) >= {"demo", "eval", "encode", "inspect", "clear", "schema"}
    for command in COMMANDS:
        assert re.search(rf"^│ {command} ", text, flags=re.MULTILINE)
    assert "Exit status: 0 done; 1" in text
    assert "130 interrupted" in text


def test_versions_are_those_that_are_installed() -> None:
    status, text = run("--version")
    assert (status, text.split()[::2]) == (0, ["pcache-integrations", "torch", "transformers"])
    assert text.split()[3] == torch.__version__


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example_with_options_that_it_knows(command: str) -> None:
    status, text = run(command, "--help")
    assert status == 0
    (example,) = re.findall(rf"Example: pcache {command} (.*)", text)
    for option in re.findall(r"--[a-z-]+", example):
        assert re.search(rf"{option}[ ,]", text.partition("Example:")[0]), option


def test_results_come_as_json_from_every_command_that_has_some() -> None:
    for command in set(COMMANDS) - {"schema", "serve"}:  # PML, and a command line
        assert "--json" in run(command, "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no.txt", "--store", "TMP/s"), "no.txt can't be read: No such file"),
        (("TMP/bad.txt", "--store", "TMP/s"), r"bad.txt is not UTF-8 text \(byte 3\); save it"),
        (("TMP/fields.jsonl", "--store", "TMP/s"), r"fields.jsonl:2: expected a string.*got the f"),
        (("TMP/cut.jsonl", "--store", "TMP/s"), r"cut.jsonl:1 is not JSON"),
        (("TMP/a.json", "--store", "TMP/s"), r"a.json: texts are read from JSON lines; write one"),
        (("TMP/empty", "--store", "TMP/s"), r"holds no file of texts \(.txt, .md, "),
        (("TMP/a.txt", "--store", "memory"), "ends with this process; give a folder"),
        (("TMP/a.txt", "--store", "memmory"), "did you mean 'memory'"),
        (("TMP/a.txt", "--store", "TMP/a.txt"), "no folder for states at .*: File exists; give a"),
        pytest.param(
            ("TMP/a.txt", "--store", "/proc"),
            "'/proc' can't be written: .*; give a folder of your",
            marks=pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux's /proc"),
        ),
        (("TMP/a.txt", "--store", "redis://127.0.0.1:1"), "server at redis://127.0.0.1:1 can't be"),
        (("TMP/a.txt", "--store", "redis://127.0.0.1:x"), "has a host or a port"),
        (("TMP/a.txt", "--store", "nosuch://x"), "Protocol not known: nosuch"),
        (("TMP/a.txt", "--store", "TMP/s", "--preamble", "TMP/q.txt"), "q.txt holds no preamble"),
        (("TMP/a.txt", "--store", "TMP/s", "--preamble", "TMP/no"), "no holds no preamble: .*No s"),
        (("TMP/a.txt", "--store", "TMP/s", "--model", "TMP"), "has no config.json"),
        (("TMP/a.txt", "--store", "TMP/s", "--storage-dtype", "int4"), "int4"),
        (("TMP/a.txt", "--store", "TMP/s", "--device", "tpu9"), "unknown device 'tpu9'; use auto"),
    ],
)
def test_encode_says_what_is_wrong_and_what_to_do(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("A text of more than eight words, so that it has a state.")
    (tmp_path / "q.txt").write_text("Read this.")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "fields.jsonl").write_text('\n{"foo": 1}\n')
    (tmp_path / "cut.jsonl").write_text('{"text": "not')
    status, text = run("encode", *TINY, *(each.replace("TMP", str(tmp_path)) for each in arguments))
    assert status == 2
    assert re.search(said, text), text
    assert not list(tmp_path.glob("s/*/*"))


def test_inspect_and_clear_say_that_a_server_is_no_folder(tmp_path: Path) -> None:
    for command in ("inspect", "clear"):
        status, text = run(command, "redis://localhost:6379/0")
        assert status == 2
        assert "is not a folder: inspect and clear work on folders" in text
        assert (
            "no folder of states at"
            in run(command, tmp_path / "none", *["--all"] * (command == "clear"))[1]
        )


def test_clear_tells_machines_what_it_removed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A text of more than eight words, so that it has a state.")
    assert run("encode", *TINY, tmp_path / "a.txt", "--store", tmp_path / "s")[0] == 0
    kept = sum(path.stat().st_size for path in tmp_path.glob("s/*/*"))
    status, text = run("clear", tmp_path / "s", "--all", "--yes", "--json")
    assert (status, json.loads(text)["bytes"]) == (0, kept)
    assert run("clear", tmp_path / "s", "--all", "--json")[1] == '{"removed": 0, "bytes": 0}\n'


# --- processes of their own ---------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    """Refuses every model: unknown ones, and those whose name says why."""

    def do_GET(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


ASK_FOR_ANOTHER_FIRST = """
import sys
from pcache_integrations.cli import main
try:
    main()
except SystemExit:
    sys.argv[-1] = "org/gated"
"""


def test_a_model_that_the_hub_does_not_give(hub: str, tmp_path: Path) -> None:
    asked = ("demo", "--model", "org/unknown")
    home = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = pcache(*asked, before=ASK_FOR_ANOTHER_FIRST, HF_ENDPOINT=hub, **home)
    unreachable = pcache(*asked, HF_ENDPOINT="http://127.0.0.1:1", **home)
    unknown, gated = done.stderr.split("error: ")[1:]
    for said in (unknown, unreachable.stderr.removeprefix("error: ")):
        assert said.startswith("model 'org/unknown' is neither a directory here nor a model")
    assert "The hub knows no such model, or it is private." in unknown
    assert "The model's owner wants to be asked first." in gated
    assert "The hub can't be reached from here" in unreachable.stderr
    assert "The hub can't be reached from here" in run(*asked)[1]  # tests are offline
    for each in (done, unreachable):
        assert (each.returncode, each.stdout) == (2, "")
        assert "Traceback" not in each.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_too_little_memory_is_said_in_a_sentence() -> None:
    limit = """
import mmap, resource
import pcache_integrations.cli, pcache_core.evaluation.evaluate
from pcache_core import CausalLM

CausalLM.from_pretrained("builtin:tiny-rag")  # everything is imported now
used = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**20, -1))
"""
    done = pcache("eval", *TINY, "--questions", "1", before=limit)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is not enough memory for this. Take a smaller")
    assert "Traceback" not in done.stderr


def test_a_server_without_its_package_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("A text.")
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "pcache_core.store.redis", raising=False)
    assert run("encode", *TINY, tmp_path / "a.txt", "--store", "redis://localhost") == (
        2, "RedisStore needs the redis package; pip install 'pcache-integrations[redis]'",
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_names_the_python_that_it_needs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    old.chmod(0o700)
    done = subprocess.run(
        ["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"Python 3.11 or newer is needed, and {old} is Python 3.9.2; name another" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_errors_that_nobody_foresaw_are_not_explained_away() -> None:
    assert explain(ValueError("a bug")) is None
    assert explain(RuntimeError("a bug")) is None
    assert explain(StoreError("full")) == "full"
    assert explain(OSError(28, "No space left on device", "plot.svg")) == (
        "plot.svg: No space left on device"
    )
    error = ModelError("model 'x' can't be loaded")
    error.__cause__ = MemoryError()
    assert "not enough memory" in str(explain(error))
