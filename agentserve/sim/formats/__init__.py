"""Files of other projects as workloads: one module a format, `load_workload` for all of them."""

from agentserve.sim.formats.load import FORMATS, detect_format, load_workload

__all__ = ["FORMATS", "detect_format", "load_workload"]
