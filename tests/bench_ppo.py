"""How fast is a PPO update on digits, against the bare passes it needs? Run by hand: python tests/bench_ppo.py [--help]

It needs a folder that warmup.py wrote: python estimate.py && python warmup.py && python tests/bench_ppo.py --ckpt warmup/
With --tokensar N: TokenSAR over N updates, each pair of texts scored once against one call a sentence and nothing kept.
With --memory it needs nothing: the memory plan of ppo.py against the peak of a real update, for models of two sizes.
"""

import argparse
import copy
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from benchmark import machine, peak_memory, report

import common as c
import ppo


def memory(hidden_size: int, layers: int, vocab_size: int, micro_batch: int, tokens: int) -> None:
    """An update of full fine-tuning on random responses: planned and measured GB, without what holds the program itself."""
    processor = c.build_digits_processor()
    model = c.build_digits_model(processor, hidden_size, layers, vocab_size)
    model.config.text_config.max_position_embeddings = 4096
    pixels = [c.draw_digits(np.random.default_rng(i), "base")[0] for i in range(micro_batch)]
    records = [{"image": c.to_image(x), "question": "?", "reference": {"image": [], "reasoning": []}} for x in pixels]
    prompt = c.collate(processor, records).start
    with tempfile.TemporaryDirectory() as folder:
        c.save_model(model, processor, folder)
        del model
        flags = f"--dry-run --model {folder} --lora-rank 0 --prompt-tokens {prompt} --max-new-tokens {tokens} --epochs 1"
        flags += f" --samples 1 --minibatches 2 --micro-batch {micro_batch} --batch-size {4 * micro_batch} --lr 1e-5"
        args = ppo.parse_args(flags.split())
        c.fill_defaults(args, ppo.DEFAULTS, {"data": "real"})
        plan = ppo.memory_plan(args)
        generator, shape = torch.Generator().manual_seed(0), (4 * micro_batch, tokens)
        ids = torch.randint(300, 500, shape, generator=generator).tolist()
        generations = [c.Generation(row, "", [(0, 0)] * tokens, None, None) for row in ids]
        mask = torch.ones(shape, dtype=torch.bool)

        def update():
            models = ppo.load_models(Path(folder), copy.copy(args))
            optimizer = ppo.make_optimizers(models, args)["policy"]
            hidden = torch.zeros(*shape, hidden_size)
            roll = ppo.Rollout(records * 4, generations, [], mask, ~mask, -torch.ones(shape), -torch.ones(shape), hidden)
            ppo.update(models, optimizer, roll, torch.randn(shape), args, 0)

        measured = peak_memory(update)
    planned = sum(v for k, v in plan.items() if k != "peak" and not k.startswith("sampling")) / 1e9
    name = f"{hidden_size} wide, {layers} layers, vocabulary {vocab_size:,}, {micro_batch} x {prompt + tokens} tokens"
    print(f"| {name} | {planned:.3f} | {measured:.3f} | {planned / measured:.2f} |", flush=True)


def tokensar(updates: int, update, runs: int) -> None:
    """Run `updates` updates, note what TokenSAR is asked in each, and answer that again in both ways."""
    asked, original = [], c.token_relevance
    c.token_relevance = lambda groups, similarity: asked.append(groups) or original(groups, similarity)
    for step in range(updates):
        update(step)
    c.token_relevance = original

    def ours():
        similarity = c.Similarity()
        for groups in asked:
            original(groups, similarity)

    def one_by_one():
        for groups in asked:
            for group in groups:
                original([group], c.Similarity())

    def bare():
        c.sentence_encoder()(sorted({text for groups in asked for group in groups for text in group}, key=len))

    n = sum(map(len, asked))
    variants = {"bare encoder, distinct texts": bare, "ours": ours, "one call a sentence": one_by_one}
    report(f"TokenSAR over {updates} updates, {n:,} sentences", variants, "ours", runs, memory=False, per=n, unit="sentences")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="warmup", help="folder of warmup.py")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokensar", type=int, metavar="N", help="TokenSAR over N updates instead")
    parser.add_argument("--memory", action="store_true", help="the memory plan instead")
    bench, rest = parser.parse_known_args()
    if bench.memory:
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # else glibc keeps freed blocks, and the resident set shows its habits
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})
        print(machine(), "\n\n| model | planned GB | measured GB | ratio |\n|---|---|---|---|")
        memory(128, 4, 1000, 128, 300)
        memory(768, 12, 32_000, 8, 400)
        return
    args = ppo.parse_args(["--ckpt", bench.ckpt, *rest])
    ckpt = Path(bench.ckpt)
    config = c.read_run(ckpt, "sft.jsonl", "confidence.json")
    c.fill_defaults(args, ppo.DEFAULTS, config["setup"])
    models = ppo.load_models(ckpt, args)
    judge = ppo.load_judge(c.read_json(ckpt / "confidence.json"), config["setup"], args)
    optimizers = ppo.make_optimizers(models, args)
    questions = c.read_jsonl(ckpt / "sft.jsonl")[: args.batch_size]
    if bench.tokensar:
        parts = list(c.chunks(c.read_jsonl(ckpt / "sft.jsonl"), args.batch_size))
        print(machine())
        update = lambda i: ppo.train_update(models, optimizers, parts[i], judge, args, i, i == 0)  # noqa: E731
        return tokensar(bench.tokensar, update, bench.runs)
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
