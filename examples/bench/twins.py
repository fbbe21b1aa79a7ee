"""A RoPE and a FoPE twin of one small GPT in one process, trained by Megatron's schedule and optimizer.

Both have the same weights, the same data and the same parallel layout; they differ in the position embedding
alone. ``bench step`` times them, ``bench communication`` counts what they send.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

KINDS = ("rope", "fope", "fope learnable")

MODEL = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --lr 1e-4 --clip-grad 1.0 --train-iters 1 --eval-iters 0 "
    "--mock-data --no-check-for-nan-in-loss-and-grad --logging-level 40 --position-embedding-type fope"
)
"""Flags that every twin has; what they do not say (sizes, layout) the caller adds."""


def initialize(flags: list[str], *, cpu: bool) -> None:
    """Start Megatron for the twins of this process.

    Args:
        flags: Megatron's flags besides :data:`MODEL`.
        cpu: use the CPU runtime.

    Raises:
        UserError: no GPU although ``cpu`` is false, or bad flags.
    """
    sys.argv = ["python examples/bench", *MODEL.split(), *flags]
    from megatron_fope.training.launch import prepare

    prepare(cpu=cpu)
    from megatron_fope import compat
    from megatron_fope.training.pretrain import embedding_ranks

    compat.initialize_megatron(lambda parser, args: None, get_embedding_ranks=embedding_ranks)


class Twin:
    """One model with its optimizer; :func:`initialize` comes first.

    Args:
        kind: one of :data:`KINDS`.
        like: another twin whose weights this one starts from.
    """

    def __init__(self, kind: str, *, like: Twin | None = None) -> None:
        import torch
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.utils import get_model_config
        from megatron.training import get_args
        from megatron.training.training import get_model

        from megatron_fope.training.pretrain import model_provider

        self.kind = kind
        args = get_args()
        args.position_embedding_type = kind.split()[0]
        args.fope_learnable = kind.endswith("learnable")
        # Megatron's default for RoPE; validated as FoPE, it was switched off.
        args.apply_rope_fusion = kind == "rope" and args.transformer_impl == "transformer_engine"
        self.model = get_model(model_provider)
        self._check()
        if like is not None:
            weights = {n: p for chunk in like.model for n, p in chunk.named_parameters()}
            with torch.no_grad():
                for chunk in self.model:
                    for name, parameter in chunk.named_parameters():
                        if name in weights:
                            parameter.copy_(weights[name])
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=args.lr,
                clip_grad=args.clip_grad,
                bf16=args.bf16,
                params_dtype=args.params_dtype,
                use_distributed_optimizer=args.use_distributed_optimizer,
            ),
            self.model,
        )
        config = get_model_config(self.model[0])
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads

    def _check(self) -> None:
        """A twin that is not what its name says would make every comparison meaningless."""
        from megatron_fope.layers.report import describe

        for layer in describe(self.model):
            if (layer.fope is not None) != self.kind.startswith("fope"):
                raise RuntimeError(f"the {self.kind} twin has {layer}")
            if layer.fope is not None and layer.fope.learnable != self.kind.endswith("learnable"):
                raise RuntimeError(f"the {self.kind} twin has {layer}")

    def step(self) -> float:
        """Forward, backward, gradient reduction, clipping and Adam on the next micro-batches.

        Returns:
            The mean loss of the micro-batches; 0 on pipeline stages without the output layer.
        """
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.training import get_args

        args = get_args()
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batch = _batch(args)
        reports = get_forward_backward_func()(
            forward_step_func=partial(_forward, batch),
            data_iterator=None,
            model=self.model,
            num_microbatches=get_num_microbatches(),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        self.optimizer.step()
        return sum(float(report["loss"]) for report in reports) / max(1, len(reports))


def _batch(args: Any) -> dict[str, Any]:
    """The same random tokens in every step and on every rank."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (args.micro_batch_size, args.seq_length // args.context_parallel_size + 1)
    tokens = torch.randint(args.padded_vocab_size, shape, generator=generator).cuda()
    positions = torch.arange(shape[1] - 1, device=tokens.device).expand(shape[0], -1)
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "position_ids": positions,
        "attention_mask": None,
        "labels": tokens[:, 1:].contiguous(),
    }


def _forward(batch: dict[str, Any], data_iterator: Any, model: Any) -> tuple[Any, Callable]:
    return model(**batch), _mean


def _mean(losses: Any) -> tuple[Any, dict[str, Any]]:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}
