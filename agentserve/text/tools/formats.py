"""The tool-call formats by name, and which of them a chat template uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from agentserve.text.tools.hermes import HermesParser
from agentserve.text.tools.llama_json import TAG, LlamaJsonParser
from agentserve.text.tools.mistral import ARGS, CALL_ID, CALLS, MistralParser
from agentserve.text.tools.parser import ToolCallParser
from agentserve.text.tools.pythonic import TAGS, PythonicParser
from agentserve.text.tools.qwen_xml import QwenXmlParser
from agentserve.text.tools.spec import ToolSpec


class _MakeParser(Protocol):
    def __call__(self, tools: Sequence[ToolSpec]) -> ToolCallParser: ...


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes tool calls."""

    name: str
    make_parser: _MakeParser
    markers: tuple[str, ...] = ()
    """Texts that may be special tokens of the model; the parser has to see them."""


_MISTRAL_MARKERS = (CALLS, ARGS, CALL_ID)
TOOL_FORMATS = MappingProxyType(
    {
        tool_format.name: tool_format
        for tool_format in (
            ToolFormat("hermes", HermesParser, ("<tool_call>", "</tool_call>")),
            ToolFormat("qwen3_coder", QwenXmlParser, ("<tool_call>", "</tool_call>")),
            ToolFormat("llama3_json", LlamaJsonParser, (TAG,)),
            ToolFormat("llama_pythonic", PythonicParser, (*TAGS, "<|python_end|>")),
            ToolFormat("mistral", MistralParser, _MISTRAL_MARKERS),
            ToolFormat("mistral_array", MistralParser, _MISTRAL_MARKERS),
        )
    }
)


def detect_tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template shows the model; None if it shows none that is known."""
    if "<function=" in template and "<parameter=" in template:
        name = "qwen3_coder"
    elif CALLS in template:
        name = "mistral" if ARGS in template else "mistral_array"
    elif "<tool_call>" in template:
        name = "hermes"
    elif "[func_name1(" in template or "<|python_start|>" in template:
        name = "llama_pythonic"
    elif TAG in template or "Environment: ipython" in template:
        name = "llama3_json"
    else:
        return None
    return TOOL_FORMATS[name]
