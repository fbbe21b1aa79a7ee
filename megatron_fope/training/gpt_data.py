"""Data sets and micro-batches of GPT pre-training, in every supported release of Megatron."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_fope import compat
from megatron_fope.common.errors import UserError

BATCH_KEYS = (
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "labels",
    "local_cp_size",
    "loss_mask",
    "max_seqlen",
    "position_ids",
    "tokens",
)


def _dataset_config(args: Any) -> GPTDatasetConfig:
    """Megatron's description of the data set for these arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    values = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": build_tokenizer(args),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "sequences_per_dataset": sequences_per_dataset,
        "sequence_parallel_size": args.tensor_model_parallel_size if args.sequence_parallel else 0,
        "inter_document_masking": _masks_documents(args),
    }
    values |= {
        name: getattr(args, name)
        for name in (
            "split",
            "multiple_validation_sets",
            "full_validation",
            "num_dataset_builder_threads",
            "mmap_bin_files",
            "reset_position_ids",
            "reset_attention_mask",
            "eod_mask_loss",
            "object_storage_cache_path",
            "mid_level_dataset_surplus",
            "allow_ambiguous_pad_tokens",
            "context_parallel_size",
            "data_parallel_size",
            "hybrid_context_parallel",
        )
    }
    return GPTDatasetConfig(**compat.known_fields(GPTDatasetConfig, values))


def _masks_documents(args: Any) -> bool:
    """Whether documents meet in ordinary sequences, but must not see each other (0.19 and later)."""
    return getattr(args, "dataloader_inter_document_masking", False)


def _packs_documents(args: Any) -> bool:
    """Whether a sample says where its documents end."""
    return args.sft or _masks_documents(args)


def _needs_data(args: Any, vp_stage: int | None) -> bool:
    """Whether this rank reads the data set.

    The first tensor-parallel rank of a stage that uses tokens; of every stage when documents are kept apart,
    because each needs to know where they end.
    """
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    return (
        _packs_documents(args)
        or is_first_or_last_pipeline_stage(vp_stage)
        or compat.has_mtp_layers(core_transformer_config_from_args(args), vp_stage)
    )


def check_args(args: Any) -> None:
    """Refuse data that cannot be read here.

    Raises:
        UserError: ``--sft`` with a release, or without a flag or library, that it needs.
    """
    if not args.sft:
        return
    if not compat.reads_packed_batches():
        raise UserError(
            f"--sft is given with Megatron-Core {compat.megatron_version()}, whose pipeline stages do not "
            "all learn where documents end; requires 0.18 or later"
        )
    if args.create_attention_mask_in_dataloader:
        raise UserError("--sft is given without --no-create-attention-mask-in-dataloader, which it needs")
    missing = [name for name in ("datasets", "transformers") if find_spec(name) is None]
    if missing and args.tokenizer_type == "SFTTokenizer":
        raise UserError(f"--sft needs {' and '.join(missing)}; pip install {' '.join(missing)}")


def _dataset_class(args: Any) -> type:
    """The class that reads the data.

    Raises:
        UserError: ``--sft`` with a tokenizer that knows no conversations.
    """
    if args.sft:
        if args.tokenizer_type != "SFTTokenizer":
            raise UserError(
                f"--tokenizer-type is {args.tokenizer_type}, but --sft reads conversations; "
                "allowed: SFTTokenizer"
            )
        from megatron.training.datasets.sft_dataset import SFTDataset

        return SFTDataset
    return MockGPTDataset if args.mock_data else GPTDataset


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Build the training, validation and test data sets.

    Args:
        num_samples: how many samples each of the three must give.
        vp_stage: index of the model chunk under virtual pipeline parallelism.

    Returns:
        The three data sets, each None where it is empty or not read by this rank.
    """
    args = get_args()
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    datasets = BlendedMegatronDatasetBuilder(
        _dataset_class(args),
        num_samples,
        partial(_needs_data, args, vp_stage),
        _dataset_config(args),
    ).build()
    print_rank_0("> finished creating GPT datasets ...")
    return datasets


# Every rank calls the provider, and the builder decides who reads.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron's way to say it


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, config: Any, vp_stage: int | None = None
) -> tuple[dict[str, Any], PackedSeqParams | None]:
    """One micro-batch as this rank needs it.

    Args:
        data_iterator: yields samples; None on ranks that read none.
        config: the model's ``TransformerConfig``.
        vp_stage: index of the model chunk under virtual pipeline parallelism.

    Returns:
        The batch of tensors (None for what this pipeline stage has no use for) and, when documents are kept
        apart, their boundaries.
    """
    args = get_args()
    packed = _packs_documents(args)
    mtp = compat.has_mtp_layers(config, vp_stage)
    uses_tokens = is_first_or_last_pipeline_stage(vp_stage) or mtp
    if not uses_tokens and not packed:
        return dict.fromkeys(BATCH_KEYS), None

    batch = compat.read_batch(data_iterator, args, keys=BATCH_KEYS, packed=packed, mtp=mtp)
    if uses_tokens:
        whole = _masks_documents(args) and not args.sft
        batch = compat.slice_batch_for_context_parallelism(batch, whole=whole)
        batch = {key: batch.get(key) for key in BATCH_KEYS}
    else:
        # A stage in the middle only needs to know where documents end.
        boundaries = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
        batch = {key: batch.get(key) if key in boundaries else None for key in BATCH_KEYS}
    return batch, _packed_seq_params(batch, args)


def _packed_seq_params(batch: dict[str, Any], args: Any) -> PackedSeqParams | None:
    """Document boundaries in the form that attention takes, or None for ordinary sequences."""
    if batch["cu_seqlens"] is None:
        return None
    # The loader keeps a batch dimension of one; attention expects flat boundaries.
    actual, padded = (
        None if batch[key] is None else batch[key].squeeze(0) for key in ("cu_seqlens", "cu_seqlens_padded")
    )
    compat.count_document_tokens(actual)
    used = actual if padded is None else padded
    longest = int(batch["max_seqlen"].item())
    values = {
        "qkv_format": "thd",
        "cu_seqlens_q": used,
        "cu_seqlens_kv": used,
        "cu_seqlens_q_padded": padded,
        "cu_seqlens_kv_padded": padded,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "tokens_per_sample": args.seq_length,
    }
    return PackedSeqParams(**compat.known_fields(PackedSeqParams, values))
