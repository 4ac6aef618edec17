"""The stated confidence put to use at inference: self-correction, against votes over sampled chains at equal tokens.

    python evaluate.py --correct 3 --ckpt ppo/ --split validation --candidates 3 --budget 2 3 5 --out corrected/
    python evaluate.py --correct 3 --ckpt ppo/ --data digits-ood --out corrected_ood/

1. Self-correction: the model answers greedily. The first sentence whose stated level is at or below that of --correct is drawn
   again behind the tokens before it, --candidates times at temperature 1, each until its statement ends. The one stated most
   confidently is kept, if more so than what stands there, and completed greedily; on to the next doubtful sentence, none is
   looked at twice. The same sentence with more confidence is no correction: it would leave every error, and state it more
   confidently.
2. Votes: N chains at temperature 1. An answer has the weight of the chains that name it: 1 each (majority, Wang et al. 2023) or a
   chain's confidence: that of its last sentence, the minimum or the product over its sentences. No statement is confidence 0.
3. Selective answering: accuracy at coverage, by a chain's confidence, or the winner's weight over N.

Tokens are all that a method draws, what is thrown away and the end token included; a question never takes more than --budget times
those of its greedy response. A candidate starts only where it leaves room for the rest of the response, and a chain that the budget
cuts is not taken. The ceiling is the accuracy with the best of the candidates: of the sampled chains; of the greedy chain, the kept
ones and those of all candidates, whose completions are drawn for this figure alone and are not among the method's tokens.

Writes to --out: correct.json (every figure), chains.jsonl (a question a line), correct.png.
"""

import functools
import math
import sys
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import evaluate
from common import COUNT, RUN_FLAGS, TEXT, Batch, Kind, conf

import numpy as np
import summary
import torch
from matplotlib.figure import Figure
from transformers import StoppingCriteriaList

WEIGHTS = {"majority": lambda c: 1.0, "last": lambda c: c[-1], "minimum": min, "product": math.prod}  # of a chain's confidences
LEVEL = Kind(int, lambda n: 1 <= n <= 5, "must lie between 1 and 5")
BUDGETS = Kind(float, lambda x: 1 <= x < math.inf, "must be at least 1", "+")
FLAGS = {
    "run": {"ckpt": evaluate.FLAGS["run"]["ckpt"], "out": (TEXT, "corrected", "folder to write")} | RUN_FLAGS,
    "method": {
        "correct": (LEVEL, 3, "draw again what is said at or below this level"),
        "candidates": (COUNT, 3, "for a doubtful sentence, at most"),
        "budget": (BUDGETS, [2.0, 3.0, 5.0], "times the tokens of the greedy response, at most"),
        "samples": (COUNT._replace(nargs="+"), [1, 2, 3, 5, 10], "chains of a vote"),
        "weight": (tuple(WEIGHTS)[1:], "product", "a chain's confidence in the table and the picture; correct.json has all"),
    },
    "data": {name: flag for name, flag in evaluate.FLAGS["data"].items() if name != "consistency"},
}
parse_args = functools.partial(common.parse_flags, __doc__, FLAGS)


# ----------------------------------------------------------------------------------------------------------------- chains
@dataclass
class Chain:
    """A response or its beginning, parsed and judged."""

    ids: list[int]  # its tokens, the end token included
    offsets: list[tuple[int, int]]
    steps: list[common.Step]
    answer: str | None
    right: bool

    def tokens_before(self, character: int) -> int:
        return max((i + 1 for i, (a, b) in enumerate(self.offsets) if a < b <= character), default=0)

    def level(self, t: int) -> int:
        """The level stated of sentence t, 0 where there is none."""
        return (self.steps[t].level or 0) if t < len(self.steps) else 0

    def record(self) -> dict:
        said = {"levels": [step.level for step in self.steps], "n_tokens": len(self.ids)}
        return {"prediction": self.answer, "answer_correct": self.right} | said


@dataclass
class Tools:
    """A model, how what it writes is read, and how long that may be."""

    vlm: common.VLM
    reader: common.StatementReader
    matcher: common.Matcher
    max_new_tokens: int

    def read(self, records: list[dict], ids: list[list[int]]) -> list[Chain]:
        responses = [common.read_response(self.vlm.tokenizer, tokens) for tokens in ids]
        parsed, chains = self.reader.parse([response.text for response in responses]), []
        texts = [[step.text for step in steps] for steps in parsed]
        matches = self.matcher(texts, list(map(common.reference_chain, records)))
        for record, response, steps, said, matched in zip(records, responses, parsed, texts, matches, strict=True):
            answer = common.extract_answer(said, record["choices"])
            right = evaluate.is_right(answer, record, matched.size > 0 and bool(matched[-1, -1]))
            chains.append(Chain(response.ids, response.offsets, steps, answer, right))
        return chains

    def ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self.vlm.end_tokens

    def states(self, ids: list[int], t: int) -> bool:
        """Whether sentence t and its statement stand there in full; where statements stand behind the chain, whether it ended."""
        if self.ended(ids) or self.reader.layout != "each" or not common.STOP.search(self.vlm.tokenizer.decode(ids[-4:])):
            return self.ended(ids)
        text = common.read_response(self.vlm.tokenizer, ids).text
        steps = self.reader.parse([text])[0]
        return len(steps) > t + 1 or (len(steps) == t + 1 and steps[t].level is not None and steps[t].stop >= len(text.rstrip()))

    def go_on(self, records: list[dict], prefixes: list[list[int]], room: list[int], until: list, seed: int) -> list[list[int]]:
        """The prefixes with at most room[i] tokens more: sampled until sentence until[i] is stated; greedy where that is None."""
        prompts, sampled = continue_from(self.vlm, records, prefixes), until[0] is not None
        lengths, ended = list(room), [False] * len(room)

        def stop(input_ids: torch.Tensor, scores, **_) -> torch.Tensor:  # each row by itself; what follows in it is padding
            for i, new in enumerate(input_ids[:, prompts.inputs["input_ids"].shape[1] :].tolist()):
                if not ended[i] and (len(new) >= room[i] or sampled and self.states(prefixes[i] + new, until[i])):
                    ended[i], lengths[i] = True, len(new)
            return torch.tensor(ended, device=input_ids.device)

        batch = Batch(prompts.inputs | {"stopping_criteria": StoppingCriteriaList([stop])}, prompts.responses, prompts.mask)
        new = common.generate(self.vlm, batch, float(sampled), max(room), seed)
        return [ids + tokens[:n] for ids, tokens, n in zip(prefixes, new, lengths, strict=True)]


def continue_from(vlm: common.VLM, records: list[dict], prefixes: list[list[int]]) -> Batch:
    """Prompts that end with the beginning of their response, padded on the left."""
    batch = common.add_responses(vlm, common.collate(vlm, records), prefixes)
    inputs, padding = dict(batch.inputs), (~batch.mask).sum(1).tolist()
    for name, value in inputs.items():
        if value.shape[:2] == inputs["input_ids"].shape:  # (B, P + T): the padding on the right goes round to the left
            inputs[name] = torch.stack([row.roll(n, 0) for row, n in zip(value, padding, strict=True)])
    return Batch(inputs, batch.responses[:, :0], batch.mask[:, :0])


# ------------------------------------------------------------------------------------------------------------- correction
def correct(tools: Tools, record: dict, kept: Chain, level: int, candidates: int, budget: float) -> Generator:
    """Self-correction of one greedy chain: yields (prefix, room, until), is sent what `Tools.go_on` makes of them, and returns the
    chain that is kept, the tokens drawn, and all whole chains."""
    spent, limit, seen, settled = len(kept.ids), int(budget * len(kept.ids)), [kept], 0
    while (t := next((t for t in range(settled, len(kept.steps)) if 0 < kept.level(t) <= level), None)) is not None:
        start, stop = kept.tokens_before(kept.steps[t].start), kept.tokens_before(kept.steps[t].stop)
        drafts, settled = [], t + 1
        for _ in range(candidates):
            room = limit - spent - (len(kept.ids) - stop)  # a whole response shall still fit in
            if room < stop - start:
                break
            ids = yield kept.ids[:start], room, t
            spent += len(ids) - start
            drafts += tools.read([record], [ids]) if tools.states(ids, t) else []
        others = [d for d in drafts if len(d.steps) > t and common.plain(d.steps[t].text) != common.plain(kept.steps[t].text)]
        surest = max(others, key=lambda draft: draft.level(t), default=kept)  # the first of equals
        surest, room, cost = surest if surest.level(t) > kept.level(t) else kept, limit - spent, 0
        for draft in others:
            whole, left = draft, min(room, tools.max_new_tokens - len(draft.ids))
            if not tools.ended(draft.ids) and left > 0:
                whole = tools.read([record], [(yield draft.ids, left, None)])[0]
            seen += [whole] * tools.ended(whole.ids)
            if draft is surest:
                cost, kept = len(whole.ids) - len(draft.ids), whole if tools.ended(whole.ids) else kept
        spent += cost  # the others are completed for the ceiling alone
    return kept, spent, seen


def run_jobs(tools: Tools, records: list[dict], jobs: list[Generator], seed: int) -> list[tuple]:
    """What the jobs return, one a record. What they ask for is drawn in rounds of two batches, candidates and completions."""
    results, answers = {}, dict.fromkeys(range(len(jobs)))
    while answers:
        asked = {}
        for i, ids in answers.items():
            try:
                asked[i] = jobs[i].send(ids)
            except StopIteration as end:
                results[i] = end.value
        answers = {}
        for rows in ([i for i in asked if asked[i][2] is not None], [i for i in asked if asked[i][2] is None]):
            prefixes, room, until = zip(*(asked[i] for i in rows), strict=True) if rows else ((), (), ())
            seed += 1
            answers |= zip(rows, tools.go_on([records[i] for i in rows], prefixes, room, until, seed) if rows else (), strict=True)
    return [results[i] for i in range(len(jobs))]


# ----------------------------------------------------------------------------------------------------------------- figures
def weigh(chain: dict, weight: str) -> float:
    """A chain's confidence in [0, 1]."""
    return WEIGHTS[weight]([conf(level) if level else 0.0 for level in chain["levels"]] or [0.0])


def vote(chains: list[dict], weight: str) -> tuple[bool, float]:
    """Whether the answer with the most weight is right (of equals the one named first), and that weight over all N chains."""
    votes, right = defaultdict(float), {}
    for chain in chains:
        if chain["prediction"] is not None:
            answer = common.bare(chain["prediction"])
            votes[answer] += weigh(chain, weight)
            right.setdefault(answer, chain["answer_correct"])
    best = max(votes, key=votes.get, default=None)
    return right.get(best, False), votes[best] / len(chains)


def make_rows(lines: list[dict], budgets: list[float], samples: list[int]) -> list[dict]:
    """Every method at every setting with every weight. What a method has of a question: its chains, among which it votes."""
    chains = {("greedy", 1): [[line["greedy"]] for line in lines]}
    chains |= {("self-correction", b): [[line["corrected"][k]] for line in lines] for k, b in enumerate(budgets)}
    chains |= {("vote", n): [line["sampled"][:n] for line in lines] for n in samples}
    before, rows = np.array([line["greedy"]["answer_correct"] for line in lines], dtype=float), []
    for (method, setting), of in chains.items():
        tokens = float(np.mean([sum(chain["n_tokens"] for chain in drawn) for drawn in of]))
        times = tokens / float(np.mean([line["greedy"]["n_tokens"] for line in lines]))
        ceiling = float(np.mean([any(chain.get("ceiling", chain["answer_correct"]) for chain in drawn) for drawn in of]))
        for weight in list(WEIGHTS)[method != "vote" :]:
            right, sure = np.array([vote(drawn, weight) for drawn in of], dtype=float).T  # (questions,) each
            row = {"method": method, "setting": setting, "weight": weight, "tokens": tokens, "times_greedy": times}
            row |= {"accuracy": float(right.mean()), "ceiling": ceiling}
            row |= {"mended": int((right > before).sum()), "broken": int((right < before).sum())}
            row |= {f"selective_{share}": summary.selective_accuracy(sure, right, share / 100) for share in (80, 50)}
            rows.append(row | {"risk_coverage": evaluate.risk_coverage(sure, right).tolist()})
    return rows


def make_table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| method | budget, N | tokens | x greedy | accuracy | mended, broken | ceiling | at 80% | at 50% |", "|---" * 9 + "|"]
    cells = "| {method}, {weight} | {setting:g} | {tokens:.1f} | {times_greedy:.2f} | {accuracy:.3f} | {mended}, {broken} "
    cells += "| {ceiling:.3f} | {selective_80:.3f} | {selective_50:.3f} |"
    return "\n".join([*lines, *(cells.format(**row) for row in rows)])


def plot(path: Path, rows: list[dict]) -> None:
    """Left: accuracy (dotted: its ceiling) against tokens. Right: accuracy at coverage, at the last setting of each method."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, name in enumerate(dict.fromkeys((row["method"], row["weight"]) for row in rows)):
        of = [row for row in rows if (row["method"], row["weight"]) == name]
        for key, line in (("accuracy", "-"), ("ceiling", ":")):
            left.plot([r["tokens"] for r in of], [r[key] for r in of], line, c=f"C{k}", marker="os^d"[k], label=", ".join(name))
        curve = 1 - np.array(of[-1]["risk_coverage"])
        right.plot(np.linspace(0, 1, len(curve) + 1)[1:], curve, c=f"C{k}", label=f"{', '.join(name)} ({of[-1]['setting']:g})")
    left.set(xscale="log", xlabel="tokens a question", ylabel="accuracy (dotted: ceiling)")
    right.set(xlabel="coverage", ylabel="accuracy of the answers given")
    right.legend(fontsize=8, frameon=False)
    common.save_figure(path, figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup = evaluate.read_setup(args)
    common.fill_defaults(args, FLAGS, setup["data"])
    run = common.Run("correct", args, setup)
    if run.finished:
        return
    options = (args.split, args.limit, True, args.allow_bad_records, setup | {"model": args.ckpt})
    records = common.load_data(setup["data"], setup["data_dir"], *options)
    reader = common.StatementReader(setup["statement_encoder"], run.device, setup.get("layout", "each"))
    matcher, vlm = common.Matcher(setup["matcher"], device=run.device), common.load_model(args.ckpt, args, run.device)
    tools = Tools(vlm, reader, matcher, args.max_new_tokens)

    def answer(batch: list[dict], start: int) -> list[dict]:
        seed, prompts = args.seed + 1_000_003 * (start + 1), common.collate(vlm, batch)
        with common.images_encoded_once(vlm):
            draws = [(0.0, seed), *((1.0, seed + n) for n in range(max(args.samples)))]
            greedy, *sampled = [tools.read(batch, common.generate(vlm, prompts, t, args.max_new_tokens, s)) for t, s in draws]
        lines = [{"id": record["id"], "sentences": [], "answer_correct": c.right} for record, c in zip(batch, greedy, strict=True)]
        for i, line in enumerate(lines):
            line |= {"greedy": greedy[i].record(), "sampled": [of[i].record() for of in sampled], "corrected": []}
        for budget in args.budget:
            rows = zip(batch, greedy, strict=True)
            jobs = [correct(tools, record, chain, args.correct, args.candidates, budget) for record, chain in rows]
            for line, (kept, spent, seen) in zip(lines, run_jobs(tools, batch, jobs, seed), strict=True):
                line["corrected"].append(kept.record() | {"n_tokens": spent, "ceiling": any(chain.right for chain in seen)})
        return lines

    lines = common.answer_in_batches(run, records, args.batch_size, "chains.jsonl", answer)
    if run.accelerator.is_main_process:
        rows = make_rows(lines, args.budget, args.samples)
        common.write_json(run.out / "correct.json", rows)
        shown = [row for row in rows if row["weight"] in ("majority", args.weight)]
        print(make_table(shown))
        plot(run.out / "correct.png", shown)
    run.finish()
