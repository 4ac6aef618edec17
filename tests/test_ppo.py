"""Rewards, advantages and the PPO update."""

import copy

import numpy as np
import pytest
import torch

import common as c
import ppo
import warmup


@pytest.fixture(scope="module")
def warm(base, records):
    """A policy that states levels after its sentences: the tiny base model, fine-tuned for a few steps on its own chains."""
    model, processor = copy.deepcopy(base[0]).requires_grad_(True), base[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rng = np.random.default_rng(0)
    pool = {level: texts[:3] for level, texts in c.load_statements().items()}
    for _ in range(70):
        chains = [c.chain(r) for r in records]
        texts = [c.insert(chain, rng.integers(1, 6, size=4), rng, pool) for chain in chains]
        warmup.train_step(model, processor, records, texts, optimizer, micro_batch=12)
    return model.eval(), processor


@pytest.fixture
def models(warm):
    torch.manual_seed(0)
    policy = copy.deepcopy(warm[0])
    return ppo.Models(policy, copy.deepcopy(policy).requires_grad_(False), ppo.ValueHead(128), warm[1])


@pytest.fixture
def args():
    flags = "--updates 10 --batch-size 4 --generate-batch 36 --micro-batch 5 --lr 1e-4 --kl-coef 0.05"
    flags += " --max-new-tokens 70 --minibatches 1 --epochs 1"
    return ppo.parse_args(flags.split())


def judge_all_right(roll):
    return [(np.ones(len(steps), bool), np.ones(len(steps))) for steps in roll.steps]


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
    assert ppo.value_loss(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 2.0])).tolist() == [0.5, 4.5]


def test_value_head_is_fitted():
    torch.manual_seed(0)
    head, hidden, known = ppo.ValueHead(8), torch.randn(600, 8), torch.randn(600, 3)
    returns = hidden[:, 0] * 2 + known[:, 1] + 1
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    assert head(hidden, known).abs().max() == 0  # starts at zero
    ppo.fit_value(head, optimizer, hidden, known, returns, 200, seed=0)
    assert float(((head(hidden, known).detach() - returns) ** 2).mean()) < 0.05 * float(returns.var())


def fake_rollout(texts, n_reference=2):
    """A rollout around given responses, one token a character and an end-of-sequence token."""
    offsets = [[(i, i + 1) for i in range(len(t))] + [(len(t), len(t))] for t in texts]
    generations = [c.Generation([5] * len(t) + [2], t, o, None, None) for t, o in zip(texts, offsets, strict=True)]
    width = max(len(g.ids) for g in generations)
    mask = torch.arange(width) < torch.tensor([len(g.ids) for g in generations])[:, None]
    zeros = torch.zeros(mask.shape)
    record = {"reference": {"image": ["It is red."] * n_reference, "reasoning": []}}
    return ppo.Rollout([record] * len(texts), generations, c.parse(texts), mask, mask & False, zeros, zeros, zeros)


def test_rewards(args):
    texts = [
        "It is red, and I trust this is correct. It is a car. I'm unsure about this.",  # levels 4, 1
        "It is red. It is a car, with total certainty.",  # none, level 5
        "",
    ]
    roll = fake_rollout(texts)
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
    for row, generation in enumerate(roll.generations):
        last = len(generation.ids) - 1
        assert float(ends[row, last]) == pytest.approx(float(total[row]))
        assert not ends[row, :last].any() and not ends[row, last + 1 :].any()


def test_an_extra_sentence_pays_for_itself(args):
    """Placed rewards sum to R, and none depends on what is written after it: else a repeated sentence would look like a gain."""
    right, short = "It is red, and I trust this is correct.", "It is red, though I can't confirm this."
    texts = [short, f"{short} {right}", f"{short} {right} {right}"]  # one less than the reference, as many, one more
    roll = fake_rollout(texts, n_reference=2)
    judged = [(np.ones(n, bool), np.ones(n)) for n in (1, 2, 3)]
    scores, parts = ppo.rewards(roll, judged, args)
    assert torch.allclose(scores.sum(1), sum(parts.values()))
    assert torch.equal(scores[1, : len(texts[1])], scores[2, : len(texts[1])])
    assert torch.equal(scores[0, : len(texts[0])], scores[2, : len(texts[0])]) and scores[0, len(texts[0])] == -0.5
    extra = float(scores[2, len(texts[1]) :].sum())
    assert extra == pytest.approx(float(scores[2].sum() - scores[1].sum()))


def test_first_epoch_is_on_policy(models, records, args):
    roll = ppo.rollout(models, records[:4], args, seed=3)
    assert len(roll.records) == 12 and roll.records[0] == roll.records[2] != roll.records[3]
    assert torch.allclose(roll.logprob, roll.ref_logprob, atol=1e-5)  # the policy is still the warm-up policy: KL = 0
    for row, generation in enumerate(roll.generations):  # the update's forward pass gives what was sampled from
        assert torch.allclose(roll.logprob[row][roll.mask[row]], generation.logprob, atol=1e-4)
    stats = ppo.update(models, ppo.make_optimizers(models, args)["policy"], roll, torch.randn(roll.mask.shape), args, seed=0)
    assert abs(stats["approx_kl"]) < 1e-6 and stats["clipfrac"] == 0.0  # ratio = 1


def test_statement_tokens(models, records, args):
    roll = ppo.rollout(models, records[:2], args, seed=5)
    statements = 0
    for row, (generation, steps) in enumerate(zip(roll.generations, roll.steps, strict=True)):
        tokens = zip(generation.offsets, roll.statement[row].tolist(), strict=False)
        marked = "".join(generation.text[a:b] for (a, b), is_statement in tokens if is_statement)
        assert all(step.statement in marked for step in steps if step.statement)
        statements += sum(step.statement is not None for step in steps)
    assert statements > 10


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_update_does_not_depend_on_padding_or_micro_batches(models, records, args):
    roll = ppo.rollout(models, records[:4], args, seed=4)
    advantages = torch.randn(roll.mask.shape, generator=torch.Generator().manual_seed(0))
    trained = []
    for micro_batch, garbage in ((12, False), (5, False), (12, True)):
        twin, other, given = copy.copy(models), copy.copy(roll), advantages
        twin.policy = copy.deepcopy(models.policy)
        if garbage:
            other.logprob, given = (torch.where(roll.mask, x, 1e3) for x in (roll.logprob, advantages))
        args.micro_batch = micro_batch
        ppo.update(twin, torch.optim.SGD(twin.policy.parameters(), lr=0.1), other, given, args, seed=0)
        trained.append(flat(twin.policy))
    assert (trained[0] - flat(models.policy)).abs().max() > 1e-3
    assert torch.allclose(trained[0], trained[1], atol=1e-5) and torch.allclose(trained[0], trained[2], atol=1e-6)


def test_a_planted_reward_is_learned(models, records, args):
    """Were every sentence right and the internal confidence full, R_EC and R_CS would ask for level 5: PPO must find that out."""
    args.batch_size, args.micro_batch, args.lr, args.epochs, args.minibatches, args.kl_coef = 12, 36, 6e-4, 2, 2, 0.01
    optimizers = ppo.make_optimizers(models, args)
    history = [ppo.train_update(models, optimizers, records, judge_all_right, args, step, step == 0) for step in range(24)]
    shares = [h["levels"]["5"] / max(1, sum(h["levels"].values())) for h in history]
    assert np.mean(shares[-3:]) > np.mean(shares[:3]) + 0.25, shares
    assert np.mean([h["r_ec"] for h in history[-3:]]) > np.mean([h["r_ec"] for h in history[:3]]) + 0.2
    assert history[-1]["kl"] > history[0]["kl"] >= 0


def test_gradient_checkpointing_changes_nothing(base, records):
    """Less memory, the same gradient; and the model is back in eval mode to sample."""
    model, processor = copy.deepcopy(base[0]), base[1]
    batch = c.collate(processor, records[:3], c.response_ids(processor, ["The left digit is 3."] * 3))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            c.enable_train_mode(model)
        model.zero_grad()
        c.sft_loss(model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.model.language_model.parameters()]))
        assert model.training == checkpointing
    assert gradients[0].abs().max() > 1e-3 and torch.allclose(gradients[0], gradients[1], atol=1e-6)
    c.generate(model, processor, records[:2], 1.0, 3, seed=0)
    assert not model.training


def test_lora_dropout_in_warm_up_alone(cache, records, tmp_path):
    """Passes with gradient drop out in the warm-up; measuring never does, nor does a checkpoint that PPO goes on with."""
    flags = "--device cpu --lora-rank 4 --lora-dropout 0.5 --gradient-checkpointing".split()
    model, processor = c.load_model(c.digits_paths(cache, 0, 1.0)["model"], warmup.parse_args(flags), trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    c.save_model(model, processor, tmp_path)
    batch = c.collate(processor, records[:3], c.response_ids(processor, ["The left digit is 3."] * 3))
    policy = ppo.load_models(tmp_path, ppo.parse_args(["--device", "cpu", "--gradient-checkpointing"])).policy
    with torch.no_grad():
        expected = c.response_statistics(model, batch)[0]
    assert not torch.allclose(c.response_statistics(model, batch)[0], expected, atol=0.1)
    assert torch.allclose(c.response_statistics(policy, batch)[0], expected, atol=1e-4)


def test_memory_plan(cache, base, records):
    """Weights to the byte, activations within 15% of what autograd saves in a real pass of the same size."""
    folder, (model, processor) = c.digits_paths(cache, 0, 1.0)["model"], base
    texts = ["The left digit is 3. " * 8] * 12
    batch = c.collate(processor, records, c.response_ids(processor, texts))
    model.requires_grad_(True)
    held = {}

    def count(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    embeds = torch.randn(*batch.inputs["input_ids"].shape, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.get_decoder()(inputs_embeds=embeds, attention_mask=batch.inputs["attention_mask"], use_cache=False)
    flags = f"--dry-run --model {folder} --lora-rank 0 --micro-batch 12 --prompt-tokens {batch.start} --batch-size 4 --lr 1"
    args = ppo.parse_args([*flags.split(), "--max-new-tokens", str(embeds.shape[1] - batch.start), "--generate-batch", "9"])
    plan = ppo.memory_plan(args)
    assert plan["weights"] == sum(p.numel() * 4 for p in model.parameters()) == plan["reference copy"]
    assert plan["update: activations"] == pytest.approx(sum(x.nbytes() for x in held.values()), rel=0.15)
    assert plan["sampling: KV cache"] == 2 * 5 * 9 * embeds.shape[1] * 128 * 4  # a layer more: the one that is being copied
    assert plan["peak"] == pytest.approx(sum(v for k, v in plan.items() if ": " not in k and k != "peak") + max(
        sum(v for k, v in plan.items() if k.startswith(phase)) for phase in ("sampling: ", "update: ")))  # fmt: skip
    args.lora_rank = 4
    adapters = ppo.memory_plan(args)
    assert adapters["gradients"] == 4 * 4 * 4 * (4 * (128 + 128) + 2 * (128 + 320) + (320 + 128))  # bytes, rank, layers, shapes
    args.lora_targets = "nothing"
    with pytest.raises(SystemExit) as error:
        ppo.memory_plan(args)
    assert error.value.code == 2
