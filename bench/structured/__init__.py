"""How often constrained answers are valid."""
