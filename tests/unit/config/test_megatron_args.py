"""Megatron-LM's stored settings in ours."""

from typing import Any

import pytest

from megasp.config.megatron_args import SERVED, config_of
from megasp.errors import CheckpointError

MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ({"layernorm_epsilon": 1e-6}, {"norm_epsilon": 1e-6}),
        ({"rotary_base": 500000}, {"rotary_base": 500000.0}),
        ({"use_rotary_position_embeddings": True}, {"position_embedding_type": "rope"}),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32}, {"rotary_scaling": "llama3", "rotary_factor": 32.0}),
        ({"rotary_seq_len_interpolation_factor": 4}, {"rotary_scaling": "linear", "rotary_factor": 4.0}),
        # Always there, but of latent attention alone.
        ({"rotary_scaling_factor": 1.0, "original_max_position_embeddings": 4096}, {"rotary_scaling_factor": None}),
        ({"window_size": (127, 0)}, {"window_size": 127}),
        ({"window_size": (-1, 0)}, {"window_size": None}),
        ({"num_query_groups": 1, "group_query_attention": False}, {"kv_heads": 4}),
        ({"num_query_groups": 2, "group_query_attention": True}, {"kv_heads": 2}),
        ({"add_bias_linear": False, "add_qkv_bias": True}, {"add_bias_linear": False, "qkv_bias": True}),
    ],
)
def test_model(args: dict[str, Any], wanted: dict[str, Any]) -> None:
    config, notes = config_of(MODEL | {"position_embedding_type": "rope"} | args, {}, 64)
    assert {name: getattr(config.model, name) for name in wanted} == wanted and notes == []


@pytest.mark.parametrize(
    ("args", "rows", "vocab_size", "model"),
    [
        ({"vocab_size": 250, "padded_vocab_size": 256, "make_vocab_size_divisible_by": 128}, 256, 250, None),
        # There it is padded to a multiple of 128 x the tensor-parallel size.
        (
            {"vocab_size": 50257, "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 8},
            51200,
            50257,
            None,
        ),
        ({"vocab_size": None, "padded_vocab_size": 32000}, 32000, 32000, None),
        ({"vocab_size": 100, "padded_vocab_size": 256, "make_vocab_size_divisible_by": 8}, 256, 256, None),
        ({}, 77, 77, None),
        ({"vocab_size": 250, "tokenizer_type": "NullTokenizer", "make_vocab_size_divisible_by": 8}, 256, 251, "250"),
    ],
)
def test_vocabulary(args: dict[str, Any], rows: int, vocab_size: int, model: str | None) -> None:
    config, _ = config_of(MODEL | args, {}, rows)
    assert (config.model.vocab_size, config.model.padded_vocab_size) == (vocab_size, rows)
    assert config.data.tokenizer_model == model


def test_training() -> None:
    args = {
        "data_path": ["0.3", "a", "0.7", "b"], "seq_length": 128, "train_samples": 1000, "train_iters": 10, "lr": 1,
        "rampup_batch_size": ["8", "8", "100"], "global_batch_size": 32, "fp16": True, "loss_scale_window": 500.0,
        "reset_attention_mask": True, "lr_decay_style": "cosine", "attention_backend": object(), "num_workers": 9,
        "lr_decay_samples": 900, "lr_warmup_samples": 50,
    }  # fmt: skip
    config, notes = config_of(MODEL | args, {}, 64)
    assert notes == []
    assert config.data.data_path == ("0.3", "a", "0.7", "b") and config.data.data_order == "megatron"
    assert config.data.eod_starts_document and config.data.num_workers == 2
    training = config.training
    assert (training.train_samples, training.train_iters, training.rampup_batch_size) == (1000, None, (8, 8, 100))
    assert training.fp16 and training.attention_backend == "auto"
    assert config.loss_scaling.loss_scale_window == 500 and config.optimizer.lr == 1.0
    assert config.optimizer.schedule(training.length) == (50, 900, 0)


def test_what_is_not_taken_over_is_said() -> None:
    args = {
        "weight_decay_incr_style": "linear", "optimizer": "muon",
        "tokenizer_type": "Llama3Tokenizer", "bias_gelu_fusion": False,
    }  # fmt: skip
    _, notes = config_of(MODEL | args, {}, 64)
    assert [note.split(" ")[0] for note in notes] == [
        "optimizer", "weight_decay_incr_style", "tokenizer_type", "bias_gelu_fusion"
    ]  # fmt: skip
    assert "weight_decay_incr_style linear is not taken over: give a constant --weight-decay" in notes


def test_flags_win() -> None:
    config, _ = config_of(MODEL | {"num_layers": 4}, {"num_layers": 3, "num_query_groups": 2}, 64)
    assert config.model.num_layers == 3 and config.model.kv_heads == 2 and config.model.group_query_attention


@pytest.mark.parametrize("name", SERVED)
def test_other_models_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"model has {name} other: megasp computes models with it"):
        config_of(MODEL | {name: "other"}, {}, 64)


def test_windows_ahead_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"window_size \(4, 4\): a token never sees"):
        config_of(MODEL | {"window_size": (4, 4)}, {}, 64)
