"""Finds a C++ compiler. Needs no torch, so that the doctor may ask."""

from __future__ import annotations

import os
import shutil

COMPILERS = ("g++", "c++", "clang++")


def wanted() -> tuple[str, ...]:
    """The names that are looked for: what `CXX` says, if it says something."""
    chosen = os.environ.get("CXX")
    return (chosen,) if chosen else COMPILERS


def find() -> str | None:
    """The path of the compiler that would be used, None if there is none."""
    return next((path for name in wanted() if (path := shutil.which(name)) is not None), None)
