"""The statement pool, inserting and parsing, and the reverse mapping of wordings to levels."""

import json
from pathlib import Path

import numpy as np
import pytest

import common
import evaluate
import warmup

PRINTED = {  # some of Table 4, at least two a level
    1: ["but I can't confirm this.", "This answer is unclear to me.", "I'm unsure about this."],
    2: ["it might not be right.", "though I feel a bit unsure.", "but there's minor hesitation."],
    3: ["I can't be entirely sure.", "though it's open to review.", "but it's not beyond all doubt."],
    4: ["and this seems trustworthy.", "and this is well-reasoned.", "and I trust this is correct."],
    5: ["with no doubts at all.", "and I guarantee this is right.", "with total certainty."],
}
CHAIN = ["The left digit is 3.", "The right digit is 5.", "3 plus 5 is 8.", "So, the answer is 8."]


def test_pool():
    pool = common.load_statements()
    assert list(pool) == [1, 2, 3, 4, 5] and all(len(texts) == 40 for texts in pool.values())
    assert len({text.lower() for texts in pool.values() for text in texts}) == 200
    for level, texts in PRINTED.items():
        assert set(texts) <= set(pool[level])


@pytest.mark.parametrize("pool", [common.load_statements(), warmup.NUMERIC_STATEMENTS], ids=["statements", "numbers"])
@pytest.mark.parametrize("chain", [CHAIN, ["In 1.5 hours, a man, Mr. Li, sat down.", "He said so!", "Is it a U.S. flag?"]])
def test_parse_is_the_inverse_of_insert(pool, chain, reader):
    class First:  # a stand-in for the random generator: always the n-th statement
        def __init__(self, n):
            self.n = n

        def integers(self, size):
            return self.n % size

    for level in range(1, 6):
        for n in range(len(pool[level])):
            levels = [level, 6 - level, level, 3][: len(chain)]
            text = warmup.insert(chain, levels, First(n), pool)
            steps = reader.parse([text])[0]
            assert [s.text for s in steps] == chain and [s.level for s in steps] == levels, text
            for step, sentence in zip(steps, chain, strict=True):
                assert text[step.start : step.end] == sentence.rstrip(".!?")
                assert text[step.end : step.stop].lower().endswith(step.statement.lower())


def test_parse_without_statements(reader):
    text = " ".join(CHAIN)
    assert [s.text for s in reader.parse([text])[0]] == CHAIN and all(s.level is None for s in reader.parse([text])[0])
    assert [s.text for s in common.split_steps(text)] == CHAIN
    assert reader.parse(["", "."]) == [[], []]


def test_plain_chains_have_no_statements(reader):
    for family in common.FAMILIES:
        chains = [digits for a in range(10) for b in range(10) for digits in [common.digit_chain(family, a, b)]]
        texts = [" ".join(chain["image"] + chain["reasoning"]) for chain in chains]
        assert all(len(steps) == 4 and not any(s.level for s in steps) for steps in reader.parse(texts))


def test_parse_other_wordings(reader):
    text = "The man, who wears a hat, is old, and I am completely certain of it. It rains, but that is only a wild guess."
    steps = reader.parse([text])[0]
    assert [s.text for s in steps] == ["The man, who wears a hat, is old.", "It rains."]
    assert steps[0].level == 5 and steps[1].level in (1, 2)


def test_split_sentences():
    text = 'Mr. Li has 3.5 apples. "Is it so?" Yes!  e.g. the U.S. flag\nNew line. and lower case'
    assert [text[a:b] for a, b in common.split_sentences(text)] == [
        "Mr. Li has 3.5 apples.", '"Is it so?"', "Yes!  e.g. the U.S. flag", "New line. and lower case",
    ]  # fmt: skip


def test_fresh_paraphrases(reader):
    """Wordings that the pool was not written or tuned with."""
    held_out = json.loads(Path(__file__).with_name("paraphrases.json").read_text())
    pairs = [(text, int(level)) for level, texts in held_out.items() if level != "none" for text in texts]
    levels = reader.levels([text for text, _ in pairs])
    right = np.mean([a == b for a, (_, b) in zip(levels, pairs, strict=True)])
    error = np.mean([abs(a - b) for a, (_, b) in zip(levels, pairs, strict=True) if a])
    assert right >= 0.8 and error <= 0.25
    assert np.mean([level is None for level in reader.levels(held_out["none"])]) >= 0.9


def test_known_statements_need_no_encoder(monkeypatch):
    monkeypatch.setattr(common, "sentence_encoder", lambda *_: None)
    reader = common.StatementReader()
    for level, texts in common.load_statements().items():
        assert reader.levels([text.upper().rstrip(".") for text in texts]) == [level] * 40
    assert reader.levels(["with confidence 2 of 5."]) == [2]


def test_another_statement_encoder(monkeypatch):
    names, original = [], common.sentence_encoder
    monkeypatch.setattr(common, "sentence_encoder", lambda name, device: names.append(name) or original(None, device))
    reader = common.StatementReader("another/encoder")
    assert reader.levels(["and I would stake my house on it being so."]) == [5] and names == ["another/encoder"]


def test_matching_and_answers():
    matcher = common.Matcher("exact")
    matched, none = matcher([["the left digit is  3", "3 plus 5 is 9."], []], [CHAIN, CHAIN])
    assert matched.tolist() == [[True, False, False, False], [False] * 4]
    assert none.shape == (0, 4)
    assert common.extract_answer(["x", "Therefore, the answer is 'warm'."]) == "warm"
    assert common.extract_answer(["So the answer is a sponge cake."]) == "a sponge cake"
    assert common.extract_answer(["I do not know."]) is None and common.extract_answer([]) is None
    assert evaluate.same_answer("Warm", "warm.") and not evaluate.same_answer(None, "warm")
