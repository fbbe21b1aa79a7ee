"""Nonsense given to ``plan``, ``ladder`` and ``prepare-data``: one line, exit code 2, nothing written."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic import SyntheticCheckpoint

from megatron_fope.arguments import parser
from megatron_fope.tools.cli import main
from megatron_fope.tools.ladder import plan as ladder_plan


def refusal(*argv: str) -> str:
    """The one line of a command that refuses, without the prefix."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = main(list(argv))
        except SystemExit as stop:
            code = stop.code
    said = stderr.getvalue()
    assert code == 2 and stdout.getvalue() == "", (code, stdout.getvalue()[:500], said[-2000:])
    start = "megatron-fope: error: "
    assert said.startswith(start) and said.count("\n") == 1 and said.endswith("\n"), said[-2000:]
    return said.removeprefix(start).rstrip("\n")


@pytest.fixture(scope="module", autouse=True)
def one_parser() -> Iterator[None]:
    """Megatron's parser reads Megatron's source, which takes a second: once is enough."""
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(parser.megatron_parser)
        for module in (parser, ladder_plan):
            patch.setattr(module, "megatron_parser", cached)
        yield


# plan --------------------------------------------------------------------------------------------------

CLUSTER = "--gpus 64 --gpu h100"
PLAN = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --seq-length 8192 --micro-batch-size 1 "
    "--global-batch-size 512 --vocab-size 128256 --swiglu --bf16 --position-embedding-type fope"
)
NONSENSE_CLUSTERS = {
    "--gpus -8 --gpu h100": "--gpus is -8",
    "--gpus 0 --gpu h100": "--gpus is 0",
    "--gpus 1e3 --gpu h100": "--gpus is '1e3'; allowed: whole numbers",
    "--gpus 64 --gpu-memory lots": "--gpu-memory is 'lots'; allowed: ",
    "--gpus": "--gpus requires one value",
    "--gpus 64 --gpus-per-nod 8": "unrecognized arguments: --gpus-per-nod 8",
    "--gpus 1000000000000 --gpu h100": "--gpus is 1000000000000",
    "--gpus 64 --gpu-memory inf": "--gpu-memory is inf",
    "--gpus 64 --gpu-memory 0": "--gpu-memory is 0",
    "--gpus 64 --gpu-memory 1e300": "--gpu-memory is 1e+300",
    "--gpus 64 --gpu ''": "--gpu",
    "--gpus 64 --gpu h100 --margin -0.1": "--margin is -0.1",
    "--gpus 64 --gpu h100 --margin nan": "--margin is nan",
    "--gpus 64 --gpu h100 --gpus-per-node -8": "--gpus-per-node is -8",
    "--gpus 64 --gpu h100 --gpus-per-node 1000000000000": "--gpus-per-node is 1000000000000",
    "--gpus 64 --gpu h100 --show -1": "--show is -1",
}
NONSENSE_PLANS = {
    "--tensor-model-parallel-size -2": "is -2; allowed: 1 or more",
    "--tensor-model-parallel-size 0": "is 0; allowed: 1 or more",
    "--tensor-model-parallel-size 64": "is 64; allowed: a divisor of the 32",
    "--pipeline-model-parallel-size -1": "is -1; allowed: 1 or more",
    "--pipeline-model-parallel-size 0": "is 0; allowed: 1 or more",
    "--pipeline-model-parallel-size 64": "is 64; allowed: a divisor of the 32",
    "--context-parallel-size -4": "is -4; allowed: 1 or more",
    "--context-parallel-size 0": "is 0; allowed: 1 or more",
    "--expert-model-parallel-size -8": "is -8; allowed: 1 or more",
    "--expert-model-parallel-size 8": "is 8; allowed: 1 without --num-experts",
    "--num-experts 8 --expert-tensor-parallel-size -1": "is -1; allowed: 1 or more",
    "--num-experts 8 --expert-tensor-parallel-size 0": "is 0; allowed: 1 or more",
    "--num-experts 8 --expert-tensor-parallel-size 3": "is 3; allowed: a divisor of",
    "--num-experts 8 --expert-model-parallel-size 3": "is 3; allowed: a divisor of the 8",
    "--num-experts 8 --expert-model-parallel-size 8 --expert-tensor-parallel-size 16": (
        "is 8; allowed: numbers that, times 16 expert-tensor-parallel"
    ),
    "--num-experts -8": "is -8; allowed: 0 or more",
    "--num-experts 8 --moe-router-topk 0": "is 0; allowed: 1 or more",
    "--num-experts 8 --moe-router-topk -2": "is -2; allowed: 1 or more",
    "--num-experts 8 --moe-router-topk 9": "is 9; allowed: at most the 8",
    "--num-experts 8 --moe-ffn-hidden-size 0": "is 0; allowed: 1 or more",
    "--num-experts 8 --moe-ffn-hidden-size -4": "is -4; allowed: 1 or more",
    "--num-experts 8 --moe-layer-freq 0": "is 0; allowed: 1 or more",
    "--num-experts 8 --moe-layer-freq -2": "is -2; allowed: ",
    "--num-experts 8 --moe-layer-freq [0,1]": "is 0 1; allowed: ",
    "--num-experts 8 --moe-layer-freq [2]*32": "; allowed: ",
    "--num-experts 8 --moe-shared-expert-intermediate-size -64": "is -64; allowed: 1 or more",
    "--num-experts 1000000000": "is 1000000000; allowed: up to 100000",
    "--num-layers 0": "is 0; allowed: 1 or more",
    "--num-layers -32": "is -32; allowed: 1 or more",
    "--num-layers 1000000000": "is 1000000000; allowed: up to 100000",
    "--num-layers 3.5": "--num-layers",
    "--hidden-size -4096": "is -4096; allowed: 1 or more",
    "--hidden-size 1": "allowed: a divisor of the 1",
    "--hidden-size 99999999999999999999": "allowed: less than 2^63",
    "--ffn-hidden-size 0": "is 0; allowed: 1 or more",
    "--ffn-hidden-size -1": "is -1; allowed: 1 or more",
    "--ffn-hidden-size 14337 --tensor-model-parallel-size 2": "is 2; allowed: a divisor of the 14337",
    "--num-attention-heads 0": "is 0; allowed: 1 or more",
    "--num-attention-heads 31": "is 31; allowed: a divisor of the 4096",
    "--num-query-groups 0": "is 0; allowed: 1 or more",
    "--num-query-groups -8": "is -8; allowed: 1 or more",
    "--num-query-groups 64": "is 64; allowed: a divisor of the 32",
    "--kv-channels 0": "is 0; allowed: 1 or more",
    "--kv-channels -128": "is -128; allowed: 1 or more",
    "--kv-channels 127": "127",
    "--vocab-size 0": "is 0; allowed: 1 or more",
    "--vocab-size -5": "is -5; allowed: 1 or more",
    "--make-vocab-size-divisible-by 0": "is 0; allowed: 1 or more",
    "--make-vocab-size-divisible-by -128": "is -128; allowed: 1 or more",
    "--max-position-embeddings -1": "is -1; allowed: 1 or more",
    "--max-position-embeddings 100": "is 100; allowed: at least the 8192",
    "--seq-length 0": "is 0; allowed: 1 or more",
    "--seq-length -8192": "is -8192; allowed: 1 or more",
    "--micro-batch-size 0": "is 0; allowed: 1 or more",
    "--micro-batch-size -1": "is -1; allowed: 1 or more",
    "--micro-batch-size 1024 --tensor-model-parallel-size 2": "--global-batch-size is 512; allowed",
    "--global-batch-size 0": "is 0; allowed: 1 or more",
    "--global-batch-size -512": "is -512; allowed: 1 or more",
    "--num-layers-per-virtual-pipeline-stage 0 --pipeline-model-parallel-size 4": "is 0; allowed: 1 or more",
    "--num-layers-per-virtual-pipeline-stage -1 --pipeline-model-parallel-size 4": "is -1; allowed: 1 or",
    "--num-layers-per-virtual-pipeline-stage 3 --pipeline-model-parallel-size 4": "is 3; allowed: divisors",
    "--num-layers-per-virtual-pipeline-stage 64 --pipeline-model-parallel-size 4": "is 64; allowed: divisors",
    "--num-virtual-stages-per-pipeline-rank 0 --pipeline-model-parallel-size 4": "is 0; allowed: 1 or more",
    "--num-virtual-stages-per-pipeline-rank 3 --pipeline-model-parallel-size 4": "is 3; allowed: divisors",
    "--num-virtual-stages-per-pipeline-rank 2": "is 2; allowed: 1 with one pipeline rank",
    "--num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 2": "both given",
    "--num-virtual-stages-per-pipeline-rank 2 --pipeline-model-parallel-size 4 --global-batch-size 32": (
        "is 2; allowed: 1 with fewer than 4 micro-batches of a rank in a step, here 2"
    ),
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 0": "is 0; allowed: 1 or",
    "--recompute-granularity full --recompute-method block --recompute-num-layers -1": "is -1; allowed: 1 or",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 33": "is 33; allowed: 1 to",
    "--recompute-granularity full --recompute-num-layers 1": "--recompute-method is missing",
    "--recompute-granularity full --recompute-method uniform": "--recompute-num-layers is missing",
    "--recompute-granularity selective --recompute-modules everything": "is everything; allowed: core_attn",
    "--num-distributed-optimizer-instances 0": "is 0; allowed: 1 or more",
    "--num-distributed-optimizer-instances 3": "is 3; allowed: divisors of the 64",
    "--hidden-dropout -0.1": "is -0.1; allowed: 0 to less than 1",
    "--hidden-dropout 2": "is 2.0; allowed: 0 to less than 1",
    "--hidden-dropout nan": "is nan; allowed: finite numbers",
    "--context-parallel-size 4 --cp-comm-type ring": "is ring; allowed: p2p, all_gather",
    "--context-parallel-size 4 --cp-comm-type a2a+p2p": "two --hierarchical-context-parallel-sizes",
    "--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 0 --cp-comm-type a2a+p2p": "is 0;",
    "--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 4 --cp-comm-type a2a+p2p": "is 2 4;",
    "--tensor-model-parallel-size 8 --sequence-parallel --seq-length 8188": (
        "is 8; allowed: a divisor of the 8188 tokens"
    ),
    "--fp16": "--bf16 and --fp16 are both given",
    "--rotary-base nan": "--rotary-base",
    "--rotary-base inf": "--rotary-base",
    "--rotary-base 0": "--rotary-base is 0",
    "--rotary-base -5": "--rotary-base is -5",
    "--fope-gain nan": "--fope-gain is nan",
    "--fope-train-length 0": "--fope-train-length is 0",
    "--fope-train-length 5": "--fope-train-length is 5",
    "--norm-epsilon -1": "is -1.0; allowed: more than 0",
    "--rotary-percent 0": "is 0.0; allowed: more than 0, up to 1",
    "--lr nan": "--lr is nan; allowed: finite numbers",
    "--train-iters -1": "is -1; allowed: 1 or more",
    "--yaml-cfg run.yaml": "--yaml-cfg is given",
    "--tensor-model-parallel 2": "--tensor-model-parallel",
    "8 16": "8 16",
}  # fmt: skip


@pytest.mark.parametrize("words", NONSENSE_CLUSTERS)
def test_clusters(words: str) -> None:
    assert NONSENSE_CLUSTERS[words] in refusal("plan", *shlex.split(words), "--", *PLAN.split())


def test_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, expected in NONSENSE_PLANS.items():
        found = refusal("plan", *CLUSTER.split(), "--", *PLAN.split(), *words.split())
        assert expected in found, (words, found)
    assert not list(tmp_path.iterdir())


# ladder ------------------------------------------------------------------------------------------------

LADDER = """
launcher = ["torchrun", "-m", "megatron_fope", "pretrain"]
gpus = 4
save = "ladder"
[start]
checkpoint = "base"
from-rope = "immediate"
[megatron]
num-layers = 4
hidden-size = 64
num-attention-heads = 4
group-query-attention = true
num-query-groups = 2
micro-batch-size = 1
global-batch-size = 4
train-iters = 4
save-interval = 2
eval-interval = 4
mock-data = true
[[stage]]
lr = 1e-3
seq-length = 128
[[stage]]
name = "long"
lr = 1e-3
seq-length = 512
"""
LONG = 'name = "long"'
NONSENSE_LADDERS = {
    # old text -> new text, and a part of the line
    f'{LONG} -> name = ".."': "stage 2: name is '..'; allowed: ",
    f'{LONG} -> name = "."': "name is '.'; allowed: ",
    f'{LONG} -> name = ""': "name is ''; allowed: ",
    f'{LONG} -> name = " long"': "name is ' long'; allowed: ",
    f'{LONG} -> name = "long "': "name is 'long '; allowed: ",
    f'{LONG} -> name = "long\\n"': "name is 'long\\n'; allowed: ",
    f'{LONG} -> name = "/tmp/long"': "name is '/tmp/long'; allowed: ",
    f'{LONG} -> name = "a/../../b"': "name is 'a/../../b'; allowed: ",
    f'{LONG} -> name = "a\\\\b"': "allowed: up to 100",
    f'{LONG} -> name = "-long"': "name is '-long'; allowed: ",
    f'{LONG} -> name = ".hidden"': "name is '.hidden'; allowed: ",
    f'{LONG} -> name = "..."': "name is '...'; allowed: ",
    f'{LONG} -> name = "lo\u0308ng"': "allowed: up to 100",
    f'{LONG} -> name = "\uff0e\uff0e"': "allowed: up to 100",
    f'{LONG} -> name = "lang\u200b"': "allowed: up to 100",
    f'{LONG} -> name = "\u0661"': "allowed: up to 100",
    f'{LONG} -> name = "iter_0000004"': "no name that Megatron gives",
    f'{LONG} -> name = "release"': "no name that Megatron gives",
    f'{LONG} -> name = "latest_checkpointed_iteration.txt"': "no name that Megatron gives",
    f'{LONG} -> name = "{"x" * 300}"': "allowed: up to 100",
    f"{LONG} -> name = 7": "name is 7; allowed: a string",
    f'{LONG} -> name = "STAGE1-128"': "is 'stage1-128' in 2 stages; use different ones",
    'save = "ladder" -> save = ""': "save is '', which comes to ''",
    'save = "ladder" -> save = "$NOTHING"': "save is '$NOTHING', which comes to ''",
    'checkpoint = "base" -> checkpoint = ""': "[start] checkpoint is ''",
    'checkpoint = "base" -> checkpoint = "b\\u0000"': "[start] checkpoint is ",
    "gpus = 4 -> gpus = 0": "gpus is 0; allowed: 1 or more",
    "gpus = 4 -> gpus = -4": "gpus is -4; allowed: 1 or more",
    "gpus = 4 -> gpus = 2.5": "gpus is 2.5; allowed: a whole number",
    "gpus = 4 -> gpus = true": "gpus is True; allowed: a whole number",
    f"{LONG} -> tensor-model-parallel-size = -1": "stage 2: --tensor-model-parallel-size is -1; all",
    f"{LONG} -> tensor-model-parallel-size = 0": "--tensor-model-parallel-size is 0; allowed: 1 or more",
    f"{LONG} -> pipeline-model-parallel-size = -2": "--pipeline-model-parallel-size is -2; allowed",
    f"{LONG} -> context-parallel-size = -2": "--context-parallel-size is -2; allowed: 1 or more",
    f"{LONG} -> context-parallel-size = 0": "--context-parallel-size is 0; allowed: 1 or more",
    f"{LONG} -> expert-model-parallel-size = 4": "--expert-model-parallel-size is 4; allowed: 1 without",
    f"{LONG} -> lr = nan": "TOML",  # lr is there twice
    "lr = 1e-3 -> lr = nan": "stage 2: --lr is nan; allowed: finite numbers",
    "lr = 1e-3 -> lr = inf": "--lr is inf; allowed: finite numbers",
    "lr = 1e-3 -> lr = -1e-3": "--lr is -0.001; allowed: more than 0",
    "lr = 1e-3 -> lr = 0": "--lr is 0.0; allowed: more than 0",
    "lr = 1e-3 -> lr = 'nan'": "--lr is nan; allowed: finite numbers",
    "lr = 1e-3 -> lr = []": "stage 2: lr is missing",
    "lr = 1e-3 -> lr = 1979-05-27": "stage 2: lr holds datetime",
    f"{LONG} -> min-lr = 1": "--min-lr is 1; allowed: up to --lr 0.001",
    f"{LONG} -> min-lr = -1": "--min-lr is -1.0; allowed: 0 or more",
    f"{LONG} -> weight-decay = nan": "--weight-decay is nan; allowed: finite numbers",
    f"{LONG} -> clip-grad = -1": "--clip-grad is -1.0; allowed: 0 or more",
    f"{LONG} -> adam-beta2 = 1.5": "--adam-beta2 is 1.5; allowed: 0 to less than 1",
    f"{LONG} -> attention-dropout = -0.5": "--attention-dropout is -0.5; allowed: 0 to less than 1",
    f"{LONG} -> lr-warmup-fraction = 2": "--lr-warmup-fraction is 2.0; allowed: 0 to less than 1",
    f"{LONG} -> lr-warmup-iters = -3": "--lr-warmup-iters is -3; allowed: 0 or more",
    f"{LONG} -> seed = -1": "--seed is -1; allowed: 1 to 2^32 - 1",
    f"{LONG} -> eval-iters = -1": "--eval-iters is -1; allowed: 0 or more",
    f"{LONG} -> num-workers = -1": "--num-workers is -1; allowed: 0 or more",
    f"{LONG} -> rotary-base = 0": "--rotary-base is 0",
    f"{LONG} -> train-samples = 100": "--train-samples is given; a ladder counts iterations",
    f"{LONG} -> yaml-cfg = 'a.yaml'": "--yaml-cfg is given",
    f"{LONG} -> 'load=x' = true": "stage 2: 'load=x' is no flag",
    f"{LONG} -> '--lr' = 3": "stage 2: '--lr' is no flag",
    f"{LONG} -> wandb-exp-name = ['--load', 'x']": "wandb-exp-name holds '--load', which is a flag",
    f"{LONG} -> wandb-exp-name = '--load=base'": "wandb-exp-name holds '--load=base', which is a flag",
    "seq-length = 512 -> seq-length = -512": "--seq-length is -512",
    "seq-length = 512 -> seq-length = 0": "--seq-length is 0",
    "train-iters = 4 -> train-iters = 0": "--train-iters is 0; allowed: 1 or more",
    "save-interval = 2 -> save-interval = -2": "--save-interval is -2; allowed: 0 or more",
    "save-interval = 2 -> save-interval = 0": "--save-interval is 0; allowed: 1 or more",
    "eval-interval = 4 -> ": (
        "stage 1: eval-interval is missing; requires a value in [[stage]] or in [megatron]"
    ),
    "eval-interval = 4 -> eval-interval = 0": "--eval-interval is 0; allowed: 1 or more",
    "micro-batch-size = 1 -> micro-batch-size = 0": "--micro-batch-size is 0; allowed: 1 or more",
    "global-batch-size = 4 -> global-batch-size = -4": "--global-batch-size is -4; allowed: 1 or more",
    "num-query-groups = 2 -> num-query-groups = 0": "--num-query-groups is 0; allowed: 1 or more",
}  # fmt: skip


def test_ladders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTHING", "")
    SyntheticCheckpoint(Path("base"))
    before = sorted(tmp_path.rglob("*"))
    schedule = tmp_path / "ladder.toml"
    for change, expected in NONSENSE_LADDERS.items():
        old, _, new = change.partition(" -> ")
        head, found, tail = LADDER.rpartition(old)
        assert found, change
        schedule.write_text(head + new + tail)
        line = refusal("ladder", str(schedule))
        assert line.startswith(str(schedule)) and expected in line, (change, line)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, schedule])


@pytest.mark.parametrize(
    "start", ["ladder/long", "./ladder/../ladder/long/", "ladder/link", "other", "{here}/ladder/long"]
)
def test_a_stage_does_not_take_its_start_for_itself(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the start is spelled: the stage would be taken for finished."""
    monkeypatch.chdir(tmp_path)
    SyntheticCheckpoint(Path("ladder/long"))
    Path("ladder/link").symlink_to("long")
    Path("other").symlink_to("ladder")
    start = {"other": "other/long"}.get(start, start.replace("{here}", str(tmp_path)))
    Path("ladder.toml").write_text(LADDER.replace('"base"', f'"{start}"'))
    expected = "ladder.toml: stage 2: name is 'long': its folder ladder/long is what the ladder starts from"
    assert refusal("ladder", "ladder.toml", "--run") == expected


def test_two_stages_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SyntheticCheckpoint(Path("base"))
    Path("ladder/stage1-128").mkdir(parents=True)
    Path("ladder/long").symlink_to("stage1-128")
    Path("ladder.toml").write_text(LADDER)
    assert refusal("ladder", "ladder.toml").endswith("its folder ladder/long is that of stage 'stage1-128'")


# prepare-data ------------------------------------------------------------------------------------------

PREPARE = "--input in/a.jsonl --output-prefix out"
NONSENSE_DATA = {
    # flags behind those of PREPARE, and a part of the line
    "--input ''": "--input: '' given",
    "--input none.txt": "--input: none.txt does not exist",
    "--input in/a.jsonl none.txt": "--input: none.txt does not exist",
    "--input empty": "--input: no file in empty matches --include",
    "--input in --include *.csv": "--input: no file in in matches --include *.csv",
    "--input in --exclude *": "matches --include",
    "--input blank.txt": "--input: no document in blank.txt (1 empty)",
    "--input blank.jsonl": "--input: no document in blank.jsonl",
    "--input blank.json": "--input: no document in blank.json",
    "--input bom.txt": "--input: bom.txt: not UTF-8",
    "--input array.json": "--input: array.json: holds no JSON object in its first line",
    "--input pretty.json": "--input: pretty.json: holds no JSON object in its first line",
    "--input words.jsonl": "--input: words.jsonl:1: not JSON at column 1",
    "--input number.jsonl": "--input: number.jsonl:1: the value of 'text' is a int, not a string",
    "--input null.jsonl": "--input: null.jsonl:1: the value of 'text' is a NoneType, not a string",
    "--input latin.jsonl": "--input: latin.jsonl:1: not UTF-8: byte 0xe9",
    "--input packed.jsonl.gz": "--input: packed.jsonl.gz: not UTF-8: byte 0x8b",
    "--input packed.jsonl.gz --format jsonl": "(it looks like gzip",
    "--input pipe": "--input: pipe: is not a regular file",
    "--input /dev/zero": "--input: /dev/zero: is not a regular file",
    "--input link": "--input: link: cannot be read",
    "--json-key body": "--input: in/a.jsonl:1: has no key 'body'",
    "--json-key ''": "--input: in/a.jsonl:1: has no key ''",
    "--output-prefix ''": "--output-prefix: '' given",
    "--output-prefix out/": "--output-prefix: 'out/' given",
    "--output-prefix .": "--output-prefix: '.' given",
    "--output-prefix in/..": "--output-prefix: 'in/..' given",
    "--output-prefix out.bin": "--output-prefix: 'out.bin' given",
    "--output-prefix out.idx": "--output-prefix: 'out.idx' given",
    "--output-prefix out.json": "--output-prefix: 'out.json' given",
    "--output-prefix 'a\nb'": "use a name of printable characters",
    f"--output-prefix {'x' * 250}": "--output-prefix has a name of 250 bytes",
    "--output-prefix in/a.jsonl/out": "--output-prefix: cannot write in/a.jsonl/out",
    "--output-prefix /proc/none/out": "--output-prefix: cannot write /proc/none/out",
    "--output-prefix old": "--output-prefix: old.json exists",
    "--output-prefix folder --overwrite": "--output-prefix: folder.bin is a folder",
    "--input old.json --output-prefix old --overwrite": "old.json would replace an input file",
    "--holdout-fraction 1": "--holdout-fraction is 1.0; allowed: ",
    "--holdout-fraction -0.1": "--holdout-fraction is -0.1; allowed: ",
    "--holdout-fraction nan": "--holdout-fraction is nan",
    "--holdout-fraction inf": "--holdout-fraction is inf",
    "--holdout-fraction 0.999": "leaves one side empty",
    "--holdout-seed -1": "--holdout-seed is -1; allowed: ",
    "--shuffle-seed -1": "--shuffle-seed is -1; allowed: ",
    "--workers 0": "--workers is 0; allowed: ",
    "--workers -4": "--workers is -4; allowed: ",
    "--workers two": "--workers is 'two'; allowed: whole numbers",
    "--workers 1.5": "--workers is '1.5'; allowed: whole numbers",
    "--workers 99999999999999999999": "--workers is 99999999999999999999",
    "--format csv": "--format is 'csv'; allowed: auto, text, jsonl",
    "--on-bad-file ignore": "--on-bad-file is 'ignore'; allowed: refuse, skip",
    "--input": "--input requires at least one value",
    "--outputprefix x": "unrecognized arguments: --outputprefix x",
    "--overwrite=maybe": "--overwrite takes no value, but 'maybe' is given",
    "--workers 1000000": "--workers is 1000000; allowed: ",
    "--tokenizer gpt2": "--tokenizer: 'gpt2' is neither 'bytes' nor an existing",
    "--tokenizer ''": "--tokenizer: ''",
    "--tokenizer blank.json": "--tokenizer: blank.json is not a tokenizer.json",
    "--tokenizer empty": "--tokenizer: ",
    "--eod-token x": "--eod-token: 'x' given, but --tokenizer bytes",
}  # fmt: skip
NONSENSE_RECALL = {
    "--length 7": "--length is 7; allowed: ",
    "--length -64": "--length is -64; allowed: ",
    "--documents 0": "--documents is 0; allowed: ",
    "--keys 1": "--keys is 1; allowed: ",
    "--keys 1000": "--keys is 1000; allowed: ",
    "--values 1": "--values is 1; allowed: ",
    "--pair-fraction nan": "--pair-fraction is nan",
    "--pair-fraction 0": "--pair-fraction is 0.0; allowed: ",
    "--seed -1": "--seed is -1; allowed: ",
    "--text none": "--text: 'none' given",
    "--text old --output-prefix old --overwrite": "would replace an input file",
    "--output-prefix old": "old.json exists",
}


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that are good and bad, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "empty", "folder.bin"):
        (tmp_path / folder).mkdir()
    contents = {
        "in/a.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
        "blank.txt": b" \n",
        "blank.jsonl": b"\n\n",
        "blank.json": b"",
        "bom.txt": "text".encode("utf-16"),
        "array.json": b'[{"text": "x"}]',
        "pretty.json": b'{\n"text": "x"\n}',
        "words.jsonl": b"words\n",
        "number.jsonl": b'{"text": 3}\n',
        "null.jsonl": b'{"text": null}\n',
        "latin.jsonl": b'{"text": "\xe9"}\n',
        "packed.jsonl.gz": gzip.compress(b'{"text": "x"}\n'),
        **{f"old.{suffix}": b'{"text": "x"}\n' for suffix in ("bin", "idx", "json")},
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    return tmp_path


def test_data(corpus: Path) -> None:
    before = sorted(corpus.rglob("*"))
    for words, expected in NONSENSE_DATA.items():
        line = refusal("prepare-data", *PREPARE.split(), *shlex.split(words))
        assert expected in line, (words, line)
        assert sorted(corpus.rglob("*")) == before, words


def test_recall_data(corpus: Path) -> None:
    before = sorted(corpus.rglob("*"))
    for words, expected in NONSENSE_RECALL.items():
        common = "--output-prefix out --length 64 --documents 2"
        line = refusal("make-recall-data", *common.split(), *shlex.split(words))
        assert expected in line, (words, line)
    assert sorted(corpus.rglob("*")) == before
