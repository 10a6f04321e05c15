"""Clocks, power, temperature and the like, as nvidia-smi reports them; nothing is changed."""

from __future__ import annotations

import subprocess

_FIELDS = (
    "name,driver_version,compute_mode,mig.mode.current,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,"
    "power.limit,temperature.gpu,memory.total,memory.used,pstate"
)


def smi() -> dict[str, str] | None:
    """Of GPU 0 now; None without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader", "--id=0"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in result.stdout.split(",")]
    names = _FIELDS.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None
