"""The notebooks run from top to bottom and still print what they are saved with."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 150_000

every_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: nbformat.NotebookNode) -> str:
    """What a cell prints and displays as text; every figure is a #, for times differ."""
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        if "text" in output:
            texts.append(output.text)
        elif "text/html" in data:
            before_times = data["text/html"].partition("first token after")[0]
            texts.append(re.sub(r"<[^>]*>", " ", before_times))
        elif "image/png" not in data:
            texts.append(data["text/plain"])
    return " ".join(re.sub(r"\d[\d,.]*(e[+-]?\d+)?", "#", "\n".join(texts)).split())


@pytest.fixture
def _execute_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    sys.modules.pop("execute", None)


def test_there_are_five_notebooks() -> None:
    assert [file.name[:2] for file in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]


@every_notebook
@pytest.mark.usefixtures("_execute_can_be_imported")
def test_a_notebook_runs_and_prints_what_it_is_saved_with(file: Path) -> None:
    from execute import executed

    saved = code_cells(nbformat.read(file, as_version=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the machinery that starts kernels
        new = code_cells(executed(file))
    for before, now in zip(saved, new, strict=True):
        assert shown(now) == shown(before), before.source


@every_notebook
def test_a_notebook_is_saved_with_its_outputs_and_nothing_of_a_machine(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("tokens reused" in output.get("data", {}).get("text/html", "") for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
    text = file.read_text("utf-8")
    assert len(text) < MAX_BYTES
    assert not re.findall(r"/(?:tmp|home|work|root|usr|var|opt|Users)/|\b\w:\\\\", text)
    assert "Warning" not in text


@every_notebook
def test_a_notebook_teaches_before_it_shows(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    assert notebook.cells[0].source.startswith("# ")
    assert max(len(cell.source.splitlines()) for cell in notebook.cells) <= 30
    prose = sum(cell.cell_type == "markdown" for cell in notebook.cells)
    assert prose >= len(code_cells(notebook)) * 0.7
