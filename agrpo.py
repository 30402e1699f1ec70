"""AGRPO (arXiv 2510.04019) in one file: policy gradients for masked diffusion language models, without bias.

    python agrpo.py                          teach a tiny mask predictor 4x4 Sudoku: minutes, on a CPU, nothing to download
    python agrpo.py --data puzzles.csv       the same, measured on your puzzles (columns Puzzle, Solution; 0 is a blank)
    python agrpo.py --resume RUN_DIR         go on with an interrupted run
    python agrpo.py --help                   every setting, with its default

A masked diffusion language model is a mask predictor: shown a prompt and a partly masked completion, it returns a
distribution over tokens for every masked position. It writes by unmasking: all masks at first, a few positions filled
at each step. That is a Markov decision process, and AGRPO is GRPO on it:

    rollout      unmask G completions of each prompt, remembering at which step each position was filled     sample
    advantage    each completion's reward minus the mean of its group                                         group_advantages
    timesteps    the gradient is a sum over all T steps; draw k of them, weighted so that the mean is right   draw_timesteps
    estimate     one pass for each drawn step: log-probabilities of what was filled in there, in that state   step_logps
    objective    GRPO's clipped ratio, token by token                                                         clipped_objective
    update       gradient of all this over the batch, then AdamW                                              policy_gradient

The log-likelihood of a trajectory is exact here, not a bound. With random unmasking the order carries no parameters,
so log pi(trajectory | prompt) is the sum, over steps, of the log-probabilities of the tokens filled in, plus a
constant; that is the quantity a policy gradient needs. (Averaged over orders the same sum is the any-order ELBO, a
lower bound on the likelihood of the completion as a text; that is why the estimate is called ELBO-style.)

The paper's letters, and the words for them in this file:

    q             prompt                       (B, P) token ids, padded on the left; B = prompts x group size
    o             completion                   (B, C) token ids
    s_t           state at step t              the completion with everything filled at step t or later masked again
    U_t           revealed                     the positions that step t fills in
    T             steps, num_steps             sampling steps; what one row really took (rows that end early take fewer)
    k             k                            sampled timesteps a row, k << T: an update costs k passes a row, not T
    G             group_size                   completions of one prompt
    A             advantage                    (B,)
    rho           ratio                        new probability of a token over the one it was sampled with
    eps, beta     eps_low, eps_high, beta      clipping range; weight of the KL term
    tau           temperature
    theta         model                        any Hugging Face PreTrainedModel with a head on top
"""

import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    HfArgumentParser,
    PreTrainedTokenizerFast,
)

# ======================================================================================================================
# 1. Sampler: the unmasking Markov decision process
# ======================================================================================================================


@dataclass
class Rollout:
    """B completions and how each came about: one trajectory of the unmasking process a row."""

    prompt: Tensor  # (B, P) int64, padded on the left
    prompt_mask: Tensor  # (B, P) bool, False on padding
    completion: Tensor  # (B, C) int64; EOS from where the row had ended
    step: Tensor  # (B, C) int64, the step that filled each position; -1 where the row had already ended
    logp: (
        Tensor  # (B, C) float32 (float64 for a float64 model), nats, under the policy that sampled; 0 where step is -1
    )
    entropy: Tensor  # (B, T) like logp, nats, summed over the tokens that each step filled in
    num_steps: Tensor  # (B,) int64, steps taken: T, or fewer where the row ended early
    kept: Tensor | None = None  # (B, C, K) int64, ids that top-k and top-p left to choose from; -1 fills up to K


def logits_at(model, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
    """Logits at the given positions only: the output head never sees the rest of the sequence.

    input_ids (N, L) int64; attention_mask (N, L) bool, or None where nothing is padding (leaves the way free for flash
    attention); positions (N, n) int64 in [0, L). Returns (N, n, V) in the model's dtype, differentiable.
    """
    where = {"attention_mask": attention_mask}
    if attention_mask is not None:  # count positions from the first real token, so that padding changes nothing
        where["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    hidden = model.base_model(input_ids=input_ids, **where).last_hidden_state  # (N, L, D)
    hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))  # (N, n, D)
    head = model.cls if hasattr(model, "cls") else model.lm_head  # BERT's head has a layer of its own
    return head(hidden)


def truncate(logits: Tensor, mask_id: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor | None:
    """Ids left to choose from after top-k, then top-p (nucleus, arXiv 1904.09751) among what top-k kept.

    logits (..., V). Returns (..., K) int64 with -1 in unused places, K = top_k (or V where only top-p is asked for);
    None where nothing is cut. At least one id is always kept; mask_id never.
    """
    if not top_k and top_p >= 1:
        return None
    banned = torch.tensor([mask_id], device=logits.device)
    top, kept = logits.index_fill(-1, banned, -math.inf).topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
    drop = top == -math.inf
    if top_p < 1:
        probability = (_wide(top) / temperature).softmax(-1)
        drop |= probability.cumsum(-1) - probability >= top_p  # what is more probable already makes up top_p
    return kept.masked_fill(drop, -1)


def policy_logps(logits: Tensor, mask_id: int, temperature: float, kept: Tensor | None = None) -> Tensor:
    """Log-probabilities of the policy: softmax at a temperature over every id but mask_id, or over the kept ids.

    logits (..., V); kept (..., K) int64 from `truncate`. Returns (..., V), or (..., K) in the order of kept; float32,
    or float64 for float64 logits. The sampler and the gradient both call this: one policy, one definition.
    """
    if kept is None:
        banned = torch.tensor([mask_id], device=logits.device)
        return (_wide(logits).index_fill(-1, banned, -math.inf) / temperature).log_softmax(-1)
    logits = _wide(logits.gather(-1, kept.clamp(min=0))).masked_fill(kept < 0, -math.inf)
    return (logits / temperature).log_softmax(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 is too coarse for log-probabilities


def tokens_per_step(completion_length: int, block_length: int, steps: int) -> list[int]:
    """How many tokens each step inside one block fills in; every block is alike. 12 tokens in 4 steps: [3, 3, 3, 3].

    Raises ValueError where blocks do not divide the completion, or steps do not spread over the blocks.
    """
    blocks, rest = divmod(completion_length, block_length)
    if rest:
        raise ValueError(f"block length {block_length} does not divide completion length {completion_length}")
    if steps < blocks or steps % blocks:
        raise ValueError(f"{steps} steps cannot be shared out evenly over {blocks} blocks; use a multiple of {blocks}")
    if steps > completion_length:
        raise ValueError(f"{steps} steps for {completion_length} tokens: each step must fill in at least one")
    each, rest = divmod(block_length, steps // blocks)
    return [each + (step < rest) for step in range(steps // blocks)]


@torch.no_grad()
def sample(
    model,
    prompt: Tensor,
    prompt_mask: Tensor,
    *,
    completion_length: int,
    block_length: int,
    steps: int,
    temperature: float,
    unmasking: str,
    mask_id: int,
    eos_id: int | None,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Unmask one completion for each row of prompt, block by block from the left (semi-autoregressive; LLaDA, arXiv 2502.09992).

    prompt (B, P) int64 padded on the left; prompt_mask (B, P) bool, False on padding. Inside a block each step fills in
    `tokens_per_step` of the masked positions:
      unmasking="random"          any of them with equal probability. The order carries no parameters, so the sum of
                                  Rollout.logp is the exact log-likelihood of the trajectory, up to a constant.
      unmasking="low_confidence"  tokens are sampled for all of them and the most probable kept. The choice depends on
                                  the model, so the same sum is only an approximation.
    temperature 0 is greedy. A row whose block is all EOS has ended: it takes no further steps and leaves the batch.
    eos_id None: rows never end early. mask_id is never produced. generator: on the model's device.
    Raises ValueError for settings that do not fit together.
    """
    if unmasking not in ("random", "low_confidence"):
        raise ValueError(f"unmasking is 'random' or 'low_confidence', not {unmasking!r}")
    per_step = tokens_per_step(completion_length, block_length, steps)
    if temperature == 0:  # greedy is a choice from one: its log-probability and entropy come out as 0
        temperature, top_k = 1.0, 1
    (B, P), C, device = prompt.shape, completion_length, prompt.device
    logp_type = torch.promote_types(next(model.parameters()).dtype, torch.float32)

    ids = torch.cat([prompt, prompt.new_full((B, C), mask_id)], 1)  # (B, P+C)
    attention = None if bool(prompt_mask.all()) else torch.cat([prompt_mask, prompt_mask.new_ones(B, C)], 1)
    step = prompt.new_full((B, C), -1)
    logp = torch.zeros(B, C, dtype=logp_type, device=device)
    entropy = torch.zeros(B, steps, dtype=logp_type, device=device)
    num_steps = prompt.new_zeros(B)
    kept = None

    rows = torch.arange(B, device=device)  # rows still being sampled
    t = 0
    for start in range(0, C, block_length):
        # Filling in at random = going through the block in a random order drawn beforehand.
        noise = torch.rand(len(rows), block_length, generator=generator, device=device)
        masked = start + noise.argsort(1)  # (R, m): the block's masked positions, m of them left
        for count in per_step:
            looked_at = masked[:, :count] if unmasking == "random" else masked
            logits = logits_at(model, ids[rows], None if attention is None else attention[rows], P + looked_at)
            choices = truncate(logits, mask_id, temperature, top_k, top_p)  # (R, m, K) or None
            logps = policy_logps(logits, mask_id, temperature, choices)  # (R, m, K or V)
            gumbel = -torch.empty_like(logps).exponential_(generator=generator).clamp_(min=1e-30).log()
            pick = (logps + gumbel).argmax(-1, keepdim=True)  # the Gumbel-max trick: a draw from the policy
            token = (pick if choices is None else choices.gather(-1, pick)).squeeze(-1)  # (R, m)
            token_logp = logps.gather(-1, pick).squeeze(-1)
            token_entropy = torch.special.entr(logps.exp()).sum(-1)

            if unmasking == "low_confidence":  # most confident first; confidence is at temperature 1 and untruncated
                confidence = policy_logps(logits, mask_id, 1.0).gather(-1, token[..., None]).squeeze(-1)
                best = confidence.argsort(1, descending=True)  # (R, m)
                masked, token, token_logp, token_entropy = (
                    x.gather(1, best) for x in (masked, token, token_logp, token_entropy)
                )
                if choices is not None:
                    choices = choices.gather(1, best[..., None].expand_as(choices))

            filled, masked = masked[:, :count], masked[:, count:]
            row = rows[:, None]  # (R, 1) beside filled (R, count)
            ids[row, P + filled] = token[:, :count]
            step[row, filled] = t
            logp[row, filled] = token_logp[:, :count]
            entropy[rows, t] = token_entropy[:, :count].sum(1)
            if choices is not None:
                if kept is None:
                    kept = prompt.new_zeros(B, C, choices.shape[-1])
                kept[row, filled] = choices[:, :count]
            t += 1
        num_steps[rows] = t
        if eos_id is not None:
            ended = (ids[rows, P + start : P + start + block_length] == eos_id).all(1)
            rows = rows[~ended]
            if len(rows) == 0:
                break
    completion = ids[:, P:]
    if eos_id is not None:
        completion = completion.masked_fill(step < 0, eos_id)
    return Rollout(prompt, prompt_mask, completion, step, logp, entropy, num_steps, kept)


# ======================================================================================================================
# 2. Estimator: log-likelihood of a trajectory from a few sampled timesteps
# ======================================================================================================================


def draw_timesteps(
    num_steps: Tensor, k: int, proposal: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw k timesteps for each row, with weights that make sum_j weights[j] f(steps[j]) unbiased for sum_{t<num_steps} f(t).

    num_steps (B,) int64; proposal (B, T) nonnegative, positive on each row's own steps and of any scale, None = uniform;
    generator: on the CPU. Returns steps (B, k) int64 and weights (B, k) float64 (float32 on mps, which has no float64).

    Step t of a row is drawn with probability P(t), the row's normalised proposal, and weighs 1 / (k P(t)). The k draws
    come from strata on two levels: each row has one in each of its k equal strata (systematic sampling), and the batch
    as a whole has exactly one in each of B k finer ones. Each draw alone stays uniform over its row's strata, so
    nothing is biased; far less is left to chance. A step drawn twice is one step of twice the weight; unused places
    have weight 0 and cost no pass. A row of at most k steps gets every step once with weight 1: the exact sum.
    Raises ValueError where k < 1 or a proposal is negative, not finite, or 0 at a step that the row has taken.
    """
    if k < 1:
        raise ValueError(f"k is the number of timesteps drawn for each row and must be at least 1, not {k}")
    device, num_steps = num_steps.device, num_steps.cpu()[:, None]  # (B, 1)
    B, T = len(num_steps), int(num_steps.max()) if proposal is None else proposal.shape[1]
    taken = torch.arange(T) < num_steps  # (B, T)
    P = taken.double() if proposal is None else proposal.detach().cpu().double() * taken
    if not (P.isfinite().all() and (P >= 0).all() and ((P > 0) | ~taken).all()):
        raise ValueError("a proposal must be positive and finite at every step that its row has taken")

    row = torch.randperm(B, generator=generator)[:, None]  # (B, 1)
    offset = torch.rand(B, 1, generator=generator, dtype=torch.float64)
    u = (torch.arange(k) + (row + offset) / B) / k  # (B, k), rising along each row
    cdf = P.cumsum(1)
    cdf = cdf / cdf[:, -1:]
    steps = torch.searchsorted(cdf, u, right=True).clamp(max=(num_steps - 1).clamp(min=0))
    first = torch.cat([steps.new_ones(B, 1).bool(), steps[:, 1:] != steps[:, :-1]], 1)
    times = (steps[:, :, None] == steps[:, None, :]).sum(-1)  # (B, k): how often this step was drawn
    weights = first * times * P.sum(1, keepdim=True) / (k * P.gather(1, steps))

    each = torch.arange(k).expand(B, k)
    steps = torch.where(num_steps <= k, each.clamp(max=T - 1), steps)
    weights = torch.where(num_steps <= k, (each < num_steps).double(), weights)
    return steps.to(device), weights.to(device, torch.float32 if device.type == "mps" else torch.float64)


def step_logps(
    model, rollout: Rollout, rows: Tensor, steps: Tensor, *, mask_id: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p(o_j | q, s_t) of the tokens that step t filled in, under the model as it is now: one pass for each (row, step).

    rows (N,), steps (N,) int64: N >= 1 pairs. Returns logp (N, C), 0 outside the revealed positions, differentiable;
    and revealed (N, C) bool. The temperature, and the truncation the rollout recorded, are those of the sampler:
    the ratio of two policies means nothing otherwise.
    """
    when, prompt, prompt_mask = rollout.step[rows], rollout.prompt[rows], rollout.prompt_mask[rows]
    completion, t = rollout.completion[rows], steps[:, None]
    revealed = when == t  # (N, C)
    state = torch.where((when >= 0) & (when < t), completion, mask_id)  # s_t: what earlier steps filled in, else masks

    # Positions to look at: n = the most that any of these steps filled in; where a step filled in fewer, others pad.
    n = int(revealed.sum(1).max())
    where = revealed.int().argsort(dim=1, descending=True, stable=True)[:, :n]  # (N, n)
    attention = None if bool(prompt_mask.all()) else torch.cat([prompt_mask, prompt_mask.new_ones(state.shape)], 1)
    logits = logits_at(model, torch.cat([prompt, state], 1), attention, prompt.shape[1] + where)  # (N, n, V)

    token = completion.gather(1, where)[..., None]  # (N, n, 1)
    if rollout.kept is None:
        logps = policy_logps(logits, mask_id, temperature or 1.0).gather(-1, token).squeeze(-1)  # (N, n)
    else:
        kept = rollout.kept[rows[:, None], where]  # (N, n, K)
        pick = (kept == token).int().argmax(-1, keepdim=True)
        logps = policy_logps(logits, mask_id, temperature or 1.0, kept).gather(-1, pick).squeeze(-1)
    logps = logps.masked_fill(~revealed.gather(1, where), 0)
    return torch.zeros(revealed.shape, dtype=logps.dtype, device=logps.device).scatter(1, where, logps), revealed


def defensive_proposal(entropy: Tensor, num_steps: Tensor, uniform_share: float = 0.1) -> Tensor:
    """Draw timesteps more often where more was undecided: (1 - share) x entropy + share x uniform, each row summing to 1.

    entropy (B, T), num_steps (B,). Returns (B, T) float64. The uniform share keeps every weight below 1 / share times
    its uniform value, so a step where the policy was nearly certain cannot blow up the gradient.
    """
    T = entropy.shape[1]
    entropy, length = entropy.double().cpu(), num_steps.cpu().clamp(min=1)[:, None]
    uniform = (torch.arange(T) < length) / length  # (B, T)
    total = entropy.sum(1, keepdim=True)
    return torch.where(total > 0, (1 - uniform_share) * entropy / total + uniform_share * uniform, uniform)


def estimate_logp(
    model,
    rollout: Rollout,
    k: int,
    *,
    mask_id: int,
    temperature: float,
    proposal: Tensor | None = None,
    micro_batch: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unbiased estimate, from k sampled timesteps a row, of log pi(trajectory): (B,), differentiable, nats.

    Exact for every row with num_steps <= k. Proposal and generator as in `draw_timesteps`. The training loop takes the
    gradient of an objective rather than of this sum, with the same timesteps and weights: see `policy_gradient`.
    """
    steps, weights = draw_timesteps(rollout.num_steps, k, proposal, generator)
    row, j = weights.nonzero(as_tuple=True)  # the (row, step) pairs that need a pass, as one flat list
    total = torch.zeros_like(rollout.logp[:, 0])
    for part in torch.arange(len(row), device=row.device).split(micro_batch):
        r, d = row[part], j[part]
        logp, _ = step_logps(model, rollout, r, steps[r, d], mask_id=mask_id, temperature=temperature)
        total = total.index_add(0, r, weights[r, d].to(logp) * logp.sum(1))
    return total


# ======================================================================================================================
# 3. Objective: clipped, relative to the group
# ======================================================================================================================


def group_advantages(rewards: Tensor, group_size: int, scale_by_std: bool = False) -> Tensor:
    """A_i = r_i - mean(r) over the row's group (GRPO, arXiv 2402.03300). rewards (B,), groups side by side; returns (B,).

    The row's own reward is in the mean, which scales the expected gradient by exactly 1 - 1/G. Dividing by the group's
    standard deviation is GRPO's habit; it biases the gradient towards easy and hard prompts (Dr. GRPO, arXiv 2503.20783),
    so it is off unless asked for. Raises ValueError where B is not a multiple of group_size.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not split into groups of {group_size}")
    groups = rewards.view(-1, group_size)  # (B / G, G)
    advantage = groups - groups.mean(1, keepdim=True)
    # A group of equal rewards has nothing to say: exactly 0, whatever rounding made of its mean.
    advantage = advantage.masked_fill((groups == groups[:, :1]).all(1, keepdim=True), 0)
    if scale_by_std:
        advantage = advantage / (groups.std(1, keepdim=True) + 1e-4)
    return advantage.view(-1)


def clipped_objective(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, eps_low: float = 0.2, eps_high: float = 0.2
) -> Tensor:
    """min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), elementwise, to be maximised (PPO, arXiv 1707.06347).

    rho = exp(logp - old_logp). All three broadcast together; differentiable in logp.
    """
    ratio = (logp - old_logp).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)


def kl_penalty(logp: Tensor, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(policy || reference) for each token: the k3 estimator exp(d) - d - 1, d = ref_logp - logp, times rho.

    The tokens come from the old policy; rho = exp(logp - old_logp) corrects for that, in the gradient too (DeepSeek-V3.2,
    arXiv 2512.02556). Never negative, 0 where the policies agree. Elementwise.
    """
    d = ref_logp - logp
    return (logp - old_logp).exp() * (d.exp() - d - 1)


# ======================================================================================================================
# 4. Update: the amortized policy gradient
# ======================================================================================================================


def policy_gradient(
    model,
    rollout: Rollout,
    advantage: Tensor,
    *,
    k: int,
    mask_id: int,
    temperature: float,
    on_policy: bool,
    proposal: Tensor | None = None,
    length_norm: str = "sequence",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    beta: float = 0.0,
    ref_model=None,
    micro_batch: int = 64,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Add to .grad the gradient of -J, estimated from k timesteps a row, and return what happened.

        J = 1/B sum_i 1/L_i sum_{t < T_i} [ sum_{j in U_t} min(rho_j A_i, clip(rho_j) A_i) - beta KL_j ]

    with the sum over t replaced by its unbiased estimate from `draw_timesteps`. L_i, after length_norm:
      "sequence"  T_i, GRPO's normalisation and the paper's: unbiased for GRPO's length-weighted objective.
      "constant"  T, the same for all rows (Dr. GRPO, arXiv 2503.20783): unbiased for the gradient of E[reward], times
                  (1 - 1/G) / T. Where no row ends early the two are one.
    on_policy: the weights are still those that sampled, so rho is 1 whatever rounding the sampler saw. advantage (B,).
    ref_model: the reference for beta > 0. Passes are made for no row without advantage and no step twice; at most
    micro_batch (row, step) pairs are in memory at once.
    """
    B, T = rollout.entropy.shape
    learns = (rollout.num_steps > 0) & ((advantage != 0) | (beta > 0))
    rows = learns.nonzero().squeeze(1)
    if len(rows) == 0:
        return {"loss": 0.0, "passes": 0}
    steps, weights = draw_timesteps(rollout.num_steps[rows], k, None if proposal is None else proposal[rows], generator)
    i, j = weights.nonzero(as_tuple=True)  # one flat list of (row, step) pairs
    rows, steps, weights = rows[i], steps[i, j], weights[i, j]
    length = rollout.num_steps[rows] if length_norm == "sequence" else T
    weights = (weights / (B * length)).to(rollout.logp.dtype)

    sums: dict[str, Tensor] = {}
    for part in torch.arange(len(rows), device=rows.device).split(micro_batch):
        r = rows[part]
        logp, revealed = step_logps(model, rollout, r, steps[part], mask_id=mask_id, temperature=temperature)
        old_logp = logp.detach() if on_policy else rollout.logp[r]
        objective = clipped_objective(logp, old_logp, advantage[r, None], eps_low, eps_high)  # (N, C)
        if beta > 0:
            with torch.no_grad():
                ref_logp, _ = step_logps(ref_model, rollout, r, steps[part], mask_id=mask_id, temperature=temperature)
            kl = kl_penalty(logp, old_logp, ref_logp)
            objective = objective - beta * kl
        loss = -(weights[part, None] * objective * revealed).sum()
        loss.backward()

        with torch.no_grad():
            change = (logp - old_logp)[revealed]
            clipped = (change.exp() < 1 - eps_low) & (advantage[r, None].expand_as(logp)[revealed] < 0)
            clipped |= (change.exp() > 1 + eps_high) & (advantage[r, None].expand_as(logp)[revealed] > 0)
            seen = {
                "loss": loss,
                "tokens": revealed.sum(),
                "clipfrac": clipped.sum(),
                "approx_kl": (change.exp() - 1 - change).sum(),
                "ratio": change.exp().sum(),
                "sampler_gap": (logp - rollout.logp[r])[revealed].abs().sum(),
            }
            if beta > 0:
                seen["kl"] = kl[revealed].sum()
            sums = {name: sums.get(name, 0) + value.detach() for name, value in seen.items()}
    figures = {name: float(value) for name, value in sums.items()}
    tokens = figures.pop("tokens")
    return {name: value if name == "loss" else value / tokens for name, value in figures.items()} | {
        "passes": len(rows)
    }


# ======================================================================================================================
# 5. Training loop
# ======================================================================================================================


def train(model, tokenizer, mask_id: int, task: "Task", args: "Settings", ref_model=None) -> bool:
    """Rollouts, rewards, advantages, timesteps, gradient, AdamW step; repeat. Returns whether it reached the last update.

    Goes on from the newest checkpoint in args.output_dir, if there is one. Every random choice is seeded by (seed, what
    it is for, update), so a run that was stopped and resumed is the run that was not. Writes metrics.jsonl (a line an
    update) and checkpoint-N. Ctrl-C or SIGTERM: finish the update, save, return False; a second Ctrl-C stops at once.
    """
    run, device = Path(args.output_dir), model.device
    examples = task.examples("train", args)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
    )
    start = restore_training_state(run, optimizer)
    stop = stop_after_this_update()
    finished = start >= args.max_steps
    bar = tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, desc="AGRPO", unit="update")
    for update in bar:
        clock = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(update, args)

        # Rollouts: G completions of each prompt, groups side by side.
        batch = [example for example in draw_examples(examples, update, args) for _ in range(args.group_size)]
        prompts = [task.prompt(example) for example in batch]
        rollout, texts = complete(
            model, tokenizer, mask_id, prompts, generator(device, args.seed, "rollout", update), **args.sampling()
        )
        seconds_rollout = time.time() - clock

        # Rewards and advantages.
        rewards = torch.tensor([task.reward(example, text) for example, text in zip(batch, texts)], device=device)
        correct = [task.correct(example, text) for example, text in zip(batch, texts)]
        advantage = group_advantages(rewards, args.group_size, args.scale_by_std)

        # Where the timesteps are drawn: more often where more was undecided, never with less than a share of uniform.
        proposal = None
        if args.timestep_proposal == "entropy":
            proposal = defensive_proposal(rollout.entropy, rollout.num_steps, args.uniform_share)

        # Updates: the first on the policy that sampled, the rest off it; that is what the clipping is for.
        for again in range(args.updates_per_rollout):
            optimizer.zero_grad()
            figures = policy_gradient(
                model,
                rollout,
                advantage,
                k=args.k,
                mask_id=mask_id,
                temperature=args.temperature,
                on_policy=again == 0,
                proposal=proposal,
                length_norm=args.length_norm,
                eps_low=args.eps_low,
                eps_high=args.eps_high,
                beta=args.beta,
                ref_model=ref_model,
                micro_batch=args.micro_batch,
                generator=generator("cpu", args.seed, "timesteps", update, again),
            )
            parameters = [p for p in model.parameters() if p.grad is not None]
            figures["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm))
            optimizer.step()

        groups = rewards.view(-1, args.group_size)
        metrics = {
            "update": update + 1,
            "reward": float(rewards.mean()),
            "reward_std": float(groups.std(1).mean()),
            "accuracy": sum(correct) / len(correct),
            "frac_reward_zero_std": float((groups == groups[:, :1]).all(1).float().mean()),
            "completion_length": float((rollout.step >= 0).sum(1).float().mean()),
            "entropy": float(rollout.entropy.sum() / (rollout.step >= 0).sum()),
            **figures,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "seconds_rollout": seconds_rollout,
            "seconds_update": time.time() - clock - seconds_rollout,
        }
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        bar.set_postfix_str(
            "reward {reward:.2f} accuracy {accuracy:.2f} clipfrac {clipfrac:.3f} |grad| {grad_norm:.2f}".format(
                **{"clipfrac": 0.0, **metrics}
            )
        )
        if args.show_every and (update + 1) % args.show_every == 0:
            shown = random.Random(f"{args.seed} show {update}").randrange(len(batch))
            bar.write(f"\nupdate {update + 1}, reward {rewards[shown]:.2f}\n" + task.show(batch[shown], texts[shown]))
        finished = update + 1 == args.max_steps
        if stop or finished or (update + 1) % args.save_every == 0:
            save_checkpoint(run, update + 1, model, tokenizer, optimizer, args.keep_checkpoints)
        if stop:
            break
    bar.close()
    return finished


def complete(
    model, tokenizer, mask_id: int, prompts: list[str], rng: torch.Generator, **sampling
) -> tuple[Rollout, list[str]]:
    """One completion for each prompt: the rollout, and its texts up to the first EOS. sampling: arguments of `sample`."""
    encoded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    prompt, prompt_mask = encoded["input_ids"].to(model.device), encoded["attention_mask"].bool().to(model.device)
    eos_id = tokenizer.eos_token_id
    rollout = sample(model, prompt, prompt_mask, mask_id=mask_id, eos_id=eos_id, generator=rng, **sampling)
    written = [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in rollout.completion.tolist()]
    return rollout, tokenizer.batch_decode(written, skip_special_tokens=True)


def evaluate(
    model, tokenizer, mask_id: int, task: "Task", examples: list[dict], batch: int, seed: int, **sampling
) -> list:
    """Complete every example once: a list of {"prompt", "completion", "correct"} dicts. sampling: arguments of `sample`."""
    records = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        prompts = [task.prompt(example) for example in part]
        rng = generator(model.device, seed, "evaluation", start)
        _, texts = complete(model, tokenizer, mask_id, prompts, rng, **sampling)
        for example, prompt, text in zip(part, prompts, texts):
            records.append({"prompt": prompt, "completion": text, "correct": task.correct(example, text)})
    return records


def generator(device, *key) -> torch.Generator:
    """A random generator of its own for each purpose: key says which, so nothing random has a state to be saved."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(60))


def draw_examples(examples: list[dict], update: int, args: "Settings") -> list[dict]:
    """The prompts of one update: every example comes once an epoch, in an order of that epoch's own."""
    N, first = len(examples), update * args.prompts_per_update
    last = first + args.prompts_per_update
    orders = [random.Random(f"{args.seed} epoch {e}").sample(examples, N) for e in range(first // N, (last - 1) // N + 1)]
    skipped = first // N * N
    return list(itertools.chain(*orders))[first - skipped : last - skipped]


def learning_rate_at(update: int, args: "Settings") -> float:
    """Linear warm-up over the first warmup_ratio of the updates, then constant or half a cosine down to 0."""
    warm = min(1.0, (update + 1) / max(1, round(args.warmup_ratio * args.max_steps)))
    cosine = (1 + math.cos(math.pi * update / args.max_steps)) / 2
    return args.learning_rate * warm * (cosine if args.lr_schedule == "cosine" else 1.0)


def stop_after_this_update() -> list:
    """A list that is empty until Ctrl-C or SIGTERM. The second one raises KeyboardInterrupt as usual."""
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        tqdm.write("Stopping: finishing this update and saving. (Once more to stop at once.)")

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return asked


def save_checkpoint(run: Path, update: int, model, tokenizer, optimizer, keep: int) -> None:
    """Write run/checkpoint-N: the model in Hugging Face format, and what a resumed run needs. All of it or nothing:
    it is written aside and renamed when whole; then all but the newest `keep` are removed."""
    aside = run / f"checkpoint-{update}.part"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": tensor for i, entry in state.items() for name, tensor in entry.items()}
    save_file(tensors, aside / "optimizer.safetensors")
    aside.rename(run / f"checkpoint-{update}")
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def restore_training_state(run: Path, optimizer) -> int:
    """Load the optimizer from the newest checkpoint and cut metrics.jsonl back to it; returns the updates made so far."""
    done, saved = 0, checkpoints(run)
    if saved:
        done, state = int(saved[-1].name.split("-")[1]), {}
        for key, tensor in load_file(saved[-1] / "optimizer.safetensors").items():
            i, name = key.split(".")
            state.setdefault(int(i), {})[name] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    log = run / "metrics.jsonl"
    if log.exists():
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:done]))
    return done


# ======================================================================================================================
# 6. Tasks: examples, prompts, rewards
# ======================================================================================================================


@dataclass(frozen=True)
class Task:
    """What to train on. An example is a dict; what is in it is between the functions of one task."""

    examples: Callable[[str, "Settings"], list[dict]]  # ("train" or "test", settings) -> examples
    prompt: Callable[[dict], str]
    reward: Callable[[dict, str], float]  # what training maximises: (example, completion) -> reward
    correct: Callable[[dict, str], bool]  # what accuracy counts
    show: Callable[[dict, str], str]  # a completion, as a person would look at it


# A 4x4 Sudoku is written as its 16 cells, row by row, 0 for a blank. Its units: 4 rows, 4 columns, 4 boxes.
ROWS = [[4 * r + c for c in range(4)] for r in range(4)]
COLUMNS = [[4 * r + c for r in range(4)] for c in range(4)]
BOXES = [[8 * r + 2 * c + i for i in (0, 1, 4, 5)] for r in range(2) for c in range(2)]


def is_grid(text: str) -> bool:
    """Whether text is a full 4x4 Sudoku grid: 16 digits, 1 to 4 once in every row, column and box."""
    return len(text) == 16 and all({text[i] for i in unit} == set("1234") for unit in ROWS + COLUMNS + BOXES)


def all_grids() -> list[str]:
    """All 288 4x4 grids, always in the same order."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    bands = [a + b for a, b in itertools.product(rows, rows) if set(a[:2] + b[:2]) == set(a[2:] + b[2:]) == set("1234")]
    return [a + b for a, b in itertools.product(bands, bands) if is_grid(a + b)]


def sudoku_examples(split: str, args: "Settings") -> list[dict]:
    """Puzzles of 10 to 14 blanks; most have several solutions, and any of them is right.

    240 of the 288 grids are for training (16 puzzles each, drawn with the seed) and 48 for testing (8 puzzles each,
    the same for every seed). With --data, the test puzzles are the file's.
    """
    if split == "test" and args.data:
        return read_sudoku_file(args.data)
    grids = random.Random("grids").sample(all_grids(), 288)
    rng = random.Random(f"{args.seed} puzzles" if split == "train" else "test puzzles")
    puzzles = []
    for grid in grids[:240] * 16 if split == "train" else grids[240:] * 8:
        blank = rng.sample(range(16), rng.randint(10, 14))
        puzzles.append({"puzzle": "".join("0" if i in blank else grid[i] for i in range(16)), "solution": grid})
    return puzzles


def read_sudoku_file(path: str) -> list[dict]:
    """Puzzles from a CSV with the columns Puzzle and Solution, 16 digits each. Raises ValueError that names a bad row."""
    from datasets import Features, Value, load_dataset

    if not Path(path).is_file():
        raise ValueError(
            f"--data {path}: no such file; for sudoku give a CSV file with the columns Puzzle and Solution"
        )
    with open(path, encoding="utf-8") as file:
        header = file.readline().strip().split(",")
    if not {"Puzzle", "Solution"} <= set(header):
        raise ValueError(f"--data {path}: needs the columns Puzzle and Solution; its first line names {header}")
    text = Features({name: Value("string") for name in header})  # read as numbers, a grid would lose its leading zeros
    puzzles = []
    for number, row in enumerate(load_dataset("csv", data_files=path, features=text, split="train"), start=2):
        puzzle, solution = row["Puzzle"] or "", row["Solution"] or ""
        if not re.fullmatch("[0-4]{16}", puzzle) or not is_grid(solution):
            raise ValueError(
                f"--data {path}, line {number}: Puzzle must be 16 digits 0 to 4 and Solution a full grid, "
                f"not {puzzle!r} and {solution!r}"
            )
        puzzles.append({"puzzle": puzzle, "solution": solution})
    return puzzles


def sudoku_correct(example: dict, completion: str) -> bool:
    """Whether the completion is a full grid that keeps every clue of the puzzle."""
    return is_grid(completion) and all(clue in ("0", cell) for clue, cell in zip(example["puzzle"], completion))


def sudoku_show(example: dict, completion: str) -> str:
    completion = completion.ljust(16)
    lines = []
    for row in ROWS:
        puzzle, cells = (" ".join(text[i] for i in row) for text in (example["puzzle"].replace("0", "."), completion))
        lines.append(f"    {puzzle}   {cells}")
    lines[0] += "   " + ("right" if sudoku_correct(example, completion) else "wrong")
    return "\n".join(lines) + "\n"


TASKS = {
    "sudoku": Task(
        examples=sudoku_examples,
        prompt=lambda example: example["puzzle"],
        reward=lambda example, completion: float(sudoku_correct(example, completion)),
        correct=sudoku_correct,
        show=sudoku_show,
    ),
}


# ======================================================================================================================
# 7. Models
# ======================================================================================================================


def load_model(name_or_path: str, dtype: torch.dtype = torch.float32):
    """(model, tokenizer, mask_id) for "tiny" (freshly initialised: `pretrain` it), or for a folder this project saved.

    Raises ValueError for anything else.
    """
    if name_or_path == "tiny":
        tokenizer = character_tokenizer()
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=384,
            initializer_range=0.1,  # the usual 0.02 is for wide models; here it takes far longer to get going
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        return BertForMaskedLM(config).to(dtype).eval(), tokenizer, tokenizer.mask_token_id
    folder = Path(name_or_path)
    folder = (checkpoints(folder) or [folder])[-1]  # a run's folder stands for its newest checkpoint
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name_or_path} is not a checkpoint: no config.json in it. Give 'tiny' or a checkpoint's folder"
        )
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model.eval(), tokenizer, tokenizer.mask_token_id


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: printable ASCII and the newline."""
    special = ["[PAD]", "[UNK]", "[EOS]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate(special + [chr(c) for c in range(32, 127)] + ["\n"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", mask_token="[MASK]"
    )


def pretrain(model, tokenizer, mask_id: int, examples: list[tuple[str, str]], args: "Settings") -> None:
    """Teach a fresh model (prompt, completion) pairs with the masked-diffusion ELBO (arXiv 2406.07524).

    Each completion has its tokens masked with probability t ~ U(0, 1); the loss is the cross-entropy of the masked ones,
    weighted 1/t: an upper bound on -log p(completion | prompt).
    """
    encode = lambda texts: tokenizer(list(texts), add_special_tokens=False, return_tensors="pt")["input_ids"]
    prompts, completions = map(encode, zip(*examples))
    P, C = prompts.shape[1], completions.shape[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.pretrain_learning_rate)
    bar = tqdm(range(args.pretrain_steps), desc="pretraining", unit="step")
    for step in bar:
        rng = generator("cpu", args.seed, "pretrain", step)
        rows = torch.randint(len(prompts), (args.pretrain_batch,), generator=rng)
        t = (torch.arange(len(rows)) + torch.rand(len(rows), generator=rng))[:, None] / len(rows)  # (B, 1), stratified
        t = t.clamp(min=1e-3)
        masked = torch.rand(len(rows), C, generator=rng) < t  # (B, C)
        state = torch.where(masked, mask_id, completions[rows])
        ids = torch.cat([prompts[rows], state], 1).to(model.device)
        logits = logits_at(model, ids, None, torch.arange(P, P + C, device=ids.device).expand(len(rows), C))
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), completions[rows].to(ids.device), reduction="none"
        )
        loss = (loss * (masked / t).to(ids.device)).sum(1).mean()
        for group in optimizer.param_groups:  # linear warm-up over a tenth of the steps, then linear to 0
            fraction = (step + 1) / args.pretrain_steps
            group["lr"] = args.pretrain_learning_rate * min(fraction / 0.1, (1 - fraction) / 0.9 + 1e-3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"-ELBO {loss.item():.2f} nats")


# ======================================================================================================================
# 8. Command line
# ======================================================================================================================


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Every setting there is."""

    task: Literal["sudoku"] = option("sudoku", "what to train on")
    model: str = option("tiny", "'tiny' (pretrained on the spot, then cached) or the folder of a checkpoint")
    data: str | None = option(None, "your own data; sudoku: a CSV of puzzles to test on (columns Puzzle, Solution)")
    output_dir: str | None = option(None, "where the run goes; not given: a new folder under runs/")
    resume: str | None = option(None, "folder of an interrupted run to go on with; its own settings apply")
    seed: int = option(0, "the same seed gives the same run on the same machine")
    device: str | None = option(None, "cuda, mps or cpu; not given: the first of these that there is")
    bf16: bool = option(False, "keep the model in bfloat16 (GPU)")

    max_steps: int = option(120, "updates: batches of rollouts to train on")
    prompts_per_update: int = option(32, "prompts in an update")
    group_size: int = option(16, "G: completions of each prompt")
    k: int = option(2, "k: timesteps drawn for each completion; a forward and backward pass each")
    timestep_proposal: Literal["entropy", "uniform"] = option("entropy", "where timesteps are drawn more often")
    uniform_share: float = option(0.1, "share of uniform mixed into the entropy proposal; bounds its weights")

    completion_length: int = option(16, "tokens in a completion")
    block_length: int = option(16, "blocks are unmasked from left to right; must divide completion_length")
    steps: int = option(4, "T: sampling steps for a completion")
    unmasking: Literal["random", "low_confidence"] = option(
        "random", "which positions a step fills in; random is exact"
    )
    temperature: float = option(1.0, "tau: sampling temperature")
    top_k: int = option(0, "sample from the k most probable tokens (0: from all)")
    top_p: float = option(1.0, "sample from the most probable tokens that make up this probability")

    updates_per_rollout: int = option(
        1, "optimizer steps on each batch of rollouts; beyond the first, clipping matters"
    )
    eps_low: float = option(0.2, "eps: clip the ratio at 1 - eps_low")
    eps_high: float = option(0.2, "eps: clip the ratio at 1 + eps_high")
    beta: float = option(0.0, "beta: weight of the KL to the model before training; 0 makes no reference pass")
    scale_by_std: bool = option(False, "divide advantages by the group's standard deviation (biased)")
    length_norm: Literal["sequence", "constant"] = option("sequence", "divide a row by its own steps, or all by T")

    learning_rate: float = option(2e-4, "AdamW's, after warm-up")
    lr_schedule: Literal["constant", "cosine"] = option("constant", "learning rate after warm-up")
    warmup_ratio: float = option(0.01, "share of the updates spent warming up")
    adam_beta1: float = option(0.9, "AdamW's")
    adam_beta2: float = option(0.99, "AdamW's")
    weight_decay: float = option(0.01, "AdamW's")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    micro_batch: int = option(256, "(completion, timestep) pairs in memory at once; changes nothing else")

    eval_steps: list[int] = field(
        default_factory=lambda: [16, 8, 4, 2, 1],
        metadata={"help": "sampling steps to measure accuracy at, before and after"},
    )
    eval_batch: int = option(384, "completions in a batch when measuring")
    show_every: int = option(20, "print one completion every so many updates (0: never)")
    save_every: int = option(20, "save a checkpoint every so many updates")
    keep_checkpoints: int = option(2, "checkpoints to keep, the newest")

    pretrain_steps: int = option(300, "tiny: steps of pretraining")
    pretrain_batch: int = option(256, "tiny: completions in a pretraining step")
    pretrain_learning_rate: float = option(2e-3, "tiny: AdamW's in pretraining")

    def sampling(self, **changes) -> dict:
        """The arguments of `sample` that are settings."""
        names = ("completion_length", "block_length", "steps", "temperature", "unmasking", "top_k", "top_p")
        return {name: getattr(self, name) for name in names} | changes


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Settings from the command line; with --resume, those of the run that is resumed. Exits with one sentence if wrong."""
    parser = HfArgumentParser(Settings, description="AGRPO (arXiv 2510.04019) in one file.", allow_abbrev=False)
    parser.error = refuse
    (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if args.resume:
        saved = Path(args.resume) / "settings.json"
        if not saved.is_file():
            refuse(f"--resume {args.resume}: no run there (no settings.json); give the folder that the run printed")
        parser.set_defaults(**json.loads(saved.read_text()) | {"output_dir": args.resume, "resume": args.resume})
        (original,) = parser.parse_args_into_dataclasses(["--resume", args.resume], look_for_args_file=False)
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        for name in (f.name for f in fields(Settings)):
            if getattr(args, name) != getattr(original, name):
                refuse(
                    f"--{name} differs from the run that --resume goes on with ({getattr(original, name)}); leave it out"
                )
    check_settings(args)
    return args


def refuse(sentence: str):
    sys.exit(f"agrpo.py: {sentence}")


def check_settings(args: Settings) -> None:
    """Exit with one sentence on the first setting that cannot work, before anything is loaded or written."""
    for name in ("max_steps", "show_every", "top_k", "weight_decay", "beta", "eps_high", "pretrain_steps", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            refuse(f"--{name} must be 0 or more, not {getattr(args, name)}")
    for name in ("prompts_per_update", "k", "completion_length", "block_length", "steps", "updates_per_rollout"):
        if getattr(args, name) < 1:
            refuse(f"--{name} must be 1 or more, not {getattr(args, name)}")
    for name in ("micro_batch", "eval_batch", "save_every", "keep_checkpoints", "pretrain_batch"):
        if getattr(args, name) < 1:
            refuse(f"--{name} must be 1 or more, not {getattr(args, name)}")
    for name in ("temperature", "learning_rate", "max_grad_norm", "pretrain_learning_rate"):
        if not 0 < getattr(args, name) < math.inf:
            refuse(f"--{name} must be above 0, not {getattr(args, name)}")
    for name in ("eps_low", "warmup_ratio", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            refuse(f"--{name} must be in [0, 1), not {getattr(args, name)}")
    for name in ("top_p", "uniform_share"):
        if not 0 < getattr(args, name) <= 1:
            refuse(f"--{name} must be above 0 and at most 1, not {getattr(args, name)}")
    if args.group_size < 2:
        refuse(f"--group_size {args.group_size}: an advantage compares completions of one prompt, so use at least 2")
    for name, steps in [("steps", args.steps)] + [("eval_steps", steps) for steps in args.eval_steps]:
        try:
            tokens_per_step(args.completion_length, args.block_length, steps)
        except ValueError as error:
            refuse(f"--{name}, --block_length or --completion_length: {error}")


def pretrained_model(task: Task, args: Settings, device: torch.device):
    """(model, tokenizer, mask_id) to start from. The tiny model is pretrained first, or read from the cache beside the run."""
    if args.model != "tiny":
        model, tokenizer, mask_id = load_model(args.model, torch.bfloat16 if args.bf16 else torch.float32)
        return model.to(device), tokenizer, mask_id
    recipe = (args.task, args.seed, args.pretrain_steps, args.pretrain_batch, args.pretrain_learning_rate)
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
    cache = Path(args.output_dir).parent / f"pretrained-{args.task}-seed{args.seed}-{digest}"
    if not cache.exists():
        torch.manual_seed(args.seed)
        model, tokenizer, mask_id = load_model("tiny")
        examples = [(task.prompt(example), example["solution"]) for example in task.examples("train", args)]
        pretrain(model.to(device), tokenizer, mask_id, examples, args)
        aside = cache.with_suffix(f".{os.getpid()}")
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(cache)
    model, tokenizer, mask_id = load_model(str(cache), torch.bfloat16 if args.bf16 else torch.float32)
    return model.to(device), tokenizer, mask_id


def measure(
    model, tokenizer, mask_id: int, task: Task, examples: list[dict], args: Settings
) -> dict[str, dict[str, float]]:
    """Accuracy at each of eval_steps: of the sampler that is trained, and of greedy low-confidence unmasking."""
    table = {}
    samplers = {
        "as trained": {},
        "greedy": {"unmasking": "low_confidence", "temperature": 0.0, "top_k": 0, "top_p": 1.0},
    }
    for name, changes in samplers.items():
        table[name] = {}
        for steps in tqdm(args.eval_steps, desc=f"accuracy, {name}", leave=False):
            sampling = args.sampling(steps=steps, **changes)
            records = evaluate(model, tokenizer, mask_id, task, examples, args.eval_batch, seed=0, **sampling)
            table[name][str(steps)] = sum(record["correct"] for record in records) / len(records)
    return table


def print_table(results: dict, args: Settings) -> None:
    trained = f"as trained ({args.unmasking} unmasking, temperature {args.temperature:g})"
    titles = {"as trained": trained, "greedy": "greedy (low-confidence unmasking, temperature 0)"}
    print(f"\nAccuracy on {results['examples']} test examples, by sampling steps (trained with {args.steps})")
    for sampler, title in titles.items():
        print(f"\n  {title:50s}" + "".join(f"{steps:>7}" for steps in args.eval_steps))
        for stage in ("base", "AGRPO"):
            print(
                f"    {stage:48s}" + "".join(f"{results[stage][sampler][str(steps)]:7.3f}" for steps in args.eval_steps)
            )


def main(argv: list[str] | None = None) -> None:
    began = time.time()
    args = parse_settings(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.output_dir is None:
        name = f"{args.task}-{Path(args.model).name}-seed{args.seed}"
        names = [name] + [f"{name}-{n}" for n in range(2, 10_000)]
        args.output_dir = str(next(Path("runs") / name for name in names if not (Path("runs") / name).exists()))
    run, task = Path(args.output_dir), TASKS[args.task]
    if not args.resume and run.exists() and (not run.is_dir() or any(run.iterdir())):
        refuse(f"--output_dir {run} is not empty: choose another, or go on with that run by --resume {run}")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
        test = task.examples("test", args)
        if args.model != "tiny" and not args.resume:
            load_model(args.model)
    except (ValueError, RuntimeError, AssertionError) as error:
        refuse(str(error).splitlines()[0])
    run.mkdir(parents=True, exist_ok=True)
    (run / "settings.json").write_text(json.dumps(asdict(args) | {"resume": None}, indent=1))

    model, tokenizer, mask_id = pretrained_model(task, args, device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.task}: {args.model}, {size:,} parameters, on {device}; seed {args.seed}; run directory {run}")
    results = {"examples": len(test), "base": measure(model, tokenizer, mask_id, task, test, args)}
    ref_model = copy.deepcopy(model).requires_grad_(False) if args.beta > 0 else None
    if checkpoints(run):
        model, tokenizer, mask_id = load_model(str(run), model.dtype)
        model.to(device)
    if not train(model, tokenizer, mask_id, task, args, ref_model):
        refuse(f"stopped; nothing is lost. Go on with: python agrpo.py --resume {run}")
    results["AGRPO"] = measure(model, tokenizer, mask_id, task, test, args)
    (run / "results.json").write_text(json.dumps(results, indent=1))
    print_table(results, args)
    minutes, seconds = divmod(round(time.time() - began), 60)
    print(f"\n{minutes} min {seconds} s. Checkpoint: {checkpoints(run)[-1]}. Every update: {run / 'metrics.jsonl'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        refuse("stopped at once")
