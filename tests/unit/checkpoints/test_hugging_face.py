"""Export to Hugging Face, against transformers itself."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megasp.checkpoints import Shard, convert, load, safetensors_file, save
from megasp.checkpoints.hugging_face import to_hf
from megasp.config.schema import ModelConfig
from megasp.errors import CheckpointError, DataError
from megasp.model import GPTModel
from megasp.parallel_state import ParallelState
from megasp.parameters import whole

transformers = pytest.importorskip("transformers")

LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    position_embedding_type="rope",
    max_position_embeddings=16384,
    normalization="RMSNorm",
    norm_epsilon=1e-6,
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    init_method_std=0.1,
    vocab_size=300,
)
TIED = replace(LLAMA, untie_embeddings_and_output_weights=False, rotary_scaling="llama3", rotary_base=5e5)
BIASED = replace(LLAMA, add_bias_linear=True, num_query_groups=None)


def saved(root: Path, config: ModelConfig, **groups: Any) -> Any:
    """A random model, and a checkpoint of it in `root`."""
    model: Any = GPTModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # norms and biases, too
    shards = [Shard("model", parameter, parameter.pieces) for parameter in model.parameters()]
    save(root, 3, shards, ParallelState.single(), {"config": {"model": asdict(config), **groups}})
    return model


@pytest.mark.parametrize("config", [LLAMA, TIED, BIASED], ids=["untied", "tied-llama3-scaling", "biases"])
def test_loads_in_transformers(tmp_path: Path, config: ModelConfig) -> None:
    model = saved(tmp_path / "ckpt", config)
    output = to_hf(tmp_path / "ckpt", tmp_path / "hf")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    weights = theirs.state_dict()
    attention, query = model.layers[1].attention, config.num_attention_heads * config.head_dim
    assert torch.equal(weights["model.layers.1.self_attn.q_proj.weight"], attention.qkv.weight[:query])
    assert torch.equal(weights["model.embed_tokens.weight"], model.embedding.weight)
    for name, tensor in load_file(output / "model.safetensors").items():
        assert torch.equal(weights[name], tensor)
    tokens = torch.randint(config.vocab_size or 0, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_config(tmp_path: Path) -> None:
    saved(tmp_path / "ckpt", TIED, training={"bf16": True})
    output = to_hf(tmp_path / "ckpt", tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(output)
    assert (config.vocab_size, config.head_dim, config.max_position_embeddings) == (384, 16, 16384)
    assert (config.tie_word_embeddings, config.rms_norm_eps, config.dtype) == (True, 1e-6, torch.bfloat16)
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert config.rope_parameters == rope | {"original_max_position_embeddings": 8192}
    written = json.loads((output / "config.json").read_text())
    assert written["rope_theta"] == 5e5 and written["rope_scaling"]["rope_type"] == "llama3"  # for transformers 4
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}


def test_sharded_with_index(tmp_path: Path) -> None:
    model = saved(tmp_path / "ckpt", LLAMA)
    output = to_hf(tmp_path / "ckpt", tmp_path / "hf", "fp32", shard_bytes=40_000)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    assert all(
        (output / file).stat().st_size < 55_000 for file in files
    )  # the embedding alone is larger than asked for
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()) and torch.equal(theirs.lm_head.weight, model.head.weight)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A byte-level BPE without merges."""
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = tmp_path / "tok" / "tokenizer.json"
    path.parent.mkdir()
    tokenizer.save(str(path))
    return path


def test_tokenizer_is_carried_along(tmp_path: Path, tokenizer: Path) -> None:
    saved(tmp_path / "ckpt", LLAMA, data={"tokenizer_model": str(tokenizer)})
    output = to_hf(tmp_path / "ckpt", tmp_path / "hf")
    theirs, text = transformers.AutoTokenizer.from_pretrained(output), "def hello( ):  return 1 # ü"
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token == "<|endoftext|>" and theirs.eos_token_id == 0
    assert transformers.GenerationConfig.from_pretrained(output).eos_token_id == 0
    with pytest.raises(DataError, match=r"no tokenizer at .*gone"):
        to_hf(tmp_path / "ckpt", tmp_path / "other", tokenizer_model=str(tmp_path / "gone"))
    assert not list(tmp_path.glob("*other*"))


def test_tokenizer_config_of_its_own(tmp_path: Path, tokenizer: Path) -> None:
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "d", "model_max_length": 77}
    tokenizer.with_name("tokenizer_config.json").write_text(json.dumps(own))
    saved(tmp_path / "ckpt", LLAMA)
    output = to_hf(tmp_path / "ckpt", tmp_path / "hf", tokenizer_model=str(tokenizer.parent))
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    assert (theirs.eos_token, theirs.model_max_length) == ("d", 77)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "has normalization LayerNorm: .*LlamaForCausalLM, has RMSNorm"),
        ({"position_embedding_type": "learned_absolute"}, "has position-embedding-type learned_absolute: .* has rope"),
        ({"swiglu": False}, "has swiglu False: .* has True"),
        ({"rotary_percent": 0.5}, "has rotary-percent 0.5: .*has 1.0"),
        ({"window_size": 7, "attention_sinks": 2}, "has attention-sinks 2: .*MistralForCausalLM, has 0"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "has .*keep this one in megasp"),
    ],
)
def test_other_families_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved(tmp_path / "ckpt", replace(LLAMA, **changes))
    with pytest.raises(CheckpointError, match=message):
        to_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        to_hf(tmp_path / "nowhere", tmp_path / "hf")
    extra = Shard("model", torch.zeros(2), (whole("layers.0.router.weight", (2,)),))
    save(tmp_path / "other", 1, [extra], ParallelState.single(), {"config": {"model": asdict(LLAMA)}})
    with pytest.raises(CheckpointError, match=r"has a tensor layers.0.router.weight: LlamaForCausalLM has none such"):
        to_hf(tmp_path / "other", tmp_path / "hf")
    save(tmp_path / "bare", 1, [extra], ParallelState.single(), {})
    with pytest.raises(CheckpointError, match="does not say what model it is"):
        to_hf(tmp_path / "bare", tmp_path / "hf")
    saved(tmp_path / "ckpt", LLAMA)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for taken in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(CheckpointError, match=f"--output {taken} exists: existing output is never overwritten"):
            to_hf(tmp_path / "ckpt", taken)
    with pytest.raises(CheckpointError, match=r"cannot write to --output .*Not a directory"):
        to_hf(tmp_path / "ckpt", tmp_path / "full" / "file" / "hf")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file, "write", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        to_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*"))


def test_command(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "ckpt", LLAMA)
    (tmp_path / "hf").mkdir()  # empty: taken as it is
    monkeypatch.setattr(logging.getLogger("megasp"), "propagate", True)
    with caplog.at_level(logging.INFO, "megasp"):
        assert convert.run(convert.Options(load=str(tmp_path / "ckpt"), output=str(tmp_path / "hf"), dtype="bf16")) == 0
    assert "model.safetensors (" in caplog.text and "AutoModelForCausalLM.from_pretrained(" in caplog.text
    exported = load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(exported, model.head.weight.bfloat16())
    load(tmp_path / "ckpt", [])  # the checkpoint is as it was
