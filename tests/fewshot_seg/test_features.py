"""Feature store: computed once, never wrong, never over the budget. Mask store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from episodes.annotations import derive_annotation
from episodes.augment import EpisodeTransform, fitted_size
from episodes.protocols import Fit
from episodes.sources import JointSource, SyntheticSource, VocSource
from episodes.types import IGNORE, OUTSIDE, SUPPORT_KINDS, DataError, SupportKind, UInt8Array
from fewshot_seg.backbones import Backbone
from fewshot_seg.features import FeatureStore, MaskStore, content_name

SIZE = 48
SHAPES = [(4, 12, 12), (6, 6, 6)]
TENSOR_BYTES = 2 * (4 * 12 * 12 + 6 * 6 * 6)
DAMAGES = ["empty", "truncated", "overwritten", "bit", "no checksum", "shape", "level", "dtype"]
FILE_BYTES = TENSOR_BYTES + 250  # with its header, at most


class TinyEncoder(nn.Module):
    """Two levels, at strides 4 and 8."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.out_channels = [3, 0, 4, 6]
        self.first = nn.Conv2d(3, 4, 4, stride=4)
        self.second = nn.Conv2d(4, 6, 2, stride=2)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.first(images)
        return [images, images[:, :0], fine, self.second(fine)]


class CountingBackbone(Backbone):
    """Counts the images that it was asked to embed."""

    def __init__(self, seed: int = 0) -> None:
        neutral = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        super().__init__(TinyEncoder(seed), name="tiny", strides=(4, 8), **neutral)
        self.images = 0

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.images += len(images)
        return super().forward(images)


SOURCE = SyntheticSource(seed=3, base_classes=2, novel_classes=2, images_per_class=4, size=40)
IDS = SOURCE.ids("train")  # 8


@pytest.fixture
def backbone() -> CountingBackbone:
    return CountingBackbone()


def stored_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def expected_features(
    backbone: Backbone, source: Any, image_ids: Sequence[str], size: int = SIZE, fit: Fit = "squash"
) -> list[Tensor]:
    transform = EpisodeTransform("none", size, fit)
    found = []
    for image_id in image_ids:
        image = source.image(image_id)
        found.append(backbone(transform(image, np.zeros(image.shape[:2], np.uint8), seed=0)[0][None]))
    return [torch.cat(level).half().float() for level in zip(*found, strict=True)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "disk" else None


class TestBothKinds:
    """What a store does, whether it keeps files or memory."""

    def test_gives_the_backbones_features_in_half_precision(
        self, backbone: CountingBackbone, directory: Path | None
    ) -> None:
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory)
        levels = store.get(IDS[:3])
        assert [(level.dtype, tuple(level.shape)) for level in levels] == [
            (torch.float32, (3, *shape)) for shape in SHAPES
        ]
        assert_same(levels, expected_features(CountingBackbone(), SOURCE, IDS[:3]))

    def test_computes_each_image_once_and_gives_the_same_again(
        self, backbone: CountingBackbone, directory: Path | None
    ) -> None:
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, batch_size=2)
        fresh = store.get([IDS[0], IDS[1], IDS[0], IDS[2]])  # repeated ids are one image
        assert backbone.images == 3
        assert_same([level[0] for level in fresh], [level[2] for level in fresh])
        cached = store.get([IDS[0], IDS[1], IDS[0], IDS[2]])
        assert backbone.images == 3
        assert_same(cached, fresh)
        turned = store.get([IDS[2], IDS[3], IDS[1]])  # one of them new, another order
        assert backbone.images == 4
        assert_same([level[[2, 0]] for level in turned], [level[[1, 3]] for level in fresh])

    def test_ensure_computes_what_is_missing(self, backbone: CountingBackbone, directory: Path | None) -> None:
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, batch_size=3)
        store.get(IDS[:2])
        store.ensure([*IDS, *IDS])
        assert backbone.images == len(IDS)
        store.ensure(IDS)
        store.get(IDS)
        assert backbone.images == len(IDS)

    def test_progress_goes_to_stderr_only_when_asked(
        self, backbone: CountingBackbone, directory: Path | None, capfd: pytest.CaptureFixture[str]
    ) -> None:
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory)
        store.ensure(IDS[:4])
        assert capfd.readouterr().err == ""
        store.ensure(IDS, show_progress=True)
        captured = capfd.readouterr()
        assert "4/4" in captured.err
        assert captured.out == ""

    def test_writing_to_the_result_does_not_change_what_is_kept(
        self, backbone: CountingBackbone, directory: Path | None
    ) -> None:
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory)
        first = store.get(IDS[:1])
        kept = [level.clone() for level in first]
        for level in first:
            level.zero_()
        assert_same(store.get(IDS[:1]), kept)

    def test_the_least_recently_used_goes_first(self, backbone: CountingBackbone, directory: Path | None) -> None:
        budget = 3 * (TENSOR_BYTES + 250)  # three images and their file headers
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=budget, batch_size=1)
        for image_id in IDS[:3]:
            store.get([image_id])
        store.get([IDS[0]])  # 1 is now the oldest
        store.get([IDS[3]])
        assert backbone.images == 4
        store.get([IDS[0], IDS[2], IDS[3]])
        assert backbone.images == 4
        store.get([IDS[1]])
        assert backbone.images == 5

    def test_more_images_at_once_than_the_budget_holds(
        self, backbone: CountingBackbone, directory: Path | None
    ) -> None:
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=2 * TENSOR_BYTES)
        assert_same(store.get(IDS), expected_features(CountingBackbone(), SOURCE, IDS))

    def test_a_budget_below_one_image(self, backbone: CountingBackbone, directory: Path | None) -> None:
        expected = r"feature cache of 100 bytes cannot hold one image \(\d+ bytes\); raise --cache-gigabytes"
        with pytest.raises(DataError, match=expected):
            FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=100)


class TestFiles:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path / "cache"

    def test_a_second_run_computes_nothing(self, backbone: CountingBackbone, directory: Path) -> None:
        fresh = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory).get(IDS)
        again = CountingBackbone()
        assert_same(FeatureStore(again, SOURCE, size=SIZE, directory=directory).get(IDS), fresh)
        assert again.images == 0

    def test_two_stores_on_one_folder_share(self, backbone: CountingBackbone, directory: Path) -> None:
        one = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory)
        other_backbone = CountingBackbone()
        other = FeatureStore(other_backbone, SOURCE, size=SIZE, directory=directory)
        fresh = one.get(IDS[:3])
        assert_same(other.get(IDS[:3]), fresh)
        other.get(IDS[3:5])
        one.get(IDS[:5])
        assert (backbone.images, other_backbone.images) == (3, 2)

    def test_a_file_that_another_store_evicted_is_computed_anew(
        self, backbone: CountingBackbone, directory: Path
    ) -> None:
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory)
        fresh = store.get(IDS[:2])
        stored_files(directory)[0].unlink()
        assert_same(store.get(IDS[:2]), fresh)
        assert backbone.images == 3

    def test_other_weights_and_other_sizes_never_share(self, backbone: CountingBackbone, directory: Path) -> None:
        FeatureStore(backbone, SOURCE, size=SIZE, directory=directory).get(IDS[:1])
        other = CountingBackbone(seed=1)
        levels = FeatureStore(other, SOURCE, size=SIZE, directory=directory).get(IDS[:1])
        assert_same(levels, expected_features(CountingBackbone(seed=1), SOURCE, IDS[:1]))
        larger = FeatureStore(backbone, SOURCE, size=2 * SIZE, directory=directory).get(IDS[:1])
        assert larger[0].shape[-2:] == (24, 24)
        assert (backbone.images, other.images) == (2, 1)

    def test_padded_and_squashed_photos_never_share(
        self, backbone: CountingBackbone, directory: Path, tiny_voc: Path
    ) -> None:
        source = VocSource(tiny_voc)  # photos that are not square
        ids = source.ids("val")[:2]
        squashed = FeatureStore(backbone, source, size=SIZE, directory=directory).get(ids)
        padded = FeatureStore(backbone, source, size=SIZE, directory=directory, fit="pad").get(ids)
        assert backbone.images == 4
        assert not torch.equal(padded[0], squashed[0])
        assert_same(padded, expected_features(CountingBackbone(), source, ids, fit="pad"))
        name = f"{backbone.fingerprint[:16]}-{SIZE}"  # squashed ones lie where they always lay
        assert sorted(file.parent.name for file in stored_files(directory)) == [name] * 2 + [f"{name}-pad"] * 2
        again = CountingBackbone()
        fitted: tuple[tuple[Fit, tuple[Tensor, ...]], ...] = (("pad", padded), ("squash", squashed))
        for fit, levels in fitted:
            assert_same(FeatureStore(again, source, size=SIZE, directory=directory, fit=fit).get(ids), levels)
        assert again.images == 0

    def test_padded_ones_count_in_the_budget_too(self, backbone: CountingBackbone, directory: Path) -> None:
        FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, fit="pad").get(IDS[:2])
        budget = 7 * TENSOR_BYTES // 2
        FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=budget).get(IDS[:2])
        assert len(stored_files(directory)) == 3
        assert sum(file.stat().st_size for file in stored_files(directory)) <= budget

    def test_equal_ids_of_other_sources_never_share(self, backbone: CountingBackbone, directory: Path) -> None:
        FeatureStore(backbone, SOURCE, size=SIZE, directory=directory).get(IDS[:1])
        other = SyntheticSource(seed=4, base_classes=2, novel_classes=2, images_per_class=4, size=40)
        levels = FeatureStore(backbone, other, size=SIZE, directory=directory).get(IDS[:1])
        assert_same(levels, expected_features(CountingBackbone(), other, IDS[:1]))

    def test_a_changed_image_is_computed_anew(
        self, backbone: CountingBackbone, directory: Path, tiny_voc: Path
    ) -> None:
        source = VocSource(tiny_voc)
        image_id, other_id = source.ids("val")[:2]
        before = FeatureStore(backbone, source, size=SIZE, directory=directory).get([image_id, other_id])
        photo = source.image_file(image_id)
        Image.new("RGB", (64, 56), (10, 200, 30)).save(photo)
        os.utime(photo, ns=(1, 1))  # a clock of coarse ticks must not make this test pass or fail by chance
        after = FeatureStore(backbone, source, size=SIZE, directory=directory).get([image_id, other_id])
        assert backbone.images == 3
        assert not torch.equal(after[0][0], before[0][0])
        assert_same([level[1] for level in after], [level[1] for level in before])
        assert_same(after, expected_features(CountingBackbone(), source, [image_id, other_id]))

    def test_a_photo_that_was_only_touched_keeps_its_features(
        self, backbone: CountingBackbone, directory: Path, tiny_voc: Path
    ) -> None:
        source = VocSource(tiny_voc)
        image_id = source.ids("val")[0]
        before = FeatureStore(backbone, source, size=SIZE, directory=directory).get([image_id])
        os.utime(source.image_file(image_id), ns=(1, 1))
        assert_same(FeatureStore(backbone, source, size=SIZE, directory=directory).get([image_id]), before)
        assert backbone.images == 1

    def test_a_photo_that_is_missing_is_named(
        self, backbone: CountingBackbone, directory: Path, tiny_voc: Path
    ) -> None:
        source = VocSource(tiny_voc)
        source.image_file(source.ids("val")[0]).unlink()
        with pytest.raises(DataError, match=source.ids("val")[0]):
            FeatureStore(backbone, source, size=SIZE, directory=directory).get([source.ids("val")[0]])

    def test_stores_that_write_at_once_leave_whole_files_within_the_budget(self, directory: Path) -> None:
        budget, expected = 4 * FILE_BYTES, expected_features(CountingBackbone(), SOURCE, IDS)

        def work(number: int) -> None:
            store = FeatureStore(CountingBackbone(), SOURCE, size=SIZE, directory=directory, byte_budget=budget)
            order = IDS[number:] + IDS[:number]
            for _ in range(3):
                for image_id in order:
                    row = IDS.index(image_id)
                    # one photo at a time: the last bit of a float16 may differ from the batch's
                    torch.testing.assert_close(
                        list(store.get([image_id])), [level[row : row + 1] for level in expected], rtol=2e-3, atol=1e-3
                    )

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert len(stored_files(directory)) <= 4 + 4  # each may have written one since it counted last
        last = CountingBackbone()
        FeatureStore(last, SOURCE, size=SIZE, directory=directory).ensure(IDS)
        found = FeatureStore(last, SOURCE, size=SIZE, directory=directory).get(IDS)
        torch.testing.assert_close(list(found), expected, rtol=2e-3, atol=1e-3)

    def test_what_others_write_counts_in_the_budget(self, backbone: CountingBackbone, directory: Path) -> None:
        budget = 3 * FILE_BYTES
        first = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=budget)
        FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=budget).ensure(IDS[:3])
        first.ensure(IDS[3:5])
        assert len(stored_files(directory)) == 3

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_file_is_computed_anew(self, backbone: CountingBackbone, directory: Path, damage: str) -> None:
        fresh = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory).get(IDS[:2])
        victim = stored_files(directory)[0]
        whole = victim.read_bytes()
        tensors = {name: tensor.clone() for name, tensor in load_file(victim).items()}
        if damage == "empty":
            victim.write_bytes(b"")
        elif damage == "truncated":
            victim.write_bytes(whole[: len(whole) // 2])
        elif damage == "overwritten":
            victim.write_bytes(b"\xff" * len(whole))
        elif damage == "bit":
            victim.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
        elif damage == "no checksum":
            save_file(tensors, victim)
        elif damage == "shape":
            save_file({name: tensor[:, 1:].contiguous() for name, tensor in tensors.items()}, victim)
        elif damage == "level":
            save_file({"level0": tensors["level0"]}, victim)
        else:
            save_file({name: tensor.int() for name, tensor in tensors.items()}, victim)
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory)
        with pytest.warns(UserWarning, match=rf"{victim.name}.*computing it anew"):
            assert_same(store.get(IDS[:2]), fresh)
        assert backbone.images == 3
        assert victim.read_bytes() == whole  # mended

    def test_the_folder_stays_within_the_budget(self, backbone: CountingBackbone, directory: Path) -> None:
        budget = 7 * TENSOR_BYTES // 2
        store = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=budget, batch_size=1)
        for image_id in [*IDS, *IDS[:3]]:
            store.get([image_id])
            assert sum(file.stat().st_size for file in stored_files(directory)) <= budget
        assert len(stored_files(directory)) == 3

    def test_other_backbones_and_sizes_count_too(self, backbone: CountingBackbone, directory: Path) -> None:
        FeatureStore(CountingBackbone(seed=1), SOURCE, size=SIZE, directory=directory).get(IDS[:2])
        foreign = directory / "my-weights" / "best.safetensors"
        foreign.parent.mkdir()
        foreign.write_bytes(b"user's own")
        os.utime(foreign, ns=(1, 1))  # older than everything of ours
        budget = 7 * TENSOR_BYTES // 2
        FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=budget).get(IDS[:2])
        ours = [file for file in stored_files(directory) if file != foreign]
        assert foreign.read_bytes() == b"user's own"
        assert sum(file.stat().st_size for file in ours) <= budget
        folders = [file.parent.name for file in ours]
        assert folders.count(f"{backbone.fingerprint[:16]}-{SIZE}") == 2  # it was the others' turn to go
        assert len(folders) == 3

    def test_use_is_remembered_across_runs_near_the_budget(self, backbone: CountingBackbone, directory: Path) -> None:
        budget = 7 * TENSOR_BYTES // 2
        for position, image_id in enumerate(IDS[:3]):
            known = set(stored_files(directory))
            FeatureStore(backbone, SOURCE, size=SIZE, directory=directory).get([image_id])
            (written,) = set(stored_files(directory)) - known
            os.utime(written, ns=(position, position))
        FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=budget).get([IDS[0]])
        later = FeatureStore(backbone, SOURCE, size=SIZE, directory=directory, byte_budget=budget)
        later.get([IDS[3]])  # sends 1 away, not 0
        assert backbone.images == 4
        later.get([IDS[0], IDS[2], IDS[3]])
        assert backbone.images == 4

    def test_an_interrupted_ensure_leaves_whole_files_and_is_repeated(
        self, backbone: CountingBackbone, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written, write = 0, Path.write_bytes

        def interrupted(path: Path, content: bytes) -> int:
            nonlocal written
            written += 1
            if written == 4:
                write(path, content[:50])
                raise KeyboardInterrupt
            return write(path, content)

        monkeypatch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            FeatureStore(backbone, SOURCE, size=SIZE, directory=directory).ensure(IDS)
        monkeypatch.undo()
        files = stored_files(directory)
        assert len(files) == 3
        assert all(set(load_file(file)) == {"level0", "level1"} for file in files)
        again = CountingBackbone()
        store = FeatureStore(again, SOURCE, size=SIZE, directory=directory)
        store.ensure(IDS)
        assert again.images == len(IDS) - 3
        assert_same(store.get(IDS), expected_features(CountingBackbone(), SOURCE, IDS))

    def test_a_folder_that_cannot_be_written(self, backbone: CountingBackbone, tmp_path: Path) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("not a folder")
        with pytest.raises(DataError, match="choose a folder you may write to"):
            FeatureStore(backbone, SOURCE, size=SIZE, directory=blocked).get(IDS[:1])


class CountingSource(SyntheticSource):
    """Counts the masks that were read."""

    masks_read = 0

    def mask(self, image_id: str, class_id: int) -> UInt8Array:
        type(self).masks_read += 1
        return super().mask(image_id, class_id)


DRAWN = np.full((SIZE, SIZE), 255, np.uint8)
DRAWN[:7] = 0


class DrawnSource(SyntheticSource):
    """Somebody drew boxes."""

    def annotation(self, image_id: str, class_id: int, kind: SupportKind) -> UInt8Array | None:
        assert image_id
        assert class_id
        return DRAWN if kind == "box" else None


class TestMaskStore:
    def test_equals_the_transform_and_reads_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(CountingSource, "masks_read", 0)
        source = CountingSource(seed=3, base_classes=2, novel_classes=2, images_per_class=4, size=40)
        store, transform = MaskStore(source, size=SIZE), EpisodeTransform("none", SIZE)
        pairs = [(IDS[0], 1), (IDS[1], 2), (IDS[0], 2), (IDS[0], 1)]
        for _ in range(2):
            masks = store.get(*zip(*pairs, strict=True))
            for mask, (image_id, class_id) in zip(masks, pairs, strict=True):
                expected = transform(SOURCE.image(image_id), SOURCE.mask(image_id, class_id), seed=0)[1]
                assert torch.equal(mask, expected)
        assert masks.dtype == torch.uint8
        assert source.masks_read == 3

    @pytest.mark.parametrize("fit", ["squash", "pad"])
    def test_fits_masks_and_annotations_as_the_photos(self, tiny_voc: Path, fit: Fit) -> None:
        source, transform = VocSource(tiny_voc), EpisodeTransform("none", SIZE, fit)
        store = MaskStore(source, size=SIZE, fit=fit)
        for image_id in source.ids("val")[:4]:
            image, class_id = source.image(image_id), next(iter(source.class_areas(image_id)))
            found = store.get([image_id] * 5, [class_id] * 5, SUPPORT_KINDS)
            for known, kind in zip(found, SUPPORT_KINDS, strict=True):
                annotation = derive_annotation(source.mask(image_id, class_id), kind)
                resize = transform if kind == "mask" else transform.marks
                assert torch.equal(known, resize(image, annotation, seed=0)[1]), kind
            assert torch.equal(found[0], store.get([image_id], [class_id])[0])  # masks unless told otherwise
            if fit == "squash":
                assert (found[4] == IGNORE).all()
                assert not (found == OUTSIDE).any()
            else:
                height, width = fitted_size(*image.shape[:2], SIZE, "pad")
                assert min(height, width) < SIZE
                outside = torch.ones(SIZE, SIZE, dtype=torch.bool)
                outside[:height, :width] = False
                assert (found[0, outside] == IGNORE).all()  # masks keep what they always had
                assert (found[1:, outside] == OUTSIDE).all()
                assert not (found[:, ~outside] == OUTSIDE).any()
                assert (found[4, ~outside] == IGNORE).all()

    @pytest.mark.parametrize(("fit", "rows", "place"), [("squash", SIZE, [32, 12]), ("pad", 36, [24, 12])])
    def test_an_object_smaller_than_a_pixel_of_the_square_keeps_one(
        self, fit: Fit, rows: int, place: list[int]
    ) -> None:
        class Large(SyntheticSource):
            def mask(self, image_id: str, class_id: int) -> UInt8Array:
                assert (image_id, class_id) == (IDS[0], 1)
                mask = np.zeros((900, 1200), np.uint8)
                mask[600:602, 305] = 1
                return mask

        store = MaskStore(Large(seed=3, base_classes=2, novel_classes=2, images_per_class=4), size=SIZE, fit=fit)
        mask, box, scribble, point = store.get([IDS[0]] * 4, [1] * 4, ["mask", "box", "scribble", "point"])
        for marks, value in ((mask, 1), (box, IGNORE), (scribble, 1), (point, 1)):
            assert (marks[:rows] == value).nonzero().tolist() == [place]
        for marks, beside in ((mask, IGNORE), (box, OUTSIDE), (scribble, OUTSIDE), (point, OUTSIDE)):
            assert (marks[rows:] == beside).all()

    def test_takes_what_was_drawn_before_what_can_be_derived(self) -> None:
        store = MaskStore(
            DrawnSource(seed=3, base_classes=2, novel_classes=2, images_per_class=4, size=SIZE), size=SIZE
        )
        box, point, mask = store.get([IDS[0]] * 3, [1] * 3, ["box", "point", "mask"])
        assert torch.equal(box, torch.from_numpy(DRAWN))
        source = SyntheticSource(seed=3, base_classes=2, novel_classes=2, images_per_class=4, size=SIZE)
        assert torch.equal(mask, torch.from_numpy(source.mask(IDS[0], 1)))
        assert torch.equal(point, torch.from_numpy(derive_annotation(source.mask(IDS[0], 1), "point")))

    def test_an_object_that_is_not_in_the_photo_cannot_be_marked(self) -> None:
        image_id = next(i for i in IDS if 2 not in SOURCE.class_areas(i))
        store = MaskStore(SOURCE, size=SIZE)
        assert not store.get([image_id], [2]).any()  # a mask may be empty
        with pytest.raises(DataError, match=rf"{image_id}.*class 2: .* box"):
            store.get([image_id], [2], ["box"])

    def test_keeps_ignored_pixels(self, tiny_voc: Path) -> None:
        source = VocSource(tiny_voc)
        image_id = source.ids("val")[0]
        class_id = next(iter(source.class_areas(image_id)))
        (mask,) = MaskStore(source, size=SIZE).get([image_id], [class_id])
        expected = EpisodeTransform("none", SIZE)(source.image(image_id), source.mask(image_id, class_id), seed=0)[1]
        assert torch.equal(mask, expected)
        assert set(mask.unique().tolist()) == {0, 1, 255}

    def test_writing_to_the_result_does_not_change_what_is_kept(self) -> None:
        store = MaskStore(SOURCE, size=SIZE)
        kept = store.get(IDS[:1], [1])
        store.get(IDS[:1], [1]).fill_(9)
        assert torch.equal(store.get(IDS[:1], [1]), kept)

    def test_ids_and_classes_that_do_not_pair(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            MaskStore(SOURCE, size=SIZE).get(IDS[:2], [1])


def test_joint_source_shares_the_features_of_its_members(shared_voc: Path) -> None:
    voc, drawn = VocSource(shared_voc), SyntheticSource()
    joint = JointSource((voc, drawn))
    assert content_name(joint, "voc/val_01_0") == content_name(voc, "val_01_0")
    assert content_name(joint, "synthetic/train-001-0000") == content_name(drawn, "train-001-0000")
