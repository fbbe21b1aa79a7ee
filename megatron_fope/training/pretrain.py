"""Pre-training of GPT and hybrid models on the ``megatron.training`` of an installed Megatron-Core wheel.

Wheels carry the training loop but no ``pretrain_gpt.py`` and no ``pretrain_hybrid.py``. :func:`main` is both:
the same flags, data sets, batches, losses and models as Megatron-LM's; ``--hybrid-layer-pattern`` makes the
model a hybrid one. The pieces are public, so that other commands can build the same model and feed it the
same batches: :func:`model_provider`, :func:`forward_step`, :func:`datasets_provider`.

Nothing here knows about position embeddings; a launcher registers those before it calls :func:`main`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers, inprocess_restart, pretrain, set_startup_timestamps

from megatron_fope import compat
from megatron_fope.training.gpt_data import datasets_provider, get_batch
from megatron_fope.training.model import builder_config, check_args, embedding_ranks, model_provider

__all__ = [
    "check_args",
    "datasets_provider",
    "embedding_ranks",
    "forward_step",
    "get_batch",
    "loss_func",
    "main",
    "model_provider",
]

SPIKE_FACTOR = 10
"""A loss this many times the largest one seen so far counts as a spike (``--check-for-spiky-loss``)."""

_straggler_timer = StragglerDetector()


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor, model: Any = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the token losses of one micro-batch.

    Args:
        loss_mask: 1 for tokens that count, shape ``[B, S]``.
        output_tensor: loss of every token, shape ``[B, S]``.
        model: unused; part of the interface that Megatron's schedules call.

    Returns:
        The summed loss, the number of tokens that count (int32), and both side by side for the log.
    """
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    report = {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}

    # A forward pass is deterministic: another run of the same micro-batch must give the same number.
    validate = partial(get_rerun_state_machine().validate_result, result=loss, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        for test, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            validate(
                rejection_func=test, message=f"found {name} in local forward loss calculation", fatal=True
            )
    if args.check_for_spiky_loss:
        is_spike = partial(
            get_rerun_state_machine().is_unexpectedly_large, threshold=SPIKE_FACTOR, context="loss"
        )
        validate(rejection_func=is_spike, message="Spiky loss", fatal=False)
    return loss, num_tokens, report


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable]:
    """Run one micro-batch through one model chunk.

    Args:
        data_iterator: yields samples; None on ranks that read none.
        model: the model chunk, wrapped or not.
        return_schedule_plan: return the plan of ``--overlap-moe-expert-parallel-comm`` instead of running.

    Returns:
        The chunk's output (or plan) and the loss function that is still to be applied to it.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler_timer(bdata=True):
        config = get_attr_wrapped_model(model, "config")
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch, packed_seq_params = get_batch(data_iterator, config, vp_stage)
    timers("batch-generator").stop()

    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with _straggler_timer:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **targets)
        else:
            output = model(*inputs, **targets, packed_seq_params=packed_seq_params)
    return output, partial(loss_func, batch["loss_mask"], model=model)


def main(check: Callable[[Any], None] | None = None) -> None:
    """Pre-train a model as Megatron's flags on the command line say.

    Args:
        check: called with Megatron's arguments before a model is built.

    Raises:
        UserError: a flag is not part of the built-in pre-training.
    """

    def check_all(args: Any) -> None:
        check_args(args)
        if check is not None:
            check(args)

    now = time.time()
    set_startup_timestamps(program_start=now, main_entry=now)
    compat.repair_checkpoint_metadata_reader()
    restartable_pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    compat.run_pretraining(
        restartable_pretrain,
        datasets_provider=datasets_provider,
        model_provider=model_provider,
        forward_step=forward_step,
        check_args=check_all,
        builder_config=builder_config,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        store=store,
        get_embedding_ranks=embedding_ranks,
    )
