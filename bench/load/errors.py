"""What can go wrong with a run; all of them are sentences for whoever started it."""

from __future__ import annotations

from agentserve.errors import AgentServeError


class BenchError(AgentServeError):
    """The bench cannot do what it was asked for."""


class ScenarioError(BenchError):
    """The file of servers, a name in it or a program that it needs is wrong or missing."""


class EndpointError(BenchError):
    """The endpoint does not answer as an OpenAI-compatible server does."""


class EndpointGoneError(BenchError):
    """Nobody listens at the address any more: the run ends."""


class ServerFailedError(BenchError):
    """A server that the bench started has ended or did not become ready; the message has the end of its log."""
