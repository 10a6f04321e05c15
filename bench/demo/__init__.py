"""The demo: three agents with real tools against a real daemon. Run it with `scripts/demo`."""
