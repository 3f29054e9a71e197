"""What every trainer of a benchmark gets alike: a Llama-style model, its weights, its batches, and AdamW's settings.

Weights and tokens come from numpy's frozen RandomState stream, each tensor from one of its own that is keyed by its
canonical name. So any framework, and any rank of any layout, makes its part without an exchange file.
"""

import zlib
from collections.abc import Mapping

import numpy as np
import torch

from megasp.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megasp.data import Batch
from megasp.parameters import Piece, placed
from megasp.training.build import Training

SEED = 1234
INIT_STD = 0.02
LEARNING_RATE = 1e-3
CLIP = 1000.0
"""Everybody takes the norm and scales by it, but no gradient is as large: PyTorch's fp32 norm of a large tensor is 0.2
percent low on a CPU, and peers that clip by it would train with other gradients than megasp, whose norm is right."""
ADAMW = OptimizerConfig(lr=LEARNING_RATE, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, clip_grad=CLIP)


def llama(
    *, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, sequence: int, batch: int
) -> Config:
    """A Llama-style model and its batch, without dropout, in one process and fp32."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        group_query_attention=kv_heads != heads,
        num_query_groups=kv_heads,
        max_position_embeddings=sequence,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        vocab_size=vocab,
    )
    training = TrainingConfig(seq_length=sequence, micro_batch_size=batch, train_iters=1)
    data = DataConfig(mock_data=True)  # unread: batches come from `batch`
    return Config(model=model, parallel=ParallelConfig(), data=data, optimizer=ADAMW, training=training)


LLAMA_56M = llama(layers=8, hidden=512, ffn=1408, heads=8, kv_heads=4, vocab=32000, sequence=1024, batch=2)
"""56 million parameters, of which 33 are embedding and head; 2 x 1024 tokens a step."""


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the model."""
    d, q, kv = model.hidden_size, model.num_attention_heads * model.head_dim, model.kv_heads * model.head_dim
    block = {
        "input_norm": (d,),
        "attention.q": (q, d),
        "attention.k": (kv, d),
        "attention.v": (kv, d),
        "attention.o": (d, q),
        "mlp_norm": (d,),
        "mlp.gate": (model.mlp_size, d),
        "mlp.up": (model.mlp_size, d),
        "mlp.down": (d, model.mlp_size),
    }
    layers = {f"layers.{i}.{name}.weight": shape for i in range(model.num_layers) for name, shape in block.items()}
    ends = {"final_norm.weight": (d,), "head.weight": (model.padded_vocab_size, d)}
    return {"embedding.weight": (model.padded_vocab_size, d)} | layers | ends


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Initial values of a whole canonical tensor, fp32: ones for a norm, else normal with deviation 0.02."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    random = np.random.RandomState(zlib.crc32(name.encode()) ^ SEED)
    return (INIT_STD * random.standard_normal(shape)).astype(np.float32)


def weights(model: ModelConfig) -> Mapping[str, torch.Tensor]:
    """Canonical name -> initial values of every tensor."""
    return {name: torch.from_numpy(weight(name, shape)) for name, shape in shapes(model).items()}


@torch.no_grad()
def load_weights(training: Training) -> None:
    """Give this rank's part of megasp's model the weights above: a loop over pieces, whatever the layout."""
    for master in training.replicas.masters:
        pieces: tuple[Piece, ...] = master.pieces  # type: ignore[attr-defined]
        for piece, local in placed(pieces):
            master[local.slices] = torch.from_numpy(weight(piece.name, piece.shape)[piece.box.slices]).to(master)
    training.replicas.publish()
    names = {piece.name for master in training.replicas.masters for piece in master.pieces}  # type: ignore[attr-defined]
    assert training.state.pp.size > 1 or names == set(shapes(training.config.model))


def batch(config: Config, step: int) -> Batch:
    """One step's tokens and labels, [B, S] each.

    Small ids are frequent (id = u^4 x vocabulary), so the loss falls from ln(vocabulary) as the model learns that.
    """
    rows, length, vocab = config.training.micro_batch_size, config.training.seq_length, config.model.padded_vocab_size
    uniform = np.random.RandomState(SEED + 7919 * (step + 1)).random_sample((rows, length + 1))
    ids = (uniform**4 * vocab).astype(np.int64)
    return Batch(
        tokens=ids[:, :-1].copy(),
        labels=ids[:, 1:].copy(),
        loss_mask=np.ones((rows, length), np.float32),
        positions=np.arange(length),
        samples=np.arange(step * rows, (step + 1) * rows),
    )
