"""A user's own training script with the one line that makes FoPE available."""

import sys

if __name__ == "__main__":
    from megatron_fope import cpu

    cpu.enable()
    sys.argv = cpu.add_argument_defaults(sys.argv)

    import megatron_fope

    megatron_fope.register()

    from megatron_fope.training.pretrain import main

    main()
