"""What `scripts/gpu_check` runs on a machine with a GPU: one module a part, each in a process of its own."""
