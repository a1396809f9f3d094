"""What templates make is PML: their schemas are its trees, and its parser reads them as written."""

from __future__ import annotations

from hypothesis import example, given, settings

from pcache_core.pml import Module, Scaffold, Schema, parse_prompt, parse_schema, place, resolve
from pcache_templates import JinjaTemplate, to_pml
from pml_documents import schemas


@settings(max_examples=150, deadline=None)
@example(Schema("s", (Module("a"), Module("b"), Scaffold(("a", "b")))))
@given(schema=schemas())
def test_a_schema_that_is_written_is_read_as_it_was(schema: Schema) -> None:
    assert parse_schema(to_pml(schema)) == schema


def test_a_templates_schema_is_laid_out_without_being_written() -> None:
    template = JinjaTemplate(
        "Answer from:\n{% for d in docs %}- {{ d }}\n{% endfor %}{% if brief %}Be brief.{% endif %}"
        "{{ '' }} {{ question }}"
    )
    values = {"docs": ["One.", "Two."], "brief": True, "question": "Who?"}
    layout = place(template.schema, list)
    prompt = parse_prompt(template.prompt_pml(**values))
    read = resolve(layout, prompt, positions="compact").text
    assert read == "Answer from:\n- One.\n- Two.\nBe brief. Who?"
