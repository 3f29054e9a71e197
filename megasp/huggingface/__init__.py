"""Models of `transformers` under megasp's sequence parallelism: one call, no change to the model.

    state = parallel_state.initialize_model_parallel(ulysses_size=4, ring_size=2)
    model, collate = sequence_parallel(model, state)
    Trainer(model, args, train_dataset=dataset, data_collator=collate).train()

parallel      the call: what is hung around the model
support       which models it can serve, and why not the others
attention     the function in transformers' attention registry
batches       samples -> this rank's shard of them
loaders       ranks of one sequence read the same samples (Accelerate)
loss          sums over shards by the global token count; head and loss without logits
memory        tiled MLP, offload
precision     autocast
"""

from megasp.errors import ConfigError

try:
    import transformers  # noqa: F401
except ImportError as missing:
    raise ConfigError(
        "import megasp.huggingface", "it needs the package transformers", "pip install 'megasp[hf]'"
    ) from missing

from megasp.huggingface.batches import SampleInfo, ShardingCollator
from megasp.huggingface.parallel import sequence_parallel

__all__ = ["SampleInfo", "ShardingCollator", "sequence_parallel"]
