"""Run Megatron's own training loop on CPUs with gloo: for tests, laptops and continuous integration.

Nothing on the GPU path imports this package, and importing it changes nothing. A launcher calls
:func:`enable` first of all and completes the command line with :func:`add_argument_defaults`.
"""

from __future__ import annotations

from megatron_fope.cpu.arguments import add_argument_defaults
from megatron_fope.cpu.runtime import enable

__all__ = ["add_argument_defaults", "enable"]
