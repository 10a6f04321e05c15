"""What the control plane decided, as text: for golden tests, replay and reading."""

from __future__ import annotations

from agentserve.core.adapters import AdapterLoad, TransferOrder
from agentserve.core.batch import ScheduledChunk
from agentserve.core.engine import StepResult
from agentserve.core.events import (
    BatchScheduled,
    ControlDecided,
    EngineEvent,
    PolicyFailed,
    PrefillProgress,
    RequestAdmitted,
    RequestFinished,
    RequestPreempted,
    TokenGenerated,
)


def describe(result: StepResult) -> list[str]:
    """One line an event, in order, then one a transfer. Equal lines mean equal decisions, down to the blocks."""
    return [*map(_line, result.events), *map(_transfer, result.transfers)]


def _transfer(transfer: TransferOrder) -> str:
    if isinstance(transfer, AdapterLoad):
        parts = f"{transfer.first_part}+{transfer.num_parts}"
        return f"adapter {transfer.load_id} {transfer.adapter}@{transfer.slot} {parts}"
    places = f"{_runs(transfer.source_ids)}>{_runs(transfer.destination_ids)}"
    return f"{transfer.kind} {transfer.transfer_id} {transfer.source}>{transfer.destination} {places}"


def _line(event: EngineEvent) -> str:
    match event:
        case BatchScheduled(_, batch):
            chunks = " ".join(_chunk(chunk) for chunk in batch.chunks)
            ended = f" ended={','.join(batch.ended_request_ids)}" if batch.ended_request_ids else ""
            line = f"batch {batch.batch_id} {batch.lane} {batch.partition.label} [{chunks}]{ended}"
        case ControlDecided(_, decision):
            line = f"control {decision.partition.label} resume={decision.resume_budget} chunk={decision.prefill_chunk}"
            line += " shared" if decision.shares_budget else ""
        case PolicyFailed(_, policy, error):
            line = f"policy {policy} failed: {error}"
        case RequestAdmitted(request_id, _, total, cached):
            line = f"admit {request_id} cached={cached}/{total}"
        case PrefillProgress(request_id, _, computed, total):
            line = f"prefill {request_id} {computed}/{total}"
        case TokenGenerated(request_id, _, sample, index):
            line = f"token {request_id} #{index}={sample.token_id}"
        case RequestPreempted(request_id, _):
            line = f"preempt {request_id}"
        case RequestFinished(request_id, _, reason, stats, _):
            line = f"finish {request_id} {reason} prompt={stats.num_prompt_tokens} output={stats.num_output_tokens}"
    return line


def _chunk(chunk: ScheduledChunk) -> str:
    slot = "" if chunk.adapter_slot is None else f"~{chunk.adapter_slot}"
    return f"{chunk.request_id}:{chunk.work_class}@{chunk.start}+{chunk.num_tokens}/{_runs(chunk.block_ids)}{slot}"


def _runs(block_ids: tuple[int, ...]) -> str:
    """Block ids as runs: `(3, 4, 5, 9)` is `3-5,9`."""
    runs: list[str] = []
    first = previous = block_ids[0]
    for block_id in (*block_ids[1:], -1):
        if block_id != previous + 1:
            runs.append(str(first) if first == previous else f"{first}-{previous}")
            first = block_id
        previous = block_id
    return ",".join(runs)
