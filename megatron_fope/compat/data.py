"""Data sets and micro-batches."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_fope.common.errors import UserError
from megatron_fope.compat.signatures import known_parameters


def prepare_dataset_helpers() -> None:
    """See to the ``make -C megatron/core/datasets`` that Megatron runs at start-up, and exits if it fails.

    Wheels (0.17 - 0.19) ship the compiled helpers and no Makefile, so there is nothing to make; without this
    no wheel can train, on a GPU neither. A checkout's Makefile asks whatever ``python3`` and
    ``python3-config`` are on PATH for pybind11's folder and the result's suffix; this interpreter answers.

    Raises:
        UserError: what compiling needs is missing.
    """
    import megatron.core.datasets.utils as dataset_utils

    folder = Path(dataset_utils.__file__).parent
    if not (folder / "Makefile").exists():
        dataset_utils.compile_helpers = lambda: None
        return

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    source, compiled = folder / "helpers.cpp", folder / f"helpers_cpp{suffix}"
    missing = [] if shutil.which("make") else ["make"]
    if not compiled.exists() or compiled.stat().st_mtime < source.stat().st_mtime:
        if not shutil.which(os.environ.get("CXX", "g++")):
            missing.append("a C++ compiler")
        if find_spec("pybind11") is None:
            missing.append("pybind11 (pip install pybind11)")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            missing.append("the headers of Python (python3-dev)")
    if missing:
        raise UserError(
            f"Megatron compiles its data helpers in {str(folder)!r}, which requires {', '.join(missing)}"
        )
    own, path = Path(sys.executable).parent, os.environ.get("PATH", os.defpath)
    if Path(shutil.which("python3") or "/").parent != own:
        os.environ["PATH"] = f"{own}{os.pathsep}{path}"
    flags = os.environ.get("MAKEFLAGS", "")
    if f"LIBEXT={suffix}" not in flags:
        os.environ["MAKEFLAGS"] = f"{flags} LIBEXT={suffix}".strip()


def reads_packed_batches() -> bool:
    """Whether every pipeline and tensor-parallel rank learns where packed documents end (0.18 and later)."""
    from megatron.core import utils as core_utils

    return hasattr(core_utils, "get_batch_on_this_tp_rank")


def read_batch(
    data_iterator: Any, args: Any, *, keys: tuple[str, ...], packed: bool, mtp: bool
) -> dict[str, Any]:
    """One micro-batch, read by the first tensor-parallel rank and broadcast to the others.

    0.17: one function of ``megatron.training.utils`` reads and broadcasts. 0.18: the caller reads, and a
    function of ``megatron.core.utils`` broadcasts. 0.19 renames ``is_sft`` of it to ``has_cu_seqlens`` and
    needs the samples of a packed micro-batch joined; in 0.18 a packed micro-batch is one sample.

    Args:
        data_iterator: yields dictionaries of tensors; used on the first tensor-parallel rank only.
        args: Megatron's arguments.
        keys: every key that the batch shall have (None where the dataset has none).
        packed: the samples carry document boundaries (0.18 and later).
        mtp: multi-token-prediction layers live on this stage.
    """
    from megatron.core import parallel_state
    from megatron.core import utils as core_utils

    broadcast = getattr(core_utils, "get_batch_on_this_tp_rank", None)
    if broadcast is None:
        from megatron.training.utils import get_batch_on_this_tp_rank

        batch = get_batch_on_this_tp_rank(data_iterator, mtp_on_this_rank=mtp)
        return {key: batch.get(key) for key in keys}

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {
            key: sample[key].cuda(non_blocking=True) if sample.get(key) is not None else None for key in keys
        }
    cu_seqlens_argument = known_parameters(broadcast, {"is_sft": packed, "has_cu_seqlens": packed})
    batch = broadcast(
        batch,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
        **cu_seqlens_argument,
    )
    join = getattr(core_utils, "flatten_batch_for_packed_sequences", None)
    return join(batch) if packed and join is not None else batch


def count_document_tokens(cu_seqlens: Any) -> None:
    """Tell Megatron's throughput report how long the documents are (0.18 and later)."""
    from megatron.training import training

    count = getattr(training, "update_seqlen_stats_from_cu_seqlens", None)
    if count is not None:
        count(cu_seqlens)


def slice_batch_for_context_parallelism(batch: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """The part of every sequence that belongs to this context-parallel rank.

    0.17 takes the batch alone; 0.18 and later cut every document when the batch says where documents end,
    unless 0.19 is told not to.

    Args:
        batch: tensors ``[b, s]`` and the boundaries of documents, if any.
        whole: cut whole sequences, whatever documents are in them.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    routing = {
        "is_hybrid_cp": False,
        "cp_group": parallel_state.get_context_parallel_group(),
        "hybrid_cp_group_func": None,
        "use_per_sequence_balancing": whole,
    }
    return get_batch_on_this_cp_rank(batch, **known_parameters(get_batch_on_this_cp_rank, routing))
