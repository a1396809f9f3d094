"""What modules are encoded after: the same at all times, in the module's language, not too long."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import tiny_models
from pcache_core.errors import OptionError
from pcache_core.library.preamble import Preamble, PreambleIds, default_opening, language_of
from pcache_core.lm.tokenizer import SegmentTokenizer

INSTRUCTION = "Use the following documents to answer the question.\n\n"
ENGLISH = "The bees are at home in the garden, and nobody has seen them since."
GERMAN = "Die Bienen sind im Garten, und niemand hat sie seitdem gesehen."

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<bot>"
DATED = "{{ strftime_now('%d %B %Y, %H:%M:%S') }}\n" + TURNS
DATED_INSIDE = (
    "{% macro head() %}{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% endif %}"
    "{% endmacro %}[{{ head() }}]" + TURNS
)
REFUSING = {
    "raises": "{{ raise_exception('no users here') }}",
    "broken": "{% for m in messages %}",
    "lowers": "{% for m in messages %}{{ m.content | lower }}{% endfor %}",
    "escapes": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "cuts": "{% for m in messages %}{{ m.content[:40] }}{% endfor %}",
    "first word": "{% for m in messages %}{{ m.content.split()[0] }}{% endfor %}",
    "one line": "{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}",
    "twice": "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    "reversed": "{% for m in messages %}{{ m.content | reverse }}{% endfor %}",
    "moved": "{% for m in messages %}{{ m.content[60:] }}{{ m.content[:60] }}{% endfor %}",
    "leaves out": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "chance": "{{ range(10**6) | random }}" + TURNS,
    "chance by name": "{{ [['a', 'b']] | map('random') | list }}" + TURNS,
    "chance of words": "{{ lipsum(n=1) }}" + TURNS,
}


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    made = tiny_models.tiny_tokenizer()
    made.chat_template = template
    return made


def opening_text(template: str | None) -> str:
    return default_opening(SegmentTokenizer(tokenizer(template)))


def ids_with(
    preamble: Preamble | None, context_length: int | None = None, template: str | None = None
) -> PreambleIds:
    return PreambleIds(SegmentTokenizer(tokenizer(template)), context_length, preamble)


def alone(text: str, *, data: bool = False) -> tuple[int, ...]:
    ids = tokenizer()(text, add_special_tokens=False, split_special_tokens=data)["input_ids"]
    return tuple(ids)


def company_file() -> dict[str, dict[str, list[str]]]:
    path = Path(sys.modules[Preamble.__module__].__file__ or "").with_name("company.json")
    data: dict[str, dict[str, list[str]]] = json.loads(path.read_text("utf-8"))
    return data


# The opening


def test_the_opening_is_the_chat_template_up_to_where_a_document_would_stand() -> None:
    assert opening_text(TURNS) == "<user>" + INSTRUCTION


def test_a_template_that_trims_its_contents_has_the_same_opening() -> None:
    trimming = TURNS.replace("m.content", "m.content | trim")
    assert opening_text(trimming) == "<user>" + INSTRUCTION


def test_leading_line_breaks_of_a_template_stay() -> None:
    assert opening_text("\n\n" + TURNS) == "\n\n<user>" + INSTRUCTION


def test_without_a_template_the_opening_is_the_instruction() -> None:
    assert opening_text(None) == INSTRUCTION


@pytest.mark.parametrize("name", REFUSING)
def test_a_template_that_does_not_keep_the_message_gives_the_instruction(name: str) -> None:
    assert opening_text(REFUSING[name]) == INSTRUCTION


@pytest.mark.parametrize("template", [DATED, DATED_INSIDE])
def test_the_opening_is_the_same_tomorrow(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime.datetime):
        today_is: datetime.datetime

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls.today_is

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    openings, prompts = set(), set()
    for day in (datetime.datetime(2025, 2, 3, 4, 5, 6), datetime.datetime(2031, 12, 30, 23, 59)):
        Clock.today_is = day
        openings.add(opening_text(template))
        text = SegmentTokenizer(tokenizer(template))
        prompts.add(text.apply_chat_template([{"role": "user", "content": "x"}]))
    assert len(prompts) == 2, "the clock did not move"
    (opening,) = openings
    assert "2024" in opening
    assert "%" not in opening
    assert opening.endswith("<user>" + INSTRUCTION)


def test_ids_are_the_same_in_every_process() -> None:
    script = (
        "import test_preamble as t\n"
        "ids = t.ids_with(None, template=t.DATED)\n"
        "print([ids.ids_for(text) for text in (t.ENGLISH, t.GERMAN)])"
    )
    here = str(Path(__file__).parent)
    tests = str(Path(__file__).parents[1])
    printed = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {
            "PYTHONHASHSEED": "1",
            "TZ": "Pacific/Auckland",
            "PYTHONPATH": os.pathsep.join([here, tests, *sys.path]),
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ids = ids_with(None, template=DATED)
    assert printed == f"{[ids.ids_for(text) for text in (ENGLISH, GERMAN)]}\n"


# Ids


def test_opening_and_each_company_text_are_tokenised_alone() -> None:
    ids = ids_with(Preamble("He", ["re is", "a th"]))
    expected = (tiny_models.BOS, *alone("He"))
    expected += alone("re is") + alone("\n\n") + alone("a th") + alone("\n\n")
    assert ids.ids_for(ENGLISH) == expected
    assert ids.opening == (tiny_models.BOS, *alone("He"))


def test_special_tokens_count_in_the_opening_and_are_plain_text_in_company() -> None:
    ids = ids_with(Preamble("a<eos>", ["b<eos>"]))
    assert ids.ids_for(ENGLISH) == (
        tiny_models.BOS,
        *alone("a"),
        tiny_models.EOS,
        *alone("b<eos>", data=True),
        *alone("\n\n"),
    )
    assert ids.ids_for(ENGLISH).count(tiny_models.EOS) == 1


def test_an_opening_that_begins_with_the_first_token_gets_no_second() -> None:
    assert ids_with(Preamble("<bos>a", [])).ids_for(ENGLISH) == (tiny_models.BOS, *alone("a"))


def test_none_is_the_first_token_alone() -> None:
    assert ids_with(Preamble.none()).ids_for(ENGLISH) == (tiny_models.BOS,)


def test_a_tokenizer_that_adds_no_first_token_gets_none() -> None:
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tiny_models.tiny_tokenizer().backend_tokenizer, bos_token=None
    )
    plain.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    assert PreambleIds(SegmentTokenizer(plain), None, Preamble.none()).ids_for("a") == ()
    assert PreambleIds(SegmentTokenizer(plain), None, Preamble("a", [])).ids_for("b") == alone("a")


def test_the_default_company_is_in_the_language_of_the_module() -> None:
    ids = ids_with(None)
    data = company_file()
    for text, language in ((ENGLISH, "en"), (GERMAN, "de")):
        expected = ids.opening
        for member in data[language]["company"]:
            expected += alone(member) + alone("\n\n")
        assert ids.ids_for(text) == expected


def test_a_given_company_is_for_every_language() -> None:
    ids = ids_with(Preamble(company=["One."]))
    assert ids.ids_for(ENGLISH) == ids.ids_for(GERMAN)


@pytest.mark.parametrize(
    ("context_length", "kept"), [(None, 3), (8 * 11, 3), (8 * 11 - 1, 2), (8 * 5, 1), (8 * 4, 0)]
)
def test_company_is_dropped_from_the_end_down_to_an_eighth_of_the_context(
    context_length: int | None, kept: int
) -> None:
    # Eleven tokens: the first one, "x", and three for each company text with its line breaks.
    ids = ids_with(Preamble("x", ["y", "z", "w"]), context_length)
    whole = ids_with(Preamble("x", ["y", "z", "w"])).ids_for(ENGLISH)
    assert len(whole) == 11
    assert ids.ids_for(ENGLISH) == whole[: 2 + 3 * kept]


def test_a_long_text_in_the_middle_lets_none_after_it_through() -> None:
    ids = ids_with(Preamble("x", ["y", "z" * 50, "w"]), 8 * 20)
    assert ids.ids_for(ENGLISH) == ids.opening + alone("y") + alone("\n\n")


def test_where_the_opening_is_too_long_the_first_token_is_all() -> None:
    ids = ids_with(Preamble("abc" * 10, ["y"]), 8 * 10)
    assert ids.opening == (tiny_models.BOS,)
    assert ids.ids_for(ENGLISH) == (tiny_models.BOS, *alone("y"), *alone("\n\n"))


# What is given


def test_preambles_are_equal_by_value_and_lists_will_do() -> None:
    first, second = Preamble("a", ["b"]), Preamble("a", ("b",))
    assert first == second
    assert hash(first) == hash(second)
    assert first != Preamble("a", [])
    assert Preamble.none() != Preamble()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"opening": 3}, "opening must be a text, got 3"),
        ({"opening": "\ud800"}, "half a surrogate pair at character 0"),
        ({"company": "one text"}, r"use company=\[text\]"),
        ({"company": 5}, "company must be a list of texts, got 5"),
        ({"company": ["a", None]}, "each text in company must be a text, got None"),
        ({"company": ["a", " \n"]}, "got an empty one; leave it out"),
        ({"company": ["\udfff"]}, "half a surrogate pair"),
    ],
)
def test_what_is_no_preamble_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Preamble(**fields)  # type: ignore[arg-type]


def test_a_model_folder_may_bring_its_own(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    loaded = SegmentTokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert PreambleIds(loaded, None).preamble == Preamble()
    (tmp_path / "preamble.json").write_text('{"opening": "Texts:\\n", "company": ["Bees hum."]}')
    assert PreambleIds(loaded, None).preamble == Preamble("Texts:\n", ["Bees hum."])
    assert PreambleIds(loaded, None, Preamble.none()).preamble == Preamble.none()


@pytest.mark.parametrize("content", ["", "[]", '{"company": "a"}', '{"anything": 1}', "\\xff"])
def test_a_file_that_holds_no_preamble_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "preamble.json").write_text(content)
    with pytest.raises(OptionError, match=r"preamble\.json holds no preamble.*remove the file"):
        Preamble.of_folder(tmp_path)


def test_a_tokenizer_made_in_memory_reads_no_file_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "preamble.json").write_text('{"opening": "Strange:"}')
    monkeypatch.chdir(tmp_path)
    assert ids_with(None).preamble == Preamble()


# Languages

SENTENCES = {
    "en": "Mix the flour with the butter until it is smooth, then add eggs and a little sugar.",
    "de": "Mehl und Butter glatt rühren, dann die Eier und etwas Zucker zu dem Teig geben.",
    "fr": "Mélangez la farine et le beurre, puis ajoutez les œufs avec un peu de sucre.",
    "es": "Se mezcla la harina con la mantequilla y luego se añaden los huevos y el azúcar.",
    "it": "Mescolate la farina con il burro, poi aggiungete le uova e un po' di zucchero.",
    "pt": "Misture a farinha com a manteiga e junte depois os ovos e um pouco de açúcar.",
    "nl": "Meng het meel met de boter tot het glad is en voeg dan de eieren en suiker toe.",
    "pl": "Mąkę wymieszaj z masłem, a potem dodaj jajka i trochę cukru do ciasta.",
    "tr": "Unu tereyağıyla karıştırın, sonra yumurtaları ve biraz da şeker ekleyin.",
    "vi": "Trộn bột với bơ cho đến khi mịn, rồi cho trứng và một ít đường vào.",
    "ru": "Смешайте муку с маслом, затем добавьте яйца и немного сахара.",
    "uk": "Змішайте борошно з маслом, потім додайте яйця і трохи цукру.",
    "zh": "把面粉和黄油拌匀，然后加入鸡蛋和少许糖。",
    "ja": "小麦粉とバターをよく混ぜ、卵と砂糖を少し加える。",
    "ko": "밀가루와 버터를 잘 섞은 다음 달걀과 설탕을 조금 넣는다.",
    "ar": "اخلط الدقيق مع الزبدة ثم أضف البيض وقليلا من السكر.",
    "hi": "आटे में मक्खन मिलाएँ, फिर अंडे और थोड़ी चीनी डालें।",
}


def test_every_language_with_a_company_has_a_sentence_here() -> None:
    assert SENTENCES.keys() == company_file().keys()


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_known_by_its_language(language: str) -> None:
    assert language_of(SENTENCES[language]) == language


@pytest.mark.parametrize("language", SENTENCES)
def test_a_company_speaks_its_own_language(language: str) -> None:
    company = company_file()[language]["company"]
    assert len(company) == 4
    assert {language_of(text) for text in company} == {language}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", "en"),
        ("1, 2, 3, 4", "en"),
        ("Die Hard", "en"),
        ("Ανακατεύουμε το αλεύρι με το βούτυρο και προσθέτουμε τα αυγά.", "en"),
        ("Blanda mjölet med smöret tills det är slätt och tillsätt sedan äggen.", "en"),
        ("for (int i = 0; i < n; i++) { sum += values[i]; }", "en"),
        ("The word 面粉 means flour, and the word 黄油 means butter.", "en"),
        ("使用 transformers 加载模型，然后用 Python 写几行代码就可以运行。", "zh"),
        ("Das Buch 'The Old Man and the Sea' ist auf der Liste, die er mir gab.", "de"),
        ("Программа Python 3 написана на языке C, и её можно скачать.", "ru"),
        ("東京都は日本の首都である。", "ja"),
        ("한국(韓國)은 동아시아에 있는 나라이다.", "ko"),
        ("  \n" * 300 + GERMAN, "de"),
        ("E\u0301le\u0301ments de the\u0301orie pour les e\u0301le\u0300ves de la classe", "fr"),
    ],
)
def test_mixed_short_and_unknown_texts(text: str, language: str) -> None:
    assert language_of(text) == language


def test_only_the_beginning_of_a_text_is_read() -> None:
    assert language_of(GERMAN * 40 + ENGLISH * 1000) == "de"
