"""Ladders: one schedule file for a model that goes through several context lengths, stage by stage.

:mod:`schedule` reads the file, :mod:`plan` turns it into one Megatron command a stage and checks that the
stages fit each other, :mod:`execution` runs them with resume, :mod:`command` is ``megatron-fope ladder``.
"""
