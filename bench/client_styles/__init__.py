"""How much of what agents send again is found in the cache, by the way in which their clients send it."""
