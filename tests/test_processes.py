"""Training in two processes, as `torchrun` starts them, against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common as c

ROOT = Path(__file__).parents[1]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(script: str, *flags: str, processes: int = 1):
    launch = LAUNCH if processes == 2 else []
    command = [sys.executable, *launch, script, *flags, "--device", "cpu"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def two(cache, tmp_path_factory):
    """estimate, then warmup and ppo with one process and with two, on the same batches."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--limit", "16", "--batch-size", "16", "--max-new-tokens", "30", "--cache", str(cache), "--out", str(folder / "e")]
    results = [run("estimate.py", *flags)]
    for n in (1, 2):
        flags = ["--estimate", str(folder / "e"), "--epochs", "6", "--batch-size", "8", "--save-every", "4"]
        results.append(run("warmup.py", *flags, "--out", str(folder / f"w{n}"), processes=n))
    flags = ["--updates", "1", "--value-updates", "0", "--batch-size", "4", "--generate-batch", "6", "--minibatches", "1"]
    flags += ["--epochs", "1", "--max-new-tokens", "30", "--ckpt", str(folder / "w1"), "--out"]
    results += [run("ppo.py", *flags, str(folder / f"p{n}"), processes=n) for n in (1, 2)]
    for result in results:
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_the_joint_batch(two):
    """The same losses, rewards and weights as one process with the joint batch."""
    losses = [[line["loss"] for line in c.read_jsonl(two / f"w{n}" / "log.jsonl")] for n in (1, 2)]
    assert len(losses[0]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    [one], [both] = (c.read_jsonl(two / f"p{n}" / "log.jsonl") for n in (1, 2))
    for name in ("reward", "r_ka", "r_ec", "r_cs", "response_length"):
        assert both[name] == pytest.approx(one[name], abs=1e-4)
    assert both["levels"] == one["levels"] and both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    weights = [load_file(two / f"p{n}" / "model.safetensors") for n in (1, 2)]
    before = load_file(two / "w1" / "model.safetensors")
    moved = sum(float((weights[0][k] - before[k]).abs().sum()) for k in before)
    apart = sum(float((weights[0][k] - weights[1][k]).abs().sum()) for k in before)
    assert moved > 0 and apart < 0.1 * moved


def test_one_process_writes(two):
    for n in (1, 2):
        assert sorted(p.name for p in (two / f"w{n}").iterdir()) == sorted(p.name for p in (two / "w1").iterdir())
    assert torch.load(two / "w2" / "trainer_state.pt", weights_only=True)["step"] == 12


def test_a_batch_that_cannot_be_divided(two):
    result = run("warmup.py", "--estimate", str(two / "e"), "--batch-size", "7", "--out", str(two / "x"), processes=2)
    assert result.returncode != 0 and "--batch-size 7 cannot be divided among 2 processes" in result.stderr
    assert not (two / "x").exists()
