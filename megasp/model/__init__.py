"""A GPT from scratch, and its tensor-parallel layers. `gpt.py` is where to start reading."""

from megasp.config.schema import ModelConfig
from megasp.model.gpt import GPTModel
from megasp.model.init import Factory
from megasp.model.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

__all__ = ["ColumnParallelLinear", "Factory", "GPTModel", "ModelConfig", "RowParallelLinear", "VocabParallelEmbedding"]
