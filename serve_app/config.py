"""What the app is built from: one frozen value, the same in YAML and on the command line. Knows no Ray."""

from pathlib import Path

from pydantic import Field

from axn_ray.core.cross_encoder_config import CrossEncoderConfig

SAMPLE = "sample"


class AppArgs(CrossEncoderConfig):
    """The index to search, the cross-encoder that scores, and the limits that keep both answering."""

    index: str = Field(SAMPLE, description="folder of a run (`embeddings` and a factorization), or `sample`: the bundled corpus")
    cache: Path = Field(Path("~/.cache/axn-ray"), description="where the sample index and the items' token ids are kept")
    threads: int | None = Field(None, ge=1, description="CPU threads of a cross-encoder replica; default: its Ray CPUs")
    api_keys_file: Path | None = Field(None, description="one key a line, read again when it changes; else AXN_API_KEYS")
    max_queued_pairs: int = Field(4096, ge=1, description="pairs that may wait; requests beyond get 429 and Retry-After")
    max_budget: int = Field(1000, ge=1, description="CE calls that one search may ask for")
    max_queries: int = Field(64, ge=1, description="queries in one request")
    max_query_chars: int = Field(10_000, ge=1, description="characters of a query; a longer one is 422")
    max_document_chars: int = Field(100_000, ge=1, description="characters of a document; what follows is not read")
    max_documents: int = Field(1000, ge=1, description="documents in one request of the rerank and score routes")
    max_body_bytes: int = Field(8 << 20, ge=1, description="bytes of a request; more is 413")
    deadline_ms: int = Field(30_000, ge=1, description="of requests that name none; no request may ask for more")
    stuck_after_s: float = Field(60, gt=0, description="a forward pass longer than this makes the replica unhealthy")
