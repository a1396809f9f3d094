"""The exception tree: everything this project raises for a caller's mistake or a broken input.

```
PromptCacheError
├── ModelError            a model or tokenizer can't be loaded or used
│   └── ChatTemplateError the tokenizer has no chat template, or it can't render the messages
├── PromptError           a prompt can't be run (ValueError)
│   └── ContextLengthError  more tokens than the model's context
├── OptionError           an argument is out of range or unknown (ValueError)
│   └── BudgetError       a byte budget that can't hold what it is for
├── TemplateError         a template can't be read, rendered or made a schema (ValueError)
├── StateMismatchError    a state is of another shape, model or dtype
└── StoreError            a store can't be reached or written
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


class OptionError(PromptCacheError, ValueError):
    """An argument is out of range, unknown, or contradicts another."""


class BudgetError(OptionError):
    """A byte budget is negative or can't hold a single state."""


class TemplateError(PromptCacheError, ValueError):
    """A template can't be read or rendered, or says what a schema can't."""


class StateMismatchError(PromptCacheError):
    """A state does not fit: other shape, other dtype, other model or damaged."""


class StoreError(PromptCacheError):
    """A store can't be reached or written."""
