"""PyTerrier transformers: a retriever and a reranker. Extra `pyterrier`; needs no Java."""

from typing import Any

import pandas as pd
import pyterrier as pt

from axn_ray.replies import Backend


class AxnRetriever(pt.Transformer):
    """`[qid, query]` -> `[qid, query, docno, score, rank, iteration, text]`: the logit, and the round that found it (from 1).

    `options` go to every search: `budget`, `rounds`, ... of an `AxnClient`.
    """

    def __init__(self, backend: Backend, num_results: int = 10, options: dict[str, Any] | None = None) -> None:
        self.backend, self.num_results, self.options = backend, num_results, options or {}

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Search for each query; other columns of its row stay."""
        pt.validate.query_frame(inp, extra_columns=["query"])
        rows = []
        for asked in inp.to_dict("records"):
            reply = self.backend.search(asked["query"], top_k=self.num_results, **self.options)
            rows += [
                {**asked, "docno": hit.id, "score": hit.score, "rank": rank, "iteration": hit.round, "text": hit.text}
                for rank, hit in enumerate(reply.results)
            ]
        columns = dict.fromkeys([*inp.columns, "docno", "score", "rank", "iteration", "text"])
        return pd.DataFrame(rows, columns=list(columns))


class AxnReranker(pt.Transformer):
    """`[qid, query, docno, text]` -> the same with `score` and `rank` by the cross-encoder's logit.

    A document that cannot be scored is left out.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Rerank the documents of each query."""
        pt.validate.result_frame(inp, extra_columns=["query", "text"])
        parts = [inp.iloc[:0].assign(score=pd.Series(dtype=float), rank=pd.Series(dtype=int))]
        for _, documents in inp.groupby("qid", sort=False):
            ranked = self.backend.rerank(documents["query"].iloc[0], documents["text"].tolist())
            best = documents.iloc[[one.index for one in ranked]]
            parts.append(best.assign(score=[one.score for one in ranked], rank=range(len(ranked))))
        return pd.concat(parts[1:] or parts, ignore_index=True)
