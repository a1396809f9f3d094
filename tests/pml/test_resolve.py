"""Prompts as runs: order, positions, messages and marks, on schemas small enough to do by hand."""

from __future__ import annotations

import pytest

from pcache_core import OptionError
from pcache_core.pml import (
    Document,
    Mark,
    ModuleUse,
    PMLError,
    PromptTree,
    SchemaLayout,
    Text,
    Turn,
    parse_prompt,
    parse_schema,
    place,
    resolve,
)
from pml_words import chat


def letters(text: str) -> list[int]:
    """A token for each character, so that lengths can be read off."""
    return [ord(character) for character in text]


def layout_of(inside: str, first_position: int = 0) -> SchemaLayout:
    return place(
        parse_schema(f"<schema name='s'>{inside}</schema>"), letters, first_position=first_position
    )


def shown(
    layout: SchemaLayout, inside: str, positions: str = "schema", **arguments: str
) -> list[tuple]:
    """(text, first position) of each run."""
    extra = "".join(f" {name}='{value}'" for name, value in arguments.items())
    prompt = parse_prompt(f"<prompt schema='s'{extra}>{inside}</prompt>")
    return [(r.text, r.start) for r in resolve(layout, prompt, positions=positions).runs]  # type: ignore[arg-type]


ABC = layout_of(
    "xx<module name='a'>aaa</module>y<module name='b'>bb</module><module name='c'>cccc</module>z"
)


def test_modules_keep_their_absolute_positions_and_leave_gaps() -> None:
    assert shown(ABC, "<a/><c/>") == [("xx", 0), ("aaa", 2), ("y", 5), ("cccc", 8), ("z", 12)]
    assert shown(ABC, "<b/>") == [("xx", 0), ("y", 5), ("bb", 6), ("z", 12)]


def test_compact_positions_have_no_gaps_and_the_prompts_order() -> None:
    assert shown(ABC, "<c/><a/>", "compact") == [
        *(("xx", 0), ("y", 2), ("cccc", 3), ("aaa", 7), ("z", 10))
    ]


def test_with_absolute_positions_modules_stand_in_the_schemas_order() -> None:
    assert shown(ABC, "<c/><a/>") == shown(ABC, "<a/><c/>")


def test_text_between_begins_where_the_module_before_it_ends() -> None:
    assert shown(ABC, "<a/>QQ<c/>RRR") == [
        *(("xx", 0), ("aaa", 2), ("QQ", 5), ("y", 5), ("cccc", 8), ("z", 12), ("RRR", 13))
    ]


def test_text_behind_goes_behind_every_position_in_use() -> None:
    assert shown(ABC, "<a/>Q")[-1] == ("Q", 13)
    gapped = layout_of("x<module name='a'>aaa</module><module name='b'>bb</module>")
    assert shown(gapped, "<a/>Q")[-1] == ("Q", 4)
    assert shown(gapped, "Q") == [("x", 0), ("Q", 1)]


def test_text_between_begins_behind_what_the_module_leaves_over() -> None:
    layout = layout_of(
        "<module name='a'>a<param name='p' len='5'/></module><module name='b'>b</module>"
    )
    assert shown(layout, "<a p='x'/>T<b/>") == [("a", 0), ("x", 1), ("T", 6), ("b", 6)]


def test_text_behind_goes_behind_long_text_between() -> None:
    texts = dict(shown(ABC, "<a/>QQQQQQQQQ<c/>R"))
    assert (texts["QQQQQQQQQ"], texts["z"], texts["R"]) == (5, 12, 14)
    texts = dict(shown(ABC, "<a/>QQQQQQQQQQQQQQQ<c/>R"))
    assert (texts["z"], texts["R"]) == (12, 20)


def test_text_before_the_first_module_stands_before_it() -> None:
    assert shown(ABC, "Q<a/>") == [
        *(("xx", 0), ("Q", 2), ("aaa", 2), ("y", 5), ("z", 12)),
    ]


def test_positions_begin_behind_what_precedes_every_prompt() -> None:
    layout = layout_of("xx<module name='a'>aaa</module>", first_position=1)
    for positions in ("schema", "compact"):
        assert shown(layout, "<a/>Q", positions) == [("xx", 1), ("aaa", 3), ("Q", 6)]


def test_arguments_take_the_first_positions_of_their_parameter() -> None:
    layout = layout_of("<module name='a'>go <param name='to' len='6'/> now</module>")
    assert shown(layout, "<a to='Rome'/>") == [("go ", 0), ("Rome", 3), (" now", 9)]
    assert shown(layout, "<a to='Rome'/>", "compact")[-1] == (" now", 7)
    assert shown(layout, "<a to=''/>") == [("go ", 0), (" now", 9)]
    with pytest.raises(PMLError, match="'to' has 7 tokens, the parameter holds 6"):
        shown(layout, "<a to='Firenze'/>")


def test_parameters_of_the_schema_itself_are_attributes_of_the_prompt() -> None:
    layout = layout_of("Hi <param name='who' len='5'/>!")
    assert shown(layout, "", who="Ada") == [("Hi ", 0), ("Ada", 3), ("!", 8)]
    with pytest.raises(PMLError, match="the schema needs an argument for 'who'"):
        shown(layout, "Q")


def test_nested_modules_stand_inside_and_text_between_them_is_kept() -> None:
    layout = layout_of(
        "<module name='o'>(<module name='p'>pp</module>,<module name='q'>q</module>)</module>"
    )
    assert shown(layout, "<o><p/>T<q/></o>") == [
        *(("(", 0), ("pp", 1), ("T", 3), (",", 3), ("q", 4), (")", 5))
    ]
    assert shown(layout, "<o/>") == [("(", 0), (",", 3), (")", 5)]


def test_union_members_share_a_start_and_the_longest_counts() -> None:
    layout = layout_of("x<union><module name='a'>aaa</module><module name='b'>b</module></union>y")
    assert [(m.name, m.start, m.stop) for m in layout.modules()] == [("a", 1, 4), ("b", 1, 2)]
    assert shown(layout, "<b/>Q") == [("x", 0), ("b", 1), ("y", 4), ("Q", 5)]
    assert shown(layout, "<b/>QQ<!-- more -->") == [("x", 0), ("b", 1), ("y", 4), ("QQ", 5)]


def test_documents_fill_a_slot_one_behind_the_other() -> None:
    layout = layout_of("x<slot name='d' max-tokens='9'/>y")
    documents = "<d><document>one</document>-<document>two</document></d>Q"
    assert shown(layout, documents) == [
        *(("x", 0), ("one", 1), ("-", 4), ("two", 5), ("y", 10), ("Q", 11))
    ]
    assert shown(layout, "<d/>Q") == [("x", 0), ("y", 10), ("Q", 11)]
    with pytest.raises(PMLError, match="gets 12 tokens, it holds 9"):
        shown(layout, "<d><document>one and more</document></d>")


def test_a_slot_without_limit_needs_compact_positions_or_the_end() -> None:
    documents = "<d><document>one</document><document>two</document></d>Q"
    before_text = layout_of("x<slot name='d'/>y")
    with pytest.raises(PMLError, match="max-tokens"):
        shown(before_text, documents)
    assert shown(before_text, documents, "compact")[-2:] == [("y", 7), ("Q", 8)]
    assert shown(layout_of("x<slot name='d'/>"), documents)[1:] == [
        *(("one", 1), ("two", 4), ("Q", 7))
    ]


def test_what_runs_say_of_themselves() -> None:
    layout = layout_of(
        "x<module name='a'><param name='p' len='3'/>a</module><slot name='d' max-tokens='9'/>"
    )
    prompt = parse_prompt(
        "<prompt schema='s'><a p='P'/><d><document name='n'>D</document></d>Q</prompt>"
    )
    runs = resolve(layout, prompt).runs
    assert [(r.kind, r.owner, r.name, r.home, r.is_reusable) for r in runs] == [
        ("anonymous", (), None, 0, True),
        ("argument", ("a",), "p", 1, False),
        ("module", ("a",), None, 4, True),
        ("document", ("d",), "n", None, True),
        ("text", (), None, None, False),
    ]
    assert {run.role for run in runs} == {None}


def test_cache_false_holds_for_everything_inside() -> None:
    layout = layout_of("<module name='a' cache='false'>a<module name='b'>b</module></module>")
    assert [(m.name, m.cached) for m in layout.modules()] == [("a", False), ("b", False)]
    runs = resolve(layout, parse_prompt("<prompt schema='s'><a><b/></a></prompt>")).runs
    assert [run.is_reusable for run in runs] == [False, False]


def test_an_empty_prompt_and_unknown_positions_are_refused() -> None:
    layout = layout_of("<module name='a'/>")
    for inside in ("", "<a/>", "<user></user>"):
        with pytest.raises(PMLError, match="the prompt is empty"):
            shown(layout, inside)
    with pytest.raises(OptionError, match="use one of schema, compact"):
        shown(ABC, "<a/>", "relative")


def test_overlapping_scaffolds_give_way_to_the_largest() -> None:
    modules = "".join(f"<module name='{name}'>{name}</module>" for name in "abcd")
    layout = layout_of(
        f"{modules}<scaffold modules='a b'/><scaffold modules='b c d'/><scaffold modules='a d'/>"
    )
    used = parse_prompt("<prompt schema='s'><a/><b/><c/><d/></prompt>")
    assert resolve(layout, used).scaffolds == ((("b",), ("c",), ("d",)),)
    fewer = parse_prompt("<prompt schema='s'><a/><b/></prompt>")
    assert resolve(layout, fewer).scaffolds == ((("a",), ("b",)),)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (PromptTree("s", (Text("\ud800"),)), "surrogate"),
        (PromptTree("s", (ModuleUse("a", {"p": 3}),)), "no parameter|str, got int"),  # type: ignore[dict-item]
        (PromptTree("s", (Turn("user", (Turn("user"),)),)), "can't stand here"),
        (PromptTree("s", (Document("d"),)), "only in a slot"),
        (PromptTree("s", (Text(5),)), "str, got int"),  # type: ignore[arg-type]
    ],
)
def test_prompts_built_in_python_keep_the_same_rules(prompt: PromptTree, says: str) -> None:
    with pytest.raises(PMLError, match=says):
        resolve(ABC, prompt)


# Messages. A mark is "<", the roles' first letters and ">", one token a character.


def marks(before: str | None, after: str | None) -> Mark:
    text = f"<{(before or '-')[0]}{(after or '-')[0]}>"
    return Mark(text, tuple(letters(text)))


def chat_layout(inside: str) -> SchemaLayout:
    return place(parse_schema(f"<schema name='s'>{inside}</schema>"), letters, marks=marks)  # type: ignore[arg-type]


def test_messages_begin_with_their_marks_and_the_answers_mark_ends_the_prompt() -> None:
    layout = chat_layout("<system>S</system><user>U<module name='m'>mm</module></user>")
    expected = [("<-s>", 0), ("S", 4), ("<su>", 5), ("U", 9), ("mm", 10), ("<u->", 12)]
    for positions in ("schema", "compact"):
        assert shown(layout, "<m/>", positions) == expected


def test_text_behind_a_users_message_continues_it() -> None:
    layout = chat_layout("<system>S</system><user>U</user>")
    assert [text for text, _ in shown(layout, "Q")] == ["<-s>", "S", "<su>", "U", "Q", "<u->"]


def test_text_behind_another_message_is_a_users_message() -> None:
    layout = chat_layout("<user>U</user><assistant>A</assistant>")
    expected = ["<-u>", "U", "<ua>", "A", "<au>", "Q", "<u->"]
    assert [text for text, _ in shown(layout, "Q")] == expected
    assert [text for text, _ in shown(layout, "<user>Q</user>")] == expected


def test_what_stands_beside_messages_joins_the_users_message_behind_it() -> None:
    layout = chat_layout("<system>S</system><module name='m'>m</module>")
    expected = ["<-s>", "S", "<su>", "m", "Q", "<u->"]
    assert [text for text, _ in shown(layout, "<m/><user>Q</user>")] == expected
    assert [text for text, _ in shown(layout, "<user><m/>Q</user>")] == expected


def test_two_messages_of_one_role_are_two() -> None:
    layout = chat_layout("<user>U</user>")
    texts = [text for text, _ in shown(layout, "<user>Q</user><user>R</user>")]
    assert texts == ["<-u>", "U", "<uu>", "Q", "<uu>", "R", "<u->"]
    turn = Turn("user", (Text("Q"),))
    same = resolve(layout, PromptTree("s", (turn, turn)))
    assert same.text == "<-u>U<uu>Q<uu>Q<u->"


@pytest.mark.parametrize(
    ("long_behind", "with_m", "without_m"), [("system", 12, 12), (None, 17, 17)]
)
def test_room_is_kept_for_the_longest_mark_that_may_stand_there(
    long_behind: str | None, with_m: int, without_m: int
) -> None:
    def uneven(before: str | None, after: str | None) -> Mark:
        text = "<<long>>" if before == long_behind else "<m>"
        return Mark(text, tuple(letters(text)))

    schema = parse_schema(
        "<schema name='s'><module name='m'><system>S</system></module><user>U</user></schema>"
    )
    layout = place(schema, letters, marks=uneven)
    assert dict(shown(layout, "<m/>"))["U"] == with_m
    assert dict(shown(layout, ""))["U"] == without_m


def test_messages_that_the_template_can_not_render_are_an_error_at_their_line() -> None:
    schema = parse_schema("<schema name='s'><user>U</user></schema>")
    prompt = parse_prompt("<prompt schema='s'>\n<system>late</system></prompt>", file="p.pml")
    with pytest.raises(PMLError, match="no <system> after <user>") as caught:
        resolve(place(schema, letters, marks=chat), prompt)
    assert caught.value.line == 2


def test_an_empty_message_is_none() -> None:
    layout = chat_layout("<system> \n </system><user>U</user>")
    assert [text for text, _ in shown(layout, "")] == ["<-u>", "U", "<u->"]


OPENING_HOURS = """<schema name="s">
  Answer from the documents.
  <module name="hours">
    The shop opens at nine.
  </module>
  <module name="place">
    The shop is in Oslo.
  </module>
</schema>"""


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("<hours/>\n<place/>\n<user>\n  When?\n</user>", "nine. The shop is in Oslo. When?<u->"),
        ("<hours/><place/><user> When?</user>", "nine. The shop is in Oslo. When?<u->"),
        ("<hours/><place/> <user>When?</user>", "nine. The shop is in Oslo. When?<u->"),
        ("<hours/><place/><user>When?</user>", "nine. The shop is in Oslo.When?<u->"),
        ("<hours/><user>\n<place/>\nWhen?\n</user>", "nine. The shop is in Oslo. When?<u->"),
        ("<hours/>\n<place/>\nWhen?\n<user>\nTell me.\n</user>", "Oslo. When? Tell me.<u->"),
    ],
)
def test_white_space_at_a_messages_tags_keeps_its_words_apart_where_no_mark_does(
    prompt: str, text: str
) -> None:
    layout = place(parse_schema(OPENING_HOURS), letters, marks=marks)  # type: ignore[arg-type]
    tree = parse_prompt(f"<prompt schema='s'>{prompt}</prompt>")
    for positions in ("schema", "compact"):
        assert resolve(layout, tree, positions=positions).text.endswith(text)  # type: ignore[arg-type]


def test_text_after_a_schemas_own_message_is_kept_apart_too() -> None:
    layout = chat_layout("\n<system>S</system>\n<user>\nU\n</user>\n")
    assert "".join(text for text, _ in shown(layout, "Q")) == "<-s>S<su>U Q<u->"
