"""The OpenAPI document is true: the same routes, answers that fit it, and no answer above 499 to anything."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections import Counter
from typing import Any

import aiohttp
import jsonschema
import pytest

from agentserve.server.openapi import document
from tests.server import simulated
from tests.server.scripted import replying, serve

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library's own dependencies
    import schemathesis
    from hypothesis import HealthCheck, given, settings


async def test_every_route_is_described_and_every_description_has_a_route() -> None:
    async with serve() as daemon, aiohttp.ClientSession() as session:
        async with session.get(f"{daemon.url}/openapi.json") as response:
            described = await response.json()
        assert described == document()
    from agentserve.server.app import create_app  # noqa: PLC0415

    routes = {
        ((route.resource.canonical if route.resource else ""), route.method.lower())
        for route in create_app(daemon.state).router.routes()
        if route.method != "HEAD"
    }
    assert routes == {(path, method) for path, item in document()["paths"].items() for method in item}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/responses/input_tokens", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"content": "hi"}),
        ("/detokenize", {"tokens": [65]}),
        ("/v1/models", None),
        ("/v1/models/test-model", None),
        ("/props", None),
        ("/health", None),
    ],
)
async def test_answers_and_errors_fit_the_document(path: str, body: dict[str, Any] | None) -> None:
    described = document()
    key = path if path in described["paths"] else "/v1/models/{name}"
    operation = next(iter(described["paths"][key].values()))

    def check(status: str, data: Any) -> None:
        schema = operation["responses"][status]["content"]["application/json"]["schema"]
        jsonschema.validate(data, schema | {"components": described["components"]})

    async with serve(replying("x")) as daemon, aiohttp.ClientSession() as session:
        async with session.request("GET" if body is None else "POST", daemon.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            check("200", await response.json())
        if body is not None:
            async with session.post(daemon.url + path, json={"messages": 1, "input": 1, "tokens": 1}) as response:
                assert response.status == 400
                check("4XX", await response.json())


def _bodies_of_each_operation() -> dict[str, Any]:
    """Strategies that make bodies from the document, by path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schema = schemathesis.openapi.from_dict(json.loads(json.dumps(document())))
        return {
            path: schema[path]["POST"].as_strategy()
            for path, item in document()["paths"].items()
            # The same operations without the prefix.
            if "post" in item and not path.startswith("/v1/")
        }


async def test_bodies_that_fit_the_document_are_answered() -> None:
    """Schemathesis makes the bodies; the real control plane answers them on simulated timing.

    Some must be refused: those that ask for more than the window, for tools that are not there, or for two things that
    exclude each other.
    """
    loop = asyncio.get_running_loop()
    seen: dict[str, Counter[int]] = {}
    refusals: Counter[str] = Counter()
    options = {"accept_any_model": True, "uses_distances": True}
    async with (
        simulated.serve(
            1024,
            options=options,
            max_model_len=2048,
            num_blocks=2048,
            max_num_seqs=16,
            max_num_batched_tokens=512,
            policy="invocation_distance",
        ) as daemon,
        aiohttp.ClientSession() as session,
    ):

        async def send(path: str, body: Any) -> int:
            async with session.post(daemon.url + path, data=json.dumps(body).encode()) as response:
                text = await response.text()
                assert response.status < 500, (response.status, text, body)
                assert "internal_error" not in text, (text, body)
                if response.status != 200:
                    refusals[f"{path} {json.loads(text)['error']['message'][:70]}"] += 1
                return response.status

        def attack(path: str, strategy: Any) -> None:
            @given(case=strategy)
            @settings(max_examples=10, suppress_health_check=list(HealthCheck), derandomize=True)
            def run(case: Any) -> None:
                status = asyncio.run_coroutine_threadsafe(send(path, case.body), loop).result(20)
                seen.setdefault(path, Counter())[status] += 1

            run()

        for path, strategy in _bodies_of_each_operation().items():
            await asyncio.to_thread(attack, path, strategy)
        await daemon.state.idle.wait()
    shown = "\n".join(f"{count} {message}" for message, count in refusals.most_common())
    assert all(counts[200] for counts in seen.values()), f"{seen}\n{shown}"
    assert sum(counts[200] for counts in seen.values()) > sum(counts.total() for counts in seen.values()) / 3, shown
