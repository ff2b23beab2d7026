"""Settings of a run: the schema, and the way in and out of YAML, JSON and ``key=value``."""

from shoestring.config.adapt import DistillConfig, DreamBoothConfig, LoRAConfig, SuperResConfig
from shoestring.config.data import CODEC_DOWNSAMPLING, DataConfig, StoreConfig
from shoestring.config.files import apply_overrides, from_json, load_yaml, parse_yaml, to_yaml
from shoestring.config.model import (
    DecoderConfig,
    ExpertsConfig,
    MixerConfig,
    ModelConfig,
    Ramp,
    TokensConfig,
    TransformerConfig,
    UNetConfig,
)
from shoestring.config.running import GuardConfig, LoggingConfig, ParallelConfig
from shoestring.config.schema import (
    LONGEST_AVERAGE,
    SHORTEST_AVERAGE,
    NoiseConfig,
    OptimizerConfig,
    ProcessConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
)

__all__ = [
    "CODEC_DOWNSAMPLING",
    "LONGEST_AVERAGE",
    "SHORTEST_AVERAGE",
    "DataConfig",
    "DecoderConfig",
    "DistillConfig",
    "DreamBoothConfig",
    "ExpertsConfig",
    "GuardConfig",
    "LoRAConfig",
    "LoggingConfig",
    "MixerConfig",
    "ModelConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProcessConfig",
    "Ramp",
    "RunConfig",
    "SamplingConfig",
    "StageConfig",
    "StoreConfig",
    "SuperResConfig",
    "TokensConfig",
    "TransformerConfig",
    "UNetConfig",
    "apply_overrides",
    "from_json",
    "load_yaml",
    "parse_yaml",
    "to_yaml",
]
