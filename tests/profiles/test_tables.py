"""Shipped profiles and data sheets against published step times.

`bench/profiles/excerpt.csv` holds 400 rows a card, spread over all shapes, of step times of Llama-3.1-8B that follow
from the kernel times of LLMServingSim 2.0 (casys-kaist/LLMServingSim, MIT licence, CASYS Lab at KAIST). What the fit
makes of all 28,007 rows is in `bench/results/2026-11-21-profile-fits`.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from agentserve.core.costmodel import CostModel, DeviceProfile, Sample
from agentserve.profiles import load_document, load_profile
from agentserve.profiles.fit import fit_profile
from agentserve.profiles.residuals import kind_of, residuals_of
from bench.profiles.cards import ESTIMATED, RTX_4090, RTX_PRO_6000, Card
from bench.profiles.fit_tables import EXCERPT, TABLES
from bench.profiles.tables import LLAMA_3_1_8B, read_samples

CARDS = pytest.mark.parametrize(("hardware", "card"), TABLES.items(), ids=list(TABLES))


def excerpt(hardware: str, card: Card) -> list[Sample]:
    samples = read_samples(Path(EXCERPT), hardware, card.num_sms)
    assert len(samples) == 400
    return samples


def check_goals(samples: list[Sample], profile: DeviceProfile) -> None:
    """Median below 3 % and p95 below 10 % for decodes up to 64 and for all other shapes."""
    goal = [s for s in samples if kind_of(s.shape) != "decode" or s.shape.num_decodes <= 64]
    residuals = residuals_of(goal, CostModel(profile, LLAMA_3_1_8B))
    assert [residual.kind for residual in residuals] == ["decode", "prefill", "mixed"]
    for residual in residuals:
        assert residual.median < 0.03, residual
        # An excerpt has other tails than the whole: one row in 250 is 0.4 % of them.
        assert residual.p95 < 0.12, residual


@CARDS
def test_shipped_profiles_reproduce_the_tables(hardware: str, card: Card) -> None:
    check_goals(excerpt(hardware, card), load_profile(card.name))
    for residual in load_document(card.name).residuals:  # of the whole table, when it was fitted
        assert residual.median < 0.03, residual
        assert residual.p95 < 0.10, residual


@CARDS
def test_a_fit_to_a_few_hundred_rows_is_as_good(hardware: str, card: Card) -> None:
    samples = excerpt(hardware, card)
    check_goals(samples[1::2], fit_profile(samples[::2], card.sheet(), LLAMA_3_1_8B).profile)


@CARDS
def test_a_data_sheet_alone_predicts_the_tables(hardware: str, card: Card) -> None:
    model = CostModel(card.sheet(), LLAMA_3_1_8B)
    errors = [
        abs(model.duration_ns(s.shape, s.lane, s.partition, False) / s.duration_ns - 1) for s in excerpt(hardware, card)
    ]
    assert median(errors) < 0.15


@pytest.mark.parametrize("card", ESTIMATED, ids=lambda card: card.name)
def test_shipped_estimates_are_those_of_the_data_sheets(card: Card) -> None:
    document = load_document(card.name)
    for name in ("bandwidth_bytes_per_s", "flops_per_s", "rows", "cache_bytes", "contention", "compute_units"):
        assert getattr(document.profile, name) == getattr(card.sheet(), name), name
    assert f"{card.gb_per_s:g} GB/s" in document.origin.source


def test_fitted_rates_are_below_what_the_data_sheets_promise() -> None:
    for card in (RTX_4090, RTX_PRO_6000):
        profile = load_profile(card.name)
        assert 0.8 < profile.bandwidth_bytes_per_s / (card.gb_per_s * 1e9) < 1
        assert 0.8 < profile.kv_bandwidth_bytes_per_s / (card.gb_per_s * 1e9) < 1
        assert 0.5 < profile.attention_flops_per_s / (card.tflops * 1e12) < profile.flops_per_s / (card.tflops * 1e12)
        assert profile.flops_per_s < card.tflops * 1e12
