"""The input log of a control plane, as JSON lines, and what it decided.

Line 1 is a header: format version, engine configuration, partition table, controller. Each further line is one step:
`now`, `completions`, `commands` and the decisions as `core.decision_log` writes them. The file holds the prompts as
token ids, so it is created readable by its owner only.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from agentserve.config import AdapterConfig, ControlConfig, EngineConfig, LoraConfig, TierConfig, TieringConfig
from agentserve.core.adapters import AdapterLoadOutput
from agentserve.core.batch import BatchOutput, Lane, TokenSample
from agentserve.core.costmodel import Contention, DeviceProfile, ModelShape
from agentserve.core.decision_log import describe
from agentserve.core.engine import StepResult
from agentserve.core.events import (
    Command,
    EndRequest,
    FlushTiers,
    Foresight,
    NoteTurn,
    SetDistances,
    Speculate,
    SubmitRequest,
)
from agentserve.core.executor import Report
from agentserve.core.request import FinishReason, SamplingParams
from agentserve.core.transfers import StoredBlock, Tier, TierContents, TransferOutput
from agentserve.errors import AgentServeError, ConfigError, RecordingError

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True)
class Header:
    """What a core must be built with to make the same decisions."""

    config: EngineConfig
    compute_units: int
    unit_granularity: int
    min_units: int
    model: str
    executor: str
    device: DeviceProfile | None = None
    """With `model_shape`: the cost model that a controller asks. None for controllers that need none."""
    model_shape: ModelShape | None = None
    unused_units: int = 0
    version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One call of `EngineCore.step` and its decisions."""

    now_ns: int
    completions: tuple[Report, ...]
    commands: tuple[Command, ...]
    decisions: tuple[str, ...]


def require_recordable(path: Path) -> None:
    """Raises ConfigError if no recording can be begun there: to be asked before anything takes long."""
    reason = None
    if path.exists():
        reason = errno.EEXIST
    elif not path.parent.is_dir():
        reason = errno.ENOENT
    elif not os.access(path.parent, os.W_OK):
        reason = errno.EACCES
    if reason is not None:
        raise ConfigError(f"cannot record to {path}: {os.strerror(reason)}")


class Recorder:
    """Writes a recording. One thread."""

    def __init__(self, path: Path, header: Header) -> None:
        """Raises ConfigError if the file exists already or cannot be written."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot record to {path}: {error.strerror}") from None
        self._file: TextIO = os.fdopen(descriptor, "w", encoding="utf-8")
        self._write(dataclasses.asdict(header))

    def write(
        self,
        now_ns: int,
        completions: Sequence[Report],
        commands: Sequence[Command],
        result: StepResult,
    ) -> None:
        self._write(
            {
                "now": now_ns,
                "completions": [_output_to_json(output) for output in completions],
                "commands": [_command_to_json(command) for command in commands],
                "decisions": describe(result),
            }
        )

    def close(self) -> None:
        self._file.close()

    def _write(self, value: dict[str, Any]) -> None:
        json.dump(value, self._file, separators=(",", ":"))
        self._file.write("\n")
        # What is lost when the daemon is killed is at most the step at which it happened.
        self._file.flush()


class Recording:
    """Reads a recording.

    Raises RecordingError, with the line, for a file that is missing, malformed or of another version. A last line that
    is cut off (the daemon was killed) is reported by `truncated` after iteration and is otherwise ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.truncated = False
        try:
            with path.open(encoding="utf-8") as file:
                first = file.readline()
        except (OSError, UnicodeDecodeError) as error:
            raise RecordingError(f"cannot read {path}: {error}") from None
        self.header = self._header(first)

    def _header(self, line: str) -> Header:
        try:
            fields = json.loads(line)
            version = fields["version"]
            if version == FORMAT_VERSION:
                config = dict(fields.pop("config"))
                control = ControlConfig(**config.pop("control"))
                tiering = _tiering_from_json(config.pop("tiering", None))
                lora = _lora_from_json(config.pop("lora", None))
                device, shape = fields.pop("device"), fields.pop("model_shape")
                return Header(
                    **fields,
                    config=EngineConfig(**config, control=control, tiering=tiering, lora=lora),
                    device=None if device is None else _device_from_json(device),
                    model_shape=None if shape is None else ModelShape(**shape),
                )
        except (ValueError, KeyError, TypeError, AgentServeError) as error:
            raise RecordingError(f"{self._path}:1: not the header of a recording: {error}") from None
        raise RecordingError(f"{self._path}: format version {version}, but this is version {FORMAT_VERSION}")

    def steps(self) -> Iterator[RecordedStep]:
        with self._path.open(encoding="utf-8") as file:
            next(file)
            for number, line in enumerate(file, start=2):
                if not line.endswith("\n"):
                    self.truncated = True
                    return
                yield self._step(number, line)

    def _step(self, number: int, line: str) -> RecordedStep:
        try:
            value = json.loads(line)
            return RecordedStep(
                now_ns=value["now"],
                completions=tuple(_output_from_json(output) for output in value["completions"]),
                commands=tuple(_command_from_json(command) for command in value["commands"]),
                decisions=tuple(value["decisions"]),
            )
        except (ValueError, KeyError, TypeError, AgentServeError) as error:
            raise RecordingError(f"{self._path}:{number}: not a step of a recording: {error!r}") from None


def _tiering_from_json(value: dict[str, Any] | None) -> TieringConfig | None:
    if value is None:
        return None
    return TieringConfig(**{**value, "tiers": tuple(TierConfig(**tier) for tier in value["tiers"])})


def _lora_from_json(value: dict[str, Any] | None) -> LoraConfig | None:
    if value is None:
        return None
    return LoraConfig(**{**value, "adapters": tuple(AdapterConfig(**adapter) for adapter in value["adapters"])})


def _device_from_json(value: dict[str, Any]) -> DeviceProfile:
    rows = tuple((tokens, rows) for tokens, rows in value["rows"])
    return DeviceProfile(**{**value, "rows": rows, "contention": Contention(**value["contention"])})


def _command_to_json(command: Command) -> dict[str, Any]:
    return {"type": type(command).__name__, **dataclasses.asdict(command)}


def _command_from_json(value: dict[str, Any]) -> Command:
    fields = dict(value)
    kind = fields.pop("type")
    if kind == "EndRequest":
        return EndRequest(fields["request_id"], FinishReason(fields["reason"]))
    if kind == "SetDistances":
        return SetDistances(tuple((name, distance) for name, distance in fields["agents"]), fields["relative"])
    if kind == "NoteTurn":
        return NoteTurn(**fields)
    if kind == "Speculate":
        return Speculate(fields["request_id"], tuple(fields["token_ids"]))
    if kind == "FlushTiers":
        return FlushTiers()
    if kind != "SubmitRequest":
        raise ValueError(f"unknown command {kind!r}")
    sampling = dict(fields.pop("sampling"))
    sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
    if fields.get("foresight") is not None:
        fields["foresight"] = Foresight(**fields["foresight"])
    fields["prompt_token_ids"] = tuple(fields["prompt_token_ids"])
    return SubmitRequest(**fields, sampling=SamplingParams(**sampling))


def _output_to_json(output: Report) -> dict[str, Any]:
    if not isinstance(output, TierContents):
        return dataclasses.asdict(output)
    blocks = [(block.slot, block.content_id.hex(), block.parent_id.hex()) for block in output.blocks]
    return {"tier": output.tier.value, "blocks": blocks}


def _output_from_json(value: dict[str, Any]) -> Report:
    if "tier" in value:
        ids = ((slot, bytes.fromhex(own), bytes.fromhex(parent)) for slot, own, parent in value["blocks"])
        return TierContents(Tier(value["tier"]), tuple(StoredBlock(*fields) for fields in ids))
    if "transfer_id" in value:
        return TransferOutput(**value)
    if "load_id" in value:
        return AdapterLoadOutput(**value)
    samples = tuple(
        TokenSample(
            sample["request_id"],
            sample["token_id"],
            sample["logprob"],
            tuple((token, logprob) for token, logprob in sample["top_logprobs"]),
        )
        for sample in value["samples"]
    )
    return BatchOutput(**{**value, "lane": Lane(value["lane"]), "samples": samples})
