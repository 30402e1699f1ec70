"""AGRPO in one file: policy gradients for masked diffusion language models from a few sampled denoising steps.

    python agrpo.py                          train a tiny model on 4x4 Sudoku: minutes on a CPU, nothing to download
    python agrpo.py --task gsm8k             LLaDA-8B-Instruct with LoRA, from the hub, on a GPU (or math, countdown)
    torchrun --nproc_per_node 8 agrpo.py --task gsm8k
    python agrpo.py --resume RUN             go on with a run; other options given here override its own
    python agrpo.py --task gsm8k --help      every setting, with its default for that task

AGRPO is Amortized Group Relative Policy Optimization (Anthony Zhan, "Simple Policy Gradients for Reasoning with
Diffusion Language Models", ICML 2026, arXiv 2510.04019v2). A masked diffusion language model predicts the masked tokens
of a completion. Generation starts from masks only; each of T steps unmasks a few positions, whose tokens are drawn
independently, block by block from the left, until a whole block is EOS. This is a Markov decision process. AGRPO is
GRPO (arXiv 2402.03300) on it, and maximizes over B completions

    J = 1/B sum_i 1/L_i sum_{t < T_i} sum_{j in U_t} [ min(rho_j A_i, clip(rho_j, 1 - eps, 1 + eps) A_i) - beta KL_j ]

Each of the T_i steps would cost a forward and backward pass. That cost is *amortized*: k << T of them are drawn, and
weighted so that they stand for all in expectation.

Letters, and the words for them in the code (i is a row, j a position; the paper writes m for T):

    q, o       prompt (B, P), completion (B, C): token ids; B = prompts x G       G  group_size: completions of a prompt
    s_t        state: the completion before step t, with masks where nothing is unmasked yet
    U_t        unmasked: the positions that step t unmasks, all inside one block
    T, T_i     steps; num_steps: those that row i took before it ended            k  steps drawn per completion
    L_i        T_i for length_norm "sequence" (GRPO's), T for "constant"          tau  temperature
    A_i        advantage: reward minus the group's mean                           eps  clipping range, beta  KL's weight
    rho_j      importance ratio p_theta(o_j | q, s_t) / p_old(o_j | q, s_t), p_old being the policy that sampled

Unbiased for what? Over the draw of steps: always for the gradient of J. Over rollouts as well: for (1 - 1/G) / T times
grad E[reward], if unmasking is random, L_i = T, beta 0, advantages not scaled, and it is the first update on these
rollouts. A random order carries no parameters, so the likelihood that a policy gradient needs is exact:

    log pi(trajectory | q) = sum_t sum_{j in U_t} log p_theta(o_j | q, s_t) + const

(Its mean over orders is an ELBO, a lower bound on log p(o | q): the estimator is ELBO-style.) "sequence" gives rows that
end early more weight per step, as GRPO does. Low-confidence unmasking depends on theta: the sum is an approximation.

Whose is what?
    the paper's           unmasking as a decision process, its stepwise likelihood, k sampled steps in place of T
    the official code's   steps drawn by entropy, stratified over the batch; top-k and top-p in the ratio; RELEASE
    this file's own       steps drawn by `surprise`, without replacement, stratified within each row too; rho of the
                          first update exactly 1; every sampled token counts (the official code drops those behind the
                          last non-EOS token, and so terms of the gradient)
    off by default        dividing by the group's standard deviation; the KL
"""

import ast
import contextlib
import copy
import importlib.util
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import datasets
import huggingface_hub as hub
import tokenizers
import torch
import torch.distributed as dist
import transformers as hf
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm

# ===== 1. Sampler.  pi(trajectory | q) = prod_t [ Pr(U_t | s_t) prod_{j in U_t} p_theta(o_j | q, s_t) ] ===============


@dataclass
class Rollout:
    """B completions, each with the trajectory that led to it. logp and entropy are float64 where the model is."""

    prompt: Tensor  # (B, P) int64, padded on the left
    prompt_mask: Tensor  # (B, P) bool, False on padding
    completion: Tensor  # (B, C) int64, EOS from where the row had ended
    step: Tensor  # (B, C) int64, the step that unmasked each position; -1 where the row had already ended
    logp: Tensor  # (B, C) float32, nats, under the policy that sampled; 0 where step is -1
    entropy: Tensor  # (B, T) float32, nats, summed over the positions that each step unmasked
    num_steps: Tensor  # (B,) int64, steps taken: T, or fewer where the row ended early
    kept: Tensor | None = None  # (B, C, K) int64, the ids that top-k and top-p left to choose from; -1 fills up to K


def logits_at(model, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
    """Logits at the given positions only: the head never sees the rest of the sequence.

    input_ids (N, L) int64; attention_mask (N, L) bool, False on padding, or None; positions (N, n) int64 in [0, L), for
    Dream in [1, L). Returns (N, n, V) in the model's dtype, differentiable. Raises ValueError where padding is not on
    the left, dropout is on, or the model is of a kind that would be silently wrong (RoBERTa's positions, a causal mask).
    """
    head = model.cls if hasattr(model, "cls") else getattr(model, "lm_head", None)  # BERT's is more than a layer
    if not hasattr(model, "cls") and (
        not isinstance(head, torch.nn.Linear) or getattr(model.config, "is_causal", True)
    ):
        raise ValueError(f"{type(model).__name__} is neither like BERT, nor like a Llama with config.is_causal = False")
    if model.training and any("drop" in name and p for name, p in vars(model.config).items()):
        raise ValueError("dropout is on, so that no two passes agree: call model.eval()")
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(~attention_mask.bool(), -1)
    # Equal rows share one forward pass, as the G completions of a prompt do while they are all masks.
    input_ids, row = input_ids.unique(dim=0, return_inverse=True)  # (M, L) different rows; (N,) which of them each is
    real, options = input_ids >= 0, {}
    if (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("prompts must be padded on the left: tokenizer(..., padding_side='left')")
    if not real.all():  # count positions from the first real token, so that padding changes nothing
        options = {"attention_mask": real, "position_ids": (real.long().cumsum(1) - 1).clamp(min=0)}
    hidden = model.base_model(input_ids=input_ids.clamp(min=0), **options).last_hidden_state  # (M, L, D)
    positions = positions - getattr(model.config, "logits_shift", 0)  # Dream's logits at i - 1 are about position i
    return head(hidden[row[:, None], positions])


def truncate(logits: Tensor, mask_id: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor | None:
    """The ids left to choose from after top-k, then top-p (nucleus sampling, arXiv 1904.09751) among those.

    logits (..., V). Returns (..., K) int64, -1 in unused places, None where nothing is cut. K = top_k; without top_k,
    the 1,024 most probable ids stand for all, to bound the memory. At least one id is kept; mask_id never is.
    """
    if not top_k and top_p >= 1:
        return None
    top, kept = without_mask(logits, mask_id).topk(min(top_k or 1024, logits.shape[-1]), dim=-1)
    drop = top == -math.inf
    if top_p < 1:
        probability = (at_least_float32(top) / temperature).softmax(-1)
        drop |= probability.cumsum(-1) - probability >= top_p  # those before it already make up top_p
        drop[..., 0] = False
    return kept.masked_fill(drop, -1)


def policy_logps(logits: Tensor, mask_id: int, temperature: float, kept: Tensor | None = None) -> Tensor:
    """Log-probabilities of the policy: a softmax at a temperature over all ids but mask_id, or over the kept ids.

    logits (..., V); kept (..., K) int64 from `truncate`. Returns (..., V), or (..., K) in the order of kept, in nats;
    float32, or float64 for float64 logits. The sampler and the estimator both call this: one policy, one definition.
    """
    if kept is None:
        logits = without_mask(at_least_float32(logits), mask_id)
    else:
        logits = at_least_float32(logits.gather(-1, kept.clamp(min=0))).masked_fill(kept < 0, -math.inf)
    return (logits / (temperature or 1.0)).log_softmax(-1)  # at 0 one id is kept: any divisor will do


at_least_float32 = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 is too coarse for log p
without_mask = lambda x, mask_id: x.masked_fill(torch.arange(x.shape[-1], device=x.device) == mask_id, -math.inf)


def tokens_per_step(completion_length: int, block_length: int, steps: int) -> list[int]:
    """How many tokens each step inside a block unmasks, the same for every block. 8 tokens in 3 steps: [3, 3, 2].

    Raises ValueError where blocks do not divide the completion, or steps do not spread evenly over the blocks.
    """
    blocks, rest = divmod(completion_length, block_length)
    if rest:
        raise ValueError(f"block length {block_length} does not divide completion length {completion_length}")
    if steps % blocks or not blocks <= steps <= completion_length:
        raise ValueError(f"{steps} steps must be a multiple of {blocks} blocks and at most {completion_length} tokens")
    each, rest = divmod(block_length, steps // blocks)
    return [each + (step < rest) for step in range(steps // blocks)]


@torch.no_grad()
def sample(
    model, prompt: Tensor, prompt_mask: Tensor, *, completion_length: int, block_length: int, steps: int,
    temperature: float, unmasking: str, mask_id: int, eos_id: int | None, top_k: int = 0, top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollout:  # fmt: skip
    """Generate one completion for each row of prompt, block by block from the left (LLaDA, arXiv 2502.09992).

    prompt (B, P) int64, padded on the left; prompt_mask (B, P) bool, False on padding; generator on the model's device.
    Inside a block each step unmasks `tokens_per_step` of the positions that are still masked:
      unmasking="random"          any of them, with equal probability; Rollout.logp then sums to log pi + const.
      unmasking="low_confidence"  a token is drawn for all of them; the most probable stay, the others are masked again.
    temperature 0 is greedy. A row has ended when its whole block is EOS: it leaves the batch and takes no further steps
    (with eos_id None, never). mask_id is never sampled. Raises ValueError for settings that do not fit together.
    """
    if unmasking not in ("random", "low_confidence"):
        raise ValueError(f"unmasking is 'random' or 'low_confidence', not {unmasking!r}")
    per_step = tokens_per_step(completion_length, block_length, steps)
    if temperature == 0:
        temperature, top_k = 1.0, 1  # greedy is a choice from one
    B, C, device, prompt_mask = len(prompt), completion_length, prompt.device, prompt_mask.bool()
    P = int(prompt_mask.sum(1).max())  # the longest prompt; all left of it is padding
    ids = torch.cat([prompt[:, prompt.shape[1] - P :], prompt.new_full((B, C), mask_id)], 1)  # (B, P+C)
    attention_mask = torch.cat([prompt_mask[:, prompt.shape[1] - P :], prompt_mask.new_ones(B, C)], 1)  # (B, P+C)
    step, num_steps, kept = prompt.new_full((B, C), -1), prompt.new_zeros(B), None
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    logp, entropy = (torch.zeros(B, n, dtype=dtype, device=device) for n in (C, steps))

    rows, t = torch.arange(B, device=device), 0  # the R rows that have not ended
    for start in range(0, C, block_length):
        # Unmasking at random is going through the block in a random order.
        noise = torch.rand(len(rows), block_length, generator=generator, device=device)
        masked = start + noise.argsort(1)  # (R, number still masked), positions of the block
        for count in per_step:
            evaluated = masked[:, :count] if unmasking == "random" else masked  # (R, n)
            logits = logits_at(model, ids[rows], attention_mask[rows], P + evaluated)  # (R, n, V)
            choices = truncate(logits, mask_id, temperature, top_k, top_p)  # (R, n, K) or None
            logps = policy_logps(logits, mask_id, temperature, choices)  # (R, n, K or V)
            gumbel = -torch.empty_like(logps).exponential_(generator=generator).clamp_(min=1e-30).log()
            pick = (logps + gumbel).argmax(-1, keepdim=True)  # the Gumbel-max trick: a draw from the policy
            token = (pick if choices is None else choices.gather(-1, pick)).squeeze(-1)  # (R, n)
            token_logp = logps.gather(-1, pick).squeeze(-1)
            token_entropy = torch.special.entr(logps.exp()).sum(-1)

            if unmasking == "low_confidence":  # most confident first; confidence is at temperature 1, untruncated
                confidence = policy_logps(logits, mask_id, 1.0).gather(-1, token[..., None]).squeeze(-1)
                best = torch.arange(len(rows), device=device)[:, None], confidence.argsort(1, descending=True)
                masked, token, token_logp, token_entropy = (x[best] for x in (masked, token, token_logp, token_entropy))
                choices = None if choices is None else choices[best]

            row, place, masked = rows[:, None], masked[:, :count], masked[:, count:]  # (R, 1), (R, count), the rest
            ids[row, P + place] = token[:, :count]
            step[row, place] = t
            logp[row, place] = token_logp[:, :count]
            entropy[rows, t] = token_entropy[:, :count].sum(1)
            if choices is not None:
                kept = prompt.new_zeros(B, C, choices.shape[-1]) if kept is None else kept
                kept[row, place] = choices[:, :count]
            t += 1
        num_steps[rows] = t
        if eos_id is not None:
            rows = rows[(ids[rows, P + start : P + start + block_length] != eos_id).any(1)]
            if len(rows) == 0:
                break
    completion = ids[:, P:] if eos_id is None else ids[:, P:].masked_fill(step < 0, eos_id)
    return Rollout(prompt, prompt_mask, completion, step, logp, entropy, num_steps, kept)


# ===== 2. Estimator.  log pi = sum_t f(t) + const, f(t) = sum_{j in U_t} log p_theta(o_j | q, s_t) ====================
#                       = E[ sum over the k drawn t of f(t) / inclusion(t) ] + const


def draw_timesteps(num_steps: Tensor, k: int, proposal: Tensor | None = None, generator=None) -> tuple[Tensor, Tensor]:
    """Draw k timesteps for each row; sum_d weights[d] f(steps[d]) is unbiased for the sum of f(t) over t < num_steps.

    num_steps (B,) int64. proposal (B, T) nonnegative, of any scale, positive on each row's own steps; None = uniform.
    generator on the CPU. Returns steps (B, k) int64 and weights (B, k) float64 (float32 on mps, which has no float64).

    inclusion(t), the probability that step t is drawn, is k times its share of the proposal; a step weighs 1/inclusion
    (Horvitz-Thompson). Proposal 1, 2, 3, 4 with k = 2 gives inclusions .2, .4, .6, .8, which end to end fill [0, k):

        0   .2       .6           1.2            2
        | 0 |   1    |     2      |       3      |

    Points at x and 1 + x, x uniform on [0, 1), hit each step as often as its length says, none twice (systematic
    sampling). x = .1 draws steps 0 and 2, weights 1/.2 and 1/.6; x = .7 draws steps 2 and 3, weights 1/.6, 1/.8. Each
    of the B rows has its x in a different one of B equal strata of [0, 1); each x by itself is still uniform.
    An inclusion is at most 1; what it would have beyond that goes to the row's other steps. So a row of at most k steps
    gets each of them once with weight 1: the exact sum. Its unused draws have weight 0 and need no pass.
    Raises ValueError where k < 1 or a proposal is negative, not finite, or 0 at a step that its row has taken.
    """
    if k < 1:
        raise ValueError(f"k, the number of timesteps drawn per completion, must be at least 1, not {k}")
    device, num_steps = num_steps.device, num_steps.cpu()[:, None]  # (B, 1)
    B, T = len(num_steps), int(num_steps.max()) if proposal is None else proposal.shape[1]
    taken = torch.arange(T) < num_steps  # (B, T)
    density = taken.double() if proposal is None else proposal.detach().cpu().double() * taken
    if (num_steps > T).any() or (taken & (density <= 0)).any() or (density < 0).any() or not density.isfinite().all():
        raise ValueError("a proposal must be positive and finite at every step that its row has taken")

    certain = taken & (num_steps <= k)  # (B, T), steps with inclusion 1
    while True:
        rest = density.masked_fill(certain, 0)
        share = rest / rest.sum(1, keepdim=True).clamp(min=1e-300)
        inclusion = certain + (k - certain.sum(1, keepdim=True)) * share  # (B, T)
        if not (inclusion > 1).any():
            break
        certain |= inclusion > 1

    stratum = torch.randperm(B, generator=generator)[:, None]  # (B, 1)
    x = (stratum + torch.rand(B, 1, generator=generator, dtype=torch.float64)) / B
    steps = torch.searchsorted(inclusion.cumsum(1), torch.arange(k) + x, right=True)  # (B, k)
    steps = steps.clamp(max=(num_steps - 1).clamp(min=0))
    weights = torch.where(torch.arange(k) < num_steps, 1 / inclusion.gather(1, steps), 0)
    return steps.to(device), weights.to(device, torch.float32 if device.type == "mps" else torch.float64)


def surprise(rollout: Rollout) -> Tensor:
    """1 - p(token), summed over the tokens that each step unmasked: (B, T), from what the sampler recorded.

    The gradient of log p(token) with respect to the logits is onehot(token) - p, whose length is 1 - p(token) up to a
    factor of at most sqrt(2): there is little to learn from tokens that the policy was sure of.
    """
    doubt = (1 - rollout.logp.exp()).clamp(min=0) * (rollout.step >= 0)
    return torch.zeros_like(rollout.entropy).scatter_add(1, rollout.step.clamp(min=0), doubt)


def defensive_proposal(score: Tensor, num_steps: Tensor, uniform_share: float = 0.1) -> Tensor:
    """The normalized score, mixed with some uniform: no weight exceeds T_i / (k uniform_share).

    score (B, T) nonnegative: `surprise`, or Rollout.entropy; num_steps (B,). Returns (B, T) float64 on the CPU.
    """
    score, length = score.cpu().double(), num_steps.cpu().clamp(min=1)[:, None]
    uniform = (torch.arange(score.shape[1]) < length) / length  # (B, T)
    total = score.sum(1, keepdim=True)
    return torch.where(total > 0, (1 - uniform_share) * score / total + uniform_share * uniform, uniform)


def step_logps(model, rollout: Rollout, rows: Tensor, steps: Tensor, *, mask_id: int, temperature: float):
    """log p_theta(o_j | q, s_t) of the tokens that step t unmasked, under the model as it is: a pass per (row, step).

    rows (N,) and steps (N,) int64, N >= 1 pairs. Returns logp (N, C), nats, 0 elsewhere, differentiable; and unmasked
    (N, C) bool: U_t. The temperature must be the sampler's, or the ratio means nothing; truncation is in Rollout.kept.
    """
    P = int(rollout.prompt_mask[rows].sum(1).max())  # the longest prompt of these rows; all left of it is padding
    prompt, prompt_mask = (x[rows, x.shape[1] - P :] for x in (rollout.prompt, rollout.prompt_mask))
    step, completion, t = rollout.step[rows], rollout.completion[rows], steps[:, None]
    unmasked = step == t  # (N, C)
    state = torch.where((step >= 0) & (step < t), completion, mask_id)  # s_t

    n = int(unmasked.sum(1).max())  # a step that unmasked fewer than n tokens is filled up with other positions
    evaluated = unmasked.int().argsort(dim=1, descending=True, stable=True)[:, :n]  # (N, n)
    attention_mask = torch.cat([prompt_mask, torch.ones_like(unmasked)], 1)
    logits = logits_at(model, torch.cat([prompt, state], 1), attention_mask, P + evaluated)  # (N, n, V)

    kept, index = None, completion.gather(1, evaluated)[..., None]  # (N, n, 1), the token's place among the V ids
    if rollout.kept is not None:
        kept = rollout.kept[rows[:, None], evaluated]  # (N, n, K)
        index = (kept == index).int().argmax(-1, keepdim=True)  # its place among the K kept ones
    logps = policy_logps(logits, mask_id, temperature, kept).gather(-1, index).squeeze(-1)  # (N, n)
    logps = logps.masked_fill(~unmasked.gather(1, evaluated), 0)
    return logps.new_zeros(unmasked.shape).scatter(1, evaluated, logps), unmasked


def estimate_logp(model, rollout: Rollout, k: int, *, mask_id: int, temperature: float, proposal=None, generator=None):
    """Unbiased estimate of log pi(trajectory | q) - const from k steps of each row: (B,), nats, differentiable.

    Exact for rows with num_steps <= k. proposal and generator as in `draw_timesteps`. Training does not call this:
    `policy_gradient` puts the clipped objective in the place of log p, with the same steps and weights.
    """
    steps, weights = draw_timesteps(rollout.num_steps, k, proposal, generator)
    row, draw = weights.nonzero(as_tuple=True)  # (N,) each: one flat list of (row, step) pairs
    logp, _ = step_logps(model, rollout, row, steps[row, draw], mask_id=mask_id, temperature=temperature)  # (N, C)
    return torch.zeros_like(rollout.logp[:, 0]).index_add(0, row, weights[row, draw].to(logp) * logp.sum(1))


# ===== 3. Objective.  min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) - beta KL,  A = r - mean(r) over the group ===


def group_advantages(rewards: Tensor, group_size: int, scale_by_std: bool = False) -> Tensor:
    """A_i = r_i - mean(r) over the row's group (GRPO, arXiv 2402.03300).

    rewards (B,), groups side by side; returns (B,). Each reward is part of its own baseline, which scales the expected
    gradient by exactly 1 - 1/G. Dividing by the group's standard deviation is GRPO's habit; it biases the gradient
    towards easy and hard prompts (Dr. GRPO, arXiv 2503.20783). Raises ValueError where group_size does not divide B.
    """
    rewards = torch.as_tensor(rewards)
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not split into groups of {group_size}")
    groups = at_least_float32(rewards).view(-1, group_size)  # (B / G, G)
    advantage = groups - groups.mean(1, keepdim=True)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    advantage = advantage.masked_fill(equal, 0)  # exactly 0, whatever rounding made of the mean
    if scale_by_std:
        advantage = advantage / (groups.std(1, keepdim=True) + 1e-4)
    return advantage.view(-1)


def clipped_objective(logp: Tensor, old_logp: Tensor, advantage: Tensor, eps_low=0.2, eps_high=0.2) -> Tensor:
    """min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), elementwise, to be maximized (PPO, arXiv 1707.06347).

    rho = exp(logp - old_logp). All three broadcast together; differentiable in logp.
    """
    ratio = (logp - old_logp).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)


def kl_penalty(logp: Tensor, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(policy || reference) per token: the k3 estimator exp(d) - d - 1, d = ref_logp - logp, times rho. Elementwise.

    rho = exp(logp - old_logp) corrects for tokens drawn from the old policy, in the gradient too (DeepSeek-V3.2, arXiv
    2512.02556). Never negative, 0 where the policies agree. The gradient leaves out that theta changes the states.
    """
    d = ref_logp - logp
    return (logp - old_logp).exp() * (d.exp() - d - 1)


# ===== 4. Gradient: the amortized policy gradient, grad J =============================================================


def policy_gradient(
    model, rollout: Rollout, advantage: Tensor, *, k: int, mask_id: int, temperature: float, on_policy: bool,
    proposal: Tensor | None = None, length_norm: str = "sequence", eps_low: float = 0.2, eps_high: float = 0.2,
    beta: float = 0.0, ref_model=None, micro_batch: int = 64, generator: torch.Generator | None = None,
) -> dict[str, float]:  # fmt: skip
    """Add to .grad the gradient of -J (see the top of this file), estimated from k steps of each row.

    advantage (B,). on_policy: the model is still the one that sampled; rho is 1, but has its gradient. length_norm: L_i
    is T_i ("sequence") or T ("constant"). ref_model: the reference, for beta > 0. proposal and generator as in
    `draw_timesteps`; temperature as in sampling. At most micro_batch (row, step) pairs are in memory at once.
    Returns loss, an estimate of -J, and clip_ratio, approx_kl (to the old policy) and kl, means over tokens evaluated.
    Raises ValueError for another length_norm, and for beta > 0 without ref_model.
    """
    if length_norm not in ("sequence", "constant"):
        raise ValueError(f"length_norm is 'sequence' or 'constant', not {length_norm!r}")
    if beta > 0 and ref_model is None:
        raise ValueError("beta > 0 needs ref_model, the reference of the KL")
    B, T = rollout.entropy.shape
    metrics = {"loss": 0.0, "clip_ratio": 0.0, "approx_kl": 0.0, "kl": 0.0}
    rows = ((advantage != 0) | (beta > 0)).nonzero().squeeze(1)  # no advantage: no gradient, so no pass
    if len(rows) == 0:
        return metrics
    proposal = None if proposal is None else proposal[rows.cpu()]
    steps, weights = draw_timesteps(rollout.num_steps[rows], k, proposal, generator)  # (R, k)
    row, draw = weights.nonzero(as_tuple=True)  # one flat list of N (row, step) pairs
    rows, steps, weights = rows[row], steps[row, draw], weights[row, draw]  # (N,)
    weights = (weights / (B * (rollout.num_steps[rows] if length_norm == "sequence" else T))).to(rollout.logp.dtype)

    seen = []
    for start in range(0, len(rows), micro_batch):
        r, t, w = (x[start : start + micro_batch] for x in (rows, steps, weights))
        A = advantage[r, None]
        logp, unmasked = step_logps(model, rollout, r, t, mask_id=mask_id, temperature=temperature)  # (N, C)
        old_logp = logp.detach() if on_policy else rollout.logp[r] * unmasked
        objective, kl = clipped_objective(logp, old_logp, A, eps_low, eps_high), torch.zeros_like(logp)
        if beta > 0:
            with torch.no_grad():
                ref_logp, _ = step_logps(ref_model, rollout, r, t, mask_id=mask_id, temperature=temperature)
            kl = kl_penalty(logp, old_logp, ref_logp)
        loss = -(w[:, None] * (objective - beta * kl) * unmasked).sum()
        loss.backward()
        metrics["loss"] += loss.item()
        seen.append(torch.stack([logp - old_logp, A.expand_as(logp), kl])[:, unmasked].detach())

    log_ratio, A, kl = torch.cat(seen, 1)  # (tokens,) each
    ratio = log_ratio.exp()
    clipped = (ratio < 1 - eps_low) & (A < 0) | (ratio > 1 + eps_high) & (A > 0)
    means = {"clip_ratio": clipped.double().mean(), "approx_kl": (ratio - 1 - log_ratio).mean(), "kl": kl.mean()}
    return metrics | {name: float(mean) for name, mean in means.items()}


# ===== 5. Training loop ===============================================================================================


def train(model, tokenizer, mask_id: int, task: "Task", examples: list, test: list, args: "Settings", ref_model=None):
    """Rollouts, rewards, advantages, gradient, AdamW; repeat, from the run's newest checkpoint on.

    Every random choice is seeded by (seed, purpose, update): a run that was killed and resumed ends as if it had not
    been, on a CPU bit for bit. Raises FloatingPointError where log-probabilities or a gradient are not finite.
    """
    run, trained = Path(args.output_dir), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.01)
    start = load_training_state(run, optimizer)
    track = tracker(args, start) if rank() == 0 else None
    policy = {"mask_id": mask_id, "temperature": args.temperature, "micro_batch": args.micro_batch}
    model.train(args.gradient_checkpointing)  # it works in training mode only; there is no dropout
    hidden = True if rank() > 0 else None  # None: where there is no terminal, such as in a log, lines stand for the bar
    progress = tqdm(range(start, args.max_steps), "AGRPO", args.max_steps, initial=start, disable=hidden)
    for update in progress:
        # Rollouts: group_size completions of each prompt, side by side.
        prompts = [example for example in draw_examples(examples, update, args) for _ in range(args.group_size)]
        key = (args.seed, "rollout", update)
        batch, texts, rollout = generate(model, tokenizer, mask_id, task, prompts, args, key)

        # Rewards and advantages.
        grades = torch.tensor([task.grade(*pair) for pair in zip(batch, texts)], dtype=torch.float32)  # (B, 2)
        for i in (~grades.isfinite()).any(1).nonzero().flatten():
            raise BadInput(
                f"the reward of {args.task} is {float(grades[i, 0])} for {batch[i]!r:.200}: {texts[i]!r:.200}"
            )
        rewards, right = grades.to(model.device).unbind(1)
        advantage = group_advantages(rewards, args.group_size, args.scale_by_std)

        # Timesteps: drawn more often where more can be learned.
        scores = {"surprise": surprise(rollout), "entropy": rollout.entropy, "uniform": 0 * rollout.entropy}
        proposal = defensive_proposal(scores[args.timestep_proposal], rollout.num_steps)
        rngs = [seeded_generator("cpu", args.seed, update, i, rank()) for i in range(args.updates_per_rollout)]
        views = [rollout] * len(rngs)
        if args.method == "diffu_grpo":
            views = [one_step_view(model, rollout, on_policy=g is rngs[0], generator=g, **policy) for g in rngs]

        # Updates: the first is on the policy that sampled; the others are not, which is what clipping is for.
        warm, cosine = (update + 1) / max(1, args.warmup_steps), (1 + math.cos(math.pi * update / args.max_steps)) / 2
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, warm) * cosine
        for i, view in enumerate(views):
            optimizer.zero_grad()
            metrics = policy_gradient(
                model, view, advantage, k=args.k, on_policy=i == 0, proposal=proposal, length_norm=args.length_norm,
                eps_low=args.eps_low, eps_high=args.eps_high, beta=args.beta, ref_model=ref_model, generator=rngs[i],
                **policy,
            )  # fmt: skip
            for p in trained:  # where nothing was to be learned there is no gradient: take part with zeros
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if world_size() > 1:
                    dist.all_reduce(p.grad)
                    p.grad /= world_size()
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if not (rollout.logp.isfinite().all() and grad_norm.isfinite()):
                cause = "--learning_rate, --beta or --updates_per_rollout may be too high: resume with less"
                raise FloatingPointError(f"update {update + 1} is not finite; {last_checkpoint(run)}. {cause}")
            optimizer.step()

        std, tokens = rewards.view(-1, args.group_size).std(1), (rollout.step >= 0).sum()
        metrics |= {
            "reward": rewards.mean(),
            "reward_std": std.mean(),
            "accuracy": right.mean(),
            "grad_norm": grad_norm,
        }
        metrics |= {"completion_length": tokens / len(batch), "entropy": rollout.entropy.sum() / tokens}
        metrics |= {
            "frac_reward_zero_std": (std < 1e-6).float().mean(),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        metrics = {"update": update + 1} | mean_over_ranks(metrics)
        if args.eval_every and (update + 1) % args.eval_every == 0:
            metrics["eval_accuracy"] = evaluate(model, tokenizer, mask_id, task, test, args, args.eval_steps[0], True)
        if rank() > 0:
            continue
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        track(metrics)
        progress.set_postfix_str(
            text := "reward {reward:.2f} accuracy {accuracy:.2f} grad_norm {grad_norm:.2f}".format(**metrics)
        )
        if progress.disable and (update + 1) % 10 == 0:
            print(f"update {update + 1} of {args.max_steps}: {text}", flush=True)
        if args.show_every and (update + 1) % args.show_every == 0:
            progress.write(f"\nupdate {update + 1}, reward {rewards[0]:g}\n{task.show(batch[0], texts[0])}\n")
        if (update + 1) % args.save_every == 0 or update + 1 == args.max_steps:
            save_training_state(run, update + 1, model, tokenizer, optimizer)
    model.eval()


def generate(model, tokenizer, mask_id: int, task: "Task", examples: list, args: "Settings", key: tuple, **changes):
    """Complete each example; under torchrun, this process's share. Returns (its examples, their completions, Rollout).

    Each --rollout_batch has a generator of its own, from key: completions do not depend on the number of processes.
    Completions end before their first EOS. Tokens after it were sampled, so they are trained on; rewards ignore them.
    changes override settings of sampling. Raises BadInput where the model has not enough positions.
    """
    names = ("completion_length", "block_length", "steps", "temperature", "unmasking", "top_k", "top_p")
    sampling = {name: getattr(args, name) for name in names} | {"mask_id": mask_id, "eos_id": tokenizer.eos_token_id}
    prompts, mine, texts, rollouts = [task.prompt(example, tokenizer) for example in examples], [], [], []
    encoded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    longest, most = encoded["input_ids"].shape[1] + args.completion_length, model.config.max_position_embeddings
    if longest > most:
        raise BadInput(f"the longest prompt and a completion make {longest} tokens, but the model has {most} positions")
    for n in range(rank(), math.ceil(len(examples) / args.rollout_batch), world_size()):
        part, rng = slice(n * args.rollout_batch, (n + 1) * args.rollout_batch), seeded_generator(model.device, *key, n)
        ids, mask = (encoded[name][part].to(model.device) for name in ("input_ids", "attention_mask"))
        rollouts.append(sample(model, ids, mask.bool(), generator=rng, **sampling | changes))
        rows = [row[: [*row, sampling["eos_id"]].index(sampling["eos_id"])] for row in rollouts[-1].completion.tolist()]
        rows = [
            [token for token in row if token != tokenizer.pad_token_id] for row in rows
        ]  # other special ones are text
        mine, texts = mine + examples[part], texts + tokenizer.batch_decode(rows)
    columns = zip(*(vars(rollout).values() for rollout in rollouts))  # none if this process has no share
    rollout = [None if column[0] is None else torch.cat(column) for column in columns]
    return mine, texts, Rollout(*rollout) if rollout else None


def evaluate(model, tokenizer, mask_id: int, task: "Task", test: list, args: "Settings", steps: int, greedy: bool):
    """Accuracy: the share of test examples answered right, each completed once in so many steps."""
    changes = {"unmasking": "low_confidence", "temperature": 0.0, "top_k": 0, "top_p": 1.0} if greedy else {}
    mine, texts, _ = generate(model, tokenizer, mask_id, task, test, args, ("evaluation",), steps=steps, **changes)
    right = sum(task.grade(*pair)[1] for pair in zip(mine, texts))
    return mean_over_ranks({"right": right})["right"] * world_size() / len(test)


def one_step_view(
    model, rollout: Rollout, *, mask_id: int, temperature: float, on_policy: bool, micro_batch: int = 64, generator=None
) -> Rollout:
    """diffu-GRPO's estimator (d1, arXiv 2504.12216), to compare with: the rollout as if one step had unmasked it all.

    The completion is all masks, and so is each prompt token with probability 0.15. Hardly any token was sampled in such
    a state, so the gradient is biased. Give the result to `policy_gradient` in place of the rollout. Off policy, its
    logp is the model's as it is now. Nothing is truncated.
    """
    hide = (torch.rand(rollout.prompt.shape, generator=generator) < 0.15).to(rollout.prompt.device)
    prompt, step = rollout.prompt.masked_fill(hide & rollout.prompt_mask, mask_id), rollout.step.clamp(max=0)
    view = replace(rollout, prompt=prompt, step=step, num_steps=rollout.num_steps.clamp(max=1), kept=None)
    if not on_policy:
        logps = lambda rows: step_logps(model, view, rows, 0 * rows, mask_id=mask_id, temperature=temperature)[0]
        with torch.no_grad():
            rows = torch.arange(len(prompt), device=prompt.device).split(micro_batch)
            view.logp = torch.cat(list(map(logps, rows)))
    return view


def seeded_generator(device, *key) -> torch.Generator:
    """A generator for the purpose that key names: nothing random has a state that a checkpoint would have to hold."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(60))


def draw_examples(examples: list[dict], update: int, args: "Settings") -> list[dict]:
    """The prompts of one update: every example comes once per epoch, each epoch in another random order."""
    size, first = len(examples), update * args.prompts_per_update  # counted from the start of the run
    places = [divmod(n, size) for n in range(first, first + args.prompts_per_update)]
    epochs = {n: random.Random(f"{args.seed} epoch {n}").sample(range(size), size) for n in {n for n, _ in places}}
    return [examples[epochs[n][place]] for n, place in places]


def tracker(args: "Settings", start: int) -> Callable[[dict], None]:
    """What takes an update's metrics where --report_to says; a resumed run goes on where its checkpoint was made."""
    if args.report_to == "wandb":
        import wandb

        name = Path(args.output_dir).name
        run = wandb.init(project="agrpo", name=name, id=name, resume="allow", config=asdict(args))
        return lambda metrics: run.log(metrics, step=metrics["update"])
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        add = SummaryWriter(args.output_dir, purge_step=start + 1).add_scalar
        return lambda metrics: [add(name, value, metrics["update"]) for name, value in metrics.items()]
    return lambda metrics: None


rank = lambda: dist.get_rank() if dist.is_initialized() else 0
world_size = lambda: dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(metrics: dict) -> dict[str, float]:
    """Also where processes wait for each other."""
    values = torch.tensor([float(value) for value in metrics.values()], dtype=torch.float64)
    if world_size() > 1:
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
    return dict(zip(metrics, (values / world_size()).tolist()))


def save_training_state(run: Path, update: int, model, tokenizer, optimizer) -> None:
    """Write run/checkpoint-N, keep the newest two. It is renamed when whole: a killed process leaves no half of one."""
    aside, state = run / "checkpoint.part", optimizer.state_dict()["state"]
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, tokenizer, aside)
    save_file({f"{i} {name}": x for i in state for name, x in state[i].items()}, aside / "optimizer.safetensors")
    aside.rename(run / f"checkpoint-{update}")
    for old in checkpoints(run)[:-2]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(run.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name[11:]))


def last_checkpoint(run: Path) -> str:
    return f"the last checkpoint is {checkpoints(run)[-1]}" if checkpoints(run) else "there is no checkpoint yet"


def load_training_state(run: Path, optimizer) -> int:
    """Load the optimizer from the newest checkpoint, cut metrics.jsonl back to it, return the updates made so far."""
    done, state, log = 0, {}, run / "metrics.jsonl"
    for newest in checkpoints(run)[-1:]:
        done = int(newest.name[11:])
        for key, tensor in load_file(newest / "optimizer.safetensors").items():
            i, name = key.split()
            state.setdefault(int(i), {})[name] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if rank() == 0 and log.exists():
        write_whole(log, "".join(log.read_text().splitlines(keepends=True)[:done]))
    return done


def write_whole(path: Path, text: str) -> None:
    """All of a file or nothing, whenever the process is killed."""
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").replace(path)


# ===== 6. Tasks: examples, prompts, rewards ===========================================================================


class BadInput(ValueError):
    """What was given cannot work. The message says why and what to do, and is all that the scripts print."""


@dataclass(frozen=True)
class Task:
    """An example is a dict; question and plain are templates over it. A model is asked the question and must write
    <reasoning>...</reasoning><answer>...</answer>; or, without a chat template, is shown plain and writes the answer."""

    question: str
    is_right: Callable[[dict, str], bool]  # (example, answer)
    columns: dict[str, tuple[str, str]]  # field of an example -> (column of a data set, what its values look like)
    hub: dict[str, str] | None = None  # split -> data set
    create: Callable[[str, int], list[dict]] | None = None  # (split, seed) -> examples, where there is no --data
    plain: str | None = None
    credit: Callable[[dict, str], float] = lambda example, answer: 0.0  # partial credit, from 0 to 1
    picture: Callable[[dict, str], str] = lambda example, answer: answer

    def examples(self, split: str, args: "Settings") -> list[dict]:
        """Examples of split "train" or "test": from --data, made here (what --data lacks too), or from the hub."""
        if split not in ("train", "test"):
            raise ValueError(f"a split is 'train' or 'test', not {split!r}")
        if self.create and not (args.data and (split == "test" or any(Path(args.data).glob("train*")))):
            return self.create(split, args.seed)
        return read_rows(args.data or self.hub[split], split, self.columns)

    def for_model(self, tokenizer) -> "Task":
        return replace(self, plain=None, picture=Task.picture) if tokenizer.chat_template else self

    def prompt(self, example: dict, tokenizer) -> str:
        text = (self.plain or self.question).format(**example)
        if tokenizer.chat_template is None:
            return text
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def answer(self, completion: str) -> str | None:
        return completion.strip() if self.plain else inside_tags(completion, "answer")

    def grade(self, example: dict, completion: str) -> tuple[float, bool]:
        """(reward, whether the answer is right). The reward is the official release's: 3 for a right answer, partial
        credit, and 0.5 for each pair of tags. Where the whole completion is the answer: 1, and partial credit."""
        answer = self.answer(completion)
        right = answer is not None and self.is_right(example, answer)
        credit = self.credit(example, answer) if answer is not None else 0.0
        tags = sum(inside_tags(completion, tag) is not None for tag in ("reasoning", "answer"))
        return right + credit if self.plain else 3 * right + credit + 0.5 * tags, right

    def show(self, example: dict, completion: str) -> str:
        return self.picture(example, completion) + (
            "\n    right" if self.grade(example, completion)[1] else "\n    wrong"
        )


def inside_tags(text: str, tag: str) -> str | None:
    """What stands between <tag> and </tag>; None unless each occurs exactly once, in this order."""
    if re.findall(f"</?{tag}>", text) != [f"<{tag}>", f"</{tag}>"]:
        return None
    return text.split(f"<{tag}>")[1].split(f"</{tag}>")[0].strip()


def read_rows(source: str, split: str, columns: dict[str, tuple[str, str]]) -> list[dict[str, str]]:
    """Examples from a file (to test on), a folder of train.* and test.*, or a hub id; .csv, .json, .jsonl or .parquet.

    columns as in `Task`, "a|b" meaning a or b; where a pattern has a group, that is the value. Raises BadInput that says
    what is wrong.
    """
    place = local_or_hub(source, "dataset", ["*.json*", "*.csv", "*.parquet"])
    name = r"\w+" if place.is_file() and split == "test" else split + r"(-\d+-of-\d+)?"
    found = [place, *place.glob("*"), *place.glob("main/*"), *place.glob("data/*")]  # the latter two on the hub
    files = [file for file in found if re.fullmatch(name + r"\.(jsonl?|csv|parquet)", file.name)]
    if not files:
        raise BadInput(f"--data {source}: give a folder with a {split}.csv, .json, .jsonl or .parquet")
    kind, files = files[0].suffix[1:].removesuffix("l"), sorted(str(f) for f in files if f.parent == files[0].parent)
    shards = re.search(r"-of-0*(\d+)\.\w+$", files[0])
    if len(files) != (int(shards[1]) if shards else 1):
        raise BadInput(f"--data {source}: {len(files)} files for {split}, which is one too many or lacks some: {files}")
    text = {
        "converters": {name: str for column, _ in columns.values() for name in column.split("|")}
    }  # "01" stays "01"
    try:
        table = datasets.load_dataset(kind, data_files=files, split="train", **text if kind == "csv" else {})
    except Exception as error:  # noqa: BLE001 - each format has errors of its own
        reason = (str(error.__cause__ or error) or "empty").splitlines()[0]
        raise BadInput(f"--data {files[0]}: not readable, or no rows: {reason}") from None
    rows = []
    for number, row in enumerate(table.to_list(), start=1):
        rows.append({})
        for key, (column, pattern) in columns.items():
            value = next((row[name] for name in column.split("|") if row.get(name)), "")
            match = re.fullmatch(pattern, str(value).strip(), re.DOTALL)
            if not match:
                raise BadInput(
                    f"--data {files[0]}, row {number}: no {column} that looks like {pattern} in {row!r:.100}"
                )
            rows[-1][key] = match[match.lastindex or 0]
    if not rows:
        raise BadInput(f"--data {files[0]} has no rows")
    return rows


# A 4x4 Sudoku is its 16 cells, row by row, 0 for a blank. Each of 4 rows, 4 columns and 4 boxes holds 1 to 4 once.
ROWS = [[4 * r + c for c in range(4)] for r in range(4)]
BOXES = [[8 * r + 2 * c + i for i in (0, 1, 4, 5)] for r in range(2) for c in range(2)]


def sudoku_credit(example: dict, answer: str) -> float:
    """The share of rows, columns and boxes that hold 1 to 4 once; 0 if it is not 16 cells that keep the clues."""
    cells = "".join(answer.split()) if len(answer) <= 100 else ""
    if len(cells) != 16 or not all(clue in ("0", cell) for clue, cell in zip(example["puzzle"], cells)):
        return 0.0
    return sum({cells[i] for i in unit} == set("1234") for unit in [*ROWS, *zip(*ROWS), *BOXES]) / 12


def sudoku_picture(example: dict, answer: str) -> str:
    puzzle, cells = example["puzzle"].replace("0", "."), answer.ljust(16)
    line = lambda text, row: " ".join(text[i] for i in row)
    return "\n".join(f"    {line(puzzle, row)}   {line(cells, row)}" for row in ROWS)


def sudoku_create(split: str, seed: int) -> list[dict]:
    """Puzzles of 10 to 14 blanks; most have several solutions, and any of them is right. 240 of the 288 grids are to
    train on (64 puzzles each, drawn with the seed), 48 to test on (8 each, always the same)."""
    lines = ["".join(line) for line in itertools.permutations("1234")]
    bands = [a + b for a in lines for b in lines if set(a[:2] + b[:2]) == set(a[2:] + b[2:]) == set("1234")]
    grids = [a + b for a in bands for b in bands if sudoku_credit({"puzzle": "0" * 16}, a + b) == 1]
    grids = random.Random("grids").sample(grids, 288)
    rng, puzzles = random.Random(f"{seed} puzzles" if split == "train" else "test puzzles"), []
    for grid in grids[:240] * 64 if split == "train" else grids[240:] * 8:
        blank = rng.sample(range(16), rng.randint(10, 14))
        puzzles.append({"puzzle": "".join("0" if i in blank else grid[i] for i in range(16)), "solution": grid})
    return puzzles


def countdown_create(split: str, seed: int) -> list[dict]:
    """Three numbers and the value of an expression of them: 4,096 to train on, drawn with the seed, 256 to test on."""
    rng, problems = random.Random(f"{seed} countdown" if split == "train" else "countdown test"), []
    while len(problems) < (4096 if split == "train" else 256):
        a, b, c = (rng.randint(1, 99) for _ in range(3))
        first, second = rng.choice("+-*/"), rng.choice("+-*/")
        target = arithmetic(rng.choice([f"({a}{first}{b}){second}{c}", f"{a}{first}({b}{second}{c})"]))
        if target is not None and target.denominator == 1 and 0 < target < 1000:
            problems.append({"numbers": ",".join(map(str, rng.sample([a, b, c], 3))), "target": str(target)})
    return problems


def countdown_right(example: dict, answer: str) -> bool:
    """Whether it is an expression of the target from exactly the given numbers; "= target" may follow it."""
    expression, equals, target = plainly(answer).partition("=")
    if len(answer) > 200 or equals and target.strip() != example["target"]:
        return False
    given, used = (sorted(re.findall("[0-9]+", text)) for text in (example["numbers"], expression))
    return used == given and arithmetic(expression) == int(example["target"])


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def arithmetic(expression: str) -> Fraction | None:
    """The exact value of an expression of +, -, *, / and parentheses over whole numbers; None for anything else."""

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))

    expression = " ".join(expression.split())
    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", expression):
        return None
    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, KeyError, AttributeError):  # the last two: 2 ** 3, 2(3), -2
        return None


def gsm8k_right(example: dict, answer: str) -> bool:
    """Whether the answer names one number, and it is the gold one: 1,234 and $1234.00 and 1234 apples are the same."""
    number = single_number(answer)
    return number is not None and number == single_number(example["gold"])


def boxed(text: str) -> str | None:
    r"""What the only \boxed{...} of a text holds, braces matched; None where there is none, or more than one."""
    parts, depth = text.split("\\boxed{"), 1
    for i, character in enumerate(parts[1][:1000] if len(parts) == 2 else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return parts[1][:i]
    return None


def plainly(answer: str) -> str:
    """The answer out of its box, with one sign each for times, divided by, minus and the comma, no bold, no full stop."""
    text = boxed(answer) or answer
    for written, sign in SIGNS.items():
        text = re.sub(written, sign, text)
    return text.strip().removesuffix(".")


SIGNS = {
    r"\*\*": "",
    r"×|·|\\times\b|\\cdot\b": "*",
    r"÷|\\div\b": "/",
    "[\u2010-\u2013\u2212\ufe63\uff0d]": "-",
    r"\{,\}": ",",
}
NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![A-Za-z])\.[0-9]+")
BEFORE, AFTER = r"(sqrt|√|log|ln|exp|\^|/|\w\s*\*)[\s{(]*$", r"[\s})]*(!|\^|\\?pi\b|π|\*\s*\w)"  # another value


def single_number(text: str) -> Fraction | None:
    """The number in a text that holds exactly one, negative if a minus stands before it with no letter between. None
    for none, several, digits other than 0 to 9, an operator or function beside it, or over 100 characters. The power of
    a unit (m^2) is no number, and words are not read: 72 thousand is 72."""
    text = re.sub(r"(?<=[A-Za-z])(\^\{?[23]\}?|[²³])", "", plainly(text))
    found = list(NUMBER.finditer(text))
    if len(found) != 1 or len(text) > 100 or any(c.isnumeric() and not c.isascii() for c in text):
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    if re.search(BEFORE, before) or re.match(AFTER, after):
        return None
    value = Fraction(found[0][0].replace(",", ""))
    return -value if re.search(r"-\W*$", before) else value


def math_right(example: dict, answer: str) -> bool:
    r"""Whether math-verify finds what is in \boxed{} equal to the solution's; the text around it is not looked at."""
    from math_verify import parse, verify

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify's time limits use signals, which only the main thread has")
    inside = boxed(answer) if len(answer) <= 500 else None
    if not inside or not inside.strip():
        return False
    try:  # a second each: 9^{9^9} must not hold up a group
        gold, found = (parse(text, parsing_timeout=1) for text in (example["solution"], f"\\boxed{{{inside}}}"))
        return bool(verify(gold, found, timeout_seconds=1))
    except Exception:  # noqa: BLE001 - whatever a parser of LaTeX does with what a model wrote, it was no right answer
        return False


FORMAT = "\n\nThink first, inside <reasoning> and </reasoning>. Then write the answer inside <answer> and </answer>: "
TASKS = {
    "sudoku": Task(
        "Fill in this 4x4 Sudoku, given row by row, so that every row, column and 2x2 box holds 1, 2, 3 and 4 once; 0 "
        "is a blank: {puzzle}" + FORMAT + "the 16 digits, such as <answer>1234341223414123</answer>.",
        lambda example, answer: sudoku_credit(example, answer) == 1,
        {"puzzle": ("Puzzle", "[0-4]{16}"), "solution": ("Solution", "[1-4]{16}")},
        create=sudoku_create, plain="{puzzle}", credit=sudoku_credit, picture=sudoku_picture,
    ),
    "countdown": Task(
        "Write an expression that equals {target}, using each of the numbers {numbers} exactly once, +, -, *, / and "
        "parentheses." + FORMAT + "the expression alone, such as <answer>(1 + 2) * 3</answer> for 9.",
        countdown_right,
        {"numbers": ("input|nums", r"\[?([0-9]+(?:[, ]+[0-9]+)+)\]?"), "target": ("output|target", "[0-9]+")},
        create=countdown_create,
    ),
    "gsm8k": Task(  # arXiv 2110.14168
        "{question}" + FORMAT + "the number alone, in \\boxed{{}}, such as <answer>\\boxed{{42}}</answer>.",
        gsm8k_right, {"question": ("question", ".+"), "gold": ("answer", r".*####\s*(-?\$?[0-9.,]*[0-9])")},
        {"train": "openai/gsm8k", "test": "openai/gsm8k"},
    ),
    "math": Task(  # arXiv 2103.03874
        "{problem}" + FORMAT + "the final answer alone, in \\boxed{{}}, such as <answer>\\boxed{{42}}</answer>.",
        math_right, {"problem": ("problem", ".+"), "solution": ("solution", r".*\\boxed.*")},
        {"train": "DigitalLearningGmbH/MATH-lighteval", "test": "HuggingFaceH4/MATH-500"},
    ),
}  # fmt: skip


# ===== 7. Models ======================================================================================================


def load_model(name_or_path: str, device="cpu", dtype: torch.dtype = torch.float32, base: str | None = None):
    """(model, tokenizer, mask_id), ready to sample from.

    name_or_path: "tiny" (not trained yet), a LLaDA or Dream checkpoint (hub id or folder), or a folder that this file
    saved: a run, a checkpoint, a LoRA adapter (peft's too); base stands in for an adapter's base that is gone. LLaDA is a
    Llama and Dream a Qwen2, both without the causal mask, so transformers' own classes hold them: no remote code,
    safetensors only. Raises BadInput for anything else.
    """
    if name_or_path == "tiny":
        return tiny_model(device, dtype)
    folder = find_checkpoint(name_or_path)
    if (folder / "adapter_config.json").exists():
        adapter, file = json.loads((folder / "adapter_config.json").read_text()), folder / "adapter_model.safetensors"
        if any(adapter.get(name) for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")):
            raise BadInput(f"{folder} is no plain LoRA adapter, the only kind that this file reads")
        if not file.exists():
            raise BadInput(f"{folder} has no {file.name}, and only safetensors is read")
        recorded = adapter["base_model_name_or_path"]
        try:
            model, tokenizer, mask_id = load_model(recorded, device, dtype)
        except BadInput:
            if base in (None, recorded):
                raise
            print(f"{folder}: {recorded} is not to be had, {base} takes its place")
            model, tokenizer, mask_id = load_model(base, device, dtype)
        saved = {name.removeprefix(PEFT): tensor for name, tensor in load_file(file).items()}
        for theirs, ours in LLADA_WEIGHTS.items():  # as adapters of the published code are named
            saved = {re.sub(theirs, ours, name): tensor for name, tensor in saved.items()}
        add_lora(merge_lora(model), adapter["r"], adapter["lora_alpha"], {name.split(".lora_")[0] for name in saved})
        if {n: x.shape for n, x in saved.items()} != {n: p.shape for n, p in model.named_parameters() if "lora_" in n}:
            raise BadInput(f"{folder} is an adapter for another model than {model.name_or_path}")
        model.load_state_dict(saved, strict=False)
        return model, tokenizer, mask_id

    raw = json.loads((folder / "config.json").read_text())
    kind = raw.get("model_type")
    if kind not in MODELS:
        raise BadInput(f"{name_or_path} is a {kind!r} model; this file knows LLaDA, Dream and its own tiny one")
    model_class, extra = MODELS[kind]
    own = {key: key for key in (*model_class.config_class.__annotations__, "rope_theta", "rope_scaling")}
    keys = LLADA_CONFIG if kind == "llada" else own  # only what describes the architecture
    given = {ours: raw[theirs] for ours, theirs in keys.items() if theirs in raw}
    config = model_class.config_class(**given | extra | {"use_cache": False})
    with torch.device("meta"):
        size = model_class(config).num_parameters()
    if torch.device(device).type == "cpu" and size > 2e9:
        raise BadInput(f"{name_or_path}: {size / 1e9:.1f} billion parameters are too many for a CPU; use a GPU")
    tokenizer_class = hf.Qwen2Tokenizer if kind == "Dream" else hf.AutoTokenizer  # Dream's own is remote code
    tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    mask_id = raw.get("mask_token_id", tokenizer.mask_token_id)
    if mask_id is None or tokenizer.eos_token_id is None:
        raise BadInput(f"{name_or_path}: no mask_token_id in config.json, or no eos_token in the tokenizer")
    model, loaded = model_class.from_pretrained(
        find_checkpoint(name_or_path, "*.safetensors"), config=config, dtype=dtype, use_safetensors=True,
        key_mapping=LLADA_WEIGHTS if kind == "llada" else None, output_loading_info=True,
    )  # fmt: skip
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loaded[problem]:
            raise BadInput(f"{name_or_path}: {problem.replace('_', ' ')}: {sorted(map(str, loaded[problem]))[:5]}")
    model.raw_config = raw
    model.name_or_path = str(folder.resolve()) if Path(name_or_path).exists() else name_or_path  # for an adapter's base
    return model.to(device).eval(), tokenizer, mask_id


MODELS = {  # model_type: transformers' class, and what its config needs besides
    "bert": (hf.BertForMaskedLM, {}),
    "Dream": (hf.Qwen2ForCausalLM, {"is_causal": False, "logits_shift": 1}),
    "llada": (hf.LlamaForCausalLM, {"is_causal": False}),
}
LLADA_CONFIG = {  # Llama's name: LLaDA's
    "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "intermediate_size": "mlp_hidden_size", "vocab_size": "embedding_size",
    "rms_norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
}  # fmt: skip
LLADA_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj", "self_attn.o_proj": "attn_out", "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
}  # fmt: skip
LLADA_WEIGHTS = {rf"blocks\.(\d+)\.{theirs}": rf"model.layers.\1.{ours}" for ours, theirs in LLADA_LAYER.items()}
LLADA_WEIGHTS |= {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
LLADA_WEIGHTS = {rf"^model\.transformer\.{theirs}\.": f"{ours}." for theirs, ours in LLADA_WEIGHTS.items()}
PEFT = "base_model.model."  # what peft puts before the name of each weight of an adapter


def find_checkpoint(name: str, weights: str = "*.txt") -> Path:
    """The folder of a checkpoint: itself, a run's newest checkpoint, or what the hub has by that name."""
    folder = local_or_hub(name, "model", ["*.json", "*.txt", "*.jinja", "adapter_model.safetensors", weights])
    if (folder / "settings.json").is_file():  # a run
        folder = (checkpoints(folder) or [folder])[-1]
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise BadInput(f"{name}: no config.json or adapter_config.json in it, so it is no checkpoint")
    return folder


def local_or_hub(name: str, kind: str, files: list[str]) -> Path:
    """A path as it is, or the folder of a hub repository, kind "model" or "dataset": downloaded, or from the cache."""
    if Path(name).exists():
        return Path(name)
    try:  # one short question first: a download retries for minutes before it says that there is no network
        hub.HfApi().repo_info(name, repo_type=kind, timeout=5)
        return Path(hub.snapshot_download(name, repo_type=kind, allow_patterns=files))
    except Exception as error:  # noqa: BLE001 - which one says that there is no network depends on the HTTP client
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        return Path(hub.snapshot_download(name, repo_type=kind, allow_patterns=files, local_files_only=True))
    except (OSError, ValueError):
        option = "--model" if kind == "model" else "--data"
        advice = f"give {option} FOLDER, or run plain `python agrpo.py`, which needs no hub"
        raise BadInput(f"{name}: no such file or folder, and no {kind} on the hub ({reason}); {advice}") from None


class LoRALinear(torch.nn.Module):
    """W x + (alpha / r) B A x, with W frozen and A, B in float32 (LoRA, arXiv 2106.09685)."""

    def __init__(self, base: torch.nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base_layer, self.r, self.alpha = base, r, alpha
        options = {"bias": False, "dtype": torch.float32, "device": base.weight.device}
        self.lora_A = torch.nn.Linear(base.in_features, r, **options)
        self.lora_B = torch.nn.Linear(r, base.out_features, **options)
        torch.nn.init.zeros_(self.lora_B.weight)  # at first nothing changes

    def forward(self, x: Tensor) -> Tensor:
        low = linear(x, self.lora_A.weight.to(x.dtype))  # (..., r)
        return self.base_layer(x) + self.alpha / self.r * linear(low, self.lora_B.weight.to(x.dtype))


def add_lora(model, r: int, alpha: float, names: set[str] | None = None) -> None:
    """Freeze a model and put LoRA on the linear layers of these names; by default on all but the output head."""
    model.requires_grad_(False)
    inside = model.base_model_prefix + "."
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and (name in names if names else name.startswith(inside)):
            model.set_submodule(name, LoRALinear(layer, r, alpha))


def merge_lora(model):
    """Take LoRA away, its weights added to the model's: an ordinary checkpoint again."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            layer.base_layer.weight.data += layer.alpha / layer.r * layer.lora_B.weight.data @ layer.lora_A.weight.data
            model.set_submodule(name, layer.base_layer)
    return model.requires_grad_(True)


def save_model(model, tokenizer, folder: Path) -> None:
    """Write what `load_model` reads: an adapter in peft's layout, or the whole model under the names it came with."""
    folder = Path(folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if layers:
        folder.mkdir(parents=True)
        weights = {PEFT + name: p.data.contiguous() for name, p in model.named_parameters() if "lora_" in name}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        layer, targets = next(iter(layers.values())), sorted(layers)
        config = {"peft_type": "LORA", "r": layer.r, "lora_alpha": layer.alpha, "lora_dropout": 0.0, "bias": "none"}
        config |= {"target_modules": targets, "base_model_name_or_path": model.name_or_path, "task_type": None}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    else:
        model.save_pretrained(folder)
        if hasattr(model, "raw_config"):  # LLaDA's weights go back under LLaDA's names, so its config must too
            (folder / "config.json").write_text(json.dumps(model.raw_config, indent=1))
    tokenizer.save_pretrained(folder)


def tiny_model(device, dtype):
    """A BERT of 367,396 weights over a tokenizer of one token per character: printable ASCII and the newline."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *map(chr, range(32, 127)), "\n"])}
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    characters.decoder = tokenizers.decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=characters, **special)
    config = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1, pad_token_id=tokenizer.pad_token_id,  # the usual 0.02 is for wide models
    )  # fmt: skip
    return hf.BertForMaskedLM(config).to(device, dtype).eval(), tokenizer, tokenizer.mask_token_id


def pretrain(model, tokenizer, mask_id: int, pairs: list[tuple[str, str]], seed: int, steps: int, batch: int = 256):
    """Teach a fresh model (prompt, completion) pairs with the masked-diffusion ELBO (arXiv 2406.07524).

    Each completion has its tokens masked with probability t ~ U(0, 1); the loss is the cross-entropy of the masked ones
    weighted 1/t, an upper bound on -log p(completion | prompt). It stops at 3.2 nats: a model that knows the rules and
    is not yet sure of them.
    """
    prompts, completions = (tokenizer(list(texts), return_tensors="pt")["input_ids"] for texts in zip(*pairs))
    optimizer, recent = torch.optim.AdamW(model.parameters()), []
    bar = tqdm(range(steps), desc="pretraining", unit="step")
    for step in bar:
        rng = seeded_generator("cpu", seed, "pretrain", step)
        rows = torch.randint(len(prompts), (batch,), generator=rng)
        t = ((torch.arange(batch) + torch.rand(batch, generator=rng))[:, None] / batch).clamp(min=1e-3)  # (B, 1)
        masked = torch.rand(batch, completions.shape[1], generator=rng) < t  # (B, C)
        ids = torch.cat([prompts[rows], completions[rows].masked_fill(masked, mask_id)], 1).to(model.device)
        logits = model(ids).logits[:, prompts.shape[1] :].cpu()  # (B, C, V)
        loss = cross_entropy(logits.transpose(1, 2), completions[rows], reduction="none")  # (B, C)
        loss = (loss * masked / t).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        fraction = (step + 1) / steps  # linear warm-up over a tenth of the steps, then linear to 0
        optimizer.param_groups[0]["lr"] = 2e-3 * min(fraction / 0.1, (1 - fraction) / 0.9 + 1e-3)
        optimizer.step()
        recent = recent[-24:] + [loss.item()]
        bar.set_postfix_str(f"-ELBO {sum(recent) / len(recent):.2f} nats")
        if step >= 25 and sum(recent) / len(recent) < 3.2:
            break


# ===== 8. Command line ================================================================================================

option = lambda default, text: field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Every setting there is. The defaults are the tiny model's; RELEASE holds those that differ for an 8B model."""

    task: Literal["sudoku", "countdown", "gsm8k", "math"] = option("sudoku", "what to train on")
    model: str = option("tiny", "tiny (pretrained on the spot, then cached), a folder, or a hub id of LLaDA or Dream")
    data: str | None = option(None, "your data: a file to test on, a folder of train.* and test.*, or a hub id")
    output_dir: str | None = option(None, "where the run goes; not given: a new folder under runs/")
    resume: str | None = option(None, "folder of a run to go on with; its settings apply, but for those given here")
    seed: int = option(0, "the same seed gives the same run on the same machine")
    device: str | None = option(None, "cuda, mps or cpu; not given: the first of these that there is")

    method: Literal["agrpo", "diffu_grpo"] = option("agrpo", "diffu_grpo is d1's one-step estimator, to compare with")
    max_steps: int = option(400, "updates: batches of rollouts to train on")
    prompts_per_update: int = option(32, "prompts in an update, over all processes")
    group_size: int = option(16, "G: completions of each prompt")
    k: int = option(1, "k: steps drawn per completion; a forward and backward pass each")
    timestep_proposal: Literal["surprise", "entropy", "uniform"] = option("surprise", "what steps are drawn by")
    length_norm: Literal["sequence", "constant"] = option("sequence", "divide a row by its own steps, or all by T")
    scale_by_std: bool = option(False, "divide advantages by the group's standard deviation (biased)")
    updates_per_rollout: int = option(1, "optimizer steps on each batch of rollouts")
    eps_low: float = option(0.2, "eps: clip the ratio at 1 - eps_low")
    eps_high: float = option(0.2, "eps: clip the ratio at 1 + eps_high")
    beta: float = option(0.0, "beta: weight of the KL to the model before training; 0 makes no reference pass")

    completion_length: int = option(16, "tokens in a completion")
    block_length: int = option(16, "blocks are unmasked from left to right; must divide completion_length")
    steps: int = option(2, "T: sampling steps for a completion")
    unmasking: Literal["random", "low_confidence"] = option("random", "what a step unmasks; random is exact")
    temperature: float = option(1.0, "tau: sampling temperature")
    top_k: int = option(0, "sample from so many most probable tokens (0: from all)")
    top_p: float = option(1.0, "sample from the most probable tokens that make up this probability")

    learning_rate: float = option(5e-4, "AdamW's, times a linear warm-up and half a cosine to 0")
    warmup_steps: int = option(20, "updates in which the learning rate rises")
    lora_rank: int = option(0, "r of LoRA on every linear layer but the head; 0 trains all weights")
    lora_alpha: float = option(64.0, "alpha of LoRA")
    micro_batch: int = option(256, "(completion, step) pairs in memory at once; changes nothing else")
    rollout_batch: int = option(512, "completions sampled at once, whole groups")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")

    eval_steps: list[int] = field(
        default_factory=lambda: [16, 8, 4, 2, 1], metadata={"help": "sampling steps to measure at, before and after"}
    )
    eval_examples: int = option(0, "test examples to measure on (0: all)")
    eval_every: int = option(0, "measure greedy accuracy at the first of eval_steps every so many updates (0: never)")
    show_every: int = option(50, "print a completion every so many updates (0: never)")
    save_every: int = option(50, "save a checkpoint every so many updates; the newest two are kept")
    report_to: Literal["none", "tensorboard", "wandb"] = option("none", "where else the metrics go")
    pretrain_steps: int = option(400, "steps of pretraining the tiny model, at the most")


RELEASE = {  # the official release's settings for LLaDA-8B, for one GPU; measured on fewer examples than by eval.py
    "model": "GSAI-ML/LLaDA-8B-Instruct", "max_steps": 1000, "prompts_per_update": 16, "group_size": 8, "k": 24,
    "completion_length": 384, "block_length": 12, "steps": 128, "temperature": 0.6, "top_k": 150, "top_p": 0.99,
    "learning_rate": 5e-6, "warmup_steps": 10, "lora_rank": 64, "micro_batch": 8, "rollout_batch": 8,
    "eval_steps": [128, 64], "eval_examples": 64, "eval_every": 50, "show_every": 1, "save_every": 10,
}  # fmt: skip


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Settings from the command line, over the defaults for the task and model, or over those of the run to resume."""
    usage = "agrpo.py [--option value ...], where --help lists all options"
    parser, saved = hf.HfArgumentParser(Settings, usage=usage, allow_abbrev=False), {}
    argv = sys.argv[1:] if argv is None else argv
    first = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    if first.resume:
        file = Path(first.resume) / "settings.json"
        if not file.is_file():
            parser.error(f"--resume {first.resume}: no settings.json there; give the folder that the run printed")
        saved = json.loads(file.read_text()) | {"resume": first.resume, "output_dir": first.resume}
        parser.set_defaults(**{name: value for name, value in saved.items() if hasattr(first, name)})
    elif first.task != "sudoku" or not is_tiny(first.model):
        parser.set_defaults(**RELEASE)
    args = Settings(**vars(parser.parse_args(argv)))
    for name in [name for name, value in vars(args).items() if name in saved and saved[name] != value]:
        print(f"--{name} was {saved[name]}, is {getattr(args, name)} from here on")
    return args


def is_tiny(name: str) -> bool:
    """Whether this is the tiny model or a folder that holds one, so that its defaults apply."""
    config = (checkpoints(Path(name)) or [Path(name)])[-1] / "config.json"
    return name == "tiny" or config.is_file() and json.loads(config.read_text()).get("model_type") == "bert"


def start_processes(args) -> None:
    """Choose the device where none is given and, under torchrun, join the other processes."""
    hf.logging.set_verbosity_error()  # what goes wrong in loading is said in a sentence
    hf.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def check_settings(args: Settings) -> None:
    """Raise ValueError on the first setting that cannot work, before anything is loaded or written."""
    for name in (
        "temperature",
        "top_p",
        "k",
        "max_steps",
        "save_every",
        "updates_per_rollout",
        "micro_batch",
        "block_length",
    ):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} must be above 0, not {getattr(args, name)}")
    for steps in (args.steps, *args.eval_steps):
        tokens_per_step(args.completion_length, args.block_length, steps)
    n, batch, size = world_size(), args.rollout_batch, args.group_size
    if size < 2 or n > 1 and (batch % size or args.prompts_per_update * size % (n * batch)):
        what = (
            f"at least 2, divide --rollout_batch, and that x {n} processes divide --prompts_per_update x --group_size"
        )
        raise ValueError(f"--group_size must be {what}")
    if args.model == "tiny" and args.task != "sudoku":
        raise ValueError(f"--model tiny knows only sudoku, not {args.task}; give a LLaDA or Dream checkpoint")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        raise ValueError(f"--report_to {args.report_to} needs that package: pip install {args.report_to}")
    torch.zeros(1, device=args.device)


def claim(args: Settings) -> FileLock:
    """Take a folder for this run alone: --output_dir, or the next free one in runs/. The lock ends with the process."""
    name = f"runs/{args.task}-{Path(args.model).name}-seed{args.seed}"
    for run in [args.output_dir] if args.output_dir else [name, *(f"{name}-{i}" for i in range(2, 1000))]:
        lock, settings = FileLock(Path(run) / "run.lock"), Path(run) / "settings.json"
        try:
            Path(run).mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except (Timeout, OSError) as error:
            reason = "another process is at work in it" if isinstance(error, Timeout) else error
            continue
        if args.resume or not settings.exists():
            args.output_dir = run
            write_whole(settings, json.dumps(asdict(args), indent=1))
            return lock
        reason = f"there is a run in it; choose another, or go on with that one: --resume {run}"
    raise BadInput(f"--output_dir {run}: {reason}")


def pretrained(model, tokenizer, mask_id: int, examples: list, args: Settings):
    """The tiny model after pretraining, which is done once for all runs with the same seed."""
    cache = Path(args.output_dir).parent / f"pretrained-{args.task}-seed{args.seed}-{args.pretrain_steps}steps"
    if rank() == 0 and not cache.exists():
        pairs = [(example["puzzle"], example["solution"]) for example in examples]
        pretrain(model, tokenizer, mask_id, pairs, args.seed, args.pretrain_steps)
        aside = cache.with_name(f"{cache.name}.{os.getpid()}")
        save_model(model, tokenizer, aside)
        aside.rename(cache)
    mean_over_ranks({})  # wait for it
    return load_model(str(cache), args.device)[0]


def measure(model, tokenizer, mask_id: int, task: Task, test: list, args: Settings) -> dict:
    """Accuracy at each of eval_steps, as trained and with greedy low-confidence unmasking."""
    at = lambda steps, greedy: evaluate(model, tokenizer, mask_id, task, test, args, steps, greedy)
    return {name: {str(n): at(n, name == "greedy") for n in args.eval_steps} for name in ("as trained", "greedy")}


def print_table(results: dict, args: Settings) -> None:
    print(f"\nAccuracy on {results['examples']} test examples, by sampling steps (trained with {args.steps})")
    how = {"as trained": f"{args.unmasking} unmasking, temperature {args.temperature:g}"}
    for name, sampler in (how | {"greedy": "low-confidence unmasking, temperature 0"}).items():
        print(f"\n  {f'{name} ({sampler})':50s}" + "".join(f"{steps:>7}" for steps in args.eval_steps))
        for stage in [stage for stage in ("base", "AGRPO", "diffu-GRPO") if stage in results]:
            print(f"    {stage:48s}" + "".join(f"{accuracy:7.3f}" for accuracy in results[stage][name].values()))
    print(flush=True)


def run_training(args: Settings, on_exit: contextlib.ExitStack) -> None:
    """Load, measure, train, measure. on_exit: where the run's folder is given back."""
    began, task = time.time(), TASKS[args.task]
    examples, test = task.examples("train", args), task.examples("test", args)[: args.eval_examples or None]
    problem = lambda example: str(sorted(re.findall(r"\w+", (task.plain or task.question).format(**example))))
    tested, many = set(map(problem, test)), len(examples)
    examples = [example for example in examples if problem(example) not in tested]
    if not examples:
        raise BadInput(f"all {many} training examples are test examples too")
    torch.manual_seed(args.seed)  # the tiny model begins at random
    half = args.device == "cuda" and args.lora_rank > 0  # frozen weights in bfloat16; those trained are in float32
    model, tokenizer, mask_id = load_model(args.model, args.device, torch.bfloat16 if half else torch.float32)
    name = str(find_checkpoint(args.model).resolve()) if Path(args.model).exists() else args.model
    merge_lora(model).name_or_path = name  # if it is an adapter, a new one goes on top of it
    if rank() == 0:
        on_exit.callback(claim(args).release)
        size = sum(p.numel() for p in model.parameters())
        print(
            f"{args.task}: {args.model}, {size:,} parameters, on {args.device}; seed {args.seed}; in {args.output_dir}"
        )
        print(
            f"{len(examples)} examples to train on, {len(test)} to test on, {many - len(examples)} left out as in both"
        )
    where = [args.output_dir]
    if world_size() > 1:
        dist.broadcast_object_list(where)
    args.output_dir, run, task = where[0], Path(where[0]), task.for_model(tokenizer)
    if args.model == "tiny":
        model = pretrained(model, tokenizer, mask_id, examples, args)
    results = {"examples": len(test), "eval_steps": args.eval_steps}
    results["base"] = measure(model, tokenizer, mask_id, task, test, args)
    if rank() == 0:
        print_table(results, args)

    ref_model = None
    if args.beta > 0:  # the model before training; with LoRA its weights stay, so deepcopy is told to share them (memo)
        memo = {id(p): p for p in model.parameters()} if args.lora_rank else {}
        ref_model = copy.deepcopy(model, memo).requires_grad_(False)
    if checkpoints(run):
        dtype, base = model.dtype, model.name_or_path
        del model  # there may not be room for two
        model, tokenizer, mask_id = load_model(str(run), args.device, dtype, base)
    elif args.lora_rank:
        torch.manual_seed(args.seed)
        add_lora(model, args.lora_rank, args.lora_alpha)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    train(model, tokenizer, mask_id, task, examples, test, args, ref_model)
    method = "AGRPO" if args.method == "agrpo" else "diffu-GRPO"
    results[method] = measure(model, tokenizer, mask_id, task, test, args)
    if rank() == 0:
        write_whole(run / "results.json", json.dumps(results, indent=1))
        print_table(results, args)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if all(line["frac_reward_zero_std"] == 1 for line in lines):
            print(
                "Nothing was learned: all rewards of a group were equal, always. Look at the completions printed above."
            )
        print(f"{time.time() - began:.0f} s; checkpoint: {checkpoints(run)[-1]}; every update: {run / 'metrics.jsonl'}")


def main(argv: list[str] | None = None) -> None:
    args = parse_settings(argv)
    start_processes(args)
    try:
        check_settings(args)
    except (ValueError, RuntimeError, AssertionError) as error:  # the latter two: no such device
        sys.exit(f"agrpo.py: {str(error).splitlines()[0]}")
    state = lambda: f"{last_checkpoint(Path(args.output_dir))}. Go on with --resume {args.output_dir}"
    try:
        with contextlib.ExitStack() as on_exit:
            run_training(args, on_exit)
    except (BadInput, FloatingPointError) as error:
        sys.exit(f"agrpo.py: {error}")
    except torch.OutOfMemoryError:
        less = "a smaller --micro_batch or --rollout_batch, or --gradient_checkpointing true"
        sys.exit(f"agrpo.py: out of memory on {args.device}; {state()} and {less}")
    except KeyboardInterrupt:
        sys.exit(f"agrpo.py: stopped; {state()}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
