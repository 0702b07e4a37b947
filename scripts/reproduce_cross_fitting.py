"""What each part of the cross-fitted models of PASCAL-5i is worth; records of docs/results.json.

    python scripts/train_weights.py --voc ../shared/data/VOCdevkit/VOC2012 --only pascal-fold0 pascal-fold1 ...
    python scripts/reproduce_cross_fitting.py --root ../shared/data/VOCdevkit/VOC2012

The first trains (and ships) the four models; the second reads their run folders. The models themselves are scored by
scripts/reproduce_sizes.py; here all is at the size of the training, without guided upsampling. Every ablation is a
decoder trained anew, with the same steps and seed, on the same stored priors but for what it does without. It reads
the same embedding of the same test episodes. Interrupted runs go on where they stopped: finished cells are kept under
--out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fold_benchmark import records_of
from render_results import fold_means, merge_records, provenance, render
from safetensors.torch import load_file
from torch import Tensor, nn
from train_weights import PASCAL_NAMES, TRAINING, pascal_data
from weight_runs import open_backbone

from fewshot_seg.checkpoint import load_segmenter
from fewshot_seg.config import default_cache
from fewshot_seg.cross_fitting import priors_of_episodes, train_decoder
from fewshot_seg.decoder import ContextDecoder, PriorReadout
from fewshot_seg.encoded_photos import EncodedPhotos
from fewshot_seg.episode_logits import shot_logits
from fewshot_seg.evaluation import evaluate_logits
from fewshot_seg.fold_data import FoldData, evaluation_episodes, group_episodes
from fewshot_seg.metrics import EpisodeIoU
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.runs import MODEL_NAME, benchmark_name
from fewshot_seg.runtime import read_json, write_json
from fewshot_seg.segmenter import EVIDENCE_MAPS, FewShotSegmenter

PLAIN = "ours without guided upsampling"
MAPS = (*PRIOR_CHANNELS, *EVIDENCE_MAPS)
WITHOUT: dict[str, tuple[str, ...]] = {
    f"{PLAIN} and base learner": ("other base class", "any base class"),
    f"{PLAIN} and frozen soft margin": ("frozen soft margin",),
    f"{PLAIN} and commonness": ("commonness",),
    f"{PLAIN} and prototype, nearest and attention maps": PRIOR_CHANNELS[1:],
    f"{PLAIN} and prior (base learner and commonness alone)": (*PRIOR_CHANNELS, "frozen soft margin"),
}
"""Maps that each ablation does without."""
NO_STATISTICS = f"{PLAIN} and statistics of the photo"
IN_FOLD = f"{PLAIN} and cross-fitting: decoder trained on classes that the embedding knows"
MARGIN = "soft margin alone, three backbones, similarity trained"
BYTES = 3 * 2**30


class ChosenMaps(nn.Module):
    """A decoder that reads some of the maps."""

    def __init__(self, decoder: ContextDecoder, channels: Sequence[int]) -> None:
        super().__init__()
        self.decoder, self.channels = decoder, list(channels)

    def forward(self, priors: Tensor, query_maps: Tensor, prototype: Tensor) -> Tensor:
        """As `ContextDecoder`."""
        logits: Tensor = self.decoder(priors[:, self.channels], query_maps, prototype)
        return logits


class WithoutStatistics(ContextDecoder):
    """The same network of every cell, which knows nothing of the photo."""

    def fit_scales(self, priors: Tensor) -> None:
        """As it is, with statistics that are always 0."""
        super().fit_scales(priors)
        self.statistics_mean.zero_()
        self.statistics_scale.fill_(float("inf"))


def ablations(stored: dict[str, Tensor], in_fold: dict[str, Tensor], steps: int) -> dict[str, nn.Module]:
    """Decoders by name, all trained alike."""

    def trained(decoder: ContextDecoder, priors: dict[str, Tensor], channels: Sequence[int]) -> nn.Module:
        train_decoder(decoder, priors | {"priors": priors["priors"][:, list(channels)]}, steps=steps)
        return ChosenMaps(decoder, channels).eval()

    everything = range(len(MAPS))
    found = {}
    for name, maps in WITHOUT.items():
        left = [n for n in everything if MAPS[n] not in maps]
        found[name] = trained(ContextDecoder(prior_channels=len(left)), stored, left)
    found[NO_STATISTICS] = trained(WithoutStatistics(prior_channels=len(MAPS)), stored, everything)
    found[IN_FOLD] = trained(ContextDecoder(prior_channels=len(MAPS)), in_fold, everything)
    return found


def margin_threshold(stored: dict[str, Tensor]) -> float:
    """The best single cut of the soft margin on the base classes' stored priors."""
    margin, sides = stored["priors"][:, 0].float(), [stored[name].float() for name in ("foreground", "background")]
    target = (sides[0] > sides[1]).byte().masked_fill(sides[0] + sides[1] < 0.5, 255)

    def miou(threshold: float) -> float:
        metric = EpisodeIoU()
        metric.update(margin > threshold, target, stored["class_ids"].tolist())
        return metric.compute().miou

    return float(max(torch.linspace(-1, 2, 31).tolist(), key=miou))


def seen_classes(segmenter: FewShotSegmenter, data: FoldData, counts: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Priors of base classes by the embedding that was trained on them."""
    parts = []
    for shots, count in counts:
        drawn = group_episodes(data, data.split.base, shots=shots, count=2 * count, seed=1)
        parts.append(priors_of_episodes(segmenter, drawn, show_progress=True))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def scores(
    segmenter: FewShotSegmenter,
    decoders: Mapping[str, Any],
    cuts: Mapping[str, float],
    data: FoldData,
    shots: int,
    quick: bool,
) -> list[dict[str, Any]]:
    """Records of all decoders over the same episodes in one pass, bilinearly enlarged."""
    encoded = EncodedPhotos(segmenter, decoders.values(), byte_budget=BYTES)
    segmenter.guided = False
    drawn = evaluation_episodes(data, shots=shots, count=20 if quick else None)
    found = evaluate_logits(
        lambda batch, size: shot_logits(segmenter, decoders, batch, size, encoded=encoded),
        {name: (name, threshold) for name, threshold in cuts.items()},
        drawn,
        scoring_size=data.protocol.scoring_size,
        source=data.source,
        show_progress=True,
    )
    return [record for name, one in found.items() for record in records_of(name, shots, one, data)]


def ablate_fold(fold: int, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of what the model does without one part or another."""
    data = pascal_data(arguments.root, fold, open_backbone("cpu"), arguments.cache)
    segmenter = load_segmenter(folder / MODEL_NAME).segmenter
    groups = [load_file(path) for path in sorted(folder.glob("group*/priors.safetensors"))]
    stored = {name: torch.cat([group[name] for group in groups]) for name in groups[0]}
    steps, counts = TRAINING["decoder_steps"], TRAINING["decoder_episodes"]
    if arguments.quick:
        steps, counts = 20, ((1, 5),)
    kept = arguments.out / f"fold{fold}.json"
    if not kept.exists():
        decoders = ablations(stored, seen_classes(segmenter, data, counts), steps)
        decoders |= {PLAIN: segmenter.decoder, MARGIN: PriorReadout(0)}
        cuts = dict.fromkeys(decoders, segmenter.threshold) | {MARGIN: margin_threshold(stored)}
        found = [scores(segmenter, decoders, cuts, data, shots, arguments.quick) for shots in arguments.shots]
        write_json(kept, [record for records in found for record in records])
        print(f"fold {fold} done", flush=True)
    # classes of an ablation would make the page's table of classes too wide to read
    records = [one for one in read_json(kept, what="finished cell") if not one["metric"].startswith("IoU: ")]
    common = {"fold": fold, "data": benchmark_name(data), "support": "mask"}
    return [record | common for record in records]


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012")
    parser.add_argument("--runs", type=Path, default=Path("runs/weights"), help="run folders of train_weights.py")
    parser.add_argument("--out", type=Path, default=Path("runs/cross-fitting"), help="finished cells")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(4)))
    parser.add_argument("--shots", type=int, nargs="+", default=[1], help="of the test episodes")
    parser.add_argument("--results", type=Path, default=Path("docs/results.json"))
    parser.add_argument("--quick", action="store_true", help="a few steps and episodes; records nothing")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Score the folds; with all four, write the records and the page."""
    arguments = parse_arguments(given)
    if arguments.quick:
        arguments.out = arguments.out / "quick"
    per_fold = [ablate_fold(fold, arguments.runs / PASCAL_NAMES[fold], arguments) for fold in arguments.folds]
    if arguments.quick or sorted(arguments.folds) != list(range(4)):
        return
    common = {"protocol": "hsnet", "seeds": [0], **provenance()}
    records = [common | record for fold in per_fold for record in fold]
    merge_records(arguments.results, [*records, *fold_means(records)])
    render(arguments.results, arguments.results.with_suffix(".md"))


if __name__ == "__main__":
    main()
