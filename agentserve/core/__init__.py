"""The control plane: a deterministic function of `(now, completions, commands)`.

Nothing in here reads a clock, sleeps, opens a file or a socket, starts a thread or imports torch. Time is an `int` of
nanoseconds.
"""
