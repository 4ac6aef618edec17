"""Stage 4: evaluation on the held-out test split (sec. 4.3, App. D).

The model answers greedily; its sentences and statements are parsed, and matched with the reference chain.

Writes to --out: metrics.json, predictions.jsonl, reliability.png, report.html (open it in any browser), config.json.

Metrics: ece, auroc, accuracy are of the answer (confidence: the last sentence's); mece (eq. 15-17), auroc_sentence, brier,
brier_skill, aurc, precision, recall and f1 (eq. 19-20) are of sentences. A sentence without a statement counts for precision, F1
and coverage, and is left out of every calibration metric.

Choices beyond the paper
 1. MECE is not a proper score: E|I - c| is least at c = 0 or 1. `mece_constant` is the MECE of always saying the best single level;
    Brier, a proper score, and its skill 1 - Brier/(p(1 - p)) stand beside it.
 2. The first sentences, as many as the reference has at the image level, count as the image level, the rest as reasoning.
 3. ECE is Guo et al.'s with 10 equal-width bins.

    python evaluate.py --ckpt ppo/
    python evaluate.py --ckpt warmup/ --out results_warmup
    python evaluate.py --ckpt ppo/ --data digits-ood --out results_ood
"""

import argparse
import base64
import io
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import common as c

LEVELS = (1, 2, 3, 4, 5)
# What is left out on the command line: (digits, other data)
DEFAULTS = {"limit": (600, None), "max_new_tokens": (100, 320), "batch_size": (200, 8)}
PARTS = ("image", "reasoning")

# -------------------------------------------------------------------------------------------------------------- metrics


def mean(x):
    return float(np.mean(x)) if len(x) else float("nan")


def stated(predictions):
    """All sentences with a statement: confidence (N,) in [0, 1] and correct (N,) in {0., 1.}."""
    pairs = [(c.conf(s["level"]), s["correct"]) for p in predictions for s in p["sentences"] if s["level"] is not None]
    return np.array(pairs, dtype=float).reshape(-1, 2).T


def only(predictions, part):
    """The same predictions with nothing but the sentences and the coverage of one part of the chain."""
    return [{**p, "sentences": [s for s in p["sentences"] if s["part"] == part],
             "covered": {part: p["covered"].get(part, [])}} for p in predictions]


def ece(confidence, correct, n_bins=10):
    """Expected calibration error (Guo et al., 2017, eq. 3): sum_b |B_b|/n |acc(B_b) - conf(B_b)|; both inputs (N,).

    Equal-width bins, closed on the right: (0, .1], (.1, .2], ...; a confidence of 0 falls into the first bin.
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    if not len(confidence):
        return float("nan")
    bins = np.searchsorted(np.arange(1, n_bins) / n_bins, confidence, side="left")  # (N,)
    # |B|/n |sum(correct)/|B| - sum(confidence)/|B|| = |sum(correct - confidence)|/n, so empty bins need no special case
    return float(np.abs(np.bincount(bins, weights=correct - confidence)).sum() / len(confidence))


def mece(predictions):
    """Multi-granular ECE, eq. 15-17; a response without any statement is left out (`coverage` stands beside it)."""
    errors = [[abs(s["correct"] - c.conf(s["level"])) for s in p["sentences"] if s["level"] is not None] for p in predictions]
    return mean([mean(e) for e in errors if e])  # inner mean: eq. 16; outer mean: eq. 17


def mece_constant(predictions):
    """(lowest MECE, its level) if every sentence with a statement said one and the same level: the bar MECE must clear.

    With a = the mean over responses of the share of right sentences, always saying c gives a(1 - c) + (1 - a)c. That is
    linear in c, so the best constant is level 1 or 5 and MECE itself rewards extremes; hence Brier skill beside it.
    """
    correct = [[s["correct"] for s in p["sentences"] if s["level"] is not None] for p in predictions]
    a = mean([mean(c) for c in correct if c])
    if np.isnan(a):
        return a, None
    values = {level: a * (1 - c.conf(level)) + (1 - a) * c.conf(level) for level in LEVELS}
    level = min(values, key=values.get)
    return values[level], level


def auroc(confidence, correct):
    """Area under the ROC curve, eq. 18, as a rank statistic: P(right one ranks above wrong one) + P(tie)/2."""
    correct = np.asarray(correct, dtype=bool)
    n_pos, n_neg = int(correct.sum()), int((~correct).sum())
    if n_pos == 0 or n_neg == 0:
        return float("nan")
    _, group, counts = np.unique(np.asarray(confidence, dtype=float), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]  # (N,) 1-based, the mean rank within a tie
    return float((ranks[correct].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def brier(confidence, correct):
    """Mean squared difference of confidence and correctness: a proper score, lower is better."""
    return mean((np.asarray(confidence, dtype=float) - np.asarray(correct, dtype=float)) ** 2)


def brier_skill(confidence, correct):
    """1 - Brier / (p(1 - p)): 0 = no better than always saying the base rate p of right sentences, 1 = perfect."""
    p = mean(np.asarray(correct, dtype=float))
    return 1 - brier(confidence, correct) / (p * (1 - p)) if 0 < p < 1 else float("nan")


def aurc(confidence, correct):
    """Area under the risk-coverage curve (Geifman & El-Yaniv, 2017; Ding et al., 2020), lower is better.

    Mean over k = 1..N of the error rate among the k most confident. Five levels tie nearly everywhere, so within a tie
    each sentence carries the tie's mean error: exactly the expectation over random orders of the tied ones.
    """
    if not len(confidence):
        return float("nan")
    error = 1 - np.asarray(correct, dtype=float)
    _, group, counts = np.unique(-np.asarray(confidence, dtype=float), return_inverse=True, return_counts=True)
    risk = np.repeat(np.bincount(group, weights=error) / counts, counts)  # (N,) most confident first
    return mean(np.cumsum(risk) / np.arange(1, len(risk) + 1))


def sentence_metrics(predictions):
    """What is reported for the whole chain and again for its image and its reasoning part."""
    confidence, correct = stated(predictions)
    matched = [bool(s["correct"]) for p in predictions for s in p["sentences"]]
    covered = [bool(c) for p in predictions for part in p["covered"].values() for c in part]
    precision, recall = mean(matched), mean(covered)  # eq. 19, micro-averaged over the test set
    # A chain that says nothing, or nothing right, scores F1 = 0; without any reference there is no F1.
    f1 = 2 * precision * recall / (precision + recall) if precision * recall > 0 else 0.0  # eq. 20
    return {
        "mece": mece(predictions),
        "auroc_sentence": auroc(confidence, correct),
        "brier": brier(confidence, correct),
        "f1": f1 if covered else float("nan"),
        "precision": precision,
        "recall": recall,
        "n_sentences": len(matched),
    }


def compute_metrics(predictions):
    """metrics.json: plain ints, floats and None. ECE, AUROC and accuracy are of the answer, the rest of sentences."""
    confidence, correct = stated(predictions)
    last = [(c.conf(p["sentences"][-1]["level"]), p["answer_correct"]) for p in predictions
            if p["sentences"] and p["sentences"][-1]["level"] is not None]
    answer_confidence, answer_correct = np.array(last, dtype=float).reshape(-1, 2).T
    levels = [s["level"] for p in predictions for s in p["sentences"]]
    constant, constant_level = mece_constant(predictions)
    metrics = {
        "ece": ece(answer_confidence, answer_correct),
        "coverage": mean([level is not None for level in levels]),
        "auroc": auroc(answer_confidence, answer_correct),
        "accuracy": mean([bool(p["answer_correct"]) for p in predictions]),
        "direct_answer": mean([c.direct_answer_score(p["prediction"], p.get("answers") or [p["answer"]]) for p in predictions]),
        **sentence_metrics(predictions),
        "n_questions": len(predictions),
        "level_histogram": {**{str(k): levels.count(k) for k in LEVELS}, "none": levels.count(None)},
        "brier_skill": brier_skill(confidence, correct),
        "aurc": aurc(confidence, correct),
        "mece_constant": constant,
        "mece_constant_level": constant_level,
        **{part: sentence_metrics(only(predictions, part)) for part in PARTS},
    }
    return without_nan(metrics)


def without_nan(value):
    """NaN is no JSON: None in its place."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


# ----------------------------------------------------------------------------------------------------- table and figure


def fmt(value, digits=3):
    return "–" if value is None else f"{value:.{digits}f}"


def format_table(rows):
    """{run name: metrics} -> a markdown table, padded so that it also reads well in a terminal."""
    table = [["run", "ECE↓", "MECE↓ (always level k)", "Brier skill↑", "AUROC↑", "AUROC-sent↑ (image / reasoning)", "Acc↑", "F1↑",
              "coverage", "levels used"]]
    for name, m in rows.items():
        k, image, reasoning = m["mece_constant_level"], m["image"], m["reasoning"]
        constant = f" ({fmt(m['mece_constant'])}, k={k})" if k else ""
        parts = f" ({fmt(image['auroc_sentence'])} / {fmt(reasoning['auroc_sentence'])})"
        used = " ".join(str(level) if m["level_histogram"][str(level)] else "·" for level in LEVELS)
        table.append([name.replace("|", "\\|"), fmt(m["ece"]), fmt(m["mece"]) + constant, fmt(m["brier_skill"]), fmt(m["auroc"]),
                      fmt(m["auroc_sentence"]) + parts, fmt(m["accuracy"]), fmt(m["f1"]), fmt(m["coverage"]), used])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def wilson(k, n, z=1.96):
    """95% Wilson score interval of k successes in n trials: honest near 0 and 1, where the levels are meant to be."""
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (k * (n - k) / n + z * z / 4) ** 0.5
    return centre - half, centre + half


def plot_reliability(predictions, path):
    """Left: observed accuracy of the sentences of each level, by part. Right: how many there are, right and wrong."""
    confidence, correct = stated(predictions)
    fig = Figure(figsize=(10, 4.6), layout="constrained", dpi=130)
    left, right = fig.subplots(1, 2, width_ratios=[1.15, 1])
    left.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, zorder=0, label="calibrated")
    for part, colour, marker, shift in zip(PARTS, ("#0072B2", "#D55E00"), "os", (-0.014, 0.014), strict=True):
        part_confidence, part_correct = stated(only(predictions, part))
        used = [k for k in LEVELS if (part_confidence == c.conf(k)).any()]
        n = np.array([(part_confidence == c.conf(k)).sum() for k in used])
        hits = np.array([part_correct[part_confidence == c.conf(k)].sum() for k in used])
        x = np.array([c.conf(k) for k in used]) + shift  # side by side, or the intervals hide each other
        left.vlines(x, *wilson(hits, n), color=colour, linewidth=1.6, zorder=1)
        area = 22 + 260 * n / max(len(confidence), 1)
        left.scatter(x, hits / n, s=area, color=colour, marker=marker, alpha=0.85, edgecolor="white", zorder=2)
        left.scatter([], [], s=50, color=colour, marker=marker, label=f"{part} (n = {len(part_correct)})")
    left.set(xlim=(-0.07, 1.07), ylim=(-0.04, 1.17), yticks=np.arange(6) / 5, ylabel="observed accuracy, 95% interval")
    left.set_title("Reliability of sentences (area: count)", fontsize=11)
    left.legend(loc="upper left", frameon=False, fontsize=9, ncols=3, columnspacing=1)
    counts = np.array([[(correct[confidence == c.conf(k)] == r).sum() for k in LEVELS] for r in (1, 0)])  # (2, 5)
    x = [c.conf(k) for k in LEVELS]
    right.bar(x, counts[0], 0.17, color="#009E73", label="right")
    right.bar(x, counts[1], 0.17, bottom=counts[0], color="#E8B4A0", hatch="///", edgecolor="#A04020", label="wrong")
    for xi, n in zip(x, counts.sum(0), strict=True):
        right.annotate(str(n), (xi, n), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)
    n_none = sum(s["level"] is None for p in predictions for s in p["sentences"])
    right.set(ylabel="sentences", xlim=(-0.14, 1.14), ylim=(0, 1.22 * max(counts.sum(0).max(), 1)))
    right.set_title(f"Levels used ({n_none} without a statement)", fontsize=11)
    right.legend(loc="upper left", frameon=False, fontsize=9, ncols=2)
    for ax in (left, right):
        ax.set_xticks(x, [f"{k}\n{c.conf(k):g}" for k in LEVELS])
        ax.set_xlabel("expressed level / confidence")
        ax.spines[["top", "right"]].set_visible(False)
    numbers = [fmt(without_nan(v)) for v in (mece(predictions), auroc(confidence, correct))]
    fig.suptitle(f"n = {len(confidence)} sentences     MECE = {numbers[0]}     AUROC = {numbers[1]}", fontsize=12)
    fig.savefig(path, metadata={"Software": None})  # no version stamp: the same predictions give the same bytes


# --------------------------------------------------------------------------------------------------------------- report

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { --bg: #f5f6f8; --card: #fff; --ink: #1b1f24; --soft: #5a6472; --line: #d9dee5; --tint: 30 100 210; --right: #00724f;
  --wrong: #b3400a } * { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 1180px; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 0 .8rem } h2 { font-size: 1.05rem; margin: 0 }
h3 { font-size: .75rem; color: var(--soft); margin: .7rem 0 .2rem; text-transform: uppercase; letter-spacing: .05em }
div > h3:first-child, li:first-child h3 { margin-top: 0 } dd { margin: 0; font-size: 1.25rem } dd small { display: block }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: .5rem; margin: 0 }
dl div, .card, nav { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem .7rem }
dt, small, .soft { font-size: .82rem; color: var(--soft) } nav { position: sticky; top: 0; margin: 1rem 0 }
.figure { display: block; max-width: 100%; width: 860px; margin: 1rem auto; border-radius: 8px }
nav div { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: .2rem 0 }
button { font: inherit; font-size: .9rem; padding: .25rem .7rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--bg); color: inherit; cursor: pointer } button[aria-pressed=true] { background: var(--ink); color: var(--card) }
:focus-visible { outline: 3px solid rgb(var(--tint)); outline-offset: 2px }
.card { padding: 1rem; margin-bottom: 1rem; display: grid; gap: .6rem 1.4rem;
  grid-template-columns: auto minmax(0, 1.5fr) minmax(0, 1fr) } .card[hidden] { display: none } .card header { grid-column: 1 / -1 }
.card img { display: block; width: 200px; border-radius: 4px } .missing { width: 160px; margin: 0 }
.card img.pixelated { width: 160px; image-rendering: pixelated } .answer { margin: .7rem 0 0 }
ol, ul { list-style: none; margin: 0; padding: 0 } li { margin: .25rem 0 } .l0 { outline: 1px dashed var(--line) }
.s { padding: .25rem .6rem; border-radius: 5px; border-left: 4px solid var(--right) } .s.no { border-left: 4px dashed var(--wrong) }
.l1 { background: rgb(var(--tint) / .05) } .l2 { background: rgb(var(--tint) / .15) } .l3 { background: rgb(var(--tint) / .26) }
.l4 { background: rgb(var(--tint) / .38) } .l5 { background: rgb(var(--tint) / .52) } b.yes { color: var(--right) }
.legend span { padding: 0 .5rem; border-radius: 4px; color: var(--ink) } b.no { color: var(--wrong) }
.level { padding: 0 .35em; font-size: .8rem; border: 1px solid currentColor; border-radius: 4px; margin-right: .45em }
.s b.yes, .s b.no { background: var(--card); border-radius: 4px; padding: 0 .25em; margin-left: .3em }
@media (max-width: 820px) { .card { grid-template-columns: minmax(0, 1fr) } nav { position: static } }
</style></head><body>
<h1>$title</h1><dl>$figures</dl>$reliability
<nav aria-label="Filters"><div>$buttons</div><div class="legend soft">Expressed confidence: $legend
<b class="yes">✓</b> matches the reference <b class="no">✗</b> does not</div></nav>
<p class="soft" role="status"><span id="shown">$n_shown</span> of $n_shown cards. $note</p>
<main>$cards</main>
<script>
const buttons = [...document.querySelectorAll("nav button")], cards = [...document.querySelectorAll(".card")];
buttons.forEach(button => button.addEventListener("click", () => {
  buttons.forEach(b => b.setAttribute("aria-pressed", b === button));
  const tag = button.dataset.tag;
  cards.forEach(card => card.hidden = tag !== "all" && !card.dataset.tags.split(" ").includes(tag));
  document.getElementById("shown").textContent = cards.filter(card => !card.hidden).length;
}));
</script></body></html>
""")

FILTERS = {  # tag: (label, test of a question)
    "all": ("all", lambda p: True),
    "overconfident": ("confident and wrong", lambda p: any((s["level"] or 0) >= 4 and not s["correct"] for s in p["sentences"])),
    "underconfident": ("unsure and right", lambda p: any((s["level"] or 5) <= 2 and s["correct"] for s in p["sentences"])),
    "wrong": ("wrong answer", lambda p: not p["answer_correct"]),
    "unstated": ("no statement", lambda p: any(s["level"] is None for s in p["sentences"]) or not p["sentences"]),
}


def data_uri(data, kind):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_html(path):
    """<img> with the picture inside: tiny ones as they are, with hard pixels; others as a thumbnail."""
    try:
        with Image.open(path) as image:
            kind, css = ("png", "pixelated") if max(image.size) <= 64 else ("jpeg", "photo")
            image = image.convert("RGBA")
    except Exception:  # whatever is wrong with a file, it costs its picture and not the page
        return f'<p class="missing soft">no image at {escape(str(path))}</p>'
    image.thumbnail((320, 320))
    # On white: a diagram is often black lines on transparency, which would turn black on black.
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return f'<img class="{css}" alt="image of the question" src="{data_uri(buffer.getvalue(), kind)}">'


def mark(good, yes, no):
    css, label, sign = ("yes", yes, "✓") if good else ("no", no, "✗")
    return f'<b class="{css}" role="img" aria-label="{label}">{sign}</b>'


def card_html(p):
    sentences, part = [], None
    for s in p["sentences"]:
        if s["part"] != part:
            part = s["part"]
            sentences.append(f"<li><h3>{escape(part)}</h3></li>")
        level = f'<b class="level" title="expressed level">{s["level"] or "–"}</b>'
        statement = f" <i>{escape(s['statement'])}</i>" if s["statement"] else ""
        css = f"s l{s['level'] or 0} {'yes' if s['correct'] else 'no'}"
        sentences.append(f'<li class="{css}">{level}{escape(s["text"])}{statement} {mark(s["correct"], "right", "wrong")}</li>')
    reference = ""
    for part in PARTS:
        pairs = zip(p["reference"].get(part, []), p["covered"].get(part, []), strict=True)
        items = "".join(f"<li>{mark(c, 'covered', 'not covered')} {escape(text)}</li>" for text, c in pairs)
        reference += f"<h3>Reference, {part}</h3><ul>{items or '<li>–</li>'}</ul>"
    tags = " ".join(tag for tag, (_, test) in FILTERS.items() if test(p))
    choices = f'<div class="soft">Choices: {escape(" · ".join(map(str, p["choices"])))}</div>' if p["choices"] else ""
    answer = "no answer found" if p["prediction"] is None else p["prediction"]
    return (
        f'<article class="card" data-tags="{tags}"><header><small>{escape(str(p["id"]))}</small>'
        f"<h2>{escape(p['question'])}</h2>{choices}</header><div>{image_html(p['image'])}</div>"
        f"<div><ol>{''.join(sentences) or '<li>' + escape(p['response'] or '(empty response)') + '</li>'}</ol>"
        f'<p class="answer">Answer: <b>{escape(answer)}</b> {mark(p["answer_correct"], "right", "wrong")} '
        f'<span class="soft">gold: {escape(p["answer"])}</span></p></div><div>{reference}</div></article>'
    )


def write_report(predictions, metrics, path, title, limit=200):
    """One HTML file that needs no network and no other file: the figures, then a card for each of `limit` questions."""
    path, shown = Path(path), predictions[:limit]
    k = metrics["mece_constant_level"]
    constant = f"always {k}: {fmt(metrics['mece_constant'])}" if k else "no statement"
    figures = [("ECE ↓", "ece", "answers"), ("MECE ↓", "mece", constant), ("Brier skill ↑", "brier_skill", "sentences"),
               ("AUROC ↑", "auroc", "answers"), ("AUROC ↑", "auroc_sentence", "sentences"),
               ("Accuracy ↑", "accuracy", f"{metrics['n_questions']} answers"),
               ("Chain F1 ↑", "f1", f"{metrics['n_sentences']} sentences"), ("Coverage", "coverage", "of sentences")]
    tiles = [f"<div><dt>{a}</dt><dd>{fmt(metrics[b])}<small>{c}</small></dd></div>" for a, b, c in figures]
    plot, reliability = path.with_name("reliability.png"), ""
    if plot.exists():
        alt = "Reliability of sentences by expressed level, and the number of sentences at each level"
        reliability = f'<img class="figure" alt="{alt}" src="{data_uri(plot.read_bytes(), "png")}">'
    buttons = [f'<button type="button" data-tag="{tag}" aria-pressed="{"true" if tag == "all" else "false"}">'
               f"{label} ({sum(map(test, shown))})</button>" for tag, (label, test) in FILTERS.items()]
    cut = f"Only the first {limit} of {len(predictions)} questions are shown; the figures above are over all of them."
    legend = "".join(f'<span class="l{k}">{k}</span>' for k in LEVELS) + '<span class="l0">– no statement</span>'
    page = PAGE.substitute(
        title=escape(title), figures="".join(tiles), reliability=reliability, buttons="".join(buttons), legend=legend,
        n_shown=len(shown), note=cut if len(predictions) > limit else "", cards="".join(map(card_html, shown)))
    path.write_text(page, encoding="utf-8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = c.Parser(__doc__)
    parser.add_argument("--ckpt", default="ppo", help="folder of ppo.py, warmup.py or of a base model (default: %(default)s/)")
    parser.add_argument("--data", choices=[*c.DATASETS, *c.PUBLISHED], help="data set (default: the run's)")
    parser.add_argument("--data-dir", help="folder with the published annotations and the images (default: the run's)")
    parser.add_argument("--allow-bad-records", action="store_true", help="go on when more than a fifth of the records is unusable")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="tune on validation, report on test")
    parser.add_argument("--limit", type=int, help="number of questions (digits: 600; other data: all)")
    parser.add_argument("--noise-scale", type=float, help="digits: multiplies the noise of every image (default: the run's)")
    parser.add_argument("--cache", help="where the digits world keeps its images (default: the run's)")
    parser.add_argument("--max-new-tokens", type=int, help="longest response (100 / 320)")
    parser.add_argument("--batch-size", type=int, help="questions a batch (200 / 8)")
    c.add_run_arguments(parser.add_argument_group("run"), out="results")
    args = parser.parse_args(argv)
    c.usage_error(*c.positive(args, "limit", "noise_scale", "max_new_tokens", "batch_size"))
    return args


def read_setup(args: argparse.Namespace) -> dict:
    """The setup that a run of this project was made with; a base model has none and gets the data set's."""
    ckpt = Path(args.ckpt)
    if not ckpt.is_dir():
        c.usage_error(f"no such folder: {args.ckpt}")
    config = c.read_json(ckpt / "config.json") if (ckpt / "config.json").exists() else {}
    if "setup" not in config and "model_type" not in config:
        c.usage_error(f"{args.ckpt} holds neither a model nor a run of warmup.py or ppo.py")
    setup = {"data": "digits", "data_dir": None, "cache": "cache", "noise_scale": 1.0, "world_seed": args.seed, "matcher": None}
    setup |= config.get("setup", {})
    given = {"data": args.data, "data_dir": args.data_dir, "noise_scale": args.noise_scale, "cache": args.cache}
    setup |= {k: v for k, v in given.items() if v is not None}
    return setup | {"matcher": setup["matcher"] or c.default_of(c.MATCHER, setup)}


def predict(model, processor, records: list[dict], matcher: c.Matcher, max_new_tokens: int, seed: int) -> list[dict]:
    """Greedy responses to a batch of questions, parsed and matched: lines of predictions.jsonl."""
    predictions = []
    generations = c.generate(model, processor, records, 0.0, max_new_tokens, seed)
    parsed = c.parse([g.text for g in generations])
    matches = matcher([[s.text for s in steps] for steps in parsed], [c.chain(r) for r in records])
    for record, generation, steps, matched in zip(records, generations, parsed, matches, strict=True):
        n_image = len(record["reference"]["image"])
        sentences = [
            {"text": s.text, "statement": s.statement, "level": s.level, "correct": bool(matched[i].any()),
             "part": "image" if i < n_image else "reasoning"} for i, s in enumerate(steps)
        ]  # fmt: skip
        covered = matched.any(0).tolist()
        answer = c.extract_answer([s.text for s in steps], record["choices"])
        predictions.append(record | {
            "response": generation.text, "prediction": answer, "answer_correct": c.same_answer(answer, record["answer"]),
            "sentences": sentences, "covered": {"image": covered[:n_image], "reasoning": covered[n_image:]},
        })  # fmt: skip
    return predictions


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup, out = read_setup(args), Path(args.out)
    c.fill_defaults(args, DEFAULTS, setup)
    if c.start_run("evaluate", args, "metrics.json", setup):
        return
    records = c.load_data(setup["data"], setup["data_dir"], args.split, args.limit, True, args.allow_bad_records, setup)
    c.statement_encoder = setup.get("statement_encoder")
    matcher, path = c.Matcher(setup["matcher"], device=args.device), out / "predictions.jsonl"
    model, processor = c.load_model(args.ckpt, args)
    predictions = c.read_jsonl(path) if path.exists() else []
    bar = tqdm(total=len(records), initial=len(predictions), desc="evaluate")
    while len(predictions) < len(records):
        batch = records[len(predictions) : len(predictions) + args.batch_size]
        predictions += predict(model, processor, batch, matcher, args.max_new_tokens, args.seed)
        c.append_jsonl(path, predictions[-len(batch) :])
        bar.update(len(batch))
        bar.set_postfix(accuracy=f"{np.mean([p['answer_correct'] for p in predictions]):.3f}")
    bar.close()
    metrics = compute_metrics(predictions)
    plot_reliability(predictions, out / "reliability.png")
    write_report(predictions, metrics, out / "report.html", f"{args.ckpt} on {setup['data']}, {args.split} split")
    print(format_table({str(args.ckpt): metrics}))
    c.write_json(out / "metrics.json", metrics)


if __name__ == "__main__":
    main()
