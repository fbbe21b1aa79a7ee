"""Megatron's training loop with FoPE: registration, ways to start, models from arguments."""
