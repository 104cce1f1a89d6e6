"""The versions of SGLang that this package serves, where each was verified, and the one that is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from sglang_misa import __version__

# Under each version, the devices on which the whole of it has served. One source tree serves all: where they differ, a
# comment names the version.
#
# With 0.5.22 as the oldest, whatever names an older version goes, and every second signature of patches/register.py;
# and SGLang itself has what these do: the Triton and allocator twins of cpu/hooks.py and the pool getters of
# cpu/platform.py (PlatformCapabilities), patches/cuda_graph.py and most of decode_gate.py (AttentionGraphVariants);
# with 0.5.23, patches/forward_batch.py too (ForwardBatch.max_seq_len_host).
VERIFIED: Mapping[str, frozenset[str]] = {
    "0.5.17": frozenset({"cpu", "gpu"}),
    "0.5.22": frozenset({"cpu"}),
    "0.5.23": frozenset({"cpu", "gpu"}),
}
SUPPORTED = tuple(VERIFIED)


def installed() -> str:
    """The version of the installed SGLang. Raises PackageNotFoundError without one."""
    return metadata.version("sglang")


def here() -> str:
    """This package's version and SGLang's, in words."""
    try:
        return f"sglang-misa {__version__} with SGLang {installed()}"
    except metadata.PackageNotFoundError:
        return f"sglang-misa {__version__} without SGLang"


def places(version: str) -> str:
    """Where `version` was verified, in words."""
    return " and ".join(place.upper() for place in sorted(VERIFIED[version]))


def known() -> str:
    """Every supported version and where it was verified, in words."""
    return ", ".join(f"{version} ({places(version)})" for version in SUPPORTED)


def problem(version: str, device: str, *, allow_unverified: bool) -> str | None:
    """The reason not to serve SGLang `version` on `device` ("cpu", "cuda", …), or None.

    An unknown version is always refused: nothing can be known of it. A known one that was not verified on this device
    may be allowed.
    """
    if version not in VERIFIED:
        return f"SGLang: expected one of {known()}, got {version}; install sglang=={SUPPORTED[-1]}"
    if device == "cpu" or "gpu" in VERIFIED[version] or allow_unverified:
        return None
    newest = [each for each in SUPPORTED if "gpu" in VERIFIED[each]][-1]
    return (
        f"SGLang: expected a version verified on a GPU, of {known()}, got {version}; install sglang=={newest}, or add "
        "--misa-allow-unverified"
    )
