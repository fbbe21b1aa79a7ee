"""Every fact about a Megatron version that this package relies on.

Nothing else in the package may read a Megatron version number or probe a signature: a new Megatron
release is supported by editing this package. Each helper says which releases it bridges, so that it can be
deleted when the oldest of them is dropped:

=============== ======================================================================================
only for        helpers
=============== ======================================================================================
0.16            ``repair_models_without_transformer_engine``, ``require_built_in_training``;
                ``has_training_loop`` (its wheel)
up to 0.17      ``count_document_tokens``, ``has_mtp_layers``, ``hybrid_stack_classes``,
                ``hybrid_stack_module``, ``hybrid_stack_spec``, ``initialize_megatron``,
                ``known_attributes``, ``model_classes``, ``modules_that_import``,
                ``null_tokenizer_adds``, ``null_tokenizer_flags``, ``reads_packed_batches``,
                ``token_positions``
up to 0.18      ``builder_config``, ``keep_on_device``, ``known_fields``, ``known_parameters``,
                ``read_batch``, ``rope_arguments``, ``run_pretraining``,
                ``slice_batch_for_context_parallelism``, ``yarn_settings``
0.19            ``repair_help_texts``
all so far      ``repair_checkpoint_metadata_reader``, ``prepare_dataset_helpers``,
                ``survives_offloading``
=============== ======================================================================================
"""

from __future__ import annotations

from megatron_fope.compat.arguments import (
    modules_that_import,
    null_tokenizer_adds,
    null_tokenizer_flags,
    repair_help_texts,
)
from megatron_fope.compat.backends import chosen_libraries
from megatron_fope.compat.checkpoints import repair_checkpoint_metadata_reader
from megatron_fope.compat.data import (
    count_document_tokens,
    prepare_dataset_helpers,
    read_batch,
    reads_packed_batches,
    slice_batch_for_context_parallelism,
)
from megatron_fope.compat.inference import token_positions
from megatron_fope.compat.memory import theoretical_memory
from megatron_fope.compat.models import (
    build_model,
    builder_config,
    has_mtp_layers,
    hybrid_stack_classes,
    hybrid_stack_module,
    hybrid_stack_spec,
    model_classes,
    repair_models_without_transformer_engine,
    rope_arguments,
    yarn_settings,
)
from megatron_fope.compat.offloading import keep_on_device, survives_offloading
from megatron_fope.compat.signatures import known_attributes, known_fields, known_parameters
from megatron_fope.compat.training import initialize_megatron, reset_megatron, run_pretraining
from megatron_fope.compat.versions import (
    SUPPORTED_CHECKOUTS,
    SUPPORTED_MEGATRON,
    has_training_loop,
    megatron_version,
    require_built_in_training,
    require_megatron_core,
    require_supported_megatron,
)
