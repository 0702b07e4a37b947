"""Settings: flag over file over default; every mistake is one line that names the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from episodes.prepare import DATA_SETS, CocoYear
from episodes.protocols import PROTOCOL_NAMES
from episodes.protocols.protocol import ShotRule
from episodes.reidentification import ReidentificationLayout
from episodes.retrieval import RetrievalLayout
from episodes.types import SUPPORT_KINDS, DataError
from fewshot_seg import config as module
from fewshot_seg.attention import ATTENTION_KINDS, NEGATIVES_NEEDED
from fewshot_seg.config import (
    Config,
    DemoConfig,
    EpisodesConfig,
    EvaluateConfig,
    ExplainConfig,
    PredictConfig,
    PrepareConfig,
    ShowConfig,
    SimilarityEvaluateConfig,
    SimilarityExplainConfig,
    SimilarityTrainConfig,
    TrainConfig,
    VerifyConfig,
    default_cache,
    resolve,
    settings_of,
)
from fewshot_seg.config.similarity import EPISODIC
from fewshot_seg.fold_data import Augment
from fewshot_seg.metric_losses import METRIC_LOSSES
from fewshot_seg.optimisation import SCHEDULES
from fewshot_seg.priors import PRIOR_CHANNELS
from fewshot_seg.segmenter import PRIOR_KINDS
from fewshot_seg.similarity_losses import MAP_KINDS

SIMILARITY = (SimilarityTrainConfig, SimilarityEvaluateConfig, SimilarityExplainConfig)
DATA = (VerifyConfig, PrepareConfig, EpisodesConfig, ShowConfig)
ALL = (DemoConfig, *DATA, TrainConfig, EvaluateConfig, ExplainConfig, PredictConfig, *SIMILARITY)


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def choices(config_class: type[Config], name: str) -> tuple[str, ...]:
    return next(setting.choices for setting in settings_of(config_class) if setting.name == name)


class TestSettings:
    @pytest.mark.parametrize("config_class", ALL)
    def test_every_setting_is_explained_and_has_a_default_in_bounds(self, config_class: type[Config]) -> None:
        for setting in settings_of(config_class):
            assert setting.help, setting.name
            if not setting.required:
                setting.check(setting.default)

    def test_choices_are_those_of_the_components(self) -> None:
        assert choices(TrainConfig, "prior") == PRIOR_KINDS
        assert set(choices(TrainConfig, "attention")) == set(ATTENTION_KINDS) - {"quadruplet"}  # needs two episodes
        assert choices(EvaluateConfig, "prior_map") == PRIOR_CHANNELS
        assert choices(TrainConfig, "schedule") == SCHEDULES
        assert choices(TrainConfig, "augment") == choices(TrainConfig, "support_augment")
        presets = get_args(get_args(Augment)[1])
        assert set(choices(TrainConfig, "augment")) == {"mirror", *presets}
        assert set(choices(ShowConfig, "query_augment")) == set(choices(ShowConfig, "support_augment")) == set(presets)
        assert choices(TrainConfig, "protocol") == PROTOCOL_NAMES
        assert choices(TrainConfig, "supports") == choices(EvaluateConfig, "support") == SUPPORT_KINDS
        assert set(choices(EvaluateConfig, "shot_rule")) == {*get_args(ShotRule), "protocol"}
        assert choices(PrepareConfig, "data_set") == DATA_SETS
        assert choices(PrepareConfig, "year") == tuple(map(str, get_args(CocoYear)))

    def test_choices_of_the_similarity_network_are_those_of_the_components(self) -> None:
        assert choices(SimilarityTrainConfig, "loss") == METRIC_LOSSES
        assert choices(SimilarityTrainConfig, "maps") == MAP_KINDS
        assert set(choices(SimilarityTrainConfig, "constraint_form")) == set(ATTENTION_KINDS) - {"quadruplet"}
        assert choices(SimilarityTrainConfig, "schedule") == SCHEDULES
        for config_class in SIMILARITY:
            layouts = (*get_args(RetrievalLayout), *get_args(ReidentificationLayout))
            assert choices(config_class, "data") == (*layouts, *EPISODIC)
            assert set(EPISODIC) <= set(choices(TrainConfig, "data"))
        for config_class in (SimilarityEvaluateConfig, SimilarityExplainConfig):
            assert choices(config_class, "form") == ATTENTION_KINDS

    @pytest.mark.parametrize("config_class", ALL)
    def test_flags_differ(self, config_class: type[Config]) -> None:
        flags = [setting.flag for setting in settings_of(config_class)]
        assert len(set(flags)) == len(flags)
        assert "--config" not in flags  # the file's own flag

    def test_cache_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("FEWSHOT_SEG_CACHE", str(tmp_path))
        assert default_cache() == tmp_path
        assert TrainConfig(data="synthetic").cache == tmp_path
        monkeypatch.delenv("FEWSHOT_SEG_CACHE")
        assert default_cache() == Path.home() / ".cache" / "fewshot-seg"

    def test_as_json(self) -> None:
        values = TrainConfig(root=Path("data"), strides=(8, 16)).as_json()
        assert values["root"] == "data"
        assert values["strides"] == [8, 16]
        assert values["validation_fold"] is None


class TestResolve:
    def test_flag_over_file_over_default(self, tmp_path: Path) -> None:
        file = write(tmp_path, 'data = "synthetic"\nsteps = 7\nlearning-rate = 1\nbatch_size = 3\nstrides = [8, 32]\n')
        config = resolve(TrainConfig, {"steps": 9}, file)
        assert (config.steps, config.batch_size, config.shots) == (9, 3, 1)
        assert config.learning_rate == 1.0
        assert isinstance(config.learning_rate, float)
        assert config.strides == (8, 32)

    def test_paths_of_a_file(self, tmp_path: Path) -> None:
        config = resolve(TrainConfig, {}, write(tmp_path, 'root = "~/voc"\n'))
        assert config.root == Path.home() / "voc"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("shot = 1", r"settings.toml: unknown key 'shot'; did you mean shots"),
            ("qqq = 1", r"settings.toml: unknown key 'qqq'; known are: .*steps"),
            ('steps = "many"', r"settings.toml: steps must be of type int, got 'many' \(str\)"),
            ("steps = true", r"steps must be of type int, got True \(bool\)"),
            ("steps = 1.5", r"steps must be of type int, got 1.5 \(float\)"),
            ("resume = 1", r"resume must be of type bool"),
            ("strides = 16", r"strides must be a list, got 16"),
            ('strides = ["a"]', r"strides must be of type int"),
            ("root = 3", r"root must be of type str, got 3 \(int\)"),
            ("steps =", r"settings.toml is not valid TOML"),
        ],
    )
    def test_mistakes_in_the_file(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            resolve(TrainConfig, {"data": "synthetic"}, write(tmp_path, text))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"cannot read configuration file .*none.toml: No such file"):
            resolve(TrainConfig, {}, tmp_path / "none.toml")

    def test_missing(self) -> None:
        with pytest.raises(DataError, match="missing --support: PHOTO:MASK pairs"):
            resolve(PredictConfig, {"query": ("a.jpg",)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shots": 0}, "--shots must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"fold": 4}, "--fold must be at most 3, got 4"),
        ({"fold": -1}, "--fold must be at least 0, got -1"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a finite number, got nan"),
        ({"prior": "magic"}, "--prior must be one of similarity, pfenet, none; got 'magic'"),
        ({"prior": "none"}, "--prior none leaves the decoder nothing to read; add --appearance 16"),
        ({"decoder_width": 12}, "--decoder-width must be a multiple of 8, got 12"),
        ({"strides": ()}, "--strides needs at least one value"),
        (
            {"data": "voc"},
            "--data voc needs --root, the VOC2012 folder that holds JPEGImages/ and ImageSets/; --data syn",
        ),
        ({"data": "coco"}, "--data coco needs --root, the folder that holds annotations/"),
        ({"data": "coco-json"}, "--data coco-json needs --root, the JSON file of annotations"),
        ({"sbd": Path("sbd")}, "--sbd is for --data voc, not for --data synthetic; leave it out"),
        ({"images": Path("i")}, "--images is for --data coco-json, not for --data synthetic; leave it out"),
        (
            {"protocol": "bam", "protocol_file": Path("p.toml")},
            "--protocol-file describes a custom protocol, but --protocol is bam; drop one",
        ),
        ({"supports": ("mask", "line")}, "--supports must be one of mask, box, scribble, point, label; got 'line'"),
        ({"supports": ()}, "--supports needs at least one value"),
        ({"data": "coco", "root": Path(), "fold": 1, "validation_fold": 1}, "--validation-fold 1 is the test fold"),
        ({"data": "voc", "root": Path(), "fold": 2, "validation_fold": 2}, "--validation-fold 2 is the test fold"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TrainConfig(**{"data": "synthetic", **values})


class TestCrossFits:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({}, True),
            ({"supports": ("mask", "box")}, True),
            ({"training": "cross-fit"}, True),
            ({"training": "joint"}, False),
            ({"similarity_rank": 0}, False),  # nothing of the similarity network is trained
            ({"similarity": Path("s.safetensors")}, False),
            ({"prior": "pfenet"}, False),
            ({"prior": "none", "appearance": 4}, False),
        ],
    )
    def test_by_default_where_the_similarity_network_is_trained(self, values: dict[str, Any], expected: bool) -> None:
        assert TrainConfig(data="synthetic", **values).cross_fits == expected

    @pytest.mark.parametrize(
        "values", [{"prior": "pfenet"}, {"prior": "none", "appearance": 4}, {"similarity": Path("s.safetensors")}]
    )
    def test_refuses_what_it_cannot_train(self, values: dict[str, Any]) -> None:
        message = "--training cross-fit trains the similarity network: it needs --prior similarity, and no --similarity"
        with pytest.raises(DataError, match=message):
            TrainConfig(data="synthetic", training="cross-fit", **values)
        assert not TrainConfig(data="synthetic", training="joint", **values).cross_fits

    def test_refuses_rank_0(self) -> None:
        message = "--similarity-rank 0 leaves nothing of it to train; give a rank of at least 1, or --training joint"
        with pytest.raises(DataError, match=message):
            TrainConfig(data="synthetic", training="cross-fit", similarity_rank=0)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"training": "stacked"}, "--training must be one of cross-fit, joint; got 'stacked'"),
            ({"decoder_steps": 0}, "--decoder-steps must be at least 1, got 0"),
            ({"decoder_episodes": 0}, "--decoder-episodes must be at least 1, got 0"),
        ],
    )
    def test_values_out_of_range(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            TrainConfig(data="synthetic", **values)


class TestEpisodesFile:
    def test_a_number_is_for_count(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(DataError, match="--episodes 100: no such file; the number of episodes is --count"):
            EvaluateConfig(data="synthetic", episodes=Path("100"))
        monkeypatch.chdir(tmp_path)
        Path("100").touch()
        assert EvaluateConfig(data="synthetic", episodes=Path("100")).count is None

    @pytest.mark.parametrize("values", [{"count": 3}, {"seed": 0}, {"ways": 2}, {"shots": 5}])
    def test_brings_its_own_settings(self, values: dict[str, Any]) -> None:
        (name,) = values
        message = f"--episodes FILE brings its own --{name}; leave --{name} out"
        with pytest.raises(DataError, match=message):
            EvaluateConfig(data="synthetic", episodes=Path("e.json"), **values)


def test_model_and_prior_map_exclude_each_other() -> None:
    with pytest.raises(DataError, match="--model and --prior-map exclude each other"):
        EvaluateConfig(data="synthetic", model=Path("m.safetensors"), prior_map="soft margin")


def test_model_and_similarity_exclude_each_other() -> None:
    for config_class in (EvaluateConfig, ExplainConfig):
        with pytest.raises(DataError, match="--model and --similarity exclude each other: a model brings its own net"):
            config_class(data="synthetic", model=Path("m.safetensors"), similarity=Path("s.safetensors"))
    assert TrainConfig(data="synthetic", similarity=Path("s.safetensors")).prior == "similarity"
    with pytest.raises(DataError, match="--similarity is the source of the prior 'similarity', but --prior is 'none'"):
        TrainConfig(data="synthetic", similarity=Path("s.safetensors"), prior="none", appearance=16)


class TestSimilarity:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"data": "folders", "root": None}, "--data folders needs --root DIR, the folder of the data set"),
            ({"data": "voc", "root": None}, "--data voc needs --root DIR"),
            ({"data": "imagenet"}, "--data must be one of folders, cub, cars, sop, .*voc, synthetic; got 'imagenet'"),
            ({"fold": 4}, "--fold must be at most 3, got 4"),
            ({"loss": "arcface"}, "--loss must be one of contrastive, triplet, quadruplet, multi-similarity; got"),
            ({"maps": ("margin", "lime")}, "--maps must be one of soft margin, .*; got 'lime'"),
            ({"maps": ()}, "--maps needs at least one value"),
            ({"constraint": -1.0}, "--constraint must be at least 0, got -1"),
            ({"constraint_triples": 0}, "--constraint-triples must be at least 1, got 0"),
            ({"rank": 0}, "--rank must be at least 1, got 0"),
            ({"classes": 1}, "--classes must be at least 2, got 1"),
            ({"photos": 1}, "--photos must be at least 2, got 1"),
            ({"resolution": 16}, "--resolution must be at least 32, got 16"),
            ({"metric_weight": 0.0}, "--metric-weight 0 without --constraint leaves nothing to train; raise one"),
            ({"data": "voc", "map_weight": 0.0}, "--map-weight 0 without --metric-weight or --constraint leaves noth"),
            (
                {"data": "synthetic", "map_weight": 0.0, "metric_weight": 0.0},
                "--map-weight 0 without --metric-weight or --constraint leaves nothing to train",
            ),
            (
                {"data": "voc", "constraint": 0.3, "constraint_domain": "photos"},
                "--data voc gives stored features; use --constraint-domain features",
            ),
        ],
    )
    def test_training_that_cannot_be(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            SimilarityTrainConfig(**{"root": Path("data"), **values})

    @pytest.mark.parametrize(
        "values",
        [
            {"metric_weight": 0.0, "constraint": 0.3},
            {"constraint": 0.3, "constraint_domain": "photos"},
            {"map_weight": 0.0},  # of episodes alone
            {"data": "synthetic", "root": None},
            {"data": "voc", "metric_weight": 0.0},
            {"data": "voc", "map_weight": 0.0, "metric_weight": 1.0},
            {"data": "voc", "map_weight": 0.0, "constraint": 0.3},
        ],
    )
    def test_training_that_can_be(self, values: dict[str, Any]) -> None:
        config = SimilarityTrainConfig(**{"root": Path("data"), **values})
        assert config.episodic == (config.data in ("voc", "synthetic"))

    def test_episodes_as_the_other_verbs_name_them(self) -> None:
        named = SimilarityTrainConfig(data="voc", root=Path("VOC2012")).data_settings()
        assert (named.data, named.root, named.protocol) == ("voc", Path("VOC2012"), "hsnet")
        assert SimilarityEvaluateConfig(data="synthetic").data_settings().data == "synthetic"

    def test_fold_and_seed_are_left_to_model_and_protocol(self) -> None:
        config = SimilarityEvaluateConfig(data="synthetic")
        assert (config.fold, config.seed, config.resolution, config.episodes) == (None, None, None, None)
        with pytest.raises(DataError, match="--fold must be at least 0, got -1"):
            SimilarityEvaluateConfig(data="synthetic", fold=-1)

    @pytest.mark.parametrize("form", ATTENTION_KINDS)
    def test_own_photos_are_as_many_as_the_form_compares(self, form: Any) -> None:
        needed = 2 + NEGATIVES_NEEDED[form]
        photos = tuple(Path(f"{number}.jpg") for number in range(needed))
        assert SimilarityExplainConfig(images=photos, form=form).root is None
        too_few = f"--form {form} compares {needed} photos, --images names {needed - 1}; add photos, or choose another"
        with pytest.raises(DataError, match=too_few):
            SimilarityExplainConfig(images=photos[1:], form=form)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({}, "--data folders needs --root DIR"),
            ({"data": "voc", "root": Path()}, "--data voc: episodes are drawn by `fewshot-seg explain --similarity"),
            ({"data": "synthetic"}, "--data synthetic: episodes are drawn by `fewshot-seg explain --similarity FILE`"),
            ({"images": ()}, "--images needs at least one value"),
            ({"images": (Path("a.jpg"),) * 3, "count": 0}, "--count must be at least 1, got 0"),
            ({"images": (Path("a.jpg"),) * 3, "form": "lime"}, "--form must be one of siamese, triplet"),
        ],
    )
    def test_explanations_that_cannot_be(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            SimilarityExplainConfig(**values)

    def test_from_a_file(self, tmp_path: Path) -> None:
        file = write(tmp_path, 'root = "birds"\nks = [1, 10]\npart = "held-out"\nfaithfulness = 4\n')
        config = resolve(SimilarityEvaluateConfig, {"faithfulness": 8}, file)
        assert (config.ks, config.part, config.faithfulness) == ((1, 10), "held-out", 8)
        file = write(tmp_path, 'images = ["~/a.jpg", "b.jpg", "c.jpg"]\n')
        assert resolve(SimilarityExplainConfig, {}, file).images == (
            Path.home() / "a.jpg",
            Path("b.jpg"),
            Path("c.jpg"),
        )


def test_configurations_are_frozen() -> None:
    with pytest.raises(AttributeError):
        DemoConfig().seed = 1  # type: ignore[misc]
    assert module.DemoConfig().replace(seed=1).seed == 1
