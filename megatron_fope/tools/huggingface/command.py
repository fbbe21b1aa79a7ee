"""``megatron-fope export`` and ``import``."""

from __future__ import annotations

import argparse
import shlex

from megatron_fope.common.command_line import whole
from megatron_fope.tools.huggingface import DTYPES, FORMATS, SHARD_SIZE


def add_export(parser: argparse.ArgumentParser) -> None:
    """The flags of ``export``."""
    parser.description = (
        "A Megatron checkpoint as a folder of Hugging Face, for transformers and the engines built on it. A "
        "RoPE model becomes a plain model of its family (Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE). A FoPE "
        "model brings its model file along and is loaded with trust_remote_code=True. Needs no GPU, and "
        "memory for one shard."
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder made by --save, torch_dist format, any layout")
    add("out", metavar="OUT", help="new folder")
    add(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="of a FoPE model: 'hf' (default), or 'engine' for LMDeploy and XTuner: a plain Llama, Qwen3 or "
        "Qwen3-MoE with one pair of coefficients; models of the profile intern-s1-pro only",
    )
    add("--iteration", type=whole(0), metavar="N", help="default: the latest")
    add(
        "--tokenizer",
        metavar="DIR",
        help="Hugging Face tokenizer to put beside the weights, with its generation_config.json; default: "
        "the one that the model was trained with, if it is still there",
    )
    add(
        "--max-length",
        type=whole(1),
        metavar="N",
        help="longest text in tokens that engines accept (max_position_embeddings); default: the training "
        "length. It changes no number that the model computes. A FoPE model may hold beyond the training "
        "length: give the length up to which you have evaluated yours",
    )
    add("--shard-size", default=SHARD_SIZE, metavar="SIZE", help=f"largest file ({SHARD_SIZE})")
    add("--dtype", choices=DTYPES, help="of the weights; default: as stored")


def run_export(arguments: argparse.Namespace) -> int:
    """Export; see :func:`megatron_fope.tools.huggingface.exporting.export`."""
    from megatron_fope.tools.huggingface.exporting import export

    made = export(**{name: value for name, value in vars(arguments).items() if name != "command"})
    print(f"{made.folder}: {made.architecture}, {made.num_parameters:,} parameters")
    print(f"engines accept {made.max_length} tokens (--max-length)")
    if made.removed_rows:
        print(f"{made.removed_rows} rows of padding removed from the vocabulary")
    print(f"tokenizer: {made.tokenizer or 'none, and no special tokens'} (--tokenizer)")
    if made.architecture.startswith("Fope"):
        print("load it with trust_remote_code=True")
    if arguments.format == "engine":
        print("for LMDeploy and XTuner only: transformers and others would ignore the coefficients")
    return 0


def add_import(parser: argparse.ArgumentParser) -> None:
    """The flags of ``import``."""
    parser.description = (
        "A folder of Hugging Face as a Megatron checkpoint, which any parallel layout loads: RoPE models of "
        "the families that export writes (and Mistral), and FoPE models that it or XTuner wrote, with their "
        "settings and coefficients. Code in the folder is never run. Needs no GPU, and memory for one tensor."
    )
    add = parser.add_argument
    add("folder", metavar="HF_FOLDER", help="with config.json and safetensors files")
    add("checkpoint", metavar="CHECKPOINT", help="new folder, for --load")
    add(
        "--train-length",
        type=whole(2),
        metavar="N",
        help="length in tokens that a FoPE model in LMDeploy's and XTuner's layout was trained with, where "
        "its config.json does not tell it",
    )
    add(
        "--make-vocab-size-divisible-by",
        type=whole(1, 2**20),
        default=128,
        metavar="N",
        help="rows of zeros are added to the embedding up to a multiple of N (128, Megatron's default)",
    )


def run_import(arguments: argparse.Namespace) -> int:
    """Import; see :func:`megatron_fope.tools.huggingface.importing.import_model`."""
    from megatron_fope.tools.huggingface.importing import import_model

    made = import_model(**{name: value for name, value in vars(arguments).items() if name != "command"})
    print(f"{made.folder}: {made.architecture}, {made.num_parameters:,} parameters")
    if made.added_rows:
        print(f"{made.added_rows} rows of zeros added to the vocabulary")
    print("Megatron's flags of this model:")
    print(shlex.join(made.flags))
    return 0
