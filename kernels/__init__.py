"""GPU kernels of agentserve, packaged as `agentserve_kernels`. Imports nothing from agentserve; needs torch and Triton.

    prefill.paged_prefill       causal attention of chunks over a paged prefix
    decode.paged_decode         attention of one token a sequence, split over the context
    rope.rope_and_write         RMSNorm of heads, rotary embedding, keys and values into their pages
    elementwise                 rms_norm, add_rms_norm, silu_mul
    blocks                      gather_blocks, scatter_blocks: whole blocks for moves between tiers
    sampling.sample             tokens from logits without a synchronization
    reference                   the same functions in plain torch, for tests
    native                      the first three and elementwise for CPUs, in C++
    tuning                      tile sizes, stages and splits as pure functions
    compile_check               compiles every kernel for every architecture, without a GPU

Rules that hold for every launcher:

- It launches on torch's current stream and returns at once: no synchronization, no look at values on the device, no
  allocation (but for filters in `sampling.sample`). So each can be captured in a CUDA graph.
- The grid depends on shapes and `num_units`, never on data. No kernel waits for another CTA: any slot is large enough.
- No workspace belongs to a module. What a kernel needs beside its arguments is the caller's (`DecodeScratch`).
- Wrong shapes, strides and dtypes raise `KernelArgumentError`; values on the device (lengths, block ids) are trusted.
"""
