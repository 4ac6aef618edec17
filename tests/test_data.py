"""Loaders of published annotation files. MMB_DATA may name the folder with the published ones (default: ../shared/data)."""

import base64
import gc
import io
import json
import os
import time
import weakref
from pathlib import Path

import common
import evaluate
import warmup

import numpy as np
import pytest
from PIL import Image

CHAIN = {"Image_level": ["  A dog lies on\na sofa "], "Reasoning_level": ["Dogs like sofas!", "So, the answer is sleeping"]}


def aokvqa_row(n: int, **changes) -> dict:
    row = {"question_id": f"q{n}", "image_id": n, "question": " What does the dog do? ", "choices": ["eating", "sleeping"],
           "correct_choice_idx": 1, "direct_answers": ["sleep"] * 10, "rationales": ["It lies. Its eyes are shut", "It sleeps."],
           "keys": CHAIN, "keys_filtered": CHAIN}  # fmt: skip
    return {k: v for k, v in (row | changes).items() if v is not ...}


def picture(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(path)


def write(folder, name: str, rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")


def aokvqa(folder, rows, missing=()):
    """A folder with val_mmb.json and the images of all rows that name one."""
    write(folder, "val_mmb.json", rows)
    for n in {r["image_id"] for r in rows if isinstance(r, dict) and isinstance(r.get("image_id"), int)} - set(missing):
        picture(folder / f"val2017/{n:012d}.jpg")
    return folder


def error_of(capsys, *args, **kwargs) -> str:
    """The one line on stderr with which load_data exits."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        common.load_data(*args, **kwargs)
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1
    return lines[0]


def test_aokvqa_record(tmp_path):
    aokvqa(tmp_path, [aokvqa_row(377368)])
    for split in ("test",):
        (record,) = common.load_data("aokvqa", tmp_path, split)
        assert record == {
            "id": "q377368", "image": str(tmp_path / "val2017/000000377368.jpg"), "question": "What does the dog do?",
            "choices": ["eating", "sleeping"], "answer": "sleeping", "answers": ["sleep"] * 10,
            "answer_is_clause": False, "difficult_direct_answer": False,
            "reference": {"image": ["A dog lies on a sofa."], "reasoning": ["Dogs like sofas!", "So, the answer is sleeping."]},
        }  # fmt: skip
    assert common.prompt_text(record).startswith("What does the dog do? Choices: eating, sleeping.")


def test_lists_in_strings_and_choice_of_chain(tmp_path):
    raw = {"Image_level": ["Raw."], "Reasoning_level": ["So, the answer is eating."]}
    rows = [
        aokvqa_row(1, choices="['eating', \"it's asleep\"]", direct_answers='["a", "b"]', keys_filtered=json.dumps(CHAIN)),
        aokvqa_row(2, keys_filtered={k: str(v) for k, v in CHAIN.items()}, keys=raw),
        aokvqa_row(3, keys_filtered=..., keys=raw),
        aokvqa_row(4, keys_filtered=None, keys=raw),
    ]
    first, filtered, *unfiltered = common.load_data("aokvqa", aokvqa(tmp_path, rows), "test")
    assert first["choices"] == ["eating", "it's asleep"] and first["answer"] == "it's asleep" and first["answers"] == ["a", "b"]
    assert first["reference"] == filtered["reference"] and filtered["reference"]["image"] == ["A dog lies on a sofa."]
    assert [r["reference"]["image"] for r in unfiltered] == [["Raw."], ["Raw."]]


FLAWS = {
    "no question": [{"question": " "}, {"question": ...}],
    "no chain": [{"keys": ..., "keys_filtered": ...}],
    "empty chain": [{"keys_filtered": {"Image_level": [], "Reasoning_level": [" "]}}, {"keys_filtered": {}}],
    "no answer": [{"choices": ..., "correct_choice_idx": ..., "keys_filtered": CHAIN | {"Reasoning_level": []}}],
    "malformed": [
        {"question": 3}, {"image_id": ...}, {"image_id": "dog"}, {"correct_choice_idx": 2}, {"correct_choice_idx": -1},
        {"choices": 7}, {"choices": "['a', "}, {"choices": "__import__('os')"}, {"keys_filtered": "no chain"},
        {"keys_filtered": [["x"]]},
        {"keys_filtered": {"Image_level": "x", "Reasoning_level": ["x"]}}, {"keys_filtered": CHAIN | {"Image_level": [3]}},
    ],
}  # fmt: skip


def test_bad_records_are_named_by_reason(tmp_path, capsys):
    changes = [change for kinds in FLAWS.values() for change in kinds]
    rows = [aokvqa_row(n, **change) for n, change in enumerate(changes)]
    rows += [None, "text", *(aokvqa_row(100 + n) for n in range(90)), aokvqa_row(200), aokvqa_row(201)]
    aokvqa(tmp_path, rows, missing=[200])
    (tmp_path / "val2017/000000000201.jpg").write_bytes((tmp_path / "val2017/000000000100.jpg").read_bytes()[:900])  # cut short
    records = common.load_data("aokvqa", tmp_path, "test", allow_bad_records=True)
    assert [r["id"] for r in records] == [f"q{100 + n}" for n in range(90)] and not any("flaw" in r for r in records)
    printed, start = capsys.readouterr().out.splitlines(), 0
    for reason, kinds in FLAWS.items():
        count = len(kinds) + 2 * (reason == "malformed")
        (line,) = [line for line in printed if f"left out: {reason} (" in line]
        assert line.startswith(f"{count} of {len(rows)} records left out") and f"q{start}" in line
        start += len(kinds)
    assert f"2 of {len(rows)} records left out: image missing or unreadable (q200, q201)" in printed
    unchecked = common.load_data("aokvqa", tmp_path, "test", require_images=False, allow_bad_records=True)
    assert [r["id"] for r in unchecked[-2:]] == ["q200", "q201"]


def test_more_than_a_fifth_bad_ends_the_run(tmp_path, capsys):
    rows = [aokvqa_row(n, question="" if n < 2 else "What?") for n in range(10)]
    assert len(common.load_data("aokvqa", aokvqa(tmp_path / "a", rows), "test")) == 8  # exactly a fifth
    rows[2]["question"] = ""
    assert "3 of 10 records cannot be used" in error_of(capsys, "aokvqa", aokvqa(tmp_path / "b", rows), "test")
    assert "3 of 10 records cannot be used" in error_of(capsys, "aokvqa", tmp_path / "b", "test", limit=2)
    assert len(common.load_data("aokvqa", tmp_path / "b", "test", allow_bad_records=True)) == 7
    nothing = aokvqa(tmp_path / "c", [aokvqa_row(1, question="")])
    assert "1 of 1 records" in error_of(capsys, "aokvqa", nothing, "test", allow_bad_records=True)


def test_limit_opens_no_further_image(tmp_path, monkeypatch):
    aokvqa(tmp_path, [aokvqa_row(n, question="" if n == 0 else "What?") for n in range(12)], missing=[2])
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or original(path))
    assert [r["id"] for r in common.load_data("aokvqa", tmp_path, "test", limit=2)] == ["q1", "q3"]
    assert len(opened) == 2  # the first row has no question, the image of the third is missing
    opened.clear()
    assert len(common.load_data("aokvqa", tmp_path, "test", require_images=False)) == 11 and not opened


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)


def alpha(*values) -> Image.Image:
    """Black pixels in a row, as opaque as `values` say."""
    return Image.fromarray(np.array([[(0, 0, 0, value) for value in values]], dtype=np.uint8), "RGBA")


def row(mode: str, *values) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def oriented() -> Image.Image:
    """Red above black, kept turned as a camera does: orientation 6."""
    image = row("RGB", RED, BLACK)
    image.getexif()[0x0112] = 6
    return image


def palette() -> Image.Image:
    image = row("P", 0, 1)
    image.putpalette([*BLACK, *RED])
    return image


PICTURES = {
    "rgba.png": (alpha(0, 255, 51), {}, [WHITE, BLACK, (204,) * 3]), "a.webp": (alpha(0, 255), {"lossless": True}, [WHITE, BLACK]),
    "la.png": (alpha(0, 255).convert("LA"), {}, [WHITE, BLACK]), "la.tif": (alpha(0, 255).convert("LA"), {}, [WHITE, BLACK]),
    "p.png": (palette(), {"transparency": 0}, [WHITE, RED]), "bytes.png": (palette(), {"transparency": b"\x00\xff"}, [WHITE, RED]),
    "p.gif": (palette(), {"transparency": 0}, [WHITE, RED]), "opaque.png": (palette(), {}, [BLACK, RED]),
    "rgb.png": (row("RGB", BLACK, RED), {"transparency": BLACK}, [WHITE, RED]),
    "l.png": (row("L", 0, 100), {"transparency": 0}, [WHITE, (100,) * 3]), "1.png": (row("1", 0, 255), {}, [BLACK, WHITE]),
    "16.png": (Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)), {}, [BLACK, (100,) * 3, WHITE]),
    "16.tif": (Image.fromarray(np.array([[0, 257 * 7, 257]], dtype=np.uint16)), {}, [BLACK, (7,) * 3, (1,) * 3]),
    "f.tif": (Image.fromarray(np.array([[0, 0.6, 1, np.nan]], dtype=np.float32)), {}, [BLACK, (153,) * 3, WHITE, BLACK]),
    "i.tif": (row("I", 0, 51, 255), {}, [BLACK, (51,) * 3, WHITE]), "i32.tif": (row("I", 0, 10**9), {}, [BLACK, WHITE]),
    "cmyk.tif": (row("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), {}, [WHITE, BLACK]), "turned.png": (oriented(), {}, [RED, BLACK]),
    "black.tif": (Image.fromarray(np.zeros((1, 2), dtype=np.float32)), {}, [BLACK, BLACK]),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_seen_as_in_a_viewer(tmp_path, name):
    """On white where transparent, upright, 16 bits scaled to 8: for the model, for CLIP (both ask load_image) and in the report."""
    image, options, expected = PICTURES[name]
    if "turned" in name:
        options = {"exif": image.getexif()}
    image.save(tmp_path / name, **options)
    seen = common.load_image(str(tmp_path / name))
    assert seen.mode == "RGB" and seen.size == ((1, 2) if "turned" in name else (len(expected), 1))
    assert np.asarray(seen).reshape(-1, 3).tolist() == list(map(list, expected))
    shown = Image.open(io.BytesIO(base64.b64decode(evaluate.thumbnail(str(tmp_path / name))["uri"].partition(",")[2])))
    assert np.array_equal(np.asarray(shown), np.asarray(seen))
    record = {"id": "x", "image": name}
    assert common.usable([record], (), False, roots=(tmp_path,)) == [record | {"image": str(tmp_path / name)}]


def test_few_decoded_pictures_are_kept(tmp_path):
    for n in range(80):
        picture(tmp_path / f"{n}.png")
    kept = [weakref.ref(common.load_image(str(tmp_path / f"{n}.png"))) for n in range(80)]
    gc.collect()
    assert 0 < sum(ref() is not None for ref in kept) <= 32


def test_no_file_outside_the_folder_is_opened(tmp_path, monkeypatch, capsys):
    """Neither by "..", nor by an absolute path, nor in a folder whose name begins alike; links that the user set are followed."""
    data, opened, original = tmp_path / "data", [], Image.open
    for path in ("data/in.png", "out.png", "data2/out.png", "beside.png", "elsewhere/linked/a.png"):
        picture(tmp_path / path)
    (data / "linked").symlink_to(tmp_path / "elsewhere" / "linked")
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path)) or original(path))
    monkeypatch.chdir(tmp_path)
    bad = ["../out.png", str(tmp_path / "out.png"), "../data2/out.png", "linked/../../out.png", "sub/../../out.png", "out.png", 7]
    records = [{"id": image, "image": image} for image in [*bad, "in.png", "data/in.png", str(data / "in.png"), "linked/a.png"]]
    used = common.usable(records, (), True, roots=("data",))
    assert [record["image"] for record in used] == ["data/in.png", "data/in.png", str(data / "in.png"), "data/linked/a.png"]
    assert all(path.absolute().is_relative_to(data) and ".." not in path.parts for path in opened)
    printed = capsys.readouterr().out
    assert "5 of 11 records left out: image outside data" in printed and "2 of 11 records left out: image missing" in printed
    chain = CHAIN | {"Reasoning_level": ["The answer is x."]}
    keys = ("in", "../out", str(tmp_path / "out"))
    write(data, "cvqa_mmb.json", [{"id": key, "question": "What?", "keys_filtered": chain} for key in keys])
    assert [record["id"] for record in common.load_data("culturalvqa", data, allow_bad_records=True)] == ["in"]
    assert "2 of 3 records left out: image outside" in capsys.readouterr().out


def test_duplicates_keep_apart(tmp_path):
    rows = [aokvqa_row(1, question="One?"), aokvqa_row(2), aokvqa_row(1, question="Two?"), aokvqa_row(1, question="Three?")]
    records = common.load_data("aokvqa", aokvqa(tmp_path, rows), "test")
    assert [(r["id"], r["question"][:3]) for r in records] == [("q1", "One"), ("q2", "Wha"), ("q1#2", "Two"), ("q1#3", "Thr")]
    assert records[0]["image"] == records[3]["image"]


def test_plain_aokvqa_reasons_with_rationales(tmp_path, capsys):
    write(tmp_path, "aokvqa_v1p0_train.json", [aokvqa_row(5, keys=..., keys_filtered=...)])
    picture(tmp_path / "images/train2017/000000000005.jpg")
    (record,) = common.load_data("aokvqa", tmp_path)
    assert record["reference"] == {"image": [], "reasoning": ["It lies.", "Its eyes are shut.", "It sleeps."]}
    assert record["image"].endswith("000000000005.jpg")
    assert "aokvqa_v1p0_train.json holds no chains: the reference is its rationales" in capsys.readouterr().out
    write(tmp_path / "aokvqa", "train_mmb.json", [aokvqa_row(5)])  # the published chains go first, also in the data set's folder
    assert common.load_data("aokvqa", tmp_path)[0]["reference"]["image"] == ["A dog lies on a sofa."]
    assert "no chains" not in capsys.readouterr().out


def test_scienceqa(tmp_path, capsys):
    row = {"question": "Which?", "choices": ["a magnet", "wood"], "answer": 0, "hint": "See it.", "image": "image.png",
           "lecture": "Iron is drawn.\nWood is not", "solution": "It is drawn. So it is a magnet."}  # fmt: skip
    write(tmp_path, "problems.json", {"1": row, "2": row | {"image": None}, "3": row | {"hint": "", "answer": 1}, "4": row})
    write(tmp_path, "pid_splits.json", {"train": ["1", "2"], "val": ["3"], "test": ["4"]})
    for path in ("train/1", "val/3", "test/4"):
        picture(tmp_path / path / "image.png")
    (record,) = common.load_data("scienceqa", tmp_path, "train")
    assert "1 of 2 questions have no image" in capsys.readouterr().out
    assert (record["id"], record["answer"], record["answers"]) == ("1", "a magnet", ["a magnet"])
    assert record["question"] == "See it. Which?" and record["image"] == str(tmp_path / "train/1/image.png")
    assert record["reference"]["reasoning"] == ["Iron is drawn.", "Wood is not.", "It is drawn.", "So it is a magnet."]
    assert [common.load_data("scienceqa", tmp_path, s)[0]["id"] for s in ("validation", "test")] == ["3", "4"]
    published = {"pid": 3, "question": "Which?", "choices": ["a magnet", "wood"], "answer": 1, "keys_filtered": CHAIN}
    write(tmp_path / "annotated_data/sciencevqa", "val_mmb.json", [published])
    (record,) = common.load_data("scienceqa", tmp_path, "test")
    assert record["id"] == "3" and record["answer"] == "wood" and record["reference"]["reasoning"][0] == "Dogs like sofas!"


def test_culturalvqa(tmp_path):
    forms = ["So, the answer is 'warm'.", "Therefore, the answer is warm", "So the answer is a sponge cake or pound cake.",
             "The answer is: X."]  # fmt: skip
    rows = [{"id": n, "question": "What?", "image_info": "<PIL image>", "general_output": "The answer is cold.", "keys": {},
             "keys_filtered": {"Image_level": ["A dish."], "Reasoning_level": ["It steams.", form]}}
            for n, form in enumerate(forms)]  # fmt: skip
    write(tmp_path, "cvqa_mmb.json", rows)
    for path in ("0.png", "images/1.webp", "2.jpeg", "images/3.jpg"):
        picture(tmp_path / path)
    records = common.load_data("culturalvqa", tmp_path, "test")
    assert [r["answer"] for r in records] == ["warm", "warm", "a sponge cake or pound cake", "X"]
    assert records[2]["answers"] == ["a sponge cake or pound cake", "a sponge cake", "pound cake"] and records[0]["choices"] is None
    assert [os.path.relpath(r["image"], tmp_path) for r in records] == ["0.png", "images/1.webp", "2.jpeg", "images/3.jpg"]


def test_validation_is_a_tenth_of_train(tmp_path):
    """Neither sees a question of the other, nor of test; which are held out does not depend on what else is in the file."""
    for part in ("train", "val"):
        write(tmp_path, f"{part}_mmb.json", [aokvqa_row(n, question_id=f"{part}{n % 400}") for n in range(500)])
    split = lambda name, **kw: [r["id"] for r in common.load_data("aokvqa", tmp_path, name, require_images=False, **kw)]  # noqa: E731
    train, validation, test = split("train"), split("validation"), split("test")
    assert {i[:3] for i in test} == {"val"} and len(test) == 500
    assert {i.partition("#")[0] for i in train}.isdisjoint(i.partition("#")[0] for i in validation)
    assert len(train) + len(validation) == 500 == len(split("all")) and 30 <= len(validation) <= 70
    write(tmp_path, "train_mmb.json", [aokvqa_row(n, question_id=f"train{n}") for n in range(399, 200, -1)])
    assert set(split("validation")) < set(validation) and set(split("train", limit=20)) < set(train)


def test_two_data_sets(tmp_path):
    """The paper trains on both; one folder holds them as the hub does."""
    write(tmp_path / "aokvqa", "train_mmb.json", [aokvqa_row(n) for n in range(4)])
    row = {"question": "Which?", "choices": ["a magnet", "wood"], "answer": 0, "keys_filtered": CHAIN}
    write(tmp_path / "sciencevqa", "train_mmb.json", [row | {"pid": n} for n in range(4)])
    for n in range(4):
        picture(tmp_path / f"aokvqa/train2017/{n:012d}.jpg")
        picture(tmp_path / f"sciencevqa/train/{n}/image.png")
    records = common.load_data("aokvqa+scienceqa", tmp_path, limit=2)
    assert [r["id"] for r in records[:2]] == ["q0", "q1"] and [r["answer"] for r in records[2:]] == ["a magnet"] * 2
    assert all("aokvqa" in r["image"] for r in records[:2]) and all("sciencevqa" in r["image"] for r in records[2:])


def test_wrong_folders_name_the_expected_files(tmp_path, capsys):
    for name, files in {
        "aokvqa": ["val_mmb.json", "aokvqa_v1p0_val.json", "val2017/"], "culturalvqa": ["cvqa_mmb.json", ".webp"],
        "scienceqa": ["val_mmb.json", "problems.json", "pid_splits.json", "val/ID/image.png"],
    }.items():  # fmt: skip
        for folder, problem in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "holds no annotation file")):
            line = error_of(capsys, name, folder, "test")
            assert problem in line and all(file in line for file in files)
    assert "no dev split of 'aokvqa'" in error_of(capsys, "aokvqa", tmp_path, "dev")
    assert "aokvqa, scienceqa, culturalvqa" in error_of(capsys, "okvqa", tmp_path)
    assert "no validation split of 'culturalvqa'" in error_of(capsys, "culturalvqa", tmp_path, "validation")
    write(tmp_path, "problems.json", {})
    assert "pid_splits.json" in error_of(capsys, "scienceqa", tmp_path, "validation")
    for text in ('[{"id": 1,', "3", '"[1"', ""):
        (tmp_path / "cvqa_mmb.json").write_text(text)
        assert "cvqa_mmb.json cannot be read" in error_of(capsys, "culturalvqa", tmp_path)
    write(tmp_path, "val_mmb.json", [aokvqa_row(7)])
    assert "val2017/000000000007.jpg" in error_of(capsys, "aokvqa", tmp_path, "test", allow_bad_records=True)


def test_hub(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def unreachable(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    line = error_of(capsys, "aokvqa", split="test")
    assert common.HUB in line and "download val_mmb.json or aokvqa_v1p0_val.json there or in aokvqa/" in line
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kw: asked.append((args, kw)) or str(tmp_path))
    assert "expected cvqa_mmb.json" in error_of(capsys, "culturalvqa")  # a snapshot of an unknown layout
    aokvqa(tmp_path / "annotated_data/aokvqa", [aokvqa_row(1)])
    assert [r["id"] for r in common.load_data("aokvqa", split="test")] == ["q1"]
    patterns = ["*aokvqa/*", "val_mmb.json", "aokvqa_v1p0_val.json"]
    assert asked[-1] == ((common.HUB,), {"repo_type": "dataset", "allow_patterns": patterns})


@pytest.mark.parametrize("sentence, answer", [
    ("So, the answer is 'warm'.", "warm"), ("Therefore, the answer is warm", "warm"), ("The answer is: X.", "X"),
    ("So the answer is a sponge cake or pound cake.", "a sponge cake or pound cake"), ("**Answer:** 3.5", "3.5"),
    ("Thus, the correct answer would be “hot pot”.", "hot pot"), ("The answer to the question is that it rains.", "it rains"),
    ("The answer is unclear at first, but the answer is red.", "red"), ("So, the best choice is a hand pump.", "a hand pump"),
    ("So, the answer cannot be determined from the image.", None), ("It was answered: yes", None), ("It is red.", None),
    ("The answer is .", None), (r"So, the answer is $\boxed{12}$.", "12"), ("<answer>a red hat</answer>", "a red hat"),
    ("I would go with a hat.", "a hat"), ("The answer is $3.50.", "$3.50"), ("The most appropriate choice is red.", "red"),
    (r"\boxed{\text{red}}", "red"), ("So, pound cake is the correct answer.", "pound cake"), ("**The answer is: *red***", "red"),
])  # fmt: skip
def test_direct_answers(sentence, answer):
    assert common.extract_answer(["It is red.", sentence]) == answer
    assert common.extract_answer([]) is None and common.extract_answer([], ["a"]) is None


CHOICES = ["ice", "ice cream", "snow", "a t-shirt"]


@pytest.mark.parametrize("sentence, answer", [
    ("So, the answer is (B).", "ice cream"), ("The answer is B", "ice cream"), ("The answer is b.", "ice cream"), ("(c)", "snow"),
    ("The answer is C. snow.", "snow"), ("The answer is C) something", "snow"), ("So, option (D) fits best.", "a t-shirt"),
    ("The answer is option A", "ice"), ("The answer is 'Snow'.", "snow"), ("So, the answer is the T-shirt.", "a t-shirt"),
    ("So, it is a cone of ice cream.", "ice cream"), ("Thus, the snow is deep", "snow"), ("The answer is ice, not snow.", "ice"),
    ("So, the answer is either ice or snow.", "either ice or snow"), ("It shows ice and snow.", None), ("The answer is E", "E"),
    (r"$\boxed{B}$", "ice cream"), ("<answer>C</answer>", "snow"), ("Option B is correct.", "ice cream"),
    ("Answer: B.", "ice cream"),
    ("The answer is not snow.", "not snow"), ("The answer is a nice dish.", "a nice dish"), ("A dog and a snowman(s).", None),
])  # fmt: skip
def test_multiple_choice(sentence, answer):
    assert common.extract_answer([sentence], CHOICES) == answer


def test_a_closing_remark_names_no_answer():
    assert common.extract_answer(["So, the answer is snow.", "Let me know if you need more."], CHOICES) == "snow"
    assert common.extract_answer(["So, the answer is a dog.", "I hope this helps!"]) == "a dog"
    for remark in ("Option A is wrong because it is not snow.", "The choice is clear.", "This answer is based on the image."):
        assert common.extract_answer(["So, the answer is B.", remark]) == "B"
        assert common.extract_answer(["So, the answer is B.", remark], CHOICES) == "ice cream"


def test_right_answers():
    cake = {"answer": "a sponge cake or pound cake", "answers": ["a sponge cake or pound cake", "a sponge cake", "pound cake"]}
    right = lambda text, record, last=False: evaluate.is_right(text, {"choices": None} | record, last)  # noqa: E731
    assert [right(text, cake) for text in ("pound cake", "Sponge cake", "cake", None)] == [True, True, False, False]
    assert not right("pound cake", cake | {"choices": ["x"]})  # of a choice there is one
    clause = {"answer": "So, the artwork in the image belongs to India.", "answer_is_clause": True}
    assert [right(text, clause) for text in ("India", "the artwork", "Indi", "", None)] == [True, True, False, False, False]
    assert not any(right(text, clause) for text in ("so", "the", "in the image")) and right(None, clause, last=True)


def test_reading_is_linear(reader):
    reader.levels(["I would not bet on it."])  # the vote is fitted at first use
    began = time.process_time()
    for text in (piece * 9000 for piece in ("the answer to ", "answer is ", "...", "A. ", "a, ", "\n", "(*_", "\n ", "e.g. ")):
        for further in (text, f"{text} a", f"I am sure{text}b"):
            common.extract_answer([further]), common.split_steps(further), reader.parse([further])
    assert time.process_time() - began < 8  # two seconds or so; minutes where it is not linear


def test_choices_that_are_letters_or_empty():
    assert common.extract_answer(["So, the answer is b"], ["s", "", "b", "f"]) == "b"
    assert common.extract_answer(["It's a dog."], ["s", "", "b", "f"]) is None


def test_direct_answer_score():
    answers = ["Hot Dog"] * 2 + ["a sausage"] + ["bun"] * 7
    score, same = evaluate.direct_answer_score, evaluate.same_answer
    assert [score(p, answers) for p in ("hot dog.", "the sausage", "bun", "dog", None)] == [2 / 3, 1 / 3, 1, 0, 0]
    assert score("pound cake", ["a sponge cake or pound cake", "a sponge cake", "pound cake"]) == 1
    assert score("x", []) == 0 and same("a 'hand pump'", "Hand pump.") and not same(None, "x")


DATA = Path(os.environ.get("MMB_DATA", Path(__file__).parents[2] / "shared" / "data"))
published = pytest.mark.skipif(not DATA.is_dir() and "MMB_DATA" not in os.environ, reason="the published files are not here")


@published
def test_published_aokvqa(capsys):
    records = common.load_data("aokvqa", DATA, "test", require_images=False)
    printed = capsys.readouterr().out
    assert len(records) == 1151 and "1 of 1152 records left out: empty chain (WapXzWUgE3zgx5n3fVGUjS)" in printed
    assert len({r["id"] for r in records}) == 1151 and sum("#" in r["id"] for r in records) == 8
    assert sum(r["difficult_direct_answer"] for r in records) == 70 and not any(r["answer_is_clause"] for r in records)
    named = [evaluate.same_answer(common.extract_answer(r["reference"]["reasoning"], r["choices"]), r["answer"]) for r in records]
    assert sum(named) >= 1090  # the others misspell the choice, name none or name a wrong one


@published
def test_published_culturalvqa(capsys):
    records = common.load_data("culturalvqa", DATA, "test", require_images=False)
    assert len(records) == 800 and "left out" not in capsys.readouterr().out
    clauses = [r for r in records if r["answer_is_clause"]]
    assert len(clauses) == 76 and all(r["answer"] == r["reference"]["reasoning"][-1] for r in clauses)


@published
def test_published_sentences_are_no_statements_and_come_back(reader):
    sentences = []
    for name, split in (("aokvqa", "test"), ("culturalvqa", "test")):
        for record in common.load_data(name, DATA, split, require_images=False):
            sentences += common.reference_chain(record)
    sentences = list(dict.fromkeys(sentences))
    parsed = reader.parse([f"It is red. {sentence}" for sentence in sentences])
    assert sum(any(step.level for step in steps) for steps in parsed) <= 0.002 * len(sentences)
    rng, pool, chains = np.random.default_rng(0), common.load_statements(), [sentences[i : i + 5] for i in range(0, 2000, 5)]
    levels = [rng.integers(1, 6, size=5).tolist() for _ in chains]
    texts = [warmup.insert(chain, said, rng, pool) for chain, said in zip(chains, levels, strict=True)]
    back = [([step.text for step in steps], [step.level for step in steps]) for steps in reader.parse(texts)]
    assert back == list(zip(chains, levels, strict=True))
