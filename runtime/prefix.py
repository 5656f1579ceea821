"""One cache kept from the last generation, for a prompt that begins as that one did.

Knows token ids, not text. A chunk that is appended to a cache differs from the same tokens in one
prefill by rounding: with it a text may depend on what was generated before, where two tokens are
almost equally likely. So it is off unless asked for: `Model(path, reuse_prefix=True)`.

Try: `kept.give(cache, [1, 2, 3])`, then `kept.take([1, 2, 4])` -> the cache, which holds [1, 2].
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pico_edge.runtime.cache import Cache
from pico_edge.runtime.portable import PortableCache


class KeptCache:
    """A cache of one row, or none; a generation takes it and gives it back. Thread-safe.

    Of several generations at once the first one takes it; the last one to end is kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[Cache | PortableCache, list[int]] | None = None

    def take(self, ids: Sequence[int]) -> Cache | PortableCache | None:
        """The cache, if any, holding the longest start of ids that it has, not all of them."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None:
            return None
        cache, held = kept
        cache.truncate(0, _common(held, ids[:-1]))
        return cache

    def give(self, cache: Cache | PortableCache, ids: Sequence[int]) -> None:
        """Keep a cache that holds these ids; its owner must not use it any more."""
        with self._lock:
            self._kept = cache, list(ids)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with. Example: [1, 2, 3], [1, 2, 4] -> 2."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
