"""The methods that MMBoundary is compared with: where their statements stand, what their levels come from, their reward."""

from pathlib import Path

import common
import estimate
import evaluate
import ppo
import warmup

import conf_csr
import numpy as np
import pytest
import rows
import scripted
import tables
import torch

SENTENCES = ["The left digit is 3.", "The right digit is 8.", "3 plus 8 is 11.", "So, the answer is 11."]


def test_statements_behind_the_chain():
    """Layout `after`: one for each sentence, in order; `once`: that of the answer for all. The way back knows where they are."""
    pool, rng = common.load_statements(), np.random.default_rng(0)
    for layout in ("after", "once"):
        reader = common.StatementReader(layout=layout)
        for levels in rng.integers(1, 6, size=(200, 4)).tolist():
            text = warmup.insert(SENTENCES, levels, rng, pool, layout)
            assert text.startswith(" ".join(SENTENCES))
            steps = reader.parse([text])[0]
            assert [step.text for step in steps] == SENTENCES
            assert [step.level for step in steps] == (levels if layout == "after" else levels[-1:] * 4)
            assert all(common.plain(text[step.said : step.stop]) == common.plain(step.statement) for step in steps)


def test_a_chain_without_its_statements():
    reader = common.StatementReader(layout="after")
    [steps] = reader.parse(["The left digit is 3. The right digit is 8. But I can't confirm this."])
    assert [(step.text, bool(step.level)) for step in steps] == [(SENTENCES[0], True), (SENTENCES[1], False)]
    assert reader.parse(["", "But I can't confirm this."]) == [[], []]


def test_numbers_behind_the_chain():
    text = warmup.insert(SENTENCES, [5, 1, 2, 4], np.random.default_rng(0), common.NUMERIC_STATEMENTS, "after")
    assert [s.level for s in common.StatementReader(layout="after").parse([text])[0]] == [5, 1, 2, 4]


def test_self_consistency_is_the_share_that_agrees(monkeypatch):
    """Of each four samples, every one with another seed, three say 3 and one 5; of the second question's, all say 9."""
    processor, seeds = scripted.processor(), []
    vlm = scripted.Bigram(processor, {"It is 3.": 1.0}, end=True).vlm(processor)
    ids = {text: scripted.tokens(processor, text, end=True) for text in ("It is 3.", "It is 5.", "It is 9. It is 3.")}

    def generate(vlm, prompts, temperature, max_new_tokens, seed):
        seeds.append((temperature, seed))
        first = "It is 5." if temperature and len(seeds) % 4 == 0 else "It is 3."
        return [ids[first], ids["It is 9. It is 3."]]

    monkeypatch.setattr(common, "generate", generate)
    records, chains, exact = [scripted.record(3, 5)] * 2, [["It is 3.", "It is 5."], ["It is 9."]], common.Matcher("exact")
    (a, b), spent = common.self_consistency(vlm, records, chains, exact, 8, 12, 0)
    assert a.tolist() == [0.75, 0.25] and b.tolist() == [1.0]
    assert spent.tolist() == [8 * len(ids[text]) for text in ("It is 3.", "It is 9. It is 3.")]
    assert len(set(seeds)) == 8 and {temperature for temperature, _ in seeds} == {1.0}
    seeds[:] = [(0, 0)] * 3  # so that the greedy response is the fourth, and the samples begin anew
    predictions = evaluate.predict(vlm, common.StatementReader(), exact, records, 12, 0, consistency=8)
    assert [[s["level"] for s in p["sentences"]] for p in predictions] == [[4], [5, 5]]
    assert predictions[1]["n_tokens"] == 9 * len(ids["It is 9. It is 3."])  # the samples count


def test_levels_of_baselines():
    lines = [{"id": i, "sentences": [dict.fromkeys(common.ESTIMATORS, float(i)) | {"correct": i % 2 > 0}]} for i in range(400)]
    for i, line in enumerate(lines):
        line["sentences"][0]["consistency"] = (i % 11) / 10
    estimate.assign_levels(lines, estimate.parse_args(["--levels", "consistency"]))
    levels = [line["sentences"][0]["level"] for line in lines[:11]]
    assert levels == [1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]  # nearest of 0, .25, .5, .75, 1
    sigma = estimate.assign_levels(lines, estimate.parse_args(["--levels", "sigma"]))
    chance = estimate.assign_levels(lines, estimate.parse_args(["--levels", "random"]))
    assert chance["edges"] == sigma["edges"]  # what PPO measures by stays
    counts = np.bincount([line["sentences"][0]["level"] for line in lines], minlength=6)[1:]
    assert counts.min() > 50  # 80 are expected of each


def test_reward_of_the_answer_alone():
    """SaySelf: 1 - 2 (I - EV)^2 of the answer, all of it at the last token, whatever the other sentences are."""
    processor, pool = scripted.processor(), common.load_statements()
    text = warmup.insert(SENTENCES, [5, 5, 5, 2], np.random.default_rng(0), pool, "once")
    ids = scripted.tokens(processor, text, end=True)
    response = common.read_response(processor.tokenizer, ids)
    steps = common.StatementReader(layout="once").parse([text])
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    roll = ppo.Rollout([scripted.record(3, 8)], [response], steps, mask, *[mask] * 5)
    args = ppo.parse_args(["--reward", "answer"])
    for right, expected in ((True, 1 - 2 * 0.75**2), (False, 1 - 2 * 0.25**2)):
        scores, _ = ppo.rewards(roll, [(np.array([False, True, True, right]), np.zeros(4))], args)
        assert scores[0, -1].item() == pytest.approx(expected) and scores[0, :-1].abs().sum() == 0
    roll.steps = [[]]
    assert ppo.rewards(roll, [(np.zeros(0), np.zeros(0))], args)[0].sum() == -1


def test_relevel(cache, tmp_path, capsys):
    """Other levels for responses that were measured: nothing is generated, and the setup is that of the estimate."""
    first, again, agreed = (str(tmp_path / name) for name in ("a", "b", "c"))
    estimate.main(["--limit", "12", "--cache", str(cache), "--out", first])
    estimate.main(["--relevel", first, "--levels", "uniform", "--weights", "1", "0", "0", "0", "--out", again])
    a, b = (common.read_jsonl(tmp_path / name / "responses.jsonl") for name in "ab")
    assert [line["response"] for line in a] == [line["response"] for line in b]
    low, high = (common.read_json(tmp_path / "a" / "confidence.json")[name][0] for name in ("min", "max"))
    for one, other in zip(common.all_sentences(a), common.all_sentences(b), strict=True):
        assert one["lnlp"] == other["lnlp"] and other["u"] == pytest.approx((one["lnlp"] - low) / (high - low), abs=1e-9)
    assert common.read_run(tmp_path / "b")["setup"] == common.read_run(tmp_path / "a")["setup"]
    estimate.main(["--relevel", first, "--levels", "consistency", "--samples", "4", "--out", agreed])
    shares = {s["consistency"] for s in common.all_sentences(common.read_jsonl(tmp_path / "c" / "responses.jsonl"))}
    assert shares <= {0, 0.25, 0.5, 0.75, 1} and len(shares) > 1
    with pytest.raises(SystemExit):
        estimate.main(["--relevel", str(tmp_path / "nowhere"), "--out", str(tmp_path / "d")])
    assert "no such folder" in capsys.readouterr().err


def test_dpo_by_a_loop():
    rng = np.random.default_rng(0)
    logprob, reference = (torch.tensor(rng.normal(-9, 3, (2, 7))) for _ in range(2))
    losses = []
    for i in range(7):
        margin = 0.3 * ((logprob[0, i] - reference[0, i]) - (logprob[1, i] - reference[1, i])).item()
        losses.append(np.log(1 + np.exp(-margin)))
    assert conf_csr.dpo_loss(logprob, reference, 0.3).item() == pytest.approx(np.mean(losses))
    better = logprob.clone()
    better[0] += 1
    assert conf_csr.dpo_loss(better, reference, 0.3) < conf_csr.dpo_loss(logprob, reference, 0.3)


def test_pairs_of_self_rewards():
    """The best and the worst of a question's samples by the mean of 1 - U; none where all are equal."""
    confidence = {"min": [1, 0, 0, 0], "max": [2, 1, 1, 1], "weights": [0.1, 0, 0, 0.9], "fuse": "mean"}
    sentence = lambda lnlp, clip: {"lnlp": lnlp, "mte": 0.0, "tokensar": 0.0, "clip": clip}  # noqa: E731
    lines = [{"sentences": [sentence(1.0, 0.2), sentence(2.0, 0.4)]}, {"sentences": []}]
    assert conf_csr.self_rewards(lines, confidence) == pytest.approx([1 - (0.18 + 0.1 + 0.36) / 2, 0.0])
    assert conf_csr.choose_pairs(np.array([[0.1, 0.5, 0.3], [0.2, 0.2, 0.2]])) == [(0, 1, 0)]


def test_conf_csr_on_digits(cache, tmp_path):
    """One DPO round raises the preferred responses above the others; its levels are those of U under the trained model."""
    estimate.main(["--limit", "24", "--cache", str(cache), "--out", str(tmp_path / "e")])
    estimate.main(["--relevel", str(tmp_path / "e"), "--weights", "1", "0", "0", "9", "--out", str(tmp_path / "w")])
    flags = [
        "--estimate",
        str(tmp_path / "w"),
        "--out",
        str(tmp_path / "csr"),
        "--samples",
        "3",
        "--epochs",
        "4",
        "--batch-size",
        "8",
    ]
    conf_csr.main([*flags, "--lr", "3e-4"])
    log = common.read_jsonl(tmp_path / "csr" / "log.jsonl")
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and log[-1]["loss"] < log[0]["loss"] - 0.01
    vlm = common.load_model(tmp_path / "csr", estimate.parse_args([]), "cpu")
    tools = conf_csr.load_tools(common.read_run(tmp_path / "csr")["setup"], "cpu")
    records = common.read_jsonl(tmp_path / "e" / "responses.jsonl")[:4]
    lines = conf_csr.sample(vlm, records, 0, tools, 0.0)
    confidence = common.read_json(tmp_path / "csr" / "confidence.json")
    predictions = conf_csr.levels_of(lines, confidence, tools[2])
    for line, prediction in zip(lines, predictions, strict=True):
        for sentence, said in zip(line["sentences"], prediction["sentences"], strict=True):
            u = common.fuse(np.array([[sentence[name] for name in common.ESTIMATORS]]), confidence)
            assert said["level"] == common.to_level(u, confidence)[0]
    assert evaluate.compute_metrics(predictions)["coverage"] == 1


def test_the_tables_of_the_readme(monkeypatch, capsys):
    """They are what the command prints from the figures that were kept."""
    kept, readme = Path(__file__).with_name("table1.json"), Path(__file__).parents[1] / "README.md"
    monkeypatch.setattr("sys.argv", ["rows.py", "--table", str(kept)])
    rows.main()
    printed, text = capsys.readouterr().out, readme.read_text(encoding="utf-8")
    for data, found in [(data, common.read_json(kept)[data]) for data in rows.DATA]:
        table = tables.markdown(tables.table_1(found, rows.PAPER[data]))
        assert table in printed and table in text and all(f"| {row}" in table for row in found)


def test_every_row_can_be_made():
    """Each run of the comparison names runs that exist, scripts that exist and flags that they know."""
    for name, command in rows.RUNS.items():
        script, *flags = command.split()
        assert all(flag[1:-1] in rows.RUNS for flag in flags if flag[0] == "{"), name
        module = {"estimate": estimate, "warmup": warmup, "ppo": ppo, "conf_csr": conf_csr}[script]
        module.parse_args([*flags, "--out", "x"])
    assert all(run in rows.RUNS for run, _, _ in rows.ROWS.values())


def test_rows_share_and_go_on(tmp_path, monkeypatch, capsys):
    """What two rows have in common is made once; a row that fails is named and the others are made; the table needs no model."""
    made, options = [], dict.fromkeys(rows.SCRIPTS, ())
    make = lambda argv, script: (script, argv) in made or made.append((script, argv))  # noqa: E731
    fakes = {script: lambda argv, script=script: make(argv, script) for script in ("estimate", "warmup")}
    fakes["ppo"] = lambda argv: 1 / 0
    monkeypatch.setattr(rows, "SCRIPTS", fakes)
    monkeypatch.setattr(evaluate, "main", lambda argv: made.append(("evaluate", argv)))
    setup = {"model": "base", "noise_scale": 2.0, "cache": "there"}
    monkeypatch.setattr(common, "read_run", lambda folder: {"setup": setup})
    failed = [rows.run_row((tmp_path, 7, row, options)) for row in ("w/o RL", "w/o R_EC", "DPS", "SC")]
    assert failed == [None, (7, "w/o R_EC"), None, None]
    assert made[-1][1][:8] == "--ckpt base --seed 7 --noise-scale 2.0 --cache there".split()
    del made[-2:]
    assert [script for script, _ in made].count("estimate") == 2  # "estimate" once, and "random"
    assert [argv[argv.index("--ckpt") + 1] for script, argv in made if script == "evaluate"] == [
        str(tmp_path / "seed7" / name) for name in ("no_rl", "no_rl", "dps", "dps")
    ]
    assert all(argv[argv.index("--seed") + 1] == "7" for _, argv in made) and "w/o R_EC: failed" in capsys.readouterr().err
