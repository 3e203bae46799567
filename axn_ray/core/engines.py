"""Runs a batch of token ids through a model's weights. Knows no pair, no text and no policy."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def _cast_to_float(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)


def set_encoder_dtype(model: Any, dtype: torch.dtype) -> None:
    """Cast the encoder to `dtype`; keep its pooler and the head in float32 and feed them float32."""
    encoder = model.base_model
    encoder.to(dtype)
    heads = [child for child in model.children() if child is not encoder]
    if getattr(encoder, "pooler", None) is not None:
        heads.append(encoder.pooler)
    for head in heads:
        head.float()
        head.register_forward_pre_hook(_cast_to_float)


class TorchEngine:
    """A transformers sequence-classification model, its encoder in `dtype`, its pooler and head in float32."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        set_encoder_dtype(model, dtype)
        self._model, self._device = model.to(device).eval(), device

    @torch.inference_mode()
    def logits(
        self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], types: npt.NDArray[np.int64] | None, column: int = 0
    ) -> npt.NDArray[np.float32]:
        """One output of each row of a padded batch: (n, longest) -> (n,) float32."""
        inputs = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if types is not None else {})
        tensors = {name: self._send(array) for name, array in inputs.items()}
        logits = self._model(**tensors).logits
        return logits[:, column].float().cpu().numpy()

    def _send(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        """To the device; from page-locked memory where that is a GPU, so that the host does not wait for the copy."""
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
