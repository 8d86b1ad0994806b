"""The same network on the same inputs by other means: memory formats, precisions, compilers, other runtimes."""

import copy
import io
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def runtimes(
    network: nn.Module, inputs: tuple[Tensor, ...], device: torch.device, is_compiling: bool
) -> dict[str, Callable[[], Any]]:
    """Calls by name, each warmed up; prints which are left out and why."""
    contiguous = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    folded = with_norms_folded(network)
    ways: dict[str, Callable[[], Any]] = {
        "eager, contiguous": _eager(contiguous, inputs),
        "eager, channels last (as shipped)": _eager(network, inputs),
        "channels last, norms folded": _eager(folded, inputs),
        "norms folded, bf16 autocast": _eager(folded, inputs, torch.bfloat16),
    }
    if device.type == "cuda":
        ways["norms folded, fp16 autocast"] = _eager(folded, inputs, torch.float16)
        ways["CUDA graph, norms folded"] = _graph(folded, inputs)
    if not is_compiling:
        _left_out("torch.compile", "not asked for (--compile)")
    elif device.type == "cpu" and not shutil.which("g++"):
        _left_out("torch.compile", "there is no g++")
    else:
        for kind, of in (("channels last", folded), ("contiguous", with_norms_folded(contiguous))):
            torch.compiler.reset()  # or it takes another network of the same classes for this one, with other shapes
            compiled = _eager(torch.compile(of, dynamic=False), inputs)  # type: ignore[arg-type]
            try:
                compiled()
            except torch._dynamo.exc.TorchDynamoException as error:
                _left_out(f"torch.compile, {kind}", f"it failed: {str(error).strip().splitlines()[0]}")
            else:
                ways[f"torch.compile, {kind}, norms folded"] = compiled
    if device.type == "cpu":
        others = {
            "ONNX Runtime": _onnx_runtime,
            "OpenVINO": partial(_openvino, "f32"),
            "OpenVINO, bf16": partial(_openvino, "bf16"),
        }
        for name, make in others.items():
            try:
                ways[name] = make(network, inputs)
            except ModuleNotFoundError as error:
                _left_out(name, str(error))
    for call in ways.values():
        call()
    return ways


def with_norms_folded(network: nn.Module) -> nn.Module:
    """A copy whose batch norms are folded into the convolutions before them: conv1 and norm1, or neighbours in a row.

    What is left of a batch norm is an identity. Results differ by rounding.
    """
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        children = dict(module.named_children())
        if isinstance(module, nn.Sequential):
            pairs = list(zip(children, list(children)[1:], strict=False))
        else:
            pairs = [(name, name.replace("conv", "norm")) for name in children if name.startswith("conv")]
        for conv, norm in pairs:
            is_pair = isinstance(children[conv], nn.Conv2d | nn.Conv3d) and isinstance(
                children.get(norm), nn.BatchNorm2d | nn.BatchNorm3d
            )
            if is_pair:
                fused = fuse_conv_bn_eval(children[conv], children[norm])  # type: ignore[type-var]
                setattr(module, conv, fused)
                setattr(module, norm, nn.Identity())
    return network


def _left_out(name: str, reason: str) -> None:
    print(f"Not measured: {name}, {reason}.", flush=True)


def _eager(network: nn.Module, inputs: tuple[Tensor, ...], precision: torch.dtype | None = None) -> Callable[[], Any]:
    device = inputs[0].device.type

    @torch.inference_mode()
    def call() -> Any:
        with torch.autocast(device, precision, enabled=precision is not None):
            return network(*inputs)

    return call


def _graph(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A CUDA graph of one forward pass; PyTorch wants it warmed up on a stream beside the current one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(3):
            network(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        outputs = network(*inputs)

    def call() -> Any:
        graph.replay()
        return outputs

    return call


def _onnx_runtime(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    import onnxruntime

    file = io.BytesIO()
    names = [f"input{number}" for number in range(len(inputs))]
    torch.onnx.export(copy.deepcopy(network), inputs, file, dynamo=False, input_names=names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}  # the exporter drops inputs that are not used
    arrays = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True) if name in wanted}
    return lambda: [torch.from_numpy(np.asarray(output)) for output in session.run(None, arrays)]


def _openvino(precision: str, network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    import openvino

    model = openvino.convert_model(copy.deepcopy(network), example_input=inputs)
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(model, "CPU", config)
    arrays = [tensor.numpy() for tensor in inputs[: len(compiled.inputs)]]
    return lambda: [torch.from_numpy(np.asarray(output)) for output in compiled(arrays).values()]
