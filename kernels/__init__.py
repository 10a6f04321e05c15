"""GPU kernels of agentserve, packaged as `agentserve_kernels`. Imports nothing from agentserve."""
