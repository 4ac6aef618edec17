"""Self-correction and votes: on responses that are known word for word, and on a model of random weights."""

import random

import common
import estimate

import correct
import pytest
import scripted
import torch

SURE, FAIR, UNSURE = ", and I trust this is correct.", ", it might not be right.", ". I'm unsure about this."  # levels 4, 2, 1
START, END = "The left digit is 3" + SURE, f" 3 plus 6 is 9{SURE} So, the answer is 9{SURE}</s>"
GREEDY = f"{START} The right digit is 6{FAIR}{END}"
RECORD, TOKENIZER = scripted.record(3, 5), scripted.processor().tokenizer


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def tools(reader):
    torch.manual_seed(0)
    model = estimate.build_digits_model(scripted.processor(), hidden_size=32, layers=1)
    return correct.Tools(common.make_vlm(model, scripted.processor()), reader, common.Matcher("exact"), 200)


def play(tools, say, candidates=2, budget=4.0, text=GREEDY):
    """Answer what self-correction asks for by say(until) -> the requests, what it returns, how many tokens were candidates'."""
    job = correct.correct(tools, RECORD, tools.read([RECORD], [ids_of(text)])[0], 3, candidates, budget)
    requests, drawn, new = [], 0, None
    try:
        while True:
            requests.append(job.send(new))
            prefix, room, until = requests[-1]
            new = prefix + ids_of(say(until))[:room]
            drawn += (len(new) - len(prefix)) * (until is not None)
    except StopIteration as end:
        return requests, end.value, drawn


@pytest.mark.parametrize("levels, best", [((FAIR, SURE), 8), ((SURE, UNSURE), 7), ((SURE, SURE), 7), ((FAIR, FAIR), 6)])
def test_the_doubtful_sentence_is_drawn_again_and_the_surest_kept(tools, levels, best):
    said = [f" The right digit is {digit}{level}" for digit, level in zip((7, 8), levels, strict=True)]
    endings = {7: END, 8: f" Well.{END}"}  # of different lengths: one of them counts, or none
    texts = iter([*said, *endings.values()])
    requests, (kept, spent, seen), drawn = play(tools, lambda _: next(texts))
    assert [r[::2] for r in requests] == [(ids_of(START), 1)] * 2 + [(ids_of(START + text), None) for text in said]
    assert kept.ids == ids_of(GREEDY if best == 6 else START + said[best - 7] + endings[best]) and len(seen) == 3
    assert drawn == sum(len(ids_of(text)) for text in said)
    assert spent == len(ids_of(GREEDY)) + drawn + len(ids_of(endings.get(best, "")))


def test_the_same_sentence_with_more_confidence_is_no_correction(tools):
    requests, (kept, spent, seen), drawn = play(tools, lambda _: f" The right digit is 6{SURE}")
    assert len(requests) == 2 and seen == [kept] and kept.ids == ids_of(GREEDY) and spent == len(kept.ids) + drawn


def test_the_budget_holds_whatever_is_said(tools):
    text, sure = GREEDY.replace(SURE, FAIR), f" The right digit is 5{SURE}"
    draw, endings = random.Random(0), [END, " Well.</s>", " The" * 99]
    sentences = [sure, f" The right digit is 8{FAIR}", f" The right digit is 7{UNSURE}", " Well" + ", maybe" * 30]
    for budget in [1.0, 1.3, 2.0, 3.0, 6.0] * 10:
        say = lambda until: draw.choice(endings if until is None else sentences)  # noqa: E731
        _, (kept, spent, seen), drawn = play(tools, say, 3, budget, text)
        assert len(ids_of(text)) + drawn <= spent <= budget * len(ids_of(text)) and tools.ended(kept.ids) and kept in seen
    _, (kept, spent, seen), _ = play(tools, lambda until: sure if until else " and" * 500, 1, 2.0)
    assert seen == [kept] and spent == 2 * len(kept.ids)  # a chain that the budget cuts is not taken, and its tokens count


def test_where_a_sentence_and_its_statement_end(tools):
    whole = [START, "The left digit is 3" + UNSURE, "The left digit is 3. The right digit is 6.", "The left digit</s>"]
    assert [tools.states(ids_of(text), 0) for text in whole] == [True] * 4 and not tools.states(ids_of(START), 1)
    assert not any(tools.states(ids_of(text), 0) for text in ("The left digit is 3,", "The left digit is 3.", START[:-1]))


def test_prefixes_go_on_as_whole_responses_and_rows_stop_by_themselves(tools, monkeypatch):
    records = [scripted.record(3, 5, grey=grey) for grey in (0.1, 0.5, 0.9)]
    whole = common.generate(tools.vlm, common.collate(tools.vlm, records), 0.0, 30, 0)
    prefixes = [ids[:n] for ids, n in zip(whole, (0, 3, 14), strict=True)]
    assert tools.go_on(records, prefixes, [30, 27, 4], [None] * 3, 0) == [whole[0], whole[1], whole[2][:18]]
    free = tools.go_on(records, [[]] * 3, [20] * 3, [0] * 3, 5)
    monkeypatch.setattr(correct.Tools, "states", lambda self, ids, t: len(ids) >= t)
    assert tools.go_on(records, [[]] * 3, [20, 12, 20], [4, 30, 9], 5) == [free[0][:4], free[1][:12], free[2][:9]]


def test_jobs_are_drawn_together(tools, monkeypatch):
    def job(n):
        ids = []
        for _ in range(n):
            ids = yield ids, 9, n
        return (yield ids, 9, None)

    def draw(_, records, prefixes, room, until, seed):
        calls.append((records, until, seed))
        return [ids + [record] for ids, record in zip(prefixes, records, strict=True)]

    calls = []
    monkeypatch.setattr(correct.Tools, "go_on", draw)
    assert correct.run_jobs(tools, [5, 6, 7], [job(n) for n in (2, 0, 1)], 40) == [[5] * 3, [6], [7] * 2]
    assert [(records, *until) for records, until, _ in calls] == [([5, 7], 2, 1), ([6], None), ([5], 2), ([7], None), ([5], None)]
    assert len({seed for _, _, seed in calls}) == len(calls)  # every draw is a new one


def chain(prediction, right, *levels, n=10):
    return {"prediction": prediction, "answer_correct": right, "levels": list(levels), "n_tokens": n}


def test_votes_and_rows_by_hand():
    chains = [chain("9", False, 1, 4), chain("8", True, 5, 3), chain("9.", False, 4, 2), chain("8", True, 5, None)]
    votes = {weight: correct.vote([*chains, chain(None, False, 5)], weight) for weight in correct.WEIGHTS}
    assert votes == {"majority": (False, 2 / 5), "last": (False, 1 / 5), "minimum": (True, 0.5 / 5), "product": (True, 0.5 / 5)}
    first = {"greedy": chain("9", False, 2), "sampled": [chain("9", False, 2), chain("8", True, 5, n=14)]}
    second = {"greedy": chain("4", True, 5, n=20), "sampled": [chain("4", True, 4, n=20), chain("3", False, 4, n=16)]}
    first["corrected"] = [chain("7", False, 5, n=18) | {"ceiling": True}]
    second["corrected"] = [second["greedy"] | {"ceiling": True}]
    rows = {(r["method"], r["setting"], r["weight"]): r for r in correct.make_rows([first, second], [2.0], [1, 2])}
    figures = ("tokens", "times_greedy", "accuracy", "ceiling", "mended", "broken", "selective_50")
    assert [rows["self-correction", 2.0, "last"][name] for name in figures] == [19, 19 / 15, 0.5, 1, 0, 0, 0.5]  # both say 5: a tie
    assert [rows["vote", 2, "majority"][name] for name in figures] == [30, 2, 0.5, 1, 0, 0, 0.5]
    assert [rows["vote", 2, "last"][name] for name in figures] == [30, 2, 1, 1, 1, 0, 1]
    assert [rows["vote", 1, "last"][name] for name in figures] == [15, 1, 0.5, 0.5, 0, 0, 1]


def test_the_script(tools, tmp_path, capsys):
    common.save_model(tmp_path / "model", tools.vlm)
    flags = f"--ckpt {tmp_path}/model --cache {tmp_path} --limit 3 --max-new-tokens 9 --samples 1 2".split()
    for out in ("a", "b"):
        correct.main([*flags, "--out", str(tmp_path / out)])
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"run.json", "done", "correct.json", "chains.jsonl", "correct.png"}
    assert (tmp_path / "a" / "chains.jsonl").read_text() == (tmp_path / "b" / "chains.jsonl").read_text()
    with pytest.raises(SystemExit, match="2"):
        correct.main([*flags, "--correct", "6", "--budget", "0.5"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("--correct must lie between 1 and 5; --budget must be at least 1")
