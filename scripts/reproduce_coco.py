"""Train and evaluate all folds of COCO-20i, 1-shot, and write the records of docs/results.json.

    python scripts/reproduce_coco.py --root ../shared/data/coco

Interrupted runs go on where they stopped; docs/results.md is written at the end.
"""

from pathlib import Path

from fold_benchmark import OURS, Benchmark, parse_arguments, run_benchmark

if __name__ == "__main__":
    run_benchmark(
        Benchmark(dataset="coco", variants=(OURS,), shots=(1,)),
        parse_arguments(str(__doc__), root="folder of annotations/ and photos", out=Path("runs/coco")),
    )
