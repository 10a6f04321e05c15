"""Where a policy loses against the oracle: what is computed a second time, and what has taken its place meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentserve.core.engine import StepResult
from agentserve.core.events import RequestAdmitted, RequestFinished, RequestPreempted, SubmitRequest
from agentserve.core.memory.manager import MemoryManager
from bench.cachesage.contents import Contents

NEW, ANCHOR, HISTORY = "new", "anchor", "history"
ANSWER, ENDED, UNNEEDED, HELD = "answer", "ended task", "never needed again", "held"


@dataclass(frozen=True, slots=True)
class Losses:
    """Blocks by class."""

    missed: Mapping[str, float]
    """Blocks of prompts that were not found, as a share of all: `new` ones were never computed before, `anchor` is what
    tasks share, `history` belongs to one task."""
    resident: Mapping[str, float]
    """What the memory held when a call was admitted, as a mean share of its blocks. Nobody holds them: `anchor`,
    `history` that is needed again, and what is not: `answer`, history of an `ended task`, and of one that goes on
    (`never needed again`). The rest is `held` or free."""


class LossMeter:
    """Looks at the memory after each step of a replay."""

    def __init__(self, commands: Sequence[SubmitRequest], block_size: int) -> None:
        self._contents = Contents(commands, block_size)
        self._task = {command.request_id: command.program_id for command in commands}
        self._open = Counter(self._task.values())
        self._users: dict[int, set[str | None]] = {}
        for request_id, path in self._contents.paths.items():
            for number in path:
                self._users.setdefault(number, set()).add(self._task[request_id])
        self._computed: set[int] = set()
        self._missed: Counter[str] = Counter()
        self._resident: Counter[str] = Counter()
        self._num_admitted = 0
        self._block_size = block_size

    def saw(self, result: StepResult, memory: MemoryManager) -> None:
        """A step was made."""
        for event in result.events:
            if isinstance(event, RequestAdmitted):
                self._admitted(event.request_id, event.num_cached_tokens // self._block_size)
                self._look(memory)
            elif isinstance(event, RequestPreempted):
                self._contents.preempted(event.request_id)
            elif isinstance(event, RequestFinished):
                self._open[self._task[event.request_id]] -= 1

    def result(self, num_blocks: int) -> Losses:
        """All of it."""
        num_asked = sum(map(len, self._contents.paths.values()))
        return Losses(
            missed={name: self._missed[name] / num_asked for name in (NEW, ANCHOR, HISTORY)},
            resident={
                name: self._resident[name] / (num_blocks * self._num_admitted)
                for name in (ANCHOR, HISTORY, ANSWER, ENDED, UNNEEDED, HELD)
            },
        )

    def _admitted(self, request_id: str, num_cached: int) -> None:
        path = self._contents.paths[request_id]
        self._contents.admitted(request_id)
        for number in path[num_cached:]:
            self._missed[NEW if number not in self._computed else self._class(number)] += 1
        self._computed.update(path)

    def _class(self, number: int) -> str:
        return ANCHOR if len(self._users[number]) > 1 else HISTORY

    def _look(self, memory: MemoryManager) -> None:
        self._num_admitted += 1
        for node in memory._tree.nodes():
            number = self._contents.number(node)
            if node.num_refs:
                name = HELD
            elif number is None:
                name = ANSWER
            elif len(self._users[number]) > 1:
                name = ANCHOR
            elif self._contents.uses[number]:
                name = HISTORY
            else:
                (task,) = self._users[number]
                name = UNNEEDED if self._open[task] > 0 else ENDED
            self._resident[name] += 1
