"""Grammars: which tokens a request may produce."""
