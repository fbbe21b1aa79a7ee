"""``megatron-fope export``: a Megatron checkpoint as a folder of Hugging Face."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_fope import compat
from megatron_fope.checkpoint.reader import Checkpoint, is_optimizer, open_checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.common.staging import check_new_folder, check_space, new_folder
from megatron_fope.tools.huggingface import DTYPES, SHARD_SIZE, engine, settings
from megatron_fope.tools.huggingface.companions import NO_SPECIAL_TOKENS, companions
from megatron_fope.tools.huggingface.families import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    Weight,
    coefficient_weights,
    layer_weights,
)

_SIZE = re.compile(r"(\d{1,9}(?:\.\d+)?) ?[KMGT]B", re.IGNORECASE)
"""Of a file, as huggingface_hub reads it."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    architecture: str
    num_parameters: int
    max_length: int
    """``max_position_embeddings``, tokens."""
    removed_rows: int
    """Of the embedding: padding of the vocabulary."""
    tokenizer: Path | None
    """Folder of the one that was put beside the weights."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the new folder."""

    empty: Tensor
    """On the device "meta"."""
    read: Callable[[], Tensor]


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: str = "hf",
    iteration: int | str | None = None,
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
    shard_size: str = SHARD_SIZE,
    dtype: str | None = None,
) -> Exported:
    """Write a checkpoint as a folder that ``transformers`` and the engines built on it load.

    RoPE models become plain models of their family. FoPE models become their family's with
    ``modeling_fope.py`` beside the weights, which is loaded with ``trust_remote_code=True``, or for LMDeploy
    and XTuner a plain model with one pair of coefficients. Weights are read and written one shard at a time;
    nothing else is held in memory.

    Args:
        checkpoint: folder made by ``--save`` with ``--ckpt-format torch_dist``, of any layout.
        out: the new folder; it appears when it is whole.
        format: one of :data:`megatron_fope.tools.huggingface.FORMATS`.
        iteration: number or "release"; None: the latest.
        tokenizer: folder of a Hugging Face tokenizer to put beside the weights, with its
            ``generation_config.json``; None: the one that the model was trained with, if it is still there.
        max_length: ``max_position_embeddings``, the longest text in tokens that engines accept; None: the
            length that the model was trained with.
        shard_size: largest size of a file, for example "5GB".
        dtype: one of :data:`megatron_fope.tools.huggingface.DTYPES` for the weights; None: as stored.
            Coefficients are always float32.

    Raises:
        UserError: no such checkpoint, a model that no family or the format has, a tokenizer with more ids
            than the model, ``out`` exists or cannot be written. Nothing is left then.
    """
    try:
        import huggingface_hub  # noqa: F401
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        raise UserError(f"export needs {name}; install it with: pip install {name}") from None
    out = Path(out)
    check_new_folder("OUT", out)
    size = _SIZE.fullmatch(shard_size)
    if size is None or not float(size[1]):
        raise UserError(f"--shard-size is {shard_size!r}; allowed: sizes such as 500MB or 5GB")
    source = open_checkpoint(checkpoint, iteration, name="CHECKPOINT")
    where = f"CHECKPOINT is {str(source.folder)!r}"
    if source.metadata is None:
        raise UserError(f"{where}: its format is torch (legacy); allowed: torch_dist")
    stored = source.tensors.get(EMBEDDING[0])
    if stored is None:
        raise UserError(f"{where}: it has no {EMBEDDING[0]}")
    rows = stored.size[0]
    vocab_size = min(_vocab_size(source.args) or rows, rows)
    config = settings.config_of(source, vocab_size, max_length, format, where)
    kept = getattr(torch, dtype) if dtype else None
    config["dtype"] = config["torch_dtype"] = str(kept or stored.properties.dtype).removeprefix("torch.")
    beside = companions(tokenizer, source.args, vocab_size)
    config |= beside.special if beside else NO_SPECIAL_TOKENS
    tensors = dict(_tensors(source, config, kept, where))
    check_space("OUT", out, sum(tensor.empty.nbytes for tensor in tensors.values()))
    with new_folder("OUT", out) as new:
        _write_weights(tensors, new, shard_size)
        if beside is not None:
            beside.write(new)
        if "auto_map" in config:
            name = f"{settings.MODELING}.py"
            shutil.copyfile(Path(__file__).with_name(name), new / name)
        # Last: without it nothing loads.
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Exported(
        folder=out,
        architecture=config["architectures"][0],
        num_parameters=sum(tensor.empty.numel() for tensor in tensors.values()),
        max_length=config["max_position_embeddings"],
        removed_rows=rows - vocab_size,
        tokenizer=beside.folder if beside else None,
    )


def _vocab_size(args: Any) -> int | None:
    """Ids of the model, as far as the arguments tell; its embedding may have more rows."""
    size = getattr(args, "vocab_size", None)
    if size and getattr(args, "tokenizer_type", None) == "NullTokenizer":
        return size + compat.null_tokenizer_adds()
    return size


# Weights ------------------------------------------------------------------------------------------


def _tensors(
    source: Checkpoint, config: dict[str, Any], dtype: torch.dtype | None, where: str
) -> Iterator[tuple[str, _Tensor]]:
    """Every tensor of the new folder by name, in the order in which they are written.

    Raises:
        UserError: one is missing or of another size, or one is left that the family has no place for.
    """
    fope = None if source.position_embedding_type == "rope" else settings.fope_settings(source, where)
    names = fope.coefficient_names if fope else ()
    shared = fope is not None and "fope" not in config  # one pair of coefficients for all layers
    family = settings.family_of(source.args, where)
    shape = settings.shape_of_args(source.args, fope)
    stored_tensors = source.tensors
    left = {name for name in stored_tensors if not is_optimizer(name)}
    read = functools.lru_cache(maxsize=1)(source.read_tensor)  # of a layer, all experts and parts at once

    def place(weight: Weight, layer: int) -> tuple[str, tuple[int, ...]]:
        """Where a layer's tensor is: Megatron stacks those of equal layers."""
        stored, index = named_place(weight, layer)
        size = (shape.num_experts, *weight.size) if weight.per_expert else weight.size
        if tuple(stored_tensors[stored].size[len(index) :]) != size:
            raise UserError(
                f"{where}: {stored} has the size {list(stored_tensors[stored].size)}, which does not fit its "
                "arguments"
            )
        check_dtype(stored)
        return stored, index

    def check_dtype(stored: str) -> None:
        kind = str(stored_tensors[stored].properties.dtype).removeprefix("torch.")
        if kind not in DTYPES:
            raise UserError(f"{where}: {stored} is {kind}; allowed: {', '.join(DTYPES)}")

    def named_place(weight: Weight, layer: int) -> tuple[str, tuple[int, ...]]:
        names = (weight.megatron, weight.also) if weight.also else (weight.megatron,)
        places: dict[str, tuple[int, ...]] = {f"decoder.layers.{name}": (layer,) for name in names}
        places |= {_single(layer, name): () for name in names}
        left.difference_update(places)
        for stored, index in places.items():
            if stored in stored_tensors:
                return stored, index
        missing = _single(layer, weight.megatron)
        raise UserError(f"{where}: it has no {missing}, which {family.architecture} needs")

    def whole(megatron: str, name: str, rows: int | None = None) -> tuple[str, _Tensor]:
        if megatron not in stored_tensors:
            raise UserError(f"{where}: it has no {megatron}, which {family.architecture} needs")
        check_dtype(megatron)
        left.discard(megatron)
        size = list(stored_tensors[megatron].size)
        size[0] = rows or size[0]
        stored = stored_tensors[megatron].properties.dtype
        empty = torch.empty(size, dtype=dtype or stored, device="meta")
        return name, _Tensor(empty, lambda: read(megatron)[: size[0]].to(empty.dtype))

    def piece(
        weight: Weight, place: tuple[str, tuple[int, ...]], expert: int | None, number: int, kept: torch.dtype
    ) -> Callable[[], Tensor]:
        def read_piece() -> Tensor:
            value = read(*place)
            return weight.split(value if expert is None else value[expert], shape)[number].to(kept)

        return read_piece

    yield whole(*EMBEDDING, rows=config["vocab_size"])
    for layer in range(shape.num_layers):
        for weight in layer_weights(family, shape, () if shared else names):
            stored, index = place(weight, layer)
            kept = dtype or stored_tensors[stored].properties.dtype
            if weight.is_coefficient:
                kept = torch.float32
            parts = weight.split(torch.empty(weight.size, dtype=kept, device="meta"), shape)
            # Files are planned by the size of tensors' memory, which these would share.
            empty = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
            for expert in range(shape.num_experts) if weight.per_expert else (None,):
                for number, (name, part) in enumerate(zip(weight.huggingface, empty, strict=True)):
                    key = f"model.layers.{layer}.{name.format(expert=expert)}"
                    yield key, _Tensor(part, piece(weight, (stored, index), expert, number, kept))
    if shared:
        for name, weight in zip(names, coefficient_weights(shape, names), strict=True):
            layers = (read(*place(weight, layer)) for layer in range(shape.num_layers))
            first = next(layers).to(torch.float32)
            if not all(torch.equal(value, first) for value in layers):
                raise UserError(
                    f"{where}: {name} differs from layer to layer; --format engine has one for all layers"
                )
            yield f"{engine.PREFIX}{name}", _Tensor(first.to("meta"), functools.partial(torch.clone, first))
    yield whole(*FINAL_NORM)
    if config["tie_word_embeddings"]:
        left.discard(OUTPUT[0])
    else:
        yield whole(*OUTPUT, rows=config["vocab_size"])
    if left:
        raise UserError(f"{where}: {family.architecture} has no place for {', '.join(sorted(left)[:3])}")


def _single(layer: int, name: str) -> str:
    return f"decoder.layers.{layer}.{name}"


def _write_weights(tensors: dict[str, _Tensor], folder: Path, shard_size: str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plan = split_torch_state_dict_into_shards(
        {name: tensor.empty for name, tensor in tensors.items()},
        max_shard_size=shard_size,
        filename_pattern="model{suffix}.safetensors",
    )
    total = sum(tensor.empty.nbytes for tensor in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing weights", disable=None) as bar:
        for file, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = tensors[name].read().clone(memory_format=torch.contiguous_format)
                bar.update(shard[name].nbytes)
            try:
                save_file(shard, folder / file, {"format": "pt"})
            except SafetensorError as error:  # a disk that is full, for one
                raise OSError(f"{file}: {error}") from error
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
