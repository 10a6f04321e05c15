"""Tests of `agentserve_kernels`: interpreted on a machine without a GPU, compiled and run on one."""
