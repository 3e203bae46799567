"""Haystack components over a served index: a retriever and a ranker. Extra `haystack`: needs `haystack-ai`."""

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret

from axn_ray.client import AxnClient
from axn_ray.errors import InputError


class _Served:
    """What both components are made from, and how a pipeline writes and reads it; the key itself is never written."""

    def __init__(self, url: str, api_key: Secret | None, **more: Any) -> None:
        self._client = AxnClient(url, api_key.resolve_value() if api_key else None)
        self._settings = {"url": url, "api_key": api_key, **more}

    def to_dict(self) -> dict[str, Any]:
        """Haystack's serialization; one with a key from `Secret.from_token` cannot be written."""
        return default_to_dict(self, **self._settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """Haystack's deserialization."""
        return default_from_dict(cls, data)


@component
class AxnRetriever(_Served):
    """The `top_k` best documents by the cross-encoder's logit. `options` go to every search: `budget`, `rounds`, ..."""

    def __init__(self, url: str, api_key: Secret | None = None, top_k: int = 10, options: dict[str, Any] | None = None) -> None:
        _Served.__init__(self, url, api_key, top_k=top_k, options=options)  # @component makes another class: no super()
        self.top_k, self.options = top_k, options or {}

    @component.output_types(documents=list[Document])
    def run(self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None) -> dict[str, list[Document]]:
        """Search the index; `filters` (column -> value, or values to choose from) replace the `filter` of the options.

        Raises:
            InputError: filters in Haystack's own language.
        """
        if filters and "operator" in filters and filters.keys() & {"field", "conditions"}:
            raise InputError("the server knows no operators; give filters as {column: value} or {column: [values]}")
        options = {**self.options, "filter": filters} if filters else self.options
        reply = self._client.search(query, top_k=self.top_k if top_k is None else top_k, **options)
        found = [
            Document(id=h.id, content=h.text, score=h.score, meta={"title": h.title, "exact": h.exact, "round": h.round})
            for h in reply.results
        ]
        return {"documents": found}


@component
class AxnRanker(_Served):
    """Some documents by the cross-encoder's logit of their content; all that can be scored without a `top_k`."""

    def __init__(self, url: str, api_key: Secret | None = None, top_k: int | None = None) -> None:
        _Served.__init__(self, url, api_key, top_k=top_k)
        self.top_k = top_k

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Rerank documents.

        Raises:
            InputError: a `top_k` below 1.
        """
        top_k = self.top_k if top_k is None else top_k
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k={top_k} asks for nothing; give at least 1")
        if not documents:
            return {"documents": []}
        ranked = self._client.rerank(query, [document.content or "" for document in documents])
        best = ranked[:top_k]
        return {"documents": [replace(documents[one.index], score=one.score) for one in best]}
