"""The answers that describe a whole atlas: made once, kept plain and compressed. At 100,000 latents making them takes
seconds, so a server makes those of the first look before it says where it listens, and the others meanwhile.

Knows `Data` and gzip; knows no HTTP.
"""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator, Sequence

from sememe.browse.data import Data
from sememe.browse.together import Served
from sememe.browse.written import dump
from sememe.errors import SememeError

__all__ = ["WHOLE", "Whole"]

FIRST = ("overview", "index", "tokens")
"""What the first look at an atlas needs."""
LATER = ("details", "search")
"""What the map and a search need."""
WHOLE = (*FIRST, *LATER, "embeddings")


class Whole:
    """Answers about whole atlases.

    Args:
        served: The atlases.
    """

    def __init__(self, served: Sequence[Served]) -> None:
        self.served = served
        self._made: dict[tuple[int, str], tuple[bytes, bytes]] = {}
        self._lock = threading.Lock()

    def data(self, number: int) -> Data:
        """An atlas.

        Raises:
            SememeError: it cannot be shown.
        """
        found = self.served[number].data
        if isinstance(found, SememeError):
            raise found
        return found

    def made(self, number: int, name: str) -> tuple[bytes, bytes]:
        """One of WHOLE about an atlas: plain, and compressed.

        Raises:
            SememeError: the atlas cannot be shown, or is damaged.
        """
        key = number, name
        if key not in self._made:  # what is there need not wait for what is being made
            with self._lock:
                if key not in self._made:
                    plain = dump(getattr(self.data(number), name)())
                    self._made[key] = plain, gzip.compress(plain, compresslevel=4)
        return self._made[key]

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """What the first look needs is made; the rest is made on a thread inside, the first atlas's first."""
        with contextlib.suppress(SememeError):  # whoever asks is told
            for name in FIRST:
                self.made(0, name)
        stop = threading.Event()
        thread = threading.Thread(target=self._rest, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()  # no query must be under way when the atlas is closed

    def _rest(self, stop: threading.Event) -> None:
        for number in range(len(self.served)):
            for name in (*FIRST, *LATER):
                if stop.is_set():
                    return
                with contextlib.suppress(SememeError):
                    self.made(number, name)
