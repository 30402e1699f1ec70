"""AGRPO in one file: policy gradients for masked diffusion language models from a few sampled denoising steps.

    python agrpo.py                train a tiny model on 4x4 Sudoku: minutes on a CPU, no downloads
    python agrpo.py --task gsm8k   LLaDA-8B-Instruct with LoRA, on a GPU; also math, countdown; --help: every setting
    python agrpo.py --task gsm8k --model qwen3-0.6b    0.6 billion weights, for a GPU of 12 GB
    torchrun --nproc_per_node 8 agrpo.py --task gsm8k
    python agrpo.py --resume RUN   go on with a run; options given here override its own

AGRPO is Amortized Group Relative Policy Optimization (Anthony Zhan, "Simple Policy Gradients for Reasoning with
Diffusion Language Models", ICML 2026, arXiv 2510.04019v2). A masked diffusion language model predicts the masked tokens
of a text. It writes a completion from masks only, block by block from the left: each of T steps unmasks a few positions
of the block and draws their tokens independently. A block of only EOS ends it. This is a Markov decision process. AGRPO
is GRPO (arXiv 2402.03300) on it, and maximizes a mean over B completions

    J = 1/B sum_i 1/L_i sum_{t < T_i} sum_{j in U_t} [ min(rho_j A_i, clip(rho_j, 1 - eps, 1 + eps) A_i) - beta KL_j ]

Each step would cost a pass. That cost is *amortized*: k << T steps are drawn, each weighted by 1 / its probability.

    q, o     prompt (B, P), completion (B, C): token ids; B = prompts x G, the group size
    s_t      state: the completion before step t, masks where nothing is unmasked yet
    U_t      the positions that step t unmasks, all in one block
    T, T_i   all steps (the paper's m), and those that row i took; k: those drawn, per row with A_i or beta not 0
    L_i      T_i (length_norm "sequence") or T ("constant")
    A_i      advantage: reward minus the group's mean; eps: clipping range (eps_low, eps_high); beta: the KL's weight
    rho_j    importance ratio p_theta(o_j | q, s_t) / p_old(o_j | q, s_t), p_old being the policy that sampled
    p_theta  the policy: the model's softmax at temperature tau, over the ids that top-k and top-p left in sampling
    KL_j     rho_j (x - 1 - log x), x = p_ref / p_theta: estimates KL(p_theta || p_ref); p_ref: model before training

A random order does not depend on theta. So log pi(trajectory | q), which a policy gradient needs, is exactly the sum of
log p_theta(o_j | q, s_t) over all t and j in U_t, plus a constant. That sum's mean over orders is the ELBO, a lower
bound of log p(o | q). A low-confidence order does depend on theta: then the sum is an approximation.

Unbiased for what? Before norms are clipped, and over draws of steps: for grad J, always. Over rollouts too: for
(1 - 1/G) / T grad E[reward], if unmasking is random, beta 0, advantages are not scaled, L_i is T or no row ends early,
the ids left by top-k and top-p are held fixed, and it is the first optimizer step on the rollouts.

The paper's: unmasking as a decision process, its stepwise likelihood, k sampled steps in place of T, 1/T_i.
The official code's: top-k and top-p in the ratio; the optimizer in `train`; the settings in RELEASE.
This file's own: systematic draws of steps, without replacement, from all rows as if they were one, more where |A_i| and
surprise (1 - p of the tokens) are large (official: by entropy, with replacement); rho exactly 1 on the first optimizer
step; every sampled token counts (official: none after the last non-EOS token, so terms are lost).
"""

import ast
import atexit
import contextlib
import copy
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import huggingface_hub as hub
import tokenizers
import torch
import torch.distributed as dist
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor  # sections 1 to 4 need only math, dataclass, torch and this; 2 builds on 1, and 4 on 1 to 3
from torch.nn import Linear
from torch.nn.functional import cross_entropy
from tqdm import tqdm

# ===== 1. Sampler.  pi(trajectory | q) = prod_t [ Pr(U_t | s_t) prod_{j in U_t} p_theta(o_j | q, s_t) ] =====


@dataclass
class Rollout:
    """B completions with their trajectories: the state s_t is the completion where 0 <= step < t, masks elsewhere."""

    prompt: Tensor  # (B, P) int64, padded on the left
    prompt_mask: Tensor  # (B, P) bool, False on padding
    completion: Tensor  # (B, C) int64; the last of eos_id where step is -1
    step: Tensor  # (B, C) int64, the step that unmasked each position; -1 where the row had ended
    logp: Tensor  # (B, C) at least float32, nats, of the policy that sampled; 0 where step is -1
    entropy: Tensor  # (B, T) likewise, summed over U_t: a metric
    num_steps: Tensor  # (B,) int64, T_i, the steps taken
    kept: Tensor | None = None  # (B, C, K) int64, the ids left by top-k and top-p, then -1; 0 where step is -1


def logits_at(model, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
    """Logits (N, n, V), in the model's dtype, at positions (N, n) only: the head never sees the rest.
    input_ids (N, S) int64; attention_mask (N, S) bool, False on padding; None: ids are -1 there; positions int64, from
    the end if below 0, for Dream not the first. ValueError for padding on the right, dropout, and classes of libraries
    that would be silently wrong (RoBERTa counts positions otherwise, StableLM is causal, Gemma 2 scales logits). Your
    own class needs base_model, config, and either cls, or lm_head with config.is_causal = False (transformers 5.2)."""
    kind, bert = type(model), hasattr(model, "cls")
    known = kind.__name__ in ("BertForMaskedLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    causal = getattr(model.config, "is_decoder" if bert else "is_causal", not bert)
    if causal or not known and kind.__module__.startswith(("transformers.", "peft.", "torch.")):
        raise ValueError(f"{kind.__name__} is neither a BERT, nor a Llama or Qwen with config.is_causal = False")
    for m in model.modules():
        if m.training and (m.p if isinstance(m, torch.nn.Dropout) else getattr(m, "attention_dropout", 0)):
            raise ValueError("dropout is on: call model.eval()")
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(~attention_mask.bool(), -1)  # so that `unique` tells padding from tokens
    # Equal rows share a pass, as do the G completions of a prompt while all are masks.
    input_ids, row = input_ids.unique(dim=0, return_inverse=True)  # (M, S); (N,) which of the M each row is
    real, options = input_ids >= 0, {}
    if not real.all():  # padding changes nothing: positions count from the first token
        if (real[:, :-1] & ~real[:, 1:]).any():
            raise ValueError("prompts must be padded on the left: padding_side='left'")
        options = {"attention_mask": real, "position_ids": (real.long().cumsum(1) - 1).clamp(min=0)}
    hidden = model.base_model(input_ids=input_ids.clamp(min=0), **options).last_hidden_state  # (M, S, D)
    shift = getattr(model.config, "logits_shift", 0)  # 1 for Dream: its logits at i - 1 are about i
    return (model.cls if bert else model.lm_head)(hidden[row[:, None], positions - shift])


at_least_float32 = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 is too coarse for log p
without_padding = lambda ids: ids[:, int((ids >= 0).any(0).int().argmax()) :]  # cuts off columns that are -1
without_mask = lambda x, mask_id: x.masked_fill(torch.arange(x.shape[-1], device=x.device) == mask_id, -math.inf)


def truncate(logits: Tensor, mask_id: int, temperature: float, top_k=0, top_p=1.0) -> Tensor | None:
    """The ids left by top-k, then top-p (nucleus sampling, arXiv 1904.09751): at least one, never mask_id; None: all.
    logits (..., V). Returns (..., K) int64, filled up with -1; K is top_k; 1,024 for top-p alone, to save memory."""
    if not top_k and top_p >= 1:
        return None
    top, kept = without_mask(logits, mask_id).topk(min(top_k or 1024, logits.shape[-1]), dim=-1)
    drop = top == -math.inf
    if top_p < 1:
        p = (at_least_float32(top) / temperature).softmax(-1)
        drop |= p.cumsum(-1) - p >= top_p  # those before it already make up top_p
        drop[..., 0] = False
    return kept.masked_fill(drop, -1)


def policy_logps(logits: Tensor, mask_id: int, temperature: float, kept: Tensor | None = None) -> Tensor:
    """log p of the policy, nats: a softmax at a temperature over all ids but mask_id, or over kept of `truncate`.
    logits (..., V), kept (..., K). Returns (..., V), or (..., K) as in kept, at least float32."""
    if kept is None:
        logits = without_mask(at_least_float32(logits), mask_id)
    else:
        logits = at_least_float32(logits.gather(-1, kept.clamp(min=0))).masked_fill(kept < 0, -math.inf)
    return (logits / (temperature or 1.0)).log_softmax(-1)  # temperature 0: one id is kept, its log p is 0


def tokens_per_step(completion_length: int, block_length: int, steps: int) -> list[int]:
    """Tokens that each step inside a block unmasks: 8 in 3 steps, [3, 3, 2]. ValueError where they do not fit."""
    blocks, rest = divmod(completion_length, block_length)
    if rest:
        raise ValueError(f"block length {block_length} does not divide completion length {completion_length}")
    if steps % blocks or not 0 < steps <= completion_length:
        raise ValueError(f"{steps} steps must be a multiple of {blocks} blocks, at most {completion_length}")
    return [len(part) for part in torch.arange(block_length).tensor_split(steps // blocks)]


@torch.no_grad()
def sample(
    model, prompt: Tensor, prompt_mask: Tensor, *, completion_length: int, block_length: int, steps: int,
    temperature: float, unmasking: str, mask_id: int, eos_id: int | list[int] | None, top_k=0, top_p=1.0,
    generator=None,
) -> Rollout:  # fmt: skip
    """Complete each prompt, block by block from the left (LLaDA, arXiv 2502.09992).

    prompt, prompt_mask as in Rollout, each G times in a row; generator on the model's device. Each step unmasks
    `tokens_per_step` of the masked positions of its block:
      unmasking "random": any of them, equally likely. Rollout.logp then sums to log pi - const.
      "low_confidence": a token is drawn for each; the most probable stay, the rest are masked again.
    temperature 0 is greedy: nothing to learn from. A row ends with a block of only EOS, and leaves the batch; eos_id
    may be a list, whose last fills the rest, or None. ValueError where settings do not fit."""
    if unmasking not in ("random", "low_confidence"):
        raise ValueError(f"unmasking is 'random' or 'low_confidence', not {unmasking!r}")
    if not temperature >= 0 or not prompt_mask.any(1).all():
        raise ValueError("temperature must not be negative, prompt_mask True on at least a token of each prompt")
    per_step = tokens_per_step(completion_length, block_length, steps)
    if temperature == 0:
        temperature, top_k = 1.0, 1  # greedy is a choice from one
    B, C, prompt_mask = len(prompt), completion_length, prompt_mask.bool()
    ends = prompt.new_tensor([] if eos_id is None else eos_id).view(-1)
    ids = without_padding(torch.cat([prompt.masked_fill(~prompt_mask, -1), prompt.new_full((B, C), mask_id)], 1))
    completion = ids[:, -C:]  # a view: what is written here is in ids
    step, num_steps, kept = prompt.new_full((B, C), -1), prompt.new_zeros(B), None
    logp, entropy = (at_least_float32(next(model.parameters()).new_zeros(B, n)) for n in (C, steps))
    rows, t = torch.arange(B, device=prompt.device), 0  # the R rows that have not ended
    for start in range(0, C, block_length):
        # The block's masked positions (R, ...), in the random order in which "random" takes them.
        masked = start + torch.rand(len(rows), block_length, generator=generator, device=prompt.device).argsort(1)
        row = rows[:, None]  # (R, 1)
        for count in per_step:
            place = masked[:, :count] if unmasking == "random" else masked  # (R, n): where to draw
            logits = logits_at(model, ids[rows], None, place - C)  # (R, n, V)
            choices = truncate(logits, mask_id, temperature, top_k, top_p)  # (R, n, K) or None
            logps = policy_logps(logits, mask_id, temperature, choices)  # (R, n, K or V)
            gumbel = torch.empty_like(logps).exponential_(generator=generator).clamp_(min=1e-30).log_().neg_()
            pick = (logps + gumbel).argmax(-1, keepdim=True)  # the Gumbel-max trick: a draw from the policy
            token = pick if choices is None else choices.gather(-1, pick)  # (R, n, 1)
            token_entropy = torch.special.entr(logps.exp()).sum(-1)  # (R, n)
            completion[row, place] = token[..., 0]  # low confidence records all, and takes most back below
            step[row, place] = t
            logp[row, place] = logps.gather(-1, pick)[..., 0]
            if choices is not None:
                kept = prompt.new_zeros(B, C, choices.shape[-1]) if kept is None else kept
                kept[row, place] = choices
            if unmasking == "low_confidence":  # confidence: p at temperature 1, untruncated
                order = policy_logps(logits, mask_id, 1.0).gather(-1, token)[..., 0].argsort(1, descending=True)
                masked, token_entropy = masked.gather(1, order), token_entropy.gather(1, order)
            entropy[rows, t] = token_entropy[:, :count].sum(1)
            masked = masked[:, count:]
            completion[row, masked] = mask_id
            t += 1
        num_steps[rows] = t
        rows = rows[~torch.isin(completion[rows, start : start + block_length], ends).all(1)]
        if not len(rows):
            break
    completion = completion.masked_fill(step < 0, ends[-1]) if len(ends) else completion
    return Rollout(prompt, prompt_mask, completion, step, logp, entropy, num_steps, kept)


# ===== 2. Estimator.  log pi - const = sum_t f(t) = E[ sum over drawn t of f(t) / inclusion(t) ] =====
# f(t) = sum_{j in U_t} log p_theta(o_j | q, s_t)


def draw_timesteps(num_steps: Tensor, k: int, proposal: Tensor | None = None, generator=None):
    """Draw k steps for each row; sum_d weights[d] f(steps[d]) is unbiased for the sum of f(t) over t < num_steps.

    num_steps (B,) int64. proposal (B, T), of any scale, finite and above 0 at each row's own steps; None is uniform.
    generator on the CPU. Returns steps (B, k) int64, weights (B, k) float64 (float32 on mps). ValueError for any other
    proposal, or k not in 1, 2, 3 ...

    inclusion(t), the probability that step t is drawn, is k times its share of the proposal, but at most 1; a step
    weighs 1/inclusion (Horvitz-Thompson). Proposal 1, 2, 3, 4 with k = 2 gives .2, .4, .6, .8. Laid end to end:

        0   .2       .6           1.2            2
        | 0 |   1    |     2      |       3      |

    Points at x and 1 + x, x uniform on [0, 1), hit each step as often as its length says, none twice (systematic
    sampling). x = .1 draws steps 0 and 2, weights 1/.2 and 1/.6; x = .7 draws 2 and 3, weights 1/.6 and 1/.8.
    What is cut off at 1 goes to the other steps. So a row of at most k steps gets each once with weight 1, the exact
    sum; draws left over have weight 0 and need no pass."""
    if k < 1 or k % 1:
        raise ValueError(f"k must be whole and at least 1, not {k}")
    device, num_steps = num_steps.device, num_steps.cpu()[:, None]  # (B, 1)
    proposal = torch.ones(len(num_steps), int(num_steps.max())) if proposal is None else proposal
    taken = torch.arange(proposal.shape[1]) < num_steps  # (B, T)
    density = proposal.detach().cpu().double().masked_fill(~taken, 0)
    if (((density > 0) & (density < math.inf)).sum(1, keepdim=True) < num_steps).any():
        raise ValueError("a proposal must be positive and finite at each step that its row took")
    certain = taken & (num_steps <= k)  # (B, T): inclusion 1; the others share the rest, until none exceeds 1
    while True:
        rest = density.masked_fill(certain, 0)
        share = rest / rest.sum(1, keepdim=True).clamp(min=1e-300)
        inclusion = certain + (k - certain.sum(1, keepdim=True)) * share  # (B, T)
        if not (inclusion > 1).any():
            break
        certain |= inclusion > 1
    points = torch.arange(k) + torch.rand(num_steps.shape, generator=generator, dtype=torch.float64)  # (B, k)
    steps = torch.searchsorted(inclusion.cumsum(1), points, right=True)  # (B, k)
    steps = steps.clamp(max=(num_steps - 1).clamp(min=0))  # where rounding or k > num_steps led beyond
    weights = torch.where(torch.arange(k) < num_steps, 1 / inclusion.gather(1, steps), 0)
    return steps.to(device), weights.to(device, torch.float32 if device.type == "mps" else torch.float64)


def draw_pairs(num_steps: Tensor, magnitude: Tensor, k: int, proposal=None, generator=None):
    """Draw (row, step) pairs, k per row of magnitude above 0: `draw_timesteps` with all rows laid end to end.

    A pair is drawn in proportion to magnitude (B,) times proposal (B, T): where one answer of a group is right, the
    G - 1 others have small advantages and need few passes. Returns, on the CPU, rows, steps (N,) int64 and weights
    (N,) float64: weights @ f(rows, steps) is unbiased for the sum of f."""
    magnitude, num_steps = magnitude.cpu(), num_steps.cpu()
    active = magnitude.nonzero().squeeze(1)  # (R,)
    which, steps = (torch.arange(num_steps.max()) < num_steps[active, None]).nonzero(as_tuple=True)  # (M,)
    rows = active[which]
    # Rotate each row's steps at random: else evenly spaced points hit equal rows at the same steps: unbiased, noisy.
    offset = torch.rand(active.shape, generator=generator)[which] * num_steps[rows]
    steps = (steps + offset.long()) % num_steps[rows]
    density = magnitude[rows] * (1 if proposal is None else proposal.cpu()[rows, steps])
    drawn, weights = draw_timesteps(torch.tensor([len(rows)]), k * len(active), density[None], generator)  # one row
    drawn, weights = drawn[weights > 0], weights[weights > 0]
    return rows[drawn], steps[drawn], weights


def defensive_proposal(rollout: Rollout, uniform_share=0.1) -> Tensor:
    """Where to draw: at steps of much surprise, 1 - p(token) summed over U_t. (B, T) float64 on the CPU, sum 1 in all.
    1 - p is, up to a factor of sqrt(2), the length of log p's gradient in the logits: tokens that the policy was sure
    of teach little. Some uniform (defensive importance sampling) keeps weights small."""
    doubt = (1 - rollout.logp.exp()).clamp(min=0)  # (B, C), 0 where the row had ended
    surprise = torch.zeros_like(rollout.entropy).scatter_add(1, rollout.step.clamp(min=0), doubt).cpu().double()
    taken = (torch.arange(surprise.shape[1]) < rollout.num_steps.cpu()[:, None]).double()  # (B, T)
    uniform, total = taken / taken.sum(), surprise.sum()
    return torch.lerp(surprise / total, uniform, uniform_share) if total > 0 else uniform


def step_logps(model, rollout: Rollout, rows: Tensor, steps: Tensor, *, mask_id: int, temperature: float):
    """log p_theta(o_j | q, s_t) of the tokens that step t unmasked: a pass per (row, step).
    rows, steps (N,) int64, N >= 1. Returns logp (N, C), nats, differentiable, 0 outside U_t; U_t as (N, C) bool.
    temperature must be the sampler's, or the ratio means nothing."""
    prompt = rollout.prompt[rows].masked_fill(~rollout.prompt_mask[rows], -1)  # (N, P)
    step, completion, t = rollout.step[rows], rollout.completion[rows], steps[:, None]
    unmasked = step == t  # (N, C)
    state = torch.where((step >= 0) & (step < t), completion, mask_id)  # s_t
    n = int(unmasked.sum(1).max())  # rows with fewer are filled up with other positions
    place = unmasked.int().argsort(dim=1, descending=True, stable=True)[:, :n]  # (N, n), those unmasked first
    logits = logits_at(model, without_padding(torch.cat([prompt, state], 1)), None, place - state.shape[1])  # (N, n, V)
    token = completion.gather(1, place)[..., None]  # (N, n, 1)
    kept = None if rollout.kept is None else rollout.kept[rows[:, None], place]  # (N, n, K)
    index = token if kept is None else (kept == token).int().argmax(-1, keepdim=True)  # among V ids, or K kept
    logps = policy_logps(logits, mask_id, temperature, kept).gather(-1, index)[..., 0]  # (N, n)
    return logps.new_zeros(unmasked.shape).scatter(1, place, logps).masked_fill(~unmasked, 0), unmasked


def estimate_logp(model, rollout: Rollout, k: int, *, mask_id: int, temperature: float, proposal=None, generator=None):
    """Unbiased estimate of log pi(trajectory | q) - const from k steps of each row: (B,), nats, differentiable.
    Exact where num_steps <= k. To read: training uses `policy_gradient`, which sums the objective in place of log p."""
    steps, weights = draw_timesteps(rollout.num_steps, k, proposal, generator)
    row, draw = weights.nonzero(as_tuple=True)  # (N,) pairs
    logp, _ = step_logps(model, rollout, row, steps[row, draw], mask_id=mask_id, temperature=temperature)  # (N, C)
    return torch.zeros_like(rollout.logp[:, 0]).index_add(0, row, weights[row, draw].to(logp) * logp.sum(1))


# ===== 3. Objective =====


def group_advantages(rewards: Tensor, group_size: int, scale_by_std=False) -> Tensor:
    """A_i = r_i - mean(r) over the row's group. (B,), as are rewards, groups side by side. ValueError for other shapes.
    Each reward is in its own baseline, which scales the expected gradient by 1 - 1/G. Dividing by the group's standard
    deviation biases it towards easy and hard prompts (Dr. GRPO, arXiv 2503.20783)."""
    rewards = torch.as_tensor(rewards)
    if group_size < 2 or rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(f"rewards {tuple(rewards.shape)} do not split into groups of {group_size}; 2 is the least")
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)  # (B / G, G)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    advantage = (groups - groups.mean(1, keepdim=True)).masked_fill(equal, 0)  # whatever rounding made of the mean
    if scale_by_std:
        advantage = advantage / (groups.std(1, keepdim=True) + 1e-4)
    return advantage.view(-1)


def clipped_objective(logp: Tensor, old_logp: Tensor, advantage: Tensor, eps_low=0.2, eps_high=0.2) -> Tensor:
    """min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), rho = exp(logp - old_logp), to be maximized
    (PPO, arXiv 1707.06347). The three broadcast."""
    ratio = (logp - old_logp).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)


# ===== 4. Gradient: grad J, amortized =====


def policy_gradient(
    model, rollout: Rollout, advantage: Tensor, *, k: int, mask_id: int, temperature: float, on_policy: bool,
    proposal=None, length_norm="sequence", eps_low=0.2, eps_high=0.2, beta=0.0, ref_model=None, micro_batch=64,
    generator=None,
) -> dict[str, float]:  # fmt: skip
    """Add to .grad the gradient of -J, estimated from the pairs of `draw_pairs`.

    advantage (B,). k: passes per row, on average. on_policy: the model is still the one that sampled; rho = exp(logp -
    logp.detach()) is 1, with logp's gradient. micro_batch: pairs in memory at once. proposal, generator: see
    `draw_pairs`. Train float32 weights: Adam's small steps vanish in bfloat16. Returns loss, an estimate of -J (of mean
    0 on policy, but for the KL, or early ends with L_i = T); clip_ratio, kl: over the tokens evaluated, not unbiased.
    ValueError for any other length_norm, beta > 0 without a ref_model of its own, advantages not B finite numbers."""
    if length_norm not in ("sequence", "constant"):
        raise ValueError(f"length_norm is 'sequence' or 'constant', not {length_norm!r}")
    if beta > 0 and ref_model in (None, model):
        raise ValueError("beta > 0 needs ref_model, a copy of the model before training")
    B, T = rollout.entropy.shape
    advantage = torch.as_tensor(advantage).detach().to(rollout.logp)
    if advantage.shape != (B,) or not advantage.isfinite().all():
        raise ValueError(f"advantage must be {B} finite numbers")
    length = rollout.num_steps if length_norm == "sequence" else torch.full_like(rollout.num_steps, T)  # L_i
    magnitude = (advantage.abs() + beta) / length
    if not magnitude.any():  # no gradient, so no pass
        return {"loss": 0.0, "clip_ratio": 0.0, "kl": 0.0}
    rows, steps, weights = draw_pairs(rollout.num_steps, magnitude, k, proposal, generator)  # (N,) each
    weights = (weights / (B * length.cpu()[rows])).to(rollout.logp.dtype)
    total = rollout.logp.new_zeros(4)
    for r, t, w in zip(*(x.to(advantage.device).split(micro_batch) for x in (rows, steps, weights))):
        logp, unmasked = step_logps(model, rollout, r, t, mask_id=mask_id, temperature=temperature)  # (n, C)
        old_logp = logp.detach() if on_policy else rollout.logp[r] * unmasked
        objective = clipped_objective(logp, old_logp, advantage[r, None], eps_low, eps_high)
        rho, kl = (logp - old_logp).exp(), torch.zeros_like(logp)
        if beta > 0:  # times rho: the old policy drew the tokens (DeepSeek-V3.2, arXiv 2512.02556)
            with torch.no_grad():
                ref_logp, _ = step_logps(ref_model, rollout, r, t, mask_id=mask_id, temperature=temperature)
            d = ref_logp - logp
            kl = rho * (d.expm1() - d)
        loss = -(w[:, None] * (objective - beta * kl) * unmasked).sum()
        loss.backward()
        clipped = objective != rho * advantage[r, None]
        total += torch.stack([loss.detach(), clipped.sum(), kl.detach().sum(), unmasked.sum()])
    loss, clipped, kl, tokens = total.tolist()
    return {"loss": loss, "clip_ratio": clipped / tokens, "kl": kl / tokens}


# ===== 5. Training loop =====


def train(loaded: tuple, examples: list, test: list, args: "Settings", ref_model=None) -> None:
    """Train loaded = (model, tokenizer, mask_id); the model is of the run's newest checkpoint, if there is one. What is
    random has a seed of its own in each update: on a CPU, a run that was killed ends bit for bit as if it had not."""
    (model, tokenizer, mask_id), task, run = loaded, TASKS[args.task], Path(args.output_dir)
    trained, history, log = [p for p in model.parameters() if p.requires_grad], [], run / "metrics.jsonl"
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.01)
    for folder in checkpoints(run)[-1:]:  # what came after it is done again
        history = [json.loads(line) for line in log.read_text().splitlines()[: number(folder)]]
        for key, tensor in load_file(folder / "optimizer.safetensors").items():
            i, name = key.split()
            optimizer.state[trained[int(i)]][name] = tensor if name == "step" else tensor.to(model.device)
    report, count = lambda *_: None, args.prompts_per_update
    if rank() == 0 and args.report_to == "wandb":
        report = importlib.import_module("wandb").init(project="agrpo", config=asdict(args)).log
    if rank() == 0 and args.report_to == "tensorboard":
        board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(run)
        report = lambda metrics, step: [board.add_scalar(*metric, step) for metric in metrics.items()]
    epochs = range(math.ceil(args.max_steps * count / len(examples)))  # each has every example once
    order = [e for n in epochs for e in random.Random(f"{args.seed} epoch {n}").sample(examples, len(examples))]
    model.train(args.gradient_checkpointing)  # as this works in training mode only; dropout is refused
    bar = tqdm(range(len(history), args.max_steps), "AGRPO", args.max_steps, initial=len(history), disable=no_bar())
    for update in bar:
        # Rollouts: group_size completions of each prompt, side by side.
        chosen = [e for e in order[update * count :][:count] for _ in range(args.group_size)]
        batch, texts, rollout = generate(*loaded, chosen, args, (args.seed, "rollout", update))

        # Rewards and advantages.
        rewards, right = torch.tensor([*map(task.grade, batch, texts)], dtype=torch.float32).to(model.device).unbind(1)
        advantage = group_advantages(rewards, args.group_size, args.scale_by_std)

        # Optimizer steps, each on pairs of its own. After the first, the policy is not the one that sampled: so clip.
        rng, proposal = seeded_generator("cpu", args.seed, "timesteps", update, rank()), defensive_proposal(rollout)
        warm, cosine = (update + 1) / max(1, args.warmup_steps), (1 + math.cos(math.pi * update / args.max_steps)) / 2
        learning_rate = optimizer.param_groups[0]["lr"] = args.learning_rate * min(1.0, warm) * cosine
        for i in range(args.optimizer_steps):
            optimizer.zero_grad()
            metrics = policy_gradient(
                model, rollout, advantage, k=args.k, mask_id=mask_id, temperature=args.temperature, on_policy=i == 0,
                proposal=proposal, generator=rng, length_norm=args.length_norm, beta=args.beta,
                eps_low=args.eps_low, eps_high=args.eps_high, ref_model=ref_model, micro_batch=args.micro_batch,
            )  # fmt: skip
            for p in trained:  # where there was nothing to learn, there is no gradient
                p.grad = sum_over_ranks(torch.zeros_like(p) if p.grad is None else p.grad / world_size())
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if not (grad_norm.isfinite() and rollout.logp.isfinite().all()):
                raise FloatingPointError(f"update {update + 1} is not finite; lower --learning_rate or --beta")
            optimizer.step()

        # Metrics; those of the gradient are the last optimizer step's.
        done, std, tokens = update + 1, rewards.view(-1, args.group_size).std(1), (rollout.step >= 0).sum()
        metrics |= {
            "reward": rewards.mean(), "reward_std": std.mean(), "frac_reward_zero_std": (std < 1e-6).float().mean(),
            "accuracy": right.mean(), "completion_length": tokens / len(batch), "grad_norm": grad_norm,
            "entropy": rollout.entropy.sum() / tokens, "learning_rate": learning_rate,
        }  # fmt: skip
        sums = sum_over_ranks(torch.tensor([*map(float, metrics.values())], dtype=torch.float64))
        metrics = {"update": done} | dict(zip(metrics, (sums / world_size()).tolist()))
        if args.eval_every and done % args.eval_every == 0:
            best = max((row.get("eval_accuracy", 0) for row in history), default=0)
            metrics["eval_accuracy"] = accuracy = evaluate(*loaded, test, args, args.eval_steps[0], greedy=True)
            bar.write(f"update {done}: accuracy {accuracy:.3f} in evaluation; before, at best {best:.3f}")
            if rank() == 0 and accuracy > best:  # chosen on test examples, so a little lucky
                save_model(model, tokenizer, run / "best")
        history.append(metrics)
        if rank() == 0:
            report(metrics, done)
            write(log, "".join(json.dumps(row) + "\n" for row in history))
            if done % args.save_every == 0 or done == args.max_steps:
                save_model(model, tokenizer, run / f"checkpoint-{done}", optimizer)
                for old in checkpoints(run)[:-2]:
                    shutil.rmtree(old)
        if done % max(1, args.max_steps // 20) == 0:
            bar.write("update {update}: reward {reward:.2f} accuracy {accuracy:.2f}".format(**metrics))
        if args.show_every and done % args.show_every == 0:
            bar.write(f"\na completion of reward {rewards[0]:g}\n{task.picture(batch[0], texts[0])}\n")
        if done in (5, args.max_steps) and all(row["frac_reward_zero_std"] == 1 for row in history):
            bar.write("Nothing to learn from: equal rewards in each group. Try --answer_format boxed (gsm8k, math)")
        sys.stdout.flush()  # for those who watch a log file


def generate(model, tokenizer, mask_id: int, examples: list, args: "Settings", key: tuple, **changes):
    """Complete each example; under torchrun, this process's share. Returns (its examples, their completions, Rollout or
    None). Texts end before the first end token; what was sampled after it is trained on, not rewarded."""
    task, ends, texts, rollouts = TASKS[args.task], end_tokens(tokenizer), [], []
    names = ("completion_length", "block_length", "steps", "temperature", "unmasking", "top_k", "top_p")
    options = {name: getattr(args, name) for name in names} | {"mask_id": mask_id, "eos_id": ends} | changes
    prompts = [task.prompt(e, tokenizer, args.answer_format) for e in examples]
    encoded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    share, size = math.ceil(len(examples) / world_size()), args.rollout_batch
    first = rank() * share
    ids, mask = (encoded[name][first:][:share].to(model.device) for name in ("input_ids", "attention_mask"))
    for n in range(0, len(ids), size):
        rng = seeded_generator(model.device, *key, first + n)
        rollouts.append(sample(model, ids[n:][:size], mask[n:][:size], generator=rng, **options))
        texts += [tokenizer.decode(before_end(row, ends)) for row in rollouts[-1].completion.tolist()]
    fields = [torch.cat(x) for x in zip(*(vars(r).values() for r in rollouts)) if x[0] is not None]
    return examples[first:][:share], texts, Rollout(*fields) if rollouts else None


def evaluate(model, tokenizer, mask_id: int, test: list, args: "Settings", steps: int, greedy: bool) -> float:
    """Accuracy: the share of test examples answered right, each completed once in so many steps."""
    how = {"unmasking": "low_confidence", "temperature": 0.0} if greedy else {}
    mine, texts, _ = generate(model, tokenizer, mask_id, test, args, ("evaluation",), steps=steps, **how)
    right = sum(right for _, right in map(TASKS[args.task].grade, mine, texts))
    return sum_over_ranks(torch.tensor(right)).item() / len(test)


end_tokens = lambda tokenizer: [tokenizer.eos_token_id, tokenizer.pad_token_id]  # models differ in which fills the rest
before_end = lambda tokens, ends: [*itertools.takewhile(lambda token: token not in ends, tokens)]
seeded_generator = lambda device, *key: torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(60))
number = lambda folder: int(folder.name[11:] if folder.name[11:].isdigit() else -1)  # a copy, or best: -1
checkpoints = lambda run: sorted((x for x in run.glob("checkpoint-*") if number(x) >= 0), key=number)  # oldest first
newest = lambda folder: [folder, *(checkpoints(folder) if (folder / "settings.json").is_file() else [])][-1]  # a run's
write = lambda file, text: Path(f"{file}.part").write_text(text) and Path(f"{file}.part").replace(file)  # atomic
sum_over_ranks = lambda x: (dist.all_reduce(x) or x) if dist.is_initialized() else x  # the former returns None
rank = lambda: dist.get_rank() if dist.is_initialized() else 0
world_size = lambda: dist.get_world_size() if dist.is_initialized() else 1
no_bar = lambda: rank() > 0 or "TQDM_DISABLE" in os.environ or None  # None: none where there is no terminal


# ===== 6. Tasks: examples, prompts, rewards =====


class BadInput(ValueError): ...  # what was given cannot work: agrpo.py and eval.py end with the message


@dataclass
class Task:
    is_right: Callable  # (example, answer) -> bool
    source: Callable  # (split, seed) -> examples made here, or a data set on the hub
    columns: dict  # names of a column -> a pattern, whose named groups make up the example
    question: str  # a template over the example
    credit: Callable = lambda *_: 0.0  # (example, answer) -> partial credit, from 0 to 1
    picture: Callable = lambda _, completion: completion

    def examples(self, split: str, args: "Settings") -> list[dict]:
        """To "train" or "test" on: from --data, or from the task's source, also where --data has no train*."""
        source = args.data
        if not source or (split == "train" and Path(source).exists() and not any(Path(source).glob("**/train*"))):
            source = self.source(split, args.seed)
        if isinstance(source, list):
            return source
        datasets = importlib.import_module("datasets")  # only here, as it takes 85 MB
        patterns = [at + split + shard for at in ("", "data/", "main/") for shard in (".*", "-*-of-*")]
        place = local_or_hub(source, "dataset", patterns)
        found = [place, *itertools.chain(*map(place.glob, patterns))]
        files = sorted(str(file) for file in found if file.suffix in (".csv", ".json", ".jsonl", ".parquet"))
        if len(files) != int((re.findall(r"-\d+-of-(\d+)[^/\\]*$", str(files)) or [1])[0]):
            raise BadInput(f"{source}: not one {split}.csv, .json, .jsonl or .parquet, or all its shards: {files}")
        examples, problem, kind = [], "", Path(files[0]).suffix[1:].removesuffix("l")
        text = {"converters": dict.fromkeys("|".join(self.columns).split("|"), str)} if kind == "csv" else {}
        try:
            for row in datasets.load_dataset(kind, data_files=files, split="train", **text):  # text, as 01 is not 1
                examples.append({})
                for names, pattern in self.columns.items():
                    problem = f"no {names} like {pattern} in row {len(examples)}"
                    value = next(value for value in map(row.get, names.split("|")) if value is not None)
                    examples[-1] |= re.fullmatch(pattern, str(value).strip(), re.DOTALL).groupdict()
        except Exception as error:
            problem = problem or f"not readable, or no rows: {error.__cause__ or error}"
            raise BadInput(f"{files[0]}: {problem}") from error
        return examples

    def prompt(self, example: dict, tokenizer, answer_format: str = "tags") -> str:
        question = BOXED if answer_format == "boxed" and self.question == TAGS else self.question
        if not tokenizer.chat_template:
            return example.get("puzzle", question.format(**example))  # all that the tiny model reads
        chat = [{"role": "user", "content": question.format(**example)}]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)

    def grade(self, example: dict, completion: str) -> tuple[float, bool]:
        """(reward, whether the answer is right): 3 if it is, partial credit, 0.5 a pair of tags (as official)."""
        answer = answer_in(completion)
        right = self.is_right(example, answer)
        pairs = [re.findall(f"</?{tag}>", completion) == [f"<{tag}>", f"</{tag}>"] for tag in ("reasoning", "answer")]
        return 3 * right + self.credit(example, answer) + 0.5 * sum(pairs), right


def answer_in(completion: str) -> str:
    """What stands in <answer>...</answer>; all of the completion if it has no such tag; nothing if it has others."""
    tags, texts = re.findall("</?answer>", completion), re.split("</?answer>", completion)
    return texts[len(tags) // 2].strip() if tags in ([], ["<answer>", "</answer>"]) else ""


def sudoku_credit(example: dict, answer: str) -> float:
    """The share of rows, columns and boxes that hold 1 to 4 once; 0 if it is not 16 cells that keep the clues."""
    cells = "".join(answer.split())
    units = [cells[i : i + 4] for i in (0, 4, 8, 12)] + [cells[i::4] for i in range(4)]
    units += [cells[i : i + 2] + cells[i + 4 : i + 6] for i in (0, 2, 8, 10)]
    kept = re.fullmatch(example["puzzle"].replace("0", "."), cells)
    return sum(set(unit) == set("1234") for unit in units) / 12 if kept else 0.0


def sudoku_picture(example: dict, completion: str) -> str:
    puzzle, grid = (" ".join(cells) for cells in (example["puzzle"].replace("0", "."), completion))
    lines = (f"    {puzzle[i : i + 7]}   {grid[i : i + 7]}" for i in (0, 8, 16, 24))
    return "\n".join(lines) if len(completion) == 16 else completion


def sudoku_create(split: str, seed: int) -> list[dict]:
    """240 of the 288 grids are to train on, 48 to test on. Four in five puzzles to "pretrain" on are of Latin squares,
    whose boxes do not matter: they are left to learn."""
    rows, latin = ["".join(row) for row in itertools.permutations("1234")], [""]
    for _ in range(4):
        latin = [a + row for a in latin for row in rows if all(x not in a[i::4] for i, x in enumerate(row))]
    grids = random.Random("grids").sample([x for x in latin if sudoku_credit({"puzzle": "0" * 16}, x) == 1], 288)
    train, test = grids[:240], grids[240:]
    cut = {"train": train * 64, "test": test * 8, "pretrain": 22 * train + 40 * [x for x in latin if x not in test]}
    rng = random.Random("test puzzles" if split == "test" else f"{seed} {split} puzzles")
    hide = lambda grid, blank: "".join("0" if i in blank else grid[i] for i in range(16))
    return [{"puzzle": hide(grid, rng.sample(range(16), rng.randint(12, 14))), "solution": grid} for grid in cut[split]]


def countdown_create(split: str, seed: int) -> list[dict]:
    rng, problems = random.Random(f"{seed} countdown" if split == "train" else "countdown test"), []
    while len(problems) < (4096 if split == "train" else 256):
        a, b, c = (rng.randint(1, 99) for _ in range(3))
        form = rng.choice(["({}{}{}){}{}", "{}{}({}{}{})"])
        target = arithmetic(form.format(a, rng.choice("+-*/"), b, rng.choice("+-*/"), c))
        if target in range(1, 1000):
            problems.append({"numbers": f"{a},{b},{c}", "target": str(target)})
    return problems


def countdown_right(example: dict, answer: str) -> bool:
    """Whether it is an expression of the target from exactly the given numbers; "= target" may follow it."""
    expression = re.sub(rf"=\s*{example['target']}\s*$", "", plainly(answer))
    given, used = (sorted(re.findall("[0-9]+", text)) for text in (example["numbers"], expression))
    return used == given and arithmetic(expression) == int(example["target"])


def arithmetic(expression: str) -> Fraction | None:
    """The exact value of an expression of +, -, *, / and parentheses over whole numbers; None for anything else."""
    with contextlib.suppress(Exception):
        allowed = re.fullmatch(r"[0-9+\-*/()\s]{1,100}", expression)[0]
        return worth(ast.parse(" ".join(allowed.split()), mode="eval").body)


def plainly(answer: str) -> str:
    """The answer out of its box, with one sign each for times, divided by, minus and comma, no bold, no full stop."""
    text = boxed(answer) or answer
    for sign, written in ("*", r"×|·|\\(times|cdot)\b"), ("/", r"÷|\\div\b"), ("-", "[‐-–−﹣－]"):
        text = re.sub(written, sign, text)
    return text.replace("{,}", ",").replace("**", "").strip().removesuffix(".")


def single_number(text: str) -> Fraction | None:
    """The only number in a text, be it 1,234 or $1234.00 or 1234 apples; None for several, or one in a formula."""
    text = re.sub(r"(?<=[A-Za-z])(\^\{?[23]\}?|[²³])", "", plainly(text))  # m^2
    found, foreign = re.findall(NUMBER, text), any(c.isnumeric() and not c.isascii() for c in text)  # foreign: ½, ٣
    if len(found) != 1 or len(text) > 100 or foreign or re.search(ANOTHER, text):
        return None
    return Fraction(found[0][1].replace(",", "")) * (-1 if found[0][0] else 1)


def math_right(example: dict, answer: str) -> bool:
    r"""Whether math-verify, given a second, finds what \boxed{} holds equal to the solution's; 9^{9^9} takes longer."""
    from math_verify import parse, verify

    texts = example["solution"], f"\\boxed{{{boxed(answer)[:500]}}}"
    return verify(*(parse(text, parsing_timeout=1) for text in texts), timeout_seconds=1)


SIGN = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__, ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__}
worth = lambda n: SIGN[type(n.op)](worth(n.left), worth(n.right)) if hasattr(n, "op") else Fraction(n.value)
NUMBER = r"(-\W*?)?((?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![A-Za-z])\.\d+)"  # (minus, digits)
ANOTHER = r"\w\s*\*\s*\w|/[\s{(]*\d|\d[\s})]*!|[\^√π]|(?<![a-z])(sqrt|log|ln|exp|pi)(?![a-z])"  # 2*x, x/2, 3!
BOX = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
boxed = lambda text: "".join(re.findall(BOX, text)) if text.count("\\boxed{") == 1 else ""  # what the only box holds
FORMAT = "\n\nThink first, inside <reasoning> and </reasoning>. Then write the answer inside <answer> and </answer>: "
TAGS = "{question}" + FORMAT + "the final answer alone, in \\boxed{{}}, such as <answer>\\boxed{{42}}</answer>."
BOXED = "{question}\n\nReason step by step, and put the final answer within \\boxed{{}}."  # --answer_format boxed
TASKS = {
    "sudoku": Task(lambda *pair: sudoku_credit(*pair) == 1, sudoku_create,
        {"Puzzle": "(?P<puzzle>[0-4]{16})", "Solution": "(?P<solution>[1-4]{16})"},
        "Fill in this 4x4 Sudoku, given row by row, so that every row, column and 2x2 box holds 1, 2, 3 and 4 once; 0 "
        "is a blank: {puzzle}" + FORMAT + "the 16 digits, such as <answer>1234341221434321</answer>.",
        sudoku_credit, sudoku_picture),
    "countdown": Task(countdown_right, countdown_create,
        {"input|nums": r"\[?(?P<numbers>[0-9]+(?:[, ]+[0-9]+)+)\]?", "output|target": "(?P<target>[0-9]+)"},
        "Write an expression that equals {target}, using each of the numbers {numbers} exactly once, +, -, *, / and "
        "parentheses." + FORMAT + "the expression alone, such as <answer>(1 + 2) * 3</answer> for 9."),
    "gsm8k": Task(lambda example, answer: single_number(answer) == Fraction(example["gold"].replace(",", "")),
        lambda *_: "openai/gsm8k",  # arXiv 2110.14168
        {"question": "(?P<question>.+)", "answer": r".*####\s*\$?(?P<gold>-?[0-9][0-9,]*(?:\.[0-9]+)?)"}, TAGS),
    "math": Task(math_right,  # arXiv 2103.03874
        lambda split, _: "DigitalLearningGmbH/MATH-lighteval" if split == "train" else "HuggingFaceH4/MATH-500",
        {"problem": "(?P<question>.+)", "solution": r"(?P<solution>.*\\boxed.*)"}, TAGS),
}  # fmt: skip


# ===== 7. Models =====


def load_model(name_or_path: str, device="cpu", dtype: torch.dtype = torch.float32):
    """(model, tokenizer, mask_id), ready to sample from. Raises BadInput or OSError for what cannot be loaded.
    name_or_path: "tiny" (not trained yet), a LLaDA, Dream or A2D (dLLM's) checkpoint (folder or hub id), or what this
    file saved: a run, a checkpoint, an adapter (peft's too)."""
    if name_or_path == "tiny":
        return tiny_model(device, dtype)
    folder = newest(local_or_hub(name_or_path))
    name = str(folder.resolve()) if Path(name_or_path).exists() else name_or_path
    if (adapter := folder / "adapter_config.json").exists():
        loaded = load_model(json.loads(adapter.read_text())["base_model_name_or_path"], device, dtype)
        load_lora(merge_lora(loaded[0]), folder)
        loaded[0].name_or_path = name  # what a further adapter is put on
        return loaded
    raw = json.loads((folder / "config.json").read_text())
    kind = raw.get("model_type")
    windows = raw.get("use_sliding_window") or {*(raw.get("layer_types") or [])} - {"full_attention"}
    if kind not in MODELS or windows or re.search("bd3lm|tide|opdlm", Path(name).name.lower()):  # causal between blocks
        raise BadInput(f"{name}, a {kind}: only {', '.join(MODELS)} can be loaded, if all tokens see each other")
    shape = raw | {ours: raw[theirs] for theirs, ours in LLADA.items() if theirs in raw}
    own = (*MODELS[kind].config_class.__annotations__, "rope_theta", "rope_scaling")  # what describes the architecture
    shape = {key: shape[key] for key in own if key in shape} | (FULL if kind != "bert" else {})
    config = MODELS[kind].config_class(**shape, logits_shift=int(kind == "Dream"))
    if torch.device(device).type == "cpu" and config.hidden_size > 3000:
        raise BadInput(f"{name}: too large for a CPU; use a GPU")
    tokenizer_class = hf.Qwen2Tokenizer if kind == "Dream" else hf.AutoTokenizer
    tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    mask_id = raw.get("mask_token_id", tokenizer.mask_token_id)
    if None in (mask_id, tokenizer.eos_token_id):
        raise BadInput(f"{name}: no mask_token_id in config.json, or no eos_token in the tokenizer")
    model, found = MODELS[kind].from_pretrained(
        local_or_hub(name, "model", ["*.safetensors*"]), config=config, dtype=dtype, use_safetensors=True,
        key_mapping=LLADA if kind == "llada" else None, output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    if any(found.values()):
        raise BadInput(f"{name}: weights that do not fit: {found!s:.500}")
    model.raw_config, model.name_or_path = raw, name
    return model.to(device).eval(), tokenizer, mask_id


MODELS = {  # model_type: its class in transformers; those of A2D are dLLM's
    "bert": hf.BertForMaskedLM, "llada": hf.LlamaForCausalLM, "Dream": hf.Qwen2ForCausalLM,
    "a2d-llama": hf.LlamaForCausalLM, "a2d-qwen2": hf.Qwen2ForCausalLM, "a2d-qwen3": hf.Qwen3ForCausalLM,
}  # fmt: skip
# All tokens see each other; the embedding of the padding token is trained like any other.
FULL = {"is_causal": False, "use_cache": False, "pad_token_id": None}
LLADA = {  # LLaDA's names: Llama's. Three lines of a config's, then parts of the names of weights, replaced in order
    "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "mlp_hidden_size": "intermediate_size", "embedding_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings", "weight_tying": "tie_word_embeddings",
    "model.transformer.ff_out": "lm_head", "model.transformer.": "model.", "model.ln_f": "model.norm",
    "wte": "embed_tokens", "blocks": "layers", "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip


def local_or_hub(name: str, kind="model", files=("*.json", "*.txt", "*.jinja", "adapter_model.safetensors")) -> Path:
    """A path as it is, or the folder of a hub repository, a "model" (by default without weights) or "dataset"."""
    if Path(name).exists():
        return Path(name)
    try:
        return Path(hub.snapshot_download(name, repo_type=kind, allow_patterns=files))
    except Exception as error:  # noqa: BLE001 - which one depends on the HTTP client
        advice = f"give --{kind.removesuffix('set')} FOLDER, or run plain `python agrpo.py`"
        raise BadInput(f"{name}: no such file or folder, and no {kind} on the hub; {advice}: {error}") from None


class LoRALinear(Linear):
    """W x + B A x, with W frozen and A, B in float32 (LoRA, arXiv 2106.09685, with alpha = r)."""

    def forward(self, x: Tensor) -> Tensor:
        low = x @ self.lora_A.weight.T.to(x.dtype)  # (..., r)
        return super().forward(x) + low @ self.lora_B.weight.T.to(x.dtype)


def add_lora(model, r: int, names: set[str] | None = None) -> None:
    """Freeze a model and put LoRA on the linear layers of these names; by default on all but the output head."""
    wanted = lambda name: name in names if names else name.startswith(model.base_model_prefix + ".")
    layers = {name: m for name, m in model.named_modules() if wanted(name) and isinstance(m, Linear)}
    new = {"bias": False, "device": model.requires_grad_(False).device}
    for m in layers.values():
        m.__class__ = LoRALinear  # the same layer, with two more
        m.lora_A, m.lora_B = Linear(m.in_features, r, **new), Linear(r, m.out_features, **new)
        torch.nn.init.zeros_(m.lora_B.weight)  # at first nothing changes
    model.adapter_config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": sorted(layers)}
    model.adapter_config["base_model_name_or_path"] = model.name_or_path


def load_lora(model, folder: Path) -> None:
    """Put a saved adapter on its base. Its names may be LLaDA's, as in the published code's; here alpha = r."""
    adapter, file = json.loads((folder / "adapter_config.json").read_text()), folder / "adapter_model.safetensors"
    if any(map(adapter.get, ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"))) or not file.exists():
        raise BadInput(f"{folder}: only plain LoRA in {file.name} can be read")
    weights, scale = {}, adapter["lora_alpha"] / adapter["r"]
    for name, tensor in load_file(file).items():
        name = name.removeprefix("base_model.model.")
        for theirs, ours in LLADA.items() if "model.transformer." in name else ():
            name = name.replace(theirs, ours)
        weights[name] = tensor * scale if ".lora_B." in name else tensor
    add_lora(model, adapter["r"], {name.split(".lora_")[0] for name in weights})
    shapes = lambda tensors: {name: tensor.shape for name, tensor in tensors.items() if ".lora_" in name}
    if shapes(model.state_dict()) != shapes(weights):
        raise BadInput(f"{folder} is an adapter for another model than {model.name_or_path}")
    model.load_state_dict(weights, strict=False)


def merge_lora(model):
    """Take LoRA away, its weights added to the model's: an ordinary checkpoint again."""
    for m in [m for m in model.modules() if isinstance(m, LoRALinear)]:
        m.weight.data += m.lora_B.weight.data @ m.lora_A.weight.data
        m.__class__ = Linear
        del m.lora_A, m.lora_B
    return model.requires_grad_(True)


def save_model(model, tokenizer, folder: Path, optimizer=None) -> None:
    """Write a folder, whole or not at all: an adapter in peft's layout, or all weights under the names they had."""
    part = Path(f"{Path(folder)}.part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save_pretrained(part)
    lora = {f"base_model.model.{name}": tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    if lora:
        save_file(lora, part / "adapter_model.safetensors")
        (part / "adapter_config.json").write_text(json.dumps(model.adapter_config, indent=1))
    else:
        model.save_pretrained(part)
        if hasattr(model, "raw_config"):  # transformers has undone the key_mapping, so the config must be LLaDA's too
            (part / "config.json").write_text(json.dumps(model.raw_config, indent=1))
    if optimizer:
        states = {f"{i} {name}": x for i, state in optimizer.state_dict()["state"].items() for name, x in state.items()}
        save_file(states, part / "optimizer.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def tiny_model(device, dtype):
    """A BERT of 367,396 weights over a tokenizer of one token per character: printable ASCII and the newline."""
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "eos", "mask")}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *map(chr, range(32, 127)), "\n"])}
    characters = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[], unk_token="[UNK]"))
    characters.decoder = tokenizers.decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=characters, **special)
    config = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    return hf.BertForMaskedLM(config).to(device, dtype).eval(), tokenizer, tokenizer.mask_token_id


def pretrain(model, tokenizer, mask_id: int, pairs: list[tuple[str, str]], seed: int, steps: int, batch: int = 128):
    """Teach a fresh model (prompt, completion) pairs by the masked-diffusion ELBO (arXiv 2406.07524): cross-entropy of
    tokens masked with probability t ~ U(0, 1), weighted 1/t, an upper bound on -log p(completion | prompt)."""
    prompts, completions = (tokenizer(list(texts), return_tensors="pt").input_ids for texts in zip(*pairs))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in tqdm(range(steps), "pretraining", unit="step", disable=no_bar()):
        rng = seeded_generator("cpu", seed, "pretrain", step)
        rows = torch.randint(len(prompts), (batch,), generator=rng)
        t = ((torch.arange(batch) + torch.rand(batch, generator=rng))[:, None] / batch).clamp(min=1e-3)  # (B, 1)
        target = completions[rows]  # (B, C)
        masked = torch.rand(target.shape, generator=rng) < t
        ids = torch.cat([prompts[rows], target.masked_fill(masked, mask_id)], 1).to(model.device)
        logits = model(ids).logits[:, prompts.shape[1] :].cpu()  # (B, C, V)
        losses = cross_entropy(logits.transpose(1, 2), target, reduction="none")  # (B, C)
        optimizer.zero_grad()
        (losses * masked / t).sum(1).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        fraction = (step + 1) / steps  # linear warm-up over a tenth of the steps, then linear to 0
        optimizer.param_groups[0]["lr"] = 2e-3 * min(fraction / 0.1, (1 - fraction) / 0.9 + 1e-3)
        optimizer.step()


# ===== 8. Command line =====

option = lambda default, text: field(default=default, metadata={"help": text})


@dataclass
class Settings:  # with the tiny model's defaults; RELEASE holds those that differ for an 8B model
    task: Literal["sudoku", "countdown", "gsm8k", "math"] = option("sudoku", "what to train on")
    model: str = option("tiny", "tiny, qwen3-0.6b, a folder or a hub id")
    answer_format: Literal["tags", "boxed"] = option("tags", "gsm8k and math: ask for tags, or for a box alone")
    data: str | None = option(None, "a file to test on, a folder of train.* and test.*, or a hub id")
    output_dir: str | None = option(None, "the run's folder; None: runs/TASK-MODEL-seedN")
    resume: str | None = option(None, "a run's folder, to go on with; other options replace its own")
    seed: int = option(0, "the same seed gives the same run")
    device: str | None = option(None, "cuda, mps or cpu; None: the best there is")
    max_steps: int = option(160, "updates")
    prompts_per_update: int = option(32, "prompts in an update")
    group_size: int = option(16, "G: completions of each prompt")
    k: int = option(1, "steps drawn per completion, on average")
    length_norm: Literal["sequence", "constant"] = option("sequence", "divide a row by its own steps, or all by T")
    scale_by_std: bool = option(False, "divide advantages by the group's deviation")
    optimizer_steps: int = option(2, "optimizer steps on the same rollouts")
    eps_low: float = option(0.2, "clip the ratio at 1 - eps_low")
    eps_high: float = option(0.2, "clip the ratio at 1 + eps_high")
    beta: float = option(0.0, "weight of the KL to the model before training")
    completion_length: int = option(16, "tokens in a completion")
    block_length: int = option(16, "tokens in a block")
    steps: int = option(4, "T: sampling steps")
    unmasking: Literal["random", "low_confidence"] = option("random", "what a step unmasks; random is exact")
    temperature: float = option(1.0, "tau: sampling temperature")
    top_k: int = option(0, "sample from so many tokens; 0: all, or 1,024 with top_p")
    top_p: float = option(1.0, "sample from the most probable with this sum")
    learning_rate: float = option(7e-4, "before warm-up and cosine decay to 0")
    warmup_steps: int = option(20, "updates of rising learning rate")
    lora_rank: int = option(0, "r of LoRA; 0: train all weights")
    micro_batch: int = option(256, "(completion, step) pairs in memory at once")
    rollout_batch: int = option(512, "completions sampled at once")
    gradient_checkpointing: bool = option(False, "less memory, more time")
    eval_steps: list[int] = field(default_factory=lambda: [16, 8, 4, 2, 1], metadata={"help": "steps to measure at"})
    eval_examples: int = option(0, "test examples to measure on; 0: all")
    eval_every: int = option(0, "updates between measurements, greedy, at the first of eval_steps; 0: none")
    show_every: int = option(40, "updates between completions printed; 0: none")
    save_every: int = option(40, "updates between checkpoints; two are kept")
    report_to: Literal["none", "tensorboard", "wandb"] = option("none", "where else the metrics go")
    pretrain_steps: int = option(600, "to pretrain the tiny model")


RELEASE = {  # the official release's settings for LLaDA-8B, on one GPU; how often to measure, show and save is ours
    "model": "GSAI-ML/LLaDA-8B-Instruct", "max_steps": 1000, "prompts_per_update": 16, "group_size": 8, "k": 24,
    "completion_length": 384, "block_length": 12, "steps": 128, "temperature": 0.6, "top_k": 150, "top_p": 0.99,
    "optimizer_steps": 1, "learning_rate": 5e-6, "warmup_steps": 10, "micro_batch": 8, "rollout_batch": 8,
    "lora_rank": 64, "eval_steps": [128, 64], "eval_examples": 64, "eval_every": 50, "show_every": 1, "save_every": 10,
}  # fmt: skip
SMALL = RELEASE | {  # ours, for a Qwen3-0.6B that was made a masked diffusion model
    "model": "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", "answer_format": "boxed", "max_steps": 100, "k": 16,
    "completion_length": 256, "block_length": 32, "learning_rate": 2e-5, "rollout_batch": 64, "eval_steps": [256, 128],
    "eval_examples": 256, "eval_every": 25,
}  # fmt: skip
is_tiny = lambda name: name == "tiny" or any('"bert"' in c.read_text() for c in newest(Path(name)).glob("config.json"))


def parse_settings(argv: list[str]) -> Settings:
    """Settings from the command line, over those of the run to resume, or over the defaults for the task and model."""
    parser = hf.HfArgumentParser(Settings, usage="agrpo.py [--option value ...] (--help: all)", allow_abbrev=False)
    first = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    if first.resume:
        file = Path(first.resume) / "settings.json"
        if not file.is_file() or not file.read_text():
            parser.error(f"--resume {first.resume}: no settings.json there; give the folder that the run printed")
        saved = {name: value for name, value in json.loads(file.read_text()).items() if hasattr(first, name)}
        parser.set_defaults(**saved | {"resume": first.resume})
    elif first.task != "sudoku" or not is_tiny(first.model):
        parser.set_defaults(**SMALL if "qwen3-0.6b" in first.model.lower() else RELEASE)
    args = parser.parse_args(argv)
    changed = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.resume:
        if changed.keys() & {"lora_rank", "output_dir"}:
            parser.error("--lora_rank and --output_dir of a run cannot be changed")
        print("changed from here on:", changed or "nothing")
    args.model = SMALL["model"] if args.model == "qwen3-0.6b" else args.model
    args.data = str(Path(args.data).resolve()) if args.data and Path(args.data).exists() else args.data
    run = args.resume or args.output_dir or f"runs/{args.task}-{Path(args.model).resolve().name}-seed{args.seed}"
    if Path(run, "settings.json").exists() and not args.resume:
        parser.error(f"{run} has a run; give another --output_dir, or go on: --resume {run}")
    return Settings(**vars(args) | {"output_dir": run})


def prepare(args: Settings) -> None:
    """Choose the device and, under torchrun, join the others. Raise BadInput for settings that cannot work."""
    hf.logging.set_verbosity_error()  # what goes wrong in loading is said in a sentence
    hf.logging.disable_progress_bar()
    args.device = args.device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for good: only the first process prints
    positive = ("temperature", "top_p", "k", "max_steps", "save_every", "optimizer_steps", "rollout_batch")
    for name in (*positive, "micro_batch", "prompts_per_update", "block_length", "group_size"):
        if not getattr(args, name) > (name == "group_size"):
            raise BadInput(f"--{name} {getattr(args, name)} is too small")
    if args.model == "tiny" and args.task != "sudoku":
        raise BadInput("tiny knows only sudoku; give another --model")
    for used, package in (args.task == "math", "math_verify"), (args.report_to != "none", args.report_to):
        if used and not importlib.util.find_spec(package):
            raise BadInput(f"this needs pip install {package}")
    try:
        for steps in (args.steps, *args.eval_steps):
            tokens_per_step(args.completion_length, args.block_length, steps)
        torch.zeros(1, device=args.device)
    except (ValueError, RuntimeError, AssertionError) as error:  # the latter two: no such device
        raise BadInput(str(error)) from None


def measure(results: dict, stage: str, loaded: tuple, test: list, args: Settings) -> None:
    """Add to results the accuracy at each of eval_steps, as trained and greedy; print a table of what they hold."""
    results[stage], trained = {}, f"{args.unmasking} unmasking, temperature {args.temperature:g}"
    print(f"\nAccuracy on {len(test)} test examples, by sampling steps (trained with {args.steps})")
    for name, how in ("as trained", trained), ("greedy", "low-confidence unmasking, temperature 0"):
        results[stage][name] = {n: evaluate(*loaded, test, args, n, name == "greedy") for n in args.eval_steps}
        print(f"\n  {f'{name} ({how})':50s}" + "".join(f"{n:>7}" for n in args.eval_steps))
        for row, found in results.items():
            print(f"    {row:48s}" + "".join(f"{accuracy:7.3f}" for accuracy in found[name].values()))
    print(flush=True)


def run_training(args: Settings) -> None:
    began, task, run, results = time.time(), TASKS[args.task], Path(args.output_dir), {}
    if args.prompts_per_update % world_size():
        raise BadInput(f"--prompts_per_update must be a multiple of the {world_size()} processes")
    given, test = task.examples("train", args), task.examples("test", args)
    asked = {task.question.format(**example) for example in test}
    examples, test = [e for e in given if task.question.format(**e) not in asked], test[: args.eval_examples or None]
    if not examples:
        raise BadInput("all training examples are test examples too")
    torch.manual_seed(args.seed)  # for weights that begin at random: the same in all processes
    half = args.lora_rank > 0 and args.device.startswith("cuda")  # frozen weights; those that are trained never are
    loaded = load_model(args.model, args.device, torch.bfloat16 if half else torch.float32)
    model = merge_lora(loaded[0])  # if it is an adapter, a new one goes on top of it
    args.model = model.name_or_path or args.model  # the whole path
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "settings.json").touch(exist_ok=bool(args.resume))  # fails if another run has begun here
        write(run / "settings.json", json.dumps(asdict(args), indent=1))
    start, both = newest(run), len(given) - len(examples)
    print(f"{args.task}: {args.model}, {model.num_parameters():,} weights, {args.device}; seed {args.seed}; at {start}")
    print(f"{len(examples)} examples to train on, {len(test)} to test on; {both} were both: not trained on")
    if args.model == "tiny":
        if rank() == 0 and not (run / "base").exists():
            pairs = [tuple(example.values()) for example in sudoku_create("pretrain", args.seed)]
            pretrain(*loaded, pairs, args.seed, args.pretrain_steps)
            save_model(*loaded[:2], run / "base")
        sum_over_ranks(torch.ones(1))  # the others wait here
        loaded = load_model(str(run / "base"), args.device)
    measure(results, "base", loaded, test, args)
    model = loaded[0]
    shared = {id(p): p for p in model.parameters()} if args.lora_rank else {}  # LoRA leaves these weights as they are
    ref_model = copy.deepcopy(model, memo=shared).requires_grad_(False) if args.beta > 0 else None
    if args.lora_rank:
        load_lora(model, start) if start != run else add_lora(model, args.lora_rank)
    elif start != run:
        loaded = load_model(str(start), args.device)
    if args.gradient_checkpointing:
        loaded[0].activation_checkpointing_enable()  # gradient_checkpointing_enable, before transformers 5
    train(loaded, examples, test, args, ref_model)
    measure(results, "AGRPO", loaded, test, args)
    if rank() == 0:
        (run / "results.json").write_text(json.dumps({"examples": len(test)} | results, indent=1))
        print(f"{time.time() - began:.0f} s; checkpoint: {checkpoints(run)[-1]}; every update: {run}/metrics.jsonl")


def main(argv: list[str]) -> None:
    args = parse_settings(argv)
    try:
        prepare(args)
        run_training(args)
    except (BadInput, OSError, FloatingPointError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        less = "out of memory: lower --micro_batch or --rollout_batch, or --gradient_checkpointing true"
        what = less if isinstance(error, torch.OutOfMemoryError) else (str(error) or "stopped").splitlines()[0]
        go_on = f"; to go on: --resume {args.output_dir}" * Path(args.output_dir, "settings.json").exists()
        sys.exit(f"agrpo.py: {what}{go_on}")


if __name__ == "__main__":
    main(sys.argv[1:])
