"""What does PPO need in memory? Nothing is loaded: the model is built on the meta device, and autograd counts what it would keep.

    python tests/bench_memory.py --model llava-hf/llava-v1.6-vicuna-7b-hf --load-in-4bit --dtype bfloat16 --gradient-checkpointing
    python tests/bench_memory.py --measure           # the plan against the peak of a real update, for models of two sizes

Takes the flags of ppo.py that change memory, and those of warmup.py for the adapter, with their defaults for real models.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import estimate
import ppo
import warmup

import numpy as np
import torch
from accelerate import Accelerator
from benchmark import machine, peak_memory
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

LORA = {name: flag for name, flag in warmup.FLAGS["training"].items() if name.startswith("lora_")}
FLAGS = ppo.FLAGS | {
    "adapter": LORA,
    "plan": {
        "model": (common.TEXT, None, "hub name, or folder with a config.json, of the base model to plan for"),
        "prompt_tokens": (common.COUNT, 3072, "longest prompt, image tokens included (LLaVA-NeXT: 2,928 of a square picture)"),
        "measure": (common.SWITCH, False, "compare with the peak of a real update"),
    },
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    needed = lambda args: ["--model or --measure is needed"] * (not args.model and not args.measure)  # noqa: E731
    args = common.parse_flags(__doc__, FLAGS, argv, needed)
    common.fill_defaults(args, FLAGS, "real")
    return args


class AttentionShape(torch.autograd.Function):
    """What a fused attention kernel saves (q, k, v, its output, a log-sum-exp a row), for the meta device, which has none."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def build(args: argparse.Namespace) -> nn.Module:
    """The architecture of args.model on the meta device."""
    with common.loading("model", args.model):
        config = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, args.dtype))


def activations(decoder: nn.Module, rows: int, length: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that autograd saves in a pass of `rows` x `length` tokens."""
    saved = {}

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    embeds = torch.empty(rows, length, width, device="meta", dtype=dtype, requires_grad=True)
    mask = torch.empty(rows, 1, length, length, device="meta", dtype=torch.bool)
    attention = patch.object(nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: AttentionShape.apply(q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), attention:
        decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


def memory_plan(args: argparse.Namespace) -> dict[str, float]:
    """Bytes of what a run on `args.model` holds at its peak. Exits with code 2 where no LoRA target is found."""
    dtype, model = getattr(torch, args.dtype), build(args)
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head] if args.load_in_4bit else []
    packed = {id(w) for w in linear}  # NF4: half a byte, and an 8-bit scale a block of 64 with a float32 scale a 256 of those

    def bytes_of(parameters) -> float:
        return sum(p.numel() * (0.5 + (1 + 4 / 256) / 64 if id(p) in packed else p.element_size()) for p in parameters)

    plan, tower = {"weights": bytes_of(model.parameters())}, bytes_of(model.get_encoder(modality="image").parameters())
    if args.lora_rank:
        model = common.add_lora(model, args)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision" not in name and "visual" not in name)
    trained, text, decoder = [p for p in model.parameters() if p.requires_grad], model.config.get_text_config(), model.get_decoder()
    if args.lora_rank:
        plan["adapters"] = 2 * bytes_of(trained)
    else:
        plan["reference copy"] = plan["weights"] - tower  # which shares the image tower
    plan |= {"gradients": bytes_of(trained), "optimizer": 2 * bytes_of(trained)}
    length, rows, size = args.prompt_tokens + args.max_new_tokens, args.batch_size * args.samples, dtype.itemsize
    plan["rollout's hidden states"] = 2 * rows * args.max_new_tokens * text.hidden_size * 4
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    sampled = min(rows, args.generate_batch)
    sampling = {"KV cache": 2 * (text.num_hidden_layers + 1) * sampled * length * width * size}
    sampling["logits"] = 4 * sampled * text.vocab_size * 4
    # the prompt's way through a layer: gate and up in the model's type, an adapter's input, output and scaled output in float32
    a_token = 2 * size * (text.intermediate_size + text.hidden_size) + 4 * text.hidden_size
    a_token += 4 * (2 * text.intermediate_size + text.hidden_size) if args.lora_rank else 0
    sampling["a layer's activations"] = sampled * args.prompt_tokens * a_token
    update = {"activations": activations(decoder, args.micro_batch, length, text.hidden_size, dtype)}
    if args.gradient_checkpointing:  # the input of every layer, and all of one layer at a time
        inputs = args.micro_batch * length * text.hidden_size * size
        update["activations"] = text.num_hidden_layers * inputs + update["activations"] / text.num_hidden_layers
    update["logits in blocks"] = 5 * 4 * common.HeadStatistics.ROWS * text.vocab_size
    update["a layer unpacked"] = max((w.numel() * size for w in linear), default=0)
    print(f"{sum(p.numel() for p in trained):,} trainable of {sum(p.numel() for p in model.parameters()):,} parameters")
    peak = sum(plan.values()) + max(sum(sampling.values()), sum(update.values()))
    plan |= {f"sampling: {k}": v for k, v in sampling.items()} | {f"update: {k}": v for k, v in update.items()}
    return plan | {"peak": peak}


def measure(hidden_size: int, layers: int, vocab_size: int, micro_batch: int, tokens: int) -> None:
    """An update of full fine-tuning on random responses: planned and measured GB, without what holds the program itself."""
    processor = estimate.build_digits_processor()
    model = estimate.build_digits_model(processor, hidden_size, layers)
    model.resize_token_embeddings(vocab_size)
    model.config.text_config.max_position_embeddings = 4096
    vlm = common.make_vlm(model, processor)
    pixels = [common.draw_digits(np.random.default_rng(i), "base")[0] for i in range(micro_batch)]
    records = [{"image": common.to_image(x), "question": "?", "reference": {"image": [], "reasoning": []}} for x in pixels]
    prompt = common.collate(vlm, records).inputs["input_ids"].shape[1]
    with tempfile.TemporaryDirectory() as folder:
        common.save_model(folder, vlm)
        del model, vlm
        flags = f"--model {folder} --lora-rank 0 --prompt-tokens {prompt} --max-new-tokens {tokens} --epochs 1 --device cpu"
        flags += f" --samples 1 --minibatches 2 --micro-batch {micro_batch} --batch-size {4 * micro_batch} --lr 1e-5"
        args = parse_args(flags.split())
        plan = memory_plan(args)
        shape = (4 * micro_batch, tokens)
        ids = torch.randint(300, 500, shape, generator=torch.Generator().manual_seed(0)).tolist()
        responses = [common.Response(row, "", [(0, 0)] * tokens) for row in ids]
        mask, ones = torch.ones(shape, dtype=torch.bool), torch.ones(shape)

        def update():
            models = ppo.load_models(Path(folder), args, "cpu")
            optimizer = ppo.make_optimizers(models, args)["policy"]
            roll = ppo.Rollout(records * 4, responses, [], mask, ~mask, -ones, ones, torch.zeros(*shape, hidden_size), -ones)
            ppo.update(models, optimizer, roll, torch.randn(shape), args, 0, Accelerator(cpu=True))

        measured = peak_memory(update)
    planned = sum(v for k, v in plan.items() if k != "peak" and not k.startswith("sampling")) / 1e9
    name = f"{hidden_size} wide, {layers} layers, vocabulary {vocab_size:,}, {micro_batch} x {prompt + tokens} tokens"
    print(f"| {name} | {planned:.3f} | {measured:.3f} | {planned / measured:.2f} |", flush=True)


def main() -> None:
    args = parse_args()
    if args.measure:
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # else glibc keeps freed blocks, and the resident set shows its habits
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})
        print(machine(), "\n\n| model | planned GB | measured GB | ratio |\n|---|---|---|---|")
        measure(128, 4, 1000, 128, 300)
        measure(768, 12, 32_000, 8, 400)
        return
    for name, size in memory_plan(args).items():
        print(f"  {name:28s} {size / 1e9:8.3f} GB")


if __name__ == "__main__":
    main()
