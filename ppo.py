"""Stage 3: reinforcement learning with the three rewards of MMBoundary (sec. 3.2), by a hand-written PPO.

Each update samples N responses for a batch of training questions, splits them into sentences z_t and statements c_t, and scores
    R_KA  knowledge accuracy: does z_t match the reference chain?                        eq. 10
    R_EC  expected calibration: 1 - 2 (I(z_t) - EV(c_t))^2                               eq. 11
    R_CS  self-calibration: 1 - 2 (IV(z_t) - EV(c_t))^2, IV from the policy's own logits eq. 12
    R = alpha R_KA + beta R_EC + gamma R_CS                                              eq. 13
then turns rewards into advantages (GAE) and takes clipped policy steps (eq. 14) with a penalty for leaving the warm-up policy.

Reads the folder that warmup.py wrote. Writes to --out: the model, value_head.safetensors, the processor, confidence.json,
log.jsonl (a line an update), training.png, trainer_state.pt (the same command continues an interrupted run).

Choices beyond the paper
 1. A sentence without a statement gets the worst value, -1, in R_EC and R_CS; a response without a sentence gets 0, -1, -1.
 2. --reward-placement end is eq. 13: one reward at the last token. `sentence` places the same terms where what they judge ends:
    R_KA's at the last token of z_t, R_EC's and R_CS's at that of c_t, each divided by the number of sentences of the reference
    chain, or by t where that is more: a sentence beyond those dilutes the ones before it, at its own token and not at theirs.
    What is then left of R (responses that are too short) comes at the last token. The sum is the same R.
 3. The KL penalty is per token, to the warm-up policy, -kl_coef (log pi - log pi_ref) added to the reward; it is reported with the
    estimator exp(-x) - 1 + x (k3, Schulman 2020), x = log pi - log pi_ref.
 4. Advantages are divided by their standard deviation, not centred. No dropout anywhere; policy, old policy and reference come from
    the same forward pass.
 5. The value head is a two-layer network on the last hidden state, whose gradient stops there, so that a bad value cannot harm
    the policy. It is also told I(z) and IV(z) of the sentences that ended before (an asymmetric critic, Pinto et al. 2018): they
    are settled when a statement begins, so as a baseline they leave the gradient unbiased and take out most of its noise. It is
    fitted on the rollout, some passes an update, without clipping (which slows it down: Andrychowicz et al. 2021), and alone in
    the first updates, on undiscounted sums of rewards.
 6. The reference is a second, frozen copy of the adapter on the same base weights, or a frozen copy for full fine-tuning.
 7. The entropy bonus counts statement tokens only: it keeps the choice of level alive and leaves the sentences alone.

    python ppo.py --ckpt warmup/
    python ppo.py --ckpt warmup/ --beta 0             # the ablation w/o R_EC (likewise --alpha 0, --gamma 0)
    python ppo.py --ckpt warmup/ --reward-placement end
    python ppo.py --dry-run --model llava-hf/llava-v1.6-vicuna-7b-hf --load-in-4bit --dtype bfloat16
"""

import argparse
import copy
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

import common as c

# What is left out on the command line: (digits, real models as in App. B)
DEFAULTS = {
    "updates": (48, 200), "batch_size": (64, 16), "lr": (2e-4, 1e-5), "kl_coef": (0.03, 0.03), "micro_batch": (48, 4),
    "max_new_tokens": (72, 256), "generate_batch": (192, 8), "lora_rank": (0, 16),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = c.Parser(__doc__)
    parser.add_argument("--ckpt", default="warmup", help="folder that warmup.py wrote (default: %(default)s/)")
    reward = parser.add_argument_group("reward (eq. 13)")
    reward.add_argument("--alpha", type=float, default=1.0, help="weight of R_KA; 0 is the ablation w/o R_KA (default: 1)")
    reward.add_argument("--beta", type=float, default=1.0, help="weight of R_EC; 0 is the ablation w/o R_EC (default: 1)")
    reward.add_argument("--gamma", type=float, default=1.0, help="weight of R_CS; 0 is the ablation w/o R_CS (default: 1)")
    reward.add_argument("--reward-placement", choices=["sentence", "end"], default="sentence", help="see choice 2 above")
    reward.add_argument("--kl-coef", type=float, help="penalty for leaving the warm-up policy (0.03 / 0.03)")
    rollout = parser.add_argument_group("rollouts (defaults: digits / other data)")
    rollout.add_argument("--updates", type=int, help="number of rollouts and updates (48 / 200)")
    rollout.add_argument("--batch-size", type=int, help="questions a rollout (64 / 16)")
    rollout.add_argument("--samples", type=int, default=3, help="N, responses a question (default: 3, App. B)")
    rollout.add_argument("--generate-batch", type=int, help="responses generated at once; changes memory (192 / 8)")
    rollout.add_argument("--max-new-tokens", type=int, help="longest response (72 / 256)")
    rollout.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: 1)")
    update = parser.add_argument_group("update (defaults: digits / other data)")
    update.add_argument("--epochs", type=int, default=2, help="passes over a rollout (default: 2)")
    update.add_argument("--minibatches", type=int, default=4, help="optimizer steps an epoch (default: 4)")
    update.add_argument("--micro-batch", type=int, help="responses a forward pass; changes memory, not the result (48 / 4)")
    update.add_argument("--lr", type=float, help="learning rate of the policy (2e-4 / 1e-5)")
    update.add_argument("--warmup-ratio", type=float, default=0.1, help="share of updates with rising learning rate (0.1)")
    update.add_argument("--value-lr", type=float, default=2e-3, help="learning rate of the value head (default: 2e-3)")
    update.add_argument("--value-epochs", type=int, default=8, help="passes of the value head over a rollout (default: 8)")
    update.add_argument("--value-updates", type=int, default=1, help="first updates that train the value head alone (1)")
    update.add_argument("--clip-range", type=float, default=0.2, help="epsilon of eq. 14 (default: 0.2)")
    update.add_argument("--discount", type=float, default=1.0, help="discount of GAE (default: 1)")
    update.add_argument("--lam", type=float, default=0.9, help="lambda of GAE (default: 0.9)")
    update.add_argument("--entropy-coef", type=float, default=0.02, help="bonus on statement tokens (default: 0.02)")
    update.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient clipping (default: 1)")
    update.add_argument("--save-every", type=int, default=10, help="updates between checkpoints (default: 10)")
    c.add_run_arguments(parser.add_argument_group("run"), out="ppo")
    plan = parser.add_argument_group("memory plan, and as given to warmup.py")
    c.add_training_arguments(plan)
    plan.add_argument("--dry-run", action="store_true", help="load nothing, print the memory that a run on --model needs")
    plan.add_argument("--model", help="hub name, or folder with a config.json, of the base model to plan for")
    plan.add_argument("--prompt-tokens", type=int, default=2400, help="longest prompt, image tokens included (default: 2400)")
    args = parser.parse_args(argv)
    numbers = ("updates", "batch_size", "samples", "max_new_tokens", "epochs", "minibatches", "micro_batch", "lr", "temperature")
    problems = c.positive(args, *numbers, "clip_range", "max_grad_norm", "save_every", "generate_batch", "prompt_tokens")
    problems += ["--dry-run needs --model"] * (args.dry_run and not args.model)
    problems += [f"--{n} must lie between 0 and 1" for n in ("discount", "lam") if not 0 <= getattr(args, n) <= 1]
    c.usage_error(*problems)
    return args


class ValueHead(nn.Module):
    """V(s) from the policy's last hidden state (..., H) and what is known of the sentences before (..., 3) -> (...)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden_size + 3, 128), nn.Tanh(), nn.Linear(128, 1))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, hidden: Tensor, known: Tensor) -> Tensor:
        return self.layers(torch.cat([hidden.float(), known], -1)).squeeze(-1)


@dataclass
class Rollout:
    """N responses to each question of a batch, B in all, padded to T response tokens; the tensors are 0 outside `mask`."""

    records: list[dict]  # the question of each response
    generations: list[c.Generation]
    steps: list[list[c.Step]]  # its sentences and statements
    mask: Tensor  # (B, T) bool: response tokens
    statement: Tensor  # (B, T) bool: tokens of statements
    logprob: Tensor  # (B, T) of the policy that sampled
    ref_logprob: Tensor  # (B, T) of the warm-up policy
    hidden: Tensor  # (B, T, H) last hidden state before each token


@dataclass
class Models:
    policy: nn.Module
    reference: nn.Module | None  # None: the adapter named "reference" on the same base weights
    value_head: ValueHead
    processor: object

    def forward(self, records: list[dict], ids: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of the policy -> log-probability (B, T), entropy (B, T) and last hidden state (B, T, H) of response tokens."""
        return c.response_statistics(self.policy, c.collate(self.processor, records, ids, self.policy.device))

    def ref_logprob(self, records: list[dict], ids: list[list[int]]) -> Tensor:
        batch = c.collate(self.processor, records, ids, self.policy.device)
        model = self.reference or self.policy
        if self.reference is None:
            self.policy.set_adapter("reference")
        logprob, _, _ = c.response_statistics(model, batch)
        if self.reference is None:
            self.policy.set_adapter("default")
        return logprob


@torch.no_grad()
def rollout(models: Models, questions: list[dict], args: argparse.Namespace, seed: int, first: int = 0) -> Rollout:
    """Sample args.samples responses a question from the policy, and keep what the update needs to know of them.

    first: how many responses of the same batch other processes draw before these, so that no two draw with the same seed.
    """
    records = [q for q in questions for _ in range(args.samples)]
    known = models.policy.dtype == torch.float32  # then generation has the numbers of the update's pass; bfloat16 rounds otherwise
    generations = []
    for part in c.chunks(records, args.generate_batch):
        sampling = (args.temperature, args.max_new_tokens, seed + 1_000_003 * (first + len(generations)), known)
        generations += c.generate(models.policy, models.processor, part, *sampling)
    steps = c.parse([g.text for g in generations])
    B, T = len(records), max(len(g.ids) for g in generations)
    mask, statement = torch.zeros(2, B, T, dtype=torch.bool)
    logprob, ref_logprob = torch.zeros(2, B, T)
    hidden = torch.zeros(B, T, models.policy.get_output_embeddings().in_features)
    for row, (generation, sentence_steps) in enumerate(zip(generations, steps, strict=True)):
        mask[row, : len(generation.ids)] = True
        if known:
            logprob[row, : len(generation.ids)], hidden[row, : len(generation.ids)] = generation.logprob, generation.hidden
        for step in sentence_steps:
            statement[row, c.step_tokens(generation.offsets, step.end, step.stop)] = True
    for rows in torch.arange(B).split(args.micro_batch):
        part, ids = [records[i] for i in rows], [generations[i].ids for i in rows]
        width = max(map(len, ids))
        if not known:
            logprob[rows, :width], _, hidden[rows, :width] = (x.float().cpu() for x in models.forward(part, ids))
        ref_logprob[rows, :width] = models.ref_logprob(part, ids).cpu()
    return Rollout(records, generations, steps, mask, statement, logprob, ref_logprob, hidden)


def rewards(roll: Rollout, judged: list, args: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """Reward of every token (B, T) without the KL penalty, and R_KA, R_EC, R_CS of every response (B,).

    judged: for each response, I(z_t) and IV(z_t) of its T sentences, two arrays.
    """
    scores = torch.zeros(roll.mask.shape)
    parts = {name: torch.zeros(len(roll.records)) for name in ("r_ka", "r_ec", "r_cs")}
    for row, (steps, (correct, internal)) in enumerate(zip(roll.steps, judged, strict=True)):
        last = len(roll.generations[row].ids) - 1  # the response's last token: end-of-sequence where it came, never padding
        if not steps:
            parts["r_ec"][row] = parts["r_cs"][row] = -1.0
            scores[row, last] -= args.beta + args.gamma
        total, credited, length = 0.0, 0.0, len(c.chain(roll.records[row]))
        for t, step in enumerate(steps):
            ec = cs = -1.0
            if step.level is not None:
                ec = 1 - 2 * (float(correct[t]) - c.conf(step.level)) ** 2  # eq. 11
                cs = 1 - 2 * (float(internal[t]) - c.conf(step.level)) ** 2  # eq. 12
            ka = float(correct[t])  # eq. 10
            for name, term in (("r_ka", ka), ("r_ec", ec), ("r_cs", cs)):
                parts[name][row] += term / len(steps)
            expected = max(t + 1, length)
            for end, term in ((step.end, args.alpha * ka), (step.stop, args.beta * ec + args.gamma * cs)):
                total += term
                if args.reward_placement == "sentence":
                    scores[row, c.step_tokens(roll.generations[row].offsets, step.start, end)[-1]] += total / expected - credited
                    credited = total / expected
        scores[row, last] += total / max(len(steps), 1) - credited  # eq. 13: the rest of R, or all of it
    return scores, parts


class Judge:
    """I(z_t) by the matcher and IV(z_t) by the estimators of the estimate run, on the logits the policy sampled from."""

    def __init__(self, confidence: dict, clip: c.ClipScorer, similarity: c.Similarity, matcher: c.Matcher):
        self.confidence, self.clip, self.similarity, self.matcher = confidence, clip, similarity, matcher

    def __call__(self, roll: Rollout) -> list[tuple[np.ndarray, np.ndarray]]:
        raw = c.uncertainties(roll.records, roll.generations, roll.steps, self.clip, self.similarity)
        matched = self.matcher([[s.text for s in steps] for steps in roll.steps], [c.chain(r) for r in roll.records])
        judged = []
        for correct, values in zip(matched, raw, strict=True):
            levels = c.to_level(c.fuse(values, self.confidence), self.confidence)
            judged.append((correct.any(1), np.array([c.conf(level) for level in levels])))
        return judged


def known_before(roll: Rollout, judged: list) -> Tensor:
    """What the value head is told at each token (B, T, 3) of the sentences that ended before it: I and IV of the latest one, and
    the share of right ones; 0 in the first sentence."""
    known = torch.zeros(*roll.mask.shape, 3)
    for row, (steps, (correct, internal)) in enumerate(zip(roll.steps, judged, strict=True)):
        for t, step in enumerate(steps):
            after = c.step_tokens(roll.generations[row].offsets, step.start, step.end)[-1] + 1
            known[row, after:] = torch.tensor([float(correct[t]), float(internal[t]), float(np.mean(correct[: t + 1]))])
    return known


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015); (B, T) each -> advantages, returns, 0 outside the mask.

    delta_t = r_t + discount V_{t+1} - V_t,  A_t = delta_t + discount lam A_{t+1};  V = 0 after a response's last token.
    """
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + discount * lam * following, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def policy_loss(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (eq. 14) of each token, and per-token diagnostics; all 1-D over tokens."""
    logratio = logprob - old_logprob
    ratio = logratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)  # eq. 14
    with torch.no_grad():
        diagnostics = {"clipfrac": ((ratio - 1).abs() > clip_range).float(), "approx_kl": ratio - 1 - logratio}
    return loss, diagnostics


def value_loss(value: Tensor, returns: Tensor) -> Tensor:
    """Squared error of each token; 1-D over tokens."""
    return 0.5 * (value - returns) ** 2


def fit_value(value_head: ValueHead, optimizer, hidden: Tensor, known: Tensor, returns: Tensor, epochs: int, seed: int) -> float:
    """Passes of the value head over a rollout's tokens: hidden (tokens, H), known (tokens, 3), returns (tokens,) -> mean loss."""
    generator, losses = torch.Generator().manual_seed(seed), []
    steps = -(-int(c.total(torch.tensor(len(returns), device=returns.device))) // (1024 * c.world_size()))  # of about 1024 tokens
    for _ in range(epochs):
        for rows in torch.randperm(len(returns), generator=generator).tensor_split(steps):
            optimizer.zero_grad()
            loss = value_loss(value_head(hidden[rows], known[rows]), returns[rows]).mean() / c.world_size()
            loss.backward()
            c.sum_gradients(value_head)
            optimizer.step()
            losses.append(loss.item())
    return float(np.mean(losses))


def update(models: Models, optimizer, roll: Rollout, advantages: Tensor, args, seed: int) -> dict:
    """args.epochs passes of args.minibatches optimizer steps of the policy -> means over all tokens of all steps.

    Losses are normalised by the tokens of the minibatch, whatever the micro-batch.
    """
    device, sums, norms = models.policy.device, {}, []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.epochs):
        for mb_rows in torch.randperm(len(roll.records), generator=generator).chunk(args.minibatches):
            optimizer.zero_grad()
            tokens = c.total(roll.mask[mb_rows].sum().to(device))
            statements = c.total(roll.statement[mb_rows].sum().to(device)).clamp(min=1)
            for rows in mb_rows.split(args.micro_batch):
                records, ids = [roll.records[i] for i in rows], [roll.generations[i].ids for i in rows]
                width = max(map(len, ids))
                logprob, entropy, _ = models.forward(records, ids)
                mask, statement = roll.mask[rows, :width].to(device), roll.statement[rows, :width].to(device)
                old_logprob, adv = (x[rows, :width].to(device)[mask] for x in (roll.logprob, advantages))
                pg_loss, token_stats = policy_loss(logprob[mask], old_logprob, adv, args.clip_range)
                bonus = entropy[statement].sum() / statements
                (pg_loss.sum() / tokens - args.entropy_coef * bonus).backward()
                token_stats |= {"policy_loss": pg_loss, "entropy": entropy[mask]}
                for name, values in token_stats.items():
                    sums[name] = sums.get(name, 0.0) + values.detach().sum().item()
                sums["tokens"] = sums.get("tokens", 0) + int(mask.sum())
            c.sum_gradients(models.policy)
            norms.append(nn.utils.clip_grad_norm_(models.policy.parameters(), args.max_grad_norm).item())
            optimizer.step()
    total = sums.pop("tokens")
    return {name: value / total for name, value in sums.items()} | {"grad_norm": float(np.mean(norms))}


def train_update(models: Models, optimizers: dict, questions: list[dict], judge, args, seed: int, value_only: bool = False) -> dict:
    """One round of PPO: rollout, rewards, advantages, updates of policy and value head -> a line of log.jsonl.

    With several processes each takes its share of the questions; what normalises a loss or a reward is of all of them.
    """
    began = time.time()
    first = len(questions) * c.rank() // c.world_size() * args.samples
    roll = rollout(models, c.share(questions), args, seed, first)
    sampled = time.time()
    judged = judge(roll)
    scores, parts = rewards(roll, judged, args)
    log_ratio = (roll.logprob - roll.ref_logprob) * roll.mask
    lam = 1.0 if value_only else args.lam
    device = models.policy.device
    hidden, known = roll.hidden[roll.mask].to(device), known_before(roll, judged)[roll.mask].to(device)
    with torch.no_grad():
        values = torch.zeros(roll.mask.shape).masked_scatter(roll.mask, models.value_head(hidden, known).cpu())
    advantages, returns = gae(scores - args.kl_coef * log_ratio, values, roll.mask, args.discount, lam)
    b_advantages, b_returns, b_values = advantages[roll.mask], returns[roll.mask], values[roll.mask]
    moments = torch.stack([torch.ones_like(b_advantages), b_advantages, b_advantages**2]).double().sum(1)
    n, first_moment, second_moment = c.total(moments.to(device)).tolist()
    scaled = advantages / ((second_moment / n - (first_moment / n) ** 2) ** 0.5 + 1e-8)
    scored = time.time()
    stats = dict.fromkeys(("policy_loss", "clipfrac", "approx_kl", "entropy", "grad_norm"))
    if not value_only:
        stats = update(models, optimizers["policy"], roll, scaled, args, seed)
    epochs = args.value_epochs * (5 if value_only else 1)
    stats["value_loss"] = fit_value(models.value_head, optimizers["value"], hidden, known, b_returns.to(device), epochs, seed)
    k3 = ((-log_ratio).exp() - 1 + log_ratio).sum(1).mean()
    levels = [step.level for steps in roll.steps for step in steps]
    said = [(ok, level) for ok, level in zip(np.concatenate([ok for ok, _ in judged]), levels, strict=True) if level]
    stats = {
        "reward": scores.sum(1).mean().item(),
        **{name: part.mean().item() for name, part in parts.items()},
        "auroc": float(roc_auc_score(*zip(*said, strict=True))) if len({ok for ok, _ in said}) == 2 else None,
        "kl": k3.item(),
        **stats,
        "explained_variance": 1 - ((b_returns - b_values).var() / (b_returns.var() + 1e-8)).item(),
        "response_length": roll.mask.sum(1).float().mean().item(),
        "levels": {str(level or "none"): levels.count(level) for level in (1, 2, 3, 4, 5, None)},
        "seconds_rollout": round(sampled - began, 3),
        "seconds_reward": round(scored - sampled, 3),
        "seconds_update": round(time.time() - scored, 3),
    }
    return over_processes(stats)


def over_processes(stats: dict) -> dict:
    """Counts of levels added up, means of everything else over the processes."""
    if c.world_size() == 1:
        return stats
    rows = [None] * c.world_size()
    dist.all_gather_object(rows, stats)
    merged = {k: [row[k] for row in rows if row[k] is not None] for k in stats if k != "levels"}
    levels = {"levels": {k: sum(row["levels"][k] for row in rows) for k in stats["levels"]}}
    return stats | {k: float(np.mean(v)) if v else None for k, v in merged.items()} | levels


def load_models(ckpt: Path, args: argparse.Namespace) -> Models:
    """The warm-up policy to train, its frozen reference and a new value head (or the saved one of a PPO checkpoint)."""
    torch.manual_seed(args.seed)
    args.lora_rank = 0  # the checkpoint has its adapter, or none
    policy, processor = c.load_model(ckpt, args, trainable=True)
    if hasattr(policy, "peft_config"):
        policy.load_adapter(ckpt, "reference", is_trainable=False)
        policy.set_adapter("default")
        reference = None
    else:
        reference = copy.deepcopy(policy).requires_grad_(False)
    value_head = ValueHead(policy.get_output_embeddings().in_features).to(policy.device)
    if (ckpt / "value_head.safetensors").exists():
        value_head.load_state_dict(load_file(ckpt / "value_head.safetensors"))
    return Models(policy, reference, value_head, processor)


def load_judge(confidence: dict, setup: dict, args: argparse.Namespace) -> Judge:
    similarity, matcher = c.Similarity(setup["similarity"], args.device), c.Matcher(setup["matcher"], device=args.device)
    c.statement_encoder = setup.get("statement_encoder")
    return Judge(confidence, c.ClipScorer(setup["clip"], args.device), similarity, matcher)


def make_optimizers(models: Models, args: argparse.Namespace) -> dict[str, torch.optim.Optimizer]:
    trained = [p for p in models.policy.parameters() if p.requires_grad]
    return {
        "policy": torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
        "value": torch.optim.AdamW(models.value_head.parameters(), lr=args.value_lr, weight_decay=0.0),
    }


class _AttentionShape(torch.autograd.Function):
    """What a fused attention kernel saves (q, k, v, its output, a log-sum-exp a row), for the meta device, which has none."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def memory_plan(args: argparse.Namespace) -> dict[str, float]:
    """Bytes of what a run on `args.model` holds at its peak, from the architecture alone: it is built on the meta device, and the
    activations are what autograd saves there for one micro-batch. Exits with code 2 where no LoRA target is found."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    dtype = getattr(torch, args.dtype)
    with c.loading("model", args.model):
        config = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head] if args.load_in_4bit else []
    packed = {id(w) for w in linear}  # NF4: half a byte, and an 8-bit scale a block of 64 with a float32 scale a 256 of those
    bytes_of = lambda ps: sum(p.numel() * (0.5 + (1 + 4 / 256) / 64 if id(p) in packed else p.element_size()) for p in ps)  # noqa: E731
    plan = {"weights": bytes_of(model.parameters())}
    if args.lora_rank:
        model = c.add_lora(model, args)
    else:
        c.freeze_vision(model)
    trained, text, decoder = [p for p in model.parameters() if p.requires_grad], config.get_text_config(), model.get_decoder()
    plan["adapters" if args.lora_rank else "reference copy"] = 2 * bytes_of(trained) if args.lora_rank else plan["weights"]
    plan |= {"gradients": bytes_of(trained), "optimizer": 2 * bytes_of(trained)}
    length, rows, size = args.prompt_tokens + args.max_new_tokens, args.batch_size * args.samples, dtype.itemsize
    plan["rollout's hidden states"] = 2 * rows * args.max_new_tokens * text.hidden_size * 4
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    sampling = {"KV cache": 2 * (text.num_hidden_layers + 1) * min(rows, args.generate_batch) * length * width * size}
    sampling["logits"] = 4 * min(rows, args.generate_batch) * text.vocab_size * 4
    saved = {}

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    embeds = torch.empty(args.micro_batch, length, text.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    mask = torch.empty(args.micro_batch, 1, length, length, device="meta", dtype=torch.bool)
    attention = patch.object(nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: _AttentionShape.apply(q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), attention:
        decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    update = {"activations": sum(storage.nbytes() for storage in saved.values())}
    if args.gradient_checkpointing:  # the input of every layer, and all of one layer at a time
        layers = text.num_hidden_layers
        update["activations"] = layers * embeds.nelement() * size + update["activations"] / layers
    update["logits in blocks"] = 5 * 4 * c._HeadStatistics.ROWS * min(c._HeadStatistics.BLOCK, text.vocab_size)
    update["a layer unpacked"] = max((w.numel() * size for w in linear), default=0)
    print(f"{sum(p.numel() for p in trained):,} trainable of {sum(p.numel() for p in model.parameters()):,} parameters")
    plan |= {f"sampling: {k}": v for k, v in sampling.items()} | {f"update: {k}": v for k, v in update.items()}
    larger = max(sum(sampling.values()), sum(update.values()))
    return plan | {"peak": larger + sum(v for k, v in plan.items() if ": " not in k)}


def plot(log: list[dict], path: Path) -> None:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    x = range(1, len(log) + 1)
    for name, label in (("reward", "R"), ("r_ka", "R_KA"), ("r_ec", "R_EC"), ("r_cs", "R_CS")):
        axes[0].plot(x, [r[name] for r in log], label=label)
    for name in ("kl", "entropy", "explained_variance"):
        axes[1].plot(x, [np.nan if r[name] is None else r[name] for r in log], label=name.replace("_", " "))
    shares = np.array([[r["levels"][k] for k in ("1", "2", "3", "4", "5", "none")] for r in log], dtype=float)
    shares /= shares.sum(1, keepdims=True)
    colors = ["#762a83", "#af8dc3", "#cccccc", "#7fbf7b", "#1b7837", "#000000"]
    axes[2].stackplot(x, shares.T, labels=["1", "2", "3", "4", "5", "none"], colors=colors)
    for axis, title in zip(axes, ("reward", "policy", "levels said"), strict=True):
        axis.set(xlabel="update", title=title)
        axis.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.dry_run:
        c.fill_defaults(args, DEFAULTS, {"data": "real"})
        for name, size in memory_plan(args).items():
            print(f"  {name:28s} {size / 1e9:8.3f} GB")
        return
    ckpt = Path(args.ckpt)
    config = c.read_run(ckpt, "sft.jsonl", "confidence.json", "done")
    setup = config["setup"]
    c.fill_defaults(args, DEFAULTS, setup)
    c.join_processes(args)
    if c.start_run("ppo", args, "done", setup):
        return
    out, questions = Path(args.out), c.read_jsonl(ckpt / "sft.jsonl")
    confidence = c.read_json(ckpt / "confidence.json")
    c.write_json(out / "confidence.json", confidence)
    shutil.copy(ckpt / "sft.jsonl", out)
    judge, models = load_judge(confidence, setup, args), load_models(ckpt, args)
    optimizers, modules = make_optimizers(models, args), {"policy": models.policy, "value_head": models.value_head}
    start = c.load_checkpoint(out / "trainer_state.pt", modules, optimizers)
    log = c.read_jsonl(out / "log.jsonl")[:start] if start else []
    c.write_jsonl(out / "log.jsonl", log)
    bar = tqdm(range(start, args.updates), desc="ppo", initial=start, total=args.updates)
    for step in bar:
        epoch, position = divmod(step * args.batch_size, len(questions))
        order = np.concatenate([np.random.default_rng([args.seed, e]).permutation(len(questions)) for e in (epoch, epoch + 1)])
        picked = [questions[i] for i in order[position : position + args.batch_size]]
        c.warmup_then_linear(optimizers["policy"], step, args.updates, [args.lr], args.warmup_ratio)
        stats = train_update(models, optimizers, picked, judge, args, args.seed * 1_000_000 + step, step < args.value_updates)
        log.append({"update": step} | stats)
        c.append_jsonl(out / "log.jsonl", log[-1:])
        shown = {k: np.nan if stats[k] is None else stats[k] for k in ("reward", "r_ka", "r_ec", "r_cs", "auroc", "kl")}
        bar.set_postfix({k: f"{value:.2f}" for k, value in shown.items()})
        if (step + 1) % args.save_every == 0 or step + 1 == args.updates:
            c.save_checkpoint(out / "trainer_state.pt", modules, optimizers, step + 1)
            plot(log, out / "training.png")
    if models.reference is None:
        models.policy.delete_adapter("reference")
    c.save_model(models.policy, models.processor, out)
    save_file(models.value_head.state_dict(), out / "value_head.safetensors")
    (out / "done").touch()


if __name__ == "__main__":
    main()
