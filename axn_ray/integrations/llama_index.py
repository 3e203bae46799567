"""A LlamaIndex retriever and node postprocessor. Extra `llama-index`: needs `llama-index-core` alone."""

from typing import Any

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from pydantic import Field

from axn_ray.replies import Backend


class AxnRetriever(BaseRetriever):
    """Nodes by the cross-encoder's logit. `options` go to every search: `budget`, `rounds`, ... of an `AxnClient`."""

    def __init__(self, backend: Backend, top_k: int = 10, options: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._backend, self._top_k, self._options = backend, top_k, options or {}

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        reply = self._backend.search(query_bundle.query_str, top_k=self._top_k, **self._options)
        return [
            NodeWithScore(
                node=TextNode(id_=h.id, text=h.text, metadata={"title": h.title, "exact": h.exact, "round": h.round}),
                score=h.score,
            )
            for h in reply.results
        ]


class AxnPostprocessor(BaseNodePostprocessor):
    """The `top_n` best of some nodes (all of them without one), by the cross-encoder's logit of their text."""

    backend: Any
    top_n: int | None = Field(None, ge=1)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex prints."""
        return "AxnPostprocessor"

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None) -> list[NodeWithScore]:
        """Rerank; a node that cannot be scored is left out.

        Raises:
            ValueError: no query.
        """
        if query_bundle is None:
            raise ValueError("AxnPostprocessor needs a query; pass query_str or query_bundle")
        if not nodes:
            return []
        texts = [node.node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes]
        ranked = self.backend.rerank(query_bundle.query_str, texts)
        return [NodeWithScore(node=nodes[one.index].node, score=one.score) for one in ranked[: self.top_n]]
