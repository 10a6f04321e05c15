"""Profile files: shipped ones load, what is written is read back, and malformed ones are refused with a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentserve.core.slots import build_partition_table
from agentserve.errors import ConfigError
from agentserve.profiles import (
    ProfileOrigin,
    available_profiles,
    load_document,
    load_profile,
    save_profile,
)
from agentserve.profiles.residuals import Residual
from tests.core.builders import device_profile

ORIGIN = ProfileOrigin(provenance="measured", source="a test", expected_error="none", machine="this one", date="today")


@pytest.mark.parametrize("name", available_profiles())
def test_shipped_profiles_can_be_loaded_and_split(name: str) -> None:
    document = load_document(name)
    profile = document.profile
    assert profile.name == name
    assert document.origin.provenance == ("fitted" if name in {"rtx-4090", "rtx-pro-6000"} else "estimated")
    assert bool(document.residuals) == (document.origin.provenance == "fitted")
    assert profile.provenance.startswith(f"{document.origin.provenance}: ")
    assert document.origin.source in profile.provenance
    assert build_partition_table(profile.compute_units, profile.unit_granularity, profile.min_units).splits


def test_there_is_a_profile_for_each_promised_card() -> None:
    promised = {"rtx-4090", "rtx-pro-6000", "rtx-a5000", "rtx-5090", "rtx-a6000", "h100", "h200", "rtx-3090"}
    assert promised <= set(available_profiles())


def test_names_are_forgiving_but_not_guessed() -> None:
    assert load_profile(" RTX 5090").compute_units == 170
    with pytest.raises(ConfigError, match="did you mean rtx-4090"):
        load_profile("rtx-4091")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    profile = device_profile(rows=((1.0, 1 / 3), (2.0, 2 / 3)), flops_per_s=1e12 / 7)
    residual = Residual("decode", "whole", 3, 0.01, 0.02, -0.005, ("1 decodes at 64, 1.000 ms: +2.0%",))
    path = tmp_path / "mine.json"
    save_profile(path, profile, ORIGIN, (residual,))
    document = load_document(str(path))
    assert document.profile == replace(profile, provenance="measured: a test")
    assert document.origin == ORIGIN
    assert document.residuals == (residual,)
    assert load_profile(str(path)) == document.profile
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_told_from_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_profile(tmp_path / "mine", device_profile(), ORIGIN)
    assert load_profile(f"{tmp_path}/mine").name == "test"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no profile of a device named 'mine'"):
        load_profile("mine")
    with pytest.raises(ConfigError, match=r"cannot read the profile mine\.json: No such file"):
        load_profile("mine.json")
    with pytest.raises(ConfigError, match="cannot write the profile"):
        save_profile(tmp_path / "no" / "folder.json", device_profile(), ORIGIN)


def change(value: dict[str, Any], path: str, new: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        value = value[parent]
    value[last] = new


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("format_version", 2, "format_version is 2, but this version reads 1"),
        ("extra", 1, "the file has unknown fields extra"),
        ("profile", [], r"profile must be an object, not \[\]"),
        ("profile.flops_per_s", "fast", "profile.flops_per_s must be a finite number, not 'fast'"),
        ("profile.flops_per_s", True, "profile.flops_per_s must be a finite number, not True"),
        ("profile.flops_per_s", float("inf"), "profile.flops_per_s must be a finite number, not inf"),
        ("profile.flops_per_s", 10**400, "profile.flops_per_s must be a finite number"),
        ("profile.flops_per_s", -1.0, "profile test: flops_per_s must be positive, not -1.0"),
        ("profile.compute_units", 1.5, "profile.compute_units must be a whole number, not 1.5"),
        ("profile.fused_attention", 1, "profile.fused_attention must be true or false, not 1"),
        ("profile.name", None, "profile.name must be a text, not None"),
        ("profile.color", "red", "profile has unknown fields color"),
        ("profile.rows", [[1, 2, 3]], r"profile.rows\[0\] must be a pair \[tokens, rows\], not \[1, 2, 3\]"),
        ("profile.rows", {}, "profile.rows must be a list"),
        ("profile.contention.decode_split", 0.5, "contention.decode_split must be at least 1"),
        ("profile.contention", {}, "profile.contention lacks decode_shared, decode_split"),
        ("origin.provenance", "guessed", "provenance must be measured, fitted, estimated, not 'guessed'"),
        ("origin.source", "", "must say its source and its expected error"),
        ("residuals", [{}], r"residuals\[0\] lacks bias"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, path: str, new: Any, message: str) -> None:
    file = tmp_path / "bad.json"
    save_profile(file, device_profile(), ORIGIN)
    value = json.loads(file.read_text())
    change(value, path, new)
    file.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=message) as caught:
        load_profile(str(file))
    assert str(file) in str(caught.value)


def test_missing_fields_and_other_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    save_profile(file, device_profile(), ORIGIN)
    value = json.loads(file.read_text())
    del value["profile"]["bandwidth_bytes_per_s"]
    file.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match="profile lacks bandwidth_bytes_per_s"):
        load_profile(str(file))
    file.write_text("not JSON")
    with pytest.raises(ConfigError, match="not JSON"):
        load_profile(str(file))
    file.write_text("[]")
    with pytest.raises(ConfigError, match="the file must be an object"):
        load_profile(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        load_profile(str(file))
