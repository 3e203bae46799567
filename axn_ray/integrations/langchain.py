"""A LangChain retriever and document compressor. Extra `langchain`: needs `langchain-core` alone."""

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun, Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

SCORE = "relevance_score"


class AxnRetriever(BaseRetriever):
    """Documents by the cross-encoder's logit, which stands in `metadata["relevance_score"]`.

    `options` go to every search: `budget`, `rounds`, ... of an `AxnClient`.
    """

    backend: Any
    top_k: int = Field(10, ge=1)
    options: dict[str, Any] = {}

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        reply = self.backend.search(query, top_k=self.top_k, **self.options)
        return [
            Document(
                id=h.id, page_content=h.text, metadata={"title": h.title, SCORE: h.score, "exact": h.exact, "round": h.round}
            )
            for h in reply.results
        ]


class AxnCompressor(BaseDocumentCompressor):
    """The `top_n` best of some documents (all of them without one), by the cross-encoder's logit."""

    backend: Any
    top_n: int | None = Field(None, ge=1)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rerank; a document that cannot be scored is left out."""
        if not documents:
            return []
        ranked = self.backend.rerank(query, [document.page_content for document in documents])
        best = [(documents[one.index], one.score) for one in ranked[: self.top_n]]
        return [document.model_copy(update={"metadata": {**document.metadata, SCORE: score}}) for document, score in best]
