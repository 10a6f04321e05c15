"""Part `daemon`: our daemon in several configurations, under the workloads of figures 2, 5 and 7.

The daemons are started several at a time, as many as fit the memory, because loading takes longer than the measurement;
then one after the other is put under load while the others idle. With the profile and the target that the part
`sharing` has left, none of them needs to measure when it starts, which it could not do beside others.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentserve.core.controllers.factory import TARGET_FACTOR
from agentserve.models.registry import resolve_model
from agentserve.sim.workloads import make_workload
from bench.figures import data
from bench.figures.live import live_runs, server_of
from bench.figures.simulated import ATTACK_SCALE
from bench.figures.variants import ABLATION, ABLATION_AGENTS, TIMELINE_AGENTS
from bench.gpu.record import PartRun
from bench.gpu.sharing import PROFILE, TPOT
from bench.load.compare import Comparison
from bench.load.endpoint import NamedWorkload
from bench.load.errors import BenchError
from bench.load.headline import Headline
from bench.load.results import RunResult, load
from bench.load.servers import ServerSpec, running

VARIANTS = ("predictive", "chunked", "static", "stream", "cap", "fcfs", "no-slots")
"""The most valuable first: each is one daemon. `static` keeps a green split, `stream` has no Green Contexts."""
AGENTS = (3, 6)
"""Of figure 5; figure 7 has its own number."""
_PROGRAMS, _DRY_SCALE = 8, 0.1
_KV_BYTES = 4 << 30
_OVERHEAD_BYTES = 5 << 30
"""Of one daemon beside weights and KV: context, workspaces, graphs."""
_MAX_AT_ONCE = 5
_CLOSING_S = 12.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all daemons have in common."""

    options: tuple[str, ...]
    at_once: int


def run(part: PartRun) -> None:
    setting = _setting(part)
    keys = VARIANTS[:2] if part.dry_run else VARIANTS
    part.put("how", {"options": _shown(setting.options), "daemons_at_once": setting.at_once, "variants": keys})
    out = part.scratch / "runs"
    try:
        asyncio.run(_run_all(part, setting, keys, out))
    finally:
        _publish(part, out)
    if not part.result.get("runs"):
        raise BenchError("no daemon gave a result: " + "; ".join(part.result.get("failures", ())))


def _setting(part: PartRun) -> Setting:
    options = ["--model", part.model, "--load-format", part.load_format, "--executor", part.executor]
    options += ["--max-model-len", "2048" if part.dry_run else "16384"]
    options += ["--kv-cache-memory", str(16 << 20 if part.dry_run else _KV_BYTES)]
    profile, tpot = part.shared / PROFILE, part.shared / TPOT
    if not (profile.is_file() and tpot.is_file()):
        part.say("there is no profile: each daemon measures for itself, so they start one after the other")
        return Setting(tuple(options), 1)
    target_ms = TARGET_FACTOR * int(tpot.read_text(encoding="utf-8")) / 1e6
    options += ["--profile", str(profile), "--tpot-target-ms", f"{target_ms:.3f}"]
    if part.dry_run:
        return Setting(tuple(options), 2)
    import torch  # noqa: PLC0415

    config = resolve_model(part.model).config
    assert config is not None, "the model has a shape"
    return Setting(tuple(options), fitting(torch.cuda.mem_get_info()[0], 2 * config.num_parameters))


def fitting(free_bytes: int, weight_bytes: int) -> int:
    """How many daemons fit the memory at a time; one at least."""
    return max(1, min(_MAX_AT_ONCE, int(0.95 * free_bytes) // (weight_bytes + _KV_BYTES + _OVERHEAD_BYTES)))


def options_of(key: str, setting: Setting) -> tuple[str, ...]:
    """The common options that a variant takes: a scheduler without a controller has no profile and no target."""
    words = setting.options
    if "--scheduler" not in server_of(key).command:
        return words
    pairs = zip(words[::2], words[1::2], strict=True)
    return tuple(word for name, value in pairs if name != "--tpot-target-ms" for word in (name, value))


def _shown(options: Sequence[str]) -> list[str]:
    """Without places of this machine."""
    return [Path(word).name if word.startswith("/") else word for word in options]


# ---- running ----


async def _run_all(part: PartRun, setting: Setting, keys: Sequence[str], out: Path) -> None:
    failures: list[str] = []
    needed_s = 0.0
    for first in range(0, len(keys), setting.at_once):
        wave = keys[first : first + setting.at_once]
        if first and part.left_s < needed_s + _CLOSING_S:
            failures.append(f"{', '.join(keys[first:])}: no time was left")
            break
        before_s = part.left_s
        async with _daemons(wave, setting, out / "logs", failures, before_s / 2) as urls:
            part.say(f"{len(urls)} of {len(wave)} daemons ready after {before_s - part.left_s:.0f} s")
            for key, url in urls.items():
                if part.left_s < _CLOSING_S:
                    failures.append(f"{key}: no time was left")
                    continue
                await _load_one(part, key, url, out / key, failures)
        needed_s = max(needed_s, before_s - part.left_s)
        part.put("failures", failures)


@contextlib.asynccontextmanager
async def _daemons(
    keys: Sequence[str], setting: Setting, logs: Path, failures: list[str], ready_timeout_s: float
) -> AsyncIterator[dict[str, str]]:
    """Starts all at once; yields the addresses of those that are ready in time."""
    async with contextlib.AsyncExitStack() as stack:
        specs = {key: server_of(key, options_of(key, setting)) for key in keys}
        contexts = {
            key: running(dataclasses.replace(spec, ready_timeout_s=ready_timeout_s), {}, logs)
            for key, spec in specs.items()
        }
        started = await asyncio.gather(*(entry.__aenter__() for entry in contexts.values()), return_exceptions=True)
        urls: dict[str, str] = {}
        for (key, context), outcome in zip(contexts.items(), started, strict=True):
            if isinstance(outcome, BaseException):
                failures.append(f"{key}: {outcome}"[-1500:])
                continue
            stack.push_async_exit(context.__aexit__)
            urls[key] = outcome.base_url
        yield urls


async def _load_one(part: PartRun, key: str, url: str, out: Path, failures: list[str]) -> None:
    spec = server_of(key)
    there = ServerSpec(name=spec.name, kind=spec.kind, label=spec.label, setting=spec.setting, base_url=url)
    comparison = Comparison(
        servers=[there], values={}, workloads=lambda _: workloads(part, key), rounds=1, out=out, seed=0, timeout_s=60.0
    )
    try:
        async with asyncio.timeout(max(1.0, part.left_s - _CLOSING_S / 2)):
            await comparison.run()
    except (BenchError, TimeoutError) as error:
        failures.append(f"{key}: {error or 'no time was left'}"[-1500:])
    failures += comparison.failures
    part.put("runs", [row for path in sorted(out.parent.rglob("results.json")) for row in rows_of(load([path]).runs)])


def workloads(part: PartRun, key: str) -> list[NamedWorkload]:
    """What a variant is put under; the attack first, because most depends on it."""
    scale = _DRY_SCALE if part.dry_run else 1.0
    attack = make_workload("victim_attacker", num_agents=TIMELINE_AGENTS, scale=scale * ATTACK_SCALE)
    named = [NamedWorkload(f"victim_attacker ({TIMELINE_AGENTS} agents, scale {scale * ATTACK_SCALE:g})", attack)]
    numbers = {*AGENTS, *((ABLATION_AGENTS,) if key in ABLATION else ())}
    for num_agents in sorted({2} if part.dry_run else numbers):
        programs = 2 if part.dry_run else max(_PROGRAMS, num_agents)
        workload = make_workload("react", num_agents=num_agents, num_programs=programs, scale=scale)
        named.append(NamedWorkload(f"react ({num_agents} agents, {programs} programs, scale {scale:g})", workload))
    return named


# ---- what is kept ----


def rows_of(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """The headline numbers of each run."""
    rows = []
    for run_result in runs:
        headline, summary = Headline.of(run_result), run_result.summary
        rows.append(
            {
                "variant": run_result.server.name.removeprefix("agentserve-").replace("agentserve", "predictive"),
                "workload": run_result.workload,
                "calls": len(run_result.records),
                "errors": sorted({record.error for record in run_result.records if record.error is not None}),
                "gap_p50_ms": headline.gap_p50_ms,
                "gap_p95_ms": headline.gap_p95_ms,
                "worst_stall_ms": headline.worst_stall_ms,
                "cold_ttft_ms": headline.cold_ttft_ms,
                "resumed_ttft_ms": headline.resumed_ttft_ms,
                "output_tokens_per_s": round(headline.output_tokens_per_s, 1),
                "num_cached_tokens": summary.num_cached_tokens,
                "num_prompt_tokens": summary.num_prompt_tokens,
                "doubts": list(run_result.doubts),
            }
        )
    return rows


def _publish(part: PartRun, out: Path) -> None:
    """Figures and the ends of the logs, of whatever there is."""
    logs = sorted((out / "logs").glob("*.log")) if out.is_dir() else []
    part.put("logs", {path.stem: path.read_text(encoding="utf-8", errors="replace")[-1500:] for path in logs})
    source = live_runs(out) if out.is_dir() else None
    if source is None:
        return
    agents = tuple(sorted({*AGENTS, ABLATION_AGENTS}))
    figures = [data.timeline(source), data.scaling(source, agents), data.ablation(source, ABLATION_AGENTS)]
    found = [figure for figure in figures if figure is not None]
    part.put("figures", found)
    from bench.figures.plots import draw  # noqa: PLC0415 - matplotlib must not be loaded while tokens are stamped

    for figure in found:
        draw(figure, part.png(figure["figure"]))
