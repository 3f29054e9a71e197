"""Every family of Hugging Face's, both ways: round trips bit for bit, logits, losses and tokens as transformers'."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasp.checkpoints import Shard, check_same_model, load, read_hugging_face, read_manifest
from megasp.checkpoints.hf_reader import canonical_shapes
from megasp.checkpoints.hugging_face import from_hf, to_hf
from megasp.cli import main
from megasp.config.hf_config import read, read_directory
from megasp.config.load import load as load_config
from megasp.config.load import parser
from megasp.config.schema import ModelConfig
from megasp.errors import CheckpointError, ConfigError
from megasp.generate import load_model
from megasp.model import GPTModel
from tests.unit.checkpoints.families import FAMILIES, make, tokens_of

transformers = pytest.importorskip("transformers")


def ours(directory: Path) -> GPTModel:
    """The model of a Hugging Face directory, straight from its safetensors."""
    manifest = read_hugging_face(directory)
    model = GPTModel(ModelConfig(**read(json.loads((directory / "config.json").read_text()))[1])).eval()
    load(directory, [Shard("model", p.data, p.pieces) for p in model.parameters()], False, manifest)  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    """Logits, loss and greedy tokens, fp32."""
    theirs = make(name, tmp_path / "hf")
    model, tokens = ours(tmp_path / "hf"), tokens_of(theirs)
    with torch.no_grad():
        out = theirs(tokens, labels=tokens)
        logits = model(tokens)
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    assert (logits - out.logits).abs().max() <= 1e-5 * out.logits.abs().max()
    assert float(loss) == pytest.approx(float(out.loss), rel=1e-5)
    start = tokens[:1, :4]
    expected = theirs.generate(start, do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0)
    with torch.no_grad():
        for _ in range(12):
            start = torch.cat([start, model(start)[:, -1:].argmax(-1)], 1)
    assert start.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """hf -> checkpoint -> hf: every byte of every tensor, and every setting that transformers knows."""
    theirs = make(name, tmp_path / "hf", dtype)
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == dtype and torch.equal(after[key], tensor), key
    config, own = transformers.AutoConfig.from_pretrained(tmp_path / "back").to_dict(), theirs.config.to_dict()
    # Token ids are the tokenizer's, of which there is none; n_inner of None is four times the width.
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "dtype", "n_inner", "transformers_version")
    different = {key for key in own if config.get(key) != own[key]} - {*ids}
    assert different <= {"attention_bias", "mlp_bias"}, {key: (own[key], config.get(key)) for key in different}
    model, _, step = load_model(str(tmp_path / "ckpt"))
    if name == "mistral-full":  # which is a Llama
        other = to_hf(tmp_path / "ckpt", tmp_path / "other", model_type="llama")
        assert json.loads((other / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        with pytest.raises(CheckpointError, match=r"has kv-heads 2: .*GPT2LMHeadModel, has 4"):
            to_hf(tmp_path / "ckpt", tmp_path / "gpt2", model_type="gpt2")
    assert step == 0 and next(model.parameters()).dtype == torch.float32


def test_canonical_shapes_are_the_models() -> None:
    config = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=40, attention_dropout=0.0)
    pieces = [piece for p in GPTModel(config).parameters() for piece in p.pieces]  # type: ignore[attr-defined]
    assert canonical_shapes(config) == {piece.name: piece.shape for piece in pieces}


def test_sharded_input(tmp_path: Path) -> None:
    theirs = make("llama", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    tokens = tokens_of(theirs)
    with torch.no_grad():
        assert torch.equal(ours(tmp_path / "one")(tokens), ours(tmp_path / "many")(tokens))
    from_hf(tmp_path / "many", tmp_path / "ckpt", shard_bytes=30_000)
    assert len(read_manifest(tmp_path / "ckpt" / "step_00000000").files) > 2
    assert main(["checkpoint", "verify", str(tmp_path / "ckpt")]) == 0


def test_tensors_of_the_bare_model(tmp_path: Path) -> None:
    """openai-community/gpt2 leaves the prefix out, and has the mask's buffers."""
    theirs = make("gpt2", tmp_path)
    tensors = {key.removeprefix("transformer."): t for key, t in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(ours(tmp_path)(tokens_of(theirs)), theirs(tokens_of(theirs)).logits)


def test_vocabulary_with_more_rows(tmp_path: Path) -> None:
    """A run may pad it, so that tensor-parallel ranks can divide it: the rows that are not there are zeros."""
    theirs = make("llama", tmp_path, vocab_size=61)
    config = ModelConfig(**read_directory(tmp_path, {}) | {"make_vocab_size_divisible_by": 16})
    model = GPTModel(config)
    manifest = read_hugging_face(tmp_path, config)
    check_same_model(manifest, config)
    load(tmp_path, [Shard("model", p.data, p.pieces) for p in model.parameters()], False, manifest)  # type: ignore[attr-defined]
    assert torch.equal(model.embedding.weight[:61], theirs.model.embed_tokens.weight)  # type: ignore[union-attr]
    assert not model.embedding.weight[61:].any() and not model.head.weight[61:].any()  # type: ignore[union-attr]


def test_flags_win_over_the_model(tmp_path: Path) -> None:
    make("llama3.1", tmp_path)
    argv = ["--load-hf", str(tmp_path), "--seq-length", "64"]
    model = load_config(argv, parser("p", ""))[0].model
    assert (model.rotary_scaling, model.rotary_scaling_factor, model.original_max_position_embeddings) == (
        "llama3",
        8,
        16,
    )
    argv += ["--rotary-scaling", "yarn", "--rotary-scaling-factor", "4"]
    model = load_config(argv, parser("p", ""))[0].model
    assert (model.rotary_scaling, model.rotary_scaling_factor, model.original_max_position_embeddings) == (
        "yarn",
        4,
        16,
    )
    assert model.num_query_groups == 2 and model.hidden_dropout == 0
    with pytest.raises(ConfigError, match="--model tiny and --load-hf"):
        load_config([*argv, "--model", "tiny"], parser("p", ""))


def test_carries_tokenizer_and_generation_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("qwen2", tmp_path / "hf")
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a")).save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "own": 1}')
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [0, 1], "temperature": 0.7}')
    assert main(["convert", "from-hf", "--input", str(tmp_path / "hf"), "--save", str(tmp_path / "ckpt")]) == 0
    assert main(["checkpoint", "inspect", str(tmp_path / "ckpt"), "--tensors"]) == 0
    said = capsys.readouterr().out
    assert (
        f"converted from {tmp_path / 'hf'}" in said and "model/layers.1.attention.q.bias  F32 [32] in 1 boxes" in said
    )
    assert main(["convert", "to-hf", "--load", str(tmp_path / "ckpt"), "--output", str(tmp_path / "back")]) == 0
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["own"] == 1
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [0, 1]


def _without(tensor: str) -> Any:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        save_file({key: value for key, value in tensors.items() if key != tensor}, directory / "model.safetensors")

    return change


def _settings(**settings: Any) -> Any:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | settings))

    return change


def _extra(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors") | {"model.layers.0.router.weight": torch.zeros(2)}
    save_file(tensors, directory / "model.safetensors")


def _truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _symlink(directory: Path) -> None:
    path = directory / "model.safetensors"
    shutil.move(path, directory.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def _index(name: str) -> Any:
    def change(directory: Path) -> None:
        keys = load_file(directory / "model.safetensors")
        index = {"weight_map": dict.fromkeys(keys, name)}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


BAD = {
    "missing tensor": (_without("model.norm.weight"), r"has no tensor model.norm.weight"),
    "extra tensor": (_extra, r"has a tensor model.layers.0.router.weight: LlamaForCausalLM has none such"),
    "shape": (
        _settings(hidden_size=64),
        r"model.embed_tokens.weight in .* is \[64, 32\]: by config.json .* \[64, 64\]",
    ),
    "truncated": (_truncated, r"model.safetensors cannot be read: it must be whole safetensors"),
    "pickle": (_pickled, r"has neither model.safetensors nor .*: .bin files are pickles"),
    "symlink": (_symlink, r"model.safetensors is .*elsewhere: a model's files must be inside its directory"),
    "path": (_index("../hf2/model.safetensors"), r"a model's files must be inside its directory"),
    "absolute": (_index("/etc/passwd"), r"a model's files must be inside its directory"),
    "architecture": (
        _settings(architectures=["GemmaForCausalLM"], model_type="gemma"),
        r"architecture GemmaForCausalLM: megasp serves LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, ",
    ),
    "activation": (_settings(hidden_act="gelu"), r"config.json has hidden_act gelu: .* with silu"),
    "biases": (_settings(attention_bias=True), r"config.json has mlp_bias False: here one setting, add_bias_linear"),
    "dynamic": (
        _settings(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        r"config.json has rope_type dynamic: megasp scales by linear, yarn and llama3",
    ),
    "factors": (
        _settings(rope_parameters={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 2.0}),
        r"config.json has rope low_freq_factor 2.0",
    ),
    "quantized": (_settings(quantization_config={"bits": 4}), r"config.json has quantization_config .*'bits': 4"),
    "no config": (lambda directory: (directory / "config.json").unlink(), r"config.json cannot be read"),
    "no json": (lambda directory: (directory / "config.json").write_text("[]"), r"it must be a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    make("llama", tmp_path / "hf", cached=True)
    change(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=message):
        from_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists() and not list(tmp_path.glob(".*"))


def test_links_into_the_cache_are_followed(tmp_path: Path) -> None:
    """As huggingface_hub lays models out."""
    make("llama", tmp_path / "m" / "blobs")
    snapshot = tmp_path / "m" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert read_hugging_face(snapshot).tensors


def test_output_that_exists(tmp_path: Path) -> None:
    make("llama", tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="holds checkpoints: they are never overwritten"):
        from_hf(tmp_path / "hf", tmp_path / "ckpt")
