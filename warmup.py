"""Stage 2: teach the model to state its confidence (sec. 3.1.2 and 3.1.3).

Every sentence of the model's own responses gets a statement drawn at random from the 40 of its internal level, and the model is
fine-tuned on the result (eq. 9), with loss on the response tokens only. Reads the folder that estimate.py wrote. Writes to --out:
the model (or a PEFT adapter), confidence.json, sft.jsonl (the questions, the text of the first epoch), log.jsonl, training.png.

Choices beyond the paper
 1. --explore: this share of the statements has the level of an earlier sentence of the response, drawn at random (the first: a
    neighbouring level). Without it the policy says one level for sure wherever its own confidence does not vary, as in steps built
    on a misread digit; PPO samples no other, and cannot learn there. Whether an earlier level is worth repeating, rewards decide.
 2. Statements are drawn anew every epoch. The digits default uses 3 of the 40 statements a level (--statements-per-level): with 40
    the million-parameter model spends its few hundred steps on their wordings and not yet on which level to say.
 3. Eq. 9 is a mean over the tokens of a batch, in which long responses weigh more.

    python warmup.py                                  # reads estimate/, writes warmup/
    python warmup.py --no-statements                  # the ablation w/o S-S Mapping: "with confidence 4 of 5."
    python warmup.py --explore 0                      # the paper's data, without exploration
"""

import functools
import re
import shutil
import time
from pathlib import Path

import common
from common import COUNT, LEVELS, LORA_TARGETS, N_LEVELS, POSITIVE, SHARE, SWITCH, TEXT, TRAINING_FLAGS, VLM, Kind

import numpy as np
import torch

FLAGS = {
    "run": {"estimate": (TEXT, "estimate", "what estimate.py wrote"), "out": (TEXT, "warmup", "folder to write"), **TRAINING_FLAGS},
    "data": {
        "layout": ("each after once".split(), "each", "a statement after each sentence, all behind the chain, or one in all"),
        "no_statements": (SWITCH, False, "write the numeric level instead of a statement"),
        "statements_per_level": (Kind(int, range(1, 41).__contains__, "must be 1 to 40"), 3, 40, "of the pool's 40, evenly spaced"),
        "oracle": (SWITCH, False, "no method, a reference line: level 5 where a sentence is right and 1 where it is wrong"),
        "explore": (SHARE, 0.4, "share of statements with the level of an earlier sentence"),
    },
    "training": {
        "epochs": (COUNT, 6, 1, "passes over the responses"),
        "batch_size": (COUNT, 32, 16, "responses an optimizer step"),
        "micro_batch": (COUNT, 64, 4, "responses a forward pass; changes memory, not the result"),
        "lr": (POSITIVE, 3e-3, 1e-4, "peak learning rate of AdamW"),
        "warmup_ratio": (SHARE, 0.1, "share of steps with rising learning rate"),
        "lora_rank": (Kind(int, range(4097).__contains__, "must be 0 to 4096"), 0, 16, "of a new LoRA adapter; 0: all weights"),
        "lora_alpha": (POSITIVE, None, "scale of the adapter (default: twice the rank)"),
        "lora_dropout": (SHARE, 0.0, "of the adapter, in warm-up only"),
        "lora_targets": (TEXT, LORA_TARGETS, "regular expression of the layers that get it"),
        "save_every": (COUNT, 50, "steps between checkpoints"),
    },
}
parse_args = functools.partial(common.parse_flags, __doc__, FLAGS)


def insert(sentences: list[str], levels: list[int], rng: np.random.Generator, pool: dict[int, list[str]], layout="each") -> str:
    """The chain with a random statement of its level after each sentence; `StatementReader.parse` is the way back. Layout `after`:
    all statements behind the last sentence, in order; `once`: one for all, of the level of the last sentence, the answer.
    "The left digit is 3." and "and I trust this is correct." become "The left digit is 3, and I trust this is correct."; a
    statement that starts with a capital follows as a sentence of its own."""
    said = [pool[level][rng.integers(len(pool[level]))] for level in (levels[-1:] if layout == "once" else levels)]
    if layout != "each":
        return " ".join([*sentences, *(f"{statement[0].upper()}{statement[1:]}" for statement in said)])
    parts = []
    for sentence, statement in zip(sentences, said, strict=True):
        joined = statement[0].islower() and re.search(r"[^.]\.$", sentence)
        parts.append(f"{sentence[:-1]}, {statement}" if joined else f"{sentence} {statement[0].upper()}{statement[1:]}")
    return " ".join(parts)  # eq. 2


def add_statements(line: dict, rng: np.random.Generator, pool: dict[int, list[str]], explore: float, layout="each") -> str:
    """The response of a line of responses.jsonl, each sentence followed by a statement of its level (or, exploring, another)."""
    levels = []
    for sentence in line["sentences"]:
        level = sentence["level"]
        others = levels or [other for other in (level - 1, level + 1) if other in LEVELS]
        levels.append(int(rng.choice(others)) if rng.random() < explore else level)
    return insert([sentence["text"] for sentence in line["sentences"]], levels, rng, pool, layout)


def train_step(vlm: VLM, records: list[dict], texts: list[str], optimizer, micro_batch: int, accelerator) -> tuple[float, float]:
    """One optimizer step -> loss and gradient norm. The loss is normalised by the tokens of the whole batch, so that neither
    micro-batches nor processes (each takes its share of the batch) change anything but what an adapter drops out."""
    ids = common.response_ids(vlm, texts, [record.get("finished", True) for record in records])
    n_tokens, loss_sum = sum(map(len, ids)), torch.zeros((), device=vlm.model.device)
    optimizer.zero_grad()
    with accelerator.split_between_processes(list(zip(records, ids, strict=True))) as mine:
        for part in common.chunks(mine, micro_batch):
            batch = common.collate(vlm, *zip(*part, strict=True))
            loss = common.sft_loss(vlm, batch) * batch.mask.sum() / n_tokens  # eq. 9
            loss.backward()
            loss_sum += loss.detach()
    common.sum_gradients(accelerator, vlm.model)
    norm = torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
    optimizer.step()
    return accelerator.reduce(loss_sum, "sum").item(), norm.item()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup = common.read_run(args.estimate, "responses.jsonl", "confidence.json")["setup"]
    lines = common.read_finished(args.estimate, "responses.jsonl", "sentences")
    common.fill_defaults(args, FLAGS, setup["data"])
    common.usage_error(*common.cannot_train(setup["model"], args))
    with common.loading("--lora-targets", args.lora_targets):
        re.compile(args.lora_targets)
    run = common.Run("warmup", args, setup | {"layout": args.layout})
    if run.finished:
        return
    lines = [line for line in lines if line["sentences"]]
    if args.oracle:
        args.explore = 0.0
        for sentence in common.all_sentences(lines):
            common.usage_error(sentence["correct"] is None and "--oracle needs the reference chains that given responses lack")
            sentence["level"] = N_LEVELS if sentence["correct"] else 1
    n = args.statements_per_level
    pool = {level: [texts[i * len(texts) // n] for i in range(n)] for level, texts in common.load_statements().items()}
    pool = common.NUMERIC_STATEMENTS if args.no_statements else pool

    def text_of(epoch: int, i: int) -> str:
        return add_statements(lines[i], np.random.default_rng([args.seed, epoch, i]), pool, args.explore, args.layout)

    torch.manual_seed(args.seed)
    vlm = common.load_model(setup["model"], args, run.device, trainable=True)
    run.write(lambda path: shutil.copy(Path(args.estimate, path.name), path), "confidence.json")
    kept = "id image question answer choices reference".split()
    questions = [{name: line[name] for name in kept} | {"text": text_of(0, i)} for i, line in enumerate(lines)]
    run.write(common.write_jsonl, "sft.jsonl", questions)
    optimizer = torch.optim.AdamW(common.trainable(vlm.model), lr=args.lr, weight_decay=0.0)
    per_epoch = -(-len(lines) // args.batch_size)
    training = common.Training(run, {"model": vlm.model}, {"model": optimizer}, args.epochs * per_epoch, args.save_every)
    for step in training:
        began, (epoch, position) = time.time(), divmod(step, per_epoch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(lines))
        rows = order[position * args.batch_size : (position + 1) * args.batch_size]
        common.set_learning_rate(optimizer, args.lr, step, training.steps, args.warmup_ratio)
        torch.manual_seed(args.seed * 1_000_000 + step)  # of the adapter's dropout
        records, texts = [lines[i] for i in rows], [text_of(epoch, i) for i in rows]
        loss, norm = train_step(vlm, records, texts, optimizer, args.micro_batch, run.accelerator)
        training.record({"step": step, "loss": loss, "grad_norm": norm, "seconds": time.time() - began}, "loss")
    run.write(common.plot_log, "training.png", training.log, {"warm-up: nats a token": ("loss",)})
    run.write(common.save_model, "", vlm)
    run.finish()


if __name__ == "__main__":
    common.run_script(main)
