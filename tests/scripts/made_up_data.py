"""The built-in pre-training on data made up here, which Megatron's own mock data does not cover.

With ``--sft`` packed conversations, read by Megatron's own data set for them, which pads each to a multiple
of ``2 * context-parallel-size``. Else samples of different lengths (give ``--micro-batch-size 1``).
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

NUM_SAMPLES = 64
PAD, IGNORED = 0, -100


def conversation(generator: random.Random) -> list[int]:
    return [generator.randrange(1, 126) for _ in range(generator.randint(3, 13))]


class Tokenizer(SimpleNamespace):
    """A conversation is a list of tokens already; its first two play the prompt, which is not learned."""

    pad = PAD
    eod = 126
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    def tokenize_conversation(self, conversation: list[dict[str, Any]], **_: Any) -> tuple[Any, Any]:
        import numpy

        tokens = numpy.array(conversation[0]["content"])
        targets = tokens.copy()
        targets[:2] = IGNORED
        return tokens, targets


def conversations(num_samples: int, args: Any) -> Any:
    """Four packed conversations per sample: room for all of them however they are padded."""
    import numpy
    from megatron.core.datasets.utils import Split
    from megatron.training.datasets.sft_dataset import SFTDataset

    generator = random.Random(0)
    samples = [
        [{"role": "system", "content": conversation(generator)} for _ in range(4)] for _ in range(NUM_SAMPLES)
    ]
    config = SimpleNamespace(
        tokenizer=Tokenizer(),
        sequence_length=args.seq_length,
        context_parallel_size=args.context_parallel_size,
        reset_position_ids=False,
        reset_attention_mask=False,
        create_attention_mask=False,
        allow_ambiguous_pad_tokens=False,
    )

    class Conversations(SFTDataset):
        def _key_config_attributes(self) -> list[str]:
            return []

    return Conversations(samples, None, numpy.arange(NUM_SAMPLES), num_samples, Split.train, config)


def samples_of_changing_length(num_samples: int, args: Any) -> Any:
    """One half to all of ``--seq-length`` tokens, in steps of 4."""
    import torch

    generator = random.Random(0)

    def sample() -> dict[str, Any]:
        length = 4 * generator.randint(args.seq_length // 8, args.seq_length // 4)
        ids = torch.tensor([generator.randrange(126) for _ in range(length + 1)])
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }

    return [sample() for _ in range(num_samples)]


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, None, None]:
    """Training data for Megatron's loop."""
    from megatron.training import get_args

    args = get_args()
    make = conversations if args.sft else samples_of_changing_length
    return make(num_samples[0], args), None, None


def install() -> None:
    """Let the built-in pre-training read this data."""
    from megatron_fope.training import pretrain

    def check_args(args: Any) -> None:
        # No release has a flag for it; a script whose data changes sets it.
        args.variable_seq_lengths = not args.sft

    datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain.datasets_provider, pretrain.check_args = datasets_provider, check_args
