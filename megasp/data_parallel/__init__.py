"""Gradients of one model over the ranks that see different tokens: accumulation, reduction, master weights."""

from megasp.data_parallel.gradients import clip_, global_norm, sum_partial_, sum_tied_
from megasp.data_parallel.replicas import Replicas, master_dtype, on_host
from megasp.data_parallel.weight_shards import WeightShards

__all__ = ["Replicas", "WeightShards", "clip_", "global_norm", "master_dtype", "on_host", "sum_partial_", "sum_tied_"]
