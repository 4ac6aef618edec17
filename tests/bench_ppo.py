"""How fast is a PPO update on digits, against the bare passes it needs? Run by hand: python tests/bench_ppo.py [--help]

It needs a folder that warmup.py wrote: python estimate.py && python warmup.py && python tests/bench_ppo.py --ckpt warmup/
With --tokensar N: TokenSAR over N updates, each pair of texts scored once against one call a sentence and nothing kept.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import ppo

import torch
from accelerate import Accelerator
from bench_estimators import texts_of
from benchmark import machine, report


def tokensar(updates: int, update, runs: int) -> None:
    """Run `updates` updates, note what TokenSAR is asked in each, and answer that again in both ways."""
    asked, original = [], common.token_relevance
    common.token_relevance = lambda groups, similarity: asked.append(groups) or original(groups, similarity)
    for step in range(updates):
        update(step)
    common.token_relevance = original

    def ours():
        similarity = common.Similarity()
        for groups in asked:
            original(groups, similarity)

    def one_by_one():
        for groups in asked:
            for group in groups:
                original([group], common.Similarity())

    def bare():
        common.sentence_encoder()(sorted({text for groups in asked for one in groups for text in texts_of(*one)}, key=len))

    n = sum(map(len, asked))
    variants = {"bare encoder, distinct texts": bare, "ours": ours, "one call a sentence": one_by_one}
    report(
        f"TokenSAR over {updates} updates, {n:,} sentences",
        variants,
        "bare encoder, distinct texts",
        runs,
        memory=False,
        per=n,
        unit="sentences",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="warmup", help="folder of warmup.py")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokensar", type=int, metavar="N", help="TokenSAR over N updates instead")
    bench, rest = parser.parse_known_args()
    args, ckpt, alone = ppo.parse_args(["--ckpt", bench.ckpt, *rest]), Path(bench.ckpt), Accelerator(cpu=True)
    setup = common.read_run(ckpt, "sft.jsonl", "confidence.json")["setup"]
    common.fill_defaults(args, ppo.FLAGS, setup["data"])
    models, reader = ppo.load_models(ckpt, args, args.device), common.StatementReader(setup["statement_encoder"])
    judged_by = common.ClipScorer(setup["clip"]), common.Similarity(setup["similarity"]), common.Matcher(setup["matcher"])
    judge = ppo.Judge(common.read_json(ckpt / "confidence.json"), *judged_by, args.iv)
    optimizers = ppo.make_optimizers(models, args)
    parts = list(common.chunks(common.read_jsonl(ckpt / "sft.jsonl"), args.batch_size))

    def update(part: int = 0, value_only: bool = False):
        ppo.train_update(models, optimizers, reader, judge, parts[part % len(parts)], args, part, value_only, alone)

    if bench.tokensar:
        print(machine())
        return tokensar(bench.tokensar, lambda step: update(step, step == 0), bench.runs)
    records = [question for question in parts[0] for _ in range(args.samples)]
    ids = [response.ids for response in ppo.rollout(models, reader, parts[0], args, 0).responses]
    rows = list(torch.arange(len(records)).split(args.micro_batch))
    batches = [common.collate(models.policy, [records[i] for i in part], [ids[i] for i in part]) for part in rows]

    def generate():
        for part in common.chunks(records, args.generate_batch):
            common.generate(models.policy, common.collate(models.policy, part), 1.0, args.max_new_tokens, 0)

    def logits(vlm, batch):
        before = slice(-batch.responses.shape[1] - 1, -1)
        hidden = vlm.base.model(**batch.inputs, use_cache=False).last_hidden_state[:, before][batch.mask]
        return vlm.head(hidden)

    def passes():
        """Generation, a pass of policy and of reference, forward and backward passes of the policy; nothing else."""
        generate()
        with torch.no_grad():
            for batch in batches:
                logits(models.policy, batch), logits(models.reference or models.policy, batch)
        for _ in range(args.epochs):
            for batch in batches:
                models.policy.model.zero_grad()
                logits(models.policy, batch).float().logsumexp(-1).sum().backward()

    print(machine(), f"{len(records)} responses, {sum(map(len, ids))} tokens")
    report("PPO on digits", {"bare passes": passes, "PPO update": update, "generation alone": generate}, "bare passes", bench.runs)


if __name__ == "__main__":
    main()
