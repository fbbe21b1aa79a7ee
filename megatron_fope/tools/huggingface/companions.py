"""What lies beside a model's weights: tokenizer, special tokens, settings of generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fope.common.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Companions:
    """Of one folder."""

    folder: Path
    tokenizer: Any
    """transformers' tokenizer."""
    generation: Any
    """transformers' ``GenerationConfig``."""
    special: dict[str, int | None]
    """Ids of special tokens for ``config.json``."""

    def write(self, folder: Path) -> None:
        """Put them into a new folder.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self.tokenizer.save_pretrained(str(folder))
            self.generation.save_pretrained(str(folder))
        except Exception as error:  # the tokenizers library has no class for a disk that is full
            raise OSError(f"the tokenizer: {error}") from error


NO_SPECIAL_TOKENS: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""For ``config.json`` without a tokenizer; a family's own defaults would end texts at other tokens."""


def companions(tokenizer: str | Path | None, args: Any, vocab_size: int) -> Companions | None:
    """Those of a checkpoint, or None.

    Args:
        tokenizer: folder of a Hugging Face tokenizer; None: the one that the checkpoint was trained with, if
            that was one and is still there.
        args: Megatron's arguments as stored.
        vocab_size: ids of the model.

    Raises:
        UserError: it cannot be read, or has more ids than the model.
    """
    folder, name = tokenizer, "--tokenizer"
    if folder is None:
        folder, name = getattr(args, "tokenizer_model", None), "CHECKPOINT's --tokenizer-model"
        is_one = getattr(args, "tokenizer_type", None) == "HuggingFaceTokenizer" and isinstance(folder, str)
        if not is_one or not has_tokenizer(Path(str(folder))):
            return None
    loaded = load_tokenizer(str(folder), name)
    if len(loaded) > vocab_size:
        raise UserError(
            f"{name} is {str(folder)!r} with {len(loaded)} ids, but the model has {vocab_size}; use the "
            "tokenizer that it was trained with"
        )
    special = {key: getattr(loaded, key) for key in NO_SPECIAL_TOKENS}
    return Companions(Path(str(folder)), loaded, _generation(Path(str(folder)), name, special), special)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: str | Path, name: str) -> Any:
    """A tokenizer of a folder on this machine; code in it is never run.

    Args:
        folder: where it is.
        name: how messages call the folder.

    Raises:
        UserError: there is none, or transformers is missing.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(f"{name} needs transformers; install it with: pip install transformers") from None
    if not Path(folder).is_dir():
        raise UserError(f"{name} is {str(folder)!r}; requires a folder with a Hugging Face tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} is {str(folder)!r}: its tokenizer cannot be read ({reason})") from None


def _generation(folder: Path, name: str, special: dict[str, int | None]) -> Any:
    """The settings that lie beside the tokenizer, if any, with the tokenizer's special tokens."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return GenerationConfig(**special)
    try:
        found = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} is {str(folder)!r}: its generation_config.json cannot be read ({reason})"
        ) from None
    for key, value in special.items():
        if getattr(found, key) is None:
            setattr(found, key, value)
    return found
