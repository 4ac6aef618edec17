"""Training in two processes, as `torchrun` starts them, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import common
import estimate
import evaluate
import ppo
import warmup

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable, "-c"]
ALL = """import accelerate, importlib, json, sys
accelerate.Accelerator.end_training = lambda self: None  # the group of processes goes on
[importlib.import_module(name).main(flags) for name, flags in json.loads(sys.argv[1])]"""


def run_two(*stages: tuple[str, list[str]]) -> None:
    """Stages one after the other, in two processes that import everything once."""
    command = [sys.executable, *LAUNCH, ALL, json.dumps(stages)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def two(cache, tmp_path_factory):
    """estimate, then warmup and ppo with one process and with two, on the same batches."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--limit", "17", "--batch-size", "6", "--max-new-tokens", "30", "--cache", str(cache), "--device", "cpu", "--out"]
    estimate.main([*flags, str(folder / "e1")])
    stages = [("estimate", [*flags, str(folder / "e2")])]
    flags = f"--estimate {folder}/e1 --epochs 6 --batch-size 8 --save-every 4 --device cpu --out".split()
    warmup.main([*flags, str(folder / "w1")])
    stages.append(("warmup", [*flags, str(folder / "w2")]))
    flags = ["--updates", "1", "--value-updates", "0", "--batch-size", "4", "--generate-batch", "6", "--minibatches", "1"]
    flags += ["--epochs", "1", "--max-new-tokens", "30", "--device", "cpu", "--ckpt", str(folder / "w1"), "--out"]
    ppo.main([*flags, str(folder / "p1")])
    stages.append(("ppo", [*flags, str(folder / "p2")]))
    flags = f"--ckpt {folder}/w1 --limit 7 --batch-size 3 --max-new-tokens 30 --device cpu --out".split()
    evaluate.main([*flags, str(folder / "r1")])
    run_two(*stages, ("evaluate", [*flags, str(folder / "r2")]))
    return folder


def test_the_joint_batch(two):
    """The same losses, rewards and weights as one process with the joint batch."""
    losses = [[line["loss"] for line in common.read_jsonl(two / f"w{n}" / "log.jsonl")] for n in (1, 2)]
    assert len(losses[0]) == 18 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    [one], [both] = (common.read_jsonl(two / f"p{n}" / "log.jsonl") for n in (1, 2))
    for name in ("reward", "r_ka", "r_ec", "r_cs", "response_length"):
        assert both[name] == pytest.approx(one[name], abs=1e-4)
    assert [both[name] for name in ppo.SAID] == pytest.approx([one[name] for name in ppo.SAID], abs=1e-6)
    assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    assert both["value_loss"] == pytest.approx(one["value_loss"], rel=0.1)  # the mean of two means
    weights = [load_file(two / f"p{n}" / "model.safetensors") for n in (1, 2)]
    before = load_file(two / "w1" / "model.safetensors")
    moved = sum(float((weights[0][k] - before[k]).abs().sum()) for k in before)
    apart = sum(float((weights[0][k] - weights[1][k]).abs().sum()) for k in before)
    assert moved > 0 and apart < 0.1 * moved


def close(one, both) -> bool:
    """The same values, numbers but for what another number of threads rounds."""
    if isinstance(one, dict):
        return isinstance(both, dict) and list(one) == list(both) and all(close(one[k], both[k]) for k in one)
    if isinstance(one, list):
        return isinstance(both, list) and len(one) == len(both) and all(map(close, one, both))
    return one == pytest.approx(both, abs=1e-3) if isinstance(one, float) else one == both


def test_questions_are_shared(two):
    """Two processes answer what one answers, in its order."""
    for name in ("e{}/responses.jsonl", "r{}/predictions.jsonl"):
        one, both = (common.read_jsonl(two / name.format(n)) for n in (1, 2))
        assert len(one) >= 7 and close(one, both), name
    for name in ("e{}/confidence.json", "r{}/metrics.json"):
        assert close(*(common.read_json(two / name.format(n)) for n in (1, 2))), name


def test_one_process_writes(two):
    for stage in "ewpr":
        one, both = (sorted(p.name for p in (two / f"{stage}{n}").iterdir()) for n in (1, 2))
        assert one == both and "done" in one
    assert torch.load(two / "w2" / "trainer_state.pt", weights_only=True)["step"] == 18


def test_a_batch_that_cannot_be_divided(two, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as error:
        warmup.main(["--estimate", str(two / "e1"), "--batch-size", "7", "--out", str(two / "x")])
    assert error.value.code == 2 and "--batch-size 7 cannot be divided among 2 processes" in capsys.readouterr().err
    assert not (two / "x").exists()
