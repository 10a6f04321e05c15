"""Real command-line agents against the daemon with a scripted model, on a network that has nothing but loopback."""
