"""The schedule file of a ladder (TOML).

::

    launcher = ["torchrun", "--nproc-per-node", "8", "-m", "megatron_fope", "pretrain"]
    gpus = 64                          # ranks of a stage; a [[stage]] may give its own
    save = "checkpoints/ladder"        # a stage saves to <save>/<its name>

    [start]
    checkpoint = "checkpoints/base"    # what the first stage continues, RoPE or FoPE
    from-rope = "immediate"            # a value of --fope-start-from-rope, for a RoPE checkpoint
    # anneal-iters = 500               # with from-rope = "function-preserving"; anneal-order and others, too
    # Only needed where the checkpoint cannot be read, and compared with it where it can:
    # position-embedding-type = "rope"
    # seq-length = 4096
    # rotary-base = 10000

    [megatron]                         # flags of every stage, without the dashes
    num-layers = 32
    sequence-parallel = true           # a switch; false takes a flag of [megatron] back
    data-path = ["0.7", "books", "0.3", "${SCRATCH}/code"]

    [[stage]]                          # flags of one stage; they win over [megatron]
    seq-length = 32768
    context-parallel-size = 2
    rotary-base = 2e6
    lr = 2e-5
    train-iters = 1000
    global-batch-size = 128
    # and in one of the two tables: micro-batch-size, save-interval, eval-interval

Every key of ``[megatron]`` and ``[[stage]]`` is a flag of Megatron's or FoPE's; ``name`` and ``gpus`` of a
stage are not. ``$NAME`` and ``${NAME}`` in strings are environment variables, ``$$`` is a dollar sign.
"""

from __future__ import annotations

import os
import re
import string
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fope.common.errors import UserError

REQUIRED = (
    *("seq-length", "train-iters", "global-batch-size", "micro-batch-size", "lr", "save-interval"),
    "eval-interval",  # Megatron divides by it, even with --eval-iters 0
)
"""Flags that every stage needs, its own or those of ``[megatron]``."""

ANNEAL = {
    "anneal-iters": int,
    "anneal-order": str,
    "anneal-clip": str,
    "anneal-padding": str,
    "anneal-series": str,
}
"""Keys of ``[start]`` that are flags of a gradual start, with their types."""

OWNED = {
    "load": "the folder of the stage",
    "save": "the folder of the stage",
    "pretrained-checkpoint": "the stage before",
    "finetune": "off, so that a stage resumes with its optimizer; its start is a new run by itself",
    "use-checkpoint-args": "off, because it would bring the length back",
    "position-embedding-type": "fope",
    "max-position-embeddings": "seq-length",
    "fope-train-length": "seq-length",
    "fope-start-from-rope": "[start] from-rope",
    **{f"fope-{name}": f"[start] {name}" for name in ANNEAL},
    "fope-grow": "what the stage needs",
    "fope-change-rotary-base": "what the stage needs",
}
"""Flags that a ladder sets, and to what."""

_TOP = {"launcher": list, "gpus": int, "save": str, "start": dict, "megatron": dict, "stage": list}
_START = {
    "checkpoint": str,
    "from-rope": str,
    **ANNEAL,
    "position-embedding-type": str,
    "seq-length": int,
    "rotary-base": (int, float),
}
_STAGE = {"name": str, "gpus": int}
_WORDS = {list: "an array of strings", int: "a whole number", str: "a string", dict: "a table"}


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_MEGATRONS = re.compile(r"iter_\d+|release|latest_.*", re.IGNORECASE)
_FLAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Stage:
    """One length."""

    name: str
    """Of its folder."""
    gpus: int
    """Ranks."""
    flags: dict[str, list[str]]
    """Values by flag, without dashes; a switch has none."""


@dataclass(frozen=True)
class Schedule:
    """A schedule file."""

    path: Path
    launcher: list[str]
    """What stands in front of Megatron's flags."""
    save: Path
    """Folder of the stages' folders."""
    start: dict[str, Any]
    """The table ``[start]``."""
    stages: list[Stage]

    def folder(self, stage: Stage) -> Path:
        """What a stage's ``--save`` and ``--load`` are."""
        return self.save / stage.name


def read_schedule(path: str | Path) -> Schedule:
    """Read a schedule file.

    Raises:
        UserError: naming the file, the key, what was given and what is allowed.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"SCHEDULE is {str(path)!r}: {error}; use a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: no valid TOML: {error}") from None
    try:
        return _read(path, content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read(path: Path, content: dict[str, Any]) -> Schedule:
    _check_keys("", content, _TOP, required=("launcher", "gpus", "save", "start", "stage"))
    start = content["start"]
    _check_keys("[start] ", start, _START, required=("checkpoint",))
    start = {key: _expand(f"[start] {key}", value) for key, value in start.items()}
    launcher = [_expand("launcher", word) for word in content["launcher"]]
    if not launcher or not all(isinstance(word, str) for word in launcher):
        raise UserError("launcher requires an array of strings, for example ['torchrun', ...]")
    common = _flags("[megatron] ", content.get("megatron", {}))
    tables = content["stage"]
    if not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError("stage requires one [[stage]] table or more")
    stages = [_stage(number, table, common, content["gpus"]) for number, table in enumerate(tables, 1)]
    names = Counter(stage.name.lower() for stage in stages)  # some file systems do not tell them apart
    for stage in stages:
        if (count := names[stage.name.lower()]) > 1:
            raise UserError(f"name is {stage.name!r} in {count} stages; use different ones")
    return Schedule(path, launcher, Path(_expand("save", content["save"])), start, stages)


def _stage(number: int, table: dict[str, Any], common: dict[str, Any], gpus: int) -> Stage:
    where = f"stage {number}: "
    own = {key: value for key, value in table.items() if key in _STAGE}
    _check_keys(where, own, _STAGE)
    given = _flags(where, {key: value for key, value in table.items() if key not in _STAGE})
    merged = {key: value for key, value in (common | given).items() if value is not None}
    for key in REQUIRED:
        if not merged.get(key):
            raise UserError(f"{where}{key} is missing; requires a value in [[stage]] or in [megatron]")
    name = own.get("name", f"stage{number}-{merged['seq-length'][0]}")
    if not _NAME.fullmatch(name) or _MEGATRONS.fullmatch(name):
        raise UserError(
            f"{where}name is {name!r}; allowed: up to 100 of a-z, A-Z, 0-9 and . + - _, first a letter "
            "or digit, and no name that Megatron gives in a checkpoint's folder"
        )
    return Stage(name, own.get("gpus", gpus), merged)


def _check_keys(where: str, table: dict[str, Any], types: dict[str, Any], required: tuple = ()) -> None:
    for key in required:
        if key not in table:
            raise UserError(f"{where}{key} is missing")
    for key, value in table.items():
        if key not in types:
            raise UserError(f"{where}{key} is unknown; allowed: {', '.join(types)}")
        if not isinstance(value, types[key]) or isinstance(value, bool):
            allowed = "[[stage]] tables" if key == "stage" else _WORDS.get(types[key], "a number")
            raise UserError(f"{where}{key} is {value!r}; allowed: {allowed}")
        if types[key] is int and value < 1:
            raise UserError(f"{where}{key} is {value}; allowed: 1 or more")


def _flags(where: str, table: dict[str, Any]) -> dict[str, list[str] | None]:
    """Flags as words; None for a flag that is taken back."""
    flags: dict[str, list[str] | None] = {}
    for key, value in table.items():
        if not _FLAG.fullmatch(key):
            raise UserError(
                f"{where}{key!r} is no flag; use the name of one of Megatron's, without the dashes in front"
            )
        if key in OWNED:
            raise UserError(f"{where}{key} is given, but a ladder sets it: {OWNED[key]}; leave it out")
        if isinstance(value, dict):
            raise UserError(f"{where}{key} is a table; allowed: a string, a number, true, false or an array")
        if isinstance(value, bool):
            flags[key] = [] if value else None
        else:
            values = value if isinstance(value, list) else [value]
            flags[key] = [_word(f"{where}{key}", item) for item in values]
    return flags


def _word(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{where} holds {value!r}; allowed: strings and numbers")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)  # some of Megatron's flags take whole numbers only
    word = str(_expand(where, value))
    if word.startswith("--"):
        raise UserError(f"{where} holds {word!r}, which is a flag; give it a line of its own")
    return word


def _expand(where: str, value: Any) -> Any:
    """Put environment variables into a string."""
    if not isinstance(value, str):
        return value
    try:
        expanded = string.Template(value).substitute(os.environ)
    except KeyError as error:
        raise UserError(f"{where} is {value!r}, but {error.args[0]} is not set") from None
    except ValueError:
        raise UserError(f"{where} is {value!r}; allowed: $NAME, ${{NAME}}, or $$ for a dollar sign") from None
    if not expanded.strip() or "\0" in expanded:
        raise UserError(f"{where} is {value!r}, which comes to {expanded!r}; give a text")
    return expanded
