"""FoPE's settings: one frozen dataclass, from the flags to the layer to the checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_fope.common.errors import UserError
from megatron_fope.formula import functional, geometry

PROFILES: dict[str, dict[str, Any]] = {
    "paper": {
        "strict_floor": False,
        "square": False,
        "shared_layers": False,
        "gain": 0.3,
        "seed": 1234,
        "scaling_before_clip": False,
    },
    "intern-s1-pro": {
        "strict_floor": True,
        "square": True,
        "shared_layers": True,
        "gain": 0.1,
        "seed": 123,
        "scaling_before_clip": True,
    },
}
"""What a profile decides; every entry can be overridden one by one.

``paper`` is the authors' code (TsinghuaC3I/Fourier-Position-Embedding); ``intern-s1-pro`` is the variant of
XTuner, vLLM, SGLang and LMDeploy. Both assign coefficients to KV heads, which for multi-head attention are
the query heads.
"""

PAD_VALUES = {"1,1": (1.0, 1.0), "0,1": (0.0, 1.0)}
"""(sin, cos) of channel pairs without a series, by the flag's spelling."""

SCALINGS = ("none", "pi", "linear", "yarn", "llama3")

GROWTHS = ("aligned", "upstream", "upstream-zeros")
"""How coefficients grow with the training length; see :mod:`megatron_fope.formula.growth`."""

_WIDEST = 65536
"""Channels of a head: beyond it a number is a slip, and would cost memory before anything is checked."""

_LARGEST_FLOAT = torch.finfo(torch.float32).max

BACKENDS = ("auto", "torch", "triton")
"""What rotates queries and keys; see :func:`megatron_fope.kernels.backend.choose`."""


def flag(field: str) -> str:
    """The flag that sets a field: ``train_length`` -> ``--fope-train-length``; the base is Megatron's own."""
    return "--rotary-base" if field == "rotary_base" else "--fope-" + field.replace("_", "-")


@dataclass(frozen=True)
class FoPEConfig:
    """Everything that changes FoPE's numbers. Make one with :meth:`from_profile`.

    Head dimension and head counts belong to the model and are passed to the methods that need them.
    """

    profile: str
    """Name of the profile the other fields started from."""
    train_length: int
    """Training length L in tokens; frequencies below one cycle in L are clipped."""
    strict_floor: bool
    """Keep frequencies ``>`` the floor instead of ``>=``."""
    square: bool
    """D_out = D_in (intern-s1-pro) instead of min(D_in, head_dim // 4) (paper)."""
    shared_layers: bool
    """One pair of coefficient matrices for all layers instead of one per layer."""
    gain: float
    """Spread of the random coefficients around the identity."""
    seed: int
    """Seed of the coefficients; independent of Megatron's ``--seed`` and of every rank."""
    scaling_before_clip: bool
    """Scale frequencies before the floor is applied (changes D_in) or after."""
    rotary_base: float = 10000.0
    """Base (theta) of the frequencies."""
    floor_ratio: float = 1.0
    """Multiplies the floor: 2 drops everything below two cycles in L, 0 nothing at all."""
    num_inv_freq: int | None = None
    """Keep exactly the first so many frequencies; the floor is not looked at."""
    clip: bool = True
    """Apply the floor at all."""
    drop_clipped: bool = True
    """Remove clipped frequencies and pad (``fourier_ignore_zero``); False keeps them as zeros."""
    basis_dim: int = 0
    """Spread the frequencies over more channels than head_dim (``fourier_dim``); 0: head_dim."""
    separate_heads: bool = True
    """Coefficients per KV head instead of one matrix for all heads."""
    separate_basis: bool = True
    """Separate matrices for sin and cos instead of one for both."""
    normalize: bool = False
    """Divide every series by the sum of its coefficients (``fourier_norm``)."""
    init: str = "eye_xavier_norm"
    """One of :data:`megatron_fope.formula.functional.INITIALIZATIONS`."""
    growth: str = "aligned"
    """One of :data:`GROWTHS`; only looked at when the training length grows."""
    anneal_iters: int = 0
    """Iterations from the RoPE model to this one (:mod:`megatron_fope.layers.anneal`); 0: FoPE at once."""
    learnable: bool = False
    """Train the coefficients. The paper and all published models keep them frozen."""
    pad_value: str = "1,1"
    """(sin, cos) of channel pairs without a series; one of :data:`PAD_VALUES`."""
    scaling: str = "none"
    """Length extension of the frequencies; one of :data:`SCALINGS`."""
    scaling_factor: float = 1.0
    """Length ratio for linear, yarn and llama3."""
    original_length: int = 0
    """Length before extension, tokens; for pi, yarn and llama3."""
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_extrapolation_factor: float = 1.0
    attention_scaling: float = 1.0
    """Multiplied into sin and cos, padding included (YaRN's temperature is 0.1 ln(factor) + 1)."""
    exact_angles: bool = False
    """Angles in float64. More exact beyond 8k positions, but differs from every published engine."""

    backend: str = "auto"
    """One of :data:`BACKENDS`; the numbers are the same to rounding."""

    FRESH_ONLY: ClassVar[frozenset[str]] = frozenset({"profile", "seed", "gain", "init", "growth"})
    """Fields that only decide what new coefficients are; a checkpoint brings its own."""
    RUN_ONLY: ClassVar[frozenset[str]] = frozenset({"backend"})
    """Fields that belong to a run and not to the model; a checkpoint's are not looked at."""

    @classmethod
    def from_profile(cls, profile: str = "paper", *, train_length: int, **overrides: Any) -> FoPEConfig:
        """A profile's settings with some replaced.

        Args:
            profile: key of :data:`PROFILES`.
            train_length: training length in tokens.
            **overrides: any other field; ``None`` leaves the profile's value.

        Raises:
            UserError: unknown profile, or a value outside what is allowed.
        """
        if profile not in PROFILES:
            raise UserError(f"--fope-profile is {profile!r}; allowed: {', '.join(PROFILES)}")
        settings = PROFILES[profile] | {k: v for k, v in overrides.items() if v is not None}
        config = cls(profile=profile, train_length=train_length, **settings)
        config._check()
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FoPEConfig:
        """Rebuild a configuration from :meth:`to_dict`; fields added since then take their defaults."""
        return cls.from_profile(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain scalars and strings, safe to store in a checkpoint."""
        return dataclasses.asdict(self)

    def differences(self, other: FoPEConfig) -> dict[str, tuple[Any, Any]]:
        """Fields in which two configurations differ: ``{field: (self's value, other's value)}``.

        :data:`FRESH_ONLY` and :data:`RUN_ONLY` do not count.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        ignored = self.FRESH_ONLY | self.RUN_ONLY
        return {k: (mine[k], theirs[k]) for k in mine if k not in ignored and mine[k] != theirs[k]}

    @property
    def pad(self) -> tuple[float, float]:
        """(sin, cos) of channel pairs without a series."""
        return PAD_VALUES[self.pad_value]

    # Geometry -------------------------------------------------------------------------------------

    def inv_freq(self, head_dim: int) -> Tensor:
        """The basis: ``[D_in]`` on CPU, float32, or float64 under ``exact_angles``.

        Raises:
            UserError: no frequency is left, or the head dimension is odd.
        """
        self.check_model(head_dim)
        return geometry.inv_freq(self, head_dim).clone()

    def num_clipped(self, head_dim: int) -> int:
        """How many of the rotary frequencies are clipped."""
        return int((~geometry.kept(self, head_dim)).sum())

    def d_in(self, head_dim: int) -> int:
        """Number of frequencies in the basis."""
        self.check_model(head_dim)
        return geometry.inv_freq(self, head_dim).numel()

    def d_out(self, head_dim: int) -> int:
        """Number of channel pairs that get a Fourier series; the others are padded."""
        half = head_dim // 2
        if not self.drop_clipped:
            return half
        return min(self.d_in(head_dim), half if self.square else head_dim // 4)

    def coefficient_shape(self, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """``(num_kv_heads, D_in, D_out)``, with one head when heads share. For the whole model.

        Always three dimensions: optimizers that orthogonalise weights (Muon) take two for a matrix.
        """
        return (num_kv_heads if self.separate_heads else 1, self.d_in(head_dim), self.d_out(head_dim))

    def drawn_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The dimensions that random coefficients of a shape are drawn with, as published: no head when
        heads share. The spread of Xavier's rules depends on them."""
        return shape if self.separate_heads else shape[1:]

    def make_coefficients(
        self, num_kv_heads: int, head_dim: int, *, layer: int, stack: str = "decoder"
    ) -> dict[str, Tensor]:
        """Fresh coefficients of one layer, the same on every rank of every layout.

        Args:
            num_kv_heads: KV heads of the whole model, not of a tensor-parallel rank.
            head_dim: channels per head.
            layer: Megatron's global ``layer_number``, from 1.
            stack: "decoder" or "mtp"; multi-token-prediction layers are numbered from 1 again.

        Returns:
            ``sin_coef`` and ``cos_coef``, or one ``fourier_coef`` for both, each float32 of
            :meth:`coefficient_shape` on CPU. With ``shared_layers`` and seed 123 this is XTuner's CPU
            stream bit for bit.
        """
        generator = self.generator(layer, stack)
        shape = self.coefficient_shape(num_kv_heads, head_dim)
        drawn = self.drawn_shape(shape)
        names = ("sin_coef", "cos_coef") if self.separate_basis else ("fourier_coef",)
        return {
            name: functional.init_coefficients(drawn, self.init, self.gain, generator).view(shape)
            for name in names
        }

    def generator(self, layer: int, stack: str = "decoder", purpose: str = "") -> torch.Generator:
        """Random numbers of one layer's coefficients, from the seed alone.

        Args:
            layer: Megatron's global ``layer_number``, from 1; without effect where layers share.
            stack: "decoder" or "mtp".
            purpose: other words, other numbers; none: those of fresh coefficients.
        """
        seed = self.seed
        words = [] if self.shared_layers else [stack, str(layer)]
        if purpose:
            words.append(purpose)
        if words:
            digest = hashlib.sha256("/".join([str(seed), *words]).encode()).digest()
            seed = int.from_bytes(digest[:8], "big") >> 1
        return torch.Generator(device="cpu").manual_seed(seed)

    def tables(
        self, positions: Tensor, coefficients: dict[str, Tensor], inv_freq: Tensor, head_dim: int
    ) -> tuple[Tensor, Tensor]:
        """sin and cos tables for any positions.

        Args:
            positions: ``[...]`` integer.
            coefficients: as from :meth:`make_coefficients`, possibly fewer heads.
            inv_freq: as from :meth:`inv_freq`, on the device of ``positions``.
            head_dim: channels per head.

        Returns:
            ``(sin, cos)``, each ``[..., H, head_dim / 2]`` in the coefficients' dtype.
        """
        sin_basis, cos_basis = functional.fourier_basis(positions, inv_freq)
        return self.mix(sin_basis, cos_basis, coefficients, head_dim)

    def mix(
        self, sin_basis: Tensor, cos_basis: Tensor, coefficients: dict[str, Tensor], head_dim: int
    ) -> tuple[Tensor, Tensor]:
        """:meth:`tables` from a basis that is already there (``[..., D_in]`` each)."""
        sin_coef = coefficients["sin_coef" if self.separate_basis else "fourier_coef"]
        cos_coef = coefficients["cos_coef" if self.separate_basis else "fourier_coef"]
        pad_sin, pad_cos = self.pad
        return functional.fourier_tables(
            sin_basis.to(sin_coef.dtype),
            cos_basis.to(cos_coef.dtype),
            sin_coef,
            cos_coef,
            head_dim // 2,
            pad_sin=pad_sin,
            pad_cos=pad_cos,
            normalize=self.normalize,
            attention_scaling=self.attention_scaling,
        )

    def effective_coefficients(self, coefficients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The matrices that mix the series of sin and of cos, with everything per column folded in.

        Args:
            coefficients: as from :meth:`make_coefficients`, possibly fewer heads.

        Returns:
            ``(sin, cos)``, each ``[H, D_in, D_out]`` (``H = 1`` when heads share); the same tensor twice when
            both share one basis. Differentiable.
        """
        effective = {}
        for name, value in coefficients.items():
            if self.normalize:
                value = functional.normalize_coefficients(value)
            if self.attention_scaling != 1.0:
                value = value * self.attention_scaling
            effective[name] = value
        names = ("sin_coef", "cos_coef") if self.separate_basis else ("fourier_coef", "fourier_coef")
        return effective[names[0]], effective[names[1]]

    # Checks ---------------------------------------------------------------------------------------

    def check_model(self, head_dim: int) -> None:
        """Check what needs the model's head dimension.

        Raises:
            UserError: odd head dimension, no frequency left, or ``num_inv_freq`` beyond head_dim / 2.
        """
        if not 4 <= head_dim <= _WIDEST or head_dim % 2:
            raise UserError(
                f"--kv-channels (head dimension) is {head_dim}; FoPE rotates channel pairs and needs an even "
                f"number >= 4, at most {_WIDEST}"
            )
        width = max(head_dim, self.basis_dim)
        if self.num_inv_freq is not None and not 1 <= self.num_inv_freq <= width // 2:
            raise UserError(f"--fope-num-inv-freq is {self.num_inv_freq}; allowed: 1 to {width // 2}")
        num_kept = int(geometry.kept(self, head_dim).sum())
        floor = functional.floor_frequency(self.train_length, self.floor_ratio)
        if not num_kept:
            raise UserError(
                f"--fope-train-length is {self.train_length}: no frequency completes {self.floor_ratio:g} "
                f"cycle(s) in it (floor {floor:.3g}, "
                "fastest frequency 1 radian per token); use at least "
                f"{int(2 * math.pi * self.floor_ratio) + 1} tokens"
            )
        if self.drop_clipped and self.square and num_kept > head_dim // 2:
            raise UserError(
                f"--fope-basis-dim is {self.basis_dim}: a wider basis needs --fope-profile paper, whose "
                "coefficients need not be square"
            )

    def _check(self) -> None:
        def require(ok: bool, flag: str, value: object, allowed: str) -> None:
            if not ok:
                raise UserError(f"{flag} is {value!r}; allowed: {allowed}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            finite = not isinstance(value, float) or abs(value) <= _LARGEST_FLOAT
            require(finite, flag(field.name), value, "finite numbers that float32 can hold")
        require(self.train_length >= 2, "--fope-train-length", self.train_length, "at least 2 tokens")
        require(self.gain > 0, "--fope-gain", self.gain, "greater than 0")
        require(self.rotary_base > 1, "--rotary-base", self.rotary_base, "greater than 1")
        require(self.floor_ratio >= 0, "--fope-floor-ratio", self.floor_ratio, "0 or more")
        require(
            self.init in functional.INITIALIZATIONS,
            "--fope-init",
            self.init,
            ", ".join(functional.INITIALIZATIONS),
        )
        require(
            self.backend in BACKENDS,
            "--fope-backend",
            self.backend,
            ", ".join(BACKENDS),
        )
        require(self.anneal_iters >= 0, "--fope-anneal-iters", self.anneal_iters, "0 or more")
        require(self.growth in GROWTHS, "--fope-growth", self.growth, ", ".join(GROWTHS))
        require(self.pad_value in PAD_VALUES, "--fope-pad-value", self.pad_value, ", ".join(PAD_VALUES))
        require(self.scaling in SCALINGS, "--fope-scaling", self.scaling, ", ".join(SCALINGS))
        require(0 <= self.seed < 2**63, "--fope-seed", self.seed, "0 to 2^63 - 1")
        require(
            0 <= self.basis_dim <= _WIDEST and self.basis_dim % 2 == 0,
            "--fope-basis-dim",
            self.basis_dim,
            f"even numbers from 0 to {_WIDEST}",
        )
        require(self.attention_scaling > 0, "--fope-attention-scaling", self.attention_scaling, "> 0")
        if self.scaling in ("linear", "yarn", "llama3"):
            require(self.scaling_factor >= 1, "--fope-scaling-factor", self.scaling_factor, "at least 1")
        if self.scaling in ("pi", "yarn", "llama3"):
            require(
                self.original_length >= 1,
                "--fope-original-length",
                self.original_length,
                f"1 or more, the length before extension in tokens, with --fope-scaling {self.scaling}",
            )
        if self.scaling == "yarn":
            fast, slow = self.yarn_beta_fast, self.yarn_beta_slow
            require(slow > 0, "--fope-yarn-beta-slow", slow, "greater than 0")
            require(
                fast >= slow, "--fope-yarn-beta-fast", fast, f"at least the {slow:g} of --fope-yarn-beta-slow"
            )
            weight = self.yarn_extrapolation_factor
            require(0 <= weight <= 1, "--fope-yarn-extrapolation-factor", weight, "numbers from 0 to 1")
        if self.learnable and self.shared_layers:
            raise UserError(
                "--fope-learnable is given with coefficients shared by all layers; use "
                "--no-fope-shared-layers (each layer then learns its own)"
            )
