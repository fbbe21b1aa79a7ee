"""No speed without a correct result: every provider is compared with the formula before it is timed.

The expected values are those of :mod:`megatron_fope.formula.functional` in float64, from the same float32
basis,
forward and gradients, for every element. What is allowed is rounding: half a unit in the last place of the
result, plus four times the largest error that the same formula makes in float32. TF32 in the mixing, for
example, does not pass. RoPE in 16 bit rounds its tables and products as well, so its limit counts three units
of its two products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.providers import Call, Provider
from megatron_fope.formula import functional
from megatron_fope.formula.geometry import Geometry

_CHUNK = 1 << 22
"""Elements of the query compared at a time: float64 takes a multiple of the memory of the tensors."""

_NAMES = ("rotated query", "rotated key", "gradient of the query", "gradient of the key")


class Expected:
    """The formula's values for one kind of provider: rotated query and key, then all gradients.

    Args:
        inputs: the case's tensors.
        computes: ``fope``, ``rope`` or ``copy``.
    """

    def __init__(self, inputs: Inputs, computes: str) -> None:
        self.inputs = inputs
        self.computes = computes
        learning = inputs.learning if computes == "fope" else ()
        self.values = [torch.empty(x.shape, device=x.device) for x in (inputs.query, inputs.key) * 2]
        self.coefficients = [torch.zeros_like(c, dtype=torch.float64) for c in learning]
        narrow = [torch.zeros_like(c, dtype=torch.float64) for c in learning]
        self.noise = 0.0
        """Largest error of the formula in float32; 0 for a copy."""
        for rows in chunks(inputs.query):
            exact, exact_coefficients = self._formula(rows, torch.float64)
            rounded, rounded_coefficients = self._formula(rows, torch.float32)
            for whole, part, other in zip(self.values, exact, rounded, strict=True):
                whole[rows] = part.float()
                self.noise = max(self.noise, _largest(part - other))
            for i in range(len(learning)):
                self.coefficients[i] += exact_coefficients[i]
                narrow[i] += rounded_coefficients[i].double()
        self.coefficient_noise = [
            _largest(a - b) + 1e-6 * _largest(a) for a, b in zip(self.coefficients, narrow, strict=True)
        ]

    def _formula(self, rows: slice, dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        inputs = self.inputs
        leaves = [x.detach()[rows].to(dtype).requires_grad_() for x in (inputs.query, inputs.key)]
        grads = [g[rows].to(dtype) for g in inputs.grads]
        if self.computes == "copy":
            return [x.detach() for x in leaves] + grads, ()
        coefficients = {
            k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in inputs.coefficients.items()
        }
        if self.computes == "fope":
            learning = [c for c in coefficients.values() if c.requires_grad]
            bases = (basis[rows].to(dtype) for basis in (inputs.sin_basis, inputs.cos_basis))
            sin, cos = Geometry(inputs.fope, leaves[0].size(-1)).tables(*bases, coefficients)
        else:
            learning = []
            angles = inputs.angles[rows, 0, :, : leaves[0].size(-1) // 2].to(dtype)
            sin, cos = angles.sin(), angles.cos()
        rotated = [functional.apply_fourier_rotary(x, sin[:, None], cos[:, None]) for x in leaves]
        gradients = torch.autograd.grad(rotated, [*leaves, *learning], grads)
        return [x.detach() for x in rotated] + list(gradients[:2]), gradients[2:]

    def compare(self, results: list[Tensor]) -> str | None:
        """Where results differ by more than rounding.

        Args:
            results: rotated query and key, then their gradients, then those of the coefficients.

        Returns:
            One line about the worst element, or None when everything agrees.
        """
        sources = (self.inputs.query, self.inputs.key, *self.inputs.grads)
        for name, result, expected, source in zip(_NAMES, results[:4], self.values, sources, strict=True):
            if result.shape != expected.shape or result.dtype != source.dtype:
                return (
                    f"{name}: {list(result.shape)} {result.dtype} instead of {list(expected.shape)} "
                    f"{source.dtype}"
                )
            for rows in chunks(self.inputs.query):
                error = (result.detach()[rows].double() - expected[rows]).abs()
                allowed = self._allowed(expected[rows], source.detach()[rows])
                problem = _worst(name, error, allowed)
                if problem:
                    return problem
        if len(results) != 4 + len(self.coefficients):
            return f"{len(results) - 4} coefficient gradients instead of {len(self.coefficients)}"
        for result, expected, noise in zip(
            results[4:], self.coefficients, self.coefficient_noise, strict=True
        ):
            error = (result.double() - expected).abs()
            problem = _worst("gradient of the coefficients", error, torch.full_like(error, 4 * noise))
            if problem:
                return problem
        return None

    def _allowed(self, expected: Tensor, source: Tensor) -> Tensor:
        eps = torch.finfo(source.dtype).eps
        noise = 4 * self.noise
        if self.computes == "fope":
            # 0.51: the expected value itself is rounded to float32.
            return 0.51 * eps * expected.double().abs() + noise
        if self.computes == "rope":
            first, second = source.double().abs().chunk(2, dim=-1)
            return 3 * eps * (first + second).repeat(1, 1, 1, 2) + noise
        return torch.zeros_like(expected, dtype=torch.float64)


def check(provider: Provider, call: Call, expected: Expected) -> str | None:
    """Run a provider once, forward and backward, and compare everything.

    Returns:
        None when it is correct, otherwise one line about what is wrong.
    """
    outputs = call.forward()
    return expected.compare([*outputs, *call.backward(outputs)])


def chunks(query: Tensor) -> Iterator[slice]:
    """Ranges of tokens that are small enough for float64; a rotation never mixes tokens."""
    step = max(1, _CHUNK // (query.numel() // query.size(0)))
    for start in range(0, query.size(0), step):
        yield slice(start, start + step)


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _worst(name: str, error: Tensor, allowed: Tensor) -> str | None:
    if bool((error <= allowed).all()):  # False for NaN
        return None
    excess = torch.where(error.isnan(), torch.inf, error - allowed).flatten()
    worst = int(excess.argmax())
    wrong = int((~(error <= allowed)).sum())
    return (
        f"{name}: {wrong} of {error.numel()} elements are wrong, the worst by "
        f"{float(error.flatten()[worst]):.2g} where {float(allowed.flatten()[worst]):.2g} is allowed"
    )
