"""Stage 3: reinforcement learning with the three rewards of MMBoundary (sec. 3.2), by a hand-written PPO.

Each update samples N responses for a batch of training questions, splits them into sentences z_t and statements c_t, and scores
    R_KA  knowledge accuracy: does z_t match the reference chain?                        eq. 10
    R_EC  expected calibration: 1 - 2 (I(z_t) - EV(c_t))^2                               eq. 11
    R_CS  self-calibration: 1 - 2 (IV(z_t) - EV(c_t))^2, IV by the policy's own logits   eq. 12
    R = alpha R_KA + beta R_EC + gamma R_CS                                              eq. 13
then turns rewards into advantages (GAE) and takes clipped policy steps (eq. 14) with a penalty for leaving the warm-up policy.
Reads the folder that warmup.py wrote. Writes the model, value_head.safetensors, confidence.json, log.jsonl, training.png.

Choices beyond the paper
 1. A sentence without a statement gets the worst value, -1, in R_EC and R_CS; a response without a sentence gets 0, -1, -1.
 2. --reward-placement end is eq. 13: one reward at the last token. `sentence` places the same terms where what they judge ends;
    their sum is R, but that T is at least the number of sentences of the reference: with T as printed, policies learn to stop soon.
 3. The KL penalty is per token, to the warm-up policy, -kl_coef (log pi - log pi_ref) added to the reward; it is reported with the
    estimator exp(-x) - 1 + x (k3, Schulman 2020), x = log pi - log pi_ref.
 4. Advantages are divided by their standard deviation, not centred; those of statements by their own, which is several times
    smaller. No dropout; policy, old policy and reference come from one forward pass at temperature 1; eq. 14's ratio is a token's.
 5. The value head is a two-layer network on the last hidden state, whose gradient stops there. It is also told I(z) and IV(z) of
    the sentences that ended before (an asymmetric critic, Pinto et al. 2018), which are settled when a statement begins. It is
    fitted on the rollout, unclipped (Andrychowicz et al. 2021), and alone in the first updates, on sums of rewards (lambda = 1).
 6. The reference is a frozen copy: of the adapter on the same base weights, or of the whole model but its image tower.
 7. The entropy bonus counts statement tokens only: it keeps the choice of level alive and leaves the sentences alone.
 8. IV is the value of the internal level, as EV is of the stated one; --iv score reads "internal confidence score" as 1 - U_Final.

    python ppo.py --ckpt warmup/
    python ppo.py --ckpt warmup/ --beta 0             # the ablation w/o R_EC (likewise --alpha 0, --gamma 0)
    python ppo.py --ckpt warmup/ --server http://localhost:8000    # an inference server samples; --server URL --help
"""

import copy
import functools
import shutil
import time
from argparse import Namespace
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path

import common
from common import COUNT, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE, TEXT, TRAINING_FLAGS, Step, conf, response_statistics, step_tokens

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

FLAGS = {
    "run": {"ckpt": (TEXT, "warmup", "folder that warmup.py wrote"), "out": (TEXT, "ppo", "folder to write"), **TRAINING_FLAGS},
    "reward (eq. 13)": {
        "alpha": (NOT_NEGATIVE, 1.0, "weight of R_KA; 0 is the ablation w/o R_KA"),
        "beta": (NOT_NEGATIVE, 1.0, "weight of R_EC; 0 is the ablation w/o R_EC"),
        "gamma": (NOT_NEGATIVE, 1.0, "weight of R_CS; 0 is the ablation w/o R_CS"),
        "reward": (("sentences", "answer"), "sentences", "eq. 13, or that of SaySelf: the calibration of the last sentence"),
        "iv": (("level", "score"), "level", "IV of eq. 12: the value of the internal level, or 1 - U_Final"),
        "reward_placement": (("sentence", "end"), "sentence", "see choice 2 above"),
        "kl_coef": (NOT_NEGATIVE, 0.03, "penalty for leaving the warm-up policy"),
        "max_kl": (POSITIVE, 1000.0, "nats a response from the warm-up policy at which a run has gone astray and stops"),
    },
    "rollouts": {
        "updates": (COUNT, 96, 200, "number of rollouts and updates"),
        "batch_size": (COUNT, 64, 16, "questions a rollout"),
        "samples": (COUNT, 3, "N, responses a question (App. B)"),
        "generate_batch": (COUNT, 96, 8, "responses sampled and measured at once; changes memory"),
        "max_new_tokens": (COUNT, 72, 256, "longest response"),
    },
    "update": {
        "epochs": (COUNT, 2, "passes over a rollout"),
        "minibatches": (COUNT, 4, "optimizer steps an epoch"),
        "micro_batch": (COUNT, 48, 4, "responses a forward pass with gradient; changes memory, not the result"),
        "lr": (POSITIVE, 3e-4, 1e-5, "learning rate of the policy"),
        "warmup_ratio": (SHARE, 0.1, "share of updates with rising learning rate"),
        "value_lr": (POSITIVE, 2e-3, "learning rate of the value head"),
        "value_epochs": (COUNT, 8, "passes of the value head over a rollout"),
        "value_updates": (NATURAL, 1, "first updates that train the value head alone"),
        "clip_range": (POSITIVE, 0.2, "epsilon of eq. 14"),
        "discount": (SHARE, 1.0, "of GAE"),
        "lam": (SHARE, 0.9, "lambda of GAE"),
        "entropy_coef": (NOT_NEGATIVE, 0.02, "bonus on statement tokens"),
        "max_grad_norm": (POSITIVE, 1.0, "gradient clipping"),
        "save_every": (COUNT, 10, "updates between checkpoints"),
    },
}
parse_args = functools.partial(common.parse_flags, __doc__, FLAGS)


# ---------------------------------------------------------------------------------------------------------------- rollouts
class ValueHead(nn.Module):
    """V(s) from the policy's last hidden state (..., H) and what is known of the sentences before (..., 3) -> (...)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size + 3, 128), nn.Tanh(), nn.Linear(128, 1))
        for parameter in self.layers[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, known: Tensor) -> Tensor:
        return self.layers(torch.cat([hidden.float(), known], -1)).squeeze(-1)


SAID = [f"level_{level}" for level in (*common.LEVELS, "none")]  # in the log: the share of sentences that say it
# The reference is None where it is the adapter of that name on the policy's base weights.
Models = namedtuple("Models", "policy reference value_head")


@dataclass
class Rollout:
    """N responses to each question of a batch, B in all, padded to T response tokens; the tensors are 0 outside `mask`."""

    records: list[dict]  # the question of each response
    responses: list[common.Response]
    steps: list[list[Step]]  # its sentences and statements
    mask: Tensor  # (B, T) bool: response tokens
    statement: Tensor  # (B, T) bool: tokens of statements
    logprob: Tensor  # (B, T) of the policy that sampled
    entropy: Tensor  # (B, T) of its distributions
    hidden: Tensor  # (B, T, H) its last hidden state before each token
    ref_logprob: Tensor  # (B, T) of the warm-up policy


def reference_logprob(models: Models, batch: common.Batch) -> Tensor:
    """Log-probability of the response tokens under the frozen warm-up policy (B, T)."""
    if models.reference:
        return response_statistics(models.reference, batch)[0]
    models.policy.model.set_adapter("reference")
    logprob, _, _ = response_statistics(models.policy, batch)
    models.policy.model.set_adapter("default")
    return logprob


@torch.no_grad()
def rollout(models: Models, reader, questions: list[dict], args, seed: int, first: int = 0) -> Rollout:
    """Sample args.samples responses a question from the policy, and keep what the update needs to know of them. first: how many
    other processes draw before these, so that no two draw with the same seed."""
    records = [question for question in questions for _ in range(args.samples)]
    policy, responses, measured = models.policy, [], []
    for part in common.chunks(records, args.generate_batch):
        with common.images_encoded_once(policy):
            prompts = common.collate(policy, part)
            ids = common.generate(policy, prompts, 1.0, args.max_new_tokens, seed + 1_000_003 * (first + len(responses)))
            batch = common.add_responses(policy, prompts, ids)
            statistics = (*response_statistics(policy, batch), reference_logprob(models, batch))
        for row, tokens in enumerate(ids):
            responses.append(common.read_response(policy.tokenizer, tokens))
            measured.append([values[row, : len(tokens)].float().cpu() for values in statistics])
    logprob, entropy, hidden, ref_logprob = (pad_sequence(rows, batch_first=True) for rows in zip(*measured, strict=True))
    steps = reader.parse([response.text for response in responses])
    mask, statement = torch.zeros(2, *logprob.shape, dtype=torch.bool)
    for row, response in enumerate(responses):
        mask[row, : len(response.ids)] = True
        for step in steps[row]:
            begin = step.end if step.said is None else step.said
            statement[row, step_tokens(response.offsets, begin, step.stop)] = True
    return Rollout(records, responses, steps, mask, statement, logprob, entropy, hidden, ref_logprob)


# ----------------------------------------------------------------------------------------------------------------- rewards
@dataclass
class Judge:
    """I(z_t) by the matcher and IV(z_t) (choice 8) by the estimators of the estimate run, on the logits the policy sampled from."""

    confidence: dict
    clip: common.ClipScorer
    similarity: common.Similarity
    matcher: common.Matcher
    iv: str

    def __call__(self, roll: Rollout) -> list[tuple[np.ndarray, np.ndarray]]:
        """-> I (0 or 1) and IV (0 to 1) of the sentences of each response."""
        texts = [[step.text for step in steps] for steps in roll.steps]
        matched = self.matcher(texts, [common.reference_chain(record) for record in roll.records])
        raw = common.uncertainties(roll.records, roll.responses, roll.steps, roll.logprob, roll.entropy, self.clip, self.similarity)
        fused = [common.fuse(values, self.confidence) for values in raw]
        internal = [1 - u if self.iv == "score" else conf(common.to_level(u, self.confidence)) for u in fused]
        return list(zip((matches.any(1) for matches in matched), internal, strict=True))


def rewards(roll: Rollout, judged: list, args: Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """Reward of every token (B, T), without the KL penalty, and R_KA, R_EC, R_CS (B,); judged: I and IV of each one's sentences."""
    scores, parts = torch.zeros(roll.mask.shape), torch.zeros(len(roll.records), 3)
    weights = torch.tensor([args.alpha, args.beta, args.gamma])
    for row, (steps, (correct, internal)) in enumerate(zip(roll.steps, judged, strict=True)):
        terms = sentence_rewards(steps, correct, internal)  # (sentences, 3)
        parts[row] = terms.mean(0) if steps else torch.tensor([0.0, -1.0, -1.0])
        reward = weights @ parts[row]  # eq. 13
        if args.reward == "answer":  # SaySelf's: 1 - 2 (I - EV)^2 of the last sentence alone
            reward = terms[-1, 1] if steps else torch.tensor(-1.0)
        offsets = roll.responses[row].offsets
        if not steps or args.reward == "answer" or args.reward_placement == "end":
            scores[row, len(offsets) - 1] = reward  # at the last token: end-of-sequence where it came, never padding
        else:
            ends = [[step_tokens(offsets, 0, end)[-1] for end in (step.end, step.stop)] for step in steps]
            place_at_sentences(scores[row], weights * terms, ends, len(common.reference_chain(roll.records[row])))
    return scores, dict(zip("r_ka r_ec r_cs".split(), parts.T, strict=True))


def sentence_rewards(steps: list[Step], correct: np.ndarray, internal: np.ndarray) -> Tensor:
    """What R_KA, R_EC and R_CS are the means of, for every sentence (sentences, 3)."""
    terms = torch.full((len(steps), 3), -1.0)
    for t, step in enumerate(steps):
        terms[t, 0] = float(correct[t])  # eq. 10
        if step.level is not None:
            terms[t, 1] = 1 - 2 * (correct[t] - conf(step.level)) ** 2  # eq. 11
            terms[t, 2] = 1 - 2 * (internal[t] - conf(step.level)) ** 2  # eq. 12
    return terms


def place_at_sentences(scores: Tensor, terms: Tensor, ends: list, n_reference: int) -> None:
    """Each term where what it judges ends: scores (T,) of one response, weighted terms (sentences, 3), ends of z_t and c_t.
    By its t-th sentence a response has earned S = (sum of its terms so far) / max(t, n_reference). Every place is paid the change
    of S: they telescope to the last S, eq. 13 or less where sentences are missing."""
    earned = paid = 0.0
    for t, ((ka, ec, cs), (sentence_end, statement_end)) in enumerate(zip(terms, ends, strict=True), 1):
        for term, token in ((ka, sentence_end), (ec + cs, statement_end)):
            earned += term
            share = earned / max(t, n_reference)
            scores[token] += share - paid
            paid = share


def known_before(roll: Rollout, judged: list) -> Tensor:
    """What the value head is told at each token (B, T, 3) of the sentences before: I, IV of the latest, share of right ones."""
    known = torch.zeros(*roll.mask.shape, 3)
    for row, (steps, (correct, internal)) in enumerate(zip(roll.steps, judged, strict=True)):
        for t, step in enumerate(steps):
            after = step_tokens(roll.responses[row].offsets, step.start, step.end)[-1] + 1
            known[row, after:] = torch.tensor([correct[t], internal[t], correct[: t + 1].mean()])
    return known


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015); (B, T) each -> advantages, returns, 0 outside the mask:
    delta_t = r_t + discount V_{t+1} - V_t,  A_t = delta_t + discount lam A_{t+1};  V = 0 after a response's last token."""
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + discount * lam * following, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


# ------------------------------------------------------------------------------------------------------------------ update
def policy_loss(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (eq. 14) of each token, and per-token diagnostics; all 1-D over tokens."""
    logratio = logprob - old_logprob
    ratio = logratio.exp()
    plain_objective = ratio * advantages
    clipped_objective = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -torch.min(plain_objective, clipped_objective)  # eq. 14
    with torch.no_grad():
        diagnostics = {"clipfrac": ((ratio - 1).abs() > clip_range).float(), "approx_kl": ratio - 1 - logratio}
    return loss, diagnostics


def update(models: Models, optimizer, roll: Rollout, advantages: Tensor, args, seed: int, accelerator) -> dict:
    """args.epochs passes of args.minibatches optimizer steps of the policy -> means over all tokens of all steps. Losses are
    normalised by the tokens of the minibatch in all processes, whatever the micro-batch."""
    policy, sums, norms = models.policy, Counter(), []
    device, generator = policy.model.device, torch.Generator().manual_seed(seed)
    for _ in range(args.epochs):
        for mb_rows in torch.randperm(len(roll.records), generator=generator).tensor_split(args.minibatches):
            counts = torch.stack([roll.mask[mb_rows].sum(), roll.statement[mb_rows].sum()]).to(device)
            tokens, statements = accelerator.reduce(counts, "sum").clamp(min=1)
            optimizer.zero_grad()
            for rows in mb_rows.split(args.micro_batch) if len(mb_rows) else ():
                batch = common.collate(policy, [roll.records[i] for i in rows], [roll.responses[i].ids for i in rows])
                logprob, entropy, _ = response_statistics(policy, batch)
                mask, width = batch.mask, batch.mask.shape[1]
                statement, old_logprob, adv = (x[rows, :width].to(device) for x in (roll.statement, roll.logprob, advantages))
                pg_loss, diagnostics = policy_loss(logprob[mask], old_logprob[mask], adv[mask], args.clip_range)
                loss = pg_loss.sum() / tokens - args.entropy_coef * entropy[statement].sum() / statements
                loss.backward()
                for name, values in (diagnostics | {"policy_loss": pg_loss, "entropy": entropy[mask]}).items():
                    sums[name] += values.detach().sum().item()
                sums["tokens"] += int(mask.sum())
            common.sum_gradients(accelerator, policy.model)
            norms.append(nn.utils.clip_grad_norm_(policy.model.parameters(), args.max_grad_norm).item())
            optimizer.step()
    n_tokens = sums.pop("tokens")
    return {name: value / n_tokens for name, value in sums.items()} | {"grad_norm": float(np.mean(norms))}


def fit_value(head: ValueHead, optimizer, hidden: Tensor, known: Tensor, returns: Tensor, epochs, seed, accelerator) -> float:
    """Passes of the value head over a rollout's tokens: hidden (tokens, H), known (tokens, 3), returns (tokens,) -> mean loss."""
    generator, losses, n = torch.Generator().manual_seed(seed), [], accelerator.num_processes
    n_tokens = accelerator.reduce(torch.tensor(len(returns), device=returns.device), "sum")
    steps = -(-int(n_tokens) // (1024 * n))  # of about 1024 tokens in each process
    for _ in range(epochs):
        for rows in torch.randperm(len(returns), generator=generator).tensor_split(steps):
            loss = 0.5 * (head(hidden[rows], known[rows]) - returns[rows]).square().mean() / n
            optimizer.zero_grad()
            loss.backward()
            common.sum_gradients(accelerator, head)
            optimizer.step()
            losses.append(loss.item() * n)
    return float(np.mean(losses))


def train_update(models: Models, optimizers: dict, reader, judge: Judge, questions, args, seed, value_only, accelerator) -> dict:
    """One round of PPO -> a line of log.jsonl. Processes share the questions; the policy's loss is normalised over all of them."""
    # 1. sample responses
    began, device = time.time(), models.policy.model.device
    with accelerator.split_between_processes(questions) as mine:
        roll = rollout(models, reader, mine, args, seed, accelerator.process_index * len(mine) * args.samples)
    sampled = time.time()

    # 2. judge their sentences, reward their tokens; leaving the warm-up policy costs
    judged = judge(roll)
    scores, parts = rewards(roll, judged, args)
    logratio = roll.logprob - roll.ref_logprob  # (B, T)
    penalised = scores - args.kl_coef * logratio

    # 3. values and advantages
    hidden, known = roll.hidden[roll.mask].to(device), known_before(roll, judged)[roll.mask].to(device)  # (tokens, ...)
    with torch.no_grad():
        values = torch.zeros(roll.mask.shape).masked_scatter(roll.mask, models.value_head(hidden, known).cpu())
    advantages, returns = gae(penalised, values, roll.mask, args.discount, 1.0 if value_only else args.lam)
    rewarded = time.time()

    # 4. improve the policy, then fit the value head
    stats = dict.fromkeys("policy_loss clipfrac approx_kl entropy grad_norm".split(), np.nan)
    if not value_only:
        apart = [advantages[tokens] for tokens in (roll.mask & ~roll.statement, roll.statement)]
        sentences, statements = (max(1e-8, np.std(gather_object(part.tolist()) or [0])) for part in apart)
        statements = max(statements, sentences / 20)  # where they are few or all alike
        b_advantages = advantages / torch.where(roll.statement, statements, sentences)
        stats = update(models, optimizers["policy"], roll, b_advantages, args, seed, accelerator)
    b_returns, epochs = returns[roll.mask].to(device), args.value_epochs * (5 if value_only else 1)
    value_fit = fit_value(models.value_head, optimizers["value"], hidden, known, b_returns, epochs, seed, accelerator)

    # 5. what happened, on the mean of all processes
    stats |= {name: part.mean().item() for name, part in parts.items()}
    levels = np.array([step.level or 0 for steps in roll.steps for step in steps])
    n_sentences = np.mean(gather_object([len(levels)])) or 1  # of a process, so that the mean of the shares is that of all
    stats |= {name: (levels == level).sum() / n_sentences for name, level in zip(SAID, (*common.LEVELS, 0), strict=True)}
    stats["auroc"] = common.auroc(levels[levels > 0], np.concatenate([correct for correct, _ in judged])[levels > 0])
    stats |= {"reward": scores.sum(1).mean().item(), "value_loss": value_fit}
    stats["kl"] = ((-logratio).exp() - 1 + logratio).sum(1).mean().item()
    sampled_returns, _ = gae(penalised, torch.zeros_like(values), roll.mask, args.discount, 1.0)
    residual = (sampled_returns - values)[roll.mask]
    stats["explained_variance"] = 1 - (residual.var() / (sampled_returns[roll.mask].var() + 1e-8)).item()
    stats["response_length"] = roll.mask.sum(1).float().mean().item()
    stats |= {"seconds_rollout": sampled - began, "seconds_reward": rewarded - sampled, "seconds_update": time.time() - rewarded}
    means = torch.tensor(gather_object([list(stats.values())])).nanmean(0)
    return dict(zip(stats, means.tolist(), strict=True))


def load_models(ckpt: Path, args: Namespace, device: str) -> Models:
    """The warm-up policy to train, its frozen reference and a new value head (or the saved one of a PPO checkpoint)."""
    torch.manual_seed(args.seed)
    policy, reference = common.load_model(ckpt, args, device, trainable=True), None
    if hasattr(policy.model, "peft_config"):
        policy.model.load_adapter(ckpt, "reference", is_trainable=False)
        policy.model.set_adapter("default")
    else:
        tower = policy.base.get_encoder(modality="image")
        reference = copy.deepcopy(policy, {id(tower): tower, id(policy.processor): policy.processor})
        reference.model.requires_grad_(False)
    value_head = ValueHead(policy.head.in_features).to(device)
    if (ckpt / "value_head.safetensors").exists():
        value_head.load_state_dict(load_file(ckpt / "value_head.safetensors"))
    return Models(policy, reference, value_head)


def make_optimizers(models: Models, args: Namespace) -> dict[str, torch.optim.Optimizer]:
    policy = torch.optim.AdamW(common.trainable(models.policy.model), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return {"policy": policy, "value": torch.optim.AdamW(models.value_head.parameters(), lr=args.value_lr, weight_decay=0.0)}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    ckpt = Path(args.ckpt)
    setup = common.read_run(ckpt, "sft.jsonl", "confidence.json")["setup"]
    common.fill_defaults(args, FLAGS, setup["data"])
    questions = common.read_finished(ckpt, "sft.jsonl", "choices")
    confidence = common.read_object(ckpt / "confidence.json", *"weights fuse min max edges".split())
    blind = (args.alpha or args.beta) and not all(map(common.reference_chain, questions))
    problem = "R_KA and R_EC need the reference chains that given responses lack: --alpha 0 --beta 0"
    common.usage_error(*common.cannot_train(ckpt, args), blind and problem)
    run = common.Run("ppo", args, setup)
    if run.finished:
        return
    reader = common.StatementReader(setup["statement_encoder"], run.device, setup.get("layout", "each"))
    matcher, similarity = common.Matcher(setup["matcher"], run.device), common.Similarity(setup["similarity"], run.device)
    judge = Judge(confidence, common.ClipScorer(setup["clip"], run.device), similarity, matcher, args.iv)
    models = load_models(ckpt, args, run.device)
    for name in ("confidence.json", "sft.jsonl"):
        run.write(lambda path: shutil.copy(ckpt / path.name, path), name)
    optimizers, modules = make_optimizers(models, args), {"policy": models.policy.model, "value_head": models.value_head}
    training = common.Training(run, modules, optimizers, args.updates, args.save_every, args.max_kl)
    for step in training:
        epoch, position = divmod(step * args.batch_size, len(questions))
        epochs = range(epoch, epoch + 2 + args.batch_size // len(questions))
        order = np.concatenate([np.random.default_rng([args.seed, e]).permutation(len(questions)) for e in epochs])
        picked = [questions[i] for i in order[position : position + args.batch_size]]
        common.set_learning_rate(optimizers["policy"], args.lr, step, args.updates, args.warmup_ratio)
        seed, value_only = args.seed * 1_000_000 + step, step < args.value_updates
        stats = train_update(models, optimizers, reader, judge, picked, args, seed, value_only, run.accelerator)
        training.record({"update": step} | stats, *"reward r_ka r_ec r_cs auroc kl".split())
    panels = {"reward": ("reward", "r_ka", "r_ec", "r_cs"), "policy": ("kl", "entropy", "explained_variance"), "levels": SAID}
    run.write(common.plot_log, "training.png", training.log, panels)
    if models.reference is None:
        models.policy.model.delete_adapter("reference")
    run.write(common.save_model, "", models.policy)
    run.write(lambda path: save_file(models.value_head.state_dict(), path), "value_head.safetensors")
    run.finish()


if __name__ == "__main__":
    common.run_script(main, "--server")
