"""Longer training lengths: coefficients that grow with the basis.

With a longer training length L' the floor falls and more frequencies are kept: the basis gets new rows behind
the old ones, and, while fewer than ``head_dim // 4`` channel pairs have a series (paper), new outputs. What a
checkpoint holds stays as it is; the question is what the new entries are.

``upstream`` (``olmo/checkpoint.py: FullCheckpointer.restore_checkpoint``) fills them as if the whole matrix
were fresh. The fresh identity is :func:`megatron_fope.formula.functional.step_eye`, whose step follows the
ratio of
``D_in`` to ``D_out``, so the old part and the new one often follow different steps: some outputs get two
frequencies with weight one, and new outputs may get none. Outputs that ``step_eye`` left without a frequency
stay so, and the new frequencies, which are why the length was extended, may reach the outputs as noise only.
``upstream-zeros`` puts zeros into the new entries, which erases the channels of new outputs.

``aligned``, the default, draws the same noise and looks at what each output carries. One that has a frequency
keeps it and gets no second one. One that carries next to nothing, because it is new or because ``step_eye``
skipped it, gets one frequency with weight one. It is a new one, spread evenly up to the slowest, as only the
slowest tell positions apart over the whole new length; or, when there are more such outputs than new
frequencies, the slowest of the old that no output has. No trained output changes but by the noise of the new
frequencies. An output that carried nothing begins to carry something: the first loss rises by that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fope.common.errors import UserError
from megatron_fope.formula import functional
from megatron_fope.formula.config import FoPEConfig, flag
from megatron_fope.formula.geometry import Geometry

_IDLE = 0.25
"""Mean of ``sin^2 + cos^2`` over positions below which an output carries next to nothing; 1 is plain RoPE."""

_OWNED = 0.5
"""Mean weight over heads from which a frequency counts as an output's own."""

_MAY_CHANGE = frozenset(
    {
        "train_length",
        "rotary_base",
        "num_inv_freq",
        "scaling",
        "scaling_factor",
        "scaling_before_clip",
        "original_length",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "yarn_extrapolation_factor",
        "attention_scaling",
        "learnable",
        *FoPEConfig.START,
    }
)
"""Fields that move or scale frequencies, or belong to a run; the others would give the coefficients another
meaning. A start that was annealed to its end has left a plain FoPE model; who reads the checkpoint checks the
end."""


def check_growth(old: FoPEConfig, new: FoPEConfig, source: str) -> None:
    """Check that a model can go on with other settings by growing its coefficients.

    Args:
        old: the checkpoint's settings.
        new: what it shall become.
        source: what was trained with ``old``, for messages.

    Raises:
        UserError: a shorter train length, another profile, or a setting that growth cannot change.
    """
    if new.train_length < old.train_length:
        raise UserError(
            f"--fope-train-length is {new.train_length}, but {source} was trained with "
            f"{old.train_length} and coefficients only grow; allowed: at least {old.train_length}"
        )
    if new.profile != old.profile:
        raise UserError(
            f"--fope-profile is {new.profile!r}, but {source} was trained with "
            f"{old.profile!r}; growth keeps the profile"
        )
    for field, (value, stored) in new.differences(old).items():
        if field not in _MAY_CHANGE:
            raise UserError(
                f"{flag(field)} is {value!r}, but {source} was trained with {stored!r}; "
                "growth changes the train length, the base and the scaling only"
            )
    if old.scaling != "none" and new.scaling == "none":
        raise UserError(
            f"--fope-scaling is 'none', but {source} was trained with {old.scaling!r}; "
            "use one of the scalings"
        )


def grow_coefficients(
    old: dict[str, Tensor], before: Geometry, after: Geometry, *, layer: int, stack: str = "decoder"
) -> dict[str, Tensor]:
    """One layer's coefficients for a longer training length.

    Random entries come from the new settings' seed, ``init`` and ``gain`` and the layer, never from the
    global generator: every rank of every layout makes the same ones.

    Args:
        old: ``{name: [num_kv_heads, D_in, D_out]}`` of ``before`` (one head when heads share).
        before: what ``old`` belongs to.
        after: what the result belongs to; its ``growth`` says by which rule.
        layer: Megatron's global ``layer_number``, from 1.
        stack: "decoder" or "mtp".

    Returns:
        The same names, float32 on the CPU, of ``after``'s shape; new tensors. A larger rotary base may
        leave fewer frequencies than before: the slowest rows and outputs are then cut.

    Raises:
        UserError: see :func:`check_growth`.
        ValueError: ``old`` does not have the shape of ``before``.
    """
    config = after.config
    check_growth(before.config, config, "the model")
    for name, value in old.items():
        if tuple(value.shape) != before.coefficient_shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)}; the old configuration says {before.coefficient_shape}"
            )
    old = {name: value.detach().float().cpu() for name, value in old.items()}
    shape = after.coefficient_shape
    if shape == before.coefficient_shape:
        return {name: value.clone() for name, value in old.items()}
    generator = after.generator(layer, stack, f"grown to {shape[-2]} x {shape[-1]}")
    if config.growth != "aligned":
        return {
            name: grow_upstream(
                value.view(before.drawn_shape),
                *shape[-2:],
                expand=config.growth == "upstream",
                gain=config.gain,
                generator=generator,
            ).view(shape)
            for name, value in old.items()
        }
    drawn = after.drawn_shape
    noise = {
        name: functional.random_coefficients(drawn, config.init, config.gain, generator).view(shape)
        for name in old
    }
    return _grow_aligned(old, noise, with_identity=functional.has_identity(config.init))


def grow_upstream(
    old: Tensor,
    d_in: int,
    d_out: int,
    *,
    expand: bool = True,
    gain: float = 0.3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fit trained coefficients to another basis, by the authors' rule.

    Growing keeps the old block and fills the rest with fresh ``eye_xavier_norm`` values (``expand``) or
    zeros; shrinking cuts. Its weaknesses are described above.

    Args:
        old: ``[..., d_in_old, d_out_old]`` float32.
        d_in: new number of frequencies.
        d_out: new number of series.
        expand: fill new entries as at initialisation instead of with zeros.
        gain: gain of the new entries.
        generator: CPU generator; None uses torch's global one, as the authors do.

    Returns:
        ``[..., d_in, d_out]`` float32, a new tensor.

    Raises:
        ValueError: one dimension grows while the other shrinks.
    """
    old_in, old_out = old.shape[-2:]
    if old_in >= d_in and old_out >= d_out:
        return old[..., :d_in, :d_out].clone()
    if old_in > d_in or old_out > d_out:
        raise ValueError(
            f"coefficients {old_in} x {old_out} cannot become {d_in} x {d_out}: one side grows, the other "
            "shrinks"
        )
    shape = (*old.shape[:-2], d_in, d_out)
    new = (
        functional.init_coefficients(shape, "eye_xavier_norm", gain, generator)
        if expand
        else torch.zeros(shape, dtype=torch.float32, device="cpu")
    )
    new[..., :old_in, :old_out] = old
    return new


def _grow_aligned(old: dict[str, Tensor], noise: dict[str, Tensor], with_identity: bool) -> dict[str, Tensor]:
    """The old block in front of the noise, and one frequency for every output that carries nothing.

    Args:
        old: ``[..., d_in_old, d_out_old]``.
        noise: ``[..., d_in, d_out]``; receives the result.
        with_identity: False for initialisations that have no identity.
    """
    d_in, d_out = next(iter(noise.values())).shape[-2:]
    kept = {name: value[..., :d_in, :d_out] for name, value in old.items()}
    pairs = _missing_identities(torch.stack(list(kept.values())), d_in, d_out) if with_identity else []
    for name, value in noise.items():
        value[..., : kept[name].size(-2), : kept[name].size(-1)] = kept[name]
        for row, column in pairs:
            value[..., row, column] += 1.0
    return noise


def _missing_identities(kept: Tensor, d_in: int, d_out: int) -> list[tuple[int, int]]:
    """(frequency, output) of the identity entries to add, both increasing.

    Args:
        kept: ``[bases, ..., d_in_old, d_out_old]``, the old block of sin and of cos.
        d_in: new number of frequencies.
        d_out: new number of outputs.
    """
    flat = kept.reshape(-1, *kept.shape[-2:])
    old_in, old_out = flat.shape[-2:]
    power = flat.square().mean(0).sum(0)
    outputs = [*(power < _IDLE).nonzero().flatten().tolist(), *range(old_out, d_out)]
    num_new = d_in - old_in
    if len(outputs) <= num_new:
        rows = [old_in + (k + 1) * num_new // len(outputs) - 1 for k in range(len(outputs))]
    else:
        owned = (flat.mean(0) > _OWNED).any(1).tolist()
        slowest = sorted(range(old_in), key=lambda row: (owned[row], -row))
        rows = sorted(slowest[: len(outputs) - num_new]) + list(range(old_in, d_in))
    return list(zip(rows, outputs, strict=True))
