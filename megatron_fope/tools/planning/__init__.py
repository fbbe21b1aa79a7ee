"""``megatron-fope plan``: memory and communication of a run on paper, and a layout that fits."""
