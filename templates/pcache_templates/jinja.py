"""Jinja2 templates: their schemas, and prompts rendered from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from traceback import extract_tb
from typing import NamedTuple

from jinja2 import (
    Environment,
    FileSystemLoader,
    StrictUndefined,
    Template,
    TemplateNotFound,
)
from jinja2.exceptions import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pcache_core.errors import TemplateError
from pcache_core.prompt import Segment
from pcache_templates.base import PromptTemplate
from pcache_templates.jinja_source import Source
from pcache_templates.jinja_trace import TURNS, ChatTag, Turn, traced_environment
from pcache_templates.jinja_tree import template_tree
from pcache_templates.trace import Traced, concat
from pcache_templates.tree import Node


class ChatTurn(NamedTuple):
    """A rendered chat turn. role: `system`, `user` or `assistant`."""

    role: str
    segments: tuple[Segment, ...]


def sandbox(folder: Path | None = None) -> Environment:
    """Make the environment that templates run in when none is given.

    Sandboxed, values can't be changed, a variable without a value is an error, and `{% chat %}`
    marks turns. folder: where `include`, `import` and `extends` find templates, and nowhere else;
    without one they find none.
    """
    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        loader=_ConfinedLoader(folder) if folder is not None else None,
        extensions=[ChatTag],
    )


class _ConfinedLoader(FileSystemLoader):
    """Loads from one folder; a link that leads out of it leads nowhere."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, encoding="utf-8-sig")
        self._folder = folder.resolve()

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, object]:  # type: ignore[override]
        text, filename, is_current = super().get_source(environment, template)
        if not Path(filename).resolve().is_relative_to(self._folder):
            raise TemplateNotFound(template)
        return text, filename, is_current


class JinjaTemplate(PromptTemplate):
    r"""A Jinja2 template.

    environment: whose settings, filters, globals and loader count; `sandbox()` if not given.
    label: what errors call the template.

    ```python
    template = JinjaTemplate("From:\n{% for d in docs %}{{ d }}\n{% endfor %}Q: {{ question }}")
    template.pml
    template.render(docs=["…", "…"], question="Who?").segments
    ```

    Raises: TemplateError: the template can't be parsed.
    """

    def __init__(
        self,
        source: str,
        *,
        environment: Environment | None = None,
        name: str | None = None,
        lengths: Mapping[str, int] | None = None,
        label: str = "template",
    ) -> None:
        super().__init__(name, lengths)
        self._environment = traced_environment(environment or sandbox())
        self._source = Source.parse(self._environment, source, None, label)
        self._label = label
        self._text = source

    @classmethod
    def from_file(
        cls, path: Path | str, *, lengths: Mapping[str, int] | None = None, name: str | None = None
    ) -> JinjaTemplate:
        """Read a template, which may include others from its own folder.

        The schema is called as the file is, up to its first dot. Raises: TemplateError: no such
        file, not UTF-8, or not a template.
        """
        path = Path(path)
        return cls(
            read_template(path),
            environment=sandbox(path.parent),
            name=name or path.name.partition(".")[0],
            lengths=lengths,
            label=path.name,
        )

    def trace(self, values: Mapping[str, object]) -> Traced:
        """Render. Raises: TemplateError: a value is missing or the template fails."""
        try:
            return concat([self._template.render(values)])
        except TemplateSyntaxError as error:  # of a template that this one includes
            raise TemplateError(
                f"{error.name or self._label}:{error.lineno}: {error.message}"
            ) from error
        except Exception as error:
            what = str(error) or type(error).__name__
            raise TemplateError(f"{self._label}:{_line_of(error)}: {what}") from error

    def render_chat(self, /, **values: object) -> list[ChatTurn]:
        """Render the turns that the tag `{% chat role="…" %}` marks.

        Raises: TemplateError: a value is missing, the template fails, or it marks no turn.
        """
        turns: list[Turn] = []
        self.trace({**values, TURNS: turns})
        if not turns:
            raise TemplateError(
                f'{self._label}: no turn was written; mark turns with {{% chat role="user" %}}'
            )
        return [ChatTurn(role, tuple(self._segments(text))) for role, text in turns]

    def prompt_pml(self, /, **values: object) -> str:
        """Render a prompt as PML; of a template with chat tags, what is in them."""
        turns: list[Turn] = []
        traced = self.trace({**values, TURNS: turns})
        return self._prompt_pml(concat(turn.text for turn in turns) if turns else traced)

    @cached_property
    def _template(self) -> Template:
        return self._environment.from_string(self._text)

    def raw_nodes(self) -> Iterable[Node]:
        """As the base class."""
        return template_tree(self._source)


def _line_of(error: Exception) -> int:
    """Return the line of the main template that was rendered; Jinja puts it into tracebacks."""
    frames = extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return next((line for line in lines if line is not None), 1)


def read_template(path: Path) -> str:
    """Read a template file. Raises: TemplateError: it can't be read, or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TemplateError(f"{path}: {error.strerror}; give a template file") from None
    except UnicodeDecodeError as error:
        raise TemplateError(
            f"{path}: byte {error.start} is not UTF-8; save the template as UTF-8"
        ) from None
