"""What a run will take: memory, disk and tokens, before anything starts."""
