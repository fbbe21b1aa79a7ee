"""Evaluation of checkpoints at context lengths other than the one they were trained at."""
