"""`make bench-scoring`: pairs per second on random pairs of the sample corpus, against peers, other engines and the limit.

One run, one list of pairs, the same threads for all; every figure of ours includes tokenization where the peer's does.
Parity: Spearman of the scores over each query's true (float32) top 100, mean over queries.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import ray
import torch
from scipy.stats import spearmanr
from sentence_transformers import CrossEncoder as PeerCrossEncoder

from axn_ray import sample
from axn_ray.core.bert_engine import BertCpuEngine
from axn_ray.core.corpus import read_items, read_queries
from axn_ray.core.cross_encoder import CrossEncoder, load_adapter_or_model
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.engines import TorchEngine
from axn_ray.core.pair_layout import PairLayout
from axn_ray.core.score_store import load_scores
from axn_ray.core.tokens import token_budget_batches
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.score import ScoreConfig, score
from tests.benchmarks.common import record

OUT = Path("runs/bench-scoring")
N_PAIRS, REPEATS = 3000, 3
PARITY_QUERIES, CANDIDATES, TOP = 20, 150, 100
SHARD_QUERIES, SHARDS = 3, 3  # x 13,767 items a shard: over 30 s each in one thread


def verbs():
    """Items, queries and exact scores (n_queries, n_items) of the sample's held-out verb world, in the scores' order."""
    exact = load_scores(sample.EXACT_SCORES)
    items, queries = read_items(sample.ITEMS, ("verb",)), read_queries(sample.QUERIES, ("verb",), "test")
    if items.ids != exact.item_ids:
        raise SystemExit("the exact scores are of other items than the verb world's")
    return items, queries.take([queries.index_of[name] for name in exact.query_ids]), exact.dense()


def random_pairs(n_queries, n_items, n):
    rng = np.random.default_rng(0)
    return rng.integers(0, n_queries, n).astype(np.int32), rng.integers(0, n_items, n).astype(np.int32)


def rate(run, n, repeats=REPEATS):
    """Median pairs per second of `repeats` runs after one that warms up, with the slowest and the fastest."""
    run()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        rates.append(n / (time.perf_counter() - start))
    return {"pairs_per_second": round(statistics.median(rates)), "slowest": round(min(rates)), "fastest": round(max(rates))}


def measure_peers(folder, pairs):
    """sentence-transformers as its README shows it, and at its best settings."""
    plain = PeerCrossEncoder(str(folder), device="cpu")
    rows = {"readme": rate(lambda: plain.predict(pairs), len(pairs), 1)}
    best = PeerCrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    by_length = sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1]))
    for batch in (32, 64, 128, 256):
        rows[f"bf16_sorted_batch_{batch}"] = rate(lambda b=batch: best.predict(by_length, batch_size=b), len(pairs), 2)
    return rows


def measure_infinity(folder, texts):
    """infinity-emb in its own environment, `.venv-peer`."""
    pairs = OUT / "pairs.json"
    pairs.write_text(json.dumps(texts))
    command = [".venv-peer/bin/python", "tests/benchmarks/infinity_peer.py", str(folder), str(pairs)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_limit():
    """The highest bfloat16 matrix-product rate that this CPU reaches, TFLOP/s, over shapes of models."""
    best = 0.0
    for rows, inner, outer in ((4096, 384, 1536), (4096, 384, 1152), (2048, 1024, 4096), (4096, 4096, 4096)):
        a, b = torch.randn(rows, inner).bfloat16(), torch.randn(inner, outer).bfloat16()
        for _ in range(12):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * rows * inner * outer / (time.perf_counter() - start) / 1e12)
    return best


def model_flops(model, tokens):
    """Multiply-adds x 2 of all encoder layers' products over these tokens, as the model defines them."""
    return 2 * tokens * sum(p.numel() for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2)


def parity(scorer, tables, chosen, truth):
    """How a scorer orders each query's true top 100, and how far its logits lie from float32's."""
    scores = scorer.score(*tables, *chosen).reshape(truth.shape)
    error = np.abs(scores - truth)
    order = [spearmanr(ours, true).statistic for ours, true in zip(scores, truth, strict=True)]
    figures = {"spearman_top100": np.mean(order), "lowest_spearman": np.min(order)}
    figures |= {"mean_abs_logit_error": error.mean(), "max_abs_logit_error": error.max()}
    return {name: round(float(value), 5) for name, value in figures.items()}


def true_top(scorer, tables, exact):
    """The pairs of each query's float32 top 100, among the candidates that the shipped scores put first."""
    queries = np.linspace(0, len(exact) - 1, PARITY_QUERIES).astype(np.int32)
    candidates = np.argsort(-exact[queries], axis=1)[:, :CANDIDATES].astype(np.int32)
    scores = scorer.score(*tables, np.repeat(queries, CANDIDATES), candidates.ravel()).reshape(candidates.shape)
    order = np.argsort(-scores, axis=1)[:, :TOP]
    items = np.take_along_axis(candidates, order, axis=1)
    return (np.repeat(queries, TOP), items.ravel()), np.take_along_axis(scores, order, axis=1)


def engines(threads, calibration):
    """Name -> a call that makes the engine. Rivals are imported here: memory and job measures do without them."""
    from tests.benchmarks import rival_engines as rivals

    def fresh():
        return load_adapter_or_model(sample.CROSS_ENCODER)[0]

    onnx = rivals.export(fresh(), OUT / "model.onnx")
    return {
        "torch eager, float32": lambda: TorchEngine(fresh(), torch.float32, rivals.CPU),
        "torch eager, bfloat16": lambda: TorchEngine(fresh(), torch.bfloat16, rivals.CPU),
        "torch.compile, bfloat16": lambda: rivals.Compiled(fresh()),
        "ours, float32": lambda: BertCpuEngine(fresh(), torch.float32),
        "ours, bfloat16": lambda: BertCpuEngine(fresh(), torch.bfloat16),
        "ONNX Runtime, float32": lambda: rivals.OnnxRuntime(onnx, threads),
        "ONNX Runtime, int8 dynamic": lambda: rivals.OnnxRuntime(rivals.quantize_onnx(onnx, OUT / "int8.onnx"), threads),
        "OpenVINO, float32": lambda: rivals.OpenVino(str(onnx), threads, "f32"),
        "OpenVINO, bfloat16": lambda: rivals.OpenVino(str(onnx), threads, "bf16"),
        "OpenVINO, int8 (NNCF)": lambda: rivals.OpenVino(rivals.quantize_openvino(onnx, calibration), threads, "bf16"),
    }


def measure_engines(scorer, tables, pairs, exact, threads):
    """Speed and parity of every engine on the same padded batches."""
    ours = scorer._engine
    scorer._engine = TorchEngine(load_adapter_or_model(sample.CROSS_ENCODER)[0], torch.float32, torch.device("cpu"))
    chosen, truth = true_top(scorer, tables, exact)
    room = scorer.max_length - scorer._template.n_special
    layout = PairLayout.of(*tables, *random_pairs(len(tables[0]), len(tables[1]), 64), room, "truncate")
    calibration = [layout.join(rows, scorer._template) for rows in token_budget_batches(layout.lengths, 512)]
    rows = []
    for name, make in engines(threads, calibration).items():
        try:
            scorer._engine = make()
            measured = rate(lambda: scorer.score(*tables, *pairs), len(pairs[0]), 1) | parity(scorer, tables, chosen, truth)
        except Exception as error:  # a rival that does not run here is a row of the table, not the end of the run
            measured = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        rows.append({"engine": name, **measured})
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    scorer._engine = ours
    return rows


def measure_memory(n):
    """Peak resident memory of a process that scores n pairs, MiB."""
    command = [sys.executable, "-m", "tests.benchmarks.scoring", "--memory-of", str(n)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def score_alone(n):
    items, queries, _ = verbs()
    scorer = CrossEncoder(CrossEncoderConfig())
    pairs = random_pairs(len(queries), len(items), n)
    scorer.score(scorer.tokenize(queries.texts), scorer.tokenize(items.full_texts), *pairs)
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}\n")


def measure_job(items, queries):
    """The Ray job with one worker of one thread over the batcher alone, both once warm: shards after the first.

    One thread, as a worker has by default: on a machine of few cores Ray's own processes need some time as well, and they
    would stop a batcher that has every core, in the job alone.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scorer = CrossEncoder(CrossEncoderConfig())
    tables = scorer.tokenize(queries.texts), scorer.tokenize(items.full_texts)
    seconds = [time_shard(scorer, tables, shard) for shard in range(SHARDS)]
    torch.set_num_threads(threads)
    alone = (SHARDS - 1) * SHARD_QUERIES * len(items) / sum(seconds[1:])
    asked = queries.take(range(SHARD_QUERIES * SHARDS))
    unused = np.zeros((len(items), 1), np.float32), np.zeros((len(asked), 1), np.float32)
    corpus = EmbeddedCorpus(items, asked, ("test",) * len(asked), *unused, "none")
    config = ScoreConfig(split="test", choice="all", shard_pairs=SHARD_QUERIES * len(items), workers=1, threads=1)
    shutil.rmtree(OUT / "scores", ignore_errors=True)
    join_cluster()
    score(corpus, config, OUT / "scores")
    ray.shutdown()
    written = sorted((OUT / "scores" / "shards").glob("part-*.json"), key=lambda path: path.stat().st_mtime)
    passed = written[-1].stat().st_mtime - written[0].stat().st_mtime
    per_worker = (SHARDS - 1) * SHARD_QUERIES * len(items) / passed
    return {
        "batcher_pairs_per_second": round(alone),
        "batcher_seconds": [round(s, 1) for s in seconds],
        "job_pairs_per_second_per_worker": round(per_worker),
        "shard_seconds": [json.loads(path.read_text())["seconds"] for path in written],
        "efficiency": round(per_worker / alone, 3),
    }


def time_shard(scorer, tables, shard):
    """Seconds for all pairs of one shard's queries, without Ray."""
    n_items, queries = len(tables[1]), np.arange(shard * SHARD_QUERIES, (shard + 1) * SHARD_QUERIES, dtype=np.int32)
    start = time.perf_counter()
    scorer.score(*tables, np.repeat(queries, n_items), np.tile(np.arange(n_items, dtype=np.int32), SHARD_QUERIES))
    return time.perf_counter() - start


class World:
    """What the sections share: the sample's verbs, the default cross-encoder and the random pairs."""

    def __init__(self):
        self.items, self.queries, self.exact = verbs()
        self.threads = torch.get_num_threads()
        self.scorer = CrossEncoder(CrossEncoderConfig())
        self.tables = self.scorer.tokenize(self.queries.texts), self.scorer.tokenize(self.items.full_texts)
        self.pairs = random_pairs(len(self.queries), len(self.items), N_PAIRS)

    def rates(self):
        """Ours, the peers and the limit, one after the other."""
        model, tokenizer = load_adapter_or_model(sample.CROSS_ENCODER)
        model.save_pretrained(OUT / "model")
        tokenizer.save_pretrained(OUT / "model")
        texts = [(self.queries.texts[q], self.items.full_texts[i]) for q, i in zip(*self.pairs, strict=True)]
        peak = measure_limit()
        ours = rate(lambda: self.scorer.score_texts(*zip(*texts, strict=True)), N_PAIRS)
        from_ids = rate(lambda: self.scorer.score(*self.tables, *self.pairs), N_PAIRS)
        peers, infinity = measure_peers(OUT / "model", texts), measure_infinity(OUT / "model", texts)
        peak = max(peak, measure_limit())
        lengths = self.tables[0].lengths[self.pairs[0]] + self.tables[1].lengths[self.pairs[1]] + self.scorer.n_special
        tokens = int(np.minimum(lengths, self.scorer.max_length).sum())
        flops = model_flops(model, tokens) / N_PAIRS * from_ids["pairs_per_second"] / 1e12
        limit = {"bf16_peak_tflops": round(peak, 2), "model_tflops": round(flops, 2), "share_of_peak": round(flops / peak, 3)}
        return {
            "pairs": N_PAIRS,
            "tokens_per_pair": round(tokens / N_PAIRS, 1),
            "threads": self.threads,
            "ours_from_texts": ours,
            "ours_from_token_ids": from_ids,
            "sentence_transformers": peers,
            "infinity_emb": infinity,
            "limit": limit,
        }

    def engines(self):
        """See `measure_engines`."""
        return {"engines": measure_engines(self.scorer, self.tables, self.pairs, self.exact, self.threads)}

    def memory(self):
        """See `measure_memory`, of the pairs and ten times as many."""
        return {"peak_memory_mib": {str(n): measure_memory(n) for n in (N_PAIRS, 10 * N_PAIRS)}}

    def job(self):
        """See `measure_job`."""
        return {"job": measure_job(self.items, self.queries)}


SECTIONS = ("rates", "engines", "memory", "job")


def main():
    """Measure the sections that are asked for, keep each, and record them once all are there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--memory-of", type=int)
    arguments = parser.parse_args()
    if arguments.memory_of is not None:
        score_alone(arguments.memory_of)
        return
    OUT.mkdir(parents=True, exist_ok=True)
    kept = {name: OUT / f"{name}.json" for name in SECTIONS}
    world = World()
    for name in arguments.sections or SECTIONS:
        kept[name].write_text(json.dumps(getattr(world, name)()))
    if all(path.exists() for path in kept.values()):
        record_all({key: value for path in kept.values() for key, value in json.loads(path.read_text()).items()})


def over(ours, rival):
    """How many times a rival's best rate, None where it ran with no setting."""
    rates = [row["pairs_per_second"] for row in rival.values() if "pairs_per_second" in row]
    return round(ours / max(rates), 2) if rates else None


def record_all(figures):
    """The closing line and the file."""
    ours, peers = figures["ours_from_texts"]["pairs_per_second"], figures["sentence_transformers"]
    record(
        "scoring",
        figures,
        pairs_per_second=ours,
        tokens_per_second=round(figures["tokens_per_pair"] * figures["ours_from_token_ids"]["pairs_per_second"]),
        over_readme=round(ours / peers["readme"]["pairs_per_second"], 2),
        over_best_settings=round(ours / max(row["pairs_per_second"] for row in peers.values()), 2),
        share_of_bf16_peak=figures["limit"]["share_of_peak"],
        over_infinity=over(ours, figures["infinity_emb"]),
        spearman_top100=next(row["spearman_top100"] for row in figures["engines"] if row["engine"] == "ours, bfloat16"),
        job_efficiency=figures["job"]["efficiency"],
    )


if __name__ == "__main__":
    main()
