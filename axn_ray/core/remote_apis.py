"""The servers that score pairs over HTTP: what each is asked, what it answers, how it names its model. Knows no network.

A `#kind` after the server's address says which one it is; `#kind:model` names the model where a server has several.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from axn_ray.core.pairs import FloatArray
from axn_ray.errors import ModelError

HIGHEST, LOWEST = 1 - 2**-24, 1e-30  # probabilities whose logits are told apart: float32 rounds more to 1, nothing to 0
Body = dict[str, Any]


@dataclass(frozen=True)
class Api:
    """One kind of server. `body` makes a request for one query and n items; `raw` are the fields that ask for logits.

    `info_path` answers what is served; `describe` takes from it what scores depend on. `truncate` are the fields that let
    the server cut long items.
    """

    path: str
    body: Callable[[str, Sequence[str]], Body]
    rows: str | None
    score: str
    raw: Body
    truncate: Body
    info_path: str | None = None
    describe: Callable[[Any], Body] = dict

    def read(self, reply: Any, n: int) -> FloatArray:
        """An answer about n items -> logits (n,), in the order of the request; NaN where the server has null.

        Raises:
            ValueError: anything but one score per item.
        """
        rows = reply if self.rows is None else reply[self.rows]
        indices = [row["index"] for row in rows]
        if sorted(indices) != list(range(n)):
            raise ValueError(f"the server answered about items {sorted(indices)[:5]}... of {n}, each is due once")
        scores = np.full(n, np.nan)
        scores[indices] = [np.nan if row[self.score] is None else row[self.score] for row in rows]
        return (scores if self.raw else to_logits(scores)).astype(np.float32)


def to_logits(probabilities: np.ndarray) -> np.ndarray:
    """The logits whose sigmoid these are, (n,) -> (n,).

    Raises:
        ValueError: a number outside [0, 1].
    """
    given = probabilities[~np.isnan(probabilities)]
    if len(given) and not 0 <= given.min() <= given.max() <= 1:
        raise ValueError(f"the server answered {given.min():g} to {given.max():g}, which are no probabilities")
    clipped = np.clip(probabilities, LOWEST, HIGHEST)
    return np.log(clipped) - np.log1p(-clipped)


def _documents(query: str, items: Sequence[str]) -> Body:
    return {"query": query, "documents": list(items)}


def _texts(query: str, items: Sequence[str]) -> Body:
    return {"query": query, "texts": list(items)}


def _text_pairs(query: str, items: Sequence[str]) -> Body:
    return {"text_1": query, "text_2": list(items)}


def _pick(described: Body, *names: str) -> Body:
    return {name: described[name] for name in names if described.get(name) is not None}


APIS = {
    "axn": Api(
        path="/rerank",
        body=_texts,
        rows=None,
        score="score",
        raw={"raw_scores": True},
        truncate={},
        info_path="/info",
        describe=lambda reply: {key: value for key, value in reply["model"].items() if key != "name"},
    ),
    "tei": Api(
        path="/rerank",
        body=_texts,
        rows=None,
        score="score",
        raw={"raw_scores": True},
        truncate={"truncate": True},
        info_path="/info",
        describe=lambda reply: _pick(reply, "model_id", "model_sha", "model_dtype", "max_input_length"),
    ),
    "vllm": Api(
        path="/v1/score",
        body=_text_pairs,
        rows="data",
        score="score",
        raw={"use_activation": False},
        truncate={"truncate_prompt_tokens": -1},
        info_path="/v1/models",
        describe=lambda reply: _pick(reply["data"][0], "id", "root", "max_model_len"),
    ),
    "cohere": Api(path="/v2/rerank", body=_documents, rows="results", score="relevance_score", raw={}, truncate={}),
    "jina": Api(path="/v1/rerank", body=_documents, rows="results", score="relevance_score", raw={}, truncate={}),
}


@dataclass(frozen=True)
class Address:
    """Where a remote CE is: `url` (without a trailing slash), the kind of server, and the model's name there."""

    url: str
    kind: Literal["axn", "tei", "vllm", "cohere", "jina"]
    model: str | None

    @classmethod
    def of(cls, name: str) -> "Address":
        """Read `http(s)://host[:port][/path]#kind[:model]`.

        Raises:
            ModelError: another form.
        """
        url, _, fragment = name.partition("#")
        kind, _, model = fragment.partition(":")
        if kind not in APIS:
            raise ModelError(f"cross-encoder {name!r} does not say what serves it; add #{', #'.join(APIS)} or #kind:model")
        if "@" in url:
            raise ModelError("a cross-encoder's address must hold no password; give it as api_key")
        return cls(url.rstrip("/"), kind, model or None)  # type: ignore[arg-type]
