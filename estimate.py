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
 3. --annotate (stage 0, App. C and G): an unusable answer goes back once with what is wrong with it, then its question is left out;
    the same command again asks for what was left out.

    python estimate.py                                # the digits world, nothing to download
    python estimate.py --weights 1 1 1 0              # the ablation w/o U_CLIPScore
    python estimate.py --fuse max                     # the ablation w U_Max
    python estimate.py --levels uniform               # uniform intervals (UIC, Table 7)
    python estimate.py --data aokvqa --shard 0/2 --out e0 (and 1/2, e1), then estimate.py --data aokvqa --merge e0 e1
    python estimate.py --data aokvqa --annotate gpt-4o --out chains    # reference chains (OPENAI_BASE_URL, OPENAI_API_KEY)
    python estimate.py --responses chains.jsonl       # measure given responses (id, image, question, response), no generation
"""

import argparse
import asyncio
import base64
import importlib.util
import json
import mimetypes
import os
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import common as c

# What is left out on the command line: (digits, other data)
DEFAULTS = {
    "model": (None, "llava-hf/llava-v1.6-vicuna-7b-hf"), "clip": (None, "ViT-L-14-336/openai"),
    "matcher": c.MATCHER, "limit": (3000, None), "max_new_tokens": (64, 256), "batch_size": (250, 8),
}  # fmt: skip

PROMPT = """You get an image, a question about it and the correct answer. {task}
Reply with one JSON object and nothing else, as in this example:
Image: (a bicycle with a flat rear tyre leans on a railing, a hand pump lies beside it)\nQuestion: What must the rider do first?
Answer: inflate tyre\n{draft}Reply: {{"image": ["The rear tyre of the bicycle is flat.", "A hand pump lies beside it."], \
"reasoning": ["Riding needs tyres full of air.", "A hand pump inflates tyres.", "So, the answer is inflate tyre."]}}
Now the image above.\nQuestion: {question}\nAnswer: {answer}\n{more}"""
ANNOTATE = {"draft": "", "task": """Write the chain of reasoning from the image to the answer in two parts: "image", the visual \
elements that matter most to question and answer; "reasoning", what follows from them until it is clear why the answer is correct, \
ending with "So, the answer is ...". Each sentence is short, holds one piece of knowledge and builds on those before. Say all \
that is needed, and nothing that is repeated or beside the point."""}
REFINE = {"draft": """Chain: {"image": ["The rear tyre of the bicycle, a black one, is flat.", "The railing is green.", "A hand \
pump lies beside it."], "reasoning": ["Riding needs tyres full of air.", "A hand pump, quite cheap, inflates tyres.", "So, the \
answer is inflate tyre."]}\n""", "task": """Improve the chain of reasoning that follows the answer: correct what is wrong, drop \
each sentence that the answer does not need, cut the others to the essential; "So, the answer is ..." stays last."""}
REPAIR = 'This cannot be used: {}. Reply with the whole JSON object {{"image": [...], "reasoning": [...]}} again and nothing else.'
RETRIES, TIMEOUT, STOP_AFTER = 8, 120.0, 8  # the client waits 0.5, 1, ... 8 s, less up to a quarter, or what Retry-After says
_REFUSAL = re.compile(r"\W*((I'm|I am) )?(very |so )?sorry\b|\W*(I|we) (can't|cannot|won't|(am|are) (un|not )able)", re.I)


def shard(text: str) -> tuple[int, int]:
    """ "1/4" -> (1, 4)."""
    index, count = map(int, text.split("/"))
    if not 0 <= index < count:
        raise ValueError
    return index, count


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = c.Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=["digits", *c.PUBLISHED], default="digits", help="data set; its training split is answered")
    data.add_argument("--data-dir", help="folder with the published annotations and the images (default: the Hugging Face hub)")
    data.add_argument("--responses", metavar="FILE", help="score the responses of a .jsonl file (id, image, question, response) "
                      "instead of generating them")  # fmt: skip
    data.add_argument("--shard", type=shard, metavar="I/N", help="answer only every N-th question, from the I-th (0 to N - 1)")
    data.add_argument("--merge", nargs="+", metavar="FOLDER", help="join such runs, in the order of I, and find their levels")
    data.add_argument("--allow-bad-records", action="store_true", help="go on when more than a fifth of the records is unusable")
    data.add_argument("--limit", type=int, help="number of questions (digits: 3000; other data: all)")
    data.add_argument("--noise-scale", type=float, default=1.0, help="digits: multiplies the noise of every image (default: 1)")
    data.add_argument("--cache", default="cache", help="where the digits world keeps its models and images (default: cache/)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="vision-language model, hub name or folder (the digits world's own / LLaVA-NeXT 7B)")
    model.add_argument("--clip", help="open_clip model NAME/TAG or folder (the digits world's own / ViT-L-14-336/openai)")
    model.add_argument("--matcher", help="exact, or a cross-encoder model (exact / cross-encoder/stsb-roberta-large)")
    model.add_argument("--similarity", help="g of TokenSAR: a sentence encoder or cross-encoder (default: all-MiniLM-L6-v2)")
    model.add_argument("--statement-encoder", help="sentence encoder that maps statements to levels (default: all-MiniLM-L6-v2)")
    model.add_argument("--temperature", type=float, default=0.1, help="of sampling (default: %(default)s, App. B)")
    model.add_argument("--max-new-tokens", type=int, help="longest response (64 / 256)")
    model.add_argument("--batch-size", type=int, help="questions a batch (250 / 8)")
    confidence = parser.add_argument_group("confidence")
    names = ("LNLP", "MTE", "TOKENSAR", "CLIP")
    confidence.add_argument("--weights", type=float, nargs=4, metavar=names, default=[0.25] * 4,
                            help="w_0..w_3 of eq. 7, scaled to sum 1; 0 leaves an estimator out (default: 0.25 each)")  # fmt: skip
    confidence.add_argument("--fuse", choices=["mean", "max"], default="mean", help="weighted mean (eq. 7) or largest")
    confidence.add_argument("--levels", choices=["sigma", "uniform"], default="sigma", help="cuts: mu and sigma, or fifths")
    chains = parser.add_argument_group("reference chains")
    chains.add_argument("--annotate", metavar="MODEL", help="only write reference chains, with a model at OPENAI_BASE_URL")
    chains.add_argument("--concurrency", type=int, default=8, help="requests at the same time (default: %(default)s)")
    chains.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="of a million tokens, to print the cost")
    c.add_run_arguments(parser.add_argument_group("run"), out="estimate")
    args = parser.parse_args(argv)
    problems = c.positive(args, "limit", "noise_scale", "max_new_tokens", "batch_size")
    if args.temperature < 0:
        problems.append("--temperature must not be negative")
    if min(args.weights) < 0 or sum(args.weights) == 0:
        problems.append("--weights must not be negative, nor all 0")
    if args.responses and not Path(args.responses).is_file():
        problems.append(f"no such file: {args.responses}")
    if args.annotate:
        problems += annotate_problems(args)
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
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    u = np.array([s["u"] for s in sentences])
    axis.hist([u[~wrong], u[wrong]], bins=50, stacked=True, color=["#4477aa", "#ee6677"], label=["right", "wrong"])
    for edge in confidence["edges"]:
        axis.axvline(edge, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel="$U_{Final}$ (0 = certain); dashed: cuts between levels 5, 4, 3, 2, 1", ylabel="sentences")
    axis.set(yscale="log", xlim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=120)


def annotate_problems(args: argparse.Namespace) -> list[str]:
    """What keeps --annotate from starting."""
    problems = c.positive(args, "concurrency") + ["--price must not be negative"] * (min(args.price or [0]) < 0)
    for name, form in (("OPENAI_BASE_URL", r"https?://[^/\s]\S*"), ("OPENAI_API_KEY", r"[!-~]+")):  # else an error shows the key
        if not re.fullmatch(form, os.environ.get(name, "")):
            problems.append(f"--annotate needs {'an http(s) address' if 'URL' in name else 'a key'} in {name}")
    return problems + ["--annotate needs the package openai"] * (importlib.util.find_spec("openai") is None)


def parse_chain(text: str, answer: str) -> dict[str, list[str]]:
    """The chain in a model's answer, each sentence with its stop; raises ValueError(reason that is counted, details)."""
    try:
        value = json.loads(re.sub(r"^\s*```(?:json)?\s*(\{.*\})\s*```\s*$", r"\1", text, flags=re.DOTALL))
    except (ValueError, RecursionError) as error:
        raise ValueError("no valid JSON", str(error)) from None
    if not isinstance(value, dict) or set(value) != {"image", "reasoning"}:
        raise ValueError("not an object with the fields image and reasoning")
    for part, found in value.items():
        if not isinstance(found, list) or not found or not all(isinstance(s, str) and re.search(r"\w", s) for s in found):
            raise ValueError(f"{part} is not a list of sentences")
        value[part] = c.tidy(found)
    named = c._plain(answer)
    if not any(f" {named} " in f" {c._plain(s)} " if named else answer in s for s in value["reasoning"]):
        raise ValueError("no reasoning sentence names the answer", repr(answer))
    return value


async def annotate_all(records: list[dict], path: Path, args: argparse.Namespace, tally: Counter) -> None:
    """Append each record's row to `path` as soon as both passes are done; `tally` counts what was used and left out."""
    import openai

    async def count(_) -> None:
        tally["requests"] += 1  # retries too

    async def ask(messages: list[dict]) -> str:
        try:
            completion = await client.chat.completions.create(model=args.annotate, messages=messages)
            choice, usage = completion.choices[0], completion.usage
            text, refused = str(choice.message.content), choice.message.refusal or choice.finish_reason == "content_filter"
        except (openai.APIError, ValueError, AttributeError, TypeError, IndexError) as error:  # the last four: another protocol
            failures.append(error)
            if len(failures) >= STOP_AFTER or isinstance(error, (openai.AuthenticationError, openai.NotFoundError)):
                c.usage_error(" ".join(f"gave up: {error}".replace(client.api_key, "...").split())[:300])
            raise ValueError("refusal" if getattr(error, "code", 0) == "content_filter" else type(error).__name__) from None
        failures.clear()
        tally.update({n: getattr(usage, n, 0) or 0 for n in ("prompt_tokens", "completion_tokens")})
        if refused or ("{" not in text and _REFUSAL.match(text.replace("\u2019", "'"))):
            raise ValueError("refusal")
        return text

    async def find_row(record: dict) -> dict:
        image, answer, given, parts = Path(record["image"]), record["answer"], record["reference"], []
        uri = f"data:{mimetypes.guess_type(image)[0] or 'image/png'};base64,{base64.b64encode(image.read_bytes()).decode()}"
        more = "".join(f"Rationale: {r}\n" for r in given["reasoning"] if not given["image"])  # else it has a chain already
        for task in (ANNOTATE, REFINE):
            text = {"type": "text", "text": PROMPT.format_map(record | task | {"more": more})}
            messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}, text]}]
            reply = await ask(messages)
            try:
                chain = parse_chain(reply, answer)
            except ValueError as error:
                problem = {"role": "user", "content": REPAIR.format(": ".join(error.args))}
                chain = parse_chain(await ask([*messages, {"role": "assistant", "content": reply}, problem]), answer)
            parts.append({"Image_level": chain["image"], "Reasoning_level": chain["reasoning"]})
            more = f"Chain: {json.dumps(chain, ensure_ascii=False)}"
        row = {"split": "train", "image_id": int(image.stem) if image.stem.isdecimal() else image.stem, "question_id": record["id"]}
        row |= {k: record[k] for k in ("image", "question", "choices")} | {"direct_answers": record.get("answers") or [answer]}
        row["correct_choice_idx"] = record["choices"].index(answer) if answer in (record["choices"] or []) else None
        return row | {"keys": parts[0], "keys_filtered": parts[1]}

    async def work() -> None:
        for record in queue:
            try:
                c.append_jsonl(path, [await find_row(record)])
            except ValueError as error:
                tally[f"left out: {error.args[0]}"] += 1
                bar.write(f"{record['id']} left out: {error.args[0]}")
            bar.update()

    queue, failures, bar = iter(records), [], tqdm(total=len(records), desc="annotate")
    http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [count]})
    async with openai.AsyncOpenAI(max_retries=RETRIES, timeout=TIMEOUT, http_client=http) as client:
        await asyncio.gather(*(work() for _ in range(args.concurrency)))
    bar.close()


def annotate(records: list[dict], args: argparse.Namespace) -> None:
    """Write train_mmb.json (published layout), annotations.jsonl (a row a finished record: a rerun does the others), log.jsonl."""
    c.usage_error(*annotate_problems(args))
    records = list({r["id"]: r for r in c.usable(records, ("image", "question", "answer"), args.allow_bad_records)}.values())
    fixed = {k: v for k, v in vars(args).items() if k not in ("concurrency", "price", "limit", "device")}
    c.start_run("annotate", argparse.Namespace(**fixed), "-", {"data": args.data})  # no file ends the run: more may be wanted
    path, tally = Path(args.out) / "annotations.jsonl", Counter()
    rows = {row["question_id"]: row for row in c.read_jsonl(path)} if path.exists() else {}
    c.write_jsonl(path.with_suffix(".tmp"), list(rows.values()))  # without a last line cut short
    path.with_suffix(".tmp").replace(path)
    try:
        asyncio.run(annotate_all([r for r in records if r["id"] not in rows], path, args, tally))
    finally:
        rows = {row["question_id"]: row for row in c.read_jsonl(path)}
        done = [rows[r["id"]] for r in records if r["id"] in rows]
        c.write_json(path.with_name("train_mmb.json"), done)
        if args.price:
            tally["cost"] = round(tally["prompt_tokens"] * args.price[0] + tally["completion_tokens"] * args.price[1]) / 1e6
        c.append_jsonl(path.with_name("log.jsonl"), [tally])
        print(f"{len(done)} of {len(records)} chains written; this run: {', '.join(f'{k} {v:,}' for k, v in tally.items())}")


def finish(lines: list[dict], args) -> None:
    """Levels over all lines, and the files of the run."""
    out, confidence = Path(args.out), assign_levels(lines, args)
    c.write_json(out / "confidence.json", confidence)
    summarize(lines, confidence, out / "confidence.png")
    c.write_jsonl(out / "responses.jsonl", lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    c.fill_defaults(args, DEFAULTS, vars(args))
    out, world = Path(args.out), c.digits_paths(args.cache, args.seed, args.noise_scale)
    names = ("matcher", "similarity", "statement_encoder", "data", "data_dir", "cache", "noise_scale")
    setup = {name: getattr(args, name) for name in names} | {"world_seed": args.seed}
    setup |= {"model": args.model or world["model"], "clip": args.clip or world["clip"]}
    if args.merge:
        setups = [c.read_run(folder, "responses.jsonl")["setup"] for folder in args.merge]
        if any(other != setups[0] for other in setups):
            c.usage_error(f"{', '.join(args.merge)} are runs with different data or models")
        if not c.start_run("estimate", args, "responses.jsonl", setups[0]):
            shards = [c.read_jsonl(Path(folder) / "responses.jsonl") for folder in args.merge]
            finish([line for row in zip_longest(*shards) for line in row if line], args)
        return
    if args.responses:
        records = c.usable(c.read_jsonl(args.responses), ("image", "question", "response"), args.allow_bad_records, args.limit)
        blank = {"answer": None, "choices": None, "reference": {"image": [], "reasoning": []}}
        records = [{"id": i} | blank | record for i, record in enumerate(records)]
    else:
        records = c.load_data(args.data, args.data_dir, "train", args.limit, True, args.allow_bad_records, setup)
    if args.annotate:
        return annotate(records, args)
    if args.shard:
        records = records[args.shard[0] :: args.shard[1]]
    if c.start_run("estimate", args, "responses.jsonl", setup):
        return
    c.build_digits_world(args.cache, args.seed, args.noise_scale, [setup["model"], setup["clip"]])
    partial = out / "partial.jsonl"
    lines = c.read_jsonl(partial) if partial.exists() else []
    lines = lines[: len(lines) // args.batch_size * args.batch_size]  # whole batches only
    c.write_jsonl(partial, lines)
    similarity, matcher = c.Similarity(args.similarity, args.device), c.Matcher(args.matcher, device=args.device)
    clip = c.ClipScorer(setup["clip"], args.device)
    model, processor = c.load_model(setup["model"], args)
    bar = tqdm(total=len(records), initial=len(lines), desc="estimate")
    while len(lines) < len(records):
        args.batch_seed = args.seed * 1_000_000 + len(lines)
        batch = respond(model, processor, records[len(lines) : len(lines) + args.batch_size], clip, similarity, matcher, args)
        c.append_jsonl(partial, batch)
        lines += batch
        bar.update(len(batch))
        bar.set_postfix(correct=f"{np.mean([bool(s['correct']) for line in lines for s in line['sentences']]):.3f}")
    bar.close()
    finish(lines, args)
    partial.unlink()


if __name__ == "__main__":
    main()
