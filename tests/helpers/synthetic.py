"""Checkpoints of any apparent size, made without a model: tables of contents over sparse data files."""

from __future__ import annotations

import argparse
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_fope.arguments.flags import FIELDS, resolve_fope_arguments
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.tools import cli

COMMON = "common_state/shard_0_1"
LATEST = "latest_checkpointed_iteration.txt"


def main(*argv: object) -> int:
    """Run a command in this process; returns its exit code."""
    return cli.main([str(word) for word in argv])


class SyntheticCheckpoint:
    """A ``torch_dist`` checkpoint of a dense grouped-query model with optimizer states.

    Only arguments and coefficients are real; the data files of everything else are holes.

    Args:
        folder: what ``--load`` would get.
        layers: number of layers.
        hidden: channels; heads have 16, or 128 from 1024 channels on.
        pieces: tensor-parallel pieces of every large matrix, each in a file of its own.
        fope: None for a RoPE model.
        llama: arguments and tensors are a Llama's, and weights can be read: they are zeros.
        old: arguments in ``common.pt``, as Megatron through 0.18 stores them.
        iteration: number.
        **changes: arguments to replace.
    """

    def __init__(
        self,
        folder: Path,
        *,
        layers: int = 4,
        hidden: int = 64,
        pieces: int = 2,
        fope: FoPEConfig | None = None,
        llama: bool = False,
        old: bool = False,
        iteration: int = 4,
        **changes: Any,
    ) -> None:
        self.folder, self.iteration = folder, iteration
        self.path = folder / f"iter_{iteration:07d}"
        self.path.mkdir(parents=True)
        self._metadata = Metadata({}, storage_data={})
        self._ends: dict[str, int] = {}
        self._frames: dict[Any, tuple[bytes, bytes]] | None = {} if llama else None
        head_dim = 128 if hidden >= 1024 else 16
        self.args = argparse.Namespace(
            num_layers=layers, hidden_size=hidden, num_attention_heads=hidden // head_dim,
            group_query_attention=True, num_query_groups=2, kv_channels=head_dim, seq_length=64,
            max_position_embeddings=64, position_embedding_type="rope", rotary_base=10000,
            add_position_embedding=True,
            multi_latent_attention=False, no_save_optim=None, ckpt_format="torch_dist",
        )  # fmt: skip
        if llama:
            vars(self.args).update(
                normalization="RMSNorm", swiglu=True, add_bias_linear=False, ffn_hidden_size=4 * hidden,
                untie_embeddings_and_output_weights=True, layernorm_epsilon=1e-5, vocab_size=128,
            )  # fmt: skip
        if fope is not None:
            self.args.position_embedding_type = "fope"
            self.args.add_position_embedding = False
            for field in FIELDS:
                setattr(self.args, f"fope_{field.name}", getattr(fope, field.name))
            resolve_fope_arguments(self.args, fope)
        for name, value in changes.items():
            setattr(self.args, name, value)
        for name, shape in self._shapes(layers, hidden, head_dim).items():
            self._add_holes(name, shape, torch.bfloat16, pieces)
            for state in ("exp_avg", "exp_avg_sq", "fp32_param"):
                self._add_holes(f"optimizer.state.{state}.{name}", shape, torch.float32, pieces)
        if fope is not None:
            self._add_coefficients(fope, layers, head_dim)
        common = {"args": self.args, "iteration": iteration, "checkpoint_version": 3.0}
        if old:
            torch.save(common, self.path / "common.pt")
        else:
            self._metadata.state_dict_metadata[COMMON] = BytesStorageMetadata()
            self._append(COMMON, None, [common])
        for file, size in self._ends.items():
            with open(self.path / file, "ab") as stream:
                stream.truncate(size)
        (self.path / ".metadata").write_bytes(pickle.dumps(self._metadata))
        (self.path / "metadata.json").write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        )
        (folder / LATEST).write_text(str(iteration))

    @property
    def apparent_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.iterdir())

    def contents(self) -> dict[str, tuple[int, int, int, bytes]]:
        """Inode, size, time of change and (of small files) bytes of everything there."""
        return {
            str(file): (
                state.st_ino,
                state.st_size,
                state.st_mtime_ns,
                file.read_bytes() if state.st_size < 10**7 else b"",
            )
            for file in self.folder.rglob("*")
            if file.is_file()
            for state in [file.stat()]
        }

    def _shapes(self, layers: int, hidden: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        attention = "decoder.layers.self_attention."
        more = {
            "output_layer.weight": (128, hidden),
            "decoder.final_layernorm.weight": (hidden,),
            attention + "linear_qkv.layer_norm_weight": (layers, hidden),
            "decoder.layers.mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        }
        return ({} if self._frames is None else more) | {
            "embedding.word_embeddings.weight": (128, hidden),
            attention + "linear_qkv.weight": (layers, hidden + 4 * head_dim, hidden),
            attention + "linear_proj.weight": (layers, hidden, hidden),
            "decoder.layers.mlp.linear_fc1.weight": (layers, 8 * hidden, hidden),
            "decoder.layers.mlp.linear_fc2.weight": (layers, hidden, 4 * hidden),
        }

    def _add_holes(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: int) -> None:
        entry = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
        self._metadata.state_dict_metadata[name] = entry
        for offset, size in _split(shape, pieces):
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
            file = f"__{offset[1] // size[1] if len(shape) == 3 else 0}_0.distcp"
            start = self._ends.get(file, 0)
            length = torch.Size(size).numel() * dtype.itemsize
            if self._frames is not None and not name.startswith("optimizer."):
                length = self._write_frame(file, start, torch.Size(size), dtype)
            self._ends[file] = start + length
            index = MetadataIndex(name, torch.Size(offset))
            self._metadata.storage_data[index] = _StorageInfo(file, start, length)

    def _write_frame(self, file: str, start: int, size: torch.Size, dtype: torch.dtype) -> int:
        """What ``torch.save`` puts around a tensor's numbers, and a hole for them; returns the length."""
        length = size.numel() * dtype.itemsize
        if (size, dtype) not in self._frames:
            example = self.path / "example"
            with torch.serialization.skip_data():
                torch.save(torch.empty(size, dtype=dtype), example)
            first = torch._C.PyTorchFileReader(str(example)).get_record_offset("data/0")
            with open(example, "rb") as stream:
                head = stream.read(first)
                stream.seek(first + length)
                self._frames[size, dtype] = head, stream.read()
            example.unlink()
        head, tail = self._frames[size, dtype]
        with open(self.path / file, "r+b" if (self.path / file).exists() else "w+b") as stream:
            stream.seek(start)
            stream.write(head)
            stream.seek(start + len(head) + length)
            stream.write(tail)
        return len(head) + length + len(tail)

    def _add_coefficients(self, fope: FoPEConfig, layers: int, head_dim: int) -> None:
        made = [Geometry(fope, head_dim, 2).make_coefficients(layer=layer) for layer in range(1, layers + 1)]
        for leaf in made[0]:
            name = f"decoder.layers.self_attention.fope.{leaf}"
            size = torch.Size((layers, *made[0][leaf].shape))
            entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, [])
            self._metadata.state_dict_metadata[name] = entry
            for i, values in enumerate(made):
                offset = torch.Size((i, *(0,) * values[leaf].dim()))
                entry.chunks.append(ChunkStorageMetadata(offset, torch.Size((1, *values[leaf].shape))))
                self._append(name, offset, values[leaf].unsqueeze(0))

    def _append(self, name: str, offset: torch.Size | None, value: Any) -> None:
        """Write something real behind the holes of the first file."""
        buffer = io.BytesIO()
        torch.save(value, buffer)
        start, data = self._ends.get("__0_0.distcp", 0), buffer.getvalue()
        mode = "r+b" if (self.path / "__0_0.distcp").exists() else "w+b"
        with open(self.path / "__0_0.distcp", mode) as stream:
            stream.seek(start)
            stream.write(data)
        self._ends["__0_0.distcp"] = start + len(data)
        self._metadata.storage_data[MetadataIndex(name, offset)] = _StorageInfo(
            "__0_0.distcp", start, len(data)
        )


def _split(shape: tuple[int, ...], pieces: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, size) of what ranks store: layer by layer, and each layer in pieces."""
    if len(shape) < 3:
        yield (0,) * len(shape), shape
        return
    layers, rows, columns = shape
    for layer in range(layers):
        for piece in range(pieces):
            yield (layer, piece * (rows // pieces), 0), (1, rows // pieces, columns)
