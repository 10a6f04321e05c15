"""The official SDK against the server, over real HTTP."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest

from agentserve.core.request import FinishReason
from tests.server.daemon import EOS
from tests.server.scripted import LOGPROB, MAX_MODEL_LEN, Run, replying, serve

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
# "<user>hi" + "<assistant>"
NUM_HELLO_TOKENS = 8 + 11


async def test_chat_whole() -> None:
    async with serve(replying("Hällo", num_cached_tokens=16)) as daemon:
        answer = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO)
        assert answer.object == "chat.completion"
        assert answer.model == "test-model"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content == "Hällo"
        assert answer.choices[0].finish_reason == "stop"
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        # six bytes and the end-of-sequence token
        assert (usage.prompt_tokens, usage.completion_tokens) == (NUM_HELLO_TOKENS, 7)
        assert usage.total_tokens == NUM_HELLO_TOKENS + 7
        assert usage.prompt_tokens_details.cached_tokens == 16


async def test_chat_stream() -> None:
    async with serve(replying("Hällo", num_cached_tokens=16)) as daemon:
        stream = await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert len({chunk.id for chunk in chunks}) == 1
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert chunks[0].choices[0].delta.role == "assistant"
        *text_chunks, last, usage_chunk = chunks
        assert "".join(chunk.choices[0].delta.content or "" for chunk in text_chunks) == "Hällo"
        assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in text_chunks)
        assert last.choices[0].finish_reason == "stop"
        assert usage_chunk.choices == []
        usage = usage_chunk.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (NUM_HELLO_TOKENS, 7)
        assert usage.prompt_tokens_details.cached_tokens == 16


async def test_stream_without_usage_has_none() -> None:
    async with serve() as daemon:
        stream = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
        assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"


async def test_continuous_usage_counts_up() -> None:
    async with serve(replying("abc")) as daemon:
        stream = await daemon.openai().chat.completions.create(
            model="test-model",
            messages=HELLO,
            stream=True,
            extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        )
        counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
        assert counts[0] == 0
        assert counts == sorted(counts)
        assert counts[-1] == 4


async def test_sampling_reaches_the_engine() -> None:
    async with serve(replying("abc")) as daemon:
        await daemon.openai().chat.completions.create(
            model="test-model",
            messages=HELLO,
            temperature=0.25,
            top_p=0.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            seed=42,
            max_completion_tokens=9,
            logit_bias={"65": 1, "66": -2},
            extra_body={
                "top_k": 7,
                "min_p": 0.125,
                "repetition_penalty": 1.5,
                "min_tokens": 2,
                "stop_token_ids": [3],
                "priority": -1,
                "cache_salt": "s",
                "prompt_cache_key": "session-1",
            },
        )
        submitted = daemon.driver.submitted[0]
        sampling = submitted.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 7, 0.125)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
        assert (sampling.repetition_penalty, sampling.seed, sampling.max_tokens) == (1.5, 42, 9)
        assert (sampling.min_tokens, sampling.stop_token_ids) == (2, (EOS, 3))
        assert sampling.logit_bias == ((65, 1.0), (66, -2.0))
        assert (submitted.priority, submitted.cache_salt, submitted.session_id) == (-1, "s", "session-1")


async def test_defaults() -> None:
    """Chat may fill the window; completions stop after 16 tokens, or where the window ends; seeds differ."""
    async with serve() as daemon:
        client = daemon.openai()
        for _ in range(2):
            await client.chat.completions.create(model="test-model", messages=HELLO)
        await client.completions.create(model="test-model", prompt="hi")
        await client.completions.create(model="test-model", prompt=[7] * (MAX_MODEL_LEN - 6))
        chat, again, completion, long = (submitted.sampling for submitted in daemon.driver.submitted)
        assert chat.max_tokens == MAX_MODEL_LEN - NUM_HELLO_TOKENS
        assert chat.temperature == 1.0
        assert chat.seed != again.seed
        assert completion.max_tokens == 16
        assert long.max_tokens == 6


async def test_ignore_eos() -> None:
    async with serve(replying(b"ab\x00")) as daemon:
        answer = await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, max_tokens=2, extra_body={"ignore_eos": True}
        )
        assert daemon.driver.submitted[0].sampling.stop_token_ids == ()
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content == "ab"


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string(stream: bool) -> None:
    """The text ends before the stop string, the engine is told, and what it had sampled by then is dropped."""
    async with serve(replying("one END two END three")) as daemon:
        client = daemon.openai()
        if stream:
            chunks = await client.chat.completions.create(
                model="test-model", messages=HELLO, stop=["END", "never"], stream=True
            )
            choices = [chunk.choices[0] async for chunk in chunks]
            text = "".join(choice.delta.content or "" for choice in choices)
            reason = choices[-1].finish_reason
        else:
            answer = await client.chat.completions.create(model="test-model", messages=HELLO, stop="END")
            text, reason = answer.choices[0].message.content or "", answer.choices[0].finish_reason
            assert answer.usage is not None
            assert answer.usage.completion_tokens == len("one END")
        assert (text, reason) == ("one ", "stop")
        assert daemon.driver.ended == [(daemon.driver.submitted[0].request_id, FinishReason.STOP)]


async def test_stop_string_that_never_completes_is_text() -> None:
    async with serve(replying("one EN")) as daemon:
        answer = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, stop="END")
        assert answer.choices[0].message.content == "one EN"


async def test_chat_logprobs() -> None:
    async with serve(replying("ab")) as daemon:
        client = daemon.openai()
        answer = await client.chat.completions.create(model="test-model", messages=HELLO, logprobs=True, top_logprobs=2)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert [entry.token for entry in logprobs.content] == ["a", "b"]
        assert logprobs.content[0].bytes == [97]
        assert math.isclose(logprobs.content[0].logprob, LOGPROB)
        assert [entry.token for entry in logprobs.content[0].top_logprobs] == ["a", "b"]

        stream = await client.chat.completions.create(model="test-model", messages=HELLO, logprobs=True, stream=True)
        tokens = [
            entry.token
            async for chunk in stream
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content or ()
        ]
        assert tokens == ["a", "b"]


async def test_logprobs_show_the_bytes_of_half_a_character() -> None:
    async with serve(replying("é")) as daemon:
        answer = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, logprobs=True)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert [entry.bytes for entry in logprobs.content] == [[0xC3], [0xA9]]
        assert answer.choices[0].message.content == "é"


async def test_completion_logprobs_and_echo() -> None:
    async with serve(replying("ab")) as daemon:
        client = daemon.openai()
        answer = await client.completions.create(model="test-model", prompt="x", logprobs=1)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == ["a", "b"]
        assert logprobs.token_logprobs == [LOGPROB, LOGPROB]
        assert logprobs.top_logprobs == [{"a": LOGPROB}, {"b": LOGPROB}]
        assert logprobs.text_offset == [0, 1]
        echoed = await client.completions.create(model="test-model", prompt="x", echo=True)
        assert echoed.choices[0].text == "xab"
        stream = await client.completions.create(model="test-model", prompt=[120, 121], echo=True, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "xyab"


async def test_completions_take_many_prompts() -> None:
    """Choice p * n + i belongs to prompt p; each prompt counts once in the usage."""

    async def script(run: Run) -> None:
        run.num_cached_tokens = 1
        await run.reply(bytes(run.submitted.prompt_token_ids[-1:]))

    async with serve(script) as daemon:
        client = daemon.openai()
        answer = await client.completions.create(model="test-model", prompt=["pA", "B"], n=2)
        assert [choice.text for choice in answer.choices] == ["A", "A", "B", "B"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        # (BOS p A) + (BOS B); 4 choices of a byte and the end token; the first choice of each prompt
        assert (usage.prompt_tokens, usage.completion_tokens) == (3 + 2, 4 * 2)
        assert usage.prompt_tokens_details.cached_tokens == 2
        answer = await client.completions.create(model="test-model", prompt=[[67], [68, 69]])
        assert [choice.text for choice in answer.choices] == ["C", "E"]


async def test_n_choices_have_seeds_of_their_own_and_interleave() -> None:
    turn = asyncio.Barrier(3)

    async def script(run: Run) -> None:
        index = int(run.id[-1])
        for _ in range(2):
            await turn.wait()
            run.token(65 + index)
        run.token(EOS)
        run.finish(FinishReason.STOP)

    async with serve(script) as daemon:
        stream = await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, n=3, seed=5, stream=True
        )
        texts = ["", "", ""]
        order = []
        reasons = {}
        async for chunk in stream:
            choice = chunk.choices[0]
            texts[choice.index] += choice.delta.content or ""
            if choice.delta.content:
                order.append(choice.index)
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        assert texts == ["AA", "BB", "CC"]
        assert order != sorted(order)
        assert reasons == {0: "stop", 1: "stop", 2: "stop"}
        seeds = [submitted.sampling.seed for submitted in daemon.driver.submitted]
        assert seeds[0] == 5
        assert len(set(seeds)) == 3


async def test_a_prompt_may_end_within_a_character() -> None:
    async with serve(replying(b"\x82\xac!")) as daemon:
        answer = await daemon.openai().completions.create(model="test-model", prompt=[0xE2])
        assert answer.choices[0].text == "€!"


async def test_half_a_character_is_never_sent() -> None:
    async with serve(replying("a€😀")) as daemon:
        stream = await daemon.openai().chat.completions.create(model="test-model", messages=HELLO, stream=True)
        pieces = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices[0].delta.content]
        assert "".join(pieces) == "a€😀"
        assert not any("\ufffd" in piece for piece in pieces)


async def test_sync_client_and_models() -> None:
    def talk(url: str) -> tuple[str | None, list[str], str]:
        with openai.OpenAI(api_key="none", base_url=url, max_retries=0) as client:
            answer = client.chat.completions.create(model="other", messages=HELLO)
            models = [model.id for model in client.models.list()]
            return answer.choices[0].message.content, models, client.models.retrieve("or/g").id

    async with serve(aliases=("other", "or/g")) as daemon:
        # The same routes exist without the prefix.
        for base in (f"{daemon.url}/v1", daemon.url):
            content, models, retrieved = await asyncio.to_thread(talk, base)
            assert content == "Hello"
            assert models == ["test-model", "other", "or/g"]
            assert retrieved == "or/g"


async def test_messages_of_all_roles_are_rendered() -> None:
    messages: list[Any] = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": [{"type": "text", "text": "D"}, {"type": "text", "text": "d"}]},
        {"role": "user", "content": "U"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "cut'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "T"},
    ]
    async with serve() as daemon:
        await daemon.openai().chat.completions.create(
            model="test-model", messages=messages, extra_body={"chat_template_kwargs": {"tail": "<think>"}}
        )
        prompt = bytes(daemon.driver.submitted[0].prompt_token_ids).decode()
        assert prompt == '<system>S\n\nD\nd<user>U<assistant>[f {"x": "cut]<tool>T<assistant><think>'


async def test_session_is_read_from_headers() -> None:
    async with serve() as daemon:
        await daemon.openai().chat.completions.create(
            model="test-model", messages=HELLO, extra_headers={"X-Session-Id": "s-1", "X-Agent-Id": "a-1"}
        )
        submitted = daemon.driver.submitted[0]
        assert (submitted.session_id, submitted.agent_id) == ("s-1", "a-1")
