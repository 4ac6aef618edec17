"""Stage 4: evaluation on the held-out test split (sec. 4.3, App. D).

The model answers greedily; its sentences and statements are parsed, and matched with the reference chain. A sentence without a
statement counts for precision, F1 and coverage, and is left out of every calibration metric.

Writes to --out: metrics.json, predictions.jsonl, reliability.png, report.html (open it in any browser). Choices beyond the paper:
MECE is not a proper score, E|I - c| is least at c = 0 or 1. `mece_constant` is the MECE of always saying the best single level;
Brier, a proper score, and its skill stand beside it.

    python evaluate.py --ckpt ppo/                    # --server URL: an inference server samples. With flags of their own (--help):
    python evaluate.py --ckpt ppo/ --bars             # instead, what the untrained model's internal confidence is worth
    python evaluate.py --ckpt ppo/ --correct 3        # draw doubtful sentences again; votes, selective answers
    python evaluate.py --table runs/                  # the comparison of what tests/rows.py has run
    python evaluate.py --human-sheet results/         # human evaluation; --human-scores rater.csv
"""

import argparse
import base64
import functools
import io
import itertools
import json
import math
import re
from pathlib import Path

import common
from common import COUNT, DIGITS, LEVELS, NATURAL, POSITIVE, PUBLISHED, RUN_FLAGS, SWITCH, TEXT, all_sentences, auroc, bare, conf

import jinja2
import numpy as np
import scipy

PARTS = ("image", "reasoning")
FILLERS = set("a an and as at by for from in is it of on or so that the this to with image picture".split())  # answer nothing
FLAGS = {
    "run": {"ckpt": (TEXT, "ppo", "of ppo.py, warmup.py, or a model"), "out": (TEXT, "results", "folder to write"), **RUN_FLAGS},
    "data": {
        "data": ((*DIGITS, *PUBLISHED), None, "data set (default: the run's)"),
        "data_dir": (TEXT, None, "folder with the published annotations and the images (default: the run's)"),
        "allow_bad_records": (SWITCH, False, "go on when more than a fifth of the records is unusable"),
        "split": (("test", "validation"), "test", "tune on validation, report on test"),
        "limit": (COUNT, 600, None, "number of questions"),
        "consistency": (NATURAL, 0, "levels by agreement among so many sampled responses, not by statements (the baseline SC)"),
        "noise_scale": (POSITIVE, None, "digits: multiplies the noise of every image (default: the run's)"),
        "cache": (TEXT, None, "where the digits world keeps its images (default: the run's)"),
        "max_new_tokens": (COUNT, 100, 320, "longest response"),
        "batch_size": (COUNT, 200, 8, "questions a batch"),
    },
}
parse_args = functools.partial(common.parse_flags, __doc__, FLAGS)


# ----------------------------------------------------------------------------------------------------------------- metrics
def mean(values) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def stated(predictions: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """All sentences with a statement: confidence (N,) in [0, 1] and correct (N,) in {0., 1.}."""
    sentences = [sentence for sentence in all_sentences(predictions) if sentence["level"] is not None]
    levels, correct = (np.array([sentence[name] for sentence in sentences], dtype=float) for name in ("level", "correct"))
    return conf(levels), correct


def only(lines: list[dict], part: str) -> list[dict]:
    """The same predictions with nothing but the sentences and the coverage of one part of the chain."""
    return [dict(p, sentences=[s for s in p["sentences"] if s["part"] == part], covered={part: p["covered"][part]}) for p in lines]


def ece(confidence, correct, n_bins: int = 10) -> float:
    """Expected calibration error (Guo et al., 2017, eq. 3): sum_b |B_b|/n |acc(B_b) - conf(B_b)|; both inputs (N,). Equal-width
    bins, closed on the right: (0, .1], (.1, .2], ...; a confidence of 0 falls into the first bin."""
    if not len(confidence):
        return math.nan
    gap = np.subtract(correct, confidence, dtype=float)
    bins = np.searchsorted(np.arange(1, n_bins) / n_bins, confidence)  # (N,)
    # |B|/n |sum(correct)/|B| - sum(confidence)/|B|| = |sum(correct - confidence)|/n, so empty bins need no special case
    return float(sum(abs(gap[bins == b].sum()) for b in range(n_bins)) / len(gap))


def mece(predictions: list[dict]) -> float:
    """Multi-granular ECE: the mean over responses, but those without a statement, of the mean |correct - confidence|."""
    errors = [np.abs(correct - confidence) for confidence, correct in (stated([p]) for p in predictions)]  # eq. 15
    return mean([mean(error) for error in errors if len(error)])  # eq. 16: a response; # eq. 17: all


def mece_constant(predictions: list[dict]) -> tuple[float, int | None]:
    """(lowest MECE, its level) if all sentences said the same level: the bar MECE must clear. With a the mean over responses of the
    share of right ones, always saying c gives a(1 - c) + (1 - a)c, linear in c: the best constant is level 1 or 5."""
    shares = [mean(correct) for _, correct in (stated([p]) for p in predictions) if len(correct)]
    if not shares:
        return math.nan, None
    right = mean(shares)
    return min((right * (1 - conf(level)) + (1 - right) * conf(level), level) for level in LEVELS)


def brier(confidence, correct) -> float:
    """Mean squared difference of confidence and correctness: a proper score, lower is better."""
    return mean(np.square(np.subtract(confidence, correct)))


def brier_skill(confidence, correct) -> float:
    """1 - Brier / (p(1 - p)): 0 = no better than always saying the base rate p of right sentences, 1 = perfect."""
    p = mean(correct)
    return 1 - brier(confidence, correct) / (p * (1 - p)) if 0 < p < 1 else math.nan


def risk_coverage(confidence, correct) -> np.ndarray:
    """Error rate (N,) among the k most confident, k = 1..N (Geifman & El-Yaniv, 2017); its mean is the area under the curve (AURC).
    Within a tie each carries the tie's mean error, the expectation over random orders."""
    confidence, error = np.asarray(confidence, dtype=float), 1 - np.asarray(correct, dtype=float)
    for value in np.unique(confidence):
        error[confidence == value] = error[confidence == value].mean()
    return np.cumsum(error[np.argsort(-confidence)]) / np.arange(1, len(error) + 1)


def sentence_metrics(predictions: list[dict]) -> dict:
    """What is reported for the whole chain and again for its image and its reasoning part."""
    sentences = stated(predictions)
    matched = [sentence["correct"] for sentence in all_sentences(predictions)]
    covered = [hit for p in predictions for part in p["covered"].values() for hit in part]
    precision, recall = mean(matched), mean(covered)  # eq. 19, micro-averaged over the test set
    # A chain that says nothing, or nothing right, scores F1 = 0; without any reference there is no F1.
    f1 = 2 * precision * recall / (precision + recall) if precision * recall > 0 else 0.0  # eq. 20
    metrics = {"mece": mece(predictions), "auroc_sentence": auroc(*sentences), "brier": brier(*sentences)}
    metrics |= {"f1": f1 if covered else math.nan, "precision": precision, "recall": recall}
    return metrics | {"n_sentences": len(matched)}


def compute_metrics(predictions: list[dict]) -> dict:
    """metrics.json: plain ints, floats and None. ECE, AUROC and accuracy are of the answer, the rest of sentences."""
    sentences = stated(predictions)
    last = [p["sentences"][-1] | {"correct": p["answer_correct"]} for p in predictions if p["sentences"]]
    answers = stated([{"sentences": last}])  # eq. 1: c is that of the last sentence
    levels = [sentence["level"] for sentence in all_sentences(predictions)]
    direct = [p for p in predictions if not p.get("difficult_direct_answer")]  # as A-OKVQA's authors do
    metrics = {"ece": ece(*answers), "auroc": auroc(*answers)}
    metrics |= {"accuracy": mean([p["answer_correct"] for p in predictions]), "coverage": mean([bool(n) for n in levels])}
    metrics["direct_answer"] = mean([direct_answer_score(p["prediction"], p.get("answers") or [p["answer"]]) for p in direct])
    metrics |= sentence_metrics(predictions) | {"n_questions": len(predictions)}
    metrics["tokens"] = mean([p["n_tokens"] for p in predictions if "n_tokens" in p])
    metrics["level_histogram"] = {**{str(level): levels.count(level) for level in LEVELS}, "none": levels.count(None)}
    metrics |= {"brier_skill": brier_skill(*sentences), "aurc": mean(risk_coverage(*sentences))}
    metrics["mece_constant"], metrics["mece_constant_level"] = mece_constant(predictions)
    metrics |= {part: sentence_metrics(only(predictions, part)) for part in PARTS}
    return json.loads(json.dumps(metrics), parse_constant=lambda _: None)  # NaN is no JSON


# ------------------------------------------------------------------------------------------------ table, figure and report
def fmt(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def table_row(metrics: dict) -> dict[str, str]:
    """{title: cell} of metrics.json, the figures to read first."""
    counts = [metrics["level_histogram"][str(level)] for level in LEVELS]
    figures = metrics | {part: metrics[part]["auroc_sentence"] for part in PARTS}
    titles = {"ECE↓": "ece", "MECE↓": "mece", "Brier skill↑": "brier_skill", "AUROC↑": "auroc"}
    titles |= {"AUROC of sentences↑": "auroc_sentence", "image": "image", "reasoning": "reasoning"}
    titles |= {"Acc↑": "accuracy", "F1↑": "f1", "coverage": "coverage"}
    row = {title: fmt(figures[name]) for title, name in titles.items()}
    row["best constant"] = f"{fmt(metrics['mece_constant'])} (level {metrics['mece_constant_level']})"
    return row | {"levels 1-5, %": " ".join(f"{100 * n / max(sum(counts), 1):.0f}" for n in counts)}


def format_table(rows: dict[str, dict]) -> str:
    """{run name: metrics} -> a markdown table, padded so that it also reads well in a terminal."""
    named = [{"run": name.replace("|", "\\|")} | table_row(metrics) for name, metrics in rows.items()]
    columns = [[title, "", *(row[title] for row in named)] for title in named[0]]  # "" becomes the line below the titles
    padded = [[cell.ljust(max(map(len, column)), " " if cell else "-") for cell in column] for column in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*padded, strict=True))


def plot_reliability(predictions: list[dict], path: Path) -> None:
    """Left: observed accuracy of each level's sentences, by part, with 95% Wilson intervals. Right: how many, right and wrong."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], "--", color="0.6", label="calibrated")
    for part, marker, shift in zip(PARTS, "os", (-0.014, 0.014), strict=True):
        confidence, correct = stated(only(predictions, part))
        outcomes = {c: correct[confidence == c] for c in np.unique(confidence)}
        x, share = [c + shift for c in outcomes], [right.mean() for right in outcomes.values()]
        bars = [scipy.stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson") for right in outcomes.values()]
        error = np.abs(np.reshape(bars, (-1, 2)).T - share)  # below and above
        left.errorbar(x, share, error, fmt=marker, label=f"{part} (n = {len(correct)})")
    left.set(ylabel="observed accuracy, 95% interval", title="Reliability of sentences")
    confidence, correct = stated(predictions)
    kinds, edges = [confidence[correct == ok] for ok in (1, 0)], np.arange(-0.125, 1.2, 0.25)
    n, _, bars = right.hist(kinds, edges, stacked=True, rwidth=0.7, color=["#009E73", "#E8B4A0"], label=["right", "wrong"])
    right.bar_label(bars[1], map(int, n[1]))  # right and wrong ones together
    right.set(ylabel="sentences", title=f"Levels said ({len(all_sentences(predictions)) - len(correct)} without a statement)")
    for axis in (left, right):
        axis.set(xlim=(-0.14, 1.14), xlabel="expressed level / confidence")
        axis.set_xticks([*map(conf, LEVELS)], [f"{level}\n{conf(level):g}" for level in LEVELS])
        axis.legend(frameon=False)
    figure.suptitle(f"{len(correct)} sentences     MECE {fmt(mece(predictions))}     AUROC {fmt(auroc(confidence, correct))}")
    common.save_figure(path, figure)


PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
{% macro mark(good, yes, no) %}<b class="{{ 'yes' if good else 'no' }}" role="img"
aria-label="{{ yes if good else no }}">{{ "✓" if good else "✗" }}</b>{% endmacro %}
{% macro card(p, picture, judged) %}<article class="card"><header><small>{{ p.id }}</small><h2>{{ p.question }}</h2>
{% if p.choices %}<p class="soft">Choices: {{ p.choices | join(" · ") }}</p>{% endif %}</header>
<div>{% if picture %}<img class="{{ picture.kind }}" alt="image of the question" src="{{ picture.uri }}">
{% else %}<p class="soft">no image at {{ p.image }}</p>{% endif %}</div>
<div><ol>{% for s in p.sentences %}{% if loop.changed(s.part) %}<li><h3>{{ s.part }}</h3></li>{% endif %}
<li class="s l{{ s.level or 0 }}{{ ' wrong' if judged and not s.correct }}"><b title="expressed level">{{ s.level or "–" }}</b>
{{ s.text }} {% if s.statement %}<i>{{ s.statement }}</i>{% endif %}
{% if judged %}{{ mark(s.correct, "right", "wrong") }}{% endif %}</li>
{% else %}<li>{{ p.response or "(empty response)" }}</li>{% endfor %}</ol>
<p>Answer: <b>{{ "no answer found" if p.prediction is none else p.prediction }}</b>
{% if judged %}{{ mark(p.answer_correct, "right", "wrong") }} <span class="soft">gold: {{ p.answer }}</span>{% endif %}</p></div>
{% if judged %}<div>{% for part in p.reference %}<h3>Reference, {{ part }}</h3><ul>{% for text in p.reference[part] %}
<li>{{ mark(p.covered[part][loop.index0], "covered", "not covered") }} {{ text }}</li>{% endfor %}</ul>{% endfor %}</div>{% endif %}
</article>{% endmacro %}
<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body { margin: 0 auto; padding: 1rem; max-width: 1180px; font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h2, h3, ol, ul { font-size: 1rem; margin: 0; padding: 0; list-style: none } small, .soft { color: #5a6472 }
.figure { max-width: 100% } .card { display: grid; grid-template-columns: 200px 1.5fr 1fr; gap: .6rem 1.4rem; margin: 1.5rem 0 }
.card header { grid-column: 1 / -1 } .card img { width: 100% } .png { image-rendering: pixelated } .yes { color: #00724f }
.s { padding: .25rem .6rem; margin: .25rem 0; border-left: 4px solid #00724f } .s.wrong { border-left: 4px dashed #b3400a }
.l1 { background: #f1f5fc } .l2 { background: #dfe8f8 } .l3 { background: #c8d8f3 } .l4 { background: #adc6ee }
.l5 { background: #8fb1e7 } @media (max-width: 820px) { .card { grid-template-columns: 1fr } .card img { max-width: 200px } }
.no { color: #b3400a }</style></head><body><h1>{{ title }}</h1>
<p>{% for name, value in figures %}<span class="soft">{{ name }}</span> {{ value }} &emsp;{% endfor %}</p>
{% if plot %}<img class="figure" alt="Reliability, and how many say which level" src="data:image/png;base64,{{ plot }}">{% endif %}
<p class="soft">Expressed confidence: {% for level in levels %}<b class="l{{ level }}">&nbsp;{{ level }}&nbsp;</b> {% endfor %}
<b class="yes">✓</b> matches the reference <b class="no">✗</b> does not. {% if cards | length < total %}Only the first
{{ cards | length }} of {{ total }} questions are shown; the figures above are over all of them.{% endif %}</p>
<main>{% for p, picture in cards %}{{ card(p, picture, true) }}{% endfor %}</main></body></html>
""")


def thumbnail(path: str) -> dict | None:
    """A picture to put into a page: tiny ones as they are, with hard pixels; others small. None where it cannot be opened."""
    try:
        image = common.load_image(path).copy()
    except Exception:  # whatever is wrong with a file, it costs its picture and not the page
        return None
    kind = "png" if max(image.size) <= 64 else "jpeg"
    image.thumbnail((320, 320))
    image.save(buffer := io.BytesIO(), kind, quality=85)
    return {"kind": kind, "uri": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"}


def write_report(predictions: list[dict], metrics: dict, path: Path, title: str, limit: int = 200) -> None:
    """One HTML file that needs no network and no other file: the figures, then a card for each of `limit` questions."""
    plot, cards = path.with_name("reliability.png"), [(p, thumbnail(p["image"])) for p in predictions[:limit]]
    figure, figures = plot.exists() and base64.b64encode(plot.read_bytes()).decode(), table_row(metrics).items()
    page = PAGE.render(title=title, figures=figures, plot=figure, levels=LEVELS, total=len(predictions), cards=cards)
    common.write_text(path, page)


# ------------------------------------------------------------------------------------------------------------- predictions
def same_answer(prediction: str | None, answer: str) -> bool:
    return prediction is not None and bare(prediction) == bare(answer)


def is_right(prediction: str | None, record: dict, last_matches: bool) -> bool:
    """Whether the prediction is the answer, or one of its listed alternatives. An answer that is a whole clause ("the artwork
    belongs to India.") holds the right prediction as a phrase, or is what the chain's last sentence says (`last_matches`)."""
    if record.get("answer_is_clause"):
        phrase = bare(prediction or "")
        return last_matches or bool(set(phrase.split()) - FILLERS) and f" {phrase} " in f" {bare(record['answer'])} "
    alternatives = [] if record["choices"] else record.get("answers", [])
    return any(same_answer(prediction, answer) for answer in [record["answer"], *alternatives])


def direct_answer_score(prediction: str | None, answers: list[str]) -> float:
    """A-OKVQA's direct-answer score, min(1, matches / 3) over its ten answers; with fewer answers one match is enough."""
    return min(1.0, sum(same_answer(prediction, answer) for answer in answers) / (3 if len(answers) >= 10 else 1))


def predict(vlm: common.VLM, reader, matcher, records: list[dict], max_new_tokens: int, seed: int, consistency=0) -> list[dict]:
    """Greedy responses to a batch of questions, parsed and matched: lines of predictions.jsonl. With `consistency` the level of a
    sentence is not what is said, but how many of so many sampled responses hold it (the baseline SC)."""
    ids = common.generate(vlm, common.collate(vlm, records), 0.0, max_new_tokens, seed)
    texts = [common.read_response(vlm.tokenizer, tokens).text for tokens in ids]
    parsed, spent = reader.parse(texts), np.array([*map(len, ids)])
    chains, predictions = [[step.text for step in steps] for steps in parsed], []
    matches = matcher(chains, list(map(common.reference_chain, records)))
    if consistency:
        shares, drawn = common.self_consistency(vlm, records, chains, matcher, consistency, max_new_tokens, seed)
        spent += drawn
        levels = common.to_level(1 - np.concatenate(shares), common.NEAREST).tolist()
        for step, level in zip(itertools.chain(*parsed), levels, strict=True):
            step.level = level
    for record, text, steps, chain, matched, n_tokens in zip(records, texts, parsed, chains, matches, spent.tolist(), strict=True):
        sentences = [
            {"text": step.text, "statement": step.statement, "level": step.level, "correct": hit, "part": common.part_of(record, i)}
            for i, (step, hit) in enumerate(zip(steps, matched.any(1).tolist(), strict=True))
        ]
        n_image, hits = len(record["reference"]["image"]), matched.any(0).tolist()
        covered = {"image": hits[:n_image], "reasoning": hits[n_image:]}
        answer = common.extract_answer(chain, record["choices"])
        right = is_right(answer, record, len(steps) > 0 and bool(matched[-1, -1]))
        prediction = record | {"response": text, "n_tokens": n_tokens, "prediction": answer, "sentences": sentences}
        predictions.append(prediction | {"answer_correct": right, "covered": covered})
    return predictions


def read_setup(args: argparse.Namespace) -> dict:
    """The setup that a run of this project was made with; a base model has none and gets the data set's."""
    ckpt = Path(args.ckpt)
    made = any((ckpt / name).exists() for name in ("run.json", "confidence.json"))
    hub = not ckpt.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", args.ckpt)  # the name of an untrained model there
    common.usage_error(not hub and not ckpt.is_dir() and f"no such folder: {ckpt}")
    unknown = not hub and not any((ckpt / name).exists() for name in ("config.json", "adapter_config.json"))
    common.usage_error(unknown and f"{ckpt} holds neither a model nor a run of warmup.py or ppo.py")
    base = {"data": "digits", "cache": "cache", "noise_scale": 1.0, "world_seed": args.seed}
    setup = common.read_run(ckpt)["setup"] if made else dict.fromkeys("data_dir matcher statement_encoder".split()) | base
    given = "data data_dir noise_scale cache".split()
    setup |= {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    return setup | {"matcher": setup["matcher"] or ("exact" if setup["data"].startswith("digits") else common.CROSS_ENCODER)}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup = read_setup(args)
    common.fill_defaults(args, FLAGS, setup["data"])
    run = common.Run("evaluate", args, setup)
    if run.finished:
        return
    world = setup | {"model": args.ckpt}
    records = common.load_data(setup["data"], setup["data_dir"], args.split, args.limit, True, args.allow_bad_records, world)
    reader = common.StatementReader(setup["statement_encoder"], run.device, setup.get("layout", "each"))
    matcher = common.Matcher(setup["matcher"], run.device)
    vlm = common.load_model(args.ckpt, args, run.device)

    def answer(batch: list[dict], start: int) -> list[dict]:
        return predict(vlm, reader, matcher, batch, args.max_new_tokens, args.seed * 1_000_000 + start, args.consistency)

    predictions = common.answer_in_batches(run, records, args.batch_size, "predictions.jsonl", answer)
    if run.is_main:
        metrics = compute_metrics(predictions)
        plot_reliability(predictions, run.out / "reliability.png")
        write_report(predictions, metrics, run.out / "report.html", f"{args.ckpt} on {setup['data']}, {args.split} split")
        print(format_table({str(args.ckpt): metrics}))
        common.write_json(run.out / "metrics.json", metrics)
    run.finish()


if __name__ == "__main__":
    common.run_script(main, *common.BESIDE)
