"""Published training rates as jobs for the planner: `data/published_results.csv`, and what is known of each stack.

A row counts where it says every layout field and a rate, its GPU has measured matmul rates in the hardware tables, and
megasp has its schedule. `reason_left_out` says which of these a row lacks. What a stack does beyond the layout (its
attention kernel, whether element-wise work is fused, what it overlaps) is a fact of its code, said in `STACKS`.
"""

import csv
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megasp.config import stages
from megasp.config.layout import Layout
from megasp.config.load import from_values
from megasp.config.pipeline import PipelinePlan
from megasp.config.schema import ModelConfig
from megasp.planner.hardware import AttentionRates, Curve, Hardware, load
from megasp.planner.job import Job, Redone, Software

FILE = Path(__file__).parent / "data" / "published_results.csv"

GPUS = {"A100-40": "a100-40", "A100-80": "a100-80", "H100": "h100-80", "H200": "h200-141", "B200": "b200-180",
        "GB200": "gb200-186"}  # fmt: skip

NOT_STATED = {
    "SC21-T1": "microbatch and virtual stages are not in the source",
    "MLM-README": "microbatch and virtual stages are not in the source",
    "MEGASCALE": "virtual stages and microbatch are not in the source",
    "DGXC-MT": "what is recomputed is not in the source",
}
"""Sources that leave layout fields open, from their notes."""

BOTH, BACKWARD, NONE = frozenset({"forward", "backward"}), frozenset({"backward"}), frozenset[str]()

MEGATRON = Software("fused", True, BOTH, 2, 2)
ZERO_BUBBLE = Software("fused softmax", True, NONE, 4, overlap_messages=False)
"""Scores in memory, as its peaks show; its scripts have --no-overlap-p2p-communication."""
NANOTRON = Software("flash", False, NONE, 4, accumulate_bytes=10, overlap_messages=False)
"""A microbatch's bf16 gradients are added to fp32 sums by a kernel of their own (optim/gradient_accumulator.py); each
message waits for its transfer, its shape's before it (parallel/pipeline_parallel/p2p.py)."""

STACKS = {
    # Transformer Engine, cuDNN attention, user-buffer overlap of tensor parallelism, bf16 gradients in the recipes.
    "NeMo/Megatron-Core": MEGATRON,
    "Megatron-Bridge": MEGATRON,
    "Megatron-LM core r0.8.0": MEGATRON,
    "MaxText": MEGATRON,  # XLA fuses and schedules collectives asynchronously; cuDNN attention
    "Megatron-LM": MEGATRON,
    "Megatron-LM 2022": Software("fused softmax", True, NONE, 4, overlap_messages=False),
    "zero-bubble (1F1B)": ZERO_BUBBLE,
    "zero-bubble (1F1B-I)": ZERO_BUBBLE,
    "llm-foundry (PyTorch FSDP)": Software("triton", False, NONE, 2),  # eager PyTorch
    "torchtitan": Software("flash", True, NONE, 4),  # torch.compile
    "fms-fsdp": Software("flash", True, NONE, 2),  # torch.compile
    "nanotron": NANOTRON,
    # Without DDP: `sync_gradients_across_dp(reduce_scatter=False)` after the last backward (trainer.py).
    "nanotron ZeRO-1": dataclasses.replace(NANOTRON, overlap_gradients=False, whole_gradients=True),
    "InternEvo": Software("flash", True, NONE, 2),
    "DistFlashAttn (ring)": Software("flash", False, NONE, 2, 2),  # on Hugging Face's model code
    "DeepSpeed-Ulysses": Software("flash", False, NONE, 2),
    "Megatron-LM (TP+SP)": Software("flash", True, NONE, 4),
}

NETWORKS = {"DFA": (12.5e9, 8), "INTERNEVO": (12.5e9, 4)}
"""Bytes a second of a port and ports of a node, where the source says another network than the GPU's usual one. DFA
says "100 Gbps InfiniBand"; its 16-way tensor parallelism sends more than one such port a node can carry in its time."""

TRITON = 1 / 1.8
"""The Triton kernel of 2023 by FlashAttention-2's rate, which is 1.3 to 2.5 times as high (arXiv 2307.08691, 4.1)."""


@dataclass(frozen=True)
class Row:
    """One measured layout."""

    values: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def number(self, name: str, default: int = 1) -> int:
        return int(float(self.values[name])) if self.values[name] else default

    @property
    def reason_left_out(self) -> str | None:
        """Why it is not compared, or None."""
        if self["source"] in NOT_STATED:
            return NOT_STATED[self["source"]]
        if self["gpu_type"] not in GPUS:
            return f"no measured matmul rate of a {self['gpu_type']}"
        if self["framework"].endswith("(ZB-2p)"):
            return "schedule ZB-2p, which megasp has not"
        for field in ("global_batch", "micro_batch", "recompute"):
            if not self[field]:
                return f"{field.replace('_', ' ')} is not in the source"
        if "not stated" in self["notes"] or "policy not stated" in self["recompute"]:
            return "a layout field is not in the source"
        if not self["tokens_per_s_per_gpu"] and not self["step_time_s"]:
            return "no rate"
        if self["framework"] not in STACKS:
            return "offload-bound stack whose host is not described"
        if "full-block on 5 layers/stage" in self["recompute"]:
            return "which layers are recomputed depends on how the source counts stages"
        return None

    @property
    def hardware(self) -> Hardware:
        made = load(GPUS[self["gpu_type"]])
        slower = {
            direction: {head: Curve(c.sizes, tuple(r * TRITON for r in c.rates)) for head, c in curves.items()}
            for direction, curves in vars(made.attention["flash"]).items()
        }
        made = dataclasses.replace(made, attention={**made.attention, "triton": AttentionRates(**slower)})
        if self["source"] in NETWORKS:
            return made.with_network(*NETWORKS[self["source"]])
        return made.with_network(25e9, 8) if "a3mega" in self["notes"] else made

    @cached_property
    def seconds(self) -> float:
        """The measured step."""
        if self["step_time_s"]:
            return float(self["step_time_s"])
        tokens = self.number("global_batch") * self.number("seq_len")
        return tokens / float(self["tokens_per_s_per_gpu"]) / self.number("gpus")

    @property
    def group(self) -> tuple[str, str]:
        """Model and kind of GPU and precision: rows within which a planner must rank."""
        return self["model"], f"{self['gpu_type']} {self['precision'][:3]}"

    @property
    def model(self) -> ModelConfig:
        heads, kv, tp = self.number("heads"), self.number("kv_heads"), max(self.number("tp"), self.number("ulysses"))
        if heads % tp:  # the source pads the heads
            heads = kv = -(-heads // tp) * tp
        return ModelConfig(
            num_layers=self.number("layers"),
            hidden_size=self.number("hidden"),
            ffn_hidden_size=self.number("ffn"),
            num_attention_heads=heads,
            group_query_attention=kv != heads,
            num_query_groups=kv if kv != heads else None,
            kv_channels=self.number("head_dim"),
            vocab_size=self.number("vocab"),
            swiglu=self["mlp"] == "swiglu",
            position_embedding_type="rope" if self["mlp"] == "swiglu" else "learned_absolute",
            untie_embeddings_and_output_weights=self["tied"] != "1",
            hidden_dropout=0.0,
        )

    @property
    def stack(self) -> str:
        """Its code base, as `STACKS` names it."""
        if self["source"] == "K22":
            return "Megatron-LM 2022"
        return self["framework"] + " ZeRO-1" * (self["framework"] == "nanotron" and self["zero_stage"] == "1")

    @property
    def stage_layout(self) -> str:
        """Which layers are where, as the source's code splits them, in words of --pipeline-model-parallel-layout."""
        stages = self.number("pp") * self.number("vpp")
        sizes = {name: self.number(name) for name in ("layers", "hidden", "ffn", "vocab")}
        split = by_cost(stages, **sizes) if self["framework"] == "nanotron" else evenly(sizes["layers"], stages)
        return "E" + "|".join("t" * layers for layers in split) + "L"

    @property
    def job(self) -> Job:
        dp, cp, ulysses = self.number("dp"), self.number("cp"), self.number("ulysses")
        inner = {"INTERNEVO": 8}.get(self["source"], 128 if "fsdp=128" in self["notes"] else dp)
        layout = Layout(
            pp=self.number("pp"), dp_outer=max(1, dp // inner), dp_inner=min(inner, dp), ring=cp, ulysses=ulysses,
            tp=self.number("tp"),
        )  # fmt: skip
        model, chunks = self.model, self.number("vpp")
        plan = PipelinePlan.choose(None, layout.pp, chunks if layout.pp > 1 and chunks > 1 else None)
        config = from_values(
            dataclasses.asdict(model)
            | {"seq_length": self.number("seq_len"), "pipeline_model_parallel_size": layout.pp}
            | ({"num_virtual_stages_per_pipeline_rank": chunks} if plan.chunks > 1 else {})
            | ({"pipeline_model_parallel_layout": self.stage_layout} if layout.pp > 1 else {})
        )  # fmt: skip
        return Job(
            model=model,
            layout=layout,
            stages=tuple(stages.split(config)),
            plan=plan,
            seq_length=self.number("seq_len"),
            micro_batch=self.number("micro_batch"),
            microbatches=max(1, self.number("global_batch") // (self.number("micro_batch") * dp)),
            sequence_parallel=self["megatron_sp"] == "1",
            ring_mode="lightseq" if self["framework"].startswith("DistFlashAttn") else "p2p",  # the same paper
            precision="fp8" if self["precision"].startswith("FP8") else "bf16",
            zero=self.number("zero_stage", 0),
            recompute=_recompute(self["recompute"]),
            offload_activations=0.5 if "offload 40 layers" in self["offload"] else 0.0,
            software=STACKS.get(self.stack, Software()),  # memory is asked of others, too
        )


def evenly(layers: int, stages: int) -> list[int]:
    """Megatron-LM splits evenly. Where that does not go, its users count embedding and head as a layer each (the
    zero-bubble paper, and NeMo's --account-for-embedding-in-pipeline-split and -loss-)."""
    each, left = divmod(layers, stages)
    if not left:
        return [each] * stages
    each, left = divmod(layers + 2, stages)
    assert not left, f"{layers} layers over {stages} stages"
    return [each - 1, *[each] * (stages - 2), each - 1]


def by_cost(stages: int, layers: int, hidden: int, ffn: int, vocab: int) -> list[int]:
    """nanotron's `build_model` (models/base.py): a stage takes blocks until their summed cost passes its share, the
    block that passes it included. Costs are elements of a layer's matrices, 4 h^2 of attention whatever the kv heads,
    and of the head."""
    layer, head = hidden * (4 * hidden + 3 * ffn), hidden * vocab
    share = (layers * layer + head) / stages
    split, stage = [0] * stages, 0
    for number in range(1, layers + 1):
        split[stage] += 1
        stage += number * layer > (stage + 1) * share
    return split


def _recompute(words: str) -> Redone:
    if words.startswith("full at FlashAttn"):
        return Redone(0.0, 1.0, 1.0, 1.0)
    if words.startswith("full-block on 5 of 32"):
        return Redone(*4 * [5 / 32])
    if words.startswith("full"):
        return Redone(1.0, 1.0, 1.0, 1.0)
    if words.startswith("selective-op"):  # keeps attention and every second matrix product
        return Redone(0.0, 0.5, 0.5, 1.0)
    if words == "selective every 2nd layer":
        return Redone(*4 * [0.5])
    if "MLP recomputed" in words:
        return Redone(mlp=1.0, elementwise=0.5)
    if words.startswith("selective:"):
        return Redone(float("core_attn" in words), 0.0, float("mlp" in words), 0.5)
    if words.startswith("selective"):
        return Redone(core_attention=1.0)
    return Redone()


def rows() -> list[Row]:
    """Every row of the file."""
    with FILE.open(newline="") as file:
        return [Row(values) for values in csv.DictReader(file)]
