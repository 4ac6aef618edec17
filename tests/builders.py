"""Tiny random LLaVA-NeXT, Qwen2-VL, Gemma 3 and SmolVLM models with their real processors, saved to a folder as any model is."""

from pathlib import Path

import common
import estimate

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)  # fmt: skip
from transformers.models.smolvlm import processing_smolvlm

VICUNA = estimate.CHAT_TEMPLATE


def build_digits_world(cache: Path, steps: int = 100) -> dict[str, str]:
    """A digits world in `cache` that trained just long enough to write chains of four sentences -> where its models lie."""
    paths = estimate.digits_paths(cache, 0, 1.0)
    estimate.train_digits_clip(Path(paths["clip"]), 0, 1.0, steps=(20, 20))
    estimate.train_digits_model(Path(paths["model"]), 0, 1.0, steps=steps)
    for path in paths.values():
        Path(path, "done").touch()
    return paths


MISTRAL = (
    "<s>{% for m in messages %}[INST] {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %} [/INST]{% endfor %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<start_of_image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SMOL = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
MLLAMA = (
    "<|begin_of_text|>{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
)


def build_tokenizer(special: list[str], pad: str | None, eos: str, bos: str | None = None, **extra: str) -> PreTrainedTokenizerFast:
    statements = [s for texts in common.load_statements().values() for s in texts]
    corpus = ["What is in the image? The cat sits on the red mat. So, the answer is cat. USER: ASSISTANT: Choices:", *statements]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    if bos:  # as Llama's and Gemma's tokenizers do
        first = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[first])
    names = {"pad_token": pad, "eos_token": eos, "bos_token": bos, "extra_special_tokens": extra}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def llava_next_config(vocab: int, image_token: int, full: bool = False, mistral: bool = False) -> LlavaNextConfig:
    """full: the sizes of llava-v1.6-vicuna-7b / -mistral-7b."""
    kind = MistralConfig if mistral else LlamaConfig
    if full:
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
        )
        sizes = {"intermediate_size": 14336, "num_key_value_heads": 8} if mistral else {"intermediate_size": 11008}
        text = kind(vocab_size=vocab, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **sizes)
        return LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = kind(
        vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    return LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=image_token, image_grid_pinpoints=pinpoints)


def build_llava_next(folder: Path, mistral: bool = False) -> str:
    tokenizer = build_tokenizer(["<pad>", "<s>", "</s>", "<image>"], "<pad>", "</s>")
    config = llava_next_config(len(tokenizer), 3, mistral=mistral)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=config.image_grid_pinpoints
    )
    template = MISTRAL if mistral else VICUNA
    processor = LlavaNextProcessor(images, tokenizer, 14, "default", template, num_additional_image_tokens=1)
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def qwen2_vl_config(ids: dict[str, int], vocab: int, full: bool = False) -> Qwen2VLConfig:
    """full: the sizes of Qwen2-VL-7B."""
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"} | {f"vision_{x}": f"<|vision_{x}|>" for x in ("start", "end")}
    tokens = {f"{name}_token_id": ids[token] for name, token in names.items()}
    if full:
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        text |= {"num_key_value_heads": 4, "vocab_size": 152064, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
        return Qwen2VLConfig(text_config=text, vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 3584}, **tokens)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": vocab}
    text |= {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    text |= {"max_position_embeddings": 1024, "bos_token_id": None, "pad_token_id": 0, "eos_token_id": 2}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)


def build_qwen2_vl(folder: Path) -> str:
    names = "endoftext im_start im_end vision_start vision_end image_pad video_pad"
    special = [f"<|{name}|>" for name in names.split()]
    tokenizer = build_tokenizer(special, "<|endoftext|>", "<|im_end|>")
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 6)
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), QWEN)
    config = qwen2_vl_config({t: i for i, t in enumerate(special)}, len(tokenizer))
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}


def build_gemma3(folder: Path) -> str:
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = build_tokenizer([*special, *images.values()], "<pad>", "<eos>", "<bos>", **images)
    picture = Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = Gemma3Processor(picture, tokenizer, GEMMA, image_seq_length=4)
    text = TEXT | {"vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": 32, "max_position_embeddings": 1024}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    tokens = {"boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7, "eos_token_id": [1, 4]}
    config = Gemma3Config(text_config=text, vision_config=VISION | {"image_size": 56}, mm_tokens_per_image=4, **tokens)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def build_smolvlm(folder: Path) -> str:
    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # a package that only videos need
    special = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    special += [f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)]
    tokenizer = build_tokenizer(special, "<|im_start|>", "<end_of_utterance>", "<|im_start|>")
    picture = SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 28})
    processor = SmolVLMProcessor(picture, tokenizer, SmolVLMVideoProcessor(), image_seq_len=1, chat_template=SMOL)
    text = TEXT | {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    text |= {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 1}
    config = SmolVLMConfig(text_config=text, vision_config=VISION | {"image_size": 28}, scale_factor=2, image_token_id=3)
    torch.manual_seed(0)
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def build_mllama(folder: Path) -> str:
    special = ["<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|image|>"]
    tokenizer = build_tokenizer(special, "<pad>", "<|eot_id|>", "<|begin_of_text|>", image_token="<|image|>")
    processor = MllamaProcessor(MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=2), tokenizer, MLLAMA)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "max_num_tiles": 2, "intermediate_layers_indices": [0], "vision_output_dim": 64}
    text = TEXT | {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "cross_attention_layers": [1], "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 1024, "rope_scaling": {"rope_type": "default"}}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=3))
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_gate", "mlp_gate")):  # 0 at the start: the picture would have no say
            torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


BUILDERS = {"llava-next-vicuna": build_llava_next, "llava-next-mistral": lambda f: build_llava_next(f, mistral=True),
            "qwen2-vl": build_qwen2_vl, "gemma3": build_gemma3, "smolvlm": build_smolvlm}  # fmt: skip
