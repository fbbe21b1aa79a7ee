"""FoPE without Megatron: the formula, its settings, the geometry that follows from them."""
