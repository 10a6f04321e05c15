"""The probe of `smid`. Apart from it because Triton is wanted only here, and only when it is used."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_smid(out, hold_ns):  # type: ignore[no-untyped-def]
    """Each program writes the number of the SM it runs on and stays there for `hold_ns` nanoseconds.

    The special register %smid is an SM of the whole device, whatever share of it a stream has. Staying keeps the next
    programs from being put on the same SM while another one is free.
    """
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    start = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    now = start
    while now - start < hold_ns:
        now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(out + tl.program_id(0), sm)
