"""The Megatron flags a CPU needs, and those it cannot honour."""

from __future__ import annotations

import itertools
from collections import defaultdict

from megatron_fope.common.errors import UserError
from megatron_fope.cpu.environment import prepare_environment

REQUIRED_FLAGS: tuple[tuple[str, str | None], ...] = (
    ("--distributed-backend", "gloo"),
    ("--transformer-impl", "local"),
    ("--use-cpu-initialization", None),
    ("--no-gradient-accumulation-fusion", None),
    ("--no-masked-softmax-fusion", None),
    ("--no-bias-gelu-fusion", None),
    ("--no-bias-swiglu-fusion", None),
    ("--no-rope-fusion", None),
    ("--no-persist-layer-norm", None),
)
"""Flags (with their value) that are added when absent; the spelling is the same in Megatron 0.17 - 0.19.

All of them select an implementation, none of them changes what is computed; dropout in particular keeps
Megatron's default.
"""

NO_MASK_FLAGS: tuple[tuple[str, str | None], ...] = (("--no-create-attention-mask-in-dataloader", None),)
"""The same where no mask but the causal one is needed, for which the fused attention takes none."""

MEGATRON_FSDP_FLAGS: tuple[tuple[str, str | None], ...] = (("--no-gradient-reduce-div-fusion", None),)
"""The same for Megatron FSDP, whose fused division is an operation of NCCL."""

ALLOWED_VALUES: dict[str, frozenset[str]] = {
    "--distributed-backend": frozenset({"gloo"}),
    "--transformer-impl": frozenset({"local"}),
    "--attention-backend": frozenset({"auto", "local", "unfused"}),
    "--cuda-graph-impl": frozenset({"none"}),
    "--moe-token-dispatcher-type": frozenset({"allgather", "alltoall"}),
    "--cross-entropy-fusion-impl": frozenset({"native"}),
    "--cpu-offloading-num-layers": frozenset({"0"}),
    "--pipeline-model-parallel-comm-backend": frozenset(),
    "--fp8-format": frozenset(),
    "--fp4-format": frozenset(),
    "--inference-cuda-graph-scope": frozenset({"none"}),
}
"""Flags with a value of which only some values run on a CPU (an empty set: leave the flag out)."""

REFUSED_SWITCHES: dict[str, str] = {
    "--enable-cuda-graph": "CUDA graphs",
    "--external-cuda-graph": "CUDA graphs",
    "--optimizer-cuda-graph": "CUDA graphs",
    "--cuda-graph-scope": "CUDA graphs",
    "--cuda-graph-modules": "CUDA graphs",
    "--fp8-param-gather": "FP8",
    "--fp4-param-gather": "FP4",
    "--use-flash-attn": "FlashAttention",
    "--flash-decode": "FlashAttention",
    "--tp-comm-overlap": "Transformer Engine",
    "--te-rng-tracker": "Transformer Engine",
    "--use-te-activation-func": "Transformer Engine",
    "--use-transformer-engine-op-fuser": "Transformer Engine",
    "--use-precision-aware-optimizer": "Transformer Engine",
    "--moe-permute-fusion": "Transformer Engine",
    "--moe-router-fusion": "Transformer Engine",
    "--moe-enable-deepep": "DeepEP",
    "--optimizer-cpu-offload": "offloading from a GPU",
    "--fine-grained-activation-offloading": "offloading from a GPU",
    "--overlap-moe-expert-parallel-comm": "overlapping CUDA streams",
    "--hybrid-context-parallel": "hybrid context parallelism, which needs Transformer Engine's attention",
    "--batch-invariant-mode": "Triton kernels for a GPU",
    "--use-nccl-ub": "NCCL",
    "--use-sharp": "NCCL",
    "--perform-rl-step": "the inference engine, which needs FlashAttention",
}
"""Switches that have no meaning without CUDA, with the thing that they ask for."""


def _given(argv: list[str]) -> dict[str, list[str | None]]:
    """Every flag on the command line with the values it was given, in either spelling.

    Megatron's parser takes no abbreviations, so a literal comparison of names is enough.
    """
    given: dict[str, list[str | None]] = defaultdict(list)
    for word, following in itertools.pairwise([*argv, "--"]):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            given[flag].append(value if equals else None if following.startswith("--") else following)
    return given


def add_argument_defaults(argv: list[str]) -> list[str]:
    """Complete a Megatron command line for the CPU.

    What the user gave is kept, in the order given; missing flags of :data:`REQUIRED_FLAGS` are appended.
    Environment variables that Megatron reads while it checks its arguments are set as well, where the
    user did not (:func:`megatron_fope.cpu.environment.prepare_environment`).

    Args:
        argv: the command line, with or without the program name in front.

    Returns:
        A new list; ``argv`` stays as it is.

    Raises:
        UserError: a flag asks for something that only exists with CUDA.
    """
    given = _given(argv)
    for flag, what in REFUSED_SWITCHES.items():
        if flag in given:
            raise UserError(f"{flag} asks for {what}, which a CPU does not have; leave it out on the CPU")
    for flag, allowed in ALLOWED_VALUES.items():
        for value in given.get(flag, []):
            if value not in allowed:
                instead = f"use {' or '.join(sorted(allowed))}" if allowed else "leave it out"
                raise UserError(f"{flag} {value or '(no value)'} needs CUDA; {instead} on the CPU")

    megatron_fsdp = "--use-megatron-fsdp" in given
    if megatron_fsdp and "--save" in given:
        raise UserError(
            "--save is given with --use-megatron-fsdp, which waits for ever on the CPU while it saves, with "
            "RoPE too; leave --save out, or take --use-distributed-optimizer alone"
        )

    completed = list(argv)
    needed = [*REQUIRED_FLAGS, *(MEGATRON_FSDP_FLAGS if megatron_fsdp else ())]
    if "--reset-attention-mask" not in given:
        needed += NO_MASK_FLAGS
    for flag, value in needed:
        if flag not in given:
            completed += [flag] if value is None else [flag, value]
    prepare_environment(fully_sharded=megatron_fsdp or "--use-torch-fsdp2" in given)
    return completed
