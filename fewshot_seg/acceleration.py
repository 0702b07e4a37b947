"""How the frozen backbone runs fastest on this machine: measured at the start of a run, never guessed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from episodes.types import DataError
from fewshot_seg.backbones import Backbone

PrecisionChoice = Literal["float32", "bfloat16", "auto"]
PRECISION_CHOICES: tuple[PrecisionChoice, ...] = get_args(PrecisionChoice)

_BATCH = 4
_ROUNDS = 3
_WORTHWHILE = 1.15
"""bfloat16 must be this many times as fast before its rounding is accepted."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a backbone runs: precision of its arithmetic, and whether maps lie in memory channel by channel last."""

    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True


def accelerate(
    backbone: Backbone,
    *,
    size: int,
    precision: PrecisionChoice = "float32",
    compiled: bool = False,
    seconds_of: Callable[[Callable[[], object]], float] | None = None,
) -> Form:
    """Set how `backbone` runs, in place; its weights stay as they are.

    Args:
        backbone: on its device.
        size: side of the square photos that it will see.
        precision: ``auto`` measures both precisions in both layouts on a few random photos, and takes the fastest.
            bfloat16 has 8 bits of mantissa: features differ in the third digit, and are kept apart from others.
        compiled: through torch.compile, which takes up to a minute at the first photo. Where that fails (no C++
            compiler, for example), a warning says so, and the backbone runs as it is.
        seconds_of: how a call is timed.

    Returns:
        What was set.

    Raises:
        DataError: an unknown precision.
    """
    if precision not in PRECISION_CHOICES:
        raise DataError(f"unknown precision {precision!r}; known: {', '.join(PRECISION_CHOICES)}")
    form = fastest_form(backbone, size, seconds_of) if precision == "auto" else Form(precision)
    backbone.run_in(getattr(torch, form.precision), channels_last=form.channels_last)
    if compiled:
        backbone.run_by(_compiled(backbone.encoder))
    return form


def fastest_form(
    backbone: Backbone, size: int, seconds_of: Callable[[Callable[[], object]], float] | None = None
) -> Form:
    """The fastest of both precisions and layouts on random photos; bfloat16 only where it is worthwhile."""
    timed = seconds_of or _seconds
    device = next(backbone.parameters()).device
    photos = torch.rand(_BATCH, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    forms = [Form(precision, last) for precision in ("float32", "bfloat16") for last in (True, False)]
    best = {form: float("inf") for form in forms}

    def run() -> None:
        backbone(photos)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for number in range(_ROUNDS + 1):  # taking turns; the first round warms up
        for form in forms:
            backbone.run_in(getattr(torch, form.precision), channels_last=form.channels_last)
            seconds = timed(run)
            if number:
                best[form] = min(best[form], seconds)
    exact = min(forms[:2], key=lambda form: best[form])
    rounded = min(forms[2:], key=lambda form: best[form])
    return rounded if best[rounded] * _WORTHWHILE <= best[exact] else exact


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _compiled(encoder: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """torch.compile of an encoder, or the encoder itself from the first failure on."""
    run: Callable[[Tensor], list[Tensor]] = torch.compile(encoder)
    failed = False

    def either(images: Tensor) -> list[Tensor]:
        nonlocal failed
        if not failed:
            try:
                return run(images)
            except Exception as error:  # compilers fail in many ways; none of them may end a run
                failed = True
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                warnings.warn(f"torch.compile does not work here ({reason}); going on without it", stacklevel=2)
        plain: list[Tensor] = encoder(images)
        return plain

    return either
