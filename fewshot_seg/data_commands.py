"""What ``fewshot-seg data ...`` does; results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import sys

from episodes.augment import EpisodeTransform
from episodes.episode_files import EpisodeFile, episodes_as_text, fingerprint_pairs, write_episodes
from episodes.fold_lists import FoldLists, draw, evaluation_specs, left_out_classes, open_lists, splits_of
from episodes.loader import EpisodeDataset, support_kinds
from episodes.prepare import prepare
from episodes.verify import inspect, report, report_lines
from fewshot_seg.config import EpisodesConfig, PrepareConfig, ShowConfig, VerifyConfig
from fewshot_seg.contact_sheet import write_contact_sheets
from fewshot_seg.report import Figure, Section, write_page
from fewshot_seg.runs import RUN_NAME, open_protocol, open_source
from fewshot_seg.runtime import environment, write_json


def data_prepare(config: PrepareConfig) -> int:
    """Fetch, check and unpack a data set."""
    prepared = prepare(
        config.data_set,
        config.target,
        archives=config.archives,
        mirror=config.mirror,
        year=2014 if config.year == "2014" else 2017,
        with_sbd=config.sbd,
        show_progress=True,
    )
    print("\n".join(prepared.steps))
    print(f"check it with: {prepared.next_command}")
    return 0


def data_verify(config: VerifyConfig) -> int:
    """List every problem of a data set; 1 if there are any."""
    source = open_source(config)
    splits = config.splits or tuple(dict.fromkeys(splits_of(open_protocol(config, source), source)))
    found = report(source, [inspect(source, split) for split in splits])
    if config.out is not None:
        write_json(config.out, found)
    if config.format == "json":
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print("\n".join(report_lines(found)))
    return 1 if found["problems"] else 0


def data_episodes(config: EpisodesConfig) -> int:
    """Write the exact episodes of an evaluation."""
    lists = _open_lists(config)
    specs = tuple(evaluation_specs(lists, shots=config.shots, count=config.count, seed=config.seed, ways=config.ways))
    first = lists.protocol.seed if config.seed is None else config.seed
    names = lists.source.class_names
    file = EpisodeFile(
        protocol=lists.protocol.name,
        data=lists.source.name,
        fold=lists.fold,
        shots=config.shots,
        ways=config.ways,
        seeds=tuple(range(first, first + lists.protocol.repeats)),
        class_names={class_id: names[class_id] for class_id in sorted({spec.class_id for spec in specs})},
        source_fingerprint=lists.evaluation_index.fingerprint,
        pairs_fingerprint=fingerprint_pairs(lists.evaluation_pairs),
        specs=specs,
    )
    left_out = [names[class_id] for class_id in left_out_classes(lists, shots=config.shots)]
    if left_out:
        print(f"left out, with too few images: {', '.join(left_out)}", file=sys.stderr)
    if config.out is None:
        print(episodes_as_text(file), end="")
        return 0
    write_episodes(config.out, file)
    print(f"{len(specs) // config.ways} episodes, fingerprint {file.episodes_fingerprint[:12]}: {config.out}")
    return 0


def data_show(config: ShowConfig) -> int:
    """Draw what the network sees: supports as they are marked and changed, and queries with their masks."""
    lists = _open_lists(config)
    training = config.part == "training" and bool(lists.split.base)
    if training:
        index, pairs = lists.training_index, lists.training_pairs
    else:
        index, pairs = lists.evaluation_index, lists.evaluation_pairs
    specs = draw(lists, index, pairs, shots=config.shots, count=config.count, seed=config.seed, order="random")
    size, fit = config.resolution or lists.protocol.resolution, lists.protocol.fit
    dataset = EpisodeDataset(
        lists.training_source if training else lists.source,
        specs,
        EpisodeTransform(config.support_augment, size, fit),
        EpisodeTransform(config.query_augment, size, fit),
        supports=config.supports,
    )
    pages = write_contact_sheets(
        config.out,
        (dataset[n] for n in range(len(dataset))),
        class_names=lists.source.class_names,
        kinds=[support_kinds(spec, config.supports) for spec in specs],
        show_progress=True,
    )
    page = config.out / "index.html"
    figures = [Figure(path=path, caption=f"page {number}") for number, path in enumerate(pages, 1)]
    part = "training" if training else "evaluation"
    heading = f"{lists.source.name}, {part}: supports {config.support_augment}, queries {config.query_augment}"
    write_page(page, title="fewshot-seg data show", sections=[Section(heading=heading, figures=figures)])
    record = {"verb": "data show", "configuration": config.as_json(), "environment": environment()}
    write_json(config.out / RUN_NAME, record)
    print(f"{len(specs)} episodes: {page.resolve()}")
    return 0


def _open_lists(config: EpisodesConfig | ShowConfig) -> FoldLists:
    source = open_source(config)
    return open_lists(
        source,
        open_protocol(config, source),
        fold=config.fold,
        novel_classes=config.novel_classes,
        index_cache=config.cache / "index",
        show_progress=True,
    )
