"""Qwen-Bailian traces (Wang et al., "KVCache Cache in the Wild", USENIX ATC '25).

One request a line; a hash id stands for 16 prompt tokens, and `parent_chat_id` names the turn before it, -1 none:

    {"chat_id": 159, "parent_chat_id": 55, "timestamp": 61.114, "input_length": 521, "output_length": 132,
     "type": "text", "turn": 2, "hash_ids": [1089, 1090, ...]}
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from agentserve.sim.blocks import MAX_BLOCK_ID
from agentserve.sim.formats.interface import Trace, output_tokens
from agentserve.sim.programs import Program, Turn
from agentserve.sim.records import Notes, Record, Source, json_records

BLOCK_TOKENS = 16
_NO_PARENT = "-1"


@dataclass(frozen=True, slots=True)
class _Row:
    chat_id: str
    parent_id: str
    arrival_ms: float
    num_tokens: int
    num_outputs: int
    block_ids: tuple[int, ...]


def read_bailian(source: Source, limit: int | None) -> Trace:
    """The requests of a conversation are the turns of a program; each starts at its time, or when the one before it
    has ended, if that is later.

    Of several requests that continue the same one, the first stays in its program and the others begin programs of
    their own. A prompt is what its hash ids say, so what was generated before is not found again in it, as in the
    published hit rates, which compare prompts only.
    """
    notes = Notes()
    rows: dict[str, _Row] = {}
    for record in islice(json_records(source), limit):
        row = _row(record, notes)
        if row.chat_id in rows:
            raise record.error("chat_id", "each id once")
        rows[row.chat_id] = row
        notes.add_unused(record)
    chains = _chains(list(rows.values()), notes)
    next_id = 1 + max((block_id for row in rows.values() for block_id in row.block_ids), default=0)
    programs = []
    for chain in chains:
        turns = []
        for index, row in enumerate(chain):
            block_ids = row.block_ids
            if len(block_ids) * BLOCK_TOKENS < row.num_tokens:
                block_ids = (*block_ids, next_id)  # an id that nobody else has
                next_id += 1
                notes.add("prompts end in a partial block without a hash id; nobody shares it")
            later = index > 0
            turns.append(
                Turn(
                    row.num_tokens,
                    row.num_outputs,
                    keep_tokens=0 if later else None,
                    block_ids=block_ids,
                    arrival_ms=row.arrival_ms if later else None,
                )
            )
        first = chain[0]
        programs.append(
            Program(f"chat-{first.chat_id}", tuple(turns), arrival_ms=first.arrival_ms, block_tokens=BLOCK_TOKENS)
        )
    return Trace(tuple(programs), notes.lines())


def _row(record: Record, notes: Notes) -> _Row:
    chat_id = record.name("chat_id")
    if chat_id is None:
        raise record.error("chat_id", "an id")
    num_tokens = record.integer("input_length", 1)
    block_ids = record.integers("hash_ids", MAX_BLOCK_ID)
    whole, both = num_tokens // BLOCK_TOKENS, -(-num_tokens // BLOCK_TOKENS)
    if len(block_ids) not in (whole, both):
        expected = f"{whole} ids" if whole == both else f"{whole} or {both} ids"
        raise record.error("hash_ids", f"{expected} for {num_tokens} tokens (there are {len(block_ids)})")
    return _Row(
        chat_id,
        record.name("parent_chat_id", default=_NO_PARENT) or _NO_PARENT,
        1e3 * record.number("timestamp", "seconds"),
        num_tokens,
        output_tokens(record, "output_length", notes),
        block_ids,
    )


def _chains(rows: list[_Row], notes: Notes) -> list[list[_Row]]:
    """Conversations in the order of their beginnings; the rows of each in the order of arrival."""
    chains: list[list[_Row]] = []
    chain_of: dict[str, list[_Row]] = {}
    for row in sorted(rows, key=lambda row: row.arrival_ms):
        chain = chain_of.get(row.parent_id)
        if chain is None and row.parent_id != _NO_PARENT:
            notes.add("requests continue one that is not before them in the file; they begin programs of their own")
        if chain is not None and chain[-1].chat_id != row.parent_id:
            notes.add("requests continue one that was continued already; they begin programs of their own")
            chain = None
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(row)
        chain_of[row.chat_id] = chain
    return chains
