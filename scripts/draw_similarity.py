"""Draw the pictures of docs/similarity.md from the project's own generated photos: train, then explain.

    python scripts/draw_similarity.py --out docs/pictures

Writes the generated photos as a folder data set (train/CLASS, test/CLASS: novel classes), trains a similarity network
on it, and explains similar pairs and a dissimilar photo of the test classes, all by the commands a user would type.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from episodes.sources import SyntheticSource
from fewshot_seg.cli import main as fewshot_seg

PICTURES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photos(SyntheticSource(), root / "photos")
        data = ["--data", "folders", "--root", str(root / "photos"), "--cache", str(root / "cache")]
        network, shown = root / "network", root / "shown"
        trained = fewshot_seg(["similarity", "train", *data, "--resolution", "192", "--out", str(network)])
        model = ["--model", str(network / "similarity.safetensors")]
        count = ["--count", str(PICTURES), "--out", str(shown)]
        if trained or fewshot_seg(["similarity", "explain", *data, *model, *count]):
            raise SystemExit(2)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for number in range(PICTURES):
            picture = Image.open(shown / f"comparison-{number:04d}.png")
            picture.quantize(256).save(
                arguments.out / f"similarity-{number}.png", optimize=True
            )  # a third of the bytes


def write_photos(source: SyntheticSource, root: Path) -> None:
    """One folder per class; a photo belongs to the class that covers most of it."""
    for split, part in (("train", "train"), ("val", "test")):
        for image_id in source.ids(split):
            areas = source.class_areas(image_id)
            name = source.class_names[max(areas, key=lambda class_id: areas[class_id])]
            path = root / part / name / f"{image_id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.image(image_id)).save(path)


if __name__ == "__main__":
    main()
