"""A GPU that is short of memory: smaller batches, then the CPU. The GPU is played by "cpu:0", where nothing differs."""

import pytest
import torch
from torch import Tensor, nn

from model.memory import answer, has_bfloat16

GPU, CPU = torch.device("cpu:0"), torch.device("cpu")


class Network(nn.Module):
    """Doubles and negates. On the "GPU" it holds `capacity` items at most; it notes where it ran on how many."""

    def __init__(self, capacity: int, error: Exception | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.on = CPU
        self.ran: list[tuple[torch.device, int]] = []

    def to(self, device: torch.device) -> "Network":  # type: ignore[override]
        self.on = device
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.ran.append((self.on, len(x)))
        if self.on == GPU and len(x) > self.capacity:
            raise self.error
        return 2 * x, -x


BATCH = torch.arange(14.0).reshape(7, 2)


@pytest.mark.parametrize(
    ("capacity", "ran"),
    [
        (7, [(GPU, 7)]),
        (4, [(GPU, 7), (GPU, 4), (GPU, 3)]),
        (1, [(GPU, 7), (GPU, 4), (GPU, 2), *[(GPU, 1)] * 7]),
        (0, [(GPU, 7), (GPU, 4), (GPU, 2), (GPU, 1), *[(CPU, 1)] * 7]),
    ],
)
def test_the_answer_is_the_same_however_little_memory_there_is(
    capacity: int, ran: list[tuple[torch.device, int]]
) -> None:
    network = Network(capacity)
    doubled, negated = answer(network, BATCH, GPU)
    assert torch.equal(doubled, 2 * BATCH)
    assert torch.equal(negated, -BATCH)
    assert network.ran == ran


def test_the_next_one_is_tried_on_the_gpu_again() -> None:
    network = Network(0)
    answer(network, BATCH, GPU)
    network.capacity = 7
    network.ran.clear()
    answer(network, BATCH, GPU)
    assert network.ran == [(GPU, 7)]


def test_cudnn_says_it_in_its_own_words() -> None:
    network = Network(4, RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert torch.equal(answer(network, BATCH, GPU)[0], 2 * BATCH)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("odd shape")])
def test_other_errors_are_not_hidden(error: Exception) -> None:
    network = Network(0, error)
    with pytest.raises(type(error), match=str(error)):
        answer(network, BATCH, GPU)
    assert len(network.ran) == 1


def test_a_cpu_that_is_out_of_memory_says_so() -> None:
    class Full(Network):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            raise self.error

    with pytest.raises(torch.OutOfMemoryError):
        answer(Full(0), BATCH, CPU)


def test_answers_are_float32_whatever_the_processor_reckons_in() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2, bias=False)
            nn.init.eye_(self.linear.weight)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            assert self.linear(x).dtype == (torch.bfloat16 if has_bfloat16("cpu") else torch.float32)
            return (2 * self.linear(x),)

    with torch.inference_mode():
        (doubled,) = answer(Doubled(), BATCH, CPU)
    assert doubled.dtype == torch.float32
    torch.testing.assert_close(doubled, 2 * BATCH, rtol=1e-2, atol=0)
