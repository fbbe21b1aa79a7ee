"""FoPE in Megatron's layers: the hook, coefficients, positions, layer specs."""
