"""What a stage of the model holds, in bytes: weights, and the activations of one microbatch, layer by layer.

Every Function states its own bytes beside its code; here they are put together as `gpt.py` and `block.py` run them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from megasp.config.recompute import Recompute
from megasp.config.schema import ModelConfig
from megasp.footprint import Footprint, Part, as_part, chain, joined, pinned, recomputed
from megasp.model.activations import activation_footprint
from megasp.model.dropout import dropout_footprint
from megasp.model.layers import embedding_footprint, sum_footprint
from megasp.model.loss import loss_footprint
from megasp.model.norm import norm_footprint
from megasp.model.products import PLAIN, Products
from megasp.model.rotary import rotary_footprint, tables_footprint
from megasp.model.tiles import chunked_footprint, tiled_footprint
from megasp.sequence_parallel.memory import AttentionSizes, PastBytes, attention_parts

STREAM = "residual stream"


@dataclass(frozen=True)
class Sizes:
    """One microbatch on one rank.

    Attributes:
        tokens: of all its samples, on this rank before tensor parallelism splits them.
        samples: B.
        item: bytes of an element in the compute dtype.
        gradient: of a weight's gradient as it is made, `head_gradient` of the head's.
        tp: tensor-parallel ranks; `sequence_parallel`: they split the residual stream, too.
        attention: how attention is split; its heads are this tensor-parallel rank's.
        dropout: whether dropout is on.
        tiles: of the MLP.
        chunks: of the sequence, one after another; `chunks_on_host`: where what they leave is.
        head_bytes: of the logits that exist at a time; the loss's own choice without it.
        products: how linear layers multiply.
        fused_norms: whether a norm is one kernel; `compiled`: whether the rest between products is.
    """

    tokens: int
    samples: int
    item: int
    gradient: int
    head_gradient: int
    tp: int
    sequence_parallel: bool
    attention: AttentionSizes
    tiles: int = 1
    chunks: int = 1
    chunks_on_host: bool = False
    head_bytes: int | None = None
    products: Products = PLAIN
    fused_norms: bool = False
    compiled: bool = False

    @property
    def split(self) -> int:
        """Ranks that share the residual stream."""
        return self.tp if self.sequence_parallel else 1

    @property
    def rows(self) -> int:
        """Tokens of the residual stream on this rank."""
        return self.tokens // self.split


def layer_parameters(model: ModelConfig, tp: int) -> int:
    """Elements that one rank of `tp` holds of a layer."""
    d, ffn, head = model.hidden_size, model.mlp_size // tp, model.head_dim
    heads, kv = model.num_attention_heads // tp, max(1, model.kv_heads // tp)
    qkv, up = (heads + 2 * kv) * head, ffn * (2 if model.swiglu else 1)
    per_norm = 2 if model.normalization == "LayerNorm" else 1
    norms = per_norm * (2 * d + model.qk_layernorm * 2 * head)
    biases = model.qkv_bias * qkv + model.add_bias_linear * (up + 2 * d)
    return d * (qkv + heads * head + up + ffn) + norms + biases


def norm_parameters(model: ModelConfig) -> int:
    """Elements of a norm of the residual stream."""
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def matrices(model: ModelConfig, tp: int) -> list[int]:
    """Elements of a layer's matrices on one rank of `tp`, fused as they are held."""
    heads, kv = model.num_attention_heads // tp, max(1, model.kv_heads // tp)
    ffn = model.mlp_size // tp
    widths = (heads + 2 * kv) * model.head_dim, heads * model.head_dim, ffn * (2 if model.swiglu else 1), ffn
    return [model.hidden_size * width for width in widths]


def end_parameters(model: ModelConfig, tp: int, first: bool, last: bool) -> dict[str, int]:
    """Elements of what is beside the layers: embedding, positions, final norm, head (none of its own where it is tied
    to an embedding that is here)."""
    table, d = model.padded_vocab_size // tp * model.hidden_size, model.hidden_size
    learned = first and model.position_embedding_type == "learned_absolute"
    own_head = last and (model.untie_embeddings_and_output_weights or not first)
    counts = {
        "embedding": first * table,
        "positions": learned * (model.max_position_embeddings or 1024) * d,
        "final norm": last * norm_parameters(model),
        "head": own_head * table,
    }
    return {name: count for name, count in counts.items() if count}


def _norm(model: ModelConfig, sizes: Sizes, remade: bool = False) -> Part:
    shape = sizes.rows, model.hidden_size, sizes.item
    part = norm_footprint(model.normalization, *shape, "norm output", sizes.fused_norms)
    return replace(part, remade=remade)


def _attention(model: ModelConfig, sizes: Sizes, recompute: Recompute, chunk: Part | None = None) -> list[Part]:
    attention, item, gradient = sizes.attention, sizes.item, sizes.gradient
    remade = recompute.does("layernorm")
    width = (attention.heads + 2 * attention.kv_heads) * attention.head_dim
    parts = [
        _norm(model, sizes, remade),
        sizes.products.keeping_input(remade).footprint(
            "q, k, v", sizes.rows, model.hidden_size, width, item, gradient, sizes.split
        ),
    ]
    heads = sizes.tokens * (attention.heads + attention.kv_heads)
    if model.qk_layernorm:
        shape = heads, model.head_dim, item
        normed = norm_footprint(model.normalization, *shape, "q, k, normed", sizes.fused_norms)
        parts.append(normed)
    if model.position_embedding_type == "rope":
        rotating = heads * (int(model.head_dim * model.rotary_percent) // 2 * 2) * item
        around = heads * model.head_dim * item if model.qk_layernorm else attention.qkv
        parts.append(rotary_footprint(around, rotating, sizes.compiled))
    inner = attention_parts(attention, chunk)
    if recompute.does("core_attn"):
        parts.append(as_part(chain(inner, attention.qkv, "q, k, v"), attention.qkv, "attention output"))
    else:
        parts += inner
    hidden = attention.heads * attention.head_dim
    products = sizes.products.keeping_input(attention.ulysses == 1 and not recompute.does("core_attn"))
    parts.append(products.footprint("residual branch", sizes.tokens, hidden, model.hidden_size, item, gradient))
    return [*parts, *_branch_end(model, sizes), *_dropout(model, sizes)]


def _branch_end(model: ModelConfig, sizes: Sizes) -> list[Part]:
    """What follows a row-parallel product: sum over ranks, and bias."""
    elements, parts = sizes.rows * model.hidden_size, []
    if sizes.tp > 1:
        parts.append(sum_footprint(sizes.tokens * model.hidden_size, sizes.item, sizes.tp, sizes.sequence_parallel))
    if model.add_bias_linear:
        out = elements * sizes.item
        parts.append(Part("residual branch", out, out, keeps_input=False))
    return parts


def _dropout(model: ModelConfig, sizes: Sizes) -> list[Part]:
    elements = sizes.rows * model.hidden_size
    return [dropout_footprint(elements, sizes.item, sizes.compiled)] if model.hidden_dropout else []


def _mlp(model: ModelConfig, sizes: Sizes, recompute: Recompute) -> list[Part]:
    stream, item, gradient = sizes.rows * model.hidden_size * sizes.item, sizes.item, sizes.gradient
    ffn = model.mlp_size // sizes.tp
    up = ffn * (2 if model.swiglu else 1)
    if sizes.tiles > 1:
        tile = replace(sizes, tokens=sizes.tokens // sizes.tiles, tiles=1)
        parts = _mlp(replace(model, hidden_dropout=0.0), tile, Recompute())
        inner = chain(parts, stream // sizes.tiles, STREAM)
        whole = tiled_footprint(inner, stream, sizes.tiles, model.hidden_size * (up + ffn), gradient)
        return [whole, *_dropout(model, sizes)]
    act = activation_footprint(model, sizes.tokens * ffn * item, sizes.compiled)
    norm_again, act_again = recompute.does("layernorm"), recompute.does("mlp_act")
    norm, products = _norm(model, sizes, norm_again), sizes.products
    mlp = [
        products.keeping_input(norm_again).footprint(
            "MLP hidden", sizes.rows, model.hidden_size, up, item, gradient, sizes.split
        ),
        replace(act, remade=act_again),
        products.keeping_input(act_again).footprint(
            "residual branch", sizes.tokens, ffn, model.hidden_size, item, gradient
        ),
    ]
    end, dropped = _branch_end(model, sizes), _dropout(model, sizes)
    if not recompute.does("mlp"):
        return [norm, *mlp, *end, *dropped]
    if norm_again:
        inner = chain([_norm(model, sizes), *mlp, *end], stream, STREAM)
        return [as_part(inner, stream, "residual branch"), *dropped]
    return [norm, as_part(chain([*mlp, *end], stream, "norm output"), stream, "residual branch"), *dropped]


def _layer(model: ModelConfig, sizes: Sizes, recompute: Recompute, chunk: Part | None = None) -> Footprint:
    """A layer, or a `chunk` of the sequence through it."""
    stream = sizes.rows * model.hidden_size * sizes.item
    parts = _attention(model, sizes, recompute, chunk), _mlp(model, sizes, recompute)
    attention, mlp = (chain(half, stream, STREAM, residual=True) for half in parts)
    return joined([attention, mlp])


def _in_chunks(model: ModelConfig, sizes: Sizes) -> Footprint:
    chunks, stream = sizes.chunks, sizes.rows * model.hidden_size * sizes.item
    attention = replace(sizes.attention, tokens=sizes.attention.tokens // chunks)
    tiles = -(-sizes.tiles // chunks)
    one = replace(sizes, tokens=sizes.tokens // chunks, attention=attention, tiles=tiles, chunks=1)
    past = PastBytes.of(attention, chunks, sizes.chunks_on_host)
    attend = past.first(), past.again(chunks - 1, sums=False), past.again(chunks - 2, sums=True)
    weights = layer_parameters(model, sizes.tp)
    first, last, before = (_layer(model, one, Recompute(), part) for part in attend)
    part = chunked_footprint(first, (last, before), stream, past, weights, sizes.gradient)
    found = chain([part], stream, STREAM)
    if not past.host:
        return found
    kept, working = past.on_host
    return replace(found, host=kept, host_working=working)


@cache
def layer_footprint(model: ModelConfig, sizes: Sizes, recompute: Recompute) -> Footprint:
    """A layer that recomputes as `recompute` says, one layer at a time."""
    stream = sizes.rows * model.hidden_size * sizes.item
    layer = _layer(model, sizes, recompute) if sizes.chunks == 1 else _in_chunks(model, sizes)
    shares = sizes.tp if recompute.distributed else 1
    if recompute.granularity == "full":
        return recomputed(layer, stream, name=STREAM, shares=shares)
    if recompute.granularity == "all-but-attention":
        attend = next(part for part in attention_parts(sizes.attention) if part.keeps_output)
        also = {attend.name: attend.output or 0, **attend.kept}
        return recomputed(layer, stream, also, STREAM, shares)
    return layer


def stage_layers(
    model: ModelConfig,
    sizes: Sizes,
    recompute: Recompute,
    products: Sequence[Products],
    offloaded: int = 0,
    reduced: bool = False,
) -> list[Footprint]:
    """The layers of a stage, which multiply by `products`, those that are recomputed together as one; the first
    `offloaded` keep theirs on the host. Gradients of weights are `reduced` layer by layer, or are not.

    Of these the last one's is on the device, too; two layers' are while a forward runs, and while a backward does.
    """

    def layer(number: int, recompute: Recompute) -> Footprint:
        return layer_footprint(model, replace(sizes, products=products[number]), recompute)

    stream = sizes.rows * model.hidden_size * sizes.item
    found: list[Footprint] = []
    away: list[tuple[int, Footprint, int]] = []
    for group, again in recompute.groups(len(products)):
        if not again:
            found.append(layer(group.start, Recompute()))
        elif len(group) == 1:
            found.append(layer(group.start, recompute))
        else:
            shares = sizes.tp if recompute.distributed else 1
            inner = joined([layer(number, Recompute()) for number in group], reduced)
            found.append(recomputed(inner, stream, name=STREAM, shares=shares))
        if group.start < offloaded:
            before = found[-2].total if len(found) > 1 else 0
            away.append((len(found) - 1, found[-1], before))
    for index, piece, before in away:
        found[index] = replace(
            piece,
            kept=piece.kept if index == away[-1][0] else {},
            host=piece.host + sum(map(pinned, piece.kept.values())),
            forward=piece.forward + before,
            backward=piece.backward + before,
            put_off=piece.put_off + before,
            growing=piece.growing + before,
        )
    return found


def first_footprint(model: ModelConfig, sizes: Sizes) -> Footprint:
    """The embedding."""
    elements = sizes.tokens * model.hidden_size
    table = model.padded_vocab_size // sizes.tp * model.hidden_size
    item, gradient = sizes.item, sizes.gradient
    parts = [embedding_footprint(elements, table, item, gradient, sizes.tp, sizes.sequence_parallel)]
    return chain([*parts, *_dropout(model, sizes)], 8 * sizes.tokens, "token ids")


def last_footprint(model: ModelConfig, sizes: Sizes) -> Footprint:
    """The final norm, the head and the loss."""
    d, stream = model.hidden_size, sizes.rows * model.hidden_size * sizes.item
    vocabulary, item = model.padded_vocab_size // sizes.tp, sizes.item
    shape = sizes.tokens, d, vocabulary, item, sizes.head_gradient
    loss = loss_footprint(*shape, sizes.split, sizes.head_bytes, sizes.compiled)
    norm = _norm(model, sizes)
    if sizes.chunks > 1:
        part = _norm(model, replace(sizes, tokens=sizes.tokens // sizes.chunks))
        tile, weights = chain([part], stream // sizes.chunks, STREAM), norm_parameters(model)
        norm = replace(tiled_footprint(tile, stream, sizes.chunks, weights, item), name="norm output")
    return chain([norm, loss], stream, STREAM)


def tables(model: ModelConfig, sizes: Sizes) -> int:
    """Rotary tables, which the layers of a stage share, of one microbatch."""
    return tables_footprint(model, sizes.tokens // sizes.samples, sizes.item)
