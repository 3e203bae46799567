"""A search model for MTEB's retrieval and reranking tasks. Extra `mteb`: needs `mteb` 2."""

from collections.abc import Iterable, Mapping
from typing import Any

from mteb.models import ModelMeta

from axn_ray.errors import InputError
from axn_ray.replies import Backend


class AxnSearchModel:
    """MTEB's `SearchProtocol` over an index that stands already, made from the task's own corpus.

    `name` (`organization/model`) and `revision` are what results are filed under: let them name cross-encoder, index and
    budget. `options` go to every search. MTEB judges up to 1000 results of a query; here are as many as were scored.
    """

    def __init__(self, backend: Backend, name: str, revision: str = "1", options: dict[str, Any] | None = None) -> None:
        self.backend, self.options = backend, options or {}
        described = {
            "name": name,
            "revision": revision,
            "model_type": ["cross-encoder"],
            "experiment_kwargs": self.options or None,
        }
        self.mteb_model_meta = ModelMeta.create_empty(described)
        self._texts: dict[str, str] = {}

    def index(self, corpus: Iterable[Mapping[str, Any]], **_: Any) -> None:
        """Keep the texts of the task's corpus, for reranking; what is searched is the backend's index."""
        self._texts = {str(row["id"]): f"{row.get('title') or ''} {row['text']}".strip() for row in corpus}

    def search(
        self,
        queries: Iterable[Mapping[str, Any]],
        *,
        top_k: int,
        top_ranked: Mapping[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Query id -> document id -> logit: found in the index, or of the `top_ranked` documents that a task gives.

        Raises:
            InputError: the index holds a document that the task's corpus does not, or a query is no plain text.
        """
        found = {}
        for query in queries:
            name, text = str(query["id"]), query["text"]
            if not isinstance(text, str):
                raise InputError(f"query {name!r} is a {type(text).__name__}, not a text; choose tasks with plain queries")
            found[name] = self._search(text, top_k) if top_ranked is None else self._rerank(text, top_ranked[name][:top_k])
        return found

    def _search(self, text: str, top_k: int) -> dict[str, float]:
        scores = {hit.id: hit.score for hit in self.backend.search(text, top_k=top_k, **self.options).results}
        foreign = scores.keys() - self._texts.keys()
        if foreign:
            raise InputError(f"the index holds {min(foreign)!r}, the task's corpus does not; search an index of that corpus")
        return scores

    def _rerank(self, text: str, names: list[str]) -> dict[str, float]:
        ranked = self.backend.rerank(text, [self._texts[name] for name in names])
        return {names[one.index]: one.score for one in ranked}
