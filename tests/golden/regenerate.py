"""Writes the golden decision logs anew: `python -m tests.golden.regenerate`. Read the difference before committing."""

from __future__ import annotations

from tests.core.test_determinism import GOLDEN, WAYS, golden_logs


def main() -> None:
    for name in WAYS:
        for file, log in golden_logs(name).items():
            (GOLDEN / file).write_text("\n".join(log) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
