"""The import rules of the design hold, and breaking one is noticed."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BANNED_IN_CORE = {"asyncio", "threading", "time", "random", "socket", "os", "io", "pathlib", "subprocess", "secrets"}


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Checks the contracts of pyproject.toml on the package in `tree`."""
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--config", ROOT / "pyproject.toml", "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_contracts_hold() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("core/scheduler/base.py", "import time", "neither sleeps"),
        ("core/memory/manager.py", "import torch", "neither sleeps"),
        ("core/engine.py", "from agentserve.runtime import live", "go down only"),
        ("server/app.py", "import torch", "composition root"),
        ("runtime/live.py", "from agentserve.executors.simulated import executor", "composition root"),
    ],
)
def test_a_planted_import_is_caught(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copytree(ROOT / "agentserve", tmp_path / "agentserve", ignore=shutil.ignore_patterns("__pycache__"))
    planted = tmp_path / "agentserve" / module
    planted.write_text(planted.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    broken = [text for text in result.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(contract in text for text in broken), result.stdout


def test_core_imports_the_standard_library_only() -> None:
    allowed = set(sys.stdlib_module_names) - BANNED_IN_CORE
    for path in (ROOT / "agentserve" / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            for name in names:
                ours = name.startswith(("agentserve.core", "agentserve.config", "agentserve.errors"))
                assert ours or name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, agentserve.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_package_is_installed() -> None:
    """The list in pyproject.toml is written by hand: an editable install would not notice what it lacks."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"])
    packages = {"agentserve": ROOT / "agentserve", "agentserve_kernels": ROOT / "kernels"}
    found = {
        ".".join((name, *path.parent.relative_to(root).parts))
        for name, root in packages.items()
        for path in root.rglob("__init__.py")
    }
    assert listed == found


def test_what_is_no_python_is_installed_too() -> None:
    """Profiles, documents, and the sources of the C++ kernels, which are compiled where they run."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    installed = set()
    for package, patterns in settings["package-data"].items():
        first, *rest = package.split(".")
        directory = ROOT.joinpath(settings["package-dir"][first], *rest)
        found = {pattern: set(directory.glob(pattern)) for pattern in patterns}
        assert all(found.values()), f"{package}: a pattern matches nothing: {found}"
        installed |= set().union(*found.values())
    there = {
        path
        for root in settings["package-dir"].values()
        for path in (ROOT / root).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".so"}
    }
    assert there - installed == set()
    assert {path.suffix for path in there} >= {".json", ".cpp", ".h", ".md"}
