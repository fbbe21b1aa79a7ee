"""Benchmarks: speed and memory of the rotation, step time and communication of RoPE and FoPE twins.

``megatron-fope bench`` runs them; see :mod:`megatron_fope.tools.bench.command`. Nothing else imports this
package.
"""
