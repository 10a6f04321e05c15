"""Prompts of a wanted length, made of words: the same for every server, and nothing in common by chance.

The server's tokenizer is not known here. Three short probes say how many tokens a word has and what the chat template
adds; a comparison measures that once, on its first server, so that all servers get the same text. What was really sent
is read from `usage` and reported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from random import Random

from agentserve.sim.programs import Program, Workload
from bench.load.client import Call, ChatClient
from bench.load.errors import EndpointError
from bench.load.words import WORDS

_PROBE_WORDS = 400
_TASK_WORDS = 16
"""The user's message of a first turn; the rest of its prompt is the system's message."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the tokenizer and the chat template of the server make of words."""

    tokens_per_word: float
    first_overhead: float
    """Tokens that the template adds to a conversation of a system's and a user's message."""
    turn_overhead: float
    """Tokens that it adds for each further pair of an assistant's and a user's message."""

    def num_words(self, num_tokens: float) -> int:
        """At least one."""
        return max(1, round(num_tokens / self.tokens_per_word))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class WordStream:
    """Words drawn from a seed, without end. The same seed gives the same words."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed)

    def __iter__(self) -> WordStream:
        return self

    def __next__(self) -> str:
        return self._random.choice(WORDS)

    def take(self, num_words: int) -> list[str]:
        return list(islice(self, num_words))


class Conversation:
    """The messages of one program, turn by turn."""

    def __init__(self, program: Program, calibration: Calibration, seed: str) -> None:
        """`seed` decides all words; programs of one `prefix_id` share the words of their prefix."""
        self._program = program
        self._calibration = calibration
        self._own = WordStream(f"{seed}/program/{program.program_id}")
        self._prefix = WordStream(f"{seed}/prefix/{program.prefix_id}")
        self.messages: list[dict[str, str]] = []

    def begin_turn(self, turn_index: int) -> list[dict[str, str]]:
        """Appends what the program says in this turn; returns the whole conversation."""
        num_tokens = self._program.turns[turn_index].append_tokens
        if turn_index > 0:
            words = self._own.take(self._calibration.num_words(num_tokens - self._calibration.turn_overhead))
            self.messages.append({"role": "user", "content": " ".join(words)})
            return self.messages
        prefix: list[str] = []
        if self._program.prefix_tokens:
            prefix = self._prefix.take(self._calibration.num_words(self._program.prefix_tokens))
        rest = num_tokens - self._program.prefix_tokens - self._calibration.first_overhead
        own = self._own.take(max(2, self._calibration.num_words(rest)))
        num_task = min(_TASK_WORDS, len(own) // 2)
        self.messages = [
            {"role": "system", "content": " ".join(prefix + own[:-num_task])},
            {"role": "user", "content": " ".join(own[-num_task:])},
        ]
        return self.messages

    def end_turn(self, text: str) -> None:
        """Appends the server's own answer, as agents do."""
        self.messages.append({"role": "assistant", "content": text})


async def calibrate(client: ChatClient, seed: int) -> Calibration:
    """Three calls of one output token each. Raises EndpointError if they fail or say nothing about tokens."""
    words = WordStream(f"{seed}/calibration")
    system, task = words.take(_TASK_WORDS), " ".join(words.take(_TASK_WORDS))

    async def num_tokens(messages: list[dict[str, str]]) -> int:
        call = Call("calibration")
        await client.chat(call, messages, max_tokens=1)
        if call.error is not None:
            raise EndpointError(f"a probe of {client.base_url} failed: {call.error}")
        if call.num_prompt_tokens < 1:
            raise EndpointError(f"{client.base_url} does not report usage.prompt_tokens; prompts cannot be sized")
        return call.num_prompt_tokens

    base = [{"role": "system", "content": " ".join(system)}, {"role": "user", "content": task}]
    short = await num_tokens(base)
    long = await num_tokens([{"role": "system", "content": " ".join(system + words.take(_PROBE_WORDS))}, base[1]])
    further = await num_tokens([*base, {"role": "assistant", "content": "the"}, {"role": "user", "content": task}])
    per_word = (long - short) / _PROBE_WORDS
    if per_word <= 0:
        raise EndpointError(f"{client.base_url} counts {long} prompt tokens for a longer prompt than one of {short}")
    # The assistant's answer of the probe is one word; in a run it is counted as output of the turn before.
    return Calibration(
        tokens_per_word=per_word,
        first_overhead=short - 2 * _TASK_WORDS * per_word,
        turn_overhead=further - short - (_TASK_WORDS + 1) * per_word,
    )


def planned_prompt_tokens(workload: Workload) -> dict[tuple[str, int], int]:
    """Prompt tokens that each turn should have, by program and turn: all inputs and outputs before it, and its own."""
    planned: dict[tuple[str, int], int] = {}
    for program in workload.programs:
        total = 0
        for index, turn in enumerate(program.turns):
            total += turn.append_tokens
            planned[program.program_id, index] = total
            total += turn.output_tokens
    return planned
