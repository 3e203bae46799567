"""A cross-encoder with known answers whose vices are called by name in a query, or by a poisoned document."""

import hashlib
import time

from axn_ray.errors import ModelError


def known_score(query, item):
    """A logit in -4..4 from the two texts alone."""
    digest = hashlib.sha256(f"{query}|{item}".encode()).digest()
    return int.from_bytes(digest[:3], "little") / 2**21 - 4


class Known:
    """Query words: `slow` takes 0.2 s a batch, `sleepy` 3 s, `broken` fails; `hangs` does so from its second batch on.

    An item with `poison` raises on its batch.
    """

    fingerprint = "known-v1"

    def __init__(self):
        self._hangs = 0

    def score_texts(self, queries, items):
        words = {word for query in queries for word in query.split()}
        if "broken" in words:
            raise ModelError("the model is broken; mend it")
        self._hangs += "hangs" in words
        if "hangs" in words and self._hangs > 1:
            time.sleep(60)
        time.sleep(3.0 * ("sleepy" in words) + 0.2 * ("slow" in words))
        if any("poison" in item for item in items):
            raise ValueError("this item breaks the model")
        return [known_score(query, item) for query, item in zip(queries, items, strict=True)]


class Picky(Known):
    """One that raises on items with `twice`."""

    fingerprint = "picky-v1"

    def score_texts(self, queries, items):
        if any("twice" in item for item in items):
            raise ValueError("not twice")
        return super().score_texts(queries, items)
