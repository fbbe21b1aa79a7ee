"""The pictures of how-it-works.md, from the formula: ``python docs/pictures.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

from megatron_fope import FoPEConfig
from megatron_fope.formula import functional
from megatron_fope.formula.geometry import Geometry
from megatron_fope.kernels.torch_rotary import rotate

matplotlib.use("Agg")
from matplotlib import pyplot

HEAD_DIM, LENGTH = 64, 512
ROPE, FOPE, GREY = "#c44e52", "#2a6f97", "0.6"


def frequencies(axes: Any) -> None:
    """Cycles that each channel pair completes in the training length."""
    cycles = functional.inverse_frequencies(HEAD_DIM, 10000.0) * LENGTH / (2 * torch.pi)
    kept = cycles >= 1
    pairs = torch.arange(len(cycles))
    axes.bar(pairs[kept], cycles[kept], color=FOPE, label="kept")
    axes.bar(pairs[~kept], cycles[~kept], color=GREY, label="clipped by FoPE")
    axes.axhline(1, color="0.3", linestyle="--", linewidth=1)
    axes.set(yscale="log", xlabel="channel pair of a head", ylabel=f"cycles in {LENGTH} tokens")
    axes.set_title(f"Which frequencies are kept (train length {LENGTH}, {HEAD_DIM} channels)")
    axes.legend(frameon=False)


def series(axes: Any) -> None:
    """The cosine of one channel pair: a single frequency, and the series around it."""
    fope = FoPEConfig.from_profile("paper", train_length=LENGTH, gain=0.4)
    positions = torch.arange(256)
    geometry = Geometry(fope, HEAD_DIM, 4)
    _, cos = functional.fourier_basis(positions, geometry.inv_freq)
    coefficients = geometry.make_coefficients(layer=1)["cos_coef"]
    mixed = functional.mix_basis(cos, coefficients)
    pair = 6
    axes.plot(positions, cos[:, pair], color=ROPE, label="RoPE: one frequency")
    for head, line in zip((0, 1), ("-", "--"), strict=True):
        axes.plot(
            positions,
            mixed[:, head, pair],
            color=FOPE,
            linestyle=line,
            label=f"FoPE: series of KV head {head}",
        )
    axes.set(xlabel="position", ylabel="cosine table", ylim=(-1.4, 2.2))
    axes.set_title(f"Channel pair {pair}, gain 0.4")
    axes.legend(frameon=False, loc="upper right")


def attention(axes: Any) -> None:
    """Score between one random query and the same key at growing distance, mean over many draws."""
    distances = 4 * LENGTH
    positions = torch.arange(distances)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(1, 1, 256, HEAD_DIM, generator=generator).expand(distances, -1, -1, -1)
    identity = {"init": "identity", "square": True, "clip": False, "pad_value": "0,1"}
    for label, color, options in (("RoPE", ROPE, identity), ("FoPE", FOPE, {"gain": 0.4})):
        fope = FoPEConfig.from_profile("paper", train_length=LENGTH, **options)
        geometry = Geometry(fope, HEAD_DIM, 256)
        basis = functional.fourier_basis(positions, geometry.inv_freq)
        coefficients = geometry.make_coefficients(layer=1)
        # Query and key are the same vector: what remains is the position embedding's own preference.
        query, key = rotate(vectors, vectors, *basis, coefficients, fope)
        scores = (query[0] * key).sum(-1)[:, 0].mean(-1)
        axes.plot(positions, scores / scores[0], color=color, linewidth=1, label=label)
    axes.axvline(LENGTH, color=GREY, linestyle="--", linewidth=1)
    axes.annotate("train length", (LENGTH, 0.95), xytext=(4, 0), textcoords="offset points", color="0.4")
    axes.set(xlabel="distance between query and key", ylabel="score / score at distance 0")
    axes.set_title("Equal query and key, mean of 256 heads")
    axes.legend(frameon=False)


def main(folder: Path) -> None:
    """Draw all of them into one file."""
    figure, panels = pyplot.subplots(1, 3, figsize=(16, 4), dpi=110, layout="constrained")
    for axes, draw in zip(panels, (frequencies, series, attention), strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "how-it-works.png")
    print(folder / "how-it-works.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
