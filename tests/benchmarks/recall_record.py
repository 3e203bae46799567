"""What `make bench-recall` writes: JSON with every row, tables in Markdown and figures, a set for each section that is done."""

import pyarrow as pa

from axn_ray.core.artifact import read_manifest
from axn_ray.core.comparison import summarize
from axn_ray.core.evaluation_store import Evaluation, load_evaluation
from axn_ray.core.figures import draw_calls_saved, draw_pareto, draw_recall, draw_reliability, draw_wins, save_figure
from axn_ray.core.report import markdown_table
from tests.benchmarks.common import DOCS, record
from tests.benchmarks.recall_figures import draw_sweep

RNR, PAPER, BAYES = ("RnR, DE", 1), ("AXN pinv, MF_Ind", 10), ("AXN bayes", 10)
DISTILLED = ", distilled DE"  # ends the names of methods that search over its embeddings
# The targets: level of what the dev queries chose of ours, gain over `PAPER`; in percent, by (k, B).
LEVELS = {(1, 100): 95, (10, 100): 78, (10, 200): 85, (10, 500): 92, (100, 500): 66}
GAINS = {(10, 100): 14, (10, 200): 13, (10, 500): 14, (100, 500): 24}
GAIN = ("k", "budget", "gain", "gain_low", "gain_high")
WHAT = """Percent of the exact top k that was found, with 95 % bootstrap intervals over queries; R rounds, B CE calls per query,
those of round 1 included."""
SHOWN = [(k, b) for b in (100, 500) for k in (1, 10, 100)]


def record_all(out, sweep):
    """Write the documents of the sections found below `out`; those of sections that are not there stay as they are."""
    has_verbs = is_done(out / "verbs/distilled", "dev_plain")  # the last step
    worlds = [name for name in ("artifact", "all") if is_done(out / name)]
    if has_verbs:
        record_verbs(out)
    for name in worlds:
        record_world(name, out)
    if swept := {part: load_evaluation(folder / "evaluation") for part in sweep if is_done(folder := sweep_folder(out, part))}:
        record_sweep(swept, out)
    if not (has_verbs or worlds or swept):
        raise SystemExit(f"no section is done in {out}, so there is nothing to record; run one first, the verbs with `distilled`")


def record_verbs(out):
    """docs/benchmarks/recall.json, recall.md and their figures."""
    folder = out / "verbs"
    verbs = join_distilled(load_world(folder), folder)
    done = [k for k in (1, 10, 100) if is_done(folder, f"lambda_{k}")]
    lambdas = {k: load_evaluation(folder / f"lambda_{k}").summary for k in done}
    dev = {name: load_evaluation(folder / "distilled" / name).summary for name in ("dev_plain", "dev")}
    ours = choose_ours(dev)
    targets = judge_targets(verbs, lambdas, ours)
    sections = [
        "# Recall: the benchmark of record\n",
        'Made by `make bench-recall SECTIONS="verbs distilled record"`; `recall.json` beside this file has every row.',
        f"{WHAT}\n",
        f"## {title('verbs', verbs)}\n",
        compact_table(verbs.summary),
        f"## The targets, on the verbs, of {ours[0]}\n",
        target_table(targets),
    ]
    if is_done(folder, "stops"):
        sections += ["## The adaptive stop, on the verbs\n", stop_table(load_evaluation(folder / "stops").summary)]
        sections += ["![the stop](recall_stop.png)\n"]
    if is_done(folder, "rounds"):
        several = load_evaluation(folder / "rounds").summary
        sections += ["## Fewer and more rounds, on the verbs\n", compact_table(several)]
    sections += ["## Every row of the verbs\n", markdown_table(verbs.summary)]
    write_page("recall", sections)
    draw(verbs, out, ours)
    figures = {
        "seconds": seconds_below(folder, out),
        "settings": verbs.manifest.config["settings"],
        "targets": targets,
        "targets_without_distillation": judge_targets(verbs, lambdas, BAYES),
        "distilled_over_pinv": gains(folder / "distilled/evaluation", ("AXN pinv, DE", BAYES[1])),
        "ours": ours[0],
        "dev": dev,
        "worlds": {"verbs": {"counts": verbs.manifest.counts, "summary": verbs.summary}},
        "lambda_by_k": lambdas,
    }
    met = sum(target["reached"] for target in targets)
    record("recall", figures, **headline(verbs.summary, ours), targets_reached=f"{met}/{len(targets)}")


def record_world(name, out):
    """docs/benchmarks/recall_NAME.json, .md and .png of another world."""
    folder, page = out / name, f"recall_{name}"
    world, ours = load_world(folder), BAYES
    if is_done(folder / "distilled"):
        world, ours = join_distilled(world, folder), (BAYES[0] + DISTILLED, BAYES[1])
    over_paper = [row for row in summarize(world.table, baseline=PAPER) if (row["method"], row["rounds"]) in (BAYES, ours)]
    counts = world.manifest.counts
    chosen = is_done(folder, "chosen")
    settings = "Free settings are those that the verbs' dev queries chose." if chosen else "Every method has its own settings."
    sections = [
        f"# Recall: {title(name, world)}\n",
        f'Made by `make bench-recall SECTIONS="{name} record"`; `{page}.json` beside this file has every row.',
        f"{WHAT} {settings}\n",
        compact_table(world.summary),
        f"![recall against budget]({page}.png)\n",
        f"## Gains over {PAPER[0]}, R={PAPER[1]}\n",
        gain_table(over_paper),
        "## Every row\n",
        markdown_table(world.summary),
    ]
    write_page(page, sections)
    save_figure(draw_recall(world.summary, f"{name}, {counts['items']:,} items", baseline=RNR), DOCS / page)
    figures = {
        "seconds": seconds_below(folder, out),
        "settings": world.manifest.config["settings"],
        "counts": counts,
        "gains_over_paper": [{column: row[column] for column in ("method", *GAIN)} for row in over_paper],
        "summary": world.summary,
    }
    if is_done(folder / "distilled"):
        figures["distilled_over_pinv"] = gains(folder / "distilled/evaluation", ("AXN pinv, DE", BAYES[1]))
    record(page, figures, f'bench-recall SECTIONS="{name} record"', **headline(world.summary, ours))


def record_sweep(swept, out):
    """docs/benchmarks/recall_sweep.json, .md and .png."""
    sections = [
        "# Recall by the size of the score matrix\n",
        'Made by `make bench-recall SECTIONS="sweep record"`; `recall_sweep.json` beside this file has every row.',
        f"{WHAT} On the verbs, over the embeddings of the dual-encoder as it is; both fits see its nearest items alone.\n",
        sweep_table(swept),
        "![the sweep](recall_sweep.png)\n",
    ]
    write_page("recall_sweep", sections)
    save_figure(draw_sweep(swept), DOCS / "recall_sweep")
    parts = {"{}x{}".format(*part): evaluation.summary for part, evaluation in swept.items()}
    figures = {"seconds": seconds_below(out / "sweep", out), "sweep": parts}
    record("recall_sweep", figures, 'bench-recall SECTIONS="sweep record"', swept=len(swept))


def write_page(name, sections):
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / f"{name}.md").write_text("\n".join(sections))


def seconds_below(folder, out):
    """Of every step of a section, by its path below `out`."""
    timed = sorted(folder.rglob("*.seconds"))
    return {str(path.relative_to(out).with_suffix("")): float(path.read_text()) for path in timed}


def headline(summary, ours):
    """recall@10 at B=100 of the methods that are looked at first, in percent."""
    named = {"rnr_de": RNR, "pinv_mf_ind": PAPER, "bayes": BAYES, "ours": ours}
    return {f"{name}_at10_b100": round(100 * at(summary, method, 10, 100)["recall"], 1) for name, method in named.items()}


def load_world(folder):
    """The methods with settings of their own, and in their place those with chosen ones where they were judged."""
    fixed = load_evaluation(folder / "evaluation")
    parts = [load_evaluation(folder / name) for name in ("cur", "chosen") if is_done(folder, name)]
    added = [row for part in parts for row in part.summary if (row["method"], row["rounds"]) != RNR]
    again = {(row["method"], row["rounds"]) for row in added}
    kept = [row for row in fixed.summary if (row["method"], row["rounds"]) not in again]
    settings = {"settings": (parts or [fixed])[-1].manifest.config["settings"]}
    manifest = fixed.manifest.model_copy(update={"config": fixed.manifest.config | settings})
    return Evaluation(fixed.table, [*kept, *added], manifest)


def join_distilled(verbs, folder):
    """The rows over the distilled dual-encoder beside the others, with the calls that it has learned from."""
    distilled = load_evaluation(folder / "distilled/evaluation")
    calls = read_manifest(folder / "g_mix", "scores").counts["pairs"]
    renamed = [row | {"method": rename(row["method"]), "index_ce_calls": calls} for row in distilled.summary]
    table = distilled.table
    names = pa.array([rename(name) for name in table["method"].to_pylist()])
    table = table.set_column(table.column_names.index("method"), "method", names)
    joined = pa.concat_tables([verbs.table, table], promote_options="permissive")
    return Evaluation(joined, [*verbs.summary, *renamed], verbs.manifest)


def gains(folder, baseline):
    """What the closed form gains over another method of the same evaluation, by k and B, paired by query."""
    rows = summarize(load_evaluation(folder).table, baseline=baseline)
    return [{name: row[name] for name in GAIN} for row in rows if (row["method"], row["rounds"]) == BAYES]


def rename(method):
    """`RnR, distilled DE` of `RnR, DE`."""
    return method.removesuffix(", DE") + DISTILLED


def is_done(folder, name="evaluation"):
    return (folder / name / "manifest.json").exists()


def sweep_folder(out, part):
    return out / "sweep" / "{}x{}".format(*part)


def at(summary, method, k, budget):
    return next(row for row in summary if (row["method"], row["rounds"], row["k"], row["budget"]) == (*method, k, budget))


def title(name, evaluation):
    counts = evaluation.manifest.counts
    return f"{name}: {counts['items']:,} items, {counts['queries']} test queries"


def compact_table(summary):
    """A line per method, columns of k and B; index calls beside them."""
    cells = {(row["method"], row["rounds"], row["k"], row["budget"]): row for row in summary}
    methods = list(dict.fromkeys((row["method"], row["rounds"]) for row in summary))
    header = ["method", "R", "index CE calls", *(f"recall@{k}, B={b}" for k, b in SHOWN)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for method in methods:
        rows = [cells[*method, k, b] for k, b in SHOWN]
        calls = "unknown" if rows[0]["index_ce_calls"] is None else f"{rows[0]['index_ce_calls']:,}"
        lines.append([method[0], str(method[1]), calls, *map(percent, rows)])
    return table(lines)


def percent(row, name="recall"):
    return f"{100 * row[name]:.1f} ({100 * row[f'{name}_low']:.0f}–{100 * row[f'{name}_high']:.0f})"


def table(lines):
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def choose_ours(dev):
    """The closed form over plain or distilled embeddings, whichever finds more on the dev queries, over all budgets and k."""
    plain, distilled = (sum(row["recall"] for row in dev[name]) for name in ("dev_plain", "dev"))
    return (BAYES[0] + DISTILLED, BAYES[1]) if distilled > plain else BAYES


def judge_targets(verbs, lambdas, ours_at):
    """Each target: what was wanted, what was reached, with its interval."""
    against_paper = summarize(verbs.table, baseline=PAPER)
    found = []

    def add(what, wanted, row, name, reached):
        bounds = [round(100 * row[f"{name}_{side}"], 1) for side in ("low", "high")]
        value = round(100 * row[name], 1)
        found.append({"target": what, "wanted": wanted, "value": value, "interval": bounds, "reached": bool(reached)})

    for (k, b), level in LEVELS.items():
        row = at(verbs.summary, ours_at, k, b)
        add(f"recall@{k}, B={b}", level, row, "recall", 100 * row["recall"] >= level)
    for (k, b), gain in GAINS.items():
        row = at(against_paper, ours_at, k, b)
        add(f"gain of recall@{k} over pinv MF_Ind, B={b}", gain, row, "gain", 100 * row["gain"] >= gain)
    for k, summary in lambdas.items():
        for b in (100, 500):
            best = next(row for row in summary if (row["k"], row["budget"]) == (k, b))
            row = at(verbs.summary, ours_at, k, b)
            what = f"recall@{k} over the best λ for that k ({best['method']}), B={b}"
            add(what, round(100 * best["recall"], 1), row, "recall", row["recall"] > best["recall"])
    paper, rerank = at(verbs.summary, PAPER, 10, 500)["recall"], at(verbs.summary, RNR, 10, 500)["recall"]
    ours = at(verbs.summary, ours_at, 10, 100)
    add("recall@10, B=100 against pinv MF_Ind with B=500", round(100 * paper, 1), ours, "recall", ours["recall"] >= paper)
    ours = at(verbs.summary, ours_at, 10, 50)
    add("recall@10, B=50 against RnR DE with B=500", round(100 * rerank, 1), ours, "recall", ours["recall"] > rerank)
    return found


def target_table(targets):
    lines = [["target", "wanted", "measured", "reached"], ["---", "---:", "---:", "---"]]
    for row in targets:
        low, high = row["interval"]
        lines.append([row["target"], str(row["wanted"]), f"{row['value']} ({low}–{high})", "yes" if row["reached"] else "**no**"])
    return table(lines)


def gain_table(rows):
    """A line per method and budget, columns of k, in points of recall."""
    ks = sorted({row["k"] for row in rows})
    lines = [["method", "B", *(f"recall@{k}" for k in ks)], ["---", "---:", *["---:"] * len(ks)]]
    for method, budget in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        cells = {row["k"]: row for row in rows if (row["method"], row["budget"]) == (method, budget)}
        lines.append([method, str(budget), *(percent(cells[k], "gain") for k in ks)])
    return table(lines)


def stop_table(summary):
    """A line per target recall@10 and largest budget: what was found, for how many calls, beside the whole budget."""
    lines = [["B at most", "target recall@10", "recall@10", "CE calls, mean"], ["---:", "---:", "---:", "---:"]]
    for row in sorted(summary, key=lambda row: (row["budget"], row["target_recall"] or 1)):
        if row["method"].startswith(BAYES[0]):
            target = f"{100 * row['target_recall']:.0f}" if row["target_recall"] else "none"
            lines.append([str(row["budget"]), target, percent(row), f"{row['ce_calls']:.0f}"])
    return table(lines)


def sweep_table(swept):
    """A line per size of the score matrix; ours and the paper's side by side, both on the dual-encoder's nearest items."""
    columns = [(method, k, b) for k, b in ((10, 100), (100, 500)) for method in (PAPER, BAYES)]
    header = ["train queries x items", "CE calls", *(f"{method[0]}, recall@{k}, B={b}" for method, k, b in columns)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for (n, per_query), evaluation in swept.items():
        cells = [percent(at(evaluation.summary, *column)) for column in columns]
        lines.append([f"{n} x {per_query}", f"{n * per_query:,}", *cells])
    return table(lines)


def draw(verbs, out, ours):
    save_figure(draw_recall(verbs.summary, "13,767 items", baseline=RNR), DOCS / "recall")
    if is_done(out / "verbs", "stops"):
        save_figure(draw_reliability(load_evaluation(out / "verbs" / "stops").summary), DOCS / "recall_stop")
    save_figure(draw_calls_saved(verbs.summary, RNR), DOCS / "recall_calls_saved")
    save_figure(draw_pareto(verbs.summary, 10, RNR), DOCS / "recall_pareto")
    save_figure(draw_wins(verbs.table, ours, PAPER, 10), DOCS / "recall_wins")
