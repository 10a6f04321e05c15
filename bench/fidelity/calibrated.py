"""A profile fitted to the calibration set of a campaign, and how well it predicts runs that it has not seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from agentserve.core.costmodel import DeviceProfile
from agentserve.profiles.fit import FitReport
from agentserve.profiles.residuals import render
from agentserve.runtime.recorded_batches import RecordedRuns, fit_runs, samples_of
from bench.fidelity.observed import CALIBRATION, HELD_OUT, Observation
from bench.fidelity.score import score
from bench.load.errors import BenchError


def fit_to(observations: Sequence[Observation], sheet: DeviceProfile) -> FitReport:
    """A profile fitted to the batches of runs of one model, starting from `sheet`.

    Raises BenchError if there are no batches to fit to, or the runs are of different models.
    """
    found = [observation for observation in observations if observation.recorded]
    shapes = {observation.header.model_shape for observation in found}
    if len(shapes) != 1 or (model := shapes.pop()) is None:
        raise BenchError("a profile is fitted to recordings of one model, and there are none or several")
    samples = tuple(sample for observation in found for sample in samples_of(observation.recorded))
    batches = tuple(batch for observation in found for batch in observation.recorded)
    return fit_runs(RecordedRuns(found[0].header, model, batches, samples), sheet)


def score_both(observations: Sequence[Observation]) -> dict[str, Any]:
    """The score of the held-out runs, and under `calibration` how a profile came about that is fitted to the others.

    Raises BenchError if either set is empty; see `score` for the rest.
    """
    sets = {role: [o for o in observations if o.role == role] for role in (CALIBRATION, HELD_OUT)}
    if not all(sets.values()):
        raise BenchError("a calibration and a held-out run must have succeeded")
    report = fit_to(sets[CALIBRATION], sets[CALIBRATION][0].device)
    fitted = {
        role: score([dataclasses.replace(observation, fitted=report.profile) for observation in group])
        for role, group in sets.items()
    }
    before = score(sets[HELD_OUT])
    calibration = fitted[CALIBRATION]
    return {
        **fitted[HELD_OUT],
        "calibration": {
            "profile": dataclasses.asdict(report.profile),
            "residuals": render(report.residuals).splitlines(),
            "overall": {
                "calibration set": calibration["overall"]["predicted"],
                "held out": fitted[HELD_OUT]["overall"]["predicted"],
                "held out, profile as given": before["overall"]["predicted"],
            },
            "live_spread": calibration["live_spread"],
            "cells": calibration["cells"],
        },
    }
