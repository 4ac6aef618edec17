"""The hand-written metrics against independent references; table, figure and page against known predictions."""

import json
import re
from fractions import Fraction
from html.parser import HTMLParser
from itertools import permutations

import evaluate as ev

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import brier_score_loss, roc_auc_score


def sentence(level, correct, part="image", text="The left digit is 3."):
    return {"text": text, "statement": level and f"level {level}", "level": level, "correct": correct, "part": part}


def question(sentences, answer_correct=True, covered=None, **fields):
    covered = covered or {"image": [True], "reasoning": [True]}
    reference = {part: [f"{part} fact {i}" for i in range(len(c))] for part, c in covered.items()}
    return {
        "id": "q",
        "image": "none.png",
        "question": "How many?",
        "answer": "3",
        "choices": None,
        "response": "r",
        "reference": reference,
        "prediction": "3",
        "answer_correct": answer_correct,
        "sentences": sentences,
        "covered": covered,
        **fields,
    }


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    out = []
    for _ in range(60):
        sentences = []
        for part in ["image"] * rng.integers(0, 3) + ["reasoning"] * rng.integers(0, 4):
            level = None if rng.random() < 0.15 else int(rng.integers(1, 6))
            sentences.append(sentence(level, bool(rng.random() < 0.3 + 0.1 * (level or 3)), part))
        covered = {part: [bool(c) for c in rng.random(rng.integers(1, 4)) < 0.6] for part in ev.PARTS}
        out.append(question(sentences, bool(rng.random() < 0.6), covered))
    return out


@pytest.fixture
def pairs():
    """Confidences with many ties and the outcomes they go with, (300,) each."""
    rng = np.random.default_rng(1)
    confidence = rng.choice([0, 0.25, 0.5, 0.75, 1.0], 300)
    return confidence, (rng.random(300) < 0.2 + 0.6 * confidence).astype(int)


# Metrics


@pytest.mark.parametrize("n_bins", [1, 5, 10, 15])
def test_ece_is_the_plain_loop(n_bins):
    rng = np.random.default_rng(2)
    confidence = np.concatenate([rng.random(400), np.arange(11) / 10])
    correct = rng.random(len(confidence)) < confidence**2
    total = 0.0
    for b in range(n_bins):
        inside = [i for i, c in enumerate(confidence) if b / n_bins < c <= (b + 1) / n_bins or (b == 0 and c == 0)]
        if inside:
            gap = abs(np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
            total += len(inside) / len(confidence) * gap
    assert ev.ece(confidence, correct, n_bins) == pytest.approx(total, abs=1e-12)


def test_ece_bins_are_closed_on_the_right():
    # 0.3 belongs to (0.2, 0.3], with 0.25: gaps cancel inside the bin. In a bin of its own it could not.
    assert ev.ece([0.25, 0.3], [0, 1]) == pytest.approx(abs(0.5 - 0.275))
    assert ev.ece([0.3, 0.35], [0, 1]) == pytest.approx((0.3 + 0.65) / 2)
    assert ev.ece([0.0, 0.1], [1, 0]) == pytest.approx(0.45)  # 0 is in the first bin, with 0.1
    assert ev.ece([1.0, 1.0], [1, 0]) == pytest.approx(0.5)


def test_mece_is_the_plain_loop(predictions):
    total, n_responses = Fraction(0), 0
    for p in predictions:
        error, n = Fraction(0), 0
        for s in p["sentences"]:
            if s["level"] is not None:
                error += abs(int(s["correct"]) - Fraction(s["level"] - 1, 4))
                n += 1
        if n:
            total, n_responses = total + error / n, n_responses + 1
    assert 0 < n_responses < len(predictions)  # some responses say nothing about their confidence and are left out
    assert ev.mece(predictions) == pytest.approx(float(total / n_responses), abs=1e-12)


def test_mece_by_hand():
    first = question([sentence(5, True), sentence(4, False), sentence(None, False)])  # (0 + .75) / 2
    second = question([sentence(2, True)])  # .75
    assert ev.mece([first, second, question([]), question([sentence(None, True)])]) == pytest.approx(0.5625)


def test_mece_constant_is_the_best_relabelling(predictions):
    def said(level):
        return [{**p, "sentences": [{**s, "level": s["level"] and level} for s in p["sentences"]]} for p in predictions]

    by_level = {level: ev.mece(said(level)) for level in ev.LEVELS}
    value, level = ev.mece_constant(predictions)
    assert level == min(by_level, key=by_level.get)
    assert value == pytest.approx(by_level[level])
    assert ev.mece_constant([question([sentence(5, False), sentence(5, False), sentence(3, True)])]) == (pytest.approx(1 / 3), 1)


def test_auroc_is_sklearns(pairs):
    confidence, correct = pairs
    assert ev.auroc(confidence, correct) == pytest.approx(roc_auc_score(correct, confidence), abs=1e-12)
    continuous = confidence + np.random.default_rng(3).random(300)
    assert ev.auroc(continuous, correct) == pytest.approx(roc_auc_score(correct, continuous), abs=1e-12)


def test_auroc_by_hand():
    assert ev.auroc([0.5, 0.5, 0.5], [1, 0, 1]) == 0.5
    assert ev.auroc([1, 0.5, 0.5, 0], [1, 1, 0, 0]) == pytest.approx(3.5 / 4)
    for confidence, correct in [([0.2, 0.4], [1, 1]), ([0.2, 0.4], [0, 0]), ([], [])]:
        assert np.isnan(ev.auroc(confidence, correct))


def test_brier_is_sklearns_and_skill_is_against_the_base_rate(pairs):
    confidence, correct = pairs
    assert ev.brier(confidence, correct) == pytest.approx(brier_score_loss(correct, confidence), abs=1e-12)
    base = brier_score_loss(correct, np.full(len(correct), correct.mean()))
    assert ev.brier_skill(confidence, correct) == pytest.approx(1 - brier_score_loss(correct, confidence) / base)
    assert ev.brier_skill([0.25] * 4, [1, 0, 0, 0]) == pytest.approx(0)
    assert ev.brier_skill([1, 0], [1, 0]) == 1
    assert np.isnan(ev.brier_skill([0.5, 0.5], [1, 1]))


def test_aurc_is_the_mean_over_all_orders_of_the_ties():
    confidence, correct = [0.75, 0.25, 0.75, 0.75, 0.25, 1.0, 0.25], [1, 1, 0, 1, 0, 1, 0]
    values = []
    for order in permutations(range(len(confidence))):
        if any(confidence[a] < confidence[b] for a, b in zip(order, order[1:], strict=False)):
            continue  # not most confident first
        errors = [1 - correct[i] for i in order]
        values.append(np.mean([sum(errors[:k]) / k for k in range(1, len(errors) + 1)]))
    assert len(values) == 36 and np.ptp(values) > 0.1  # 3! x 3! orders, and the order does matter
    assert np.mean(ev.risk_coverage(confidence, correct)) == pytest.approx(np.mean(values), abs=1e-12)


def test_aurc_does_not_depend_on_the_order_of_the_input(pairs):
    confidence, correct = pairs
    expected = ev.risk_coverage(confidence, correct)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(confidence))
        assert ev.risk_coverage(confidence[order], correct[order]).tolist() == expected.tolist()
    assert np.mean(ev.risk_coverage([0.9, 0.5, 0.1], [1, 1, 0])) == pytest.approx(1 / 9)
    assert np.mean(ev.risk_coverage([0.5, 0.5], [1, 0])) == pytest.approx(0.5)


def test_chain_f1_of_the_papers_example():
    """Appendix D.3: Prediction = 4, Reference = 6, Matched = 3, Covered = 3."""
    sentences = [sentence(5, True), sentence(4, True), sentence(3, True, "reasoning"), sentence(2, False, "reasoning")]
    covered = {"image": [True, True, False], "reasoning": [True, False, False]}
    m = ev.compute_metrics([question(sentences, covered=covered)])
    assert (m["precision"], m["recall"], m["f1"]) == (0.75, 0.5, pytest.approx(0.6))
    assert (m["image"]["precision"], m["image"]["recall"]) == (1, pytest.approx(2 / 3))
    assert m["image"]["f1"] == pytest.approx(0.8)
    assert (m["reasoning"]["precision"], m["reasoning"]["recall"]) == (0.5, pytest.approx(1 / 3))


def test_chain_f1_is_micro_averaged():
    long = question([sentence(3, True)] * 9, covered={"image": [True] * 3, "reasoning": []})
    short = question([sentence(3, False)], covered={"image": [False], "reasoning": []})
    m = ev.compute_metrics([long, short])
    assert (m["precision"], m["recall"]) == (0.9, 0.75)  # a macro average would be 0.5 and 0.5
    assert m["reasoning"]["f1"] is None


# compute_metrics

PART_KEYS = {"mece", "auroc_sentence", "brier", "f1", "precision", "recall", "n_sentences"}
KEYS = PART_KEYS | {
    "ece",
    "coverage",
    "auroc",
    "accuracy",
    "direct_answer",
    "n_questions",
    "level_histogram",
    "brier_skill",
    "aurc",
    "tokens",
    "mece_constant",
    "mece_constant_level",
    "image",
    "reasoning",
}


def test_compute_metrics_is_made_of_the_metrics(predictions):
    m = ev.compute_metrics(predictions)
    assert set(m) == KEYS and set(m["image"]) == set(m["reasoning"]) == PART_KEYS
    said = [s for p in predictions for s in p["sentences"] if s["level"]]
    confidence, correct = [(s["level"] - 1) / 4 for s in said], [s["correct"] for s in said]
    assert m["auroc_sentence"] == pytest.approx(roc_auc_score(correct, confidence))
    assert m["brier"] == pytest.approx(brier_score_loss(correct, confidence))
    assert m["aurc"] == np.mean(ev.risk_coverage(confidence, correct)) and m["brier_skill"] == ev.brier_skill(confidence, correct)
    everything = [s for p in predictions for s in p["sentences"]]
    assert m["n_sentences"] == len(everything) == m["image"]["n_sentences"] + m["reasoning"]["n_sentences"]
    assert m["coverage"] == pytest.approx(len(said) / len(everything)) and m["n_questions"] == len(predictions)
    image = [s for s in said if s["part"] == "image"]
    assert m["image"]["brier"] == pytest.approx(np.mean([((s["level"] - 1) / 4 - s["correct"]) ** 2 for s in image]))
    levels = [s["level"] for s in everything]
    assert m["level_histogram"] == {**{str(k): levels.count(k) for k in range(1, 6)}, "none": levels.count(None)}


def test_the_answer_is_judged_by_the_last_sentence():
    predictions = [
        question([sentence(1, True), sentence(5, False)], answer_correct=True),
        question([sentence(5, True), sentence(2, True)], answer_correct=False),
        question([sentence(5, True), sentence(None, True)], answer_correct=False),  # only in the accuracy
        question([], answer_correct=True),  # only in the accuracy
    ]
    m = ev.compute_metrics(predictions)
    assert (m["ece"], m["auroc"], m["accuracy"]) == (pytest.approx(0.125), 1.0, 0.5)


def test_json_is_valid_plain_and_repeatable(predictions):
    def leaves(value):
        return [x for v in value.values() for x in leaves(v)] if isinstance(value, dict) else [value]

    m = ev.compute_metrics(predictions)
    assert {type(x) for x in leaves(m)} <= {int, float, type(None)}
    assert json.dumps(m, allow_nan=False) == json.dumps(ev.compute_metrics(predictions), allow_nan=False)


def test_degenerate_predictions():
    undefined = {"ece", "mece", "auroc", "auroc_sentence", "brier", "brier_skill", "aurc", "mece_constant", "mece_constant_level"}
    empty = ev.compute_metrics([])
    assert all(empty[k] is None for k in undefined | {"coverage", "accuracy", "precision", "recall", "f1"})
    assert empty["n_questions"] == empty["n_sentences"] == 0
    silent = ev.compute_metrics([question([], answer_correct=False, covered={"image": [False], "reasoning": [False]})])
    assert (silent["accuracy"], silent["recall"], silent["f1"], silent["precision"]) == (0, 0, 0, None)
    unstated = ev.compute_metrics([question([sentence(None, True), sentence(None, False)])])
    assert all(unstated[k] is None for k in undefined)
    assert unstated["coverage"] == 0 and unstated["precision"] == 0.5 and unstated["level_histogram"]["none"] == 2
    one_class = ev.compute_metrics([question([sentence(5, True), sentence(4, True)])])
    assert one_class["auroc"] is one_class["auroc_sentence"] is one_class["brier_skill"] is None
    assert (one_class["mece"], one_class["aurc"], one_class["brier"]) == (0.125, 0, 0.03125)
    for m in (empty, silent, unstated, one_class):
        json.dumps(m, allow_nan=False)


# Table and figure


def test_format_table(predictions):
    m = ev.compute_metrics(predictions)
    one = ev.compute_metrics([question([sentence(1, True), sentence(4, False)])])
    lines = ev.format_table({"warmup": m, "a|b": one, "empty": ev.compute_metrics([])}).split("\n")
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1  # aligned
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in cells} == {13} and set(lines[1]) == {"|", "-", " "}
    row = dict(zip(cells[0], cells[2], strict=True))
    assert row["run"] == "warmup" and row["ECE↓"] == f"{m['ece']:.3f}" and row["F1↑"] == f"{m['f1']:.3f}"
    assert row["MECE↓"] == f"{m['mece']:.3f}"
    assert row["best constant"] == f"{m['mece_constant']:.3f} (level {m['mece_constant_level']})"
    assert [row[part] for part in ev.PARTS] == [f"{m[part]['auroc_sentence']:.3f}" for part in ev.PARTS]
    assert cells[3][0] == "a\\|b" and cells[3][-1] == "50 0 0 50 0" and cells[4][1:3] == ["–", "–"]


def test_reliability_figure(predictions, tmp_path):
    for name, data in [("a", predictions), ("b", predictions), ("empty", []), ("fewer", predictions[:5])]:
        ev.plot_reliability(data, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 1000
    a, b, fewer = ((tmp_path / f"{name}.png").read_bytes() for name in ("a", "b", "fewer"))
    assert a == b and a != fewer


# Report


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of <script> and <style>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.inside = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def report(predictions, path, **kwargs):
    ev.write_report(predictions, ev.compute_metrics(predictions), path, "A <title> & more", **kwargs)
    return path.read_text(encoding="utf-8")


def test_report_escapes_everything(tmp_path):
    evil = "<script>alert('x')</script> $title \"><img src=x onerror=alert(1)>"
    s = sentence(4, False, text=evil) | {"statement": evil}
    fields = dict.fromkeys(["id", "image", "question", "answer", "response", "prediction"], evil) | {"choices": [evil]}
    covered = {"image": [False], "reasoning": [True]}
    p = question([s], covered=covered) | fields | {"reference": {"image": [evil], "reasoning": [evil]}}
    page = Page(report([p, p | {"sentences": []}], tmp_path / "report.html"))
    assert page.all("script") == page.all("img") == []
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(evil) == 10 + 9  # every field, as text; without sentences the response stands for two
    assert "A <title> & more" in page.text


def test_report_is_standalone(predictions, tmp_path):
    Image.effect_noise((32, 16), 50).save(tmp_path / "tiny.png")
    Image.effect_noise((900, 600), 50).convert("RGBA").save(tmp_path / "large.png")
    ev.plot_reliability(predictions, tmp_path / "reliability.png")
    for p, name in zip(predictions, ["tiny.png", "large.png", "missing.png"], strict=False):
        p["image"] = str(tmp_path / name)
    text = report(predictions[:3], tmp_path / "report.html")
    page = Page(text)
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "data", "action")]
    assert len(links) == 3 and all(link.startswith("data:image/") for link in links)
    assert not re.search(r"https?://|@import|url\(", text)
    assert [i["class"] for i in page.all("img")] == ["figure", "png", "jpeg"]
    assert "no image at" in page.text and "missing.png" in page.text
    assert len(text) < 400_000  # the large picture is a thumbnail


def test_report_limit(predictions, tmp_path):
    predictions = predictions + [question([]), question([sentence(None, True)])]
    page = Page(report(predictions, tmp_path / "report.html", limit=50))
    assert len(page.all("article")) == 50 and f"the first 50 of {len(predictions)} questions" in " ".join(page.text.split())
    assert "Only the first" not in Page(report(predictions[:50], tmp_path / "all.html", limit=50)).text
