"""CacheSage's evaluation: traffic is recorded once and replayed under each policy."""
