"""The sweep's figure: recall against the CE calls of the index, a line for each number of train queries."""

from axn_ray.core.figures import COLOURS, MARKERS, new_figure

METHODS = {("AXN bayes", 10): "-", ("AXN pinv, MF_Ind", 10): "--"}
FLAT = {("AXN pinv, DE", 10): "-.", ("RnR, DE", 1): ":"}
PANELS = ((1, 100), (10, 100), (100, 500))


def draw_sweep(swept):
    """A panel per (k, B). Solid: ours, dashed: the paper's; grey: methods without an index."""
    figure, panels = new_figure(len(PANELS), height=5.2)
    sizes = sorted({n for n, _ in swept})
    for axes, (k, budget) in zip(panels, PANELS, strict=True):
        for number, n in enumerate(sizes):
            for method, dash in METHODS.items():
                points = [(n * d, row_of(e, method, k, budget)) for (m, d), e in swept.items() if m == n]
                calls, rows = zip(*sorted(points, key=lambda point: point[0]), strict=True)
                style = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 5, "linewidth": 1.6}
                axes.plot(calls, [100 * row["recall"] for row in rows], dash, label=f"{method[0]}, {n} train queries", **style)
                if dash == "-":
                    low, high = ([100 * row[f"recall_{side}"] for row in rows] for side in ("low", "high"))
                    axes.fill_between(calls, low, high, color=COLOURS[number], alpha=0.12, linewidth=0)
        first = next(iter(swept.values()))
        for method, dash in FLAT.items():
            height = 100 * row_of(first, method, k, budget)["recall"]
            axes.axhline(height, color="grey", linestyle=dash, label=f"{method[0]}, no index")
        axes.set(title=f"recall@{k}, B={budget}", xlabel="CE calls for the index", xscale="log")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("share of the exact top k found, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def row_of(evaluation, method, k, budget):
    wanted = (*method, k, budget)
    return next(row for row in evaluation.summary if (row["method"], row["rounds"], row["k"], row["budget"]) == wanted)
