"""The shipped scripts, each on a tiny setting, as a user runs them."""

import errno
import fcntl
import importlib
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import common
import estimate
import evaluate
import ppo
import warmup

import bars
import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scripted import code_and_line

ROOT = Path(__file__).parents[1]
PPO = "--updates 2 --batch-size 3 --samples 2 --save-every 1 --max-new-tokens 45".split()


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """estimate, warmup, ppo and evaluate one after the other, on 24 questions."""
    folder = tmp_path_factory.mktemp("runs")
    out = {name: str(folder / name) for name in ("estimate", "warmup", "ppo", "results")}
    estimate.main(["--limit", "24", "--batch-size", "10", "--cache", str(cache), "--out", out["estimate"]])
    warmup.main(["--estimate", out["estimate"], "--epochs", "3", "--batch-size", "8", "--out", out["warmup"]])
    ppo.main(["--ckpt", out["warmup"], "--out", out["ppo"], *PPO])
    evaluate.main(["--ckpt", out["ppo"], "--limit", "12", "--max-new-tokens", "60", "--out", out["results"]])
    return {name: Path(path) for name, path in out.items()}


def test_estimate(runs):
    lines = common.read_jsonl(runs["estimate"] / "responses.jsonl")
    confidence = common.read_json(runs["estimate"] / "confidence.json")
    assert len(lines) == 24
    assert set(lines[0]) == {"id", "image", "question", "answer", "choices", "reference", "response", "finished", "sentences"}
    sentences = [s for line in lines for s in line["sentences"]]
    names = {"text", "start", "end", "part", "n_tokens", "lnlp", "mte", "tokensar", "clip", "u", "level", "correct"}
    assert len(sentences) > 24 and all(set(s) == names for s in sentences)
    for line in lines:
        reference = common.reference_chain(line)
        for s in line["sentences"]:
            assert line["response"][s["start"] : s["end"]] == s["text"].rstrip(".!? ") and s["correct"] == (s["text"] in reference)
            assert s["lnlp"] >= 1 and s["mte"] >= 0 and s["tokensar"] >= 0 and 0 <= s["clip"] <= 1 and 0 <= s["u"] <= 1
    u = np.array([s["u"] for s in sentences])
    assert [confidence["mean"], confidence["std"]] == pytest.approx([u.mean(), u.std()])
    for name, low, high in zip(common.ESTIMATORS, confidence["min"], confidence["max"], strict=True):
        values = [s[name] for s in sentences]
        assert (low, high) == (min(values), max(values))
    assert all(s["level"] == 5 - sum(s["u"] > e for e in confidence["edges"]) for s in sentences)
    assert (runs["estimate"] / "confidence.png").stat().st_size > 5000
    config = common.read_json(runs["estimate"] / "run.json")
    assert config["args"]["limit"] == 24 and config["args"]["temperature"] == 0.1 and config["versions"]["torch"]


def test_interrupted_estimate_continues(runs, cache, tmp_path, capsys):
    args = ["--limit", "24", "--batch-size", "10", "--cache", str(cache), "--out", str(tmp_path / "e")]

    class Stop(Exception):
        pass

    def stop(*_, original=common.measure):
        if calls.append(0) or len(calls) > 2:
            raise Stop
        return original(*_)

    calls, original = [], common.measure
    common.measure = stop
    try:
        with pytest.raises(Stop):
            estimate.main(args)
    finally:
        common.measure = original
    partial = tmp_path / "e" / "responses.jsonl"
    answered = common.read_jsonl(partial)
    common.write_jsonl(partial, [line | {"id": f"other {line['id']}"} for line in answered])
    with pytest.raises(SystemExit):  # never mixed with answers to other questions
        estimate.main(args)
    assert "responses.jsonl has answers to other questions" in capsys.readouterr().err
    common.write_jsonl(partial, answered)
    with open(partial, "a") as file:
        file.write('{"id": "cut sho')  # as a killed process leaves it
    estimate.main(args)
    for line, whole in zip(*(common.read_jsonl(f / "responses.jsonl") for f in (tmp_path / "e", runs["estimate"])), strict=True):
        assert [line[k] for k in ("id", "response")] == [whole[k] for k in ("id", "response")]
        for s, t in zip(line["sentences"], whole["sentences"], strict=True):
            assert s == {k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v for k, v in t.items()}


def test_estimate_given_responses(runs, cache, tmp_path, capsys, monkeypatch):
    """--responses measures existing chains as it measures its own, all of them; unusable records are counted by reason."""
    monkeypatch.setitem(estimate.FLAGS["data"], "limit", (common.COUNT, 20, None, "of what is generated"))
    lines = common.read_jsonl(runs["estimate"] / "responses.jsonl")
    given = [{k: line[k] for k in ("id", "image", "question", "response")} for line in lines]
    common.write_jsonl(tmp_path / "given.jsonl", [*given, {"id": "x", "image": "nowhere.png", "question": "?", "response": "No."}])
    args = ["--responses", str(tmp_path / "given.jsonl"), "--cache", str(cache), "--batch-size", "7", "--out"]
    estimate.main([*args, str(tmp_path / "e")])
    assert "1 of 25 records left out: image missing or unreadable (x)" in capsys.readouterr().out
    whole = [line for line in lines if line["response"].rstrip().endswith(".")]  # ended by itself, not cut at the longest length
    scored = {line["id"]: line for line in common.read_jsonl(tmp_path / "e" / "responses.jsonl")}
    assert len(scored) == 24 and len(whole) > 3
    for line in whole:
        for s, t in zip(scored[line["id"]]["sentences"], line["sentences"], strict=True):
            assert s["text"] == t["text"] and s["correct"] is None
            assert [s[k] for k in common.ESTIMATORS] == pytest.approx([t[k] for k in common.ESTIMATORS], abs=1e-4)


def test_given_responses_that_cannot_be_used(runs, cache, tmp_path, capsys):
    """Too many unusable records, a line that is no JSON, and responses without a sentence each end the run in one line."""
    line = common.read_jsonl(runs["estimate"] / "responses.jsonl")[0]
    given = json.dumps({k: line[k] for k in ("id", "image", "question")} | {"response": "It is 3."})
    problems = {f'{{"id": 1}}\n{given}\n{given}\n': "1 of 3 records", f"{given}\n{{oops\n{given}\n": "line 2, is no JSON"}
    problems[given.replace("It is 3.", "...") + "\n"] = "no response holds a sentence"
    problems |= {f"{given}\n{given[:-9]}": "line 2, is no JSON object", f"[{given}]": "line 1, is no JSON object", "3": "line 1"}
    problems |= {f"{given}\n{given}".encode("utf-16"): "is no JSON object", given.replace("It", "É").encode("latin-1"): "line 1"}
    problems |= {given.replace('"It is 3."', "[3]"): "1 of 1 records", given.replace('"It is 3."', '""'): "1 of 1 records"}
    for i, (text, message) in enumerate(problems.items()):
        (tmp_path / "given.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(SystemExit) as error:
            estimate.main(["--responses", str(tmp_path / "given.jsonl"), "--cache", str(cache), "--out", str(tmp_path / f"e{i}")])
        assert error.value.code == 2 and message in capsys.readouterr().err
        assert (tmp_path / f"e{i}").exists() == (i == 2) and not (tmp_path / f"e{i}" / "done").exists()


def test_a_cut_response(base, records, cache, monkeypatch):
    """Its unfinished last sentence is left out, and no end token is learned after it."""
    full = base.tokenizer("The left digit is 3. The right", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(common, "generate", lambda *_: [full, [*full, base.end_tokens[0]], base.end_tokens[:1]])
    paths = estimate.digits_paths(cache, 0, 1.0)
    judged_by = common.ClipScorer(paths["clip"]), common.Similarity(), common.Matcher("exact")
    cut, whole, empty = common.measure(base, records[:3], common.generate, *judged_by)
    assert [[s["text"] for s in line["sentences"]] for line in (cut, whole, empty)] == [
        ["The left digit is 3."],
        ["The left digit is 3.", "The right."],
        [],
    ]
    assert [line["finished"] for line in (cut, whole, empty)] == [False, True, True]
    seen, original = [], common.collate
    monkeypatch.setattr(common, "collate", lambda vlm, records, ids=(): seen.extend(ids) or original(vlm, records, ids))
    optimizer = torch.optim.SGD(base.model.parameters(), lr=0.0)
    warmup.train_step(base, [cut, whole], ["It is 3.", "It is 3."], optimizer, 2, Accelerator(cpu=True))
    assert seen[1] == [*seen[0], base.end_tokens[0]]


def test_a_batch_without_a_word(base, records, cache, monkeypatch):
    ids = base.tokenizer("...", add_special_tokens=False)["input_ids"] + base.end_tokens[:1]
    monkeypatch.setattr(common, "generate", lambda *_: [ids, base.end_tokens[:1]])
    clip = common.ClipScorer(estimate.digits_paths(cache, 0, 1.0)["clip"])
    lines = common.measure(base, records[:2], common.generate, clip, common.Similarity(), common.Matcher("exact"))
    assert [line["sentences"] for line in lines] == [[], []]


def test_warmup(runs, reader):
    folder = runs["warmup"]
    lines, sft = common.read_jsonl(runs["estimate"] / "responses.jsonl"), common.read_jsonl(folder / "sft.jsonl")
    assert (folder / "confidence.json").read_text() == (runs["estimate"] / "confidence.json").read_text()
    lines = {line["id"]: line for line in lines}
    for row in sft:
        steps, sentences = reader.parse([row["text"]])[0], lines[row["id"]]["sentences"]
        assert len(steps) == len(sentences) and all(step.level for step in steps)
    log = common.read_jsonl(folder / "log.jsonl")
    assert [r["step"] for r in log] == list(range(9)) and log[-1]["loss"] < log[0]["loss"]
    assert common.read_json(folder / "run.json")["stage"] == "warmup"
    assert (folder / "model.safetensors").exists() and (folder / "training.png").exists()


def test_statements_follow_the_levels(reader):
    line = {"sentences": [{"text": f"Sentence {i} is here.", "level": 1 + i % 5} for i in range(50)]}
    pool = common.load_statements()
    levels = [s.level for s in reader.parse([warmup.add_statements(line, np.random.default_rng(0), pool, explore=0.0)])[0]]
    assert levels == [s["level"] for s in line["sentences"]]
    for seed in range(20):  # exploring: a neighbour first, then what was said before; half of the time, between the two
        mixed = [s.level for s in reader.parse([warmup.add_statements(line, np.random.default_rng(seed), pool, explore=1.0)])[0]]
        assert set(mixed) == {2}
        half = [s.level for s in reader.parse([warmup.add_statements(line, np.random.default_rng(seed), pool, explore=0.5)])[0]]
        moved = [t for t in range(1, 50) if half[t] != levels[t]]
        assert 8 < len(moved) < 35 and all(half[t] in half[:t] for t in moved)
    numbers = warmup.add_statements(line, np.random.default_rng(0), common.NUMERIC_STATEMENTS, explore=0.0)
    assert numbers.startswith("Sentence 0 is here, with confidence 1 of 5. Sentence 1")


def test_oracle(runs, reader, tmp_path):
    warmup.main(["--estimate", str(runs["estimate"]), "--epochs", "1", "--oracle", "--out", str(tmp_path / "w")])
    lines = {line["id"]: line["sentences"] for line in common.read_jsonl(runs["estimate"] / "responses.jsonl")}
    for row in common.read_jsonl(tmp_path / "w" / "sft.jsonl"):
        truth = [5 if sentence["correct"] else 1 for sentence in lines[row["id"]]]
        assert [step.level for step in reader.parse([row["text"]])[0]] == truth


def test_which_tokens_carry_loss(base, records):
    """Exactly the tokens of the response and its end: not the prompt, the image or the padding."""
    texts = ["The left digit is 3.", "The left digit is 3, and I trust this is correct."]
    batch = common.collate(base, records[:2], common.response_ids(base, texts))
    for row, text in enumerate(texts):
        carried = batch.responses[row][batch.mask[row]].tolist()
        assert base.tokenizer.decode(carried) == text + base.tokenizer.eos_token
        kept = batch.inputs["input_ids"][row, -batch.responses.shape[1] :][batch.mask[row]].tolist()
        assert kept == carried and base.processor.image_token_id not in carried
    with torch.no_grad():
        logits = base.model(**batch.inputs).logits[:, -batch.responses.shape[1] - 1 : -1].log_softmax(-1)
        picked = logits.gather(-1, batch.responses[..., None]).squeeze(-1)
        expected = -picked[batch.mask].mean()
        assert float(common.sft_loss(base, batch)) == pytest.approx(float(expected), rel=1e-5)


def test_ppo(runs):
    log = common.read_jsonl(runs["ppo"] / "log.jsonl")
    keys = {"reward", "r_ka", "r_ec", "r_cs", "kl", "entropy", "policy_loss", "value_loss", "clipfrac", "approx_kl", "grad_norm"}
    keys |= {"explained_variance", "response_length", "seconds_rollout", "seconds_reward", "seconds_update"}
    keys |= {f"level_{level}" for level in (1, 2, 3, 4, 5, "none")}
    assert len(log) == 2 and keys <= set(log[0])
    assert all(math.isfinite(v) for row in log for v in row.values() if isinstance(v, float))
    # R of eq. 13 but for what is missing: nothing is worth more than 3, or less than a response without a word
    assert all(-2 <= row["reward"] <= 3 and 0 <= row["r_ka"] <= 1 for row in log)
    for name in ("model.safetensors", "value_head.safetensors", "confidence.json", "training.png", "trainer_state.pt"):
        assert (runs["ppo"] / name).exists()


def test_interrupted_ppo_equals_uninterrupted(runs, tmp_path, monkeypatch):
    args = ["--ckpt", str(runs["warmup"]), "--out", str(tmp_path / "p"), *PPO]
    original, calls = ppo.train_update, []

    def stop(*a):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*a)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "train_update", stop)
        with pytest.raises(KeyboardInterrupt):
            ppo.main(args)
    ppo.main(args)
    for name in ("model.safetensors", "trainer_state.pt"):
        assert (tmp_path / "p" / name).read_bytes() == (runs["ppo"] / name).read_bytes()
    strip = lambda rows: [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in rows]  # noqa: E731
    assert strip(common.read_jsonl(tmp_path / "p" / "log.jsonl")) == strip(common.read_jsonl(runs["ppo"] / "log.jsonl"))


def test_iv_score_changes_r_cs_alone(runs, tmp_path):
    """In the same first rollout, of which the levels are said and the sentences judged as before."""
    ppo.main(["--ckpt", str(runs["warmup"]), "--out", str(tmp_path / "p"), *PPO, "--updates", "1", "--iv", "score"])
    score, level = (common.read_jsonl(folder / "log.jsonl")[0] for folder in (tmp_path / "p", runs["ppo"]))
    assert [score[name] for name in ("r_ka", "r_ec", "auroc")] == [level[name] for name in ("r_ka", "r_ec", "auroc")]
    assert abs(score["r_cs"] - level["r_cs"]) > 1e-3


def test_interrupted_warmup_equals_uninterrupted(runs, tmp_path, monkeypatch):
    """Also where an adapter drops out at random."""
    flags = ["--estimate", str(runs["estimate"]), "--epochs", "1", "--batch-size", "8", "--save-every", "1", "--out"]
    flags = ["--lora-rank", "2", "--lora-dropout", "0.5", *flags]
    warmup.main([*flags, str(tmp_path / "whole")])
    original, calls = warmup.train_step, []

    def stop(*a):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*a)

    with monkeypatch.context() as patch:
        patch.setattr(warmup, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            warmup.main([*flags, str(tmp_path / "twin")])
    warmup.main([*flags, str(tmp_path / "twin")])
    losses = [[row["loss"] for row in common.read_jsonl(tmp_path / name / "log.jsonl")] for name in ("whole", "twin")]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    whole, twin = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "twin"))
    assert whole == twin


def test_evaluate(runs, tmp_path):
    metrics = common.read_json(runs["results"] / "metrics.json")
    predictions = common.read_jsonl(runs["results"] / "predictions.jsonl")
    assert metrics["n_questions"] == len(predictions) == 12
    assert metrics["n_sentences"] == sum(len(p["sentences"]) for p in predictions) == sum(metrics["level_histogram"].values())
    assert metrics["accuracy"] == pytest.approx(np.mean([p["prediction"] == p["answer"] for p in predictions]))
    assert all("-test-" in p["id"] for p in predictions)
    for name in ("reliability.png", "report.html", "run.json"):
        assert (runs["results"] / name).stat().st_size > 500
    assert all((folder / "done").exists() for folder in runs.values())
    evaluate.main(["--ckpt", str(runs["ppo"]), "--limit", "12", "--max-new-tokens", "60", "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "metrics.json").read_bytes() == (runs["results"] / "metrics.json").read_bytes()


def test_the_bars(runs, cache, tmp_path, capsys):
    base = estimate.digits_paths(cache, 0, 1.0)["model"]
    assert "--bars needs " in code_and_line(capsys, bars.main, "--ckpt", base, "--bars", "--out", tmp_path / "r")
    bars.main(["--ckpt", str(runs["ppo"]), "--limit", "6", "--max-new-tokens", "60", "--bars", "--out", str(tmp_path / "r")])
    metrics, lines = common.read_json(tmp_path / "r" / "metrics.json"), common.read_jsonl(tmp_path / "r" / "base.jsonl")
    right = [sentence["correct"] for line in lines for sentence in line["sentences"]]
    assert len(lines) == 6 and metrics["base rate"] == pytest.approx(np.mean(right))
    assert "base, levels of U_Final" in capsys.readouterr().out and set(metrics["base, LNLP"]) == {"auroc", "image", "reasoning"}


def test_every_batch_has_its_seed(runs, tmp_path, monkeypatch):
    seeds, predict = [], evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda *args: seeds.append(args[5]) or predict(*args))
    flags = "--limit 4 --batch-size 2 --consistency 1 --seed 3 --max-new-tokens 20".split()
    evaluate.main(["--ckpt", str(runs["warmup"]), *flags, "--out", str(tmp_path / "r")])
    assert seeds == [3_000_000, 3_000_002]


def test_evaluate_a_base_model(cache, tmp_path):
    model = estimate.digits_paths(cache, 0, 1.0)["model"]
    evaluate.main(["--ckpt", model, "--limit", "6", "--cache", str(cache), "--data", "digits-ood", "--out", str(tmp_path / "b")])
    metrics = common.read_json(tmp_path / "b" / "metrics.json")
    assert metrics["n_questions"] == 6 and metrics["f1"] is not None


def test_lora_adapter(runs, tmp_path):
    """With --lora-rank both stages train and save an adapter of the language model alone, in PEFT's format."""
    out = {name: str(tmp_path / name) for name in ("w", "p", "r")}
    warmup.main(["--estimate", str(runs["estimate"]), "--epochs", "1", "--lora-rank", "4", "--out", out["w"]])
    ppo.main(["--ckpt", out["w"], "--out", out["p"], *PPO])
    evaluate.main(["--ckpt", out["p"], "--limit", "3", "--max-new-tokens", "40", "--out", out["r"]])
    from safetensors.torch import load_file

    first, second = (load_file(Path(out[x]) / "adapter_model.safetensors") for x in ("w", "p"))
    assert set(first) == set(second) and all("language_model" in key for key in first)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    assert sorted(p.name for p in Path(out["p"]).glob("*.safetensors")) == ["adapter_model.safetensors", "value_head.safetensors"]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("estimate.py", "--limit 0", "--limit must be 1 to"),
        ("estimate.py", "--weights 0 0 0 0", "--weights must not be"),
        ("estimate.py", "--data imagenet", "invalid choice"),
        ("estimate.py", "--responses nowhere.jsonl", "no such file: nowhere.jsonl"),
        ("estimate.py", "--data digits aokvqa", "--data digits goes with no other data"),
        ("estimate.py", "--relevel e --statement-encoder x", "whatever --statement-encoder says"),
        ("estimate.py", "--clip nowhere", "--clip nowhere is neither a folder nor NAME/TAG"),
        ("estimate.py", "--relevel tests --limit 9", "--relevel takes what is measured already, whatever --limit says"),
        ("estimate.py", "--relevel=", "--relevel must be text"),
        ("estimate.py", "--device meta", "--device must be cpu, cuda"),
        ("ppo.py", "--lr 1e39", "--lr must be positive, at most 1e9"),
        ("ppo.py", "--ckpt p\udcff", "--ckpt must be text"),
        ("warmup.py", "--estimate nowhere", "no such folder: nowhere/"),
        ("warmup.py", "--explore 2 --lr -1", "--explore must lie between 0 and 1; --lr must be positive"),
        ("ppo.py", "--ckpt tests", "tests/ is not a finished run"),
        ("ppo.py", "--lam 1.5", "--lam must lie between 0 and 1"),
        ("evaluate.py", "--ckpt nowhere", "no such folder: nowhere"),
        ("evaluate.py", "--ckpt tests", "tests holds neither a model nor a run"),
    ],
)
def test_usage_errors(script, flags, message, monkeypatch, capsys):
    """One line on stderr and exit code 2, before any weight is loaded."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as error:
        importlib.import_module(script[:-3]).main(flags.split())
    out, err = capsys.readouterr()
    assert error.value.code == 2 and not out
    assert err.startswith(f"{script}: error: ") and message in err and len(err.splitlines()) == 1


def test_a_usage_error_from_the_shell():
    result = subprocess.run([sys.executable, "warmup.py", "--estimate", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "warmup.py: error: no such folder: nowhere/\n"


@pytest.fixture
def no_torch(tmp_path):
    """Run a script where importing torch, or what common.py imports before it, runs some code instead; -> its result."""

    def run(command: str, code: str) -> subprocess.CompletedProcess:
        for name in ("huggingface_hub", "scipy", "torch"):
            (tmp_path / f"{name}.py").write_text(code)
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        script, *flags = command.split()
        return subprocess.run(
            [sys.executable, ROOT / script, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize(
    "command, message",
    [
        ("estimate.py --nope", "unrecognized arguments: --nope"),
        ("estimate.py --weights 0 0 0 0", "--weights must not be all 0"),
        ("warmup.py --lr nan", "--lr must be positive"),
        ("ppo.py --updates 0", "--updates must be 1 to"),
        ("evaluate.py --split train", "--split: invalid choice"),
    ],
)
def test_wrong_flags_are_answered_before_the_slow_imports(no_torch, command, message):
    result = no_torch(command, "raise AssertionError('imported')")
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["estimate.py", "warmup.py", "ppo.py", "evaluate.py"])
def test_help_comes_before_the_slow_imports(no_torch, script):
    result = no_torch(f"{script} --help", "raise AssertionError('imported')")
    assert (result.returncode, result.stderr) == (0, "") and f"python {script}" in result.stdout
    assert "imported" in no_torch(f"{script} --seed 1", "raise AssertionError('imported')").stderr  # where nothing is wrong


def test_an_interruption_during_the_imports(no_torch):
    """Also in a finaliser, where Python ignores exceptions."""
    finaliser = "class Last:\n    __del__ = lambda self: os.kill(os.getpid(), signal.SIGINT)\nLast()\nprint('went on')"
    for command, said in {"estimate.py": "", "estimate.py --overwrite": " without --overwrite"}.items():
        result = no_torch(command, f"import os, signal\n{finaliser}")
        assert (result.returncode, result.stdout) == (130, "")
        assert result.stderr == f"stopped by signal 2; the same command{said} goes on\n"


@pytest.mark.parametrize(
    "command, message",
    [
        ("estimate.py --server http://127.0.0.1:9 --out s", "server http://127.0.0.1:9 does not answer"),
        ("ppo.py --ckpt gone --server=http://127.0.0.1:9", "no such folder: gone"),
        ("evaluate.py --server", "expected one argument"),
        ("evaluate.py --bars --ckpt gone", "no such folder: gone"),
        ("evaluate.py --correct 6", "--correct must lie between 1 and 5"),
        ("evaluate.py --table gone.json", "gone.json"),
        ("evaluate.py --human-sheet a/x b/x", "two folders have the same name"),
        ("evaluate.py --human-scores rater.csv --out gone", "gone/key.json"),
        ("warmup.py --server http://127.0.0.1:9", "unrecognized arguments: --server"),
        ("estimate.py --table runs", "unrecognized arguments: --table"),
    ],
)
def test_flags_that_leave_the_work_to_a_file_in_tests(monkeypatch, tmp_path, capsys, command, message):
    script, *flags = command.split()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out, err = capsys.readouterr()
    assert error.value.code == 2 and not out
    assert err.startswith(f"{script}: error: ") and message in err and len(err.splitlines()) == 1


def test_another_runs_folder_is_not_touched(runs, cache, capsys):
    before, record = (runs["estimate"] / "responses.jsonl").read_text(), common.read_json(runs["estimate"] / "run.json")
    common.write_json(runs["estimate"] / "run.json", record | {"commit": "of the run"})
    with pytest.raises(SystemExit) as error:
        estimate.main(["--limit", "25", "--batch-size", "10", "--cache", str(cache), "--out", str(runs["estimate"])])
    assert error.value.code == 2 and "other settings" in capsys.readouterr().err
    estimate.main(["--limit", "24", "--batch-size", "10", "--cache", str(cache), "--out", str(runs["estimate"])])
    assert "already holds this run" in capsys.readouterr().out
    assert (runs["estimate"] / "responses.jsonl").read_text() == before
    assert common.read_json(runs["estimate"] / "run.json")["commit"] == "of the run"


def test_what_would_spoil_a_run(runs, tmp_path, capsys):
    """A folder that is read is not overwritten, and 4-bit weights are not trained without an adapter."""
    for main, source in ((warmup.main, ["--estimate", str(runs["estimate"])]), (ppo.main, ["--ckpt", str(runs["warmup"])])):
        problems = {"lies in what is read": ["--out", source[1], "--overwrite"]}
        problems["trains an adapter only"] = ["--out", str(tmp_path / "q"), "--load-in-4bit"]
        for message, flags in problems.items():
            before = sorted(Path(source[1]).iterdir())
            with pytest.raises(SystemExit) as error:
                main([*source, *flags])
            assert error.value.code == 2 and message in capsys.readouterr().err
            assert sorted(Path(source[1]).iterdir()) == before and not (tmp_path / "q").exists()


@pytest.mark.parametrize("name", "estimate warmup ppo evaluate annotate bars bench_gpu bench_memory conf_csr correct".split())
def test_every_default_is_allowed(name):
    tables = importlib.import_module(name).FLAGS
    common.parse_flags("", tables if isinstance(next(iter(tables.values())), dict) else {"": tables}, [])


@pytest.mark.parametrize("script", ["estimate.py", "warmup.py", "ppo.py", "evaluate.py"])
def test_help_teaches(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as error:
        importlib.import_module(script[:-3]).main(["--help"])
    shown = capsys.readouterr().out
    assert error.value.code == 0 and f"python {script}" in shown and "Choices beyond the paper" in shown


def test_no_script_imports_another():
    scripts = ["estimate", "warmup", "ppo", "evaluate"]
    for name in scripts:
        source = (ROOT / f"{name}.py").read_text()
        assert not any(f"import {other}" in source or f"from {other}" in source for other in scripts)


def test_statements_are_valid_json():
    assert sorted(json.loads((ROOT / "statements.json").read_text())) == ["1", "2", "3", "4", "5"]


def test_given_responses_without_references_have_no_rewards(runs, tmp_path, capsys):
    for name in ("run.json", "confidence.json", "done"):
        (tmp_path / name).write_bytes((runs["warmup"] / name).read_bytes())
    blank = {"reference": {"image": [], "reasoning": []}}
    common.write_jsonl(tmp_path / "sft.jsonl", [row | blank for row in common.read_jsonl(runs["warmup"] / "sft.jsonl")])
    with pytest.raises(SystemExit):
        ppo.main(["--ckpt", str(tmp_path), "--out", str(tmp_path / "p")])
    assert "damaged or was edited" in capsys.readouterr().err
    (tmp_path / "done").write_text("")
    for flags in ([], ["--alpha", "0"], ["--beta", "0"]):
        with pytest.raises(SystemExit):
            ppo.main(["--ckpt", str(tmp_path), "--out", str(tmp_path / "p"), *flags])
        assert "need the reference chains" in capsys.readouterr().err and not (tmp_path / "p").exists()


def test_folders_that_hold_or_are_held(runs, tmp_path, capsys):
    """--out may not be, hold or lie in a folder that is read, a link to it included; nothing is deleted."""
    parent, inside, link = runs["warmup"].parent, runs["warmup"] / "deeper", tmp_path / "link"
    link.symlink_to(runs["warmup"])
    before = sorted(parent.rglob("*"))
    for out in (runs["warmup"], f"{runs['warmup']}/", parent, inside, link):
        for main in (ppo.main, evaluate.main):
            assert "is, holds or lies in" in code_and_line(capsys, main, "--ckpt", runs["warmup"], "--out", out, "--overwrite")
    assert sorted(parent.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--model", "--clip", "--cache", "--responses"])
def test_what_else_is_read_is_not_deleted(flag, runs, cache, tmp_path, capsys):
    """Neither a model nor a cache, nor a file of responses, that lies in the folder to write."""
    shutil.copytree(runs["results"], tmp_path / "r")
    held = tmp_path / "r" / "held"
    shutil.copytree(runs["estimate"], held)
    held = held / "responses.jsonl" if flag == "--responses" else held
    before = sorted(tmp_path.rglob("*"))
    flags = ["--out", tmp_path / "r", "--overwrite", "--limit", "3", *(["--cache", cache] * (flag != "--cache"))]
    line = code_and_line(capsys, estimate.main, flag, held, *flags)
    assert f"is, holds or lies in what is read, {held}" in line and set(before) <= {*tmp_path.rglob("*")}


def test_overwriting_waits_for_good_arguments(runs, tmp_path, capsys):
    """Data that is not there, layers that no model has, a damaged pool: what the folder holds stays; then it goes, whole."""
    for stage in ("warmup", "results"):
        shutil.copytree(runs[stage], tmp_path / stage)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flags = ["--ckpt", runs["ppo"], "--out", tmp_path / "results", "--overwrite"]
    code_and_line(capsys, evaluate.main, *flags, "--data", "aokvqa", "--data-dir", tmp_path / "nowhere")
    flags = ["--estimate", runs["estimate"], "--out", tmp_path / "warmup", "--overwrite", "--lora-rank", "4"]
    assert "no layer that matches" in code_and_line(capsys, warmup.main, *flags, "--lora-targets", "nothing")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "results" / "old.json").write_text("{}")
    flags = ["--ckpt", str(runs["ppo"]), "--limit", "2", "--max-new-tokens", "9", "--out", str(tmp_path / "results")]
    evaluate.main([*flags, "--overwrite"])
    assert not (tmp_path / "results" / "old.json").exists()
    assert len(common.read_jsonl(tmp_path / "results" / "predictions.jsonl")) == 2


def test_a_damaged_run_is_not_taken_for_finished(runs, tmp_path, capsys):
    shutil.copytree(runs["results"], tmp_path / "r")
    flags = ["--ckpt", str(runs["ppo"]), "--limit", "12", "--max-new-tokens", "60", "--out", str(tmp_path / "r")]
    evaluate.main(flags)
    assert "already holds this run" in capsys.readouterr().out
    (tmp_path / "r" / "metrics.json").unlink()
    assert "damaged or was edited since its run ended" in code_and_line(capsys, evaluate.main, *flags)


def test_nothing_is_measured_again_after_the_last_file(runs, cache, tmp_path, monkeypatch):
    """Killed before the finish mark, an estimate ends with the same bytes, and no whole batch is measured again."""
    shutil.copytree(runs["estimate"], tmp_path / "e")
    (tmp_path / "e" / "done").unlink()
    last, original = 24 % 10, common.measure  # the last batch is not whole: it alone is measured again

    def measure(vlm, batch, *others):
        assert len(batch) == last
        return original(vlm, batch, *others)

    monkeypatch.setattr(common, "measure", measure)
    estimate.main(["--limit", "24", "--batch-size", "10", "--cache", str(cache), "--out", str(tmp_path / "e")])
    for name in ("responses.jsonl", "confidence.json", "done"):
        assert (tmp_path / "e" / name).read_bytes() == (runs["estimate"] / name).read_bytes()


def test_overwriting_does_not_follow_links(runs, tmp_path):
    (tmp_path / "w").mkdir()
    common.write_json(tmp_path / "w" / "run.json", {"stage": "warmup"})
    (tmp_path / "w" / "link").symlink_to(runs["estimate"])
    warmup.main(["--estimate", str(runs["estimate"]), "--epochs", "1", "--out", str(tmp_path / "w"), "--overwrite"])
    assert (runs["estimate"] / "responses.jsonl").exists() and not (tmp_path / "w" / "link").exists()


def test_what_is_read_belongs_to_the_settings(runs, tmp_path, monkeypatch, capsys):
    """Moved together and called from elsewhere it is the same run; with other contents of its input it is another one."""
    for name in ("estimate", "warmup"):
        shutil.copytree(runs[name], tmp_path / name)
    monkeypatch.chdir(tmp_path / "warmup")
    same = ["--epochs", "3", "--batch-size", "8"]
    warmup.main(["--estimate", "../estimate", "--out", "../warmup/", *same])
    assert "already holds this run" in capsys.readouterr().out
    lines = common.read_jsonl(tmp_path / "estimate" / "responses.jsonl")
    common.write_jsonl(tmp_path / "estimate" / "responses.jsonl", lines[1:])
    (tmp_path / "estimate" / "done").write_text(common.fingerprint(tmp_path / "estimate"))  # as another estimate ends
    line = code_and_line(capsys, warmup.main, "--estimate", "../estimate", "--out", ".", *same, "--lr", "0.5")
    assert "other settings (the contents of --estimate, --lr)" in line


def test_two_runs_on_one_folder(runs, capsys):
    held = os.open(runs["ppo"], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as another process would, after the run that made the folder
    assert "another run is at work" in code_and_line(capsys, ppo.main, "--ckpt", runs["warmup"], "--out", runs["ppo"], *PPO)
    os.close(held)
    ppo.main(["--ckpt", str(runs["warmup"]), "--out", str(runs["ppo"]), *PPO])
    assert "already holds this run" in capsys.readouterr().out
    held = os.open(runs["ppo"], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # who finds it finished, does not keep others out
    os.close(held)


def test_two_runs_on_one_cache(tmp_path, monkeypatch, capsys):
    """Who comes second waits, and finds what the first has drawn and trained."""
    trained = []
    for name in ("train_digits_clip", "train_digits_model"):
        monkeypatch.setattr(estimate, name, lambda folder, *_: trained.append(folder.name))
    world = estimate.parse_args(["--cache", str(tmp_path)])
    needed = list(estimate.digits_paths(world.cache, 0, 1.0).values())
    drawn = Path(common.digits_data("digits", "test", 1, tmp_path)[0]["image"])
    for folder, make in (
        (drawn.parent, lambda: common.digits_data("digits", "test", 1, tmp_path)),
        (Path(needed[0]), lambda: estimate.build_digits_world(world, needed)),
    ):
        held = common.lock(folder)
        second = threading.Thread(target=make, daemon=True)
        second.start()
        second.join(0.5)
        assert second.is_alive() and not trained
        held.close()
        second.join(60)
        assert not second.is_alive()
    estimate.build_digits_world(world, needed)
    assert trained == ["clip", "model"]

    def no_locks(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as on NFS
    common.digits_data("digits", "test", 1, tmp_path)
    assert "locks no folders (" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut", "a byte", None])
def test_a_damaged_checkpoint(runs, tmp_path, damage):
    """The one before is used, and the run ends as it would have; without any it starts over."""
    shutil.copytree(runs["ppo"], tmp_path / "p")
    for name in ("done", "model.safetensors", "value_head.safetensors"):
        (tmp_path / "p" / name).unlink()
    if damage == "a byte":  # of a weight: the file is read as before
        damage = bytearray((tmp_path / "p" / "trainer_state.pt").read_bytes())
        weights = torch.load(tmp_path / "p" / "trainer_state.pt")["weights"]["policy"].values()
        damage[damage.find(next(iter(weights)).detach().numpy().tobytes()[:64]) + 1] ^= 64
    (tmp_path / "p" / "trainer_state.pt").write_bytes(damage or b"")
    if damage is None:
        (tmp_path / "p" / "trainer_state.pt.before").unlink()
    ppo.main(["--ckpt", str(runs["warmup"]), "--out", str(tmp_path / "p"), *PPO])
    for name in ("model.safetensors", "value_head.safetensors", "done"):
        assert (tmp_path / "p" / name).read_bytes() == (runs["ppo"] / name).read_bytes()


@pytest.mark.parametrize(("flags", "row"), [([], {"kl": math.nan}), ([], {"reward": math.inf}), (["--max-kl", "3"], {"kl": 3.5})])
def test_a_run_that_goes_astray_stops(runs, tmp_path, monkeypatch, capsys, flags, row):
    original, rows = ppo.train_update, []

    def astray(*others):  # in the second update
        rows.append(rows[0] | row if rows else original(*others))
        return rows[-1]

    monkeypatch.setattr(ppo, "train_update", astray)
    line = code_and_line(capsys, ppo.main, "--ckpt", runs["warmup"], "--out", tmp_path / "p", *PPO, *flags)
    assert f"astray at step 1: {next(iter(row))} = " in line and not (tmp_path / "p" / "done").exists()
    assert len(common.read_jsonl(tmp_path / "p" / "log.jsonl")) == torch.load(tmp_path / "p" / "trainer_state.pt")["step"] == 1


def test_weights_that_are_not_finite_are_not_saved(runs, tmp_path, monkeypatch, capsys):
    """The last update of a run is seen by no later loss."""
    original = ppo.train_update

    def spoil(models, *others):
        row = original(models, *others)
        next(iter(models.value_head.parameters())).data.fill_(math.nan)
        return row

    monkeypatch.setattr(ppo, "train_update", spoil)
    line = code_and_line(capsys, ppo.main, "--ckpt", runs["warmup"], "--out", tmp_path / "p", *PPO)
    assert "weights are not finite" in line and not (tmp_path / "p" / "trainer_state.pt").exists()


def test_a_log_that_is_gone(runs, tmp_path, capsys):
    shutil.copytree(runs["ppo"], tmp_path / "p")
    for name in ("done", "log.jsonl"):
        (tmp_path / "p" / name).unlink()
    line = code_and_line(capsys, ppo.main, "--ckpt", runs["warmup"], "--out", tmp_path / "p", *PPO)
    assert "log.jsonl is damaged: 0 lines of 2 steps" in line


def test_overwriting_leaves_what_others_call_a_run(runs, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    common.write_json(tmp_path / "run.json", {"name": "of another program"})
    line = code_and_line(capsys, warmup.main, "--estimate", runs["estimate"], "--out", tmp_path, "--overwrite")
    assert "holds no run of this project" in line and (tmp_path / "thesis.tex").exists()


def test_a_refusal_leaves_no_new_folder(runs, tmp_path, capsys):
    blank = {"image": str(tmp_path / "gone.png"), "question": "?", "response": "It is."}
    common.write_jsonl(tmp_path / "given.jsonl", [blank])
    flags = ["--responses", tmp_path / "given.jsonl", "--cache", tmp_path, "--allow-bad-records"]
    code_and_line(capsys, estimate.main, *flags, "--out", tmp_path / "a" / "b")
    line = code_and_line(
        capsys, warmup.main, "--estimate", runs["estimate"], "--out", tmp_path / "c" / "d", "--lora-rank", 2, "--lora-targets", "x"
    )
    assert "no layer that matches" in line and sorted(path.name for path in tmp_path.iterdir()) == ["given.jsonl"]


@pytest.mark.parametrize("key", ["id", "image", "question", "reference"])
def test_a_line_that_lacks_something_is_named(runs, tmp_path, capsys, key):
    for stage, name, main, flag in (("estimate", "responses", warmup.main, "--estimate"), ("warmup", "sft", ppo.main, "--ckpt")):
        shutil.copytree(runs[stage], tmp_path / stage)
        first, second, *rest = common.read_jsonl(tmp_path / stage / f"{name}.jsonl")
        second.pop(key)
        common.write_jsonl(tmp_path / stage / f"{name}.jsonl", [first, second, *rest])
        (tmp_path / stage / "done").write_text("")  # as who edits a file says that it is meant
        assert f"{name}.jsonl, line 2, has no {key}" in code_and_line(capsys, main, flag, tmp_path / stage, "--out", tmp_path / "x")


def test_a_batch_is_whole_where_there_are_fewer_questions(runs, tmp_path, monkeypatch):
    def stop(models, optimizers, reader, judge, questions, *others):
        raise KeyError(len(questions), len({question["id"] for question in questions}))

    monkeypatch.setattr(ppo, "train_update", stop)
    with pytest.raises(KeyError) as error:
        ppo.main(["--ckpt", str(runs["warmup"]), "--out", str(tmp_path / "p"), "--batch-size", "100"])
    assert error.value.args == (100, 24)


def test_given_responses_without_references(runs, cache, tmp_path, capsys):
    """null is none; no level is calibrated by what nobody knows, measured now or before; the file may be renamed."""
    lines = [{**line, "reference": None} for line in common.read_jsonl(runs["estimate"] / "responses.jsonl")[:3]]
    common.write_jsonl(tmp_path / "a.jsonl", lines)
    shutil.copytree(cache, tmp_path / "e" / "cache", ignore=shutil.ignore_patterns("digits-train*"))
    model, out = estimate.digits_paths(tmp_path / "e" / "cache", 0, 1.0), tmp_path / "e" / "run"
    flags = ["--data-dir", cache, "--model", model["model"], "--clip", model["clip"], "--cache", out / "inside"]
    refused = code_and_line(
        capsys, estimate.main, "--responses", tmp_path / "a.jsonl", *flags, "--levels", "calibrated", "--out", out
    )
    assert "needs reference chains" in refused and not out.exists()
    assert "is, holds or lies in" in code_and_line(capsys, estimate.main, "--responses", tmp_path / "a.jsonl", *flags, "--out", out)
    flags[-1] = tmp_path / "e"
    estimate.main(["--responses", str(tmp_path / "a.jsonl"), *map(str, flags), "--out", str(out)])
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    estimate.main(["--responses", str(tmp_path / "b.jsonl"), *map(str, flags), "--out", str(out)])
    assert "already holds this run" in capsys.readouterr().out
    assert len(common.read_jsonl(out / "responses.jsonl")) == 3
    again = ["--relevel", out, "--levels", "calibrated", "--out", tmp_path / "c"]
    assert "needs reference chains" in code_and_line(capsys, estimate.main, *again)


def test_weights_that_were_changed_are_noticed(runs, tmp_path, capsys):
    shutil.copytree(runs["warmup"], tmp_path / "w")
    with open(tmp_path / "w" / "model.safetensors", "rb+") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x01")
    assert "is damaged or was edited" in code_and_line(capsys, ppo.main, "--ckpt", tmp_path / "w", "--out", tmp_path / "p")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": 1}'])
@pytest.mark.parametrize("name", ["run.json", "confidence.json"])
def test_damaged_records(runs, tmp_path, capsys, name, text):
    shutil.copytree(runs["warmup"], tmp_path / "w")
    (tmp_path / "w" / name).write_text(text)
    line = code_and_line(capsys, ppo.main, "--ckpt", tmp_path / "w", "--out", tmp_path / "p", *PPO)
    damaged = tmp_path / "w" / (name if name == "run.json" else "")
    assert f"{damaged}{'/' * damaged.is_dir()} is damaged" in line and not (tmp_path / "p").exists()
    (tmp_path / "w" / "done").write_text("")  # as who edits a file says that it is meant
    line = code_and_line(capsys, ppo.main, "--ckpt", tmp_path / "w", "--out", tmp_path / "p", *PPO)
    assert f"{tmp_path / 'w' / name} is damaged" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pool: pool["3"].pop(), "level 3 has 39 statements, not 40"),
        (lambda pool: pool["2"].append("and who knows?"), "level 2 has 41 statements, not 40"),
        (lambda pool: pool.pop("4"), "no 4"),
        (lambda pool: pool.update({"6": pool["5"]}), "level 6 has 40 statements, not 0"),
        (lambda pool: pool["3"].__setitem__(0, " "), "'' stands there 1 times"),
        (lambda pool: pool["3"].__setitem__(0, 7), "'' stands there 1 times"),
        (lambda pool: pool["3"].__setitem__(0, pool["1"][1].upper()), "stands there 2 times"),
    ],
)
def test_an_edited_pool(tmp_path, monkeypatch, capsys, change, message):
    pool = common.read_json(ROOT / "statements.json")
    change(pool)
    common.write_json(tmp_path / "statements.json", pool)
    monkeypatch.setattr(common, "STATEMENTS", tmp_path / "statements.json")
    common.load_statements.cache_clear()
    monkeypatch.setattr(common, "sentence_encoder", lambda *_: pytest.fail("loaded"))
    assert message in code_and_line(capsys, lambda _: common.StatementReader())
    common.load_statements.cache_clear()


def test_what_was_read_has_changed(runs, tmp_path, monkeypatch, capsys):
    """The setup of the stage before, the pool of statements: a finished run is not shown as the new one."""
    for name in ("estimate", "warmup"):
        shutil.copytree(runs[name], tmp_path / name)
    flags = ["--estimate", tmp_path / "estimate", "--epochs", "3", "--batch-size", "8", "--out", tmp_path / "warmup"]
    warmup.main([str(flag) for flag in flags])
    assert "already holds this run" in capsys.readouterr().out
    record = common.read_json(tmp_path / "estimate" / "run.json")
    changed = record | {"setup": record["setup"] | {"statement_encoder": "another"}}
    common.write_json(tmp_path / "estimate" / "run.json", changed)
    assert "--statement-encoder)" in code_and_line(capsys, warmup.main, *flags)
    common.write_json(tmp_path / "estimate" / "run.json", record)
    pool = common.read_json(ROOT / "statements.json")
    pool["3"][0] = "though I have my doubts about this one."
    common.write_json(tmp_path / "statements.json", pool)
    monkeypatch.setattr(common, "STATEMENTS", tmp_path / "statements.json")
    assert "other settings (the contents of --statements)" in code_and_line(capsys, warmup.main, *flags)


def test_another_model_in_the_same_folder(cache, tmp_path, capsys):
    model, clip = (estimate.digits_paths(cache, 0, 1.0)[name] for name in ("model", "clip"))
    shutil.copytree(model, tmp_path / "m")
    flags = ["--limit", "4", "--cache", cache, "--clip", clip, "--model", tmp_path / "m", "--out", tmp_path / "e"]
    estimate.main([str(flag) for flag in flags])
    weights = load_file(tmp_path / "m" / "model.safetensors")
    last = sorted(name for name in weights if "layers" in name and "weight" in name)[-1]
    save_file(weights | {last: weights[last] * 2}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert "other settings (the contents of --model)" in code_and_line(capsys, estimate.main, *flags)
    save_file({name: w for name, w in weights.items() if name != last}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    line = code_and_line(capsys, evaluate.main, "--ckpt", tmp_path / "m", "--cache", cache, "--limit", 4, "--out", tmp_path / "r")
    assert "lacks weights" in line


def test_other_answers_are_not_mixed_in(runs, cache, tmp_path, capsys):
    """The same questions with another gold answer, in a run that goes on."""
    shutil.copytree(runs["estimate"], tmp_path / "e")
    (tmp_path / "e" / "done").unlink()
    lines = common.read_jsonl(tmp_path / "e" / "responses.jsonl")
    common.write_jsonl(tmp_path / "e" / "responses.jsonl", [lines[0] | {"answer": "77"}, *lines[1:]])
    flags = ["--limit", 24, "--batch-size", 10, "--cache", cache, "--out", tmp_path / "e"]
    assert "answers to other questions" in code_and_line(capsys, estimate.main, *flags)


def test_a_broken_line_before_anything_loads(runs, cache, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs["estimate"], tmp_path / "e")
    (tmp_path / "e" / "done").unlink()
    lines = (tmp_path / "e" / "responses.jsonl").read_text().splitlines()
    (tmp_path / "e" / "responses.jsonl").write_text("\n".join([lines[0][:-9], *lines[1:]]) + "\n")
    monkeypatch.setattr(common, "ClipScorer", lambda *_: pytest.fail("loaded"))
    flags = ["--limit", 24, "--batch-size", 10, "--cache", cache, "--out", tmp_path / "e"]
    assert "responses.jsonl, line 1, is no JSON object" in code_and_line(capsys, estimate.main, *flags)


def test_files_that_only_look_like_ours(tmp_path, runs, capsys):
    (tmp_path / "thesis.tmp.tex").touch()
    flags = ["--estimate", runs["estimate"], "--out", tmp_path, "--overwrite"]
    assert "holds no run of this project" in code_and_line(capsys, warmup.main, *flags)
    assert "holds neither a model" in code_and_line(capsys, evaluate.main, "--ckpt", runs["estimate"], "--out", tmp_path / "r")
    assert "--device must be" in code_and_line(capsys, evaluate.main, "--device", "cuda:first")


def test_a_full_disk_by_any_name(runs, tmp_path):
    """torch and safetensors raise errors of their own."""
    args = warmup.parse_args(["--estimate", str(runs["estimate"]), "--out", str(tmp_path / "w")])
    run = common.Run("warmup", args, {"data": "digits"})

    def fail(path, error) -> None:
        raise error

    for error in (RuntimeError("unexpected pos 64 vs 0\nframe #0"), SafetensorError("No space left")):
        with pytest.raises(OSError, match=rf"x\.pt: {str(error).splitlines()[0]}$"):
            run.write(fail, "x.pt", error)


def test_where_the_hub_is_away(tmp_path, monkeypatch):
    asked, away = [], lambda *place, **_: asked.append(place) or 1 / 0
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: Namespace(head=away))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in (str(tmp_path), "[", None):
        with common.loading("model" if name != "[" else "--lora-targets", name):
            assert not huggingface_hub.constants.HF_HUB_OFFLINE
    for _ in range(2):
        with common.loading("model", "some/where"):
            assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert len(asked) == 1


def test_a_terminal_without_arrows():
    code = "import common; common.run_script(lambda: print('ECE\u2193'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "ECE?\n")


def test_what_a_refused_command_leaves(runs, tmp_path, capsys):
    """Neither a folder nor a lock; a picture that is gone is noticed before a model loads, a damaged one of the cache made anew."""
    flags = ["--ckpt", runs["warmup"], "--out", tmp_path / "p", *PPO]
    assert "cannot be used" in code_and_line(capsys, ppo.main, *flags, "--device", "xpu")
    assert not (tmp_path / "p").exists()
    for seed in ("-1", "4294967296", "1.5"):
        assert "--seed" in code_and_line(capsys, ppo.main, *flags, "--seed", seed)
    assert "--lora-targets" in code_and_line(capsys, warmup.main, "--estimate", runs["estimate"], "--lora-targets", "(")
    shutil.copytree(runs["warmup"], tmp_path / "w")
    questions = common.read_jsonl(tmp_path / "w" / "sft.jsonl")
    common.write_jsonl(tmp_path / "w" / "sft.jsonl", [questions[0] | {"image": "nowhere.png"}, *questions[1:]])
    (tmp_path / "w" / "done").write_text("")
    assert "1 pictures of" in code_and_line(capsys, ppo.main, "--ckpt", tmp_path / "w", "--out", tmp_path / "p", *PPO)
    record = common.digits_data("digits", "test", 1, tmp_path)[0]
    whole = Path(record["image"]).read_bytes()
    Path(record["image"]).write_bytes(whole[:20])
    common.digits_data("digits", "test", 1, tmp_path)
    assert Path(record["image"]).read_bytes() == whole


def test_a_fingerprint_sees_every_byte_of_the_results(tmp_path):
    common.write_jsonl(tmp_path / "responses.jsonl", [{"text": "x" * 2_000_000, "level": 4}])
    before = common.fingerprint(tmp_path)
    common.write_jsonl(tmp_path / "responses.jsonl", [{"text": "x" * 2_000_000, "level": 5}])
    assert common.fingerprint(tmp_path) != before
    prints = set()
    for text in ("one", "two"):
        (tmp_path / "given.txt").write_text(text)
        prints.add(common.fingerprint(tmp_path / "given.txt"))
    assert len(prints) == 2


def test_a_stopped_script(runs, tmp_path):
    """SIGTERM: one line and the exit code of a shell; the same command ends as if nothing had happened."""
    command = [sys.executable, "evaluate.py", "--ckpt", runs["ppo"], "--limit", "12", "--batch-size", "1", "--out", tmp_path / "r"]
    process = subprocess.Popen([*map(str, command), "--max-new-tokens", "60"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not common.read_jsonl(tmp_path / "r" / "predictions.jsonl"):
        time.sleep(0.05)
    process.terminate()
    err = process.communicate()[1]
    assert process.returncode == 143 and "stopped by signal 15" in err and "Traceback" not in err
    evaluate.main([*map(str, command[2:]), "--max-new-tokens", "60"])
    predictions = [common.read_jsonl(folder / "predictions.jsonl") for folder in (tmp_path / "r", runs["results"])]
    assert [p["response"] for p in predictions[0]] == [p["response"] for p in predictions[1]]
