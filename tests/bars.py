"""The bars that a trained model must clear: what the untrained model's internal confidence is worth on the sentences that it writes
itself to the same questions.

    python evaluate.py --bars --ckpt ppo/ --out bars

Writes to --out: metrics.json (the figures), base.jsonl (what it wrote, and its uncertainties).
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import evaluate
from common import RUN_FLAGS, SWITCH, TEXT

import numpy as np

FLAGS = {
    "run": {"ckpt": evaluate.FLAGS["run"]["ckpt"], "out": (TEXT, "bars", "folder to write")} | RUN_FLAGS,
    "data": {name: flag for name, flag in evaluate.FLAGS["data"].items() if name != "consistency"},
    "method": {"bars": (SWITCH, False, "this")},
}
parse_args = functools.partial(common.parse_flags, __doc__, FLAGS)


def internal_rows(lines: list[dict], confidence: dict) -> dict[str, dict]:
    """What the base model's internal confidence is worth on the sentences that it wrote itself: the bars that training must clear.
    LNLP and U_Final as they are (AUROC); in five levels, the levels of U_Final and a logistic regression on the four."""
    sentences = common.all_sentences(lines)
    common.usage_error(not sentences and "no response holds a sentence")
    raw = np.array([[sentence[name] for name in common.ESTIMATORS] for sentence in sentences])
    correct, part = (np.array([sentence[name] for sentence in sentences]) for name in ("correct", "part"))
    u = common.fuse(raw, confidence, np.cumsum([len(line["sentences"]) for line in lines])[:-1])
    rows, levels = {"base, LNLP": -raw[:, 0], "base, U_Final": -u}, {"base, levels of U_Final": common.to_level(u, confidence)}
    if "logistic" in confidence:
        *coefficients, intercept = confidence["logistic"]
        p = 1 / (1 + np.exp(-common.normalize(raw, confidence) @ np.array(coefficients) - intercept))
        levels["base, logistic regression"] = 1 + np.rint(4 * p).astype(int)
    scores = {"base rate": float(correct.mean())}
    for name, values in (rows | levels).items():
        scores[name] = {"auroc": common.auroc(values, correct)} | {
            p: common.auroc(values[part == p], correct[part == p]) for p in evaluate.PARTS
        }
        if name in levels:
            for sentence, level in zip(sentences, values, strict=True):
                sentence["level"] = int(level)
            scores[name] |= {"brier_skill": evaluate.brier_skill((values - 1) / 4, correct), "mece": evaluate.mece(lines)}
    return scores


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup, path = evaluate.read_setup(args), Path(args.ckpt, "confidence.json")
    common.usage_error(not path.exists() and f"--bars needs {path}, of warmup.py or ppo.py")
    confidence = common.read_object(path, "weights", "fuse", "min", "max", "edges")
    common.fill_defaults(args, FLAGS, setup["data"])
    run = common.Run("bars", args, setup)
    if run.finished:
        return
    options = (args.split, args.limit, True, args.allow_bad_records, setup)
    records = common.load_data(setup["data"], setup["data_dir"], *options)
    matcher, base = common.Matcher(setup["matcher"], device=run.device), common.load_model(setup["model"], args, run.device)
    clip, similarity = common.ClipScorer(setup["clip"], run.device), common.Similarity(setup["similarity"], run.device)

    def answer(batch: list[dict], _: int) -> list[dict]:
        greedy = lambda prompts: common.generate(base, prompts, 0.0, args.max_new_tokens, 0)  # noqa: E731
        return common.measure(base, batch, greedy, clip, similarity, matcher)

    lines = common.answer_in_batches(run, records, args.batch_size, "base.jsonl", answer)
    if run.accelerator.is_main_process:
        rows = internal_rows(lines, confidence)
        print(f"{'the bars, of what the base model wrote':40s} AUROC  image  reasoning  Brier skill  MECE")
        for name, row in rows.items():
            cells = row if isinstance(row, dict) else {"auroc": row}
            print(
                f"{name:40s}" + "  ".join(evaluate.fmt(cells.get(key)) for key in ("auroc", *evaluate.PARTS, "brier_skill", "mece"))
            )
        common.write_json(run.out / "metrics.json", json.loads(json.dumps(rows), parse_constant=lambda _: None))  # NaN is no JSON
    run.finish()
