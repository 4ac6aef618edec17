"""How fast is a PPO update on digits, against the bare passes it needs? Run by hand: python tests/bench_ppo.py [--help]

It needs a folder that warmup.py wrote: python estimate.py && python warmup.py && python tests/bench_ppo.py --ckpt warmup/
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from benchmark import machine, report

import common as c
import ppo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="warmup", help="folder of warmup.py")
    parser.add_argument("--runs", type=int, default=5)
    bench, rest = parser.parse_known_args()
    args = ppo.parse_args(["--ckpt", bench.ckpt, *rest])
    ckpt = Path(bench.ckpt)
    config = c.read_run(ckpt, "sft.jsonl", "confidence.json")
    c.fill_defaults(args, ppo.DEFAULTS, config["setup"])
    models = ppo.load_models(ckpt, args)
    judge = ppo.load_judge(c.read_json(ckpt / "confidence.json"), config["setup"], args)
    optimizers = ppo.make_optimizers(models, args)
    questions = c.read_jsonl(ckpt / "sft.jsonl")[: args.batch_size]
    records = [q for q in questions for _ in range(args.samples)]
    roll = ppo.rollout(models, questions, args, 0)
    ids = [g.ids for g in roll.generations]
    batches = []
    for rows in torch.arange(len(records)).split(args.micro_batch):
        batches.append(c.collate(models.processor, [records[i] for i in rows], [ids[i] for i in rows], models.policy.device))

    def generate():
        c.generate(models.policy, models.processor, records, args.temperature, args.max_new_tokens, 0)

    def logits(model, batch):
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state[:, batch.start - 1 : -1][batch.mask]
        return model.get_output_embeddings()(hidden)

    def passes():
        """Generation, one forward pass of the reference, and forward and backward passes of the policy; nothing is computed."""
        generate()
        with torch.no_grad():
            for batch in batches:
                logits(models.reference or models.policy, batch)
        for _ in range(args.epochs):
            for batch in batches:
                models.policy.zero_grad()
                logits(models.policy, batch).float().logsumexp(-1).sum().backward()

    print(machine(), f"{len(records)} responses, {int(roll.mask.sum())} tokens")
    variants = {"bare passes": passes, "PPO update": lambda: ppo.train_update(models, optimizers, questions, judge, args, 0)}
    report("PPO on digits", variants | {"rollout alone": generate}, "bare passes", bench.runs)


if __name__ == "__main__":
    main()
