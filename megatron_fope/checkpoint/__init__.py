"""Checkpoints: reading, comparing settings, refusing damage, starts from other models."""
