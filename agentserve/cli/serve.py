"""`agentserve serve`: load a model, say what was chosen and why, answer requests until a signal comes."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel

from agentserve.cli.options import add_options, resolve_options
from agentserve.config import Resolved, ServeConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentserve.build import Engine
    from agentserve.cli.types import Verbs
    from agentserve.core.agents.policy import Policy
    from agentserve.server.state import ServerOptions

logger = logging.getLogger("agentserve")


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "serve",
        help="serve a model to local agents",
        description="Serves a model over an OpenAI-compatible HTTP interface. Every option can also be set by the "
        "environment variable in brackets or in a TOML file (--config, else agentserve/config.toml in "
        "$XDG_CONFIG_HOME, else /etc/agentserve/config.toml); the command line wins, then the environment.",
        allow_abbrev=False,
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    resolved = resolve_options(arguments, os.environ)
    config = resolved.config
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"
    )
    for name, source in resolved.sources.items():
        shown = "***" if name == "api_key" and config.api_key else getattr(config, name)
        level = logging.DEBUG if source == "default" else logging.INFO
        logger.log(level, "%s = %s (%s)", name, shown, source)
    check_address(config)
    # Imported here, so that `--help` and wrong options answer at once.
    from agentserve.build import build_engine
    from agentserve.build.policies import safety_policies

    safety = safety_policies(config)
    engine = build_engine(config, report=logger.info)
    # What was made until now stays until the end. Else every full collection would look through all of torch, with the
    # interpreter locked, while streams wait: 160 ms for the 250,000 objects of the imports alone, on a 2-core Xeon.
    gc.collect()
    gc.freeze()
    try:
        asyncio.run(_serve(engine, resolved, safety))
    finally:
        engine.stop()
    return 0


def check_address(config: ServeConfig) -> None:
    """Refuses an unsafe address before a model is loaded for it. Raises ConfigError."""
    from agentserve.server.state import ServerOptions

    ServerOptions(model_name="", executor="", host=config.host, api_key=config.api_key, insecure=config.insecure)


def server_options(engine: Engine, config: ServeConfig) -> ServerOptions:
    from agentserve.server.security import is_loopback
    from agentserve.server.state import ServerOptions

    lora = engine.engine_config.lora
    adapters = () if lora is None else tuple(adapter.name for adapter in lora.adapters)
    # With adapters a wrong name would be answered by the wrong model.
    accepts_any = is_loopback(config.host) and not adapters
    return ServerOptions(
        model_name=engine.model_name,
        executor=engine.capabilities.name,
        device=engine.capabilities.device,
        dtype=engine.dtype,
        simulated=engine.capabilities.simulated,
        notes=engine.notes,
        host=config.host,
        port=config.port,
        api_key=config.api_key,
        insecure=config.insecure,
        aliases=config.alias,
        adapters=adapters,
        accept_any_model=accepts_any if config.accept_any_model is None else config.accept_any_model,
        claude_alias=config.claude_alias,
        uses_distances=engine.engine_config.policy == "invocation_distance",
        max_num_seqs=config.max_num_seqs,
        max_body_bytes=config.max_body_size,
        sse_ping_interval_s=config.sse_ping_interval,
        write_timeout_s=config.write_timeout,
        drain_timeout_s=config.drain_timeout,
        train_context=engine.model_config.max_position_embeddings,
        num_parameters=engine.model_config.num_parameters,
    )


async def _serve(engine: Engine, resolved: Resolved, safety: Sequence[Policy]) -> None:
    from agentserve.server.answer_format import AnswerSupport
    from agentserve.server.app import run_server
    from agentserve.server.caching import CacheOptions
    from agentserve.server.state import ServerState

    config = resolved.config
    engine.bridge.bind(engine.client, asyncio.get_running_loop())
    engine.driver.start()
    state = ServerState.create(
        server_options(engine, config),
        engine.client,
        engine.tokenizer,
        engine.chat_template,
        support=AnswerSupport(engine.output_format, engine.grammars),
        cache=CacheOptions(
            block_size=engine.engine_config.block_size,
            has_prefix_cache=config.prefix_caching,
            token_history_bytes=config.token_history_size if config.token_history else 0,
            stabilize=config.stabilize,
            speculates=engine.engine_config.speculate != "none",
        ),
        safety=safety,
        engine_failure=lambda: engine.driver.failure,
    )
    await run_server(state, on_ready=lambda host, port: _print_banner(engine, host, port))


def _print_banner(engine: Engine, host: str, port: int) -> None:
    name = f"[{host}]" if ":" in host else host
    capabilities, config = engine.capabilities, engine.engine_config
    lines = [
        f"listening on http://{name}:{port}",
        f"model      {engine.model_name} in {engine.dtype}, window of {config.max_model_len} tokens",
        f"executor   {capabilities.name}: {capabilities.device}",
        f"KV cache   {config.num_blocks * config.block_size} tokens in blocks of {config.block_size}",
    ]
    if config.lora is not None:
        lines.append(f"adapters   {len(config.lora.adapters)}, of which {config.lora.max_resident} fit the device")
    title = "agentserve"
    if capabilities.simulated:
        title = "SIMULATED: tokens and timing are made up, no model runs"
        lines[0:0] = [f"! {note}" for note in engine.notes] + [""]
    else:
        lines += [f"note       {note}" for note in engine.notes]
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if console.is_terminal:
        style = "bold red" if capabilities.simulated else "green"
        console.print(Panel("\n".join(lines), title=title, border_style=style, expand=False))
    else:
        console.print("\n".join([title, *lines]))
