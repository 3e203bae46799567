"""A causal language model as a cross-encoder: the logit of one token after a prompt, less that of another.

The way of Qwen3-Reranker, whose published score is the sigmoid of this one. Knows no corpus, no search and no Ray.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from axn_ray.core.cross_encoder import describe_model, find_max_length, is_adapter, load_adapter_or_model, not_loaded
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.engines import set_encoder_dtype
from axn_ray.core.models import choose_device, choose_dtype, locate_model
from axn_ray.core.pair_layout import Int64Array
from axn_ray.core.pairs import FloatArray
from axn_ray.core.prompt import Prompt
from axn_ray.core.token_scorer import TokenPairScorer
from axn_ray.core.tokens import TokenTable
from axn_ray.errors import ModelError

logger = logging.getLogger(__name__)


def is_causal(name: str) -> bool:
    """Whether the name is of a causal language model, or of an adapter for one.

    Raises:
        ModelError: nothing can be read under that name.
    """
    source = locate_model(name)
    try:
        if is_adapter(source):
            from peft import PeftConfig

            return bool(PeftConfig.from_pretrained(source).task_type == "CAUSAL_LM")
        architectures = AutoConfig.from_pretrained(source).architectures or []
    except (OSError, ValueError) as error:
        raise not_loaded(name, error) from error
    return bool(set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


class CausalCrossEncoder(TokenPairScorer):
    """A causal CE: `logit(yes_token)`, less `logit(no_token)` where one is named, after `template`.

    Raises:
        ModelError: see `load_adapter_or_model`, `find_max_length` and `Prompt`; a token that the model does not know.
    """

    def __init__(self, config: CrossEncoderConfig) -> None:
        model, self._tokenizer = load_adapter_or_model(config.cross_encoder, AutoModelForCausalLM)
        names = [name for name in (config.yes_token, config.no_token) if name]
        tokens = [find_token(self._tokenizer, name) for name in names]
        device = choose_device()
        dtype = choose_dtype(config.dtype, device)
        self._prompt = Prompt.of(config.template, config.instruction)
        max_length = find_max_length(config, model, self._tokenizer)
        self.fingerprint = describe_model(config, model, max_length, dtype) | {
            "template": config.template.replace("{instruction}", config.instruction),
            "tokens": names,
        }
        engine = CausalEngine(model, tokens, dtype, device)
        logger.info("causal cross-encoder: logit of %s after the template", " less that of ".join(map(repr, names)))
        template = self._prompt.pair_template(self._tokenizer)
        super().__init__(engine, template, max_length, config.overlong, config.batch_tokens)

    def tokenize_queries(self, texts: Sequence[str]) -> TokenTable:
        """Tokenize n queries once, as they stand in the template."""
        return self._prompt.tokenize(texts, 0, self._tokenizer)

    def tokenize(self, texts: Sequence[str]) -> TokenTable:
        """Tokenize n items once, as they stand in the template."""
        return self._prompt.tokenize(texts, 1, self._tokenizer)


def find_token(tokenizer: Any, name: str) -> int:
    """The id of one token by its name in the vocabulary.

    Raises:
        ModelError: the vocabulary does not have it.
    """
    token = tokenizer.get_vocab().get(name)
    if token is None:
        raise ModelError(f"the tokenizer has no token {name!r}; set yes_token and no_token to entries of its vocabulary")
    return int(token)


class CausalEngine:
    """A causal LM whose output layer keeps the rows of one or two tokens; takes the model over."""

    def __init__(self, model: Any, tokens: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        full = model.get_output_embeddings()
        rows = list(tokens)
        head = torch.nn.Linear(full.weight.shape[1], len(rows), bias=full.bias is not None)
        head.weight.data = full.weight.detach()[rows].clone()
        if full.bias is not None:
            head.bias.data = full.bias.detach()[rows].clone()
        model.set_output_embeddings(head)
        set_encoder_dtype(model, dtype)
        self._model, self._device = model.to(device).eval(), device

    @torch.inference_mode()
    def logits(self, ids: Int64Array, mask: Int64Array, _: Int64Array | None, column: int = 0) -> FloatArray:
        """The first token's logit after each row, less the second's: (n, longest) -> (n,) float32; `column` is 0."""
        seen = torch.from_numpy(mask).to(self._device)
        outputs = self._model(torch.from_numpy(ids).to(self._device), attention_mask=seen, use_cache=False)
        after = outputs.logits.float()[torch.arange(len(ids), device=self._device), seen.sum(1) - 1]
        score = after[:, 0] - after[:, 1] if after.shape[1] > 1 else after[:, 0]
        return score.cpu().numpy()
