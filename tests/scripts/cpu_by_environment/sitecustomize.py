"""With this folder on ``PYTHONPATH``, scripts that torchrun starts get the CPU runtime."""

import os
import sys

if "RANK" in os.environ:
    from megatron_fope import cpu

    sys.argv[1:] = cpu.add_argument_defaults(sys.argv[1:])
    cpu.enable()
