"""The wheel holds what an installed package needs, and runs without the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_types_model_corpus_and_nothing_of_the_tests(unpacked: Path) -> None:
    packages = ("pcache_core", "pcache_integrations", "pcache_templates")
    assert all((unpacked / package / "py.typed").is_file() for package in packages)
    assert (unpacked / "pcache_core/models/tiny-rag/model.safetensors").stat().st_size > 2**20
    for corpus in ("corpus", "corpus_toy"):
        assert (unpacked / "pcache_integrations" / corpus / "questions.tsv").is_file()
    names = {path.name for path in unpacked.iterdir()}
    assert names - {*packages} == {n for n in names if n.endswith(".dist-info")}


def test_an_installed_package_finds_its_model_and_its_corpus(unpacked: Path) -> None:
    code = (
        "import sys, pcache_core, pcache_integrations\n"
        "assert 'llguidance' not in sys.modules, 'it is imported when it is needed'\n"
        "from pcache_integrations.demo.corpus import Corpus, shipped\n"
        "from pcache_core.lm.loading import resolve\n"
        "print(pcache_core.__file__, resolve('builtin:tiny-rag'))\n"
        "print(shipped('corpus'), shipped('corpus_toy'))\n"
        "assert Corpus(shipped('corpus')).questions\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=unpacked.parent,
        env={"PYTHONPATH": str(unpacked), "PATH": ""},
    )
    assert all(path.startswith(str(unpacked)) for path in done.stdout.split())


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, pcache_integrations\n"
        "assert not {'langchain_core', 'llama_index', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
