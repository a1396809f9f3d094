"""Chat templates in the manner of well-known models, and tokenizers that carry them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

import tiny_models

CHATML_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "Functions:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call one within <tool_call></tool_call>.<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}"
    "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if not (loop.first and m.role == 'system') %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n"
    "{% elif m.tool_calls %}<|im_start|>assistant"
    "{% if m.content %}\n{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS_WITH_TOOLS = (
    "{% for m in messages %}"
    "<|head|>{{ 'ipython' if m.role == 'tool' else m.role }}<|endhead|>\n\n"
    "{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson }}\n"
    "{% endfor %}{% endif %}"
    "{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|endhead|>\n\n{% endif %}"
)
BRACKETS_WITH_TOOLS = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last and tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}"
    "[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    "[TOOL_RESULTS] {{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] ["
    "{% for call in m.tool_calls %}{{ ', ' if not loop.first }}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, '
    '"id": "{{ call.id }}"}{% endfor %}]<eos>'
    "{% elif m.role == 'assistant' %} {{ m.content }}<eos>"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
WITHOUT_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|head|>", "<|endhead|>", "<|end|>")


def tokenizer(template: str, special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a chat template. Its special tokens are beyond the models' logits."""
    made = tiny_models.tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.chat_template = template
    return made
