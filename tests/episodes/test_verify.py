from __future__ import annotations

from pathlib import Path

from PIL import Image

from episodes.sources import SyntheticSource, VocSource
from episodes.verify import verify


def by_kind(root: Path) -> dict[tuple[str, str], str]:
    return {(Path(p.file).name, p.kind): str(p) for p in verify(VocSource(root), "val") if p.kind != "empty-class"}


def test_sound_data_only_lack_the_classes_they_lack(tiny_voc: Path) -> None:
    problems = verify(VocSource(tiny_voc), "val")
    assert {problem.kind for problem in problems} == {"empty-class"}
    assert len(problems) == 20 - 8
    assert "no image of the split shows class 3 (bird)" in problems[0].message
    assert problems[0].file.endswith("val.txt")


def test_synthetic_source_has_no_problem() -> None:
    source = SyntheticSource(base_classes=3, novel_classes=2, images_per_class=2, size=48)
    assert verify(source, "train") == []
    assert verify(source, "val") == []


def test_every_problem_is_listed_by_file(tiny_voc: Path) -> None:
    source = VocSource(tiny_voc)
    source.image_file("val_01_0").unlink()
    source.mask_file("val_01_1").unlink()
    photo = source.image_file("val_02_0")
    photo.write_bytes(photo.read_bytes()[:500])
    source.mask_file("val_02_1").write_bytes(b"no picture")
    Image.new("L", (5, 6), 2).save(source.mask_file("val_06_0"))
    mask = source.mask_file("val_06_1")
    Image.new("L", Image.open(mask).size, 40).save(mask)
    mask = source.mask_file("val_07_0")
    Image.open(mask).convert("RGB").save(mask)
    found = by_kind(tiny_voc)
    assert set(found) == {
        ("val_01_0.jpg", "missing"),
        ("val_01_1.png", "missing"),
        ("val_02_0.jpg", "undecodable"),
        ("val_02_1.png", "undecodable"),
        ("val_06_0.png", "size-mismatch"),
        ("val_06_1.png", "unknown-label"),
        ("val_07_0.png", "rgb-mask"),
    }
    assert all("\n" not in text and "; " in text for text in found.values())


def test_two_problems_of_one_file_are_both_listed(tiny_voc: Path) -> None:
    Image.new("L", (5, 6), 40).save(VocSource(tiny_voc).mask_file("val_06_0"))
    assert set(by_kind(tiny_voc)) == {("val_06_0.png", "size-mismatch"), ("val_06_0.png", "unknown-label")}


def test_empty_and_missing_split(tiny_voc: Path) -> None:
    path = tiny_voc / "ImageSets" / "Segmentation" / "val.txt"
    path.write_text("")
    (problem,) = verify(VocSource(tiny_voc), "val")
    assert (problem.kind, problem.file) == ("empty-split", str(VocSource(tiny_voc).split_file("val")))
    path.unlink()
    (problem,) = verify(VocSource(tiny_voc), "val")
    assert problem.kind == "missing"
    assert problem.mend == "this data set has: train, trainaug"
