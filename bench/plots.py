"""Plots of the files under bench/results: `python -m bench plot`.

A PNG by run, suite and kind: time and memory over tokens and over density, the time of every variant relative to the
base, and rates as shares of the machine's ceilings. Variants have one colour in all of them, blue if they are
gradroute's.
"""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .cases import FULL, STEP
from .results import RELATIVE, Figure, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

RESULTS = Path(__file__).parent / "results"
DPI, COLORS = 100, 96
COLUMNS = {1: 1, 2: 2, 4: 2}  # number of panels of bars → columns; other numbers have 3
MOST_SWEEPS = 8  # sweeps in one picture at most
PANEL = 4.6  # width of a panel in inches
POINTS = 5.2  # width of a letter in a panel's title
LIMIT_COLOR = "#de2d26"
NOTHING_TO_PLOT = (
    "nothing to plot: a curve needs two cases that differ in density or tokens alone (such as --density 0.25 0.5 1), "
    "and bars need a case with a target, which a suite has where no axes are given"
)
METRICS = {"speed": ("time", "ms"), "memory": ("peak memory", "MB"), "saved": ("saved for backward", "MB")}


def main(paths: Sequence[Path], out: Path | None) -> tuple[list[Path], list[str]]:
    """Plots runs, by default every one under bench/results.

    Args:
        paths: files of runs, or folders of them.
        out: a folder for the PNGs, with one in it for every machine if there are several; None: beside the runs.

    Returns:
        The files that were written; and for every run without any the reason, in words.

    Raises:
        ValueError: there is no matplotlib, or there are no runs.
    """
    require_matplotlib()
    found = run_files(paths or [RESULTS])
    several = len({file.parent for file in found}) > 1
    written, empty = [], []
    for file in found:
        folder = file.parent if out is None else out / file.parent.name if several else out
        folder.mkdir(parents=True, exist_ok=True)
        files = save(Run.load(file), folder)
        written += files
        empty += [] if files else [f"{file}: {NOTHING_TO_PLOT}"]
    return written, empty


def require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'gradroute[bench]'") from None


def run_files(paths: Iterable[Path]) -> list[Path]:
    """The CSV files of the runs named, of those in the folders named, and of those in the folders in them."""
    files: list[Path] = []
    for path in paths:
        inside = sorted([*path.glob("*.csv"), *path.glob("*/*.csv")]) if path.is_dir() else []
        found = inside if path.is_dir() else [path.with_suffix(".csv")]
        if not found or not all(file.with_suffix(".json").exists() and file.exists() for file in found):
            raise ValueError(
                f"{path}: got no runs, expected NAME.csv with NAME.json, or a folder of such files"
            )
        files += found
    return files


def save(run: Run, folder: Path) -> list[Path]:
    """The PNGs of a run."""
    written = []
    for suite in dict.fromkeys(case["suite"] for case in run.cases.values()):
        for kind, file in files(run.name, suite, folder).items():
            picture = KINDS[kind](run, suite)
            if picture is not None:
                write(picture, file)
                written.append(file)
    return written


def write(picture: Picture, file: Path) -> None:
    """A PNG with a palette, a third of the size that it has without."""
    from PIL import Image  # installed with matplotlib, which needs it

    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=DPI)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, optimize=True)


def files(run: str, suite: str, folder: Path) -> dict[str, Path]:
    """The file of each kind of PNG, whether or not there is one."""
    stem = re.sub(r"[^\w.]+", "-", f"{run}-{suite}")
    return {kind: folder / f"{stem}-{kind}.png" for kind in KINDS}


#: Colours by family, which is the first word of a variant's name; gradroute's are blue.
OURS = {
    "cpu": "#08519c",
    "triton": "#08519c",
    "cuda": "#4292c6",
    "torch": "#9ecae1",
    "automatic": "#08306b",
    "reference": "#6b7fb3",
    "routed": "#2171b5",
}
RIVALS = {
    "unmasked": "#525252",
    "unrouted": "#525252",
    "cuDNN": "#525252",
    "SDPA": "#7f7f7f",
    "copy": "#b0b0b0",
    "detach": "#e6550d",
    "hook": "#c49a00",
    "Flex": "#c51b8a",
    "flash": "#8c6d46",
    "Liger": "#31a354",
    "homogeneous": "#756bb1",
}
OTHER_OURS = ("#3182bd", "#6baed6", "#164a7a")
OTHER_RIVALS = ("#a63603", "#0f7b6c", "#7a0177", "#969696")
MARKERS = "osD^vP*Xh<>"


class Look(NamedTuple):
    """The look of a variant; lines of rivals are dashed."""

    color: str
    marker: str
    is_rival: bool

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.color, "marker": self.marker, "linestyle": "--" if self.is_rival else "-"}


def looks(run: Run, suite: str) -> dict[str, Look]:
    """The look of every variant of a suite. Known families look alike in all suites; their members are ever paler."""
    cases = [case for case in run.cases.values() if case["suite"] == suite]
    names = list(dict.fromkeys(name for case in cases for name in case["variants"]))
    is_rival = {name: rival(run, name) for name in names}
    made = {}
    for rivals, known, others in ((False, OURS, OTHER_OURS), (True, RIVALS, OTHER_RIVALS)):
        group = sorted(
            (name for name in names if is_rival[name] == rivals), key=lambda name: name != family(name)
        )
        unknown = list(dict.fromkeys(family(name) for name in group if family(name) not in known))
        colors = known | {name: others[place % len(others)] for place, name in enumerate(unknown)}
        members: dict[str, int] = {}
        for place, name in enumerate(group):
            paler = members[family(name)] = members.get(family(name), -1) + 1
            marker = MARKERS[place % len(MARKERS)]
            made[name] = Look(pale(colors[family(name)], min(0.3 * paler, 0.7)), marker, rivals)
    return {name: made[name] for name in names}


def family(variant: str) -> str:
    return re.split(r"[, ]", variant)[0]


def rival(run: Run, variant: str) -> bool:
    entries = (case["variants"].get(variant, {}) for case in run.cases.values())
    return any(entry.get("is_rival") for entry in entries)


def pale(color: str, share: float) -> str:
    """A colour with a share of white."""
    channels = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(one + (255 - one) * share):02x}" for one in channels)


def main_mode(run: Run, case: str) -> str:
    """The whole pass where it was timed, else the last one."""
    modes = run.modes(case) or run.cases[case]["modes"]
    return next((mode for mode in modes if mode in (FULL, STEP)), modes[-1])


class Sweep(NamedTuple):
    """Cases that differ in one axis alone.

    Attributes:
        title: the values that they share.
        x: the axis.
        cases: their names by the value on it, in its order.
        mode: the pass that is drawn.
    """

    title: str
    x: str
    cases: dict[float, str]
    mode: str


def over_tokens(run: Run, suite: str) -> Picture | None:
    """Every sweep of a suite along its tokens, or their number in a row."""
    axes = {case["x"] for case in run.cases.values() if case["suite"] == suite} - {"density"}
    return over(run, suite, sorted(axes))


def over_density(run: Run, suite: str) -> Picture | None:
    return over(run, suite, ["density"])


def over(run: Run, suite: str, axes: Sequence[str]) -> Picture | None:
    """Every sweep along some axes: its time, and beside it its memory if that was measured."""
    every = [sweep for x in axes for sweep in sweeps(run, suite, x)]
    if not every:
        return None
    found = every[:MOST_SWEEPS]
    columns = [metrics(run, sweep) for sweep in found]
    width = max(map(len, columns))
    picture, panels = grid(len(found), width, (0.8 + 4.4 * width, 1.4 + 3.1 * len(found)))
    drawn = looks(run, suite)
    for sweep, shown, row in zip(found, columns, panels, strict=True):
        for metric, panel in zip(shown, row, strict=False):
            draw_sweep(panel, run, sweep, metric, drawn)
        for panel in row[len(shown) :]:
            panel.set_axis_off()
        row[0].set_title(wrapped(sweep.title, 58 * width), loc="left", fontsize=10)
    xs = " and ".join(dict.fromkeys(sweep.x for sweep in found))
    left_out = f"; {len(every) - len(found)} more in the files" if every != found else ""
    finish(picture, run, f"{suite} over {xs}: medians, 20th to 80th percentile{left_out}")
    legend(picture)
    return picture


def sweeps(run: Run, suite: str, x: str) -> list[Sweep]:
    """The groups of at least two of a suite's cases that differ in x alone, where one of them runs along it."""
    groups: dict[str, dict[float, str]] = {}
    along = set()
    for name, case in run.cases.items():
        if case["suite"] == suite and isinstance(case["axes"].get(x), (int, float)):
            shared = json.dumps([case["kernel"], {**case["axes"], x: None}], sort_keys=True)
            groups.setdefault(shared, {}).setdefault(case["axes"][x], name)
            along |= {shared} if case["x"] == x else set()
    chosen = [
        dict(sorted(cases.items())) for shared, cases in groups.items() if len(cases) > 1 and shared in along
    ]
    firsts = [next(iter(cases.values())) for cases in chosen]
    titles = sweep_titles([run.cases[first] for first in firsts], x)
    modes = [main_mode(run, first) for first in firsts]
    return [Sweep(title, x, cases, mode) for title, cases, mode in zip(titles, chosen, modes, strict=True)]


def sweep_titles(cases: list[dict[str, Any]], x: str) -> list[str]:
    """The op, and the values on the axes that tell a case from the others; those on all axes if none does."""
    axes = [{name: value for name, value in case["axes"].items() if name != x} for case in cases]
    telling = {name for own in axes for name in own if any(other.get(name) != own[name] for other in axes)}
    return [
        ", ".join(
            [
                case["kernel"],
                *(
                    f"{name} {value}"
                    for name, value in own.items()
                    if value is not None and name in (telling or own)
                ),
            ]
        )
        for case, own in zip(cases, axes, strict=True)
    ]


def metrics(run: Run, sweep: Sweep) -> list[str]:
    """The metrics to draw: the time, and the memory where it was measured."""
    variants = sweep_variants(run, sweep)
    sized = [
        metric
        for metric in ("memory", "saved")
        if any(len(curve(run, sweep, variant, metric)) > 1 for variant in variants)
    ]
    return ["speed", *sized[:1]]


def sweep_variants(run: Run, sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(name for case in sweep.cases.values() for name in run.cases[case]["variants"]))


def curve(run: Run, sweep: Sweep, variant: str, metric: str) -> dict[float, Figure]:
    """The figures of a variant by the value on the axis."""
    figures = {x: run.figure(case, variant, sweep.mode, metric) for x, case in sweep.cases.items()}
    return {x: figure for x, figure in figures.items() if figure is not None}


def draw_sweep(panel: Axes, run: Run, sweep: Sweep, metric: str, drawn: Mapping[str, Look]) -> None:
    """A line for every variant, with the band between the percentiles."""
    medians: list[float] = []
    for variant in sweep_variants(run, sweep):
        figures, look = curve(run, sweep, variant, metric), drawn[variant]
        if figures:
            p50, p20, p80 = zip(*figures.values(), strict=True)
            panel.fill_between([*figures], p20, p80, color=look.color, alpha=0.15, linewidth=0)
            panel.plot([*figures], p50, label=variant, markersize=5, linewidth=1.6, **look.line)
            medians += p50
    name, unit = METRICS[metric]
    of_pass = "" if sweep.mode == FULL else f", {sweep.mode}"
    panel.set_ylabel(f"{name}{of_pass}, {unit}")
    panel.set_xlabel(sweep.x.replace("_", " "))
    scale(panel, list(sweep.cases), medians, tall=4 if sweep.x != "density" else 20)


def scale(panel: Axes, xs: list[float], ys: list[float], tall: float) -> None:
    """Makes axes logarithmic where values differ by much, and puts ticks at the values measured."""
    if xs[0] > 0 and xs[-1] / xs[0] >= 4:
        panel.set_xscale("log", base=2)
    if ys and min(ys) > 0 and max(ys) / min(ys) > tall:
        low, high = min(ys) / 1.5, max(ys) * 1.5
        ticks = one_two_five(low, high)
        panel.set_yscale("log")
        panel.set_ylim(low, high)
        panel.set_yticks(ticks, [short(tick) for tick in ticks])
    else:
        panel.set_ylim(0, 1.08 * max(ys, default=1.0) or 1.0)
    panel.set_xticks(xs, [short(x) for x in xs], rotation=45 if len(xs) > 6 else 0)
    panel.minorticks_off()


def one_two_five(low: float, high: float) -> list[float]:
    """The ticks of a range: 1, 2 and 5 times powers of ten, or powers alone where it is large."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 1e3 else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def short(value: float) -> str:
    """A short form of a number: 16384 → "16k"; 0.0625 → "0.0625"."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value:.3g}" if value < 1000 else f"{value:g}"


class Bar(NamedTuple):
    """A variant's bar.

    Attributes:
        value: its length.
        text: the words beside it.
        spread: the ends of a thin line on it.
        pale: the length of a pale bar behind it.
        limits: the places of ticks.
    """

    value: float
    text: str
    spread: tuple[float, float] | None = None
    pale: float = 0.0
    limits: tuple[float, ...] = ()

    @property
    def end(self) -> float:
        return max(self.value, self.pale, *self.limits, *(self.spread or ()))


class Bars(NamedTuple):
    """A panel of bars.

    Attributes:
        title: the case, and its pass unless that is the whole one.
        one: the meaning of 1, where a line is drawn.
        bars: the bars by variant, the first on top.
        percent: whether the axis is in percent.
    """

    title: str
    one: str
    bars: dict[str, Bar]
    percent: bool = False


def relative(run: Run, suite: str) -> Picture | None:
    """The time relative to the base, and the limits."""
    panels = [relative_bars(run, name) for name in run.headlines(suite)]
    return bars_picture(run, suite, "time relative to the base, less is better; red: limits", panels)


def ceiling(run: Run, suite: str) -> Picture | None:
    """Rates as shares of what a matmul or a copy reached on the same machine."""
    panels = [ceiling_bars(run, name) for name in run.headlines(suite)]
    return bars_picture(run, suite, ceiling_text(panels), panels)


def ceiling_text(panels: Sequence[Bars]) -> str:
    """The title, which explains pale bars and shares over 100 % where there are any."""
    bars = [bar for panel in panels for bar in panel.bars.values()]
    has_pale = any(bar.pale for bar in bars)
    text = "share of the measured ceiling" + (" (useful FLOPs; pale: dense-equivalent)" if has_pale else "")
    text += ", more is better"
    if any(bar.pale > 1 for bar in bars):
        text += ". Pale over 100%: work that masks leave out is counted"
    if any(bar.value > 1 for bar in bars):
        text += ". Dark over 100%: other shapes or a cache are faster than the product or copy that is the ceiling"
    return text


def relative_bars(run: Run, name: str) -> Bars:
    base, mode = run.cases[name]["base"], main_mode(run, name)
    figures = {
        variant: figure
        for variant in run.cases[name]["variants"]
        if (figure := run.figure(name, variant, mode, RELATIVE + base)) is not None
    }
    bars = {
        variant: Bar(
            p50,
            f"{p50:.2f}" if p50 >= 0.1 else f"{p50:.3f}",
            spread=(p20, p80),
            limits=tuple(limits(run.cases[name], variant, mode, figures)),
        )
        for variant, (p50, p20, p80) in figures.items()
    }
    return Bars(pass_name(name, mode), f"1 = {base}", bars)


def pass_name(name: str, mode: str) -> str:
    return name if mode in (FULL, STEP) else f"{name}, {mode}"


def limits(
    case: Mapping[str, Any], variant: str, mode: str, figures: Mapping[str, Figure]
) -> Iterator[float]:
    """The limits of a variant's time in a pass, as multiples of the base's."""
    for limit in case["limits"]:
        asked = [limit["rival"], *([limit["added"]] if limit.get("added") else [])]
        is_of = (limit["variant"], limit["quantity"], limit["mode"]) == (variant, "speed", mode)
        if is_of and all(name in figures for name in asked):
            beyond = figures[asked[1]].p50 if len(asked) > 1 else 0.0
            yield beyond + limit["most"] * (figures[limit["rival"]].p50 - beyond)


def ceiling_bars(run: Run, name: str) -> Bars:
    """Shares of the copy's bandwidth where bytes bound the time, else of the matmul's rate in that dtype."""
    found, mode = run.description.get("ceilings") or {}, main_mode(run, name)
    gemm, copy = (found.get("gemm") or {}).get(run.cases[name]["axes"].get("dtype")), found.get("copy")
    bandwidth, useful, dense = (
        rates(run, name, mode, metric) for metric in ("bandwidth", "useful rate", "dense-equivalent rate")
    )
    if copy and bandwidth:
        bars = {variant: Bar(rate / copy, f"{rate / copy:.0%}") for variant, rate in bandwidth.items()}
        return Bars(pass_name(name, mode), f"100% = copy, {copy:.4g} GB/s", bars, percent=True)
    if not gemm:
        return Bars(name, "", {})
    bars = {
        variant: rate_bar(useful.get(variant, rate) / gemm, rate / gemm)
        for variant, rate in (useful | dense).items()
    }
    return Bars(pass_name(name, mode), f"100% = matmul, {gemm:.3g} TFLOP/s", bars, percent=True)


def rates(run: Run, name: str, mode: str, metric: str) -> dict[str, float]:
    """The medians of a metric by variant."""
    figures = {variant: run.figure(name, variant, mode, metric) for variant in run.cases[name]["variants"]}
    return {variant: figure.p50 for variant, figure in figures.items() if figure is not None}


def rate_bar(useful: float, dense: float) -> Bar:
    if f"{useful:.0%}" == f"{dense:.0%}":
        return Bar(useful, f"{useful:.0%}")
    return Bar(useful, f"{useful:.0%}, {dense:.0%}", pale=dense)


def bars_picture(run: Run, suite: str, text: str, found: Sequence[Bars]) -> Picture | None:
    """A picture of the panels that have bars; None where none has."""
    shown = [one for one in found if one.bars]
    if not shown:
        return None
    columns = COLUMNS.get(len(shown), 3)
    lines = -(-len(shown) // columns)
    height = 1.2 + 0.25 * max(len(one.bars) for one in shown)
    wide = PANEL + (1.4 if columns == 1 else 0.0)
    picture, panels = grid(lines, columns, (wide * columns, 0.7 + height * lines))
    places = [panel for row in panels for panel in row]
    drawn = looks(run, suite)
    for one, panel in zip(shown, places, strict=False):
        draw_bars(panel, one, drawn, wide)
    for panel in places[len(shown) :]:
        panel.remove()
    finish(picture, run, f"{suite}: {text}")
    return picture


def draw_bars(panel: Axes, one: Bars, drawn: Mapping[str, Look], wide: float) -> None:
    """Draws a panel, `wide` inches wide."""
    panel.axvline(1, color="black", linewidth=0.9, zorder=2.5)
    for place, (variant, bar) in enumerate(one.bars.items()):
        draw_bar(panel, place, bar, drawn[variant].color)
    panel.set_yticks(range(len(one.bars)), list(one.bars))
    panel.set_ylim(len(one.bars) - 0.4, -0.6)
    panel.set_xlim(0, 1.02 * max(1.0, *(bar.end for bar in one.bars.values())))
    if one.percent:
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    letters = 72 * wide / POINTS - 1.2 * max(map(len, one.bars))
    panel.set_title(f"{wrapped(one.title, int(letters))}\n{one.one}", loc="left", fontsize=9)
    panel.grid(axis="y", visible=False)


def draw_bar(panel: Axes, place: int, bar: Bar, color: str) -> None:
    """Draws a bar, its spread and limits, and its text at the right end of the panel."""
    if bar.pale:
        panel.barh(place, bar.pale, color=pale(color, 0.65), height=0.68)
    panel.barh(place, bar.value, color=color, height=0.68)
    if bar.spread:
        panel.plot(bar.spread, [place, place], color="black", linewidth=1)
    for limit in bar.limits:
        panel.plot([limit, limit], [place - 0.42, place + 0.42], color=LIMIT_COLOR, linewidth=2.4)
    text_color = LIMIT_COLOR if is_over(bar) else "black"
    beside = panel.get_yaxis_transform()
    panel.text(1.02, place, bar.text, transform=beside, va="center", fontsize=8.5, color=text_color)


def is_over(bar: Bar) -> bool:
    return any(bar.value > limit for limit in bar.limits)


def grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Picture, list[list[Axes]]]:
    """A figure of so many panels, whose size is in inches."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=size, layout="constrained")
    panels = picture.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=9)
    return picture, panels.tolist()


def finish(picture: Picture, run: Run, text: str) -> None:
    """Adds the title: the subject, and the machine."""
    width = int(picture.get_figwidth() * 12)
    lines = f"{wrapped(text, width)}\n{wrapped(run.machine, width)}"
    picture.suptitle(lines, fontsize=11, x=0.01, ha="left")


def legend(picture: Picture) -> None:
    """Adds one legend for all panels, below them."""
    handles = {
        label: handle
        for panel in picture.axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    columns = max(1, int(picture.get_figwidth() / 2.4))
    picture.legend(
        handles.values(), handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=9
    )


def wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


KINDS: dict[str, Callable[[Run, str], Any]] = {
    "relative": relative,
    "tokens": over_tokens,
    "density": over_density,
    "ceiling": ceiling,
}
