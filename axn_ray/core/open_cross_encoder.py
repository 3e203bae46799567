"""Opens any cross-encoder by its name: weights that run here, a server, or a Python object. Knows no model's inside."""

import importlib

from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.pairs import PairScorer, TextPairScorer, TextScorer
from axn_ray.core.remote_cross_encoder import RemoteCrossEncoder
from axn_ray.errors import ModelError

PYTHON, HTTP = "python:", ("http://", "https://")


def open_cross_encoder(config: CrossEncoderConfig) -> PairScorer:
    """Open the CE that `config.cross_encoder` names.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    if config.cross_encoder.startswith(PYTHON):
        return TextPairScorer(_make_text_scorer(config.cross_encoder.removeprefix(PYTHON)))
    if config.cross_encoder.startswith(HTTP):
        return RemoteCrossEncoder(config)
    from axn_ray.core.causal_cross_encoder import CausalCrossEncoder, is_causal  # seconds to import, and only weights need it
    from axn_ray.core.cross_encoder import CrossEncoder

    return CausalCrossEncoder(config) if is_causal(config.cross_encoder) else CrossEncoder(config)


def is_model(config: CrossEncoderConfig) -> bool:
    """Whether the name is that of weights that run in this process."""
    return not config.cross_encoder.startswith((PYTHON, *HTTP))


def _make_text_scorer(path: str) -> TextScorer:
    """Call `module:factory`, which takes nothing and returns a `TextScorer`."""
    module, _, factory = path.partition(":")
    try:
        scorer: TextScorer = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"no cross-encoder at {PYTHON}{path} ({error}); give python:module:factory") from error
    missing = [name for name in ("fingerprint", "score_texts") if not hasattr(scorer, name)]
    if missing:
        raise ModelError(f"{PYTHON}{path} made an object without {missing[0]}; see axn_ray.core.pairs.TextScorer")
    return scorer
