"""ReAct-style agents over the official `openai` SDK."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from openai import AsyncOpenAI

from bench.demo.tools import Tools, parse_action

SYSTEM_PROMPT = """\
You are a careful software engineer who answers questions about the project in the current directory.
You work in steps. In every step you write one short thought and then exactly one action.

You have four tools. They run on the user's machine, read-only, inside the project.

list_files[directory]
    Lists the files and directories in a directory of the project, one a line. Directories end with a slash. The
    argument is a path relative to the root of the project; a dot is the root itself. Hidden files are left out.
    Use it first when you do not know where something is.
    Example: Action: list_files[agentserve/core]

read_file[path]
    Shows the first lines of a text file. The argument is a path relative to the root of the project. Blank lines are
    left out and long lines are cut. Use it when you know which file holds the answer.
    Example: Action: read_file[pyproject.toml]

search[text]
    Looks for a piece of text in all Python files of the project and shows each line that contains it, with its file
    and line number. Upper and lower case are the same. The argument is the plain text, not a regular expression.
    Example: Action: search[class Scheduler]

calculate[expression]
    Works out an arithmetic expression with numbers, parentheses and the operators + - * / // and %. Use it for every
    calculation, also for easy ones: you are not good at mental arithmetic.
    Example: Action: calculate[(30 + 12) * 2]

Rules
1. Write "Thought:" and one sentence, then "Action:" and one tool with its argument in square brackets, all in one line.
2. The user answers with "Observation:" and the result of the tool. Never write an observation yourself.
3. Use only the four tools above. Never invent a file name: list the directory first.
4. Do not repeat an action whose result you have seen. If a tool reports an error, try something else.
5. Do not write code, and do not explain the tools to the user.
"""

EXAMPLES = (
    ("Question: Which programs are in the project?", "Thought: I start at the root. Action: list_files[.]"),
    ("Observation: LICENSE\ndocs/\nsrc/", "Thought: The programs must be in src. Action: list_files[src]"),
    ("Observation: main.py\nutil.py", "Thought: The main program comes first. Action: read_file[src/main.py]"),
    ("Observation: import util\nutil.run()", "Thought: It calls run. Action: search[def run]"),
    ("Observation: src/util.py:12: def run():", "Thought: Now I read that file. Action: read_file[src/util.py]"),
    (
        "Question: How large are 12 blocks of 16 tokens with 40 bytes each?",
        "Thought: I multiply the three numbers. Action: calculate[12 * 16 * 40]",
    ),
    ("Observation: 7680", "Thought: I want it in kilobytes. Action: calculate[7680 / 1024]"),
    ("Question: Where is the class Batch defined?", "Thought: I search for it. Action: search[class Batch]"),
    ("Observation: src/batch.py:7: class Batch:", "Thought: I read the file. Action: read_file[src/batch.py]"),
)
"""Turns of other sessions: a tiny model follows examples better than rules. Every session starts with them."""


@dataclass(frozen=True, slots=True)
class Task:
    """A question, and the tool calls of somebody who knows the project.

    The demo's model is tiny. When its reply names no tool, or a call whose result it has seen, the agent takes the next
    call of the plan instead, so that every session moves on; the table says how often that happened.
    """

    agent: str
    question: str
    plan: tuple[tuple[str, str], ...]


TASKS = (
    Task(
        "explorer",
        "Which modules make up the control plane of this project?",
        (
            ("list_files", "."),
            ("list_files", "agentserve"),
            ("list_files", "agentserve/core"),
            ("read_file", "agentserve/core/scheduler.py"),
            ("read_file", "agentserve/core/engine.py"),
        ),
    ),
    Task(
        "searcher",
        "Where is the prefix cache implemented, and how does it evict blocks?",
        (
            ("search", "class RadixTree"),
            ("search", "def allocate"),
            ("read_file", "agentserve/core/memory/radix.py"),
            ("search", "evict"),
            ("list_files", "agentserve/core/memory"),
        ),
    ),
    Task(
        "accountant",
        "How many bytes of KV cache does a token need with 30 layers, 3 heads of 64 and 4 bytes an element?",
        (
            ("search", "def kv_bytes_per_token"),
            ("calculate", "2 * 30 * 3 * 64 * 4"),
            ("calculate", "46080 * 16"),
            ("calculate", "2147483648 // 737280"),
            ("read_file", "agentserve/models/config.py"),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class TurnResult:
    """One model call, measured by the client. Times in seconds on the client's monotonic clock."""

    agent: str
    turn: int
    work_class: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    sent_s: float
    chunk_times_s: tuple[float, ...]
    action: tuple[str, str]
    """The tool that ran, and its argument."""
    by_model: bool
    """Whether the model itself named them."""

    @property
    def num_new_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_cached_tokens

    @property
    def ttft_s(self) -> float:
        return self.chunk_times_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """(last - first token) / (n - 1), vLLM's definition; None for a single token."""
        if self.num_output_tokens < 2:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def worst_gap_s(self) -> float | None:
        """The longest pause between two chunks."""
        gaps = [b - a for a, b in zip(self.chunk_times_s, self.chunk_times_s[1:], strict=False)]
        return max(gaps, default=None)


@dataclass(slots=True)
class Agent:
    """One session: a growing conversation of thoughts, actions and observations."""

    task: Task
    client: AsyncOpenAI
    model: str
    tools: Tools
    max_tokens: int
    on_turn: Callable[[TurnResult], None]
    messages: list[dict[str, str]] = field(default_factory=list)
    done: set[tuple[str, str]] = field(default_factory=set)

    async def run(self, num_turns: int) -> None:
        self.messages = [{"role": "system", "content": SYSTEM_PROMPT}]
        for question, action in EXAMPLES:
            self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": action}]
        self.messages.append({"role": "user", "content": f"Question: {self.task.question}"})
        for turn in range(num_turns):
            result, reply = await self._turn(turn)
            self.on_turn(result)
            self.done.add(result.action)
            observation = self.tools.run(*result.action)
            # The reply goes back as it came, so the next prompt starts with everything that is cached by now.
            self.messages.append({"role": "assistant", "content": reply})
            self.messages.append({"role": "user", "content": f"Observation: {observation}"})

    async def _turn(self, turn: int) -> tuple[TurnResult, str]:
        sent_s = time.monotonic()
        stream = await self.client.chat.completions.create(
            model=self.model,
            messages=self.messages,  # type: ignore[arg-type]
            max_tokens=self.max_tokens,
            temperature=0.0,
            stop=["\n"],
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"X-Session-ID": self.task.agent},
        )
        text, times, usage = "", [], None
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                text += chunk.choices[0].delta.content
                times.append(time.monotonic())
            if chunk.usage is not None:
                usage = chunk.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        extension = (usage.model_extra or {}).get("agentserve", {})
        chosen = parse_action(text, self.tools.names)
        by_model = chosen is not None and chosen not in self.done
        result = TurnResult(
            agent=self.task.agent,
            turn=turn + 1,
            work_class=extension.get("work_class", "?"),
            num_prompt_tokens=usage.prompt_tokens,
            num_cached_tokens=usage.prompt_tokens_details.cached_tokens or 0,
            num_output_tokens=usage.completion_tokens,
            sent_s=sent_s,
            chunk_times_s=tuple(times) or (time.monotonic(),),
            action=chosen if chosen is not None and by_model else self.task.plan[turn % len(self.task.plan)],
            by_model=by_model,
        )
        return result, text
