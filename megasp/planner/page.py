"""The report as one HTML file: answers, where their time and memory go, the pipeline's timeline. No script in it."""

from html import escape

from megasp.pipeline import draw
from megasp.planner import attention, report
from megasp.planner.layer_time import COMPONENTS
from megasp.planner.rates import Coefficients, Rates
from megasp.planner.search import Found, Plan
from megasp.planner.space import Request
from megasp.planner.step_time import stage_times, step_time, timeline

COLOURS = (
    "#4878a8", "#7aa6da", "#a8c8e8", "#9a9a9a", "#c8b070", "#e2a14a", "#d87838", "#b85838", "#a04868", "#805890",
    "#8bbf73", "#5a9a50", "#b0b0b0", "#d0d0d0",
)  # fmt: skip

DRAWN_MICROBATCHES = 3
"""Times the pipeline's ranks: so many microbatches are drawn at most."""

DRAWN_ACTIONS = 120
"""Forwards of a rank that are drawn at most, where as many microbatches as ranks have no more."""

ACTIONS = {"F": "forward", "B": "backward", "W": "weight gradients, where apart"}
"""Kinds of a pipeline's actions, as its key names them."""

OUTSIDE = "outside PyTorch, and what its allocator cannot use (assumed)"

STYLE = """body{font:15px/1.5 sans-serif;max-width:1240px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child,td.words,th.words{text-align:left}
.wide{overflow-x:auto}
.row{display:flex;align-items:center;margin:.2em 0}.row span{flex:0 0 18em;overflow-wrap:anywhere}
.bar{display:flex;flex:1;height:1.5em;background:#ececec}
.key span{display:inline-block;margin-right:1.2em}.key i{display:inline-block;width:.9em;height:.9em;margin-right:.4em}
svg{max-width:100%;height:auto}
@media(max-width:700px){.row{display:block}}"""


def html(found: Found, request: Request, top: int) -> str:
    """The page."""
    plans = found.plans[:top]
    training = request.config.training
    where = f"{request.gpus} x {request.hardware.name}"
    title = f"{where}, {training.seq_length:,} tokens, batch {training.global_batch_size:,}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _table(plans, request),
        *(f"<p>{escape(line)}</p>" for line in attention.compared(plans[0].time, plans[0].config, request.hardware)),
        "<h2>Where the time goes</h2>",
        _key({report.WORDS[name]: colour for name, colour in _shades(plans).items()}),
        *(_time_bar(plan, plans[-1].time.seconds) for plan in plans),
        f"<h2>Memory of each pipeline rank, of {request.hardware.memory / 1e9:.0f} GB</h2>",
        _memory(plans[:3], request),
        f"<h2>The pipeline of {escape(plans[0].layout.name)}</h2>",
        _timeline(plans[0], request),
        "<h2>How much it depends on what was assumed</h2>",
        _sensitivity(plans, request),
        "<h2>What else was looked at</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in report.rejections(found, request)) + "</ul>",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>" + "\n".join(sections) + "</body></html>\n"
    )


def _table(plans: list[Plan], request: Request) -> str:
    rows = [
        f"<tr><td>{escape(plan.layout.name)}</td><td>{plan.time.seconds:.4g}</td>"
        f"<td>{plan.time.tokens_per_second_per_gpu:,.0f}</td><td>{report.mfu(plan, request):.1%}</td>"
        f"<td>{plan.time.bubble:.1%}</td><td>{plan.peak / 1e9:.1f}</td>"
        f'<td class="words">{escape(report.options(plan))}</td></tr>'
        for plan in plans
    ]
    head = "".join(f"<th>{name}</th>" for name in ("layout", "s/step", "tokens/s/GPU", "MFU", "bubble", "GB/GPU"))
    return f'<div class="wide"><table><tr>{head}<th class="words">beside</th></tr>{"".join(rows)}</table></div>'


def _key(colours: dict[str, str]) -> str:
    items = (f'<span><i style="background:{colour}"></i>{escape(words)}</span>' for words, colour in colours.items())
    return f'<p class="key">{"".join(items)}</p>'


def _row(words: str, parts: list[tuple[str, float, str]], whole: float) -> str:
    """A name, and coloured parts of a whole: (words, size, colour)."""
    cells = (
        f'<div style="width:{100 * size / whole:.2f}%;background:{colour}" title="{escape(said)}"></div>'
        for said, size, colour in parts
        if size > 0
    )
    return f'<div class="row"><span>{escape(words)}</span><div class="bar">{"".join(cells)}</div></div>'


def _shades(plans: list[Plan]) -> dict[str, str]:
    """Components that some answer has, with their colours."""
    seen = {name for plan in plans for name, seconds in plan.time.parts.items() if seconds > 0}
    return {name: colour for name, colour in zip(COMPONENTS, COLOURS, strict=True) if name in seen}


def _time_bar(plan: Plan, longest: float) -> str:
    parts = [
        (f"{report.WORDS[name]}: {seconds:.3g} s, {seconds / plan.time.seconds:.1%}", seconds, colour)
        for name, colour in zip(COMPONENTS, COLOURS, strict=True)
        if (seconds := plan.time.parts.get(name, 0.0)) > 0
    ]
    return _row(f"{plan.layout.name}, {plan.time.seconds:.4g} s", parts, max(longest, plan.time.seconds))


def _memory(plans: list[Plan], request: Request) -> str:
    """Bars of every pipeline rank, a part in one colour in all of them."""
    names = list(dict.fromkeys(name for plan in plans for rank in plan.memory for name in rank.parts))
    shades = dict(zip(names, COLOURS, strict=False)) | {OUTSIDE: COLOURS[-1]}
    lines = [_key(shades)]
    for plan in plans:
        lines.append(f"<h3>{escape(plan.layout.name)}</h3>")
        for rank in plan.memory:
            sizes = rank.parts | {OUTSIDE: rank.needed - rank.allocated}
            parts = [(f"{name}: {size / 1e9:.2f} GB", size, shades[name]) for name, size in sizes.items()]
            host = f", host {rank.host / 1e9:.1f}" if rank.host else ""
            lines.append(_row(f"rank {rank.rank}: {rank.needed / 1e9:.1f} GB{host}", parts, request.hardware.memory))
    return "".join(lines)


def _timeline(plan: Plan, request: Request) -> str:
    job, rates = plan.time.job, Rates(request.hardware)
    ranks = job.plan.ranks
    if ranks == 1:
        return "<p>One pipeline rank: microbatches run one after another.</p>"
    rounds = max(1, min(DRAWN_MICROBATCHES, DRAWN_ACTIONS // (ranks * job.plan.chunks)))
    number = min(job.microbatches, rounds * ranks)
    line = timeline(job, rates, stage_times(job, rates), number)
    kinds = {"B" if action.kind == "I" else action.kind for row in line.schedule.rows for action in row}
    key = {words: draw.COLOURS[kind] for kind, words in ACTIONS.items() if kind in kinds} | {"idle": draw.IDLE}
    chunks = f", {job.plan.chunks} chunks a rank, later ones paler" if job.plan.chunks > 1 else ""
    words = f"<p>{job.plan.schedule}, {number} of {job.microbatches} microbatches{chunks}</p>"
    return words + _key(key) + draw.svg(line)


def _sensitivity(plans: list[Plan], request: Request) -> str:
    """The answers under other coefficients: does the best stay the best?"""
    base = Coefficients()
    changes = {
        "as assumed": base,
        "network 25% slower": Coefficients(network=0.75 * base.network),
        "matrix products 10% slower": Coefficients(matmul=0.9 * base.matmul),
        "attention 25% slower": Coefficients(attention=0.75 * base.attention),
        "tensor parallel communication not hidden": Coefficients(hidden_tensor=0.0),
        "twice the time per layer that is not compute": Coefficients(layer_seconds=2 * base.layer_seconds),
    }
    head = "".join(f"<th>{escape(plan.layout.name)}</th>" for plan in plans)
    rows = []
    for words, fit in changes.items():
        seconds = [step_time(plan.time.job, Rates(request.hardware, fit)).seconds for plan in plans]
        cells = "".join(
            f"<td>{'<b>' * (s == min(seconds))}{s:.4g} s{'</b>' * (s == min(seconds))}</td>" for s in seconds
        )
        rows.append(f"<tr><td>{words}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
