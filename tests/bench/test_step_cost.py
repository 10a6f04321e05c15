"""The bench of the control plane's own cost measures what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

from bench import step_cost


def test_every_kind_of_step_is_timed_and_kept_with_its_conditions(tmp_path: Path) -> None:
    options = ["--steps", "20", "--only", "chunked", "--agents", "2", "--rounds", "1", "--out", str(tmp_path)]
    assert step_cost.main(options) == 0
    found = json.loads((tmp_path / "step_cost.json").read_text(encoding="utf-8"))
    kinds = [(row["num_decodes"], row["num_prompts"], row["num_steps"]) for row in found["steps"]]
    assert kinds == [(n, prompts, 20) for prompts in (0, 3) for n in (1, 8, 64)]
    assert all(0 < row["median_us"] <= row["p95_us"] for row in found["steps"])
    assert [row["variant"] for row in found["runs"]] == ["predictive", "static", "chunked"]
    for row in found["runs"]:
        assert row["num_steps"] > 0 and row["num_generated_tokens"] > 0 and row["times_real_time"] > 0
    assert {"machine", "commit", "command"} <= set(found["conditions"])
    assert found["conditions"]["command"].startswith("python -m bench.step_cost --steps 20")
