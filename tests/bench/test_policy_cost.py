"""The bench of the policies' cost measures what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

from bench import policy_cost


def test_policies_are_timed_by_step_and_kept_with_their_conditions(tmp_path: Path) -> None:
    options = ["--agents", "40", "--steps", "300", "--rounds", "2", "--warm-up", "0.5", "--only", "none", "transition"]
    assert policy_cost.main([*options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "policy_cost.json").read_text(encoding="utf-8"))
    rows = found["policies"]
    assert [(row["policy"], row["roles"]) for row in rows] == [
        ("none", False),
        ("transition", False),
        ("transition", True),
    ]
    for row in rows:
        assert (row["num_agents"], row["num_steps"]) == (40, 300)
        assert 0 < row["num_busy_steps"] <= 300 and row["num_calls"] > 0
        assert 0.0 < row["p50_us"] <= row["p99_us"] <= row["max_us"]
    assert set(found["over_the_goal"]) == {row["policy"] for row in rows if row["p99_us"] >= policy_cost.GOAL_US}
    assert {"machine", "commit", "command"} <= set(found["conditions"])
