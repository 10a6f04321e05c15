"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A deadline is a timed assertion: on a machine with other work it fails for no fault of the code.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")
