"""Results as a table for people, as JSON for files, as a plot."""

from collections.abc import Sequence
from typing import Any

from memeff.bench.measure import Settings, ShapeResult, VariantResult

MIB = 2**20


def _columns(result: ShapeResult, row: VariantResult, settings: Settings) -> list[str]:
    backward = settings.backward
    if row.timing is None:
        return [row.name, "-", "-", "-", "-", "-", *(["-", "-", "-"] if backward else [])]
    assert row.errors is not None  # both come from the same call
    cells = [
        row.name,
        _milliseconds(row.timing.median, settings),
        _milliseconds(row.timing.spread, settings),
        f"{row.timing.median / result.floor.median:.2f}",
        "-" if row.extra_bytes is None else f"{row.extra_bytes / MIB:.1f}",
    ]
    if backward:
        over = None if row.extra_bytes is None else row.extra_bytes - result.gradient_bytes
        cells.append("-" if over is None else f"{over / MIB:.1f}")
    cells.append(f"{row.errors.loss:.1e}")
    if backward:
        cells += [f"{row.errors.dx:.1e}", f"{row.errors.dw:.1e}"]
    return cells


def _milliseconds(seconds: float, settings: Settings) -> str:
    return f"{seconds * 1e3:.{1 if settings.device == 'cpu' else 3}f}"


def table(result: ShapeResult, settings: Settings) -> str:
    """The rows of one shape as aligned text, notes of the variants that did not run below."""
    shape, backward = result.shape, settings.backward
    header = ["variant", "ms", "IQR", "x floor", "peak MiB"]
    header += ["over grads"] if backward else []
    header += ["err loss"] + (["err dX", "err dW"] if backward else [])
    products = 3 if backward else 1
    rate = products * shape.product_flops / result.floor.median / 1e9
    floor = [
        "GEMM floor",
        _milliseconds(result.floor.median, settings),
        _milliseconds(result.floor.spread, settings),
        "1.00",
    ]
    if backward:
        floor += [f"{result.gradient_bytes / MIB:.1f}", "0.0"]
    floor += ["-"] * (len(header) - len(floor))
    body = [header, floor] + [
        _columns(result, row, settings) for row in result.rows if row.timing is not None
    ]
    widths = [max(len(line[i]) for line in body) for i in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        first, *rest = line
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        return "  ".join([first.ljust(widths[0]), *cells])

    what = "forward + backward" if backward else "forward only, no gradients"
    softcap = "" if settings.softcap is None else f", softcap {settings.softcap:g}"
    peaked = ", peaked softmax" if settings.peaked else ""
    where = f"{settings.threads} threads" if settings.device == "cpu" else settings.device
    lines = [
        f"N={shape.tokens} D={shape.features} V={shape.vocab} {settings.dtype}, {what}{softcap}"
        f"{peaked}, {where}; floor = {products} x torch.mm, {rate:.0f} GFLOP/s",
        aligned(header),
        "-" * (sum(widths) + 2 * (len(widths) - 1)),
        *(aligned(line) for line in body[1:]),
    ]
    lines += [f"  {row.name}: {row.note}" for row in result.rows if row.note]
    return "\n".join(lines)


LEGEND = (
    "ms: median over interleaved rounds. peak MiB: over the inputs, measured.\n"
    "over grads: peak without dX + dW. err: against float64; relative, gradients in Frobenius norm."
)


def to_json(
    environment: dict[str, Any], finished: Sequence[tuple[Settings, ShapeResult]]
) -> dict[str, Any]:
    """Everything measured, in seconds and bytes; with each shape the settings it ran under."""
    return {**environment, "runs": [_run_json(settings, result) for settings, result in finished]}


def _run_json(settings: Settings, result: ShapeResult) -> dict[str, Any]:
    shape = result.shape
    return {
        "dtype": settings.dtype,
        "backward": settings.backward,
        "softcap": settings.softcap,
        "peaked": settings.peaked,
        "device": settings.device,
        "rounds": settings.rounds,
        "tokens": shape.tokens,
        "features": shape.features,
        "vocab": shape.vocab,
        "gradient_bytes": result.gradient_bytes,
        "floor": {
            "median_s": result.floor.median,
            "iqr_s": result.floor.spread,
            "seconds": result.floor.seconds,
        },
        "variants": [_variant_json(result, row) for row in result.rows],
    }


def _variant_json(result: ShapeResult, row: VariantResult) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": row.name}
    if row.note is not None:
        entry["note"] = row.note
    if row.timing is not None:
        entry |= {
            "median_s": row.timing.median,
            "iqr_s": row.timing.spread,
            "floor_ratio": row.timing.median / result.floor.median,
            "seconds": row.timing.seconds,
        }
    if row.extra_bytes is not None:
        entry["peak_extra_bytes"] = row.extra_bytes
        entry["over_gradients_bytes"] = row.extra_bytes - result.gradient_bytes
    if row.errors is not None:
        entry["errors"] = {"loss": row.errors.loss, "dx": row.errors.dx, "dw": row.errors.dw}
    return entry


# Colours of the plots: memeff's stand out, those of the other ways are pale.
_OURS = ("#c1121f", "#e36414", "#7b2cbf", "#003049")
_OTHERS = ("#5b7ea4", "#7fa99b", "#a08f70", "#8d8d8d", "#9a8fb5", "#6f9db5", "#b58f9a", "#8fa35b")
_MARKERS = "osD^vP*X"


def with_unit(value: float, units: Sequence[str], base: float) -> str:
    """`value` in the largest of `units`, each `base` times the one before, that keeps it >= 1."""
    index = 0
    while value >= base and index + 1 < len(units):
        value, index = value / base, index + 1
    return f"{value:.3g} {units[index]}"


def _label_axis(axis: Any, units: Sequence[str], base: float) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5 times powers of ten (or of two), with their units."""
    from matplotlib import ticker

    if base == 1024:
        axis.set_major_locator(ticker.LogLocator(base=4, numticks=12))
    else:
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: with_unit(value, units, base)))
    axis.set_minor_locator(ticker.NullLocator())


def plot(path: str, settings: Settings, results: Sequence[ShapeResult]) -> None:
    """Image of time and peak memory against whichever of N and V differs between results."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    varies_n = len({r.shape.tokens for r in results}) > 1
    axis_name = "N, tokens" if varies_n else "V, classes"
    ordered = sorted(results, key=lambda r: r.shape.tokens if varies_n else r.shape.vocab)

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    ours = iter(_OURS * len(settings.variants))
    others = iter(_OTHERS * len(settings.variants))
    for i, name in enumerate(settings.variants):
        points = [
            (r.shape.tokens if varies_n else r.shape.vocab, row)
            for r in ordered
            for row in r.rows
            if row.name == name and row.timing is not None
        ]
        if not points:
            continue
        is_ours = name.startswith("memeff")
        style: dict[str, Any] = {
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 6 if is_ours else 5,
            "linewidth": 2.5 if is_ours else 1.2,
            "color": next(ours if is_ours else others),
            "zorder": 3 if is_ours else 2,
            "label": name,
        }
        sizes = [size for size, _ in points]
        medians = [row.timing.median * 1e6 for _, row in points if row.timing]
        spreads = [row.timing.spread * 1e6 / 2 for _, row in points if row.timing]
        left.errorbar(sizes, medians, yerr=spreads, capsize=3, **style)
        memory = [(size, row.extra_bytes) for size, row in points if row.extra_bytes is not None]
        if memory:
            right.plot(*zip(*memory, strict=True), **style)
    xs = [r.shape.tokens if varies_n else r.shape.vocab for r in ordered]
    left.plot(xs, [r.floor.median * 1e6 for r in ordered], "k--", label="bare matrix products")
    if settings.backward:
        right.plot(xs, [r.gradient_bytes for r in ordered], "k:", label="the gradients themselves")
    left.set(title="time", xscale="log", yscale="log")
    right.set(title="peak memory over the inputs", xscale="log", yscale="log")
    for axes in (left, right):
        axes.set(xlabel=axis_name)
        axes.set_xticks(xs, [f"{x:,}" for x in xs])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.grid(alpha=0.3)
    _label_axis(left.yaxis, ("us", "ms", "s"), 1000)
    _label_axis(right.yaxis, ("B", "KiB", "MiB", "GiB"), 1024)
    fixed = ordered[0].shape
    held = f"V={fixed.vocab}" if varies_n else f"N={fixed.tokens}"
    direction = "forward + backward" if settings.backward else "forward"
    figure.suptitle(
        f"{direction}, {settings.dtype}, D={fixed.features}, {held}, {settings.threads} threads"
    )
    handles: dict[str, Any] = {}
    for axes in (left, right):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
