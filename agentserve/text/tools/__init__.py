"""Tool calls in a model's text: what a request may ask for, and one incremental parser a format."""
