"""Tiny models trained by Megatron, what Megatron computes with them, and their exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from forks import Launcher
from megatron_logits import loaded
from torch import Tensor
from trainer import FOPE, SHARP, Trainer

from megatron_fope.tools.huggingface.exporting import export

VOCABULARY = 257
"""Ids of the tiny model: bytes and an end."""
LENGTH, LONG = 64, 256
"""Tokens that the tiny model is trained at, and four times as many."""
DENSE = ("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--kv-channels", "32", *SHARP)
EXPERTS = ("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "96")
UNTIED = "--untie-embeddings-and-output-weights"
INTERN = ("--fope-profile", "intern-s1-pro")
MODELS = {
    "paper, dense": (*FOPE, *DENSE, UNTIED, "--fope-gain", "0.6"),
    "intern-s1-pro, dense": (*FOPE, *DENSE, *INTERN, "--qk-layernorm"),
    "paper, experts": (*FOPE, *DENSE, *EXPERTS, UNTIED, "--fope-gain", "0.6"),
    "intern-s1-pro, experts": (
        *(*FOPE, *DENSE, *INTERN, *EXPERTS),
        *("--qk-layernorm", "--moe-router-pre-softmax"),
    ),
    "qwen2, shared heads and basis, learnable": (
        *(*FOPE, *DENSE, "--add-qkv-bias", "--fope-learnable"),
        *("--no-fope-separate-heads", "--no-fope-separate-basis", "--use-distributed-optimizer"),
    ),
}
"""Flags of models: Llama, Qwen3, Mixtral, Qwen3-MoE and Qwen2 on Hugging Face."""


@dataclass(frozen=True)
class Exported:
    """One model: its export, and what Megatron computes for the prompts."""

    checkpoint: Path
    folder: Path
    reference: Path
    """``torch.save`` of ``[(prompt, logits [tokens + generated, vocabulary], generated tokens), ...]``."""


def reference(
    launcher: Launcher, checkpoint: Path, prompts: Sequence[Tensor], generated: int, folder: Path
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What Megatron computes on one rank: for every prompt, its logits and the likeliest tokens after it."""
    found = folder / "found.pt"
    call = (_generate, str(checkpoint), list(prompts), generated, str(found))
    code, text = launcher.call(*call, log=folder / "log")
    assert code == 0, text[-6000:]
    return [(prompt, *computed) for prompt, computed in zip(prompts, torch.load(found), strict=True)]


def _generate(checkpoint: str, prompts: list[Tensor], generated: int, found: str) -> None:
    with loaded(checkpoint, "--make-vocab-size-divisible-by", "512") as compute:

        def logits(tokens: Tensor) -> Tensor:
            return compute(tokens)[..., :VOCABULARY].float()

        answers = []
        for prompt in prompts:
            text = prompt[None]
            for _ in range(generated):
                text = torch.cat((text, logits(text)[:, -1:].argmax(-1)), dim=1)
            answers.append((logits(text)[0], text[0, len(prompt) :]))
    torch.save(answers, found)


def make_exports(
    names: Sequence[str],
    trainer: Trainer,
    launcher: Launcher,
    folder: Path,
    *,
    prompts: Sequence[Tensor],
    generated: int,
    tokenizer: Path | None = None,
) -> Mapping[str, Exported]:
    """Train models of :data:`MODELS` for two iterations, compute what they say and export them."""
    made = {}
    for name in names:
        checkpoint = trainer.run(f"export-{name}", *MODELS[name], "--train-iters", "2").folder
        out = folder / name.replace(", ", "-").replace(" ", "-")
        out.mkdir()
        torch.save(reference(launcher, checkpoint, prompts, generated, out), out / "reference.pt")
        export(checkpoint, out / "hf", max_length=2 * LONG, tokenizer=tokenizer)
        made[name] = Exported(checkpoint, out / "hf", out / "reference.pt")
    return made


def random_prompts(*lengths: int) -> list[Tensor]:
    """Tokens, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


def byte_tokenizer(folder: Path) -> Path:
    """A Hugging Face tokenizer whose ids are bytes, and 256 for the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()} | {"<end>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder
