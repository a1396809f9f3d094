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


_HEAVY = {"torch", "transformers", "llguidance", "huggingface_hub"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pcache_integrations", {*_HEAVY, "langchain_core", "llama_index"}),
        ("pcache_core", _HEAVY),
        ("pcache_integrations.cli", {*_HEAVY, "langchain_core", "llama_index"}),
        ("pcache_integrations.langchain", {*_HEAVY, "llama_index", "numpy"}),
        ("pcache_integrations.llama_index", {*_HEAVY, "langchain_core"}),
    ],
)
def test_an_import_leaves_for_later_what_takes_seconds(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*{absent} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_is_imported_late_has_its_public_names_all_the_same() -> None:
    code = (
        "import pcache_core, pickle\n"
        "assert set(pcache_core.__all__) <= set(dir(pcache_core))\n"
        "from pcache_core import *\n"
        "from pcache_core.store import DiskStore as same\n"
        "assert DiskStore is same and pickle.loads(pickle.dumps(CausalLM)) is CausalLM\n"
        "assert not hasattr(pcache_core, 'Nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
