"""What the control plane tells the world: engine events and commands.

Commands go in, events come out. Both are plain data, so that a recording holds them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from agentserve.core.batch import Batch, TokenSample
from agentserve.core.controllers import Decision
from agentserve.core.records import record
from agentserve.core.request import FinishReason, SamplingParams

HUMAN = "(human)"
"""In place of a tool's name, for an answer that calls no tool: whoever reads it takes the time until the next call."""

# ---- commands ----


@dataclass(frozen=True, slots=True)
class Foresight:
    """What only a simulator knows about a call's program. For oracles."""

    gap_ns: int | None
    """From the end of this call to the arrival of the next one; None: there is none."""
    next_not_before_ns: int
    """The next one does not arrive before this time, on the driver's clock."""
    num_prompt_tokens: int
    """New prompt tokens of this call and of all that follow."""
    num_output_tokens: int
    """The same for tokens that are generated."""


@dataclass(frozen=True, slots=True)
class SubmitRequest:
    """A new request. Its terminal event is guaranteed, whatever happens."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    agent_id: str | None = None
    session_id: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    """Prefixes are shared only between requests of the same salt and the same adapter."""
    adapter: str | None = None
    """The LoRA adapter that it is for; None: the model as it is."""
    program_id: str | None = None
    """The task that this call is a part of, if it has several sessions; None: the session is the task."""
    tool_name: str | None = None
    """The tool that runs after this call, if that is known before it; see `NoteTurn`. Policies use it once the call has
    ended."""
    is_last_turn: bool | None = None
    """Whether the task ends with this call; None: nobody knows. Policies use it once the call has ended."""
    foresight: Foresight | None = None
    distance: float | None = None
    """How far the agent's next call is once this one has ended, as in `SetDistances`; None: nobody knows."""


@dataclass(frozen=True, slots=True)
class SetDistances:
    """How far agents are from their next call: their invocation distances (ScaleSim, section 4.2).

    A distance is a number of steps, hops or seconds, whatever the application counts in: only the order matters, and
    how it compares with the threshold of prefetching. `core.agents.distances` has the rules.
    """

    agents: tuple[tuple[str, float], ...]
    """Agent, or session of an agent without a name, and its distance; in no order."""
    relative: bool = False
    """The numbers are changes of the distances that are known, such as -1 for a step nearer."""


@dataclass(frozen=True, slots=True)
class EndRequest:
    """Ends a request early: CANCELLED when nobody listens any more, STOP when a stop string was found in its text.

    Ignored for a request that has ended already: the two may cross.
    """

    request_id: str
    reason: FinishReason = FinishReason.CANCELLED


@dataclass(frozen=True, slots=True)
class NoteTurn:
    """What a call that has ended was found to end with, once its answer was read.

    Ignored if its session has gone on meanwhile.
    """

    request_id: str
    tool_name: str
    """The tool that runs now, `HUMAN` if it is none. An answer with calls of several tools has all their names, in
    alphabetical order with `+` between them: the time until all of them are done is no single tool's."""


@dataclass(frozen=True, slots=True)
class Speculate:
    """What the next prompt of a session begins with is known, while a tool runs: see `core.agents.speculation`.

    Ignored if its session has gone on meanwhile, or if nobody speculates. It may come before the call has ended.
    """

    request_id: str
    """The call whose answer asked for the tool: the next prompt has its session, salt and adapter."""
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FlushTiers:
    """The engine is about to end: whatever is cached goes to the tier that outlives it, the most valuable first."""


Command: TypeAlias = SubmitRequest | EndRequest | SetDistances | NoteTurn | Speculate | FlushTiers

# ---- events ----


@dataclass(frozen=True, slots=True)
class RequestAdmitted:
    """It has its blocks; prefill starts with the next batch. Emitted again after each preemption."""

    request_id: str
    at_ns: int
    num_prompt_tokens: int
    num_cached_tokens: int
    """Tokens found in the prefix cache by this admission."""


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """A chunk of the prompt is done."""

    request_id: str
    at_ns: int
    num_computed_tokens: int
    num_total_tokens: int


@record
class TokenGenerated:
    request_id: str
    at_ns: int
    sample: TokenSample
    output_index: int


@dataclass(frozen=True, slots=True)
class RequestPreempted:
    """Its blocks were taken; it will be computed again."""

    request_id: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Counts and times of one request. Times are nanoseconds on the driver's clock."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were not computed because their KV was in the cache at the first admission."""
    num_output_tokens: int
    num_preemptions: int
    first_work_class: str
    """`cold_prefill` or `resume_prefill`; empty if it never ran."""
    arrival_ns: int
    first_scheduled_ns: int | None
    first_token_ns: int | None
    last_token_ns: int | None


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """The one terminal event of a request. Nothing about it follows."""

    request_id: str
    at_ns: int
    reason: FinishReason
    stats: RequestStats
    error: str | None = None
    """A sentence for the user when `reason` is ERROR."""


@record
class BatchScheduled:
    """A batch was handed to a lane."""

    at_ns: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class ControlDecided:
    """The controller changed its mind: how the device is shared from now on."""

    at_ns: int
    decision: Decision


@dataclass(frozen=True, slots=True)
class PolicyFailed:
    """A policy raised an exception. The built-in order has its place from now on."""

    at_ns: int
    policy: str
    error: str


EngineEvent: TypeAlias = (
    RequestAdmitted
    | PrefillProgress
    | TokenGenerated
    | RequestPreempted
    | RequestFinished
    | BatchScheduled
    | ControlDecided
    | PolicyFailed
)
