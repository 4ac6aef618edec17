"""The baseline Conf-CSR: calibrated self-rewards (Zhou et al. 2024) choose among a model's own responses, DPO (Rafailov et al.
2023) trains on the choice, and the same reward is the confidence of a sentence.

    python estimate.py --relevel estimate --weights 1 0 0 9 --out e_csr
    python tests/conf_csr.py --estimate e_csr --out csr --evaluate digits digits-ood     # metrics in csr/digits/, ...

Choices beyond the sources
 1. A sentence's reward is 1 - U with the weights 0.9 of CLIPScore and 0.1 of LNLP, normalised as everywhere here: CSR weighs the
    image's score by 0.9 and the text's by 0.1. A response's reward is the mean over its sentences, so that length earns nothing.
 2. Of --samples responses at temperature 1 the best and the worst make a pair; where they are equal there is none. One round.
 3. The confidence of a sentence is its reward under the trained model, in five levels by the mu/sigma cuts of the estimate.
"""

import argparse
import functools
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import evaluate
from common import COUNT, DIGITS, POSITIVE, PUBLISHED, RUN_FLAGS, SHARE, TEXT

import numpy as np
import torch
from torch import Tensor

FLAGS = {
    "run": {
        "estimate": (TEXT, "estimate", "folder of estimate.py"),
        "out": (TEXT, "csr", "folder to write"),
        "evaluate": ((*DIGITS, *PUBLISHED), [], "data sets whose test splits are answered by what was trained"),
    }
    | RUN_FLAGS,
    "training": {
        "samples": (COUNT, 5, "responses a question"),
        "beta": (POSITIVE, 0.1, "of DPO"),
        "epochs": (COUNT, 1, "passes over the pairs"),
        "batch_size": (COUNT, 32, "pairs a step"),
        "lr": (POSITIVE, 1e-4, "peak learning rate of AdamW"),
        "warmup_ratio": (SHARE, 0.1, "share of steps with rising learning rate"),
        "save_every": (COUNT, 50, "steps between checkpoints"),
    },
}
parse_args = functools.partial(common.parse_flags, __doc__, FLAGS)


def dpo_loss(logprob: Tensor, ref_logprob: Tensor, beta: float) -> Tensor:
    """Mean over pairs of -log sigmoid(beta (log pi(w)/ref(w) - log pi(l)/ref(l))), from log-probabilities of whole responses
    (2, pairs), the preferred ones first (Rafailov et al. 2023, eq. 7)."""
    preferred, other = logprob - ref_logprob  # (pairs,) each
    return -torch.nn.functional.logsigmoid(beta * (preferred - other)).mean()


def raw_of(line: dict) -> np.ndarray:
    """The raw uncertainties (sentences, 4) of a measured response."""
    raw = [[sentence[name] for name in common.ESTIMATORS] for sentence in line["sentences"]]
    return np.array(raw).reshape(-1, len(common.ESTIMATORS))


def self_rewards(lines: list[dict], confidence: dict) -> list[float]:
    """The mean reward 1 - U of each response's sentences; 0 without a sentence."""
    rewards = []
    for raw in map(raw_of, lines):
        rewards.append(float(1 - common.fuse(raw, confidence).mean()) if len(raw) else 0.0)
    return rewards


def choose_pairs(rewards: np.ndarray) -> list[tuple[int, int, int]]:
    """rewards (questions, samples) -> (question, its best sample, its worst), where they differ."""
    return [(i, int(row.argmax()), int(row.argmin())) for i, row in enumerate(rewards) if row.max() > row.min()]


def levels_of(lines: list[dict], confidence: dict, matcher) -> list[dict]:
    """Measured responses -> predictions whose levels are the internal ones."""
    predictions = []
    for line in lines:
        texts = [s["text"] for s in line["sentences"]]
        covered = matcher([texts], [common.reference_chain(line)])[0].any(0).tolist()
        levels = common.to_level(common.fuse(raw_of(line), confidence), confidence).tolist() if texts else []
        sentences = [s | {"statement": None, "level": level} for s, level in zip(line["sentences"], levels, strict=True)]
        answer, n_image = common.extract_answer(texts, line["choices"]), len(line["reference"]["image"])
        right = evaluate.is_right(answer, line, bool(texts) and bool(line["sentences"][-1]["correct"]))
        line = line | {"sentences": sentences, "prediction": answer, "answer_correct": right}
        predictions.append(line | {"covered": {"image": covered[:n_image], "reasoning": covered[n_image:]}})
    return predictions


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    train(args)
    for data in args.evaluate:
        evaluate_on(data, args)


def sample(vlm, records: list[dict], seed: int, tools: tuple, temperature: float = 1.0) -> list[dict]:
    length = 64 if str(records[0]["id"]).startswith("digits") else 256
    return common.measure(vlm, records, lambda prompts: common.generate(vlm, prompts, temperature, length, seed), *tools)


def load_tools(setup: dict, device: str) -> tuple:
    matcher = common.Matcher(setup["matcher"], device=device)
    return common.ClipScorer(setup["clip"], device), common.Similarity(setup["similarity"], device), matcher


def train(args: argparse.Namespace) -> None:
    setup, folder = common.read_run(args.estimate, "responses.jsonl", "confidence.json")["setup"], Path(args.estimate)
    args.lora_rank, args.gradient_checkpointing = 0, False
    run = common.Run("csr", args, setup, free=("evaluate",))
    if run.finished:
        return
    confidence, records = common.read_json(folder / "confidence.json"), common.read_jsonl(folder / "responses.jsonl")
    vlm, tools = common.load_model(setup["model"], args, run.device, trainable=True), load_tools(setup, run.device)

    def answer(batch: list[dict], start: int) -> list[dict]:
        drawn = [sample(vlm, batch, args.seed + 1_000_003 * (start + n), tools) for n in range(args.samples)]
        rewards = np.array([self_rewards(lines, confidence) for lines in drawn]).T.tolist()  # (questions, samples)
        texts = [[lines[i]["response"] for lines in drawn] for i in range(len(batch))]
        rows = zip(batch, texts, rewards, strict=True)
        return [{"id": r["id"], "sentences": [], "responses": said, "rewards": of} for r, said, of in rows]

    siblings = common.answer_in_batches(run, records, 250, "siblings.jsonl", answer)
    pairs = choose_pairs(np.array([line["rewards"] for line in siblings]))
    reference = common.load_model(setup["model"], args, run.device)
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    per_epoch = -(-len(pairs) // args.batch_size)
    training = common.Training(run, {"model": vlm.model}, {"model": optimizer}, args.epochs * per_epoch, args.save_every)
    for step in training:
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(pairs))
        rows = [pairs[i] for i in order[position * args.batch_size : (position + 1) * args.batch_size]]
        common.set_learning_rate(optimizer, args.lr, step, training.steps, args.warmup_ratio)
        chosen = [(i, siblings[i]["responses"][k]) for k_of in (1, 2) for i, k in ((row[0], row[k_of]) for row in rows)]
        batch = common.collate(vlm, [records[i] for i, _ in chosen], common.response_ids(vlm, [text for _, text in chosen]))
        logprob = common.response_statistics(vlm, batch)[0].sum(1).view(2, -1)  # (2, pairs)
        with torch.no_grad():
            ref_logprob = common.response_statistics(reference, batch)[0].sum(1).view(2, -1)
        loss = dpo_loss(logprob, ref_logprob, args.beta)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
        preferred = (logprob - ref_logprob).detach().diff(dim=0).lt(0).float().mean()
        row = {"step": step, "loss": loss.item(), "preferred": preferred.item(), "grad_norm": norm.item()}
        training.record(row, "loss", "preferred")
    run.write(lambda path: shutil.copy(folder / path.name, path), "confidence.json")
    run.write(common.save_model, "", vlm)
    run.finish()


def evaluate_on(data: str, args: argparse.Namespace) -> None:
    """Greedy responses of the trained model on the test split, measured; their levels; the metrics."""
    folder, setup = Path(args.out), common.read_run(args.out)["setup"]
    out = folder / data
    out.mkdir(exist_ok=True)
    records = common.load_data(data, setup["data_dir"], "test", 600 if data in common.DIGITS else None, world=setup)
    vlm, tools = common.load_model(folder, args, args.device), load_tools(setup, args.device)
    lines = [line for part in common.chunks(records, 200) for line in sample(vlm, part, 0, tools, 0.0)]
    predictions = levels_of(lines, common.read_json(folder / "confidence.json"), tools[2])
    metrics = evaluate.compute_metrics(predictions)
    common.write_jsonl(out / "predictions.jsonl", predictions)
    common.write_json(out / "metrics.json", metrics)
    print(evaluate.format_table({f"Conf-CSR, {data}": metrics}))


if __name__ == "__main__":
    common.run_script(main)
