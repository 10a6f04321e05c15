"""What is measured of a run, live or simulated. Definitions follow vLLM's benchmark where it has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One model call as its client saw it. Times are nanoseconds from the start of the run."""

    program_id: str
    turn_index: int
    role: str
    num_turns: int
    """Turns of its program: all but the last one end with a tool call."""
    num_prompt_tokens: int
    num_cached_tokens: int | None
    """None where the server does not say."""
    num_output_tokens: int
    sent_ns: int
    token_ns: tuple[int, ...]
    """When each token arrived. A live server may send several tokens in one chunk: they have one time."""
    finished_ns: int
    """When the answer was complete."""
    error: str | None = None
    """Why the call failed; then the times may be incomplete and it counts in no metric but the number of errors."""

    @property
    def is_cold(self) -> bool:
        """The first turn of a program: nothing but a shared prefix can be cached."""
        return self.turn_index == 0
