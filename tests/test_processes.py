"""Training in two processes, as `torchrun` starts them, against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common as c
import estimate
import ppo
import warmup

ROOT = Path(__file__).parents[1]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_two(script: str, *flags: str) -> None:
    command = [sys.executable, *LAUNCH, script, *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def two(cache, tmp_path_factory):
    """estimate, then warmup and ppo with one process and with two, on the same batches."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--limit", "16", "--batch-size", "16", "--max-new-tokens", "30", "--cache", str(cache), "--out", str(folder / "e")]
    estimate.main([*flags, "--device", "cpu"])
    flags = ["--estimate", str(folder / "e"), "--epochs", "6", "--batch-size", "8", "--save-every", "4", "--device", "cpu", "--out"]
    warmup.main([*flags, str(folder / "w1")])
    run_two("warmup.py", *flags, str(folder / "w2"))
    flags = ["--updates", "1", "--value-updates", "0", "--batch-size", "4", "--generate-batch", "6", "--minibatches", "1"]
    flags += ["--epochs", "1", "--max-new-tokens", "30", "--device", "cpu", "--ckpt", str(folder / "w1"), "--out"]
    ppo.main([*flags, str(folder / "p1")])
    run_two("ppo.py", *flags, str(folder / "p2"))
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


def test_a_batch_that_cannot_be_divided(two, monkeypatch, capsys):
    monkeypatch.setattr(c, "world_size", lambda: 2)
    with pytest.raises(SystemExit) as error:
        warmup.main(["--estimate", str(two / "e"), "--batch-size", "7", "--out", str(two / "x")])
    assert error.value.code == 2 and "--batch-size 7 cannot be divided among 2 processes" in capsys.readouterr().err
    assert not (two / "x").exists()
