"""`Limits` of a server, and the pixels that may be in memory at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Args:
        requests: that are read, wait or run; the next one is refused.
        timeout: of a request, from its first byte to its answer, seconds.
        request_bytes: of a request.
        request_images: of a request.
        request_pixels: of all images of a request. An image takes about 10 bytes for each while it
            is decoded.
        pixels: of all images that are in memory at once; the next ones wait for their turn.
        batch: images that the network sees at once.
    """

    requests: int = 128
    timeout: float = 30.0
    request_bytes: int = 20_000_000
    request_images: int = 32
    request_pixels: int = 40_000_000
    pixels: int = 80_000_000
    batch: int = 16


class PixelBudget:
    """Pixels that may be in memory at once, given to requests in the order in which they ask."""

    def __init__(self, total: int) -> None:
        self.total = self.free = total
        self._turn = asyncio.Lock()  # first come, first served: large requests do not starve
        self._released = asyncio.Event()

    async def acquire(self, pixels: int) -> None:
        """Wait until so many are free, and take them."""
        async with self._turn:
            while self.free < pixels:
                self._released.clear()
                await self._released.wait()
            self.free -= pixels

    def release(self, pixels: int) -> None:
        self.free += pixels
        self._released.set()
