"""The tools that the demo's agents run locally. They read the checkout and nothing else."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from pathlib import Path

MAX_LINES = 8
MAX_COLUMNS = 88
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}


class Tools:
    """`run(name, argument)` executes a tool and returns what the agent observes; errors are observations, too."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._tools: dict[str, Callable[[str], str]] = {
            "list_files": self.list_files,
            "read_file": self.read_file,
            "search": self.search,
            "calculate": self.calculate,
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    def run(self, name: str, argument: str) -> str:
        try:
            return self._tools[name](argument.strip())
        except (OSError, ValueError, SyntaxError, ZeroDivisionError) as error:
            return f"error: {error}"

    def list_files(self, argument: str) -> str:
        folder = self._inside(argument or ".")
        if not folder.is_dir():
            raise ValueError(f"{argument} is not a directory")
        names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith((".", "__")))
        return _short(names)

    def read_file(self, argument: str) -> str:
        path = self._inside(argument)
        if not path.is_file():
            raise ValueError(f"{argument} is not a file")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return _short([line for line in lines if line.strip()])

    def search(self, argument: str) -> str:
        if not argument:
            raise ValueError("nothing to search for")
        hits = []
        for path in sorted((self._root / "agentserve").rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if argument.lower() in line.lower():
                    hits.append(f"{path.relative_to(self._root)}:{number}: {line.strip()}")
        return _short(hits) if hits else f"no line contains {argument!r}"

    def calculate(self, argument: str) -> str:
        value = _evaluate(ast.parse(argument, mode="eval").body)
        return f"{value:g}"

    def _inside(self, name: str) -> Path:
        path = (self._root / name).resolve()
        if not path.is_relative_to(self._root):
            raise ValueError(f"{name} lies outside the project")
        return path


def parse_action(text: str, names: tuple[str, ...]) -> tuple[str, str] | None:
    """The first `Action: tool[argument]` in a model's reply that names a tool, or None."""
    for match in re.finditer(r"Action:\s*(\w+)\s*[\[(]([^\])\n]*)[\])]?", text):
        if match[1] in names:
            return match[1], match[2].strip("\"' ")
    return None


def _short(lines: list[str]) -> str:
    shown = [line[:MAX_COLUMNS] for line in lines[:MAX_LINES]]
    if len(lines) > MAX_LINES:
        shown.append(f"... {len(lines) - MAX_LINES} more")
    return "\n".join(shown)


def _evaluate(node: ast.expr) -> float:
    """Arithmetic and nothing else: names, calls and powers are refused."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left), _evaluate(right))
    raise ValueError("only numbers, + - * / // % and parentheses can be calculated")
