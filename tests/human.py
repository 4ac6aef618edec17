"""Human evaluation (sec. 4.3; Table 2, Figure 7): a blind sheet for raters, and what their scores say.

    python evaluate.py --human-sheet SaySelf=runs/seed0/results/sayself-digits runs/seed0/results/mmboundary-digits --out sheet
    python evaluate.py --human-scores rater1.csv rater2.csv rater3.csv --out sheet

--human-sheet draws --entries questions, the same of every results folder, and writes sheet.html (from human.html), the page for
raters, which needs no network and no other file, and key.json, which they do not get: whose response each entry is. --human-scores
reads their files back, prints means and Cohen's kappa, and draws scores.png beside the sheet. Choices beyond the paper:
1. Raters read the response as the model wrote it, not as it was parsed: one statement for a whole response stands there once.
2. The interval of Avg. is 95% (t) over questions, each with its mean over raters and criteria: scores of one question go together.
3. Kappa has quadratic weights over the whole scale (9 for 10 is no full disagreement); that without weights stands beside it.
"""

import argparse
import csv
import functools
import hashlib
import itertools
import random
import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import evaluate

import jinja2
import numpy as np
import summary
from matplotlib.figure import Figure
from sklearn.metrics import cohen_kappa_score

CRITERIA = {
    "Faithful": "Is the stated confidence what the response deserves: sure where it is right, in doubt where it may be wrong?",
    "Concise": "Does the response convey what is needed clearly and without excess?",
    "Granular": "Is confidence stated for each distinct piece of knowledge?",
}
COLUMNS = ["entry", *map(str.lower, CRITERIA)]
ASKED = ("question", "choices", "answer", "reference")  # what makes two questions the same, beside the picture
NEEDED = {"id", "image", "response", "sentences", *ASKED}


# ------------------------------------------------------------------------------------------------------------------- sheet
def draw(folders: dict[str, Path], n: int, seed: int) -> list[tuple[str, dict, dict]]:
    """(system, prediction, picture) for n random questions of every system {name: results folder}, all shuffled together."""
    of, problems = {}, []
    for name, folder in folders.items():
        lines = common.read_jsonl(folder / "predictions.jsonl", own=False)
        of[name] = {line["id"]: line for line in lines if NEEDED <= line.keys()}
        if not lines or len(of[name]) < len(lines):
            problems.append(f"{folder}/predictions.jsonl holds {len(lines)} lines and {len(of[name])} different predictions")
    common.usage_error(*problems)
    shared, rng = sorted(set.intersection(*map(set, of.values())), key=str), random.Random(seed)
    if len(shared) < n:
        common.usage_error(f"--entries {n}, but the folders have {len(shared)} questions in common")

    thumbnail, drawn, first = functools.cache(evaluate.thumbnail), rng.sample(shared, n), next(iter(of))
    entries = [(name, of[name][i], thumbnail(of[name][i]["image"])) for name in of for i in drawn]
    asked = {(name, line["id"]): [*(line[key] for key in ASKED), picture] for name, line, picture in entries}
    for name in of:  # with another seed digits have other questions under the same ids, with other noise other pictures
        unseen = [i for i in drawn if asked[name, i][-1] is None]
        other = [i for i in drawn if asked[name, i] != asked[first, i]]
        problems += [f"{name} has no picture for {len(unseen)} of {n} questions: {unseen[0]}, ..." for _ in unseen[:1]]
        problems += [f"{name} and {first} ask other questions under {len(other)} of {n} ids: {other[0]}, ..." for _ in other[:1]]
    common.usage_error(*problems)
    rng.shuffle(entries)
    return entries


def write_sheet(folders: dict[str, Path], n: int, seed: int, out: Path) -> None:
    """sheet.html, and key.json {"sheet", "systems": [name], "entries": {entry: {"system", "id"}}}. A sheet is never replaced by
    another one, whose key would be lost."""
    entries = draw(folders, n, seed)
    said = repr([(name, prediction["id"], prediction["response"]) for name, prediction, _ in entries])
    key = {"sheet": hashlib.sha256(said.encode()).hexdigest()[:16], "systems": list(folders)}
    key["entries"] = {str(i): {"system": name, "id": prediction["id"]} for i, (name, prediction, _) in enumerate(entries, 1)}
    if (out / "key.json").exists() and common.read_object(out / "key.json") != key:
        common.usage_error(f"{out}/ holds another sheet; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(Path(__file__).with_suffix(".html").read_text("utf-8"))
    cards = [(prediction, picture) for _, prediction, picture in entries]
    common.write_json(out / "key.json", key)
    common.write_text(out / "sheet.html", page.render(cards=cards, criteria=CRITERIA, columns=COLUMNS, sheet=key["sheet"]))
    for name in folders:
        silent = [s for system, p, _ in entries if system == name for s in p["sentences"] if s["level"] and s["statement"] is None]
        if silent:
            print(f"{name}: sentences whose confidence the text does not say, so that no rater sees it: {len(silent)}")
    print(f"{out}/sheet.html has {len(entries)} entries; raters do not get {out}/key.json")


# ------------------------------------------------------------------------------------------------------------------ scores
def read_scores(path: str, entries: dict) -> tuple[dict[str, list[int]], list[str]]:
    """A rater's file -> {entry: scores in the order of CRITERIA}, and all that is wrong with it."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark in front
            reader = csv.DictReader(file, strict=True)
            header, rows = reader.fieldnames or [], list(reader)
    except (OSError, ValueError, csv.Error) as error:
        return {}, [f"{path} cannot be read: {error}"]
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        return {}, [f"{path} has no column {', '.join(missing)}"]
    scores, problems = {}, []
    for row in rows:
        entry, *values = ((row[column] or "").strip() for column in COLUMNS)
        problems += [f"{path}, entry {entry!r}: not in the sheet"] * (entry not in entries)
        problems += [f"{path}, entry {entry}: there twice"] * (entry in scores)
        problems += [f"{path}, entry {entry}: more cells than columns"] * (None in row)
        wrong = [(column, v) for column, v in zip(COLUMNS[1:], values, strict=True) if not re.fullmatch("[1-9]|10", v)]
        problems += [f"{path}, entry {entry}, {column}: {v!r} is no whole number from 1 to 10" for column, v in wrong]
        scores[entry] = [] if wrong else list(map(int, values))
    missing = [entry for entry in entries if entry not in scores]
    return scores, problems + [f"{path}: entry {', '.join(missing)} missing"] * bool(missing)


def means_table(scores: dict[str, np.ndarray]) -> str:
    """{system: (raters, questions, criteria)} -> Table 2 in Markdown, with 95% intervals of Avg. over questions."""
    lines = [f"| Model | {' | '.join(CRITERIA)} | Avg. |", "|---" * (len(CRITERIA) + 2) + "|"]
    for name, given in scores.items():
        average, half = summary.mean_and_half(given.mean((0, 2)))  # raters of one question are no independent samples
        cells = [name.replace("|", "\\|"), *(f"{mean:.2f}" for mean in given.mean((0, 1)))]
        lines.append(f"| {' | '.join(cells)} | {average:.2f}{'' if np.isnan(half) else f' ± {half:.2f}'} |")
    return "\n".join(lines)


def kappa(a: np.ndarray, b: np.ndarray, weights: str | None) -> float:
    """Cohen's kappa of two raters' scores (N,); NaN where both gave one score throughout. Weights are those of the scale 1 to 10,
    whichever scores occur."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")
        return float(cohen_kappa_score(a, b, labels=range(1, 11), weights=weights))


def kappa_table(raters: list[str], scores: np.ndarray) -> str:
    """Scores (raters, entries, criteria) -> Markdown: kappa with quadratic weights (and without), for each two raters."""
    rows = {}  # name: (criteria, 2)
    for (a, x), (b, y) in itertools.combinations(zip(raters, scores, strict=True), 2):
        both = zip(x.T, y.T, strict=True)
        rows[f"{a}, {b}"] = [[kappa(*given, "quadratic"), kappa(*given, None)] for given in both]
    rows["mean"] = np.mean(list(rows.values()), 0)
    lines = [f"| raters | {' | '.join(CRITERIA)} |", "|---" * (len(CRITERIA) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{evaluate.fmt(weighted)} ({evaluate.fmt(unweighted)})" for weighted, unweighted in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_scores(scores: dict[str, np.ndarray], path: Path) -> None:
    """Figure 7: for each criterion, a box a system over the scores of all raters; triangles are means."""
    figure = Figure(figsize=(3 + 1.8 * len(scores), 4.4), layout="constrained")
    names = [name.replace("$", r"\$") for name in scores]  # no formula
    for k, axis in enumerate(figure.subplots(1, len(CRITERIA), sharey=True)):
        axis.boxplot([given[:, :, k].ravel() for given in scores.values()], tick_labels=names, showmeans=True, widths=0.6)
        axis.set(title=list(CRITERIA)[k], ylim=(0.5, 10.5), yticks=range(1, 11))
        axis.tick_params("x", rotation=60)
    common.save_figure(path, figure)


def report_scores(sheet: Path, raters: list[str]) -> None:
    key = common.read_object(sheet / "key.json", "systems", "entries")
    read = [read_scores(path, key["entries"]) for path in raters]
    same = ["a rater's file is given twice"] * (len({Path(path).resolve() for path in raters}) < len(raters))
    common.usage_error(*same, *(problem for _, problems in read for problem in problems))
    scores = np.array([[given[entry] for entry in key["entries"]] for given, _ in read])  # (raters, entries, criteria)
    systems = np.array([entry["system"] for entry in key["entries"].values()])
    of = {name: scores[:, systems == name] for name in key["systems"]}
    n = len(systems) // len(of)
    print(f"{len(raters)} raters, {len(systems)} entries ({n} questions, {len(of)} systems); ± is half of the 95% interval\n")
    print(means_table(of))
    if len(raters) > 1:
        print(f"\nCohen's kappa with quadratic weights (and without)\n\n{kappa_table(raters, scores)}")
    plot_scores(of, sheet / "scores.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = common.usage_error
    mode = parser.add_mutually_exclusive_group(required=True)
    results = "write a blind sheet from what evaluate.py wrote; a system's name is the folder's, or NAME"
    mode.add_argument("--human-sheet", nargs="+", metavar="[NAME=]FOLDER", help=results)
    mode.add_argument("--human-scores", nargs="+", metavar="CSV", help="read the raters' files back, one each")
    parser.add_argument("--entries", type=int, default=50, help="number of questions (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and their order (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("sheet"), help="folder of the sheet and its key (default: sheet)")
    args = parser.parse_args(argv)
    if args.human_scores:
        return report_scores(args.out, args.human_scores)
    parts = [text.rpartition("=") for text in args.human_sheet]
    folders = {name or Path(folder).resolve().name: Path(folder) for name, _, folder in parts}
    problems = ["--entries must be positive"] * (args.entries < 1)
    problems += ["two folders have the same name; write NAME=FOLDER"] * (len(folders) < len(parts))
    common.usage_error(*problems)
    write_sheet(folders, args.entries, args.seed, args.out)
