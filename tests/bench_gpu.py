"""What a GPU needs for models of 7 billion parameters: seconds and memory of each stage beside the memory plan, and whether it
computes what the CPU does. Nothing is downloaded: the models are built from their configurations, with random weights.

    python tests/bench_gpu.py --quick                # LLaVA-NeXT 7B, small batches: some minutes
    python tests/bench_gpu.py                        # Qwen2-VL 7B, too, and the default sizes of ppo.py
    python tests/bench_gpu.py --quick --family qwen2-vl
    python tests/bench_gpu.py --tiny --device cpu    # the same steps on tiny models: tries this script
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import estimate
import ppo
import warmup

import bench_memory
import builders
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextImageProcessor, Qwen2VLImageProcessor

FLAGS = {"device": (common.TEXT, "cuda", "where the models run"), "quick": (common.SWITCH, False, "one model, small batches")}
FLAGS |= {"tiny": (common.SWITCH, False, "tiny models"), "family": (common.TEXT, None, "one of both: llava-next-vicuna, qwen2-vl")}
VOCABULARY = {"llava-next-vicuna": 32064, "qwen2-vl": 152064}


def build(name: str, folder: Path, device: str) -> None:
    """A random model of 7 billion parameters; the tokenizer is the small one of the tests."""
    processor = AutoProcessor.from_pretrained(builders.BUILDERS[name](folder))
    ids = processor.tokenizer.get_vocab()
    if name == "qwen2-vl":
        config = builders.qwen2_vl_config(ids, VOCABULARY[name], full=True)
        processor.image_processor = Qwen2VLImageProcessor(max_pixels=1280 * 28 * 28)
    else:
        config = builders.llava_next_config(VOCABULARY[name], ids["<image>"], full=True)
        sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
        processor.image_processor = LlavaNextImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **sizes)
    with torch.device(device):
        AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def measured(what: str, work):
    """Print the seconds of a call and the most memory that is held during it, weights included -> what it returns."""
    gc.collect()  # models of an earlier stage
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began, result, peak = time.perf_counter(), work(), float("nan")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"| {what} | {time.perf_counter() - began:.2f} | {peak:.2f} |", flush=True)
    return result


def warm_up(folder: Path, adapter: Path, records: list[dict], args, alone: Accelerator) -> None:
    """A step of warmup.py; saves the new adapter."""
    vlm = measured("load for warmup.py", lambda: common.load_model(folder, args, args.device, trainable=True))
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=1e-4)
    texts = ["The cat sits on the red mat, and I am sure of it. So, the answer is cat. " * 4] * len(records)
    step = lambda: warmup.train_step(vlm, records, texts, optimizer, args.micro_batch, alone)  # noqa: E731
    measured(f"warmup.py, a step of {len(records)} responses", step)
    common.save_model(adapter, vlm)


def reinforce(adapter: Path, records: list[dict], args, clip: str, alone: Accelerator) -> int:
    """A rollout and an update of ppo.py, a batch of estimate.py -> the prompt's tokens."""
    models = measured("load for ppo.py", lambda: ppo.load_models(adapter, args, args.device))
    policy, n = models.policy, args.batch_size * args.samples
    beyond = range(len(policy.tokenizer), policy.head.weight.shape[0])  # the tokenizer cannot read these
    policy.base.generation_config.suppress_tokens += [*beyond, *policy.end_tokens]
    optimizers, reader = ppo.make_optimizers(models, args), common.StatementReader(device=args.device)
    tools = common.ClipScorer(clip, args.device), common.Similarity(device=args.device), common.Matcher()
    judge = ppo.Judge(estimate.fit_confidence(np.random.default_rng(0).random((50, 4)), [0.25] * 4), *tools, "level")
    prompts = common.collate(policy, [record for record in records for _ in range(args.samples)])
    ids = measured(f"sampling {n} responses", lambda: common.generate(policy, prompts, 1.0, args.max_new_tokens, 0))
    with torch.no_grad():
        measured("their statistics", lambda: common.response_statistics(policy, common.add_responses(policy, prompts, ids)))
    measured(f"ppo.py, a rollout of {n} responses", lambda: ppo.rollout(models, reader, records, args, 0))
    update = lambda: ppo.train_update(models, optimizers, reader, judge, records, args, 1, False, alone)  # noqa: E731
    measured(f"ppo.py, an update of {n} responses, rollout included", update)
    sample = lambda prompts: common.generate(policy, prompts, 0.1, args.max_new_tokens, 0)  # noqa: E731
    measured(f"estimate.py, {len(records[:8])} questions", lambda: common.measure(policy, records[:8], sample, *tools))
    return common.collate(policy, records[:1]).inputs["input_ids"].shape[1]


def stages(name: str, work: Path, bench, clip: str) -> None:
    folder, records, rng = work / name, [], np.random.default_rng(0)
    builders.BUILDERS[name](folder) if bench.tiny else build(name, folder, bench.device)
    flags = f"--device {bench.device} --dtype bfloat16 --load-in-4bit --gradient-checkpointing".split()
    sizes = "--batch-size 4 --samples 2 --max-new-tokens 64 --epochs 1".split() * (bench.quick or bench.tiny)
    sft, args = warmup.parse_args(flags), ppo.parse_args(flags + sizes)
    for parsed, script in ((sft, warmup), (args, ppo)):
        common.fill_defaults(parsed, script.FLAGS, "real")
    for i in range(args.batch_size):
        image, chain = work / f"{i}.png", {"image": ["The cat sits on the red mat."], "reasoning": ["So, the answer is cat."]}
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).resize((640, 480)).save(image)
        records.append({"id": f"q{i}", "image": str(image), "question": "What is it?", "choices": None, "reference": chain})
    print(f"\n{name}, {' '.join(flags + sizes)}\n\n| what | seconds | peak GB |\n|---|---|---|")
    warm_up(folder, work / "adapter", records, sft, Accelerator(cpu=bench.device == "cpu"))
    prompt = reinforce(work / "adapter", records, args, clip, Accelerator(cpu=bench.device == "cpu"))
    plan = bench_memory.parse_args([*flags, *sizes, "--model", str(folder), "--prompt-tokens", str(prompt)])
    print(f"\nThe memory plan of ppo.py at {prompt} prompt tokens")
    for what, size in bench_memory.memory_plan(plan).items():
        print(f"  {what:<24} {size / 1e9:.2f} GB")


@torch.no_grad()
def same_statistics(work: Path, device: str) -> None:
    """Log-probabilities and entropies of tiny models in float32, on the device and on the CPU."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    for name in VOCABULARY:
        folder, found = builders.BUILDERS[name](work / f"tiny-{name}"), []
        for place in ("cpu", device):
            vlm = common.load_model(folder, ppo.parse_args([]), place)
            batch = common.collate(vlm, [{"id": "q", "image": image, "question": "What?"}], [list(range(20, 50))])
            found.append([values.float().cpu() for values in common.response_statistics(vlm, batch)[:2]])
        apart = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
        print(
            f"Statistics of a tiny {name} on {device}: {apart:.1e} from those on the CPU: {'same' if apart < 1e-4 else 'DIFFERENT'}"
        )


def launched(work: Path, device: str) -> str:
    """All scripts on a small digits world, ppo.py under torchrun (nccl on a GPU) -> the world's CLIP model.

    `accelerate launch` starts several processes by torchrun; a single one it starts without a process group.
    """
    paths = builders.build_digits_world(work / "cache", steps=60)
    flags = {"estimate": f"--limit 12 --cache {work}/cache", "warmup": f"--estimate {work}/estimate --epochs 1 --lora-rank 4"}
    flags |= {"ppo": f"--ckpt {work}/warmup --updates 1 --batch-size 4", "evaluate": f"--ckpt {work}/ppo --limit 4"}
    for stage, more in flags.items():
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node 1" * (stage == "ppo")
        command = [sys.executable, *f"{torchrun} {stage}.py --device {device} --out {work}/{stage} {more}".split()]
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True, env=os.environ | {"NCCL_DEBUG": "VERSION"})
    args = ppo.parse_args(["--lr", "1e-4"])
    models = ppo.load_models(work / "warmup", args, "cpu")
    modules = {"policy": models.policy.model, "value_head": models.value_head}
    step = common.load_checkpoint(work / "ppo" / "trainer_state.pt", modules, ppo.make_optimizers(models, args))
    print(f"All scripts ran on {device}, ppo.py under torchrun; on the CPU its checkpoint goes on at update {step}.")
    return paths["clip"]


def token_statistics(device: str, n_tokens: int = 2048) -> None:
    """Log-probabilities and entropies of tokens over a vocabulary of 152,064 words, against the product with the head alone."""
    hidden, weight = (torch.randn(n, 3584, device=device, dtype=torch.bfloat16) for n in (n_tokens, VOCABULARY["qwen2-vl"]))
    targets = torch.randint(len(weight), (n_tokens,), device=device)
    work = {"the product with the head": lambda: [rows @ weight.T for rows in hidden.split(common.HeadStatistics.ROWS)]}
    work |= {"statistics": lambda: common.HeadStatistics.apply(hidden, weight, targets)}
    print("| what | seconds | peak GB |\n|---|---|---|")
    for what, run in [*work.items()] * 3:  # the first of the three warms up
        with torch.no_grad():
            measured(f"{what}, {n_tokens} tokens", run)


def main() -> None:
    bench = common.parse_flags(__doc__, {"bench": FLAGS})
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", "torch", torch.__version__)
    token_statistics(bench.device, 64 if bench.tiny else 2048)
    with tempfile.TemporaryDirectory() as folder:
        same_statistics(Path(folder), bench.device)
        clip = launched(Path(folder), bench.device)
        for name in [bench.family] if bench.family else list(VOCABULARY)[: 1 if bench.quick else 2]:
            with tempfile.TemporaryDirectory() as work:
                stages(name, Path(work), bench, clip)


if __name__ == "__main__":
    main()
