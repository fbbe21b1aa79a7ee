"""The layout of LMDeploy and XTuner: they can read what we write; what they write goes on in Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from forks import Launcher
from launch import ROOT
from safetensors.torch import load_file, save_file
from synthetic import SyntheticCheckpoint
from torch import Tensor

from megatron_fope import FoPEConfig, UserError
from megatron_fope.arguments.flags import fope_config_of_checkpoint
from megatron_fope.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_fope.tools.huggingface.exporting import export
from megatron_fope.tools.huggingface.importing import import_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {"Llama": {}, "Qwen3": {}, "Qwen3Moe": EXPERTS}
KEYS = ("fope_sep_head", "fope_init_factor", "num_inv_freq")


def golden(name: str) -> dict[str, Any]:
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file if key != "meta"}
        return arrays | {"meta": json.loads(str(file["meta"]))}


CASES = [
    path.stem
    for path in sorted((ROOT / "tests" / "golden").glob("intern_*.npz"))
    if (meta := golden(path.stem)["meta"])["kind"] == "rope" and not meta["config"]["rope"]
]


def engine_folder(folder: Path, case: dict[str, Any], family: str = "Qwen3Moe") -> Path:
    """A model of a golden case's shape with random weights, as XTuner saves it (by XTuner's source)."""
    c = case["meta"]["config"]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=128, head_dim=c["head_dim"],
        num_attention_heads=c["n_q_heads"], num_key_value_heads=c["n_kv_heads"], initializer_range=0.2,
        max_position_embeddings=c["train_length"], tie_word_embeddings=False, **FAMILIES[family],
    )  # fmt: skip
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.rotary_emb.{name}": case[name] for name in ("sin_coef", "cos_coef")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rope = {
        "rope_type": "default", "rope_theta": c["theta"], "factor": None, "partial_rotary_factor": 1.0,
        "fope_sep_head": c["separate_head"], "fope_init_factor": c["gain"], "num_inv_freq": c["num_inv_freq"],
    }  # fmt: skip
    change(folder, rope_parameters=rope)
    return folder


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def train_length(case: dict[str, Any]) -> dict[str, int]:
    """What the import has to be told: the length, unless the frequencies are counted from it."""
    c = case["meta"]["config"]
    return {"train_length": c["train_length"]} if c["num_inv_freq"] is not None else {}


# What the engines read, restated ------------------------------------------------------------------


def as_lmdeploy(folder: Path) -> tuple[float, int | None, bool, int]:
    """Base, number of frequencies, one matrix for each KV head, longest position."""
    config = transformers.AutoConfig.from_pretrained(folder)
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else config.rope_scaling
    assert {"fope_sep_head", "fope_num_inv_freq"} & config.rope_scaling.keys(), "or it computes RoPE"
    assert rope.get("rope_type", rope.get("type", "default")) in ("default", "fope")
    count = rope.get("fope_num_inv_freq", rope.get("num_inv_freq"))
    return rope["rope_theta"], count, rope["fope_sep_head"], config.max_position_embeddings


def as_xtuner(folder: Path) -> tuple[float, int | None, bool, int]:
    config = transformers.AutoConfig.from_pretrained(folder)
    rope = config.rope_parameters
    assert isinstance(rope, dict) and any(rope.get(key) is not None for key in KEYS)
    assert isinstance(rope["fope_init_factor"], float) and rope["rope_type"] == "default"
    return rope["rope_theta"], rope["num_inv_freq"], rope["fope_sep_head"], config.max_position_embeddings


def as_older_transformers(folder: Path) -> tuple[float, int | None, bool, int]:
    """Both engines before transformers 5: the base is no part of ``rope_scaling``."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_scaling"]
    assert "rope_theta" not in rope and "max_position_embeddings" not in rope
    return (
        config["rope_theta"],
        rope["num_inv_freq"],
        rope["fope_sep_head"],
        config["max_position_embeddings"],
    )


READERS = [as_lmdeploy, as_xtuner, as_older_transformers]


def engine_tables(folder: Path, reader: Any, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every engine, each ``[b, KV heads, s, head_dim]``."""
    base, count, separate, longest = reader(folder)
    weights = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    sin_coef, cos_coef = (weights[f"model.rotary_emb.{name}"] for name in ("sin_coef", "cos_coef"))
    assert separate and sin_coef.dtype == cos_coef.dtype == torch.float32
    inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))
    inv_freq = inv_freq[inv_freq > 2.0 * torch.pi / longest] if count is None else inv_freq[:count]
    angles = (inv_freq[None, :, None] @ positions[:, None, :].float()).transpose(1, 2).unsqueeze(1)
    made = []
    for basis, coefficients in ((angles.cos(), cos_coef), (angles.sin(), sin_coef)):
        table = torch.einsum("bhtD,hDd->bhtd", basis.expand(-1, coefficients.size(0), -1, -1), coefficients)
        table = F.pad(table, (0, head_dim // 2 - table.size(-1)), value=1)
        made.append(torch.cat((table, table), dim=-1))
    return made[0], made[1]


def engine_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """Neighbouring query heads share the table of their KV head."""

    def rotate(x: Tensor) -> Tensor:
        ratio = x.size(1) // cos.size(1)
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * cos.repeat_interleave(ratio, 1) + turned * sin.repeat_interleave(ratio, 1)

    return rotate(q), rotate(k)


# Both ways ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_golden_cases_in_and_out(name: str, tmp_path: Path) -> None:
    """Read from an XTuner folder, written for the engines, read as they read: their own numbers."""
    case = golden(name)
    c = case["meta"]["config"]
    source = engine_folder(tmp_path / "xtuner", case)
    made = import_model(source, tmp_path / "megatron", **train_length(case))
    checkpoint = open_checkpoint(made.folder, name="X")
    fope = fope_config_of_checkpoint(checkpoint.args, checkpoint.args)
    expected = FoPEConfig.from_profile(
        "intern-s1-pro",
        train_length=c["train_length"],
        rotary_base=c["theta"],
        gain=c["gain"],
        num_inv_freq=c["num_inv_freq"],
        separate_heads=c["separate_head"],
    )
    assert fope == expected and checkpoint.train_length == checkpoint.args.seq_length == c["train_length"]
    for leaf in ("sin_coef", "cos_coef"):
        found = checkpoint.read_tensor(f"decoder.layers.self_attention.fope.{leaf}")
        assert found.dtype == torch.float32 and torch.equal(found, case[leaf].expand_as(found))
    if not c["separate_head"]:
        with pytest.raises(UserError, match="--fope-separate-heads False; --format engine requires True"):
            export(made.folder, tmp_path / "engine", format="engine")
        return
    out = export(made.folder, tmp_path / "engine", format="engine", shard_size="100KB").folder
    assert not list(out.glob("*.py"))
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "default",
        "fope_sep_head": True,
        "fope_init_factor": c["gain"],
        "num_inv_freq": c["d_in"],
    }
    dtype = getattr(torch, case["meta"]["io_dtype"])
    for reader in READERS:
        cos, sin = engine_tables(out, reader, case["positions_q"], c["head_dim"])
        q, k = (case[x].to(dtype) for x in "qk")
        q, k = engine_rotation(q, k, cos.to(dtype), sin.to(dtype))  # in 16 bit, they round the tables
        for x, found in (("q_out", q), ("k_out", k)):
            atol = case["meta"]["suggested_atol"]
            torch.testing.assert_close(found.float(), case[x], rtol=0, atol=atol, msg=reader.__name__)
    again = import_model(out, tmp_path / "again", train_length=c["train_length"])
    ours, theirs = (open_checkpoint(folder, name="X") for folder in (made.folder, again.folder))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.read_tensor(key), theirs.read_tensor(key)) for key in ours.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_compute_what_the_model_file_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain model with the engines' tables has the logits of the same checkpoint's other export."""
    case = golden("intern_numinvfreq10")
    made = import_model(engine_folder(tmp_path / "x", case, family), tmp_path / "megatron", train_length=512)
    plain, ours = (export(made.folder, tmp_path / name, format=name).folder for name in ("engine", "hf"))
    tokens = torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        expected = load(ours, trust_remote_code=True, dtype=torch.float32)(tokens).logits
        model = load(plain, dtype=torch.float32)
        rope = model(tokens).logits
        module = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
        monkeypatch.setattr(module, "apply_rotary_pos_emb", engine_rotation)
        model.model.rotary_emb.forward = lambda x, position_ids, *_: engine_tables(
            plain, as_lmdeploy, position_ids.expand(2, -1), model.config.head_dim
        )
        found = model(tokens).logits
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)
    assert (rope - expected).abs().max() > 0.1 * scale, "without the tables it is another model"


@pytest.mark.launch
def test_a_folder_of_xtuner_goes_on_in_megatron(launcher: Launcher, tmp_path: Path) -> None:
    """Two ranks with the experts apart load it, train at a rate of 0 and save; the export has its bits."""
    case = golden("intern_numinvfreq10")
    source = engine_folder(tmp_path / "xtuner", case)
    (source / "configuration.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    change(
        source,
        architectures=["Qwen3MoeFopeForCausalLM"],
        model_type="qwen3_moe_fope",
        auto_map={"AutoConfig": "configuration.X"},
    )
    made = import_model(source, tmp_path / "megatron", train_length=512)
    words = ["--cpu", "pretrain", *made.flags, "--micro-batch-size", "1", "--global-batch-size", "2"]
    words += ["--transformer-impl", "local", "--train-iters", "1", "--lr", "0", "--min-lr", "0"]
    words += ["--weight-decay", "0", "--eval-iters", "0", "--eval-interval", "100", "--log-interval", "1"]
    words += ["--mock-data", "--finetune", "--no-save-optim", "--expert-model-parallel-size", "2"]
    words += ["--load", str(made.folder), "--save", str(tmp_path / "saved"), "--save-interval", "1"]
    log = launcher.output(2, words, tmp_path / "log")
    assert "FoPE: profile intern-s1-pro, train length 512 tokens, 10 frequencies" in log
    out = export(tmp_path / "saved", tmp_path / "engine", format="engine")
    found, expected = (load_file(folder / "model.safetensors") for folder in (out.folder, source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "executed").exists()


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"square": False}, "--fope-square False; --format engine requires True"),
        ({"shared_layers": False}, "--fope-shared-layers False; --format engine requires True"),
        ({"separate_heads": False}, "--fope-separate-heads False; --format engine requires True"),
        ({"separate_basis": False}, "--fope-separate-basis False; --format engine requires True"),
        ({"normalize": True}, "--fope-normalize True; --format engine requires False"),
        ({"drop_clipped": False}, "--fope-drop-clipped False; --format engine requires True"),
        ({"basis_dim": 16}, "--fope-basis-dim 16; --format engine requires 0"),
        ({"pad_value": "0,1"}, "--fope-pad-value 0,1; --format engine requires 1,1"),
        (
            {"scaling": "linear", "scaling_factor": 2.0},
            "--fope-scaling linear; --format engine requires none",
        ),
        ({"attention_scaling": 1.2}, "--fope-attention-scaling 1.2; --format engine requires 1.0"),
        ({"exact_angles": True}, "--fope-exact-angles True; --format engine requires False"),
        (
            {"add_qkv_bias": True},
            "its family is qwen2; --format engine requires one of llama, qwen3, qwen3_moe",
        ),
        (
            {"position_embedding_type": "rope"},
            "its --position-embedding-type is rope; --format engine requires fope",
        ),
    ],
)
def test_what_engines_lack(setting: dict[str, Any], message: str, tmp_path: Path) -> None:
    names = set(FoPEConfig.__dataclass_fields__)
    fope = {name: value for name, value in setting.items() if name in names}
    args = {name: value for name, value in setting.items() if name not in names}
    source = SyntheticCheckpoint(
        tmp_path / "checkpoint",
        fope=FoPEConfig.from_profile("intern-s1-pro", train_length=64, **fope),
        **{
            "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "ffn_hidden_size": 256,
            "untie_embeddings_and_output_weights": False, "layernorm_epsilon": 1e-5,
        } | args,
    )  # fmt: skip
    with pytest.raises(UserError) as refused:
        export(source.folder, tmp_path / "hf", format="engine")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_coefficients_that_differ_from_layer_to_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = import_model(engine_folder(tmp_path / "x", golden("intern_mha")), tmp_path / "megatron")
    read = Checkpoint.read_tensor

    def other(self: Checkpoint, name: str, index: tuple[int, ...] = ()) -> Tensor:
        return read(self, name, index) + (1e-7 if "cos_coef" in name and index == (1,) else 0)

    monkeypatch.setattr(Checkpoint, "read_tensor", other)
    with pytest.raises(UserError, match="cos_coef differs from layer to layer; --format engine has one for"):
        export(made.folder, tmp_path / "engine", format="engine")
    assert not (tmp_path / "engine").exists()


def rope(**changes: Any) -> dict[str, Any]:
    known = {"rope_type": "default", "rope_theta": 1e4, "fope_sep_head": True, "fope_init_factor": 0.1}
    return {"rope_parameters": known | changes}


@pytest.mark.parametrize(
    "config,length,message",
    [
        (
            rope(num_inv_freq=16),
            None,
            "(num_inv_freq is 16, max_position_embeddings 512); give --train-length",
        ),
        (rope(), 256, "follow from its max_position_embeddings, 512; --train-length is 256"),
        ({"rope_parameters": {"rope_type": "default"}}, 256, "--train-length is 256, but HF_FOLDER is"),
        (rope(rope_type="yarn"), None, "its rope_type is 'yarn' beside FoPE's keys"),
        (rope(mrope_section=[1, 2]), None, "its mrope_section is [1, 2]"),
        (rope(num_inv_freq="16"), 512, "'16' where a whole number is required"),
        (rope(num_inv_freq=33), 512, "--fope-num-inv-freq is 33; allowed: 1 to 32"),
        (
            rope(num_inv_freq=15),
            512,
            "sin_coef has the size [4, 16, 16]; its config.json requires [4, 15, 15]",
        ),
        (rope(fope_sep_head=1), None, "1 where true or false is required"),
        (rope(fope_sep_head=False), None, "its config.json requires [16, 16]"),
        (rope(fope_init_factor=-1.0), None, "--fope-gain is -1.0; allowed: greater"),
        ({"max_position_embeddings": 1}, None, "--fope-train-length is 1; allowed: at least 2 tokens"),
    ],
)
def test_what_a_folder_does_not_tell(
    config: dict[str, Any], length: int | None, message: str, tmp_path: Path, xtuner: Path
) -> None:
    (tmp_path / "hf").mkdir()
    for file in xtuner.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    change(tmp_path / "hf", **config)
    with pytest.raises(UserError) as refused:
        import_model(tmp_path / "hf", tmp_path / "megatron", train_length=length)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.fixture(scope="module")
def xtuner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_folder(tmp_path_factory.mktemp("xtuner") / "hf", golden("intern_mha"))


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["InternS1ProForConditionalGeneration"], "text_config": {"router_n_groups": 8}},
        {"architectures": ["InternS1ProForConditionalGeneration"]},
        {"architectures": ["Qwen3MoeForCausalLM"], "router_n_groups": 8},
    ],
)
def test_intern_s1_pro(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its router takes one expert of each of 8 groups"):
        import_model(tmp_path, tmp_path / "megatron")
