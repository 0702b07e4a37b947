"""Feature store: what is computed, what is kept, what is thrown away, and that nothing of it changes a value."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from episodes.augment import EpisodeTransform
from episodes.types import DataError, MaskSource, UInt8Array
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.features import FeatureStore, MaskStore

SIZE = 40  # no multiple of 16: maps are 5 x 5 and 3 x 3
IDS = tuple(f"photo{i}" for i in range(6))


class Photos:
    """A MaskSource of noise; `version` is what a changed file is to a real source."""

    name = "photos"
    class_names: Mapping[int, str] = {1: "thing"}

    def __init__(self) -> None:
        self.version = dict.fromkeys(IDS, 0)

    def ids(self, split: str) -> Sequence[str]:  # noqa: ARG002
        return IDS

    def image(self, image_id: str) -> UInt8Array:
        seed = [IDS.index(image_id), self.version[image_id]]
        return np.random.default_rng(seed).integers(0, 256, (50, 60, 3), dtype=np.uint8)

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        mask = np.zeros((50, 60), np.uint8)
        mask[10 : 20 + class_id, 5:30] = 1
        mask[:, -6:] = 255
        mask[0, 0] = IDS.index(image_id) % 2
        return mask

    def class_areas(self, image_id: str) -> Mapping[int, int]:  # noqa: ARG002
        return {1: 1}

    def fingerprint(self, image_ids: Sequence[str]) -> str:
        return "-".join(f"{i}:{self.version[i]}" for i in image_ids)


class Encoder(nn.Module):
    """Two small stages with the interface of segmentation-models-pytorch's encoders, and a counter."""

    out_channels = (3, 0, 0, 4, 6)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, 4, 8, stride=8), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.images_seen = 0
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> list[Tensor]:
        self.images_seen += len(images)
        self.batches.append(len(images))
        first = self.first(images)
        return [images, images, images, first, self.second(first)]


def make_backbone(seed: int = 0) -> Backbone:
    return Backbone(Encoder(seed), name="tiny", strides=(8, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


def seen(backbone: Backbone) -> int:
    count: int = backbone.encoder.images_seen  # type: ignore[assignment]
    return count


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


ONE_IMAGE = 2 * (4 * 5 * 5 + 6 * 3 * 3)  # bytes in half precision


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "features" if request.param == "disk" else None


def test_the_source_of_these_tests_is_one() -> None:
    assert isinstance(Photos(), MaskSource)


class TestOnDiskAndInMemory:
    def test_equals_the_backbone_rounded_to_half_precision(self, directory: Path | None) -> None:
        backbone, source = make_backbone(), Photos()
        store = FeatureStore(backbone, source, size=SIZE, directory=directory)
        transform, nothing = EpisodeTransform("none", SIZE), np.zeros((50, 60), np.uint8)
        images = torch.stack([transform(source.image(i), nothing, seed=0)[0] for i in IDS[:3]])
        levels = store.get(IDS[:3])
        assert [tuple(level.shape) for level in levels] == [(3, 4, 5, 5), (3, 6, 3, 3)]
        for level, expected in zip(levels, backbone(images), strict=True):
            assert level.dtype == torch.float32
            assert torch.equal(level, expected.half().float())

    def test_each_image_is_computed_once_and_stays_equal(self, directory: Path | None) -> None:
        backbone = make_backbone()
        store = FeatureStore(backbone, Photos(), size=SIZE, directory=directory)
        first = store.get(IDS)
        assert seen(backbone) == 6
        again = store.get(IDS)
        assert seen(backbone) == 6
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))

    def test_order_and_repetition_are_the_callers(self, directory: Path | None) -> None:
        backbone = make_backbone()
        store = FeatureStore(backbone, Photos(), size=SIZE, directory=directory)
        levels = store.get([IDS[2], IDS[0], IDS[2]])
        assert seen(backbone) == 2
        for level, alone in zip(levels, store.get([IDS[0]]), strict=True):
            assert torch.equal(level[0], level[2])
            assert torch.equal(level[1], alone[0])
            assert not torch.equal(level[0], level[1])

    def test_results_may_be_changed_by_the_caller(self, directory: Path | None) -> None:
        store = FeatureStore(make_backbone(), Photos(), size=SIZE, directory=directory)
        first = store.get(IDS[:1])[0]
        copy = first.clone()
        first.zero_()
        assert torch.equal(store.get(IDS[:1])[0], copy)

    def test_ensure_computes_only_what_is_missing_in_batches(
        self, directory: Path | None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        backbone = make_backbone()
        store = FeatureStore(backbone, Photos(), size=SIZE, directory=directory, batch_size=2)
        store.get(IDS[:1])
        store.ensure([*IDS, IDS[1]], show_progress=True)
        assert backbone.encoder.batches == [1, 2, 2, 1]
        captured = capsys.readouterr()
        assert "5/5" in captured.err
        assert captured.out == ""
        store.ensure(IDS)
        assert seen(backbone) == 6

    def test_budget_keeps_the_most_recently_used(self, directory: Path | None) -> None:
        backbone = make_backbone()
        store = FeatureStore(
            backbone, Photos(), size=SIZE, directory=directory, byte_budget=3 * ONE_IMAGE + 5, batch_size=1
        )
        store.ensure(IDS[:3])
        store.get([IDS[0]])  # now 1 is the oldest
        store.get([IDS[3]])
        assert seen(backbone) == 4
        store.get([IDS[0], IDS[2], IDS[3]])
        assert seen(backbone) == 4
        store.get([IDS[1]])
        assert seen(backbone) == 5

    def test_more_images_than_the_budget_holds_are_still_served(self, directory: Path | None) -> None:
        backbone = make_backbone()
        small = FeatureStore(backbone, Photos(), size=SIZE, directory=directory, byte_budget=2 * ONE_IMAGE)
        large = FeatureStore(make_backbone(), Photos(), size=SIZE, directory=None)
        for left, right in zip(small.get(IDS), large.get(IDS), strict=True):
            assert torch.equal(left, right)
        if directory is not None:
            assert len(files(directory)) == 2

    def test_a_changed_image_is_computed_anew(self, directory: Path | None) -> None:
        source, backbone = Photos(), make_backbone()
        before = FeatureStore(backbone, source, size=SIZE, directory=directory).get(IDS[:2])
        source.version[IDS[0]] = 1
        after = FeatureStore(backbone, source, size=SIZE, directory=directory).get(IDS[:2])
        assert not torch.equal(before[0][0], after[0][0])
        assert torch.equal(before[0][1], after[0][1])

    def test_a_budget_below_one_image_is_refused(self, directory: Path | None) -> None:
        with pytest.raises(DataError, match=rf"{ONE_IMAGE - 1} bytes cannot hold one image \({ONE_IMAGE} bytes\)"):
            FeatureStore(make_backbone(), Photos(), size=SIZE, directory=directory, byte_budget=ONE_IMAGE - 1)


class TestOnDisk:
    def test_a_later_run_finds_the_files(self, tmp_path: Path) -> None:
        first = FeatureStore(make_backbone(), Photos(), size=SIZE, directory=tmp_path).get(IDS)
        backbone = make_backbone()
        again = FeatureStore(backbone, Photos(), size=SIZE, directory=tmp_path).get(IDS)
        assert seen(backbone) == 0
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
        assert len(files(tmp_path)) == len(IDS)
        assert not [path for path in tmp_path.rglob(".*")]

    def test_other_weights_and_other_sizes_share_nothing(self, tmp_path: Path) -> None:
        for backbone, size in ((make_backbone(0), SIZE), (make_backbone(1), SIZE), (make_backbone(0), 48)):
            FeatureStore(backbone, Photos(), size=size, directory=tmp_path).get(IDS[:2])
            assert seen(backbone) == 2
        assert len(files(tmp_path)) == 6
        assert len({path.parent for path in files(tmp_path)}) == 3

    @pytest.mark.parametrize("damage", ["cut", "noise", "empty", "shape"])
    def test_damaged_files_are_replaced(self, tmp_path: Path, damage: str) -> None:
        store = FeatureStore(make_backbone(), Photos(), size=SIZE, directory=tmp_path)
        expected = store.get(IDS[:1])
        (path,) = files(tmp_path)
        if damage == "shape":
            FeatureStore(make_backbone(), Photos(), size=56, directory=tmp_path / "other").get(IDS[:1])
            path.write_bytes(files(tmp_path / "other")[0].read_bytes())
        else:
            whole = path.read_bytes()
            path.write_bytes({"cut": whole[:-9], "noise": os.urandom(len(whole)), "empty": b""}[damage])
        with pytest.warns(UserWarning, match=f"{path.name}.*computing it anew"):
            actual = store.get(IDS[:1])
        assert all(torch.equal(left, right) for left, right in zip(actual, expected, strict=True))
        backbone = make_backbone()
        FeatureStore(backbone, Photos(), size=SIZE, directory=tmp_path).get(IDS[:1])
        assert seen(backbone) == 0

    def test_two_stores_share_one_folder(self, tmp_path: Path) -> None:
        first_backbone, second_backbone = make_backbone(), make_backbone()
        first = FeatureStore(first_backbone, Photos(), size=SIZE, directory=tmp_path)
        second = FeatureStore(second_backbone, Photos(), size=SIZE, directory=tmp_path)
        first.ensure(IDS[:4])
        second.ensure(IDS)
        assert (seen(first_backbone), seen(second_backbone)) == (4, 2)
        for path in files(tmp_path):  # as if the other had evicted everything
            path.unlink()
        assert all(torch.equal(left, right) for left, right in zip(first.get(IDS), second.get(IDS), strict=True))

    def test_a_file_that_another_run_is_writing_is_left_alone(self, tmp_path: Path) -> None:
        arguments = {"size": SIZE, "directory": tmp_path, "byte_budget": ONE_IMAGE}
        FeatureStore(make_backbone(), Photos(), **arguments).get(IDS[:1])  # type: ignore[arg-type]
        unfinished = files(tmp_path)[0].with_name(".half-written.safetensors")
        unfinished.write_bytes(b"")
        os.utime(unfinished, (0, 0))
        FeatureStore(make_backbone(), Photos(), **arguments).get(IDS[:4])  # type: ignore[arg-type]
        assert unfinished.exists()
        assert len(files(tmp_path)) == 2

    def test_the_budget_counts_files_of_earlier_runs_oldest_first(self, tmp_path: Path) -> None:
        FeatureStore(make_backbone(), Photos(), size=SIZE, directory=tmp_path, batch_size=1).ensure(IDS[:3])
        names = {path.name for path in files(tmp_path)}
        oldest = files(tmp_path)[1]
        os.utime(oldest, (1, 1))
        later = FeatureStore(make_backbone(), Photos(), size=SIZE, directory=tmp_path, byte_budget=3 * ONE_IMAGE)
        later.get(IDS[3:4])
        kept = {path.name for path in files(tmp_path)}
        assert len(kept) == 3
        assert names - kept == {oldest.name}

    def test_an_interrupted_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("fewshot_seg.features.save_file", interrupt)
        store = FeatureStore(make_backbone(), Photos(), size=SIZE, directory=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            store.ensure(IDS)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_a_real_backbone(self, tmp_path: Path) -> None:
        backbone = build_backbone("resnet10t", strides=(16, 32), weights="random")
        store = FeatureStore(backbone, Photos(), size=64, directory=tmp_path)
        assert [tuple(level.shape) for level in store.get(IDS[:2])] == [(2, 256, 4, 4), (2, 512, 2, 2)]


class TestMaskStore:
    def test_equals_the_transform(self) -> None:
        source = Photos()
        store = MaskStore(source, size=SIZE)
        transform = EpisodeTransform("none", SIZE)
        pairs = [(IDS[0], 1), (IDS[1], 2), (IDS[0], 1)]
        for _ in range(2):  # computed, then kept
            masks = store.get([image for image, _ in pairs], [class_id for _, class_id in pairs])
            assert masks.dtype == torch.uint8
            for mask, (image_id, class_id) in zip(masks, pairs, strict=True):
                expected = transform(source.image(image_id), source.mask(image_id, class_id), seed=0)[1]
                assert torch.equal(mask, expected)
        assert set(masks.unique().tolist()) == {0, 1, 255}

    def test_unequal_lengths(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            MaskStore(Photos(), size=SIZE).get(IDS[:2], [1])
