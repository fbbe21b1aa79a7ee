"""The commands: data, evaluation, conversion, ladders, planning."""
