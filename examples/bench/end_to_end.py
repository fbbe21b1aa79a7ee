"""``bench step``: the time of a training step with RoPE and with FoPE, twins in one process, in turns."""

from __future__ import annotations

import contextlib
import io
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from bench import results
from bench.results import Row, number
from bench.table import markdown
from bench.timing import quantiles
from megatron_fope import compat

CSV = "step.csv"
MEASURED = (
    *("rope_ms50", "rope_ms20", "rope_ms80", "fope_ms50", "fope_ms20", "fope_ms80"),
    *("ratio", "ratio_low", "ratio_high"),
)
COLUMNS = ("op", "model", "dtype", "implementation", "steps", *MEASURED, *results.FACTS)
"""Times in milliseconds; ``ratio``: median FoPE / median RoPE with a 95 % bootstrap interval."""

CPU_MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 2 --ffn-hidden-size 704 "
    "--seq-length 1024 --max-position-embeddings 1024 --micro-batch-size 1 --global-batch-size 1"
)
"""About a second for a step on one CPU thread; heads of 128 channels, as in large models."""

GPU_MODEL = (
    "--num-layers 8 --hidden-size 2048 --num-attention-heads 16 --group-query-attention --num-query-groups 8 "
    "--ffn-hidden-size 5632 --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 "
    "--global-batch-size 1 --bf16"
)

WARM_UP = 3


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with the interval in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def ratio_of_medians(numerator: list[float], denominator: list[float], draws: int = 2000) -> Ratio:
    """Bootstrap over pairs: the i-th samples were taken one right after the other.

    Args:
        numerator: samples.
        denominator: as many.
        draws: resamplings; the random numbers are the same in every call.
    """
    generator = random.Random(1)
    pairs = list(zip(numerator, denominator, strict=True))

    def ratio(sample: list[tuple[float, float]]) -> float:
        above, below = zip(*sample, strict=True)
        return statistics.median(above) / statistics.median(below)

    drawn = sorted(ratio(generator.choices(pairs, k=len(pairs))) for _ in range(draws))
    return Ratio(ratio(pairs), drawn[int(0.025 * draws)], drawn[int(0.975 * draws)])


def run(out: Path, *, cpu: bool, steps: int, flags: list[str]) -> None:
    """Time both twins, print the ratio, write the CSV.

    Args:
        out: folder of the CSV.
        cpu: run on the CPU.
        steps: timed steps of each twin.
        flags: further Megatron flags; they win over the model's.

    Raises:
        UserError: Megatron or the device refuse.
    """
    vocabulary = 1024 if cpu else 32768
    model = (CPU_MODEL if cpu else GPU_MODEL).split()
    if cpu or not _has_transformer_engine():
        model += ["--transformer-impl", "local"]
        unfused = (
            "persist-layer-norm",
            "gradient-accumulation-fusion",
            "masked-softmax-fusion",
            "rope-fusion",
        )
        model += [f"--no-{name}" for name in unfused]
    from bench.twins import Twin, initialize

    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all its arguments
        initialize([*model, *compat.null_tokenizer_flags(vocabulary), *flags], cpu=cpu)
        fope = Twin("fope")
        twins = [Twin("rope", like=fope), fope]
    import torch

    times: dict[str, list[float]] = {twin.kind: [] for twin in twins}
    losses: dict[str, list[float]] = {twin.kind: [] for twin in twins}
    for step in range(WARM_UP + steps):
        for twin in twins if step % 2 else reversed(twins):
            torch.cuda.synchronize()
            start = time.perf_counter()
            losses[twin.kind].append(twin.step())
            torch.cuda.synchronize()
            if step >= WARM_UP:
                times[twin.kind].append((time.perf_counter() - start) * 1e3)
    _check_losses(losses)
    device = torch.device("cpu" if cpu else "cuda")
    row = _row(times, steps, results.facts(device), fope)
    results.update(out / CSV, COLUMNS, MEASURED, [row])
    print(f"\n{describe(row)}\n\n{out / CSV}")
    torch.distributed.destroy_process_group()


def describe(row: Row) -> str:
    """The result as text."""
    lines = [
        [kind, row[f"{kind}_ms50"], f"{row[f'{kind}_ms20']}-{row[f'{kind}_ms80']}"]
        for kind in ("rope", "fope")
    ]
    return (
        f"{row['machine']}, torch {row['torch']}, Megatron-Core {row['megatron']}, commit {row['commit']}\n"
        f"{row['model']}, {row['dtype']}, {row['implementation']}; {row['steps']} steps each, in turns\n\n"
        + markdown(["twin", "step ms", "20-80 %"], lines)
        + f"\n\nfope / rope: {row['ratio']} (95 % interval {row['ratio_low']} to {row['ratio_high']})"
    )


def _row(times: dict[str, list[float]], steps: int, facts: Row, fope: object) -> Row:
    from megatron.training import get_args

    from megatron_fope.layers.report import describe as describe_layers

    args = get_args()
    names = ("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "seq_length")
    sizes = {name: getattr(args, name) for name in (*names, "micro_batch_size")}
    if args.group_query_attention:
        sizes["num_query_groups"] = args.num_query_groups
    ratio = ratio_of_medians(times["fope"], times["rope"])
    row = {
        "op": "train step",
        "model": results.compact(sizes),
        "dtype": str(args.params_dtype).removeprefix("torch."),
        "implementation": f"{args.transformer_impl}; {describe_layers(fope.model)[0].path}",
        "steps": str(steps),
        "ratio": f"{ratio.value:.4f}",
        "ratio_low": f"{ratio.low:.4f}",
        "ratio_high": f"{ratio.high:.4f}",
    }
    for kind, samples in times.items():
        q = quantiles(samples)
        row |= {f"{kind}_ms{p}": number(v) for p, v in ((50, q.q50), (20, q.q20), (80, q.q80))}
    return row | facts


def _check_losses(losses: dict[str, list[float]]) -> None:
    """Both twins must really have trained: from the same weights, on the same tokens, again and again."""
    for kind, values in losses.items():
        if not values[-1] < values[0]:
            raise RuntimeError(
                f"the {kind} twin's loss went from {values[0]} to {values[-1]}: nothing was trained"
            )


def _has_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True
