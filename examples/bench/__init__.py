"""Benchmarks: speed and memory of the rotation, step time and communication of RoPE and FoPE twins.

``python examples/bench`` runs them; see :mod:`bench.command`.
"""
