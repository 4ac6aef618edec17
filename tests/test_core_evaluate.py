"""What the evaluation makes of responses that are known word for word."""

import common
import estimate
import evaluate

import bars
import pytest
import scripted
import torch


@pytest.fixture(scope="module")
def processor():
    return scripted.processor()


def predictions_of(monkeypatch, processor, reader, records, texts):
    """The evaluation's predictions for a model that answers with these texts."""
    policy = scripted.Bigram(processor, {}).vlm(processor)
    scripted.says(monkeypatch, [scripted.tokens(processor, t, end=True) for t in texts])
    return evaluate.predict(policy, reader, common.Matcher("exact"), records, 60, 0)


def greedy(vlm, reader, records, seed):
    return [p["response"] for p in evaluate.predict(vlm, reader, common.Matcher("exact"), records, 6, seed)]


QUESTIONS = [scripted.record(3, 5), scripted.record(4, 2, "larger"), scripted.record(7, 7, "difference")]
SAID = [
    "The left digit is 3, and I trust this is correct. The right digit is 6. I'm unsure about this. 3 plus 6 is 9, with total "
    "certainty. So, the answer is 9.",
    "The right digit is 2, it might not be right. 4 is larger than 2, with no doubts at all. So, the answer is 4, and I guarantee "
    "this is right.",
    "",
]


@pytest.fixture
def predictions(processor, reader, monkeypatch):
    return predictions_of(monkeypatch, processor, reader, QUESTIONS, SAID)


def said(prediction):
    return [(s["text"], s["statement"], s["level"], s["correct"], s["part"]) for s in prediction["sentences"]]


def test_predictions_by_hand(predictions):
    first, second, third = predictions
    assert said(first) == [
        ("The left digit is 3.", "and I trust this is correct.", 4, True, "image"),
        ("The right digit is 6.", "I'm unsure about this.", 1, False, "image"),
        ("3 plus 6 is 9.", "with total certainty.", 5, False, "reasoning"),
        ("So, the answer is 9.", None, None, False, "reasoning"),
    ]
    assert first["covered"] == {"image": [True, False], "reasoning": [False, False]}
    assert said(second) == [
        ("The right digit is 2.", "it might not be right.", 2, True, "image"),
        ("4 is larger than 2.", "with no doubts at all.", 5, True, "image"),  # the second sentence, as the chain has two there
        ("So, the answer is 4.", "and I guarantee this is right.", 5, True, "reasoning"),
    ]
    assert second["covered"] == {"image": [False, True], "reasoning": [True, True]}
    assert third["sentences"] == [] and third["covered"] == {"image": [False, False], "reasoning": [False, False]}
    assert [p["prediction"] for p in predictions] == ["9", "4", None]
    assert [p["answer_correct"] for p in predictions] == [False, True, False]
    assert [p["response"] for p in predictions] == SAID and [p["answer"] for p in predictions] == ["8", "4", "0"]


def test_metrics_by_hand(predictions):
    """Confidence and correctness: .75 1, 0 0, 1 0 (one without) and .25 1, 1 1, 1 1."""
    m = evaluate.compute_metrics(predictions)
    assert m["mece"] == pytest.approx(((0.25 + 0 + 1) / 3 + (0.75 + 0 + 0) / 3) / 2)  # eq. 15 to 17
    assert m["brier"] == pytest.approx((0.0625 + 0 + 1 + 0.5625) / 6)
    assert m["precision"] == pytest.approx(4 / 7) and m["recall"] == pytest.approx(4 / 12)  # eq. 19
    assert m["f1"] == pytest.approx(2 * 4 / (7 + 12))  # eq. 20
    # 4 right, 2 wrong; pairs won: .75 > 0; .25 > 0; 1 > 0 twice; ties 1 = 1 twice: 4 + 2 / 2 of 8
    assert m["auroc_sentence"] == pytest.approx(5 / 8)
    assert m["coverage"] == pytest.approx(6 / 7) and m["accuracy"] == pytest.approx(1 / 3)
    assert m["level_histogram"] == {"1": 1, "2": 1, "3": 0, "4": 1, "5": 3, "none": 1}
    assert m["image"]["precision"] == 3 / 4 and m["reasoning"]["precision"] == 1 / 3
    assert m["image"]["recall"] == 2 / 6 and m["reasoning"]["recall"] == 2 / 6
    assert m["image"]["mece"] == pytest.approx((0.25 / 2 + 0.75 / 2) / 2) and m["reasoning"]["mece"] == 0.5
    assert m["ece"] == 0.0  # one answer has a confidence: 1, and it is right


def test_the_confidence_of_an_answer_is_its_last_sentences(processor, reader, monkeypatch):
    """Answers of confidence .25 (right) and 1 (wrong), after sentences that say the opposite: ECE (.75 + 1) / 2, AUROC 0."""
    texts = [
        "The left digit is 3, with no doubts at all. So, the answer is 8, it might not be right.",
        "The left digit is 3, it might not be right. So, the answer is 4, with no doubts at all.",
    ]
    m = evaluate.compute_metrics(predictions_of(monkeypatch, processor, reader, [scripted.record(3, 5)] * 2, texts))
    assert m["ece"] == pytest.approx(0.875) and m["auroc"] == 0.0 and m["accuracy"] == 0.5
    assert m["auroc_sentence"] == pytest.approx(0.5 / 3)  # right: 1, .25, .25; wrong: 1


def test_answers_are_greedy(processor, reader):
    torch.manual_seed(0)
    vlm = common.make_vlm(estimate.build_digits_model(processor, hidden_size=32, layers=1), processor)
    assert greedy(vlm, reader, [scripted.record(3, 5)] * 2, 1) == greedy(vlm, reader, [scripted.record(3, 5)] * 2, 2)
    [a, b] = greedy(vlm, reader, [scripted.record(3, 5)] * 2, 1)
    assert a == b != ""


def test_the_bars_by_hand():
    """Four sentences of the base model in two responses: AUROC of LNLP and U, MECE and Brier skill of its levels."""
    confidence = {"min": [1, 0, 0, 0], "max": [2, 1, 1, 1], "weights": [0.5, 0.5, 0, 0], "fuse": "mean"}
    confidence |= {"edges": [0.1, 0.3, 0.5, 0.7], "logistic": [-8.0, 0, 0, 0, 4.0]}
    sentence = lambda *values: dict(zip(("lnlp", "mte", "correct", "part"), values, strict=True)) | {"tokensar": 0.5, "clip": 0.5}  # noqa: E731
    first = [sentence(1.0, 0.0, True, "image"), sentence(2.0, 1.0, False, "reasoning")]
    second = [sentence(1.5, 0.1, True, "image"), sentence(1.2, 0.4, False, "image")]
    lines = [{"sentences": sentences} for sentences in (first, second)]
    found = bars.internal_rows(lines, confidence)
    assert found["base rate"] == 0.5
    assert found["base, LNLP"]["auroc"] == 0.75 and found["base, LNLP"]["image"] == 0.5  # 1.0 and 1.5 are right, 1.2 and 2.0 wrong
    assert found["base, U_Final"]["auroc"] == 0.875  # U = 0, 1, .3, .3: a tie counts half
    levels = found["base, levels of U_Final"]  # 5 and 1; 4 and 4
    assert levels["mece"] == pytest.approx(((0 + 0) / 2 + (0.25 + 0.75) / 2) / 2)
    assert levels["brier_skill"] == pytest.approx(1 - (0.25**2 + 0.75**2) / 4 / 0.25)
    # p = sigmoid(4 - 8 (lnlp - 1)) = .98, .02, .5, .92: levels 5, 1, 3, 5
    assert found["base, logistic regression"]["mece"] == pytest.approx(((0 + 0) / 2 + (0.5 + 1) / 2) / 2)
    assert found["base, logistic regression"]["auroc"] == pytest.approx(0.625)
