"""The SDK, the server, the engine thread and the control plane together, on simulated timing."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp
import openai

from tests.server.simulated import BLOCK_SIZE, TEXT, serve

SYSTEM = "You are an agent with many tools. " * 4


async def test_the_second_turn_of_a_session_finds_the_first_one_in_the_cache() -> None:
    async with serve() as daemon:
        client = daemon.openai()
        messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "first"}]
        usages = []
        for _ in range(2):
            answer = await client.chat.completions.create(model="m", messages=messages, max_tokens=20)
            content = answer.choices[0].message.content
            assert content and all(char in TEXT.decode() for char in content)
            usage = answer.usage
            assert usage is not None and usage.prompt_tokens_details is not None
            usages.append((usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens))
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "more"}]
        (num_prompt, num_output, num_cached), (_, _, num_cached_again) = usages
        assert num_cached == 0
        # The prompt and the answer but its last token, whose KV is never computed, as far as blocks are full.
        num_known = num_prompt + num_output - 1
        assert num_cached_again == num_known // BLOCK_SIZE * BLOCK_SIZE


async def test_a_seed_makes_a_text() -> None:
    async with serve() as daemon:
        client = daemon.openai()

        async def text(seed: int, stream: bool) -> str:
            messages: list[Any] = [{"role": "user", "content": "hi"}]
            if not stream:
                answer = await client.chat.completions.create(model="m", messages=messages, seed=seed, max_tokens=30)
                return answer.choices[0].message.content or ""
            chunks = await client.chat.completions.create(
                model="m", messages=messages, seed=seed, max_tokens=30, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        whole, streamed, other = await asyncio.gather(text(1, False), text(1, True), text(2, True))
        assert whole == streamed
        assert whole != other


async def test_stop_string_ends_the_engine_request() -> None:
    async with serve() as daemon:
        answer = await daemon.openai().completions.create(model="m", prompt="x", max_tokens=400, stop=" ", seed=3)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert " " not in answer.choices[0].text
        assert answer.usage.completion_tokens == len(answer.choices[0].text) + 1


async def test_nothing_is_lost_under_random_clients() -> None:
    """Whole and streamed answers, early leavers, cancelled calls, overflow, a short queue and too few blocks."""
    random_numbers = random.Random(1)
    outcomes: dict[str, int] = {}
    num_at_once = asyncio.Semaphore(24)

    async with serve(max_queued_requests=12, num_blocks=140, max_num_seqs=6) as daemon:
        client = daemon.openai()

        async def whole(messages: list[Any]) -> str:
            answer = await client.chat.completions.create(model="m", messages=messages, max_tokens=40)
            return answer.choices[0].finish_reason

        async def streamed(messages: list[Any], leave_after: int) -> str:
            stream = await client.chat.completions.create(model="m", messages=messages, max_tokens=100, stream=True)
            async with stream:
                async for chunk in stream:
                    leave_after -= len(chunk.choices[0].delta.content or "")
                    if leave_after < 0:
                        return "left"
                    if chunk.choices[0].finish_reason:
                        return chunk.choices[0].finish_reason
            return "cut off"

        async def talk(index: int) -> str:
            length = random_numbers.choice([5, 50, 150, 600])
            messages = [{"role": "user", "content": SYSTEM[: index % 3 * 40] + "x" * length}]
            kind, leave_after = random_numbers.randrange(4), random_numbers.randrange(60)
            patience_s = random_numbers.random() * 0.05 if kind == 3 else None
            try:
                async with num_at_once, asyncio.timeout(patience_s):
                    if kind in (0, 3):
                        return await whole(messages)
                    return await streamed(messages, leave_after if kind == 1 else 10_000)
            except TimeoutError:
                return "cancelled"
            except openai.APIStatusError as error:
                return error.code or str(error.status_code)

        for outcome in await asyncio.gather(*(talk(index) for index in range(80))):
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert sum(outcomes.values()) == 80
    assert set(outcomes) <= {"stop", "length", "left", "cancelled", "context_length_exceeded", "overloaded"}
    assert outcomes["context_length_exceeded"] > 0
    assert outcomes["length"] > 0
    assert outcomes["left"] > 0


async def test_metrics_of_a_live_engine() -> None:
    async with serve() as daemon, aiohttp.ClientSession() as session:
        await daemon.openai().completions.create(
            model="m", prompt="x" * 40, max_tokens=10, extra_body={"ignore_eos": True}
        )
        async with session.get(f"{daemon.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        assert 'agentserve:generation_tokens_total{model_name="m"} 10.0' in lines
        assert 'agentserve:request_success_total{finished_reason="length",model_name="m"} 1.0' in lines
