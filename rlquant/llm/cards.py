"""Common NVIDIA cards, by what CUDA reports as their memory, which is less than what is printed on the box."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlquant.errors import unknown_name
from rlquant.units import parse_bytes

__all__ = ["CARDS", "CONTEXT", "FRAGMENTATION", "Card", "find_card"]

MiB, GiB = 2**20, 2**30
# CUDA's context with the kernels of torch and bitsandbytes, which no allocator statistic shows.
CONTEXT = 512 * MiB
# Share of the allocated bytes that torch's caching allocator holds beside them, in blocks of other sizes.
FRAGMENTATION = 0.05
# PyTorch's cuBLAS workspace of a thread: 8 buffers of 4 MiB where the chip is of compute capability 9.0 or 10.x,
# else 2 of 4 MiB and 8 of 16 KiB (aten/src/ATen/cuda/CublasHandlePool.cpp).
_WORKSPACE = {9: 32 * MiB, 10: 32 * MiB}


@dataclass(frozen=True)
class Card:
    """A graphics card: its name, the bytes that CUDA reports, and the major compute capability."""

    name: str
    bytes: int
    capability: int = 8

    @property
    def workspace(self) -> int:
        """Bytes that cuBLAS takes for each thread that multiplies matrices."""
        return _WORKSPACE.get(self.capability, 8 * MiB + 128 * 1024)

    @property
    def usable(self) -> int:
        """Bytes for tensors: without the context and what the allocator cannot reuse."""
        return max(int((self.bytes - CONTEXT) / (1 + FRAGMENTATION)), 0)


def _card(name: str, gib: float, capability: int) -> Card:
    return Card(name, int(gib * GiB), capability)


# Total capacity in GiB as PyTorch's out-of-memory messages give it, on Linux with recent drivers.
CARDS = (
    _card("RTX 3050 4GB", 3.81, 8),
    _card("RTX 2060 6GB", 5.79, 7),
    _card("RTX 4060 8GB", 7.75, 8),
    _card("RTX 3080 10GB", 9.77, 8),
    _card("RTX 3060 12GB", 11.75, 8),
    _card("RTX 4070 12GB", 11.72, 8),
    _card("T4 16GB", 14.74, 7),
    _card("RTX 5080 16GB", 15.46, 12),
    _card("RTX 4080 16GB", 15.69, 8),
    _card("L4 24GB", 21.96, 8),
    _card("RTX 3090 24GB", 23.68, 8),
    _card("RTX 4090 24GB", 23.61, 8),
    _card("RTX 5090 32GB", 31.36, 12),
    _card("A100 40GB", 39.38, 8),
    _card("L40S 48GB", 44.39, 8),
    _card("A100 80GB", 79.15, 8),
    _card("H100 80GB", 79.10, 9),
    _card("H200 141GB", 139.7, 9),
)


def find_card(text: str) -> Card:
    """A card of :data:`CARDS` by its name (``RTX 4090``, ``h200``), or one of so many bytes (``8GB``).

    Raises InputError that lists the cards.
    """
    wanted = _plain(text)
    for card in CARDS:
        short = card.name.rsplit(" ", 1)[0]
        if wanted and wanted in (_plain(card.name), _plain(short), _plain(short.removeprefix("RTX"))):
            return card
    if re.match(r"\s*[\d.]+\s*[kmgt]?i?b?\s*$", text.lower()):
        return Card(text.strip(), parse_bytes(text, "--gpu"))
    raise unknown_name("card", text, [*(card.name for card in CARDS), "or a size such as 8GB"])


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())
