"""The statistics and tables of the comparison against numbers that were worked out by hand."""

import csv

import common
import evaluate

import numpy as np
import pytest
import rows
import summary
import tables


def prediction(i: int, levels: list[int | None], right: list[bool], answer: bool) -> dict:
    """A response to question i whose first two sentences are of the image."""
    parts = ["image", "image", "reasoning", "reasoning"][: len(levels)]
    said = [{"level": level, "correct": ok, "part": part} for level, ok, part in zip(levels, right, parts, strict=True)]
    line = {"id": f"q{i}", "answer": "1", "prediction": "1", "answer_correct": answer, "n_tokens": 9, "sentences": said}
    return line | {"covered": {"image": right[:2], "reasoning": right[2:]}}


def write(folder, predictions: list[dict]):
    folder.mkdir()
    common.write_json(folder / "metrics.json", evaluate.compute_metrics(predictions))
    common.write_jsonl(folder / "predictions.jsonl", predictions)
    (folder / "done").touch()
    return folder


def test_what_counts_as_a_result(tmp_path, monkeypatch):
    """A finished run of a row that has not failed just now; a comparison with a run that was replaced is dropped."""
    monkeypatch.setattr(rows, "ROWS", {row: () for row in ("DPS", "SC", "Conf-CSR", "MMBoundary")})
    (tmp_path / "seed3" / "results").mkdir(parents=True)
    (tmp_path / "seed3" / "csr").mkdir()
    (tmp_path / "seed3" / "csr" / "done").touch()
    for row in rows.ROWS:
        write(rows.results(tmp_path, 3, row, "digits"), [prediction(0, [4] * 4, [True] * 4, True)])
    for row in ("SC", "Conf-CSR"):
        (rows.results(tmp_path, 3, row, "digits") / "done").unlink()
    assert set(rows.collect(tmp_path, [3], [(3, "DPS")])["digits"]) == {"Conf-CSR", "MMBoundary"}
    assert set(rows.collect(tmp_path, [3])["digits"]) == {"DPS", "Conf-CSR", "MMBoundary"}
    run = lambda mece: {"mece": mece, "against": [0.1, 0, 0.2, 0.01]}  # noqa: E731
    kept = {"digits": {"DPS": {"0": run(0.5), "1": run(0.6)}, "MMBoundary": {"0": {"mece": 0.3}, "1": {"mece": 0.4}}}}
    summary.save(tmp_path / "f.json", kept)
    now = summary.save(tmp_path / "f.json", {"digits": {"MMBoundary": {"0": {"mece": 0.2}, "1": {"mece": 0.4}}}})["digits"]
    assert now["DPS"] == {"0": {"mece": 0.5}, "1": run(0.6)} and now["MMBoundary"]["0"]["mece"] == 0.2


def test_interval_and_holm():
    assert tables.interval(np.array([0.1, 0.2, 0.3])) == "0.200 ± 0.248"  # 4.303 x 0.1 / sqrt 3
    assert tables.interval(np.array([0.25])) == "0.250" and tables.interval(np.array([])) == "–"
    assert tables.cell({"0": {"f1": 0.5}, "1": {"f1": None}, "2": {}, "3": {"f1": np.nan}}, "f1") == "0.500"
    assert summary.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}) == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})
    assert summary.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_paired_bootstrap():
    """What questions have in common cancels out; the interval is that of the mean difference, 1.96 sd / sqrt n."""
    rng = np.random.default_rng(1)
    easy, noise = rng.uniform(0, 1, 900), rng.normal(0, 0.12, 900)
    difference, low, high, p = summary.paired_bootstrap(easy + 0.1, easy)
    assert difference == pytest.approx(0.1) and high - low < 1e-9 and p == pytest.approx(2 / 5001)
    difference, low, high, p = summary.paired_bootstrap(easy + noise - noise.mean(), easy)
    assert abs(difference) < 1e-12 and p > 0.9 and (high - low) / 2 == pytest.approx(1.96 * noise.std() / 30, rel=0.05)
    assert summary.paired_bootstrap(np.array([np.nan] + [0.5] * 9), np.full(10, 0.25))[:3] == pytest.approx([0.25] * 3)


def test_questions_are_drawn_with_all_their_sentences(tmp_path):
    """Four equal sentences a response are worth one: the half interval is 1.96 sd / sqrt n of n questions."""
    right = np.random.default_rng(0).random(400) < 0.5
    ours = write(tmp_path / "ours", [prediction(i, [5] * 4, [True] * 4, True) for i in range(400)])
    other = write(tmp_path / "other", [prediction(i, [5] * 4, [bool(ok)] * 4, True) for i, ok in enumerate(right)])
    mean, low, high, _ = summary.summarize(other, ours)["against"]
    assert mean == pytest.approx(1 - right.mean()) and (high - low) / 2 == pytest.approx(1.96 * right.std() / 20, rel=0.06)
    assert "against" not in summary.summarize(ours, ours) and "against" not in summary.summarize(other, None)


def test_seconds_of_training(tmp_path):
    """A row's own and those of what it was made from: 3 + 4 of two updates, 5 of a warm-up; nothing where nothing was trained."""
    logs = {
        "ppo": [{"kl": 9, "seconds_rollout": 1.0, "seconds_update": 2.0}, {"seconds_rollout": 4.0}],
        "warmup": [{"seconds": 5.0}],
    }
    for name, before in (("estimate", None), ("warmup", "estimate"), ("ppo", "warmup"), ("results", "ppo")):
        (tmp_path / name).mkdir()
        common.write_jsonl(tmp_path / name / "log.jsonl", logs.get(name, []))
        common.write_json(tmp_path / name / "run.json", {"read": {"ckpt": str(tmp_path / before)} if before else {}})
    assert [summary.training_seconds(tmp_path / name) for name in ("results", "warmup", "estimate", "none")] == [12, 5, 0, 0]


def test_difference_of_internal_confidence_and_consistency(tmp_path):
    """U is half LNLP here; the stored `u`, 1 - consistency, would say that there is no difference at all."""
    fit = {"min": [0] * 4, "max": [1] * 4, "weights": [0.5, 0.5, 0, 0], "fuse": "mean", "snowball": True}
    common.write_json(tmp_path / "confidence.json", fit)
    pairs = ((0.2, 0.95), (0.0, 0.5), (0.8, 0.2))  # (lnlp, consistency): 1 - U is .9, 1, .6, the gaps .05, .5, .4
    zero = dict.fromkeys(common.ESTIMATORS, 0.0)
    said = [zero | {"lnlp": lnlp, "consistency": share, "u": 1 - share} for lnlp, share in pairs]
    common.write_jsonl(tmp_path / "responses.jsonl", [{"sentences": said[:1]}, {"sentences": [*said[1:], zero]}, {"sentences": []}])
    found, variance = summary.ice_sce(tmp_path), (0.05**2 + 0.4**2 + 0.5**2) / 3 - (0.95 / 3) ** 2
    assert found == pytest.approx({"mean": 0.95 / 3, "variance": variance, "std": variance**0.5, "< 0.1": 1 / 3})
    assert tables.table_3({"0": found})[0]["< 0.1"] == "0.333" and tables.table_3({"0": {}}) == []


def test_saves_add_up(tmp_path):
    file = tmp_path / "kept.json"
    summary.save(file, {"digits": {"SC": {"0": {"mece": 0.1}, "1": {"mece": 0.2}}}})
    both = summary.save(file, {"digits": {"SC": {"1": {"mece": 0.3}}, "DPS": {"0": {"mece": 0.4}}}})
    assert both["digits"] == {"SC": {"0": {"mece": 0.1}, "1": {"mece": 0.3}}, "DPS": {"0": {"mece": 0.4}}}
    assert common.read_json(file) == both and '"1": { "mece": 0.3 }' in file.read_text()  # a run is a line


def test_against_mmboundary(tmp_path):
    """p of differences .1, .2, .3: t = 2 sqrt 3, p = 1 - t / sqrt(t^2 + 2) = .0742, doubled by Holm. Means of seeds both have."""
    run = lambda mece, p: {"mece": mece, "levels": [1, 0, 0, 0, 0], "against": [0, 0, 0, p]}  # noqa: E731
    found = {"worse": {"0": run(0.4, 0.03), "1": run(0.5, 0.01), "2": run(0.6, 0.01)}, "ours": {"3": run(0.1, 0) | {"against": 0}}}
    found["better"] = {"0": run(0.3, 0.03), "1": run(0.2, 0.2), "2": run(0.2, 0.02), "3": run(0.9, 0.01)}
    found["MMBoundary"] = {seed: {"mece": 0.3, "levels": [0] * 5} for seed in "012"}
    numbers = {"worse": (0.5, 0.4), "better": (0.5, 0.4), "MMBoundary": (0.5, 0.2), "ours": (), "absent": (1, 1)}
    paper = tables.by_data({row: (1, 1, 1, 1, *of) for row, of in numbers.items()}, ("in domain", "out"))["out"]
    p = {"worse": "0.148, 2/3", "better": "0.184, 2/4", "ours": "–"}  # .03 twice is .06
    assert tables.significance(found) == p
    assert {row: list(wrong) for row, wrong in tables.wrong_orders(found, paper).items()} == {"better": ["mece"]}
    tables.write_csv(tmp_path / "t.csv", table := tables.table_1(found, paper))
    worse = next(csv.DictReader((tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["row"] for line in table] == ["worse", "better †", "MMBoundary", "ours"]
    shown = tables.markdown(table).split("\n| ")
    assert [line.split(" |")[0] for line in shown][-3:] == ["MMBoundary", "*beyond the paper*", "ours"]
    assert tables.markdown(table).endswith(tables.MARK) and table[0]["MECE↓"] == "0.500 ± 0.248"
    assert (worse["MECE↓"], worse["MECE↓ ±"], worse["MECE - MMBoundary's"]) == ("0.500", "0.248", "0.200")


def test_from_folders_to_tables(tmp_path, capsys):
    """PRR: error rates 0, 1/2, 1/3, 1/2 where the best order has 0, 0, 1/3, 1/2 and a random one 1/2: 4/7. "–" where nothing is."""
    right = [True, False, True, False]
    lines = [prediction(k, [5 - k], [right[k]], k < 3) for k in range(4)] + [prediction(4, [None], [True], False)]
    mute = [prediction(0, [None] * 4, [True] * 4, False)]
    folders = {("digits", "MMBoundary", "3"): write(tmp_path / "a", lines), ("digits", "DPS", "3"): write(tmp_path / "b", mute)}
    found = summary.collect(folders | {("digits-ood", "SC", "3"): tmp_path / "nowhere"}, {"3": tmp_path / "nowhere"})
    run = found["digits"]["MMBoundary"]["3"]
    assert run["prr"] == pytest.approx(4 / 7) and run["selective_80"] == pytest.approx(0.75)  # of answers
    assert run["risk"] == [0] * 5 + [0.5] * 5 + [0.3333] * 5 + [0.5] * 5
    assert summary.selective_accuracy(np.array([1, 0.75, 0.5, 0.25, 0]), np.array([1, 1, 1, 1, 0]), 0.8) == 1
    assert found["digits"]["DPS"]["3"]["prr"] is None and "digits-ood" not in found
    tables.show(found, rows.PAPER, tmp_path / "out")
    assert "| DPS | 1 | – | – | 0.000 | 1.000 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"table_1.png", "figure_4.png", "risk_coverage.png"}
    assert "0.571,9.000" in (tmp_path / "out" / "table_1_digits.csv").read_text(encoding="utf-8")  # PRR and tokens


def test_improvement_on_the_base():
    """Figure 4, in percent and by seed: MECE .4 -> .3 is 25, F1 .5 -> .6 is 20; seed 1 has no base."""
    sc = {"0": {"image_mece": 0.3, "image_f1": 0.6}, "1": {"image_mece": 0.1, "image_f1": 0.9}}
    gains = tables.improvements({"DPS": {"0": {"image_mece": 0.4, "image_f1": 0.5}}, "SC": sc}, ["DPS", "SC"])
    assert [panel["image"]["SC"].tolist() for panel in gains.values()] == [pytest.approx([25.0]), pytest.approx([20.0])]
