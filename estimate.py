"""Stage 1: the model's own reasoning chains, and its internal confidence in every sentence (sec. 3.1.1).

The base model answers each training question at temperature 0.1 (App. B). Each sentence of the answer gets four uncertainties:
length-normalised log-probability (eq. 3), mean token entropy (eq. 4), TokenSAR (eq. 5) and 1 - CLIPScore (eq. 6). They are min-max
normalised over the data set, summed with weights (eq. 7), and cut into the levels 5 (sure) to 1 (unsure) at mu - s, mu + s, ...
Writes to --out: responses.jsonl (a question a line, its sentences with uncertainties and levels), confidence.json (all that later
stages need to measure on the same scale), confidence.png.

Choices beyond the paper
 1. A sentence is `correct` when it matches a sentence of the reference chain; no level but those of --levels calibrated sees it.
 2. Sampling is seeded batch by batch: an interrupted run, or several processes (`accelerate launch estimate.py`), draw the same.

    python estimate.py                                # the digits world, nothing to download
    python estimate.py --relevel estimate --weights 1 1 1 0 --out no_clip    # w/o U_CLIPScore, on the responses measured above
    python estimate.py --relevel estimate --levels uniform --out uic         # uniform intervals (UIC, Table 7); --fuse max: w U_Max
    python estimate.py --data aokvqa --server http://localhost:8000    # an inference server samples; --server URL --help
    python estimate.py --data aokvqa --responses chains.jsonl    # measure given responses (id, image, question, response)
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import common
from common import COUNT, ESTIMATORS, FAMILIES, NOT_NEGATIVE, POSITIVE, PUBLISHED, RUN_FLAGS, SWITCH, TEXT, all_sentences

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

FLAGS = {
    "data": {
        "data": (("digits", *PUBLISHED), ["digits"], "data sets, one or more; their training splits are answered"),
        "data_dir": (TEXT, None, "folder with the published annotations and the images (default: the Hugging Face hub)"),
        "responses": (TEXT, None, "measure the responses of a .jsonl file (id, image, question, response) by --model"),
        "allow_bad_records": (SWITCH, False, "go on when more than a fifth of the records is unusable"),
        "limit": (COUNT, 3000, None, "number of questions of each data set; of given responses all"),
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
        "weights": (NOT_NEGATIVE._replace(nargs=4), [0.25] * 4, "of LNLP, MTE, TokenSAR, CLIP (eq. 7)"),
        "fuse": (("mean", "max"), "mean", "weighted mean (eq. 7) or largest"),
        "normalize": (("minmax", "rank"), "minmax", "each U by minimum and maximum (eq. 7), or by rank, which no outlier squeezes"),
        "levels": ("sigma uniform calibrated consistency random".split(), "sigma", "by mu and sigma, fifths, truth, votes, chance"),
        "samples": (COUNT, 10, "responses that --levels consistency samples a question"),
        "relevel": (TEXT, None, "take the measured responses of this estimate folder, with other weights, fusion or levels"),
        "snowball": (SWITCH, False, "a sentence is at least as uncertain as those before it"),
    },
    "run": {"out": (TEXT, "estimate", "folder to write"), **RUN_FLAGS},
}


def find_problems(args: Namespace) -> list:
    given, unknown = args.responses, args.clip and "/" not in args.clip and not Path(args.clip).is_dir()
    measured = [n for n in "limit data_dir model clip matcher similarity statement_encoder".split() if getattr(args, n) is not None]
    return [
        unknown and f"--clip {args.clip} is neither a folder nor NAME/TAG",
        args.relevel and measured and f"--relevel takes what is measured already, whatever --{measured[0].replace('_', '-')} says",
        "digits" in args.data and len(args.data) > 1 and "--data digits goes with no other data",
        not any(args.weights) and "--weights must not be all 0",
        given and args.relevel and "--relevel takes measured responses, --responses measures others",
        given and not Path(given).is_file() and f"no such file: {given}",
    ]


parse_args = functools.partial(common.parse_flags, __doc__, FLAGS, check=find_problems)

# ------------------------------------------------------------------------------------------------------- the digits world
# A vision-language model and a CLIP model that never leave the machine, trained on the base pool of scans at first use.
CHAT_TEMPLATE = """{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>
{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
# What the base model is taught of its own steps. Share of chains that go on from a false digit: what was said is followed, whatever
# the image shows. And results from which on it is taught one too many every other time: its own errors, which rewards can mend.
MISREAD, SHAKY = 0.25, {"sum": 7, "difference": 3}


def build_digits_processor():
    """A LLaVA processor whose tokenizer is trained on every sentence that the world and the statements can hold."""
    chains = [common.digit_chain(family, a, b) for family in FAMILIES for a in range(10) for b in range(10)]
    corpus = [" ".join(chain["image"] + chain["reasoning"]) for chain in chains]
    pools = (common.load_statements(), common.NUMERIC_STATEMENTS)
    corpus += [f"The left digit is 3, {text} {text}" for pool in pools for texts in pool.values() for text in texts]
    corpus += [f"USER: {question} ASSISTANT:" for question in FAMILIES.values()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return transformers.LlavaProcessor(images, fast, 8, "full", CHAT_TEMPLATE, num_additional_image_tokens=1)


def build_digits_model(processor, hidden_size: int = 128, layers: int = 4):
    """A LlavaForConditionalGeneration, randomly initialised; about one million parameters as it stands."""
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, hidden_act="gelu", **tower)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 5 * hidden_size // 2, "num_hidden_layers": layers}
    sizes |= {"vocab_size": len(processor.tokenizer), "pad_token_id": 0}
    text = transformers.LlamaConfig(num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=True, **sizes)
    features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": processor.image_token_id}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **features)
    return transformers.LlavaForConditionalGeneration(config)


def build_digits_clip(folder: Path):
    """A tiny open_clip model in a folder from which `open_clip.create_model_and_transforms("local-dir:...")` loads it."""
    import open_clip  # slow to import

    vision = {"image_size": 16, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [16, 16]}
    config = {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "open_clip_config.json", config)
    model = open_clip.CLIP(64, vision, text)
    model.token_embedding.requires_grad_(False)  # random vectors tell 60 words apart, and 3M weights need no optimizer
    return model, open_clip.get_tokenizer(f"local-dir:{folder}")


def to_llava_vision(visual: nn.Module) -> dict[str, Tensor]:
    """Weights of an open_clip image tower under the names of transformers' CLIPVisionModel."""
    weights, names = {}, {"class_embedding": "embeddings.class_embedding", "conv1": "embeddings.patch_embedding"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    names |= {"attn.": "self_attn.", "transformer.resblocks": "encoder.layers", "ln_": "layer_norm"}
    for name, weight in visual.named_parameters():
        for theirs, ours in (names | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}).items():
            name = name.replace(theirs, ours)
        parts = zip("qkv", weight.chunk(3), strict=True) if "in_proj" in name else [("", weight)]
        weights |= {name.replace("in_proj_", f"{key}_proj."): part for key, part in parts if name != "proj"}
    return weights


def train_on_digits(trained: list, loss_of: Callable, steps: int, size: int, lr: float, seed, noise_scale, desc, clear=0) -> None:
    """AdamW on fresh questions from the base pool; loss_of(images (16, 16) in [0, 1], records) -> loss. The first `clear` steps
    draw clear images only: learning under full noise hardly starts."""
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98))
    rng = np.random.default_rng([seed, *desc.encode()])
    bar = tqdm(range(steps), desc=desc, leave=False)
    for step in bar:
        noise = 0.2 if step < clear else None
        questions = [common.draw_digits(rng, "base", noise, noise_scale) for _ in range(size)]
        common.set_learning_rate(optimizer, lr, step, steps, 0.1)
        loss = loss_of(*zip(*questions, strict=True))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def train_digits_clip(folder: Path, seed: int, noise_scale: float, steps: tuple[int, int] = (400, 300)) -> None:
    """First the image tower learns to read digits (the stand-in for large-scale pretraining), then both towers which image-level
    sentence is true of which image. Many are true of many, so pairs are judged one by one (SigLIP's loss, Zhai et al. 2023)."""
    torch.manual_seed(seed)
    model, tokenizer = build_digits_clip(folder)
    head = nn.Linear(64, 20)
    scale, bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-5.0))

    def encode_images(images: Sequence[np.ndarray]) -> Tensor:
        return model.encode_image(torch.from_numpy(np.stack(images)).float()[:, None].expand(-1, 3, -1, -1) * 2 - 1)

    def reading_loss(images, records) -> Tensor:
        labels = torch.tensor([[int(sentence[-2]) for sentence in record["reference"]["image"]] for record in records])
        return F.cross_entropy(head(encode_images(images)).view(-1, 10), labels.view(-1))

    def pairing_loss(images, records) -> Tensor:
        truths = [record["reference"]["image"] for record in records]
        captions = list(dict.fromkeys(sentence for truth in truths for sentence in truth))
        target = torch.tensor([[float(caption in truth) for caption in captions] for truth in truths])  # (images, captions)
        v = F.normalize(encode_images(images))
        s = F.normalize(model.encode_text(tokenizer(captions)))
        return F.binary_cross_entropy_with_logits(scale * v @ s.T + bias, target, reduction="sum") / len(records)

    tower = [*model.visual.parameters(), *head.parameters()]
    train_on_digits(tower, reading_loss, steps[0], 256, 2e-3, seed, noise_scale, "digits vision", clear=steps[0] * 2 // 3)
    train_on_digits([scale, bias, *common.trainable(model)], pairing_loss, steps[1], 128, 3e-3, seed, noise_scale, "digits CLIP")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def taught_chain(record: dict, tokenizer, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Token ids of a chain to learn from, and the positions that are read only: the image level of a chain with a false digit."""
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
    clip = common.ClipScorer(str(folder.with_name("clip"))).model
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

    train_on_digits(common.trainable(model), loss_of, steps, 64, 3e-3, seed, noise_scale, "digits base model", clear=steps // 2)
    common.save_model(folder, vlm)


def digits_paths(cache: str | Path, seed: int, noise_scale: float) -> dict[str, str]:
    """Where the digits world keeps its vision-language model and its CLIP model."""
    return {name: str(Path(cache) / common.WORLD / f"digits-seed{seed}-noise{noise_scale:g}" / name) for name in ("clip", "model")}


def build_digits_world(args: Namespace, needed: list[str]) -> None:
    """Build and train the world's two models where one of them is `needed` and that has not been done yet."""
    paths = digits_paths(args.cache, args.seed, args.noise_scale)
    for name, train in (("clip", train_digits_clip), ("model", train_digits_model)):
        if set(paths.values()) & set(needed):  # the model is built from the image tower of CLIP
            folder = Path(paths[name])
            with common.lock(folder):
                if not (folder / "done").exists():
                    train(folder, args.seed, args.noise_scale)
                    common.write_text(folder / "done", "")


# ---------------------------------------------------------------------------------------------------- internal confidence
def assign_levels(lines: list[dict], args: Namespace) -> dict:
    """Fit confidence.json on all sentences and write `u` and `level` into each."""
    sentences = all_sentences(lines)
    common.usage_error(not sentences and "no response holds a sentence")
    raw, correct = np.array([[sentence[name] for name in ESTIMATORS] for sentence in sentences]), [s["correct"] for s in sentences]
    ids = np.array([str(line["id"]) for line in lines for _ in line["sentences"]])
    starts = np.cumsum([len(line["sentences"]) for line in lines])[:-1]
    broken = ids[~np.isfinite(raw).all(1)]
    problem = f"uncertainties are not finite in {len(broken)} sentences ({', '.join(broken[:3])}): is --dtype wide enough?"
    common.usage_error(len(broken) and problem)
    confidence = fit_confidence(raw, args.weights, args.fuse, args.levels, args.normalize, args.snowball, starts, correct)
    u = common.fuse(raw, confidence, starts)
    levels = common.to_level(u, confidence)
    if args.levels == "consistency":
        u = 1 - np.array([sentence["consistency"] for sentence in sentences])
        levels = common.to_level(u, common.NEAREST)
    elif args.levels == "random":
        levels = np.random.default_rng(args.seed).integers(1, common.N_LEVELS + 1, len(u))
    for sentence, value, level in zip(sentences, u, levels, strict=True):
        sentence["u"], sentence["level"] = float(value), int(level)
    return confidence


def fit_confidence(raw, weights, fusion="mean", cuts="sigma", normalize="minmax", snowball=False, starts=(), correct=()) -> dict:
    """Minima, maxima, mean, deviation and level edges of all sentences of the estimate run, raw (n, 4) -> confidence.json. starts:
    the rows where further responses begin; correct (n,): which sentences are right."""
    from sklearn import isotonic, linear_model

    confidence = {"weights": [w / sum(weights) for w in weights], "fuse": fusion, "levels": cuts, "snowball": snowball}
    confidence |= {"min": raw.min(0).tolist(), "max": raw.max(0).tolist()}
    if normalize == "rank":
        confidence["quantiles"] = np.quantile(raw, np.linspace(0, 1, 201), axis=0).T.tolist()
    if set(correct) == {True, False}:  # for comparison only: what the four tell of the truth, on the training sentences
        logistic = linear_model.LogisticRegression().fit(common.normalize(raw, confidence), correct)
        confidence["logistic"] = [*logistic.coef_[0], *logistic.intercept_]
    u = common.fuse(raw, confidence, starts)
    mean, std = u.mean(), u.std()
    sigma = [mean - std, mean + std, mean + 2 * std, mean + 3 * std]  # sec. 3.1.1, "[0, mu - s, mu + s, mu + 2s, mu + 3s, 1]"
    edges = [0.2, 0.4, 0.6, 0.8] if cuts == "uniform" else sigma
    if cuts == "calibrated":  # where the share of right sentences, falling with U, crosses the middle between two levels
        grid = np.linspace(0, 1, 10_001)
        share = isotonic.IsotonicRegression(increasing=False, out_of_bounds="clip").fit(u, correct).predict(grid)
        edges = [grid[share >= middle].max(initial=-1) for middle in (0.875, 0.625, 0.375, 0.125)]
    return confidence | {"mean": mean, "std": std, "edges": edges}


def summarize(lines: list[dict]) -> None:
    """Print how well each uncertainty tells wrong sentences from right ones, and what the levels hold."""
    names, sentences = (*ESTIMATORS, "u", "correct", "part", "level"), all_sentences(lines)
    *values, right, part, levels = (np.array([sentence[name] for sentence in sentences]) for name in names)
    known, wrong = None not in right, ~right.astype(bool)
    matching = f", {1 - wrong.mean():.3f} of them match a reference chain" * known
    print(f"\n{len(lines)} questions, {len(sentences)} sentences{matching}")
    for name, u in zip(ESTIMATORS, values, strict=False):
        if u.max() > 100 * np.quantile(u, 0.99):
            print(f"  {name}: the largest is over 100 x the 99th percentile and squeezes all others; see --normalize rank")
    print("AUROC (wrong against right)      all   image  reasoning" * known)
    for name, u in zip((*ESTIMATORS, "U_Final"), values, strict=True) if known else ():
        cells = [common.auroc(u[rows], wrong[rows]) for rows in (part != "", part == "image", part == "reasoning")]
        print(f"  {name:28s} {'   '.join(f'{cell:5.3f}' for cell in cells)}")
    for level in reversed(common.LEVELS):
        right = f", {1 - wrong[levels == level].mean():.2f} correct" if known and level in levels else ""
        print(f"  level {level}: {(levels == level).mean():6.1%} of the sentences{right}")


def plot_confidence(path: Path, lines: list[dict], confidence: dict) -> None:
    """U_Final of right and wrong sentences (or of those of which nobody knows) with its cuts."""
    from matplotlib.figure import Figure

    sentences = all_sentences(lines)
    kinds = {"right": True, "wrong": False, "right or wrong, not known": None}
    values = {name: u for name, kind in kinds.items() if (u := [s["u"] for s in sentences if s["correct"] is kind])}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.hist([*values.values()], bins=50, stacked=True, label=[*values])
    for edge in confidence["edges"]:
        axis.axvline(edge, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel="$U_{Final}$; dashed: cuts between levels 5, 4, 3, 2, 1", ylabel="sentences", yscale="log", xlim=(0, 1))
    axis.legend()
    common.save_figure(path, figure)


def read_questions(args: Namespace) -> tuple[dict, list[dict]]:
    """The setup, which is handed from stage to stage, and the questions to answer, or the lines to give other levels."""
    if args.relevel:
        setup = common.read_run(args.relevel, "responses.jsonl")["setup"]
        common.fill_defaults(args, FLAGS, setup["data"])
        return setup, common.read_finished(args.relevel, "responses.jsonl", "sentences")
    args.data, limit = "+".join(args.data), args.limit
    common.fill_defaults(args, FLAGS, args.data)
    world = digits_paths(args.cache, args.seed, args.noise_scale)
    handed_on = "matcher similarity statement_encoder data data_dir cache noise_scale".split()
    setup = {name: getattr(args, name) for name in handed_on} | {"world_seed": args.seed}
    setup |= {"model": args.model or world["model"], "clip": args.clip or world["clip"]}
    if not args.responses:
        return setup, common.load_data(args.data, args.data_dir, "train", args.limit, True, args.allow_bad_records, setup)
    given, needed = common.read_jsonl(args.responses, own=False), "image question response".split()
    roots = (Path(args.responses).parent, args.data_dir or args.cache)
    blank = {"answer": None, "choices": None, "reference": {"image": [], "reasoning": []}}  # they need no reference
    for record in given:
        parts = record["reference"] = record.get("reference") or blank["reference"]
        lists = [parts.get("image"), parts.get("reasoning"), record.get("choices") or []] if isinstance(parts, dict) else [None]
        sound = all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists)
        record["flaw"] = None if sound else "malformed reference or choices"
    records = common.usable(given, needed, args.allow_bad_records, limit, roots, args.model)
    return setup, [{"id": i} | blank | record for i, record in enumerate(records)]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    setup, records = read_questions(args)
    blind = args.levels == "calibrated" and not all(map(common.reference_chain, records))
    common.usage_error(blind and "--levels calibrated needs reference chains, which some responses lack")
    run = common.Run("estimate", args, setup)
    if run.finished:
        return
    if run.is_main:
        build_digits_world(args, [setup["model"], setup["clip"]])
    run.accelerator.wait_for_everyone()
    if args.statement_encoder:  # only later stages need it
        common.sentence_encoder(args.statement_encoder, run.device)
    if not args.relevel:
        clip, similarity = common.ClipScorer(setup["clip"], run.device), common.Similarity(setup["similarity"], run.device)
    if not args.relevel or args.levels == "consistency":
        matcher, vlm = common.Matcher(setup["matcher"], run.device), common.load_model(setup["model"], args, run.device)

    def answer(batch: list[dict], start: int) -> list[dict]:
        seed = args.seed * 1_000_000 + start

        def sample(prompts: common.Batch) -> list[list[int]]:
            if args.responses:
                return common.response_ids(vlm, [record["response"] for record in batch])
            return common.generate(vlm, prompts, args.temperature, args.max_new_tokens, seed)

        lines = batch if args.relevel else common.measure(vlm, batch, sample, clip, similarity, matcher)
        if args.levels == "consistency":
            chains = [[sentence["text"] for sentence in line["sentences"]] for line in lines]
            shares, _ = common.self_consistency(vlm, batch, chains, matcher, args.samples, args.max_new_tokens, seed)
            for sentence, share in zip(all_sentences(lines), np.concatenate(shares), strict=True):
                sentence["consistency"] = float(share)
        return lines

    lines = common.answer_in_batches(run, records, args.batch_size, "responses.jsonl", answer)
    if run.is_main:
        confidence = assign_levels(lines, args)
        common.write_json(run.out / "confidence.json", confidence)
        summarize(lines)
        plot_confidence(run.out / "confidence.png", lines, confidence)
        common.write_jsonl(run.out / "responses.jsonl", lines)
    run.finish()


if __name__ == "__main__":
    common.run_script(main, "--server")
