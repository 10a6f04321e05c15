"""What the data sheets of the cards say that have a shipped profile."""

from __future__ import annotations

from dataclasses import dataclass

from agentserve.core.costmodel import DeviceProfile
from agentserve.profiles.sheets import from_data_sheet


@dataclass(frozen=True, slots=True)
class Card:
    """Values of a data sheet. The matrix rate is dense bfloat16 with float32 accumulation."""

    name: str
    description: str
    num_sms: int
    unit_granularity: int
    min_units: int
    memory_gib: int
    gb_per_s: float
    tflops: float
    l2_mib: int
    remark: str = ""
    """What is uncertain about it."""

    def sheet(self) -> DeviceProfile:
        """The profile that the data sheet alone gives."""
        return from_data_sheet(
            self.name,
            self.description,
            bandwidth_bytes_per_s=self.gb_per_s * 1e9,
            flops_per_s=self.tflops * 1e12,
            compute_units=self.num_sms,
            memory_bytes=self.memory_gib << 30,
            cache_bytes=self.l2_mib << 20,
            unit_granularity=self.unit_granularity,
            min_units=self.min_units,
        )

    def summary(self) -> str:
        """The values in words, as the source of a profile."""
        values = (
            f"{self.gb_per_s:g} GB/s, {self.tflops:g} TFLOPS (dense bfloat16), {self.num_sms} SMs, {self.l2_mib} MiB L2"
        )
        return f"{values}{'; ' + self.remark if self.remark else ''}"


RTX_4090 = Card("rtx-4090", "NVIDIA RTX 4090", 128, 2, 4, 24, 1008, 165.2, 72)
RTX_PRO_6000 = Card(
    "rtx-pro-6000",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    188,
    8,
    8,
    96,
    1597,
    503.8,
    128,
    "the matrix rate is that of the Workstation Edition, since the sheet of the Server Edition gives none for bfloat16",
)
ESTIMATED = (
    Card("rtx-3090", "NVIDIA RTX 3090", 82, 2, 4, 24, 936, 71, 6),
    Card("rtx-a5000", "NVIDIA RTX A5000", 64, 2, 4, 24, 768, 111.1, 6, "at its 230 W the matrix rate may be far lower"),
    Card("rtx-a6000", "NVIDIA RTX A6000", 84, 2, 4, 48, 768, 154.8, 6, "at its 300 W the matrix rate may be lower"),
    Card("rtx-5090", "NVIDIA RTX 5090", 170, 8, 8, 32, 1792, 209.5, 96),
    Card("h100", "NVIDIA H100 SXM", 132, 8, 8, 80, 3350, 989.4, 50, "kernels for Hopper compute larger tiles"),
    Card("h200", "NVIDIA H200 SXM", 132, 8, 8, 141, 4800, 989.4, 50, "kernels for Hopper compute larger tiles"),
)
