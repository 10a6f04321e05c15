"""Counts valid answers of a model on the CPU: `python -m bench.structured --tries 200 --out DIR`.

One line for each kind of constraint: valid answers, those that `max_tokens` cut off, and invalid ones. The same two
questions are also asked without a grammar, to show what it is that it does. `--out` keeps the table and
`structured.json`, which has the conditions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from agentserve.build import Engine, build_engine
from agentserve.config import ServeConfig
from agentserve.core.request import FinishReason, SamplingParams
from agentserve.errors import InvalidGrammarError
from agentserve.runtime.streams import StreamEnd, StreamTokens
from agentserve.text.grammar.source import Constraint
from agentserve.text.tools.spec import (
    JsonSchemaFormat,
    TextPiece,
    ToolCallFinished,
    ToolChoice,
    ToolMode,
    ToolSpec,
)
from bench.load.results import conditions
from bench.structured.schemas import ACCEPTED, REFUSED

_PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
_WEATHER = ToolSpec(
    "get_weather",
    "The weather in a city.",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city"],
    },
)
_SEARCH = ToolSpec(
    "search", "Searches.", {"type": "object", "properties": {"query": {"type": "string", "maxLength": 60}}}
)
_TOOLS = (_WEATHER, _SEARCH)
_VALID, _CUT_OFF, _INVALID = "valid", "cut off", "invalid"
_FREE_TOKENS = 128
"""Of an answer without a grammar, which would often go on for ever."""


class Run:
    """A model that runs."""

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        self._engine = engine
        self._max_tokens = max_tokens
        self.num_tokens = 0

    async def answer(self, constraint: Constraint | None, question: str, seed: int) -> tuple[str, bool, str]:
        """The text, whether it was cut off, and the prompt; None: without a grammar."""
        engine = self._engine
        assert engine.chat_template is not None
        prompt = engine.chat_template.render([{"role": "user", "content": question}])
        grammar = None if constraint is None else await engine.grammars.compile(constraint, prompt)
        max_tokens = self._max_tokens if grammar is not None else min(self._max_tokens, _FREE_TOKENS)
        sampling = SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=engine.tokenizer.eos_token_ids)
        tokens: list[int] = []
        stream = engine.client.generate(engine.tokenizer.encode(prompt), sampling, grammar=grammar)
        async with stream:
            async for event in stream:
                if isinstance(event, StreamTokens):
                    tokens += [sample.token_id for sample in event.samples]
                elif isinstance(event, StreamEnd):
                    assert event.reason is not FinishReason.ERROR, event.error
                    self.num_tokens += len(tokens)
                    text = engine.output_format.shown(engine.tokenizer).decode(tokens)
                    return text, event.reason is FinishReason.LENGTH, prompt
        raise AssertionError("a stream has an end")

    async def json_schema(self, schema: dict[str, Any], seed: int, *, free: bool = False) -> str:
        """Judges one answer that is to fit `schema`."""
        constraint = None if free else Constraint(format=JsonSchemaFormat(schema))
        question = "Describe a person as JSON."
        if free:
            question += f" The answer must fit this JSON Schema: {json.dumps(schema)}"
        text, cut_off, _ = await self.answer(constraint, question, seed)
        try:
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        except (ValueError, jsonschema.ValidationError):
            return _CUT_OFF if cut_off else _INVALID
        return _VALID

    async def required(self, seed: int, *, free: bool = False) -> str:
        """Judges one answer that is to be a call of one of two tools."""
        choice = ToolChoice(ToolMode.REQUIRED, parallel=False)
        constraint = None if free else Constraint(_TOOLS, choice)
        question = "What is the weather in Rome?"
        if free:
            form = '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
            signatures = json.dumps([tool.for_template() for tool in _TOOLS])
            question += f" Answer with a call of one of these functions: {signatures}, in this form:\n{form}"
        text, cut_off, prompt = await self.answer(constraint, question, seed)
        parser = self._engine.output_format.parser(_TOOLS, choice, prompt)
        pieces = [*parser.push(text), *parser.finish()]
        calls = [piece for piece in pieces if isinstance(piece, ToolCallFinished)]
        if cut_off:
            return _CUT_OFF
        if len(calls) != 1 or not calls[0].complete or any(isinstance(piece, TextPiece) for piece in pieces):
            return _INVALID
        tool = next((tool for tool in _TOOLS if tool.name == calls[0].name), None)
        if tool is None or tool.parameters is None:
            return _INVALID
        try:
            jsonschema.validate(json.loads(calls[0].arguments), tool.parameters)
        except (ValueError, jsonschema.ValidationError):
            return _INVALID
        return _VALID


class Table:
    """What was counted, printed as it comes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.rows: list[dict[str, Any]] = []
        self.lines = [f"{'':<40} {_VALID:>6} {_CUT_OFF:>8} {_INVALID:>8} {'tokens':>7} {'seconds':>8}"]

    async def count(self, name: str, answers: Sequence[Coroutine[Any, Any, str]]) -> None:
        """Waits for all `answers` and adds a row."""
        started_s, num_before = time.perf_counter(), self._run.num_tokens
        counted = Counter(await asyncio.gather(*answers))
        seconds, num_tokens = time.perf_counter() - started_s, self._run.num_tokens - num_before
        num_valid, num_cut_off, num_invalid = counted[_VALID], counted[_CUT_OFF], counted[_INVALID]
        self.rows.append(
            {
                "what": name,
                "num_valid": num_valid,
                "num_cut_off": num_cut_off,
                "num_invalid": num_invalid,
                "num_output_tokens": num_tokens,
                "duration_s": round(seconds, 2),
            }
        )
        self._add(f"{name:<40} {num_valid:>6} {num_cut_off:>8} {num_invalid:>8} {num_tokens:>7} {seconds:>8.1f}")

    def refused(self, name: str, reason: str | None) -> None:
        """Adds what became of a schema that cannot be enforced; None: it was not refused."""
        self.rows.append({"what": name, "refused": reason is not None, "reason": reason})
        self._add(f"{name:<40} " + ("ACCEPTED, but cannot be enforced" if reason is None else f"refused: {reason}"))

    def _add(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


async def _measure(engine: Engine, tries: int, max_tokens: int) -> Table:
    run = Run(engine, max_tokens)
    table = Table(run)
    print(table.lines[0])
    await table.count("json_schema", [run.json_schema(_PERSON, seed) for seed in range(tries)])
    await table.count("tool_choice required", [run.required(seed) for seed in range(tries)])
    few = range(max(1, tries // 5))
    await table.count("json_schema, asked without a grammar", [run.json_schema(_PERSON, s, free=True) for s in few])
    await table.count("one call, asked without a grammar", [run.required(seed, free=True) for seed in few])
    for name, schema in ACCEPTED.items():
        await table.count(name, [run.json_schema(schema, seed) for seed in range(max(1, tries // 50))])
    for name, schema in REFUSED.items():
        try:
            await engine.grammars.compile(Constraint(format=JsonSchemaFormat(schema)), "")
        except InvalidGrammarError as error:
            table.refused(name, str(error))
        else:
            table.refused(name, None)
    return table


async def _main(arguments: argparse.Namespace) -> None:
    config = ServeConfig(model=arguments.model, executor="cpu", max_num_seqs=16, max_num_queued_reqs=4096)
    engine = build_engine(config, print)
    engine.bridge.bind(engine.client, asyncio.get_running_loop())
    engine.driver.start()
    try:
        table = await _measure(engine, arguments.tries, arguments.max_tokens)
    finally:
        engine.stop()
    if arguments.out is None:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    what = f"{engine.model_name} ({engine.dtype}) on {engine.capabilities.device}"
    command = f"python -m bench.structured {shlex.join(sys.argv[1:])}"
    record = {"conditions": {**conditions(), "command": command, "what": what}, "rows": table.rows}
    (arguments.out / "structured.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "structured.txt").write_text("\n".join(table.lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, help="a directory for the table and structured.json")
    asyncio.run(_main(parser.parse_args()))
