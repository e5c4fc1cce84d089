"""Run configuration: frozen dataclasses (schema.py, lora.py), types and bounds of their fields
(fields.py), sampling parameters (sampling.py), TOML files (toml.py), and resolving flags, tiers and
files to one config (resolve.py).
"""

from mlxgpt.config.lora import LoRAConfig
from mlxgpt.config.sampling import SamplingParams, parse_sampling_params
from mlxgpt.config.schema import (
    SECTION_BY_FIELD,
    SECTIONS,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    config_from_tree,
    diff_configs,
    fill_vocab_size,
    override_config,
    validate_config,
    weight_affecting_fields,
)

__all__ = [
    "SECTIONS",
    "SECTION_BY_FIELD",
    "Config",
    "DataConfig",
    "LoRAConfig",
    "ModelConfig",
    "OptimConfig",
    "SamplingParams",
    "TrainConfig",
    "config_from_tree",
    "diff_configs",
    "fill_vocab_size",
    "override_config",
    "parse_sampling_params",
    "validate_config",
    "weight_affecting_fields",
]
