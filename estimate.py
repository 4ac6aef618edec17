"""Stages 0 and 1: the model's own reasoning chains, and its internal confidence in every sentence (sec. 3.1.1).

The base model answers each training question at temperature 0.1 (App. B). Each sentence of the answer gets four uncertainties:
length-normalised log-probability (eq. 3), mean token entropy (eq. 4), TokenSAR (eq. 5) and CLIPScore (eq. 6). They are min-max
normalised over the data set, summed with weights (eq. 7), and cut into the levels 5 (sure) to 1 (unsure) at mu - s, mu + s, ...
Writes to --out: responses.jsonl (a question a line, its sentences with uncertainties and levels), confidence.json (all that later
stages need to measure on the same scale), confidence.png.

Choices beyond the paper
 1. A sentence is `correct` when it matches a sentence of the reference chain; only the summary and --levels calibrated see it.
 2. Sampling is seeded batch by batch: an interrupted run, or several processes (`accelerate launch estimate.py`), draw the same.
 3. --annotate (stage 0, App. C and G): an unusable answer goes back once with what is wrong with it, then its question is left
    out; the same command again asks for what was left out.

    python estimate.py                                # the digits world, nothing to download
    python estimate.py --weights 1 1 1 0              # the ablation w/o U_CLIPScore
    python estimate.py --fuse max                     # the ablation w U_Max
    python estimate.py --levels uniform               # uniform intervals (UIC, Table 7)
    python estimate.py --data aokvqa --annotate gpt-4o --out chains    # reference chains (OPENAI_BASE_URL, OPENAI_API_KEY)
    python estimate.py --responses chains.jsonl       # measure given responses (id, image, question, response), no generation
"""

import argparse
import base64
import functools
import importlib.util
import json
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from safetensors.torch import save_file
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

import common
from common import COUNT, ESTIMATORS, FAMILIES, NOT_NEGATIVE, POSITIVE, PUBLISHED, RUN_FLAGS, SWITCH, TEXT, VLM

FLAGS = {
    "data": {
        "data": (("digits", *PUBLISHED), ["digits"], "data sets, one or more; their training splits are answered"),
        "data_dir": (TEXT, None, "folder with the published annotations and the images (default: the Hugging Face hub)"),
        "responses": (TEXT, None, "measure the responses of a .jsonl file (id, image, question, response), generate nothing"),
        "allow_bad_records": (SWITCH, False, "go on when more than a fifth of the records is unusable"),
        "limit": (COUNT, 3000, None, "number of questions"),
        "noise_scale": (POSITIVE, 1.0, "digits: multiplies the noise of every image"),
        "cache": (TEXT, "cache", "where the digits world keeps its models and images"),
    },
    "model": {
        "model": (TEXT, None, "llava-hf/llava-v1.6-vicuna-7b-hf", "vision-language model, hub name or folder"),
        "clip": (TEXT, None, "ViT-L-14-336-quickgelu/openai", "open_clip model NAME/TAG, or folder"),
        "matcher": (TEXT, "exact", common.CROSS_ENCODER, "what tells right sentences: exact, or a cross-encoder model"),
        "similarity": (TEXT, None, "g of TokenSAR: a sentence encoder or cross-encoder (default: all-MiniLM-L6-v2)"),
        "statement_encoder": (TEXT, None, "sentence encoder that maps statements to levels (default: all-MiniLM-L6-v2)"),
        "temperature": (NOT_NEGATIVE, 0.1, "of sampling (App. B)"),
        "max_new_tokens": (COUNT, 64, 256, "longest response"),
        "batch_size": (COUNT, 250, 8, "questions a batch"),
    },
    "confidence": {
        "weights": (replace(NOT_NEGATIVE, nargs=4), [0.25] * 4, "of LNLP, MTE, TokenSAR, CLIP (eq. 7)"),
        "fuse": (("mean", "max"), "mean", "weighted mean (eq. 7) or largest"),
        "normalize": (("minmax", "rank"), "minmax", "each U by minimum and maximum (eq. 7), or by rank, which no outlier squeezes"),
        "levels": (("sigma", "uniform", "calibrated"), "sigma", "cuts: mu and sigma, fifths, or by the share of right sentences"),
        "snowball": (SWITCH, False, "a sentence is at least as uncertain as those before it"),
    },
    "reference chains": {
        "annotate": (TEXT, None, "only write reference chains, with this model at OPENAI_BASE_URL"),
        "concurrency": (COUNT, 8, "requests at the same time"),
        "price": (replace(NOT_NEGATIVE, nargs=2), None, "of a million tokens in and out, to print the cost"),
    },
    "run": {"out": (TEXT, "estimate", "folder to write"), **RUN_FLAGS},
}


def find_problems(args: argparse.Namespace) -> list[str]:
    problems = ["--weights must not be all 0"] * (not any(args.weights))
    problems += ["--levels calibrated needs reference chains, which given responses lack"] * (
        args.levels == "calibrated" and bool(args.responses)
    )
    problems += ["--annotate works in one process"] * bool(args.annotate and os.environ.get("WORLD_SIZE", "1") != "1")
    if args.responses and not Path(args.responses).is_file():
        problems.append(f"no such file: {args.responses}")
    if args.annotate and not importlib.util.find_spec("openai"):
        problems.append("--annotate needs the package openai")
    for name, form in (("OPENAI_BASE_URL", r"https?://[^/\s]\S*"), ("OPENAI_API_KEY", r"[!-~]+")):  # else an error shows the key
        if args.annotate and not re.fullmatch(form, os.environ.get(name, "")):
            problems.append(f"--annotate needs {'an http(s) address' if 'URL' in name else 'a key'} in {name}")
    return problems


parse_args = functools.partial(common.parse_flags, __doc__, FLAGS, check=find_problems)

# ------------------------------------------------------------------------------------------------------- the digits world
# A vision-language model and a CLIP model that never leave the machine, trained on the base pool of scans at first use.

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# What the base model is taught of its own steps. Share of chains that go on from a false digit: what was said is followed, whatever
# the image shows. And results from which on it is taught one too many every other time: its own errors, which rewards can mend.
MISREAD, SHAKY = 0.25, {"sum": 10, "difference": 5}


def build_digits_processor():
    """A LLaVA processor whose tokenizer is trained on every sentence that the world and the statements can hold."""
    chains = [common.digit_chain(family, a, b) for family in FAMILIES for a in range(10) for b in range(10)]
    corpus = [" ".join(chain["image"] + chain["reasoning"]) for chain in chains]
    statements = [text for texts in common.load_statements().values() for text in texts]
    statements += [f"with confidence {level} of {common.N_LEVELS}." for level in range(1, common.N_LEVELS + 1)]
    corpus += [f"The left digit is 3, {text} {text}" for text in statements]
    corpus += [f"USER: {question} ASSISTANT:" for question in FAMILIES.values()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return transformers.LlavaProcessor(images, fast, 8, "full", CHAT_TEMPLATE, num_additional_image_tokens=1)


def build_digits_model(processor, hidden_size: int = 128, layers: int = 4, vocab_size: int | None = None):
    """A LlavaForConditionalGeneration, randomly initialised; about one million parameters as it stands."""
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, hidden_act="gelu", **tower)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 5 * hidden_size // 2, "num_hidden_layers": layers}
    tokens = {"vocab_size": vocab_size or len(processor.tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = transformers.LlamaConfig(num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True, **sizes, **tokens)
    features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": processor.image_token_id}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **features)
    return transformers.LlavaForConditionalGeneration(config)


def build_digits_clip(folder: Path):
    """A tiny open_clip model in a folder from which `open_clip.create_model_and_transforms("local-dir:...")` loads it."""
    vision = {"image_size": 16, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [16, 16]}
    config = {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "open_clip_config.json", config)
    model = open_clip.CLIP(64, vision, text)
    model.token_embedding.requires_grad_(False)  # random vectors tell 60 words apart, and 3M weights need no optimizer
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")


# What open_clip's image tower and transformers' CLIPVisionModel call the same weights.
TOWER_NAMES = {"class_embedding": "embeddings.class_embedding", "positional_embedding": "embeddings.position_embedding.weight"}
TOWER_NAMES |= {"conv1": "embeddings.patch_embedding", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "attn.": "self_attn."}
TOWER_NAMES |= {"transformer.resblocks": "encoder.layers", "ln_": "layer_norm", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def to_llava_vision(visual: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of an open_clip image tower under the names of transformers' CLIPVisionModel."""
    weights = {}
    for name, weight in visual.named_parameters():
        for theirs, ours in TOWER_NAMES.items():
            name = name.replace(theirs, ours)
        parts = zip("qkv", weight.chunk(3), strict=True) if "in_proj" in name else [("", weight)]
        weights |= {name.replace("in_proj_", f"{key}_proj."): part for key, part in parts if name != "proj"}
    return weights


def train_on_digits(
    trained: list, loss_of: Callable, steps: int, batch_size: int, lr: float, seed, noise_scale, desc, clear=0
) -> None:
    """AdamW on fresh questions from the base pool; loss_of(images (16, 16) in [0, 1], records) -> loss.

    The first `clear` steps draw clear images only: learning under full noise hardly starts."""
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng([seed, *desc.encode()])
    bar = tqdm(range(steps), desc=desc, leave=False)
    for step in bar:
        noise = 0.2 if step < clear else None
        questions = [common.draw_digits(rng, "base", noise, noise_scale) for _ in range(batch_size)]
        common.set_learning_rate(optimizer, lr, step, steps, 0.1)
        loss = loss_of(*zip(*questions, strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def train_digits_clip(folder: Path, seed: int, noise_scale: float, steps: tuple[int, int] = (400, 300)) -> None:
    """First the image tower learns to read the digits (the stand-in for large-scale pretraining), then both towers which caption
    (image-level sentence; captions say what is there to see) is true of which image. Many captions of a batch are true of many of
    its images, so that the pairs are judged one by one (the sigmoid loss of SigLIP, Zhai et al. 2023), not by a softmax."""
    torch.manual_seed(seed)
    model, tokenizer = build_digits_clip(folder)
    head = torch.nn.Linear(64, 20)
    scale, bias = torch.nn.Parameter(torch.tensor(10.0)), torch.nn.Parameter(torch.tensor(-5.0))
    tokens = functools.cache(lambda sentence: tokenizer(sentence)[0])

    def encode_images(images: Sequence[np.ndarray]) -> Tensor:
        return model.encode_image(torch.from_numpy(np.stack(images)).float()[:, None].expand(-1, 3, -1, -1) * 2 - 1)

    def reading_loss(images, records) -> Tensor:
        labels = torch.tensor([[int(sentence[-2]) for sentence in record["reference"]["image"]] for record in records])
        return F.cross_entropy(head(encode_images(images)).view(-1, 10), labels.view(-1))

    def pairing_loss(images, records) -> Tensor:
        truths = [record["reference"]["image"] for record in records]
        captions = list(dict.fromkeys(sentence for truth in truths for sentence in truth))
        target = torch.tensor([[float(caption in truth) for caption in captions] for truth in truths])  # (images, captions)
        v = F.normalize(encode_images(images), dim=-1)
        s = F.normalize(model.encode_text(torch.stack([tokens(caption) for caption in captions])), dim=-1)
        return F.binary_cross_entropy_with_logits(scale * v @ s.T + bias, target, reduction="sum") / len(records)

    tower = [*model.visual.parameters(), *head.parameters()]
    train_on_digits(tower, reading_loss, steps[0], 256, 2e-3, seed, noise_scale, "digits vision", clear=steps[0] * 2 // 3)
    both = [scale, bias, *(p for p in model.parameters() if p.requires_grad)]
    train_on_digits(both, pairing_loss, steps[1], 128, 3e-3, seed, noise_scale, "digits CLIP")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def taught_chain(record: dict, tokenizer, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Token ids of a chain that the base model learns from, and the positions of what it reads and does not learn: the image level
    of a chain with a false digit."""
    family = next(name for name, question in FAMILIES.items() if question == record["question"])
    digits = [int(sentence[-2]) for sentence in record["reference"]["image"]]
    false = rng.random() < MISREAD
    if false:
        digits[rng.integers(2)] = int(rng.integers(10))
    result = sum(digits) if family == "sum" else abs(digits[0] - digits[1])
    chain = common.digit_chain(family, *digits, slip=int(result >= SHAKY.get(family, 99) and rng.random() < 0.5))
    image, reasoning = (tokenizer(text)["input_ids"] for text in (" ".join(chain["image"]), " " + " ".join(chain["reasoning"])))
    return [*image, *reasoning, tokenizer.eos_token_id], [*range(len(image) * false)]


def train_digits_model(folder: Path, seed: int, noise_scale: float, steps: int = 500) -> None:
    """Supervised training of projector and language model on the base pool, over the frozen image tower of the CLIP model."""
    torch.manual_seed(seed)
    processor = build_digits_processor()
    model = build_digits_model(processor)
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder.with_name('clip')}")
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)  # transformers 5.0 has a module more
    tower.load_state_dict(to_llava_vision(clip.visual))
    model.model.vision_tower.requires_grad_(False)
    vlm, rng = common.make_vlm(model, processor), np.random.default_rng(seed)

    def loss_of(images, records) -> Tensor:
        ids, read = zip(*(taught_chain(record, processor.tokenizer, rng) for record in records), strict=True)
        records = [record | {"image": common.to_image(image)} for record, image in zip(records, images, strict=True)]
        batch = common.collate(vlm, records, ids)
        for row, positions in enumerate(read):
            batch.mask[row, positions] = False
        return common.sft_loss(vlm, batch)

    trained = [p for p in model.parameters() if p.requires_grad]
    train_on_digits(trained, loss_of, steps, 64, 3e-3, seed, noise_scale, "digits base model", clear=steps // 2)
    common.save_model(vlm, folder)


def digits_paths(cache: str | Path, seed: int, noise_scale: float) -> dict[str, str]:
    """Where the digits world keeps its vision-language model and its CLIP model."""
    return {name: str(Path(cache) / common.WORLD / f"digits-seed{seed}-noise{noise_scale:g}" / name) for name in ("clip", "model")}


def build_digits_world(args: argparse.Namespace, needed: list[str]) -> None:
    """Build and train the world's two models where one of them is `needed` and that has not been done yet."""
    paths = digits_paths(args.cache, args.seed, args.noise_scale)
    for name, train in (("clip", train_digits_clip), ("model", train_digits_model)):
        if set(paths.values()) & set(needed):  # the model is built from the image tower of CLIP
            folder = Path(paths[name])
            if not (folder / "done").exists():
                train(folder, args.seed, args.noise_scale)
                common.write_text(folder / "done", "")


# ---------------------------------------------------------------------------------------------------- internal confidence
def respond(vlm: VLM, records: list[dict], clip, similarity, matcher, args: argparse.Namespace, seed: int) -> list[dict]:
    """Answer a batch of questions and measure every sentence: the lines of responses.jsonl, without `u` and `level`."""

    def sample(prompts: common.Batch) -> list[list[int]]:
        if args.responses:
            return common.response_ids(vlm, [record["response"] for record in records])
        return common.generate(vlm, prompts, args.temperature, args.max_new_tokens, seed)

    responses, steps, raw = common.measure(vlm, records, sample, clip, similarity)
    matched = matcher([[step.text for step in found] for found in steps], list(map(common.reference_chain, records)))
    lines = []
    for row, record in enumerate(records):
        sentences = []
        for step, values, matches in zip(steps[row], raw[row], matched[row], strict=True):
            n_tokens = len(common.step_tokens(responses[row].offsets, step.start, step.end))
            sentence = {"text": step.text, "start": step.start, "end": step.end, "n_tokens": n_tokens}
            sentence |= dict(zip(ESTIMATORS, values.tolist(), strict=True))
            sentences.append(sentence | {"correct": bool(matches.any()) if matches.size else None})
        lines.append(record | {"response": responses[row].text, "sentences": sentences})
        lines[-1]["finished"] = responses[row].ids[-1] in vlm.end_tokens
    return lines


def assign_levels(lines: list[dict], args: argparse.Namespace) -> dict:
    """Fit confidence.json on all sentences and write `u` and `level` into each."""
    sentences = [sentence for line in lines for sentence in line["sentences"]]
    common.usage_error(*["no response holds a sentence"] * (not sentences))
    raw, correct = np.array([[sentence[name] for name in ESTIMATORS] for sentence in sentences]), [s["correct"] for s in sentences]
    ids = np.array([str(line["id"]) for line in lines for _ in line["sentences"]])
    starts = np.cumsum([len(line["sentences"]) for line in lines])[:-1]
    broken = ids[~np.isfinite(raw).all(1)]
    if len(broken):
        common.usage_error(
            f"uncertainties are not finite in {len(broken)} sentences ({', '.join(broken[:3])}): is --dtype wide enough?"
        )
    confidence = fit_confidence(raw, args.weights, args.fuse, args.levels, args.normalize, args.snowball, starts, correct)
    u = common.fuse(raw, confidence, starts)
    for sentence, value, level in zip(sentences, u, common.to_level(u, confidence), strict=True):
        sentence["u"], sentence["level"] = float(value), int(level)
    return confidence


def fit_confidence(raw, weights, fusion="mean", cuts="sigma", normalize="minmax", snowball=False, starts=(), correct=()) -> dict:
    """Minima, maxima, mean, deviation and level edges of all sentences of the estimate run, raw (n, 4) -> confidence.json. starts:
    the rows where further responses begin; correct (n,): which sentences are right."""
    confidence = {"weights": [w / sum(weights) for w in weights], "fuse": fusion, "levels": cuts, "snowball": snowball}
    confidence |= {"min": raw.min(0).tolist(), "max": raw.max(0).tolist()}
    if normalize == "rank":
        confidence["quantiles"] = np.quantile(raw, np.linspace(0, 1, 201), axis=0).T.tolist()
    if len(set(correct)) == 2:  # for comparison only: what the four together tell of the truth, fitted on the training sentences
        logistic = LogisticRegression().fit(common.normalize(raw, confidence), correct)
        confidence["logistic"] = [*logistic.coef_[0].tolist(), float(logistic.intercept_[0])]
    u = common.fuse(raw, confidence, starts)
    mean, std = float(u.mean()), float(u.std())
    sigma = [mean - std, mean + std, mean + 2 * std, mean + 3 * std]  # sec. 3.1.1, "[0, mu - s, mu + s, mu + 2s, mu + 3s, 1]"
    edges = sigma if cuts == "sigma" else [0.2, 0.4, 0.6, 0.8]
    if (
        cuts == "calibrated"
    ):  # where the share of right sentences, falling with U, crosses the middle between two levels' confidences
        grid = np.linspace(0, 1, 10_001)
        share = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(u, correct).predict(grid)
        edges = [float(grid[share >= middle].max(initial=-1)) for middle in (0.875, 0.625, 0.375, 0.125)]
    return confidence | {"mean": mean, "std": std, "edges": edges}


def summarize(lines: list[dict]) -> None:
    """Print how well each uncertainty tells wrong sentences from right ones, and what the levels hold."""
    parts, sentences = [], [sentence for line in lines for sentence in line["sentences"]]
    for line in lines:
        parts += ["image" if i < len(line["reference"]["image"]) else "reasoning" for i in range(len(line["sentences"]))]
    wrong, part = np.array([not sentence["correct"] for sentence in sentences]), np.array(parts)
    known = all(sentence["correct"] is not None for sentence in sentences)
    print(
        f"\n{len(lines)} questions, {len(sentences)} sentences"
        + f", {1 - wrong.mean():.3f} of them match a reference chain" * known
    )
    common.report_unsplit(lines)
    for name in ESTIMATORS:
        values = [sentence[name] for sentence in sentences]
        if max(values) > 100 * np.quantile(values, 0.99):
            print(
                f"  {name}: the largest value is more than 100 x the 99th percentile and squeezes all others; see --normalize rank"
            )
    print("AUROC (wrong against right)      all   image  reasoning" * known)
    for name in (*ESTIMATORS, "u") if known else ():
        values, cells = np.array([sentence[name] for sentence in sentences]), []
        for rows in (part != "", part == "image", part == "reasoning"):
            mixed = 0 < wrong[rows].sum() < rows.sum()
            cells.append(f"{roc_auc_score(wrong[rows], values[rows]):.3f}" if mixed else "  -  ")
        print(f"  {'U_Final' if name == 'u' else name:28s} {'   '.join(cells)}")
    levels = np.array([sentence["level"] for sentence in sentences])
    for level in range(common.N_LEVELS, 0, -1):
        right = f", {1 - wrong[levels == level].mean():.2f} correct" if known and level in levels else ""
        print(f"  level {level}: {(levels == level).mean():6.1%} of the sentences{right}")


def plot_confidence(path: Path, lines: list[dict], confidence: dict) -> None:
    """U_Final of right and wrong sentences with its cuts."""
    sentences = [sentence for line in lines for sentence in line["sentences"]]
    right, wrong = ([sentence["u"] for sentence in sentences if bool(sentence["correct"]) is ok] for ok in (True, False))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.hist([right, wrong], bins=50, stacked=True, color=["#4477aa", "#ee6677"], label=["right", "wrong"])
    for edge in confidence["edges"]:
        axis.axvline(edge, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel="$U_{Final}$ (0 = certain); dashed: cuts between levels 5, 4, 3, 2, 1", ylabel="sentences")
    axis.set(yscale="log", xlim=(0, 1))
    axis.legend()
    common.save_figure(path, figure)


# ------------------------------------------------------------------------------------------------------- reference chains

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

    def __init__(self, args: argparse.Namespace):
        import openai

        self.openai, self.args, self.tally, self.failures = openai, args, Counter(), 0
        http = openai.DefaultHttpxClient(event_hooks={"request": [lambda _: self.tally.update(["requests"])]})  # retries too
        self.client = openai.OpenAI(max_retries=RETRIES, timeout=TIMEOUT, http_client=http)

    def annotate(self, records: list[dict], path: Path) -> None:
        """Append each record's row to `path` as soon as both passes are done, args.concurrency records at a time."""
        pool = ThreadPoolExecutor(self.args.concurrency)
        rows = {pool.submit(self.find_row, record): record["id"] for record in records}
        try:
            for row in tqdm(as_completed(rows), desc="annotate", total=len(rows)):
                try:
                    common.append_jsonl(path, [row.result()])
                except ValueError as error:
                    self.tally[f"left out: {error.args[0]}"] += 1
                    tqdm.write(f"{rows[row]} left out: {error.args[0]}")
        finally:
            self.failures = STOP_AFTER  # what is still at work asks no more
            pool.shutdown(cancel_futures=True)

    def find_row(self, record: dict) -> dict:
        """Both passes of a record -> its row in the published layout."""
        image, answer, given, passes = Path(record["image"]), record["answer"], record["reference"], []
        uri = f"data:{mimetypes.guess_type(image)[0] or 'image/png'};base64,{base64.b64encode(image.read_bytes()).decode()}"
        more = "".join(f"Rationale: {text}\n" for text in given["reasoning"] if not given["image"])  # else it has a chain already
        for task in (ANNOTATE, REFINE):
            text = {"type": "text", "text": ANNOTATION_PROMPT.format_map(record | task | {"more": more})}
            chain = self.ask_chain([{"type": "image_url", "image_url": {"url": uri}}, text], answer)
            passes.append({"Image_level": chain["image"], "Reasoning_level": chain["reasoning"]})
            more = f"Chain: {json.dumps(chain, ensure_ascii=False)}"
        row = {"split": "train", "image_id": int(image.stem) if image.stem.isdecimal() else image.stem, "question_id": record["id"]}
        row |= {name: record[name] for name in ("image", "question", "choices")}
        row["direct_answers"] = record.get("answers") or [answer]
        row["correct_choice_idx"] = record["choices"].index(answer) if answer in (record["choices"] or []) else None
        return row | {"keys": passes[0], "keys_filtered": passes[1]}

    def ask_chain(self, content: list[dict], answer: str) -> dict[str, list[str]]:
        """A chain; one that cannot be used goes back once with what is wrong with it."""
        messages = [{"role": "user", "content": content}]
        reply = self.ask(messages)
        try:
            return parse_chain(reply, answer)
        except ValueError as error:
            problem = {"role": "user", "content": REPAIR.format(": ".join(error.args))}
        return parse_chain(self.ask([*messages, {"role": "assistant", "content": reply}, problem]), answer)

    def ask(self, messages: list[dict]) -> str:
        """A model's answer; ValueError where it refuses or fails, RuntimeError where it fails again and again."""
        if self.failures >= STOP_AFTER:
            raise ValueError("not asked")
        try:
            completion = self.client.chat.completions.create(model=self.args.annotate, messages=messages)
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
    path, annotator = run.out / "annotations.jsonl", Annotator(args)
    rows = {row["question_id"]: row for row in common.read_jsonl(path)}
    common.write_jsonl(path, list(rows.values()))  # without a last line cut short
    try:
        annotator.annotate([record for record in records if record["id"] not in rows], path)
    except RuntimeError as error:  # the endpoint fails again and again
        common.usage_error(str(error))
    finally:
        rows, tally = {row["question_id"]: row for row in common.read_jsonl(path)}, annotator.tally
        done = [rows[record["id"]] for record in records if record["id"] in rows]
        common.write_json(run.out / "train_mmb.json", done)
        if args.price:
            tally["cost"] = round(tally["prompt_tokens"] * args.price[0] + tally["completion_tokens"] * args.price[1]) / 1e6
        common.append_jsonl(run.out / "log.jsonl", [tally])
        print(f"{len(done)} of {len(records)} chains written; this run: {', '.join(f'{k} {v:,}' for k, v in tally.items())}")


# -------------------------------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.data = "+".join(args.data)
    common.fill_defaults(args, FLAGS, args.data)
    world = digits_paths(args.cache, args.seed, args.noise_scale)
    handed_on = ("matcher", "similarity", "statement_encoder", "data", "data_dir", "cache", "noise_scale")
    setup = {name: getattr(args, name) for name in handed_on} | {"world_seed": args.seed}
    setup |= {"model": args.model or world["model"], "clip": args.clip or world["clip"]}
    if args.responses:
        given, needed = common.read_jsonl(args.responses, own=False), ("image", "question", "response")
        roots = (Path(args.responses).parent, args.data_dir or args.cache)
        records = common.usable(given, needed, args.allow_bad_records, args.limit, roots, args.model)
        blank = {"answer": None, "choices": None, "reference": {"image": [], "reasoning": []}}  # they need no reference
        records = [{"id": i} | blank | record for i, record in enumerate(records)]
    else:
        split = "all" if args.annotate and args.data not in common.DIGITS else "train"
        records = common.load_data(args.data, args.data_dir, split, args.limit, True, args.allow_bad_records, setup)
    if args.annotate:
        return annotate(records, args)
    run = common.Run("estimate", args, setup)
    if run.finished:
        return
    if run.accelerator.is_main_process:
        build_digits_world(args, [setup["model"], setup["clip"]])
    run.accelerator.wait_for_everyone()
    similarity = common.Similarity(args.similarity, run.device)
    matcher, clip = common.Matcher(args.matcher, device=run.device), common.ClipScorer(setup["clip"], run.device)
    vlm = common.load_model(setup["model"], args, run.device)

    def answer(batch: list[dict], start: int) -> list[dict]:
        return respond(vlm, batch, clip, similarity, matcher, args, args.seed * 1_000_000 + start)

    right = lambda line: [sentence["correct"] for sentence in line["sentences"]]  # noqa: E731
    lines = common.answer_in_batches(run, records, args.batch_size, "partial.jsonl", answer, right)
    if run.accelerator.is_main_process:
        confidence = assign_levels(lines, args)
        common.write_json(run.out / "confidence.json", confidence)
        summarize(lines)
        plot_confidence(run.out / "confidence.png", lines, confidence)
        common.write_jsonl(run.out / "responses.jsonl", lines)
        (run.out / "partial.jsonl").unlink()
    run.finish()


if __name__ == "__main__":
    common.run_script(main)
