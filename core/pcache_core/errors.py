"""The exception tree: everything this project raises for a caller's mistake or a broken input.

```
PromptCacheError
├── ModelError            a model or tokenizer can't be loaded or used
│   └── ChatTemplateError the tokenizer has no chat template, or it can't render the messages
├── PromptError           a prompt can't be run (ValueError)
│   └── ContextLengthError  more tokens than the model's context
├── PMLError              a schema or prompt in PML is wrong; says where (ValueError)
├── OptionError           an argument is out of range or unknown (ValueError)
│   └── BudgetError       a byte budget that can't hold what it is for
├── TemplateError         a template can't be read, rendered or made a schema (ValueError)
├── AnswerError           an answer is not what was asked for (ValueError)
├── StateMismatchError    a state is of another shape, model or dtype
├── StoreError            a store can't be reached or written
├── RequestCancelledError nobody waits for a request's answer any longer
├── DeadlineExceededError an answer was not done in the time it had (TimeoutError)
├── OverloadedError       too many requests wait already
└── DependencyError       an optional package is not installed (ImportError)
```
Every message says what was wrong, what was given, the limit and the remedy.
"""


class PromptCacheError(Exception):
    """Base of every error this project raises on purpose."""


class ModelError(PromptCacheError):
    """A model or tokenizer can't be loaded or used."""


class ChatTemplateError(ModelError):
    """The tokenizer has no chat template, or the template refuses the messages."""


class PromptError(PromptCacheError, ValueError):
    """A prompt can't be run."""


class ContextLengthError(PromptError):
    """A prompt has more tokens than the model's context holds."""


class PMLError(PromptCacheError, ValueError):
    """A schema or a prompt is no PML, or the two don't fit.

    file: as named by the caller. line: counted from 1. source_line: that line, shortened.
    All three are None where the tree was not read from text.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        source_line: str | None = None,
    ) -> None:
        place = "" if line is None else f"{file or '<string>'}:{line}: "
        shown = f"\n    {source_line}" if source_line else ""
        super().__init__(f"{place}{message}{shown}")
        self.file = file
        self.line = line
        self.source_line = source_line


class OptionError(PromptCacheError, ValueError):
    """An argument is out of range, unknown, or contradicts another."""


class BudgetError(OptionError):
    """A byte budget is negative or can't hold a single state."""


class TemplateError(PromptCacheError, ValueError):
    """A template can't be read or rendered, or says what a schema can't."""


class AnswerError(PromptCacheError, ValueError):
    """An answer is not what was asked for."""


class StateMismatchError(PromptCacheError):
    """A state does not fit: other shape, other dtype, other model or damaged."""


class StoreError(PromptCacheError):
    """A store can't be reached or written."""


class RequestCancelledError(PromptCacheError):
    """Nobody waits for a request's answer any longer, so that its work was given up."""


class DeadlineExceededError(PromptCacheError, TimeoutError):
    """An answer was not done within the time that it was given."""


class OverloadedError(PromptCacheError):
    """Too many requests wait already; the same request may be taken later."""


class DependencyError(PromptCacheError, ImportError):
    """An optional package is not installed; the message has the command that installs it."""
