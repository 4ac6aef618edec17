"""The memory plan against what a model of the same size really holds."""

import common
import estimate

import bench_memory
import pytest
import torch


def test_memory_plan(cache, base, records, model_args):
    """Weights to the byte, activations within 15% of what autograd saves in a real pass of the same size, the sum by hand."""
    folder = estimate.digits_paths(cache, 0, 1.0)["model"]
    vlm = common.load_model(folder, model_args, "cpu", trainable=True)
    batch = common.collate(vlm, records, common.response_ids(vlm, ["The left digit is 3. " * 8] * 12))
    held = {}

    def count(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    embeds = torch.randn(*batch.inputs["input_ids"].shape, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        vlm.model.get_decoder()(inputs_embeds=embeds, attention_mask=batch.inputs["attention_mask"], use_cache=False)
    prompt = embeds.shape[1] - batch.responses.shape[1]
    flags = f"--model {folder} --lora-rank 0 --micro-batch 12 --prompt-tokens {prompt} --batch-size 4 --generate-batch 9"
    flags += f" --max-new-tokens {batch.responses.shape[1]}"
    args = bench_memory.parse_args(flags.split())
    plan = bench_memory.memory_plan(args)
    weights = sum(p.numel() * 4 for p in vlm.model.parameters())
    tower = sum(p.numel() * 4 for p in vlm.base.get_encoder(modality="image").parameters())
    trained = sum(p.numel() * 4 for p in vlm.model.parameters() if p.requires_grad)
    assert plan["weights"] == weights and plan["reference copy"] == weights - tower
    assert plan["gradients"] == trained and plan["optimizer"] == 2 * trained
    assert plan["update: activations"] == pytest.approx(sum(x.nbytes() for x in held.values()), rel=0.15)
    assert plan["sampling: KV cache"] == 2 * 5 * 9 * embeds.shape[1] * 128 * 4  # a layer more: the one that is being copied
    hidden = 2 * 12 * args.max_new_tokens * 128 * 4
    blocks = 5 * 4 * common.HeadStatistics.ROWS * len(vlm.tokenizer)
    assert plan["peak"] == pytest.approx(2 * weights - tower + 3 * trained + hidden + plan["update: activations"] + blocks)
    args.lora_rank = 4
    adapters = bench_memory.memory_plan(args)
    assert adapters["gradients"] == 4 * 4 * 4 * (4 * (128 + 128) + 2 * (128 + 320) + (320 + 128))  # bytes, rank, layers, shapes
    args.lora_targets = "nothing"
    with pytest.raises(SystemExit) as error:
        bench_memory.memory_plan(args)
    assert error.value.code == 2
