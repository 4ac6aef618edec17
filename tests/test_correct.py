"""Self-correction and votes: on responses that are known word for word, and on a model of random weights."""

import random

import correct
import pytest
import scripted
import torch

import common
import estimate

SURE, FAIR, UNSURE = ", and I trust this is correct.", ", it might not be right.", ". I'm unsure about this."  # levels 4, 2, 1
START, END = "The left digit is 3, and I trust this is correct.", " 3 plus 6 is 9" + SURE + " So, the answer is 9" + SURE
GREEDY = f"{START} The right digit is 6{FAIR}{END}"
MENDED = " 3 plus 5 is 8" + SURE + " So, the answer is 8" + SURE
RECORD = scripted.record(3, 5)


@pytest.fixture(scope="module")
def processor():
    return scripted.processor()


@pytest.fixture(scope="module")
def tools(processor, reader):
    return correct.Tools(scripted.Bigram(processor, {}).vlm(processor), reader, common.Matcher("exact"), 200)


@pytest.fixture(scope="module")
def random_tools(processor, reader):
    torch.manual_seed(0)
    model = estimate.build_digits_model(processor, hidden_size=32, layers=1)
    return correct.Tools(common.make_vlm(model, processor), reader, common.Matcher("exact"), 30)


def play(tools, said, candidates=2, budget=4.0, text=GREEDY, level=3):
    """Answer what self-correction asks for with `said` (texts, or a function of the request) -> requests, what it returns, and how
    many tokens were said for candidates."""
    [greedy] = tools.read([RECORD], [scripted.tokens(tools.vlm.processor, text, end=True)])
    job, requests, drawn, new = correct.correct(tools, RECORD, greedy, level, candidates, budget), [], 0, None
    said = said if callable(said) else lambda *_, texts=iter(said): scripted.tokens(tools.vlm.processor, next(texts))
    try:
        while True:
            requests.append(job.send(new))
            new = requests[-1][0] + list(said(*requests[-1]))[: requests[-1][1]]
            drawn += (len(new) - len(requests[-1][0])) * (requests[-1][2] is not None)
    except StopIteration as end:
        return requests, end.value, drawn


def text_of(tools, ids):
    return common.read_response(tools.vlm.tokenizer, ids).text


def n_tokens(tools, *texts):
    return sum(len(scripted.tokens(tools.vlm.processor, text)) for text in texts)


def test_the_doubtful_sentence_is_drawn_again_behind_the_tokens_before_it(tools):
    end = MENDED + "</s>"
    said = [" The right digit is 5" + SURE, " The right digit is 8" + FAIR, end, end]
    requests, (kept, _, seen), _ = play(tools, said)
    assert [text_of(tools, ids) for ids, _, _ in requests[:2]] == [START] * 2 and [t for _, _, t in requests] == [1, 1, None, None]
    assert kept.ids[: len(requests[0][0])] == requests[0][0] == seen[0].ids[: len(requests[0][0])]
    assert text_of(tools, kept.ids) == f"{START}{said[0]}{MENDED}" and kept.right and not seen[0].right


@pytest.mark.parametrize(
    "levels, winner", [((FAIR, SURE), 1), ((SURE, UNSURE), 0), ((SURE, SURE), 0), ((FAIR, FAIR), None), ((UNSURE, FAIR), None)]
)
def test_the_surest_candidate_wins_and_the_first_of_equals(tools, levels, winner):
    said = [f" The right digit is {digit}{level}" for digit, level in zip((7, 8), levels, strict=True)]
    _, (kept, spent, seen), _ = play(tools, [*said, END + "</s>", END + " Well.</s>"])
    assert [step.text[-2] for step in kept.steps][1] == "6" if winner is None else "78"[winner]
    completion = [] if winner is None else [[END + "</s>"], [END + " Well.</s>"]][winner]
    assert spent == len(seen[0].ids) + n_tokens(tools, *said, *completion) and len(seen) == 3


@pytest.mark.parametrize("budget", [1.0, 1.3, 1.5, 2.0, 3.0, 6.0])
def test_the_budget_holds_and_every_token_counts(tools, budget):
    """Whatever is said, of any length: what was drawn for candidates, and for the one completion that counts, is what was spent."""
    endings = [END + "</s>", MENDED, " The" * 99]
    text, greedy = GREEDY.replace(SURE, FAIR), n_tokens(tools, GREEDY.replace(SURE, FAIR)) + 1
    for seed in range(20):
        draw = random.Random(seed)
        sentences = [f" The right digit is {draw.randrange(9)}{level}" for level in (SURE, FAIR, UNSURE, ", maybe" * 30)]
        say = lambda ids, room, t: scripted.tokens(tools.vlm.processor, draw.choice(endings if t is None else sentences))  # noqa: B023, E731
        requests, (kept, spent, seen), drawn = play(tools, say, 3, budget, text)
        assert greedy + drawn <= spent <= int(budget * greedy) and (requests or budget < 1.3)
        assert tools.ended(kept.ids) and any(chain is kept for chain in seen)


def test_a_chain_that_the_budget_cuts_is_not_taken(tools):
    sure = " The right digit is 5" + SURE
    _, (kept, spent, seen), _ = play(tools, [sure, " and" * 500], 1, 2.0)
    assert kept is seen[0] and len(seen) == 1 and spent == 2 * len(kept.ids)  # its tokens count


def test_where_a_sentence_and_its_statement_end(tools):
    said = {"The left digit is 3,": False, "The left digit is 3.": False, START: True, "The left digit is 3" + UNSURE: True}
    said |= {"The left digit is 3. The right digit is 6.": True, START.rstrip("."): False}  # said nothing of it and went on
    assert {text: tools.states(scripted.tokens(tools.vlm.processor, text), 0) for text in said} == said
    assert not tools.states(scripted.tokens(tools.vlm.processor, START), 1)


def test_prefixes_of_different_lengths_go_on_as_the_whole_response_did(random_tools):
    records = [scripted.record(3, 5, grey=grey) for grey in (0.1, 0.5, 0.9)]
    whole = common.generate(random_tools.vlm, common.collate(random_tools.vlm, records), 0.0, 30, 0)
    prefixes = [ids[:n] for ids, n in zip(whole, (0, 3, 14), strict=True)]
    assert random_tools.go_on(records, prefixes, [30, 27, 4], [None] * 3, 0) == [whole[0], whole[1], whole[2][:18]]


def test_rows_stop_by_themselves_and_padding_is_no_token(random_tools, monkeypatch):
    records, ends = [scripted.record(3, 5)] * 3, {0: 4, 1: 30, 2: 9}
    free = random_tools.go_on(records, [[], [], []], [20] * 3, [0] * 3, 5)
    monkeypatch.setattr(correct.Tools, "states", lambda self, ids, t: len(ids) >= ends[t])
    stopped = random_tools.go_on(records, [[], [], []], [20, 12, 20], [0, 1, 2], 5)
    assert stopped == [free[0][:4], free[1][:12], free[2][:9]]


def chain(prediction, right, *levels, n=10):
    return {"prediction": prediction, "answer_correct": right, "levels": list(levels), "n_tokens": n}


def test_votes_by_hand():
    chains = [
        chain("9", False, 1, 4),
        chain("8", True, 5, 3),
        chain("9.", False, 4, 2),
        chain(None, False, 5, 5),
        chain("8", True, 5, None),
    ]
    assert correct.vote(chains, "majority") == (False, 2 / 5)  # 2 : 2, and 9 was named first
    assert correct.vote(chains, "last") == (False, (0.75 + 0.25) / 5)  # 8: .5 + 0
    assert correct.vote(chains, "minimum") == (True, 0.5 / 5)  # 9: 0 + .25
    assert correct.vote(chains, "product") == (True, 0.5 / 5)  # 9: 0 + .75 * .25
    assert correct.vote([chain(None, False), chain("7", True)], "last") == (True, 0.0)


def test_rows_by_hand():
    first = {"greedy": chain("9", False, 2), "sampled": [chain("9", False, 2), chain("8", True, 5, n=14)]}
    second = {"greedy": chain("4", True, 5, n=20), "sampled": [chain("4", True, 4, n=20), chain("3", False, 4, n=16)]}
    first["corrected"], second["corrected"] = (
        [chain("7", False, 5, n=18) | {"ceiling": True}],
        [second["greedy"] | {"ceiling": True}],
    )
    rows = {(r["method"], r["setting"], r["weight"]): r for r in correct.make_rows([first, second], [2.0], [1, 2])}
    corrected, majority, last = rows["self-correction", 2.0, "last"], rows["vote", 2, "majority"], rows["vote", 2, "last"]
    assert (corrected["tokens"], corrected["accuracy"], corrected["ceiling"]) == (19, 0.5, 1.0) and corrected[
        "times_greedy"
    ] == 19 / 15
    assert (majority["tokens"], majority["accuracy"], majority["mended"], majority["broken"]) == (30, 0.5, 0, 0)
    assert (last["accuracy"], last["mended"], last["ceiling"]) == (1.0, 1, 1.0) and rows["vote", 1, "last"]["ceiling"] == 0.5
    assert rows["greedy", 1, "last"]["selective_50"] == 1.0 and corrected["selective_50"] == 0.5  # both say 5: a tie


def test_the_script(processor, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    common.save_model(
        common.make_vlm(estimate.build_digits_model(processor, hidden_size=32, layers=1), processor), tmp_path / "model"
    )
    flags = [
        "--ckpt",
        str(tmp_path / "model"),
        "--cache",
        str(tmp_path),
        "--limit",
        "3",
        "--max-new-tokens",
        "9",
        "--samples",
        "1",
        "2",
    ]
    for out in ("a", "b"):
        correct.main([*flags, "--out", str(tmp_path / out)])
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"run.json", "done", "correct.json", "chains.jsonl", "correct.png"}
    assert (tmp_path / "a" / "chains.jsonl").read_text() == (tmp_path / "b" / "chains.jsonl").read_text()
    with pytest.raises(SystemExit, match="2"):
        correct.main([*flags, "--level", "6", "--budget", "0.5"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("--level must lie between 1 and 5; --budget must be at least 1")
