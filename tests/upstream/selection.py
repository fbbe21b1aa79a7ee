"""Which of Megatron-LM's unit tests are run, on how many ranks, and why the others are not.

Paths are below ``tests/unit_tests`` of the checkout. Every test file of :data:`AREAS` is either launched or
excluded with a reason; a file that a newer checkout adds is reported as not looked at.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

UNIT_TESTS = Path("tests") / "unit_tests"


@dataclass(frozen=True)
class Launch:
    """Test files that share processes."""

    name: str
    ranks: int
    files: tuple[str, ...]
    keep: str = ""
    """pytest's ``-k``."""


_INFERENCE = (
    "inference/engines/test_static_engine.py",
    "inference/model_inference_wrappers/gpt/test_gpt_inference_wrapper.py",
    "inference/text_generation_controllers/test_text_generation_controller.py",
)
_WITH_MODELS = "TestStatic or TestGPT or TestTextGeneration"
"""The other tests of these files are about the scheduler and run mocks instead of a model."""

_CHECKPOINTS = (
    "dist_checkpointing/models/test_gpt_model.py",
    "dist_checkpointing/models/test_gpt_hybrid_interop.py",
    "dist_checkpointing/test_pipeline_parallel_layout.py",
)

LAUNCHES = (
    Launch(
        "attention, one rank",
        1,
        (
            "transformer/test_attention.py",
            "transformer/test_attention_no_rope.py",
            "transformer/test_attention_packed_seq.py",
            "transformer/test_core_attention.py",
            "transformer/test_transformer_block.py",
            "transformer/test_transformer_layer.py",
            "models/test_gpt_model.py",
            "models/test_heterogeneous_gpt_model.py",
        ),
        keep="not correctness and not TestSelfAttention",
    ),
    Launch(
        "tensor and context parallelism, four ranks",
        4,
        ("transformer/test_attention.py",),
        keep="correctness",
    ),
    Launch("inference, one rank", 1, _INFERENCE, keep=_WITH_MODELS),
    Launch("inference, two ranks", 2, _INFERENCE, keep=_WITH_MODELS),
    Launch("packed sequences, one rank", 1, ("transformer/test_thd_correctness.py",)),
    Launch("packed sequences, four ranks", 4, ("transformer/test_thd_correctness.py",)),
    Launch("checkpoints, two ranks", 2, _CHECKPOINTS),
    Launch("checkpoints, four ranks", 4, _CHECKPOINTS),
    Launch("inference, four ranks", 4, _INFERENCE, keep=_WITH_MODELS),
    Launch("process groups, eight ranks", 8, ("transformer/test_attention.py",), keep="TestSelfAttention"),
    Launch("checkpoints, eight ranks", 8, _CHECKPOINTS),
)

EXCLUDED_TESTS = {
    r"test_thd_format\[(b1_seq|b2_long|tp2_cp4|tp2_cp2_sp_longseq|extreme_mixed|long_short_mix)": (
        "thousands of tokens through wide layers in bfloat16: hours on a CPU"
    ),
}
"""Regular expression on a test's id to the reason why it is skipped inside a launched file."""

MISSING_HERE = {
    r"world_size \(\d+\) is not divisible by": "needs more ranks than this launch has",
    r"MambaSSM is not installed": "Mamba layers, which only exist for CUDA",
    r"apply_rope_fusion is not available": "RoPE's fused kernel needs Transformer Engine; FoPE refuses it",
}
"""Regular expression on a failure's text to what it means: counted as skipped."""

AREAS = (
    "transformer/test_rope.py",
    "transformer/test_*attention*.py",
    "transformer/test_thd_correctness.py",
    "inference/**/*.py",
    "test_inference.py",
    "dist_checkpointing/**/*.py",
)

_NO_ATTENTION = "builds no attention layer"
_DYNAMIC = "dynamic batching, FlashAttention or CUDA graphs: needs a GPU"
_OTHER_MODEL = "a model that FoPE does not support or that has no rotary embedding"

EXCLUDED_FILES = {
    "transformer/test_rope.py": "tests RoPE's own module, which FoPE replaces, and asserts a CUDA device",
    "transformer/test_multi_latent_attention.py": "multi-latent attention, which FoPE refuses",
    "transformer/test_relative_attention.py": _OTHER_MODEL,
    "dist_checkpointing/models/test_bert_model.py": _OTHER_MODEL,
    "dist_checkpointing/models/test_t5_model.py": _OTHER_MODEL,
    "dist_checkpointing/models/test_mamba.py": _OTHER_MODEL,
    "dist_checkpointing/models/test_m*.py": _NO_ATTENTION,
    "dist_checkpointing/test_fp8.py": "FP8: needs a GPU",
    "dist_checkpointing/*.py": _NO_ATTENTION,
    "test_inference.py": "the text generation server, which needs flask",
    "inference/contexts/*.py": _DYNAMIC,
    "inference/contexts/attention_metadata/*.py": _DYNAMIC,
    "inference/engines/*.py": _DYNAMIC,
    "inference/test_dynamic_*.py": _DYNAMIC,
    "inference/test_flash_decode.py": _DYNAMIC,
    "inference/test_mtp_cuda_graph_inference.py": _DYNAMIC,
    "inference/test_hybrid_moe.py": _DYNAMIC,
    "inference/*_reshard.py": _DYNAMIC,
    "inference/test_data_parallel_inference_coordinator.py": _DYNAMIC,
    "inference/model_inference_wrappers/t5/*.py": _OTHER_MODEL,
    "inference/text_generation_controllers/test_encoder*.py": _OTHER_MODEL,
    "inference/text_generation_controllers/test_vlm*.py": _OTHER_MODEL,
    "inference/*.py": _NO_ATTENTION,
}
"""Pattern to reason; the first that fits counts."""


def test_files(checkout: Path) -> list[str]:
    """The test files of :data:`AREAS` in a checkout."""
    root = checkout / UNIT_TESTS
    found = {path.relative_to(root).as_posix() for area in AREAS for path in root.glob(area)}
    return sorted(path for path in found if Path(path).name.startswith("test_"))


def excluded_file(path: str) -> str | None:
    """Why a file is not launched, or None if nothing says so."""
    return next((why for pattern, why in EXCLUDED_FILES.items() if fnmatch.fnmatch(path, pattern)), None)


def files_not_run(checkout: Path, launches: tuple[Launch, ...] = LAUNCHES) -> dict[str, str]:
    """Every test file of the areas that no launch holds, with the reason."""
    launched = {path for launch in launches for path in launch.files}
    return {
        path: excluded_file(path) or "not looked at yet"
        for path in test_files(checkout)
        if path not in launched
    }
