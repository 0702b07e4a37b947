"""Training of the similarity network: batches by number, losses that are the sum of their parts, resumed runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from episodes.labelled import LabelledImages
from episodes.types import DataError
from fewshot_seg.backbones import Backbone
from fewshot_seg.checkpoint import read_tensors
from fewshot_seg.constraint import SimilarityMining
from fewshot_seg.embedding import ImageEmbedder, embed_photos
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureBatch
from fewshot_seg.features import FeatureStore
from fewshot_seg.metric_losses import METRIC_LOSSES, MetricLoss, MetricLossKind, build_metric_loss
from fewshot_seg.optimisation import CHECKPOINT_NAME, Plan, TrainingResult
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter, training_free
from fewshot_seg.similarity import SimilarityNetwork
from fewshot_seg.similarity_losses import (
    Constraint,
    MapKind,
    choose_triples,
    map_loss,
    mining_loss,
    region_embeddings,
    region_triples,
)
from fewshot_seg.similarity_training import (
    PhotoBatch,
    PhotoBatches,
    episode_similarity_losses,
    photo_losses,
    train_on_episodes,
    train_on_photos,
)

SIZE, STEPS = 64, 6
DrawEpisodes = Callable[..., CachedEpisodes]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """Three classes of four photos: a square of the class's colour on random patches. Photo 2/3.png is alone."""
    root, random, files = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    for label, colour in enumerate(([200, 40, 40], [40, 200, 40], [40, 40, 200])):
        (root / str(label)).mkdir()
        for number in range(4):
            patches = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            patches[2:6, 2:6] = colour
            files.append(f"{label}/{number}.png")
            Image.fromarray(patches).resize((SIZE, SIZE), Image.Resampling.NEAREST).save(root / files[-1])
    labels = tuple(f"class {file[0]}" for file in files)
    return LabelledImages(name="patches", root=root, files=tuple(files), labels=labels)


@pytest.fixture(scope="module")
def store(tiny_backbone: Backbone, images: LabelledImages) -> FeatureStore:
    found = FeatureStore(tiny_backbone, images, size=SIZE, directory=None)
    found.ensure(images.files)
    return found


MakeBatches = Callable[..., PhotoBatches]


@pytest.fixture(scope="module")
def make_batches(store: FeatureStore, images: LabelledImages) -> MakeBatches:
    settings = {"classes": 2, "photos": 2, "batches": 8, "seed": 0}
    return lambda **changes: PhotoBatches(store, images, **(settings | changes))


def assert_same(one: PhotoBatch, other: PhotoBatch) -> None:
    assert one.files == other.files
    assert torch.equal(one.labels, other.labels)
    assert all(torch.equal(left, right) for left, right in zip(one.levels, other.levels, strict=True))
    assert (one.photos is None) == (other.photos is None)
    if one.photos is not None and other.photos is not None:
        assert torch.equal(one.photos, other.photos)


class TestPhotoBatches:
    def test_hold_classes_in_balance_with_their_features(
        self, make_batches: MakeBatches, images: LabelledImages, store: FeatureStore
    ) -> None:
        batches = make_batches(classes=3, photos=2, mirror=False)
        assert len(batches) == 8
        for number in range(8):
            batch = batches[number]
            codes = dict(zip(images.files, images.codes.tolist(), strict=True))
            assert batch.labels.tolist() == [codes[file] for file in batch.files]
            assert batch.labels.dtype == torch.int64
            assert sorted(batch.labels.tolist()) == [0, 0, 1, 1, 2, 2]
            assert len(set(batch.files)) == 6
            assert all(torch.equal(a, b) for a, b in zip(batch.levels, store.get(batch.files), strict=True))

    def test_batch_n_is_a_function_of_seed_and_n(self, make_batches: MakeBatches) -> None:
        some, more = make_batches(size=SIZE), make_batches(size=SIZE, batches=50)
        np.random.seed(5)  # noqa: NPY002  the global state must not matter
        for number in (5, 0, 3):
            assert_same(some[number], more[number])
        assert len({some[number].files for number in range(8)}) > 4
        other = make_batches(seed=1)
        assert [some[n].files for n in range(8)] != [other[n].files for n in range(8)]

    def test_mirror_turns_features_and_photos_together(self, make_batches: MakeBatches) -> None:
        plain, mirrored = make_batches(size=SIZE, mirror=False), make_batches(size=SIZE)
        turned = []
        for before, after in zip(plain.following(0), mirrored.following(0), strict=True):
            assert before.files == after.files
            assert torch.equal(before.labels, after.labels)
            assert before.photos is not None
            assert after.photos is not None
            for row in range(len(before.files)):
                turn = not torch.equal(before.photos[row], after.photos[row])
                pairs = [(before.photos, after.photos), *zip(before.levels, after.levels, strict=True)]
                for left, right in pairs:
                    assert torch.equal(right[row], left[row].flip(2) if turn else left[row])
                turned.append(turn)
        assert 0.25 < sum(turned) / len(turned) < 0.75

    def test_carry_the_photos_when_given_a_size(self, make_batches: MakeBatches, images: LabelledImages) -> None:
        batches = make_batches(size=SIZE, mirror=False)
        assert batches.with_photos
        batch = batches[2]
        assert batch.photos is not None
        for photo, file in zip(batch.photos, batch.files, strict=True):
            expected = torch.from_numpy(images.image(file)).permute(2, 0, 1).float() / 255
            torch.testing.assert_close(photo, expected)
        smaller = make_batches(size=32)[0].photos
        assert smaller is not None
        assert smaller.shape == (4, 3, 32, 32)
        assert smaller.dtype == torch.float32
        assert not make_batches().with_photos
        assert make_batches()[0].photos is None

    def test_following(self, make_batches: MakeBatches) -> None:
        batches = make_batches()
        rest = list(batches.following(5))
        assert [batch.files for batch in rest] == [batches[number].files for number in (5, 6, 7)]
        assert list(batches.following(8)) == []

    def test_refuses_more_classes_than_there_are(self, make_batches: MakeBatches) -> None:
        with pytest.raises(DataError, match="batches of 4 classes need at least as many, but the labels name 3"):
            make_batches(classes=4)


def new_network(backbone: Backbone, *, seed: int = 0) -> SimilarityNetwork:
    similarity = SimilarityNetwork(backbone.channels, rank=3, seed=seed)
    nn.init.normal_(similarity.up.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    return similarity


def gradients(loss: Tensor, similarity: SimilarityNetwork) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(similarity.parameters())))


class TestPhotoLosses:
    @pytest.fixture
    def similarity(self, tiny_backbone: Backbone) -> SimilarityNetwork:
        return new_network(tiny_backbone)

    @pytest.fixture
    def batch(self, make_batches: MakeBatches) -> PhotoBatch:
        return make_batches(classes=3, size=SIZE)[0]

    @pytest.mark.parametrize("in_photos", [False, True])
    def test_is_the_weighted_sum_of_its_parts(
        self, tiny_backbone: Backbone, similarity: SimilarityNetwork, batch: PhotoBatch, in_photos: bool
    ) -> None:
        embedder = ImageEmbedder(tiny_backbone, similarity) if in_photos else None
        constraint = Constraint(mining=SimilarityMining(), weight=0.7, triples=2, kind="triplet", embedder=embedder)
        metric = build_metric_loss("contrastive", mine=False)
        losses = photo_losses(similarity, batch, metric=metric, metric_weight=3.0, constraint=constraint)
        assert losses.keys() == {"loss", "metric_loss", "mining_loss"}
        torch.testing.assert_close(losses["loss"], 3 * losses["metric_loss"] + 0.7 * losses["mining_loss"])
        maps = similarity(batch.levels)
        embeddings = similarity.embed(maps)
        torch.testing.assert_close(losses["metric_loss"], metric(embeddings, batch.labels))
        anchor, positive, negative = choose_triples(embeddings, batch.labels, 2)
        assert len(anchor) == 2
        assert batch.photos is not None
        photos = (batch.photos[anchor], batch.photos[positive], batch.photos[negative]) if in_photos else None
        expected = mining_loss(constraint, (maps[anchor], maps[positive], maps[negative]), photos)
        torch.testing.assert_close(losses["mining_loss"], expected)
        assert losses["mining_loss"] > 0

    def test_a_part_alone(self, similarity: SimilarityNetwork, batch: PhotoBatch) -> None:
        metric, constraint = build_metric_loss("triplet", mine=False), Constraint(mining=SimilarityMining(), weight=2.0)
        alone = photo_losses(similarity, batch, metric=metric, metric_weight=1.0, constraint=None)
        assert alone.keys() == {"loss", "metric_loss"}
        assert torch.equal(alone["loss"], alone["metric_loss"])
        mined = photo_losses(similarity, batch, metric=None, metric_weight=1.0, constraint=constraint)
        assert mined.keys() == {"loss", "mining_loss"}
        torch.testing.assert_close(mined["loss"], 2 * mined["mining_loss"])

    def test_a_learned_mask_is_logged(self, similarity: SimilarityNetwork, batch: PhotoBatch) -> None:
        mining = SimilarityMining(sharpness=8.0, threshold=0.3, learnable=True)
        constraint = Constraint(mining=mining, weight=1.0)
        losses = photo_losses(similarity, batch, metric=None, metric_weight=1.0, constraint=constraint)
        assert losses["sharpness"].item() == pytest.approx(8.0, rel=1e-5)
        assert losses["mask_threshold"].item() == pytest.approx(0.3, rel=1e-5)
        assert not losses["sharpness"].requires_grad
        assert not losses["mask_threshold"].requires_grad
        found = torch.autograd.grad(losses["loss"], list(mining.parameters()))
        assert all(gradient != 0 for gradient in found)

    @pytest.mark.parametrize("kind", [None, *METRIC_LOSSES])
    @pytest.mark.parametrize("mine", [True, False])
    def test_a_batch_without_pairs_has_a_gradient_of_zeros(
        self, similarity: SimilarityNetwork, batch: PhotoBatch, kind: MetricLossKind | None, mine: bool
    ) -> None:
        metric = None if kind is None else build_metric_loss(kind, mine=mine)
        single = PhotoBatch(
            files=batch.files[:1], labels=batch.labels[:1], levels=tuple(x[:1] for x in batch.levels), photos=None
        )
        constraint = Constraint(mining=SimilarityMining(), weight=1.0)
        losses = photo_losses(similarity, single, metric=metric, metric_weight=1.0, constraint=constraint)
        assert losses["loss"] == 0
        assert "mining_loss" not in losses
        found = gradients(losses["loss"], similarity)
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)

    def test_one_class_alone_has_no_triples(self, similarity: SimilarityNetwork, batch: PhotoBatch) -> None:
        same = PhotoBatch(files=batch.files, labels=torch.zeros(6, dtype=torch.int64), levels=batch.levels, photos=None)
        constraint = Constraint(mining=SimilarityMining(learnable=True), weight=1.0)
        losses = photo_losses(similarity, same, metric=None, metric_weight=1.0, constraint=constraint)
        assert losses.keys() == {"loss"}
        assert all(not gradient.any() for gradient in gradients(losses["loss"], similarity))


class TestEpisodeSimilarityLosses:
    @pytest.fixture
    def segmenter(self, tiny_backbone: Backbone) -> FewShotSegmenter:
        return training_free(tiny_backbone, similarity=new_network(tiny_backbone))

    def test_is_the_weighted_sum_of_its_parts(self, segmenter: FewShotSegmenter, draw_episodes: DrawEpisodes) -> None:
        batch = next(draw_episodes(3, shots=2).batches(3))
        metric = build_metric_loss("contrastive", mine=False)
        constraint = Constraint(mining=SimilarityMining(learnable=True), weight=0.7)
        kinds: tuple[MapKind, ...] = ("soft margin", "quadruplet")
        losses = episode_similarity_losses(
            segmenter, batch, maps=kinds, map_weight=2.0, metric=metric, metric_weight=3.0, constraint=constraint
        )
        assert losses.keys() == {"loss", "map_loss", "metric_loss", "mining_loss", "sharpness", "mask_threshold"}
        total = 2 * losses["map_loss"] + 3 * losses["metric_loss"] + 0.7 * losses["mining_loss"]
        torch.testing.assert_close(losses["loss"], total)
        similarity = segmenter.similarity
        support = segmenter.encode_support_levels(batch.support_levels, batch.support_masks)
        maps, support_maps = similarity(batch.query_levels), similarity(batch.support_levels)
        torch.testing.assert_close(losses["map_loss"], map_loss(segmenter, support, maps, batch.query_masks, kinds))
        regions = region_embeddings(support, maps, batch.query_masks, batch.class_ids)
        torch.testing.assert_close(losses["metric_loss"], metric(*regions))
        triples = region_triples(maps, support_maps, batch.support_masks)
        torch.testing.assert_close(losses["mining_loss"], mining_loss(constraint, triples))
        assert all(losses[name] > 0 for name in ("map_loss", "metric_loss", "mining_loss"))

    @pytest.mark.parametrize("part", ["maps", "metric", "constraint"])
    def test_a_part_alone(self, segmenter: FewShotSegmenter, draw_episodes: DrawEpisodes, part: str) -> None:
        parts: dict[str, Any] = {
            "maps": ("margin",),
            "metric": build_metric_loss("triplet", mine=False),
            "constraint": Constraint(mining=SimilarityMining(), weight=1.0),
        }
        options = {"maps": (), "metric": None, "constraint": None} | {part: parts[part]}
        batch = next(draw_episodes(2).batches(2))
        losses = episode_similarity_losses(segmenter, batch, map_weight=1.0, metric_weight=1.0, **options)
        name = {"maps": "map_loss", "metric": "metric_loss", "constraint": "mining_loss"}[part]
        assert losses.keys() == {"loss", name}
        assert torch.equal(losses["loss"], losses[name])
        assert any(gradient.any() for gradient in gradients(losses["loss"], segmenter.similarity))

    @pytest.mark.parametrize("kind", METRIC_LOSSES)
    def test_one_episode_alone_has_a_finite_gradient(
        self, segmenter: FewShotSegmenter, draw_episodes: DrawEpisodes, kind: MetricLossKind
    ) -> None:
        losses = episode_similarity_losses(
            segmenter,
            next(draw_episodes(1).batches(1)),
            maps=("quadruplet",),
            map_weight=1.0,
            metric=build_metric_loss(kind),
            metric_weight=1.0,
            constraint=Constraint(mining=SimilarityMining(), weight=1.0),
        )
        assert losses["loss"].isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(losses["loss"], segmenter.similarity))


def make_plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 1e-2,
        "schedule": "one-cycle",
        "seed": 5,
        "details": {"gamma": 0.5},
    }
    return Plan(**(settings | changes))


class StoppingPhotos(PhotoBatches):
    """Raises instead of giving a batch."""

    stop: tuple[int, BaseException] | None = None

    def __getitem__(self, number: int) -> PhotoBatch:
        if self.stop is not None and number == self.stop[0]:
            raise self.stop[1]
        return super().__getitem__(number)


class StoppingEpisodes:
    """Likewise."""

    def __init__(self, episodes: CachedEpisodes, stop: tuple[int, BaseException] | None) -> None:
        self.episodes, self.stop = episodes, stop

    def __len__(self) -> int:
        return len(self.episodes)

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[FeatureBatch]:
        for number, batch in enumerate(self.episodes.batches(batch_size, start=start), start // batch_size):
            if self.stop is not None and number == self.stop[0]:
                raise self.stop[1]
            yield batch


Stop = tuple[int, BaseException]
Run = Callable[..., tuple[list[nn.Module], TrainingResult]]


@pytest.fixture(scope="module")
def runs(
    tiny_backbone: Backbone, store: FeatureStore, images: LabelledImages, draw_episodes: DrawEpisodes
) -> dict[str, Run]:
    """Trainings by name: run(folder, stop=..., seed=..., plan=...) -> what was trained, and the result."""

    def on_photos(
        in_photos: bool, folder: Path | None, *, stop: Stop | None = None, seed: int = 0, **changes: Any
    ) -> tuple[list[nn.Module], TrainingResult]:
        similarity, mining = new_network(tiny_backbone, seed=seed), SimilarityMining(learnable=True)
        batches = StoppingPhotos(
            store, images, classes=2, photos=2, batches=STEPS, seed=0, size=SIZE if in_photos else None
        )
        batches.stop = stop
        result = train_on_photos(
            similarity,
            batches,
            metric=None if in_photos else build_metric_loss("triplet", mine=False),
            plan=make_plan(**changes),
            constraint=Constraint(
                mining=mining,
                weight=0.5,
                triples=1 if in_photos else None,
                embedder=ImageEmbedder(tiny_backbone, similarity) if in_photos else None,
            ),
            folder=folder,
            checkpoint_every=2,
            log_every=1,
            resume=True,
        )
        return [similarity, mining], result

    def on_episodes(
        folder: Path | None, *, stop: Stop | None = None, seed: int = 0, **changes: Any
    ) -> tuple[list[nn.Module], TrainingResult]:
        segmenter = training_free(tiny_backbone, similarity=new_network(tiny_backbone, seed=seed))
        mining = SimilarityMining(learnable=True)
        result = train_on_episodes(
            segmenter,
            StoppingEpisodes(draw_episodes(2 * STEPS, mirror=True), stop),
            batch_size=2,
            plan=make_plan(**changes),
            maps=("soft margin", "triplet"),
            metric=build_metric_loss("multi-similarity"),
            constraint=Constraint(mining=mining, weight=0.5),
            folder=folder,
            checkpoint_every=2,
            log_every=1,
            resume=True,
        )
        return [segmenter.similarity, mining], result

    return {
        "photos, masked features": functools.partial(on_photos, False),
        "photos, masked photos": functools.partial(on_photos, True),
        "episodes": on_episodes,
    }


RUNS = ("photos, masked features", "photos, masked photos", "episodes")


def tensors_of(parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    return {f"{n}.{name}": value for n, part in enumerate(parts) for name, value in part.state_dict().items()}


@pytest.fixture(scope="module")
def uninterrupted(
    runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[nn.Module], TrainingResult, Path]]:
    @functools.cache
    def once(name: str) -> tuple[list[nn.Module], TrainingResult, Path]:
        folder = tmp_path_factory.mktemp("uninterrupted")
        return (*runs[name](folder), folder)

    return once


Uninterrupted = Callable[[str], tuple[list[nn.Module], TrainingResult, Path]]


class TestResume:
    @pytest.mark.parametrize("name", RUNS)
    @pytest.mark.parametrize("error", [RuntimeError("killed"), KeyboardInterrupt()])
    def test_resumed_equals_uninterrupted(
        self, tmp_path: Path, runs: dict[str, Run], uninterrupted: Uninterrupted, name: str, error: BaseException
    ) -> None:
        with pytest.raises(type(error)):
            runs[name](tmp_path, stop=(3, error))
        parts, result = runs[name](tmp_path, seed=9)  # what the checkpoint does not restore would show
        expected_parts, expected, folder = uninterrupted(name)
        assert result.steps == STEPS
        assert result.losses == expected.losses[3 if isinstance(error, KeyboardInterrupt) else 2 :]
        found, wanted = tensors_of(parts), tensors_of(expected_parts)
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
        found, wanted = (read_tensors(one / CHECKPOINT_NAME)[0] for one in (tmp_path, folder))
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
        assert (tmp_path / "training.jsonl").read_text() == (folder / "training.jsonl").read_text()

    @pytest.mark.parametrize("name", RUNS)
    def test_trains_network_and_mask_and_writes_them(self, uninterrupted: Uninterrupted, name: str) -> None:
        (similarity, mining), result, folder = uninterrupted(name)
        assert isinstance(mining, SimilarityMining)
        assert mining.sharpness.item() != pytest.approx(10.0, rel=1e-4)
        assert mining.threshold.item() != pytest.approx(0.5, rel=1e-4)
        assert not similarity.training
        assert not mining.training
        tensors, description = read_tensors(folder / CHECKPOINT_NAME)
        parts = {key.rpartition(".")[0] for key in tensors if not key.startswith("optimiser.")}
        assert parts == {"similarity.down", "similarity.up", "mining"}
        assert torch.equal(tensors["mining.log_sharpness"], mining.log_sharpness)
        assert description["plan"]["gamma"] == 0.5
        last = json.loads((folder / "training.jsonl").read_text().splitlines()[-1])
        assert last["loss"] == result.losses[-1]
        assert {"mining_loss", "sharpness", "mask_threshold", "rate"} < last.keys()

    @pytest.mark.parametrize("name", ["photos, masked features", "episodes"])
    @pytest.mark.parametrize("changes", [{"details": {"gamma": 0.6}}, {"learning_rate": 1e-3}])
    def test_refuses_the_checkpoint_of_another_plan(
        self,
        tmp_path: Path,
        runs: dict[str, Run],
        uninterrupted: Uninterrupted,
        name: str,
        changes: dict[str, Any],
    ) -> None:
        content = (uninterrupted(name)[2] / CHECKPOINT_NAME).read_bytes()
        (tmp_path / CHECKPOINT_NAME).write_bytes(content)
        with pytest.raises(DataError, match=rf"{CHECKPOINT_NAME} belongs to a run with other settings"):
            runs[name](tmp_path, **changes)

    def test_refuses_the_checkpoint_of_another_network(
        self, tmp_path: Path, tiny_backbone: Backbone, uninterrupted: Uninterrupted, make_batches: MakeBatches
    ) -> None:
        content = (uninterrupted("photos, masked features")[2] / CHECKPOINT_NAME).read_bytes()
        (tmp_path / CHECKPOINT_NAME).write_bytes(content)
        with pytest.raises(DataError, match=rf"{CHECKPOINT_NAME} does not fit this model: 2 tensors differ"):
            train_on_photos(
                SimilarityNetwork(tiny_backbone.channels, rank=5),
                make_batches(),
                metric=build_metric_loss("triplet"),
                plan=make_plan(),
                folder=tmp_path,
                resume=True,
            )


class TestTrainOnPhotos:
    def test_separates_classes(self, tiny_backbone: Backbone, store: FeatureStore, images: LabelledImages) -> None:
        similarity = SimilarityNetwork(tiny_backbone.channels, rank=4)
        labels = torch.from_numpy(images.codes)
        same = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)
        different = labels[:, None] != labels

        def look() -> tuple[float, float]:
            embeddings = embed_photos(similarity, store, images.files)
            cosine = embeddings @ embeddings.T
            loss = build_metric_loss("triplet", mine=False)(embeddings, labels).item()
            return loss, float(cosine[same].mean() - cosine[different].mean())

        before = look()
        batches = PhotoBatches(store, images, classes=3, photos=3, batches=30, seed=0, mirror=False)
        result = train_on_photos(
            similarity,
            batches,
            metric=build_metric_loss("triplet", mine=False),
            plan=make_plan(steps=30, learning_rate=3e-2),
            constraint=Constraint(mining=SimilarityMining(), weight=0.1),
        )
        after = look()
        assert len(result.losses) == result.steps == 30
        assert after[0] < 0.5 * before[0]
        assert after[1] > before[1] + 0.3
        assert sum(result.losses[-5:]) < 0.7 * sum(result.losses[:5])

    def test_the_backbone_is_left_alone(self, tiny_backbone: Backbone, runs: dict[str, Run]) -> None:
        before = {name: value.clone() for name, value in tiny_backbone.state_dict().items()}
        runs["photos, masked photos"](None)
        assert all(torch.equal(value, before[name]) for name, value in tiny_backbone.state_dict().items())
        assert all(parameter.grad is None for parameter in tiny_backbone.parameters())

    def test_metric_weight(self, tiny_backbone: Backbone, make_batches: MakeBatches) -> None:
        first = []
        for weight in (1.0, 3.0):
            result = train_on_photos(
                new_network(tiny_backbone),
                make_batches(),
                metric=build_metric_loss("contrastive", mine=False),
                plan=make_plan(steps=1),
                metric_weight=weight,
            )
            first.append(result.losses[0])
        assert first[1] == pytest.approx(3 * first[0])

    def test_a_batch_without_pairs_is_survived(self, tiny_backbone: Backbone, make_batches: MakeBatches) -> None:
        similarity = new_network(tiny_backbone)
        result = train_on_photos(
            similarity,
            make_batches(classes=2, photos=1),
            metric=None,
            plan=make_plan(weight_decay=0.0),
            constraint=Constraint(mining=SimilarityMining(), weight=1.0),
        )
        assert result.losses == (0.0,) * STEPS
        before = new_network(tiny_backbone).state_dict()
        assert all(torch.equal(value, before[name]) for name, value in similarity.state_dict().items())

    def test_a_loss_that_is_not_finite_names_the_photos(
        self, tmp_path: Path, tiny_backbone: Backbone, make_batches: MakeBatches
    ) -> None:
        similarity, batches = new_network(tiny_backbone), make_batches()
        nn.init.constant_(similarity.up.weight, float("nan"))
        files = "; ".join(batches[0].files)
        with pytest.raises(DataError, match=rf"loss is nan at step 0; lower --learning-rate; photos: {files}"):
            train_on_photos(
                similarity, batches, metric=build_metric_loss("contrastive"), plan=make_plan(), folder=tmp_path
            )
        assert not (tmp_path / CHECKPOINT_NAME).exists()

    def refused(self, tmp_path: Path, message: str, *arguments: Any, **more: Any) -> None:
        with pytest.raises(DataError, match=message):
            train_on_photos(*arguments, folder=tmp_path / "run", **more)
        assert not (tmp_path / "run").exists()

    def test_refuses(self, tmp_path: Path, tiny_backbone: Backbone, make_batches: MakeBatches) -> None:
        similarity, batches, metric = new_network(tiny_backbone), make_batches(), build_metric_loss("triplet")
        refused = functools.partial(self.refused, tmp_path)
        refused(
            "nothing to minimise: choose a metric loss or a constraint",
            similarity,
            batches,
            metric=None,
            plan=make_plan(),
        )
        in_photos = Constraint(mining=SimilarityMining(), weight=1.0, embedder=ImageEmbedder(tiny_backbone, similarity))
        refused(
            "a constraint that masks photos needs batches that carry them; give them a size",
            similarity,
            batches,
            metric=metric,
            plan=make_plan(),
            constraint=in_photos,
        )
        refused("9 steps need as many batches, got 8", similarity, batches, metric=metric, plan=make_plan(steps=9))

    @pytest.mark.parametrize("rank", [0, 3])
    def test_nothing_to_train(
        self, tmp_path: Path, tiny_backbone: Backbone, make_batches: MakeBatches, rank: int
    ) -> None:
        frozen = SimilarityNetwork(tiny_backbone.channels, rank=rank).requires_grad_(False)
        self.refused(
            tmp_path,
            "nothing to train",
            frozen,
            make_batches(),
            metric=build_metric_loss("triplet"),
            plan=make_plan(),
        )


class TestTrainOnEpisodes:
    @pytest.mark.parametrize(
        "options",
        [
            {"maps": ("soft margin", "siamese")},
            {"metric": build_metric_loss("triplet", mine=False)},
        ],
    )
    def test_the_loss_falls(
        self, tiny_backbone: Backbone, draw_episodes: DrawEpisodes, options: dict[str, Any]
    ) -> None:
        segmenter = training_free(tiny_backbone, similarity=SimilarityNetwork(tiny_backbone.channels, rank=4))
        batch = next(draw_episodes(24, seed=1).batches(24))
        terms: dict[str, Any] = {"maps": (), "metric": None, "constraint": None} | options

        def look() -> float:
            losses = episode_similarity_losses(segmenter, batch, map_weight=1.0, metric_weight=1.0, **terms)
            return losses["loss"].item()

        before = look()
        result = train_on_episodes(
            segmenter, draw_episodes(120), batch_size=4, plan=make_plan(steps=30, learning_rate=2e-2), **options
        )
        assert result.steps == 30
        assert look() < 0.85 * before

    def test_decoder_and_backbone_are_left_alone(self, tiny_backbone: Backbone, draw_episodes: DrawEpisodes) -> None:
        segmenter = build_segmenter(tiny_backbone, similarity_rank=3, decoder_width=8, decoder_blocks=1).train()
        before = {name: value.clone() for name, value in segmenter.state_dict().items()}
        train_on_episodes(segmenter, draw_episodes(8), batch_size=2, plan=make_plan(steps=4), maps=("margin",))
        changed = {name for name, value in segmenter.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"similarity.down.weight", "similarity.up.weight"}

    def test_weights_of_the_terms(self, tiny_backbone: Backbone, draw_episodes: DrawEpisodes) -> None:
        def first(**options: Any) -> float:
            segmenter = training_free(tiny_backbone, similarity=new_network(tiny_backbone))
            metric: MetricLoss = build_metric_loss("triplet", mine=False)
            return train_on_episodes(
                segmenter,
                draw_episodes(2),
                batch_size=2,
                plan=make_plan(steps=1),
                maps=("margin",),
                metric=metric,
                **options,
            ).losses[0]

        plain, of_map, of_metric = first(), first(map_weight=2.0), first(metric_weight=2.0)
        assert of_map + of_metric == pytest.approx(3 * plain, rel=1e-5)
        assert of_map > plain < of_metric

    def test_a_loss_that_is_not_finite_names_the_episodes(
        self, tiny_backbone: Backbone, draw_episodes: DrawEpisodes
    ) -> None:
        segmenter = training_free(tiny_backbone, similarity=new_network(tiny_backbone))
        nn.init.constant_(segmenter.similarity.up.weight, float("nan"))
        episodes = draw_episodes(12)
        query = next(episodes.batches(2)).specs[1].query_id
        with pytest.raises(DataError, match=rf"loss is nan at step 0; lower --learning-rate; episodes: .*{query}"):
            train_on_episodes(segmenter, episodes, batch_size=2, plan=make_plan(), maps=("margin",))

    def test_refuses(self, tmp_path: Path, tiny_backbone: Backbone, draw_episodes: DrawEpisodes) -> None:
        segmenter = training_free(tiny_backbone, similarity=new_network(tiny_backbone))
        in_photos = Constraint(
            mining=SimilarityMining(), weight=1.0, embedder=ImageEmbedder(tiny_backbone, segmenter.similarity)
        )
        cases: list[tuple[dict[str, Any], str]] = [
            ({}, "nothing to minimise: choose maps, a metric loss or a constraint"),
            ({"constraint": in_photos}, "episodes are stored features: their constraint masks features, not photos"),
            ({"maps": ("margin",), "batch_size": 3}, "6 steps of 3 need 18 episodes, got 12"),
        ]
        for options, message in cases:
            with pytest.raises(DataError, match=message):
                train_on_episodes(
                    segmenter,
                    draw_episodes(12),
                    plan=make_plan(),
                    folder=tmp_path / "run",
                    **({"batch_size": 2} | options),
                )
            assert not (tmp_path / "run").exists()

    def test_nothing_to_train(self, tiny_backbone: Backbone, draw_episodes: DrawEpisodes) -> None:
        frozen = new_network(tiny_backbone).requires_grad_(False)
        for similarity in (frozen, None):
            segmenter = training_free(tiny_backbone, similarity=similarity)
            with pytest.raises(DataError, match="nothing to train"):
                train_on_episodes(segmenter, draw_episodes(12), batch_size=2, plan=make_plan(), maps=("margin",))
