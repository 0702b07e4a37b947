"""Gradient attention of whole models: every family and kind against plain loops, captum and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LayerGradCam, LayerGradientXActivation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.attention import AttentionKind
from fewshot_seg.embedding_attention import GradientAttention, SimilarityExplanation
from fewshot_seg.layer_outputs import infer_token_grid

BATCH = 2
REQUESTS = ("siamese", "dissimilar siamese", "triplet", "quadruplet", "cosine", "margin")
NEGATIVES = {"siamese": 0, "dissimilar siamese": 1, "triplet": 1, "quadruplet": 2, "cosine": 0, "margin": 1}


class SiameseWithInPlaceReLU(nn.Module):
    """What a user may write: ReLUs and additions in place, right behind the layers that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)  # runs twice
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.activation(self.first(images))
        maps = maps + self.activation(self.second(maps))
        maps *= 2
        return self.head(F.adaptive_avg_pool2d(maps, 2).flatten(1))


class EncoderThatEmbeds(nn.Module):
    """An encoder of segmentation-models-pytorch, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = smp.encoders.get_encoder("tu-mobilenetv3_small_050", depth=4, weights=None)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)[-1].mean((2, 3))


class ChannelsLast(nn.Module):
    """Swin's layout: maps (B, h, w, C) between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 7, 8, stride=8)
        self.block = nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 20), nn.GELU())
        self.head = nn.Linear(20, 5)

    def forward(self, images: Tensor) -> Tensor:
        cells = self.block(self.patches(images).permute(0, 2, 3, 1))
        return self.head(torch.tanh(cells)).mean((1, 2))


def vision_transformer() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(32, 48),
        patch_size=8,
        embed_dim=12,
        depth=2,
        num_heads=2,
        num_classes=0,
        reg_tokens=2,
    )


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    grids: tuple[tuple[int, int], ...]
    size: tuple[int, int] = (48, 64)
    layout: str = "maps"
    batch: int = BATCH


FAMILIES = {
    "torchvision resnet18": Family(
        lambda: torchvision.models.resnet18(weights=None),
        ("layer4", "layer3"),
        ((1, 2), (2, 3)),
        (32, 48),
        batch=1,  # large beside the others
    ),
    "timm resnet": Family(
        lambda: timm.create_model("test_resnet", num_classes=0, zero_init_last=False),
        ("layer2.0.conv1", "layer4"),
        ((6, 8), (2, 2)),
    ),
    "timm mobilenetv3": Family(
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=0), ("blocks.3",), ((3, 4),)
    ),
    "segmentation-models encoder": Family(EncoderThatEmbeds, ("encoder.model.blocks.2",), ((3, 4),)),
    "own siamese network": Family(SiameseWithInPlaceReLU, ("first", "second"), ((12, 16), (12, 16))),
    "timm vision transformer": Family(
        vision_transformer, ("blocks.0", "blocks.1.norm1"), ((4, 6), (4, 6)), (32, 48), "tokens"
    ),
    "channels last": Family(ChannelsLast, ("block",), ((6, 8),), layout="channels last"),
}


def make_model(family: Family, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return family.build().to(dtype).eval()


def attention_of(model: nn.Module, family: Family) -> GradientAttention:
    return GradientAttention(model, family.layers, channels_last=family.layout == "channels last" or None)


def draw_images(family: Family, count: int, batch: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch or family.batch, 3, *family.size)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def images_of(family: Family, request: str, batch: int | None = None) -> list[Tensor]:
    """Anchor, positive (if any), negatives."""
    count = 1 + (request != "dissimilar siamese") + NEGATIVES[request]
    return draw_images(family, count, batch)


def ask(explain: GradientAttention, request: str, images: Sequence[Tensor], **options: Any) -> SimilarityExplanation:
    if request == "dissimilar siamese":
        return explain(images[0], negatives=images[1], kind="siamese", **options)
    return explain(images[0], images[1], images[2:], kind=request, **options)  # type: ignore[arg-type]


def maps_of(found: SimilarityExplanation) -> list[tuple[Tensor, ...]]:
    """Layers of every image, in the order of `images_of`."""
    return [found.anchor, *([found.positive] if found.positive else []), *found.negatives]


def hooks_on(model: nn.Module) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


# --- the oracle: one image, one layer, one channel at a time -------------------------------------------------------


def literal_directions(request: str, f: list[Tensor]) -> list[Tensor]:
    """The constant v of s = v . f for every image, from the formulas of the paper; f: unit-length (D,) each."""
    if request == "siamese":
        return [1 - (f[0] - f[1]).abs()] * 2
    if request == "dissimilar siamese":
        return [(f[0] - f[1]).abs()] * 2
    if request == "triplet":
        return [(1 - (f[0] - f[1]).abs()) * (f[0] - f[2]).abs()] * 3
    if request == "quadruplet":
        return [(1 - (f[0] - f[1]).abs()) * (f[0] - f[2]).abs() * (f[0] - f[3]).abs()] * 4
    if request == "cosine":
        return [f[1], f[0]]
    return [f[1] - f[2], f[0], f[0]]


def outputs_and_gradients(
    model: nn.Module, layers: Sequence[str], image: Tensor, direction: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Output of every layer, and the gradient of the scalar score with respect to zeros that are added to it."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def adding_zeros(layer: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add_zeros(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            zeros = torch.zeros_like(output, requires_grad=True)
            seen[layer] = (output.detach().clone(), zeros)
            return output + zeros

        return add_zeros

    handles = [model.get_submodule(layer).register_forward_hook(adding_zeros(layer)) for layer in layers]
    score = (direction * F.normalize(model(image[None]), dim=1)[0]).sum()
    for handle in handles:
        handle.remove()
    found = []
    for layer in layers:
        output, zeros = seen[layer]
        (gradient,) = torch.autograd.grad(score, zeros, retain_graph=True)
        found.append((output[0], gradient[0]))
    return found


def cells(tensor: Tensor, layout: str, grid: tuple[int, int]) -> Tensor:
    """One image's output or gradient as (C, h, w)."""
    if layout == "maps":
        return tensor
    if layout == "channels last":
        return tensor.permute(2, 0, 1)
    patches = tensor[-grid[0] * grid[1] :]
    return torch.stack([patches[row * grid[1] : (row + 1) * grid[1]] for row in range(grid[0])]).permute(2, 0, 1)


def loop_over_channels(maps: Tensor, gradient: Tensor, elementwise: bool) -> Tensor:
    total = torch.zeros_like(maps[0])
    for channel, slopes in zip(maps.unbind(), gradient.unbind(), strict=True):
        total = total + channel * (slopes if elementwise else slopes.sum() / slopes.numel())
    return total


def plain_attention(
    model: nn.Module, family: Family, request: str, images: list[Tensor]
) -> dict[bool, list[list[Tensor]]]:
    """Signed maps [image][layer] (B, h, w), element-wise or not."""
    found: dict[bool, list[list[list[Tensor]]]] = {e: [[[] for _ in family.layers] for _ in images] for e in (0, 1)}
    for b in range(len(images[0])):
        with torch.no_grad():
            f = [F.normalize(model(image[b : b + 1]), dim=1)[0] for image in images]
        for i, direction in enumerate(literal_directions(request, f)):
            pairs = outputs_and_gradients(model, family.layers, images[i][b], direction)
            for level, (pair, grid) in enumerate(zip(pairs, family.grids, strict=True)):
                maps, gradient = (cells(tensor, family.layout, grid) for tensor in pair)
                for elementwise in (False, True):
                    found[elementwise][i][level].append(loop_over_channels(maps, gradient, elementwise))
    return {e: [[torch.stack(level) for level in levels] for levels in found[e]] for e in found}


def assert_all_close(actual: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], rtol: float) -> None:
    assert len(actual) == len(expected)
    for some, others in zip(actual, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * other.abs().max().item())


# --- the contract --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: Family) -> nn.Module:
    """In float64 and eval(); tests must leave it as it is."""
    return make_model(family)


@pytest.mark.parametrize("request_kind", REQUESTS)
class TestEveryModelAndKind:
    def test_equals_plain_loops(self, family: Family, model: nn.Module, request_kind: str) -> None:
        images = images_of(family, request_kind)
        expected = plain_attention(model, family, request_kind, images)
        with attention_of(model, family) as explain:
            for elementwise in (False, True):
                signed = ask(explain, request_kind, images, elementwise=elementwise, rectify=False)
                assert_all_close(maps_of(signed), expected[elementwise], rtol=1e-7)
            rectified = ask(explain, request_kind, images, elementwise=True)
        for ours, with_sign in zip(maps_of(rectified), maps_of(signed), strict=True):
            for one, other in zip(ours, with_sign, strict=True):
                assert torch.equal(one, other.clamp_min(0))
        assert [tuple(layer.shape) for layer in signed.anchor] == [(family.batch, *grid) for grid in family.grids]
        assert len(signed.negatives) == NEGATIVES[request_kind]
        assert (signed.positive == ()) == (request_kind == "dissimilar siamese")

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_leaves_nothing_behind(
        self, family: Family, model: nn.Module, request_kind: str, create_graph: bool
    ) -> None:
        images = images_of(family, request_kind)
        images[0].requires_grad_()
        copies = [image.detach().clone() for image in images]
        parameters = list(model.parameters())
        frozen = parameters[::3]
        for parameter in frozen:
            parameter.requires_grad_(False)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with attention_of(model, family) as explain:
            found = ask(explain, request_kind, images, create_graph=create_graph)
            assert hooks_on(model) == len(family.layers)
        assert hooks_on(model) == 0
        assert [parameter.requires_grad for parameter in parameters] == [i % 3 != 0 for i in range(len(parameters))]
        for parameter in frozen:
            parameter.requires_grad_(True)
        assert all(parameter.grad is None for parameter in parameters)
        assert all(image.grad is None for image in images)
        assert [image.requires_grad for image in images] == [True] + [False] * (len(images) - 1)
        assert all(torch.equal(image, copy) for image, copy in zip(images, copies, strict=True))
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        tensors = [layer for layers in maps_of(found) for layer in layers] + list(found.embeddings)
        assert all(tensor.requires_grad == create_graph for tensor in tensors)


class TestEveryModel:
    @pytest.mark.parametrize("request_kind", ["triplet", "margin"])
    def test_a_loss_on_the_maps_trains_the_model(self, family: Family, request_kind: str) -> None:
        model = make_model(family)
        first = model.get_submodule(family.layers[0])
        weights = [p for p in first.parameters() if p.dim() > 1] or list(first.parameters())
        optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
        images = images_of(family, request_kind)
        with attention_of(model, family) as explain:
            expected = ask(explain, request_kind, images, rectify=False)
            found = ask(explain, request_kind, images, create_graph=True, rectify=False)
            detached = [[layer.detach() for layer in layers] for layers in maps_of(found)]
            assert_all_close(detached, maps_of(expected), rtol=1e-8)  # other kernels, the same maps
            before = [weight.detach().clone() for weight in weights]
            loss = torch.stack([layer.square().mean() for layers in maps_of(found) for layer in layers]).sum()
            loss.backward()
            optimiser.step()
        assert any(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    def test_images_of_a_batch_do_not_meet(self, family: Family, model: nn.Module) -> None:
        images = images_of(family, "quadruplet", batch=2)
        with attention_of(model, family) as explain:
            together = maps_of(ask(explain, "quadruplet", images, rectify=False))
            for b in range(2):
                alone = maps_of(ask(explain, "quadruplet", [image[b : b + 1] for image in images], rectify=False))
                assert_all_close(alone, [[layer[b : b + 1] for layer in layers] for layers in together], rtol=1e-8)

    @pytest.mark.parametrize("without_grad", [False, True])
    def test_frozen_model(self, family: Family, model: nn.Module, without_grad: bool) -> None:
        images = images_of(family, "margin")
        frozen = make_model(family).requires_grad_(False)
        with attention_of(model, family) as explain:
            expected = maps_of(ask(explain, "margin", images, rectify=False))
        with attention_of(frozen, family) as explain, torch.set_grad_enabled(not without_grad):
            actual = maps_of(ask(explain, "margin", images, rectify=False))
            assert torch.is_grad_enabled() != without_grad
        assert_all_close(actual, expected, rtol=1e-8)
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        assert hooks_on(frozen) == 0

    def test_single_precision_is_close(self, family: Family, model: nn.Module) -> None:
        images = images_of(family, "margin")
        single = make_model(family, torch.float32)
        with attention_of(model, family) as explain:
            expected = maps_of(ask(explain, "margin", images, rectify=False))
        with attention_of(single, family) as explain:
            actual = maps_of(ask(explain, "margin", [image.float() for image in images], rectify=False))
        assert_all_close(
            [[layer.double() for layer in layers] for layers in actual],
            expected,
            rtol=2e-3,
        )

    @pytest.mark.parametrize("request_kind", ["siamese", "cosine"])
    def test_equals_captum(self, family: Family, model: nn.Module, request_kind: str) -> None:
        if family.layout != "maps":
            pytest.skip("captum's LayerGradCam averages over the last dimensions of (B, C, h, w)")
        images = images_of(family, request_kind)
        with torch.no_grad():
            f = [F.normalize(model(image), dim=1) for image in images]
        directions = literal_directions(request_kind, f)
        layer = family.layers[-1]
        with GradientAttention(model, layer) as explain:
            pooled = maps_of(ask(explain, request_kind, images))
            elementwise = maps_of(ask(explain, request_kind, images, elementwise=True, rectify=False))
        for i, (image, direction) in enumerate(zip(images, directions, strict=True)):
            score = Score(CloneBehind(model, layer), direction)
            module = score.model.model.get_submodule(layer)
            cam = LayerGradCam(score, module).attribute(image, relu_attributions=True)[:, 0]
            product = LayerGradientXActivation(score, module).attribute(image).sum(1)
            scale = cam.abs().max().item()
            torch.testing.assert_close(pooled[i][0], cam.detach(), rtol=1e-8, atol=1e-8 * scale, check_stride=False)
            torch.testing.assert_close(elementwise[i][0], product.detach(), rtol=1e-8, atol=1e-8, check_stride=False)


class CloneBehind(nn.Module):
    """Protects a layer's output from what follows in place: captum reads it afterwards."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, images: Tensor) -> Tensor:
        layer = self.model.get_submodule(self.layer)
        handle = layer.register_forward_hook(lambda _module, _inputs, output: output.clone())
        # captum's own hook was registered before: it sees the output, what follows sees the copy
        try:
            return self.model(images)
        finally:
            handle.remove()


class Score(nn.Module):
    def __init__(self, model: CloneBehind, direction: Tensor) -> None:
        super().__init__()
        self.model, self.direction = model, direction

    def forward(self, images: Tensor) -> Tensor:
        return (self.direction * F.normalize(self.model(images), dim=1)).sum(1)


# --- double backward -----------------------------------------------------------------------------------------------


class Smooth(nn.Module):
    """Two convolutions and softplus: derivatives of all orders exist."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 2)
        self.head = nn.Linear(4 * 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.softplus(self.second(F.softplus(self.first(images))))
        return self.head(maps.flatten(1))


@pytest.fixture
def smooth() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Smooth().double()


def smooth_images(count: int, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, BATCH, 3, 3, 3, generator=generator, dtype=torch.float64))


class TestTraining:
    @pytest.mark.parametrize("elementwise", [False, True])
    @pytest.mark.parametrize("rectify", [False, True])
    @pytest.mark.parametrize("request_kind", ["cosine", "margin"])
    def test_gradcheck_into_the_model(
        self, smooth: nn.Module, request_kind: str, rectify: bool, elementwise: bool
    ) -> None:
        """The whole path, through maps and through directions: what the training constraint differentiates."""
        images = [image[:1] for image in smooth_images(2 + NEGATIVES[request_kind])]

        def attend(first: Tensor, head: Tensor, *, rectify: bool = rectify) -> tuple[Tensor, ...]:
            weights = {"first.weight": first, "head.weight": head}
            explain = GradientAttention(
                smooth, ["first", "second"], embed=lambda x: torch.func.functional_call(smooth, weights, x)
            )
            with explain:
                found = ask(explain, request_kind, images, create_graph=True, rectify=rectify, elementwise=elementwise)
            return *(layer for layers in maps_of(found) for layer in layers), *found.embeddings

        leaves = [smooth.first.weight.detach().clone(), smooth.head.weight.detach().clone()]
        with torch.no_grad():
            signed = attend(*leaves, rectify=False)[: -len(images)]
        assert min(layer.abs().min().item() for layer in signed) > 1e-6  # away from the kink of the ReLU
        assert any((layer > 0).any() for layer in signed)
        assert torch.autograd.gradcheck(attend, [leaf.requires_grad_() for leaf in leaves], eps=1e-7)

    @pytest.mark.parametrize("request_kind", ["siamese", "dissimilar siamese", "triplet", "quadruplet"])
    @pytest.mark.parametrize("elementwise", [False, True])
    def test_literal_forms_keep_their_weights_constant(
        self, smooth: nn.Module, request_kind: str, elementwise: bool
    ) -> None:
        """Autograd against finite differences of plain loops in which w stays what it was."""
        images = images_of(Family(Smooth, (), (), (3, 3)), request_kind)
        generator = torch.Generator().manual_seed(6)
        target = torch.randn(len(images), BATCH, 2, 2, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            constant = [
                literal_directions(request_kind, [F.normalize(smooth(image[b : b + 1]), dim=1)[0] for image in images])
                for b in range(BATCH)
            ]

        def plain_loss() -> float:
            total = 0.0
            for i, image in enumerate(images):
                for b in range(BATCH):
                    (pair,) = outputs_and_gradients(smooth, ["second"], image[b], constant[b][i])
                    total += (loop_over_channels(*pair, elementwise) * target[i, b]).sum().item()
            return total

        with GradientAttention(smooth, "second") as explain:
            found = ask(explain, request_kind, images, create_graph=True, rectify=False, elementwise=elementwise)
        loss = sum((layers[0] * target[i]).sum() for i, layers in enumerate(maps_of(found)))
        assert isinstance(loss, Tensor)
        for weight in (smooth.first.weight, smooth.head.weight):
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            for position in (0, weight.numel() // 2, weight.numel() - 1):
                values, flat = [], weight.detach().view(-1)
                for step in (1e-6, -2e-6):
                    flat[position] += step
                    values.append(plain_loss())
                flat[position] += 1e-6
                slope = (values[0] - values[1]) / 2e-6
                assert gradient.view(-1)[position].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)

    def test_directions_do_not_leak_into_the_attention(self, smooth: nn.Module) -> None:
        """A negative's map of f_a . f_n is the same whatever the positive is."""
        anchor, positive, negative, other = smooth_images(4)
        with GradientAttention(smooth, "second") as explain:
            first = explain(anchor, positive, negative, kind="margin", create_graph=True)
            second = explain(anchor, other, negative, kind="margin")
            alone = explain(anchor, negative, kind="cosine")
        torch.testing.assert_close(first.negatives[0][0].detach(), second.negatives[0][0])
        torch.testing.assert_close(alone.positive[0], second.negatives[0][0])

    def test_scaled_maps_can_be_trained(self, smooth: nn.Module) -> None:
        with GradientAttention(smooth, "second") as explain:
            found = explain(*smooth_images(2), create_graph=True)
        found.scaled((9, 9)).anchor.mean().backward()
        assert smooth.head.weight.grad is not None
        assert smooth.head.weight.grad.abs().sum() > 0

    def test_batch_normalisation_in_training_is_an_ordinary_pass(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        images = [image.float() for image in smooth_images(2)]
        with GradientAttention(network, "0") as explain:
            explain(*images)
        assert network[1].num_batches_tracked == 1
        assert network.training


# --- the passes ----------------------------------------------------------------------------------------------------


class TestPasses:
    def test_one_forward_and_one_backward(self, smooth: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        batches, backwards = [], []
        grad = torch.autograd.grad

        def counting(*arguments: Any, **options: Any) -> Any:
            backwards.append(1)
            return grad(*arguments, **options)

        def embed(images: Tensor) -> Tensor:
            batches.append(len(images))
            return smooth(images)

        monkeypatch.setattr(torch.autograd, "grad", counting)
        with GradientAttention(smooth, ["first", "second"], embed=embed) as explain:
            explain(*smooth_images(2), smooth_images(2, seed=8), kind="quadruplet")
        assert (batches, len(backwards)) == ([4 * BATCH], 1)

    def test_order_of_layers_is_that_of_the_call(self, smooth: nn.Module) -> None:
        images = smooth_images(2)
        with GradientAttention(smooth, ["second", "first"]) as explain:
            both = explain(*images).anchor
        with GradientAttention(smooth, smooth.first) as explain:  # by module
            (first,) = explain(*images).anchor
        assert [tuple(layer.shape[1:]) for layer in both] == [(2, 2), (3, 3)]
        torch.testing.assert_close(both[1], first)

    def test_embeddings_are_those_of_the_model(self, smooth: nn.Module) -> None:
        images = smooth_images(3)
        with GradientAttention(smooth, "second") as explain:
            found = explain(*images, kind="triplet")
        for image, embedding in zip(images, found.embeddings, strict=True):
            torch.testing.assert_close(embedding, F.normalize(smooth(image), dim=1).detach())

    def test_embed_stands_in_for_calling_the_model(self) -> None:
        encoder = smp.encoders.get_encoder("resnet18", depth=3, weights=None).eval()  # returns a list of maps
        images = list(torch.rand(2, BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        with GradientAttention(encoder, "layer2", embed=lambda x: encoder(x)[-1].mean((2, 3))) as explain:
            assert explain(*images).anchor[0].shape == (BATCH, 4, 4)

    def test_the_model_runs_undisturbed_inside_with(self, smooth: nn.Module) -> None:
        images = smooth_images(2)
        expected = smooth(images[0])
        with GradientAttention(smooth, "first") as explain:
            assert torch.equal(smooth(images[0]), expected)
            found = explain(*images)
            smooth(images[0]).sum().backward()  # an ordinary step of training in between
            again = explain(*images)
        assert torch.equal(found.anchor[0], again.anchor[0])

    def test_a_model_that_raises_leaves_nothing_behind(self, smooth: nn.Module) -> None:
        images = smooth_images(2)

        def fail(_images: Tensor) -> Tensor:
            smooth(_images)
            raise OSError("out of luck")

        explain = GradientAttention(smooth, "first", embed=fail)
        with pytest.raises(OSError, match="out of luck"), torch.no_grad(), explain:
            explain(*images)
        assert hooks_on(smooth) == 0
        with explain:
            for _ in range(2):  # the first failure does not spoil the second call
                with pytest.raises(OSError, match="out of luck"):
                    explain(*images)
            smooth(images[0])
        assert hooks_on(smooth) == 0
        assert all(parameter.grad is None for parameter in smooth.parameters())

    def test_may_be_entered_again_but_not_twice(self, smooth: nn.Module) -> None:
        explain, images = GradientAttention(smooth, "first"), smooth_images(2)
        with explain:
            first = explain(*images)
            with pytest.raises(RuntimeError, match="already entered"), explain:
                pass
        with explain:
            assert torch.equal(explain(*images).anchor[0], first.anchor[0])
        with GradientAttention(smooth, "first") as one, GradientAttention(smooth, "first") as two:
            assert torch.equal(one(*images).anchor[0], two(*images).anchor[0])
        assert hooks_on(smooth) == 0

    def test_an_identity_beside_a_shortcut_is_explained_alone(self) -> None:
        """Its output is the very tensor that the shortcut uses, and changes in place, later."""

        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.same = nn.Conv2d(3, 4, 1), nn.Identity()
                self.branch = nn.Conv2d(4, 4, 3)
                self.head = nn.Linear(4, 3)

            def forward(self, images: Tensor) -> Tensor:
                maps = self.stem(images).sin()
                branch = self.branch(self.same(maps))
                maps += 100
                return self.head(branch.tanh().mean((2, 3)) + maps.mean((2, 3)).cos())

        family = Family(Residual, ("same",), ((6, 6),), (6, 6))
        for frozen in (False, True):
            model = make_model(family).requires_grad_(not frozen)
            images = images_of(family, "margin")
            expected = plain_attention(model, family, "margin", images)[False]
            with attention_of(model, family) as explain:
                assert_all_close(maps_of(ask(explain, "margin", images, rectify=False)), expected, rtol=1e-8)

    def test_half_precision_of_autocast(self, smooth: nn.Module) -> None:
        network, images = smooth.float(), [image.float() for image in smooth_images(2)]
        with GradientAttention(network, "second") as explain:
            expected = explain(*images, rectify=False).anchor[0]
            with torch.autocast("cpu", torch.bfloat16):
                actual = explain(*images, rectify=False)
        assert actual.anchor[0].dtype == actual.embeddings[0].dtype == torch.float32
        torch.testing.assert_close(actual.anchor[0], expected, rtol=0.1, atol=0.1 * expected.abs().max().item())

    def test_inference_mode(self, smooth: nn.Module) -> None:
        with torch.inference_mode():
            images = smooth_images(2)
            with pytest.raises(DataError, match=r"use torch\.no_grad"), GradientAttention(smooth, "first") as explain:
                explain(*images)
        with GradientAttention(smooth, "first") as explain:  # images that were born there are welcome
            torch.testing.assert_close(explain(*images).anchor, explain(*(i.clone() for i in images)).anchor)

    def test_embeddings_of_length_zero_give_zeros(self, smooth: nn.Module) -> None:
        nn.init.zeros_(smooth.head.weight)
        nn.init.zeros_(smooth.head.bias)
        with GradientAttention(smooth, "second") as explain:
            assert torch.count_nonzero(explain(*smooth_images(2)).anchor[0]) == 0


class TestScaled:
    def test_mean_over_scaled_layers(self) -> None:
        coarse = torch.tensor([[[0.0, 4.0]], [[1.0, 1.0]]])
        fine = torch.tensor([[[3.0, 1.0, 2.0, 1.0]], [[0.0, 0.0, 0.0, 5.0]]])
        found = SimilarityExplanation((coarse, fine), (), ((coarse, coarse), (fine, fine)), (), (1, 4))
        scaled = found.scaled()
        # bilinear from 2 to 4 cells: 0, 1/4, 3/4, 1 of the way
        expected = torch.tensor([[[0.5, 0.125, 0.625, 0.5]], [[0.0, 0.0, 0.0, 0.5]]])
        torch.testing.assert_close(scaled.anchor, expected)
        assert scaled.positive is None
        assert [tuple(negative.shape) for negative in scaled.negatives] == [(2, 1, 4), (2, 1, 4)]
        assert found.scaled((3, 8)).anchor.shape == (2, 3, 8)

    def test_default_size_is_that_of_the_images(self, smooth: nn.Module) -> None:
        with GradientAttention(smooth, "second") as explain:
            scaled = explain(*smooth_images(2)).scaled()
        assert scaled.positive is not None
        for maps in (scaled.anchor, scaled.positive):
            assert maps.shape == (BATCH, 3, 3)
            assert (maps.amin(), maps.amax()) == (0, 1)


class TestTokens:
    @pytest.mark.parametrize(
        ("tokens", "size", "grid"),
        [
            (197, (224, 224), (14, 14)),  # ViT-B/16: class token
            (198, (224, 224), (14, 14)),  # DeiT: distillation token as well
            (261, (224, 224), (16, 16)),  # DINOv2 with four registers
            (256, (224, 224), (16, 16)),  # SigLIP: patches alone
            (1 + 32 * 16, (512, 256), (32, 16)),
            (1 + 5 * 5, (90, 90), (5, 5)),  # 90 // 16: the patches do not fill the image
            (4 * 6 + 1, (70, 100), (4, 6)),
            (9, (64, 64), (2, 2)),  # five prefix tokens; 3 x 3 would leave pixels over
        ],
    )
    def test_grid(self, tokens: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
        assert infer_token_grid(tokens, size) == grid

    @settings(deadline=None, max_examples=60)
    @given(st.integers(4, 40), st.integers(4, 40), st.integers(2, 16))
    def test_patches_alone_are_always_found(self, height: int, width: int, patch: int) -> None:
        assert infer_token_grid(height * width, (height * patch, width * patch)) == (height, width)

    def test_no_grid(self) -> None:
        with pytest.raises(DataError, match=r"120 tokens .* 224 x 224 pixels .* token_grid=\(h, w\)"):
            infer_token_grid(120, (224, 224))

    def test_given_grid(self) -> None:
        family = FAMILIES["timm vision transformer"]
        model, images = make_model(family), draw_images(family, 2)
        with GradientAttention(model, "blocks.0") as explain:
            expected = explain(*images).anchor[0]
        with GradientAttention(model, "blocks.0", token_grid=(4, 6)) as explain:
            assert torch.equal(explain(*images).anchor[0], expected)
        with (
            GradientAttention(model, "blocks.0", token_grid=(6, 6)) as explain,
            pytest.raises(DataError, match=r"token_grid=\(6, 6\) does not fit the 27 tokens of layer 'blocks\.0'"),
        ):
            explain(*images)

    def test_class_token_alone(self) -> None:
        """After the last attention, the patches no longer reach the class token: the map would be silently black."""
        family = FAMILIES["timm vision transformer"]
        with (
            GradientAttention(make_model(family), "blocks.1") as explain,
            pytest.raises(DataError, match=r"class token of layer 'blocks\.1' alone"),
        ):
            explain(*draw_images(family, 2))

    def test_channels_last_is_noticed(self) -> None:
        family = FAMILIES["channels last"]
        with GradientAttention(make_model(family), "patches") as explain:  # still (B, C, h, w) there
            explain(*draw_images(family, 2))
        with (
            GradientAttention(make_model(family), "block.1") as explain,
            pytest.raises(DataError, match=r"\(4, 6, 8, 20\) of layer 'block\.1' looks like .* channels_last=True"),
        ):
            explain(*draw_images(family, 2))
        with GradientAttention(make_model(family), "block.1", channels_last=False) as explain:
            assert explain(*draw_images(family, 2)).anchor[0].shape == (BATCH, 8, 20)


# --- bad inputs ----------------------------------------------------------------------------------------------------


class Awkward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared, self.unused = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(3, 4, 3)
        self.pool, self.dead_end = nn.MaxPool2d(2, return_indices=True), nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1)])

    def forward(self, images: Tensor) -> Tensor:
        self.dead_end(images)
        maps, _ = self.pool(self.shared(self.shared(self.conv(images))))
        return self.blocks[0](maps).mean((2, 3))


class TestBadInputs:
    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            ("shared", "layer 'shared' runs more than once"),
            ("unused", "layer 'unused' never ran"),
            ("blocks", "layer 'blocks' never ran .* ModuleList"),
            ("pool", "layer 'pool' must give one tensor of floats, got tuple"),
            ("dead_end", "do not depend on layer 'dead_end'"),
            ("", r"layer '' must give \(4, C, h, w\) or tokens"),
        ],
    )
    def test_layers_that_do_not_serve(self, layer: str, message: str) -> None:
        model = Awkward()
        with GradientAttention(model, layer) as explain, pytest.raises(DataError, match=message):
            explain(*torch.rand(2, 2, 3, 8, 8))
        assert hooks_on(model) == 0

    def test_dead_end_of_a_frozen_model(self) -> None:
        model = Awkward().requires_grad_(False)
        with (
            GradientAttention(model, "dead_end") as explain,
            pytest.raises(DataError, match="do not depend on 'dead_end', or the model cuts the gradient"),
        ):
            explain(*torch.rand(2, 2, 3, 8, 8))

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ("block.0", "no layer 'block.0'; did you mean 'blocks.0'"),
            ("xyz", "no layer 'xyz'; its first parts are 'conv', 'shared'"),
            (nn.ReLU(), "layer ReLU given as a module is no part of the model"),
            (["conv", "conv"], "layer 'conv' is given twice"),
            ([], "at least one layer"),
        ],
    )
    def test_layers_that_are_not_there(self, layers: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            GradientAttention(Awkward(), layers)

    def test_outside_with(self, smooth: nn.Module) -> None:
        explain = GradientAttention(smooth, "first")
        with pytest.raises(RuntimeError, match="inside `with GradientAttention"):
            explain(*smooth_images(2))
        with explain:
            pass
        with pytest.raises(RuntimeError, match="inside `with GradientAttention"):
            explain(*smooth_images(2))

    @pytest.mark.parametrize(
        ("embed", "message"),
        [
            (lambda f: [f], r"must give one tensor \(B, D\) of embeddings, got list"),
            (lambda f: f[:, :, None], r"must give embeddings \(4, D\) for 4 images, got \(4, 3, 1\)"),
            (lambda f: f[:2], r"got \(2, 3\); pool or flatten"),
            (lambda f: f / 0, "not finite"),
            (lambda f: f.detach(), "cuts the gradient"),
        ],
    )
    def test_embeddings_that_do_not_serve(
        self, smooth: nn.Module, embed: Callable[[Tensor], Tensor], message: str
    ) -> None:
        explain = GradientAttention(smooth, "first", embed=lambda images: embed(smooth(images)))
        with pytest.raises(DataError, match=message), explain:
            explain(*smooth_images(2))

    @pytest.mark.parametrize(
        ("kind", "positives", "negatives", "message"),
        [
            (
                "siamese",
                1,
                1,
                r"a positive and 0 negative\(s\) \(or no positive and 1 negative\), got a positive and 1",
            ),
            ("siamese", 0, 0, "got no positive and 0"),
            ("cosine", 0, 1, r"'cosine' needs a positive and 0 negative\(s\), got no positive and 1"),
            ("triplet", 1, 2, "'triplet' needs a positive and 1 .* got a positive and 2"),
            ("quadruplet", 1, 1, "'quadruplet' needs a positive and 2"),
            ("margin", 1, 0, "'margin' needs a positive and 1"),
            ("pair", 1, 0, "unknown attention kind 'pair'; known: siamese, triplet"),
        ],
    )
    def test_wrong_number_of_images(
        self, smooth: nn.Module, kind: AttentionKind, positives: int, negatives: int, message: str
    ) -> None:
        anchor, positive, *others = smooth_images(2 + negatives)
        with GradientAttention(smooth, "first") as explain, pytest.raises(DataError, match=message):
            explain(anchor, positive if positives else None, others, kind=kind)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda image: image[:1], r"anchor is \(2, 3, 3, 3\) .* positive is \(1, 3, 3, 3\)"),
            (lambda image: image[..., :2], r"positive is \(2, 3, 3, 2\)"),
            (lambda image: image.float(), r"positive is .* torch\.float32"),
            (lambda image: image[0], r"positive must be float \(B, C, H, W\), got torch\.float64 \(3, 3, 3\)"),
            (lambda image: image.to(torch.uint8), r"positive must be float .* torch\.uint8"),
            (lambda image: image[:0], r"positive must be float .* \(0, 3, 3, 3\)"),
        ],
    )
    def test_images_that_do_not_fit(self, smooth: nn.Module, change: Callable[[Tensor], Tensor], message: str) -> None:
        anchor, positive = smooth_images(2)
        with GradientAttention(smooth, "first") as explain, pytest.raises(DataError, match=message):
            explain(anchor, change(positive))
