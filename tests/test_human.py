"""The blind sheet, and the scores that are read back from it."""

import html
import re

import common

import human
import numpy as np
import pytest
from PIL import Image

HOSTILE = "</p></script><script>alert(1)</script><img src=//x onerror=alert(2)> {{ 7 * 7 }} \"'&amp;"
BY_HAND = {("ours", 1): ("8,6,10", "6,6,10"), ("ours", 2): ("10,8,10", "8,8,10")}  # (system, question): what two raters gave


@pytest.fixture
def sheet(tmp_path):
    """Makes a sheet of two systems, which answered the questions 1, 2, 0 and 1, 2, 3; -> its page and its key."""
    for name, last in (("ours", 0), ("theirs", 3)):
        lines = []
        for i in (1, 2, last):
            Image.new("L", (8, 8), 30 * i).save(tmp_path / f"{i}.png")
            line = {
                "id": i,
                "image": str(tmp_path / f"{i}.png"),
                "question": f"Which, {i}?",
                "choices": ["<b>x", "y"] if i == 1 else None,
            }
            line |= {
                "answer": "GOLD",
                "reference": {"image": ["GOLD."]},
                "response": f"{name[0]} {i * HOSTILE}.",
                "prediction": "it",
            }
            said = {
                "text": "It is.",
                "statement": None if i == 2 else "I doubt it.",
                "level": i + 1,
                "correct": i > 1,
                "part": "image",
            }
            lines.append(line | {"answer_correct": i > 1, "covered": {"image": [i > 1]}, "sentences": [said]})
        (tmp_path / name).mkdir()
        common.write_jsonl(tmp_path / name / "predictions.jsonl", lines)

    def make(*flags, entries=2, out="sheet"):
        folders = [str(tmp_path / "ours"), str(tmp_path / "theirs")]
        human.main(["--human-sheet", *folders, "--entries", str(entries), "--out", str(tmp_path / out), *flags])
        return (tmp_path / out / "sheet.html").read_text(), common.read_json(tmp_path / out / "key.json")

    return make


def change(folder, **fields):
    """Give the first prediction in a folder other fields."""
    first, *rest = common.read_jsonl(folder / "predictions.jsonl")
    common.write_jsonl(folder / "predictions.jsonl", [first | fields, *rest])


def refused(capsys, run, *arguments):
    """The one line on which the program gives up."""
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.strip()


def test_the_page_shows_the_responses_and_nothing_that_tells_whose_they_are_or_how_good(sheet, tmp_path, capsys):
    page, key = sheet()
    shown = [(entry["system"], entry["id"]) for entry in key["entries"].values()]
    assert sorted(shown) == [(name, i) for name in ("ours", "theirs") for i in (1, 2)]
    assert [name for name, _ in shown] not in (["ours"] * 2 + ["theirs"] * 2, ["ours", "theirs"] * 2)
    cards, about, alike = re.findall("<fieldset.*?</fieldset>", page, re.S), [*human.CRITERIA.items()], set()
    for number, ((name, i), card) in enumerate(zip(shown, cards, strict=True), 1):
        texts = [html.unescape(text).strip() for text in re.split("<[^>]*>", card) if text.strip()]
        choices = ["Choices: <b>x · y"] * (i == 1)
        assert texts == [f"Entry {number}", f"Which, {i}?", *choices, f"{name[0]} {i * HOSTILE}.", *sum(about, ())]
        tags = "".join(re.findall("<[^>]*>", card.replace(f'data-entry="{number}"', "")))
        alike.add(re.sub(r'src="data:image/png;base64,[^"]+"|<p></p>', "", tags))  # the picture, the choices
    [tags] = alike  # no class and no title that one entry has and another has not
    fields = [re.search(f'<input type="number" name="{name}" min="1" max="10" ', tags) for name in human.COLUMNS[1:]]
    assert all(fields) and not re.search("src=|href=", tags)
    assert page.count("<script>") == 1
    assert not any(word in page for word in ("GOLD", "ours", "theirs", "✓", "✗", str(tmp_path)))
    assert "ours: sentences whose confidence the text does not say, so that no rater sees it: 1" in capsys.readouterr().out


def test_the_same_command_writes_the_same_bytes_and_no_sheet_replaces_another(sheet, tmp_path, capsys):
    first = sheet()
    assert sheet() == sheet(out="again") == first
    assert {sheet("--seed", seed, entries=1, out=seed)[1]["entries"]["1"]["id"] for seed in "123456"} == {1, 2}
    change(tmp_path / "ours", response="Another.")
    assert "holds another sheet" in refused(capsys, sheet) and (tmp_path / "sheet" / "sheet.html").read_text() == first[0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"id": 9}, "--entries 2, but the folders have 1 questions in common"),
        ({"id": 2}, "predictions.jsonl holds 3 lines and 2 different predictions"),
        ({"reference": {"image": ["It is 4."]}}, "theirs and ours ask other questions under 1 of 2 ids: 1, ..."),
        ({"image": "2.png"}, "theirs and ours ask other questions under 1 of 2 ids: 1, ..."),
        ({"image": "none.png"}, "theirs has no picture for 1 of 2 questions: 1, ..."),
    ],
)
def test_folders_that_do_not_go_together_are_refused(sheet, tmp_path, monkeypatch, capsys, fields, message):
    monkeypatch.chdir(tmp_path)
    change(tmp_path / "theirs", **fields)
    Image.new("L", (8, 8), 200).save(tmp_path / "2.png")
    assert message in refused(capsys, sheet) and not (tmp_path / "sheet").exists()


@pytest.fixture
def score(sheet, tmp_path):
    """Two raters' files, BY_HAND and 3 throughout for the other system, as a spreadsheet saves them, the second one changed."""
    entries = sheet()[1]["entries"]
    for r in (0, 1):
        lines = [f"{number},{BY_HAND.get((e['system'], e['id']), ['3,3,3'] * 2)[r]}\n" for number, e in entries.items()]
        (tmp_path / f"r{r}.csv").write_text("".join(["entry,faithful,concise,granular\n", *reversed(lines)]), "utf-8-sig")

    def run(edit=lambda text: text, raters=("r0.csv", "r1.csv")):
        (tmp_path / "r1.csv").write_text(edit((tmp_path / "r1.csv").read_text("utf-8-sig")))
        human.main(["--human-scores", *(str(tmp_path / name) for name in raters), "--out", str(tmp_path / "sheet")])

    return run


def test_scores_become_means_intervals_and_boxes(score, tmp_path, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(common, "save_figure", lambda *given: kept.append(given))
    score()
    out = capsys.readouterr().out
    # The questions have means 46/6 and 54/6: half their difference, 2/3, is the standard error, and t(.975, 1) = 12.706.
    assert "| Model | Faithful | Concise | Granular | Avg. |" in out and "| ours | 8.00 | 7.00 | 10.00 | 8.33 ± 8.47 |" in out
    assert "2 raters, 4 entries (2 questions, 2 systems)" in out and "| theirs | 3.00 | 3.00 | 3.00 | 3.00 ± 0.00 |" in out
    [(path, figure)] = kept
    means = [[line.get_ydata()[0] for line in axis.lines if line.get_marker() == "^"] for axis in figure.axes]
    assert means == [[8, 3], [7, 3], [10, 3]] and path == tmp_path / "sheet" / "scores.png"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["ours", "theirs"]


def test_kappa_by_hand():
    """(1, 2, 10) and (1, 10, 10) differ by 64/3 on average, all nine pairs by 372/9: 1 - 192/372 = 15/31. Without weights 2/3
    agree, by chance 1/9 + 2/9: 1/2. Who gives one score throughout has none."""
    a, b, constant = [1, 2, 10], [1, 10, 10], [5] * 3
    scores = np.array([[a, a, constant], [b, a, constant], [a, a, constant]]).transpose(0, 2, 1)
    _, _, *pairs, mean = human.kappa_table(["x", "y", "z"], scores).split("\n")
    row = "0.484 (0.500) | 1.000 (1.000) | – (–) |"
    assert pairs == [f"| x, y | {row}", f"| x, z | {row.replace('0.484 (0.500)', '1.000 (1.000)')}", f"| y, z | {row}"]
    assert mean == "| mean | 0.656 (0.667) | 1.000 (1.000) | – (–) |"


@pytest.mark.parametrize(
    "pattern, new, message",
    [
        (r"(?m)^2,.*\n", "", "r1.csv: entry 2 missing"),
        (r"(?m)^2,", "1,", "r1.csv, entry 1: there twice"),
        (r"(?m)^2,", "5,", "r1.csv, entry '5': not in the sheet"),
        (r"(?m)^2,\d+,", "2,7,5,", "r1.csv, entry 2: more cells than columns"),
        (r"(?m)^2,(\d+),\d+", r"2,\1,11", "r1.csv, entry 2, concise: '11' is no whole number from 1 to 10"),
        (r"(?m)^2,\d+", "2,0", "r1.csv, entry 2, faithful: '0' is no whole number from 1 to 10"),
        (r"(?m)^(2.*),\d+$", r"\1,7.5", "r1.csv, entry 2, granular: '7.5' is no whole number from 1 to 10"),
        (r"(?m)^(2.*),\d+$", r"\1", "r1.csv, entry 2, granular: '' is no whole number from 1 to 10"),
        ("concise", "brief", "r1.csv has no column concise"),
    ],
)
def test_a_file_with_something_wrong_is_named_with_the_entry_and_the_column(score, capsys, pattern, new, message):
    assert message in refused(capsys, score, lambda text: re.sub(pattern, new, text))


def test_all_that_is_wrong_with_a_command_is_said_at_once(score, tmp_path, capsys):
    error = refused(capsys, score, lambda text: text.replace("concise", "brief"), ("r1.csv", "none.csv", "r1.csv"))
    assert "a rater's file is given twice; " in error and "no column concise; " in error and "none.csv cannot be read: " in error
    error = refused(capsys, human.main, ["--human-sheet", "a/x", "b/x", "--entries", "0"])
    assert error.endswith("--entries must be positive; two folders have the same name; write NAME=FOLDER")
