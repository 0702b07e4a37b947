"""What `fuzz_readers.py` feeds: valid files, made here or taken from real data, and every reader of the project.

A `Target` is a family of files with one way to read them. Its reader gets a file in a folder of its own, and returns
when the result is correct: it checks that itself, by `assert`.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from pycocotools import mask as run_length
from scipy.io import savemat
from torch import nn

import fewshot_seg.checkpoint
import fewshot_seg.shipped
from episodes.episode_files import EpisodeFile, read_episodes, write_episodes
from episodes.index import _load as load_index
from episodes.index import build_index
from episodes.prepare.extraction import extract
from episodes.prepare.part import Origin, Part
from episodes.prepare.records import read_record, write_record
from episodes.protocols import read_protocol
from episodes.retrieval import open_retrieval
from episodes.sampler import spec_from_json, spec_to_json
from episodes.sources import CocoJsonSource, FolderSource, FssSource, LabelmeSource, SyntheticSource, VocSource
from episodes.types import EpisodeSpec, MaskSource
from fewshot_seg.app.drawings import annotation_of, read_drawing
from fewshot_seg.app.limits import Limits
from fewshot_seg.app.session import Engine, Session
from fewshot_seg.backbones import Backbone, build_backbone
from fewshot_seg.backbones.weight_files import fit_weights, read_weights
from fewshot_seg.bad_steps import Account
from fewshot_seg.checkpoint import load_segmenter, load_similarity, save_segmenter, save_similarity
from fewshot_seg.config import EvaluateConfig, PredictConfig, TrainConfig, resolve
from fewshot_seg.cross_fitting import are_priors, keep_tensors
from fewshot_seg.explainer_scores import _read_done as read_scores
from fewshot_seg.features import FeatureStore
from fewshot_seg.optimisation import Plan, optimise
from fewshot_seg.photos import find_queries, open_photo, read_object_mask, read_photo
from fewshot_seg.reports import read_run, write_report
from fewshot_seg.runs import check_folder
from fewshot_seg.segmenter import FewShotSegmenter, build_segmenter
from fewshot_seg.shipped import ShippedModel, shipped_models, write_manifest
from fewshot_seg.support_files import load_support, save_support
from fewshot_seg.support_photos import read_supports
from fewshot_seg.trainee import NamedModules

SIDE = 48
_BACKBONE = "mobilenetv3_small_050"
Read = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A family of files and its reader.

    Attributes:
        name: of the reader.
        seeds: file name -> content of a valid file; the name's suffix is kept.
        read: reads the file, in a folder of its own whose other files `beside` are.
        beside: relative name -> content of what lies beside it.
        kind: ``binary``, ``json`` or ``text``: which changes are worth making.
        share: of all inputs.
        place: where the file goes in its folder, if it has a name of its own.
    """

    name: str
    seeds: Mapping[str, bytes]
    read: Read
    beside: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    kind: str = "binary"
    share: int = 1
    place: str | None = None


# ---------------------------------------------------------------------------------------------------- valid files


def picture(mode: str = "RGB", size: tuple[int, int] = (SIDE, SIDE), seed: int = 0) -> Image.Image:
    """Noise of a mode; palettes have transparency."""
    random = np.random.default_rng(seed)
    if mode in ("I;16", "F", "I"):
        kind = {"I;16": np.uint16, "F": np.float32, "I": np.int32}[mode]
        return Image.fromarray((random.random(size[::-1]) * 60000).astype(kind))
    plain = Image.fromarray(random.integers(0, 256, (*size[::-1], 3)).astype(np.uint8))
    return plain.convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """Bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def label_picture(values: Sequence[int] = (0, 1, 2, 255), mode: str = "P", side: int = SIDE) -> Image.Image:
    """Labels in stripes."""
    labels = np.array(values, np.uint8)[np.arange(side) * len(values) // side]
    image = Image.fromarray(np.repeat(labels[None], side, axis=0))
    if mode == "P":
        image.putpalette(np.random.default_rng(3).integers(0, 256, 768).astype(np.uint8).tobytes())
    return image


@cache
def photo_files() -> dict[str, bytes]:
    """Photos of every format and mode."""
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 2000, zip=True)
    frames = [picture(seed=seed) for seed in (1, 2, 3)]
    more = {"save_all": True, "append_images": frames[1:], "duration": 40}
    return {
        "plain.jpg": encoded(picture(), "JPEG"),
        "turned.jpg": encoded(picture(), "JPEG", exif=exif),
        "progressive.jpg": encoded(picture(), "JPEG", progressive=True, quality=95),
        "cmyk.jpg": encoded(picture("CMYK"), "JPEG"),
        "grey.jpg": encoded(picture("L"), "JPEG"),
        "plain.png": encoded(picture(), "PNG", pnginfo=text),
        "clear.png": encoded(picture("RGBA"), "PNG"),
        "palette.png": encoded(picture("P"), "PNG", transparency=3),
        "deep.png": encoded(picture("I;16"), "PNG"),
        "moving.png": encoded(frames[0], "PNG", **more),
        "moving.gif": encoded(frames[0].convert("P"), "GIF", **more),
        "moving.webp": encoded(frames[0], "WEBP", **more),
        "plain.webp": encoded(picture(), "WEBP", exif=exif),
        "plain.bmp": encoded(picture(), "BMP"),
        "float.tif": encoded(picture("F"), "TIFF"),
        "lzw.tif": encoded(picture(), "TIFF", compression="tiff_lzw"),
        "tiff_jpeg.tif": encoded(picture(), "TIFF", compression="jpeg"),
        "pages.tif": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
    }


@cache
def mask_files() -> dict[str, bytes]:
    """Masks as drawing tools and data sets have them."""
    return {
        "palette.png": encoded(label_picture((0, 1, 1, 255)), "PNG"),
        "grey.png": encoded(label_picture((0, 0, 255, 255), "L"), "PNG"),
        "one_bit.png": encoded(label_picture((0, 0, 255, 255), "L").convert("1"), "PNG"),
        "soft.png": encoded(picture("L"), "PNG"),
        "clear.png": encoded(label_picture((0, 1)), "PNG", transparency=0),
        "drawn.jpg": encoded(label_picture((0, 255), "L"), "JPEG"),
        "drawn.gif": encoded(label_picture((0, 1)), "GIF"),
    }


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _compressed() -> str:
    half = np.asfortranarray(np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 5 == 0, np.uint8)
    return str(run_length.encode(half)["counts"].decode())


def coco_document() -> dict[str, Any]:
    """Polygons, run lengths, crowds and a box."""
    area = SIDE * SIDE
    return {
        "info": {"year": 2026},
        "images": [{"id": n, "file_name": f"p{n}.jpg", "width": SIDE, "height": SIDE} for n in (1, 2)],
        "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [2, 3, 20, 20],
             "segmentation": [[2, 3, 22, 3, 22, 23.5, 2, 23]]},
            {"id": 2, "image_id": 1, "category_id": 2, "iscrowd": 1, "bbox": [0, 0, 10, 10],
             "segmentation": {"size": [SIDE, SIDE], "counts": [100, 50, area - 150]}},
            {"id": 3, "image_id": 2, "category_id": 2, "bbox": [5, 5, 9, 9], "segmentation": []},
            {"id": 4, "image_id": 2, "category_id": 1,
             "segmentation": {"size": [SIDE, SIDE], "counts": _compressed()}},
        ],
    }  # fmt: skip


def labelme_document() -> dict[str, Any]:
    """One shape of every type, and the photo inside."""
    mask = base64.b64encode(encoded(label_picture((0, 255), "L", 11), "PNG")).decode()
    points = {
        "polygon": [[1, 1], [20, 2], [10, 30]], "rectangle": [[3, 3], [9, 12]], "circle": [[20, 20], [25, 20]],
        "mask": [[4, 4], [14, 14]], "line": [[1, 1], [9, 9]], "linestrip": [[1, 1], [5, 9], [20, 3]],
        "point": [[7, 7]],
    }  # fmt: skip
    shapes: list[dict[str, Any]] = [
        {"label": "cat" if n % 2 else "dog", "shape_type": kind, "points": given, "flags": {}, "group_id": None}
        | ({"mask": mask} if kind == "mask" else {})
        for n, (kind, given) in enumerate(points.items())
    ]
    return {
        "version": "5.4", "flags": {"night": True}, "shapes": shapes, "imagePath": "gone.jpg",
        "imageData": base64.b64encode(photo_files()["plain.jpg"]).decode(),
        "imageHeight": SIDE, "imageWidth": SIDE,
    }  # fmt: skip


def run_documents() -> dict[str, bytes]:
    """run.json and evaluation.json of an evaluation, with an index of pictures."""
    found = {"scored": 900, "target": 400, "found": 300, "both": 200, "best_iou": 50.0, "on_others": {"2": 50},
             "on_any_other": 50}  # fmt: skip
    stored = [
        {"class_id": 1 + n % 2, "support_ids": [f"s{n}"], "query_id": f"q{n}", "seed": n, "iou": 10.0 * n,
         "finding": found}
        for n in range(8)
    ]  # fmt: skip
    results = {
        "benchmark": "zoo/30", "protocol": "hsnet", "scoring": "protocol", "fold": 1, "shots": 1, "ways": 1,
        "support": "mask", "shot_rule": "pooled", "method": "tiny", "threshold": 0.25, "threshold_origin": "given",
        "episodes_fingerprint": "abc", "left_out": [], "known_by_name": ["cat"], "seconds": 3.0,
        "miou": [50.0, 48.0, 52.0], "fb_iou": [70.0, 68.0, 72.0], "per_class": {"cat": 40.0, "dog": 60.0},
        "repeats": [50.0],
    }  # fmt: skip
    record = {
        "verb": "evaluate", "configuration": {"seed": None, "threshold": 0.25},
        "protocol": {"seed": 7, "reports_fb_iou": True},
        "data": {"name": "zoo/30", "fingerprint": {"training": "aaaa", "evaluation": "bbbb"}},
        "environment": {"versions": {"torch": "2"}, "commit": "c0ffee", "python": "3.11", "platform": "x"},
        "results": results,
    }  # fmt: skip
    panels = [{"file": "episode-00000-0.webp", "label": "query"}]
    return {
        "evaluation.json": _json(results | {"class_names": {"1": "cat", "2": "dog"}, "episodes": stored}),
        "run.json": _json(record),
        "gallery/gallery.json": _json({"episodes_fingerprint": "abc", "episodes": [{"number": 0, "panels": panels}]}),
        "gallery/episode-00000-0.webp": photo_files()["plain.webp"],
    }


def archive_files() -> dict[str, bytes]:
    """Zip and tar files, plain and compressed."""
    files = {"data/a.txt": b"alpha" * 50, "data/deep/b.bin": os.urandom(0) + bytes(range(256)), "other/c": b"c"}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    made = {"a.zip": zipped.getvalue()}
    for mode, name, form in (("w", "a.tar", tarfile.PAX_FORMAT), ("w:gz", "a.tgz", tarfile.GNU_FORMAT)):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode=mode, format=form) as archive:  # type: ignore[call-overload]
            for name_in, content in {**files, "data/" + "long" * 40: b"long"}.items():
                member = tarfile.TarInfo(name_in)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("data/same")
            link.type, link.linkname = tarfile.LNKTYPE, "data/a.txt"
            archive.addfile(link)
        made[name] = packed.getvalue()
    return made


def matlab_file(struct: Mapping[str, Any], *, compressed: bool) -> bytes:
    """A version 5 file."""
    buffer = io.BytesIO()
    savemat(buffer, dict(struct), do_compression=compressed)
    return buffer.getvalue()


def written(write: Callable[[Path], object], name: str = "file.safetensors") -> bytes:
    """What a writer of the project writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()


# ------------------------------------------------------------------------------------------------------- readers


def check_photo(pixels: np.ndarray[Any, Any]) -> None:
    """uint8 (H, W, 3)."""
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.size


def check_mask(mask: np.ndarray[Any, Any]) -> None:
    """uint8 (H, W) of 0, 1 and 255."""
    assert mask.dtype == np.uint8
    assert mask.ndim == 2
    assert set(np.unique(mask)) <= {0, 1, 255}


def read_any_photo(path: Path) -> None:
    """As a query, and at its own size."""
    photo = open_photo(path)
    check_photo(photo.pixels)
    whole = read_photo(path)
    check_photo(whole)
    assert whole.shape[:2] == photo.shape


def read_any_mask(path: Path) -> None:
    """As the mask of a support."""
    check_mask(read_object_mask(path))


def exhaust(source: MaskSource, split: str) -> None:
    """All that a data set is asked for; the first complaint ends it."""
    names = source.class_names
    assert all(class_id >= 1 for class_id in names)
    ids = source.ids(split)
    source.fingerprint(ids)
    for image_id in ids:
        check_photo(source.image(image_id))
        for class_id, mask in source.class_masks(image_id).items():
            assert class_id in names
            check_mask(mask)
        source.class_areas(image_id)
        check_mask(source.mask(image_id, next(iter(names))))
        annotation = getattr(source, "annotation", None)
        if annotation is not None:
            for kind in ("box", "scribble", "point", "label"):
                drawn = annotation(image_id, next(iter(names)), kind)
                assert drawn is None or set(np.unique(drawn)) <= {0, 1, 255}


def read_voc(path: Path) -> None:
    """The data set that the file is part of."""
    exhaust(VocSource(_root(path, "VOC")), "val")


def read_sbd(path: Path) -> None:
    """The data set that the file is part of, with masks of SBD."""
    root = _root(path, "VOC")
    exhaust(VocSource(root, sbd=root / "benchmark_RELEASE"), "val")


def _root(path: Path, name: str) -> Path:
    return next(folder for folder in path.parents if folder.name == name)


def voc_files() -> dict[str, bytes]:
    """A data set of one photo."""
    return {
        "VOC/JPEGImages/one.jpg": photo_files()["plain.jpg"],
        "VOC/SegmentationClass/one.png": encoded(label_picture((0, 1, 15, 255)), "PNG"),
        "VOC/ImageSets/Segmentation/val.txt": b"one\n",
        "VOC/ImageSets/Segmentation/train.txt": b"one\n",
    }


def folder_files() -> dict[str, bytes]:
    """A folder of one's own with names, labels, splits and marks."""
    return {
        "own/images/one.png": photo_files()["plain.png"],
        "own/images/two words.png": photo_files()["clear.png"],
        "own/masks/one.png": encoded(label_picture((0, 1, 2, 255)), "PNG"),
        "own/boxes/one.png": encoded(label_picture((0, 1, 0)), "PNG"),
        "own/scribbles/one.png": encoded(label_picture((0, 2, 254)), "PNG"),
        "own/classes.txt": b"1 cat\n2: big dog\n",
        "own/labels.txt": b'one cat "big dog"\n"two words" cat\n',
        "own/splits/val.txt": b"# comment\none\n\ntwo words\n",
    }


def fss_files() -> dict[str, bytes]:
    """Two classes, and lists of them."""
    mask = encoded(label_picture((0, 255), "L"), "PNG")
    photo = photo_files()["plain.jpg"]
    return {
        "fss/ab wheel/1.jpg": photo, "fss/ab wheel/1.png": mask, "fss/cat/1.jpg": photo, "fss/cat/1.png": mask,
        "fss/splits/test.txt": b"cat\nab wheel\n", "fss/splits/trn.txt": b"cat\n",
    }  # fmt: skip


def retrieval_files() -> dict[str, bytes]:
    """CUB's layout, SOP's and that of Cars-196, two photos each."""
    photo = photo_files()["plain.jpg"]
    header = b"image_id class_id super_class_id path\n"
    cars = {
        "annotations": np.array(
            [("car_ims/1.jpg", 1), ("car_ims/2.jpg", 2)], dtype=[("relative_im_path", object), ("class", object)]
        ),
        "class_names": np.array(["one car", "another"], dtype=object),
    }
    return {
        "cub/images.txt": b"1 001.Gull/a.jpg\n2 002.Owl/b.jpg\n", "cub/image_class_labels.txt": b"1 1\n2 2\n",
        "cub/classes.txt": b"1 001.Gull\n2 002.Owl\n", "cub/images/001.Gull/a.jpg": photo,
        "cub/images/002.Owl/b.jpg": photo, "sop/Ebay_train.txt": header + b"1 1 1 bike/a.JPG\n",
        "sop/Ebay_test.txt": header + b"2 2 1 sofa/b.JPG\n", "sop/bike/a.JPG": photo, "sop/sofa/b.JPG": photo,
        "cars/cars_annos.mat": matlab_file(cars, compressed=False), "cars/car_ims/1.jpg": photo,
        "cars/car_ims/2.jpg": photo,
    }  # fmt: skip


def read_retrieval(path: Path) -> None:
    """The layout that the file is part of."""
    root = next(folder for folder in path.parents if folder.name in ("cub", "sop", "cars"))
    data = open_retrieval(root.name, root)  # type: ignore[arg-type]
    for part in (data.train, data.test):
        part.fingerprint(part.files)
        check_photo(part.image(part.files[0]))


@cache
def backbone() -> Backbone:
    """Random weights; made once."""
    return build_backbone(_BACKBONE, weights="random")


@cache
def segmenter() -> FewShotSegmenter:
    """A model with every part that has tensors."""
    made = build_segmenter(backbone(), similarity_rank=2, base_classes=2, completion=True)
    return made.eval()


@cache
def plain_segmenter() -> FewShotSegmenter:
    """One with a mask decoder."""
    return build_segmenter(backbone(), similarity_rank=2, decoder_width=8, decoder_blocks=1).eval()


_notes = {
    "source": "voc", "fold": 0, "base_classes": [1, 2], "base_class_names": ["cat", "dog"], "protocol": "hsnet",
    "fit": "squash", "members": {"voc": [1], "coco": [3]},
}  # fmt: skip


def _save_model(path: Path, model: FewShotSegmenter) -> None:
    save_segmenter(path, model, backbone_weights="random", resolution=SIDE, notes=_notes)


def _build_once(name: Any = _BACKBONE, *, strides: Any = None, weights: Any = "embedded", **rest: Any) -> Backbone:
    """The tiny backbone is the same each time; everything else goes the usual way, but never to the network."""
    if (name, strides, weights) == (_BACKBONE, (16, 32), "random"):
        return backbone()
    return build_backbone(name, strides=strides, weights="random" if weights == "hub" else weights, **rest)


fewshot_seg.checkpoint.build_backbone = _build_once  # type: ignore[attr-defined]


def _finite(module: nn.Module) -> None:
    assert all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())


def read_model(path: Path) -> None:
    """As `--model`; what is loaded segments."""
    loaded = load_segmenter(path)
    _finite(loaded.segmenter)
    support = loaded.segmenter.encode_support(torch.rand(1, 1, 3, 32, 32), torch.ones(1, 1, 32, 32, dtype=torch.uint8))
    loaded.segmenter.segment(support, torch.rand(1, 3, 32, 32))


def read_similarity(path: Path) -> None:
    """As `--similarity`."""
    _finite(load_similarity(path).similarity)


def read_support_set(path: Path) -> None:
    """As `--support-set`; what is loaded is used."""
    saved = load_support(path, segmenter(), resolution=SIDE, fit="squash")
    segmenter().segment(saved.encoding, torch.rand(1, 3, SIDE, SIDE))


def _support_set(path: Path) -> None:
    masks = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.uint8)
    masks[..., 10:30, 10:30] = 1
    encoding = segmenter().encode_support(torch.rand(1, 1, 3, SIDE, SIDE), masks)
    save_support(path, encoding, segmenter(), resolution=SIDE, fit="squash", names=["a.jpg"])


def _train(folder: Path, *, resume: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    plan = Plan(steps=3, learning_rate=1e-3, weight_decay=0.0, schedule="cosine", seed=0, details={"of": "fuzz"})
    optimise(
        NamedModules(part=module),
        lambda step: (torch.ones(2, 4) * n for n in range(step, 3)),
        lambda batch: {"loss": module(batch).square().mean()},
        plan=plan,
        describe=lambda batch: Account(what="rows", names=tuple(map(str, batch.tolist()))),
        folder=folder,
        resume=resume,
        checkpoint_every=2,
    )
    _finite(module)


@cache
def training_files() -> dict[str, bytes]:
    """Checkpoint of a training that was stopped, and its log."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _train(folder, resume=False)
        return {one: (folder / one).read_bytes() for one in ("checkpoint.safetensors", "training.jsonl")}


class _NoWriter:
    """In place of tensorboard's: it starts a thread and writes what nobody reads here."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def add_scalar(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def read_training(path: Path) -> None:
    """As `--resume`."""
    import fewshot_seg.optimisation

    fewshot_seg.optimisation.SummaryWriter = _NoWriter  # type: ignore[attr-defined,assignment]
    _train(path.parent, resume=True)


def read_run_record(path: Path) -> None:
    """As `train --resume` reads what the run was."""
    check_folder(TrainConfig(data="synthetic", out=path.parent, resume=True), ("run.json",))


_SETTINGS = {"data": "abc", "groups": [1, 2], "steps": 3}


def _priors() -> dict[str, torch.Tensor]:
    half = partial(torch.rand, dtype=torch.float16)
    return {
        "priors": half(3, 2, 4, 4), "foreground": half(3, 4, 4), "background": half(3, 4, 4),
        "class_ids": torch.arange(3),
    }  # fmt: skip


def read_priors(path: Path) -> None:
    """As a resumed cross-fitting."""
    found = keep_tensors(path, _priors, _SETTINGS, is_sound=are_priors)
    assert are_priors(found)


def _small_state() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in _encoder().state_dict().items()}


@cache
def _encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


class RunsCode:
    """A pickle that makes a folder where it is loaded by a careless reader."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("/tmp/fuzz-readers-executed",)


def weight_files() -> dict[str, bytes]:
    """PyTorch's formats, safetensors, and a pickle with code in it."""
    from safetensors.torch import save

    def saved(value: Any, **options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, **options)
        return buffer.getvalue()

    state = _small_state()
    return {
        "new.pth": saved(state),
        "old.pth": saved({"state_dict": state, "epoch": 3}, _use_new_zipfile_serialization=False),
        "half.bin": saved(
            {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        ),
        "plain.safetensors": save(state),
        "code.pth": saved({"weight": RunsCode(), **state}),
        "old_code.pth": saved(RunsCode(), _use_new_zipfile_serialization=False),
    }


def read_weight_file(path: Path) -> None:
    """As `--backbone-weights`."""
    own = _encoder()
    fitting = fit_weights(own, read_weights(path), name="tiny", where=str(path))
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    target.load_state_dict(fitting)
    _finite(target)


@cache
def _store_source() -> SyntheticSource:
    return SyntheticSource(base_classes=2, novel_classes=2, images_per_class=2, size=SIDE)


def feature_file() -> dict[str, bytes]:
    """One photo's features, under the name that they have."""
    with tempfile.TemporaryDirectory() as name:
        store = FeatureStore(backbone(), _store_source(), size=SIDE, directory=Path(name))
        store.ensure(_store_source().ids("train")[:1])
        (file,) = Path(name).glob("*/*.safetensors")
        return {file.relative_to(name).as_posix(): file.read_bytes()}


def read_features(path: Path) -> None:
    """A damaged file is computed anew: the features are those of the photo, whatever lies there."""
    store = FeatureStore(backbone(), _store_source(), size=SIDE, directory=path.parents[1])
    for level, expected in zip(store.get(_store_source().ids("train")[:1]), _expected_features(), strict=True):
        assert torch.equal(level, expected)


@cache
def _expected_features() -> tuple[torch.Tensor, ...]:
    store = FeatureStore(backbone(), _store_source(), size=SIDE, directory=None)
    return store.get(_store_source().ids("train")[:1])


def index_file() -> bytes:
    """The stored index of a split."""
    with tempfile.TemporaryDirectory() as name:
        build_index(_store_source(), "train", cache_dir=Path(name))
        return next(Path(name).rglob("*.json")).read_bytes()


@cache
def _true_index() -> Any:
    return build_index(_store_source(), "train")


def read_index(path: Path) -> None:
    """What is stored is what would be counted, or None, and then it is counted."""
    true = _true_index()
    found = load_index(path, true.image_ids, true.fingerprint)
    assert found is None or found.image_ids == true.image_ids


def episode_file() -> bytes:
    """Three episodes."""
    specs = [EpisodeSpec(class_id=1, support_ids=("a", "b"), query_id=f"q{n}", seed=n) for n in range(3)]
    file = EpisodeFile(
        protocol="hsnet", data="voc", fold=0, shots=2, seeds=(0,), class_names={1: "aeroplane"},
        source_fingerprint="", pairs_fingerprint="", specs=tuple(specs),
    )  # fmt: skip
    return written(lambda path: write_episodes(path, file), "episodes.json")


def read_episode_file(path: Path) -> None:
    """As `--episodes`; what is read is written alike."""
    found = read_episodes(path)
    again = path.with_name("again.json")
    write_episodes(again, found)
    assert read_episodes(again) == found


def read_spec(path: Path) -> None:
    """One line."""
    spec = spec_from_json(path.read_bytes().decode("utf-8", "replace"))
    assert spec_from_json(spec_to_json(spec)) == spec


def read_configuration(path: Path) -> None:
    """As `--config` of two verbs."""
    flags = {"data": "synthetic", "out": path.parent / "out"}
    config = resolve(TrainConfig, flags, path)
    assert isinstance(json.dumps(config.as_json()), str)


def unpack(path: Path) -> None:
    """As `data prepare` unpacks; what comes out lies in the folder and is wanted."""
    target = path.parent / "target"
    extract(path, target, wanted=("data",), limit=300_000, show_progress=False)
    for file in target.rglob("*"):
        assert not file.is_symlink()
        assert file.relative_to(target).parts[0] == "data"
    assert sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) <= 300_000


def read_own_protocol(path: Path) -> None:
    """As `--protocol-file`."""
    assert read_protocol(path).episodes >= 1


def read_part(path: Path) -> None:
    """What a broken download is recognised by; None is always an answer."""
    origin = Part(path.parent, "a.zip").origin()
    assert origin is None or (isinstance(origin, Origin) and "\n" not in origin.validator)


def read_prepared(path: Path) -> None:
    """prepared.json."""
    for entry in read_record(path.parent).values():
        assert isinstance(entry["complete"], bool)


def read_report(path: Path) -> None:
    """As `report`: a page comes out, or one line."""
    folder = path.parent.parent if path.parent.name == "gallery" else path.parent
    write_report(folder / "report.html", [read_run(folder)])


def read_explainer_scores(path: Path) -> None:
    """As a scoring that goes on."""
    for number, record in read_scores(path, {"model": "tiny"}).items():
        assert record["number"] == number


def read_manifest(path: Path) -> None:
    """As `weights list`."""
    for model in shipped_models(path.parent):
        _ = model.headline, model.file, model.card


def _manifest(path: Path) -> None:
    score = {"metric": "mIoU", "value": 60.0, "shots": 1, "data": "zoo"}
    model = ShippedModel(
        name="general", sha256="00", bytes=3, backbone="x", summary="s", data="d", protocol="p", fold=None,
        resolution=400, parameters=5, commit=None, command="c", licence="l", scores=[score],
    )  # fmt: skip
    write_manifest(path.parent, [model])


def read_support_words(path: Path) -> None:
    """What stands behind `--support`, one a line; the photos lie beside."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        texts = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
        for supports in read_supports([text for text in texts if text]).values():
            for one in supports:
                check_photo(one.photo)
                assert set(np.unique(one.marks)) <= {0, 1, 255}
    finally:
        os.chdir(before)


def read_query_words(path: Path) -> None:
    """What stands behind `--query`."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        texts = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
        assert find_queries([text for text in texts if text]) is not None
    finally:
        os.chdir(before)


def read_page_drawing(path: Path) -> None:
    """What the app's page sends."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # the server's business
    check_mask(annotation_of(read_drawing(value), (SIDE, SIDE)))


def read_upload(path: Path) -> None:
    """A file that a visitor of the app sends, as example and as query."""
    folder = path.parent / "session"
    folder.mkdir()
    engine = Engine(segmenter=segmenter(), resolution=SIDE, fit="squash", name="tiny")
    session = Session(engine, Limits(file_bytes=500_000, pixels=100_000), folder)
    refused = [*session.add_examples([path]), *session.add_queries([path])]
    assert all(str(path.parent) not in line and "\n" not in line for line in refused)
    session.close()
    if refused:
        from episodes.types import DataError

        raise DataError(refused[0])


def read_page(path: Path) -> None:
    """What the configuration of `predict` and `evaluate` takes from a file."""
    for config in (PredictConfig, EvaluateConfig):
        resolve(
            config,
            {"support": ("a.jpg",), "query": ("b.jpg",)} if config is PredictConfig else {"data": "synthetic"},
            path,
        )


_DRAWING = {"kind": "mask", "shapes": [
    {"tool": "outline", "points": [[1, 1], [20, 1], [20, 30]]},
    {"tool": "brush", "points": [[3, 3], [9, 9]], "radius": 4},
    {"tool": "eraser", "points": [[5, 5]], "radius": 2}]}  # fmt: skip
_TOML = b"""steps = 3
learning-rate = 1e-3
supports = ["mask", "box"]
augment = "mirror"
select_threshold = true
cache_gigabytes = 0.5
backbone = "tf_efficientnet_lite0"
"""
_PROTOCOL = b"""name = "own"
episodes = 500
resolution = 473
fit = "pad"
min_area = 2048
query_draw = "class"
listed = [["a", 1], ["b", 2]]
repeat_supports = true
"""
_SUPPORTS = b"""a.png
a.png:m.png
cat=a.png:box=1,2,30,40
dog=a.png:point=3,4+9,9
a.png:scribble=m.png
"""


def _in_place(
    files: Mapping[str, bytes], read: Read, name: str, names: Iterator[str] | Sequence[str], **rest: Any
) -> Iterator[Target]:
    """A target for each of some files of a data set; the others lie beside it."""
    for place in names:
        others = {other: content for other, content in files.items() if other != place}
        yield Target(name=name, seeds={Path(place).name: files[place]}, read=read, beside=others, place=place, **rest)


def targets() -> list[Target]:
    """Every reader with its files."""
    voc, own, fss, lists, run = voc_files(), folder_files(), fss_files(), retrieval_files(), run_documents()
    labels = label_picture((0, 1, 15, 255))
    sbd = {
        **{name: content for name, content in voc.items() if not name.endswith(".png")},
        "VOC/SegmentationClass/none.png": voc["VOC/SegmentationClass/one.png"],
        "VOC/benchmark_RELEASE/dataset/val.txt": b"one\n",
        "VOC/benchmark_RELEASE/dataset/train.txt": b"one\n",
    }
    struct = {"GTcls": {"Segmentation": np.asarray(labels), "Boundaries": np.zeros(3), "CategoriesPresent": [1, 15]}}
    mats = {f"one{n}.mat": matlab_file(struct, compressed=bool(n)) for n in (0, 1)}
    photo, mask = photo_files()["plain.jpg"], encoded(label_picture((0, 1)), "PNG")
    coco_photos = {"coco/p1.jpg": photo, "coco/p2.jpg": photo}
    training = training_files()
    record = {"a.zip": {"complete": True, "sha256": "00", "folders": {"data": [2, 300]}, "vouched for by": "us"}}
    features = feature_file()
    model = {
        "context.safetensors": written(lambda path: _save_model(path, segmenter())),
        "mask.safetensors": written(lambda path: _save_model(path, plain_segmenter())),
    }
    similarity = written(
        lambda path: save_similarity(
            path, segmenter().similarity, backbone(), backbone_weights="random", resolution=SIDE, notes=_notes
        )
    )
    scores = "".join(json.dumps(one) + "\n" for one in ({"model": "tiny"}, {"number": 0, "auc": 0.5}, {"number": 1}))
    from fewshot_seg.checkpoint import write_tensors

    priors = written(lambda path: write_tensors(path, _priors(), {"format": 1, "settings": _SETTINGS}))
    configuration = TrainConfig(data="synthetic", out=Path("out"), resume=True).as_json()
    found = [
        Target(name="photo", seeds=photo_files(), read=read_any_photo, share=10),
        Target(name="mask", seeds=mask_files(), read=read_any_mask, share=5),
        *_in_place(voc, read_voc, "VOC", [name for name in voc if "train" not in name]),
        *(
            Target(name="SBD .mat", seeds={"one.mat": content}, read=read_sbd, beside=sbd, share=2,
                   place="VOC/benchmark_RELEASE/dataset/cls/one.mat")
            for content in mats.values()
        ),
        Target(name="COCO JSON", seeds={"annotations.json": _json(coco_document())}, kind="json", share=8,
               place="coco/annotations.json", beside=coco_photos,
               read=lambda path: exhaust(CocoJsonSource(path), "all")),
        Target(name="LabelMe JSON", seeds={"one.json": _json(labelme_document())}, kind="json", share=8,
               place="labelme/one.json", read=lambda path: exhaust(LabelmeSource(path.parent), "all")),
        *_in_place(own, lambda path: exhaust(FolderSource(_root(path, "own")), "val"), "folder",
                   [name for name in own if name.endswith(".txt") or "one" in name]),
        *_in_place(fss, lambda path: exhaust(FssSource(_root(path, "fss")), "test"), "FSS-1000",
                   ["fss/splits/test.txt", "fss/cat/1.png"]),
        *_in_place(lists, read_retrieval, "retrieval lists",
                   [name for name in lists if name.endswith((".txt", ".mat"))]),
        Target(name="episode file", seeds={"e.json": episode_file()}, kind="json", read=read_episode_file, share=4),
        Target(name="episode line", seeds={"l.json": spec_to_json(
            EpisodeSpec(class_id=1, support_ids=("a",), query_id="b", seed=3)).encode()}, kind="json",
               read=read_spec, share=2),
        Target(name="index", seeds={"i.json": index_file()}, kind="json", read=read_index, share=2),
        Target(name="protocol TOML", seeds={"p.toml": _PROTOCOL}, kind="text", read=read_own_protocol,
               share=3),
        Target(name="configuration TOML", seeds={"c.toml": _TOML}, kind="text", read=read_configuration, share=3),
        Target(name="configuration TOML", seeds={"c.toml": b'threshold = 0.5\ndevice = "cpu"\n'}, kind="text",
               read=read_page),
        Target(name="archive", seeds=archive_files(), read=unpack, share=6),
        Target(name="prepared.json", kind="json", read=read_prepared, place="prepared.json",
               seeds={"prepared.json": written(lambda path: write_record(path.parent, record), "prepared.json")}),
        Target(name="part of a download", seeds={"a.zip.part.json": _json({"validator": '"abc"', "total": 300})},
               kind="json", read=read_part, place="a.zip.part.json"),
        Target(name="model", seeds=model, read=read_model, share=7),
        Target(name="similarity network", seeds={"s.safetensors": similarity}, read=read_similarity, share=2),
        Target(name="support set", seeds={"s.safetensors": written(_support_set)}, read=read_support_set, share=4),
        Target(name="checkpoint", seeds={"c": training["checkpoint.safetensors"]}, read=read_training,
               beside={"training.jsonl": training["training.jsonl"]}, place="checkpoint.safetensors", share=3),
        Target(name="training log", seeds={"t": training["training.jsonl"]}, read=read_training, kind="text",
               beside={"checkpoint.safetensors": training["checkpoint.safetensors"]}, place="training.jsonl"),
        Target(name="stored priors", seeds={"p.safetensors": priors}, read=read_priors, share=2),
        Target(name="run.json", seeds={"run.json": _json({"configuration": configuration})}, kind="json",
               read=read_run_record, place="run.json", share=2),
        Target(name="weight file", seeds=weight_files(), read=read_weight_file, share=6),
        *(Target(name="feature file", seeds={"f": content}, read=read_features, place=place, share=3)
          for place, content in features.items()),
        *_in_place(run, read_report, "report", list(run), kind="json"),
        Target(name="explainer scores", seeds={"s.jsonl": scores.encode()}, kind="text", read=read_explainer_scores),
        Target(name="manifest", seeds={"manifest.json": written(_manifest, "manifest.json")}, kind="json",
               read=read_manifest, place="manifest.json"),
        Target(name="--support", seeds={"words.txt": _SUPPORTS}, kind="text", read=read_support_words, share=3,
               beside={"a.png": photo_files()["plain.png"], "m.png": mask}),
        Target(name="--query", seeds={"words.txt": b"a.png\n*.png\n**/*.png\n[ab].png\n."}, kind="text",
               read=read_query_words, beside={"a.png": photo}),
        Target(name="app drawing", seeds={"d.json": _json(_DRAWING)}, kind="json", read=read_page_drawing, share=3),
        Target(name="app upload", seeds={name: photo_files()[name] for name in ("plain.jpg", "palette.png")},
               read=read_upload, share=2),
    ]  # fmt: skip
    return [*found, *real_targets()]


def real_targets() -> Iterator[Target]:
    """Files of VOC and COCO, where they are."""
    voc, coco = (os.environ.get(f"FEWSHOT_SEG_{name}") for name in ("VOC", "COCO"))
    if voc and (Path(voc) / "JPEGImages").is_dir():
        root = Path(voc)
        masks = next(root / name for name in ("SegmentationClassAug", "SegmentationClass") if (root / name).is_dir())
        names = sorted(path.stem for path in masks.glob("*.png"))[:3]
        yield Target(
            name="photo", seeds={f"{n}.jpg": (root / "JPEGImages" / f"{n}.jpg").read_bytes() for n in names},
            read=read_any_photo, share=2,
        )  # fmt: skip
        yield Target(
            name="mask", seeds={f"{n}.png": (masks / f"{n}.png").read_bytes() for n in names}, read=read_any_mask
        )
    if coco and (Path(coco) / "annotations").is_dir():
        yield from _real_coco(Path(coco))


def _real_coco(root: Path) -> Iterator[Target]:
    path = root / "annotations" / "instances_val2017.json"
    if not path.is_file():
        return
    content = json.loads(path.read_text())
    photo = next(one for one in content["images"] if (root / "val2017" / one["file_name"]).is_file())
    content["images"] = [photo]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] == photo["id"]]
    yield Target(
        name="COCO JSON", seeds={"annotations.json": _json(content)}, kind="json", place="coco/annotations.json",
        beside={f"coco/{photo['file_name']}": (root / "val2017" / photo["file_name"]).read_bytes()},
        read=lambda path: exhaust(CocoJsonSource(path), "all"),
    )  # fmt: skip
