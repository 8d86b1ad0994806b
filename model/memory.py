"""A network's answer, in bfloat16 where the processor reckons in it, and though the GPU's memory is short: in smaller
batches, and at last on the CPU, which takes longer.

Others may use the same GPU, and Series differ in size: short now does not mean short for the next one.
"""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def answer(network: nn.Module, batch: Tensor, device: torch.device, *more: Tensor) -> tuple[Tensor, ...]:
    """The network's outputs for `(B, ...)`, float32 on the CPU; each output has B first.

    more: its further inputs, each with B first. The network is moved to where it is run, and may be left there: the
    next call moves it again.
    """
    size = len(batch)
    while True:
        try:
            return _run(network, (batch, *more), device, size)
        except RuntimeError as error:
            if device == _CPU or not _is_out_of_memory(error):
                raise
        # Not in the handler above: as long as the error lives, its traceback holds the tensors.
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if size > 1:
            size = (size + 1) // 2
            log.warning("action=out-of-memory device=%s: trying %d of %d at a time", device, size, len(batch))
        else:
            log.warning("action=out-of-memory device=%s: going on with the CPU", device)
            device = _CPU


def _run(network: nn.Module, inputs: tuple[Tensor, ...], device: torch.device, size: int) -> tuple[Tensor, ...]:
    network.to(device)
    parts: list[Sequence[Tensor]] = []
    for part in zip(*(torch.split(tensor, size) for tensor in inputs), strict=True):
        with in_bfloat16(device.type):
            outputs = network(*(tensor.to(device) for tensor in part))
        parts.append([output.float().cpu() for output in outputs])
    return tuple(torch.cat(output) for output in zip(*parts, strict=True))


def in_bfloat16(device_type: str) -> torch.autocast:
    """A context, new for each step of a training, since it keeps the weights' casts: see `has_bfloat16`."""
    return torch.autocast(device_type, torch.bfloat16, enabled=has_bfloat16(device_type))


@cache
def has_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 is this device's own, and so about twice as fast as float32, rather than imitated by it."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return device_type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _is_out_of_memory(error: RuntimeError) -> bool:
    """cuDNN and cuBLAS have errors of their own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)
