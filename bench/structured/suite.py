"""Holds grammars against a public JSON Schema test suite: `python -m bench.structured.suite TESTS --out DIR`.

TESTS is a folder of the suite's layout, such as `tests/draft4` of the npm package `json-schema-test-suite`: lists of
schemas with instances that are valid or not. A schema is either refused, or its grammar must not let any invalid
instance through. How many of the valid ones pass is shown, too: a grammar may be narrower than its schema (keys in
order, no properties that are not named), since it only has to let the model answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

from agentserve.errors import InvalidGrammarError
from agentserve.text.grammar.compiler import GrammarCompiler
from agentserve.text.grammar.source import Constraint
from agentserve.text.output import choose_output_format
from agentserve.text.tokenizer import ByteTokenizer
from agentserve.text.tools.spec import JsonSchemaFormat
from bench.load.results import conditions


async def judge(compiler: GrammarCompiler, tokenizer: ByteTokenizer, group: dict[str, Any]) -> dict[str, Any]:
    """What became of one schema: `refused` with the reason, or `accepted` with what passed of its instances."""
    try:
        grammar = await compiler.compile(Constraint(format=JsonSchemaFormat(group["schema"])), "")
    except InvalidGrammarError as error:
        return {"refused": str(error)}
    assert grammar is not None
    passed: Counter[bool] = Counter()
    wrong: list[Any] = []
    for test in group["tests"]:
        matcher = grammar.prototype.deep_copy()
        token_ids = tokenizer.encode(json.dumps(test["data"], ensure_ascii=False))
        if matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting():
            passed[test["valid"]] += 1
            if not test["valid"]:
                wrong.append(test["data"])
    num_valid = sum(test["valid"] for test in group["tests"])
    return {"num_valid": num_valid, "num_valid_passed": passed[True], "invalid_passed": wrong}


async def run(folder: Path) -> list[dict[str, Any]]:
    tokenizer = ByteTokenizer()
    compiler = GrammarCompiler(tokenizer, choose_output_format(None, tokenizer))
    rows = []
    for path in sorted(folder.glob("*.json")):
        for number, group in enumerate(json.loads(path.read_text("utf-8"))):
            rows.append({"file": path.name, "number": number, **await judge(compiler, tokenizer, group)})
    compiler.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = asyncio.run(run(options.tests))
    accepted = [row for row in rows if "refused" not in row]
    wrong = [row for row in accepted if row["invalid_passed"]]
    lines = [
        f"{len(rows)} schemas: {len(accepted)} accepted, {len(rows) - len(accepted)} refused",
        f"valid instances that pass: {sum(row['num_valid_passed'] for row in accepted)} of "
        f"{sum(row['num_valid'] for row in accepted)}",
        f"schemas that let an invalid instance pass: {len(wrong)}",
        *(f"  {row['file']} {row['number']}: {json.dumps(row['invalid_passed'])}" for row in wrong),
    ]
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "suite.txt").write_text("\n".join(lines) + "\n", "utf-8")
    document = {"conditions": conditions(), "suite": "/".join(options.tests.parts[-2:]), "rows": rows}
    (options.out / "suite.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
