"""Every error that agentserve raises on purpose.

    AgentServeError
    ├── ConfigError                     bad option, environment variable or file: exit code 2
    ├── ModelError
    │   ├── UnknownModelError           no such alias, directory or file
    │   ├── ModelFormatError            unreadable, truncated or inconsistent weights or tokenizer
    │   └── UnsupportedModelError       readable, but not a model that we can run
    ├── RecordingError                  a recording that cannot be read or replayed
    ├── WorkloadError                   a workload or a file of programs that cannot be run
    ├── RequestError                    one request is refused; the daemon is unharmed
    │   ├── InvalidRequestError
    │   │   ├── ContextLengthExceededError
    │   │   └── InvalidGrammarError
    │   ├── ModelNotFoundError
    │   ├── AuthenticationError
    │   ├── ForbiddenHostError
    │   ├── RequestTooLargeError
    │   └── QueueFullError
    └── EngineError                     the engine failed while it worked on an accepted request

Wrong input raises one of these at the door. `assert` is for our own bugs. None of them knows HTTP: the table from
error to status code is in `agentserve.server.errors`.
"""

from __future__ import annotations


class AgentServeError(Exception):
    """Base class. `str(error)` is a sentence that can be shown to a user."""


class ConfigError(AgentServeError):
    """An option, an environment variable or a configuration file is wrong."""


class ModelError(AgentServeError):
    """A model cannot be loaded."""


class UnknownModelError(ModelError):
    """The name is no alias, and no directory or file of that name exists."""


class ModelFormatError(ModelError):
    """A file of the model is unreadable, truncated or inconsistent."""


class UnsupportedModelError(ModelError):
    """The files are in order, but the architecture or a feature of it is not supported."""


class RecordingError(AgentServeError):
    """A recording cannot be read, or was made by an incompatible version."""


class WorkloadError(AgentServeError):
    """A program, a file of programs or a workload is malformed, or asks for what it cannot be."""


class RequestError(AgentServeError):
    """A request is refused. `param` names the field that is at fault, `code` is the OpenAI error code."""

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequestError(RequestError):
    """A field is missing, has the wrong type or a value out of range."""


class ContextLengthExceededError(InvalidRequestError):
    """Prompt and requested output do not fit the window."""

    code = "context_length_exceeded"

    def __init__(self, num_tokens: int, max_model_len: int, *, param: str = "messages") -> None:
        # The wording satisfies the matchers of the clients that compact on overflow.
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens. However, your request has "
            f"{num_tokens} input tokens (context_length_exceeded).",
            param=param,
        )
        self.num_tokens = num_tokens
        self.max_model_len = max_model_len


class InvalidGrammarError(InvalidRequestError):
    """A schema, a pattern or a grammar is malformed, contradicts itself, or uses what is not supported."""


class ModelNotFoundError(RequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""

    code = "invalid_api_key"


class ForbiddenHostError(RequestError):
    """The Host header names another machine: most likely DNS rebinding."""

    code = "forbidden_host"


class RequestTooLargeError(RequestError):
    """The body is longer than the limit."""

    code = "request_too_large"


class QueueFullError(RequestError):
    """Too many requests are waiting; the client should retry."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(AgentServeError):
    """The engine could not finish an accepted request."""
