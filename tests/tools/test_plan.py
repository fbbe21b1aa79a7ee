"""``megatron-fope plan``: what it calculates against what real training holds, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Launcher
from launch import ROOT, TINY_MODEL

from megatron_fope.arguments.layout import Layout, check_layout
from megatron_fope.common.errors import UserError
from megatron_fope.tools.cli import main
from megatron_fope.tools.planning import host
from megatron_fope.tools.planning.activations import activations, in_flight
from megatron_fope.tools.planning.cluster import Cluster
from megatron_fope.tools.planning.communication import communication, cp_bytes
from megatron_fope.tools.planning.layout import legal_layouts
from megatron_fope.tools.planning.model import read_model, read_training
from megatron_fope.tools.planning.search import LONGEST_BUBBLE, plan
from megatron_fope.tools.planning.states import parameters, states

LLAMA = shlex.split(
    "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --bf16 "
    "--group-query-attention --num-query-groups 8 --kv-channels 128 --vocab-size 128256 --micro-batch-size 1 "
    "--attention-dropout 0 --hidden-dropout 0 --position-embedding-type fope "
    "--no-create-attention-mask-in-dataloader --use-distributed-optimizer --seq-length 8192 "
    "--global-batch-size 512"
)
LLAMA_8B = [
    *LLAMA,
    *shlex.split("--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32"),
]
LLAMA_70B = [
    *LLAMA,
    *shlex.split("--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64"),
]

HELD = """
import json, os
from megatron.training import training
from bench.allocation import storages

original = training.train_step

def train_step(forward_step_func, data_iterator, model, optimizer, *rest, **options):
    result = original(forward_step_func, data_iterator, model, optimizer, *rest, **options)
    own = [p.data for chunk in model for p in chunk.parameters()]
    buffers = [b.grad_data for chunk in model for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    held = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        held += [p.data for group in one.optimizer.param_groups for p in group["params"]]
        held += [t for state in one.optimizer.state.values() for name, t in state.items() if name != "step"]
    model_memory = storages(own)
    held = [t for t in held if t.untyped_storage().data_ptr() not in model_memory]
    sizes = [sum(t.numel() * t.element_size() for t in tensors) for tensors in (own, buffers, held)]
    with open(f"{FOLDER}/{os.environ['RANK']}", "w") as file:
        json.dump(sizes, file)
    return result

training.train_step = train_step
"""
"""Bytes of a rank after its first step: parameters, gradients, what the optimizer holds besides."""

KEPT = """
import json, os, torch
from megatron_fope.training import pretrain
from bench.allocation import storages

original = pretrain.forward_step

def forward_step(data_iterator, model):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        result = original(data_iterator, model)
    known = storages([*model.parameters(), *model.module.buffers()])
    # Looked at afterwards: recomputation empties tensors after they were saved.
    kept = sum(size for address, size in storages(saved).items() if address not in known)
    with open(f"{FOLDER}/{os.environ['RANK']}", "w") as file:
        json.dump([kept], file)
    return result

pretrain.forward_step = forward_step
"""
"""Bytes that one micro-batch keeps for its backward pass."""

STATES = {
    "TP": (2, "--tensor-model-parallel-size 2 --sequence-parallel --bf16"),
    "PP, untied": (2, "--pipeline-model-parallel-size 2 --untie-embeddings-and-output-weights --bf16"),
    "PP, tied, learnable": (
        2,
        "--pipeline-model-parallel-size 2 --bf16 --swiglu --normalization RMSNorm --disable-bias-linear "
        "--qk-layernorm --fope-learnable",
    ),
    "DP, distributed optimizer": (2, "--use-distributed-optimizer --bf16"),
    "CP, distributed optimizer, fp32": (2, "--use-distributed-optimizer --context-parallel-size 2"),
    "EP, distributed optimizer": (
        2,
        "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --expert-model-parallel-size 2 "
        "--use-distributed-optimizer --bf16 --disable-bias-linear",
    ),
}

_LONGER = (
    "--bf16 --seq-length 256 --max-position-embeddings 256 --hidden-size 128 --global-batch-size 2 "
    "--no-create-attention-mask-in-dataloader --no-bias-swiglu-fusion --no-bias-gelu-fusion "
)
_EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 192"
_SELECTIVE = _LONGER + "--recompute-granularity selective "
_GATED = "--swiglu --disable-bias-linear "
KEEPING = {
    "plain": (1, _SELECTIVE),
    "norms recomputed": (1, _SELECTIVE + "--recompute-modules core_attn layernorm"),
    "gated": (1, _SELECTIVE + _GATED),
    "gated, TP": (2, _SELECTIVE + _GATED + "--tensor-model-parallel-size 2 --sequence-parallel"),
    "experts": (1, _SELECTIVE + _GATED + _EXPERTS),
    "not recomputed": (1, _LONGER),
    "layers recomputed": (
        1,
        _LONGER + "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
    ),
}
"""Megatron's attention keeps scores; recomputed, it keeps what a flash kernel keeps."""


@pytest.fixture(scope="module")
def parse() -> Any:
    from megatron_fope.arguments.parser import megatron_parser
    from megatron_fope.arguments.parser import parse as parse_words

    parser = megatron_parser("test")
    return lambda *words: parse_words(parser, [word for text in words for word in _words(text)])


def _words(text: str | list[str]) -> list[str]:
    return shlex.split(text) if isinstance(text, str) else text


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as running:
        yield running


TINY = [*TINY_MODEL, "--train-iters", "1", "--position-embedding-type", "fope"]


def layout_on(ranks: int, args: Any) -> Layout:
    args.world_size = ranks
    return Layout.of(args)


def measured(launcher: Launcher, folder: Path, ranks: int, flags: str, hook: str) -> list[list[int]]:
    """What each rank wrote, in the order of ranks."""
    argv = ["--cpu", "pretrain", *TINY, *shlex.split(flags)]
    launcher.output(ranks, argv, folder / "log", hook=f"FOLDER = {str(folder)!r}\n{hook}")
    return [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]


@pytest.mark.launch
@pytest.mark.parametrize("case", STATES)
def test_parameters_gradients_and_optimizer(
    case: str, launcher: Launcher, parse: Any, tmp_path: Path
) -> None:
    """To the byte, on every rank."""
    ranks, flags = STATES[case]
    args = parse(TINY, flags)
    model, training = read_model(args), read_training(args)
    layout = layout_on(ranks, args)
    found = measured(launcher, tmp_path, ranks, flags, HELD)
    for rank in range(ranks):
        stage = rank * layout.pp // ranks
        held = states(parameters(model, layout, stage), training, layout)
        assert found[rank] == [held.parameters, held.gradients, held.optimizer]


@pytest.mark.launch
@pytest.mark.parametrize("case", KEEPING)
def test_activations(case: str, launcher: Launcher, parse: Any, tmp_path: Path) -> None:
    """Within 3%: what is not counted is statistics of norms, masks of tokens and states of generators."""
    ranks, flags = KEEPING[case]
    args = parse(TINY, flags)
    model, training = read_model(args), read_training(args)
    layout = layout_on(ranks, args)
    calculated = activations(model, training, layout, stage=0)
    # The 16-bit logits are alive when those in float32 are made, but are not kept.
    logits = 2 * training.micro_batch * training.seq_length * model.padded_vocabulary(layout.tp) / layout.tp
    for (kept,) in measured(launcher, tmp_path, ranks, flags, KEPT):
        assert 0.97 < (calculated.kept + calculated.output - logits) / kept <= 1, kept


# Arithmetic --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, published", [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496)], ids=["8B", "70B"]
)
def test_parameters_of_published_models(flags: list[str], published: int, parse: Any) -> None:
    assert parameters(read_model(parse(flags)), Layout(), stage=0).total == published


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "--tensor-model-parallel-size 4 --sequence-parallel",
        "--num-experts 8 --moe-router-topk 2 --expert-model-parallel-size 8 --tensor-model-parallel-size 2 "
        "--sequence-parallel",
    ],
)
def test_megatrons_own_estimate(layout: str, parse: Any) -> None:
    """The same to the byte for what its formula covers."""
    from megatron_fope import compat

    found = plan(parse(LLAMA_8B, layout), Cluster(64, 80))
    held = found.own.memory.states
    if "experts" in layout and compat.megatron_version().release < (0, 18):
        pytest.skip("through 0.17 it does not divide the experts among ranks")
    assert found.megatron[0] == pytest.approx(held.parameters + held.gradients + held.optimizer, rel=1e-9)
    changed = plan(parse(LLAMA_8B, layout, "--context-parallel-size 2"), Cluster(64, 80))
    assert changed.megatron[0] > found.megatron[0], "it does not share the optimizer among CP ranks"
    assert changed.own.memory.states == held, "nothing changes for parameters when CP takes from DP"


def test_bytes_of_context_parallelism(parse: Any) -> None:
    """Counted by hand: 8 KV and 32 query heads of 128 channels, bf16, 1024 tokens of a rank, 2 layers."""
    key_and_value = 1024 * 2 * 8 * 128 * 2
    query_and_output = 1024 * 2 * 32 * 128 * 2

    def sent(flags: str, cp: int = 8) -> float:
        args = parse(LLAMA_8B, f"--num-layers 2 --context-parallel-size {cp} {flags}")
        model, training = read_model(args), read_training(args)
        return cp_bytes(model, training, layout_on(8, args), [0, 1]) / 2

    assert sent("") == 3 * 7 * key_and_value
    assert sent("--cp-comm-type a2a") == 2 * 7 / 8 * (key_and_value + query_and_output)
    assert (
        sent("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
        == 4 * 7 * key_and_value
    )
    half = 7 / 8 * 2 * (key_and_value + query_and_output) + 3 * 7 * key_and_value
    assert sent("--cp-comm-type p2p a2a") * 2 == half
    both = "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 4"
    assert sent(both) == 2 / 2 * (key_and_value + query_and_output) + 3 * 3 * key_and_value


def test_micro_batches_in_flight(parse: Any) -> None:
    """The schedules of Narayanan et al. (arXiv 2104.04473), counted by hand."""
    training = read_training(parse(LLAMA_8B))
    four = Layout(pp=4, dp=1)
    assert [in_flight(training, four, stage) for stage in range(4)] == [4, 3, 2, 1]
    chunks = Layout(pp=4, dp=1, vpp=2)
    assert [in_flight(training, chunks, stage) * 2 for stage in range(4)] == [11, 9, 7, 5]
    assert in_flight(training, Layout(pp=4, dp=256), 0) == 2, "no more than there are"


def test_fope_of_a_rank(parse: Any) -> None:
    """sin and cos of the rank's positions, once; both coefficients of all KV heads in every layer."""
    args = parse(LLAMA_8B, "--context-parallel-size 2 --pipeline-model-parallel-size 4")
    memory = plan(args, Cluster(64, 80)).own.memory
    _, d_in, d_out = read_model(args).geometry.coefficient_shape
    assert memory.table == 2 * 4096 * d_in * 4
    assert memory.coefficients == 8 * 2 * 8 * d_in * d_out * 4
    assert plan(parse(LLAMA_8B, "--position-embedding-type rope"), Cluster(64, 80)).own.memory.table == 0


# Search ------------------------------------------------------------------------------------------------


def test_every_layout_is_one_that_training_accepts(parse: Any) -> None:
    """Numbers that are no powers of two, so that many layouts do not divide them."""
    flags = (
        "--num-experts 8 --moe-router-topk 2 --seq-length 8208 --global-batch-size 480 --num-query-groups 1 "
        "--ffn-hidden-size 14400"
    )
    args = parse(LLAMA_8B, flags)
    cluster = Cluster(48, 80, gpus_per_node=12)
    layouts = list(legal_layouts(read_model(args), read_training(args), cluster, None))
    assert len(layouts) > 50 and len(set(layouts)) == len(layouts)
    for layout in layouts:
        given = parse(LLAMA_8B, flags, layout.flags(moe=True))
        given.world_size = 48
        check_layout(given)
        assert Layout.of(given) == layout


def test_mask_of_the_data_loader(parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """S x S bytes for every sample, and said."""
    masked = [word for word in LLAMA_8B if "create-attention-mask" not in word]
    both = [plan(parse(flags), Cluster(64, 80)).own for flags in (LLAMA_8B, masked)]
    without, with_it = (one.memory.activations for one in both)
    assert with_it.inputs - without.inputs == 8192**2 and with_it.kept == without.kept
    main(["plan", "--gpus", "64", "--gpu", "h100", "--", *masked, "--transformer-impl", "local"])
    text = capsys.readouterr().out
    assert "--no-create-attention-mask-in-dataloader" in text and "S x S scores in every layer" in text


@pytest.mark.parametrize(
    ("flags", "grows"),
    [
        ("", 2),
        ("--attention-backend unfused", 4),
        ("--attention-dropout 0.1", 4),
    ],
)
def test_memory_of_a_cpu(parse: Any, flags: str, grows: int) -> None:
    """Attention that is not fused makes a long sequence take the square."""
    common = (
        "--transformer-impl local --no-create-attention-mask-in-dataloader --attention-backend auto "
        "--max-position-embeddings 16384"
    )
    sizes = [
        read_training_kept(parse(TINY, common, flags, f"--seq-length {length}")) for length in (8192, 16384)
    ]
    assert sizes[1] / sizes[0] == pytest.approx(grows, rel=0.1)


def read_training_kept(args: Any) -> float:
    """Bytes that a run on the CPU keeps, without what does not depend on the length."""
    short = copy.copy(args)
    short.seq_length = 64
    return host.host_bytes(args) - host.host_bytes(short)


def test_cpu_runs_that_do_not_fit(
    parse: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parse(TINY, "--transformer-impl local --no-create-attention-mask-in-dataloader")
    needed = host.host_bytes(args)
    memory = {"total": needed + 1, "free": needed + 1}
    monkeypatch.setattr(host, "host_memory", lambda: tuple(memory.values()))
    host.check_host_memory(args)
    assert capsys.readouterr().out == ""
    memory["free"] = needed - 1
    host.check_host_memory(args)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("> CPU runtime: warning: --seq-length 64 with --micro-batch-size 2 takes about")
    memory["total"] = needed - 1
    with pytest.raises(UserError, match=r"on this machine \(1 rank\), which has"):
        host.check_host_memory(args)
    args.mtp_num_layers = 1
    host.check_host_memory(args)  # not known, so nothing is said


@pytest.mark.launch
def test_cpu_run_that_does_not_fit_does_not_start(launcher: Launcher, tmp_path: Path) -> None:
    flags = ["--seq-length", "1000000000", "--max-position-embeddings", "1000000000"]
    code, log = launcher.run(1, ["--cpu", "pretrain", *TINY, *flags], tmp_path / "log")
    (line,) = [line for line in log.splitlines() if line.startswith("megatron-fope: error: ")]
    assert code == 2 and "--seq-length 1000000000" in line and "building GPT model" not in log


def test_order_and_verdict(parse: Any) -> None:
    found = plan(parse(LLAMA_70B, "--tensor-model-parallel-size 8 --sequence-parallel"), Cluster(64, 80))
    assert not found.own.fits and found.own.memory.total > found.cluster.usable
    assert found.best and all(one.memory.total <= found.cluster.usable for one in found.best)
    late = [one.bubble > LONGEST_BUBBLE for one in found.best]
    assert late == sorted(late)
    for group in (True, False):
        costs = [
            one.communication.cost for one, is_late in zip(found.best, late, strict=True) if is_late == group
        ]
        assert costs == sorted(costs)
    again = plan(parse(LLAMA_70B, found.best[0].layout.flags(moe=False)), Cluster(64, 80))
    assert again.own == found.best[0], "the flags that are suggested give what was calculated"


def test_what_is_added_when_nothing_fits(parse: Any) -> None:
    plain = [word for word in LLAMA_70B if word != "--use-distributed-optimizer"]
    small = plan(parse(plain, "--num-layers 2"), Cluster(64, 28, gpus_per_node=1))
    assert small.added == ("--use-distributed-optimizer",)
    long = parse(plain, "--seq-length 1048576 --global-batch-size 4")
    found = plan(long, Cluster(256, 80))
    assert found.own is None, "no layout is given, and without one 4 sequences are not for 256 ranks"
    assert "--recompute-granularity" in found.added and found.best
    assert not found.recomputed, "they recompute already"
    nothing = plan(long, Cluster(8, 80))
    assert not nothing.best and nothing.smallest.memory.total > nothing.cluster.usable


def test_recomputation_beside_it(parse: Any) -> None:
    """What is shown for it is what its flags give."""
    found = plan(parse(LLAMA_70B), Cluster(64, 80))
    with_it = plan(parse(LLAMA_70B, list(found.recompute_flags)), Cluster(64, 80))
    assert found.best and found.recomputed == with_it.best


def test_communication_over_nodes(parse: Any) -> None:
    args = parse(LLAMA_8B)
    model, training = read_model(args), read_training(args)

    def outside(layout: Layout) -> frozenset[str]:
        count = parameters(model, layout, 0)
        return communication(model, training, layout, Cluster(64, 80), count, 0).outside

    assert outside(Layout(tp=8, cp=2, dp=4)) == {"cp", "dp"}
    assert outside(Layout(tp=2, cp=4, pp=8, dp=1)) == {"pp"}
    assert outside(Layout(tp=4, cp=2, dp=8)) == {"dp"}


# The command -------------------------------------------------------------------------------------------


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--gpus", "64", "--gpu", "h100", "--show", "3"]
    assert main([*command, "--", *LLAMA_8B, "--context-parallel-size", "2"]) == 0
    text = capsys.readouterr().out
    assert "8.03 billion parameters" in text and "Your layout, TP 1 x PP 1 x CP 2 x DP 32: fits" in text
    for name in ("parameters", "gradients", "optimizer", "FoPE table", "context parallel", "Not counted"):
        assert name in text
    assert main([*command, "--json", "--", *LLAMA_8B]) == 0
    read = json.loads(capsys.readouterr().out)
    assert len(read["best"]) == 3 and read["own"]["fits"] is False
    assert main(["plan", "--gpus", "2", "--gpu-memory", "1", "--", *LLAMA_8B]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


CLUSTER = "--gpus 64 --gpu h100"
WRONG_CLUSTERS = {
    "--gpu h100": "--gpus is missing",
    "--gpus 64": "--gpu and --gpu-memory are both missing",
    "--gpus 64 --gpu h100 --gpu-memory 80": "--gpu and --gpu-memory are both given",
    "--gpus 64 --gpu h1000": "--gpu is 'h1000'; allowed: a100-40gb",
    "--gpus 0 --gpu h100": "--gpus is 0",
    "--gpus 12 --gpu h100": "--gpus is 12; allowed: a multiple of the 8 --gpus-per-node",
    "--gpus 64 --gpu-memory -1": "--gpu-memory is -1",
    "--gpus 64 --gpu-memory nan": "--gpu-memory is nan",
    "--gpus 64 --gpu h100 --margin 1": "--margin is 1",
    "--gpus 64 --gpu h100 --gpus-per-node 0": "--gpus-per-node is 0",
    f"{CLUSTER} --show 0": "--show is 0",
    CLUSTER: "no Megatron flags are given",
}


def test_bad_clusters_are_refused_before_torch_is_imported() -> None:
    """All in one process: none may import it."""
    code = f"""
import sys
from megatron_fope.tools.cli import main
for words in {
        [
            ["plan", *text.split(), *([] if text == CLUSTER else ["--", "--swiglu"])]
            for text in WRONG_CLUSTERS
        ]!r
    }:
    try:
        main(words)
    except SystemExit as error:
        assert error.code == 2
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(WRONG_CLUSTERS), done.stderr
    for line, expected in zip(lines, WRONG_CLUSTERS.values(), strict=True):
        assert line.startswith(f"megatron-fope: error: {expected}"), line


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        (
            "--tensor-model-parallel-size 3",
            "3 x --pipeline-model-parallel-size 1 x --context-parallel-size 1",
        ),
        (
            "--tensor-model-parallel-size 64",
            "--tensor-model-parallel-size is 64; allowed: a divisor of the 32",
        ),
        (
            "--context-parallel-size 2 --seq-length 8190",
            "--context-parallel-size is 2; allowed: numbers whose",
        ),
        ("--pipeline-model-parallel-size 2 --global-batch-size 20", "--global-batch-size is 20"),
        (
            "--tensor-model-parallel-size 8 --context-parallel-size 2 --cp-comm-type a2a",
            "--context-parallel-size is 2; allowed: a common divisor of the 4 heads and 1 KV",
        ),
        ("--num-query-groups 5", "--num-query-groups is 5"),
        ("--num-layers 0", "--num-layers is 0"),
        ("--optimizer sgd", "--optimizer is 'sgd'"),
        ("--use-megatron-fsdp", "--use-megatron-fsdp is given; a plan does not know the memory of"),
        ("--multi-latent-attention", "--multi-latent-attention is given"),
        ("--cp-comm-type p2p a2a", "--cp-comm-type has 2 values; allowed: 1 or 32"),
        ("--fope-gain -1", "--fope-gain is -1"),
    ],
)
def test_bad_flags(flags: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["plan", *CLUSTER.split(), "--", *LLAMA_8B, *flags.split()])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("megatron-fope: error: ")]
    assert expected in line and not out


@pytest.mark.parametrize("missing", ["--vocab-size", "--global-batch-size", "--num-layers"])
def test_missing_flags(missing: str, parse: Any) -> None:
    at = LLAMA_8B.index(missing)
    with pytest.raises(UserError, match=f"{missing} is missing"):
        plan(parse(LLAMA_8B[:at] + LLAMA_8B[at + 2 :]), Cluster(64, 80))


def test_the_example_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "examples" / "plan_1m_tokens.md").read_text()
    common = re.search(r'COMMON="([^"]+)"', text).group(1)
    pairs = re.findall(r"```sh\n(megatron-fope plan [^`]+)```\n\n```\n([^`]+)```", text)
    assert len(pairs) == 3
    for command, output in pairs:
        main(shlex.split(command.replace("\\\n", " ").replace("$COMMON", common))[1:])
        assert capsys.readouterr().out == output
