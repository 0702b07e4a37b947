"""What ``fewshot-seg weights ...`` does; results go to stdout, problems to stderr."""

from __future__ import annotations

import dataclasses
import json
import sys

from fewshot_seg.config import WeightsListConfig, WeightsVerifyConfig
from fewshot_seg.report import Table, text_table
from fewshot_seg.shipped import shipped_models, verify_shipped, weights_folder

_NONE = "this copy of fewshot-seg comes without weights; scripts/train_weights.py trains them"


def weights_list(config: WeightsListConfig) -> int:
    """Print the models that come with the package."""
    models = shipped_models()
    if config.format == "json":
        print(json.dumps([dataclasses.asdict(model) for model in models], indent=1, ensure_ascii=False))
        return 0
    if not models:
        print(_NONE)
        return 0
    rows = [[model.name, f"{model.bytes / 1e6:.1f}", model.data, model.headline] for model in models]
    print(text_table(Table(header=["name", "MB", "trained on", "score"], rows=rows)))
    print(f"\nuse one with --model NAME; model cards: {weights_folder()}")
    return 0


def weights_verify(config: WeightsVerifyConfig) -> int:
    """Check the shipped files; 1 if something is wrong with them."""
    del config
    problems = verify_shipped()
    for problem in problems:
        print(f"fewshot-seg: {problem}", file=sys.stderr)
    if not problems:
        count = len(shipped_models())
        print(f"{count} models, all of them as they were shipped and loadable" if count else _NONE)
    return 1 if problems else 0
