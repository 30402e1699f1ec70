"""AGRPO (arXiv 2510.04019) in one file: policy gradients for masked diffusion language models, without bias.

    python agrpo.py                          teach a tiny mask predictor 4x4 Sudoku: minutes, on a CPU, no download
    python agrpo.py --data puzzles.csv       the same, measured on your puzzles (columns Puzzle, Solution; 0 is a blank)
    python agrpo.py --task gsm8k             LLaDA-8B-Instruct with LoRA, from the hub, on a GPU (also: math, countdown)
    torchrun --nproc_per_node 8 agrpo.py --task gsm8k             the same on eight
    python agrpo.py --resume RUN_DIR         go on with an interrupted run
    python agrpo.py --task gsm8k --help      every setting, with its default for the task

A masked diffusion language model is a mask predictor: shown a prompt and a partly masked completion, it returns a
distribution over tokens for every masked position. It writes by unmasking: all masks at first, a few positions filled
at each step. That is a Markov decision process, and AGRPO is GRPO on it:

    rollout      unmask G completions of each prompt, remembering which step filled in which position  sample
    advantage    each completion's reward minus the mean of its group                                 group_advantages
    timesteps    the gradient is a sum over T steps: draw k of them, weighted so that the mean is it  draw_timesteps
    estimate     one pass for each drawn step: log-probabilities of what it filled in, in its state   step_logps
    objective    GRPO's clipped ratio, token by token                                                 clipped_objective
    update       the gradient of all this over the batch; then AdamW                                  policy_gradient

The log-likelihood of a trajectory is exact here, not a bound. With random unmasking the order carries no parameters,
so log pi(trajectory | prompt) is the sum, over steps, of the log-probabilities of the tokens filled in, plus a
constant; that is the quantity a policy gradient needs. (Averaged over orders the same sum is the any-order ELBO, a
lower bound on the likelihood of the completion as a text; that is why the estimate is called ELBO-style.)

The paper's letters, and the words for them in this file:

    q             prompt                       (B, P) token ids, padded on the left; B = prompts x group size
    o             completion                   (B, C) token ids
    s_t           state at step t              the completion with everything filled at step t or later masked again
    U_t           revealed                     the positions that step t fills in, a few of the block it works on
    T             steps, num_steps             sampling steps; what one row really took (rows that end early take fewer)
    k             k                            sampled timesteps a row, k << T: an update costs k passes a row, not T
    G             group_size                   completions of one prompt
    A             advantage                    (B,)
    rho           ratio                        new probability of a token over the one it was sampled with
    eps, beta     eps_low, eps_high, beta      clipping range; weight of the KL term
    tau           temperature
    theta         model                        a Hugging Face PreTrainedModel with bidirectional attention: `base_model`
                                               makes hidden states, `lm_head` (or BERT's `cls`) makes logits of them
"""

import ast
import contextlib
import copy
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

# ======================================================================================================================
# 1. Sampler: the unmasking Markov decision process
#
#        pi(trajectory | q) = prod over t of [ P(U_t) x prod over i in U_t of p_theta(o_i | q, s_t) ]
# ======================================================================================================================


@dataclass
class Rollout:
    """B completions and how each came about: one trajectory of the unmasking process a row.

    logp and entropy are float64 where the model is.
    """

    prompt: Tensor  # (B, P) int64, padded on the left
    prompt_mask: Tensor  # (B, P) bool, False on padding
    completion: Tensor  # (B, C) int64; EOS from where the row had ended
    step: Tensor  # (B, C) int64, the step that filled each position; -1 where the row had already ended
    logp: Tensor  # (B, C) float32, nats, under the policy that sampled; 0 where step is -1
    entropy: Tensor  # (B, T) float32, nats, summed over the tokens that each step filled in
    num_steps: Tensor  # (B,) int64, steps taken: T, or fewer where the row ended early
    kept: Tensor | None = None  # (B, C, K) int64, ids that top-k and top-p left to choose from; -1 fills up to K


def logits_at(
    model, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, merge: bool = False
) -> Tensor:
    """Logits at the given positions only: the output head never sees the rest of the sequence.

    input_ids (N, L) int64; attention_mask (N, L) bool, or None where nothing is padding (leaves the way free for flash
    attention); positions (N, n) int64 in [0, L), for Dream in [1, L). merge: one pass for all rows that are equal, as
    the completions of one prompt are at step 0. Returns (N, n, V) in the model's dtype, differentiable.
    """
    same = None
    if merge:
        seen = input_ids if attention_mask is None else input_ids.masked_fill(~attention_mask, -1)
        same = seen.unique(dim=0, return_inverse=True)[1]  # (N,): equal rows share a number
        one_of = same.new_zeros(int(same.max()) + 1).scatter_(0, same, torch.arange(len(same), device=same.device))
        input_ids, attention_mask = input_ids[one_of], None if attention_mask is None else attention_mask[one_of]
    where = {"attention_mask": attention_mask}
    if attention_mask is not None:  # count positions from the first real token, so that padding changes nothing
        where["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    hidden = model.base_model(input_ids=input_ids, **where).last_hidden_state  # (N, L, D), fewer rows where merged
    if same is not None:
        hidden = hidden.index_select(0, same)
    positions = positions - getattr(model.config, "logits_shift", 0)  # Dream's logits at i - 1 are about i
    hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))  # (N, n, D)
    head = model.cls if hasattr(model, "cls") else model.lm_head  # BERT's head has a layer of its own
    return head(hidden)


def truncate(logits: Tensor, mask_id: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor | None:
    """Ids left to choose from after top-k, then top-p (nucleus, arXiv 1904.09751) among what top-k kept.

    logits (..., V). Returns (..., K) int64 with -1 in unused places, K = top_k (V where that is less, or 0);
    None where nothing is cut. At least one id is always kept; mask_id never.
    """
    if not top_k and top_p >= 1:
        return None
    top, kept = _without(logits, mask_id).topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
    drop = top == -math.inf
    if top_p < 1:
        probability = (_wide(top) / temperature).softmax(-1)
        drop |= probability.cumsum(-1) - probability >= top_p  # what is more probable already makes up top_p
        drop[..., 0] = False
    return kept.masked_fill(drop, -1)


def policy_logps(logits: Tensor, mask_id: int, temperature: float, kept: Tensor | None = None) -> Tensor:
    """Log-probabilities of the policy: softmax at a temperature over every id but mask_id, or over the kept ids.

    logits (..., V); kept (..., K) int64 from `truncate`. Returns (..., V), or (..., K) in the order of kept; float32,
    or float64 for float64 logits. Temperature 0 is greedy, a choice from one (top-k of 1): log-probability 0 at any
    temperature, so 1 is taken. The sampler and the gradient both call this: one policy, one definition.
    """
    temperature = temperature or 1.0
    if kept is None:
        return (_without(_wide(logits), mask_id) / temperature).log_softmax(-1)
    logits = _wide(logits.gather(-1, kept.clamp(min=0))).masked_fill(kept < 0, -math.inf)
    return (logits / temperature).log_softmax(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 is too coarse for log-probabilities


def _without(logits: Tensor, mask_id: int) -> Tensor:
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) == mask_id, -math.inf)


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
    """Unmask one completion for each row of prompt, block by block from the left (LLaDA, arXiv 2502.09992).

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
    if temperature == 0:  # greedy: a choice from one
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
            logits = logits_at(
                model, ids[rows], None if attention is None else attention[rows], P + looked_at, merge=t == 0
            )
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
#
#        log pi = sum over t of f(t) + const,  f(t) = sum over i in U_t of log p_theta(o_i | q, s_t)
#               = E[ sum over k drawn t of f(t) / inclusion(t) ] + const
# ======================================================================================================================


def draw_timesteps(
    num_steps: Tensor, k: int, proposal: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw k timesteps for each row; sum_j weights[j] f(steps[j]) is unbiased for the sum of f(t) over t < num_steps.

    num_steps (B,) int64. proposal (B, T) nonnegative, of any scale, positive on each row's own steps; None = uniform.
    generator: on the CPU. Returns steps (B, k) int64 and weights (B, k) float64 (float32 on mps, which has no float64).

    Step t of a row is drawn with probability inclusion[t], in proportion to the proposal but at most 1, and weighs
    1 / inclusion[t] (Horvitz-Thompson). No step is drawn twice; a row of at most k steps gets each once with weight 1:
    the exact sum. Weights 0 fill up such a row to k; they cost no pass.

    How: laid end to end, a row's inclusion probabilities are k long. Points at x, 1 + x, ..., k - 1 + x, where x is
    uniform on [0, 1), hit each step as often as its length says (systematic sampling); the B rows take their x from B
    different strata of [0, 1), in random order. Each x alone stays uniform, so nothing is biased; usually far less is
    left to chance.
    Raises ValueError where k < 1 or a proposal is negative, not finite, or 0 at a step that the row has taken.
    """
    if k < 1:
        raise ValueError(f"k is the number of timesteps drawn for each row and must be at least 1, not {k}")
    device, num_steps = num_steps.device, num_steps.cpu()[:, None]  # (B, 1)
    B, T = len(num_steps), int(num_steps.max()) if proposal is None else proposal.shape[1]
    taken = torch.arange(T) < num_steps  # (B, T)
    density = taken.double() if proposal is None else proposal.detach().cpu().double() * taken
    covered = (num_steps <= T).all() and ((density > 0) | ~taken).all()
    if not (covered and density.isfinite().all() and (density >= 0).all()):
        raise ValueError("a proposal must be positive and finite at every step that its row has taken")

    inclusion = torch.zeros_like(density)
    while True:  # the probability that a step has beyond 1 goes to the others
        certain = inclusion >= 1
        others = density.masked_fill(certain, 0)
        share = (k - certain.sum(1, keepdim=True)) / others.sum(1, keepdim=True).clamp(min=1e-300)
        inclusion = torch.where(certain, 1.0, others * share)
        if (inclusion <= 1).all():
            break
    inclusion = torch.where(num_steps <= k, taken.double(), inclusion)  # (B, T)

    row = torch.randperm(B, generator=generator)[:, None]  # (B, 1)
    x = (row + torch.rand(B, 1, generator=generator, dtype=torch.float64)) / B
    steps = torch.searchsorted(inclusion.cumsum(1), torch.arange(k) + x, right=True)  # (B, k), rising along each row
    steps = steps.clamp(max=(num_steps - 1).clamp(min=0))
    weights = torch.where(torch.arange(k) < num_steps, 1 / inclusion.gather(1, steps), 0)
    return steps.to(device), weights.to(device, torch.float32 if device.type == "mps" else torch.float64)


def step_logps(
    model, rollout: Rollout, rows: Tensor, steps: Tensor, *, mask_id: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p(o_j | q, s_t) of the tokens that step t filled in, under the model as it is: a pass for each (row, step).

    rows (N,), steps (N,) int64: N >= 1 pairs. Returns logp (N, C), 0 outside the revealed positions, differentiable;
    and revealed (N, C) bool. The temperature, and the truncation the rollout recorded, are those of the sampler:
    the ratio of two policies means nothing otherwise.
    """
    P = int(rollout.prompt_mask[rows].sum(1).max())  # these rows' longest prompt: what is left of it is all padding
    left = rollout.prompt.shape[1] - P
    prompt, prompt_mask = rollout.prompt[rows, left:], rollout.prompt_mask[rows, left:]
    when, completion, t = rollout.step[rows], rollout.completion[rows], steps[:, None]
    revealed = when == t  # (N, C)
    state = torch.where((when >= 0) & (when < t), completion, mask_id)  # s_t: what earlier steps filled in, else masks

    # Positions to look at: n = the most that any of these steps filled in; where a step filled in fewer, others pad.
    n = int(revealed.sum(1).max())
    where = revealed.int().argsort(dim=1, descending=True, stable=True)[:, :n]  # (N, n)
    attention = None if bool(prompt_mask.all()) else torch.cat([prompt_mask, prompt_mask.new_ones(state.shape)], 1)
    logits = logits_at(model, torch.cat([prompt, state], 1), attention, P + where, merge=True)  # (N, n, V)

    token = completion.gather(1, where)[..., None]  # (N, n, 1)
    if rollout.kept is None:
        logps = policy_logps(logits, mask_id, temperature).gather(-1, token).squeeze(-1)  # (N, n)
    else:
        kept = rollout.kept[rows[:, None], where]  # (N, n, K)
        pick = (kept == token).int().argmax(-1, keepdim=True)
        logps = policy_logps(logits, mask_id, temperature, kept).gather(-1, pick).squeeze(-1)
    logps = logps.masked_fill(~revealed.gather(1, where), 0)
    return torch.zeros(revealed.shape, dtype=logps.dtype, device=logps.device).scatter(1, where, logps), revealed


def surprise(rollout: Rollout) -> Tensor:
    """1 - p(token), summed over the tokens that each step filled in: (B, T), from what the sampler recorded.

    The gradient of log p(token) with respect to the logits (over the temperature) is onehot(token) - p, whose length is
    1 - p(token) up to a factor of at most sqrt(2): tokens that the policy was sure of have next to nothing to teach.
    """
    doubt = (1 - rollout.logp.exp()).clamp(min=0) * (rollout.step >= 0)
    return torch.zeros_like(rollout.entropy).scatter_add(1, rollout.step.clamp(min=0), doubt)


def defensive_proposal(score: Tensor, num_steps: Tensor, uniform_share: float = 0.1) -> Tensor:
    """Draw timesteps more often where more can be learnt: (1 - share) x score + share x uniform, each row summing to 1.

    score (B, T) nonnegative: `surprise`, or Rollout.entropy; num_steps (B,). Returns (B, T) float64 on the CPU, where
    timesteps are drawn. The uniform share keeps every weight at most 1 / share times its uniform value, so that no rare
    step can blow up the gradient.
    """
    T = score.shape[1]
    score, length = score.cpu().double(), num_steps.cpu().clamp(min=1)[:, None]
    uniform = (torch.arange(T) < length) / length  # (B, T)
    total = score.sum(1, keepdim=True)
    return torch.where(total > 0, (1 - uniform_share) * score / total + uniform_share * uniform, uniform)


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


def one_step_view(
    model,
    rollout: Rollout,
    *,
    mask_id: int,
    temperature: float,
    on_policy: bool,
    prompt_masking: float = 0.15,
    micro_batch: int = 64,
    generator: torch.Generator | None = None,
) -> Rollout:
    """diffu-GRPO's estimator (d1, arXiv 2504.12216), to compare with: as if one step had filled in everything.

    Every completion token is masked, and each prompt token with probability prompt_masking, anew at each call; one pass
    then gives all log-probabilities. Only the tokens of step 0 were sampled in such a state (and with all of the prompt
    in sight), so the gradient is biased. To be given to `policy_gradient` in place of the rollout: it looks like one
    whose rows took one step. Its logp is the model's now, before any update (with on_policy=True the sampler's: the
    first update takes the ratio as 1); nothing is truncated. Divided by its one step, its gradient is about T times as
    long as AGRPO's: AdamW does not mind, clipping the norm does. generator: on the CPU.
    """
    hidden = (torch.rand(rollout.prompt.shape, generator=generator) < prompt_masking).to(rollout.prompt.device)
    prompt = rollout.prompt.masked_fill(hidden & rollout.prompt_mask, mask_id)
    step, num_steps = rollout.step.clamp(max=0), rollout.num_steps.clamp(max=1)
    view = replace(rollout, prompt=prompt, step=step, num_steps=num_steps, kept=None)
    if on_policy:
        return view
    with torch.no_grad():
        parts = torch.arange(len(prompt), device=prompt.device).split(micro_batch)
        logps = [step_logps(model, view, r, 0 * r, mask_id=mask_id, temperature=temperature)[0] for r in parts]
    return replace(view, logp=torch.cat(logps))


# ======================================================================================================================
# 3. Objective: clipped, relative to the group
#
#        min( rho A, clip(rho, 1 - eps, 1 + eps) A ) - beta KL,  A = r - mean(r) over the group
# ======================================================================================================================


def group_advantages(rewards: Tensor, group_size: int, scale_by_std: bool = False) -> Tensor:
    """A_i = r_i - mean(r) over the row's group (GRPO, arXiv 2402.03300).

    rewards (B,), groups side by side; returns (B,). The row's own reward is in the mean, which scales the expected
    gradient by exactly 1 - 1/G. Dividing by the group's standard deviation is GRPO's habit; it biases the gradient
    towards easy and hard prompts (Dr. GRPO, arXiv 2503.20783), so it is off unless asked for.
    Raises ValueError where B is not a multiple of group_size.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not split into groups of {group_size}")
    groups = _wide(rewards).view(-1, group_size)  # (B / G, G); whole numbers become float32
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

    The tokens come from the old policy; rho = exp(logp - old_logp) corrects for that, in the gradient too
    (DeepSeek-V3.2, arXiv 2512.02556), token by token given its state; that theta also changes which states are visited
    is left out. Never negative, 0 where the policies agree. Elementwise.
    """
    d = ref_logp - logp
    return (logp - old_logp).exp() * (d.exp() - d - 1)


# ======================================================================================================================
# 4. Update: the amortized policy gradient
#
#        grad J,  J = mean over rows of 1 / T_i x [ the objective, summed over tokens, estimated from k of T_i steps ]
# ======================================================================================================================


PER_TOKEN = ("clipfrac", "approx_kl", "ratio", "sampler_gap", "kl")  # figures that are means over tokens


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
                  (1 - 1/G) / T, on the first update on rollouts of random order, with beta 0 and advantages not scaled.
                  Where no row ends early the two are one.
    advantage (B,). on_policy: the model is still the one that sampled, so rho is 1 whatever rounding the sampler saw.
    ref_model: the reference for beta > 0. No pass is made for a row without advantage (unless beta > 0); at most
    micro_batch (row, step) pairs are in memory at once. Returns loss, counts, and plain means over the tokens looked at.
    """
    B, T = rollout.entropy.shape
    k = min(k, int(rollout.num_steps.max()))  # there are no more steps than that to learn from
    learns = (rollout.num_steps > 0) & ((advantage != 0) | (beta > 0))
    rows = learns.nonzero().squeeze(1)
    names = ("loss", "tokens", *PER_TOKEN)
    sums = dict.fromkeys(names, torch.zeros((), device=advantage.device))
    saved = {"passes_saved_no_advantage": int(rollout.num_steps.clamp(max=k)[~learns].sum())}
    if len(rows) == 0:
        return dict.fromkeys(names, 0.0) | saved | {"passes": 0, "passes_saved_short": 0}
    steps, weights = draw_timesteps(
        rollout.num_steps[rows], k, None if proposal is None else proposal[rows.cpu()], generator
    )
    i, j = weights.nonzero(as_tuple=True)  # one flat list of (row, step) pairs
    saved |= {"passes": len(i), "passes_saved_short": k * len(rows) - len(i)}
    rows, steps, weights = rows[i], steps[i, j], weights[i, j]
    # By prompt length, so that little is padding; then by step, so that equal states (step 0 of a group) share a pass.
    order = (rollout.prompt_mask[rows].sum(1) * T + steps).argsort(stable=True)
    rows, steps, weights = rows[order], steps[order], weights[order]
    length = rollout.num_steps[rows] if length_norm == "sequence" else T
    weights = (weights / (B * length)).to(rollout.logp.dtype)

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
            change, A = (logp - old_logp)[revealed], advantage[r, None].expand_as(logp)[revealed]
            ratio = change.exp()
            seen = {
                "loss": loss,
                "tokens": revealed.sum(),
                "clipfrac": ((ratio < 1 - eps_low) & (A < 0) | (ratio > 1 + eps_high) & (A > 0)).sum(),
                "approx_kl": (ratio - 1 - change).sum(),
                "ratio": ratio.sum(),
                "sampler_gap": (logp - rollout.logp[r])[revealed].abs().sum(),
                "kl": kl[revealed].sum() if beta > 0 else 0,
            }
            sums = {name: sums[name] + value for name, value in seen.items()}
    figures = {name: float(value) for name, value in sums.items()}
    return figures | {name: figures[name] / figures["tokens"] for name in PER_TOKEN} | saved


# ======================================================================================================================
# 5. Training loop: the paper's algorithm, from rollouts to AdamW
# ======================================================================================================================


def train(model, tokenizer, mask_id: int, task: "Task", examples, held_out, args: "Settings", ref_model=None) -> bool:
    """Rollouts, rewards, advantages, timesteps, gradient, AdamW step; repeat. Returns whether it reached the end.

    examples, held_out: lists of the task's examples, to train on and to measure on every --eval_every updates. Goes on
    from the newest checkpoint in args.output_dir, if there is one. Every random choice is seeded by (seed, what it is
    for, update), so a run that was stopped and resumed is the run that was not. Writes metrics.jsonl (a line an
    update), completions.jsonl (samples) and checkpoint-N. Ctrl-C or SIGTERM: finish the update, save, return False.
    Under torchrun each process rolls out its share of the prompts, and gradients are averaged.
    Raises FloatingPointError where one update after another has no finite log-probabilities or gradient.
    """
    run, chat = Path(args.output_dir), tokenizer.chat_template is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = args.adam_beta1, args.adam_beta2
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=betas, weight_decay=args.weight_decay)
    model.train(args.gradient_checkpointing)  # for its checkpointing hooks alone: there is no dropout
    start, stop, report = restore_training_state(run, optimizer), stop_after_this_update(), reporter(args)
    finished, skipped, forward_passes = start >= args.max_steps, 0, pass_counter(model)
    progress = tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, desc="AGRPO", disable=rank() > 0)
    for update in progress:
        lap = stopwatch(model.device)
        forward_passes()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(update, args)

        # Rollouts: group_size completions of each prompt, side by side.
        batch, texts, rollout = roll_out(model, tokenizer, mask_id, task, examples, update, args)
        sane = not any_rank(not rollout.logp.isfinite().all())  # a broken model's rewards are equal, its gradient 0
        seconds_rollout, rollout_forward_passes = lap(), forward_passes()

        # Rewards and advantages.
        grades = [task.grade(example, text, chat) for example, text in zip(batch, texts)]
        rewards = torch.tensor([reward for reward, _ in grades], dtype=torch.float32).to(model.device)
        advantage = group_advantages(rewards, args.group_size, args.scale_by_std)
        seconds_reward = lap()

        # Timesteps: drawn more often where more can be learnt. (diffu-GRPO has but one, masked anew for each update.)
        proposal, views = None, [rollout] * args.updates_per_rollout
        policy = {"mask_id": mask_id, "temperature": args.temperature, "micro_batch": args.micro_batch}
        if args.method == "diffu_grpo":
            for again in range(len(views)):
                rng = seeded_generator("cpu", args.seed, "prompt masks", update, again, rank())
                with autocast(model, args):
                    views[again] = one_step_view(model, rollout, on_policy=again == 0, generator=rng, **policy)
        elif args.timestep_proposal != "uniform":
            score = surprise(rollout) if args.timestep_proposal == "surprise" else rollout.entropy
            proposal = defensive_proposal(score, rollout.num_steps, args.uniform_share)

        # Updates: the first on the policy that sampled, the rest off it; that is what the clipping is for.
        objective = {name: getattr(args, name) for name in ("k", "length_norm", "eps_low", "eps_high", "beta")}
        one_step_passes = forward_passes()
        passes, skipped_of_these = Counter(passes=one_step_passes), 0
        for again, view in enumerate(views):
            optimizer.zero_grad()
            rng = seeded_generator("cpu", args.seed, "timesteps", update, again, rank())
            drawing = {"on_policy": again == 0, "proposal": proposal, "ref_model": ref_model, "generator": rng}
            with autocast(model, args):
                figures = policy_gradient(model, view, advantage, **drawing, **policy, **objective)
            passes.update({name: value for name, value in figures.items() if "passes" in name})
            average_gradients(model)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm))
            if sane and math.isfinite(grad_norm):  # one bad batch must not spoil the weights
                optimizer.step()
                skipped = 0
            else:
                skipped += 1
                skipped_of_these += 1
        seconds_update, update_forward_passes = lap(), one_step_passes + forward_passes()

        groups, tokens = rewards.view(-1, args.group_size), float((rollout.step >= 0).sum())
        metrics = {
            "reward": float(rewards.mean()),
            "reward_std": float(groups.std(1).mean()),
            "accuracy": sum(correct for _, correct in grades) / len(grades),
            "frac_reward_zero_std": float((groups == groups[:, :1]).all(1).float().mean()),
            "completion_length": tokens / len(batch),
            "entropy": float(rollout.entropy.sum() / tokens),
            **figures,  # of the last update on this rollout
            **passes,
            "forward_passes": update_forward_passes,
            "rollout_passes": int(rollout.num_steps.sum()),
            "rollout_passes_saved_ended": int((args.steps - rollout.num_steps).sum()),
            "rollout_forward_passes": rollout_forward_passes,
            "grad_norm": grad_norm,
            "skipped": skipped_of_these,
            "skipped_in_a_row": skipped,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "seconds_rollout": seconds_rollout,
            "seconds_reward": seconds_reward,
            "seconds_update": seconds_update,
            "rollout_tokens_per_second": tokens / seconds_rollout,
            "update_pairs_per_second": passes["passes"] / seconds_update,
            "peak_memory_gib": peak_memory_gib(model.device),
        }
        metrics = average_over_ranks(metrics)
        if args.eval_every and (update + 1) % args.eval_every == 0:
            metrics["eval_accuracy"] = evaluate(
                model, tokenizer, mask_id, task, held_out, args, args.eval_steps[0], greedy=True
            )
        report({"update": update + 1} | metrics)
        shown = "reward {reward:.2f} accuracy {accuracy:.2f} clipfrac {clipfrac:.3f} |grad| {grad_norm:.2f}"
        with contextlib.suppress(BrokenPipeError):
            progress.set_postfix_str(shown.format(**metrics) + f" SKIPPED {skipped}" * (skipped > 0))
        if args.show_every and (update + 1) % args.show_every == 0 and rank() == 0:
            n = random.Random(f"{args.seed} show {update}").randrange(len(batch))
            shown = {"update": update + 1, "prompt": task.prompt(batch[n], tokenizer), "completion": texts[n]}
            append_line(run / "completions.jsonl", shown | {"reward": float(rewards[n])})
            with contextlib.suppress(BrokenPipeError):
                progress.write(f"\nupdate {update + 1}, reward {rewards[n]:g}\n{task.show(batch[n], texts[n], chat)}\n")

        if skipped >= 5:
            raise FloatingPointError(
                f"{skipped} updates in a row, up to update {update + 1}, had no finite log-probabilities or gradient and were skipped; "
                f"{last_checkpoint(run)}. Most likely --learning_rate {args.learning_rate:g} is too high, or --beta or "
                "--updates_per_rollout lets the ratio overflow: start again with less"
            )
        finished, stopping = update + 1 == args.max_steps, any_rank(bool(stop))
        if stopping or finished or ((update + 1) % args.save_every == 0 and not skipped):
            save_training_state(run, update + 1, model, tokenizer, optimizer, args.keep_checkpoints)
        if stopping:
            break
    progress.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    model.eval()
    return finished


def roll_out(model, tokenizer, mask_id: int, task: "Task", examples: list, update: int, args: "Settings"):
    """This process's rollouts of one update: (example of each row, completion of each row, Rollout).

    They are made --rollout_batch at a time, each batch with a generator of its own, so that they come out the same
    however many processes share them.
    """
    batch, texts, rollouts = [], [], []
    drawn, size = draw_examples(examples, update, args), args.rollout_batch // args.group_size
    for c in range(rank(), len(drawn) // size, world_size()):
        part = [example for example in drawn[c * size : (c + 1) * size] for _ in range(args.group_size)]
        prompts = [task.prompt(example, tokenizer) for example in part]
        rng = seeded_generator(model.device, args.seed, "rollout", update, c)
        with autocast(model, args):
            rollout, written = complete(model, tokenizer, mask_id, prompts, rng, **args.sampling())
        batch, texts, rollouts = batch + part, texts + written, rollouts + [rollout]
    return batch, texts, concatenate(rollouts)


def complete(model, tokenizer, mask_id: int, prompts: list[str], rng, **sampling) -> tuple[Rollout, list[str]]:
    """One completion for each prompt: the rollout, and its texts up to the first EOS. sampling: arguments of `sample`.

    Tokens after that EOS are no part of the text, so of the reward; they were sampled, so they are trained on.
    """
    encoded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    prompt, prompt_mask = encoded["input_ids"].to(model.device), encoded["attention_mask"].bool().to(model.device)
    eos_id = tokenizer.eos_token_id
    rollout = sample(model, prompt, prompt_mask, mask_id=mask_id, eos_id=eos_id, generator=rng, **sampling)
    written = [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in rollout.completion.tolist()]
    return rollout, tokenizer.batch_decode(written, skip_special_tokens=True)


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """One rollout of all rows: the shorter prompts are padded on the left."""
    P = max(rollout.prompt.shape[1] for rollout in rollouts)
    columns = {}
    for name in (f.name for f in fields(Rollout)):
        parts = [getattr(rollout, name) for rollout in rollouts]
        if name in ("prompt", "prompt_mask"):
            parts = [torch.nn.functional.pad(part, (P - part.shape[1], 0)) for part in parts]
        columns[name] = None if parts[0] is None else torch.cat(parts)
    return Rollout(**columns)


def evaluate(
    model, tokenizer, mask_id: int, task: "Task", examples: list, args: "Settings", steps: int, greedy: bool
) -> float:
    """Share of examples answered rightly, each completed once in so many steps; processes share the work."""
    chat, right, sampling = tokenizer.chat_template is not None, 0, args.eval_sampling(steps, greedy)
    for start in range(rank() * args.eval_batch, len(examples), world_size() * args.eval_batch):
        part = examples[start : start + args.eval_batch]
        prompts = [task.prompt(example, tokenizer) for example in part]
        rng = seeded_generator(model.device, 0, "evaluation", start)
        with autocast(model, args):
            _, texts = complete(model, tokenizer, mask_id, prompts, rng, **sampling)
        right += sum(task.correct(example, text, chat) for example, text in zip(part, texts))
    return sum_over_ranks([right])[0] / len(examples)


def seeded_generator(device, *key) -> torch.Generator:
    """A random generator of its own for each purpose: key says which, so nothing random has a state to be saved."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(60))


def draw_examples(examples: list[dict], update: int, args: "Settings") -> list[dict]:
    """The prompts of one update: every example comes once an epoch, in an order of that epoch's own."""
    N, first = len(examples), update * args.prompts_per_update
    places = range(first, first + args.prompts_per_update)  # counted from the start of the run
    order = {e: random.Random(f"{args.seed} epoch {e}").sample(examples, N) for e in {place // N for place in places}}
    return [order[place // N][place % N] for place in places]


def learning_rate_at(update: int, args: "Settings") -> float:
    """Linear warm-up over the first warmup_ratio of the updates; constant, or half a cosine towards 0."""
    warm = min(1.0, (update + 1) / max(1, round(args.warmup_ratio * args.max_steps)))
    cosine = (1 + math.cos(math.pi * update / args.max_steps)) / 2
    return args.learning_rate * warm * (cosine if args.lr_schedule == "cosine" else 1.0)


def autocast(model, args: "Settings"):
    """bfloat16 matrix products over float32 weights: for --bf16 where all weights are trained, so must stay float32."""
    on = args.bf16 and model.device.type == "cuda" and model.dtype == torch.float32
    return torch.autocast("cuda", torch.bfloat16) if on else contextlib.nullcontext()


def stopwatch(device: torch.device) -> Callable[[], float]:
    """A function that returns the seconds since it was last called, what the GPU was still doing included."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before, last = last, time.perf_counter()
        return last - before

    return lap


def pass_counter(model) -> Callable[[], int]:
    """A function that returns how many sequences have gone forward through the model since it was last called."""
    sizes: list[int] = []
    model.base_model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output[0])))

    def count() -> int:
        total = sum(sizes)
        sizes.clear()
        return total

    return count


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: on the GPU by tensors, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# Several processes (torchrun). Alone, each of these does nothing.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: list[float]) -> list[float]:
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def any_rank(flag: bool) -> bool:
    return sum_over_ranks([float(flag)])[0] > 0


def wait_for_all_ranks() -> None:
    any_rank(False)


def average_over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Means over processes; what is a mean over tokens looked at is weighted by them, and counts are added up."""
    if world_size() == 1:
        return metrics
    weighted = {name: value * (metrics["tokens"] if name in PER_TOKEN else 1) for name, value in metrics.items()}
    total = dict(zip(metrics, sum_over_ranks(list(weighted.values()))))
    for name in metrics:
        if name in PER_TOKEN:
            total[name] /= max(1, total["tokens"])
        elif name != "tokens" and "passes" not in name and "per_second" not in name:
            total[name] /= world_size()
    return total


def average_gradients(model) -> None:
    """Mean of the gradients over processes. One without any row to learn from takes part with zeros; if that goes for
    all of them there is no gradient, as in a single process."""
    if world_size() == 1 or not any_rank(any(p.grad is not None for p in model.parameters())):
        return
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad /= world_size()


# Interrupted and resumed runs.


def stop_after_this_update() -> list:
    """A list that is empty until Ctrl-C or SIGTERM. The second one raises KeyboardInterrupt as usual."""
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        with contextlib.suppress(BrokenPipeError):  # `| tee` has ended by the same Ctrl-C
            tqdm.write("Stopping: finishing this update and saving. (Once more to stop at once.)")

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return asked


def save_training_state(run: Path, update: int, model, tokenizer, optimizer, keep: int) -> None:
    """Write run/checkpoint-N: the model, and the optimizer for a resumed run. All of it or nothing: it is written aside
    and renamed when whole; then all but the newest `keep` are removed."""
    if rank() == 0:
        for unfinished in run.glob("checkpoint-*.part"):  # of a killed run
            shutil.rmtree(unfinished)
        aside = run / f"checkpoint-{update}.part"
        save_model(model, tokenizer, aside)
        state = optimizer.state_dict()["state"]
        tensors = {f"{i}.{name}": tensor for i, entry in state.items() for name, tensor in entry.items()}
        save_file(tensors, aside / "optimizer.safetensors")
        shutil.rmtree(run / f"checkpoint-{update}", ignore_errors=True)
        aside.rename(run / f"checkpoint-{update}")
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    wait_for_all_ranks()


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(run: Path) -> str:
    found = checkpoints(run)
    return f"the last whole checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def restore_training_state(run: Path, optimizer) -> int:
    """Load the optimizer from the newest checkpoint and cut the logs back to it; returns the updates made so far."""
    done, saved = 0, checkpoints(run)
    if saved:
        done, state = int(saved[-1].name.split("-")[1]), {}
        file, parameters = saved[-1] / "optimizer.safetensors", optimizer.param_groups[0]["params"]
        tensors = read_tensors(file)
        shapes = {f"{i}.{name}": p.shape for i, p in enumerate(parameters) for name in ("exp_avg", "exp_avg_sq")}
        shapes |= {f"{i}.step": torch.Size([]) for i in range(len(parameters))}
        if len(tensors) % 3 or any(shapes.get(key) != tensor.shape for key, tensor in tensors.items()):
            raise BadInput(f"{file} is not of this model; remove its folder to go back one checkpoint")
        for key, tensor in tensors.items():
            i, name = key.split(".")
            state.setdefault(int(i), {})[name] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for log in (run / "metrics.jsonl", run / "completions.jsonl"):
        if log.exists() and rank() == 0:
            kept = []
            for line in log.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a killed run may leave half a line
                    if json.loads(line)["update"] <= done:
                        kept.append(line + "\n")
            write_whole(log, "".join(kept))
    return done


class BadInput(ValueError):
    """What was given cannot work: the message says why and what to do, and is all that the scripts print."""


@contextlib.contextmanager
def refused_as(what: str):
    """Whatever a library raises over a file that is damaged or made up becomes one sentence that begins with `what`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001 - which exception it is depends on the library and on the damage
        first_line = (str(error).splitlines() or [""])[0]
        raise BadInput(f"{what} ({type(error).__name__}: {first_line:.300})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    with refused_as(f"{path} is missing or damaged; remove its folder to go back one checkpoint"):
        return load_file(path)


def read_json(path: Path) -> dict:
    with refused_as(f"{path} is not readable as a JSON object"):
        return {**json.loads(path.read_text(encoding="utf-8"))}


def write_whole(path: Path, text: str) -> None:
    """All of a file or nothing, whenever the process is killed."""
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").replace(path)


def append_line(path: Path, record: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def reporter(args: "Settings") -> Callable[[dict], None]:
    """A function that writes one update's metrics to metrics.jsonl and wherever --report_to says; rank 0 only."""
    if rank() > 0:
        return lambda metrics: None
    run, also = Path(args.output_dir), lambda metrics: None
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run)
        also = lambda metrics: [writer.add_scalar(name, value, metrics["update"]) for name, value in metrics.items()]
    if args.report_to == "wandb":
        import wandb

        wandb.init(project="agrpo", name=run.name, dir=run, config=asdict(args))
        also = lambda metrics: wandb.log(metrics, step=metrics["update"])

    def report(metrics: dict) -> None:
        append_line(run / "metrics.jsonl", metrics)
        also(metrics)

    return report


# ======================================================================================================================
# 6. Tasks: examples, prompts, rewards
# ======================================================================================================================


@dataclass(frozen=True)
class Task:
    """What to train on. An example is a dict; what is in it is between the functions of one task.

    A model with a chat template is asked `question` and must write <reasoning>...</reasoning><answer>...</answer>; one
    without (the tiny model) is shown `plain`, where there is one, and its whole completion is the answer.
    """

    examples: Callable[[str, "Settings"], list[dict]]  # ("train" or "test", settings) -> examples
    question: Callable[[dict], str]
    is_right: Callable[[dict, str], bool]  # (example, answer) -> whether it is right
    plain: Callable[[dict], str] | None = None
    credit: Callable[[dict, str], float] = lambda example, answer: 0.0  # for a wrong answer too, from 0 to 1
    picture: Callable[[dict, str], str] | None = None  # (example, answer) -> how a person would look at it

    def prompt(self, example: dict, tokenizer) -> str:
        if tokenizer.chat_template is None:
            return (self.plain or self.question)(example)
        messages = [{"role": "user", "content": self.question(example)}]
        with refused_as("the tokenizer's chat template does not work"):
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def answer(self, completion: str, chat: bool) -> str | None:
        """What the completion gives as its answer: all of it, or what is inside its <answer> tags; None unless there is
        exactly one pair of them."""
        if not chat and self.plain:
            return completion.strip()
        return inside_tags(completion, "answer")

    def grade(self, example: dict, completion: str, chat: bool) -> tuple[float, bool]:
        """(reward, what training maximises; correct, what accuracy counts: the answer is right).

        The reward is 3 for a right answer, partial credit, and 0.5 for each of the two pairs of tags, as in the
        official release; where the whole completion is the answer, 1 for a right one, and partial credit: 2 for a
        Sudoku solved.
        """
        answer = self.answer(completion, chat)
        right = answer is not None and self.is_right(example, answer)
        credit = self.credit(example, answer) if answer is not None else 0.0
        if self.plain and not chat:
            return right + credit, right
        return 3 * right + credit + 0.5 * sum(inside_tags(completion, tag) is not None for tag in TAGS), right

    def reward(self, example: dict, completion: str, chat: bool) -> float:
        return self.grade(example, completion, chat)[0]

    def correct(self, example: dict, completion: str, chat: bool) -> bool:
        return self.grade(example, completion, chat)[1]

    def show(self, example: dict, completion: str, chat: bool) -> str:
        verdict = "right" if self.correct(example, completion, chat) else "wrong"
        if not chat and self.plain and self.picture:
            return self.picture(example, completion) + "\n    " + verdict
        return completion + "\n" + verdict


def inside_tags(text: str, tag: str) -> str | None:
    """What stands between <tag> and </tag>; None unless each occurs exactly once, in this order."""
    if re.findall(f"</?{tag}>", text) != [f"<{tag}>", f"</{tag}>"]:
        return None
    return text.split(f"<{tag}>")[1].split(f"</{tag}>")[0].strip()


TAGS = ("reasoning", "answer")
FORMAT = "Think first, inside <reasoning> and </reasoning>. Then write the answer inside <answer> and </answer>"


def read_rows(path: str, split: str, columns: tuple[str, ...]) -> list[dict]:
    """Rows of a local data set, as dicts of strings: a .jsonl, .json, .csv or .parquet file, or a folder of train.* and
    test.* (or train-00000-of-00001.*, as on the hub).

    Raises BadInput that names file and row where something is missing, empty or not text: nothing is skipped.
    """
    files = [Path(path)]
    if files[0].is_dir():
        files = sorted(f for f in files[0].iterdir() if f.stem.split("-")[0] == split and f.suffix in DATA_FILES)
        if not files or len({f.suffix for f in files}) > 1:
            raise BadInput(f"--data {path}: this folder should hold one {split}.jsonl, .json, .csv or .parquet")
    elif not files[0].is_file():
        raise BadInput(f"--data {path}: no such file or folder")
    elif split == "train":
        raise BadInput(
            f"--data {path}: give a folder of train.* and test.*, or it would be tested on what it was taught"
        )
    elif files[0].suffix not in DATA_FILES:
        raise BadInput(f"--data {path}: give a .jsonl, .json, .csv or .parquet file, or a folder of them")
    rows = []
    for file in files:
        try:
            table = read_table(file)
        except (ValueError, OSError, csv.Error, RecursionError) as error:
            raise BadInput(f"--data {file}: not readable as {file.suffix} in UTF-8: {error}") from None
        for number, row in enumerate(table, start=1):
            where, row = f"--data {file}, row {number}", row if isinstance(row, dict) else {}
            if None in row:
                raise BadInput(f"{where}: more values than columns: {row[None]}")
            missing = [name for name in columns if name not in row]
            if missing:
                raise BadInput(f"{where}: no {' and no '.join(missing)}; it has {', '.join(row) or 'no columns'}")
            for name in columns:
                text = str(row[name]).strip()
                if type(row[name]) not in (str, int, float) or text in ("", "nan", "inf", "-inf"):
                    raise BadInput(f"{where}: {name} is empty or not text: {row[name]!r:.50}")
                if re.search("[\ud800-\udfff]", text):
                    raise BadInput(f"{where}: {name} holds half a character: {row[name]!r:.50}")
            rows.append({name: str(row[name]) for name in columns})
    if not rows:
        raise BadInput(f"--data {path}: no rows in it")
    return rows


DATA_FILES = (".jsonl", ".json", ".csv", ".parquet")


def read_table(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        import datasets

        datasets.disable_progress_bars()
        try:
            return datasets.Dataset.from_parquet(str(file)).to_list()
        except Exception as error:  # noqa: BLE001 - the errors of datasets and pyarrow have no ancestor of their own
            raise ValueError(str(error)) from None
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".csv":  # all as text: read as numbers, a Sudoku would lose its leading zeros
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if len(set(table.fieldnames or ())) < len(table.fieldnames or ()):
            raise ValueError(f"a column stands twice in {', '.join(table.fieldnames)}")
        return list(table)
    if file.suffix == ".json":
        rows = json.loads(text)
        return rows if isinstance(rows, list) else [rows]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


# --- sudoku


# A 4x4 Sudoku is written as its 16 cells, row by row, 0 for a blank. Its units: 4 rows, 4 columns, 4 boxes.
ROWS = [[4 * r + c for c in range(4)] for r in range(4)]
COLUMNS = [[4 * r + c for r in range(4)] for c in range(4)]
BOXES = [[8 * r + 2 * c + i for i in (0, 1, 4, 5)] for r in range(2) for c in range(2)]
UNITS = ROWS + COLUMNS + BOXES


def all_grids() -> list[str]:
    """All 288 4x4 grids, always in the same order."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    bands = [a + b for a, b in itertools.product(rows, rows) if set(a[:2] + b[:2]) == set(a[2:] + b[2:]) == set("1234")]
    return [a + b for a, b in itertools.product(bands, bands) if sudoku_right({"puzzle": "0" * 16}, a + b)]


def sudoku_examples(split: str, args: "Settings") -> list[dict]:
    """Puzzles of 10 to 14 blanks; most have several solutions, and any of them is right.

    240 of the 288 grids are for training (64 puzzles each, drawn with the seed) and 48 for testing (8 puzzles each,
    the same for every seed). With --data, the test puzzles are the file's (columns Puzzle and Solution).
    """
    if split == "test" and args.data:
        rows = read_rows(args.data, split, ("Puzzle", "Solution"))
        puzzles = [{"puzzle": row["Puzzle"], "solution": row["Solution"]} for row in rows]
        for number, example in enumerate(puzzles, start=1):
            puzzle, solution = example.values()
            if not re.fullmatch("[0-4]{16}", puzzle) or not sudoku_right(example, solution):
                why = "Puzzle must be 16 digits 0 to 4 (leading zeros included) and Solution a full grid that fits it"
                raise BadInput(f"--data {args.data}, row {number}: {why}, not {puzzle!r} and {solution!r}")
        return puzzles
    grids = random.Random("grids").sample(all_grids(), 288)
    rng = random.Random(f"{args.seed} puzzles" if split == "train" else "test puzzles")
    puzzles = []
    for grid in grids[:240] * 64 if split == "train" else grids[240:] * 8:
        blank = rng.sample(range(16), rng.randint(10, 14))
        puzzles.append({"puzzle": "".join("0" if i in blank else grid[i] for i in range(16)), "solution": grid})
    return puzzles


def sudoku_question(example: dict) -> str:
    rows = "\n".join(example["puzzle"][i : i + 4] for i in range(0, 16, 4))
    return (
        "Fill in this 4x4 Sudoku: every row, every column and every 2x2 box holds 1, 2, 3 and 4 once; 0 is a blank.\n\n"
        f"{rows}\n\n{FORMAT}: the 16 digits, row by row. For example, 1000 0010 0300 0003 is solved by "
        "<answer>1234341223414123</answer>."
    )


def sudoku_right(example: dict, answer: str) -> bool:
    """Whether the answer is a full grid that keeps every clue of the puzzle."""
    return sudoku_credit(example, answer) == 1


def sudoku_credit(example: dict, answer: str) -> float:
    """The share of rows, columns and boxes that hold 1 to 4 once; 0 if it is not 16 cells that keep the clues."""
    cells = "".join(answer.split()) if len(answer) <= 100 else ""
    if len(cells) != 16 or not all(clue in ("0", cell) for clue, cell in zip(example["puzzle"], cells)):
        return 0.0
    return sum({cells[i] for i in unit} == set("1234") for unit in UNITS) / len(UNITS)


def sudoku_picture(example: dict, answer: str) -> str:
    """Puzzle and answer side by side, as grids."""
    puzzle, cells = example["puzzle"].replace("0", "."), answer.ljust(16)
    return "\n".join(
        "    " + " ".join(puzzle[i] for i in row) + "   " + " ".join(cells[i] for i in row) for row in ROWS
    )


# --- countdown


def countdown_examples(split: str, args: "Settings") -> list[dict]:
    """Three numbers and a target that they make, each used once. From the seed (the test problems always the same), or,
    for testing, from --data: columns input ("30,100,93") and output ("23")."""
    if split == "test" and args.data:
        problems = []
        for number, row in enumerate(read_rows(args.data, split, ("input", "output")), start=1):
            good = re.fullmatch("[0-9]{1,6}(,[0-9]{1,6})+", row["input"]) and re.fullmatch("[0-9]{1,9}", row["output"])
            if not good:
                raise BadInput(f'--data {args.data}, row {number}: wanted input like "30,100,93" and output like "23"')
            problems.append({"numbers": [int(n) for n in row["input"].split(",")], "target": int(row["output"])})
        return problems
    rng, problems = random.Random(f"{args.seed} countdown" if split == "train" else "countdown test"), []
    while len(problems) < (4096 if split == "train" else 256):
        a, b, c = (rng.randint(1, 99) for _ in range(3))
        first, second = rng.choice("+-*/"), rng.choice("+-*/")
        target = arithmetic(rng.choice([f"({a}{first}{b}){second}{c}", f"{a}{first}({b}{second}{c})"]))
        if target is not None and target.denominator == 1 and 0 < target < 1000:
            problems.append({"numbers": rng.sample([a, b, c], 3), "target": int(target)})
    return problems


def countdown_question(example: dict) -> str:
    numbers = ", ".join(map(str, example["numbers"]))
    return (
        f"Write an expression that equals {example['target']}, using each of the numbers {numbers} exactly once, and "
        f"+, -, *, / and parentheses. {FORMAT}: the expression alone, such as <answer>(1 + 2) * 3</answer> for 9."
    )


def countdown_right(example: dict, answer: str) -> bool:
    """Whether the answer is an expression of the target from exactly the given numbers ("= target" may follow it)."""
    answer = " ".join(answer.replace("×", "*").replace("÷", "/").split())
    expression, equals, target = answer.partition("=")
    if len(answer) > 200 or equals and target.strip() != str(example["target"]):
        return False
    used = sorted(re.findall(r"\d+", expression))
    return used == sorted(map(str, example["numbers"])) and arithmetic(expression) == example["target"]


def arithmetic(expression: str) -> Fraction | None:
    """The exact value of an expression of +, -, *, / and parentheses over whole numbers; None for anything else."""
    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", expression):
        return None

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        raise ValueError("neither a number nor one of the four operations")  # ** or // or a sign

    try:
        with warnings.catch_warnings(action="ignore"):  # "3(4)" makes the parser offer advice
            return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


# --- gsm8k and math


def gsm8k_examples(split: str, args: "Settings") -> list[dict]:
    """Grade-school word problems (arXiv 2110.14168) from the hub, or from --data: columns question and answer, whose
    last line is #### and the number."""
    source = args.data or str(from_hub("openai/gsm8k", "dataset", ["main/*.parquet"]) / "main")
    rows = read_rows(source, split, ("question", "answer"))
    for number, row in enumerate(rows, start=1):
        row["gold"] = row["answer"].rpartition("####")[2].strip()
        if "####" not in row["answer"] or single_number(row["gold"]) is None:
            raise BadInput(f"--data {source}, {split} row {number}: its answer does not end in #### and a number")
    return rows


def gsm8k_question(example: dict) -> str:
    return (
        f"{example['question']}\n\n{FORMAT}: the number alone, in \\boxed{{}}, such as <answer>\\boxed{{42}}</answer>."
    )


def gsm8k_right(example: dict, answer: str) -> bool:
    """Whether the answer names one number, and it is the gold one: 1,234 and $1234.00 and 1234 apples are the same."""
    number = single_number(boxed(answer) or answer)
    return number is not None and number == single_number(example["gold"])


def boxed(text: str) -> str | None:
    r"""What the only \boxed{...} of a text holds, braces matched; None where there is none, or more than one."""
    if text.count("\\boxed{") != 1:
        return None
    inside, depth = text.split("\\boxed{")[1], 1
    for i, character in enumerate(inside[:1000]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[:i]
    return None


NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
MINUS = re.compile("[\u2010-\u2013\u2212\ufe63\uff0d]")  # hyphens, en dash, minus signs
AROUND = re.compile(r"[\\$]+(?![0-9.\\$])|(?<![0-9.,\\$])[\\$]+")  # $ and \ before or after a number, never inside


def single_number(text: str) -> Fraction | None:
    """The number in a text that holds exactly one, negative if a minus stands before it with no letter between; None
    for none, several, numeric signs other than 0 to 9, or a text of over 100 characters. Words are not read: 72 thousand
    is 72."""
    if len(text) > 100 or any(c.isnumeric() and not c.isascii() for c in text):
        return None
    text = AROUND.sub("", MINUS.sub("-", text.replace("{,}", ",")))
    found = list(NUMBER.finditer(text))
    if len(found) != 1:
        return None
    value = Fraction(found[0][0].replace(",", ""))
    return -value if re.search(r"-\W*$", text[: found[0].start()]) else value


def math_examples(split: str, args: "Settings") -> list[dict]:
    """Competition MATH (arXiv 2103.03874), levels 1 to 4, to train on and MATH-500 to test on, from the hub; or --data:
    columns problem, solution (which ends in a \\boxed answer) and level."""
    math_verify()
    if args.data:
        source = args.data
    elif split == "test":
        source = str(from_hub("HuggingFaceH4/MATH-500", "dataset", ["test.jsonl"]))
    else:
        source = str(from_hub("DigitalLearningGmbH/MATH-lighteval", "dataset", ["data/*.parquet"]) / "data")
    rows = read_rows(source, split, ("problem", "solution", "level"))
    for number, row in enumerate(rows, start=1):
        row["level"] = row["level"].removeprefix("Level ")
        if "\\boxed" not in row["solution"] or row["level"] not in ("1", "2", "3", "4", "5", "?"):
            why = "solution must give its answer in \\boxed{}, and level be 1 to 5"
            raise BadInput(f"--data {source}, {split} row {number}: {why}")
    easier = [row for row in rows if row["level"] in ("1", "2", "3", "4")]
    if split == "train" and not easier:
        raise BadInput(f"--data {source}: no problem of level 1 to 4 to train on")
    return easier if split == "train" else rows


def math_question(example: dict) -> str:
    form = f"{FORMAT}: the final answer alone, in \\boxed{{}}, such as <answer>\\boxed{{42}}</answer>."
    return f"{example['problem']}\n\n{form}"


def math_right(example: dict, answer: str) -> bool:
    """Whether math-verify finds what is in \\boxed{} equal to the solution's; the text around it is not looked at."""
    inside = boxed(answer) if len(answer) <= 500 else None
    if not inside or not inside.strip():
        return False
    parse, verify = math_verify()
    try:  # a second each: 9^{9^9} must not hold up a group
        gold, found = (parse(text, parsing_timeout=1) for text in (example["solution"], f"\\boxed{{{inside}}}"))
        return bool(verify(gold, found, timeout_seconds=1))
    except Exception:  # noqa: BLE001 - whatever a parser of LaTeX does with what a model wrote, it was no right answer
        return False


def math_verify():
    try:
        from math_verify import parse, verify
    except ImportError:
        raise BadInput(
            "--task math compares answers with the package math-verify: pip install 'math-verify[antlr4_13_2]'"
        )
    return parse, verify


TASKS = {
    "sudoku": Task(
        examples=sudoku_examples,
        question=sudoku_question,
        is_right=sudoku_right,
        plain=lambda example: example["puzzle"],
        credit=sudoku_credit,
        picture=sudoku_picture,
    ),
    "countdown": Task(countdown_examples, countdown_question, countdown_right),
    "gsm8k": Task(gsm8k_examples, gsm8k_question, gsm8k_right),
    "math": Task(math_examples, math_question, math_right),
}


# ======================================================================================================================
# 7. Models
# ======================================================================================================================


def load_model(name_or_path: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
    """(model, tokenizer, mask_id), ready to sample from.

    name_or_path: "tiny" (freshly initialised; see `pretrain`), a LLaDA or Dream checkpoint (hub id or folder), or what
    this project saved: a run's folder, one of its checkpoints, a LoRA adapter. LLaDA is a Llama and Dream a Qwen2 whose
    attention is not causal, so transformers' own classes hold them and no remote code runs.
    Raises BadInput, with what to do, for anything else and for checkpoints with missing or unexpected weights.
    """
    if name_or_path == "tiny":
        tokenizer = character_tokenizer()
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=384,
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,  # the usual 0.02 is for wide models; here it takes far longer to get going
            pad_token_id=tokenizer.pad_token_id,
        )
        return BertForMaskedLM(config).to(device, dtype).eval(), tokenizer, tokenizer.mask_token_id

    folder = find_checkpoint(name_or_path, device)
    if (folder / "adapter_config.json").is_file():
        adapter = read_json(folder / "adapter_config.json")
        base, r, alpha = (adapter.get(name) for name in ("base_model_name_or_path", "r", "lora_alpha"))
        numbers = type(r) is int and 0 < r <= 4096 and type(alpha) in (int, float) and 0 < alpha <= 1e6
        if not isinstance(base, str) or not numbers:
            raise BadInput(f"{folder}: adapter_config.json does not give base_model_name_or_path, r and lora_alpha")
        if adapter.get("peft_type") != "LORA" or any(adapter.get(name) for name in NOT_PLAIN_LORA):
            raise BadInput(f"{folder}: not plain LoRA: without {', '.join(NOT_PLAIN_LORA)} it could be read")
        if (find_checkpoint(base, device) / "adapter_config.json").exists():
            raise BadInput(f"{folder}: the base model that adapter_config.json names, {base}, is an adapter itself")
        model, tokenizer, mask_id = load_model(base, device, dtype)
        add_lora(model, r, alpha)
        model.load_state_dict(lora_weights(model, read_tensors(folder / "adapter_model.safetensors")), strict=False)
        return model, tokenizer, mask_id

    raw, index = read_json(folder / "config.json"), folder / "model.safetensors.index.json"
    with refused_as(f"{index} is damaged"):
        shards = set(read_json(index)["weight_map"].values()) if index.exists() else ()
        if any(Path(file).name != file or Path(file).suffix != ".safetensors" for file in shards):
            raise BadInput(f"{index} names files that are not .safetensors in its folder")
    elsewhere = [name for name in OTHER_FILES if isinstance(tokenizer_settings(folder).get(name), (str, list))]
    if elsewhere:
        raise BadInput(f"{folder / 'tokenizer_config.json'} names files to read instead of its own: {elsewhere[0]}")
    with refused_as(f"{folder / 'config.json'} describes no model"):
        architecture, config, key_mapping = native_architecture(raw, name_or_path)
        if not 0 < config.num_hidden_layers <= 1000:
            raise BadInput(f"{name_or_path}: config.json has {config.num_hidden_layers} layers")
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in architecture(config).parameters())
    refuse_on_cpu(name_or_path, size, device)
    options = {"key_mapping": key_mapping, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    with refused_as(f"{folder}: weights missing or damaged"):
        model, loaded = architecture.from_pretrained(folder, config=config, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loaded[problem]:
            names = ", ".join(sorted(map(str, loaded[problem]))[:5])
            raise BadInput(f"{name_or_path}: {problem.replace('_', ' ')}: {names} ({len(loaded[problem])} in all)")
    tokenizer_class = Qwen2Tokenizer if raw["model_type"] == "Dream" else AutoTokenizer  # Dream's own is remote code
    with refused_as(f"{folder}: tokenizer missing or damaged"):
        tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.eos_token is None:
            raise BadInput(f"{folder}: the tokenizer names no eos_token, with which a completion ends")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer(["a"], padding=True)
        largest = max(tokenizer.get_vocab().values())
    mask_id = raw.get("mask_token_id", tokenizer.mask_token_id)
    if type(mask_id) is not int or not 0 <= mask_id < config.vocab_size or largest >= config.vocab_size:
        raise BadInput(
            f"{folder}: the model's tokens are 0 to {config.vocab_size - 1}, but the tokenizer has {largest}, and "
            f"mask_token_id is {mask_id!r:.50}"
        )
    model.raw_config = raw
    # An adapter names its base by this: of a run not the folder, whose newest checkpoint will be another one.
    model.name_or_path = str(folder.resolve()) if Path(name_or_path).exists() else name_or_path
    return model.to(device).eval(), tokenizer, mask_id


OTHER_FILES = ("fast_tokenizer_files", "vocab", "merges")


def tokenizer_settings(folder: Path) -> dict:
    file = folder / "tokenizer_config.json"
    with refused_as(f"{folder}: tokenizer missing or damaged"):
        return {**json.loads(file.read_text(encoding="utf-8"))} if file.exists() else {}


def native_architecture(raw: dict, name: str):
    """transformers' (class, config, key_mapping) for a checkpoint's config.json; BadInput for any but ours."""
    kind = raw.get("model_type")
    # Only what describes the architecture: other keys could choose code to fetch, or what a forward pass returns.
    if kind == "bert":
        return BertForMaskedLM, BertConfig(**{key: raw[key] for key in BertConfig.__annotations__ if key in raw}), None
    if kind == "Dream":
        ours = {key: raw[key] for key in (*Qwen2Config.__annotations__, "rope_theta", "rope_scaling") if key in raw}
        return Qwen2ForCausalLM, Qwen2Config(**ours | {"is_causal": False, "logits_shift": 1, "use_cache": False}), None
    if kind != "llada":
        raise BadInput(f"{name} is a {kind!r} model; this file knows LLaDA, Dream and its own tiny one")
    llama = {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "alibi": False, "rope": True}
    llama |= dict.fromkeys(("include_bias", "include_qkv_bias", "input_emb_norm", "attention_layer_norm"), False)
    for key, value in llama.items():
        if raw.get(key, value) != value:
            raise BadInput(f"{name}: config.json has {key} = {raw[key]!r}; as a Llama it would need {value!r}")
    theirs = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "vocab_size": "embedding_size",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }
    missing = [key for key in theirs.values() if raw.get(key) is None]
    if missing:
        raise BadInput(f"{name}: config.json lacks {', '.join(missing)}")
    config = LlamaConfig(is_causal=False, use_cache=False, **{ours: raw[key] for ours, key in theirs.items()})
    return LlamaForCausalLM, config, LLADA_WEIGHTS


LLADA_WEIGHTS = {  # LLaDA's names -> Llama's, as patterns
    rf"^model\.transformer\.{theirs}\.": f"{ours}."
    for theirs, ours in {
        "wte": "model.embed_tokens",
        "ln_f": "model.norm",
        "ff_out": "lm_head",
        r"blocks\.(\d+)\.attn_norm": r"model.layers.\1.input_layernorm",
        r"blocks\.(\d+)\.ff_norm": r"model.layers.\1.post_attention_layernorm",
        r"blocks\.(\d+)\.q_proj": r"model.layers.\1.self_attn.q_proj",
        r"blocks\.(\d+)\.k_proj": r"model.layers.\1.self_attn.k_proj",
        r"blocks\.(\d+)\.v_proj": r"model.layers.\1.self_attn.v_proj",
        r"blocks\.(\d+)\.attn_out": r"model.layers.\1.self_attn.o_proj",
        r"blocks\.(\d+)\.ff_proj": r"model.layers.\1.mlp.gate_proj",
        r"blocks\.(\d+)\.up_proj": r"model.layers.\1.mlp.up_proj",
        r"blocks\.(\d+)\.ff_out": r"model.layers.\1.mlp.down_proj",
    }.items()
}


def find_checkpoint(name: str, device: str | torch.device) -> Path:
    """The folder of a checkpoint: the path itself (for a run, its newest checkpoint), or what the hub has by that name.

    Raises BadInput within seconds where it cannot be had, or is too big for where it is to go.
    """
    folder = Path(name)
    if folder.is_dir():
        folder = (checkpoints(folder) or [folder])[-1]
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise BadInput(f"{name}: no config.json or adapter_config.json in this folder, so it is no checkpoint")
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise BadInput(f"{name}: no such folder; give 'tiny', a folder, or a hub id like GSAI-ML/LLaDA-8B-Instruct")
    return from_hub(name, "model", ["*.json", "*.safetensors", "*.txt", "*.jinja"], device)


def from_hub(name: str, kind: str, files: list[str], device: str | torch.device | None = None) -> Path:
    """The folder of a hub repository ("model" or "dataset"): downloaded, or cached where the hub is out of reach.

    One short question first: the hub's own clients retry for minutes before they say that there is no network.
    """
    info = None
    try:
        info = HfApi().repo_info(name, repo_type=kind, timeout=5)
    except RepositoryNotFoundError:
        raise BadInput(
            f"{name}: the hub has no such {kind}, or keeps it for those who log in (hf auth login)"
        ) from None
    except Exception:  # noqa: BLE001, S110 - no network: which exception that is depends on the hub's HTTP client
        pass
    if kind == "model" and info and info.safetensors:
        refuse_on_cpu(name, info.safetensors.total, device)
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=files, local_files_only=info is None))
    except OSError as error:
        if info:
            raise BadInput(f"{name}: not downloaded: {str(error).splitlines()[0]}") from None
        instead = (
            "--model FOLDER of a downloaded checkpoint" if kind == "model" else "--data FOLDER of downloaded files"
        )
        raise BadInput(
            f"the {kind} {name} is not in the cache and the hub cannot be reached: give {instead}, point HF_HOME at a "
            "cache that has it, or run plain `python agrpo.py`, which needs nothing"
        ) from None


def refuse_on_cpu(name: str, size: int, device: str | torch.device) -> None:
    if torch.device(device).type == "cpu" and size > 2e9:
        raise BadInput(
            f"{name} has {size / 1e9:.1f} billion parameters, too many for a CPU: run it where there is a GPU, give a "
            "small checkpoint by --model, or run plain `python agrpo.py`"
        )


# --- LoRA


class LoRALinear(torch.nn.Module):
    """W x + (alpha / r) B A x, with W frozen and A, B in float32 (LoRA, arXiv 2106.09685)."""

    def __init__(self, base: torch.nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base_layer, self.r, self.alpha = base, r, alpha
        where = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = torch.nn.Parameter(torch.empty(r, base.in_features, **where))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, r, **where))  # so that nothing changes at first
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = torch.nn.functional.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        return self.base_layer(x) + self.alpha / self.r * torch.nn.functional.linear(low, self.lora_B.to(x.dtype))


NOT_PLAIN_LORA = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # what peft can save besides


def add_lora(model, r: int, alpha: float) -> None:
    """Freeze a model and put LoRA on each of its linear layers, the output head left out."""
    model.requires_grad_(False)
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), child, LoRALinear(module, r, alpha))


def lora_layers(model) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_weights(model, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """peft's names in a file -> this model's names. Raises BadInput where the file is for another model."""
    ours = peft_names(model)
    wanted = {peft: tuple(model.get_parameter(name).shape) for peft, name in ours.items()}
    odd = sorted(wanted.items() ^ {(name, tuple(tensor.shape)) for name, tensor in saved.items()})
    if odd:
        raise BadInput(
            f"the adapter's weights are not this model's: {', '.join(f'{n} {shape}' for n, shape in odd[:4])}"
        )
    return {ours[name]: tensor for name, tensor in saved.items()}


def peft_names(model) -> dict[str, str]:
    """peft's name of each LoRA weight -> its name here."""
    names = (name for name, _ in model.named_parameters() if name.endswith((".lora_A", ".lora_B")))
    return {f"base_model.model.{name}.weight": name for name in names}


def merge_lora(model):
    """Add each B A into its W, in float32, and take LoRA away: the model is an ordinary checkpoint again."""
    for name, layer in lora_layers(model).items():
        base, delta = layer.base_layer, layer.alpha / layer.r * layer.lora_B.detach() @ layer.lora_A.detach()
        base.weight.data = (base.weight.data.float() + delta).to(base.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    return model


def save_model(model, tokenizer, folder: Path) -> None:
    """Write what `load_model` reads: an adapter in peft's layout, or the whole model under the names it came with."""
    layers, folder = lora_layers(model), Path(folder)
    if layers:
        folder.mkdir(parents=True)
        tensors = {peft: model.get_parameter(name).detach().contiguous() for peft, name in peft_names(model).items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        first = next(iter(layers.values()))
        config = {"peft_type": "LORA", "task_type": None, "r": first.r, "lora_alpha": first.alpha, "lora_dropout": 0.0}
        config |= {"bias": "none", "target_modules": sorted({name.rpartition(".")[2] for name in layers})}
        config |= {"base_model_name_or_path": model.name_or_path, "inference_mode": True}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    else:
        model.save_pretrained(folder)
        if getattr(model, "raw_config", None):  # LLaDA's weights go back under LLaDA's names, so its config must too
            (folder / "config.json").write_text(json.dumps(model.raw_config, indent=1))
    tokenizer.save_pretrained(folder)


# --- the tiny model


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

    Each completion has its tokens masked with probability t ~ U(0, 1); the loss is the cross-entropy of the masked
    ones, weighted 1/t: an upper bound on -log p(completion | prompt). It stops early, at a given loss: every seed then
    starts AGRPO from an equally good model, one that knows the rules and is not yet sure of them.
    """
    prompts, completions = (
        tokenizer(list(texts), add_special_tokens=False, return_tensors="pt")["input_ids"] for texts in zip(*examples)
    )
    P, C = prompts.shape[1], completions.shape[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.pretrain_learning_rate)
    bar, losses = tqdm(range(args.pretrain_steps), desc="pretraining", unit="step"), []
    for step in bar:
        rng = seeded_generator("cpu", args.seed, "pretrain", step)
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
        losses.append(loss.item())
        recent = sum(losses[-25:]) / len(losses[-25:])
        bar.set_postfix_str(f"-ELBO {recent:.2f} nats")
        if recent < args.pretrain_until and step >= 25:
            break
    bar.close()


# ======================================================================================================================
# 8. Command line
# ======================================================================================================================


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Every setting there is. The defaults are the tiny model's; RELEASE holds those that differ for an 8B model."""

    task: Literal["sudoku", "countdown", "gsm8k", "math"] = option("sudoku", "what to train on")
    model: str = option("tiny", "tiny (pretrained on the spot, then cached), a folder, or a hub id of LLaDA or Dream")
    data: str | None = option(
        None, "your data: for gsm8k and math a folder of train.* and test.*; else a file to test on"
    )
    output_dir: str | None = option(None, "where the run goes; not given: a new folder under runs/")
    resume: str | None = option(None, "folder of an interrupted run to go on with; its own settings apply")
    seed: int = option(0, "the same seed gives the same run on the same machine")
    device: str | None = option(None, "cuda, mps or cpu; not given: the first of these that there is")
    bf16: bool = option(False, "bfloat16 on a GPU; weights too, unless all of them are trained")

    method: Literal["agrpo", "diffu_grpo"] = option("agrpo", "diffu_grpo is d1's one-step estimator, to compare with")
    max_steps: int = option(400, "updates: batches of rollouts to train on")
    prompts_per_update: int = option(32, "prompts in an update, over all processes")
    group_size: int = option(16, "G: completions of each prompt")
    k: int = option(1, "k: timesteps drawn for each completion; a forward and backward pass each")
    timestep_proposal: Literal["surprise", "entropy", "uniform"] = option(
        "surprise", "where timesteps are drawn more often: where tokens were improbable, where much was open, nowhere"
    )
    uniform_share: float = option(0.1, "share of uniform mixed into the proposal; bounds its weights")

    completion_length: int = option(16, "tokens in a completion")
    block_length: int = option(16, "blocks are unmasked from left to right; must divide completion_length")
    steps: int = option(2, "T: sampling steps for a completion")
    unmasking: Literal["random", "low_confidence"] = option(
        "random", "which positions a step fills in; random is exact"
    )
    temperature: float = option(1.0, "tau: sampling temperature")
    top_k: int = option(0, "sample from so many most probable tokens (0: from all)")
    top_p: float = option(1.0, "sample from the most probable tokens that make up this probability")

    updates_per_rollout: int = option(
        1, "optimizer steps on each batch of rollouts; beyond the first, clipping matters"
    )
    eps_low: float = option(0.2, "eps: clip the ratio at 1 - eps_low")
    eps_high: float = option(0.2, "eps: clip the ratio at 1 + eps_high")
    beta: float = option(0.0, "beta: weight of the KL to the model before training; 0 makes no reference pass")
    scale_by_std: bool = option(False, "divide advantages by the group's standard deviation (biased)")
    length_norm: Literal["sequence", "constant"] = option("sequence", "divide a row by its own steps, or all by T")

    learning_rate: float = option(5e-4, "AdamW's, after warm-up")
    lr_schedule: Literal["constant", "cosine"] = option("cosine", "learning rate after warm-up")
    warmup_ratio: float = option(0.05, "share of the updates spent warming up")
    adam_beta1: float = option(0.9, "AdamW's")
    adam_beta2: float = option(0.99, "AdamW's")
    weight_decay: float = option(0.01, "AdamW's")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    lora_rank: int = option(0, "r of LoRA on every linear layer but the head; 0 trains all weights")
    lora_alpha: float = option(64.0, "alpha of LoRA")
    micro_batch: int = option(256, "(completion, timestep) pairs in memory at once; changes nothing else")
    rollout_batch: int = option(512, "completions sampled at once, whole groups; prompts of one length need no padding")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")

    eval_steps: list[int] = field(
        default_factory=lambda: [16, 8, 4, 2, 1],
        metadata={"help": "sampling steps to measure accuracy at, before and after"},
    )
    eval_completion_length: int = option(16, "tokens in a completion when measuring")
    eval_block_length: int = option(16, "block length when measuring")
    eval_examples: int = option(0, "test examples to measure on (0: all)")
    eval_every: int = option(0, "measure greedy accuracy at the first of eval_steps every so many updates (0: never)")
    eval_batch: int = option(384, "completions in a batch when measuring")
    show_every: int = option(50, "print a completion every so many updates (0: never)")
    save_every: int = option(50, "save a checkpoint every so many updates")
    keep_checkpoints: int = option(2, "checkpoints to keep, the newest")
    report_to: Literal["none", "tensorboard", "wandb"] = option("none", "where else the metrics go")

    pretrain_steps: int = option(400, "tiny: steps of pretraining at the most")
    pretrain_until: float = option(3.2, "tiny: stop pretraining when -ELBO, over 25 steps, is down to so many nats")
    pretrain_batch: int = option(256, "tiny: completions in a pretraining step")
    pretrain_learning_rate: float = option(2e-3, "tiny: AdamW's in pretraining")

    def sampling(self, **changes) -> dict:
        """The arguments of `sample` that are settings."""
        names = ("completion_length", "block_length", "steps", "temperature", "unmasking", "top_k", "top_p")
        return {name: getattr(self, name) for name in names} | changes

    def eval_sampling(self, steps: int, greedy: bool) -> dict:
        """Those for measuring: as trained, or greedy low-confidence unmasking, the paper's protocol."""
        changes = {"completion_length": self.eval_completion_length, "block_length": self.eval_block_length}
        if greedy:
            changes |= {"unmasking": "low_confidence", "temperature": 0.0, "top_k": 0, "top_p": 1.0}
        return self.sampling(steps=steps, **changes)


# The official release's settings for LLaDA-8B, cut to one GPU: the batch of 16 prompts goes through it 8 completions at
# a time. Accuracy is measured on fewer examples and steps than eval.py does.
RELEASE = {
    "bf16": True, "max_steps": 1000, "prompts_per_update": 16, "group_size": 8, "k": 24,
    "completion_length": 384, "block_length": 12, "steps": 128, "temperature": 0.6, "top_k": 150, "top_p": 0.99,
    "learning_rate": 5e-6, "warmup_ratio": 0.01, "lora_rank": 64, "micro_batch": 8, "rollout_batch": 8,
    "eval_steps": [128, 64], "eval_completion_length": 256, "eval_block_length": 32, "eval_examples": 64,
    "eval_every": 50, "eval_batch": 32, "show_every": 1, "save_every": 10,
}  # fmt: skip


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Settings from the command line, over the defaults for the task and model, or over those of the run to resume."""
    parser = HfArgumentParser(Settings, description="AGRPO (arXiv 2510.04019) in one file.", allow_abbrev=False)
    parser.error = refuse
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    first, _ = parser.parse_known_args(words)
    original = []
    if first.resume is not None:
        saved = Path(first.resume) / "settings.json"
        if not saved.is_file():
            refuse(f"--resume {first.resume}: no run there (no settings.json); give the folder that the run printed")
        settings = read_json(saved) | {"resume": first.resume, "output_dir": first.resume}
        if settings.keys() != {f.name for f in fields(Settings)}:
            refuse(f"{saved} has not the settings of this agrpo.py; go on with the one that began the run")
        for name, value in settings.items():  # read like a command line, so checked like one
            values = value if isinstance(value, list) else [] if value is None else [value]
            original += [f"--{name}", *map(str, values)] if len(values) > 1 else [f"--{name}={v}" for v in values]
    else:
        if first.task != "sudoku":
            parser.set_defaults(model="GSAI-ML/LLaDA-8B-Instruct")
            first, _ = parser.parse_known_args(words)
        if first.model != "tiny" and not is_bert(first.model):
            parser.set_defaults(**RELEASE)
    given = sys.argv[1:] if argv is None else argv
    args, *unknown = parser.parse_args_into_dataclasses(
        [*original, *given], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown[-1]:
        refuse(f"there is no option {unknown[-1][0]}; --help lists them all")
    if original:
        (began,) = parser.parse_args_into_dataclasses(original, look_for_args_file=False)
        for name, value in asdict(began).items():
            if getattr(args, name) != value and name not in CHANGEABLE:
                refuse(f"--{name} is {value} in the run that --resume goes on with, and stays so; leave it out")
    return args


# Settings that change no result but for rounding, so a resumed run may have others.
CHANGEABLE = (
    "device",
    "micro_batch",
    "gradient_checkpointing",
    "show_every",
    "save_every",
    "keep_checkpoints",
    "report_to",
)


def is_bert(name: str) -> bool:
    """Whether a folder holds the tiny model, whose defaults then apply."""
    folder = Path(name)
    config = (checkpoints(folder) or [folder])[-1] / "config.json"
    with contextlib.suppress(BadInput, OSError):
        return read_json(config).get("model_type") == "bert"
    return False


def refuse(sentence: str):
    sys.exit(f"agrpo.py: {sentence}")


def check_settings(args: Settings) -> None:
    """Raise BadInput, one sentence, on the first setting that cannot work, before anything is loaded or written."""

    def demand(bound: str, fits: Callable[[float], bool], names: str):
        for name in names.split():
            if not fits(getattr(args, name)):
                raise BadInput(f"--{name} must be {bound}, not {getattr(args, name)}")

    count, natural = ("from 1 to 1,000,000", lambda x: 1 <= x <= 10**6), ("0 or more", lambda x: 0 <= x < 2**63)
    demand(
        *count, "max_steps prompts_per_update k completion_length block_length steps updates_per_rollout micro_batch"
    )
    demand(*count, "rollout_batch save_every keep_checkpoints pretrain_batch eval_completion_length eval_block_length")
    demand(*count, "eval_batch")
    demand(*natural, "top_k seed eval_every eval_examples show_every pretrain_steps")
    demand("from 0 to 1,000,000", lambda x: 0 <= x <= 1e6, "weight_decay beta eps_high pretrain_until")
    positive = "temperature learning_rate max_grad_norm lora_alpha pretrain_learning_rate"
    demand("above 0 and at most 1,000,000", lambda x: 0 < x <= 1e6, positive)
    demand("from 0 to 4096", lambda x: 0 <= x <= 4096, "lora_rank")
    demand("at least 0 and below 1", lambda x: 0 <= x < 1, "eps_low warmup_ratio adam_beta1 adam_beta2")
    demand("above 0 and at most 1", lambda x: 0 < x <= 1, "top_p uniform_share")
    if args.group_size < 2:
        raise BadInput(
            f"--group_size {args.group_size}: an advantage compares completions of one prompt; use 2 or more"
        )
    if args.model == "tiny" and args.task != "sudoku":
        raise BadInput(f"--model tiny knows only sudoku; for {args.task} give a LLaDA or Dream checkpoint by --model")
    if not args.eval_steps:
        raise BadInput("--eval_steps needs at least one number of sampling steps")
    lengths = (args.completion_length, args.block_length), (args.eval_completion_length, args.eval_block_length)
    for prefix, (completion_length, block_length) in zip(("", "eval_"), lengths):
        for steps in args.eval_steps if prefix else [args.steps]:
            try:
                tokens_per_step(completion_length, block_length, steps)
            except ValueError as error:
                where = f"--{prefix}steps, --{prefix}block_length, --{prefix}completion_length"
                raise BadInput(f"{where} do not fit together: {error}") from None
    if args.rollout_batch % args.group_size:
        raise BadInput(f"--rollout_batch {args.rollout_batch} must be a multiple of --group_size {args.group_size}")
    at_once = args.rollout_batch // args.group_size * world_size()
    if args.prompts_per_update % at_once:
        raise BadInput(
            f"--prompts_per_update {args.prompts_per_update} must be a multiple of {at_once}: the prompts in "
            f"--rollout_batch {args.rollout_batch} at --group_size {args.group_size}, times {world_size()} process(es)"
        )
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise BadInput(f"--report_to {args.report_to} needs that package: pip install {args.report_to}")
    run = Path(args.output_dir)
    begun = run.exists() and (not run.is_dir() or any(path.name != "settings.part" for path in run.iterdir()))
    if begun and not args.resume:
        raise BadInput(f"--output_dir {run} is not empty: choose another, or go on with that run by --resume {run}")


def starting_model(task: Task, examples: list, test: list, args: Settings, device: torch.device):
    """The model before AGRPO, its tokenizer and mask_id. The tiny one is pretrained, or read from the cache beside it.

    Raises BadInput where the longest prompt and a completion do not fit into the model's positions.
    """
    torch.manual_seed(args.seed)  # the tiny model begins at random
    half_weights = args.bf16 and device.type == "cuda" and args.lora_rank > 0
    dtype = torch.bfloat16 if half_weights else torch.float32
    model, tokenizer, mask_id = load_model(args.model, device, dtype)
    prompts = [task.prompt(example, tokenizer) for example in examples + test]
    longest = max(len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"])
    completion, most = max(args.completion_length, args.eval_completion_length), model.config.max_position_embeddings
    if longest + completion > most:
        raise BadInput(
            f"the longest prompt has {longest} tokens and a completion {completion}, but the model has positions for "
            f"{most}: use a smaller --completion_length and --eval_completion_length, or shorter examples"
        )
    if args.model != "tiny":
        return model, tokenizer, mask_id
    recipe = {name: value for name, value in asdict(args).items() if "pretrain" in name or name == "seed"}
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    cache = Path(args.output_dir).parent / f"pretrained-{args.task}-seed{args.seed}-{digest}"
    if not cache.exists() and rank() == 0:
        pairs = [(prompt, example["solution"]) for prompt, example in zip(prompts, examples)]  # those to train on
        pretrain(model, tokenizer, mask_id, pairs, args)
        aside = cache.with_name(f"{cache.name}.{os.getpid()}")
        save_model(model, tokenizer, aside)
        try:
            aside.rename(cache)
        except OSError:  # another run with this seed was quicker
            if not cache.exists():
                raise
            shutil.rmtree(aside)
    wait_for_all_ranks()
    return load_model(str(cache), device, dtype)


def measure(model, tokenizer, mask_id: int, task: Task, examples: list, args: Settings) -> dict[str, dict[str, float]]:
    """Accuracy at each of eval_steps: of the sampler that is trained, and of greedy low-confidence unmasking."""
    table = {sampler: {} for sampler in SAMPLERS}
    for sampler, row in table.items():
        for steps in tqdm(args.eval_steps, desc=f"accuracy, {sampler}", leave=False, disable=rank() > 0):
            row[str(steps)] = evaluate(model, tokenizer, mask_id, task, examples, args, steps, sampler == "greedy")
    return table


SAMPLERS = ("as trained", "greedy")
METHODS = {"agrpo": "AGRPO", "diffu_grpo": "diffu-GRPO"}


def print_table(results: dict, args: Settings) -> None:
    """Accuracies before and, where they are there already, after training."""
    trained = f"as trained ({args.unmasking} unmasking, temperature {args.temperature:g})"
    print(f"\nAccuracy on {results['examples']} test examples, by sampling steps (trained with {args.steps})")
    for sampler, title in zip(SAMPLERS, (trained, "greedy (low-confidence unmasking, temperature 0)")):
        print(f"\n  {title:50s}" + "".join(f"{steps:>7}" for steps in args.eval_steps))
        for stage in (stage for stage in ("base", *METHODS.values()) if stage in results):
            row = results[stage][sampler]
            print(f"    {stage:48s}" + "".join(f"{row[str(steps)]:7.3f}" for steps in args.eval_steps))
    print()


def print_cost(run: Path) -> None:
    """Where the time went, and what was not computed, from metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    total = {name: sum(line.get(name, 0) for line in lines) for name in lines[-1]}
    phases = ", ".join(f"{name} {total['seconds_' + name]:.0f} s" for name in ("rollout", "reward", "update"))
    print(
        f"{len(lines)} updates: {phases}; {total['rollout_tokens_per_second'] / len(lines):,.0f} tokens/s in rollouts; "
        f"peak memory {lines[-1]['peak_memory_gib']:.1f} GiB"
    )
    rolled, made = total["rollout_forward_passes"], total["forward_passes"]
    print(
        f"forward passes in rollouts: {rolled:,.0f}; saved: {total['rollout_passes_saved_ended']:,.0f} (rows that had "
        f"ended), {total['rollout_passes'] - rolled:,.0f} (equal states)\n"
        f"forward passes in updates: {made:,.0f}; saved: {total['passes_saved_no_advantage']:,.0f} (no advantage), "
        f"{total['passes_saved_short']:,.0f} (fewer than k steps), {total['passes'] - made:,.0f} (equal states)"
    )


def main(argv: list[str] | None = None) -> None:
    began = time.time()
    transformers.logging.set_verbosity_error()  # what goes wrong in loading is refused below, in a sentence
    transformers.logging.disable_progress_bar()
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    try:
        args = parse_settings(argv)
    except (BadInput, OSError) as error:
        refuse(str(error))
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.output_dir is None:
        name = Path("runs") / f"{args.task}-{Path(args.model).name}-seed{args.seed}"
        names = itertools.chain([name], (Path(f"{name}-{n}") for n in itertools.count(2)))
        args.output_dir = str(next(name for name in names if not name.exists()))
    run, task = Path(args.output_dir), TASKS[args.task]
    try:
        check_settings(args)
        device = torch.zeros(1, device=args.device).device
        examples, test = task.examples("train", args), task.examples("test", args)[: args.eval_examples or None]
        if args.model != "tiny" and (find_checkpoint(args.model, device) / "adapter_config.json").is_file():
            raise BadInput(f"--model {args.model} is a LoRA adapter: merge it first (merge_lora, see the README)")
    except (BadInput, OSError, RuntimeError, AssertionError) as error:  # the latter two are torch's, on a device
        refuse(str(error).splitlines()[0])
    wait_for_all_ranks()  # every process has looked before one of them writes
    try:
        if rank() == 0 and not args.resume:
            run.mkdir(parents=True, exist_ok=True)
            write_whole(run / "settings.json", json.dumps(asdict(args), indent=1))
        model, tokenizer, mask_id = starting_model(task, examples, test, args, device)
        size = sum(p.numel() for p in model.parameters())
        if rank() == 0:
            print(f"{args.task}: {args.model}, {size:,} parameters, on {device}; seed {args.seed}; run directory {run}")
        base = run / "base.json"  # a resumed run need not measure it again
        digest = hashlib.sha256(json.dumps([examples, test]).encode()).hexdigest()
        if base.exists():
            results = read_json(base)
            if results.get("data") != digest:
                raise BadInput(f"the data are not those that {run} began with: put them back, or start a new run")
        else:
            results = {
                "examples": len(test),
                "data": digest,
                "base": measure(model, tokenizer, mask_id, task, test, args),
            }
            if rank() == 0:
                write_whole(base, json.dumps(results))
        if rank() == 0:
            print_table(results, args)

        ref_model = None
        if args.beta > 0:  # a frozen copy; with LoRA the weights are frozen anyway, so the copy shares them
            ref_model = copy.deepcopy(model, {id(p): p for p in model.parameters()} if args.lora_rank else {})
            ref_model.requires_grad_(False)
        if checkpoints(run):
            dtype = model.dtype
            del model  # there may not be room for two
            model, tokenizer, mask_id = load_model(str(run), device, dtype)
        elif args.lora_rank:
            torch.manual_seed(args.seed)
            add_lora(model, args.lora_rank, args.lora_alpha)
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if not train(model, tokenizer, mask_id, task, examples, test, args, ref_model):
            refuse(f"stopped; nothing is lost. Go on with: python agrpo.py --resume {run}")
        results[METHODS[args.method]] = measure(model, tokenizer, mask_id, task, test, args)
        if rank() == 0:
            write_whole(run / "results.json", json.dumps(results, indent=1))
            print_table(results, args)
            print_cost(run)
    except (BadInput, FloatingPointError) as error:
        refuse(str(error))
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "allocate memory")):
            raise
        refuse(
            f"out of memory on {device}; {last_checkpoint(run)}. A smaller --micro_batch (updates) or "
            f"--gradient_checkpointing true can be given with --resume {run}; a smaller --rollout_batch or "
            "--eval_batch (sampling) needs a new run"
        )
    except (OSError, SafetensorError) as error:  # a full disk, most likely; a checkpoint is renamed only when whole
        refuse(f"{error}; {last_checkpoint(run)}; once that is mended, go on with: python agrpo.py --resume {run}")
    minutes, seconds = divmod(round(time.time() - began), 60)
    if rank() == 0:
        print(f"{minutes} min {seconds} s. Checkpoint: {checkpoints(run)[-1]}. Every update: {run / 'metrics.jsonl'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        refuse("stopped at once")
