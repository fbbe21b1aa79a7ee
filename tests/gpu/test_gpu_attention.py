"""Fused attention on rotated queries and keys: Transformer Engine's back ends and PyTorch's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_kit import ROOT, needs_flash_attention, needs_transformer_engine

WORKER = Path(__file__).with_name("attention_worker.py")

BACK_ENDS = [
    "torch",
    pytest.param("te-flash", marks=[needs_transformer_engine, needs_flash_attention]),
    *(pytest.param(name, marks=needs_transformer_engine) for name in ("te-cudnn", "te-unfused")),
]


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_output_and_gradients_equal_float64_up_to_rounding(back_end: str, tmp_path: Path) -> None:
    """Heads with and without groups, an odd length, packed documents; forward and backward, bfloat16."""
    result = tmp_path / "errors.json"
    done = subprocess.run(
        [sys.executable, str(WORKER), back_end, str(result)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for case, tensors in json.loads(result.read_text()).items():
        for tensor, measured in tensors.items():
            # Kernels also round the attention weights, which the allowance does not contain.
            assert measured["error"] <= 3 * measured["rounding"] + 2e-3, (case, tensor, measured)
