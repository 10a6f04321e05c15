"""Workloads of AgentServeSim and LLMServingSim: sessions, workflows and single requests, one a line.

    {"session_id": "s", "arrival_time_ns": 0, "sub_requests": [
        {"input_toks": 1472, "output_toks": 133, "tool_duration_ns": 127348767, "tool_name": "bash"}, ...]}
    {"workflow_id": "w", "arrival_time_ns": 0, "nodes": [{"node_id": "a", "input_toks": 9, "output_toks": 2}, ...],
     "edges": [{"src": "a", "dst": "b", "delay_ns": 5000000}, ...]}
    {"input_toks": 128, "output_toks": 512, "arrival_time_ns": 0}

`input_toks` is the whole prompt. Where `input_tok_ids` say what it is made of, they decide what a prompt has in common
with the one before it; where there are none, a conversation is taken to grow by outputs and new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise

from agentserve.sim.formats.interface import Trace, output_tokens
from agentserve.sim.prefixes import group_prefixes, num_common_tokens
from agentserve.sim.programs import Program, Turn, circular
from agentserve.sim.records import Notes, Record, Source, json_records

_NS_PER_MS = 1e6
_MAX_TOKEN_ID = 1 << 31
_STREAMING = "streaming-deltas"


@dataclass(slots=True)
class _Call:
    """A sub-request or a node as the file says it."""

    num_prompt_tokens: int
    num_outputs: int
    """As in the file, may be 0."""
    output_tokens: int
    """At least 1."""
    prompt_ids: tuple[int, ...] | None
    output_ids: tuple[int, ...] | None
    tool_name: str | None
    gap_ms: float = 0.0
    """To the next call."""
    parents: dict[str, float] = field(default_factory=dict)
    """Of a node: the gap behind each node that it waits for, in milliseconds."""


def read_agentservesim(source: Source, limit: int | None) -> Trace:
    """A session is a program. A workflow is a program for each run of nodes that only follow each other.

    Programs whose first prompts begin with the same token ids share a prefix.
    """
    notes = Notes()
    programs: list[Program] = []
    first_ids: list[tuple[int, ...]] = []

    def add(program: Program, calls: list[_Call]) -> None:
        programs.append(program)
        first_ids.append(calls[0].prompt_ids or ())

    for index, record in enumerate(islice(json_records(source), limit)):
        arrival_ms = record.number("arrival_time_ns", "nanoseconds", 0.0) / _NS_PER_MS
        if "nodes" in record:
            _add_workflow(record, index, arrival_ms, notes, add)
        else:
            _add_session(record, index, arrival_ms, notes, add)
        notes.add_unused(record)
    groups = group_prefixes((None, ids) for ids in first_ids)
    shared = tuple(
        replace(program, prefix_id=prefix_id, prefix_tokens=num_tokens) if num_tokens else program
        for program, (prefix_id, num_tokens) in zip(programs, groups, strict=True)
    )
    return Trace(shared, notes.lines())


_Add = Callable[[Program, list[_Call]], None]


def _add_session(record: Record, index: int, arrival_ms: float, notes: Notes, add: _Add) -> None:
    program_id = record.name("session_id", default=f"program-{index:05d}")
    assert program_id is not None
    mode = record.name("input_mode")
    if mode not in (None, _STREAMING):
        raise record.error("input_mode", f"{_STREAMING!r} or none")
    calls = []
    if "sub_requests" in record:
        subs = record.records("sub_requests")
        for sub in subs:
            call = _call(sub, notes)
            call.gap_ms = sub.number("tool_duration_ns", "nanoseconds", 0.0) / _NS_PER_MS
            notes.add_unused(sub)
            calls.append(call)
    else:
        calls.append(_call(record, notes))
    if calls[-1].gap_ms:
        notes.add("tool times behind a last turn have nothing to wait for them")
        calls[-1].gap_ms = 0.0
    turns = _turns(calls, notes, is_streaming=mode == _STREAMING)
    add(Program(program_id, turns, arrival_ms=arrival_ms), calls)


def _call(record: Record, notes: Notes) -> _Call:
    num_prompt_tokens = record.integer("input_toks", 1)
    prompt_ids = record.integers("input_tok_ids", _MAX_TOKEN_ID) if "input_tok_ids" in record else None
    if prompt_ids is not None and len(prompt_ids) != num_prompt_tokens:
        raise record.error("input_tok_ids", f"{num_prompt_tokens} ids as in input_toks (there are {len(prompt_ids)})")
    return _Call(
        num_prompt_tokens,
        record.integer("output_toks", 0),
        output_tokens(record, "output_toks", notes),
        prompt_ids,
        record.integers("output_tok_ids", _MAX_TOKEN_ID) if "output_tok_ids" in record else None,
        record.name("tool_name", "tool"),
    )


# ---- sessions ----


def _turns(calls: list[_Call], notes: Notes, *, is_streaming: bool = False) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    num_history = 0
    for index, call in enumerate(calls):
        num_kept = num_history
        if index and not is_streaming:
            num_kept = min(_num_kept(calls[index - 1], call, notes), call.num_prompt_tokens - 1)
        num_new = call.num_prompt_tokens if is_streaming else call.num_prompt_tokens - num_kept
        turns.append(
            Turn(
                num_new,
                call.output_tokens,
                call.gap_ms,
                tool_name=call.tool_name,
                keep_tokens=None if num_kept == num_history else num_kept,
            )
        )
        num_history = num_kept + num_new + call.output_tokens
    return tuple(turns)


def _num_kept(before: _Call, call: _Call, notes: Notes) -> int:
    """How many tokens of the conversation before it a prompt begins with."""
    whole = before.num_prompt_tokens + before.num_outputs
    if before.prompt_ids is None or call.prompt_ids is None:
        if call.num_prompt_tokens > whole:
            return whole
        notes.add("prompts are not longer than the conversation before; they are taken to keep the earlier prompt only")
        return before.num_prompt_tokens
    num_common = num_common_tokens(before.prompt_ids, call.prompt_ids)
    if num_common < before.num_prompt_tokens:
        return num_common
    if before.output_ids is not None:
        return num_common + num_common_tokens(before.output_ids, call.prompt_ids[num_common:])
    if call.num_prompt_tokens > whole:
        return whole
    notes.add("prompts are too short to have the output before in them; it is taken to be left out")
    return num_common


# ---- workflows ----


def _add_workflow(record: Record, index: int, arrival_ms: float, notes: Notes, add: _Add) -> None:
    workflow_id = record.name("workflow_id", "session_id", default=f"workflow-{index:05d}")
    nodes = _nodes(record, notes)
    if circular({node_id: call.parents for node_id, call in nodes.items()}):
        raise record.error("edges", "no circle")
    children: dict[str, list[str]] = {}
    for node_id, call in nodes.items():
        for parent in call.parents:
            children.setdefault(parent, []).append(node_id)

    def is_continued(parent: str) -> bool:
        """Whether one node follows it, and that waits for nothing else."""
        following = children.get(parent, [])
        return len(following) == 1 and len(nodes[following[0]].parents) == 1

    last_of: dict[str, str] = {}  # the program that a node ends, which others can wait for
    chains: dict[str, list[str]] = {}
    for node_id, call in nodes.items():
        if len(call.parents) == 1 and is_continued(next(iter(call.parents))):
            continue  # it follows in the chain of its parent
        program_id, chain = f"{workflow_id}/{node_id}", [node_id]
        while is_continued(chain[-1]):
            chain += children[chain[-1]]
        chains[program_id] = chain
        last_of[chain[-1]] = program_id
    for program_id, chain in chains.items():
        calls = [nodes[node_id] for node_id in chain]
        for call, following in pairwise(calls):
            call.gap_ms = next(iter(following.parents.values()))
        parents = calls[0].parents
        program = Program(
            program_id,
            _turns(calls, notes),
            arrival_ms=arrival_ms,
            depends_on=tuple(last_of[parent] for parent in parents),
            dependency_gaps_ms=tuple(parents.values()) if any(parents.values()) else (),
        )
        add(program, calls)


def _nodes(record: Record, notes: Notes) -> dict[str, _Call]:
    """The calls by node id, with their parents."""
    nodes: dict[str, _Call] = {}
    for index, node in enumerate(record.records("nodes")):
        node_id = node.name("node_id", default=str(index))
        assert node_id is not None
        if node_id in nodes:
            raise node.error("node_id", "each id once")
        nodes[node_id] = _call(node, notes)
        notes.add_unused(node)
    for edge in record.records("edges") if "edges" in record else ():
        src, dst = edge.name("src"), edge.name("dst")
        for name, node_id in (("src", src), ("dst", dst)):
            if node_id not in nodes:
                raise edge.error(name, "the id of a node")
        assert src is not None and dst is not None
        if src == dst or src in nodes[dst].parents:
            raise edge.error("dst", f"another node than {src!r}, and each edge once")
        nodes[dst].parents[src] = edge.number("delay_ns", "nanoseconds", 0.0) / _NS_PER_MS
        notes.add_unused(edge)
    return nodes
