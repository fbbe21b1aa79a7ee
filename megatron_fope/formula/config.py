"""FoPE's settings: one frozen dataclass, from the flags to the layer to the checkpoint.

What follows from them for a model's heads is in :mod:`megatron_fope.formula.geometry`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_fope.common.errors import UserError

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

CHOICES: dict[str, tuple[str, ...]] = {
    "profile": tuple(PROFILES),
    # ``fourier_init`` in the authors' code (``olmo/model.py: FourierEmbedding``), and ``identity``: output j
    # is frequency j and nothing else, as in RoPE.
    "init": (
        "eye",
        "eye_norm",
        "eye_xavier_norm",
        "eye_xavier_uniform",
        "xavier_norm",
        "xavier_uniform",
        "identity",
    ),
    # How coefficients grow with the training length; see megatron_fope.formula.growth.
    "growth": ("aligned", "upstream", "upstream-zeros"),
    "pad_value": tuple(PAD_VALUES),
    # How clipped frequencies leave; see megatron_fope.formula.schedule.
    "anneal_order": ("together", "slowest-first", "slowest-last"),
    "scaling": ("none", "pi", "linear", "yarn", "llama3"),
    # What rotates queries and keys; see megatron_fope.kernels.backend.
    "backend": ("auto", "torch", "triton"),
}
"""Allowed values of the fields that are words."""

WIDEST = 65536
"""Channels of a head: beyond it a number is a slip, and would cost memory before anything is checked."""

_LARGEST_FLOAT = (2 - 2**-23) * 2.0**127
"""Of float32."""


def flag(field: str) -> str:
    """The flag that sets a field: ``train_length`` -> ``--fope-train-length``; the base is Megatron's own."""
    return "--rotary-base" if field == "rotary_base" else "--fope-" + field.replace("_", "-")


@dataclass(frozen=True)
class FoPEConfig:
    """Everything that changes FoPE's numbers. Make one with :meth:`from_profile`.

    Head dimension and head counts belong to the model:
    :class:`megatron_fope.formula.geometry.Geometry` joins the two.
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
    """How fresh coefficients are drawn; one of :data:`CHOICES`."""
    growth: str = "aligned"
    """How coefficients grow with the training length; one of :data:`CHOICES`."""
    anneal_iters: int = 0
    """Iterations from the RoPE model to this one (:mod:`megatron_fope.layers.anneal`); 0: FoPE at once."""
    anneal_order: str = "together"
    """How clipped frequencies leave in these iterations; one of :data:`CHOICES`."""
    anneal_clip: str = ""
    """When: "FIRST:LAST", iterations since the start (:mod:`megatron_fope.formula.schedule`); "": all."""
    anneal_padding: str = ""
    """When the padding comes in, the same way."""
    anneal_series: str = ""
    """When the series come in, the same way."""
    fold_padding: bool = False
    """The padding's factor was divided out of the weights (:mod:`megatron_fope.formula.folding`)."""
    learnable: bool = False
    """Train the coefficients. The paper and all published models keep them frozen."""
    pad_value: str = "1,1"
    """(sin, cos) of channel pairs without a series; one of :data:`PAD_VALUES`."""
    scaling: str = "none"
    """Length extension of the frequencies; one of :data:`CHOICES`."""
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
    """What rotates queries and keys, one of :data:`CHOICES`; the numbers are the same to rounding."""

    FRESH_ONLY: ClassVar[frozenset[str]] = frozenset({"profile", "seed", "gain", "init", "growth"})
    """Fields that only decide what new coefficients are; a checkpoint brings its own."""
    RUN_ONLY: ClassVar[frozenset[str]] = frozenset({"backend"})
    """Fields that belong to a run and not to the model; a checkpoint's are not looked at."""
    START: ClassVar[frozenset[str]] = frozenset(
        {
            *("anneal_iters", "anneal_order", "anneal_clip", "anneal_padding", "anneal_series"),
            "fold_padding",
        }
    )
    """Fields about the way from RoPE; without effect once a model has come to its end."""

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
    def arrived(self) -> FoPEConfig:
        """The plain FoPE model, without the way it came from RoPE."""
        defaults: dict[str, Any] = {
            field.name: field.default for field in dataclasses.fields(self) if field.name in self.START
        }
        return dataclasses.replace(self, **defaults)

    @property
    def pad(self) -> tuple[float, float]:
        """(sin, cos) of channel pairs without a series, before :attr:`attention_scaling`."""
        return PAD_VALUES[self.pad_value]

    @property
    def scaled_pad(self) -> tuple[float, float]:
        """(sin, cos) that channel pairs without a series are rotated by."""
        sin, cos = self.pad
        return sin * self.attention_scaling, cos * self.attention_scaling

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        """``("sin_coef", "cos_coef")``, or ``("fourier_coef",)`` for both."""
        return ("sin_coef", "cos_coef") if self.separate_basis else ("fourier_coef",)

    def _check(self) -> None:
        def require(field: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise UserError(f"{flag(field)} is {getattr(self, field)!r}; allowed: {allowed}")

        for name, value in dataclasses.asdict(self).items():
            finite = not isinstance(value, float) or abs(value) <= _LARGEST_FLOAT
            require(name, finite, "finite numbers that float32 can hold")
        for name, allowed in CHOICES.items():
            require(name, getattr(self, name) in allowed, ", ".join(allowed))
        require("train_length", self.train_length >= 2, "at least 2 tokens")
        require("gain", self.gain > 0, "greater than 0")
        require("rotary_base", self.rotary_base > 1, "greater than 1")
        require("floor_ratio", self.floor_ratio >= 0, "0 or more")
        require("anneal_iters", self.anneal_iters >= 0, "0 or more")
        require("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        even = 0 <= self.basis_dim <= WIDEST and self.basis_dim % 2 == 0
        require("basis_dim", even, f"even numbers from 0 to {WIDEST}")
        require("attention_scaling", self.attention_scaling > 0, "> 0")
        if self.fold_padding:
            require("pad_value", self.pad_value == "1,1", "1,1 with --fope-fold-padding")
        if self.scaling in ("linear", "yarn", "llama3"):
            require("scaling_factor", self.scaling_factor >= 1, "at least 1")
        if self.scaling in ("pi", "yarn", "llama3"):
            require(
                "original_length",
                self.original_length >= 1,
                f"1 or more, the length before extension in tokens, with --fope-scaling {self.scaling}",
            )
        if self.scaling == "yarn":
            slow = self.yarn_beta_slow
            require("yarn_beta_slow", slow > 0, "greater than 0")
            at_least = f"at least the {slow:g} of --fope-yarn-beta-slow"
            require("yarn_beta_fast", self.yarn_beta_fast >= slow, at_least)
            share = 0 <= self.yarn_extrapolation_factor <= 1
            require("yarn_extrapolation_factor", share, "numbers from 0 to 1")
        from megatron_fope.formula.schedule import Schedule  # which imports this module

        Schedule.of(self)  # refuses what is no schedule
        if self.learnable and self.shared_layers:
            raise UserError(
                "--fope-learnable is given with coefficients shared by all layers; use "
                "--no-fope-shared-layers (each layer then learns its own)"
            )
