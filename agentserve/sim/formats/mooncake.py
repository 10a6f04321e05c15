"""Mooncake traces (Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST '25).

One request a line; a hash id stands for 512 prompt tokens together with all tokens before them:

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}
"""

from __future__ import annotations

from itertools import islice

from agentserve.sim.blocks import MAX_BLOCK_ID
from agentserve.sim.formats.interface import Trace, output_tokens
from agentserve.sim.programs import Program, Turn
from agentserve.sim.records import Notes, Record, Source, json_records

BLOCK_TOKENS = 512


def read_mooncake(source: Source, limit: int | None) -> Trace:
    """Each request is a program of one turn that arrives at its time: the trace does not say who continues whom.

    Equal hash ids become equal tokens, so the prefix cache finds what the trace says. What a request generates is in no
    later prompt: the trace has no hashes of outputs.
    """
    notes = Notes()
    programs = []
    for index, record in enumerate(islice(json_records(source), limit)):
        programs.append(_program(index, record, notes))
        notes.add_unused(record)
    return Trace(tuple(programs), notes.lines())


def _program(index: int, record: Record, notes: Notes) -> Program:
    arrival_ms = record.number("timestamp", "milliseconds")
    num_tokens = record.integer("input_length", 1)
    num_outputs = output_tokens(record, "output_length", notes)
    block_ids = record.integers("hash_ids", MAX_BLOCK_ID + 1)
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    if len(block_ids) != num_blocks:
        raise record.error("hash_ids", f"{num_blocks} ids for {num_tokens} tokens (there are {len(block_ids)})")
    turn = Turn(num_tokens, num_outputs, block_ids=block_ids)
    return Program(f"request-{index:05d}", (turn,), arrival_ms=arrival_ms, block_tokens=BLOCK_TOKENS)
