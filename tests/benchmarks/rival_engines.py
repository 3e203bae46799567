"""Other ways to run the sample cross-encoder's weights, each with the `logits` that `TokenPairScorer` asks of an engine.

For `make bench-scoring` alone (extra `bench`): none of them is in the package, see the table in the README.
"""

import warnings

import nncf
import numpy as np
import onnxruntime
import openvino
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from axn_ray.core.engines import TorchEngine

NAMES = ("input_ids", "attention_mask", "token_type_ids")
CPU = torch.device("cpu")


class Compiled(TorchEngine):
    """The plain engine in bfloat16 through `torch.compile`, shapes dynamic."""

    def __init__(self, model):
        super().__init__(model, torch.bfloat16, CPU)
        self._model = torch.compile(self._model, dynamic=True)


def export(model, path):
    """Write the model as ONNX with free batch and length."""
    example = torch.ones(2, 8, dtype=torch.int64)
    axes = {name: {0: "rows", 1: "tokens"} for name in NAMES}
    model.set_attn_implementation("eager")  # the exporter's trace of SDPA's mask keeps the example's length
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.float().eval(),
            (),
            str(path),
            kwargs={"input_ids": example, "attention_mask": example, "token_type_ids": example * 0},
            input_names=list(NAMES),
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    return path


def quantize_onnx(path, out):
    """int8 weights, activations quantized as they come."""
    quantize_dynamic(str(path), str(out), weight_type=QuantType.QInt8, per_channel=True, extra_options={"MatMulConstBOnly": True})
    return out


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    def __init__(self, path, threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(self, ids, mask, types, column=0):
        return self._session.run(None, dict(zip(NAMES, (ids, mask, types), strict=True)))[0][:, column]


class OpenVino:
    """OpenVINO on the CPU; `precision` is the type it may compute in."""

    def __init__(self, model, threads, precision):
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._model = openvino.Core().compile_model(model, "CPU", settings)

    def logits(self, ids, mask, types, column=0):
        return np.asarray(self._model(dict(zip(NAMES, (ids, mask, types), strict=True)))[0])[:, column].astype(np.float32)


def quantize_openvino(path, batches):
    """int8 weights and activations, ranges from a few batches."""
    feed = nncf.Dataset([dict(zip(NAMES, batch, strict=True)) for batch in batches])
    return nncf.quantize(openvino.Core().read_model(path), feed, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
