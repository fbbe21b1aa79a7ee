"""What ``export`` and ``import`` refuse: one line, exit code 2, nothing left behind, nothing else touched."""

from __future__ import annotations

import json
import math
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import change, make_models, write_tokenizer
from synthetic import SyntheticCheckpoint, main

from megatron_fope import FoPEConfig

NOT_A_NUMBER = json.loads("NaN")


def state(folder: Path) -> dict[str, Any]:
    """Everything below a folder, with inode, size and time of change."""
    return {
        str(path): (s.st_ino, s.st_size, s.st_mtime_ns) if path.is_file() else s.st_ino
        for path in sorted(folder.rglob("*"))
        for s in [path.lstat()]
    }


def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a refused command, which leaves no trace."""
    before = state(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(*argv)
    output = capsys.readouterr()
    assert stop.value.code == 2 and not output.out
    lines = [line for line in output.err.splitlines() if "error: " in line]
    assert len(lines) == 1 and output.err.endswith(f"{lines[0]}\n"), output.err
    assert state(tmp_path) == before
    return lines[0].removeprefix("megatron-fope: error: ")


@pytest.fixture(scope="module")
def models_there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **values)


def fope_setting(**values: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        fope = json.loads((folder / "config.json").read_text())["fope"]
        change(folder / "config.json", fope=fope | {"settings": fope["settings"] | values})

    return make


def weights(edit: Callable[[dict[str, torch.Tensor]], Any], folder: Path) -> None:
    """Change the weights, which are in one file then."""
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"

IMPORTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no config": ("hf", lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "config is no JSON": ("hf", lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "config is deep": ("hf", lambda f: (f / "config.json").write_text("[" * 10**6), "config.json cannot be"),
    "config is a list": ("hf", lambda f: (f / "config.json").write_text("[]"), "config.json holds no object"),
    "other architecture": ("hf", config(architectures=["GPT2LMHeadModel"]), "its architecture is GPT2LMHead"),
    "no architecture": ("hf", config(architectures=[3]), "its architecture is None"),
    "code of its own": ("hf", config(auto_map={"AutoModel": "code.X"}), "code of its own, which is never ru"),
    "quantised": ("hf", config(quantization_config={"quant_method": "fp8"}), "its quantization_config is"),
    "windows": ("hf", config(layer_types=["sliding_attention"] * 2), "its layer_types have sliding_attentio"),
    "index is no JSON": (
        "hf", lambda f: (f / "model.safetensors.index.json").write_text("no"), "index.json cannot be read",
    ),
    "shard is missing": ("hf", lambda f: shard(f).unlink(), ".safetensors is missing"),
    "shard is empty": ("hf", lambda f: shard(f).write_bytes(b""), ".safetensors cannot be read ("),
    "shard is cut": (
        "hf", lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-100]), ".safetensors cannot be read (",
    ),
    "shard is noise": ("hf", lambda f: shard(f).write_bytes(bytes(range(256)) * 9), ".safetensors cannot be"),
    "shard lacks a tensor": (
        "hf", lambda f: save_file({"x": torch.ones(1)}, shard(f)), "its files have no model.",
    ),
    "float8": (
        "hf", lambda f: weights(lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}), f),
        f"{QUERY} has the type F8_E4M3; allowed: F32, F16, BF16",
    ),
    "integers": (
        "hf", lambda f: weights(lambda t: t.update({QUERY: t[QUERY].to(torch.int8)}), f),
        f"{QUERY} has the type I8; allowed: F32, F16, BF16",
    ),
    "scales of a quantisation": (
        "hf", lambda f: weights(lambda t: t.update({f"{QUERY}_scale_inv": torch.ones(1)}), f),
        f"Megatron's model has no place for {QUERY}_scale_inv",
    ),
    "another size": (
        "hf", lambda f: weights(lambda t: t.update({NORM: torch.ones(31)}), f), f"{NORM} has the size [31]",
    ),
    "tokenizer is larger": (
        "hf", lambda f: write_tokenizer(f, 61), "its tokenizer has 61 ids, its model 60; use the tokenizer",
    ),
    "tokenizer is damaged": (
        "hf", lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer cannot be read (",
    ),
    "negative size": ("hf", config(hidden_size=-32), "its hidden_size is -32; allowed: whole numbers from 1"),
    "no layers": ("hf", config(num_hidden_layers=0), "its num_hidden_layers is 0; allowed: whole numbers"),
    "fraction": ("hf", config(head_dim=16.5), "its head_dim is 16.5; allowed: whole numbers"),
    "true is no size": ("hf", config(num_attention_heads=True), "its num_attention_heads is True; allowed"),
    "text for a size": ("hf", config(vocab_size="60"), "its vocab_size is '60'; allowed: whole numbers"),
    "huge size": ("hf", config(intermediate_size=10**30), "its intermediate_size is 1000000000000000000000"),
    "huge heads": ("hf", config(num_attention_heads=2**40), "its num_attention_heads is 1099511627776; all"),
    "odd heads": ("hf", config(num_key_value_heads=3), "its num_attention_heads is 4; requires a multiple"),
    "odd channels": ("hf", config(head_dim=15), "its head_dim is 15; requires an even number"),
    "text for a truth": ("hf", config(tie_word_embeddings="no"), "its tie_word_embeddings is 'no'; allowed:"),
    "epsilon is NaN": ("hf", config(rms_norm_eps=NOT_A_NUMBER), "its rms_norm_eps is nan; allowed: finite"),
    "epsilon is text": ("hf", config(rms_norm_eps="1e-5"), "its rms_norm_eps is '1e-5'; allowed: finite"),
    "base is infinite": ("hf", config(rope_parameters=None, rope_theta=math.inf), "its rope_theta is inf; a"),
    "base is small": ("hf", config(rope_parameters={"rope_theta": 0.5}), "its rope_theta is 0.5; allowed: n"),
    "base is huge": ("hf", config(rope_parameters={"rope_theta": 10**400}), "its rope_theta is 1000000"),
    "scaling is a list": ("hf", config(rope_parameters=[1]), "its rope_parameters is [1]; requires an"),
    "scaling without factor": (
        "hf", config(rope_parameters={"rope_type": "linear"}), "its factor is None; allowed: finite numbers",
    ),
    "scaling by a half": (
        "hf", config(rope_parameters={"rope_type": "linear", "factor": 1.5}), "its factor is 1.5; Megatron's",
    ),
    "length is text": ("hf", config(max_position_embeddings="64"), "its max_position_embeddings is '64'; al"),
    "length is huge": ("hf", config(max_position_embeddings=2**62), "its max_position_embeddings is 4611686"),
    "window is text": ("hf", config(sliding_window="8"), "its sliding_window is '8'; allowed: whole numbers"),
    "no settings": ("fope", config(fope=None), "no settings of FoPE that this version knows"),
    "unknown setting": ("fope", fope_setting(more=1), "no settings of FoPE that this version knows"),
    "setting is text": ("fope", fope_setting(gain="0.3"), "FoPE's gain in its config.json is '0.3'; require"),
    "setting is null": ("fope", fope_setting(square=None), "FoPE's square in its config.json is None; requi"),
    "setting is NaN": ("fope", fope_setting(gain=NOT_A_NUMBER), "--fope-gain is nan; allowed: finite number"),
    "setting is huge": ("fope", fope_setting(train_length=10**400), "FoPE's train_length in its config.json"),
    "unknown profile": ("fope", fope_setting(profile="x"), "--fope-profile is 'x'; allowed: paper, intern"),
    "no frequency": ("fope", fope_setting(train_length=2), "no frequency completes 1 cycle(s) in it"),
    "coefficients of another length": (
        "fope", fope_setting(train_length=4096), "sin_coef has the size [2, 3, 3]; its config.json requires",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPORTS)
def test_import(name: str, models_there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, damage, message = IMPORTS[name]
    shutil.copytree(models_there / kind, tmp_path / "folder")
    damage(tmp_path / "folder")
    line = refusal(tmp_path, capsys, "import", tmp_path / "folder", tmp_path / "a" / "new")
    assert "does not exist" in line
    line = refusal(tmp_path, capsys, "import", tmp_path / "folder", tmp_path / "new")
    assert message in line and len(line) < 700, line


def llama(folder: Path, **changes: Any) -> list[object]:
    """A checkpoint without data."""
    known = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "layernorm_epsilon": 1e-5}
    known |= {"untie_embeddings_and_output_weights": True, "ffn_hidden_size": 256}
    return [SyntheticCheckpoint(folder / "synthetic", **known | changes).folder]


def copied(folder: Path, there: Path) -> list[object]:
    return [shutil.copytree(there / "checkpoint", folder / "copy")]


def cut(folder: Path, there: Path) -> list[object]:
    """A checkpoint whose data file is as long as it was, but half of it is noise."""
    (checkpoint,) = copied(folder, there)
    file = next(checkpoint.glob("release/*.distcp"))
    file.write_bytes(b"\xff" * file.stat().st_size)
    return [checkpoint]


def shortened(folder: Path, there: Path) -> list[object]:
    (checkpoint,) = copied(folder, there)
    file = next(checkpoint.glob("release/*.distcp"))
    file.write_bytes(file.read_bytes()[:-1000])
    return [checkpoint]


def quantised(folder: Path, there: Path) -> list[object]:
    """A checkpoint whose table says that the embedding is float8."""
    (checkpoint,) = copied(folder, there)
    file = checkpoint / "release" / ".metadata"
    table = pickle.loads(file.read_bytes())
    entry = table.state_dict_metadata["embedding.word_embeddings.weight"]
    entry.properties.dtype = torch.float8_e4m3fn
    file.write_bytes(pickle.dumps(table))
    return [checkpoint]


EXPORTS: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "nothing there": (lambda f, t: [f / "none"], "no such folder"),
    "no checkpoint": (lambda f, t: [t / "hf"], "no latest_checkpointed_iteration.txt there"),
    "no such iteration": (lambda f, t: [t / "checkpoint", "--iteration", "3"], "there is no iteration 3"),
    "negative iteration": (lambda f, t: [t / "checkpoint", "--iteration", "-3"], "--iteration is -3;"),
    "file is short": (shortened, "fope_0.distcp"),
    "file is noise": (cut, "cannot be read ("),
    "float8": (quantised, "weight is float8_e4m3fn; allowed: float32, bfloat16, float16"),
    "other family": (lambda f, t: llama(f, normalization="LayerNorm"), "--normalization LayerNorm; requires"),
    "half annealed": (
        lambda f, t: llama(
            f, fope=FoPEConfig.from_profile(train_length=64, anneal_iters=9), fope_anneal_start=0
        ),
        "its start from RoPE is still being annealed; finish it first",
    ),
    "no rotary base": (lambda f, t: llama(f, position_embedding_type="none"), "is none; allowed: rope, fope"),
    "unknown format": (lambda f, t: [t / "checkpoint", "--format", "x"], "--format is 'x'; allowed: hf, eng"),
    "no such tokenizer": (
        lambda f, t: [t / "checkpoint", "--tokenizer", f / "none"], "requires a folder with a Hugging Face",
    ),
    "no tokenizer": (lambda f, t: [t / "checkpoint", "--tokenizer", t / "hf"], "its tokenizer cannot be rea"),
    "tokenizer is larger": (
        lambda f, t: [t / "checkpoint", "--tokenizer", write_tokenizer(f / "words", 61)],
        "with 61 ids, but the model has 60; use the tokenizer that it was trained with",
    ),
    "unknown dtype": (lambda f, t: [t / "checkpoint", "--dtype", "int8"], "--dtype is 'int8'; allowed: floa"),
    "no length": (lambda f, t: [t / "checkpoint", "--max-length", "0"], "--max-length is 0; allowed: whole"),
    "shards of nothing": (lambda f, t: [t / "checkpoint", "--shard-size", "x"], "--shard-size is 'x'; allow"),
    "negative shards": (lambda f, t: [t / "checkpoint", "--shard-size", "-5GB"], "--shard-size"),
    "shards of zero": (lambda f, t: [t / "checkpoint", "--shard-size", "0GB"], "--shard-size is '0GB'; all"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_export(name: str, models_there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = EXPORTS[name]
    checkpoint, *flags = make(tmp_path, models_there)
    line = refusal(tmp_path, capsys, "export", checkpoint, tmp_path / "a" / "new", *flags)
    assert message in line and len(line) < 700, line


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size, and whoever writes them is told so as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk(
    models_there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before anything is written, or while the weights or the tokenizer are."""
    out = tmp_path / "a" / "new"
    imported = ("import", models_there / "hf", tmp_path / "new")
    exported = ("export", models_there / "checkpoint", out)
    with small_disk(10_000):
        for command in (imported, exported):
            assert "it cannot be written (" in refusal(tmp_path, capsys, *command)
    with small_disk(500):
        words = refusal(tmp_path, capsys, *exported, "--tokenizer", models_there / "tokenizer")
    assert "nothing was left there" in words

    def full(*_: Any) -> Any:
        return shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)

    monkeypatch.setattr(shutil, "disk_usage", full)
    for name, command in (("CHECKPOINT", imported), ("OUT", exported)):
        assert f"{name} needs 0.0 GB, 0.0 GB are free" in refusal(tmp_path, capsys, *command)


def test_targets_that_exist(models_there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        for command, source in (("import", "hf"), ("export", "checkpoint")):
            line = refusal(tmp_path, capsys, command, models_there / source, tmp_path / name)
            assert "which exists; use a new folder" in line


def test_no_code_of_a_folder_runs(
    models_there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a model's, not a tokenizer's, and a file with our name is not ours."""
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()\n"
    folder = shutil.copytree(models_there / "fope", tmp_path / "folder")
    write_tokenizer(folder, 60)
    (folder / "modeling_fope.py").write_text(code)
    before = state(folder)
    assert main("import", folder, tmp_path / "imported") == 0
    assert state(folder) == before
    for name in ("modeling_other.py", "tokenization_other.py", "configuration_other.py", "__init__.py"):
        (folder / name).write_text(code)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Other",
        auto_map={"AutoTokenizer": ["tokenization_other.Other", None]},
    )
    (folder / "tokenizer.json").unlink()
    assert "its tokenizer cannot be read" in refusal(tmp_path, capsys, "import", folder, tmp_path / "new")
    line = refusal(
        tmp_path, capsys, "export", models_there / "checkpoint", tmp_path / "new", "--tokenizer", folder
    )
    assert "its tokenizer cannot be read" in line
    auto_map = {"AutoConfig": "configuration_other.X", "AutoModelForCausalLM": "modeling_other.Y"}
    change(folder / "config.json", architectures=["LlamaForCausalLM"], auto_map=auto_map)
    assert "which is never run" in refusal(tmp_path, capsys, "import", folder, tmp_path / "new")
    assert not marker.exists()
