"""The language model and its configurations."""

from gsa_jax.models.config import PRESETS, ModelConfig, preset
from gsa_jax.models.lm import LanguageModel, abstract_model, count_parameters

__all__ = ["PRESETS", "LanguageModel", "ModelConfig", "abstract_model", "count_parameters", "preset"]
