"""What both trainings share: a one-cycle run of AdamW with averaged weights."""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 20
EMA_DECAY = 0.99


def train(
    network: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    *,
    num_steps: int,
    learning_rate: float,
    decay: float = EMA_DECAY,
) -> Iterator[tuple[int, float]]:
    """Trains in place, giving each step and its loss; at the end the network holds its averaged weights.

    The learning rate warms up and then falls to zero along a cosine: do not judge a run before its end.
    decay: the average goes over some 1 / (1 - decay) steps; over fewer at first.
    """
    averaged = copy.deepcopy(network).eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2)
    for step in range(num_steps):
        warmth = min(1.0, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmth * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        network.train()
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        _average(averaged, network, min(decay, (1 + step) / (10 + step)))
        yield step, loss.item()
    network.load_state_dict(averaged.state_dict())
    network.eval()


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    for kept, new in zip(averaged.state_dict().values(), network.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)
