"""The tables and pictures of the comparison, from a summary (`summary.py`).

A cell is the mean ± half of the 95% interval (t) over the seeds that have the figure, "–" where none has. Choices beyond the paper:
 1. Table 8: eq. 18 of "responses" is the AUROC of answers; that of sentences stands beside it.
 2. Figure 4: the base is DPS, the untrained model that states a level. Improvement is relative, in percent and paired by seed:
    100 (MECE_base - MECE) / MECE_base and 100 (F1 - F1_base) / F1_base.
"""

import csv
import math
from pathlib import Path

import common
import evaluate

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from summary import OURS, TRAIN, holm, interval, mean_and_half, paired, values_of

BASE = "DPS"
TITLES = {"ece": "ECE↓", "mece": "MECE↓", "accuracy": "Acc↑", "f1": "F1↑"}  # of Table 1
EXTRA = {"brier_skill": "Brier skill↑", "auroc_sentence": "AUROC↑", "reasoning": "reasoning"}  # the AUROC of sentences, by part
EXTRA |= {"selective_80": "selective_80↑", "prr": "PRR↑", "tokens": "tokens", "seconds": "training, s"}
CSV_ONLY = ("selective_80↑", "PRR↑", "tokens", "training, s", "MECE - MMBoundary's")  # or the Markdown is too wide to read
MARK = "† Its MECE is on the other side of MMBoundary's than in the paper, by the means over the seeds that both have."
TABLE_3 = {  # of the paper
    "A-OKVQA": {"mean": "0.0443", "variance": "0.0015", "std": "0.0397", "< 0.1": "0.96"},
    "ScienceVQA": {"mean": "0.0578", "variance": "0.0014", "std": "0.0374", "< 0.1": "0.93"},
    "CulturalVQA": {"mean": "0.0522", "variance": "0.0015", "std": "0.0397", "< 0.1": "0.94"},
}
TABLE_7 = {OURS: "0.316 0.324", "UIC": "0.358 0.387"}  # of the paper: ECE and MECE on A-OKVQA; its Table 1 has .304 for MMBoundary
TABLE_8 = {"Multisample": "0.5016 0.4904", "SaySelf": "0.6872 0.6261", "Conf-CSR": "0.5238 0.4931", "RCE": "0.6037 0.6059"}
TABLE_8 |= {"DRL": "0.4956 0.4576", OURS: "0.6635 0.7108"}  # of the paper: A-OKVQA, CulturalVQA


def by_data(numbers: dict[str, tuple], data_sets: tuple[str, ...]) -> dict[str, dict]:
    """{row: its numbers in the paper's Table 1, four a data set} -> {data: {row: {metric: number}}}."""
    parts = [{row: of[4 * i : 4 * i + 4] for row, of in numbers.items()} for i in range(len(data_sets))]
    named = [{row: dict(zip(TITLES, of, strict=False)) for row, of in part.items()} for part in parts]
    return dict(zip(data_sets, named, strict=True))


# ------------------------------------------------------------------------------------------------------------------ tables
# A table is a list of lines {title: cell}; rows {row: {seed: figures}} and paper {row: {metric: number}} are of one data set.
def markdown(table: list[dict]) -> str:
    titles = [title for title in table[0] if title not in CSV_ONLY]
    lines = [titles, ["---"] * len(titles), *([line[title] for title in titles] for line in table)]
    known = [i for i, line in enumerate(table) if line.get("in the paper", True)]
    if 0 < len(known) and known[-1] + 1 < len(table):
        lines.insert(known[-1] + 3, ["*beyond the paper*"] + [""] * (len(titles) - 1))
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return f"{text}\n\n{MARK}" if "†" in text else text


def write_csv(path: Path, table: list[dict]) -> None:
    """The same for machines: what stands behind a ± has its own column."""
    rows = []
    for line in table:
        parts = {title: str(line[title]).split(" ± ") for title in line}
        rows.append({title + " ±" * i: part for title in line for i, part in enumerate(parts[title])})
    names = [title + mark for title in table[0] for mark in ("", " ±") if any(title + mark in row for row in rows)]
    with common.writing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def array(runs: dict[str, dict], name: str) -> np.ndarray:
    """The figure `name` (seeds,) of the runs that have it."""
    return np.array(list(values_of(runs, name).values()))


def cell(runs: dict[str, dict], name: str) -> str:
    return interval(array(runs, name))


def significance(rows: dict) -> dict[str, str]:
    """{row: p by seed, and "seeds that differ by question / seeds measured by question"}, after Holm's correction, level .05."""
    pairs = {row: paired(runs, rows.get(OURS, {}), "mece") for row, runs in rows.items() if row != OURS}
    by_seed = {row: float(stats.ttest_rel(*pair).pvalue) for row, pair in pairs.items() if pair.shape[1] > 1}
    by_seed = holm({row: p for row, p in by_seed.items() if not math.isnan(p)})
    by_question: dict = {}
    for seed in {seed for runs in rows.values() for seed in runs}:
        p = holm({row: runs[seed]["against"][3] for row, runs in rows.items() if runs.get(seed, {}).get("against")})
        for row in p:
            by_question.setdefault(row, []).append(p[row] < 0.05)
    counts = {row: f", {sum(hits)}/{len(hits)}" for row, hits in by_question.items()}
    p = {row: "< 0.001" if by_seed[row] < 0.001 else f"{by_seed[row]:.3f}" for row in by_seed}
    return {row: p.get(row, "–") + counts.get(row, "") for row in pairs}


def wrong_orders(rows: dict, paper: dict) -> dict[str, dict]:
    """{row: {metric: its mean and MMBoundary's}} where their order, over the seeds that both have, is not the paper's."""
    wrong: dict = {}
    for row, runs in rows.items():
        for name, number in paper.get(row, {}).items():
            pair = paired(runs, rows.get(OURS, {}), name)
            if pair.size and np.sign(np.subtract(*pair.mean(1))) != np.sign(number - paper[OURS][name]):
                wrong.setdefault(row, {})[name] = pair.mean(1)
    return wrong


def table_1(rows: dict, paper: dict) -> list[dict]:
    """Of one data set, its rows in the order of `paper`."""
    p, wrong, table = significance(rows), wrong_orders(rows, paper), []
    for row in [row for row in paper if rows.get(row)]:
        runs = rows[row]
        line = {"row": row + " †" * ("mece" in wrong.get(row, {})), "seeds": len(runs)}
        line |= {title: cell(runs, name) for name, title in TITLES.items()} | {"p": p.get(row, "")}
        line |= {title: cell(runs, name) for name, title in EXTRA.items()}
        line["MECE - MMBoundary's"] = interval(np.subtract(*paired(runs, rows.get(OURS, {}), "mece")))
        line["levels 1-5, %"] = " ".join(f"{100 * share:.0f}" for share in np.mean([run["levels"] for run in runs.values()], 0))
        table.append(line | {"in the paper": " ".join(map(evaluate.fmt, paper[row].values()))})
    return table


def table_3(runs: dict[str, dict]) -> list[dict]:
    """|C_ICE - C_SCE| of {seed: `ice_sce`}, above the paper's."""
    table = [{"": "digits, training"} | {name: cell(runs, name) for name in next(iter(TABLE_3.values()))}]
    return (table + [{"": f"{data}, in the paper"} | numbers for data, numbers in TABLE_3.items()]) * any(runs.values())


def side_by_side(found: dict, names: dict[str, str], published: dict[str, str]) -> list[dict]:
    """Tables 7 and 8: {figure: title} of each data set, the rows of the paper that are there."""
    table = []
    for row in [row for row in published if any(row in rows for rows in found.values())]:
        cells = {f"{title}, {data}": cell(found[data].get(row, {}), name) for data in found for name, title in names.items()}
        table.append({"row": row} | cells | {"in the paper": published[row]})
    return table


# ---------------------------------------------------------------------------------------------------------------- pictures
def improvements(rows: dict, methods: list[str]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Figure 4: {metric: {part: {row: improvement on the base in % (seeds,)}}}."""
    panels: dict = {}
    for name, sign in (("mece", -1), ("f1", 1)):
        for part in evaluate.PARTS:
            pairs = {row: paired(rows.get(row, {}), rows.get(BASE, {}), f"{part}_{name}") for row in methods if row != BASE}
            gains = {row: sign * 100 * (values - base) / base for row, (values, base) in pairs.items() if base.size and base.all()}
            panels.setdefault(f"{name.upper()}, improvement over {BASE}, %", {})[part] = gains
    return panels


def plot_intervals(path: Path, panels: dict[str, dict[str, dict[str, np.ndarray]]]) -> None:
    """{title: {label: {row: values (seeds,)}}}: a panel a title; in it means and 95% intervals, the rows from top to bottom."""
    rows = list(dict.fromkeys(row for series in panels.values() for values in series.values() for row in values))
    if not rows:
        return
    figure = Figure(figsize=(11, 1.4 + 0.36 * len(rows)), layout="constrained")
    for axis, (title, series) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for i, (label, values) in enumerate(series.items()):
            means, halves = np.array([mean_and_half(values.get(row, np.array([]))) for row in rows]).T  # (rows,) each
            y = np.arange(len(rows)) + 0.24 * i - 0.12
            axis.errorbar(means, y, xerr=np.nan_to_num(halves), fmt="os"[i], capsize=2, label=label)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axis.invert_yaxis()  # the panels share it
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    common.save_figure(path, figure)


def plot_risk(path: Path, found: dict, methods: list[str]) -> None:
    """Risk-coverage curves of sentences, means over seeds, a panel a data set."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, data in zip(figure.subplots(1, len(found), sharey=True), found, strict=True):
        for i, row in enumerate(methods):
            curves = [run["risk"] for run in found[data].get(row, {}).values() if run.get("risk")]
            if curves:
                axis.plot(np.arange(1, 21) / 20, np.mean(curves, 0), f"C{i}", label=row, linewidth=3 if row == OURS else 1.2)
                axis.legend(frameon=False)
        axis.set(title=data, xlabel="coverage, the most confident first", ylabel="share of wrong sentences")
    common.save_figure(path, figure)


def draw(found: dict, order: list[str], out: Path) -> None:
    """Table 1 as a picture, Figure 4 (in domain) and the risk-coverage curves; rows in the given order."""
    panels, methods = {}, order[: order.index(OURS) + 1]
    for name, title in (("mece", "MECE, lower is better"), ("brier_skill", "Brier skill, higher is better")):
        panels[title] = {data: {row: array(rows[row], name) for row in order if row in rows} for data, rows in found.items()}
    plot_intervals(out / "table_1.png", panels)
    plot_intervals(out / "figure_4.png", improvements(next(iter(found.values())), methods))
    plot_risk(out / "risk_coverage.png", found, methods)


def show(summary: dict, paper: dict[str, dict], out: Path | None = None) -> None:
    """Print all tables and what did not reproduce; with `out` write CSV and pictures, too. paper: {data: {row: {metric: number}}},
    in domain first, rows in their order."""
    found = {data: summary.get(data, {}) for data in paper}
    tables = {f"Table 1, {data}": table_1(found[data], paper[data]) for data in paper}
    tables["Table 3, C_ICE and C_SCE"] = table_3(summary.get(TRAIN, {}).get("agreed", {}))
    tables["Table 7, UIC"] = side_by_side(found, {"ece": "ECE↓", "mece": "MECE↓"}, TABLE_7)
    tables["Table 8, AUROC"] = side_by_side(found, {"auroc": "answers↑", "auroc_sentence": "sentences↑"}, TABLE_8)
    for title, table in tables.items():
        print(f"\n{title}\n\n{markdown(table) if table else 'nothing has been run'}")
    print("\nWhat did not reproduce: another order than the paper's, of means over the seeds that both rows have\n")
    for data in paper:
        for row, wrong in wrong_orders(found[data], paper[data]).items():
            said = [f"{TITLES[name][:-1]} {a:.3f} against {b:.3f}" for name, (a, b) in wrong.items()]
            print(f"* {data}, {row}: {', '.join(said)}")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        for title, table in [(title, table) for title, table in tables.items() if table]:
            write_csv(out / f"{common.plain(title).replace(' ', '_')}.csv", table)
        draw(found, list(next(iter(paper.values()))), out)
