"""How close any controller can come to the best prompt speed and the best time per token at once.

    python -m bench.regret --gpu rtx-5090 --model qwen2.5-7b
    python -m bench.regret --gpu profile.json --model smollm2-135m    # a file of `agentserve profile`

Every way to share the device with streams and a prompt reads prompts at some rate and makes tokens at some rate; using
several ways in turn gives any weighted mean of theirs. The *regret* of such a mix is how many times its prompts, or its
tokens, take what they take with the way that is best for them. What is printed is the least regret in both that any mix
has, by the cost model of the profile, and the mix: no controller can do better with these ways.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from agentserve.build.simulation import load_hardware
from agentserve.config import ControlConfig, EngineConfig
from agentserve.core.batch import Lane
from agentserve.core.controllers import ControlSignal
from agentserve.core.controllers.factory import build_controller
from agentserve.core.controllers.predictive import PredictiveController
from agentserve.core.costmodel import BatchShape, prompt_shape
from agentserve.errors import AgentServeError
from agentserve.sim.hardware import Hardware

_PROMPT_TOKENS = 1000
_STEPS = 40
"""Weights of a mix are multiples of the inverse of this."""


@dataclass(frozen=True, slots=True)
class Point:
    """A way to share the device, and what it does."""

    label: str
    prompt_rate: float
    """Prompt tokens per second."""
    token_rate: float
    """Tokens per second of each stream."""


@dataclass(frozen=True, slots=True)
class Regret:
    """The best mix of two ways, since more than two are never needed for a point of a convex frontier in a plane."""

    least: float
    first: Point
    second: Point
    share: float
    """Of the time, for the first one."""
    tokens_near_best_prompts: float
    """How many times as long as with the way that is best for them tokens take at least, where prompts are within 10 %
    of theirs."""


def points(hardware: Hardware, num_decodes: int, context: int) -> list[Point]:
    """All ways to share a device between so many streams and a prompt of 1,000 tokens, without riders in a split."""
    target_ns = 2 * hardware.isolated_tpot_ns(context)
    config = EngineConfig(
        num_blocks=hardware.num_blocks(16),
        block_size=16,
        max_model_len=context + _PROMPT_TOKENS,
        control=ControlConfig(tpot_target_ns=target_ns),
    )
    decodes = BatchShape(num_decodes, num_decodes * context, num_samples=num_decodes)
    signal = ControlSignal(0, decodes, 0, _PROMPT_TOKENS, 0, 1, 0, 0, 0)
    controller = build_controller(config, hardware.table, hardware.cost_model)
    assert isinstance(controller, PredictiveController), "that is the default"
    found = []
    for option in controller.options(signal):
        decision = option.decision
        label = f"{decision.partition.label} chunk {decision.prefill_chunk}"
        if decision.partition == hardware.table.whole:
            found.append(Point(label, option.prefill_rate, 1e9 / option.tpot_ns))
            continue
        # What a lane does that has nothing else to do: the best that a split can promise to the streams.
        took_ns = hardware.cost_model.duration_ns(decodes, Lane.DECODE, decision.partition, True)
        chunk = min(decision.prefill_chunk, _PROMPT_TOKENS)
        read_ns = hardware.cost_model.duration_ns(prompt_shape(chunk), Lane.PREFILL, decision.partition, True)
        found.append(Point(label, chunk * 1e9 / read_ns, 1e9 / took_ns))
    return found


def least_regret(ways: Sequence[Point], baselines: Sequence[Point]) -> Regret:
    """The mix of ways with the least regret against what is best among the baselines.

    Args:
        ways: what may be mixed.
        baselines: at least one; the best prompt rate and the best token rate among them are what counts as best.
    """
    prompt_rate = max(point.prompt_rate for point in baselines)
    token_rate = max(point.token_rate for point in baselines)
    best: tuple[float, Point, Point, float] | None = None
    near = float("inf")
    for first, second in itertools.combinations_with_replacement(ways, 2):
        for step in range(_STEPS + 1):
            share = step / _STEPS
            prompts = prompt_rate / (share * first.prompt_rate + (1.0 - share) * second.prompt_rate)
            tokens = token_rate / (share * first.token_rate + (1.0 - share) * second.token_rate)
            if best is None or max(prompts, tokens) < best[0]:
                best = (max(prompts, tokens), first, second, share)
            if prompts <= 1.1:
                near = min(near, tokens)
    assert best is not None, "no way to share a device"
    return Regret(*best, near)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.regret", description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", default="rtx-5090", help="profile or a file (default: %(default)s)")
    parser.add_argument("--model", default="qwen2.5-7b", help="default: %(default)s")
    parser.add_argument("--context", type=int, default=500, help="tokens of each stream (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        hardware = load_hardware(arguments.gpu, arguments.model)
    except AgentServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{hardware.conditions}: streams of {arguments.context} tokens beside a prompt of {_PROMPT_TOKENS}")
    for num_decodes in (1, 2, 3, 4, 6):
        ways = points(hardware, num_decodes, arguments.context)
        # Static split, shared device, and chunked: the baselines of the issue of controllers.
        half, whole, shared = hardware.table.split_nearest(0.5), hardware.table.whole, hardware.table.stream
        names = (f"{half.label} ", f"{shared.label} ", f"{whole.label} chunk 512")
        regret = least_regret(ways, [way for way in ways if way.label.startswith(names)])
        mix = regret.first.label
        if regret.first != regret.second:
            mix = f"{regret.share:.0%} {mix}, else {regret.second.label}"
        print(
            f"{num_decodes} streams: any mix is {regret.least - 1.0:.0%} or more worse in one of both ({mix}); "
            f"with prompts within 10 % of the best, tokens take {regret.tokens_near_best_prompts:.2f} times as long"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
