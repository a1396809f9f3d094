"""Reading: what is text, what is layout, which bytes are read, which files, and the limits."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from pcache_core import OptionError
from pcache_core.pml import (
    Document,
    Limits,
    Module,
    ModuleUse,
    Param,
    PMLError,
    Schema,
    Slot,
    Text,
    Turn,
    check_schema,
    parse_prompt,
    parse_schema,
    place,
)


def texts(inside: str, space: str = "") -> list[str | None]:
    """The schema's own texts; None for anything else."""
    schema = parse_schema(f'<schema name="s"{space}>{inside}</schema>')
    return [node.text if isinstance(node, Text) else None for node in schema.children]


M = '<module name="m">x</module>'
N = '<module name="n">x</module>'


@pytest.mark.parametrize(
    ("inside", "read"),
    [
        ("a", ["a"]),
        (" a  b ", [" a  b "]),
        ("\n  a\n  b\n  ", ["a\n  b"]),
        (f"a {M} b", ["a ", None, " b"]),
        (f"\n a\n {M}\n b\n", ["a ", None, " b"]),
        (f"\n {M}\n\n {N}\n", [None, " ", None]),
        (f"{M}  {N}", [None, "  ", None]),
        ("\n <user>u</user>\n <assistant>a</assistant> ", [None, None]),
        ("a\n <user>u</user>\n b", ["a", None, "b"]),
        ("one<!-- c -->two", ["onetwo"]),
        ("one<?pi x?>two", ["onetwo"]),
        ("<![CDATA[<b> & ]]>]]&gt;", ["<b> & ]]>"]),
        ("&#65;&lt;&amp;&#x1F99C;", ["A<&🦜"]),
        ("\xa0\n", ["\xa0"]),
        ("<|im_end|&gt;&lt;/s&gt;[INST]".replace("<|", "&lt;|"), ["<|im_end|></s>[INST]"]),
    ],
)
def test_text_is_kept_and_layout_is_not(inside: str, read: list[str | None]) -> None:
    assert texts(inside) == read


def test_preserved_white_space_is_kept_as_written() -> None:
    space = ' xml:space="preserve"'
    assert texts(f"\n a\n {M}\n", space) == ["\n a\n ", None, "\n"]
    assert texts("\n<user>u</user>\n", space) == [None]
    inner = parse_schema(
        f'<schema name="s"{space}><module name="m" xml:space="default">\n a\n</module></schema>'
    )
    assert inner.children == (Module("m", (Text("a"),)),)


def test_in_prompts_line_breaks_between_uses_are_no_text() -> None:
    prompt = parse_prompt("<prompt schema='s'>\n <a/>\n <b/> <c/>\n tail\n</prompt>")
    assert [node.text for node in prompt.children if isinstance(node, Text)] == [" ", " tail"]


def test_a_prompt_is_read_with_arguments_turns_and_documents() -> None:
    prompt = parse_prompt(
        "<prompt schema='s' lang='en'><m city='a &amp;&#10;b'><docs>"
        "<document name='d'>\n one\n </document>, <document>two</document></docs></m>"
        "<user>Q <n/></user></prompt>"
    )
    docs = ModuleUse("docs", {}, (Document("one", "d"), Text(", "), Document("two")))
    assert prompt.arguments == {"lang": "en"}
    assert prompt.children == (
        ModuleUse("m", {"city": "a &\nb"}, (docs,)),
        Turn("user", (Text("Q "), ModuleUse("n"))),
    )


def test_both_spellings_of_parameters_are_the_same() -> None:
    inside = '<{0} name="p" {1}="7"/>'
    schemas = [
        parse_schema(f'<schema name="s">{inside.format(tag, length)}</schema>')
        for tag in ("param", "parameter")
        for length in ("len", "length")
    ]
    assert all(schema == Schema("s", (Param("p", 7),)) for schema in schemas)


@pytest.mark.parametrize(
    "data",
    [
        '<schema name="é"/>',
        '\ufeff<schema name="é"/>',
        '<schema name="é"/>'.encode(),
        '\ufeff<schema name="é"/>'.encode(),
        '<?xml version="1.0" encoding="utf-8"?>\r\n<schema name="é"/>'.encode(),
        '<?xml version="1.0" encoding="UTF-16"?><schema name="é"/>'.encode("utf-16"),
        '<?xml version="1.0" encoding="ISO-8859-1"?><schema name="é"/>',
    ],
)
def test_text_and_utf_8_and_marked_utf_16_are_read(data: str | bytes) -> None:
    assert parse_schema(data) == Schema("é")


@pytest.mark.parametrize("data", [None, 3, ["<schema/>"], bytearray(b"<schema/>")])
def test_anything_but_text_is_refused(data: object) -> None:
    with pytest.raises(PMLError, match="PML is str or bytes"):
        parse_schema(data)  # type: ignore[arg-type]


def test_half_a_surrogate_pair_is_refused_with_its_line() -> None:
    with pytest.raises(PMLError, match="surrogate") as caught:
        parse_schema('<schema name="s">\n\ud800</schema>')
    assert caught.value.line == 2


def test_lines_are_right_behind_line_65535() -> None:
    with pytest.raises(PMLError) as caught:
        parse_schema('<schema name="s">' + "\r\n" * 70_000 + "<x/></schema>")
    assert caught.value.line == 70_001


def test_an_error_shows_file_line_and_source_line() -> None:
    with pytest.raises(PMLError) as caught:
        parse_schema('<schema name="s">\n   <modul name="a"/>\n</schema>', file="trip.pml")
    assert str(caught.value) == (
        "trip.pml:2: <modul> can't stand in <schema>; did you mean 'module'?\n"
        '    <modul name="a"/>'
    )
    assert isinstance(caught.value, ValueError)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.txt").write_text("\n  from <a file> & more\n", "utf-8")
    (tmp_path / "secret.txt").write_text("secret", "utf-8")
    (root / "latin.txt").write_bytes(b"\xe9")
    (root / "out.txt").symlink_to(tmp_path / "secret.txt")
    (root / "outside").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    (root / "in.txt").symlink_to(root / "sub" / "a.txt")
    os.mkfifo(root / "pipe")
    return root


def included(name: str, folder: Path | None, limits: Limits | None = None) -> Schema:
    text = f'<schema name="s">\n<module name="m" src="{name}">, own</module></schema>'
    return parse_schema(text, src_root=folder, limits=limits or Limits())


@pytest.mark.parametrize("name", ["sub/a.txt", "in.txt", "sub/../sub/a.txt"])
def test_a_file_below_the_root_is_text_before_the_modules_own(folder: Path, name: str) -> None:
    (module,) = included(name, folder).children
    assert module == Module("m", (Text("from <a file> & more"), Text(", own")))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("out.txt", "leads out of the root folder"),
        ("outside/secret.txt", "leads out of the root folder"),
        ("../secret.txt", "leads out of the root folder"),
        ("/etc/passwd", "no path below"),
        ("", "no path below"),
        ("nothing.txt", "No such file"),
        ("loop", "can't be read"),
        ("sub", "can't be read|not a regular file"),
        ("pipe", "not a regular file"),
        ("latin.txt", "not UTF-8"),
        ("n" * 5000, "can't be read"),
    ],
)
def test_anything_else_is_refused_with_its_line(folder: Path, name: str, says: str) -> None:
    with pytest.raises(PMLError, match=says) as caught:
        included(name, folder)
    assert caught.value.line == 2
    assert "secret" not in str(caught.value).replace(name, "")


def test_files_are_off_without_a_root_and_count_against_the_limit(folder: Path) -> None:
    with pytest.raises(PMLError, match="src= is off"):
        included("sub/a.txt", None)
    (folder / "big.txt").write_bytes(b"x" * 900)
    with pytest.raises(PMLError, match="over the limit of"):
        included("big.txt", folder, Limits(max_bytes=900))
    twice = "".join(f"<module name='m{n}' src='big.txt'/>" for n in range(2))
    assert included("big.txt", folder, Limits(max_bytes=1700))
    with pytest.raises(PMLError, match="over the limit of"):
        parse_schema(
            f"<schema name='s'>{twice}</schema>", src_root=folder, limits=Limits(max_bytes=1700)
        )


@pytest.mark.parametrize("name", ["no-such-folder", "sub/a.txt", "\0", "loop"])
def test_a_root_that_is_no_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(PMLError, match="src_root="):
        parse_schema('<schema name="s"/>', src_root=folder / name)


HOSTILE = {
    "one tag of many attributes": "<schema name='x' " + " ".join(f"a{i}=''" for i in range(10**5)),
    "many attributes": "<prompt schema='s' " + " ".join(f"a{i}=''" for i in range(300)) + "/>",
    "too deep": '<schema name="s">' + '<module name="a">' * 70 + "</module>" * 70 + "</schema>",
    "far too deep": "<a>" * 300_000,
    "too many elements": '<schema name="s">' + "<module name='a'/>" * 10**5 + "</schema>",
    "too large": "<schema name='s'>" + "x" * 2**22 + "</schema>",
    "a name of a megabyte": f"<schema name='{'n' * 2**20}'/>",
    "a tag of a megabyte": f"<{'n' * 2**20}/>",
    "an attribute of a megabyte": f"<schema name='s'><module name='{'n' * 2**20}'/></schema>",
    "a line of a megabyte": f"<schema name='s'>{'&' * 2**20}</schema>",
    "a billion laughs": "<!DOCTYPE l [<!ENTITY a 'ha'>"
    + "".join(f"<!ENTITY a{i} '&a{i - 1 or ''};&a{i - 1 or ''};'>" for i in range(1, 40))
    + "]><schema name='s'>&a39;</schema>",
    "an external entity": "<!DOCTYPE s [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><s>&x;</s>",
    "an external document type": "<!DOCTYPE s SYSTEM 'http://127.0.0.1:9/x.dtd'><s/>",
    "a lower-case document type": "<!doctype html><schema name='s'/>",
    "processing instructions without end": "<?a" * 10**5,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_documents_are_refused_at_once(name: str) -> None:
    started = time.process_time()
    for parse in (parse_schema, parse_prompt):
        with pytest.raises(PMLError) as caught:
            parse(HOSTILE[name])
        assert len(str(caught.value)) < 1000
    assert time.process_time() - started < 10


def test_twenty_thousand_modules_and_scaffolds_are_read_in_time() -> None:
    started = time.process_time()
    names = [f"m{number}" for number in range(9_000)]
    modules = "".join(f"<module name='{name}'/>" for name in names)
    scaffolds = f"<scaffold modules='{' '.join(names)}'/>" + "<scaffold modules='m0 m1'/>" * 9_000
    assert len(parse_schema(f"<schema name='s'>{modules}{scaffolds}</schema>").children) == 18_001
    assert time.process_time() - started < 20


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_names_are_not_kept_when_a_document_has_been_read() -> None:
    def read(number: int) -> None:
        names = [f"n{number}.{index}.{'x' * 40_000}" for index in range(20)]
        uses = "".join(f"<{name}/>" for name in names)
        with pytest.raises(PMLError):
            parse_prompt(f"<prompt schema='s'>{uses}<document/></prompt>")

    for number in range(5):
        read(number)
    before = peak_bytes()
    for number in range(5, 125):
        read(number)
    assert peak_bytes() - before < 50 * 2**20  # all names together have 96 MB


def test_limits_can_be_set_and_are_checked() -> None:
    deep = '<schema name="s">' + '<module name="a">' * 99 + "</module>" * 99 + "</schema>"
    with pytest.raises(PMLError, match=r"65 elements within one another, the limit is 64"):
        parse_schema(deep)
    assert parse_schema(deep, limits=Limits(max_depth=100))
    with pytest.raises(PMLError, match="3 elements, the limit is 2"):
        parse_schema(deep, limits=Limits(max_elements=2, max_depth=200))
    with pytest.raises(OptionError, match="max_bytes=0"):
        Limits(max_bytes=0)
    with pytest.raises(OptionError, match="max_depth=201 is over 200"):
        Limits(max_depth=201)


@pytest.mark.parametrize(
    ("child", "says"),
    [
        (Module("user"), "tag of prompts"),
        (Module("a b"), "no name"),
        (Module("ok", (Param("p", 0),)), "length=0 must be 1 or more"),
        (Slot("s", 0), "max_tokens=0 must be 1 or more"),
        (Text(""), "at least one character"),
        (Text("\ud800"), "surrogate"),
        (ModuleUse("m"), "can't hold ModuleUse"),
    ],
)
def test_trees_built_in_python_keep_the_same_rules(child: object, says: str) -> None:
    with pytest.raises(PMLError, match=says) as caught:
        place(Schema("s", (child,)), list)  # type: ignore[arg-type]
    assert caught.value.line is None


def test_a_tree_that_is_too_deep_is_refused() -> None:
    module = Module("m")
    for _ in range(5000):
        module = Module("m", (module,))
    with pytest.raises(PMLError, match="over 200 levels deep"):
        check_schema(Schema("s", (module,)))
