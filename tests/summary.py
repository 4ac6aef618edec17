"""The figures of the comparison, from results folders alone and without a model; `rows.py` knows the folders.

A summary is {data: {row: {seed: the figures of a run}}}, a small JSON file. Choices beyond the paper:
 1. MMBoundary is compared by seed, a paired t-test on MECE over the seeds that both rows have, and by question within a seed, a
    paired bootstrap of the difference: questions are drawn, their sentences stay together. Holm's correction is over the rows.
 2. Table 3: C_ICE = 1 - U_Final (sec. 5.2 compares scores, not levels), C_SCE the share of sampled responses that hold the
    sentence. U_Final is computed anew, since `--levels consistency` stores 1 - C_SCE as `u`.
"""

import json
import math
import re
from pathlib import Path

import common
import evaluate

import numpy as np
from scipy import stats

OURS, TRAIN = "MMBoundary", "train"  # the row that all are compared with; the data of Table 3
NAMES = ("ece", "mece", "accuracy", "f1", "brier_skill", "auroc", "auroc_sentence", "tokens")  # as in metrics.json


# -------------------------------------------------------------------------------------------------------------- statistics
def mean_and_half(values: np.ndarray) -> tuple[float, float]:
    """Mean and half of the 95% interval (t) of values (seeds,), t sd / sqrt(n); NaN where there are too few."""
    n = len(values)
    return evaluate.mean(values), float(stats.sem(values) * stats.t.ppf(0.975, n - 1)) if n > 1 else math.nan


def interval(values: np.ndarray) -> str:
    mean, half = mean_and_half(values)
    return evaluate.fmt(mean) + ("" if math.isnan(half) else f" ± {half:.3f}")


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's correction of p-values (1979)."""
    corrected, worst = {}, 0.0
    for rank, row in enumerate(sorted(p, key=p.get)):
        worst = max(worst, min(1.0, p[row] * (len(p) - rank)))
        corrected[row] = worst
    return corrected


def values_of(runs: dict[str, dict], name: str) -> dict[str, float]:
    """{seed: the figure `name`} of the runs {seed: figures} that have it."""
    return {seed: run[name] for seed, run in runs.items() if run.get(name) is not None and not math.isnan(run[name])}


def paired(runs: dict[str, dict], others: dict[str, dict], name: str) -> np.ndarray:
    """The figure `name` of two rows in the seeds that both have (2, seeds)."""
    a, b = values_of(runs, name), values_of(others, name)
    return np.array([[a[seed], b[seed]] for seed in sorted(a.keys() & b.keys())]).reshape(-1, 2).T


def paired_bootstrap(a: np.ndarray, b: np.ndarray, draws: int = 5000) -> list[float]:
    """[mean(a) - mean(b), its 95% interval (percentiles), two-sided p]; errors (questions,) of the same questions, but NaN."""
    picks = np.random.default_rng(0).integers(len(a), size=(draws, len(a)))
    drawn = np.nanmean(a[picks], 1) - np.nanmean(b[picks], 1)  # (draws,)
    p = 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + draws)
    return [float(x) for x in (np.nanmean(a) - np.nanmean(b), *np.quantile(drawn, [0.025, 0.975]), min(1.0, p))]


def selective_accuracy(confidence: np.ndarray, correct: np.ndarray, coverage: float) -> float:
    """Accuracy of the most confident share `coverage` of the answers."""
    n = math.ceil(coverage * len(correct))
    return 1 - float(evaluate.risk_coverage(confidence, correct)[n - 1]) if n else math.nan


def prr(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Prediction rejection ratio (Malinin & Gales, 2021), (r - AURC) / (r - AURC of the best order), r the error rate: how much of
    the way from random order (0) to the best one (1)."""
    area, best = (evaluate.mean(evaluate.risk_coverage(order, correct)) for order in (confidence, correct))
    return (1 - np.mean(correct) - area) / (1 - np.mean(correct) - best) if len(set(correct)) == 2 else math.nan


# ----------------------------------------------------------------------------------------------------------------- summary
def question_errors(predictions: list[dict]) -> dict[str, float]:
    """{question: mean |confidence - correct| of its sentences}, whose mean is MECE; NaN without a statement."""
    errors = {p["id"]: np.abs(np.subtract(*evaluate.stated([p]))) for p in predictions}
    return {name: evaluate.mean(error) for name, error in errors.items()}


def training_seconds(folder: str | Path) -> float:
    """What the training of a run took, by the logs of all runs that it was made from: warm-up and PPO, not estimates."""
    log, record = common.read_jsonl(Path(folder, "log.jsonl")), Path(folder, "run.json")
    spent = sum(value for row in log for name, value in row.items() if name.startswith("seconds"))
    return spent + sum(map(training_seconds, common.read_json(record)["read"].values() if record.exists() else ()))


def summarize(folder: Path, ours: Path | None) -> dict:
    """The figures of one run; those that need predictions.jsonl only where that is. `against`: `paired_bootstrap` with `ours`."""
    metrics, predictions = common.read_json(folder / "metrics.json"), common.read_jsonl(folder / "predictions.jsonl")
    run = {name: metrics.get(name) for name in NAMES}
    run["seconds"] = round(training_seconds(folder)) if (folder / "run.json").exists() else None
    run |= {f"{part}_{name}": metrics[part].get(name) for part in evaluate.PARTS for name in ("mece", "f1")}
    counts = [metrics["level_histogram"][str(level)] for level in evaluate.LEVELS]
    run |= {"reasoning": metrics["reasoning"]["auroc_sentence"], "levels": [n / max(sum(counts), 1) for n in counts]}
    if predictions:
        last = [{**p["sentences"][-1], "correct": p["answer_correct"]} for p in predictions if p["sentences"]]
        answers, stated = evaluate.stated([{"sentences": last}]), evaluate.stated(predictions)  # an answer's c is the last one's
        run |= {"selective_80": selective_accuracy(*answers, 0.8), "prr": prr(*stated)}
        risk = evaluate.risk_coverage(*stated)
        run["risk"] = [round(risk[math.ceil(k * len(risk) / 20) - 1], 4) for k in range(1, 21) if len(risk)]  # at coverage k / 20
        a, b = question_errors(predictions), question_errors(common.read_jsonl(ours / "predictions.jsonl") if ours else [])
        pairs = np.array([[a[name], b[name]] for name in a if name in b]).reshape(-1, 2)
        if ours != folder and (~np.isnan(pairs)).any(0).all():
            run["against"] = paired_bootstrap(*pairs.T)
    return json.loads(json.dumps(run), parse_constant=lambda _: None)  # NaN is no JSON


def ice_sce(folder: Path) -> dict:
    """Table 3 of an estimate folder: |C_ICE - C_SCE| over all sentences whose agreement was measured."""
    lines, confidence = common.read_jsonl(folder / "responses.jsonl"), common.read_json(folder / "confidence.json")
    sentences = common.all_sentences(lines)
    raw = np.array([[sentence[name] for name in common.ESTIMATORS] for sentence in sentences])
    u = common.fuse(raw, confidence, np.cumsum([len(line["sentences"]) for line in lines])[:-1])  # (N,)
    gap = [abs(1 - u_i - s["consistency"]) for u_i, s in zip(u, sentences, strict=True) if "consistency" in s]
    if not gap:
        return {}
    return {"mean": np.mean(gap), "variance": np.var(gap), "std": np.std(gap), "< 0.1": np.mean(np.array(gap) < 0.1)}


def collect(folders: dict[tuple[str, str, str], Path], estimates: dict[str, Path]) -> dict:
    """The summary of {(data, row, seed): results folder} and {seed: estimate folder with agreement}, where they are finished."""
    found: dict = {}
    for (data, row, seed), folder in folders.items():
        if (folder / "metrics.json").exists() and any((place / "done").exists() for place in (folder, folder.parent)):
            found.setdefault(data, {}).setdefault(row, {})[seed] = summarize(folder, folders.get((data, OURS, seed)))
    agreed = {seed: ice_sce(folder) for seed, folder in estimates.items() if (folder / "responses.jsonl").exists()}
    return found | {TRAIN: {"agreed": agreed}}


def save(path: Path, new: dict) -> dict:
    """Add a summary to the one in a file, by data, row and seed, a line a run; returns both together. A run that was compared with
    another run of MMBoundary than the one that is there now loses that comparison."""
    kept = common.read_json(path) if path.exists() else {}
    for data, rows in new.items():
        ours = kept.get(data, {}).get(OURS, {})
        changed = [seed for seed, run in rows.get(OURS, {}).items() if run["mece"] != ours.get(seed, run)["mece"]]
        for run in [runs[seed] for runs in kept.get(data, {}).values() for seed in changed if seed in runs]:
            run.pop("against", None)
        for row, runs in rows.items():
            kept.setdefault(data, {}).setdefault(row, {}).update(runs)
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    common.write_text(path, re.sub(r"\{[^{}]+\}", lambda run: " ".join(run[0].split()), text) + "\n")
    return kept
