"""A transformers model over split sequences: megasp.huggingface beside DeepSpeed's UlyssesSPAttentionHF.

    python -m benchmarks.huggingface [--ranks 2 4] [--kv-heads 8 2]

Two parts, both through transformers' own interface of attention functions. `exchange`: one attention layer, forward and
backward, s 8192, 16 query heads of 64, with the identity in the place of attention, which leaves collectives and layout
copies. `step`: loss and gradients of a Llama of 4 layers, hidden 512, 8 query heads, vocabulary 32000, s 1024, the same
weights and tokens; losses must agree to 1e-4. "megasp, savers" is the same with tiled_mlp and chunked_loss.

Collectives and bytes of a rank are exact; megasp's must not be more than the peer's. They hold everything: the peer's
gathering of positions in every layer, megasp's check that all ranks hold the same sample, and both count targets.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import ulysses
from benchmarks.contest import Contestant, Outcome, play, ratio, record, table
from benchmarks.trainers import version
from benchmarks.ulysses import Layer, Sent
from megasp import parallel_state
from megasp.config.layout import Layout
from megasp.huggingface import sequence_parallel
from megasp.huggingface.attention import attention_forward
from megasp.parallel_state import ParallelState
from megasp.sequence_parallel import UlyssesAttention, attend

VOCAB = 32000
PEER = "UlyssesSPAttentionHF"


def _state() -> ParallelState:
    return parallel_state.build(Layout(ulysses=dist.get_world_size()), torch.device("cpu"))


def _sent(state: ParallelState) -> Callable[[], Sent]:
    """What left this rank since the last call, over every axis."""
    axes = [state.ulysses, state.cp, state.gradients]

    def sent() -> Sent:
        found = sum(axis.traffic.total_calls for axis in axes), sum(axis.traffic.total_bytes for axis in axes)
        for axis in axes:
            axis.traffic.reset()
        return found

    return sent


def registered_layer(case: ulysses.Case) -> tuple[Layer, Callable[[], Sent]]:
    """The function in transformers' registry, around the identity or attention."""
    state = _state()
    identity = lambda q, k, v: (ulysses._Identity.apply(q, k, v), None)  # noqa: E731
    inner = UlyssesAttention(identity if case.exchange else attend, state.ulysses)
    bound: Any = lambda q, k, v, window, scale: inner(q, k, v)  # noqa: E731

    def layer(*qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)  # [B, S, heads, H] -> as models call it
        return attention_forward(nn.Identity(), q, k, v, None, sample_attention=bound)[0]

    return layer, _sent(state)


ulysses.LAYERS["megasp.huggingface"] = registered_layer


def make_exchange(name: str, case: ulysses.Case) -> Callable[[int], Sent]:
    """One forward and backward of a layer per call (this module registers the layer where processes import it)."""
    return ulysses.make_layer(name, case)


@dataclass(frozen=True)
class Step:
    """A whole model's forward and backward."""

    kv_heads: int
    sequence: int


def _model(step: Step) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=step.kv_heads,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def _tokens(step: Step, index: int) -> torch.Tensor:
    return torch.randint(VOCAB, (1, step.sequence), generator=torch.Generator().manual_seed(index))


def _run(model: nn.Module, batch: dict[str, Any], count: int, sent: Callable[[], Sent]) -> tuple[float, Sent]:
    """The loss of the whole sample, and what was sent for loss and gradients (not for their sums over ranks)."""
    model.zero_grad()
    sent()
    loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    found = sent()
    total = loss.detach()
    dist.all_reduce(total)
    return float(total), found


def make_step(name: str, step: Step) -> Callable[[int], tuple[float, Sent]]:
    return _peer_step(step) if name == PEER else _megasp_step(step, "savers" in name)


def _megasp_step(step: Step, savers: bool) -> Callable[[int], tuple[float, Sent]]:
    state = _state()
    model, collate = sequence_parallel(_model(step), state, tiled_mlp=savers, chunked_loss=savers)
    sent = _sent(state)
    return lambda index: _run(model, collate([{"input_ids": _tokens(step, index)[0]}]), step.sequence - 1, sent)


def _peer_step(step: Step) -> Callable[[int], tuple[float, Sent]]:
    ulysses._deepspeed()
    sent = ulysses._count_collectives()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    model, ranks, rank = _model(step), dist.get_world_size(), dist.get_rank()
    UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", ranks, micro_batch_size=1, seq_length=step.sequence, seq_length_is_variable=False
    )

    def call(index: int) -> tuple[float, Sent]:
        tokens = _tokens(step, index)
        shifted = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        whole = {"input_ids": tokens, "labels": tokens, "shift_labels": shifted}
        whole["position_ids"] = torch.arange(step.sequence)[None]
        batch = {name: x.chunk(ranks, 1)[rank] for name, x in whole.items()}
        return _run(model, batch, step.sequence - 1, sent)

    return call


def _same_loss(results: Any) -> None:
    losses = {name: loss for name, (loss, _) in results.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses


def _report(title: str, outcomes: list[Outcome], sent: dict[str, Sent], line: dict[str, Any]) -> dict[str, Any]:
    print(f"## {title}\n\n{table(outcomes)}\n")
    for outcome in outcomes:
        collectives, count = sent[outcome.contestant.name]
        share = ratio(outcomes[0], outcome).text()
        print(f"- {outcome.contestant.name}: {collectives} collectives, {count:,} bytes; ours / its time {share}")
    print(flush=True)
    ours = sent[outcomes[0].contestant.name]
    assert ours[0] <= sent[PEER][0] and ours[1] <= sent[PEER][1], sent
    return line | {"sent": sent, "contestants": record(outcomes)}


def exchange(ranks: int, kv_heads: int, rounds: int) -> dict[str, Any]:
    case = ulysses.Case(kv_heads, exchange=True)
    names, threads = ("megasp.huggingface", PEER), max(1, 2 // ranks)
    outcomes = play([Contestant(name, make_exchange, (name, case), ranks, threads) for name in names], rounds, 2)
    sent = {outcome.contestant.name: outcome.results[-1] for outcome in outcomes}
    assert sent["megasp.huggingface"] == case.expected(ranks), (sent, case.expected(ranks))
    title = f"Exchange, {ranks} ranks, 16 heads, {kv_heads} kv heads, s {case.sequence}, fp32"
    return _report(title, outcomes, sent, {"mode": "exchange", "ranks": ranks, "kv_heads": kv_heads})


def whole_step(ranks: int, kv_heads: int, sequence: int, rounds: int) -> dict[str, Any]:
    step, threads = Step(kv_heads, sequence), max(1, 2 // ranks)
    names = ("megasp", PEER, "megasp, savers")
    outcomes = play(
        [Contestant(name, make_step, (name, step), ranks, threads) for name in names], rounds, 1, _same_loss
    )
    sent = {outcome.contestant.name: outcome.results[-1][1] for outcome in outcomes}
    title = f"Step, {ranks} ranks, 8 heads, {kv_heads} kv heads, s {sequence}, fp32"
    return _report(title, outcomes, sent, {"mode": "step", "ranks": ranks, "kv_heads": kv_heads, "sequence": sequence})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--sequence", type=int, default=1024, help="of the step")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    lines = []
    for ranks in args.ranks:
        for kv_heads in args.kv_heads:
            lines.append(exchange(ranks, kv_heads, args.rounds))
        lines.append(whole_step(ranks, args.kv_heads[-1], args.sequence, args.rounds))
    versions = [f"torch {torch.__version__}", version("transformers"), version("deepspeed")]
    print(json.dumps({"benchmark": "huggingface", "versions": versions, "rounds": args.rounds, "cases": lines}))


if __name__ == "__main__":
    main()
