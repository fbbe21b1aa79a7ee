"""Which Megatron-Core is there, and whether this package supports it."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_fope.errors import UserError

SUPPORTED_MEGATRON = SpecifierSet(">=0.17,<0.20", prereleases=True)
"""Megatron-Core releases whose training loop the flag supports. Keep in step with ``setup.py``."""


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
                "Megatron-Core is not installed; pip install 'megatron-core>=0.17,<0.20'"
            ) from None
    return Version(__version__)


def require_supported_megatron() -> Version:
    """Return the installed version or refuse it.

    Raises:
        UserError: the installed Megatron-Core is outside :data:`SUPPORTED_MEGATRON`.
    """
    version = megatron_version()
    if version not in SUPPORTED_MEGATRON:
        raise UserError(
            f"Megatron-Core {version} is installed; megatron-fope supports {SUPPORTED_MEGATRON} "
            "(pip install 'megatron-core>=0.17,<0.20')"
        )
    return version
