"""Questions about versions and optional packages, one function each.

Only package metadata is read, nothing is imported: asking must be free, and Megatron must not be
imported before ``megasft.megatron.cpu`` had its chance to prepare a machine without CUDA.
"""

from functools import cache
from importlib import metadata, util

from megasft.errors import MissingPackageError

MEGATRON_MIN = (0, 19)
"""0.17 ships ``megatron.training`` for the first time; 0.19 the hooks for side losses."""
MEGATRON_BELOW = (0, 20)


def parse_release(version: str) -> tuple[int, int]:
    """Return major and minor of a version string.

    Example:
        >>> parse_release("0.19.2rc1")
        (0, 19)
    """
    major, minor, *_ = version.split(".")
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def require_megatron() -> None:
    """Check that a megatron-core is installed which ships the training loop megasft plugs into.

    Raises:
        MissingPackageError: megatron-core is absent, too old or too new.
    """
    wanted = (
        f"pip install 'megatron-core>={MEGATRON_MIN[0]}.{MEGATRON_MIN[1]},"
        f"<{MEGATRON_BELOW[0]}.{MEGATRON_BELOW[1]}' (Python >= 3.12)"
    )
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise MissingPackageError(
            f"megasft needs megatron-core, which is not installed; run: {wanted}"
        ) from None
    if not MEGATRON_MIN <= parse_release(version) < MEGATRON_BELOW:
        raise MissingPackageError(
            f"megasft does not work with megatron-core {version}; run: {wanted}"
        ) from None


@cache
def has(package: str) -> bool:
    """Say whether an optional package can be imported, without importing it.

    Example:
        >>> has("numpy"), has("no_such_package")
        (True, False)
    """
    return util.find_spec(package) is not None
