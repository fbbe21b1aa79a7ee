"""Whether the padding can be folded into the weights of a checkpoint while it is loaded."""

from __future__ import annotations

from typing import Any

from megatron_fope.arguments.megatron import dashes, num_kv_heads_of
from megatron_fope.common.errors import UserError
from megatron_fope.formula.folding import fold_factors
from megatron_fope.formula.geometry import Geometry

_OTHER_WEIGHTS = (
    *("use_megatron_fsdp", "use_torch_fsdp2", "load_main_params_from_ckpt"),
    *("fp8_param_gather", "fp4_param_gather"),
)
"""Megatron's flags under which the weights that count are not those of the layers."""


def check_folding(args: Any, stored: Any, geometry: Geometry, where: str, *, release: bool) -> None:
    """Refuse to fold the padding where the weights would come back from elsewhere.

    Args:
        args: the run's arguments.
        stored: the checkpoint's.
        geometry: FoPE's, of the run.
        where: how messages name it.
        release: whether Megatron takes its weights only.

    Raises:
        UserError: naming the flag.
    """
    fold_factors(args, geometry, num_kv_heads_of(args) or args.num_attention_heads)
    for name in _OTHER_WEIGHTS:
        if getattr(args, name, False):
            raise UserError(
                f"--fope-fold-padding is given with --{dashes(name)}, under which the weights cannot be "
                "changed while they are loaded; use megatron-fope convert --fope-fold-padding before"
            )
    if not (release or args.finetune or args.no_load_optim or getattr(stored, "no_save_optim", False)):
        raise UserError(
            f"--fope-fold-padding is given, but {where} has optimizer states, which belong to the weights as "
            "they were; use --no-load-optim or --finetune"
        )
