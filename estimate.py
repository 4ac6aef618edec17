"""Stages 0 and 1: the model's own reasoning chains, and its internal confidence in every sentence (sec. 3.1.1).

The base model answers each training question at temperature 0.1 (App. B). Each sentence of the answer gets four uncertainties:
length-normalised log-probability (eq. 3), mean token entropy (eq. 4), TokenSAR (eq. 5) and CLIPScore (eq. 6). They are min-max
normalised over the data set, summed with weights (eq. 7), and cut into the levels 5 (sure) to 1 (unsure) at mu - s, mu + s,
mu + 2s, mu + 3s.

Writes to --out: responses.jsonl (one question a line, its sentences with their uncertainties and levels), confidence.json
(weights, minima, maxima, mean, deviation, edges: all that later stages need to measure on the same scale), confidence.png.

Choices beyond the paper
 1. A sentence is `correct` when it matches a sentence of the reference chain; this is recorded for the summary only, the
    levels never see it.
 2. Sampling is seeded batch by batch, so that an interrupted run continues with what it would have drawn.

    python estimate.py                                # the digits world, nothing to download
    python estimate.py --weights 1 1 1 0              # the ablation w/o U_CLIPScore
    python estimate.py --fuse max                     # the ablation w U_Max
    python estimate.py --levels uniform               # uniform intervals (UIC, Table 7)
    python estimate.py --responses chains.jsonl       # measure given responses (id, image, question, response), no generation
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common as c


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = c.Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=["digits"], default="digits", help="data set whose training split is answered")
    data.add_argument("--responses", metavar="FILE", help="score the responses of a .jsonl file (id, image, question, response) "
                      "instead of generating them")  # fmt: skip
    data.add_argument("--allow-bad-records", action="store_true", help="go on when more than a fifth of the records is unusable")
    data.add_argument("--limit", type=int, default=3000, help="number of questions (default: %(default)s)")
    data.add_argument("--noise-scale", type=float, default=1.0, help="digits: multiplies the noise of every image (default: 1)")
    data.add_argument("--cache", default="cache", help="where the digits world keeps its models and images (default: cache/)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="vision-language model, hub name or folder (default: the digits world's own)")
    model.add_argument("--clip", help="open_clip model NAME/TAG or folder (default: the digits world's own)")
    model.add_argument("--matcher", default="exact", help="exact, or a cross-encoder model (default: %(default)s)")
    model.add_argument("--similarity", help="g of TokenSAR: a sentence encoder or cross-encoder (default: all-MiniLM-L6-v2)")
    model.add_argument("--temperature", type=float, default=0.1, help="of sampling (default: %(default)s, App. B)")
    model.add_argument("--max-new-tokens", type=int, default=64, help="longest response (default: %(default)s)")
    model.add_argument("--batch-size", type=int, default=250, help="questions a batch (default: %(default)s)")
    confidence = parser.add_argument_group("confidence")
    names = ("LNLP", "MTE", "TOKENSAR", "CLIP")
    confidence.add_argument("--weights", type=float, nargs=4, metavar=names, default=[0.25] * 4,
                            help="w_0..w_3 of eq. 7, scaled to sum 1; 0 leaves an estimator out (default: 0.25 each)")  # fmt: skip
    confidence.add_argument("--fuse", choices=["mean", "max"], default="mean", help="weighted mean (eq. 7) or largest")
    confidence.add_argument("--levels", choices=["sigma", "uniform"], default="sigma", help="cuts: mu and sigma, or fifths")
    c.add_run_arguments(parser.add_argument_group("run"), out="estimate")
    args = parser.parse_args(argv)
    problems = c.positive(args, "limit", "noise_scale", "max_new_tokens", "batch_size")
    if args.temperature < 0:
        problems.append("--temperature must not be negative")
    if min(args.weights) < 0 or sum(args.weights) == 0:
        problems.append("--weights must not be negative, nor all 0")
    if args.responses and not Path(args.responses).is_file():
        problems.append(f"no such file: {args.responses}")
    c.usage_error(*problems)
    return args


def respond(model, processor, records, clip, similarity, matcher, args) -> list[dict]:
    """Answer a batch of questions and measure every sentence: the lines of responses.jsonl, without `u` and `level`."""
    if args.responses:
        generations = c.score(model, processor, records, [r["response"] for r in records])
    else:
        generations = c.generate(model, processor, records, args.temperature, args.max_new_tokens, args.batch_seed)
    steps = c.parse([g.text for g in generations], statements=False)
    raw = c.uncertainties(records, generations, steps, clip, similarity)
    matched = matcher([[s.text for s in found] for found in steps], [c.chain(r) for r in records])
    lines = []
    for record, generation, sentence_steps, values, rows in zip(records, generations, steps, raw, matched, strict=True):
        sentences = [
            {"text": s.text, "start": s.start, "end": s.end, "n_tokens": len(c.step_tokens(generation.offsets, s.start, s.end))}
            | dict(zip(c.ESTIMATORS, map(float, u), strict=True))
            | {"correct": bool(ok) if rows.size else None}
            for s, u, ok in zip(sentence_steps, values, rows.any(1), strict=True)
        ]
        lines.append(record | {"response": generation.text, "sentences": sentences})
    return lines


def assign_levels(lines: list[dict], args) -> dict:
    """Fit confidence.json on all sentences and write `u` and `level` into each."""
    sentences = [s for line in lines for s in line["sentences"]]
    raw = np.array([[s[name] for name in c.ESTIMATORS] for s in sentences])
    confidence = c.fit_confidence(raw, args.weights, args.fuse, args.levels)
    u = c.fuse(raw, confidence)
    for sentence, value, level in zip(sentences, u, c.to_level(u, confidence), strict=True):
        sentence["u"], sentence["level"] = float(value), int(level)
    return confidence


def summarize(lines: list[dict], confidence: dict, path: Path) -> None:
    """Print how well each uncertainty tells wrong sentences from right ones, and draw U_Final with its cuts."""
    import matplotlib
    from sklearn.metrics import roc_auc_score

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sentences = [s for line in lines for s in line["sentences"]]
    parts = ["image" if i < len(x["reference"]["image"]) else "reasoning" for x in lines for i in range(len(x["sentences"]))]
    part = np.array(parts)
    wrong = np.array([not s["correct"] for s in sentences])
    print(f"\n{len(lines)} questions, {len(sentences)} sentences, {1 - wrong.mean():.3f} of them match a reference chain")
    print("AUROC (wrong against right)      all   image  reasoning")
    for name in (*c.ESTIMATORS, "u"):
        values, row = np.array([s[name] for s in sentences]), []
        for rows in (part != "", part == "image", part == "reasoning"):
            mixed = 0 < wrong[rows].sum() < rows.sum()
            row.append(f"{roc_auc_score(wrong[rows], values[rows]):.3f}" if mixed else "  -  ")
        print(f"  {'U_Final' if name == 'u' else name:28s} {row[0]}   {row[1]}   {row[2]}")
    levels = np.array([s["level"] for s in sentences])
    for level in range(5, 0, -1):
        share = (levels == level).mean()
        right = f"{1 - wrong[levels == level].mean():.2f} correct" if share else "empty"
        print(f"  level {level}: {share:6.1%} of the sentences, {right}")
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    u = np.array([s["u"] for s in sentences])
    axis.hist([u[~wrong], u[wrong]], bins=50, stacked=True, color=["#4477aa", "#ee6677"], label=["right", "wrong"])
    for edge in confidence["edges"]:
        axis.axvline(edge, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel="$U_{Final}$ (0 = certain); dashed: cuts between levels 5, 4, 3, 2, 1", ylabel="sentences")
    axis.set(yscale="log", xlim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out, world = Path(args.out), c.digits_paths(args.cache, args.seed, args.noise_scale)
    setup = {"model": args.model or world["model"], "clip": args.clip or world["clip"]}
    setup |= {"matcher": args.matcher, "similarity": args.similarity}
    setup |= {"data": args.data, "cache": args.cache, "noise_scale": args.noise_scale, "world_seed": args.seed}
    if args.responses:
        given = c.usable(c.read_jsonl(args.responses), ("image", "question", "response"), args.allow_bad_records)
    if c.start_run("estimate", args, "responses.jsonl", setup):
        return
    c.build_digits_world(args.cache, args.seed, args.noise_scale, [setup["model"], setup["clip"]])
    if args.responses:
        blank = {"answer": None, "choices": None, "reference": {"image": [], "reasoning": []}}
        records = [{"id": i} | blank | record for i, record in enumerate(given)][: args.limit]
    else:
        records = c.digits_data(args.data, "train", args.limit, args.cache, args.seed, args.noise_scale)
    partial = out / "partial.jsonl"
    lines = c.read_jsonl(partial) if partial.exists() else []
    lines = lines[: len(lines) // args.batch_size * args.batch_size]  # whole batches only
    c.write_jsonl(partial, lines)
    model, processor = c.load_model(setup["model"], args)
    similarity, matcher = c.Similarity(args.similarity, args.device), c.Matcher(args.matcher, device=args.device)
    clip = c.ClipScorer(setup["clip"], args.device)
    bar = tqdm(total=len(records), initial=len(lines), desc="estimate")
    while len(lines) < len(records):
        args.batch_seed = args.seed * 1_000_000 + len(lines)
        batch = respond(model, processor, records[len(lines) : len(lines) + args.batch_size], clip, similarity, matcher, args)
        c.append_jsonl(partial, batch)
        lines += batch
        bar.update(len(batch))
        bar.set_postfix(correct=f"{np.mean([bool(s['correct']) for line in lines for s in line['sentences']]):.3f}")
    bar.close()
    confidence = assign_levels(lines, args)
    c.write_json(out / "confidence.json", confidence)
    summarize(lines, confidence, out / "confidence.png")
    c.write_jsonl(out / "responses.jsonl", lines)
    partial.unlink()


if __name__ == "__main__":
    main()
