"""Flags: FoPE's own, what Megatron's say, Megatron's parser.

Whatever refuses something raises a ``UserError`` of one line that names the flag.
"""
