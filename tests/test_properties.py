"""Properties of what reads text, files and annotations, on generated cases: nothing raises, and nothing is lost in silence.

EXAMPLES=10000 python -m pytest tests/test_properties.py"""

import contextlib
import json
import os
from pathlib import Path

import common
import warmup

import numpy as np
import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

cases = settings(
    max_examples=int(os.environ.get("EXAMPLES", 60)),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Text as models write it: words, stops, marks, statements, and now and then any character at all.
PIECES = "The cat|a red mat|3.5|Dr.|etc.|e.g.|**|*|#|1.|2)|- |(B)|\\boxed{7}|$x$|\n|\n\n|. |! |? |... |, |: |; |“|”|'|…|。|answer: "
PIECES = [
    *PIECES.split("|"),
    "So, the answer is ",
    "I'm quite sure of it.",
    "and I can't confirm this.",
    "<answer>",
    "</answer>",
    " ",
]
PIECES += [texts[0] for texts in common.load_statements().values()]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=25).map("".join)
words = st.sampled_from("cat dog mat lamp tree river stone bread cloud violin harbour seven large green old".split())
sentences = st.lists(words, min_size=2, max_size=9).map(lambda w: f"{' '.join(['The', *w])}.")
chains = st.lists(st.tuples(sentences, st.integers(1, 5)), min_size=1, max_size=6)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=12), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@pytest.fixture(autouse=True, scope="module")
def fitted(reader):
    reader.levels(["I would not bet on it."])  # the vote is fitted at first use, which takes seconds


@cases
@given(texts)
def test_sentences_lie_in_the_text(text):
    end = 0
    for start, stop in common.split_sentences(text):
        assert end <= start < stop <= len(text) and not text[start].isspace() and not text[stop - 1].isspace()
        end = stop


@cases
@given(st.lists(st.tuples(words, st.sampled_from([" ", ", ", ". ", "! ", "? ", "; "])), min_size=1, max_size=30))
def test_no_word_is_lost(parts):
    text = "".join(word + gap for word, gap in parts)
    kept = " ".join(text[start:stop] for start, stop in common.split_sentences(text))
    assert [w.strip(",.!?;") for w in kept.split()] == [word for word, _ in parts]


@cases
@given(texts)
def test_any_text_is_parsed(reader, text):
    for layout in ("each", "after", "once"):
        reader.layout = layout
        for step in reader.parse([text])[0]:
            assert 0 <= step.start <= step.end <= len(text) and step.level in (None, 1, 2, 3, 4, 5)
            assert (step.end if step.said is None else step.said) <= step.stop <= len(text)  # a statement may stand before
    reader.layout = "each"


@cases
@given(chains, st.integers(0, 2**32 - 1), st.sampled_from(["each", "after"]))
def test_what_is_inserted_is_read_back(reader, chain, seed, layout):
    said, levels = zip(*chain, strict=True)
    reader.layout = layout
    steps = reader.parse([warmup.insert(list(said), list(levels), np.random.default_rng(seed), common.load_statements(), layout)])[
        0
    ]
    reader.layout = "each"
    assert [(step.text, step.level) for step in steps] == chain


@cases
@given(st.lists(texts, max_size=4), st.one_of(st.none(), st.lists(texts, max_size=5)))
def test_an_answer_is_text_or_none(chain, choices):
    answer = common.extract_answer(chain, choices)
    assert answer is None or isinstance(answer, str)


@cases
@given(st.binary(max_size=60), st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), max_size=3))
def test_lines_are_read_or_refused(tmp_path, tail, records):
    assume(not common.HALF.search(json.dumps(records, ensure_ascii=False)))  # which no file takes
    path = tmp_path / "lines.jsonl"
    common.write_jsonl(path, records)
    with open(path, "ab") as file:
        file.write(tail)
    with contextlib.suppress(SystemExit):
        read = common.read_jsonl(path)
        assert json.dumps(read[: len(records)]) == json.dumps(records)  # NaN is not equal to itself
        assert all(isinstance(record, dict) for record in read)


FIELDS = (
    "question_id",
    "image_id",
    "question",
    "choices",
    "correct_choice_idx",
    "answer",
    "direct_answers",
    "keys",
    "keys_filtered",
    "hint",
)
SOUND = {"question_id": "q", "image_id": 7, "question": "What?", "choices": ["cat", "dog"], "correct_choice_idx": 0}
SOUND |= {"keys": {"Image_level": ["A cat is there."], "Reasoning_level": ["So, the answer is cat."]}}


@cases
@given(st.lists(st.one_of(values, st.dictionaries(st.sampled_from(FIELDS), values).map(lambda row: SOUND | row)), max_size=4))
def test_rows_are_used_or_counted(tmp_path, capsys, rows):
    Path(tmp_path, "cvqa_mmb.json").write_text(json.dumps([SOUND, *rows]), encoding="utf-8")
    capsys.readouterr()
    records = common.load_data("culturalvqa", tmp_path, "test", require_images=False, allow_bad_records=True)
    left_out = sum(int(line.split(" of ")[0]) for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert len(records) + left_out == 1 + len(rows) and len(records) >= 1
    common.write_jsonl(tmp_path / "records.jsonl", records)
