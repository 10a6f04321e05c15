"""Adapters in the whole engine: the greedy tokens of each are those of a model into which peft has merged it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentserve.build.adapters import lora_config
from agentserve.config import ControlConfig, EngineConfig
from agentserve.core.events import Command, Speculate, SubmitRequest
from agentserve.core.request import SamplingParams
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import TorchExecutor
from agentserve.executors.pytorch.lora import make_store
from agentserve.models.interface import DecoderModel
from agentserve.models.loader import load_model
from agentserve.models.lora import LoraAdapter, read_adapter
from agentserve.models.registry import resolve_model
from agentserve.runtime.live import MonotonicClock
from agentserve.runtime.recording import Header
from agentserve.runtime.replay import build_core
from agentserve_kernels.native.compiler import find
from agentserve_kernels.native.library import cpu_obstacle
from tests.engine.harness import Run, drive
from tests.engine.test_exactness import smollm2
from tests.models.adapters import save_adapter
from tests.models.builders import ARCHITECTURES, reference_logits, requires_smollm2, save_tiny_model

OBSTACLE = cpu_obstacle() or (None if find() else "no C++ compiler")
NUM_TOKENS = 8
PROMPTS = ((5, 6, 7, 8, 9, 10, 11, 12, 13), (5, 6, 7, 8, 9, 10, 11, 12, 14, 15), (20, 21))
ADAPTERS: Mapping[str, dict[str, Any]] = {
    "all": {"lora_alpha": 16},
    "some": {"rank": 2, "targets": ("q_proj", "v_proj", "up_proj"), "use_rslora": True},
    "mlp": {"rank": 3, "targets": ("gate_proj", "down_proj", "o_proj")},
}


@dataclass(frozen=True)
class Subject:
    """A model of ours with adapters, and what transformers makes of each."""

    model: DecoderModel
    adapters: tuple[LoraAdapter, ...]
    references: Mapping[str | None, Any]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    directory = tmp_path_factory.mktemp(request.param)
    reference = save_tiny_model(directory / "model", request.param)
    references: dict[str | None, Any] = {None: reference}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        references[name] = save_adapter(directory / name, reference, seed=seed, **settings)
    model = load_model(resolve_model(str(directory / "model")))
    adapters = tuple(read_adapter(name, directory / name, model.config, max_rank=8) for name in ADAPTERS)
    return Subject(model, adapters, references)


def run(
    model: DecoderModel,
    adapters: Sequence[LoraAdapter],
    jobs: Sequence[tuple[str | None, tuple[int, ...]]],
    *,
    max_loras: int = 2,
    apart: bool = False,
    attention: str = "auto",
    block_size: int = 4,
    speculates: bool = False,
    **values: Any,
) -> Run:
    """Greedy outputs of the jobs, named by their number. If it speculates, each is followed by what is said to come
    next: its prompt rewritten behind the eighth token."""
    device = CpuDevice()
    store = make_store(model, adapters, device, max_slots=max_loras, max_rank=8)
    executor = TorchExecutor(
        model,
        device,
        num_blocks=64,
        block_size=block_size,
        max_num_seqs=8,
        clock=MonotonicClock(),
        lora=store,
        attention=attention,
        **values,
    )
    capabilities = executor.capabilities()
    config = EngineConfig(
        num_blocks=64,
        block_size=block_size,
        max_model_len=128,
        max_num_seqs=8,
        prefill_chunk=4,
        control=ControlConfig(controller="static"),
        decode_lookahead=capabilities.lookahead,
        lora=lora_config(adapters, model.config, max_loras, ""),
        speculate="next_turn" if speculates else "none",
    )
    core = build_core(Header(config, capabilities.compute_units, 1, 1, "m", "cpu"))
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    requests: list[Command] = []
    for number, (name, prompt) in enumerate(jobs):
        session = f"s{name}" if speculates else None
        requests.append(SubmitRequest(str(number), prompt, params, adapter=name, session_id=session))
        if speculates and number < len(jobs) // 2:
            requests.append(Speculate(str(number), rewritten(prompt)))
    try:
        result = drive(core, executor, requests, apart=apart)
        stats = core.stats().adapters
        assert stats is not None and stats.num_resident <= max_loras
        assert core.memory.num_available_blocks == 64
    finally:
        executor.close()
    return result


def rewritten(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What comes after a prompt: its beginning, and 16 other tokens."""
    return (*prompt[:8], *range(40, 56))


def check(run: Run, references: Mapping[str | None, Any], jobs: Sequence[tuple[str | None, tuple[int, ...]]]) -> None:
    """Each token must be the one that the reference finds most likely behind those before it."""
    for number, (name, prompt) in enumerate(jobs):
        output = run.tokens[str(number)]
        assert len(output) == NUM_TOKENS
        logits = reference_logits(references[name], [*prompt, *output])
        assert output == logits[len(prompt) - 1 : -1].argmax(-1).tolist(), f"{name} {prompt}"


def jobs_of(subject: Subject) -> list[tuple[str | None, tuple[int, ...]]]:
    """Each prompt with each adapter and without one, next to each other: a wrong prefix would be found."""
    return [(name, prompt) for prompt in PROMPTS for name in subject.references]


def test_mixed_batches_give_what_merged_weights_give(subject: Subject) -> None:
    """Three adapters take turns in two slots, in chunks of four tokens, with and without adapters in one batch."""
    jobs = jobs_of(subject)
    result = run(subject.model, subject.adapters, jobs)
    check(result, subject.references, jobs)
    slots = [{chunk.adapter_slot for chunk in batch.chunks} for batch in result.batches]
    assert {0, 1} <= set().union(*slots) and any(len(mixed) > 1 for mixed in slots), "nothing was mixed"


def test_one_after_the_other_gives_the_same(subject: Subject) -> None:
    """The second time, each finds its own prefix and nobody else's."""
    jobs = jobs_of(subject) * 2
    result = run(subject.model, subject.adapters, jobs, max_loras=1, apart=True)
    check(result, subject.references, jobs)
    cached = [result.ends[str(number)].stats.num_cached_tokens for number in range(len(jobs))]
    num_first = len(jobs) // 2
    # Blocks of 4: the second prompt shares 8 tokens with the first one of the same adapter; the third one nothing.
    assert cached[:num_first] == [0] * 4 + [8] * 4 + [0] * 4
    assert cached[num_first:] == [8] * 8 + [0] * 4


def test_paged_attention_takes_rows_in_its_own_order(subject: Subject) -> None:
    """Single tokens come first there, and two batches may be in flight."""
    jobs = jobs_of(subject)
    check(run(subject.model, subject.adapters, jobs, attention="torch", lookahead=2), subject.references, jobs)


def test_what_is_computed_beforehand_is_the_adapters_own(subject: Subject) -> None:
    """The same prompt goes on in the same way for each adapter: each finds what was computed with its own weights."""
    names = list(subject.references)
    jobs = [(name, PROMPTS[0]) for name in names] + [(name, (*rewritten(PROMPTS[0]), 60, 61)) for name in names]
    result = run(subject.model, subject.adapters, jobs, apart=True, speculates=True)
    check(result, subject.references, jobs)
    cached = [result.ends[str(number)].stats.num_cached_tokens for number in range(len(jobs))]
    # 24 tokens were known: 6 blocks of 4, of which the first prompt had 2.
    assert cached == [0] * 4 + [24] * 4
    beforehand = {
        chunk.adapter_slot
        for batch in result.batches
        for chunk in batch.chunks
        if chunk.request_id.startswith("\0speculation/")
    }
    assert beforehand == {None, 0, 1}


@pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_for_cpus_with_adapters(tmp_path: Path, arch: str) -> None:
    """In bfloat16 a token may be another one that is about as likely; those of other weights are far less likely."""
    reference = save_tiny_model(tmp_path / "model", arch, hidden_size=128, head_dim=64, num_attention_heads=2)
    references: dict[str | None, Any] = {None: reference}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        references[name] = save_adapter(tmp_path / name, reference, seed=seed, **settings)
    model = load_model(resolve_model(str(tmp_path / "model")), dtype="bfloat16")
    adapters = [read_adapter(name, tmp_path / name, model.config, max_rank=8) for name in ADAPTERS]
    jobs = [(name, prompt) for prompt in PROMPTS for name in references]
    result = run(model, adapters, jobs, attention="native", block_size=16)

    def regret(name: str | None, number: int) -> float:
        """By how much the chosen tokens are less likely than the best ones, the mean of their logits' differences."""
        prompt, output = jobs[number][1], result.tokens[str(number)]
        logits = reference_logits(references[name], [*prompt, *output])[len(prompt) - 1 : -1]
        return float((logits.max(-1).values - logits[range(len(output)), output]).mean())

    for number, (name, prompt) in enumerate(jobs):
        assert len(result.tokens[str(number)]) == NUM_TOKENS
        own, others = regret(name, number), [regret(other, number) for other in references if other != name]
        assert own < 0.5 and min(others) > 1.5, f"{name} {prompt}: {own} {others}"


@requires_smollm2
@pytest.mark.smollm2
def test_smollm2_with_two_adapters(tmp_path: Path) -> None:
    base = smollm2()
    references: dict[str | None, Any] = {None: base.reference}
    for seed, name in enumerate("ab"):
        references[name] = save_adapter(tmp_path / name, base.reference, seed=seed)
    adapters = [read_adapter(name, tmp_path / name, base.model.config, max_rank=8) for name in "ab"]
    jobs = [(name, prompt) for name in ("a", None, "b") for prompt in PROMPTS[:1]]
    result = run(base.model, adapters, jobs)
    check(result, references, jobs)
    assert len(set(map(tuple, result.tokens.values()))) == len(jobs)
