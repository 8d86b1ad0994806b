"""The networks: shapes in, shapes out, and what must hold whatever the weights."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from model.networks import FractureNet, RegionUNet, SliceUNet, SliceVertebraUNet, StudyNet, VertebraUNet, make_encoder
from model.networks.fracture import NUM_EVIDENCE_PIXELS


def make_unet() -> VertebraUNet:
    torch.manual_seed(0)
    return VertebraUNet((4, 8, 16)).eval()


def make_fracture_net() -> FractureNet:
    torch.manual_seed(0)
    return FractureNet("residual-4-8-16", num_hidden=8).eval()


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
    logits, attention, regions, *_ = make_fracture_net()(torch.randn(3, 5, 6, 32, 32))

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


@torch.inference_mode()
def test_the_mean_of_what_slices_say_by_attention_is_what_the_vertebra_is_said_to_be() -> None:
    answer = make_fracture_net()(torch.randn(2, 5, 6, 32, 32))

    torch.testing.assert_close((answer.attention * answer.slice_logits).sum(dim=1), answer.logits)
    assert answer.context.shape == (2, 16)


@torch.inference_mode()
def test_what_the_regions_show_counts_inside_the_vertebra_and_not_beside_it() -> None:
    network = make_fracture_net()
    x = torch.zeros(1, 3, 6, 32, 32)
    x[..., -1, :, :16] = 1  # the mask: the left half
    regions = torch.full((3, 1, 32, 32), -4.0)
    network.decoder.forward = lambda features: regions  # type: ignore[method-assign]
    network.gru.forward = lambda features: (torch.zeros(1, 3, 16), None)  # type: ignore[assignment]

    nothing = network(x).logits
    regions[:, :, 8:24, 20:28] = 4
    beside = network(x).logits
    regions[:, :, 8:24, 4:12] = 4
    inside = network(x).logits

    torch.testing.assert_close(beside, nothing)
    torch.testing.assert_close(inside, nothing + 8 * network.evidence_weight)


@torch.inference_mode()
def test_each_level_is_judged_by_its_own_head() -> None:
    network = FractureNet("residual-4-8", num_hidden=4, num_heads=7, num_layers=2).eval()
    network.head.weight.zero_()
    network.head.bias.copy_(torch.arange(7.0))
    network.evidence_weight.zero_()

    answer = network(torch.randn(3, 5, 6, 16, 16), torch.tensor([6, 0, 3]))

    torch.testing.assert_close(answer.logits, torch.tensor([6.0, 0.0, 3.0]))
    torch.testing.assert_close(answer.slice_logits, torch.tensor([6.0, 0.0, 3.0])[:, None].expand(3, 5))
    with pytest.raises(ValueError, match="say which levels"):
        network(torch.randn(3, 5, 6, 16, 16))


ENCODERS = ["residual-4-8-16", "efficientnet-b0", "efficientnet-b1", "efficientnet-b2", "efficientnet-b3"]


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_encoders_give_what_they_promise(name: str) -> None:
    encoder = make_encoder(name, in_channels=5).eval()

    features = encoder(torch.randn(2, 5, 64, 96))

    shapes = [(2, c, 32 >> i, 48 >> i) for i, c in enumerate(encoder.out_channels)]
    assert [tuple(feature.shape) for feature in features] == shapes


# Parameters of the published networks with 3 channels and 1000 classes, which torchvision and MONAI have too; channels
# of their last stage, and of the layers that we leave out: a 1 x 1 convolution with norm, and the classifier.
@pytest.mark.parametrize(
    ("variant", "num_published", "last", "head"),
    [
        ("b0", 5_288_548, 320, 1280),
        ("b1", 7_794_184, 320, 1280),
        ("b2", 9_109_994, 352, 1408),
        ("b3", 12_233_232, 384, 1536),
    ],
)
def test_efficientnets_are_as_large_as_published(variant: str, num_published: int, last: int, head: int) -> None:
    encoder = make_encoder(f"efficientnet-{variant}", in_channels=3)

    left_out = last * head + 2 * head + head * 1000 + 1000
    assert sum(p.numel() for p in encoder.parameters()) == num_published - left_out


def test_training_skips_blocks_at_random_and_analysis_none() -> None:
    torch.manual_seed(0)
    encoder = make_encoder("efficientnet-b0", in_channels=1)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    x = torch.randn(4, 1, 64, 64)

    assert not torch.equal(encoder(x)[-1], encoder(x)[-1])
    encoder.eval()
    assert torch.equal(encoder(x)[-1], encoder(x)[-1])


def test_an_unknown_encoder_is_refused_by_name() -> None:
    for name in ("efficientnet-b9", "resnet", "residual", "residual-4-"):
        with pytest.raises(ValueError, match=f"no encoder '{name}'.*efficientnet-b0"):
            make_encoder(name, in_channels=6)


def test_without_timm_its_encoders_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)

    with pytest.raises(ModuleNotFoundError, match=r"timm:resnet18 needs timm.*pip install timm"):
        make_encoder("timm:resnet18", in_channels=6)


class FakeTimm(ModuleType):
    """timm cannot be installed beside a torch for CPUs: this answers as it does, by the strides given."""

    def __init__(self, *strides: int, only_side: int | None = None, is_channels_last: bool = False) -> None:
        super().__init__("timm")
        self.strides, self.only_side, self.is_channels_last = strides, only_side, is_channels_last

    def create_model(self, name: str, *, pretrained: bool, features_only: bool, in_chans: int) -> nn.Module:
        strides, only_side, is_channels_last = self.strides, self.only_side, self.is_channels_last

        class Backbone(nn.Module):
            feature_info = SimpleNamespace(reduction=lambda: list(strides), channels=lambda: [4] * len(strides))

            def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
                assert x.shape[1] == in_chans
                assert x.shape[-1] == (only_side or x.shape[-1]), f"Input height doesn't match model ({only_side})."
                features = [x[:, :4, ::stride, ::stride] for stride in strides]
                return [feature.permute(0, 2, 3, 1) for feature in features] if is_channels_last else features

        assert features_only
        assert not pretrained
        return Backbone()


@pytest.mark.parametrize("strides", [(2, 4, 8), (4, 8, 16, 32)])
@torch.inference_mode()
def test_timm_backbones_of_any_first_stride_fit(monkeypatch: pytest.MonkeyPatch, strides: tuple[int, ...]) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm(*strides))

    assert FractureNet("timm:any", 4).eval()(torch.randn(1, 3, 6, 64, 64)).regions.shape == (1, 3, 64, 64)
    assert SliceUNet("timm:any", in_channels=4).eval()(torch.randn(1, 4, 64, 64)).shape == (1, 9, 64, 64)


def test_timm_backbones_without_halving_scales_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm(16, 16, 16))

    with pytest.raises(ValueError, match=r"timm:vit has features at strides \[16, 16, 16\]"):
        make_encoder("timm:vit", in_channels=6)


@torch.inference_mode()
def test_timm_backbones_whose_channels_come_last_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = torch.randn(1, 6, 64, 64)
    found = []
    for is_channels_last in (False, True):
        monkeypatch.setitem(sys.modules, "timm", FakeTimm(2, 4, 8, is_channels_last=is_channels_last))
        found.append(make_encoder("timm:any", in_channels=6)(slices))

    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_timm_backbones_that_read_one_size_only_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm(4, 8, 16, 32, only_side=224))

    with pytest.raises(ValueError, match=r"timm:swin does not read slices of 64 x 64 pixels \(Input height.*\(224\)"):
        make_encoder("timm:swin", in_channels=6)


@pytest.mark.parametrize("encoder", ["residual-4-8-16", "efficientnet-b0"])
@torch.inference_mode()
def test_slice_unet_gives_a_class_for_each_pixel(encoder: str) -> None:
    network = SliceUNet(encoder).eval()

    assert network(torch.randn(2, 3, network.stride, 2 * network.stride)).shape == (
        2,
        9,
        network.stride,
        2 * network.stride,
    )


@torch.inference_mode()
def test_slice_by_slice_a_volume_gets_the_scores_of_the_3d_unet() -> None:
    torch.manual_seed(0)
    network = SliceVertebraUNet("residual-4-8").eval()
    network.NUM_AT_ONCE = 4
    volume = torch.randn(2, 2, 10, 8, 12)

    (scores,) = network(volume)

    assert scores.shape == volume.shape
    classes = network.unet(volume[1:, 0, [5, 6, 7]])[0]
    torch.testing.assert_close(scores[1, 0, 6].sigmoid(), 1 - classes.softmax(0)[0])
    assert torch.equal(scores[1, 1, 6], classes[1:].argmax(0) + 1.0)
    below_the_first = network.unet(volume[:1, 0, [0, 0, 1]])[0]
    torch.testing.assert_close(scores[0, 0, 0].sigmoid(), 1 - below_the_first.softmax(0)[0])


@torch.inference_mode()
def test_the_second_opinion_rests_on_voxels_of_the_vertebra_alone() -> None:
    torch.manual_seed(0)
    network = RegionUNet("residual-4-8").eval()
    stack = torch.randn(1, 5, 6, 32, 32)
    stack[:, :, -1] = 0
    stack[:, :, -1, :16] = 1
    answer = network(stack)
    inside = answer.regions[:, :, :16].flatten().topk(NUM_EVIDENCE_PIXELS).values

    assert answer.regions.shape == (1, 5, 32, 32)
    torch.testing.assert_close(answer.logits, inside.mean()[None])


def make_study(*, is_trained: bool) -> StudyNet:
    torch.manual_seed(0)
    network = StudyNet(16, num_hidden=4).eval()
    if is_trained:
        for head in (network.level_head, network.patient_head):
            nn.init.normal_(head.weight)
    return network


CONTEXTS, LOGITS = torch.randn(2, 7, 16), torch.tensor([[-3.0, -1, 2, 0, -2, 1, 9], [-4.0, -3, -2, -1, -5, -6, -7]])
PRESENT = torch.tensor([[True] * 6 + [False], [True] * 7])


@torch.inference_mode()
def test_an_untrained_study_net_repeats_the_levels_and_the_likeliest_is_the_patient() -> None:
    answer = make_study(is_trained=False)(CONTEXTS, LOGITS, PRESENT)

    torch.testing.assert_close(answer.logits, LOGITS)
    torch.testing.assert_close(answer.patient, torch.tensor([2.0, -1.0]))


@torch.inference_mode()
def test_a_study_net_looks_at_neighbours_but_not_at_what_is_missing() -> None:
    network = make_study(is_trained=True)
    others, elsewhere = CONTEXTS.clone(), LOGITS.clone()
    others[0, 6], elsewhere[0, 6] = 100.0, 50.0

    before, after = network(CONTEXTS, LOGITS, PRESENT), network(others, elsewhere, PRESENT)
    complete = network(others, elsewhere, torch.ones_like(PRESENT))

    torch.testing.assert_close(before.logits[0, :6], after.logits[0, :6])
    torch.testing.assert_close(before.patient, after.patient)
    assert not torch.allclose(complete.logits[0, :6], after.logits[0, :6])


def gradients_are_finite(network: nn.Module) -> bool:
    return all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_every_weight_can_learn() -> None:
    torch.manual_seed(0)
    stacks = torch.randn(2, 3, 6, 64, 64)
    fracture_net = FractureNet("efficientnet-b0", 4, num_heads=7, num_layers=2, dropout=0.5)
    region_net = RegionUNet("efficientnet-b0")
    slice_unet = SliceUNet("efficientnet-b0")
    study_net = make_study(is_trained=True).train()

    answer = fracture_net(stacks, torch.tensor([0, 6]))
    (answer.logits.sum() + answer.regions.square().mean()).backward()
    opinion = region_net(stacks)
    (opinion.logits.sum() + opinion.regions.square().mean()).backward()
    slice_unet(torch.randn(2, 3, 64, 64)).square().mean().backward()
    study = study_net(CONTEXTS, LOGITS, PRESENT)
    (study.logits[PRESENT].square().mean() + study.patient.square().mean()).backward()

    for network in (fracture_net, region_net, slice_unet, study_net):
        assert gradients_are_finite(network)
