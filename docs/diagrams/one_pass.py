"""Draws docs/one_pass.svg: one conversation, sixteen adapters, one forward pass.

python docs/diagrams/one_pass.py
"""

from pathlib import Path

WIDTH, HEIGHT = 880, 330
FONT = "font-family='system-ui, sans-serif'"
INK, MUTED, BASE, LINE = "#1f2933", "#5b6875", "#3b6ea5", "#c3ccd5"
HUES = (12, 40, 75, 110, 150, 185, 215, 245, 275, 305, 330, 350, 25, 95, 165, 230)
NAMES = ("issueResolved", "isConfirming", "wantsAlternatives", "… 13 more")
VERDICTS = ("yes 0.97", "no 0.88", "no 0.96", "…")


def text(x: float, y: float, words: str, *, size: int = 14, fill: str = INK, anchor: str = "start") -> str:
    return f"<text x='{x}' y='{y}' font-size='{size}' fill='{fill}' text-anchor='{anchor}' {FONT}>{words}</text>"


def box(x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "none") -> str:
    return f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='5' fill='{fill}' stroke='{stroke}'/>"


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<path d='M{x1} {y1} L{x2} {y2}' stroke='{MUTED}' stroke-width='1.4' marker-end='url(#tip)' fill='none'/>"


def draw() -> str:
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        "aria-label='One conversation is computed once; sixteen adapters read it in the same forward pass'>",
        f"<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 z' fill='{MUTED}'/></marker></defs>",
        box(0, 0, WIDTH, HEIGHT, "#ffffff"),
        text(12, 34, "one call", size=15, fill=MUTED),
        box(12, 92, 192, 120, "#f4f6f8", stroke=LINE),
        text(24, 118, "Customer: My order", size=13),
        text(24, 138, "never came.", size=13),
        text(24, 160, "Agent: I sent a new one.", size=13),
        text(24, 182, "Customer: Great, bye!", size=13),
        arrow(208, 152, 244, 152),
        box(248, 50, 420, 246, "#fbfcfd", stroke=LINE),
        text(264, 34, "one forward pass of one base model", size=15, fill=MUTED),
        box(264, 110, 178, 84, BASE),
        text(353, 148, "conversation: base tokens,", fill="#ffffff", anchor="middle", size=12),
        text(353, 166, "computed once", fill="#ffffff", anchor="middle", size=12),
    ]
    for row, hue in enumerate(HUES):
        y = 62 + row * 14
        parts.append(f"<path d='M444 152 L488 {y + 5}' stroke='{LINE}' stroke-width='1' fill='none'/>")
        parts.append(box(490, y, 62, 10, f"hsl({hue} 55% 58%)"))
    parts += [
        text(562, 150, "16 questions,", size=13, fill=MUTED),
        text(562, 168, "each under its", size=13, fill=MUTED),
        text(562, 186, "own adapter", size=13, fill=MUTED),
        text(704, 34, "16 verdicts", size=15, fill=MUTED),
    ]
    for row, (name, verdict) in enumerate(zip(NAMES, VERDICTS, strict=True)):
        y = 84 + row * 56
        parts += [arrow(672, y + 12, 698, y + 12), text(704, y + 10, name, size=13)]
        parts.append(text(704, y + 28, verdict, size=13, fill=MUTED))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parents[1] / "one_pass.svg").write_text(draw(), encoding="utf-8")
