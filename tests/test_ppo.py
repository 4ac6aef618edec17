"""Rewards, advantages and the PPO update."""

import copy

import common
import estimate
import ppo
import warmup

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def warm(base, records, alone):
    """A policy that states levels after its sentences: the tiny base model, fine-tuned for a few steps on its own chains."""
    vlm = copy.deepcopy(base)
    vlm.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=2e-3)
    rng = np.random.default_rng(0)
    pool = {level: texts[:3] for level, texts in common.load_statements().items()}
    for _ in range(70):
        chains = [common.reference_chain(r) for r in records]
        texts = [warmup.insert(chain, rng.integers(1, 6, size=4), rng, pool) for chain in chains]
        warmup.train_step(vlm, records, texts, optimizer, 12, alone)
    return vlm


@pytest.fixture
def models(warm):
    torch.manual_seed(0)
    policy, reference = copy.deepcopy(warm), copy.deepcopy(warm)
    reference.model.requires_grad_(False)
    return ppo.Models(policy, reference, ppo.ValueHead(128))


@pytest.fixture
def args():
    flags = "--updates 10 --batch-size 4 --generate-batch 36 --micro-batch 5 --lr 1e-4 --kl-coef 0.05"
    flags += " --max-new-tokens 70 --minibatches 1 --epochs 1"
    return ppo.parse_args(flags.split())


def judge_all_right(roll):
    return [(np.ones(len(steps), bool), np.ones(len(steps))) for steps in roll.steps]


@pytest.mark.parametrize("minibatches", [4, 12])
def test_as_many_steps_as_minibatches(models, records, args, reader, alone, minibatches, monkeypatch):
    """Also where they are more than the responses, 9: processes that share a batch wait for one another at each."""
    args.samples, args.max_new_tokens, args.minibatches, args.epochs, steps = 3, 4, minibatches, 1, []
    optimizer = ppo.make_optimizers(models, args)["policy"]
    monkeypatch.setattr(optimizer, "step", lambda: steps.append(0))
    roll = ppo.rollout(models, reader, records[:3], args, 0)
    ppo.update(models, optimizer, roll, torch.ones(roll.mask.shape), args, 0, alone)
    assert len(steps) == minibatches and len(roll.responses) == 9


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0, 2.0, 0.0]]), torch.tensor([[0.5, 1.0, -1.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = ppo.gae(rewards, values, mask, discount=0.5, lam=0.5)
    # delta = 0 + .5 * 1 - .5 = 0;  1 + .5 * -1 - 1 = -.5;  2 + 0 - -1 = 3;  A_2 = 3, A_1 = -.5 + .25 * 3, A_0 = .25 A_1
    assert advantages.tolist() == [[0.0625, 0.25, 3.0, 0.0]]
    assert returns.tolist() == [[0.5625, 1.25, 2.0, 0.0]]


def test_gae_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 9, generator=generator)
    lengths, discount, lam = [9, 1, 4, 7, 2], 0.97, 0.9
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    advantages, returns = ppo.gae(rewards, values, mask, discount, lam)
    for row, n in enumerate(lengths):
        r, v = rewards[row].tolist(), [*values[row, :n].tolist(), 0.0]
        for t in range(9):
            a = sum((discount * lam) ** (k - t) * (r[k] + discount * v[k + 1] - v[k]) for k in range(t, n))
            assert float(advantages[row, t]) == pytest.approx(a, abs=1e-5)
            assert float(returns[row, t]) == pytest.approx(a + v[t] if t < n else 0.0, abs=1e-5)
    garbage = torch.where(mask, rewards, 1e6), torch.where(mask, values, -1e6)
    assert torch.equal(ppo.gae(*garbage, mask, discount, lam)[0], advantages)


def test_losses_against_a_loop():
    new, old, advantages = (torch.randn(40, generator=torch.Generator().manual_seed(s)) for s in range(3))
    loss, diagnostics = ppo.policy_loss(new, old, advantages, 0.2)
    for i in range(40):
        ratio = np.exp(float(new[i]) - float(old[i]))
        expected = -min(ratio * float(advantages[i]), min(max(ratio, 0.8), 1.2) * float(advantages[i]))
        assert float(loss[i]) == pytest.approx(expected, rel=1e-4)
        assert float(diagnostics["clipfrac"][i]) == (abs(ratio - 1) > 0.2)
        assert float(diagnostics["approx_kl"][i]) == pytest.approx(ratio - 1 - np.log(ratio), abs=1e-4)


def test_value_head_is_fitted(alone):
    torch.manual_seed(0)
    head, hidden, known = ppo.ValueHead(8), torch.randn(600, 8), torch.randn(600, 3)
    returns = hidden[:, 0] * 2 + known[:, 1] + 1
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    assert head(hidden, known).abs().max() == 0  # starts at zero
    loss = ppo.fit_value(head, optimizer, hidden, known, returns, 200, 0, alone)
    assert 0 < loss < float(returns.var())
    assert float(((head(hidden, known).detach() - returns) ** 2).mean()) < 0.05 * float(returns.var())


def fake_rollout(reader, texts, n_reference=2):
    """A rollout around given responses, one token a character and an end-of-sequence token."""
    offsets = [[(i, i + 1) for i in range(len(t))] + [(len(t), len(t))] for t in texts]
    responses = [common.Response([5] * len(t) + [2], t, o) for t, o in zip(texts, offsets, strict=True)]
    width = max(len(r.ids) for r in responses)
    mask = torch.arange(width) < torch.tensor([len(r.ids) for r in responses])[:, None]
    zeros = torch.zeros(mask.shape)
    record = {"reference": {"image": ["It is red."] * n_reference, "reasoning": []}}
    return ppo.Rollout([record] * len(texts), responses, reader.parse(texts), mask, mask & False, zeros, zeros, zeros, zeros)


def test_rewards(args, reader):
    texts = [
        "It is red, and I trust this is correct. It is a car. I'm unsure about this.",  # levels 4, 1
        "It is red. It is a car, with total certainty.",  # none, level 5
        "",
    ]
    roll = fake_rollout(reader, texts)
    judged = [(np.array([1, 0]), np.array([0.5, 0.0])), (np.array([1, 0]), np.array([1.0, 0.25])), (np.array([]), np.array([]))]
    args.alpha, args.beta, args.gamma = 2.0, 3.0, 5.0
    scores, parts = ppo.rewards(roll, judged, args)
    ec = [1 - 2 * 0.25**2, 1.0]  # eq. 11
    cs = [1 - 2 * 0.25**2, 1.0]  # eq. 12
    assert parts["r_ka"].tolist() == pytest.approx([0.5, 0.5, 0.0])  # eq. 10
    assert parts["r_ec"].tolist() == pytest.approx([sum(ec) / 2, (-1 - 1) / 2, -1])
    assert parts["r_cs"].tolist() == pytest.approx([sum(cs) / 2, (-1 + 1 - 2 * 0.75**2) / 2, -1])
    total = 2 * parts["r_ka"] + 3 * parts["r_ec"] + 5 * parts["r_cs"]  # eq. 13
    assert torch.allclose(scores.sum(1), total)
    placed = {texts[0].index("red") + 2: 2 * 0.5, texts[0].index("correct.") + 7: (3 * ec[0] + 5 * cs[0]) / 2, 12: 0.0}
    for position, value in placed.items():
        assert float(scores[0, position]) == pytest.approx(value)
    assert not scores[~roll.mask].any()
    args.reward_placement = "end"
    ends, same = ppo.rewards(roll, judged, args)
    assert all(torch.equal(same[name], parts[name]) for name in parts)
    for row, response in enumerate(roll.responses):
        last = len(response.ids) - 1
        assert float(ends[row, last]) == pytest.approx(float(total[row]))
        assert not ends[row, :last].any() and not ends[row, last + 1 :].any()


def test_a_statement_may_stand_before_its_sentence(args):
    """As a policy that should say all statements behind the chain may sample it."""
    text = "It is red. I trust this is correct. I'm unsure about this. It is a car."
    roll = fake_rollout(common.StatementReader(layout="after"), [text])
    assert [(step.level, step.said) for step in roll.steps[0]] == [(4, text.index("I trust")), (1, text.index("I'm"))]
    args.alpha = args.gamma = 0.0
    scores, _ = ppo.rewards(roll, [(np.array([1, 0]), np.array([0.5, 0.0]))], args)
    assert scores[0].nonzero()[:, 0].tolist() == [text.index("correct.") + 7, text.index("this. It") + 4]


def test_an_extra_sentence_pays_for_itself(args, reader):
    """Placed rewards sum to R, and none depends on what is written after it: else a repeated sentence would look like a gain. What
    stops early has less than R: a sentence that is missing earns nothing."""
    right, short = "It is red, and I trust this is correct.", "It is red, though I can't confirm this."
    texts = [short, f"{short} {right}", f"{short} {right} {right}"]  # one less than the reference, as many, one more
    roll = fake_rollout(reader, texts, n_reference=2)
    judged = [(np.ones(n, bool), np.ones(n)) for n in (1, 2, 3)]
    scores, parts = ppo.rewards(roll, judged, args)
    whole = sum(parts.values())
    assert torch.allclose(scores.sum(1), torch.stack([whole[0] / 2, whole[1], whole[2]]))
    assert torch.equal(scores[1, : len(texts[1])], scores[2, : len(texts[1])])
    assert torch.equal(scores[0, : len(texts[0])], scores[2, : len(texts[0])]) and scores[0, len(texts[0])] == 0
    extra = float(scores[2, len(texts[1]) :].sum())
    assert extra == pytest.approx(float(scores[2].sum() - scores[1].sum()))


def test_first_epoch_is_on_policy(models, records, args, reader, alone):
    roll = ppo.rollout(models, reader, records[:4], args, seed=3)
    assert len(roll.records) == 12 and roll.records[0] == roll.records[2] != roll.records[3]
    assert torch.allclose(roll.logprob, roll.ref_logprob, atol=1e-5)  # the policy is still the warm-up policy: KL = 0
    batch = common.collate(models.policy, roll.records, [r.ids for r in roll.responses])
    with torch.no_grad():
        logp = models.policy.model(**batch.inputs).logits[:, -batch.responses.shape[1] - 1 : -1].log_softmax(-1)
    assert torch.allclose(roll.logprob[roll.mask], logp.gather(-1, batch.responses[..., None]).squeeze(-1)[batch.mask], atol=1e-4)
    assert torch.allclose(roll.entropy[roll.mask], -(logp.exp() * logp).sum(-1)[batch.mask], atol=1e-4)
    optimizer = ppo.make_optimizers(models, args)["policy"]
    stats = ppo.update(models, optimizer, roll, torch.randn(roll.mask.shape), args, 0, alone)
    assert abs(stats["approx_kl"]) < 1e-6 and stats["clipfrac"] == 0.0  # ratio = 1


def test_a_rollout_prepares_and_encodes_its_pictures_once(models, records, args, reader, monkeypatch):
    """Sampling, policy and reference share a collated batch and what the image tower sees in it."""
    tower = models.policy.base.get_encoder(modality="image")
    models.reference.base.model.vision_tower = tower
    calls, forward, collate = [], tower.forward, common.collate
    monkeypatch.setattr(tower, "forward", lambda *a, **k: calls.append("tower") or forward(*a, **k))
    monkeypatch.setattr(common, "collate", lambda *a, **k: calls.append("collate") or collate(*a, **k))
    args.generate_batch = 6
    roll = ppo.rollout(models, reader, records[:4], args, seed=3)
    assert sorted(calls) == ["collate", "collate", "tower", "tower"]
    args.generate_batch = 12
    assert ppo.rollout(models, reader, records[:2], args, seed=3).responses[0].ids == roll.responses[0].ids


def test_statement_tokens(models, records, args, reader):
    """The tokens marked are those of the statements and no others: each either stands in a statement or is its comma or stop."""
    roll = ppo.rollout(models, reader, records[:2], args, seed=5)
    statements = 0
    for response, steps, marked in zip(roll.responses, roll.steps, roll.statement.tolist(), strict=True):
        pieces = [response.text[a:b] for (a, b), is_statement in zip(response.offsets, marked, strict=False) if is_statement]
        tails = [response.text[step.end : step.stop] for step in steps]
        assert "".join(pieces).replace(" ", "") == "".join(tails).replace(" ", "")
        statements += sum(step.statement is not None for step in steps)
    assert statements > 10


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_update_does_not_depend_on_padding_or_micro_batches(models, records, args, reader, alone):
    roll = ppo.rollout(models, reader, records[:4], args, seed=4)
    advantages = torch.randn(roll.mask.shape, generator=torch.Generator().manual_seed(0))
    trained = []
    for micro_batch, garbage in ((12, False), (5, False), (12, True)):
        twin, other, given = models._replace(policy=copy.deepcopy(models.policy)), copy.copy(roll), advantages
        if garbage:
            other.logprob, given = (torch.where(roll.mask, x, 1e3) for x in (roll.logprob, advantages))
        args.micro_batch = micro_batch
        ppo.update(twin, torch.optim.SGD(twin.policy.model.parameters(), lr=0.1), other, given, args, 0, alone)
        trained.append(flat(twin.policy.model))
    assert (trained[0] - flat(models.policy.model)).abs().max() > 1e-3
    assert torch.allclose(trained[0], trained[1], atol=1e-5) and torch.allclose(trained[0], trained[2], atol=1e-6)


def test_a_planted_reward_is_learned(models, records, args, reader, alone):
    """Were every sentence right and the internal confidence full, R_EC and R_CS would ask for level 5: PPO must find that out."""
    args.batch_size, args.micro_batch, args.lr, args.epochs, args.minibatches, args.kl_coef = 12, 36, 6e-4, 2, 2, 0.01
    args.samples = 2
    optimizers = ppo.make_optimizers(models, args)
    history = []
    for step in range(10):
        history.append(ppo.train_update(models, optimizers, reader, judge_all_right, records, args, step, step == 0, alone))
    shares = [h["level_5"] for h in history]
    assert np.mean(shares[-3:]) > np.mean(shares[:3]) + 0.25, shares
    assert np.mean([h["r_ec"] for h in history[-3:]]) > np.mean([h["r_ec"] for h in history[:3]]) + 0.2
    assert history[-1]["kl"] > history[0]["kl"] >= 0


def test_gradient_checkpointing_changes_nothing(base, records):
    """Less memory, the same gradient; and the model is back in eval mode to sample."""
    vlm = copy.deepcopy(base)
    batch = common.collate(vlm, records[:3], common.response_ids(vlm, ["The left digit is 3."] * 3))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            common.enable_train_mode(vlm)
        vlm.model.zero_grad()
        common.sft_loss(vlm, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vlm.model.model.language_model.parameters()]))
        assert vlm.model.training == checkpointing
    assert gradients[0].abs().max() > 1e-3 and torch.allclose(gradients[0], gradients[1], atol=1e-6)
    common.generate(vlm, common.collate(vlm, records[:2]), 1.0, 3, seed=0)
    assert not vlm.model.training


def test_lora_dropout_in_warm_up_alone(cache, records, tmp_path):
    """Passes with gradient drop out in the warm-up; measuring never does, nor does a checkpoint that PPO goes on with."""
    flags = "--device cpu --lora-rank 4 --lora-dropout 0.5 --gradient-checkpointing".split()
    path = estimate.digits_paths(cache, 0, 1.0)["model"]
    vlm = common.load_model(path, warmup.parse_args(flags), "cpu", trainable=True)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    common.save_model(tmp_path, vlm)
    batch = common.collate(vlm, records[:3], common.response_ids(vlm, ["The left digit is 3."] * 3))
    policy = ppo.load_models(tmp_path, ppo.parse_args(["--device", "cpu", "--gradient-checkpointing"]), "cpu").policy
    with torch.no_grad():
        expected = common.response_statistics(vlm, batch)[0]
    assert not torch.allclose(common.response_statistics(vlm, batch)[0], expected, atol=0.1)
    assert torch.allclose(common.response_statistics(policy, batch)[0], expected, atol=1e-4)
