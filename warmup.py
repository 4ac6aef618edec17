"""Stage 2: teach the model to state its confidence (sec. 3.1.2 and 3.1.3).

Every sentence of the model's own responses gets a statement drawn at random from the 40 of its internal level, and the model is
fine-tuned on the result (eq. 9), with loss on the response tokens only.

Reads the folder that estimate.py wrote. Writes to --out: the model (full weights, or a PEFT adapter with --lora-rank), the
processor, confidence.json (copied), sft.jsonl (the questions and the text of the first epoch), log.jsonl, training.png.

Choices beyond the paper
 1. --explore: this share of the statements is moved one level up or down. After a warm-up on the levels alone the policy says one
    level for sure wherever the internal confidence does not vary; PPO samples no other, and so cannot learn there. Levels drawn
    from all five cost so much in R_CS that PPO unlearns the exploration before it has learned from it; neighbours cost little.
 2. Statements are drawn anew every epoch. The digits default uses 8 of the 40 statements a level (--statements-per-level): with 40
    the million-parameter model spends its few hundred steps on their wordings and not yet on which level to say.
 3. Linear decay after the warm-up of the learning rate; no weight decay.

    python warmup.py                                  # reads estimate/, writes warmup/
    python warmup.py --no-statements                  # the ablation w/o S-S Mapping: "with confidence 4 of 5."
    python warmup.py --explore 0                      # the paper's data, without exploration
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import common as c

# What is left out on the command line: (digits, real models as in App. B)
DEFAULTS = {
    "statements_per_level": (8, 40), "lr": (3e-3, 1e-4), "batch_size": (32, 16), "epochs": (6, 1), "lora_rank": (0, 16),
    "micro_batch": (64, 4),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = c.Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--estimate", default="estimate", help="folder that estimate.py wrote (default: %(default)s/)")
    data.add_argument("--no-statements", action="store_true", help="write the numeric level instead of a statement")
    data.add_argument("--statements-per-level", type=int, help="how many of the pool's 40 are used, evenly spaced (8 / 40)")
    data.add_argument("--explore", type=float, default=0.4, help="share of statements moved to a neighbouring level (default: 0.4)")
    training = parser.add_argument_group("training (defaults: digits / other data)")
    training.add_argument("--epochs", type=int, help="passes over the responses (6 / 1)")
    training.add_argument("--batch-size", type=int, help="responses an optimizer step (32 / 16)")
    training.add_argument("--micro-batch", type=int, help="responses a forward pass; changes memory, not the result (64 / 4)")
    training.add_argument("--lr", type=float, help="peak learning rate of AdamW (3e-3 / 1e-4)")
    training.add_argument("--warmup-ratio", type=float, default=0.1, help="share of steps with rising learning rate (0.1)")
    c.add_training_arguments(training)
    training.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    c.add_run_arguments(parser.add_argument_group("run"), out="warmup")
    args = parser.parse_args(argv)
    problems = c.positive(args, "epochs", "batch_size", "micro_batch", "lr", "save_every", "statements_per_level")
    if (args.statements_per_level or 0) > 40:
        problems.append("--statements-per-level must not exceed 40")
    if not 0 <= args.explore <= 1:
        problems.append("--explore must lie between 0 and 1")
    c.usage_error(*problems)
    return args


def add_statements(line: dict, rng: np.random.Generator, pool: dict[int, list[str]], explore: float) -> str:
    """The response of a line of responses.jsonl, each sentence followed by a statement of its level (or a neighbouring one)."""
    levels = [s["level"] + (int(rng.choice([-1, 1])) if rng.random() < explore else 0) for s in line["sentences"]]
    levels = [min(max(level, 1), c.N_LEVELS) for level in levels]
    return c.insert([s["text"] for s in line["sentences"]], levels, rng, pool)


def train_step(model, processor, records: list[dict], texts: list[str], optimizer, micro_batch: int) -> float:
    """One optimizer step; the loss is normalised by the tokens of the whole batch, so that neither micro-batches nor processes
    (each takes its share of the batch) change anything."""
    ids = c.response_ids(processor, texts)
    total, loss_sum = sum(map(len, ids)), torch.zeros(())
    records, ids = c.share(records), c.share(ids)
    optimizer.zero_grad()
    for i in range(0, len(records), micro_batch):
        batch = c.collate(processor, records[i : i + micro_batch], ids[i : i + micro_batch], model.device)
        loss = c.sft_loss(model, batch) * batch.mask.sum() / total
        loss.backward()
        loss_sum += loss.detach().cpu()
    c.sum_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return c.total(loss_sum.to(model.device)).item()


def plot(log: list[dict], path: Path) -> None:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([r["step"] for r in log], [r["loss"] for r in log], linewidth=1)
    axis.set(xlabel="step", ylabel="loss (nats a token)", yscale="log", title="warm-up")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup = c.read_run(args.estimate, "responses.jsonl", "confidence.json")["setup"]
    c.fill_defaults(args, DEFAULTS, setup)
    c.join_processes(args)
    if c.start_run("warmup", args, "done", setup):
        return
    out, folder = Path(args.out), Path(args.estimate)
    lines = [line for line in c.read_jsonl(folder / "responses.jsonl") if line["sentences"]]
    pool = c.NUMERIC_STATEMENTS
    if not args.no_statements:
        pool = {level: texts[:: len(texts) // args.statements_per_level] for level, texts in c.load_statements().items()}
    shutil.copy(folder / "confidence.json", out)
    first = [add_statements(x, np.random.default_rng([args.seed, 0, i]), pool, args.explore) for i, x in enumerate(lines)]
    keep = ("id", "image", "question", "answer", "choices", "reference")
    c.write_jsonl(out / "sft.jsonl", [{k: x[k] for k in keep} | {"text": text} for x, text in zip(lines, first, strict=True)])
    torch.manual_seed(args.seed)
    model, processor = c.load_model(setup["model"], args, trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    per_epoch = -(-len(lines) // args.batch_size)
    steps = args.epochs * per_epoch
    start = c.load_checkpoint(out / "trainer_state.pt", {"model": model}, {"model": optimizer})
    log = c.read_jsonl(out / "log.jsonl")[:start] if start else []
    c.write_jsonl(out / "log.jsonl", log)
    bar = tqdm(range(start, steps), desc="warm-up", initial=start, total=steps)
    for step in bar:
        began, (epoch, position) = time.time(), divmod(step, per_epoch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(lines))
        rows = order[position * args.batch_size : (position + 1) * args.batch_size]
        texts = [add_statements(lines[i], np.random.default_rng([args.seed, epoch, i]), pool, args.explore) for i in rows]
        c.warmup_then_linear(optimizer, step, steps, [args.lr], args.warmup_ratio)
        loss = train_step(model, processor, [lines[i] for i in rows], texts, optimizer, args.micro_batch)
        log.append({"step": step, "loss": loss, "seconds": round(time.time() - began, 3)})
        c.append_jsonl(out / "log.jsonl", log[-1:])
        bar.set_postfix(loss=f"{loss:.3f}")
        if (step + 1) % args.save_every == 0:
            c.save_checkpoint(out / "trainer_state.pt", {"model": model}, {"model": optimizer}, step + 1)
    c.save_model(model, processor, out)
    plot(log, out / "training.png")
    c.save_checkpoint(out / "trainer_state.pt", {"model": model}, {"model": optimizer}, steps)
    (out / "done").touch()


if __name__ == "__main__":
    main()
