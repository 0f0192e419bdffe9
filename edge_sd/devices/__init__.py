"""Which variant of each component runs where, and why."""
