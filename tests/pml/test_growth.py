"""Reading PML takes time in proportion to its length, whatever its text is."""

from __future__ import annotations

import pytest

from growth import growth
from pcache_core.pml import SchemaLayout, parse_prompt, parse_schema, place, resolve

LINEAR = 8

RUNS = [" ", "\n", "\t", "-", "]", "[", "{", "}", "'", "&amp;", "a ", "- \n"]
MARKUP = ["<!-- -->", "<![CDATA[ ]]>", "<![CDATA[<]]>", "<?a?>\n"]


def layout(modules: int) -> SchemaLayout:
    inside = "".join(f"<module name='m{i}'>x</module>" for i in range(modules))
    return place(parse_schema(f"<schema name='s'>{inside}</schema>"), lambda text: [0])


@pytest.mark.parametrize("run", [*RUNS, *MARKUP])
def test_a_long_run_in_a_text_is_read_in_linear_time(run: str) -> None:
    def read(chars: int) -> None:
        long = f"x{run * (chars // len(run))}"
        parse_schema(f"<schema name='s'><module name='m'>{long}</module></schema>")
        resolve(layout(0), parse_prompt(f"<prompt schema='s'>{long}</prompt>"))

    assert growth(read, 2**18) < LINEAR


@pytest.mark.parametrize("run", ["<!-- -->", "<?a?>", " \n", "\t"])
def test_what_stands_before_a_schema_is_passed_over_in_linear_time(run: str) -> None:
    def read(chars: int) -> None:
        parse_schema(f"{run * (chars // len(run))}<schema name='s'/>")

    assert growth(read, 2**18) < LINEAR


def test_a_layout_finds_its_modules_in_linear_time() -> None:
    layouts = {count: layout(count) for count in (1000, 4000)}

    def find(count: int) -> None:
        for module in layouts[count].modules():
            assert layouts[count].module(module.path) is module

    assert growth(find, 1000) < LINEAR
