"""A run that is killed, or finds the disk full, at one of its file operations ends with the same bytes after the same command.

    OPERATIONS=some OMP_NUM_THREADS=1 python -m pytest tests/test_kills.py     # two of three stages; all: every one, of every stage

Not with the other tests: a process with threads of its own cannot be forked."""

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

import common
import estimate
import evaluate
import ppo
import warmup

import pytest

pytestmark = pytest.mark.skipif(not os.environ.get("OPERATIONS"), reason="OPERATIONS is not set")
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")
STAGES = {
    "estimate": (estimate, "--limit 6 --batch-size 3 --cache cache"),
    "relevel": (estimate, "--relevel estimate --levels uniform"),
    "warmup": (warmup, "--estimate estimate --epochs 1 --batch-size 4 --save-every 1"),
    "ppo": (ppo, "--ckpt warmup --updates 2 --batch-size 2 --save-every 1 --max-new-tokens 30"),
    "evaluate": (evaluate, "--ckpt warmup --limit 4 --batch-size 2 --max-new-tokens 30"),
    "overwrite": (evaluate, "--ckpt warmup --limit 4 --batch-size 2 --max-new-tokens 30 --overwrite"),
}


def run(stage: str, folder: Path, nth: int = 0, full: bool = False) -> tuple[int, str, list[str]]:
    """A stage in a process of its own, stopped at its n-th file operation -> exit code, stderr, all operations."""
    pid = os.fork()
    if not pid:
        seen = []

        def hook(event: str, args: tuple) -> None:
            opened = event == "open" and isinstance(args[0], (str, Path)) and set(args[1] or "") & set("wax+")
            if not (opened or event in WRITES) or not os.path.abspath(args[0]).startswith(str(folder)):
                return
            if event == "os.mkdir" and os.path.isdir(args[0]):  # which nobody misses
                return
            seen.append(f"{event} {args[0]}")
            os.write(log, f"{seen[-1]}\n".encode())
            if len(seen) == nth and full:
                raise OSError(28, "No space left on device")
            if len(seen) == nth:
                os._exit(137)

        log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        sys.stderr = open(folder.with_suffix(".err"), "w", buffering=1)  # noqa: SIM115
        os.chdir(folder)
        sys.addaudithook(hook)
        main, flags = STAGES[stage]
        try:
            common.run_script(lambda: main.main([*flags.split(), "--out", "out"]))
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, folder.with_suffix(".err").read_text(), folder.with_suffix(".log").read_text().splitlines()


def contents(folder: Path) -> dict[str, str]:
    """Digests of what a run left, without times and the checkpoint before the last."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".before"}
    files["log.jsonl"] = re.sub(rb'"seconds\w*": [\d.e-]+', b"", files.get("log.jsonl", b""))
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


@pytest.fixture(scope="module")
def begun(cache, tmp_path_factory):
    """A folder with a digits world, an estimate, a warm-up, and in out/ what --overwrite would delete."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(cache, folder / "cache", ignore=shutil.ignore_patterns("digits-*-seed*"))  # pictures others may be drawing
    here = Path.cwd()
    os.chdir(folder)
    estimate.main("--limit 6 --batch-size 3 --cache cache --out estimate".split())
    warmup.main("--estimate estimate --epochs 1 --batch-size 4 --out warmup".split())
    evaluate.main("--ckpt warmup --limit 2 --max-new-tokens 30 --out old".split())
    os.chdir(here)
    return folder


@pytest.mark.parametrize("stage", STAGES if os.environ.get("OPERATIONS") == "all" else ["relevel", "warmup", "overwrite"])
def test_every_end_is_the_same(begun, stage, tmp_path):
    def fresh() -> Path:
        folder = tmp_path / "w"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(begun, folder)
        if stage == "overwrite":
            (folder / "old").rename(folder / "out")
        return folder

    folder = fresh()
    code, _, operations = run(stage, folder)
    expected = contents(folder / "out")
    assert code == 0 and len(operations) > 8 and "done" in expected
    every = range(1, len(operations) + 1)
    for nth in every if os.environ.get("OPERATIONS") == "all" else (4, len(operations) - 1):
        full = nth % 2 == 0
        code, error, _ = run(stage, fresh(), nth, full)
        lines = [line for line in error.splitlines() if "No space left" in line]
        assert (code, len(lines)) in ([(1, 1), (2, 1)] if full else [(137, 0)]), f"{operations[nth - 1]}: {error}"
        code, error, _ = run(stage, folder)
        assert code == 0 and contents(folder / "out") == expected, f"after {operations[nth - 1]}: {error}"
