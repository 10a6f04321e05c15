"""The load driver: any OpenAI-compatible endpoint, the same work for each, every token's time."""
