"""Haystack components over a served index: a retriever and a ranker. Extra `haystack`: needs `haystack-ai`."""

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import Secret

from axn_ray.client import AxnClient


class _Served:
    """What both components are made from, and how a pipeline writes and reads it; the key itself is never written."""

    def __init__(self, url: str, api_key: Secret | None, top_k: int | None, **more: Any) -> None:
        self.top_k = top_k
        self._client = AxnClient(url, api_key.resolve_value() if api_key else None)
        self._settings = {"url": url, "api_key": api_key.to_dict() if api_key else None, "top_k": top_k, **more}

    def to_dict(self) -> dict[str, Any]:
        """Haystack's serialization."""
        return default_to_dict(self, **self._settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """Haystack's deserialization."""
        settings = data["init_parameters"]
        key = settings.get("api_key")
        return default_from_dict(
            cls, {**data, "init_parameters": {**settings, "api_key": Secret.from_dict(key) if key else None}}
        )


@component
class AxnRetriever(_Served):
    """The `top_k` best documents by the cross-encoder's logit. `options` go to every search: `budget`, `rounds`, ..."""

    def __init__(self, url: str, api_key: Secret | None = None, top_k: int = 10, options: dict[str, Any] | None = None) -> None:
        _Served.__init__(self, url, api_key, top_k, options=options)  # @component makes another class: no super()
        self.options = options or {}

    @component.output_types(documents=list[Document])
    def run(self, query: str, top_k: int | None = None) -> dict[str, list[Document]]:
        """Search the index."""
        reply = self._client.search(query, top_k=top_k or self.top_k or 10, **self.options)
        found = [
            Document(id=h.id, content=h.text, score=h.score, meta={"title": h.title, "exact": h.exact, "round": h.round})
            for h in reply.results
        ]
        return {"documents": found}


@component
class AxnRanker(_Served):
    """Some documents by the cross-encoder's logit of their content; all that can be scored without a `top_k`."""

    def __init__(self, url: str, api_key: Secret | None = None, top_k: int | None = None) -> None:
        _Served.__init__(self, url, api_key, top_k)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Rerank documents."""
        if not documents:
            return {"documents": []}
        ranked = self._client.rerank(query, [document.content or "" for document in documents])
        best = ranked[: top_k or self.top_k]
        return {"documents": [replace(documents[one.index], score=one.score) for one in best]}
