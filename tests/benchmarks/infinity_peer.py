"""infinity-emb's pairs per second, in an environment of its own (it wants an older sentence-transformers and numpy).

    .venv-peer/bin/python tests/benchmarks/infinity_peer.py MODEL_FOLDER PAIRS.json

One request a query with all its items, all requests at once, as its server would get them; the engine makes the batches.
"""

import asyncio
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from infinity_emb import AsyncEmbeddingEngine, EngineArgs

REPEATS = 3


async def rate(folder, requests, dtype, batch_size):
    """Median, slowest and fastest pairs per second of `REPEATS` runs after one that warms up."""
    args = EngineArgs(
        model_name_or_path=folder,
        engine="torch",
        device="cpu",
        dtype=dtype,
        batch_size=batch_size,
        bettertransformer=False,
        model_warmup=False,
    )
    n, rates = sum(map(len, requests.values())), []
    engine = AsyncEmbeddingEngine.from_args(args)
    async with engine:
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            await asyncio.gather(*(engine.rerank(query=q, docs=docs, raw_scores=True) for q, docs in requests.items()))
            rates.append(n / (time.perf_counter() - start))
    rates = rates[1:]
    return {"pairs_per_second": round(statistics.median(rates)), "slowest": round(min(rates)), "fastest": round(max(rates))}


def main():
    """One JSON line: settings -> rates."""
    folder, pairs = sys.argv[1:]
    requests = defaultdict(list)
    for query, item in json.loads(Path(pairs).read_text()):
        requests[query].append(item)
    found = {}
    for dtype in ("float32", "bfloat16"):
        for batch_size in (32, 128):
            try:
                found[f"{dtype}_batch_{batch_size}"] = asyncio.run(rate(folder, requests, dtype, batch_size))
            except Exception as error:  # what it refuses is said in the record
                found[f"{dtype}_batch_{batch_size}"] = {"failed": f"{type(error).__name__}: {str(error)[:160]}"}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
