"""The bodies of requests and replies. Native ones refuse a field they do not know; those of other APIs ignore it."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

MAX_NAMES = 64  # of one object; pydantic describes every single one that is wrong


def _check_text(text: str) -> str:
    """Refuse what is no Unicode text: a lone surrogate passes JSON and fails in every encoder."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds a lone surrogate, which is no character; send valid Unicode") from error
    return text


def _check_names(value: Any) -> Any:
    """Refuse an object of very many names at once."""
    if isinstance(value, dict) and len(value) > MAX_NAMES:
        raise ValueError(f"{len(value)} names exceed the limit of {MAX_NAMES} in one object; send fewer")
    return value


Text = Annotated[str, AfterValidator(_check_text)]
# A list ends at its first bad entry: an error for each, of each branch of a union, would take longer than any search.
Texts = Annotated[list[Text], Field(fail_fast=True)]


class Native(BaseModel):
    """A body that is ours: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, body: Any) -> Any:
        return _check_names(body)


class Compat(BaseModel):
    """A body of somebody else's API: unknown fields are ignored, and named in the log."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def ignored(self) -> list[str]:
        """Names of the fields that mean nothing here."""
        return sorted(self.model_extra or {})


class Budget(Native):
    """What a search may spend."""

    ce_calls: int = Field(100, ge=1, description="cross-encoder calls over all rounds, spent exactly")
    rounds: int = Field(5, ge=1, description="1 is retrieve-and-rerank in the index's own embeddings")


class SearchRequest(Native):
    """One query, or several that are searched side by side."""

    query: Text | Texts = Field(description="a text, or a list of texts", examples=["how do plants make sugar"])
    top_k: int = Field(10, ge=1, le=1000)
    budget: Budget = Budget()
    method: Literal["axn", "rnr"] = Field("axn", description="adaptive, or the dual-encoder's first `ce_calls`, reranked")
    deadline_ms: int | None = Field(None, ge=1, description="then the best so far is the answer")
    filter: Annotated[dict[str, Text | Texts], BeforeValidator(_check_names)] = Field(
        {}, description="value or values wanted of each named column of the items", examples=[{"world": "verb.motion"}]
    )
    return_scores: Literal["exact", "all"] = Field("exact", description="`all` fills up to top_k with approximate scores")
    trace: bool = Field(False, description="what each round scored")
    stream: bool = Field(False, description="server-sent events: the ranking after every round, then the reply")
    fail_open: bool = Field(False, description="answer with the last ranking where the cross-encoder fails")


class Hit(BaseModel):
    """One result."""

    id: str
    score: float = Field(description="raw logit; an estimate of it where `exact` is false")
    exact: bool
    round: int | None = Field(None, description="the round that found it, from 1")
    title: str | None = None
    text: str


class SearchAnswer(BaseModel):
    """The reply to one query."""

    id: str
    results: list[Hit]
    score_type: Literal["logit"]
    usage: dict[str, int]
    degraded: dict[str, Any]
    index_version: str
    timing_ms: dict[str, float]
    trace: list[dict[str, Any]] | None = None
    failures: list[dict[str, str]] | None = None


class SearchAnswers(BaseModel):
    """The replies to a list of queries, in its order; one that failed holds `error` instead."""

    id: str
    data: list[SearchAnswer | dict[str, Any]]


class Document(BaseModel):
    """A document in an object."""

    model_config = ConfigDict(extra="allow")

    text: Text


class RerankRequest(Compat):
    """Jina's, Cohere's v1 and v2."""

    query: Text
    documents: Annotated[list[Text | Document], Field(fail_fast=True)]
    model: Text | None = None
    top_n: int | None = None
    return_documents: bool | None = False
    max_tokens_per_doc: int | None = Field(None, ge=1)


class TeiRequest(Compat):
    """Text Embeddings Inference's rerank."""

    query: Text
    texts: Texts
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool = False


def _dialect(body: Any) -> str:
    return "tei" if isinstance(body, dict) and "texts" in body else "jina"


# `texts` makes it TEI's, whatever else it holds
EitherRerank = Annotated[Annotated[TeiRequest, Tag("tei")] | Annotated[RerankRequest, Tag("jina")], Discriminator(_dialect)]


class ScoreRequest(Compat):
    """vLLM's score: one text against one or many, or pairwise; or `queries` and `documents` in their place."""

    model: Text | None = None
    text_1: Text | Texts | None = None
    text_2: Text | Texts | None = None
    queries: Text | Texts | None = None
    documents: Text | Texts | None = None


class Failure(BaseModel):
    """A document, or a pair, that could not be scored."""

    index: int
    message: str


class Ranked(BaseModel):
    """A document of a rerank request, by its place in it."""

    index: int
    relevance_score: float = Field(ge=0, le=1)
    document: dict[Literal["text"], str] | None = None


class RerankAnswer(BaseModel):
    """What clients of Jina and of Cohere read, best first; v2 has neither model nor usage."""

    id: str
    model: str | None = None
    results: list[Ranked]
    usage: dict[str, int] | None = None
    meta: dict[str, Any]
    failures: list[Failure] | None = None


class TeiRanked(BaseModel):
    """A text of a rerank request of Text Embeddings Inference; the score is raw where that was asked for."""

    index: int
    score: float
    text: str | None = None


class PairScore(BaseModel):
    """A pair of a score request; null where it could not be scored."""

    index: int
    object: Literal["score"]
    score: float | None


class ScoreAnswer(BaseModel):
    """What clients of vLLM's score API read, in the order asked."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: dict[str, int]
    failures: list[Failure] | None = None


class Reason(BaseModel):
    """The inner half of an error."""

    message: str
    type: str
    param: str | None = None
    code: int


class Problem(BaseModel):
    """The one body of every error."""

    id: str
    message: str
    error: Reason
