"""Drawings of a simulated schedule: text for a terminal, SVG for a page."""

from megasp.pipeline.schedules import Action
from megasp.pipeline.simulate import Timeline

COLOURS = {"F": "#7aa6da", "B": "#e2a14a", "I": "#e2a14a", "W": "#8bbf73"}

IDLE = "#ececec"

OUTLINED = 5
"""Actions that are narrower, in pixels, have no outline, which would be all that is seen of them."""


def text(timeline: Timeline) -> str:
    """One line a rank; an action is its kind and microbatch, later chunks in lower case, dots are bubbles.

    rank 0  F0 F1 .. .. B0 -- F2 B1 --
    """
    schedule = timeline.schedule
    width = len(str(schedule.microbatches - 1)) + 2  # of the shortest action
    shortest = min(timeline.end[action] - at for action, at in timeline.start.items())
    cells = round(timeline.makespan / shortest)
    lines = []
    for rank, row in enumerate(schedule.rows):
        line = [".".ljust(width - 1, ".") + " "] * cells
        for action in row:
            first, last = (round(times[action] / shortest) for times in (timeline.start, timeline.end))
            line[first:last] = ["-" * (width - 1) + " "] * (last - first)
            line[first] = _label(action, schedule.ranks).ljust(width)
        lines.append(f"rank {rank:<2} {''.join(line).rstrip()}")
    return "\n".join(lines)


def _label(action: Action, ranks: int) -> str:
    return f"{action.kind if action.stage < ranks else action.kind.lower()}{action.microbatch}"


def svg(timeline: Timeline, width: int = 1200) -> str:
    """The same as an SVG document that scales with its page; later chunks are paler."""
    schedule = timeline.schedule
    height, margin = 26, 60
    scale = (width - margin) / timeline.makespan
    whole = height * schedule.ranks + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{whole}" viewBox="0 0 {width} {whole}" '
        'font-family="sans-serif" font-size="11" text-anchor="middle">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for rank, row in enumerate(schedule.rows):
        y = 4 + rank * height
        lines.append(f'<text x="{margin / 2}" y="{y + height / 2 + 2}">rank {rank}</text>')
        lines.append(
            f'<rect x="{margin}" y="{y}" width="{width - margin}" height="{height - 4}" fill="{IDLE}">'
            "<title>idle</title></rect>"
        )
        for action in row:
            x = margin + timeline.start[action] * scale
            w = (timeline.end[action] - timeline.start[action]) * scale
            opacity = 1 - 0.5 * (action.stage // schedule.ranks) / max(1, schedule.stages // schedule.ranks - 1)
            outline = ' stroke="white"' if w > OUTLINED else ""
            what = f"{action.kind} of microbatch {action.microbatch}, stage {action.stage}"
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{height - 4}" fill="{COLOURS[action.kind]}" '
                f'fill-opacity="{opacity:.2f}"{outline}><title>{what}</title></rect>'
            )
            if w > 7 * len(str(action.microbatch)):
                lines.append(f'<text x="{x + w / 2:.1f}" y="{y + height / 2 + 2}">{action.microbatch}</text>')
    return "\n".join([*lines, "</svg>", ""])
