"""Which cross-encoder, and how it reads a pair. Imports no model: a process without weights has its settings in no time."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from axn_ray import sample
from axn_ray.core.models import Dtype
from axn_ray.core.pair_layout import Overlong
from axn_ray.core.prompt import QWEN3_INSTRUCTION, QWEN3_TEMPLATE

Config = TypeVar("Config", bound="CrossEncoderConfig")
SOURCES = "hub id, local folder, PEFT adapter folder, http://SERVER#tei (or #vllm, #cohere, #jina, #axn), python:module:factory"


class CrossEncoderConfig(BaseModel):
    """Which CE, and how it reads a pair; the part that all stages with a CE share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cross_encoder: str = Field(sample.CROSS_ENCODER, description=SOURCES)
    max_length: int | None = Field(None, ge=8, description="tokens per pair; default: what the tokenizer says")
    dtype: Dtype = Field("auto", description="of the encoder; pooler and head are always float32")
    batch_tokens: int = Field(4096, ge=1, description="tokens per forward pass, padding included")
    overlong: Overlong = Field("truncate", description="an item that does not fit: refuse it, cut its end, or score its chunks")
    label: str | None = Field(None, description="the output to read, of a model with several")
    yes_token: str = Field("yes", min_length=1, description="of a causal LM: the token whose logit is the score")
    no_token: str = Field("no", description="of a causal LM: the token whose logit is taken off; empty for none")
    template: str = Field(QWEN3_TEMPLATE, description="of a causal LM: what it reads, with {query}, {item} and {instruction}")
    instruction: str = Field(QWEN3_INSTRUCTION, description="of a causal LM: what stands for {instruction}")
    api_key: SecretStr | None = Field(None, description="of a server: file:PATH or env:NAME, where its key stands")
    in_flight: int = Field(8, ge=1, description="of a server: requests at once, from each worker")
    request_items: int = Field(32, ge=1, description="of a server: items in a request")
    timeout: float = Field(60.0, gt=0, description="of a server: seconds for one request")

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, key: SecretStr | None) -> SecretStr | None:
        """A place that no command has read is no key."""
        if key is not None and key.get_secret_value().startswith(("env:", "file:")):
            raise ValueError("api_key says where the key stands, which only the axn commands look up; give the key itself")
        return key


def with_whole_path(config: Config) -> Config:
    """The same with a local folder's whole path: workers may run in another working directory."""
    name = config.cross_encoder
    return config.model_copy(update={"cross_encoder": str(Path(name).resolve())}) if name and Path(name).is_dir() else config
