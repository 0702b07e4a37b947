"""Cross-fitting's parts: losses against plain ones, trainings that fall and survive being killed, stored priors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from episodes.index import ClassIndex
from episodes.sampler import EpisodeSampler
from episodes.types import DataError, SupportKind
from fewshot_seg import cross_fitting
from fewshot_seg.backbones import Backbone
from fewshot_seg.base_learner import BaseLearner, base_class_loss
from fewshot_seg.checkpoint import read_tensors, trained_tensors, write_tensors
from fewshot_seg.cross_fitting import (
    decoder_loss,
    embedding_losses,
    keep_tensors,
    priors_of_episodes,
    train_base_learner,
    train_decoder,
    train_embedding,
)
from fewshot_seg.decoder import ContextDecoder
from fewshot_seg.feature_episodes import CachedEpisodes, FeatureBatch
from fewshot_seg.features import FeatureStore, MaskStore
from fewshot_seg.losses import balanced_map_loss
from fewshot_seg.optimisation import CHECKPOINT_NAME
from fewshot_seg.priors import soft_margin
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.similarity import cell_weights
from fewshot_seg.training import weak_support_loss

STEPS, BATCH = 8, 2
WEAK: tuple[SupportKind, ...] = ("mask", "box", "label")

Episodes = tuple[ClassIndex, FeatureStore, MaskStore]


@pytest.fixture(scope="module")
def parts(tiny_index: ClassIndex, tiny_store: FeatureStore, tiny_masks: MaskStore) -> Episodes:
    return tiny_index, tiny_store, tiny_masks


def episodes_of(
    parts: Episodes, length: int = STEPS * BATCH, *, shots: int = 1, supports: tuple[SupportKind, ...] = ("mask",)
) -> CachedEpisodes:
    index, store, masks = parts
    specs = EpisodeSampler(
        index.pairs((1, 2, 3)), shots=shots, seed=3, length=length, order="random", repeat_supports=False
    )
    return CachedEpisodes(store, masks, specs, supports=supports)


def model(backbone: Backbone, *, completion: bool = False, seed: int = 0, shaken: bool = True) -> FewShotSegmenter:
    segmenter = build_segmenter(backbone, similarity_rank=4, base_classes=3, completion=completion, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in segmenter.trainable_parameters() if shaken else ():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return segmenter.eval()


class Stops:
    """Episodes that raise instead of giving a batch."""

    def __init__(self, episodes: CachedEpisodes, batch: int) -> None:
        self.episodes, self.batch = episodes, batch

    def __len__(self) -> int:
        return len(self.episodes)

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[FeatureBatch]:
        for number, batch in enumerate(self.episodes.batches(batch_size, start=start), start // batch_size):
            if number == self.batch:
                raise KeyboardInterrupt
            yield batch


def assert_same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class TestEmbeddingLosses:
    @pytest.mark.parametrize(("shots", "supports"), [(1, ("mask",)), (2, ("mask",)), (2, WEAK)])
    def test_equal_those_of_turned_maps(
        self, tiny_backbone: Backbone, parts: Episodes, shots: int, supports: tuple[SupportKind, ...]
    ) -> None:
        """Values and gradients of the plain way: turn all cells, encode, compare by masks; complete what is open."""
        segmenter = model(tiny_backbone, completion=supports == WEAK)
        batch = next(episodes_of(parts, shots=shots, supports=supports).batches(4))
        named = embedding_losses(segmenter, batch)
        encoded = segmenter.encode_support_levels(batch.support_levels, batch.support_masks, batch.support_dense)
        photos = segmenter.photo_maps(batch.query_levels)
        masks = segmenter.encode_support_levels(batch.support_levels, batch.support_truth)
        sides = masks.foreground, masks.background
        margin = soft_margin(photos.cells.flatten(2).transpose(1, 2), encoded.cells, *sides, temperature=0.05)
        weights = [weight.flatten(1) for weight in cell_weights(batch.query_masks, (4, 4))]
        metric = balanced_map_loss(margin, *weights)
        completion = torch.zeros(())
        if segmenter.completion is not None:
            weak = sum(kind != "mask" for kind in batch.stored.kinds)  # type: ignore[union-attr]
            completion = weak_support_loss(batch, encoded, photos.objectness, weak)
            assert completion > 0
        torch.testing.assert_close(named["metric_loss"], metric, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(named["completion_loss"], completion, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(named["loss"], metric + completion, rtol=1e-4, atol=1e-5)
        assert not named["metric_loss"].requires_grad
        trained = [p for part in (segmenter.similarity, segmenter.completion) if part for p in part.parameters()]
        gradients = [torch.autograd.grad(loss, trained) for loss in (named["loss"], metric + completion)]
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max()) + 1e-7)
            assert expected.any()

    def test_only_the_embedding_learns(self, tiny_backbone: Backbone, parts: Episodes) -> None:
        segmenter = model(tiny_backbone, completion=True)
        loss = embedding_losses(segmenter, next(episodes_of(parts, supports=WEAK).batches(4)))["loss"]
        torch.autograd.backward(loss)
        reached = {name.split(".")[0] for name, p in segmenter.named_parameters() if p.grad is not None}
        assert reached == {"similarity", "completion"}


class TestTrainEmbedding:
    def settings(self, **given: Any) -> dict[str, Any]:
        return {"steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-2, "seed": 5, "checkpoint_every": 3, **given}

    def test_lowers_the_loss_and_leaves_the_rest(self, tiny_backbone: Backbone, parts: Episodes) -> None:
        segmenter, episodes = model(tiny_backbone, shaken=False), episodes_of(parts)
        before = {name: tensor.clone() for name, tensor in trained_tensors(segmenter).items()}
        whole = next(episodes.batches(len(episodes)))
        first = embedding_losses(segmenter, whole)["loss"].item()
        result = train_embedding(segmenter, episodes, **self.settings())
        assert result.steps == len(result.losses) == STEPS
        assert embedding_losses(segmenter, whole)["loss"].item() < first
        changed = {name for name, one in trained_tensors(segmenter).items() if not torch.equal(one, before[name])}
        assert changed == {"similarity.down.weight", "similarity.up.weight"}
        assert not segmenter.similarity.training

    @pytest.mark.parametrize("completion", [False, True])
    def test_killed_and_resumed_it_ends_the_same(
        self, tiny_backbone: Backbone, parts: Episodes, tmp_path: Path, completion: bool
    ) -> None:
        episodes = episodes_of(parts, supports=WEAK if completion else ("mask",))
        whole, resumed = (model(tiny_backbone, completion=completion, seed=seed) for seed in (0, 9))
        for part in ("decoder", "base_learner", *(["weak_decoder"] if completion else [])):  # not trained here
            getattr(resumed, part).load_state_dict(getattr(whole, part).state_dict())
        expected = train_embedding(whole, episodes, **self.settings())
        with pytest.raises(KeyboardInterrupt):
            train_embedding(
                model(tiny_backbone, completion=completion),
                Stops(episodes, 5),
                **self.settings(folder=tmp_path, resume=True),
            )
        assert read_tensors(tmp_path / CHECKPOINT_NAME)[1]["step"] == 5
        result = train_embedding(resumed, episodes, **self.settings(folder=tmp_path, resume=True))
        assert result.losses == expected.losses[5:]
        assert_same_weights(trained_tensors(resumed), trained_tensors(whole))

    def test_too_few_episodes(self, tiny_backbone: Backbone, parts: Episodes) -> None:
        with pytest.raises(DataError, match="8 steps of 2 need 16 episodes, got 15"):
            train_embedding(model(tiny_backbone), episodes_of(parts, 15), **self.settings())

    def test_a_checkpoint_of_other_settings(self, tiny_backbone: Backbone, parts: Episodes, tmp_path: Path) -> None:
        train_embedding(model(tiny_backbone), episodes_of(parts), **self.settings(folder=tmp_path))
        for changed in ({"batch_size": 1}, {"learning_rate": 1e-3}):
            with pytest.raises(DataError, match="belongs to a run with other settings"):
                train_embedding(
                    model(tiny_backbone),
                    episodes_of(parts),
                    **self.settings(folder=tmp_path, resume=True, **changed),
                )


class TestTrainBaseLearner:
    def classes(self) -> tuple[Tensor, Tensor]:
        """Cells of two classes and of the background around three directions, half precision, a tenth ignored."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 3, (300,), generator=generator)
        cells = F.normalize(3 * torch.eye(3, 6)[labels] + torch.randn(300, 6, generator=generator), dim=1)
        return cells.half(), (F.one_hot(labels, 3) * (torch.arange(300) % 10 > 0)[:, None]).half()

    def test_learns_the_classes(self) -> None:
        cells, shares = self.classes()
        learner = BaseLearner(feature_channels=6, classes=2)
        before = base_class_loss(learner.logits(cells.float()), shares.float())
        train_base_learner(learner, cells, shares, steps=60, batch_size=64, learning_rate=0.1)
        logits = learner.logits(cells.float())
        assert base_class_loss(logits, shares.float()) < 0.6 * before
        known = shares.sum(dim=1) > 0
        assert (logits.argmax(dim=1) == shares.argmax(dim=1))[known].float().mean() > 0.9
        assert not learner.training

    def test_the_seed_decides_and_global_randomness_is_untouched(self) -> None:
        found = []
        for seed in (1, 1, 2):
            learner = BaseLearner(feature_channels=6, classes=2)
            torch.manual_seed(5)
            expected = torch.rand(3)
            torch.manual_seed(5)
            train_base_learner(learner, *self.classes(), steps=5, batch_size=16, seed=seed)
            assert torch.equal(torch.rand(3), expected)
            found.append(learner.weight.detach())
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])


class TestPriorsOfEpisodes:
    @pytest.mark.parametrize(("shots", "supports"), [(1, ("mask",)), (2, WEAK)])
    def test_are_those_that_the_decoder_reads_at_first_sight(
        self, tiny_backbone: Backbone, parts: Episodes, shots: int, supports: tuple[SupportKind, ...]
    ) -> None:
        segmenter = model(tiny_backbone, completion=supports == WEAK).train()
        episodes = episodes_of(parts, 7, shots=shots, supports=supports)
        stored = priors_of_episodes(segmenter, episodes, batch_size=3)
        assert not segmenter.training
        whole = next(episodes.batches(7))
        with torch.no_grad():
            support = segmenter.encode_support_levels(whole.support_levels, whole.support_masks, whole.support_dense)
            expected = segmenter.priors_of(support, segmenter.photo_maps(whole.query_levels), look_again=False)
        assert stored["priors"].shape == (7, 10 + (supports == WEAK), 4, 4)
        torch.testing.assert_close(stored["priors"].float(), expected, rtol=2e-3, atol=2e-3)
        for name, side in zip(("foreground", "background"), cell_weights(whole.query_masks, (4, 4)), strict=True):
            assert torch.equal(stored[name], side.half()), name
        assert stored["class_ids"].tolist() == [spec.class_id for spec in whole.specs]
        kinds = {name: one.dtype for name, one in stored.items()}
        assert kinds == {"class_ids": torch.int64, **dict.fromkeys(("priors", "foreground", "background"), torch.half)}


def loop_decoder_loss(logits: Tensor, foreground: Tensor, background: Tensor) -> float:
    losses, overlaps, sizes = [], 0.0, 0.0
    for episode in zip(logits.tolist(), foreground.tolist(), background.tolist(), strict=True):
        entropy = area = overlap = size = 0.0
        for rows in zip(*episode, strict=True):
            for logit, inside, outside in zip(*rows, strict=True):
                chance = 1 / (1 + math.exp(-logit))
                entropy -= inside * math.log(chance) + outside * math.log(1 - chance)
                area += inside + outside
                overlap += chance * inside
                size += chance * (inside + outside) + inside
        losses.append(entropy / max(1, area) + 1 - (2 * overlap + 0.1) / (size + 0.1))
        overlaps, sizes = overlaps + overlap, sizes + size
    return sum(losses) / len(losses) + 1 - 2 * overlaps / max(1e-6, sizes)


class TestDecoderLoss:
    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shares = torch.rand(3, 3, 4, 5, generator=generator, dtype=torch.float64)
        shares = shares / shares.sum(dim=0)  # the third share is ignored
        logits = 2 * torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
        return logits, shares[0], shares[1]

    def test_equals_plain_loops(self) -> None:
        logits, foreground, background = self.given()
        foreground[1], background[2] = 0, 0
        found = decoder_loss(logits, foreground, background)
        assert found.item() == pytest.approx(loop_decoder_loss(logits, foreground, background), rel=1e-12)

    def test_what_is_ignored_does_not_matter(self) -> None:
        logits, foreground, background = self.given()
        foreground[:, 1], background[:, 1] = 0, 0
        other = logits.clone()
        other[:, 1] += 7
        assert decoder_loss(logits, foreground, background) == decoder_loss(other, foreground, background)
        nothing = torch.zeros_like(foreground)
        assert decoder_loss(logits, nothing, nothing).isfinite()

    def test_a_perfect_answer_costs_nothing(self) -> None:
        foreground = (self.given()[1] > 0.3).double()
        logits = 40 * (foreground - 0.5)
        assert decoder_loss(logits, foreground, 1 - foreground).item() == pytest.approx(0, abs=1e-6)
        assert decoder_loss(-logits, foreground, 1 - foreground) > 10

    def test_gradcheck(self) -> None:
        logits, *sides = self.given()
        assert torch.autograd.gradcheck(lambda one: decoder_loss(one, *sides), (logits.requires_grad_(),))


class TestTrainDecoder:
    def stored(self, count: int = 10) -> dict[str, Tensor]:
        """The object is where the second map is above the episode's own threshold, which its third map tells."""
        generator = torch.Generator().manual_seed(0)
        priors = torch.randn(count, 3, 4, 4, generator=generator)
        priors[:, 2] = torch.randn(count, 1, 1, generator=generator)
        foreground = (priors[:, 1] > priors[:, 2]).half()
        return {"priors": priors.half(), "foreground": foreground, "background": 1 - foreground}

    def settings(self, **given: Any) -> dict[str, Any]:
        return {"steps": 12, "batch_size": 4, "seed": 5, "checkpoint_every": 5, **given}

    def decoder(self, seed: int = 0) -> ContextDecoder:
        return ContextDecoder(prior_channels=3, width=8, context=8, seed=seed)

    def loss(self, decoder: ContextDecoder) -> float:
        stored = {name: one.float() for name, one in self.stored().items()}
        maps = stored["priors"]
        return decoder_loss(decoder(maps, maps, maps), stored["foreground"], stored["background"]).item()

    def test_lowers_the_loss_and_fits_the_scales(self) -> None:
        decoder, stored = self.decoder(), self.stored()
        before = self.loss(decoder.eval())
        result = train_decoder(decoder, stored, **self.settings(steps=80, learning_rate=2e-2))
        assert result.steps == 80
        assert self.loss(decoder) < 0.7 * before
        assert not decoder.training
        fitted = self.decoder()
        fitted.fit_scales(stored["priors"])
        for name, buffer in fitted.named_buffers():
            assert torch.equal(dict(decoder.named_buffers())[name], buffer), name

    def test_every_pass_shows_every_episode_once_in_its_own_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stored, seen = self.stored(), list[int]()
        stored["foreground"] = torch.arange(10.0).reshape(10, 1, 1).expand(10, 4, 4) / 10
        stored["background"] = 1 - stored["foreground"]
        whole = decoder_loss

        def watched(logits: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
            seen.extend((foreground[:, 0, 0] * 10).round().int().tolist())
            return whole(logits, foreground, background)

        monkeypatch.setattr(cross_fitting, "decoder_loss", watched)
        train_decoder(self.decoder(), stored, **self.settings(steps=5))
        assert len(seen) == 20
        assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
        assert seen[:10] != seen[10:]

    @pytest.mark.parametrize("call", [3, 7])
    def test_killed_and_resumed_it_ends_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
    ) -> None:
        whole, resumed, calls = self.decoder(), self.decoder(seed=9), iter(range(100))
        expected = train_decoder(whole, self.stored(), **self.settings())

        def dies(*maps: Tensor) -> Tensor:
            if next(calls) == call:
                raise RuntimeError("disk gone")
            return decoder_loss(*maps)

        with monkeypatch.context() as patch:
            patch.setattr(cross_fitting, "decoder_loss", dies)
            with pytest.raises(RuntimeError, match="disk gone"):
                train_decoder(self.decoder(), self.stored(), **self.settings(folder=tmp_path, resume=True))
        kept = call // 5 * 5
        assert (tmp_path / CHECKPOINT_NAME).exists() == (kept > 0)
        result = train_decoder(
            resumed if kept else self.decoder(), self.stored(), **self.settings(folder=tmp_path, resume=True)
        )
        assert result.losses == expected.losses[kept:]
        if kept:
            assert_same_weights(resumed.state_dict(), whole.state_dict())

    def test_a_loss_that_is_not_finite_names_the_episodes(self) -> None:
        stored = self.stored()
        decoder = self.decoder()
        with torch.no_grad():
            decoder.gain.fill_(float("nan"))
        with pytest.raises(
            DataError, match=r"loss is nan at step 0; .*episodes: stored episode \d; stored episode \d; "
        ):
            train_decoder(decoder, stored, **self.settings())


class TestKeepTensors:
    def test_computed_once(self, tmp_path: Path) -> None:
        calls = list[int]()

        def compute() -> dict[str, Tensor]:
            calls.append(1)
            return {"a": torch.arange(3), "b": torch.rand(2, 2).half()}

        path = tmp_path / "new" / "kept.safetensors"
        settings = {"steps": 3, "classes": (1, 2), "completion": None}
        first, second = (keep_tensors(path, compute, settings) for _ in range(2))
        assert len(calls) == 1
        assert_same_weights(first, second)
        assert [one.name for one in path.parent.iterdir()] == ["kept.safetensors"]

    def test_without_a_file(self) -> None:
        assert keep_tensors(None, lambda: {"a": torch.ones(1)}, {})["a"].item() == 1

    def test_nothing_half_written(self, tmp_path: Path) -> None:
        def dies() -> dict[str, Tensor]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            keep_tensors(tmp_path / "kept.safetensors", dies, {})
        with pytest.raises(TypeError, match="not JSON serializable"):
            keep_tensors(tmp_path / "kept.safetensors", lambda: {"a": torch.ones(1)}, {"path": tmp_path})
        assert list(tmp_path.iterdir()) == []

    def test_other_settings(self, tmp_path: Path) -> None:
        path, calls = tmp_path / "kept.safetensors", list[int]()

        def compute() -> dict[str, Tensor]:
            calls.append(1)
            return {"a": torch.ones(1)}

        keep_tensors(path, compute, {"steps": 3, "classes": list(range(40)), "seed": 0})
        with pytest.raises(DataError, match=r"other settings \(steps was 3, now 4\); choose another --out, or leave"):
            keep_tensors(path, compute, {"steps": 4, "classes": list(range(40)), "seed": 0})
        with pytest.raises(
            DataError, match=r"\(classes was \[0, 1, .{40,60}\.\.\., now \[2\], shots was None, now 1\)"
        ):
            keep_tensors(path, compute, {"steps": 3, "classes": [2], "seed": 0, "shots": 1})
        assert len(calls) == 1

    def test_a_file_of_an_earlier_version_or_damaged(self, tmp_path: Path) -> None:
        path = tmp_path / "kept.safetensors"
        for write in (
            lambda: save_file({"a": torch.ones(1)}, path),
            lambda: write_tensors(path, {"a": torch.ones(1)}, {"format": 1}),
            lambda: path.write_bytes(b"torn"),
        ):
            write()
            with pytest.raises(DataError, match=r"kept.safetensors is damaged, or of an earlier version; delete it"):
                keep_tensors(path, dict, {})
