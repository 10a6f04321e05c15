"""Agent frameworks from the package registry, each with a task of several turns that uses a tool."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.clients.harness import ANSWER, MODEL, QUESTION, RESULT, WEATHER, call, serve

# What others deprecate among themselves is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

FUNCTION = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the user's environment, and no lists from the internet."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "ANTHROPIC_", "LANGCHAIN_", "LANGSMITH_", "LITELLM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    yield


# ---- OpenAI Agents SDK ----


@pytest.mark.parametrize("api", ["responses", "chat"])
@pytest.mark.parametrize("stream", [False, True])
async def test_openai_agents(tmp_path: Path, api: str, stream: bool) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    cities: list[str] = []

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        cities.append(city)
        return RESULT

    async with serve(tmp_path, WEATHER) as daemon:
        kind = agents.OpenAIResponsesModel if api == "responses" else agents.OpenAIChatCompletionsModel
        agent = agents.Agent(name="a", tools=[weather], model=kind(MODEL, openai_client=daemon.openai()))
        config = agents.RunConfig(tracing_disabled=True)
        if stream:
            result = agents.Runner.run_streamed(agent, QUESTION, run_config=config)
            kinds = [event.type async for event in result.stream_events()]
            assert "raw_response_event" in kinds and "run_item_stream_event" in kinds
        else:
            result = await agents.Runner.run(agent, QUESTION, run_config=config)
        assert cities == ["Paris"]
        assert result.final_output == ANSWER
        # The conversation goes on from the items that the SDK has kept.
        history = [*result.to_input_list(), {"role": "user", "content": "Really?"}]
        assert (await agents.Runner.run(agent, history, run_config=config)).final_output == ANSWER


# ---- LangChain ----


@pytest.mark.parametrize("responses", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_langchain(tmp_path: Path, responses: bool, stream: bool) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from_langchain = pytest.importorskip("langchain_core.messages")

    # With a client of ours, which is closed: its own stays open with the last connection.
    async with serve(tmp_path, WEATHER) as daemon, openai.DefaultAsyncHttpxClient() as http:
        model = langchain_openai.ChatOpenAI(
            model=MODEL,
            base_url=f"{daemon.url}/v1",
            api_key="none",
            http_async_client=http,
            max_retries=0,
            stream_usage=True,
            use_responses_api=responses,
        )
        bound = model.bind_tools([FUNCTION])

        async def ask(messages: list[Any]) -> Any:
            if not stream:
                return await bound.ainvoke(messages)
            total: Any = None
            async for chunk in bound.astream(messages):
                total = chunk if total is None else total + chunk
            return total

        messages: list[Any] = [from_langchain.HumanMessage(QUESTION)]
        answer = await ask(messages)
        assert [(called["name"], called["args"]) for called in answer.tool_calls] == [("weather", {"city": "Paris"})]
        assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] > 0
        messages += [answer, from_langchain.ToolMessage(RESULT, tool_call_id=answer.tool_calls[0]["id"])]
        assert (await ask(messages)).text == ANSWER


async def test_langchain_structured_output(tmp_path: Path) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    schema = {
        "title": "Weather",
        "type": "object",
        "properties": {"degrees": {"type": "integer"}},
        "required": ["degrees"],
        "additionalProperties": False,
    }
    replies = [{"reply": '{"degrees": 21}'}]
    async with serve(tmp_path, replies) as daemon, openai.DefaultAsyncHttpxClient() as http:
        model = langchain_openai.ChatOpenAI(
            model=MODEL, base_url=f"{daemon.url}/v1", api_key="none", http_async_client=http, max_retries=0
        )
        bound = model.with_structured_output(schema, method="json_schema", strict=True)
        assert await bound.ainvoke(QUESTION) == {"degrees": 21}


# ---- smolagents ----


@pytest.mark.parametrize("stream", [False, True])
async def test_smolagents(tmp_path: Path, stream: bool) -> None:
    smolagents = pytest.importorskip("smolagents", reason="smolagents is not installed")
    cities: list[str] = []

    @smolagents.tool
    def weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: its name
        """
        cities.append(city)
        return RESULT

    lines = [
        {"match": RESULT, "reply": call("final_answer", answer=ANSWER)},
        {"match": "Paris", "reply": call("weather", city="Paris")},
    ]
    async with serve(tmp_path, lines) as daemon:
        model = smolagents.OpenAIServerModel(
            model_id=MODEL, api_base=f"{daemon.url}/v1", api_key="none", client_kwargs={"max_retries": 0}
        )
        agent = smolagents.ToolCallingAgent(tools=[weather], model=model, stream_outputs=stream, verbosity_level=0)
        assert await asyncio.to_thread(agent.run, QUESTION) == ANSWER
        assert cities == ["Paris"]


# ---- LiteLLM ----


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("stream", [False, True])
async def test_litellm(tmp_path: Path, provider: str, stream: bool) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    async with serve(tmp_path, WEATHER) as daemon:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]

        async def ask() -> Any:
            # Through a thread: the asynchronous clients of this library live as long as the process.
            options: dict[str, Any] = {"tools": [FUNCTION], "max_tokens": 500, "num_retries": 0, "api_key": "none"}
            base = f"{daemon.url}/v1" if provider == "openai" else daemon.url
            answer = await asyncio.to_thread(
                lambda: _whole(
                    litellm,
                    litellm.completion(
                        model=f"{provider}/{MODEL}", api_base=base, messages=messages, stream=stream, **options
                    ),
                    messages,
                    stream,
                )
            )
            return answer.choices[0]

        choice = await ask()
        assert choice.finish_reason == "tool_calls"
        (called,) = choice.message.tool_calls
        assert (called.function.name, json.loads(called.function.arguments)) == ("weather", {"city": "Paris"})
        messages += [
            choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": called.id, "content": RESULT},
        ]
        assert (await ask()).message.content == ANSWER


def _whole(litellm: Any, answer: Any, messages: list[Any], stream: bool) -> Any:
    return litellm.stream_chunk_builder(list(answer), messages=messages) if stream else answer


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_litellm_knows_that_the_window_is_full(tmp_path: Path, provider: str) -> None:
    """aider stops on this class, and on no other."""
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    async with serve(tmp_path, WEATHER, max_model_len=64) as daemon:
        base = f"{daemon.url}/v1" if provider == "openai" else daemon.url
        with pytest.raises(litellm.ContextWindowExceededError):
            await asyncio.to_thread(
                litellm.completion,
                model=f"{provider}/{MODEL}",
                api_base=base,
                api_key="none",
                num_retries=0,
                messages=[{"role": "user", "content": "long " * 100}],
            )


# ---- llm ----


@pytest.mark.parametrize("stream", [False, True])
async def test_llm(tmp_path: Path, stream: bool) -> None:
    """The command line itself, with a function as a tool."""
    pytest.importorskip("llm", reason="llm is not installed")
    async with serve(tmp_path, WEATHER) as daemon:
        models = f"- model_id: local\n  model_name: {MODEL}\n  api_base: {daemon.url}/v1\n  supports_tools: true\n"
        (tmp_path / "extra-openai-models.yaml").write_text(models, encoding="utf-8")
        code = f"def weather(city: str) -> str:\n    'The weather of a city.'\n    return city and {RESULT!r}\n"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llm", "prompt", "-m", "local", "--key", "none", "--functions", code, QUESTION),
            *(() if stream else ("--no-stream",)),
            env={"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "HOME": str(tmp_path), "PATH": os.defpath},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        assert output.decode().split() == f"I look it up. {ANSWER}".split()
