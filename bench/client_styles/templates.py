"""Chat templates in the manner of widely used model families, small enough to be read.

They differ in what breaks a prefix: one hides the thinking of earlier questions, one writes calls as JSON in its own
spacing, one opens the thinking in the prompt, one puts nothing before an answer at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agentserve.text.chat import ChatTemplate
from agentserve.text.tokenizer import ByteTokenizer, Tokenizer

_CALLS = """\
{%- macro call_texts(calls) %}
{%- for call in calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endmacro %}
{%- macro tool_texts(tools) %}
{{- '\\n\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}
{{- '\\n</tools>' }}
{%- endmacro %}
"""
_CHATML = (
    _CALLS
    + """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{{- '<|im_start|>system\\n' ~ first ~ (tool_texts(tools) if tools else '') ~ '<|im_end|>\\n' }}
{%- set last = namespace(query=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<|im_start|>user\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
THINKING
{{- message.content ~ call_texts(message.tool_calls) ~ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\nOPENING' }}{% endif %}
"""
)
_SHOW_LATE_THINKING = """\
{%- if loop.index0 > last.query %}
{{- '<think>\\n' ~ (message.reasoning_content or '') ~ '\\n</think>\\n\\n' }}
{%- endif %}"""
_LLAMA = """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
{%- set role = 'ipython' if message.role == 'tool' else message.role %}
{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
{%- if message.tool_calls %}
{{- '{"name": "' ~ message.tool_calls[0].function.name ~ '", "parameters": ' }}
{{- message.tool_calls[0].function.arguments | tojson ~ '}' }}
{%- else %}
{{- message.content | trim }}
{%- endif %}
{%- if loop.first and tools %}{% for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}{% endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
_MISTRAL = """\
{{- '<s>' }}
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}{{ '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- if first %}{{ '[INST] ' ~ first ~ '[/INST]' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '[INST] ' ~ message.content ~ '[/INST]' }}
{%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS] ' ~ message.content ~ '[/TOOL_RESULTS]' }}
{%- elif message.role == 'assistant' %}
{{- (' ' ~ message.content) if message.content }}
{%- if message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{{- '{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) }}
{{- ', "id": "' ~ call.id ~ '"}' ~ (', ' if not loop.last else '') }}
{%- endfor %}{{ ']' }}
{%- endif %}
{{- '</s>' }}
{%- endif %}
{%- endfor %}
"""


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of a family read and write."""

    name: str
    template: str
    special: tuple[str, ...]
    """Special tokens, the one that ends a turn last."""
    tool_format: str
    opens_thinking: bool = False
    """Whether the prompt ends with the tag that opens the thinking."""

    def chat_template(self, tokenizer: Tokenizer) -> ChatTemplate:
        return ChatTemplate({"default": self.template}, tokenizer.special_tokens)

    def tokenizer(self) -> Tokenizer:
        """A token for each byte and for each special token."""
        return _FamilyTokenizer(self.special)


class _FamilyTokenizer(ByteTokenizer):
    def __init__(self, special: tuple[str, ...]) -> None:
        self.SPECIAL = special  # type: ignore[assignment]
        self.vocab_size = 256 + len(special)
        self.eos_token_ids = (255 + len(special),)  # type: ignore[assignment]
        self.special_tokens = MappingProxyType({"eos_token": special[-1]})


_IM = ("<|im_start|>", "<|im_end|>")
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("chatml", _CHATML.replace("THINKING", "").replace("OPENING", ""), _IM, "hermes"),
        Family(
            "late-thinking",
            _CHATML.replace("THINKING", _SHOW_LATE_THINKING).replace("OPENING", ""),
            _IM,
            "hermes",
        ),
        Family(
            "open-thinking",
            _CHATML.replace("THINKING", "").replace("OPENING", "<think>\\n"),
            _IM,
            "hermes",
            opens_thinking=True,
        ),
        Family(
            "headers",
            _LLAMA,
            ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            "llama3_json",
        ),
        Family(
            "instructions",
            _MISTRAL,
            (
                *("<s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
                *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "</s>"),
            ),
            "mistral_array",
        ),
    )
}
