"""What the model makes of photos, of supports and of queries: values that pass between its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoMaps:
    """What the model makes of N photos before it knows what is looked for.

    Attributes:
        cells: unit-length float (N, D, h, w), embedded by the similarity network.
        frozen: unit-length float (N, D, h, w), the joined frozen features.
        objectness: float (N, h, w), logits of the completion for a photo of which nothing is known; None without one.
        base: float (N, C + 1, h, w), probabilities of the base learner; None without one.
    """

    cells: Tensor
    frozen: Tensor
    objectness: Tensor | None = None
    base: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all maps; maps that are the same tensor count once."""
        held = (self.cells, self.frozen, self.objectness, self.base)
        return sum({one.data_ptr(): one.nbytes for one in held if one is not None}.values())

    def by_cells(self) -> PhotoMaps:
        """The same, stored cell by cell, as cells are compared: float (N, h, w, D) seen as (N, D, h, w)."""
        cells = _by_cells(self.cells)
        frozen = cells if self.frozen is self.cells else _by_cells(self.frozen)
        return replace(self, cells=cells, frozen=frozen)

    @staticmethod
    def stack(photos: Sequence[PhotoMaps]) -> PhotoMaps:
        """Photos `by_cells`, one after another."""

        def joined(maps: Sequence[Tensor]) -> Tensor:
            return torch.cat([one.permute(0, 2, 3, 1) for one in maps]).permute(0, 3, 1, 2)

        def known(maps: Sequence[Tensor | None]) -> Tensor | None:
            return None if None in maps else torch.cat([one for one in maps if one is not None])

        cells = joined([photo.cells for photo in photos])
        same = all(photo.frozen is photo.cells for photo in photos)
        return PhotoMaps(
            cells=cells,
            frozen=cells if same else joined([photo.frozen for photo in photos]),
            objectness=known([photo.objectness for photo in photos]),
            base=known([photo.base for photo in photos]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportEncoding:
    """What the model keeps of B episodes' supports; made once, used for any number of queries.

    Attributes:
        cells: unit-length float (B, K*h*w, D), embedded by the similarity network.
        foreground, background: float (B, K*h*w), fraction of each cell.
        open: float (B, K*h*w), fraction of each cell that a weak support left open; 0 for masks.
        share: float (B, K*h*w), how much of the open part was taken for object; both are in the first two already.
        photo: int64 (B, K*h*w), which of the K supports each cell is of, from 0; -1 fills up.
        foreground_embedding, background_embedding: unit-length float (B, D).
        prototype: float (B, D), frozen features pooled over the foreground.
        frozen: unit-length float (B, K, D, h, w), the joined frozen features themselves (for PFENet's prior).
        profile: float (B, C), which base classes the object looks like; C = 0 without a base learner.
    """

    cells: Tensor
    foreground: Tensor
    background: Tensor
    open: Tensor
    share: Tensor
    photo: Tensor
    foreground_embedding: Tensor
    background_embedding: Tensor
    prototype: Tensor
    frozen: Tensor
    profile: Tensor

    @property
    def frozen_cells(self) -> Tensor:
        """unit-length float (B, K*h*w, D), `frozen` in the order of `cells`."""
        return self.frozen.movedim(2, -1).flatten(1, 3)

    @property
    def frozen_foreground(self) -> Tensor:
        """float (B, K, h, w), fraction of each cell of `frozen` that is foreground.

        Open cells that are more likely background are left out: PFENet's prior gives every cell of the object the
        same weight however small its fraction.
        """
        batch, shots, _, height, width = self.frozen.shape
        unlikely = (self.open > 0.5) & (self.share < 0.5)
        return self.foreground.masked_fill(unlikely, 0).reshape(batch, shots, height, width)

    def expand(self, queries: int) -> SupportEncoding:
        """One support shared by a batch of queries (no copy). Raises ValueError if B is neither 1 nor `queries`."""
        batch = len(self.cells)
        if batch == queries:
            return self
        if batch != 1:
            raise ValueError(f"{batch} encoded supports for {queries} queries; expected 1 or {queries}")
        return replace(
            self,
            **{
                name: getattr(self, name).expand(queries, *[-1] * (getattr(self, name).dim() - 1))
                for name in self.__slots__
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Result for B queries.

    Attributes:
        logits: float (B, H, W); the mask is logits > threshold.
        priors: float (B, P, h, w) as the decoder read them (P may be 0).
        attention: float (B, H, W) in [0, 1], gradient attention of the similarity.
        threshold: where the mask is cut.
    """

    logits: Tensor
    priors: Tensor
    attention: Tensor
    threshold: float

    @property
    def masks(self) -> Tensor:
        """bool (B, H, W)."""
        return self.logits > self.threshold


def _by_cells(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def pool_cells(cells: Tensor, weights: Tensor) -> Tensor:
    """Unit-length mean of cells float (B, N, D), weighted by float (B, N): (B, D)."""
    return F.normalize(torch.einsum("bnd,bn->bd", cells, weights), dim=1)
