"""Estimators, levels, data and token statistics against numbers worked out by hand."""

import math

import common
import estimate

import numpy as np
import pytest
import scripted
import torch
from torch.nn.utils.rnn import pad_sequence


@pytest.fixture(scope="module")
def processor():
    return scripted.processor()


def statistics(policy, processor, records, texts):
    """Log-probabilities and entropies (B, T) of responses, and the mask of their tokens."""
    batch = common.collate(policy, records, [scripted.tokens(processor, t, end=True) for t in texts])
    with torch.no_grad():
        logprob, entropy, _ = common.response_statistics(policy, batch)
    return logprob, entropy, batch.mask


def loss(policy, processor, records, texts):
    return common.sft_loss(policy, common.collate(policy, records, [scripted.tokens(processor, t, end=True) for t in texts]))


def measure(processor, reader, records, texts, logprobs, entropies, cosines, similarities):
    """The four uncertainties of every sentence, one array (sentences, 4) a response.

    logprobs, entropies: of every token; cosines: {(image, sentence): CLIP's}; similarities: {text cut short: that to the whole}."""
    clip = lambda images, sentences: np.array([cosines[pair] for pair in zip(images, sentences, strict=True)])  # noqa: E731
    similarity = lambda pairs: np.array([similarities[cut] for _, cut in pairs], dtype=np.float32)  # noqa: E731
    responses = [common.read_response(processor.tokenizer, scripted.tokens(processor, text, end=True)) for text in texts]
    assert [len(r.ids) for r in responses] == [len(row) for row in logprobs] == [len(row) for row in entropies]
    padded = [pad_sequence([torch.tensor(row) for row in rows], batch_first=True) for rows in (logprobs, entropies)]
    return common.uncertainties(records, responses, reader.parse(texts), *padded, clip, similarity)


# ----------------------------------------------------------------------------------------------------------- estimators

LEAK = -1000.0  # of tokens that are no sentence's: the comma, the statement, the full stop, the end


def test_uncertainties_by_hand(processor, reader):
    """Two responses, three sentences; everything outside a sentence's own words would show."""
    texts = ["The left digit is 3, and I trust this is correct. 3 plus 5 is 8.", "So, the answer is 9, with total certainty."]
    logprobs = [
        [-0.5, -1.0, -1.5, -2.0, -3.0, *[LEAK] * 8, -0.1, -0.2, -0.3, -0.4, -1.5, LEAK, LEAK],
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, *[LEAK] * 6],
    ]
    entropies = [
        [1.0, 2.0, 3.0, 4.0, 0.5, *[LEAK] * 8, 0.25, 0.5, 0.75, 1.0, 2.5, LEAK, LEAK],
        [0.0, 0.0, 0.0, 0.0, 0.0, 3.0, *[LEAK] * 6],
    ]
    words = [
        ["The", " left", " digit", " is", " 3"],
        ["3", " plus", " 5", " is", " 8"],
        ["So", ",", " the", " answer", " is", " 9"],
    ]
    relevance = [  # 1 - g of each token; less than 0 counts as 0
        [0.0, 0.1, 0.0, 0.0, 0.3], [0.2, 0.0, 0.2, 0.0, 0.4], [-0.5, 0.0, 0.0, 0.0, 0.25, 0.25],
    ]  # fmt: skip
    cut = {}
    for sentence, row in zip(words, relevance, strict=True):
        for i, value in enumerate(row):
            cut["What? " + "".join(sentence[:i]) + "".join(sentence[i + 1 :]) + "."] = 1 - value
    cosines = {("a.png", "The left digit is 3."): 0.75, ("a.png", "3 plus 5 is 8."): -0.5, ("b.png", "So, the answer is 9."): 0.0}
    records = [scripted.record(3, 5) | {"image": name} for name in ("a.png", "b.png")]
    first, second = measure(processor, reader, records, texts, logprobs, entropies, cosines, cut)
    assert first.tolist() == [
        pytest.approx([math.exp(8 / 5), 10.5 / 5, 0.25 * 1.0 + 0.75 * 3.0, 0.25], rel=1e-5),  # eq. 3, 4, 5, 6
        pytest.approx([math.exp(2.5 / 5), 1.0, 0.25 * 0.1 + 0.25 * 0.3 + 0.5 * 1.5, 1.0], rel=1e-5),
    ]
    assert second.tolist() == [pytest.approx([math.exp(21 / 6), 0.5, 0.5 * 5 + 0.5 * 6, 1.0], rel=1e-5)]


def confidence(**changed):
    given = {"weights": [0.5, 0.25, 0.25, 0.0], "fuse": "mean", "min": [1.0, 0.0, 2.0, 0.0], "max": [3.0, 4.0, 2.0, 1.0]}
    return given | {"edges": [0.25, 0.5, 0.625, 0.75]} | changed


def test_fusion_by_hand():
    raw = np.array([[2.0, 1.0, 2.0, 0.9], [9.0, 4.0, 9.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    # (2-1)/2 = .5 and 1/4; the third is constant: 0; beyond the range: 1 and 0; a weight of 0 has no say
    assert common.fuse(raw, confidence()).tolist() == [0.5 * 0.5 + 0.25 * 0.25, 0.75, 0.0]
    assert common.fuse(raw, confidence(fuse="max")).tolist() == [0.5, 1.0, 0.0]


def test_levels_by_hand():
    """Up to the first edge 5, above the last 1; an edge belongs to the level above it."""
    levels = common.to_level(np.array([0.0, 0.25, 0.375, 0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8, 1.0]), confidence()).tolist()
    assert levels == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert [common.conf(level) for level in (1, 2, 3, 4, 5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_edges_by_hand():
    """U = 0, 0, 0, 1 of the one estimator that has weight: mean 1/4, deviation sqrt(3)/4; the smallest and largest are kept."""
    raw = np.array([[1.0, 5.0, 0.0, -1.0], [1.0, 5.0, 2.0, 0.0], [1.0, 7.0, 3.0, 0.0], [4.0, 6.0, 1.0, 0.0]])
    fitted = estimate.fit_confidence(raw, [2, 0, 0, 0])
    assert fitted["min"] == [1.0, 5.0, 0.0, -1.0] and fitted["max"] == [4.0, 7.0, 3.0, 0.0] and fitted["weights"] == [1, 0, 0, 0]
    assert fitted["edges"] == pytest.approx([0.25 + k * 3**0.5 / 4 for k in (-1, 1, 2, 3)])
    levels = common.to_level(common.fuse(raw, fitted), fitted).tolist()
    assert levels == [4, 4, 4, 3]  # 1 lies above mu + s = .68 and below mu + 2 s = 1.12


# ------------------------------------------------------------------------------------------------------ token statistics


def test_statistics_by_hand(processor):
    """A policy with known probabilities: each token has that of its own, given the one before; prompt and padding have none."""
    policy = scripted.Bigram(processor, {"The left digit is 3.": 0.75, "The right digit is 5.": 0.25}, end=True).vlm(processor)
    texts, records = ["The left digit is 5.", "The", "The right digit is 5."], [scripted.record(3, 5)] * 3
    logprob, entropy, mask = statistics(policy, processor, records, texts)
    assert mask.sum(1).tolist() == [7, 2, 7]
    a, b = math.log(0.75), math.log(0.25)
    h = -(0.75 * a + 0.25 * b)
    assert logprob.tolist() == [pytest.approx(row, abs=1e-5) for row in (
        [0, a, 0, 0, b, 0, 0], [0, scripted.Bigram.OFF, 0, 0, 0, 0, 0], [0, b, 0, 0, b, 0, 0])]  # fmt: skip
    assert entropy.tolist() == [pytest.approx(row, abs=1e-5) for row in (
        [0, h, 0, 0, h, 0, 0], [0, h, 0, 0, 0, 0, 0], [0, h, 0, 0, h, 0, 0])]  # fmt: skip
    # eq. 9: the mean over the 14 response tokens of two of them
    assert loss(policy, processor, records[:2], texts[::2]).item() == pytest.approx(-(a + 3 * b) / 14, abs=1e-5)


def test_the_image_is_seen(processor):
    """Two questions that differ in their images alone."""
    torch.manual_seed(0)
    model = common.make_vlm(estimate.build_digits_model(processor, hidden_size=32, layers=1), processor)
    records = [scripted.record(3, 5), scripted.record(3, 5, grey=1.0), scripted.record(3, 5)]
    logprob, _, mask = statistics(model, processor, records, ["The left digit is 3."] * 3)
    assert torch.allclose(logprob[0], logprob[2], atol=1e-5) and (logprob[0] - logprob[1]).abs().max() > 1e-3


def test_temperature(processor):
    """After "The", " left" has three times the probability of " right": nine times at temperature 1/2, and at 0 it is certain."""
    policy = estimate.build_digits_model(processor, hidden_size=32, layers=1)
    vlm, records, seen = common.make_vlm(policy, processor), [scripted.record(3, 5)] * 400, {}
    left, right = (scripted.tokens(processor, text)[0] for text in (" left", " right"))

    class Even(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.full((*hidden.shape[:-1], len(processor.tokenizer)), -30.0)
            logits[..., left], logits[..., right] = math.log(3), 0.0
            return logits

    policy.lm_head = Even()
    for temperature in (0.0, 0.5, 1.0, 2.0):
        said = common.generate(vlm, common.collate(vlm, records), temperature, 1, seed=0)
        assert {token for [token] in said} <= {left, right}
        seen[temperature] = np.mean([token == left for [token] in said])
    assert seen[0.0] == 1.0
    for temperature in (0.5, 1.0, 2.0):  # 3^(1/T) to 1
        odds = 3 ** (1 / temperature)
        assert seen[temperature] == pytest.approx(odds / (1 + odds), abs=0.08), temperature


# ------------------------------------------------------------------------------------------------------- data, matching


def halves(pool, n, folder):
    """The scans of n questions of a split, drawn without noise, as bytes."""
    from PIL import Image

    found = set()
    for record in common.digits_data("digits", pool, n, folder, noise_scale=0.0):
        pixels = np.array(Image.open(record["image"]))[4:12, :, 0]
        found |= {pixels[:, :8].tobytes(), pixels[:, 8:].tobytes()}
    return found


def training_halves(n):
    """The same of n questions that the base model is trained on."""
    found, weight = set(), torch.nn.Parameter(torch.zeros(1))

    def loss_of(images, records):
        for image in images:
            pixels = (image[4:12] * 255).round().astype(np.uint8)
            found.update((pixels[:, :8].tobytes(), pixels[:, 8:].tobytes()))
        return weight.sum()

    estimate.train_on_digits([weight], loss_of, n // 50, 50, 1e-3, 0, 0.0, "digits base model")
    return found


def test_questions_keep_to_their_pool_of_scans(tmp_path):
    """No scan of the base model's training or of another split is in a test question."""
    pools = {"base": training_halves(600), **{name: halves(name, 150, tmp_path) for name in ("train", "validation", "test")}}
    assert len(pools["base"]) > 500 and all(len(found) > 150 for found in pools.values())
    for name, found in pools.items():
        for other in pools.keys() - {name}:
            assert not found & pools[other], (name, other)


def test_noise_is_drawn_on_top_of_the_scans():
    """Without noise the left half is the scan of the digit that the chain calls left."""
    by_label = {}
    for scan, label in zip(*common.digit_scans("test"), strict=True):
        by_label.setdefault(int(label), set()).add((scan * 255).round().astype(np.uint8).tobytes())
    for seed in range(20):
        pixels, record = common.draw_digits(np.random.default_rng(seed), "test", noise_scale=0.0)
        for sentence, side in zip(record["reference"]["image"], (slice(0, 8), slice(8, 16)), strict=True):
            assert (pixels[4:12, side] * 255).round().astype(np.uint8).tobytes() in by_label[int(sentence[-2])]
        noisy, _ = common.draw_digits(np.random.default_rng(seed), "test", noise_scale=1.0)
        assert 0.02 < np.abs(noisy - pixels).mean() < 0.5


def test_matching_by_hand():
    """Rows are what was generated, columns the reference."""
    generated, references = [["A b.", "x", "C"], ["y"]], [["c.", "a  B"], ["x", "Y!", "z"]]
    first, second = common.Matcher("exact")(generated, references)
    assert first.tolist() == [[False, True], [False, False], [True, False]] and second.tolist() == [[False, True, False]]


# ------------------------------------------------------------------------------------------- calibrated and snowballing levels


def raw_of(u):
    """Raw uncertainties whose first column alone counts and is already between 0 and 1."""
    return np.array([[value, 0.0, 0.0, 0.0] for value in u])


def test_calibrated_edges_by_hand():
    """Quarters of the sentences are right always, three times in four, once in four, never: cuts fall between the quarters."""
    u, pattern = np.linspace(0, 1, 1000), {0: [1, 1, 1, 1], 1: [1, 1, 0, 1], 2: [0, 0, 1, 0], 3: [0, 0, 0, 0]}
    correct = [bool(pattern[4 * i // 1000][i % 4]) for i in range(1000)]
    confidence = estimate.fit_confidence(raw_of(u), [1, 0, 0, 0], cuts="calibrated", correct=correct)
    assert confidence["edges"] == pytest.approx([0.25, 0.5, 0.5, 0.75], abs=0.004)
    levels = common.to_level(common.fuse(raw_of(u), confidence), confidence)
    assert [levels[i] for i in (100, 400, 600, 900)] == [5, 4, 2, 1]
    never = estimate.fit_confidence(raw_of(u), [1, 0, 0, 0], cuts="calibrated", correct=[False] * 1000)
    assert set(common.to_level(common.fuse(raw_of(u), never), never)) == {1}


def test_snowball_by_hand():
    """A running maximum inside each response, before the cuts; empty responses do no harm."""
    raw = raw_of([0.2, 0.6, 0.1, 0.3, 0.0, 1.0])
    confidence = estimate.fit_confidence(raw, [1, 0, 0, 0], snowball=True, starts=[3, 3, 5])
    expected = [0.2, 0.6, 0.6, 0.3, 0.3, 1.0]
    assert common.fuse(raw, confidence, [3, 3, 5]) == pytest.approx(expected) and confidence["mean"] == pytest.approx(0.5)
    assert common.fuse(raw[3:5], confidence) == pytest.approx([0.3, 0.3])
    assert common.fuse(raw, estimate.fit_confidence(raw, [1, 0, 0, 0])) == pytest.approx(raw[:, 0])


# ------------------------------------------------------------------------------------------------- what the base model is taught


def test_what_follows_a_false_digit_is_taught(processor, monkeypatch):
    """A chain goes on from the digits in its text; the image level of a chain with a false digit is read and not learned."""
    monkeypatch.setattr(estimate, "MISREAD", 0.5)
    rng, false, slips = np.random.default_rng(0), 0, []
    for _ in range(400):
        pixels, record = common.draw_digits(rng, "base")
        ids, read = estimate.taught_chain(record, processor.tokenizer, rng)
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        said = [text[a:b] for a, b in common.split_sentences(text)]
        left, right = int(said[0][-2]), int(said[1][-2])
        family = next(name for name, question in common.FAMILIES.items() if question == record["question"])
        chain = common.digit_chain(family, left, right)
        result = {"sum": left + right, "difference": abs(left - right), "larger": 0}[family]
        if result >= estimate.SHAKY.get(family, 99):
            slips.append(said[2:] != chain["reasoning"])
            assert said[2:] in (chain["reasoning"], common.digit_chain(family, left, right, slip=1)["reasoning"])
        else:
            assert said == chain["image"] + chain["reasoning"]
        false += said[:2] != record["reference"]["image"]
        assert processor.tokenizer.decode([ids[i] for i in read]) in ("", " ".join(said[:2]))
        assert read or said[:2] == record["reference"]["image"]
    assert 140 < false < 220 and 0.4 < np.mean(slips) < 0.6 and len(slips) > 60
