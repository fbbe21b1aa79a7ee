"""Bad input: refused before training with exit code 2 and one line naming the flag and what is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_bad_commands
from bad_numbers import MEGATRON, NUMBERS
from megatron_arguments import FOPE, ROPE, command, outcome, save_checkpoint, start

from megatron_fope import compat
from megatron_fope.common.errors import UserError
from megatron_fope.tools import cli
from megatron_fope.tools.evaluation import perplexity_command as evaluation

PREFIX = "megatron-fope: error: "

DATA = ["--data-path", "{folder}/data"]


@dataclass(frozen=True)
class Case:
    """A command line, and what its one line must start with and contain; ``{folder}`` is a fixture."""

    start: str
    parts: tuple[str, ...]
    flags: list[str] = field(default_factory=list)
    """Megatron's, behind those of a tiny model."""
    complete: bool = True
    """Add the flags that the CPU needs."""
    extra: list[str] = field(default_factory=list)
    """Switches that a training script adds to Megatron's."""
    command: list[str] | None = None
    """Arguments of ``megatron-fope`` instead."""


def case(flags: str, start: str, *parts: str, position: list[str] = FOPE, **more: Any) -> Case:
    return Case(start, parts, [*position, *flags.split()], **more)


def load(
    name: str, flags: str, start: str, *parts: str, position: list[str] = FOPE, adopt: bool = False
) -> Case:
    """A run that loads a checkpoint, whose folder the line names too."""
    adopting = ["--use-checkpoint-args"] if adopt else []
    flags_in_order = [*position, "--load", f"{{folder}}/{name}", *adopting, *flags.split()]
    return Case(start, (*parts, f"the checkpoint in {{folder}}/{name} was trained with"), flags_in_order)


SETTINGS = {
    "unknown profile": case("--fope-profile papre", "--fope-profile is 'papre'", "paper, intern-s1-pro"),
    "gain zero": case("--fope-gain 0", "--fope-gain is 0.0", "greater than 0"),
    "gain negative": case("--fope-gain -0.3", "--fope-gain is -0.3", "greater than 0"),
    "gain not a number": case("--fope-gain nan", "--fope-gain is nan", "finite numbers"),
    "gain infinite": case("--fope-gain inf", "--fope-gain is inf", "finite numbers"),
    "gain a word": case("--fope-gain big", "--fope-gain is 'big'", "allowed: finite numbers"),
    "train length 1": case("--fope-train-length 1", "--fope-train-length is 1", "at least 2 tokens"),
    "train length 0": case("--fope-train-length 0", "--fope-train-length is 0", "at least 2 tokens"),
    "train length negative": case("--fope-train-length -64", "--fope-train-length is -64", "at least 2"),
    "no frequency left": case("--fope-train-length 6", "--fope-train-length is 6", "at least 7 tokens"),
    "no frequency left by the ratio": case(
        "--fope-floor-ratio 20", "--fope-train-length is 64", "20 cycle(s)", "at least 126 tokens"
    ),
    "floor ratio negative": case("--fope-floor-ratio -1", "--fope-floor-ratio is -1.0", "0 or more"),
    "odd head dimension": case("--kv-channels 15", "--kv-channels", "is 15", "even number >= 4"),
    "head dimension too small": case("--kv-channels 2", "--kv-channels", "is 2", "even number >= 4"),
    "base": case("--rotary-base 1", "--rotary-base is 1.0", "greater than 1"),
    "unknown init": case("--fope-init zeros", "--fope-init is 'zeros'", "eye_xavier_norm", "xavier_uniform"),
    "unknown padding": case("--fope-pad-value 0,0", "--fope-pad-value is '0,0'", "1,1, 0,1"),
    "unknown scaling": case(
        "--fope-scaling ntk", "--fope-scaling is 'ntk'", "none, pi, linear, yarn, llama3"
    ),
    "yarn without original length": case(
        "--fope-scaling yarn --fope-scaling-factor 4",
        "--fope-original-length is 0",
        "before extension",
        "yarn",
    ),
    "llama3 without original length": case(
        "--fope-scaling llama3 --fope-scaling-factor 4", "--fope-original-length is 0", "llama3"
    ),
    "pi without original length": case("--fope-scaling pi", "--fope-original-length is 0", "pi"),
    "scaling factor below one": case(
        "--fope-scaling linear --fope-scaling-factor 0.5", "--fope-scaling-factor is 0.5", "at least 1"
    ),
    "too many frequencies": case("--fope-num-inv-freq 9", "--fope-num-inv-freq is 9", "1 to 8"),
    "no frequencies": case("--fope-num-inv-freq 0", "--fope-num-inv-freq is 0", "1 to 8"),
    "negative seed": case("--fope-seed -1", "--fope-seed is -1", "0 to 2^63 - 1"),
    "odd basis": case("--fope-basis-dim 33", "--fope-basis-dim is 33", "even"),
    "wide basis with square coefficients": case(
        "--fope-profile intern-s1-pro --fope-basis-dim 128", "--fope-basis-dim is 128", "--fope-profile paper"
    ),
    "attention scaling": case("--fope-attention-scaling 0", "--fope-attention-scaling is 0.0", "> 0"),
    "learnable and shared": case(
        "--fope-learnable --fope-profile intern-s1-pro",
        "--fope-learnable is given",
        "--no-fope-shared-layers",
    ),
    "growth of sharded checkpoints": case(
        "--fope-grow --use-torch-fsdp2 --ckpt-format torch_dcp --untie-embeddings-and-output-weights",
        "--ckpt-format is torch_dcp",
        "allowed: torch_dist, torch",
    ),
    "start from sharded checkpoints": case(
        "--fope-start-from-rope immediate --ckpt-format torch_dcp --use-torch-fsdp2 "
        "--untie-embeddings-and-output-weights",
        "--ckpt-format is torch_dcp",
        "--fope-start-from-rope",
    ),
    "fope flag with rope": case(
        "--fope-gain 0.3", "--fope-gain is 0.3", "--position-embedding-type is 'rope'", "fope", position=ROPE
    ),
    "fope switch without a position embedding type": case(
        "--no-fope-clip",
        "--fope-clip is False",
        "--position-embedding-type is 'learned_absolute'",
        "fope",
        position=[],
    ),
}

HOST_FLAGS = {
    "interleaved latents": case(
        "--multi-latent-attention --rope-type rope --rotary-interleaved",
        "--rotary-interleaved is given",
        "leave it out",
    ),
    "two types": case("--use-rotary-position-embeddings", "--use-rotary-position-embeddings is given"),
    "YaRN's flags": case("--yarn-beta-fast 16", "--yarn-beta-fast is given", "use --fope-yarn-beta-fast"),
    "YaRN's factor": case("--rotary-scaling-factor 4", "--rotary-scaling-factor is given", "--fope-scaling"),
    "two scalings": case(
        "--use-rope-scaling --rotary-seq-len-interpolation-factor 4", "--use-rope-scaling is given with"
    ),
    "a file instead of flags": case("--yaml-cfg some.yaml", "--yaml-cfg is given", "use flags"),
    "rotary percent": case("--rotary-percent 0.5", "--rotary-percent is 0.5", "1.0"),
    "multi-latent attention": case("--multi-latent-attention", "--rope-type is yarn", "use --rope-type rope"),
    "multimodal sections": case("--mrope-section 2 3 3", "--mrope-section is given", "leave it out"),
    "fused rotation of a script that has the flag": case(
        "--apply-rope-fusion",
        "--apply-rope-fusion is given",
        "leave it out",
        extra=["--apply-rope-fusion"],
    ),
    "fused rotation, a flag that Megatron has not": case(
        "--apply-rope-fusion", "--apply-rope-fusion is given", "leave it out"
    ),
    "fused projection, a flag that Megatron has not": case(
        "--fused-single-qkv-rope", "--fused-single-qkv-rope is given", "leave it out"
    ),
    "fused projection and rotation": case(
        "--fused-single-qkv-rope",
        "--fused-single-qkv-rope is given",
        "leave it out",
        extra=["--fused-single-qkv-rope"],
    ),
    "no transformer engine": case(
        "--transformer-impl transformer_engine",
        "--transformer-impl is transformer_engine",
        "pip install 'megatron-fope[te]'",
        "--transformer-impl local",
        complete=False,
    ),
    "masking between documents with context parallelism": case(
        "--dataloader-inter-document-masking --context-parallel-size 2",
        "--dataloader-inter-document-masking is given",
        "--context-parallel-size 2",
        "use --context-parallel-size 1",
    ),
    "position ids that not every pipeline stage gets": case(
        "--reset-position-ids --pipeline-model-parallel-size 2",
        "--reset-position-ids is given with --pipeline-model-parallel-size 2",
    ),
    "position ids that the schedule drops": case(
        "--reset-position-ids --overlap-moe-expert-parallel-comm --transformer-impl local",
        "--reset-position-ids is given with --overlap-moe-expert-parallel-comm",
        complete=False,
    ),
    "position ids that graphs drop": case(
        "--reset-position-ids --cuda-graph-impl transformer_engine --transformer-impl local",
        "--reset-position-ids is given with --cuda-graph-impl transformer_engine",
        complete=False,
    ),
}

CHECKPOINTS = {
    "paper": {"flags": [*FOPE, "--fope-gain", "0.4"], "format": "torch"},
    "distributed": {"flags": [*FOPE, "--fope-gain", "0.4"], "format": "torch_dist"},
    "intern": {"flags": [*FOPE, "--fope-profile", "intern-s1-pro"], "format": "torch"},
    "rope": {"flags": ROPE, "format": "torch"},
    "base 20000": {"flags": [*FOPE, "--rotary-base", "20000"], "format": "torch"},
}
LOADING = {
    "another train length": load(
        "paper", "--fope-train-length 32", "--fope-train-length is 32", "trained with 64"
    ),
    "another sequence length": load(
        "paper",
        "--seq-length 128 --max-position-embeddings 128",
        "--fope-train-length is 128",
        "trained with 64",
    ),
    "another head dimension": load("paper", "--kv-channels 32", "--kv-channels is 32", "trained with 16"),
    "another number of KV heads": load(
        "paper", "--group-query-attention --num-query-groups 2", "--num-query-groups is 2", "trained with 4"
    ),
    "one KV head": load(
        "paper", "--group-query-attention --num-query-groups 1", "--num-query-groups is 1", "trained with 4"
    ),
    "fewer frequencies": load(
        "paper", "--fope-num-inv-freq 2", "--fope-num-inv-freq is 2", "trained with None"
    ),
    "shared heads": load(
        "paper", "--no-fope-separate-heads", "--fope-separate-heads is False", "trained with True"
    ),
    "learning from a frozen checkpoint": load(
        "paper", "--fope-learnable", "--fope-learnable is True", "trained with False"
    ),
    "another padding": load(
        "paper", "--fope-pad-value 0,1", "--fope-pad-value is '0,1'", "trained with '1,1'"
    ),
    "another base": load("paper", "--rotary-base 20000", "--rotary-base is 20000.0", "trained with 10000.0"),
    "another profile": load("intern", "", "--fope-profile is 'paper'", "trained with 'intern-s1-pro'"),
    "another profile the other way round": load(
        "paper",
        "--fope-profile intern-s1-pro",
        "--fope-profile is 'intern-s1-pro'",
        "trained with 'paper'",
    ),
    "torch_dist": load(
        "distributed", "--fope-pad-value 0,1", "--fope-pad-value is '0,1'", "trained with '1,1'"
    ),
    "rope into fope": load("rope", "", "--position-embedding-type is 'fope'", "trained with 'rope'"),
    "fope into rope": load(
        "paper", "", "--position-embedding-type is 'rope'", "trained with 'fope'", position=ROPE
    ),
    "torch_dist into rope": load(
        "distributed", "", "--position-embedding-type is 'rope'", "trained with 'fope'", position=ROPE
    ),
    "fope into the default": load(
        "paper", "", "--position-embedding-type is 'learned_absolute'", "trained with 'fope'", position=[]
    ),
    "its arguments, rope into fope": load(
        "rope", "", "--position-embedding-type is 'fope'", "trained with 'rope'", adopt=True
    ),
    "its arguments, fope into rope": load(
        "paper", "", "--position-embedding-type is 'rope'", "trained with 'fope'", position=ROPE, adopt=True
    ),
    "its arguments, another base": load(
        "paper", "--rotary-base 500000", "--rotary-base is 500000", "trained with 10000", adopt=True
    ),
    "its arguments, the default base": load(
        "base 20000", "--rotary-base=10000", "--rotary-base is 10000", "trained with 20000", adopt=True
    ),
    "its arguments, another pairing": load(
        "paper", "--rotary-interleaved", "--rotary-interleaved is True", "trained with False", adopt=True
    ),
    "another pairing": load("paper", "--rotary-interleaved", "--rotary-interleaved is True", "with False"),
    "layers without positions": load("paper", "--no-rope-freq 2", "--no-rope-freq is [0, 1]", "None"),
    "its arguments, another padding": load(
        "paper", "--fope-pad-value 0,1", "--fope-pad-value is '0,1'", "trained with '1,1'", adopt=True
    ),
    "its arguments, another train length": load(
        "distributed",
        "--fope-train-length 32",
        "--fope-train-length is 32",
        "trained with 64",
        position=[],
        adopt=True,
    ),
}

EVALUATION = {
    "fewer tokens than the default lengths": Case(
        "--tokens is 1000",
        ("at least the longest length, 1024",),
        command=["evaluate-perplexity", "--checkpoint", "{folder}/paper", *DATA, "--tokens", "1000"],
    ),
    "fewer tokens than a length": Case(
        "--tokens is 65536",
        ("at least the longest length, 65537",),
        command=["evaluate-perplexity", "--checkpoint", "{folder}/rope", *DATA, "--lengths", "64,65537"],
    ),
}
CASES = {
    f"{group}: {name}": one
    for group, cases in {
        "setting": SETTINGS,
        "host": HOST_FLAGS,
        "load": LOADING,
        "evaluate": EVALUATION,
        "number": {flags: case(flags, start) for flags, start in NUMBERS.items()},
        "Megatron": {flags: case(flags, start) for flags, start in MEGATRON.items()},
    }.items()
    for name, one in cases.items()
}
ACCEPTED = {
    "paper": FOPE,
    "shortest train length": [*FOPE, "--fope-train-length", "7"],
    "documents without context parallelism": [*FOPE, "--dataloader-inter-document-masking"],
    "documents whose position ids start again": [*FOPE, "--reset-position-ids", "--reset-attention-mask"],
    "no flag of FoPE": ROPE,
    "no clipping": [*FOPE, "--fope-floor-ratio", "0"],
    "largest seed": [*FOPE, "--seed", str(2**32 - 1), "--fope-seed", str(2**63 - 1)],
    "its own checkpoint": [*FOPE, "--load", "{folder}/paper"],
    "its own checkpoint, heads as groups": [
        *(*FOPE, "--load", "{folder}/paper", "--group-query-attention", "--num-query-groups", "4")
    ],
    "its own distributed checkpoint": [*FOPE, "--load", "{folder}/distributed"],
    "rope checkpoint into rope": [*ROPE, "--load", "{folder}/rope"],
    "a checkpoint's arguments": ["--load", "{folder}/intern", "--use-checkpoint-args"],
    "learning from a frozen checkpoint in a new run": [
        *(*FOPE, "--fope-learnable", "--finetune", "--load", "{folder}/paper")
    ],
    "a checkpoint with another gain and seed": [
        *(*FOPE, "--fope-gain", "0.6", "--fope-seed", "5", "--load", "{folder}/paper")
    ],
}
"""Command lines next to the refused ones, which must pass."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the checkpoints are, next to a pair of data files; FoPE is registered meanwhile."""
    from megatron_fope import register, unregister

    folder = tmp_path_factory.mktemp("bad_input")
    for suffix in ("bin", "idx"):
        (folder / f"data.{suffix}").touch()
    register()
    for name, checkpoint in CHECKPOINTS.items():
        save_checkpoint(folder / name, start(checkpoint["flags"]), checkpoint["format"])
    yield folder
    unregister()


def try_(one: Case, folder: Path) -> dict[str, Any]:
    """What becomes of a case."""
    flags, argv = (
        [word.replace("{folder}", str(folder)) for word in words or ()] for words in (one.flags, one.command)
    )
    if one.command is not None:
        return outcome(command, argv)
    return outcome(lambda: start(flags, complete=one.complete, extra=one.extra))


def check_line(text: str, *parts: str) -> None:
    """One line of ours on standard error, and nothing else."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith(PREFIX + parts[0]), lines[0]
    for part in parts[1:]:
        assert part in lines[0]


def skip_if_unknown(outcome: dict[str, Any], name: str) -> None:
    """``--dataloader-inter-document-masking`` exists from Megatron-Core 0.19 on."""
    if "unrecognized arguments: --dataloader-inter-document-masking" in outcome["stderr"]:
        pytest.skip(f"this Megatron-Core has no such flag: {name}")


@pytest.mark.launch
@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, folder: Path) -> None:
    expected = CASES[name]
    found = try_(expected, folder)
    skip_if_unknown(found, name)
    assert found["error"] is None, found["error"]
    assert found["code"] == 2
    check_line(
        found["stderr"], *(p.replace("{folder}", str(folder)) for p in (expected.start, *expected.parts))
    )


@pytest.mark.launch
@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, folder: Path) -> None:
    found = try_(Case("", (), ACCEPTED[name]), folder)
    skip_if_unknown(found, name)
    assert (found["code"], found["error"]) == (None, None)
    assert PREFIX not in found["stderr"]


@pytest.mark.launch
def test_no_cuda_and_no_cpu_flag() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "megatron_fope", "pretrain", "--num-layers", "1"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 2
    check_line(run.stderr, "no CUDA device is visible", "--cpu in front")
    assert run.stdout == ""


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"transformer_impl": "local"}, "--transformer-impl local"),
        (
            {"transformer_impl": "inference_optimized", "attention_backend": SimpleNamespace(name="local")},
            "--attention-backend local",
        ),
    ],
)
def test_context_parallelism_without_an_attention_for_it(flags: dict[str, Any], named: str) -> None:
    """On the GPU path; the CPU runtime's attention can."""
    from megatron_fope.arguments.flags import check_before_megatron

    args = SimpleNamespace(position_embedding_type="fope", context_parallel_size=2, **flags)
    with pytest.raises(UserError) as error:
        check_before_megatron(args)
    assert str(error.value).startswith("--context-parallel-size is 2, which")
    assert named in str(error.value) and "\n" not in str(error.value)


# Commands that stop before they import Megatron


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``refused([arguments], "start of the line", "part", ...)``."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def refused(argv: list[str | Path], *parts: str) -> None:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert stop.value.code == 2
        check_line(captured.err, *parts)
        assert captured.out == ""

    return refused


@pytest.mark.parametrize("cpu_flag", [[], ["--cpu"]])
def test_script_that_does_not_exist(
    cpu_flag: list[str], refused: Callable[..., None], tmp_path: Path
) -> None:
    script = tmp_path / "pretrain_gpt.py"
    refused([*cpu_flag, script], f"the training script is '{script}'", "an existing Python file")


@pytest.mark.parametrize("argv", [["--cpu"], ["--cpu", "prepare-data"], ["--cpu", "train.yaml"]])
def test_cpu_flag_with_something_else(argv: list[str], refused: Callable[..., None]) -> None:
    refused(argv, "--cpu goes in front of a training script, 'pretrain'", repr([*argv, "nothing"][1]))


@pytest.mark.parametrize("version", ["0.15.3", "0.21.0", "1.0"])
def test_megatron_outside_the_supported_range(
    version: str, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat.versions, "megatron_version", lambda: compat.versions.Version(version))
    refused(["--cpu", "pretrain"], f"Megatron-Core {version} is installed", "<0.20", ">=0.17")


def test_built_in_training_on_a_checkout_of_0_16(
    refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat.versions, "megatron_version", lambda: compat.versions.Version("0.16.1"))
    refused(["--cpu", "pretrain"], "the built-in training needs Megatron-Core >=0.17", "pretrain_gpt.py")


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0", "0.18.2", "0.19.2", "0.19.0rc1", "0.20.0"])
def test_supported_megatron(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.versions, "megatron_version", lambda: compat.versions.Version(version))
    assert str(compat.require_supported_megatron()) == version


def test_other_ranks_stay_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main([str(tmp_path / "missing.py")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for suffix in ("bin", "idx"):
        (tmp_path / f"data.{suffix}").touch()
    return tmp_path / "data"


def evaluate(data: Path, *flags: str | Path) -> list[str | Path]:
    return ["evaluate-perplexity", "--data-path", data, *flags]


def test_missing_checkpoint(refused: Callable[..., None], data: Path) -> None:
    folder = data.parent / "nothing"
    refused(evaluate(data, "--checkpoint", folder), f"--checkpoint is '{folder}'", "a folder made by --save")


def test_folder_without_a_checkpoint(refused: Callable[..., None], data: Path) -> None:
    refused(
        evaluate(data, "--checkpoint", f"FoPE={data.parent}"),
        f"--checkpoint is '{data.parent}'",
        "no latest_checkpointed_iteration.txt there",
    )


def test_tracker_that_names_no_iteration(refused: Callable[..., None], data: Path) -> None:
    (data.parent / "latest_checkpointed_iteration.txt").write_text("latest")
    refused(
        evaluate(data, "--checkpoint", data.parent),
        "--checkpoint is",
        "'latest'",
        "the number of an iteration or 'release'",
    )


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_data(suffix: str, refused: Callable[..., None], data: Path) -> None:
    missing = data.with_suffix(f".{suffix}")
    missing.unlink()
    refused(
        evaluate(data, "--checkpoint", data.parent),
        f"--data-path is '{data}'",
        f"{missing} does not exist",
    )


@pytest.mark.parametrize("lengths", ["0", "64,0", "-64", "1", "", "64,long", "64;128"])
def test_lengths(lengths: str, refused: Callable[..., None], data: Path) -> None:
    refused(
        evaluate(data, "--checkpoint", data.parent, f"--lengths={lengths}"),
        "--lengths is ",
        lengths.replace(",", ", ") if lengths.replace(",", "").lstrip("-").isdecimal() else repr(lengths),
        "whole numbers >= 2, separated by commas",
    )


@pytest.mark.parametrize("lengths", [[], [0], [64, 1]])
def test_lengths_from_python(lengths: list[int], data: Path) -> None:
    with pytest.raises(UserError, match=r"^--lengths is ") as error:
        evaluation.PerplexityOptions(checkpoints={"FoPE": data.parent}, data_path=data, lengths=lengths)
    assert str(lengths) in str(error.value)


def test_two_checkpoints_of_one_name(refused: Callable[..., None], data: Path) -> None:
    refused(
        evaluate(data, "--checkpoint", "a/fope", "--checkpoint", "b/fope"),
        "--checkpoint has the labels fope, fope",
        "NAME=FOLDER",
    )


def test_cpu_flag_in_front_reaches_the_evaluation(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    seen = []
    monkeypatch.setattr(evaluation, "run", lambda arguments: seen.append(arguments.cpu) or 0)
    argv = [str(word) for word in evaluate(data, "--checkpoint", "fope")]
    for front in ([], ["--cpu"]):
        assert cli.main([*front, *argv]) == 0
    assert seen == [False, True]


def test_how_many_are_tried() -> None:
    """Distinct bad inputs of all tables, each of which must end in one line."""
    tables = [value for name, value in vars(test_bad_commands).items() if name.startswith("NONSENSE_")]
    assert len(tables) == 5
    tried = len(CASES) + sum(map(len, tables))
    print(f"{tried} bad inputs are tried")
    assert tried >= 350
