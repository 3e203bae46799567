"""Cross-encoders with known answers and known vices, for `cross_encoder="python:tests.distributed.scorers:..."`."""

import hashlib
import os
import time


class Slow:
    """A score from the texts alone, after a while."""

    fingerprint = "slow-v1"
    seconds = 0.02

    def score_texts(self, queries, items):
        time.sleep(self.seconds)
        digests = [hashlib.sha256(f"{q}|{i}".encode()).digest() for q, i in zip(queries, items, strict=True)]
        return [int.from_bytes(digest[:3], "little") / 2**20 for digest in digests]


class Slower(Slow):
    seconds = 0.2


class Fast(Slow):
    fingerprint = "fast-v1"
    seconds = 0.0


class Poisoned(Slow):
    """Raises on any batch that holds a poisoned item."""

    fingerprint = "poisoned-v1"

    def score_texts(self, queries, items):
        if any("poison" in item for item in items):
            raise ValueError("this item breaks the model")
        return super().score_texts(queries, items)


class Deadly(Slow):
    """Ends its process, as the kernel does when memory runs out."""

    fingerprint = "deadly-v1"

    def score_texts(self, queries, items):
        if any("deadly" in item for item in items):
            os._exit(1)
        return super().score_texts(queries, items)


class Broken(Slow):
    fingerprint = "broken-v1"

    def score_texts(self, queries, items):
        return [float("nan")] * len(items)
