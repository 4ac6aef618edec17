"""Stage 0: reference chains for questions of your own (App. C and G), from any OpenAI-compatible endpoint.

A model sees each image with its question and answer, twice: it writes a chain, then refines it. Writes train_mmb.json in the
layout of the published data, which `estimate.py --data-dir` reads, and annotations.jsonl, a row a finished question. An answer that
cannot be used goes back once with what is wrong with it, then its question is left out; the same command again asks for what was
left out.

    OPENAI_BASE_URL=... OPENAI_API_KEY=... python tests/annotate.py --data aokvqa --data-dir aokvqa/ --model gpt-4o --out chains
"""

import argparse
import base64
import functools
import importlib.util
import json
import mimetypes
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
from common import COUNT, NOT_NEGATIVE, PUBLISHED, SWITCH, TEXT

FLAGS = {
    "data": {
        "data": (("digits", *PUBLISHED), "digits", "the data set whose training file gets chains"),
        "data_dir": (TEXT, None, "folder with the annotations and the images (default: the Hugging Face hub)"),
        "cache": (TEXT, "cache", "where the digits world keeps its images"),
        "limit": (COUNT, None, "number of questions (default: all)"),
        "allow_bad_records": (SWITCH, False, "go on when more than a fifth of the records is unusable"),
    },
    "endpoint": {
        "model": (TEXT, "gpt-4o", "what the endpoint at OPENAI_BASE_URL calls it"),
        "concurrency": (COUNT, 8, "requests at the same time"),
        "price": (NOT_NEGATIVE._replace(nargs=2), None, "of a million tokens in and out, to print the cost"),
    },
    "run": {
        "out": (TEXT, "chains", "folder to write"),
        "overwrite": (SWITCH, False, "start over in a folder that holds another run"),
    },
}


def find_problems(args: argparse.Namespace) -> list[str]:
    problems = ["works in one process"] * (os.environ.get("WORLD_SIZE", "1") != "1")
    problems += ["needs the package openai"] * (not importlib.util.find_spec("openai"))
    for name, form in (("OPENAI_BASE_URL", r"https?://[^/\s]\S*"), ("OPENAI_API_KEY", r"[!-~]+")):  # else an error shows the key
        if not re.fullmatch(form, os.environ.get(name, "")):
            problems.append(f"needs {'an http(s) address' if 'URL' in name else 'a key'} in {name}")
    return problems


parse_args = functools.partial(common.parse_flags, __doc__, FLAGS, check=find_problems)

ANNOTATION_PROMPT = """You get an image, a question about it and the correct answer. {task}
Reply with one JSON object and nothing else, as in this example:
Image: (a bicycle with a flat rear tyre leans on a railing, a hand pump lies beside it)\nQuestion: What must the rider do first?
Answer: inflate tyre\n{draft}Reply: {{"image": ["The rear tyre of the bicycle is flat.", "A hand pump lies beside it."], \
"reasoning": ["Riding needs tyres full of air.", "A hand pump inflates tyres.", "So, the answer is inflate tyre."]}}
Now the image above.\nQuestion: {question}\nAnswer: {answer}\n{more}"""
ANNOTATE = {
    "draft": "",
    "task": """Write the chain of reasoning from the image to the answer in two parts: "image", the visual \
elements that matter most to question and answer; "reasoning", what follows from them until it is clear why the answer is correct, \
ending with "So, the answer is ...". Each sentence is short, holds one piece of knowledge and builds on those before. Say all \
that is needed, and nothing that is repeated or beside the point.""",
}
REFINE = {
    "draft": """Chain: {"image": ["The rear tyre of the bicycle, a black one, is flat.", "The railing is green.", "A hand \
pump lies beside it."], "reasoning": ["Riding needs tyres full of air.", "A hand pump, quite cheap, inflates tyres.", "So, the \
answer is inflate tyre."]}\n""",
    "task": """Improve the chain of reasoning that follows the answer: correct what is wrong, drop \
each sentence that the answer does not need, cut the others to the essential; "So, the answer is ..." stays last.""",
}
REPAIR = 'This cannot be used: {}. Reply with the whole JSON object {{"image": [...], "reasoning": [...]}} again and nothing else.'
RETRIES, TIMEOUT, STOP_AFTER = 8, 120.0, 8  # the client waits 0.5, 1, ... 8 s, less up to a quarter, or what Retry-After says
REFUSAL = re.compile(r"\W*((I'm|I am) )?(very |so )?sorry\b|\W*(I|we) (can't|cannot|won't|(am|are) (un|not )able)", re.I)


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
        value[part] = common.tidy(found)
    named = common.plain(answer)
    if not any(f" {named} " in f" {common.plain(s)} " if named else answer in s for s in value["reasoning"]):
        raise ValueError("no reasoning sentence names the answer", repr(answer))
    return value


class Annotator:
    """Asks a model at OPENAI_BASE_URL for chains; `tally` counts requests, tokens and what was left out, by reason."""

    def __init__(self, model: str):
        import openai

        self.openai, self.model, self.tally, self.failures = openai, model, Counter(), 0
        http = openai.DefaultHttpxClient(event_hooks={"request": [lambda _: self.tally.update(["requests"])]})  # retries too
        self.client = openai.OpenAI(max_retries=RETRIES, timeout=TIMEOUT, http_client=http)

    def find_row(self, record: dict) -> dict:
        """Both passes of a record -> its row in the published layout. A chain that cannot be used goes back once with its fault."""
        image, answer, given, passes = Path(record["image"]), record["answer"], record["reference"], []
        uri = f"data:{mimetypes.guess_type(image)[0] or 'image/png'};base64,{base64.b64encode(image.read_bytes()).decode()}"
        more = "".join(f"Rationale: {text}\n" for text in given["reasoning"] if not given["image"])  # else it has a chain already
        for task in (ANNOTATE, REFINE):
            text = {"type": "text", "text": ANNOTATION_PROMPT.format_map(record | task | {"more": more})}
            messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}, text]}]
            reply = self.ask(messages)
            try:
                chain = parse_chain(reply, answer)
            except ValueError as error:
                messages += [
                    {"role": "assistant", "content": reply},
                    {"role": "user", "content": REPAIR.format(": ".join(error.args))},
                ]
                chain = parse_chain(self.ask(messages), answer)
            passes.append({"Image_level": chain["image"], "Reasoning_level": chain["reasoning"]})
            more = f"Chain: {json.dumps(chain, ensure_ascii=False)}"
        row = {"split": "train", "image_id": int(image.stem) if image.stem.isdecimal() else image.stem, "question_id": record["id"]}
        row |= {name: record[name] for name in ("image", "question", "choices")}
        row["direct_answers"] = record.get("answers") or [answer]
        row["correct_choice_idx"] = record["choices"].index(answer) if answer in (record["choices"] or []) else None
        return row | {"keys": passes[0], "keys_filtered": passes[1]}

    def ask(self, messages: list[dict]) -> str:
        """A model's answer; ValueError where it refuses or fails, RuntimeError where it fails again and again."""
        if self.failures >= STOP_AFTER:
            raise ValueError("not asked")
        try:
            completion = self.client.chat.completions.create(model=self.model, messages=messages)
            choice, usage = completion.choices[0], completion.usage
            text, refused = str(choice.message.content), choice.message.refusal or choice.finish_reason == "content_filter"
        except (self.openai.APIError, ValueError, AttributeError, TypeError, IndexError) as error:  # the last: another protocol
            self.failures += 1
            hopeless = isinstance(error, (self.openai.AuthenticationError, self.openai.NotFoundError))
            if hopeless or self.failures >= STOP_AFTER:
                self.failures = STOP_AFTER
                raise RuntimeError(" ".join(f"gave up: {error}".replace(self.client.api_key, "...").split())[:300]) from None
            raise ValueError("refusal" if getattr(error, "code", 0) == "content_filter" else type(error).__name__) from None
        self.failures = 0
        self.tally.update({name: getattr(usage, name, 0) or 0 for name in ("prompt_tokens", "completion_tokens")})
        if refused or ("{" not in text and REFUSAL.match(text.replace("\u2019", "'"))):
            raise ValueError("refusal")
        return text


def annotate(records: list[dict], args: argparse.Namespace) -> None:
    """Write train_mmb.json (published layout), annotations.jsonl (a row a finished record: a rerun does the others), log.jsonl."""
    records = common.usable(records, ("image", "question", "answer"), args.allow_bad_records)
    records = list({record["id"]: record for record in records}.values())
    run = common.Run("annotate", args, {"data": args.data}, free=("concurrency", "price", "limit"))  # never finished: more may come
    run.begin()
    path, annotator, pool = run.out / "annotations.jsonl", Annotator(args.model), ThreadPoolExecutor(args.concurrency)
    rows, tally = {row["question_id"]: row for row in common.read_jsonl(path)}, annotator.tally
    common.write_jsonl(path, list(rows.values()))  # without a last line cut short
    asked = {pool.submit(annotator.find_row, record): record["id"] for record in records if record["id"] not in rows}
    try:
        for row in tqdm(as_completed(asked), desc="annotate", total=len(asked)):
            try:
                common.append_jsonl(path, [row.result()])
            except ValueError as error:
                tally[f"left out: {error.args[0]}"] += 1
                tqdm.write(f"{asked[row]} left out: {error.args[0]}")
    except RuntimeError as error:  # the endpoint fails again and again
        common.usage_error(str(error))
    finally:
        annotator.failures = STOP_AFTER  # what is still at work asks no more
        pool.shutdown(cancel_futures=True)
        rows = {row["question_id"]: row for row in common.read_jsonl(path)}
        done = [rows[record["id"]] for record in records if record["id"] in rows]
        common.write_json(run.out / "train_mmb.json", done)
        if args.price:
            tally["cost"] = round(tally["prompt_tokens"] * args.price[0] + tally["completion_tokens"] * args.price[1]) / 1e6
        common.append_jsonl(run.out / "log.jsonl", [tally])
        print(f"{len(done)} of {len(records)} chains written; this run: {', '.join(f'{k} {v:,}' for k, v in tally.items())}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.device, world = "cpu", {"cache": args.cache, "world_seed": 0, "noise_scale": 1.0}
    split = "train" if args.data in common.DIGITS else "all"
    limit = args.limit or (3000 if args.data in common.DIGITS else None)
    annotate(common.load_data(args.data, args.data_dir, split, limit, True, args.allow_bad_records, world), args)


if __name__ == "__main__":
    common.run_script(main)
