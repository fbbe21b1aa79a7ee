"""Which stored arguments an evaluation takes from a checkpoint: all that describe the model."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, ClassVar

import torch
from launch import TINY_MODEL

from megatron_fope.arguments.parser import megatron_parser
from megatron_fope.tools.evaluation.model import describes_model

OF_A_RUN = {"seed", "te_precision_config_file", "init_method_xavier_uniform", "fp8_param_gather"}
OF_A_RUN |= {"fp4_param_gather", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"}
"""Arguments that Megatron reads to build a model, and that do not change what a trained one computes."""

WAYS_OF_RUNNING = ("fusion", "recompute", "offload", "cuda_graph", "cp_comm_type", "pipeline", "persist")
WAYS_OF_RUNNING += ("log_max_attention_logit", "rng_tracker", "test_mode")


class Watched(argparse.Namespace):
    """Remembers the names that are read."""

    seen: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        Watched.seen.add(name)
        return super().__getattribute__(name)


def test_everything_that_megatron_builds_a_model_from() -> None:
    """A new argument of a new Megatron must be sorted into one of the two kinds."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
    from megatron.training.arguments import core_transformer_config_from_args

    parser = megatron_parser("test")
    flags = "--transformer-impl local --no-rope-fusion --no-persist-layer-norm --ffn-hidden-size 64"
    flags += " --kv-channels 16 --no-gradient-accumulation-fusion"
    values = vars(parser.parse_args([*TINY_MODEL, *flags.split()]))
    args = Watched(**values | {"params_dtype": torch.float32, "padded_vocab_size": 128})
    Watched.seen = set()
    config = core_transformer_config_from_args(args)
    gpt_config_from_args(args, config)
    hybrid_config_from_args(args, config)
    parallel = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    read = Watched.seen & {action.dest for action in parser._actions}
    assert {"rope_type", "swiglu", "rotary_base", "hybrid_layer_pattern"} <= read
    left = {name for name in read - parallel - OF_A_RUN if not describes_model(name)}
    assert not {name for name in left if not any(part in name for part in WAYS_OF_RUNNING)}


def test_names_of_other_groups() -> None:
    """They were missed as long as the titles of the parser's groups decided."""
    for name in ("rope_type", "attention_softmax_in_fp32", "mla_down_proj_fusion", "fope_gain", "vocab_size"):
        assert describes_model(name), name
    for name in ("tensor_model_parallel_size", "recompute_granularity", "train_iters", "cp_comm_type"):
        assert not describes_model(name), name
