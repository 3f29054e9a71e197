"""The report as one HTML file: answers, where their time and memory go, the pipeline's timeline. No script in it."""

from html import escape

from megasp.pipeline import draw
from megasp.planner import report
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
"""Times the pipeline's ranks: so many microbatches are drawn."""

STYLE = """body{font:15px/1.5 sans-serif;max-width:1240px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child,td:last-child,th:last-child{text-align:left}
.bar{display:flex;height:1.6em;margin:.2em 0;background:#f4f4f4}
.bar div{overflow:hidden;font-size:11px;color:#fff;text-align:center}
.key span{display:inline-block;margin-right:1.2em}.key i{display:inline-block;width:.9em;height:.9em;margin-right:.4em}
svg{max-width:100%;height:auto}"""


def html(found: Found, request: Request, top: int) -> str:
    """The page."""
    plans = found.plans[:top]
    training = request.config.training
    where = f"{request.gpus} x {request.hardware.name}"
    title = f"{where}, {training.seq_length:,} tokens, batch {training.global_batch_size:,}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _table(plans, request),
        "<h2>Where the time goes</h2>",
        _key(),
        *(_time_bar(plan, plans[-1].time.seconds) for plan in plans),
        f"<h2>Memory of each pipeline rank, of {request.hardware.memory / 1e9:.0f} GB</h2>",
        *(_memory_bars(plan, request) for plan in plans[:3]),
        "<h2>The best answer's pipeline</h2>",
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
        f"<td>{plan.time.bubble:.1%}</td><td>{plan.peak / 1e9:.1f}</td><td>{escape(report.options(plan))}</td></tr>"
        for plan in plans
    ]
    head = "".join(
        f"<th>{name}</th>" for name in ("layout", "s/step", "tokens/s/GPU", "MFU", "bubble", "GB/GPU", "beside")
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _key() -> str:
    items = (
        f'<span><i style="background:{colour}"></i>{escape(report.WORDS[name])}</span>'
        for name, colour in zip(COMPONENTS, COLOURS, strict=True)
    )
    return f'<p class="key">{"".join(items)}</p>'


def _bar(parts: list[tuple[str, float, str]], whole: float) -> str:
    """Coloured parts of a whole: (words, size, colour)."""
    cells = (
        f'<div style="width:{100 * size / whole:.2f}%;background:{colour}" title="{escape(words)}"></div>'
        for words, size, colour in parts
        if size > 0
    )
    return f'<div class="bar">{"".join(cells)}</div>'


def _time_bar(plan: Plan, longest: float) -> str:
    parts = [
        (f"{report.WORDS[name]}: {plan.time.parts.get(name, 0.0):.3f} s", plan.time.parts.get(name, 0.0), colour)
        for name, colour in zip(COMPONENTS, COLOURS, strict=True)
    ]
    return f"<div>{escape(plan.layout.name)}</div>" + _bar(parts, max(longest, plan.time.seconds))


def _memory_bars(plan: Plan, request: Request) -> str:
    lines = [f"<h3>{escape(plan.layout.name)}</h3>"]
    names = list(dict.fromkeys(name for rank in plan.memory for name in rank.parts))
    shades = dict(zip(names, COLOURS, strict=False))
    lines.append(
        '<p class="key">'
        + "".join(f'<span><i style="background:{shades[name]}"></i>{escape(name)}</span>' for name in names)
        + "</p>"
    )
    for rank in plan.memory:
        parts = [(f"{name}: {size / 1e9:.2f} GB", size, shades[name]) for name, size in rank.parts.items()]
        lines.append(f"<div>rank {rank.rank}: {rank.needed / 1e9:.1f} GB</div>" + _bar(parts, request.hardware.memory))
    return "".join(lines)


def _timeline(plan: Plan, request: Request) -> str:
    job, rates = plan.time.job, Rates(request.hardware)
    if job.plan.ranks == 1:
        return "<p>One pipeline rank: microbatches run one after another.</p>"
    number = min(job.microbatches, DRAWN_MICROBATCHES * job.plan.ranks)
    drawing = draw.svg(timeline(job, rates, stage_times(job, rates), number))
    return f"<p>{number} of {job.microbatches} microbatches</p>{drawing}"


def _sensitivity(plans: list[Plan], request: Request) -> str:
    """The answers under other coefficients: does the best stay the best?"""
    base = Coefficients()
    changes = {
        "as assumed": base,
        "network 25% slower": Coefficients(network=0.75 * base.network),
        "matrix products 10% slower": Coefficients(matmul=0.9 * base.matmul),
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
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
