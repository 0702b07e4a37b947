"""Everything in docs/results.md by one command: trains and scores all of it, script by script.

    python scripts/reproduce_results.py --voc ../shared/data/VOCdevkit/VOC2012 \\
        --coco ../shared/data/coco --cub ../shared/data/cub_subset

It takes many hours on two CPU cores. Every script keeps what it has finished, so that an interrupted run goes on
where it stopped when it is started again; scripts that are through take seconds. --list shows the commands instead. The
weights that come with the package are not changed: what is trained for the ablations goes to runs/.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from train_weights import PASCAL_NAMES

_ROOT = Path(__file__).resolve().parents[1]
_SHIPPED = "fewshot_seg/weights/pascal-fold{fold}.safetensors"
_RIVALS = ("panet", "pfenet", "repri", "hsnet")


def commands(voc: Path, coco: Path, cub: Path) -> list[tuple[str, ...]]:
    """Scripts with their arguments, in order."""
    root = ("--root", str(voc))
    return [
        ("train_weights.py", "--voc", str(voc), "--only", *PASCAL_NAMES, "--out", "runs/weights"),
        ("reproduce_sizes.py", *root, "--sizes", "400", "560", "640", "--base-episodes", "50"),
        ("reproduce_cross_fitting.py", *root, "--shots", "1", "5"),
        ("reproduce_supports.py", *root, "--training", "cross-fitted", "--no-bare", "--episodes", "250", "150"),
        ("reproduce_supports.py", *root),
        ("reproduce_rivals.py", *root, "--ours", _SHIPPED, "--episodes", "400", "--methods", *_RIVALS, "--record"),
        ("reproduce_pascal.py", *root),
        ("reproduce_priors.py", *root),
        ("reproduce_explainers.py", *root),
        ("reproduce_coco.py", "--root", str(coco)),
        ("reproduce_retrieval.py", "--root", str(cub)),
        ("bench_evaluation.py", *root, "--record"),
    ]


def main(given: Sequence[str] | None = None) -> int:
    """Run them one after another; the exit status of the first that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--coco", type=Path, required=True, help="folder of annotations/ and photos")
    parser.add_argument("--cub", type=Path, required=True, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--list", action="store_true", help="show the commands, run nothing")
    arguments = parser.parse_args(given)
    steps = commands(arguments.voc, arguments.coco, arguments.cub)
    for number, (script, *rest) in enumerate(steps, start=1):
        shown = shlex.join(["python", f"scripts/{script}", *rest])
        print(shown if arguments.list else f"[{number}/{len(steps)}] {shown}", flush=True)
        if arguments.list:
            continue
        status = subprocess.run([sys.executable, f"scripts/{script}", *rest], cwd=_ROOT, check=False).returncode
        if status:
            print(f"{script} stopped with {status}; run the same command again to go on there", file=sys.stderr)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
