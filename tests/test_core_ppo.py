"""PPO on a policy whose every probability is set by hand: what an update does is worked out on paper.

The bandit: after "The left digit is 3" the policy says "with confidence 1 of 5" or "with confidence 2 of 5", and the choice
of level is its only free one. With the sentence right, R_EC of level 1 is 1 - 2 (1 - 0)^2 = -1, of level 2 1 - 2 (1 - .25)^2
= -.125."""

import copy
import functools
import math

import common
import estimate
import ppo

import ceiling
import numpy as np
import pytest
import scripted
import torch
from accelerate import Accelerator
from torch import nn

ONE, TWO = "The left digit is 3, with confidence 1 of 5.", "The left digit is 3, with confidence 2 of 5."
LENGTH, STATED = 12, 7  # tokens of either, and those of its statement: ", with confidence 1 of 5."
FLAGS = (
    "--device cpu --updates 10 --samples 1 --epochs 1 --minibatches 1 --micro-batch 64 --generate-batch 64 --max-new-tokens 40 "
    "--lr 1 --lam 1 --alpha 0 --beta 0 --gamma 0 --kl-coef 0 --entropy-coef 0 --max-grad-norm 1e9"
)
SHORT = {"image": ["The left digit is 3."], "reasoning": []}  # a chain of one sentence: nothing of R is left for the last token


@pytest.fixture(scope="module")
def processor():
    return scripted.processor()


reader = functools.cache(common.StatementReader)


def arguments(**changed):
    args = ppo.parse_args(FLAGS.split())
    vars(args).update(changed)
    return args


def make_models(processor, policy, reference=None, critic=None):
    reference = copy.deepcopy(reference or policy).requires_grad_(False)
    critic = critic or ppo.ValueHead(policy.head.in_features)
    return ppo.Models(policy.vlm(processor), reference.vlm(processor), critic)


def make_rollout(monkeypatch, models, records, texts, args=None, end=False):
    """The policy says the texts, one a record."""
    scripted.says(monkeypatch, [scripted.tokens(models.policy.processor, t, end) for t in texts])
    return ppo.rollout(models, reader(), records, args or arguments(), seed=0)


def train_step(monkeypatch, models, texts, judge, args, lr=1.0, records=None, value_only=False):
    """One whole round of PPO by plain gradient descent on what is said -> its line of the log."""
    scripted.says(monkeypatch, [scripted.tokens(models.policy.processor, t) for t in texts])
    optimizers = {"policy": torch.optim.SGD(models.policy.model.parameters(), lr=lr),
                  "value": torch.optim.SGD(models.value_head.parameters(), lr=1e-3)}  # fmt: skip
    records = records or [scripted.record(3, 5, reference=SHORT) for _ in texts]
    return ppo.train_update(models, optimizers, reader(), judge, records, args, 0, value_only, Accelerator(cpu=True))


def policy_step(models, roll, advantages, args):
    """The policy's part alone, at learning rate 1."""
    optimizer = torch.optim.SGD(models.policy.model.parameters(), lr=1.0)
    ppo.update(models, optimizer, roll, advantages, args, 0, Accelerator(cpu=True))


def judge_as(correct, internal=0.0):
    """I(z) as `correct(text)` says, of every sentence of the response; IV(z) a constant."""

    def judge(roll):
        return [(np.array([correct(g.text)] * len(s)), np.full(len(s), internal))
                for g, s in zip(roll.responses, roll.steps, strict=True)]  # fmt: skip

    return judge


def judged(*pairs):
    return [(np.array(correct), np.array(internal)) for correct, internal in pairs]


def make_judge(confidence, cosines, iv="level"):
    """The project's judge with the exact matcher, a CLIP whose cosines are given by sentence, and a flat similarity."""
    clip = lambda images, sentences: np.array([cosines[s] for s in sentences])  # noqa: E731
    return ppo.Judge(confidence, clip, lambda pairs: np.zeros(len(pairs), dtype=np.float32), common.Matcher("exact"), iv)


right, wrong = judge_as(lambda text: True), judge_as(lambda text: False)


def bandit(processor, p):
    """A policy that says TWO with probability p."""
    return scripted.Bigram(processor, {ONE: 1 - p, TWO: p})


def log_odds(processor, policy):
    logits = policy.column(processor, " confidence")
    return float(logits[scripted.tokens(processor, " 2")[0]] - logits[scripted.tokens(processor, " 1")[0]])


def odds(p):
    return math.log(p / (1 - p))


def sample(p, n=50):
    """n responses, exactly as often as a policy that says TWO with probability p is expected to say them."""
    twos = round(p * n)
    assert twos == pytest.approx(p * n)
    return [TWO] * twos + [ONE] * (n - twos)


# ------------------------------------------------------------------------------------------------------ optima on paper


@pytest.mark.parametrize(("kl_coef", "below", "above"), [(0.875, 0.70, 0.76), (0.4375, 0.86, 0.90)])
def test_optimum_under_the_kl_penalty(processor, monkeypatch, kl_coef, below, above):
    """max E R - b KL(pi | ref) is at pi ~ ref exp(R / b): with ref even and R differing by .875, at p = 1 / (1 + exp(-.875 / b)),
    .731 for b = .875 and .881 for half of it. From either side an update goes towards it."""
    for p in (below, above):
        policy = bandit(processor, p)
        models = make_models(processor, policy, reference=bandit(processor, 0.5))
        train_step(monkeypatch, models, sample(p), right, arguments(beta=1.0, kl_coef=kl_coef), lr=0.1)
        moved = log_odds(processor, policy) - odds(p)
        assert abs(moved) > 1e-4 and (moved > 0) == (p == below), (p, moved)


@pytest.mark.parametrize("beta", [0.5, 7.0])
@pytest.mark.parametrize("p", [0.74, 0.80])
def test_optimum_under_the_entropy_bonus(processor, monkeypatch, p, beta):
    """With advantages divided by their deviation, |dR| sqrt(p q), the log-odds x rise by sqrt(p q) / L - h p q x / S. At
    h = 2 S / L that is 0 where x sqrt(p q) = 1/2, p = .765, whatever the size of the rewards."""
    policy = bandit(processor, p)
    args = arguments(beta=beta, entropy_coef=2 * STATED / LENGTH)
    train_step(monkeypatch, make_models(processor, policy), sample(p), right, args)
    slope = (p * (1 - p)) ** 0.5 / LENGTH * (1 - 2 * odds(p) * (p * (1 - p)) ** 0.5)
    assert log_odds(processor, policy) - odds(p) == pytest.approx(2 * slope, rel=1e-3)  # each of the two logits moves
    assert (slope > 0) == (p == 0.74)


@pytest.mark.parametrize(("weight", "judge", "sign"), [
    ("beta", judge_as(lambda text: True, internal=0.0), 1), ("beta", judge_as(lambda text: False, internal=1.0), -1),
    ("gamma", judge_as(lambda text: False, internal=1.0), 1), ("gamma", judge_as(lambda text: True, internal=0.0), -1),
    ("alpha", judge_as(lambda text: text == TWO), 1), ("alpha", judge_as(lambda text: text == ONE), -1),
])  # fmt: skip
def test_what_each_reward_asks_for(processor, monkeypatch, weight, judge, sign):
    """R_EC wants the level of what is right, R_CS that of the internal confidence, R_KA what is right."""
    policy = bandit(processor, 0.5)
    args = arguments(**{weight: 1.0}, reward_placement="end")
    train_step(monkeypatch, make_models(processor, policy), sample(0.5), judge, args)
    assert sign * log_odds(processor, policy) > 1e-3


# ------------------------------------------------------------------------------------------------------- steps on paper


@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_a_step_by_hand(processor, monkeypatch, alpha):
    """Three right TWOs, one wrong ONE: A = (a, a, a, 0) has deviation a sqrt(3)/4, is divided by it and not centred."""
    policy = bandit(processor, 0.5)
    args = arguments(alpha=alpha, reward_placement="end")
    line = train_step(monkeypatch, make_models(processor, policy), [TWO] * 3 + [ONE], judge_as(lambda text: text == TWO), args)
    scaled = 4 / 3**0.5
    assert log_odds(processor, policy) == pytest.approx(2 * 3 * scaled * 0.5 / (4 * LENGTH), rel=1e-4)
    assert line["reward"] == 0.75 * alpha and line["r_ka"] == 0.75 and line["kl"] == pytest.approx(0, abs=1e-6)
    assert line["clipfrac"] == 0 and abs(line["approx_kl"]) < 1e-6 and line["response_length"] == LENGTH
    assert [line[f"level_{k}"] for k in (1, 2, 3, 4, 5, "none")] == [0.25, 0.75, 0, 0, 0, 0] and line["auroc"] == 1.0


def test_kl_in_the_log(processor, monkeypatch):
    """k3 of one TWO: x = log .75 - log .5, exp(-x) - 1 + x; and the first updates leave the policy alone."""
    policy = bandit(processor, 0.75)
    models, before = make_models(processor, policy, reference=bandit(processor, 0.5)), log_odds(processor, policy)
    line = train_step(monkeypatch, models, [TWO], right, arguments(beta=1.0, kl_coef=1.0), value_only=True)
    assert line["kl"] == pytest.approx(2 / 3 - 1 + math.log(1.5), abs=1e-5)
    assert line["reward"] == -0.125 and math.isnan(line["policy_loss"]) and log_odds(processor, policy) == before


class Foresees(nn.Module):
    """A critic that has the return of every token."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, hidden, known):
        return self.value.expand(len(hidden))


def test_a_reward_that_was_foreseen_moves_nothing(processor, monkeypatch):
    policy = bandit(processor, 0.5)
    before = policy.head.weight.detach().clone()
    line = train_step(monkeypatch, make_models(processor, policy, critic=Foresees(-0.125)), [TWO] * 3, right, arguments(beta=1.0))
    assert line["reward"] == -0.125 and torch.equal(policy.head.weight, before)
    train_step(monkeypatch, make_models(processor, policy, critic=Foresees(-0.25)), [TWO] * 3, right, arguments(beta=1.0))
    assert log_odds(processor, policy) > 0  # better than foreseen


FOUR = {f"The left digit is {digit}, with confidence {level} of 5.": p * q
        for digit, p in ((3, 0.8), (4, 0.2)) for level, q in ((1, 0.7), (2, 0.3))}  # fmt: skip


def test_entropy_bonus_by_hand(processor, monkeypatch):
    """Without advantages a step goes up dH/dz_i = -p_i (log p_i + H) of the choice inside the statement, and nowhere else."""
    policy = scripted.Bigram(processor, FOUR)
    models, before = make_models(processor, policy), policy.head.weight.detach().clone()
    roll = make_rollout(monkeypatch, models, [scripted.record(3, 5)] * 4, FOUR)
    policy_step(models, roll, torch.zeros(roll.mask.shape), arguments(entropy_coef=0.5))
    moved = policy.head.weight.detach() - before
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    confidence = scripted.tokens(processor, " confidence")[0]
    for level, p in ((1, 0.7), (2, 0.3)):
        expected = -0.5 * p * (math.log(p) + entropy) / STATED
        assert float(moved[scripted.tokens(processor, f" {level}")[0], confidence]) == pytest.approx(expected, abs=1e-6)
    moved[:, confidence] = 0
    assert moved.abs().max() < 1e-6


@pytest.mark.parametrize(("ratio", "advantage", "clip_range", "moves"), [
    (2.0, 1.0, 0.2, False), (2.0, -1.0, 0.2, True), (0.5, -1.0, 0.2, False), (0.5, 1.0, 0.2, True),
    (2.0, 1.0, 1.5, True), (1.5, 1.0, 0.2, False), (1.125, 1.0, 0.2, True), (0.5, -1.0, 0.75, True),
])  # fmt: skip
def test_clipping(processor, monkeypatch, ratio, advantage, clip_range, moves):
    """eq. 14: no gradient once the ratio has gone beyond the range in the direction that the advantage asks for."""
    policy = bandit(processor, 0.5)
    models = make_models(processor, policy)
    roll = make_rollout(monkeypatch, models, [scripted.record(3, 5)], [TWO])
    roll.logprob = (roll.logprob - math.log(ratio)) * roll.mask
    policy_step(models, roll, torch.full(roll.mask.shape, advantage), arguments(clip_range=clip_range))
    expected = 2 * ratio * advantage * 0.5 / LENGTH if moves else 0.0
    assert log_odds(processor, policy) == pytest.approx(expected, abs=1e-5)


def test_gae_by_hand():
    """discount 1/2, lambda 1/4; delta = 4 + 1/2 - 2 = 2.5, 0 + 4 - 1 = 3, 2 - 8 = -6; A = 2.5 + 2.25/8, 3 - 6/8, -6."""
    rewards, values = torch.tensor([[4.0, 0.0, 2.0, 7.0]]), torch.tensor([[2.0, 1.0, 8.0, 5.0]])
    advantages, returns = ppo.gae(rewards, values, torch.tensor([[True, True, True, False]]), 0.5, 0.25)
    assert advantages.tolist() == [[2.78125, 2.25, -6.0, 0.0]] and returns.tolist() == [[4.78125, 3.25, 2.0, 0.0]]


def test_discount_and_lambda_reach_the_update(processor, monkeypatch):
    """The reward comes 3 tokens after the choice (at the full stop, with V = 0 and lambda 1/2 it is 1/8 there), the update before
    the choice sees less; R = 1 for TWO alone. Deviation of the advantages of the statements: half of them 2^-k, the others 0."""
    policy = bandit(processor, 0.5)
    args = arguments(alpha=1.0, reward_placement="end", lam=0.5)
    train_step(monkeypatch, make_models(processor, policy), [TWO, ONE], judge_as(lambda text: text == TWO), args)
    per_token = np.array([0.5**k for k in range(STATED)] + [0.0] * STATED)
    assert log_odds(processor, policy) == pytest.approx(2 * 0.125 / per_token.std() * 0.5 / (2 * LENGTH), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ rollouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollout_by_hand(processor, monkeypatch, dtype):
    """Log-probabilities of policy and reference, hidden states and masks of two responses of different length."""
    texts = ["The left digit is 3, with confidence 2 of 5.", "The left digit is 4."]
    policy = scripted.Bigram(processor, {t: 1.0 for t in texts[:1]}).to(dtype)
    with torch.no_grad():  # equal logits, so that bfloat16 holds them without rounding: of 1/4 after " confidence", 1/2 after " is"
        for before, after in ((" confidence", (" 1", " 2", " 3", " 4")), (" is", (" 3", " 4")), (" 4", (",", "."))):
            policy.head.weight[:, scripted.tokens(processor, before)[0]] = scripted.Bigram.OFF
            for token in after:
                policy.head.weight[scripted.tokens(processor, token)[0], scripted.tokens(processor, before)[0]] = 0
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.head.weight[scripted.tokens(processor, " 4")[0], scripted.tokens(processor, " is")[0]] = scripted.Bigram.OFF
    models = make_models(processor, policy, reference)
    roll = make_rollout(monkeypatch, models, [scripted.record(3, 5)] * 2, texts, arguments(micro_batch=1))
    half, quarter = math.log(0.5), math.log(0.25)
    assert roll.mask.tolist() == [[True] * 12, [True] * 6 + [False] * 6]
    assert roll.statement.tolist() == [[False] * 5 + [True] * 7, [False] * 5 + [True] + [False] * 6]
    expected = [[0, 0, 0, 0, half, 0, 0, 0, quarter, 0, 0, 0], [0, 0, 0, 0, half, half] + [0] * 6]
    assert torch.allclose(roll.logprob, torch.tensor(expected), atol=1e-5)
    expected = [[0] * 8 + [quarter] + [0] * 3, [0, 0, 0, 0, scripted.Bigram.OFF, half] + [0] * 6]
    assert torch.allclose(roll.ref_logprob, torch.tensor(expected), atol=1e-5)
    for row, text in enumerate(texts):  # the state before each token is that of the token before
        ids = scripted.tokens(processor, text)
        assert roll.hidden[row].argmax(-1)[1 : len(ids)].tolist() == ids[:-1]


def test_samples_of_a_question_stand_together(processor, monkeypatch):
    records = [scripted.record(3, 5), scripted.record(4, 5)]
    roll = make_rollout(monkeypatch, make_models(processor, bandit(processor, 0.5)), records, [ONE, TWO, TWO, ONE],
                        arguments(samples=2, generate_batch=3))  # fmt: skip
    assert [r["answer"] for r in roll.records] == ["8", "8", "9", "9"]
    assert [g.text for g in roll.responses] == [ONE, TWO, TWO, ONE] and [s[0].level for s in roll.steps] == [1, 2, 2, 1]


# ------------------------------------------------------------------------------------------------------ rewards, critic

TALK = "The left digit is 3, with confidence 4 of 5. The right digit is 6. 3 plus 6 is 9, with confidence 1 of 5."
#       0   1    2     3  4^5 6    7          8 9  10^11 12 ...        16 17^ 18 19 20 21 22^23 24 25       26 27 28 29^ </s> 30
SCORED = ([True, False, False], [0.25, 1.0, 0.5])


def talk(processor, monkeypatch, reference=None):
    models = make_models(processor, bandit(processor, 0.5))
    records = [scripted.record(3, 5, reference=reference)] * 2
    return make_rollout(monkeypatch, models, records, [TALK, ""], end=True)


def test_rewards_by_hand(processor, monkeypatch):
    """Levels 4, none, 1 (.75, none, 0); weights 1, 10, 100 keep the three terms apart; the chain has four sentences."""
    roll = talk(processor, monkeypatch)
    args = arguments(alpha=1.0, beta=10.0, gamma=100.0, reward_placement="end")
    scored = judged(SCORED, ([], []))
    ec, cs = (1 - 2 * 0.25**2, -1.0, 1.0), (1 - 2 * 0.5**2, -1.0, 1 - 2 * 0.5**2)  # eq. 11, 12
    scores, parts = ppo.rewards(roll, scored, args)
    assert parts["r_ka"].tolist() == pytest.approx([1 / 3, 0.0])  # eq. 10
    assert parts["r_ec"].tolist() == pytest.approx([sum(ec) / 3, -1.0]) and parts["r_cs"].tolist() == pytest.approx([0.0, -1.0])
    total = 1 / 3 + 10 * sum(ec) / 3
    expected = torch.zeros(2, 31)
    expected[0, 30], expected[1, 0] = total, -110.0  # the last token of each, never padding
    assert torch.allclose(scores, expected, atol=1e-4)
    args.reward_placement = "sentence"
    scores, parts = ppo.rewards(roll, scored, args)
    said = [10 * a + 100 * b for a, b in zip(ec, cs, strict=True)]
    placed = {4: 1 / 4, 11: said[0] / 4, 17: said[1] / 4, 29: said[2] / 4}
    # of four sentences of the reference the response has three: the fourth earns nothing
    expected[0] = torch.zeros(31).index_copy(0, torch.tensor([*placed]), torch.tensor([*placed.values()]))
    assert torch.allclose(scores, expected, atol=1e-4)


def test_rewards_of_a_response_that_is_too_long(processor, monkeypatch):
    """Against a chain of one sentence the second and third dilute what was credited before, at their own tokens."""
    roll = talk(processor, monkeypatch, SHORT)
    scores, _ = ppo.rewards(roll, judged(SCORED, ([], [])), arguments(alpha=12.0, beta=24.0))
    sums = np.array([12, 12 + 21, (12 + 21) / 2, (12 + 21 - 24) / 2, (12 + 21 - 24) / 3, (12 + 21 - 24 + 24) / 3])
    steps = np.diff([0.0, *sums])  # 24 R_EC = 21, -24, 24
    expected = torch.zeros(31)
    for position, value in zip((4, 11, 16, 17, 22, 29), steps, strict=True):
        expected[position] += value
    assert torch.allclose(scores[0], expected, atol=1e-4) and scores[1].tolist() == [-24.0] + [0.0] * 30


def test_what_the_critic_knows(processor, monkeypatch):
    """Nothing in the first sentence; from the first token after a sentence, its I and IV and the share of right ones so far."""
    told = ppo.known_before(talk(processor, monkeypatch), judged(SCORED, ([], [])))
    expected = [[0.0, 0.0, 0.0]] * 5 + [[1.0, 0.25, 1.0]] * 12 + [[0.0, 1.0, 0.5]] * 6 + [[0.0, 0.5, 1 / 3]] * 8
    assert torch.allclose(told[0], torch.tensor(expected)), told[0]
    assert not told[1][:1].any()


def test_the_critic_learns_from_what_it_knows(processor, monkeypatch):
    """The critic is handed the state and what is known at each token, in step; it is fitted to the returns."""
    seen = {}

    class Listens(Foresees):
        def forward(self, hidden, known):
            seen.setdefault("first", (hidden.argmax(-1).tolist(), known.tolist()))
            return super().forward(hidden, known)

    models = make_models(processor, bandit(processor, 0.5), critic=Listens(0.0))
    judge = lambda roll: judged(([True], [0.75]), ([False], [0.5]))  # noqa: E731
    args = arguments(beta=1.0, value_epochs=1)
    train_step(monkeypatch, models, [TWO, ONE], judge, args)
    hidden, told = seen["first"]
    for start, text, values in ((0, TWO, [1.0, 0.75, 1.0]), (LENGTH, ONE, [0.0, 0.5, 0.0])):
        assert hidden[start + 1 : start + LENGTH] == scripted.tokens(processor, text)[:-1]
        assert told[start : start + LENGTH] == [[0.0] * 3] * 5 + [values] * 7
    # one step of 1e-3 down (V - G)^2 / 2 at V = 0: the mean return, (-.125 + 1) / 2
    assert float(models.value_head.value.detach()) == pytest.approx(1e-3 * 0.4375, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize("iv", ["level", "score"])
def test_judge_by_hand(processor, monkeypatch, iv):
    """I from the matcher: one sentence right, in another place of the chain. IV: U of half LNLP, half CLIP, in fifths or not."""
    said = "The right digit is 5, with confidence 1 of 5. The left digit is 4, with confidence 2 of 5."
    policy = scripted.Bigram(processor, {said: 1.0})
    with torch.no_grad():  # the sentence's five tokens: " left" and " 4" of 1/2, the others certain
        for before, after in (("The", (" right", " left")), (" The", (" right", " left")), (" is", (" 4", " 5"))):
            column = scripted.tokens(processor, before)[0]
            policy.head.weight[:, column] = scripted.Bigram.OFF
            for token in after:
                policy.head.weight[scripted.tokens(processor, token)[0], column] = 0
    models = make_models(processor, policy)
    roll = make_rollout(monkeypatch, models, [scripted.record(3, 5)], [said])
    confidence = {"weights": [0.5, 0, 0, 0.5], "fuse": "mean", "min": [1.0, 0, 0, 0.25], "max": [2.0, 1, 1, 1.25]}
    confidence |= {"edges": [0.2, 0.4, 0.6, 0.8]}
    [(correct, internal)] = make_judge(confidence, {"The right digit is 5.": 0.75, "The left digit is 4.": -0.5}, iv)(roll)
    # perplexity 2^(2/5) = 1.32 of the 5 tokens; CLIP 1 - .75 = .25 -> 0 and 1 - 0 -> .75: U = .16 and .53: levels 5 and 3
    u = (2**0.4 - 1) / 2
    assert correct.tolist() == [True, False]
    assert internal == pytest.approx([1.0, 0.5] if iv == "level" else [1 - u, 1 - u - 0.375], abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_the_reference_stays(processor, tmp_path, monkeypatch, lora):
    """After a step the policy says something else and the reference what the loaded checkpoint said."""
    torch.manual_seed(0)
    tiny = common.make_vlm(estimate.build_digits_model(processor, hidden_size=32, layers=1), processor)
    common.save_model(tmp_path / "base", tiny)
    folder, texts = tmp_path / "base", [TWO, ONE + " So, the answer is 8."]
    records = [scripted.record(3, 5), scripted.record(4, 4, grey=0.5)]
    if lora:
        adapter = {"lora_rank": 4, "lora_alpha": None, "lora_dropout": 0.0, "lora_targets": common.LORA_TARGETS}
        vlm = common.load_model(folder, arguments(**adapter), "cpu", trainable=True)
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        folder = tmp_path / "adapter"
        common.save_model(folder, vlm)
    models, args = ppo.load_models(folder, arguments(), "cpu"), arguments(lr=1e-2)
    trained = [p for group in ppo.make_optimizers(models, args)["policy"].param_groups for p in group["params"]]
    named = dict(models.policy.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    first = make_rollout(monkeypatch, models, records, texts, args)
    optimizer = ppo.make_optimizers(models, args)["policy"]
    ppo.update(models, optimizer, first, torch.ones(first.mask.shape), args, 0, Accelerator(cpu=True))
    again = make_rollout(monkeypatch, models, records, texts, args)
    assert torch.allclose(first.ref_logprob, first.logprob, atol=1e-5)  # it is the same policy until then
    assert torch.equal(again.ref_logprob, first.ref_logprob)
    assert (again.logprob - first.logprob).abs().max() > 1e-2
    changed = {name for name, p in named.items() if not torch.equal(p, before[name])}
    assert changed and changed <= {name for name, p in named.items() if any(p is t for t in trained)}
    if lora:
        assert all("lora" in name and "reference" not in name for name in changed)
        assert not any(p is t for name, p in named.items() if "reference" in name for t in trained)
    else:
        assert not any(p.requires_grad for p in models.reference.model.parameters())
        assert not any(p is t for p in models.reference.model.parameters() for t in trained)


@pytest.mark.parametrize(("known", "internal"), [(0.95, 0.75), (0.05, 0.75), (0.05, 1.0), (0.6, 0.25), (0.95, 0.0)])
@pytest.mark.parametrize(("beta", "gamma"), [(1, 1), (1, 0), (0, 1), (2, 1)])
def test_what_the_rewards_pay_best(known, internal, beta, gamma):
    """E (I - c)^2 = (p - c)^2 + p (1 - p): R_EC and R_CS together are best at the weighted mean of p and IV."""
    middle = (beta * known + gamma * internal) / (beta + gamma)
    assert abs(common.conf(ceiling.best_level(known, internal, beta, gamma)) - middle) <= 0.125


def test_ceiling():
    """A right and a wrong sentence of internal level 4: levels 4 and 3 where both rewards count, 5 and 1 by R_EC alone."""
    lines = [{"sentences": [{"correct": True, "level": 4, "u": 0.05}, {"correct": False, "level": 4, "u": 0.05}]}]
    mece, shares = ceiling.ceiling(lines, 0.9, 1, 1)
    assert mece == pytest.approx((0.25 + 0.5) / 2) and shares.tolist() == [0, 0, 0.5, 0.5, 0]
    assert ceiling.ceiling(lines, 0.9, 1, 0)[0] == 0
    mece, shares = ceiling.ceiling(lines, 0.9, 1, 1, iv="score")  # (.9 + .95) / 2 and (.1 + .95) / 2: levels 5 and 3
    assert mece == 0.25 and shares.tolist() == [0, 0, 0.5, 0, 0.5]
