"""Which Megatron-Core is there, and whether this package supports it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_fope.common.errors import UserError

SUPPORTED_MEGATRON = SpecifierSet(">=0.17,<0.20", prereleases=True)
"""Megatron-Core releases whose wheel the flag trains with. Keep in step with ``pyproject.toml``."""

SUPPORTED_CHECKOUTS = SpecifierSet(">=0.16,<0.21", prereleases=True)
"""Megatron-LM checkouts that the flag trains with, and all releases that the layer spec works with.

The wheel of 0.16 has no training loop, its checkout has one. 0.20 is the main branch, which has no release
yet: tested at commit d98e8a64dd.
"""


def megatron_version() -> Version:
    """The version of the Megatron-Core that will be imported (a checkout's own, else the wheel's).

    Raises:
        UserError: Megatron-Core is not installed.
    """
    try:
        from megatron.core.package_info import __version__
    except ImportError:
        try:
            __version__ = importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"Megatron-Core is not installed; pip install 'megatron-core{SUPPORTED_MEGATRON}'"
            ) from None
    return Version(__version__)


def has_training_loop() -> bool:
    """Whether ``megatron.training`` is there: in checkouts, and in wheels from 0.17 on."""
    return importlib.util.find_spec("megatron.training") is not None


def require_megatron_core() -> Version:
    """Return the version of Megatron-Core, or refuse one that layer specs do not work with.

    Raises:
        UserError: Megatron-Core is missing or outside :data:`SUPPORTED_CHECKOUTS`.
    """
    version = megatron_version()
    if version not in SUPPORTED_CHECKOUTS:
        raise UserError(
            f"Megatron-Core {version} is installed; megatron-fope supports {SUPPORTED_CHECKOUTS} "
            f"(pip install 'megatron-core{SUPPORTED_MEGATRON}')"
        )
    return version


def require_supported_megatron() -> Version:
    """Return the version of Megatron-Core, or refuse one that the flag does not work with.

    Raises:
        UserError: Megatron-Core is missing, outside :data:`SUPPORTED_CHECKOUTS`, or has no training loop.
    """
    version = require_megatron_core()
    if not has_training_loop():
        raise UserError(
            "--position-embedding-type fope needs megatron.training, which the wheel of Megatron-Core "
            f"{version} does not have; use megatron-core {SUPPORTED_MEGATRON}, a Megatron-LM checkout, "
            "or the layer spec (megatron_fope.with_fope), which needs megatron.core alone"
        )
    return version


def require_built_in_training() -> None:
    """Refuse releases for which only Megatron-LM's own script trains.

    Raises:
        UserError: Megatron-Core 0.16, whose ``megatron.training`` has another interface.
    """
    version = megatron_version()
    if version.release < (0, 17):
        raise UserError(
            f"the built-in training needs Megatron-Core >=0.17, but {version} is used; give the path of its "
            "own pretrain_gpt.py instead of 'pretrain'"
        )
