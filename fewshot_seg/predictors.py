"""The predictor of people's own photos, opened by a command's settings or by three lines of Python."""

from __future__ import annotations

from pathlib import Path

from fewshot_seg.config import ModelSettings
from fewshot_seg.method import Method, open_method, take_usual_threshold
from fewshot_seg.prediction import Predictor

USUAL_SIZE = 400
"""Side of the square for methods that have none of their own."""


def method_for_photos(settings: ModelSettings) -> Method:
    """The method for people's own photos, with a threshold: that of the model, or the usual one of a bare soft margin.

    Raises:
        DataError: as `method.open_method` and `method.take_usual_threshold`.
    """
    method = open_method(settings, own_photos=True)
    return method if method.threshold_origin else take_usual_threshold(method, settings)


def predictor_of(method: Method, *, size: int | None = None, tile: int | None = None, flip: bool = False) -> Predictor:
    """A predictor that remembers nothing yet; arguments as in `Predictor`, `size` is the method's own by default."""
    return Predictor(method.segmenter, size or method.resolution or USUAL_SIZE, method.fit, tile=tile, flip=flip)


def open_predictor(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    threshold: float | None = None,
    size: int | None = None,
    tile: int | None = None,
    flip: bool = False,
) -> Predictor:
    """What `fewshot-seg predict` goes by, for use from Python.

    Args:
        model: file of a training or name of a shipped model; by default the model that `predict` takes.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threshold: logit above which a pixel is foreground, instead of the model's.
        size: side of the square that photos are fitted into, by default the model's.
        tile, flip: see `Predictor`.

    Raises:
        DataError: missing, damaged or foreign model file, unknown device.

    Example::

        predictor = open_predictor()
        predictor.remember_files("cat.jpg:cat_mask.png")
        mask = predictor.predict_file("photo.jpg").mask  # uint8 (H, W), 1 = cat
    """
    settings = ModelSettings(model=None if model is None else Path(model), device=device, threshold=threshold)
    return predictor_of(method_for_photos(settings), size=size, tile=tile, flip=flip)
