"""The pages of docs/ say what is so: snippets run, commands exist, the references are complete."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from pcache_integrations.cli import app

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {page.name: page.read_text("utf-8") for page in sorted(DOCS.glob("*.md"))}
PUBLIC = (
    "pcache_core",
    "pcache_core.pml",
    "pcache_core.store",
    "pcache_templates",
    "pcache_integrations.langchain",
    "pcache_integrations.llama_index",
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def script(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_snippets_of_a_page_run_one_after_another(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, object] = {"__name__": "docs"}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page, "exec"), names)
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", ["engine.md", "langchain.md"])
def test_the_toy_model_answers_right(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page, "exec"), {"__name__": "docs"})
        assert capsys.readouterr().out.strip().startswith("kayaking.")


def test_the_report_in_the_concepts_is_the_one_that_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (snippet,) = blocks("concepts.md", "python")
    exec(compile(snippet, "concepts.md", "exec"), {})
    assert capsys.readouterr().out == blocks("concepts.md", "text")[0]


def test_every_command_on_the_pages_exists_with_its_options() -> None:
    written = [
        line
        for page in PAGES
        for block in blocks(page, "console")
        for line in re.findall(r"^\$ pcache ([^#\n]*)", block, flags=re.MULTILINE)
    ]
    assert len(written) > 5
    for line in written:
        command = line.split()[0]
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", line):
            assert re.search(rf"{option}[ ,]", shown.partition("Example:")[0]), line


def test_the_pml_reference_is_what_the_grammars_say() -> None:
    """If not: run docs/pml_reference.py."""
    assert PAGES["pml.md"] == script("pml_reference").page()


def test_the_pml_reference_has_every_element_with_its_attributes() -> None:
    headings = re.findall(r"^### `<(.*)>`$", PAGES["pml.md"], flags=re.MULTILINE)
    for tag in ("schema", "module", "union", "param", "slot", "scaffold", "prompt", "document"):
        assert tag in headings
    (slot,) = re.findall(r"^### `<slot>`\n(.*?)^### ", PAGES["pml.md"], flags=re.DOTALL | re.M)
    assert re.findall(r"^\| `(\S+)` \| (\w+) ", slot, flags=re.MULTILINE) == [
        ("name", "yes"),
        ("max-tokens", "no"),
    ]


def test_the_api_pages_have_every_public_name() -> None:
    listed = {
        identifier
        for page in (DOCS / "api").glob("*.md")
        for identifier in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    }
    for name in PUBLIC:
        module = importlib.import_module(name)
        for exported in module.__all__:
            value = getattr(module, exported)
            defined_in = getattr(value, "__module__", "")
            places = {f"{base}.{exported}" for base in (name, "pcache_core", defined_in)}
            assert places & listed or defined_in in listed, f"{name}.{exported}"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("x: what\n    it is.", "\n- **`x`**: what\n  it is."),
        ("One.\nx, y: two.\nThree.", "One.\n\n- **`x`, `y`**: two.\n\nThree."),
        ("Raises: StoreError: full.", "\n**Raises:** `StoreError`: full."),
        ("A `Prompt` of `x`.", "A [`Prompt`][pcache_core.Prompt] of `x`."),
        ("```python\nx: int = 1\n```\nx: one.", "```python\nx: int = 1\n```\n\n- **`x`**: one."),
    ],
)
def test_docstrings_become_lists_and_links(written: str, shown: str) -> None:
    module = script("docstrings")
    docstrings = module.HouseDocstrings()
    assert module.unfolded("A.\n\nInvoke:\n    x()\n\n    y()\nB.") == (
        "A.\n\n**Invoke**\n\nx()\n\ny()\nB."
    )
    assert module.fenced("A:\n>>> f()\n1\n\nB.") == "A:\n\n```pycon\n>>> f()\n1\n```\n\nB."
    assert module.one_a_line("x: a. y: b; z: c.", {"x", "y"}) == "x: a.\ny: b; z: c."
    assert "\n".join(docstrings._lines(written)) == shown


def test_every_test_that_the_security_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGES["security.md"])
    assert len(named) > 20
    for path, test in named:
        source = (DOCS.parent / path).read_text("utf-8")
        assert re.search(rf"^(async )?def {test}\(", source, flags=re.MULTILINE), f"{path}::{test}"


def test_every_promise_of_the_security_page_names_a_test() -> None:
    rows = PAGES["security.md"].partition("| promise | test |")[2].strip().splitlines()[1:]
    assert all(re.fullmatch(r"\| [^|]+ \| (`tests/[^`]+`(, )?)+ \|", row) for row in rows)
