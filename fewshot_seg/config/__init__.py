"""Settings of every verb of the command line: frozen dataclasses, and flag over TOML file over default.

Only the rooms that assemble an experiment read these classes; components take plain arguments.
"""

from fewshot_seg.config.data import (
    CacheSettings,
    DataName,
    DataSettings,
    EpisodesConfig,
    PrepareConfig,
    ProtocolName,
    ShotRuleName,
    ShowConfig,
    SupportName,
    VerifyConfig,
    default_cache,
)
from fewshot_seg.config.machinery import Config, Setting, resolve, setting, settings_of
from fewshot_seg.config.similarity import (
    SimilarityEvaluateConfig,
    SimilarityExplainConfig,
    SimilarityModelSettings,
    SimilaritySettings,
    SimilarityTrainConfig,
)
from fewshot_seg.config.verbs import (
    NO_MODEL,
    AttentionName,
    Augmentation,
    DemoConfig,
    DeviceSettings,
    EpisodeSettings,
    EvaluateConfig,
    ExplainConfig,
    ExportConfig,
    ModelSettings,
    PredictConfig,
    PriorMapName,
    PriorName,
    TrainConfig,
)
from fewshot_seg.config.weights import WeightsListConfig, WeightsVerifyConfig

__all__ = [
    "NO_MODEL",
    "AttentionName",
    "Augmentation",
    "CacheSettings",
    "Config",
    "DataName",
    "DataSettings",
    "DemoConfig",
    "DeviceSettings",
    "EpisodeSettings",
    "EpisodesConfig",
    "EvaluateConfig",
    "ExplainConfig",
    "ExportConfig",
    "ModelSettings",
    "PredictConfig",
    "PrepareConfig",
    "PriorMapName",
    "PriorName",
    "ProtocolName",
    "Setting",
    "ShotRuleName",
    "ShowConfig",
    "SimilarityEvaluateConfig",
    "SimilarityExplainConfig",
    "SimilarityModelSettings",
    "SimilaritySettings",
    "SimilarityTrainConfig",
    "SupportName",
    "TrainConfig",
    "VerifyConfig",
    "WeightsListConfig",
    "WeightsVerifyConfig",
    "default_cache",
    "resolve",
    "setting",
    "settings_of",
]
