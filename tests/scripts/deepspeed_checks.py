"""Training under DeepSpeed against plain training of the same model, in one launch of 2 ranks.

Plain training is one rank without DeepSpeed: PyTorch's AdamW on the whole batch. Every case trains, saves
half way, trains on, and resumes in a new engine. Rank 0 prints one JSON object ``{case: null or traceback}``
as its last line; run it with ``torchrun --nproc-per-node 2``. ``tests/examples/test_deepspeed.py`` shows each
case as a test of its own.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_fope.formula.geometry import Geometry

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deepspeed"))
import train

RANKS, STEPS, HALF = 2, 10, 5

CASES = {
    "ZeRO 0": "--zero 0",
    "ZeRO 1": "--zero 1",
    "ZeRO 2": "--zero 2",
    "ZeRO 3": "--zero 3",
    "ZeRO 2, learnable": "--zero 2 --fope-learnable",
    "ZeRO 3, learnable, divided as made": "--zero 3 --zero-init --fope-learnable",
    "ZeRO 1, bf16": "--zero 1 --bf16",
    "ZeRO 3, bf16, divided as made": "--zero 3 --zero-init --bf16",
    "ZeRO 0, Ulysses": "--zero 0 --ulysses 2",
    "ZeRO 1, Ulysses": "--zero 1 --ulysses 2",
    "ZeRO 2, Ulysses": "--zero 2 --ulysses 2",
    "ZeRO 3, Ulysses": "--zero 3 --ulysses 2",
    "ZeRO 1, Ulysses, RoPE": "--zero 1 --ulysses 2 --position rope",
    "ZeRO 3, Ulysses, learnable": "--zero 3 --ulysses 2 --fope-learnable",
    "ZeRO 3, Ulysses, bf16": "--zero 3 --ulysses 2 --bf16",
}
"""Flags of ``examples/deepspeed/train.py``; those with Ulysses last, so that groups are made twice only."""

TOLERANCE, BF16_TOLERANCE = 1e-5, 1e-2
"""Of a loss near 4. In fp32 only the order of sums differs, measured below 2e-6; bf16 has 3 digits."""


def parsed(flags: str) -> Namespace:
    return train.parse(["--cpu", "--steps", str(STEPS), *flags.split()])


@functools.cache
def plain(position: str, learnable: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final coefficients of one rank without DeepSpeed."""
    args = parsed(f"--position {position}" + " --fope-learnable" * learnable)
    settings = json.loads(args.config.read_text())
    chosen = {k: v for k, v in settings["optimizer"]["params"].items() if k != "torch_adam"}
    model = train.build_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), **chosen)
    losses = []
    for step in range(STEPS):
        sequences = train.batch(step, args)
        tokens, labels = sequences[:, :-1], sequences[:, 1:]
        loss = model(tokens, torch.arange(args.seq_length).expand_as(tokens), None, labels=labels).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["gradient_clipping"])
        optimizer.step()
        losses.append(loss.item())
    return losses, coefficients(model)


def coefficients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every coefficient by its name, gathered where ZeRO 3 has divided it."""
    import deepspeed

    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {name: value for name, value in held.items() if name.endswith("_coef")}
    with deepspeed.zero.GatheredParameters([value for value in held.values() if hasattr(value, "ds_id")]):
        return {name: value.detach().clone() for name, value in held.items()}


def fresh(args: Namespace) -> dict[str, torch.Tensor]:
    """What the coefficients are before training, made outside of DeepSpeed."""
    config = train.fope_config(args)
    return {
        f"decoder.layers.{layer - 1}.self_attention.fope.{name}": value
        for layer in range(1, args.layers + 1)
        for name, value in Geometry(config, args.hidden // args.heads, args.kv_heads)
        .make_coefficients(layer=layer)
        .items()
    }


def check(flags: str, folder: str) -> None:
    """One case."""
    args = parsed(flags)
    engine = train.initialize(args)
    losses = train.train(Namespace(**vars(args) | {"steps": HALF}), engine)
    engine.save_checkpoint(folder, tag="half", client_state={"step": HALF})
    at_half = coefficients(engine.module)
    losses += train.train(args, engine, HALF)

    expected, learned = plain(args.position, args.fope_learnable)
    torch.testing.assert_close(losses, expected, rtol=0, atol=BF16_TOLERANCE if args.bf16 else TOLERANCE)
    assert expected[-1] < expected[0] - 0.5, "the model must learn"
    final = coefficients(engine.module)
    check_coefficients(args, final, learned)
    if args.position == "fope":
        check_frequencies(args, engine.module)

    resumed = train.initialize(args)
    first = train.resume(Namespace(**vars(args) | {"load": folder}), resumed)
    assert first == HALF
    assert train.train(args, resumed, first) == losses[HALF:], "resuming must change no bit"
    assert_equal(coefficients(resumed.module), final)
    if args.zero:
        assert_equal(consolidated(folder), at_half)


def check_frequencies(args: Namespace, model: torch.nn.Module) -> None:
    """Also float32, and what they are outside of DeepSpeed."""
    found = [value for name, value in model.named_buffers() if name.endswith("fope.inv_freq")]
    assert len(found) == args.layers
    expected = Geometry(train.fope_config(args), args.hidden // args.heads).inv_freq
    for value in found:
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def check_coefficients(
    args: Namespace, final: dict[str, torch.Tensor], learned: dict[str, torch.Tensor]
) -> None:
    """Frozen ones are as they were made, learnable ones as plain training leaves them; all are fp32."""
    if args.position == "rope":
        assert not final
        return
    start = fresh(args)
    if not args.fope_learnable:
        assert_equal(final, start)
        return
    torch.testing.assert_close(final, learned, rtol=0, atol=1e-4)
    moved = [(final[name] - start[name]).abs().max() for name in start]
    assert min(moved) > 5e-3, "every coefficient tensor must be trained"


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def consolidated(folder: str) -> dict[str, torch.Tensor]:
    """Coefficients in what DeepSpeed's ``zero_to_fp32`` makes of a checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(folder, tag="half")
    return {name: value for name, value in state.items() if name.endswith("_coef")}


def divide(ulysses: int) -> None:
    """Megatron's process groups for another number of ranks per sequence."""
    from megatron.core import parallel_state

    if parallel_state.get_context_parallel_world_size() != ulysses:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(context_parallel_size=ulysses)


def main() -> None:
    """Run all cases, or those whose names are given."""
    train.start(parsed(""))
    for position, learnable in (("fope", False), ("fope", True), ("rope", False)):
        plain(position, learnable)  # while every rank has whole sequences
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        torch.distributed.broadcast_object_list(shared)
        for case, flags in CASES.items():
            if sys.argv[1:] and case not in sys.argv[1:]:
                continue
            print(f"{case}:", flush=True)
            divide(parsed(flags).ulysses)
            try:
                check(flags, f"{shared[0]}/{case}")
                results[case] = None
            except Exception:
                results[case] = traceback.format_exc()
        torch.distributed.barrier()
    gathered: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(gathered, results)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({case: next(filter(None, (r[case] for r in gathered)), None) for case in results}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
