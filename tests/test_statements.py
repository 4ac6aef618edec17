"""The statement pool, inserting and parsing, and the reverse mapping of wordings to levels."""

import json
from pathlib import Path

import common
import evaluate
import warmup

import numpy as np
import pytest

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


@pytest.mark.parametrize("pool", [common.load_statements(), common.NUMERIC_STATEMENTS], ids=["statements", "numbers"])
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


SPLIT = [  # sentences as they stand in a text, "|" between them
    "So, the answer is B.| I'm unsure about this.",
    "No.| It is dark.",
    "It opens at 9 a.m.| The shop is new.",
    "vitamin C.| It is red.",
    "Made in the U.S.| The flag is blue.",
    "He said “Stop.”| The car stops.",
    'She asked "Why?"| It is red.',
    "Is it so?| Yes!| Good.",
    "It is red.| École is French.",
    "It is red.| Über is big.",
    "It is red.| Şehir is big.",
    "Он стоит.| Кот сидит.",
    "猫は黒い。|犬は白い。",
    "He can't.| The cat sits.",
    "It is the man's.| The cat sits.",
    "The cat is black.\n|the mat is red",
    "It suits me.| It is red.",
    "It is Jan. 5 today.| Go.",
    "It is Prof. Lee.| Go.",
    "We see Mt. Fuji there.| Go.",
    "We go e.g. in May.| Go.",
    "It is 3.5 m long.| Go.",
    "George W. Bush sat.| Go.",
    "J. Smith sat.| Go.",
    "The U.S. Army came.| Go.",
    "He (see Fig. 3) sat.| (It was red.)| Go.",
    "It is approx. five m.",
    "He has a Ph.D. in art.| Go.",
    "Mr. Li has 3.5 apples.| It is No. 5 there.",
    "Tea, coffee, etc. are hot.",
    "The mat is red.| “Go.”| It is.",
    "Ms. Lee sits.| A 5 lbs. bag lies here.| It is red.",
    "The max. speed is 5.| See Figs. 2 and Eq. 3.| He came in.| The dog sat.",
    "The man waits…| The bus comes.",
]


@pytest.mark.parametrize("text", SPLIT)
def test_split_sentences(text):
    whole = text.replace("|", "")
    assert [whole[a:b] for a, b in common.split_sentences(whole)] == [part.strip() for part in text.split("|")]


TIDY = {  # what a model writes -> its sentences
    "1. The cat is black.\n2. The mat is red.": ["The cat is black.", "The mat is red."],
    "1. The cat is black. 2. The mat is red.": ["The cat is black.", "The mat is red."],
    "## Observation\n- a cat\n* **a mat**\n\nAnswer: B": ["a cat.", "a mat.", "Answer: B."],
    "**Step 1:**\nThe cat is *black*.\nThe image shows:\n• a mat\n**Answer:**\nB": ["The cat is black.", "a mat.", "Answer: B."],
    "**Bold.** It is red": ["Bold.", "It is red."],
    "(1) One cat\n(2) Two mats;": ["One cat.", "Two mats."],
    "**The answer is cat**": ["The answer is cat."],
    "A. The cat is red": ["A. The cat is red."],
    "The snake_case name is 2 * 3 * 4.": ["The snake_case name is 2 * 3 * 4."],
    "...\n---\n🙂": [],
    "**1. The cat is black.**\n**2.** The mat is red.": ["The cat is black.", "The mat is red."],
    "1.The cat sits.\nii. The dog runs.\n◦ a mat\n(b) a hat": ["The cat sits.", "The dog runs.", "a mat.", "a hat."],
    "1. The cat is black.\n2.": ["The cat is black."],
    "**Analysis**\nThe cat sits.\n**The man is tall**\n**He is old**": ["The cat sits.", "The man is tall.", "He is old."],
    "#23 is his number.\n# Title\nSeven.": ["#23 is his number.", "Seven."],
    "The final answer is:\n\n**B**": ["The final answer is: B."],
    "So the answer is\n**dog**": ["So the answer is dog."],
    "<answer>\nB\n</answer>": ["<answer> B </answer>."],
}


@pytest.mark.parametrize("text", TIDY)
def test_steps_are_tidy(text):
    steps = common.split_steps(text)
    assert [step.text for step in steps] == TIDY[text]
    for step in steps:
        assert common.tidy([text[step.start : step.end]])[0].rstrip(".") == step.text.rstrip(".")


def test_every_statement_is_found_after_every_kind_of_sentence(reader):
    sentences = [step.text for text in [*TIDY, *(text.replace("|", "") for text in SPLIT)] for step in common.split_steps(text)]
    rng, pool, texts, expected = np.random.default_rng(0), common.load_statements(), [], []
    for i in range(1000):
        chain = [sentences[j] for j in rng.integers(len(sentences), size=3)]
        levels = [i % 5 + 1, *map(int, rng.integers(1, 6, size=2))]
        texts.append(warmup.insert(chain, levels, rng, pool))
        expected.append(list(zip(chain, levels, strict=True)))
    for text, steps, pairs in zip(texts, reader.parse(texts), expected, strict=True):
        assert [(step.text, step.level) for step in steps] == pairs, text


@pytest.mark.parametrize(
    "text",
    [
        "I hope this helps!",
        "The text is unclear.",
        "He wears a helmet, which is certainly for protection.",
        "He is right.",
        "The sky is clear.",
        "The lamp is lit, confirming the count.",
        "Streetlights are on, indicating it is dark.",
        "The man is certainly tall.",
        "Let me know if you need more.",
        "I can see a dog.",
        "Most of it is hidden, the rest is probably a wall.",
        "My answer is dog.",
        "So, my answer is B.",
        "B is correct.",
        "I think B is right.",
        "I guess it's a dog.",
        "His face shows doubt.",
        "I'm sorry, I can't help with that.",
        "Feel free to ask me more questions.",
        "It is a right angle.",
        "Nothing is wrong with the car.",
    ],
)
def test_no_statements(text, reader):
    assert [step.level for step in reader.parse([f"It is red. {text}"])[0]] == [None, None]


def test_what_only_sounds_like_a_statement(reader):
    """The tail of a sentence gives way to the statement behind it, which is in the pool."""
    sentences = ["However, it is unclear.", "Yes, that's correct.", "It is a dog, I think.", "7."]
    pool = common.load_statements()
    for sentence in sentences:
        for statement in (text for texts in pool.values() for text in texts[::5]):
            level = next(level for level, texts in pool.items() if statement in texts)
            if sentence == "7." and statement[0].isupper():
                continue  # "7. I doubt it." is the seventh of a list
            text = warmup.insert([sentence, "It is red."], [level, 3], np.random.default_rng(0), pool | {level: [statement]})
            assert [(s.text, s.level) for s in reader.parse([text])[0]] == [(sentence, level), ("It is red.", 3)], text


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
