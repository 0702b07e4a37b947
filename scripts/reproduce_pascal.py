"""Train and evaluate all folds of PASCAL-5i with every ablation, and write the records of docs/results.json.

    python scripts/reproduce_pascal.py --root ../shared/data/VOCdevkit/VOC2012

Interrupted runs go on where they stopped; docs/results.md is written at the end.
"""

from pathlib import Path

from fold_benchmark import VARIANTS, Benchmark, parse_arguments, run_benchmark

if __name__ == "__main__":
    run_benchmark(
        Benchmark(dataset="pascal", variants=tuple(VARIANTS), shots=(1, 5)),
        parse_arguments(str(__doc__), root="folder VOC2012", out=Path("runs/pascal")),
    )
