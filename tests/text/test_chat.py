from __future__ import annotations

import json
import re

import pytest
import transformers

from agentserve.errors import InvalidRequestError, ModelFormatError
from agentserve.text.chat import ChatTemplate, load_chat_template
from agentserve.text.tokenizer import ByteTokenizer, load_tokenizer
from tests.models.builders import SMOLLM2, requires_smollm2
from tests.text.builders import gguf_source, hf_source, trained_bpe

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
# What the templates of Qwen and Llama 3 use: tools as JSON, namespaces, loop controls, generation blocks, own errors.
RICH = """\
{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ tool | tojson(indent=2) }}{%- endfor %}
    {{- '</tools>\\n' }}
{%- endif %}
{%- set ns = namespace(last='none') %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}{%- endif %}
    {%- if message.content == 'skip' %}{%- continue %}{%- endif %}
    {%- set ns.last = message.role %}
    {% generation %}<{{ message['role'] }}>{{ message.content | trim }}{% endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- '<call>' ~ call.function.name ~ call.function.arguments | tojson ~ '</call>' }}
    {%- endfor %}
{%- endfor %}
{{ ns.last }} {{ eos_token }} {{ strftime_now('%Y') }}
{%- if enable_thinking is defined and not enable_thinking %}<no think>{% endif %}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Größe <b> & 'x'",
            "parameters": {"type": "object", "z": 1, "a": 2},
        },
    }
]
CONVERSATION = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Where <is> it? "},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "find", "arguments": {"q": "é", "n": 2}}}],
    },
    {"role": "tool", "content": "here", "tool_call_id": "1"},
    {"role": "user", "content": "skip"},
]
USER = {"role": "user", "content": "hi"}


def template(text: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate({"default": text}, special_tokens)


def refused(messages, message, text: str = PLAIN) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        template(text).render(messages)
    assert caught.value.param == "messages"


@pytest.fixture(scope="module")
def reference():
    trained_bpe("qwen2")
    tokenizer = transformers.Qwen2Tokenizer(vocab=trained_bpe.vocabulary, merges=trained_bpe.merges)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equals_transformers(reference, tools, options, add_generation_prompt):
    ours = template(RICH, eos_token="<|im_end|>").render(
        CONVERSATION, tools=tools, add_generation_prompt=add_generation_prompt, template_kwargs=options
    )
    assert ours == reference.apply_chat_template(
        CONVERSATION,
        tools=tools,
        chat_template=RICH,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        **options,
    )
    assert re.search(r"tool <\|im_end\|> 2\d\d\d", ours)


@pytest.mark.smollm2
@requires_smollm2
def test_smollm2_template():
    tokenizer = load_tokenizer(SMOLLM2)
    chat = load_chat_template(SMOLLM2, tokenizer)
    assert not chat.supports_tools
    prompt = chat.render([{"role": "developer", "content": "Be brief."}, USER])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    token_ids = tokenizer.encode(prompt)
    # <|im_start|> is 1 and <|im_end|> is 2: each once for a message, and one start for the answer.
    assert (token_ids.count(1), token_ids.count(2)) == (3, 2)


def test_the_next_turn_continues_the_prompt():
    # The prefix cache lives from this.
    chat = load_chat_template(None, ByteTokenizer())
    first = chat.render([USER])
    second = chat.render([USER, {"role": "assistant", "content": "ho"}, USER])
    assert second.startswith(first + "ho<|im_end|>\n")


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template(PLAIN).render([{"role": "user", "content": parts}]) == "[user]a\nb[go]"
    assert template(PLAIN).render([{"role": "assistant", "content": None}]) == "[assistant][go]"


def test_developer_becomes_system_unless_the_template_knows_it():
    messages = [{"role": "developer", "content": "x"}]
    assert template(PLAIN).render(messages) == "[system]x[go]"
    assert template(PLAIN + "{# developer #}").render(messages) == "[developer]x[go]"


def test_arguments_of_tool_calls_are_parsed_but_the_request_is_left_alone():
    text = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }};{% endfor %}{% endfor %}"
    )
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ['{"b":1,"a":"é"}', "", "{oops", "3"]]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    before = json.dumps(message)
    assert template(text).render([message]) == '{"b": 1, "a": "é"};{};"{oops";"3";'
    assert json.dumps(message) == before


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([USER, {"role": "wizard", "content": "x"}], r"messages\[1\].role is 'wizard'; known are system"),
        ([{"content": "x"}], r"messages\[0\].role is None"),
        ([{"role": ["user"], "content": "x"}], r"role is \['user'\]"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "user", "content": 3}], "must be a string or a list of text parts"),
        ([{"role": "user", "content": {"type": "text"}}], "must be a string or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "part of type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "part of type 'str'"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "part of type 'text'"),
        ([{"role": "assistant", "tool_calls": 5}], "tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "entry without a function"),
    ],
)
def test_bad_messages(messages, message):
    refused(messages, message)


def test_errors_of_the_template_are_the_requests():
    refused([USER, {"role": "system", "content": "x"}], "cannot render these messages: system must come first", RICH)
    refused([USER], "cannot render these messages", "{{ messages[0].content + 1 }}")
    refused([USER], "cannot render these messages", "{{ 1 / 0 }}")
    refused([USER], "cannot render these messages", "{{ messages[7].content.x }}")


def test_templates_run_in_a_sandbox():
    refused([USER], "cannot render", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    refused([USER], "cannot render", "{{ messages.append(1) }}")
    refused([USER], "cannot render", "{% for i in range(10000000) %}{% endfor %}")


def test_a_damaged_template():
    with pytest.raises(ModelFormatError, match="chat template 'default' of the model is damaged"):
        template("{% for %}")


# ---- where templates come from ----


def test_gguf_templates():
    tokenizer = ByteTokenizer()
    metadata = {"tokenizer.chat_template": PLAIN, "tokenizer.chat_template.tool_use": "with tools"}
    chat = load_chat_template(gguf_source(metadata), tokenizer)
    assert chat.supports_tools
    assert chat.render([USER]) == "[user]hi[go]"
    assert chat.render([USER], tools=TOOLS) == "with tools"
    assert load_chat_template(gguf_source({}), tokenizer) is None


def test_directory_templates(tmp_path):
    tokenizer = ByteTokenizer()
    assert load_chat_template(hf_source(tmp_path), tokenizer) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": PLAIN}))
    assert load_chat_template(hf_source(tmp_path), tokenizer).render([USER]) == "[user]hi[go]"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    config.write_text(json.dumps({"chat_template": named}))
    chat = load_chat_template(hf_source(tmp_path), tokenizer)
    assert (chat.render([USER]), chat.render([USER], tools=TOOLS)) == ("D", "T")
    (tmp_path / "chat_template.jinja").write_text("file: {{ eos_token }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("extra")
    chat = load_chat_template(hf_source(tmp_path), tokenizer)
    assert (chat.render([USER]), chat.render([USER], tools=TOOLS)) == ("file: <|im_end|>", "extra")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFormatError, match="cannot read"):
        load_chat_template(hf_source(tmp_path), tokenizer)
    assert load_chat_template(hf_source(None), tokenizer) is None


def test_templates_written_by_transformers(reference, tmp_path):
    reference.chat_template = {"default": PLAIN, "tool_use": RICH}
    reference.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(hf_source(tmp_path))
    chat = load_chat_template(hf_source(tmp_path), tokenizer)
    for tools in (None, TOOLS):
        expected = reference.apply_chat_template(CONVERSATION, tools=tools, tokenize=False, add_generation_prompt=True)
        assert chat.render(CONVERSATION, tools=tools) == expected
