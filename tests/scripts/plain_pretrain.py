"""Pre-training that, like Megatron-LM's own scripts, knows nothing of FoPE."""

from megatron_fope import is_registered
from megatron_fope.training.pretrain import main

if __name__ == "__main__":
    main()
    print(f"> registered: {is_registered()}")
