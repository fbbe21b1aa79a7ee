"""Flags: FoPE's own, what Megatron's say, Megatron's parser."""
