"""A checkpoint's model on one rank, and forward passes through it in any layout."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from megatron_fope.arguments.flags import given_flags
from megatron_fope.tools.evaluation.progress import counted

_READ_BESIDE = (
    "add_position_embedding",
    "bf16",
    "fp16",
    "fp16_lm_cross_entropy",
    "group_query_attention",
    "hybrid_layer_pattern",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "num_experts",
    "openai_gelu",
    "padded_vocab_size",
    "position_embedding_type",
    "quick_geglu",
    "rope_scaling_factor",
    "rotary_percent",
    "rotary_base",
    "rotary_seq_len_interpolation_factor",
    "seq_length",
    "spec",
    "squared_relu",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "use_rope_scaling",
    "use_rotary_position_embeddings",
    "vocab_size",
    "merge_file",
    "chat_template",
    "metadata_path",
    "special_tokens",
    "trust_remote_code",
)
"""Arguments that describe a model, or its tokens, and are no fields of Megatron's configuration classes."""

_READ_BESIDE_STARTS = ("fope_", "yarn_", "tokenizer", "null_tokenizer", "tiktoken", "vocab_", "pad_vocab")
_NOT_MODEL = (
    "fusion",
    "recompute",
    "offload",
    "cuda_graph",
    "persist",
    "cpu_initialization",
    "coder_num_layers",
    "cp_comm_type",
    "pipeline_model_parallel_layout",
    "log_max_attention_logit",
    "rng_tracker",
    "test_mode",
)
"""Parts of names of fields that are ways of running, or derived from others."""

Batch = dict[str, Any]
"""Tensors ``[b, s]``: ``tokens``, ``position_ids``, for losses ``labels``, and what a reduction needs."""


def load_model(checkpoint: str) -> list[Any]:
    """Initialise Megatron as the checkpoint's arguments say and load its model.

    Args:
        checkpoint: folder given to ``--save``; ``sys.argv`` holds the flags for this run.

    Returns:
        The model's chunks on this rank, in evaluation mode.
    """
    from megatron.training import get_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.training import get_model

    from megatron_fope import compat
    from megatron_fope.checkpoint.reader import open_checkpoint
    from megatron_fope.training.model import embedding_ranks, model_provider

    compat.repair_checkpoint_metadata_reader()
    stored = open_checkpoint(checkpoint, name="--checkpoint").args
    compat.initialize_megatron(functools.partial(_adopt, stored), get_embedding_ranks=embedding_ranks)
    model = get_model(model_provider, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    if get_args().position_embedding_type == "fope":
        from megatron_fope.layers.report import assert_fope_active, describe

        if describe(model):
            assert_fope_active(model)
    for chunk in model:
        chunk.eval()
    return model


def unload_models() -> None:
    """Forget what Megatron and FoPE know in this process, so that another checkpoint's model can be loaded.

    Nothing may refer to a model any more.
    """
    import torch

    from megatron_fope import compat
    from megatron_fope.layers import anneal
    from megatron_fope.training.registration import unregister

    anneal.begin(0, 0)
    unregister()
    compat.reset_megatron()
    gc.collect()
    torch.cuda.empty_cache()


def _adopt(stored: Any, parser: Any, args: Any) -> None:
    """Take everything that describes the model from the checkpoint's arguments.

    Megatron's ``--use-checkpoint-args`` copies a list that leaves out precision, query/key normalisation
    and more; a model evaluated without them would be another one.
    """
    given = given_flags()
    for action in parser._actions:
        name = action.dest
        if describes_model(name) and hasattr(stored, name) and not given & set(action.option_strings):
            setattr(args, name, getattr(stored, name))


def describes_model(name: str) -> bool:
    """Whether an argument of Megatron says what a model is, and not how it is run.

    Megatron fills the fields of its configuration classes from the arguments of the same names, wherever its
    parser lists them; only those of the parallel layout belong to a run.

    Args:
        name: the argument's, as in the namespace.
    """
    if name == "mla_down_proj_fusion":  # other weights, not another kernel
        return True
    if name in _READ_BESIDE or name.startswith(_READ_BESIDE_STARTS):
        return True
    return name in _fields() and not any(part in name for part in _NOT_MODEL)


@functools.cache
def _fields() -> frozenset[str]:
    """Fields of all configurations of a transformer, without those of the parallel layout."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    classes = (MLATransformerConfig, HeterogeneousTransformerConfig)
    names = {field.name for each in classes for field in dataclasses.fields(each)}
    return frozenset(names - {field.name for field in dataclasses.fields(ModelParallelConfig)})


def sum_over_batches(
    model: list[Any],
    batches: Callable[[int, int, int], Iterable[Batch]],
    reduce: Callable[[Any, Batch], Any],
    *,
    samples: int,
    tokens_per_batch: int,
    length: int,
    shape: tuple[int, ...],
) -> Any:
    """Run sequences forward in batches and add up what a reduction makes of each batch.

    Args:
        model: from :func:`load_model`.
        batches: called with the first sequence, the number of sequences in a batch and the number of
            batches; whole sequences, of which this function takes this rank's part under context parallelism.
        reduce: called where the output is, with it and this rank's part of the batch; the output is the loss
            ``[b, s]`` if the batch has ``labels``, else this tensor-parallel rank's logits ``[b, s, v]``.
            Returns a float64 tensor of ``shape``.
        samples: number of sequences.
        tokens_per_batch: tokens in one forward pass, at least one sequence.
        length: tokens of a sequence.
        shape: of a reduction's result.

    Returns:
        The sum over batches and context-parallel ranks on the CPU, the same on all ranks; ``shape``, float64.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    total = torch.zeros(shape, dtype=torch.float64, device=next(model[0].parameters()).device)
    batch = max(1, min(samples, tokens_per_batch // length))
    # The schedule keeps one size for all micro-batches, so a smaller last batch is a run of its own.
    full, rest = divmod(samples, batch)
    for first, size, count in ((0, batch, full), (full * batch, rest, 1)):
        if not size * count:
            continue
        with torch.no_grad():
            reports = get_forward_backward_func()(
                forward_step_func=functools.partial(_forward_step, reduce),
                data_iterator=list(itertools.tee(counted(batches(first, size, count)), len(model))),
                model=model,
                num_microbatches=count,
                seq_length=length,
                micro_batch_size=size,
                forward_only=True,
            )
        for report in reports:
            total += report["sum"]
    if parallel_state.get_context_parallel_world_size() > 1:
        torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
    torch.distributed.broadcast(
        total,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return total.cpu()


def _forward_step(
    reduce: Callable[[Any, Batch], Any], data_iterator: Iterator[Batch], model: Any
) -> tuple[Any, Callable]:
    from megatron_fope import compat

    # A copy: Megatron replaces the tensors of the dictionary, which the other chunks of the model get too.
    batch = compat.slice_batch_for_context_parallelism(dict(next(data_iterator)), whole=True)
    batch = {key: value.cuda() for key, value in batch.items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch.get("labels"))

    def report(output: Any) -> tuple[Any, dict[str, Any]]:
        # The schedule scales the first value in place; it is no loss that anybody reads.
        return output.new_zeros(()), {"sum": reduce(output, batch)}

    return output, report
