"""One episode as an explainer sees it: photos, and a score that says how alike query and supports are.

The score is the margin whose gradient the package shows as attention (`attention.score_direction`, kind "margin"):

    s = f_q . (f_fg - f_bg),

with f_q the query's cells pooled, f_fg those of the supports' object, f_bg those of their background, unit length each.
All explainers answer the same question about it: which cells of a photo made s what it is?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import DataError
from fewshot_seg.encodings import PhotoMaps, SupportEncoding
from fewshot_seg.faithfulness import blurred
from fewshot_seg.priors import blockwise_soft_margin
from fewshot_seg.segmenter import FewShotSegmenter
from fewshot_seg.similarity import join_levels

_BATCH = 16
"""Changed photos that go through the network together."""


@dataclass
class Passes:
    """Photos that went through the backbone, and photos that a gradient was taken of."""

    forward: int = 0
    backward: int = 0


class Comparison:
    """An episode: K supports with their masks, and a query. Photo 0 is the query, photo k is support k.

    Features of the photos as they are, and of their `baselines`, are computed once, when first needed. The masks, or
    what the model completed weaker marks to, are held while photos change: shares of cells stay what they are.

    Args:
        segmenter: the model, in evaluation mode.
        supports: float32 (K, 3, H, W), RGB in [0, 1].
        masks: uint8 (K, H, W), 1 = object, 0 = background, 255 = ignored or not known.
        query: float32 (3, H, W).
        dense: bool (K,), which supports are masks; all by default.
        seed: of explainers that draw.

    Raises:
        DataError: shapes that do not fit, or supports without an object.
    """

    def __init__(
        self,
        segmenter: FewShotSegmenter,
        supports: Tensor,
        masks: Tensor,
        query: Tensor,
        *,
        dense: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if (
            supports.dim() != 4
            or masks.shape != (len(supports), *supports.shape[2:])
            or query.shape != supports[0].shape
        ):
            raise DataError(
                f"expected supports (K, 3, H, W), masks (K, H, W) and a query (3, H, W), got {tuple(supports.shape)}, "
                f"{tuple(masks.shape)} and {tuple(query.shape)}"
            )
        self.segmenter, self.seed, self.passes = segmenter, seed, Passes()
        self.photos = torch.cat([query[None], supports])
        self.masks, self.dense = masks, dense
        self._levels: tuple[Tensor, ...] | None = None

    def with_segmenter(self, segmenter: FewShotSegmenter) -> Comparison:
        """The same photos as another model sees them."""
        return Comparison(segmenter, self.photos[1:], self.masks, self.photos[0], dense=self.dense, seed=self.seed)

    def with_query(self, query: Tensor) -> Comparison:
        """The same supports, whose features are not computed again, and another query."""
        other = Comparison(self.segmenter, self.photos[1:], self.masks, query, dense=self.dense, seed=self.seed)
        with torch.no_grad():
            of_query = self.segmenter.backbone(query[None])
        other._levels = tuple(torch.cat([one, level[1:]]) for one, level in zip(of_query, self.levels, strict=True))
        return other

    @property
    def shots(self) -> int:
        """K."""
        return len(self.photos) - 1

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the photos."""
        return self.photos.shape[2], self.photos.shape[3]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the cells."""
        return self.cells.shape[2], self.cells.shape[3]

    @property
    def levels(self) -> tuple[Tensor, ...]:
        """Frozen features float (K + 1, C, h, w) of every level."""
        if self._levels is None:  # in two parts, as the model encodes them: batches of another size round differently
            parts = zip(self._encode(self.photos[:1]), self._encode(self.photos[1:]), strict=True)
            self._levels = tuple(torch.cat(part) for part in parts)
        return self._levels

    @torch.no_grad()
    def _encode(self, photos: Tensor) -> tuple[Tensor, ...]:
        levels: tuple[Tensor, ...] = self.segmenter.backbone(photos)
        return levels

    @cached_property
    def baselines(self) -> Tensor:
        """float32 (K + 1, 3, H, W): the photos without their edges, what a removed pixel is replaced by."""
        return blurred(self.photos, min(self.size) / 16)

    @cached_property
    def baseline_levels(self) -> tuple[Tensor, ...]:
        """`levels` of the `baselines`."""
        return self._encode(self.baselines)

    @cached_property
    def cells(self) -> Tensor:
        """Unit-length float (K + 1, D, h, w), embedded by the similarity network."""
        with torch.no_grad():
            cells: Tensor = self.segmenter.similarity(self.levels)
        return cells

    @cached_property
    def support(self) -> SupportEncoding:
        """The supports as the model keeps them."""
        return self._support_of([level[1:] for level in self.levels], 1)

    @torch.no_grad()
    def _support_of(self, levels: Sequence[Tensor], episodes: int) -> SupportEncoding:
        masks = self.masks.expand(episodes, *self.masks.shape)
        dense = None if self.dense is None else self.dense.expand(episodes, self.shots)
        joined = join_levels(levels)
        photos = PhotoMaps(cells=self.segmenter.similarity.turn(joined), frozen=joined)
        return self.segmenter.encode_support_photos(photos, masks, dense)

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Shares of the supports' cells that are object, and background, float (K, h, w) each."""
        shape = (self.shots, *self.grid)
        return self.support.foreground.reshape(shape), self.support.background.reshape(shape)

    @cached_property
    def direction(self) -> Tensor:
        """f_fg - f_bg, float (D,): the query's score is its embedding times this."""
        return (self.support.foreground_embedding - self.support.background_embedding)[0]

    @cached_property
    def embedding(self) -> Tensor:
        """f_q, unit-length float (D,)."""
        return F.normalize(self.cells[0].mean(dim=(1, 2)), dim=0)

    def pooled(self, place: int, cells: Tensor) -> tuple[Tensor, Tensor]:
        """f_fg and f_bg, float (N, D) each, where support `place` has cells float (N, D, h, w) instead of its own."""
        found = []
        for side in self.sides:
            others = torch.einsum("kdhw,khw->d", self.cells[1:], side) - torch.einsum(
                "dhw,hw->d", self.cells[place], side[place - 1]
            )
            found.append(F.normalize(others + torch.einsum("ndhw,hw->nd", cells, side[place - 1]), dim=1))
        return found[0], found[1]

    def margins(self, place: int, cells: Tensor) -> Tensor:
        """s, float (N,), where photo `place` has cells float (N, D, h, w) instead of its own. Differentiable."""
        if place == 0:
            return F.normalize(cells.mean(dim=(2, 3)), dim=1) @ self.direction
        of_object, of_other = self.pooled(place, cells)
        return (of_object - of_other) @ self.embedding

    @property
    def margin(self) -> float:
        """s of the photos as they are."""
        return float(self.margins(0, self.cells[:1])[0])

    def level_gradients(
        self, place: int, levels: Sequence[Tensor], score: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Gradient of s with respect to N variants of a photo's features, float (N, C, h, w) per level.

        Args:
            place: number of the photo.
            levels: the variants; they stay as they are.
            score: another score of cells float (N, D, h, w), float (N,); by default `margins`.
        """
        self.passes.backward += len(levels[0])
        with torch.enable_grad():
            leaves = [level.detach().clone().requires_grad_() for level in levels]
            cells = self.segmenter.similarity(leaves)
            scores = self.margins(place, cells) if score is None else score(cells)
            return torch.autograd.grad(scores.sum(), leaves)

    @torch.no_grad()
    def changed(self, place: int, photos: Tensor) -> Tensor:
        """s, float (N,), where photo `place` is one of N others, float32 (N, 3, H, W)."""
        self.passes.forward += len(photos)
        parts = torch.split(photos, _BATCH)
        return torch.cat([self.margins(place, self.segmenter.similarity(self._encode(part))) for part in parts])

    @cached_property
    def soft_margin(self) -> Tensor:
        """Log-ratio of the query's cells in the photos as they are, float (h*w,)."""
        return self._soft_margins(self.support, self.cells[:1])[0]

    @cached_property
    def likely(self) -> Tensor:
        """How likely each of the query's cells was found in the photos as they are, float (h*w,), summing to 1."""
        found = self.soft_margin.sigmoid()
        return found / found.sum().clamp_min(1e-12)

    @torch.no_grad()
    def outcomes(self, place: int, photos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model makes of it where photo `place` is one of N others, float32 (N, 3, H, W).

        Returns:
            s, float (N,); the match, float (N,): the soft margin in units of a cosine (t times its log-ratio), mean
            over the query's cells by `likely`; and what is taken for the object, bool (N, H, W).
        """
        scores, matches, masks = [], [], []
        for part in torch.split(photos, _BATCH):
            levels = self._encode(part)
            cells, count = self.segmenter.similarity(levels), len(part)
            scores.append(self.margins(place, cells))
            if place == 0:
                support, queries = self.support.expand(count), list(levels)
            else:
                support = self._support_of(self._with_support(place, levels), count)
                queries = [own[:1].expand(count, *own.shape[1:]) for own in self.levels]
                cells = self.cells[:1].expand(count, *self.cells.shape[1:])
            matches.append(self.segmenter.temperature * self._soft_margins(support, cells) @ self.likely)
            masks.append(self.segmenter.segment_levels(support, queries, self.size).masks)
        return torch.cat(scores), torch.cat(matches), torch.cat(masks)

    def _soft_margins(self, support: SupportEncoding, cells: Tensor) -> Tensor:
        """Log-ratios float (N, h*w) of queries with cells float (N, D, h, w)."""
        return blockwise_soft_margin(
            cells.flatten(2).transpose(1, 2),
            support.cells,
            support.foreground,
            support.background,
            temperature=self.segmenter.temperature,
        )

    def _with_support(self, place: int, levels: Sequence[Tensor]) -> list[Tensor]:
        """Features of N times K supports, of which number `place` has other ones, float (N, C, h, w) per level."""
        joined, count = [], len(levels[0])
        for new, own in zip(levels, self.levels, strict=True):
            supports = own[1:].repeat(count, 1, 1, 1).reshape(count, self.shots, *own.shape[1:])
            supports[:, place - 1] = new
            joined.append(supports.flatten(0, 1))
        return joined


Explainer = Callable[[Comparison, int], Tensor]
"""What made photo `place` of the comparison alike? float (h, w) on any grid: higher is more, negative is against it.

Of a support it tells what *in the support* made the query alike to its object rather than to its background."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Maps of one explainer.

    Attributes:
        query: float32 (h, w).
        supports: float32 (h, w) for each of K supports.
        forward, backward: passes over the episode's K + 1 photos: 1 is each of them once. A gradient counts however
            far back it goes.
    """

    query: Tensor
    supports: tuple[Tensor, ...]
    forward: float
    backward: float

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Of the query, then of the supports: by number of the photo."""
        return (self.query, *self.supports)


def run_explainer(explainer: Explainer, comparison: Comparison) -> Explanation:
    """Explain every photo of a comparison, and count what it cost.

    Args:
        explainer: one of `EXPLAINERS`, or your own.
        comparison: the episode. Features that an explainer before has computed are not computed again, but counted.
    """
    photos = comparison.shots + 1
    before = dataclasses.replace(comparison.passes)
    maps = [explainer(comparison, place).detach().float() for place in range(photos)]
    forward = photos + comparison.passes.forward - before.forward
    backward = comparison.passes.backward - before.backward
    return Explanation(query=maps[0], supports=tuple(maps[1:]), forward=forward / photos, backward=backward / photos)
