"""Every fact about a Megatron version that this package relies on.

Nothing else in the package may read a Megatron version number or probe a signature: a new Megatron
release is supported by editing this file. Each helper says which releases it bridges, so that it can be
deleted when the oldest of them is dropped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_fope.errors import UserError

SUPPORTED_MEGATRON = SpecifierSet(">=0.17,<0.20", prereleases=True)
"""Megatron-Core releases whose training loop the flag supports. Keep in step with ``setup.py``."""


def megatron_version() -> Version:
    """The version of the Megatron-Core that will be imported (a checkout's own, else the wheel's).

    Raises:
        UserError: Megatron-Core is not installed.
    """
    try:
        from megatron.core.package_info import __version__
    except ImportError:
        try:
            __version__ = importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                "Megatron-Core is not installed; pip install 'megatron-core>=0.17,<0.20'"
            ) from None
    return Version(__version__)


def require_supported_megatron() -> Version:
    """Return the installed version or refuse it.

    Raises:
        UserError: the installed Megatron-Core is outside :data:`SUPPORTED_MEGATRON`.
    """
    version = megatron_version()
    if version not in SUPPORTED_MEGATRON:
        raise UserError(
            f"Megatron-Core {version} is installed; megatron-fope supports {SUPPORTED_MEGATRON} "
            "(pip install 'megatron-core>=0.17,<0.20')"
        )
    return version


# Where Megatron keeps what is wrapped ---------------------------------------------------------------------


def modules_that_import(name: str, home: ModuleType) -> list[ModuleType]:
    """Modules of ``megatron.training`` that call a function through a name of their own.

    0.17's ``initialize`` imports ``validate_args`` and ``load_args_from_checkpoint`` by value; 0.18 and later
    only use them through the module that defines them.

    Args:
        name: the function's name.
        home: the module that defines it.

    Returns:
        ``home`` and every further module that holds the same function.
    """
    from megatron.training import initialize

    function = getattr(home, name, None)
    holds = function is not None and getattr(initialize, name, None) is function
    return [home, initialize] if holds else [home]


def model_classes() -> list[tuple[type, tuple[str, ...]]]:
    """Model classes that take a position embedding type, with the names of their layer-spec arguments.

    0.17 calls the attention/Mamba hybrid ``MambaModel``; from 0.18 on it is ``HybridModel``, of which
    ``MambaModel`` is a subclass.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    gpt = (GPTModel, ("transformer_layer_spec", "mtp_block_spec"))
    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:
        from megatron.core.models.mamba.mamba_model import MambaModel

        return [gpt, (MambaModel, ("mamba_stack_spec",))]
    return [gpt, (HybridModel, ("hybrid_stack_spec",))]


def repair_help_texts(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let ``--help`` print Megatron's flags.

    0.19 has a bare percent sign in the help of one flag, which argparse takes for a format and stops at.
    """
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help and action.help.replace("%", "%%")
    return parser


def null_tokenizer_flags(vocab_size: int) -> list[str]:
    """Flags for tokens that are numbers already, of which the last id ends a document.

    Through 0.17 ``NullTokenizer`` adds the end of document after ``--vocab-size`` ids; from 0.18 on it is
    the last of them.

    Args:
        vocab_size: number of ids, the end of document included.
    """
    size = vocab_size if megatron_version().release >= (0, 18) else vocab_size - 1
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size)]


# --- What the training entry point and the CPU runtime need -------------------------------------------


def use_prebuilt_dataset_helpers() -> None:
    """Skip the ``make`` that Megatron runs at start-up where there is nothing to make.

    All releases call ``make -C megatron/core/datasets`` and exit if it fails. Wheels (0.17 - 0.19) ship the
    compiled helpers and no Makefile, so without this no wheel can train, on a GPU neither. A checkout
    keeps its ``make``.
    """
    import megatron.core.datasets.utils as dataset_utils

    if (Path(dataset_utils.__file__).parent / "Makefile").exists():
        return

    def nothing_to_compile() -> None:
        pass

    dataset_utils.compile_helpers = nothing_to_compile


def repair_checkpoint_metadata_reader() -> None:
    """Let checkpoints be read with a strictness other than the default under a recent PyTorch.

    Megatron 0.17 - 0.19 passes every field of PyTorch's ``TensorProperties`` to ``torch.empty``; newer
    PyTorch releases added ``strides``, which ``torch.empty`` refuses. The unknown fields are dropped from
    the metadata before Megatron sees them. Calling it again does nothing.
    """
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    cls = strategy.TorchDistLoadShardedStrategy
    original = cls.load_tensors_metadata
    if hasattr(original, "__wrapped__"):
        return
    accepted = {"dtype", "layout", "requires_grad", "memory_format", "pin_memory"}

    @functools.wraps(original)
    def load_tensors_metadata(self: Any, checkpoint_dir: Any, metadata: Any = None) -> Any:
        if metadata is None:
            metadata = strategy._get_filesystem_reader(checkpoint_dir).read_metadata()
        for entry in metadata.state_dict_metadata.values():
            properties = vars(getattr(entry, "properties", None) or SimpleNamespace())
            for name in set(properties) - accepted:
                del properties[name]
        return original(self, checkpoint_dir, metadata)

    cls.load_tensors_metadata = load_tensors_metadata


def known_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``values`` that the dataclass ``cls`` of this release has a field for.

    ``GPTDatasetConfig.inter_document_masking`` exists from 0.19 on.
    """
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    return {name: value for name, value in values.items() if name in names}


def known_parameters(function: Callable, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``values`` that ``function`` of this release takes.

    ``get_gpt_layer_with_transformer_engine_spec`` takes ``use_grouped_gemm_for_dense_mlp`` from 0.18 on.
    """
    names = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in names}


def has_mtp_layers(config: Any, vp_stage: int | None) -> bool:
    """Whether multi-token-prediction layers live on this pipeline stage.

    0.17 takes the config, 0.18 and later its two fields.
    """
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank

    if "config" in inspect.signature(mtp_on_this_rank).parameters:
        return mtp_on_this_rank(config, ignore_virtual=False, vp_stage=vp_stage)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def read_batch(
    data_iterator: Any, args: Any, *, keys: tuple[str, ...], packed: bool, mtp: bool
) -> dict[str, Any]:
    """One micro-batch, read by the first tensor-parallel rank and broadcast to the others.

    0.17: one function of ``megatron.training.utils`` reads and broadcasts. 0.18: the caller reads, and a
    function of ``megatron.core.utils`` broadcasts. 0.19 renames ``is_sft`` of it to ``has_cu_seqlens`` and
    needs the samples of a packed micro-batch joined.

    Args:
        data_iterator: yields dictionaries of tensors; used on the first tensor-parallel rank only.
        args: Megatron's arguments.
        keys: every key that the batch shall have (None where the dataset has none).
        packed: the samples carry document boundaries (0.19 and later).
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
    return core_utils.flatten_batch_for_packed_sequences(batch) if packed else batch


def count_document_tokens(cu_seqlens: Any) -> None:
    """Tell Megatron's throughput report how long the documents are (0.18 and later)."""
    from megatron.training import training

    count = getattr(training, "update_seqlen_stats_from_cu_seqlens", None)
    if count is not None:
        count(cu_seqlens)


def slice_batch_for_context_parallelism(batch: dict[str, Any], *, packed: bool) -> dict[str, Any]:
    """The part of every sequence that belongs to this context-parallel rank.

    0.17 takes the batch alone; 0.18 routes between several ways of cutting and 0.19 must be told that
    documents inside a sequence do not matter to the cut.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    routing = {
        "is_hybrid_cp": False,
        "cp_group": parallel_state.get_context_parallel_group(),
        "hybrid_cp_group_func": None,
        "use_per_sequence_balancing": packed,
    }
    return get_batch_on_this_cp_rank(batch, **known_parameters(get_batch_on_this_cp_rank, routing))


def build_gpt_model(args: Any, config: Any, pg_collection: Any, **chunk: Any) -> Any | None:
    """Build a model chunk with Megatron's own GPT builder (0.19 and later; earlier: None).

    Args:
        args: Megatron's arguments.
        config: a ``TransformerConfig``, or None for the one that the arguments describe.
        pg_collection: process groups.
        chunk: ``pre_process``, ``post_process`` and ``vp_stage``.
    """
    model_config = gpt_builder_config(args, config)
    if model_config is None:
        return None
    return model_config.get_builder_cls()(model_config).build_model(pg_collection, **chunk)


def gpt_builder_config(args: Any, config: Any = None) -> Any | None:
    """Megatron's own description of a GPT model, which its builder turns into the model.

    0.19 and later; earlier releases have no such thing in the wheel (None).
    """
    try:
        from megatron.training.argument_utils import gpt_config_from_args
    except ImportError:
        return None
    return gpt_config_from_args(args, config)


def run_pretraining(
    pretrain: Callable,
    *,
    datasets_provider: Callable,
    model_provider: Callable,
    forward_step: Callable,
    check_args: Callable[[Any], None],
    args_defaults: dict[str, Any],
    **options: Any,
) -> None:
    """Parse Megatron's arguments and train.

    0.17: ``pretrain`` parses. 0.18: the caller parses and passes a container of configs along with the
    model provider. 0.19: the container also describes the model.

    Args:
        pretrain: ``megatron.training.pretrain``, perhaps wrapped for in-process restart.
        datasets_provider: builds the datasets of the three splits.
        model_provider: builds one model chunk.
        forward_step: runs one micro-batch.
        check_args: called with the parsed arguments; in 0.17 the providers must call it themselves.
        args_defaults: defaults for arguments that have none.
        options: further keyword arguments of ``pretrain``.
    """
    from megatron.core.enums import ModelType
    from megatron.training import arguments

    model_type = ModelType.encoder_or_decoder
    parse = getattr(arguments, "parse_and_validate_args", None)
    if parse is None:
        pretrain(
            datasets_provider,
            model_provider,
            model_type,
            forward_step,
            args_defaults=args_defaults,
            **options,
        )
        return

    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    args = parse(args_defaults=args_defaults)
    check_args(args)
    model_config = gpt_builder_config(args)
    if model_config is None:
        options["model_provider"] = model_provider
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        datasets_provider,
        model_type=model_type,
        forward_step_func=forward_step,
        **options,
    )


def initialize_megatron(adjust: Callable[[Any, Any], None], **options: Any) -> Any:
    """Parse ``sys.argv`` and initialise Megatron for a command that does not train.

    0.17 parses inside ``initialize_megatron``; 0.18 and later want it done before.

    Args:
        adjust: called with the parser and the parsed arguments before Megatron validates them.
        options: keyword arguments of Megatron's ``initialize_megatron``.

    Returns:
        Megatron's arguments.
    """
    from megatron.training import arguments, get_args, training

    parsers: list[Any] = []

    def remember(parser: Any) -> Any:
        parsers.append(parser)
        return parser

    args = arguments.parse_args(remember)
    adjust(parsers[0], args)
    # The training module's name for it: the CPU runtime replaces that one.
    initialize = training.initialize_megatron
    if "parsed_args" in inspect.signature(initialize).parameters:
        initialize(parsed_args=args, **options)
        return get_args()
    from megatron.training.global_vars import set_global_variables

    arguments.validate_args(args, {})
    set_global_variables(args)
    initialize(**options)
    return args


def hybrid_stack_spec() -> Any | None:
    """Megatron's own spec of an attention/Mamba stack; None where its parts are not installed.

    0.17: ``mamba_stack_spec``; 0.18 and later: ``hybrid_stack_spec``.
    """
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as spec
    except ImportError:
        try:
            from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as spec
        except ImportError:
            return None
    return spec


def hybrid_stack_classes() -> tuple[type, ...]:
    """Modules whose spec offers layers of many kinds, of which a model uses some.

    0.17: ``MambaStack``; 0.18 and later: ``HybridStack``.
    """
    try:
        from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack
    except ImportError:
        try:
            from megatron.core.ssm.mamba_block import MambaStack as Stack
        except ImportError:
            return ()
    return (Stack,)
