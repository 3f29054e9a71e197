"""Fine-tune a model of transformers on long packed samples, each split over several ranks (Ulysses x ring).

    torchrun --nproc-per-node 8 examples/hf_long_context_finetune.py --model DIR --data notes/*.txt \
        --seq-length 131072 --ulysses-size 4 --ring-size 2 --lora-rank 16 --output tuned
    torchrun --standalone --nproc-per-node 4 examples/hf_long_context_finetune.py --steps 5     # a tiny model, on CPUs

Each file is a document, or each line of a .jsonl file ("text"). Documents are packed into samples and do not see each
other. Ranks beyond ulysses x ring train on samples of their own. Needs `pip install 'megasp[hf]'`.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from megasp import parallel_state
from megasp.errors import ConfigError, UserError
from megasp.huggingface import sequence_parallel

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub name; a tiny random Llama of bytes without it")
    examples = sorted(Path(__file__).parent.glob("*"))
    parser.add_argument("--data", type=Path, nargs="+", default=examples, help="text files; these examples without it")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--ulysses-size", type=int, help="what kv heads and ranks have in common without it")
    parser.add_argument("--ring-size", type=int, help="the rest of the ranks without it")
    parser.add_argument("--lora-rank", type=int, default=0, help="of adapters (peft); 0 trains all weights")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--activation-offload", action="store_true", help="checkpoints of layers in the host's memory")
    parser.add_argument("--output", type=Path, help="where to save the trained model")
    return parser.parse_args()


def load(name: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, and the function from text to token ids."""
    if name is None:
        return LlamaForCausalLM(LlamaConfig(**TINY)), lambda text: list(text.encode())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attention_dropout=0.0)
    return model, lambda text: tokenizer(text)["input_ids"]


def documents(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if path.suffix == ".jsonl":
            yield from (json.loads(line)["text"] for line in path.read_text().splitlines())
        elif path.is_file():
            yield path.read_text()


def pack(texts: Iterator[str], encode: Any, length: int) -> list[dict[str, list[int]]]:
    """Samples of `length` tokens. A document that does not fit goes on in the next sample as one of its own; positions
    restart with each document, whose first token is no target."""
    tokens: list[int] = []
    starts: set[int] = set()
    for text in texts:
        starts.add(len(tokens))
        tokens += encode(text)
    samples = []
    for first in range(0, len(tokens) - length + 1, length):
        ids = tokens[first : first + length]
        positions: list[int] = []
        for at in range(first, first + length):
            positions.append(0 if at == first or at in starts else positions[-1] + 1)
        labels = [token if position else -100 for token, position in zip(ids, positions, strict=True)]
        samples.append({"input_ids": ids, "position_ids": positions, "labels": labels})
    if not samples:
        raise ConfigError(
            f"--seq-length {length} with {len(tokens)} tokens", "a sample is that long", "give more --data"
        )
    return samples


def add_lora(model: Any, rank: int) -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(f"--lora-rank {rank}", "it needs the package peft", "pip install 'megasp[hf]'") from None
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    frozen_on_gpu = args.lora_rank and torch.cuda.is_available()
    model, encode = load(args.model, torch.bfloat16 if frozen_on_gpu else torch.float32)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    ulysses = args.ulysses_size or math.gcd(
        ranks // (args.ring_size or 1), model.config.get_text_config().num_key_value_heads
    )
    ring = args.ring_size or max(1, ranks // ulysses)
    state = parallel_state.initialize_model_parallel(ulysses_size=ulysses, ring_size=ring)
    if args.lora_rank:
        model = add_lora(model, args.lora_rank)
    model, collate = sequence_parallel(
        model, state, tiled_mlp=True, chunked_loss=True, activation_offload=args.activation_offload
    )
    samples = pack(documents(args.data), encode, args.seq_length)
    if state.rank == 0:
        print(f"{len(samples)} samples of {args.seq_length} tokens, layout {state.layout.name}")
    on_cpu = state.device.type == "cpu"
    training = TrainingArguments(
        output_dir=str(args.output or "hf-long-context"),
        use_cpu=on_cpu,
        bf16=not on_cpu,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        gradient_checkpointing=True,
        max_steps=args.steps,
        learning_rate=args.lr,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(model, training, train_dataset=samples, data_collator=collate)
    trainer.train()
    if args.output:
        trainer.save_model(str(args.output))
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"hf_long_context_finetune: {error}") from None
