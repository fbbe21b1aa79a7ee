"""Models of any size go in and out in the memory of a shard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from launch import ROOT
from synthetic import SyntheticCheckpoint
from torch import Tensor

from megatron_fope.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_fope.tools.huggingface.exporting import export
from megatron_fope.tools.huggingface.importing import _Files, import_model

sys.path.append(str(ROOT / "tests" / "scripts"))
import big_models


def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    """Both commands as they are, all bytes but the zeros on the disk: see ``big_models.py``."""
    found = big_models.measure(tmp_path, layers=24, hidden=1024, shard_size="60MB")
    assert found["bytes"] > 0.7e9 and found["files"] > 10 and found["used"] < found["bytes"] / 20
    for name in ("export", "import"):
        more = found[name]["bytes_at_peak"] - found[name]["bytes_before"]
        assert more < 0.2e9, (name, found)


def test_hundred_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, sizes, places and the time for all that is not data; tensors have no memory here."""
    source = SyntheticCheckpoint(tmp_path / "checkpoint", layers=80, hidden=8192, pieces=8, llama=True)
    shards: dict[str, int] = {}

    def read_tensor(self: Checkpoint, name: str, index: tuple[int, ...] = ()) -> Tensor:
        entry = self.tensors[name]
        return torch.empty(entry.size[len(index) :], dtype=entry.properties.dtype, device="meta")

    def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, tensor in tensors.items():
            places = [end, end := end + tensor.nbytes]
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": places}
        text = json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        shards[path.name] = end

    def read(self: _Files, name: str) -> Tensor:
        return torch.empty(self._tensors[name][1], dtype=torch.bfloat16, device="meta")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read_tensor", read_tensor)
        patched.setattr(safetensors.torch, "save_file", save_file)
        patched.setattr(_Files, "read", read)
        patched.setattr("megatron_fope.tools.huggingface.exporting.check_space", lambda *_: None)
        patched.setattr("megatron_fope.tools.huggingface.importing.check_space", lambda *_: None)
        start = time.process_time()
        out = export(source.folder, tmp_path / "hf")
        exported = time.process_time()
        made = import_model(out.folder, tmp_path / "again")
        imported = time.process_time()
    assert sum(shards.values()) > 140e9 and max(shards.values()) <= 5e9 and len(shards) > 28
    index = json.loads((out.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(shards.values())
    assert set(index["weight_map"].values()) == shards.keys() and len(index["weight_map"]) == 9 * 80 + 3
    old, new = open_checkpoint(source.folder, name="X"), open_checkpoint(made.folder, name="X")
    for name, entry in new.tensors.items():
        assert entry.size == old.tensors[name].size, name
    assert exported - start < 10 and imported - exported < 20
