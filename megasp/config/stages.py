"""Which layers each pipeline stage holds: balanced by work, as flags say, or as a layout string says."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megasp.config.layout_string import parse
from megasp.config.pipeline import PipelinePlan
from megasp.config.schema import Config, ModelConfig
from megasp.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """What a stage holds.

    Attributes:
        number: its place in the model.
        layers: numbers of its layers.
        first: whether the embedding is here; `last`: the final norm, the head and the loss.
        cost: its share of the model's work.
    """

    number: int
    layers: range
    first: bool
    last: bool
    cost: float

    def describe(self) -> str:
        """`embedding, layers 0-7`"""
        span = f"{self.layers.start}-{self.layers.stop - 1}" if len(self.layers) > 1 else str(self.layers.start)
        layers = f"layer{'s' * (len(self.layers) > 1)} {span}" if self.layers else ""
        return ", ".join(part for part in ("embedding" * self.first, layers, "head" * self.last) if part)


def split(config: Config) -> list[Stage]:
    """The stages of a configuration, in the order of the model.

    Raises:
        ConfigError: the layers cannot be split as the flags say.
    """
    parallel = config.parallel
    ends = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    layout = parallel.pipeline_model_parallel_layout
    return list(_split(config.model, config.training.seq_length, config.pipeline, layout, ends))


@cache  # a search for a layout asks tens of thousands of times
def _split(
    model: ModelConfig, seq_length: int, plan: PipelinePlan, layout: str | None, ends: tuple[int | None, int | None]
) -> tuple[Stage, ...]:
    number, costs = plan.stages, _costs(model, seq_length)
    if layout is not None:
        if ends != (None, None):
            raise ConfigError(
                "--pipeline-model-parallel-layout and --decoder-first/last-pipeline-num-layers",
                "both say which layers are where",
                "leave one out",
            )
        counts = parse(layout, model.num_layers)
    else:
        counts = _balanced(model.num_layers, number, ends, costs, plan.chunks)
    starts = [sum(counts[:stage]) for stage in range(number)]
    work = [_cost(stage, number, counts[stage], costs) for stage in range(number)]
    total = sum(work)
    return tuple(
        Stage(stage, range(start, start + count), stage == 0, stage == number - 1, cost / total)
        for stage, (start, count, cost) in enumerate(zip(starts, counts, work, strict=True))
    )


Costs = tuple[float, float, float]
"""Of a layer, the embedding and the head."""


def _costs(model: ModelConfig, seq_length: int) -> Costs:
    """Multiply-adds of a token: every weight once, attention's two products over half the sequence; an embedding only
    copies its row."""
    queries, keys = (heads * model.head_dim for heads in (model.num_attention_heads, model.kv_heads))
    attention = model.hidden_size * 2 * (queries + keys) + seq_length * queries
    mlp = model.hidden_size * model.mlp_size * (3 if model.swiglu else 2)
    return attention + mlp, model.hidden_size, model.hidden_size * (model.vocab_size or 0)


def _cost(stage: int, stages: int, layers: int, costs: Costs) -> float:
    layer, embedding, head = costs
    return layers * layer + (stage == 0) * embedding + (stage == stages - 1) * head


def _balanced(
    num_layers: int, stages: int, ends: tuple[int | None, int | None], costs: Costs, chunks: int
) -> list[int]:
    """Layers of each stage. The next layer goes to the stage that has least to do, which makes the largest stage as
    small as it can be; every stage has one at least."""
    fixed = {stage: n for stage, n in zip((0, stages - 1), ends, strict=True) if n is not None}
    if fixed and (chunks > 1 or stages == 1):
        raise ConfigError(
            "--decoder-first/last-pipeline-num-layers "
            + (f"with {chunks} virtual stages a rank" if chunks > 1 else "on pipeline-model-parallel-size 1"),
            "they name the layers of the first and the last of several ranks",
            "use --pipeline-model-parallel-layout" if chunks > 1 else "leave them out",
        )
    counts = [fixed.get(stage, 1) for stage in range(stages)]
    open_stages = [stage for stage in range(stages) if stage not in fixed]
    if min(counts) < 1 or sum(counts) > num_layers or (sum(counts) < num_layers and not open_stages):
        said = f" with {' and '.join(f'{n} in stage {stage}' for stage, n in fixed.items())}" if fixed else ""
        raise ConfigError(
            f"{num_layers} layers over {stages} pipeline stages{said}",
            "every stage holds a layer, and every layer is in one stage",
            f"use at most {num_layers} stages" if stages > num_layers else "change how many layers the ends hold",
        )
    heap = [(_cost(stage, stages, counts[stage], costs), stage) for stage in open_stages]
    heapq.heapify(heap)
    for _ in range(num_layers - sum(counts)):
        least = heap[0][1]
        counts[least] += 1
        heapq.heapreplace(heap, (_cost(least, stages, counts[least], costs), least))
    return counts


def table(stages: Sequence[Stage], owner: Sequence[int]) -> list[str]:
    """The stages for a person, a line each; `owner` is the pipeline rank of each stage."""
    return [
        f"  stage {stage.number:<3} on pipeline rank {owner[stage.number]:<3} {stage.cost:6.1%} of the work: "
        + stage.describe()
        for stage in stages
    ]
