"""What the doctor finds out about GPUs, from facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agentserve.build.findings import Finding, Severity, dotted, gib
from agentserve.build.probe import DriverFacts, GpuFacts, GreenFacts, TorchFacts
from agentserve.executors.pytorch.devices.green_plan import SlotMode, decide_mode

OLDEST_CAPABILITY = (8, 0)
"""Our kernels and FlashInfer's need bfloat16 tensor cores and asynchronous copies."""


def gpu_findings(
    driver: DriverFacts,
    green: GreenFacts,
    torch: TorchFacts | None,
    versions: Mapping[str, str | None],
    nvcc: str | None,
) -> Iterator[Finding]:
    """All about the GPU: driver, cards, slots, kernels. Without a GPU only the driver has a line."""
    yield _driver(driver)
    if not driver.gpus:
        return
    for gpu in driver.gpus:
        yield _gpu(gpu, torch)
    if len(driver.gpus) > 1:
        yield Finding(
            "GPU", Severity.NOTE, f"{len(driver.gpus)} GPUs; one is used, GPU 0", "CUDA_VISIBLE_DEVICES chooses another"
        )
    yield _slots(green)
    yield from _kernels(driver, versions, nvcc)


def _driver(driver: DriverFacts) -> Finding:
    if driver.cuda is None:
        return Finding(
            "driver",
            Severity.WARNING,
            "no NVIDIA driver was found: models run on the CPU, slowly",
            "with an NVIDIA GPU in this machine, install its driver; in a container, pass the GPU through",
        )
    version = f"NVIDIA driver {driver.version}" if driver.version else "NVIDIA driver"
    text = f"{version}, runs CUDA up to {dotted(driver.cuda)}"
    if driver.error is not None:
        return Finding(
            "driver",
            Severity.WARNING,
            f"{text}, but does not start: {driver.error}",
            "look at `nvidia-smi`; after an update of the driver, restart the machine",
        )
    if not driver.gpus:
        return Finding(
            "driver", Severity.WARNING, f"{text}, but shows no GPU", "look at CUDA_VISIBLE_DEVICES and `nvidia-smi -L`"
        )
    return Finding("driver", Severity.OK, text)


def _gpu(gpu: GpuFacts, torch: TorchFacts | None) -> Finding:
    topic, capability = f"GPU {gpu.index}", dotted(gpu.compute_capability)
    free = "" if gpu.free_bytes is None else f", {gib(gpu.free_bytes)} GiB of it free"
    text = f"{gpu.name}, compute capability {capability}, {gpu.compute_units} SMs, {gib(gpu.memory_bytes)} GiB{free}"
    if gpu.compute_capability < OLDEST_CAPABILITY:
        oldest = dotted(OLDEST_CAPABILITY)
        return Finding(
            topic,
            Severity.WARNING,
            f"{text}: too old, {oldest} is needed",
            "serve on the CPU, or use an RTX 30 or newer",
        )
    if torch is not None and torch.archs and not _covers(torch.archs, gpu.compute_capability):
        return Finding(
            topic,
            Severity.WARNING,
            f"{text}: this torch has kernels for {', '.join(torch.archs)} only",
            "install a newer torch",
        )
    return Finding(topic, Severity.OK, text)


def _covers(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether binaries for these architectures run: same major version and no newer minor one, or PTX that is older."""
    major, minor = capability
    for arch in archs:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        has = divmod(int(digits), 10)
        if (kind == "sm" and has[0] == major and has[1] <= minor) or (kind == "compute" and has <= capability):
            return True
    return False


def _slots(facts: GreenFacts) -> Finding:
    """What `--slots auto` would do."""
    topic = "slots"
    if facts.device is None:
        return Finding(
            topic,
            Severity.WARNING,
            f"no Green Contexts, both lanes share all SMs: {facts.error}",
            "pip install cuda-python, in a version not newer than the driver",
        )
    decision = decide_mode(SlotMode.AUTO, facts.device)
    if decision.mode is not SlotMode.GREEN:
        return Finding(topic, Severity.WARNING, f"no Green Contexts: {decision.reason}", "both lanes share all SMs")
    if facts.plan is None:
        return Finding(topic, Severity.WARNING, f"no Green Contexts: {facts.error}", "both lanes share all SMs")
    device = facts.device
    queues = "work queues of their own" if device.splits_unequal else "shared work queues (until CUDA 13.1)"
    return Finding(
        topic,
        Severity.OK,
        f"Green Contexts with {queues}: {facts.plan}; at least {device.min_partition_sms} SMs in steps of "
        f"{device.coscheduled_alignment}",
    )


def _kernels(driver: DriverFacts, versions: Mapping[str, str | None], nvcc: str | None) -> Iterator[Finding]:
    triton, flashinfer = versions["triton"], versions["flashinfer-python"]
    if triton is None:
        yield Finding(
            "Triton",
            Severity.WARNING,
            "not installed: attention by torch alone, slowly",
            "pip install triton",
        )
    else:
        yield Finding(
            "Triton", Severity.OK, f"{triton}: paged attention and fused kernels, compiled at the first start"
        )
    if flashinfer is None:
        yield Finding(
            "FlashInfer",
            Severity.NOTE,
            "not installed: our Triton kernels compute attention",
            "pip install flashinfer-python for more speed on GPUs that it knows",
        )
    elif nvcc is None:
        yield Finding(
            "FlashInfer",
            Severity.NOTE,
            f"{flashinfer}, but no nvcc: it can only use kernels that were compiled before",
            "install the CUDA toolkit, or the package flashinfer-jit-cache that goes with it",
        )
    else:
        yield Finding("FlashInfer", Severity.OK, f"{flashinfer}, compiles its kernels with nvcc {nvcc}")
    newest = _number(nvcc) if nvcc else None
    if newest is not None and driver.cuda is not None and newest > driver.cuda:
        yield Finding(
            "nvcc",
            Severity.NOTE,
            f"{nvcc} is newer than the driver's CUDA {dotted(driver.cuda)}: what it compiles may not run",
            "update the driver",
        )


def _number(version: str) -> tuple[int, int]:
    """`13.0.3` as (13, 0)."""
    parts = version.split(".")
    return int(parts[0]), int(parts[1])
