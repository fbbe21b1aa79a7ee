"""Time and memory of ``export`` and ``import`` for models that fit on no disk here: holes stay holes.

``python big_models.py LAYERS HIDDEN SHARD_SIZE`` makes a checkpoint whose data files are sparse, exports it
and imports the export, each in a process of its own, and prints what they took. Every byte is read, put
together and compared with zero; of what is written only zeros do not reach the disk. It leaves nothing.

``python big_models.py COMMAND ...`` is one of those processes.
"""

from __future__ import annotations

import builtins
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BLOCK = 1 << 18


class SparseFile:
    """A file whose blocks of zeros become holes."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        zeros = bytes(BLOCK)
        for start in range(0, len(view), BLOCK):
            block = bytes(view[start : start + BLOCK])
            if block == zeros:
                self._file.seek(BLOCK, 1)
            else:
                self._file.write(block)
        return len(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> SparseFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def save_file(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """safetensors' function of this name; bytes in place of its compiled writer."""
    import torch

    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.dtype == torch.bfloat16
        header[name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes],
        }  # fmt: skip
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with SparseFile(open(path, "wb")) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy())
        file.truncate(8 + len(text) + end)


def run(argv: list[str]) -> None:
    """A command, with what it took as the last line."""
    import safetensors.torch

    from megatron_fope.tools import cli
    from megatron_fope.tools.conversion import writing
    from megatron_fope.tools.huggingface import exporting, importing  # noqa: F401

    if argv[0] == "import":
        from megatron.training import arguments  # noqa: F401

    safetensors.torch.save_file = save_file
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60)
    writing.open = lambda *given: SparseFile(builtins.open(*given))  # noqa: SIM115  # the caller closes it
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before, wall, cpu = peak(), time.time(), time.process_time()
    assert cli.main(argv) == 0
    took = {"seconds": time.time() - wall, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps(took | {"bytes_before": before, "bytes_at_peak": peak()}), flush=True)


def peak() -> int:
    """Resident memory at its highest, bytes."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(folder: Path, layers: int, hidden: int, shard_size: str) -> dict[str, Any]:
    """Both directions in a folder; ``{"bytes": of the weights, "export": ..., "import": ...}``."""
    from synthetic import SyntheticCheckpoint

    source = SyntheticCheckpoint(folder / "checkpoint", layers=layers, hidden=hidden, pieces=8, llama=True)
    commands = {
        "export": ("export", source.folder, folder / "hf", "--shard-size", shard_size),
        "import": ("import", folder / "hf", folder / "again"),
    }
    results: dict[str, Any] = {}
    for name, words in commands.items():
        command = [sys.executable, __file__, *map(str, words)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
        results[name] = json.loads(done.stdout.splitlines()[-1])
    files = list((folder / "hf").glob("*.safetensors"))
    used = sum(file.stat().st_blocks * 512 for file in files)
    return results | {"bytes": sum(file.stat().st_size for file in files), "files": len(files), "used": used}


def main() -> None:
    if sys.argv[1] in ("export", "import"):
        run(sys.argv[1:])
        return
    sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    print(f"{found['bytes'] / 1e9:.1f} GB of weights in {found['files']} files")
    for name in ("export", "import"):
        took = found[name]
        more = took["bytes_at_peak"] - took["bytes_before"]
        print(
            f"{name}: {took['seconds']:.0f} s ({took['cpu_seconds']:.0f} s of CPU), memory "
            f"{took['bytes_at_peak'] / 1e9:.1f} GB at its highest, {more / 1e9:.1f} GB more than before"
        )


if __name__ == "__main__":
    main()
