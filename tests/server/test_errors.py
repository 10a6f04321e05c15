"""Whatever is wrong: the right status, the SDK's own exception, and a daemon that goes on."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import aiohttp
import openai
import pytest

from agentserve.core.request import FinishReason
from tests.server.scripted import MAX_MODEL_LEN, Run, ScriptedDaemon, replying, serve

HELLO: list[Any] = [{"role": "user", "content": "hi"}]


async def post(
    daemon: ScriptedDaemon, data: bytes | dict[str, Any], path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, Any]]:
    """Status and `error` object of the answer to a raw body."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    async with (
        aiohttp.ClientSession() as session,
        session.post(daemon.url + path, data=body, headers=headers) as response,
    ):
        answer = await response.json()
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return response.status, error


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "not valid JSON"),
        (b'{"messages": [', "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"messages": "\xff\xfe"}', "not valid UTF-8"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
    ],
)
async def test_bodies_that_are_no_json_object(data: bytes, part: str) -> None:
    async with serve() as daemon:
        status, error = await post(daemon, data)
        assert status == 400
        assert error["type"] == "invalid_request_error"
        assert error["code"] == "invalid_json"
        assert part in error["message"]
        assert not daemon.driver.submitted


TOOL = {"type": "function", "function": {"name": "f"}}
_NESTED: Any = []
for _ in range(90):
    _NESTED = [_NESTED]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": _NESTED}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"model": 7}, "model"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ({"max_completion_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": 3}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"priority": 2**40}, "priority"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": "f"}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools[0].function.parameters"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ],
)
async def test_wrong_chat_fields_are_named(fields: dict[str, Any], param: str) -> None:
    async with serve() as daemon:
        status, error = await post(daemon, {"messages": HELLO} | fields)
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert not daemon.driver.submitted


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"best_of": 2}, "best_of"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
async def test_what_cannot_be_done_is_said(fields: dict[str, Any], param: str) -> None:
    async with serve() as daemon:
        status, error = await post(daemon, {"messages": HELLO} | fields)
        assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
    ],
)
async def test_wrong_completion_fields_are_named(fields: dict[str, Any], param: str) -> None:
    async with serve() as daemon:
        status, error = await post(daemon, fields, "/v1/completions")
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert not daemon.driver.submitted


async def test_harmless_and_unknown_fields_are_accepted(caplog: pytest.LogCaptureFixture) -> None:
    fields = {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "best_of": 1,
        "modalities": ["text"],
        "stop": None,
        "temperature": None,
        "top_k": -1,
        "user": 7,
        "metadata": "odd",
        "store": False,
        "service_tier": "auto",
        "a_new_field": {"x": 1},
    }
    caplog.set_level(logging.DEBUG, logger="agentserve.server.body")
    async with serve() as daemon, aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.post(f"{daemon.url}/v1/chat/completions", json={"messages": HELLO} | fields) as response:
                assert response.status == 200
        assert daemon.driver.submitted[0].sampling.top_k == 0
    assert sum("a_new_field" in record.getMessage() for record in caplog.records) == 1


async def test_tools_that_run_elsewhere_are_left_out() -> None:
    async with serve() as daemon, aiohttp.ClientSession() as session:
        body = {"messages": HELLO, "tools": [{"type": "web_search"}, TOOL]}
        async with session.post(f"{daemon.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
        assert bytes(daemon.driver.submitted[0].prompt_token_ids).startswith(b"<tools>f<user>")


async def test_lone_surrogates_become_replacement_characters() -> None:
    async with serve() as daemon, aiohttp.ClientSession() as session:
        body = rb'{"messages": [{"role": "user", "content": "a\ud83d b\ud83d\ude00"}]}'
        async with session.post(f"{daemon.url}/v1/chat/completions", data=body) as response:
            assert response.status == 200
        assert "a\ufffd b😀" in bytes(daemon.driver.submitted[0].prompt_token_ids).decode()


async def test_sdk_exceptions() -> None:
    async with serve(max_queued_requests=0) as daemon:
        client = daemon.openai()
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(model="test-model", messages=[])
        assert wrong.value.param == "messages"
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="gpt-9", messages=HELLO)
        assert unknown.value.code == "model_not_found"
        assert "test-model" in unknown.value.message
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-9")
        with pytest.raises(openai.NotFoundError) as route:
            await client.embeddings.create(model="test-model", input="x")
        assert route.value.code == "not_found"
        with pytest.raises(openai.InternalServerError) as full:
            await client.chat.completions.create(model="test-model", messages=HELLO)
        assert full.value.status_code == 503
        assert full.value.response.headers["Retry-After"] == "5"
        assert full.value.response.headers["x-should-retry"] == "true"


@pytest.mark.parametrize("stream", [False, True])
async def test_overflow_is_refused_before_any_header(stream: bool) -> None:
    async with serve() as daemon:
        long: list[Any] = [{"role": "user", "content": "x" * MAX_MODEL_LEN}]
        with pytest.raises(openai.BadRequestError) as error:
            await daemon.openai().chat.completions.create(model="test-model", messages=long, stream=stream)
        assert error.value.code == "context_length_exceeded"
        assert error.value.param == "messages"
        # "<user>" + 200 + "<assistant>"
        assert f"maximum context length is {MAX_MODEL_LEN} tokens" in error.value.message
        assert "217 input tokens" in error.value.message
        with pytest.raises(openai.BadRequestError) as completion:
            await daemon.openai().completions.create(model="test-model", prompt="x" * MAX_MODEL_LEN, stream=stream)
        assert completion.value.param == "prompt"
        assert not daemon.driver.submitted


async def test_queue_limit_in_the_middle_of_n_choices_gives_all_back() -> None:
    never = asyncio.Event()

    async def script(run: Run) -> None:
        await never.wait()

    async with serve(script, max_queued_requests=2) as daemon:
        with pytest.raises(openai.InternalServerError):
            await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, n=3)
        await daemon.driver.idle.wait()
        assert len(daemon.driver.submitted) == 2
        assert [reason for _, reason in daemon.driver.ended] == [FinishReason.CANCELLED] * 2


async def test_any_model_name_if_asked_for() -> None:
    async with serve(accept_any_model=True) as daemon:
        answer = await daemon.openai().chat.completions.create(model="gpt-x", messages=HELLO)
        assert answer.model == "gpt-x"


async def test_engine_failures() -> None:
    """Before the stream: 500. In the stream: an error event, which the SDK raises. Afterwards: 500 and not ready."""
    half_way = asyncio.Event()

    async def script(run: Run) -> None:
        run.token(65)
        await half_way.wait()
        run.finish(FinishReason.ERROR, "the device is on fire")

    async with serve(script) as daemon:
        client = daemon.openai()
        stream = await client.chat.completions.create(model="test-model", messages=HELLO, stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="the device is on fire") as streamed:
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if text:
                    half_way.set()
        assert text == "A"
        assert not isinstance(streamed.value, openai.APIStatusError)
        with pytest.raises(openai.InternalServerError, match="the device is on fire"):
            await client.chat.completions.create(model="test-model", messages=HELLO)
        daemon.driver.die("the engine is gone")
        with pytest.raises(openai.InternalServerError, match="the engine is gone"):
            await client.chat.completions.create(model="test-model", messages=HELLO)
        async with aiohttp.ClientSession() as session:
            for path in ("/health", "/ready"):
                async with session.get(daemon.url + path) as response:
                    assert response.status == 503
                    assert (await response.json())["error"]["message"] == "the engine is gone"


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_the_engine_dies_under_running_requests(num_choices: int) -> None:
    started = asyncio.Event()
    never = asyncio.Event()

    async def script(run: Run) -> None:
        run.token(65)
        started.set()
        await never.wait()

    async with serve(script) as daemon:
        client = daemon.openai()
        stream = await client.chat.completions.create(model="test-model", messages=HELLO, stream=True, n=num_choices)
        whole = asyncio.create_task(client.chat.completions.create(model="test-model", messages=HELLO, n=num_choices))
        while daemon.driver.num_running < 2 * num_choices:
            await asyncio.sleep(0)
        daemon.driver.die("out of luck")
        with pytest.raises(openai.APIError, match="out of luck"):
            async for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match="out of luck"):
            await whole


async def test_a_path_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="agentserve.request")
    async with serve() as daemon:
        status, _ = await post(daemon, b"", "/x%0Aid=forged")
        assert status == 404
    assert all("\n" not in record.getMessage() for record in caplog.records)


async def test_one_of_n_choices_fails() -> None:
    never = asyncio.Event()

    async def script(run: Run) -> None:
        if run.id.endswith("-1"):
            run.finish(FinishReason.ERROR, "no luck")
        else:
            await never.wait()

    async with serve(script) as daemon:
        with pytest.raises(openai.InternalServerError, match="no luck"):
            await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, n=3)
        await daemon.driver.idle.wait()


async def test_our_own_bugs_are_logged_but_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as daemon:

        def explode(*args: object) -> None:
            raise ValueError("secret detail")

        monkeypatch.setattr(daemon.state.generation, "_tokenize", explode)
        status, error = await post(daemon, {"messages": HELLO})
        assert (status, error["code"]) == (500, "internal_error")
        assert "secret" not in error["message"]
        assert "secret detail" in caplog.text


async def test_routes_methods_and_sizes() -> None:
    async with serve(max_body_bytes=1000) as daemon, aiohttp.ClientSession() as session:
        status, error = await post(daemon, {"messages": HELLO}, "/v2/chat/completions")
        assert (status, error["code"]) == (404, "not_found")
        async with session.get(f"{daemon.url}/v1/chat/completions") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert (await response.json())["error"]["code"] == "method_not_allowed"
        status, error = await post(daemon, b"x" * 1001)
        assert (status, error["code"]) == (413, "request_too_large")
        status, error = await post(daemon, b"x" * 1000)
        assert (status, error["code"]) == (400, "invalid_json")
        status, error = await post(daemon, b"no gzip", **{"Content-Encoding": "gzip"})
        assert status == 400
        # The content type does not matter; what counts is that the body is JSON.
        headers = {"Content-Type": "text/plain"}
        body = json.dumps({"messages": HELLO}).encode()
        async with session.post(f"{daemon.url}/v1/chat/completions", data=body, headers=headers) as response:
            assert response.status == 200


async def test_errors_do_not_harm_the_daemon() -> None:
    async with serve(replying("fine")) as daemon:
        for data in (b"{", b"\xff", b"[" * 50_000, b'{"messages": []}'):
            status, _ = await post(daemon, data)
            assert status == 400
        answer = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO)
        assert answer.choices[0].message.content == "fine"


async def test_failures_inside_a_stream_are_events(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*args: object) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr("agentserve.server.openai_chat.encode_usage", explode)
    async with serve() as daemon:
        stream = await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        with pytest.raises(openai.APIError, match="Internal error"):
            async for _ in stream:
                pass
        assert "secret detail" in caplog.text


async def test_odd_expectations_are_refused() -> None:
    async with (
        serve() as daemon,
        aiohttp.ClientSession() as session,
        session.get(f"{daemon.url}/health", headers={"Expect": "miracles"}) as response,
    ):
        assert response.status == 417
        assert response.headers["x-agentserve-executor"] == "scripted"
