"""Plain data that is made many times a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[_T]) -> type[_T]:
    """A dataclass with slots that type checkers take as frozen, but the interpreter does not.

    A frozen dataclass sets each field through `object.__setattr__`, which makes construction about three times as slow.
    That matters for what is made for every token. Nobody changes a record once it is made: it is equal by value,
    hashable, and shared between the control plane and executors.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)
