"""`benchmarks/gpu.py` runs from a checkout: in small on a CPU, and not at all without CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    without_path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(CHECKOUT / "benchmarks" / "gpu.py"), *arguments],
        capture_output=True,
        text=True,
        env={**without_path, "CUDA_VISIBLE_DEVICES": "", **environment},
        timeout=240,
    )


def test_it_checks_and_times_a_small_model_on_a_cpu() -> None:
    small = ["--layers=2", "--hidden=64", "--documents=3", "--cached=60,90", "--rounds=1"]
    done = run("--device=cpu", *small, "--answer-tokens=4", "--requests=2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("right: ") for line in lines) == 8
    names = [line.split()[0] for line in lines if line.startswith("  ") and "(" not in line]
    first_tokens = ["generate", "off", "exact", "fast", "balanced"]
    decoding, at_once = ["generate", "fast"], ["off", "fast", "balanced"]
    assert names == [*first_tokens, *first_tokens, *decoding, *at_once]


def test_without_cuda_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "CUDA" in line
    assert "--device cpu" in line


@pytest.mark.parametrize("package", ["lxml", "xxhash"])
def test_a_package_that_is_missing_is_named_with_what_to_install(
    tmp_path: Path, package: str
) -> None:
    refusal = f"raise ModuleNotFoundError(\"No module named '{package}'\")"
    (tmp_path / f"{package}.py").write_text(refusal)
    done = run("--device=cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"'{package}'" in line
    assert "pip install" in line
