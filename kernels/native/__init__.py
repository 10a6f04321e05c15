"""Kernels for CPUs with AMX and AVX512-BF16, in C++: bfloat16 in, bfloat16 out, everything between in float32.

    launch      the launchers: linear, paged_prefill, paged_decode, rope_and_write, add_rms_norm, silu_mul
    compiler    finds the machine's C++ compiler
    library     compiles the sources once with it, and loads them
    *.cpp       the kernels: `attention`, `layers`, `linear`

They have the arguments of the Triton kernels and the same rules (see the package), with one difference: they return
when they are done. They run on the calling thread and its OpenMP team, which is torch's (both link the same runtime),
so a slot of cores confines them as it confines torch. Several threads may call them at once.
"""
