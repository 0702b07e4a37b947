"""Stored photos as one model sees them, encoded once and shared by all episodes that show them.

An evaluation draws the same photos again and again, as supports and as queries. What the model makes of a photo
does not depend on the episode: its cells, how the marks of an object lie on them, and what is pooled over them. An
episode then only puts its supports together and compares cells.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.types import DataError, SupportKind
from fewshot_seg.base_learner import relative_to_largest
from fewshot_seg.condensation import condense_cells
from fewshot_seg.decoder import Decoder, MaskDecoder
from fewshot_seg.encodings import PhotoMaps, SupportEncoding
from fewshot_seg.feature_episodes import FeatureBatch, StoredPhotos
from fewshot_seg.segmenter import FewShotSegmenter

DEFAULT_BYTE_BUDGET = 768 * 2**20


_VECTORS = ("foreground", "background", "open", "share", "foreground_sum", "background_sum", "frozen_sum", "class_sum")


@dataclass(frozen=True, kw_only=True, slots=True)
class _SupportPart:
    """What one photo brings to an episode as a support: vectors over its cells (M,), and sums over them (D,) or (C,).

    `frozen` are the cells' frozen features (M, D), where the model compares them, too.
    """

    condensed: bool
    cells: Tensor
    foreground: Tensor
    background: Tensor
    open: Tensor
    share: Tensor
    foreground_sum: Tensor
    background_sum: Tensor
    frozen_sum: Tensor
    class_sum: Tensor
    frozen: Tensor | None = None


class EncodedPhotos:
    """Encodings of stored photos for one model, computed one photo at a time.

    Photos are encoded one by one, so that neither the batch nor the process that they are in changes a bit of them.

    Args:
        segmenter: the model; its weights must not change while this is used.
        decoders: all that will read the encodings, its own by default. Where none of them reads frozen features, these
            are left out: `PhotoMaps.frozen` has no channels, and the supports no prototype.
        support_cells: most cells that the supports of an episode keep together; more are condensed, the same number
            for each support (see `condensation`). None keeps all: K shots then compare K times the cells.
        byte_budget: bytes of encodings to keep, least recently used goes first.

    Raises:
        DataError: fewer than 2 cells.
    """

    def __init__(
        self,
        segmenter: FewShotSegmenter,
        decoders: Collection[Decoder] = (),
        *,
        support_cells: int | None = None,
        byte_budget: int = DEFAULT_BYTE_BUDGET,
    ) -> None:
        if support_cells is not None and support_cells < 2:
            raise DataError(f"the supports need at least 2 cells, one of each side; got {support_cells}")
        self._segmenter, self._support_cells, self._byte_budget = segmenter, support_cells, byte_budget
        readers = decoders or [segmenter.decoder]
        read = any(isinstance(one, MaskDecoder) and one.appearance for one in readers)
        self._compared = segmenter.base_learner is not None  # frozen cells of supports and queries, too
        # the completion looks at the frozen features of weak supports
        self._frozen = read or self._compared or segmenter.completion is not None
        self._photos: OrderedDict[str, PhotoMaps] = OrderedDict()
        self._supports: dict[tuple[str, int, SupportKind, int], _SupportPart] = {}
        self._bytes = 0

    def serves(self, batch: FeatureBatch) -> bool:
        """Whether the batch's photos are stored as they are, and the model's prior needs no more than is kept."""
        return batch.stored is not None and self._segmenter.prior != "pfenet"

    def queries(self, batch: FeatureBatch) -> PhotoMaps:
        """Maps of the batch's queries."""
        assert batch.stored is not None
        return PhotoMaps.stack([self._photo(batch.stored, spec.query_id) for spec in batch.specs])

    def supports(self, batch: FeatureBatch, alone: int | None = None) -> SupportEncoding:
        """The batch's supports, all of an episode together or only number `alone` (0-based) of each.

        Raises:
            DataError: an episode whose supports show no object.
        """
        assert batch.stored is not None
        episodes = []
        for row, spec in enumerate(batch.specs):
            numbers = range(spec.shots) if alone is None else [alone]
            kinds = [batch.stored.kinds[row * spec.shots + number] for number in numbers]
            limit = 0 if self._support_cells is None else max(2, self._support_cells // len(kinds))
            shown = zip((spec.support_ids[number] for number in numbers), kinds, strict=True)
            episodes.append([self._support(batch.stored, one, spec.class_id, kind, limit) for one, kind in shown])
        return _together(episodes)

    def _photo(self, stored: StoredPhotos, image_id: str) -> PhotoMaps:
        if image_id in self._photos:
            self._photos.move_to_end(image_id)
            return self._photos[image_id]
        device = next(self._segmenter.backbone.parameters()).device
        levels = tuple(level.to(device) for level in stored.features.get([image_id]))
        photo = self._segmenter.photo_maps(levels)
        photo = photo.by_cells() if self._frozen else replace(photo, frozen=photo.frozen[:, :0]).by_cells()
        self._photos[image_id] = photo
        self._bytes += photo.nbytes
        while self._bytes > self._byte_budget and len(self._photos) > 1:
            oldest, dropped = self._photos.popitem(last=False)
            self._bytes -= dropped.nbytes
            for key in [key for key in self._supports if key[0] == oldest]:
                self._bytes -= _own_bytes(self._supports.pop(key))
        return photo

    def _support(
        self, stored: StoredPhotos, image_id: str, class_id: int, kind: SupportKind, limit: int
    ) -> _SupportPart:
        photo, key = self._photo(stored, image_id), (image_id, class_id, kind, limit)
        if key in self._supports:
            return self._supports[key]
        device = photo.cells.device
        marks = stored.masks.get([image_id], [class_id], [kind])[None].to(device)
        dense = torch.tensor([[kind == "mask"]], device=device)
        one = self._segmenter.encode_support_photos(photo, marks, dense)
        frozen = photo.frozen.flatten(2)[0]
        foreground, background = one.foreground[0], one.background[0]
        part = _SupportPart(
            condensed=False,
            cells=one.cells[0],
            foreground=foreground,
            background=background,
            open=one.open[0],
            share=one.share[0],
            foreground_sum=foreground @ one.cells[0],
            background_sum=background @ one.cells[0],
            frozen_sum=frozen @ foreground,
            class_sum=foreground.new_zeros(0) if photo.base is None else photo.base.flatten(2)[0] @ foreground,
            frozen=frozen.T if self._compared else None,
        )
        if limit and not bool((part.open > 0).any()):
            part = _condensed(part, limit)
        self._supports[key] = part
        self._bytes += _own_bytes(part)
        return part


def _own_bytes(part: _SupportPart) -> int:
    """Bytes beside those of the photo; condensed cells are its own."""
    vectors: int = sum(getattr(part, name).nbytes for name in _VECTORS)
    if not part.condensed:
        return vectors
    return vectors + part.cells.nbytes + (0 if part.frozen is None else part.frozen.nbytes)


def _condensed(part: _SupportPart, limit: int) -> _SupportPart:
    cells, frozen = part.cells, part.frozen
    if frozen is not None:  # groups by both; the halves of a mean are shortened together, as they are about as long
        cells = torch.cat([cells, frozen], dim=1) / 2**0.5
    cells, foreground, background = condense_cells(cells, part.foreground, part.background, limit=limit)
    if frozen is not None:
        width = part.cells.shape[1]
        cells, frozen = cells[:, :width] * 2**0.5, cells[:, width:] * 2**0.5
    nothing = torch.zeros_like(foreground)
    sides = {"foreground": foreground, "background": background, "open": nothing, "share": nothing}
    return replace(part, condensed=True, cells=cells, frozen=frozen, **sides)


def _together(episodes: Sequence[Sequence[_SupportPart]]) -> SupportEncoding:
    """B episodes of K parts each; shorter ones are filled up with cells of no weight."""
    longest = max(sum(len(part.foreground) for part in parts) for parts in episodes)

    def filled_up(parts: Sequence[Tensor], value: int = 0) -> Tensor:
        row = torch.cat(list(parts))
        return F.pad(row, [0, 0] * (row.dim() - 1) + [0, longest - len(row)], value=value)

    def joined(name: str) -> Tensor:
        return torch.stack([filled_up([getattr(part, name) for part in parts]) for parts in episodes])

    def numbers(parts: Sequence[_SupportPart]) -> Tensor:
        own = (torch.full_like(part.open, number, dtype=torch.int64) for number, part in enumerate(parts))
        return filled_up(list(own), value=-1)

    def summed(name: str) -> Tensor:
        return torch.stack([torch.stack([getattr(part, name) for part in parts]).sum(dim=0) for parts in episodes])

    def pooled(name: str) -> Tensor:
        return F.normalize(summed(name), dim=1)

    cells = joined("cells")
    if episodes[0][0].frozen is None:
        frozen = cells.new_zeros(len(episodes), 0, cells.shape[2], 0, 0)
    else:  # of one row: the photos' places are not needed
        frozen = joined("frozen").transpose(1, 2)[:, None, :, None]
    return SupportEncoding(
        cells=cells,
        foreground=joined("foreground"),
        background=joined("background"),
        open=joined("open"),
        share=joined("share"),
        photo=torch.stack([numbers(parts) for parts in episodes]),
        foreground_embedding=pooled("foreground_sum"),
        background_embedding=pooled("background_sum"),
        prototype=pooled("frozen_sum"),
        frozen=frozen,
        profile=relative_to_largest(summed("class_sum")[:, :-1]),  # the background comes last
    )
