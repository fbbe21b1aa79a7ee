"""The model that Megatron's global arguments ask for, in every supported release.

A hybrid model with ``--hybrid-layer-pattern``, else GPT. Used by the built-in pre-training
(:mod:`megatron_fope.training.pretrain`) and by commands that load its checkpoints.
"""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args

from megatron_fope import compat
from megatron_fope.arguments.megatron import is_hybrid
from megatron_fope.common.errors import UserError
from megatron_fope.training import gpt_data, gpt_model, hybrid_model

_UNSUPPORTED = {
    "fim_data": "--fim-data",
    "perform_rl_step": "--perform-rl-step",
    "logits_load_dir": "--logits-load-dir",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "use_legacy_models": "--use-legacy-models",
}


def check_args(args: Any) -> None:
    """Refuse what only Megatron-LM's own scripts implement, and layers that cannot be built here.

    Raises:
        UserError: such a flag was given.
    """
    script = "pretrain_hybrid.py" if is_hybrid(args) else "pretrain_gpt.py"
    for name, flag in _UNSUPPORTED.items():
        if getattr(args, name, None):
            raise UserError(
                f"{flag} is not part of the built-in pre-training; give the path of Megatron-LM's {script} "
                "instead of 'pretrain'"
            )
    gpt_data.check_args(args)
    if is_hybrid(args):
        hybrid_model.check_args(args)


def builder_config(args: Any, config: Any = None) -> Any | None:
    """Megatron's own description of the model, which its builder turns into one (0.19 and later; else None).

    Args:
        args: Megatron's arguments.
        config: a ``TransformerConfig`` to use instead of the one from the arguments.
    """
    if is_hybrid(args):
        return hybrid_model.builder_config(args, config)
    return compat.builder_config(args, config)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Build one model chunk from Megatron's global arguments.

    ``megatron.training.training.get_model`` takes this function as its model provider in every release.

    Args:
        pre_process: the chunk starts with the embedding.
        post_process: the chunk ends with the output layer.
        vp_stage: index of the chunk under virtual pipeline parallelism.
        config: a ``TransformerConfig`` to use instead of the one from the arguments.
        pg_collection: process groups; Megatron's global ones by default.

    Returns:
        The bare ``GPTModel`` or ``HybridModel`` (0.17: ``MambaModel``), neither in half precision nor wrapped
        for data parallelism.
    """
    args = get_args()
    check_args(args)
    print_rank_0(f"building {'hybrid' if is_hybrid(args) else 'GPT'} model ...")
    if pg_collection is None:
        pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    chunk: dict[str, Any] = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
    description = builder_config(args, config)
    if description is not None:
        return compat.build_model(description, pg_collection, **chunk)
    config = config or gpt_model.transformer_config(args)
    own: dict[str, Any]
    model_class, (spec, *_) = compat.model_classes()[-1 if is_hybrid(args) else 0]
    if is_hybrid(args):
        own = {
            spec: hybrid_model.stack_spec(args, config),
            "hybrid_layer_pattern": args.hybrid_layer_pattern,
        }
    else:
        own = gpt_model.layer_specs(args, config, vp_stage) | {"rope_scaling": args.use_rope_scaling}
    return model_class(
        config=config,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        pg_collection=pg_collection,
        **own,
        **chunk,
    )


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The ranks of a pipeline that hold a copy of the word embedding."""
    args = get_args()
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)
