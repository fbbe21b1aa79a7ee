"""Train a Megatron-Core GPT with FoPE under DeepSpeed: ZeRO 0 to 3 and Ulysses sequence parallelism.

    torchrun --nproc-per-node 2 examples/deepspeed/train.py --cpu --zero 3
    torchrun --nproc-per-node 2 examples/deepspeed/train.py --cpu --zero 1 --ulysses 2

The model is Megatron's; engine, optimizer and checkpoints are DeepSpeed's (``config.json``). The text is made
up: sequences that count in steps of their own.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from megatron_fope import FoPEConfig, UserError
from megatron_fope.common.command_line import OneLineParser, interruptible, number, whole
from megatron_fope.common.errors import exit_on_user_error
from megatron_fope.formula.config import PROFILES

VOCABULARY = 128


def main() -> None:
    """Build, resume, train, save."""
    with interruptible("train.py"), exit_on_user_error("train.py"):
        args = parse()
        start(args)
        engine = initialize(args)
        train(args, engine, resume(args, engine))
        if args.save:
            engine.save_checkpoint(args.save, tag=f"step{args.steps}", client_state={"step": args.steps})
    torch.distributed.destroy_process_group()


# The command line ---------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, or ``argv``.

    Raises:
        UserError: numbers that cannot be divided among ranks or heads, or do not go together.
    """
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--position", choices=("rope", "fope"), default="fope", help="position embedding")
    add("--fope-profile", choices=tuple(PROFILES), default="paper", help="published variant")
    add("--fope-gain", type=number(), metavar="X", help="spread of the coefficients; default: the profile's")
    add("--fope-learnable", action="store_true", help="train the coefficients")
    add("--zero", type=whole(), choices=(0, 1, 2, 3), default=1, help="ZeRO stage")
    add("--zero-init", action="store_true", help="with --zero 3: divide each parameter as it is made")
    add("--ulysses", type=whole(1), default=1, metavar="N", help="ranks that share a sequence")
    add("--bf16", action="store_true", help="weights and activations in bf16, optimizer in fp32")
    add("--cpu", action="store_true", help="train on the CPU with gloo")
    add("--steps", type=whole(1), default=20, metavar="N", help="number of the last step")
    add("--global-batch-size", type=whole(1), default=4, metavar="N", help="sequences of all ranks in a step")
    add("--seq-length", type=whole(1), default=64, metavar="N", help="tokens of a sequence on all its ranks")
    add("--layers", type=whole(1), default=2, metavar="N")
    add("--hidden", type=whole(1), default=64, metavar="N", help="channels")
    add("--heads", type=whole(1), default=4, metavar="N", help="query heads")
    add("--kv-heads", type=whole(1), default=2, metavar="N")
    add("--rotary-base", type=number(above=1), default=10000, metavar="X")
    add("--save", metavar="FOLDER", help="write a checkpoint after the last step")
    add("--load", metavar="FOLDER", help="resume from the latest checkpoint there")
    add("--config", metavar="FILE", default=Path(__file__).with_name("config.json"), help="DeepSpeed's")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """See :func:`parse`."""
    if "WORLD_SIZE" not in os.environ:
        raise UserError("one process per rank is needed; start with: torchrun --nproc-per-node N ...")
    ranks = int(os.environ["WORLD_SIZE"])
    if args.ulysses < 1 or ranks % args.ulysses:
        raise UserError(f"--ulysses is {args.ulysses}; allowed: a divisor of the number of ranks, {ranks}")
    pieces = 2 * args.ulysses if args.ulysses > 1 else 1
    for flag, value, divisor, why in (
        ("--hidden", args.hidden, args.heads, "--heads"),
        ("--heads", args.heads, args.kv_heads, "--kv-heads"),
        ("--kv-heads", args.kv_heads, args.ulysses, "--ulysses: every rank attends with some heads"),
        ("--seq-length", args.seq_length, pieces, "two pieces per rank of --ulysses"),
        ("--global-batch-size", args.global_batch_size, ranks // args.ulysses, "ranks / --ulysses"),
    ):
        if value % divisor:
            raise UserError(f"{flag} is {value}; allowed: a multiple of {divisor} ({why})")
    fope_config(args)
    if args.zero_init and args.zero != 3:
        raise UserError(f"--zero-init is given with --zero {args.zero}; requires --zero 3")
    if args.bf16 and args.fope_learnable:
        raise UserError(
            "--fope-learnable is given with --bf16, where DeepSpeed rounds every parameter to bf16, but "
            "coefficients need fp32; leave one of the two out"
        )
    if args.bf16 and args.zero_init and args.position == "rope":
        raise UserError(
            "--zero-init is given with --bf16 --position rope, where DeepSpeed rounds the frequencies of "
            "Megatron's RoPE to bf16; leave --zero-init out"
        )


# Model and data -----------------------------------------------------------------------------------


def fope_config(args: argparse.Namespace) -> FoPEConfig:
    """FoPE's settings."""
    given = {} if args.fope_gain is None else {"gain": args.fope_gain}
    return FoPEConfig.from_profile(
        args.fope_profile,
        train_length=args.seq_length,
        rotary_base=args.rotary_base,
        learnable=args.fope_learnable,
        **given,
    )


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """A GPT with local layers; all ranks start from the same weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from ulysses import with_ulysses

    from megatron_fope import assert_fope_active, with_fope

    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        num_query_groups=args.kv_heads,
        context_parallel_size=args.ulysses,
        bf16=args.bf16,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec()
    if args.ulysses > 1:
        spec = with_ulysses(spec)
    if args.position == "fope":
        spec = with_fope(spec, fope_config(args))
    torch.manual_seed(1234)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope" if args.position == "rope" else "none",
        rotary_base=args.rotary_base,
    )
    if args.position == "fope" and torch.distributed.get_rank() == 0:
        print(f"FoPE: {assert_fope_active(model)[0].summary()}", flush=True)
    return model


def batch(step: int, args: argparse.Namespace) -> torch.Tensor:
    """``[sequences, tokens + 1]`` of one step, those of all ranks, the same numbers on each."""
    generator = torch.Generator().manual_seed(step)
    start, stride = torch.randint(1, 5, (2, args.global_batch_size, 1), generator=generator)
    return (start + stride * torch.arange(args.seq_length + 1)) % VOCABULARY


def this_rank(sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's tokens, their positions and labels, each ``[its sequences, its tokens]``."""
    from megatron.core import parallel_state as groups

    from megatron_fope.layers.positions import sequence_positions

    sequences = sequences.chunk(groups.get_data_parallel_world_size())[groups.get_data_parallel_rank()]
    size, rank = groups.get_context_parallel_world_size(), groups.get_context_parallel_rank()
    positions = sequence_positions((sequences.size(1) - 1) // size, cp_rank=rank, cp_size=size)
    return sequences[:, positions], positions.expand(len(sequences), -1), sequences[:, positions + 1]


# DeepSpeed ----------------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> None:
    """Process groups: Megatron's context-parallel ranks are Ulysses' ranks.

    Raises:
        UserError: DeepSpeed is missing.
    """
    if args.cpu:  # replaces torch.cuda, so before Megatron and DeepSpeed are imported
        from megatron_fope import cpu

        cpu.enable()
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; get it with: pip install 'megatron-fope[deepspeed]'"
        ) from None
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if args.cpu:  # a kernel for inference, which takes minutes to compile
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="gloo" if args.cpu else "nccl")
    parallel_state.initialize_model_parallel(context_parallel_size=args.ulysses)
    model_parallel_cuda_manual_seed(1234)


def initialize(args: argparse.Namespace) -> Any:
    """DeepSpeed's engine around the model.

    DeepSpeed is not told which ranks share a sequence (its ``mpu``): ZeRO then divides everything among all
    ranks and averages gradients over all of them, in every stage. Told of Ulysses, stages 0 to 2 add the
    gradients of a sequence's ranks and stage 3 averages them, as of DeepSpeed 0.19.

    Raises:
        UserError: the configuration cannot be read.
    """
    import deepspeed

    try:
        config = json.loads(Path(args.config).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--config is '{args.config}', which cannot be read: {error}") from None
    replicas = torch.distributed.get_world_size() // args.ulysses
    config["train_micro_batch_size_per_gpu"] = args.global_batch_size // replicas
    config.setdefault("zero_optimization", {})["stage"] = args.zero
    config["bf16"] = {"enabled": args.bf16}
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=args.zero_init):
        model = build_model(args)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def resume(args: argparse.Namespace, engine: Any) -> int:
    """Load the latest checkpoint of ``--load``, if given; returns how many steps it has seen.

    Raises:
        UserError: there is none, or it is at the last step already.
    """
    if not args.load:
        return 0
    path, state = engine.load_checkpoint(args.load)
    if path is None:
        raise UserError(f"--load is '{args.load}', where no DeepSpeed checkpoint is")
    if state["step"] >= args.steps:
        raise UserError(f"--steps is {args.steps}; allowed: more than the {state['step']} of --load")
    return state["step"]


def train(args: argparse.Namespace, engine: Any, first: int = 0) -> list[float]:
    """Train from after step ``first`` to ``--steps``; the loss of each step is the mean over all tokens."""
    losses = []
    for step in range(first, args.steps):
        tokens, positions, labels = (t.to(engine.device) for t in this_rank(batch(step, args)))
        # All ranks have equally many tokens, so the mean over ranks of these means is that of all tokens.
        loss = engine(tokens, positions, None, labels=labels).float().mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / torch.distributed.get_world_size())
        if torch.distributed.get_rank() == 0:
            print(f"step {step + 1}: loss {losses[-1]:.6f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
