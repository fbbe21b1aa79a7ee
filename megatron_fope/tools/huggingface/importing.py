"""``megatron-fope import``: a folder of Hugging Face as a Megatron checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_fope import compat
from megatron_fope.arguments.flags import FIELDS, resolve_fope_arguments
from megatron_fope.arguments.parser import megatron_parser, parse
from megatron_fope.common.errors import UserError
from megatron_fope.common.staging import check_new_folder, check_space
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.tools.conversion.layers import Part
from megatron_fope.tools.conversion.writing import create
from megatron_fope.tools.huggingface import config_json, engine, settings
from megatron_fope.tools.huggingface.companions import has_tokenizer, load_tokenizer
from megatron_fope.tools.huggingface.families import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    Shape,
    Weight,
    coefficient_weights,
    layer_weights,
)

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: Path
    architecture: str
    num_parameters: int
    flags: list[str]
    """Megatron's flags of the model."""
    vocab_size: int
    added_rows: int
    """Of the embedding, zeros: padding of the vocabulary."""


def import_model(
    folder: str | Path,
    checkpoint: str | Path,
    *,
    train_length: int | None = None,
    make_vocab_size_divisible_by: int = 128,
) -> Imported:
    """Write a folder of Hugging Face as a ``torch_dist`` checkpoint, which any parallel layout loads.

    RoPE models of the known families, FoPE models that :func:`~megatron_fope.tools.huggingface.exporting.
    export` wrote, and XTuner's: those get back their settings and, bit for bit, their coefficients. One
    tensor is in memory at a time. Code in the folder is never run.

    Args:
        folder: with ``config.json`` and safetensors files.
        checkpoint: the new folder, for ``--load``; it appears when it is whole. Its iteration is "release",
            from which training starts at iteration 0 with a fresh optimizer.
        train_length: that FoPE's model was trained with, tokens, where ``config.json`` does not tell; see
            :func:`megatron_fope.tools.huggingface.engine.fope_of`.
        make_vocab_size_divisible_by: Megatron's flag: rows of zeros are added to the embedding up to a
            multiple of it.

    Raises:
        UserError: an unknown architecture, files that are missing or damaged, weights that do not fit
            ``config.json``, a tokenizer that does not fit the vocabulary, a target that exists or cannot be
            written. Nothing is left then.
    """
    folder, target = Path(folder), Path(checkpoint)
    where = f"HF_FOLDER is {str(folder)!r}"
    check_new_folder("CHECKPOINT", target)
    if not target.parent.is_dir():
        raise UserError(f"CHECKPOINT is {str(target)!r}: the folder {str(target.parent)!r} does not exist")
    config = _read_json(folder / "config.json", where)
    family, layout = config_json.family_of_config(config, where)
    if train_length is not None and layout != "engine":
        raise UserError(
            f"--train-length is {train_length}, but {where}, whose config.json tells the length; leave it out"
        )
    fope = None
    if layout == "hf":
        fope = config_json.fope_of(config, where)
    elif layout == "engine":
        fope = config_json.fope_of_engine(config, train_length, where)
    vocab_size = config_json.whole(config, "vocab_size", where)
    flags = config_json.flags_of(config, family, where) + config_json.length_flags(config, fope, where)
    flags += _tokenizer_flags(folder, vocab_size)
    flags += ["--make-vocab-size-divisible-by", str(make_vocab_size_divisible_by)]
    flags += config_json.rope_flags(config, where) if fope is None else config_json.fope_flags(fope)
    args = _arguments(flags, fope, where)
    args.padded_vocab_size = -(-vocab_size // make_vocab_size_divisible_by) * make_vocab_size_divisible_by
    shape = settings.shape_of_args(args, fope)
    names = fope.coefficient_names if fope else ()
    files = _Files(folder, where)
    layers = list(_layer_pieces(layer_weights(family, shape, names if layout == "hf" else ()), shape, files))
    if fope is not None and layout == "engine":
        layers += _shared_pieces(fope, shape, files)
    wanted = _one_dtype_each([*_outer_pieces(shape, vocab_size, args, files), *layers])
    files.check_all_used()
    size = sum(part.nbytes for part in wanted)
    check_space("CHECKPOINT", target, size)
    with tqdm(total=size, unit="B", unit_scale=True, desc="writing weights", disable=None) as bar:
        common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
        create(target, common, _parts(wanted, files, bar), _extra_states(shape))
    return Imported(
        folder=target,
        architecture=(config.get("architectures") or [family.architecture])[0],
        num_parameters=files.count({source for part in wanted for source in part.sources}),
        flags=flags,
        vocab_size=vocab_size,
        added_rows=args.padded_vocab_size - vocab_size,
    )


def _read_json(file: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {file.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {file.name} holds no object")
    return value


def _tokenizer_flags(folder: Path, vocab_size: int) -> list[str]:
    if not has_tokenizer(folder):
        return compat.null_tokenizer_flags(vocab_size)
    tokens = len(load_tokenizer(folder, "HF_FOLDER"))
    if tokens > vocab_size:
        raise UserError(
            f"HF_FOLDER is {str(folder)!r}: its tokenizer has {tokens} ids, its model {vocab_size}; use the "
            "tokenizer that it was trained with"
        )
    model = str(folder.resolve())
    return [
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model),
        *("--vocab-size", str(vocab_size)),
    ]


def _arguments(flags: list[str], fope: FoPEConfig | None, where: str) -> Any:
    """Megatron's arguments for a model; the settings of FoPE are those of the folder."""
    args = parse(megatron_parser("megatron-fope import"), flags)
    if fope is None:
        return args
    args.add_position_embedding = False
    for field in FIELDS:
        setattr(args, f"fope_{field.name}", getattr(fope, field.name))
    try:
        resolve_fope_arguments(args, fope)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return args


class _Files:
    """The tensors of a folder."""

    def __init__(self, folder: Path, where: str) -> None:
        self._where = where
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            places = _read_json(index, where).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise UserError(f"{where}: {index.name} holds no weight_map")
        elif (folder / "model.safetensors").is_file():
            places = None
        else:
            raise UserError(f"{where}: it has no model.safetensors; only safetensors files are read")
        names = sorted(set(places.values())) if places else ["model.safetensors"]
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{where}: {name} is missing")
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise UserError("import needs safetensors; install it with: pip install safetensors") from None
        self._tensors: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        self._used: set[str] = set()
        for path in (folder / name for name in names):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # it is no dictionary
                        stored = file.get_slice(name)
                        self._tensors[name] = path, tuple(stored.get_shape()), stored.get_dtype()
            except (OSError, SafetensorError) as error:
                raise UserError(f"{where}: {path.name} cannot be read ({error})") from None

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def check(self, name: str, size: tuple[int, ...]) -> torch.dtype:
        """The dtype of a tensor, which must have a size.

        Raises:
            UserError: it is missing, of another size, or of another kind than floating point.
        """
        if name not in self._tensors:
            raise UserError(f"{self._where}: its files have no {name}")
        self._used.add(name)
        _, stored, kind = self._tensors[name]
        if stored != size:
            raise UserError(
                f"{self._where}: {name} has the size {list(stored)}; its config.json requires {list(size)}"
            )
        if kind not in _FLOATS:
            raise UserError(f"{self._where}: {name} has the type {kind}; allowed: {', '.join(_FLOATS)}")
        return _FLOATS[kind]

    def count(self, names: Iterable[str]) -> int:
        """Numbers in some of the tensors."""
        return sum(torch.Size(self._tensors[name][1]).numel() for name in names)

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        # Files are mapped: opened once for all, they would fill the memory bit by bit.
        with safe_open(self._tensors[name][0], framework="pt") as file:
            return file.get_tensor(name)

    def check_all_used(self) -> None:
        """Refuse weights that have no place in Megatron's model; tables of RoPE are no weights."""
        left = sorted(name for name in self._tensors.keys() - self._used if "rotary_emb.inv_freq" not in name)
        if left:
            raise UserError(f"{self._where}: Megatron's model has no place for {', '.join(left[:3])}")


@dataclass(frozen=True)
class _Wanted:
    """One piece of the new checkpoint."""

    name: str
    index: tuple[int, ...]
    """Of the layer and the expert in the stacked tensor."""
    stacked: tuple[int, ...]
    """How many there are of each."""
    sources: tuple[str, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    join: Any = None
    rows: int = 0
    """Of the piece, zeros behind what is stored; 0: as many as are stored."""

    @property
    def nbytes(self) -> int:
        rows, *columns = self.size
        return torch.Size((self.rows or rows, *columns)).numel() * self.dtype.itemsize


def _outer_pieces(shape: Shape, vocab_size: int, args: Any, files: _Files) -> Iterator[_Wanted]:
    """What is no layer's."""
    hidden, rows = shape.hidden_size, args.padded_vocab_size
    tied = not args.untie_embeddings_and_output_weights
    for name, source in (EMBEDDING,) if tied else (EMBEDDING, OUTPUT):
        dtype = files.check(source, (vocab_size, hidden))
        yield _Wanted(name, (), (), (source,), (vocab_size, hidden), dtype, rows=rows)
    if tied and OUTPUT[1] in files:
        files.check(OUTPUT[1], (vocab_size, hidden))  # a copy of the embedding
    name, source = FINAL_NORM
    yield _Wanted(name, (), (), (source,), (hidden,), files.check(source, (hidden,)))


def _layer_pieces(weights: Iterable[Weight], shape: Shape, files: _Files) -> Iterator[_Wanted]:
    for weight in weights:
        parts = weight.split(torch.empty(weight.size, device="meta"), shape)
        experts = range(shape.num_experts) if weight.per_expert else (None,)
        for layer in range(shape.num_layers):
            for expert in experts:
                sources = tuple(
                    f"model.layers.{layer}.{source.format(expert=expert)}" for source in weight.huggingface
                )
                dtypes = [
                    files.check(source, tuple(part.shape))
                    for source, part in zip(sources, parts, strict=True)
                ]
                index: tuple[int, ...] = (layer,)
                stacked: tuple[int, ...] = (shape.num_layers,)
                if expert is not None:
                    index, stacked = (layer, expert), (shape.num_layers, shape.num_experts)
                dtype = (
                    torch.float32 if weight.is_coefficient else functools.reduce(torch.promote_types, dtypes)
                )
                for name in filter(None, (weight.megatron, weight.also)):
                    yield _Wanted(
                        f"decoder.layers.{name}", index, stacked, sources, weight.size, dtype,
                        lambda values, weight=weight: weight.join(values, shape),
                    )  # fmt: skip


def _shared_pieces(fope: FoPEConfig, shape: Shape, files: _Files) -> Iterator[_Wanted]:
    """One pair of coefficients for every layer of Megatron's."""
    for name, weight in zip(
        fope.coefficient_names, coefficient_weights(shape, fope.coefficient_names), strict=True
    ):
        source = f"{engine.PREFIX}{name}"
        files.check(source, weight.size if fope.separate_heads else weight.size[1:])
        for layer in range(shape.num_layers):
            yield _Wanted(
                f"decoder.layers.{weight.megatron}", (layer,), (shape.num_layers,), (source,), weight.size,
                torch.float32, lambda values, size=weight.size: values[0].view(size),
            )  # fmt: skip


def _one_dtype_each(wanted: Iterable[_Wanted]) -> list[_Wanted]:
    """Layers and experts are pieces of one tensor in Megatron, which has one dtype."""
    pieces, dtypes = list(wanted), dict[str, torch.dtype]()
    for piece in pieces:
        dtypes[piece.name] = torch.promote_types(dtypes.get(piece.name, piece.dtype), piece.dtype)
    return [dataclasses.replace(piece, dtype=dtypes[piece.name]) for piece in pieces]


def _extra_states(shape: Shape) -> Iterator[str]:
    """Names of what Megatron's and Transformer Engine's modules ask for beside weights, and find empty."""
    layers = range(shape.num_layers)
    modules = ["linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm"]
    for module in [*(f"self_attention.{name}" for name in modules), "pre_mlp_layernorm"]:
        yield from (f"decoder.layers.{module}._extra_state/shard_{n}_{shape.num_layers}" for n in layers)
    for module in ("linear_fc1", "linear_fc2"):
        if not shape.num_experts:
            prefix = f"decoder.layers.mlp.{module}._extra_state/shard_"
            yield from (f"{prefix}{n}_{shape.num_layers}" for n in layers)
            continue
        prefix, counts = f"decoder.layers.mlp.experts.experts.{module}._extra_state/shard_", shape.num_experts
        for n in layers:
            yield from (f"{prefix}{n}.{e}_{shape.num_layers}.{counts}" for e in range(counts))
    for module in ("decoder.final_layernorm", "output_layer"):
        yield f"{module}._extra_state/shard_0_1"


def _parts(wanted: list[_Wanted], files: _Files, bar: Any) -> Iterator[Part]:
    for piece in wanted:
        values = tuple(files.read(source) for source in piece.sources)
        value = (values[0] if piece.join is None else piece.join(values)).to(piece.dtype)
        if piece.rows:
            value = torch.nn.functional.pad(value, (0, 0, 0, piece.rows - value.size(0)))
        offset = (*piece.index, *(0,) * value.dim())
        yield Part(piece.name, offset, value[(None,) * len(piece.index)], (*piece.stacked, *value.shape))
        bar.update(value.nbytes)
