"""Settings of a run: the schema, and the way in and out of YAML, JSON and ``key=value``."""

from shoestring.config.files import apply_overrides, from_json, load_yaml, parse_yaml, to_yaml
from shoestring.config.schema import (
    DataConfig,
    DecoderConfig,
    ExpertsConfig,
    LoggingConfig,
    MixerConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    ProcessConfig,
    Ramp,
    RunConfig,
    SamplingConfig,
    StageConfig,
    StoreConfig,
    TokensConfig,
)

__all__ = [
    "DataConfig",
    "DecoderConfig",
    "ExpertsConfig",
    "LoggingConfig",
    "MixerConfig",
    "ModelConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "ProcessConfig",
    "Ramp",
    "RunConfig",
    "SamplingConfig",
    "StageConfig",
    "StoreConfig",
    "TokensConfig",
    "apply_overrides",
    "from_json",
    "load_yaml",
    "parse_yaml",
    "to_yaml",
]
