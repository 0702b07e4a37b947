"""What ``fewshot-seg app`` does; its address goes to stdout."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from fewshot_seg.app.serving import check_package, is_loopback, serve
from fewshot_seg.app.session import Engine
from fewshot_seg.config import AppConfig, settings_of
from fewshot_seg.predictors import USUAL_SIZE, method_for_photos

_REACH, _BARE_REACH = 4.0, 1.0
"""Of the threshold's control: a decoder's logits, and a bare similarity margin."""
_OF_THE_MODEL = ("model", "similarity", "prior_map", "backbone", "backbone_weights", "strides", "size")


def app(config: AppConfig) -> int:
    """Serve the page until Ctrl-C."""
    check_package()
    method = method_for_photos(config)
    engine = Engine(
        segmenter=method.segmenter,
        resolution=config.size or method.resolution or USUAL_SIZE,
        fit=method.fit,
        name=method.name,
    )
    if not is_loopback(config.host):
        print(
            f"fewshot-seg: warning: everybody who reaches {config.host} can use this page and its processor: there is "
            "no password",
            file=sys.stderr,
        )
    reach = _BARE_REACH if method.model is None else _REACH
    with (
        _terminated_as_interrupted(),
        contextlib.suppress(KeyboardInterrupt),
        serve(engine, host=config.host, port=config.port, reach=reach, model_flags=_model_flags(config)) as served,
    ):
        print(f"open {served.address} in a browser; Ctrl-C stops it", flush=True)
        threading.Event().wait()
    print("stopped; nothing is left of it on disk")
    return 0


def _model_flags(config: AppConfig) -> list[str]:
    """With which ``fewshot-seg predict`` takes the same model."""
    flags = []
    for one in settings_of(AppConfig):
        value = getattr(config, one.name)
        if one.name in _OF_THE_MODEL and value != one.default:
            flags += [one.flag, *(str(part) for part in (value if one.many else (value,)))]
    return flags


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the page as Ctrl-C does, so that its folder is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
