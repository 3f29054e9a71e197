"""The account of memory: what each rank holds at the fullest moment of a step, by component, in closed form.

Every part of the program states its own bytes beside its code (`*_footprint`, `state_bytes`); here they are added up
for a rank of a layout. Beside these a GPU holds its context, the libraries' workspaces and what its allocator cannot
use: some 1 to 3 GB.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megasp.config.context_parallel import split_context
from megasp.config.kernels import choose_kernel
from megasp.config.layout import Layout
from megasp.config.schema import Config
from megasp.config.stages import Stage, split
from megasp.config.tiles import head_bytes, mlp_tiles
from megasp.data_parallel.memory import Sharding, StateBytes, stage_weights
from megasp.errors import ConfigError
from megasp.footprint import pinned
from megasp.model import linear_kernels
from megasp.model import memory as model_memory
from megasp.model.memory import Sizes
from megasp.pipeline.memory import Peak, StageBytes, peak
from megasp.pipeline.schedules import placement, schedule
from megasp.sequence_parallel.memory import AttentionSizes
from megasp.training.host_optimizer import in_transit

COMPONENTS = (
    "parameters", "master weights", "gradients", "optimizer states", "gathered weights", "reduction buffers",
    "kept activations", "working memory", "pipeline messages",
)  # fmt: skip
"""Of what a device holds."""

COPY = "copy for a checkpoint"
"""Of what the host does."""


@dataclass(frozen=True)
class Account:
    """Bytes of one rank.

    Attributes:
        rank: a rank of this kind; `pipeline_rank`: its place in the pipeline.
        states: what it holds all the time.
        peak: the fullest moment of its step.
        layer: kind -> what a layer keeps of one microbatch.
        tokens: of one microbatch on this rank.
        host: component -> bytes in the host's memory at that moment.
    """

    rank: int
    pipeline_rank: int
    states: StateBytes
    peak: Peak
    layer: dict[str, int]
    tokens: int
    host: dict[str, int]

    @property
    def static(self) -> int:
        """What is held all the time."""
        s = self.states
        return s.parameters + s.masters + (s.gradients if s.buffered else 0) + s.optimizer

    @property
    def total(self) -> int:
        """At the fullest moment of the step."""
        return self.static + max(self.peak.total, self.states.stepped)

    @property
    def fullest(self) -> str:
        """The action at whose time most is held, such as 0B3: the backward of microbatch 3 on stage 0."""
        return str(self.peak.action)

    @property
    def on_host(self) -> int:
        """All that is in the host's memory."""
        return sum(self.host.values())

    def rows(self) -> list[tuple[str, int]]:
        """Component -> bytes, which add up to `total`."""
        s, p = self.states, self.peak
        gradients = s.gradients if s.buffered else p.gradients
        held = s.parameters + min(0, p.gathered), s.masters, gradients, s.optimizer, max(0, p.gathered), p.buffers
        rows = dict(zip(COMPONENTS, (*held, p.activations, p.working, p.messages), strict=True))
        rows["optimizer step"] = self.total - sum(rows.values())
        return [(name, size) for name, size in rows.items() if size]


def account(
    config: Config,
    layout: Layout,
    pipeline_rank: int = 0,
    device: str = "cuda",
    zero: int | None = None,
    gradient_item: int | None = None,
) -> Account:
    """The account of the ranks at one place of the pipeline. Ranks that differ elsewhere hold the same, but for uneven
    heads.

    Args:
        config: validated for this layout.
        device: whose kernels are meant.
        zero, gradient_item: ZeRO stage, and bytes of a gradient's element, where they are not the configuration's.
    """
    model, plan, sizes = config.model, config.pipeline, sizes_of(config, layout, device)
    owner = placement(plan.schedule, plan.ranks, plan.chunks)
    mine = [stage for stage in split(config) if owner[stage.number] == pipeline_rank]
    layer = model_memory.layer_parameters(model, layout.tp)
    ends = {stage.number: model_memory.end_parameters(model, layout.tp, stage.first, stage.last) for stage in mine}
    elements = sum(len(stage.layers) * layer + sum(ends[stage.number].values()) for stage in mine)
    if gradient_item:
        made = min(sizes.gradient, gradient_item)
        sizes = replace(sizes, gradient=made, head_gradient=made)
    sharding = sharding_of(config, layout, sizes, zero, gradient_item)
    states = sharding.states(elements)
    stages = {stage.number: _stage(config, sizes, stage, sharding) for stage in mine}
    steps = schedule(plan.schedule, plan.ranks, config.num_microbatches(layout), plan.chunks)
    fullest = peak(steps, pipeline_rank, stages, sizes.rows * model.hidden_size * sizes.item)
    live = Counter(fullest.live) + Counter([fullest.action.stage] * (fullest.action.kind == "F"))
    tensors = [n for stage in mine for n in [*model_memory.matrices(model, layout.tp)] * len(stage.layers)]
    tensors += [count for end in ends.values() for count in end.values()]
    host = _host(config, sharding, states.host, tensors)
    activations = sum(count * sum(piece.host for piece in stages[number].pieces) for number, count in live.items())
    activations += max(piece.host_working for stage in stages.values() for piece in stage.pieces)
    host |= {"activations": activations} if activations else {}
    return Account(
        layout.rank(dict.fromkeys(("dp_outer", "dp_inner", "ring", "ulysses", "tp"), 0) | {"pp": pipeline_rank}),
        pipeline_rank,
        states,
        fullest,
        model_memory.layer_footprint(model, sizes, config.activations.recompute).kept,
        sizes.tokens,
        host,
    )


def _host(config: Config, sharding: Sharding, states: dict[str, int], tensors: Sequence[int]) -> dict[str, int]:
    """Component -> bytes in the host's memory, beside activations. What is pinned takes powers of two, by tensor.

    Args:
        tensors: elements of this rank's weights, but for norms and biases.
    """
    held, wide = dict(states), sharding.wide
    shards = [-(-count // sharding.shards) if sharding.zero else count for count in tensors]
    if sharding.host_weights:
        held |= dict.fromkeys(("master weights", "gradients"), sum(pinned(count * wide) for count in shards))
    if sharding.host_share:
        held["in transit"] = in_transit(max(shards), sharding.item)
    if config.checkpoint.async_save:
        copies = 1 if config.checkpoint.no_save_optim else 3
        on_host = config.offload.moved_share
        held[COPY] = copies * sum(
            round(on_host * count * wide + (1 - on_host) * pinned(count * wide)) for count in shards
        )
    return held


def check_host_memory(config: Config, layout: Layout, ranks: int, memory: int) -> None:
    """Refuse to offload more than there is room for.

    Args:
        ranks: on this machine; `memory`: its bytes.
    Raises:
        ConfigError: they need more.
    """
    activations, saves = config.activations, config.checkpoint.async_save
    kept_there = activations.cpu_offloading_activations or activations.cpu_offloading_attention
    if not (config.offload.optimizer_cpu_offload or kept_there or saves):
        return
    fullest = max((account(config, layout, rank) for rank in range(layout.pp)), key=lambda each: each.on_host)
    copy = fullest.host.get(COPY, 0)
    needed = ranks * (fullest.on_host - copy) + writers(layout, ranks) * copy
    if needed > memory:
        held = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in fullest.host.items())
        raise ConfigError(
            f"{needed / 1e9:.0f} GB in the memory of a host that has {memory / 1e9:.0f}",
            f"each of its {ranks} ranks keeps {fullest.on_host / 1e9:.1f} GB there ({held})"
            + (f", the copy on the {writers(layout, ranks)} that write checkpoints" if copy else ""),
            ("save without --async-save, " if saves else "")
            + "use a smaller --optimizer-offload-fraction, shard over more ranks by "
            "--data-parallel-sharding-strategy, or use fewer ranks a machine",
        )


def writers(layout: Layout, ranks: int) -> int:
    """How many of a machine's `ranks` write what they hold to a checkpoint: of ranks that hold the same, the first."""
    alike = ("dp_outer",) if layout.zero else ("dp_outer", "dp_inner", "ring", "ulysses")
    places = (layout.coordinates(rank) for rank in range(min(ranks, layout.world_size)))
    return sum(not any(place[axis] for axis in alike) for place in places)


def sizes_of(config: Config, layout: Layout, device: str) -> Sizes:
    """The sizes of one microbatch on a rank, in the layers that compute in fp8 where some do."""
    model, training, context = config.model, config.training, split_context(config)
    tokens = training.micro_batch_size * training.seq_length // layout.cp
    heads, kv_heads = (max(1, count // layout.tp) for count in (model.num_attention_heads, model.kv_heads))
    item = 2 if training.bf16 or training.fp16 else 4
    last = layout.ulysses - 1  # where heads are uneven the last rank has most of them
    dropout = model.attention_dropout
    kernel, _ = choose_kernel(training.attention_backend, device, training.compute_dtype, dropout, model.head_dim)
    attention = AttentionSizes(
        tokens,
        heads,
        kv_heads,
        model.head_dim,
        item,
        training.micro_batch_size,
        layout.ulysses,
        last,
        layout.ring,
        context.ring_mode,
        unfused=kernel == "unfused" or (kernel is None and dropout > 0),
        dropout=dropout > 0,
        repeats_kv=kernel == "fused",
    )
    activations, in_fp8 = config.activations, config.fp8.layers(model.num_layers)
    gradient = 4 if training.widens_gradients(device) else item
    return Sizes(
        tokens,
        training.micro_batch_size,
        item,
        gradient,
        4 if training.fp16 else gradient,
        layout.tp,
        config.parallel.sequence_parallel and layout.tp > 1,
        attention,
        mlp_tiles(config, layout),
        activations.sequence_chunks,
        activations.cpu_offloading_attention,
        head_bytes(config),
        linear_kernels.products(config.fp8, in_fp8.start, model.num_layers),
        config.kernels.norm(device, training.compute_dtype)[0] not in (None, "unfused"),
        config.kernels.compile,
    )


def sharding_of(
    config: Config, layout: Layout, sizes: Sizes, zero: int | None = None, gradient_item: int | None = None
) -> Sharding:
    """How the ranks of a layout share out weights, gradients and optimizer, as `account` takes it."""
    shards, offload = layout.dp_inner * layout.cp, config.offload
    wanted = config.parallel.zero_stage if zero is None else zero
    return Sharding(
        sizes.item,
        sizes.gradient,
        gradient_item or (2 if config.training.grad_reduce_in_bf16 else max(sizes.item, 4)),
        ranks=shards * layout.dp_outer,
        shards=shards,
        zero=wanted if shards > 1 or offload.cpu_offloading_weights else 0,
        once=config.num_microbatches(layout) == 1,
        deferred=config.pipeline.defers_weight_gradients,
        host_share=offload.optimizer_share,
        host_weights=offload.cpu_offloading_weights,
        largest=max(model_memory.matrices(config.model, layout.tp)),
    )


def _stage(config: Config, sizes: Sizes, stage: Stage, sharding: Sharding) -> StageBytes:
    """One microbatch through a stage."""
    model, activations = config.model, config.activations
    products = [linear_kernels.products(config.fp8, number, model.num_layers) for number in stage.layers]
    pieces = model_memory.stage_layers(
        model,
        sizes,
        activations.recompute,
        products,
        activations.offloaded(len(products)),
        sharding.reduces == "always",
    )
    ends = Counter(model_memory.end_parameters(model, sizes.tp, stage.first, stage.last))
    layer, groups = model_memory.layer_parameters(model, sizes.tp), activations.recompute.groups(len(products))
    units: list[list[int]] = [[layer] * len(group) for group, _ in groups]
    beside = [0] * len(units)
    tied = stage.first and stage.last and not model.untie_embeddings_and_output_weights
    if stage.first:
        pieces.insert(0, model_memory.first_footprint(model, sizes))
        units.insert(0, [] if tied else [ends["embedding"]])
        beside.insert(0, ends["positions"])
    if stage.last:
        pieces.append(model_memory.last_footprint(model, sizes))
        units.append([ends["final norm"]])
        beside.append(ends["embedding"] if tied else ends["head"])
    return StageBytes(
        pieces,
        stage_weights(sharding, units, beside, stage.first),
        model_memory.tables(model, sizes),
        sharding.reduces,
        sharding.made != sharding.summed,
        0 < sharding.zero < 3,
        ends["embedding"] * sizes.head_gradient if tied else 0,
    )


def table(accounts: Sequence[Account], measured: Mapping[str, Sequence[int]] | None = None) -> list[str]:
    """Accounts for a person, a column each, in GB of 10^9 bytes; `measured` are rows to stand below the sum."""
    names = list(dict.fromkeys(name for each in accounts for name, _ in each.rows()))
    found = [dict(each.rows()) for each in accounts]
    rows: list[tuple[str, Sequence[int]]] = [(name, [held.get(name, 0) for held in found]) for name in names]
    rows += [("sum", [each.total for each in accounts]), *(measured or {}).items()]
    away = list(dict.fromkeys(name for each in accounts for name in each.host))
    rows += [(f"on the host: {name}", [each.host.get(name, 0) for each in accounts]) for name in away]
    rows += [("on the host: sum", [each.on_host for each in accounts])] if len(away) > 1 else []
    width = max(22, *(len(name) for name, _ in rows))
    lines = [f"{'pipeline rank':{width}}" + "".join(f"{each.pipeline_rank:>10}" for each in accounts)]
    lines += [f"{name:{width}}" + "".join(f"{size / 1e9:10.2f}" for size in sizes) + " GB" for name, sizes in rows]
    return [*lines, f"{'fullest in':{width}}" + "".join(f"{each.fullest:>10}" for each in accounts)]


def by_component(found: Sequence[Mapping[str, int]], width: int = 22) -> list[str]:
    """Component -> bytes of some ranks, a column each, in GB of 10^9 bytes."""
    rows = []
    for name in COMPONENTS:
        if any(name in parts for parts in found):
            cells = "".join(f"{parts.get(name, 0) / 1e9:10.2f}" for parts in found)
            rows.append(f"{name:{width}}{cells} GB")
    return rows


def layer_table(each: Account) -> list[str]:
    """What one layer keeps for its backward, in bytes a token of this rank."""
    width = max(map(len, each.layer), default=0)
    lines = [f"  {name:{width}} {size / each.tokens:10,.0f}" for name, size in each.layer.items()]
    return [*lines, f"  {'sum':{width}} {sum(each.layer.values()) / each.tokens:10,.0f} bytes a token and layer"]
