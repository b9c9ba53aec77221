"""Draws the diagrams of README and "How it works": ``python docs/site/diagrams.py`` writes ``docs/diagrams/*.svg``."""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "diagrams"
SPATIAL, TEMPORAL, BOTH, PLAIN, OURS = "#cfe2f7", "#fbdcc4", "#e3d3ee", "#eef0f3", "#1f6fb5"


class Drawing:
    """Boxes, texts and arrows on white, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="15" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def text(
        self, x: float, y: float, words: str, *, size: int = 15, anchor: str = "middle", bold: bool = False
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="#222"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(
        self, x: float, y: float, width: float, height: float, *lines: str, fill: str = PLAIN, size: int = 15
    ) -> None:
        """A box with lines in its middle; the first is the larger one."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="#8a8f98"/>'
        )
        top = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for index, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * index, line, size=size if index == 0 else 12)

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="#444" stroke-width="1.6"{dash} marker-end="url(#tip)"/>'
        )

    def save(self, name: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")


def layer(folder: Path) -> None:
    """What a layer does with a sample."""
    draw = Drawing(980, 300, "A DSTS layer")
    draw.box(10, 150, 110, 60, "features", "C channels")
    draw.box(170, 20, 130, 60, "scores", "one per neuron")
    draw.box(350, 20, 150, 60, "chosen neuron", "the highest score")
    draw.box(550, 20, 140, 60, "its gates", "one per channel")
    draw.arrow((65, 150), (65, 50), (168, 50))
    draw.arrow((300, 50), (348, 50))
    draw.arrow((500, 50), (548, 50))
    draw.box(190, 150, 130, 60, "split", "channels by gate")
    draw.arrow((120, 180), (188, 180))
    draw.arrow((620, 80), (620, 100), (255, 100), (255, 148), dashed=True)
    draw.box(370, 118, 170, 54, "spatial 1x3x3", "channels with gate 1", fill=SPATIAL)
    draw.box(370, 188, 170, 54, "temporal 3x1x1", "channels with gate 0", fill=TEMPORAL)
    draw.arrow((320, 170), (368, 145))
    draw.arrow((320, 190), (368, 215))
    draw.box(590, 150, 110, 60, "mix", "1x1x1")
    draw.arrow((540, 145), (588, 170))
    draw.arrow((540, 215), (588, 190))
    draw.box(740, 150, 110, 60, "norm", "and ReLU")
    draw.arrow((700, 180), (738, 180))
    draw.box(890, 150, 80, 60, "output", "C channels")
    draw.arrow((850, 180), (888, 180))
    draw.text(
        10,
        270,
        "Each neuron has gates and convolutions of its own. Each clip chooses a neuron in each layer.",
        anchor="start",
    )
    draw.text(
        10, 290, "A module chains three layers, and adds its input to the output of the last one.", anchor="start"
    )
    draw.save("layer.svg", folder)


def data_path(folder: Path) -> None:
    """Modules, ops, backends, kernels."""
    draw = Drawing(980, 520, "The way of a sample through the code")
    for y, name in ((20, "modules"), (130, "ops"), (330, "backends"), (440, "kernels")):
        draw.text(10, y + 35, name, anchor="start", bold=True)
    draw.box(120, 20, 480, 60, "FusedDSTS.forward: checks, draws", "per layer: DSTSLayer.forward", fill=SPATIAL)
    draw.box(660, 20, 300, 60, "FrozenDSTS.forward", "per layer, or all in one native call", fill=TEMPORAL)
    steps = (
        ("tap_sums", "scores, neuron"),
        ("semhash_gate", "its gates"),
        ("gated_conv3d", "both operators"),
        ("mixing_conv3d", "and the weight"),
    )
    for index, lines in enumerate(steps):
        x = 120 + 124 * index
        draw.box(x, 130, 108, 60, *lines, fill=SPATIAL, size=14)
        if index:
            draw.arrow((x - 16, 160), (x - 2, 160))
    draw.box(660, 130, 300, 60, "frozen_layer", "route, convolve, bias, ReLU, skip", fill=TEMPORAL)
    draw.arrow((360, 80), (360, 128))
    draw.arrow((810, 80), (810, 128))
    op = "each op: checks, autograd, torch's dispatcher if a compiler listens, then backends.choose(op, device, dtype)"
    draw.box(120, 240, 840, 44, op)
    draw.arrow((360, 190), (360, 238))
    draw.arrow((810, 190), (810, 238))
    draw.box(120, 330, 260, 60, "cpu", "groups on the host; Winograd or oneDNN")
    draw.box(410, 330, 310, 60, "triton, cuda", "groups, lists, plans, panels on the device")
    draw.box(750, 330, 210, 60, "eager", "plain PyTorch")
    draw.box(120, 440, 260, 60, "csrc/cpu", "one build per instruction set")
    draw.box(410, 440, 310, 60, "triton/*.py, csrc/cuda", "one persistent convolution")
    draw.box(750, 440, 210, 60, "torch", "its own kernels")
    for x in (250, 565, 855):
        draw.arrow((x, 284), (x, 328))
        draw.arrow((x, 390), (x, 438))
    draw.save("data-path.svg", folder)


def panel(folder: Path) -> None:
    """From gates to a list, a panel and a plan."""
    draw = Drawing(980, 400, "Gates, list, panel and plan of a sample with six channels")
    colour = {1.0: SPATIAL, 0.0: TEMPORAL, 0.5: BOTH}
    gates = (1.0, 0.0, 1.0, 1.0, 0.5, 0.0)
    order = (0, 2, 3, 4, 1, 5)
    draw.text(10, 45, "gates", anchor="start", bold=True)
    for line, words in enumerate(("gate 1: spatial only", "gate 0: temporal only", "between: both")):
        draw.text(670, 30 + 20 * line, words, size=13, anchor="start")
    draw.text(10, 150, "list", anchor="start", bold=True)
    draw.text(10, 270, "panel", anchor="start", bold=True)
    draw.text(10, 365, "plan", anchor="start", bold=True)
    for channel, gate in enumerate(gates):
        draw.box(120 + 90 * channel, 20, 70, 40, f"{gate:g}", fill=colour[gate])
        draw.text(155 + 90 * channel, 76, f"channel {channel}", size=12)
        place = order.index(channel)
        draw.arrow((155 + 90 * channel, 82), (155 + 90 * place, 122))
    for place, channel in enumerate(order):
        draw.box(120 + 90 * place, 125, 70, 40, str(channel), fill=colour[gates[channel]])
    draw.text(245, 186, "only spatial", size=12)
    draw.text(425, 186, "both", size=12)
    draw.text(560, 186, "only temporal", size=12)
    cells = (("x0", SPATIAL), ("x2", SPATIAL), ("x3", SPATIAL), ("x4 * 0.5", BOTH), ("zeros", "white"))
    for index, (words, fill) in enumerate(cells):
        draw.box(120 + 82 * index, 245, 78, 40, words, fill=fill)
    for index, (words, fill) in enumerate((("x4 * 0.5", BOTH), ("x1", TEMPORAL), ("x5", TEMPORAL), ("zeros", "white"))):
        draw.box(570 + 82 * index, 245, 78, 40, words, fill=fill)
    draw.arrow((320, 195), (320, 242))
    draw.arrow((560, 195), (735, 242))
    draw.text(323, 304, "the spatial convolution reads these: one K block of 128 bytes", size=12)
    draw.text(735, 304, "the temporal convolution reads these: one more", size=12)
    numbers = (
        ("filters", "where they start"),
        ("spatial_blocks", "1"),
        ("temporal_blocks", "1"),
        ("spatial_channels", "4"),
        ("temporal_start", "3"),
        ("row", "the list's number"),
    )
    for index, lines in enumerate(numbers):
        draw.box(120 + 140 * index, 335, 134, 50, *lines, size=14)
    draw.save("panel.svg", folder)


def main(folder: Path = FOLDER) -> None:
    for drawing in (layer, data_path, panel):
        drawing(folder)


if __name__ == "__main__":
    main()
