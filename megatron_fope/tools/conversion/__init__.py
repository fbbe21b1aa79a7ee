"""Checkpoints: what one holds (:mod:`inspection`), how two differ (:mod:`comparison`), RoPE to FoPE and back
without rewriting the model's data (:mod:`converter`).

Nothing here needs a GPU or a process group.
"""
