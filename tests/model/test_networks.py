"""The networks: shapes in, shapes out, and what must hold whatever the weights."""

import torch

from model.networks import FractureNet, VertebraUNet


def make_unet() -> VertebraUNet:
    torch.manual_seed(0)
    return VertebraUNet((4, 8, 16)).eval()


def make_fracture_net() -> FractureNet:
    torch.manual_seed(0)
    return FractureNet(6, (4, 8, 16), num_hidden=8).eval()


@torch.inference_mode()
def test_unet_answers_on_its_input_grid_and_at_every_coarser_scale() -> None:
    scores = make_unet()(torch.randn(2, 2, 8, 12, 16))

    assert [tuple(score.shape) for score in scores] == [(2, 2, 4, 6, 8), (2, 2, 8, 12, 16)]


@torch.inference_mode()
def test_a_unet_may_be_told_more_than_the_windows() -> None:
    scores = VertebraUNet((4, 8), in_channels=5).eval()(torch.randn(1, 5, 4, 4, 4))

    assert scores[-1].shape == (1, 2, 4, 4, 4)


@torch.inference_mode()
def test_untrained_unet_says_background_and_middle_of_the_neck() -> None:
    answer = make_unet()(torch.randn(1, 2, 8, 8, 8))[-1][0]

    assert (answer[0] < 0).all()
    torch.testing.assert_close(answer[1], torch.full_like(answer[1], 4.5))


@torch.inference_mode()
def test_fracture_net_gives_a_logit_a_vertebra_and_a_region_logit_a_pixel() -> None:
    logits, attention, regions = make_fracture_net()(torch.randn(3, 5, 6, 32, 32))

    assert logits.shape == (3,)
    assert regions.shape == (3, 5, 32, 32)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(3))


@torch.inference_mode()
def test_a_vertebra_is_judged_the_same_alone_and_in_a_batch() -> None:
    network = make_fracture_net()
    stacks = torch.randn(3, 5, 6, 32, 32)

    together = network(stacks)
    alone = network(stacks[1:2])

    for part, whole in zip(alone, together, strict=True):
        torch.testing.assert_close(part[0], whole[1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_order_of_slices_matters() -> None:
    network = make_fracture_net()
    stack = torch.randn(1, 5, 6, 32, 32)

    assert not torch.allclose(network(stack)[0], network(stack.flip(1))[0])
