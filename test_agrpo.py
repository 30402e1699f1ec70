"""What AGRPO claims, against exact values: the appendix that the paper does not have.

    pytest test_agrpo.py        every claim, asserted
    python test_agrpo.py        the same story as tables, in half a minute; --memory: what fits which GPU, on paper

The mask predictor here knows four words (one is EOS, one the mask) and writes three or four, in float64: so few that
every trajectory (the order in which positions are unmasked, and the tokens) can be enumerated. What training only
samples is computed here, by code that shares nothing with the sampler, and compared to the last digits.
"""

import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from weakref import finalize

import datasets
import pytest
import torch
import transformers
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import agrpo
import eval as curve
from agrpo import Rollout, draw_timesteps, group_advantages, sample, step_logps

torch.set_num_threads(1)  # tensors this small lose more between threads than they gain
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

X, Y, EOS, MASK = WORDS = range(4)
PROMPT = (Y, X)
flat = torch.nn.utils.parameters_to_vector
seeded = lambda seed: torch.Generator().manual_seed(seed)
number = lambda tokens: tokens @ len(WORDS) ** torch.arange(tokens.shape[-1]).flip(0)  # of a state or text
keys = lambda *parts: list(map(tuple, torch.cat(parts, 1).tolist()))  # for a dict


# ===== 1. A mask predictor small enough to enumerate, and the enumerator ==============================================


def mask_predictor(seed: int = 2, vocab: int = 4, width: int = 8, spread: float = 0.8, dream: bool = False):
    """A random mask predictor whose predictions are far from uniform and depend on all that they may."""
    shape = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    model = BertForMaskedLM(BertConfig(**shape))
    if dream:  # a Qwen2 whose logits are about the next position
        model = Qwen2ForCausalLM(Qwen2Config(is_causal=False, num_key_value_heads=1, logits_shift=1, **shape))
    rng = seeded(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        norm = "norm" in name.lower() and name.endswith("weight")
        parameter.data.copy_(spread * noise if parameter.dim() == 2 else 0.2 * noise + norm)
    return model.double().eval()


PLAIN = {"completion_length": 3, "block_length": 3, "steps": 3, "temperature": 1.0, "unmasking": "random"}
PLAIN |= {"mask_id": MASK, "eos_id": EOS, "top_k": 0, "top_p": 1.0}
LOW = PLAIN | {"unmasking": "low_confidence"}
BLOCKS = PLAIN | {"completion_length": 4, "block_length": 2, "steps": 4}
SETTINGS = {
    "plain": PLAIN,
    "top-k, top-p": PLAIN | {"temperature": 1.5, "top_k": 2, "top_p": 0.7, "steps": 2},
    "blocks": BLOCKS,
    "blocks, top-p": BLOCKS | {"temperature": 1.3, "top_p": 0.9},
    "blocks, no EOS": BLOCKS | {"eos_id": None},
    "blocks, two EOS": BLOCKS | {"eos_id": [Y, EOS], "steps": 2, "temperature": 0.8},
    "low confidence": LOW,
    "low confidence, greedy": LOW | {"temperature": 0.0},
    "low confidence, top-p": LOW | {"temperature": 4.0, "top_p": 0.9, "steps": 2},
    "four tokens": BLOCKS | {"block_length": 4},
}
TESTED = [*SETTINGS][:-1]


def policy_table(model, sampling: dict, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The policy by its definition: log p(token | prompt, state), (S, C, V); and the ids left to it, or those given.

    Never the mask; top-k: fewer than k tokens are more probable; top-p: these make up less than top_p.
    """
    input_ids = [PROMPT + state for state in itertools.product(WORDS, repeat=sampling["completion_length"])]
    logits = model(input_ids=torch.tensor(input_ids)).logits[:, len(PROMPT) :] / (sampling["temperature"] or 1.0)
    if keep is None:
        keep = (torch.arange(len(WORDS)) != MASK).expand(logits.shape)
        better = (logits[..., None, :] > logits[..., :, None]) & keep[..., None, :]  # [..., a, b]: b beats a
        keep = keep & (better.sum(-1) < ((sampling["top_k"] or len(WORDS)) if sampling["temperature"] else 1))
        p = logits.masked_fill(~keep, -math.inf).softmax(-1)
        keep = keep & ((better * p[..., None, :]).sum(-1) < sampling["top_p"])
    return logits - logits.masked_fill(~keep, -math.inf).logsumexp(-1, keepdim=True), keep


@lru_cache
def enumerated(name: str, seed: int = 2) -> SimpleNamespace:
    """Every trajectory of one setting, N of them: as a rollout that nobody sampled, and with its exact probability.

    log_probability (N,) is of all of it, the choice of positions included; by_step (N, T) of the tokens of each step;
    logp_under(model) (N, C) of each token, in the state that is number `state` (N, C); all differentiable.
    """
    model, sampling = mask_predictor(seed=seed), SETTINGS[name]
    C, block, T, ends = (sampling[key] for key in ("completion_length", "block_length", "steps", "eos_id"))
    ends, inside = ends if isinstance(ends, list) else [ends], T * block // C  # steps inside one block
    logp, keep = policy_table(model, sampling)
    confidence, _ = policy_table(model, sampling | {"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    found = []

    def walk(t: int, history: dict, log_probability: Tensor):  # history: position -> (step, token, state before)
        start, tokens = t // inside * block, [history[i][1] if i in history else MASK for i in range(C)]
        if t == T or start and {*tokens[start - block : start]} <= {*ends}:
            found.append((t, log_probability, [history.get(i, (-1, EOS, 0)) for i in range(C)]))
            return
        n = int(number(torch.tensor(tokens)))
        masked = [i for i in range(start, start + block) if tokens[i] == MASK]
        count = math.ceil(len(masked) / (inside - t % inside))
        subsets = list(itertools.combinations(masked, count)) if sampling["unmasking"] == "random" else [masked]
        outcomes = defaultdict(list)
        for subset in subsets:  # low confidence: a token for every masked position, of which the surest stay
            for drawn in itertools.product(*(keep[n, i].nonzero().flatten().tolist() for i in subset)):
                surest = sorted(zip(subset, drawn), key=lambda place: -confidence[(n, *place)])[:count]
                outcomes[tuple(sorted(surest))].append(logp[n, subset, drawn].sum() - math.log(len(subsets)))
        for unmasked, several in outcomes.items():
            now = {i: (t, token, n) for i, token in unmasked}
            walk(t + 1, history | now, log_probability + torch.stack(several).logsumexp(0))

    walk(0, {}, torch.tensor(0.0).double())
    num_steps, log_probability, histories = zip(*found)
    step, completion, state = torch.tensor(histories).unbind(-1)
    prompt, place, ended = torch.tensor([PROMPT] * len(found)), (state, torch.arange(C)), step < 0
    logp_under = lambda other: policy_table(other, sampling, keep)[0][(*place, completion)].masked_fill(ended, 0)
    entropy = torch.special.entr(logp.detach().exp().masked_fill(~keep, 0)).sum(-1)[place].masked_fill(ended, 0)
    by_step = lambda x: torch.zeros(len(found), T).double().scatter_add(1, step.clamp(min=0), x)
    cut = sampling["top_k"] or sampling["top_p"] < 1 or not sampling["temperature"]
    kept = torch.where(keep, torch.arange(len(WORDS)), -1)[place] if cut else None
    recorded = step, logp_under(model).detach(), by_step(entropy), torch.tensor(num_steps), kept
    e = SimpleNamespace(model=model, sampling=sampling, state=state, keep=keep, logp_under=logp_under)
    e.rollout, e.by_step = Rollout(prompt, prompt > -1, completion, *recorded), by_step(logp_under(model))
    e.policy = {"mask_id": MASK, "temperature": sampling["temperature"]}
    e.log_probability = torch.stack(log_probability)
    e.probability = e.log_probability.detach().exp()
    e.rewards = torch.rand(len(WORDS) ** C, generator=seeded(0)).double()[number(completion)]
    return e


def gradient_of(value: Tensor, model) -> Tensor:
    """d value / d theta by autograd, as one vector."""
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return flat(gradients)


def update_of(model, *args, **options) -> tuple[Tensor, dict]:
    """What `policy_gradient` adds to .grad, with the sign of an ascent, and what it returns."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    figures = agrpo.policy_gradient(model, *args, **options)
    return -flat(p.grad for p in model.parameters()), figures


@contextmanager
def passes_seen(model):
    """Counts the sequences that go through a model, and the positions through its head."""
    seen, body, head = Counter(), model.base_model, model.get_output_embeddings()
    count = lambda _, __, given: seen.update(sequences=len(given["input_ids"]))
    count_head = lambda _, given: seen.update(positions=given[0].shape[:-1].numel())
    with body.register_forward_pre_hook(count, with_kwargs=True), head.register_forward_pre_hook(count_head):
        yield seen


# ===== 2. The sampler draws from the process that it says it draws from, and looks only where it must =================


def write(model, prompt: Tensor, seed: int = 0, prompt_mask: Tensor | None = None, **sampling) -> Rollout:
    prompt_mask = prompt > -1 if prompt_mask is None else prompt_mask
    return sample(model, prompt, prompt_mask, generator=seeded(seed), **sampling)


@pytest.mark.parametrize("name", TESTED)
def test_sampler_draws_from_its_process_and_records_it(name):
    """20,000 samples are as frequent as the enumeration says, nothing else occurs, and what is recorded is exact.
    `estimate_logp` finds it again at the steps that it draws, in value and gradient."""
    e = enumerated(name)
    which = {key: n for n, key in enumerate(keys(e.rollout.completion, e.rollout.step))}
    assert len(which) == len(e.probability) and abs(e.probability.sum() - 1) < 1e-12
    rollout = write(e.model, torch.tensor([PROMPT] * 20_000), **e.sampling)
    drawn = torch.tensor([which[key] for key in keys(rollout.completion, rollout.step)])
    expected = 20_000 * e.probability
    often = expected >= 5  # Pearson's chi-square
    chi2 = ((torch.bincount(drawn, minlength=len(which)) - expected) ** 2 / expected)[often].sum()
    freedom = (1 - e.probability[often]).sum().clamp(min=1)
    assert chi2 < freedom + 3 * (2 * freedom).sqrt()
    assert (rollout.kept is None) == (e.rollout.kept is None)
    for field in ("logp", "entropy", "num_steps"):
        assert_close(getattr(rollout, field), getattr(e.rollout, field)[drawn])
    options = {"k": 2, "proposal": proposal_of(e.rollout, "surprise")}
    steps, weights = draw_timesteps(e.rollout.num_steps, generator=seeded(0), **options)
    exact = (weights * e.by_step.gather(1, steps)).sum(1)
    estimate = agrpo.estimate_logp(e.model, e.rollout, generator=seeded(0), **options, **e.policy)
    assert_close(estimate, exact)
    assert_close(*(gradient_of(x @ e.rewards, e.model) for x in (estimate, exact)))


@pytest.mark.parametrize("unmasking", ["random", "low_confidence"])
def test_sampler_looks_only_where_it_must(unmasking):
    """Rows that have ended leave the batch, the head sees one block; what pads a prompt changes nothing."""
    model = mask_predictor()
    model.cls.predictions.bias.data += torch.tensor([0.0, 0.0, 1.0, 50.0])  # EOS is common; the mask tempts
    prompt_mask = torch.arange(4) >= torch.arange(64)[:, None] % 4  # left padding
    prompt = torch.where(prompt_mask, torch.arange(4) % 2, MASK)
    sampling = PLAIN | {"completion_length": 12, "steps": 8, "unmasking": unmasking, "temperature": 1.2, "top_p": 0.9}
    with passes_seen(model) as seen:
        rollout = write(model, prompt, prompt_mask=prompt_mask.long(), **sampling)  # a mask of integers will do
    step, num_steps = rollout.step, rollout.num_steps
    assert rollout.prompt_mask.dtype == torch.bool
    assert not (rollout.completion == MASK).any() and len(num_steps.unique()) > 2
    assert seen["positions"] == (step >= 0).sum() * (1 if unmasking == "random" else 4 / 3)  # of 3, 1: not of 2, 1
    row, t = (torch.arange(8) < num_steps[:, None]).nonzero(as_tuple=True)
    for few in (row >= 0, row % 4 == 3):  # in all rows, or with padding cut off
        with passes_seen(model) as seen:
            logp, unmasked = step_logps(model, rollout, row[few], t[few], mask_id=MASK, temperature=1.2)
        assert unmasked.equal(step[row[few]] == t[few, None]) and seen["positions"] == 2 * few.sum()
        assert_close(logp.detach(), rollout.logp[row[few]] * unmasked)


@pytest.mark.parametrize("dream", [False, True])
def test_logits_at_are_those_of_the_full_forward_pass(dream):
    """Padded or not, in any order; equal rows share a pass, the head sees no other positions."""
    model = mask_predictor(dream=dream)
    ids, positions = (torch.arange(45).view(5, 9) ** 2 % 7 % 4)[[0, 1, 2, 3, 4, 0, 1]], torch.tensor([8, 4, 6])
    exact = model(input_ids=ids).logits[:, positions - int(dream)]
    for padding in (0, 3):
        padded = torch.cat([torch.arange(7 * padding).view(7, padding) % 4, ids], 1)
        attention_mask = (torch.arange(9 + padding) >= padding).expand(7, -1) if padding else None
        with passes_seen(model) as seen:
            logits = agrpo.logits_at(model, padded, attention_mask, (positions + padding).expand(7, 3))
        assert seen == {"sequences": 5, "positions": 7 * 3}
        assert_close(logits, exact, atol=1e-5 if dream else 1e-12)  # Qwen's norms round to float32


def test_what_would_be_wrong_is_refused():
    """Steps that do not fit, proposals without a step, padding on the right, dropout, unknown words."""
    model, two, prompt = mask_predictor(), torch.tensor([2]), torch.tensor([[*PROMPT, MASK]])
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**shape, is_causal=False))
    causal, scaled, decoder, dropout = (mask_predictor(dream=dream) for dream in (True, True, False, False))
    del causal.config.is_causal
    scaled.config.final_logit_softcapping = 30.0
    decoder.config.is_decoder = True
    dropout.config.hidden_dropout_prob = dropout.config.attention_probs_dropout_prob = 0.0  # too late
    wide, rollout = torch.nn.functional.pad(prompt, (0, 9), value=MASK), write(model, prompt, **PLAIN)
    one = {"k": 1, "mask_id": MASK, "temperature": 1.0, "on_policy": True}
    gradient = partial(agrpo.policy_gradient, model, rollout, [1.0], **one)
    proposals = [torch.tensor([[1.0, *p]]) for p in ([-1], [0], [math.nan], [math.inf], [])]  # for a row of two steps
    for said, wrong in [
        ("does not divide", partial(agrpo.tokens_per_step, 10, 4, 4)),
        *(("must be a multiple", partial(agrpo.tokens_per_step, *wrong)) for wrong in [(12, 4, 4), (4, 2, 6)]),
        *(("positive", partial(draw_timesteps, two, 1, proposal)) for proposal in proposals),
        *(("whole and at least 1", partial(draw_timesteps, two, k)) for k in (0, 1.5)),
        ("groups of 4", partial(group_advantages, torch.ones(6), 4)),
        *(("padded on the left", partial(write, model, x, prompt_mask=x != MASK, **PLAIN)) for x in (prompt, wide)),
        *(("is neither like", partial(agrpo.logits_at, m, prompt, None, prompt)) for m in (roberta, causal)),
        *(("is neither like", partial(agrpo.logits_at, m, prompt, None, prompt)) for m in (scaled, decoder)),
        ("dropout is on", partial(write, dropout.train(), prompt, **PLAIN)),
        ("unmasking is", partial(write, model, prompt, **PLAIN | {"unmasking": "left_to_right"})),
        ("length_norm is", partial(gradient, length_norm="seqence")),
        ("needs ref_model", partial(gradient, beta=0.1)),
        *(("1 finite numbers", partial(agrpo.policy_gradient, model, rollout, A, **one)) for A in ([math.nan], [1, 2])),
        ("method is one of", partial(agrpo.Settings, method="grpo")),
        ("validation", partial(TASKS["sudoku"].examples, "validation", agrpo.Settings())),
    ]:
        with pytest.raises((ValueError, KeyError), match=said):
            wrong()


# ===== 3. Timesteps: weights that are right on average, strata that are hit once ======================================


def proposal_of(rollout: Rollout, kind: str) -> Tensor:
    """Nine tenths by the entropy of a step or the surprise, 1 - p, of its tokens; a tenth is uniform."""
    taken = (torch.arange(rollout.entropy.shape[1]) < rollout.num_steps[:, None]).double()
    doubt = [((1 - rollout.logp.exp()) * (rollout.step == t)).sum(1) for t in range(taken.shape[1])]
    score = {"uniform": taken, "entropy": rollout.entropy, "surprise": torch.stack(doubt, 1)}[kind].double()
    return 0.9 * score / score.sum().clamp(min=1e-9) + 0.1 * taken / taken.sum()


def every_draw(proposal: Tensor, num_steps: Tensor, k: int, at: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Each row with each of its timestep draws: rows (M,), probabilities (M,), what each step then weighs (M, T).

    A row draws at the points j + x, x uniform. It draws step t with probability min(1, c p_t), where c, found by
    bisection, makes them add up to k. On a piece of x between two edges the draw is the same. at: where in the piece.
    """
    p = proposal.double() * (torch.arange(proposal.shape[1]) < num_steps[:, None])
    low, high = 0 * p[:, :1], 0 * p[:, :1] + 1e9
    for _ in range(100):
        c = (low + high) / 2
        few = (c * p).clamp(max=1).sum(1, keepdim=True) < k
        low, high = c.where(few, low), high.where(few, c)
    edges = (high * p).clamp(max=1).cumsum(1) % 1
    edges = edges.where((edges - 0.5).abs() < 0.5 - 1e-12, 0)  # rounding leaves no pieces at the ends
    edges = torch.cat([edges, high**0], 1).sort(1).values  # the first is 0, where the points reach k
    rows, piece = edges.diff().nonzero(as_tuple=True)
    share = edges.diff()[rows, piece]
    x = (edges[rows, piece] + at * share)[:, None]
    with mock.patch.object(torch, "rand", lambda *_, **__: x):
        steps, weights = draw_timesteps(num_steps[rows], k, proposal[rows])
    return rows, share, torch.zeros(len(rows), proposal.shape[1]).double().scatter_add(1, steps, weights)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
def test_timestep_weights_are_unbiased(k):
    """Each step's weight is 1 on average, exactly. Each row has one point in each unit of its k; rows and seeds differ."""
    num_steps = torch.tensor([5, 3, 1])
    taken = (torch.arange(5) < num_steps[:, None]).double()  # what a proposal says of others does not matter
    scores = torch.tensor([[3.0, 0.02, 1.0, 0.5, 2.2], [0.7, 2.0, 0.01, 9.0, 9.0], [0.4, 9.0, 9.0, 9.0, 9.0]])
    for proposal, at in itertools.product((taken, scores), (0.01, 0.99)):
        rows, share, weights = every_draw(proposal, num_steps, k, at)
        assert_close(torch.zeros_like(taken).index_add(0, rows, share[:, None] * weights), taken)
        assert (weights > 0).sum(1).equal(num_steps[rows].clamp(max=k))  # no step twice: each costs a pass
        covered = num_steps[rows] <= k
        assert weights[covered].equal(taken[rows][covered])  # each step once with weight 1, in every draw
    uniform = (draw_timesteps(num_steps, k, proposal, seeded(0)) for proposal in (None, taken))
    assert all(ours.equal(theirs) for ours, theirs in zip(*uniform))
    draws = [draw_timesteps(torch.full((6,), 7 * k), k, generator=seeded(seed))[0] for seed in range(50)]
    draws = torch.stack(draws)  # (50, 6, k)
    assert (draws // 7 == torch.arange(k)).all() and (draws - draws[..., :1] == 7 * torch.arange(k)).all()
    assert len(draws[..., 0].unique(dim=0)) == 50 and len(draws[:, 0, 0].unique()) == 7


# ===== 4. The gradient: what is unbiased, for what, and at what variance; and the story as tables =====================


def policy_gradient_of(e, length: Tensor | None = None) -> Tensor:
    """grad E[(r - mean r) / length], length T if not given, by autograd through the enumeration."""
    value = (e.rewards - e.probability @ e.rewards) / (e.sampling["steps"] if length is None else length)
    return gradient_of(e.log_probability.exp() @ value, e.model)


def advantage_mass(e, group_size: int = 2, scale_by_std: bool = False) -> Tensor:
    """(N,) probability x advantage of a trajectory, added up over all N^G groups that it may be in, and over G."""
    groups = torch.cartesian_prod(*[torch.arange(len(e.probability))] * group_size)  # (N^G, G)
    advantage = group_advantages(e.rewards[groups].flatten(), group_size, scale_by_std).view(-1, group_size)
    mass = e.probability[groups].prod(1, keepdim=True) * advantage / group_size
    return torch.zeros_like(e.probability).index_add(0, groups.flatten(), mass.flatten())


def mean_update(e, k: int = 1, kind: str = "uniform", mass=None, rollout=None, **options) -> Tensor:
    """The mean of `policy_gradient` over all trajectories, groups and timestep draws, by one real call on all of them:
    it is linear in their weights."""
    rollout, mass = rollout or e.rollout, advantage_mass(e) if mass is None else mass

    def mean_draw(num_steps, k, proposal, generator):
        _, share, weights = every_draw(proposal, num_steps, k)
        return torch.arange(int(num_steps))[None], (share @ weights)[None]

    options = {"on_policy": True, "length_norm": "constant", "micro_batch": 4096} | e.policy | options
    with mock.patch.object(agrpo, "draw_timesteps", mean_draw):  # the call divides by its rows
        return update_of(e.model, rollout, mass * len(mass), k=k, proposal=proposal_of(rollout, kind), **options)[0]


@pytest.mark.parametrize("name", [name for name in TESTED if "low" not in name])
def test_mean_update_is_the_policy_gradient(name):
    """It is (1 - 1/G) grad E[reward] / T, exactly, or that of (r - mean r) / T_i where length_norm is "sequence"."""
    e, G = enumerated(name), 3 if name == "top-k, top-p" else 2
    mass = advantage_mass(e, G)
    for kind, k, on_policy in [("uniform", 1, True), ("entropy", 1, False), ("surprise", 3, False)]:
        assert_close(mean_update(e, k, kind, mass, on_policy=on_policy), (1 - 1 / G) * policy_gradient_of(e))
    update = mean_update(e, 1, "entropy", mass, length_norm="sequence")
    assert_close(update, (1 - 1 / G) * policy_gradient_of(e, e.rollout.num_steps))


def test_pairs_are_drawn_in_proportion():
    """Rows of magnitude 0 take no part; no pair is drawn twice; equal rows do not all draw the same step."""
    num_steps, rng = torch.tensor([16, 12, 9] * 32), seeded(0)
    magnitude, proposal = (1 + torch.rand(shape, generator=rng, dtype=torch.float64) for shape in (96, (96, 16)))
    magnitude[::4] = 0
    rows, steps, weights = agrpo.draw_pairs(num_steps, magnitude, 2, proposal, rng)
    assert len({*keys(rows[:, None], steps[:, None])}) == len(rows) == 2 * 72
    density = magnitude[:, None] * proposal * (torch.arange(16) < num_steps[:, None])
    assert_close(weights, density.sum() / density[rows, steps] / (2 * 72))
    rows, steps, _ = agrpo.draw_pairs(torch.full((64,), 16), torch.ones(64), 1, generator=rng)
    assert rows.tolist() == list(range(64)) and len({*steps.tolist()}) > 8


@lru_cache
def bias_table(seeds: int = 8) -> dict[str, Tensor]:
    """Each estimator's mean update beside (1 - 1/G) grad E[reward] / T: cosine, relative norm and error.

    Resampled masks: as if a text had been written in every order equally often. One step: with the prompt unmasked.
    """
    table = defaultdict(list)
    for seed in range(seeds):
        plain, blocks, sure = (enumerated(n, seed=seed) for n in ("plain", "blocks", "low confidence"))
        mass, completion = advantage_mass(plain), plain.rollout.completion
        same = (completion[:, None] == completion).all(2).double()  # (N, N), same text
        one_step = agrpo.one_step_view(plain.model, plain.rollout, **plain.policy)
        one_step.prompt = plain.rollout.prompt
        for name, e, *how, options in [
            ("AGRPO, k=1, uniform", plain, {}),
            ("AGRPO, k=1, entropy", plain, 1, "entropy", {}),
            ("AGRPO, k=2, surprise", plain, 2, "surprise", {}),
            ("AGRPO, rows end early, constant", blocks, {}),
            ("  rows end early, sequence", blocks, {"length_norm": "sequence"}),
            ("  advantage / std of the group", plain, {"mass": advantage_mass(plain, 2, True)}),
            ("  low-confidence unmasking", sure, {}),
            ("  resampled masks (ELBO)", plain, {"mass": same @ mass / same.sum(1)}),
            ("  one step (diffu-GRPO)", plain, {"rollout": one_step}),
        ]:
            update, exact = mean_update(e, *how, **options), (1 - 1 / 2) * policy_gradient_of(e)
            error, norm = ((x.norm() / exact.norm()).item() for x in (update - exact, update))
            table[name].append([torch.cosine_similarity(update, exact, 0).item(), norm, error])
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in table.items()}


@lru_cache
def passes_table(T: int = 4) -> dict:
    """(Squared bias, variance times passes) of one completion's estimate of grad E[reward], over the squared gradient.

    A bias is scaled away as far as it goes. Random masks: of L tokens, L uniform, scored in one pass, times T / L.
    """
    e, found = enumerated("four tokens"), {}
    table, states = policy_table(e.model, e.sampling)[0], torch.cartesian_prod(*[torch.arange(len(WORDS))] * T)
    score = torch.zeros(*table.shape, sum(p.numel() for p in e.model.parameters())).double()
    for place in ((states == MASK)[..., None] & e.keep).nonzero():
        score[tuple(place)] = gradient_of(table[tuple(place)], e.model)
    at, completion, A = e.rollout.step.argsort(1), e.rollout.completion, e.rewards - e.probability @ e.rewards
    scores = score[e.state.gather(1, at), at, completion.gather(1, at)]  # (N, T, weights)
    exact = (e.probability * A) @ scores.sum(1)

    def error(name: str, passes: int, share: Tensor, estimate: Tensor):
        mean = share @ estimate
        scale = mean @ exact / (mean @ mean)
        variance = share @ (estimate**2).sum(1) - mean @ mean
        bias, norm = ((scale * mean - exact) ** 2).sum(), exact @ exact
        found[name] = (bias / norm).item(), (passes * scale**2 * variance / norm).item()

    for k in (1, 2, 4):
        rows, share, weights = every_draw(proposal_of(e.rollout, "surprise"), e.rollout.num_steps, k)
        estimate = A[rows, None] * torch.einsum("nt,ntp->np", weights, scores[rows])
        error(f"AGRPO, k = {k}" + " = T" * (k == T), k, share * e.probability[rows], estimate)
    masks = torch.cartesian_prod(*[torch.arange(2)] * T)[1:]  # of one token to all
    for name, some in ("random masks (ELBO)", masks), ("one step (diffu-GRPO)", masks[-1:]):
        share, estimate = [], []
        for mask in some:
            L, state = int(mask.sum()), number(completion.where(mask == 0, MASK))
            estimate.append(A[:, None] * score[state[:, None], torch.arange(T), completion].sum(1) * T / L)
            share.append(e.probability / math.comb(T, L))
        share = torch.cat(share)
        error(name, 1, share / share.sum(), torch.cat(estimate))
    return found


def test_advantages_and_proposals_and_top_p_by_hand():
    """Reward minus the group's mean, 0 in a group of equals. A tenth of a proposal is uniform over the steps taken."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.1, 0.1, 0.1])
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    for scale_by_std, scale in [(False, 1.0), (True, math.sqrt(1 / 3) + 1e-4)]:
        torch.testing.assert_close(group_advantages(rewards, 3, scale_by_std) * scale, expected)
    torch.testing.assert_close(group_advantages([1, 0, 0], 3), expected[:3])  # a list, of whole numbers, too
    assert not group_advantages(torch.full((7,), 0.7), 7).any()  # although their mean rounds to another number
    rollout = enumerated("blocks, top-p").rollout
    assert_close(agrpo.defensive_proposal(rollout), proposal_of(rollout, "surprise"))
    sure = replace(rollout, logp=0 * rollout.logp)
    assert_close(agrpo.defensive_proposal(sure), proposal_of(rollout, "uniform"))
    logits = torch.randn(2, 5000, generator=seeded(0))  # top-p alone is taken among 1,024 ids
    kept = agrpo.truncate(logits, MASK, 1.0, top_p=0.999)
    assert kept.equal(agrpo.truncate(logits, MASK, 1.0, top_k=1024, top_p=0.999)) and kept.shape == (2, 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_is_one_on_the_first_update(dtype):
    """On the policy that sampled the ratio is exactly 1, however the sampler rounded."""
    model, sampling = mask_predictor().to(dtype), SETTINGS["blocks, top-p"]
    rollout = write(model, torch.tensor([PROMPT] * 32), **sampling)
    assert rollout.logp.dtype == rollout.entropy.dtype == torch.float32  # bfloat16 would be too coarse
    rollout = replace(rollout, logp=rollout.logp + 0.5 * (rollout.step >= 0))  # rounding, exaggerated
    run = partial(agrpo.policy_gradient, rollout=rollout, k=2, mask_id=MASK, temperature=sampling["temperature"])
    A = torch.linspace(-1, 1, 32)
    first, later = (run(model, advantage=A, on_policy=on_policy) for on_policy in (True, False))
    assert (first["clip_ratio"], first["kl"]) == (0, 0)
    assert run(None, advantage=0 * A, on_policy=True)["loss"] == 0  # nothing to learn, no pass
    assert later["clip_ratio"] > 0.1


@pytest.mark.parametrize("length_norm", ["sequence", "constant"])
@pytest.mark.parametrize("name", ["blocks", "top-k, top-p"])
def test_update_is_the_gradient_of_the_objective_as_written(name, length_norm):
    """Under another model than sampled, with clipping and KL: dJ / d theta, J written token by token; k covers all."""
    e, model, reference = enumerated(name), mask_predictor(seed=3), mask_predictor(seed=4)
    A = torch.randn(len(e.probability), 1, generator=seeded(0)).double()
    A[::3] = 0  # the KL counts there too
    logp, taken = e.logp_under(model), e.rollout.step >= 0
    rho, d = (logp - e.rollout.logp).exp(), e.logp_under(reference).detach() - logp
    gain = torch.where(A > 0, rho.clamp(max=1.3), rho.clamp(min=0.9)) * A
    kl = rho * (d.exp() - d - 1)
    # On average it is KL(policy || reference) of each step at the states visited.
    table, ref_table = (policy_table(m, e.sampling, e.keep)[0] for m in (model, reference))
    exact = (table.exp() * (table - ref_table)).masked_fill(~e.keep, 0).sum(-1)[e.state, torch.arange(kl.shape[1])]
    assert_close(*(gradient_of(e.probability @ (x * taken).sum(1), model) for x in (kl, exact)))
    length = e.rollout.num_steps if length_norm == "sequence" else torch.tensor(e.sampling["steps"])
    J = (((gain - 0.3 * kl) * taken).sum(1) / length).mean()
    options = {"eps_low": 0.1, "eps_high": 0.3, "beta": 0.3, "ref_model": reference, "length_norm": length_norm}
    options |= {"k": e.sampling["steps"] + 1, "on_policy": False} | e.policy
    proposal = proposal_of(e.rollout, "surprise")
    with mock.patch.object(agrpo, "draw_pairs", wraps=agrpo.draw_pairs) as draw:
        update, figures = update_of(model, e.rollout, A[:, 0], micro_batch=10, proposal=proposal, **options)
    assert_close(update, gradient_of(J, model))
    assert draw.call_args.args[3] is proposal and draw.call_args.args[1].equal((A[:, 0].abs() + 0.3) / length)
    clipped = ((A > 0) & (rho > 1.3) | (A < 0) & (rho < 0.9)).double()
    means = {"clip_ratio": clipped, "kl": kl}
    expected = {"loss": -J} | {name: value[taken].mean() for name, value in means.items()}
    assert figures == {name: pytest.approx(value.item(), 1e-9) for name, value in expected.items()}


def test_one_step_view_masks_everything_and_some_of_the_prompt():
    """diffu-GRPO: one step a row, from masks alone; a fresh prompt mask each time; its own old logp."""
    model, prompt = mask_predictor(), torch.full((500, 6), X)
    rollout = write(model, prompt, **BLOCKS)
    view = partial(agrpo.one_step_view, model, rollout, mask_id=MASK, temperature=1.0)
    one, two = (view(generator=seeded(n)) for n in (0, 1))
    assert not one.prompt.equal(two.prompt) and rollout.prompt.equal(prompt)
    assert one.prompt.unique().tolist() == [X, MASK] and abs((one.prompt == MASK).double().mean() - 0.15) < 0.02
    logits = model(input_ids=torch.cat([one.prompt, torch.full((500, 4), MASK)], 1)).logits[:, 6:, :MASK]
    exact = logits.detach().log_softmax(-1).gather(-1, rollout.completion[..., None]).squeeze(-1)
    assert_close(one.logp, exact.masked_fill(rollout.step < 0, 0))
    assert one.num_steps.eq(1).all() and one.step.equal(torch.where(rollout.step < 0, -1, 0))


KINDS, POINTS = ("uniform", "entropy", "surprise"), {"iid": "independent", "batch": "strata of the batch"}
POINTS |= {"row": "systematic in each row", "whole": "systematic in the batch, times |A| (ours)"}


def draw(points: str, k: int, proposal: Tensor, advantage: Tensor, rng) -> Tensor:
    """One draw's weights (B, T): of ours, in each row or in the whole batch; or of importance sampling, at independent
    points or at one in each of B x k strata (official)."""
    (B, T), weights = proposal.shape, torch.zeros_like(proposal)
    if points == "whole":
        rows, steps, drawn = agrpo.draw_pairs(torch.full((B,), T), advantage.abs(), k, proposal, rng)
        return weights.index_put((rows, steps), drawn)
    if points == "row":
        return weights.scatter_add(1, *draw_timesteps(torch.full((B,), T), k, proposal, rng))
    p, n = proposal / proposal.sum(1, keepdim=True), B * k
    stratum = torch.randperm(n, generator=rng) if points == "batch" else torch.randint(n, (n,), generator=rng)
    x = ((stratum + torch.rand(n, generator=rng, dtype=torch.float64)) / n).view(B, k)
    steps = torch.searchsorted(p.cumsum(1), x, right=True).clamp(max=T - 1)
    return weights.scatter_add(1, steps, 1 / (k * p.gather(1, steps)))


def refrains(C: int = 16, words: int = 4):
    """A mask predictor taught for a second to repeat four words: its early steps choose, its late ones mostly copy."""
    model, rng = mask_predictor(vocab=words + 1, width=32, spread=0.15).float(), seeded(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        text = torch.randint(words, (64, 4), generator=rng).repeat(1, C // 4)
        t = torch.rand(64, 1, generator=rng).clamp(min=0.05)
        masked = torch.rand(64, C, generator=rng) < t
        logits = model(input_ids=torch.where(masked, words, text)).logits.transpose(1, 2)
        loss = torch.nn.functional.cross_entropy(logits, text, reduction="none")
        optimizer.zero_grad()
        (loss * masked / t).sum(1).mean().backward()
        optimizer.step()
    return model.double()


@lru_cache
def variance_table(rows: int = 32, C: int = 16, rollouts: int = 4, draws: int = 150) -> dict[tuple, float]:
    """E |estimate - full gradient|^2 / |full gradient|^2 over timestep draws, rollouts given: by (proposal, points, k)."""
    model, rng, policy = refrains(), seeded(0), {"mask_id": 4, "temperature": 1.0}
    sampling = PLAIN | {"completion_length": C, "block_length": C, "steps": C, "eos_id": None} | policy
    variance, size = Counter(), 0.0
    for seed in range(rollouts):
        rollout = write(model, torch.zeros(rows, 1).long(), seed, **sampling)
        advantage = group_advantages((rollout.completion[:, 4:] == rollout.completion[:, :-4]).double().mean(1), 16)
        gradients = []  # of each (row, step): every estimate is a weighted sum of these
        for row, step in torch.cartesian_prod(torch.arange(rows), torch.arange(C)):
            logp, _ = step_logps(model, rollout, row[None], step[None], **policy)
            gradients.append(gradient_of(logp.sum() * advantage[row], model))
        product = torch.stack(gradients) @ torch.stack(gradients).T  # (rows x T, rows x T)
        size += float(product.sum())
        for kind, points, k in itertools.product(KINDS, POINTS, (1, 2, 4, 8)):
            proposal = proposal_of(rollout, kind)
            weights = torch.stack([draw(points, k, proposal, advantage, rng).flatten() for _ in range(draws)])
            variance[kind, points, k] += float(((weights - 1) @ product * (weights - 1)).sum(1).mean())
    return {key: value / size for key, value in variance.items()}


def test_mean_over_orders_is_a_lower_bound():
    """Averaged over the orders that lead to a text, the likelihood of the trajectory is the ELBO of the text's."""
    e = enumerated("plain")
    texts, text = e.rollout.completion.unique(dim=0, return_inverse=True)  # 3! trajectories lead to each
    total = lambda x: torch.zeros(len(texts)).double().index_add(0, text, x)
    exact, elbo = total(e.probability).log(), total(e.rollout.logp.sum(1)) / 6
    assert_close(exact.exp().sum().item(), 1.0)
    assert (elbo < exact + 1e-12).all() and (exact - elbo).max() > 0.01


def test_what_the_tables_show():
    """Other estimators point elsewhere, whatever the passes. What makes draws better: strata of rows, surprise, |A|."""
    for name, rows in bias_table().items():
        if name.startswith("AGRPO"):
            assert_close(rows, torch.tensor([[1.0, 1.0, 0.0]] * 8).double())
        else:
            most = 0.998 if "low-confidence" in name else 0.92 if "one step" in name else 0.993
            assert rows[:, 0].median() < most and rows[:, 2].median() > 0.05, (name, rows)
    for name, (bias, variance) in passes_table().items():
        assert variance > 0 and (bias < 1e-20 if "AGRPO" in name else bias > 0.005), (name, bias)
    table = variance_table()
    for kind, (k, most) in itertools.product(KINDS, ((4, 0.95), (8, 0.7))):
        assert table[kind, "row", k] < most * min(table[kind, "iid", k], table[kind, "batch", k])
    for k in (1, 2, 4, 8):
        assert table["surprise", "row", k] < 0.85 * table["entropy", "row", k] < 0.85 * table["uniform", "row", k]
        assert table["surprise", "whole", k] < 0.7 * table["surprise", "row", k]
    assert table["surprise", "whole", 8] < table["uniform", "iid", 8] / 50


def print_tables():
    spell = lambda text: " ".join("xy."[token] for token in text)
    print("1. Likelihood of a text (nats; '.' is EOS). Averaged over all orders the estimate is the ELBO: a bound\n")
    print("   text      log p exact    ELBO exact   mean estimate       gap")
    e = enumerated("plain")
    texts, text = e.rollout.completion.unique(dim=0, return_inverse=True)  # 3! trajectories lead to each
    exact, none = e.by_step.detach(), torch.zeros_like(e.probability)

    def estimates(k: int):  # mean and standard deviation over all timestep draws
        rows, share, weights = every_draw(proposal_of(e.rollout, "surprise"), e.rollout.num_steps, k)
        moment = lambda p: none.index_add(0, rows, share * (weights * exact[rows]).sum(1) ** p)
        return moment(1), (moment(2) - moment(1) ** 2).clamp(min=0).sqrt()

    total = lambda x: none[: len(texts)].index_add(0, text, x)
    marginal, elbo, estimate = total(e.probability).log(), total(exact.sum(1)) / 6, total(estimates(1)[0]) / 6
    for n in marginal.argsort(descending=True)[[0, 1, 2, 3, -2, -1]]:
        cells = f"{marginal[n]:14.8f}{elbo[n]:14.8f}{estimate[n]:16.8f}{marginal[n] - elbo[n]:10.4f}"
        print(f"   {spell(texts[n])}   {cells}")
    print(f"   mean gap over texts: {marginal.exp() @ (marginal - elbo):.4f}")

    print("\n2. Likelihood of a trajectory (nats). Estimate from k of its 3 steps: mean over draws +- deviation\n")
    print("   text   unmasked at       exact" + "".join(f"{f'k = {k}':>24s}" for k in (1, 2, 3)))
    by_k = [estimates(k) for k in (1, 2, 3)]
    for row in e.probability.argsort(descending=True)[:5]:
        cells = "".join(f"{mean[row]:14.8f} +-{deviation[row]:7.4f}" for mean, deviation in by_k)
        at = " ".join(map(str, e.rollout.step[row].tolist()))
        print(f"   {spell(e.rollout.completion[row])}  {at}     {exact[row].sum():14.8f}{cells}")

    print("\n3. Mean update over all trajectories, groups and draws, beside (1 - 1/G) grad E[reward] / T; 8 models\n")
    print(f"   {'median of the 8':32s}   cosine  (lowest)   |mean| / |exact|   relative error")
    for name, rows in bias_table().items():
        along, norm, error = rows.median(0).values.tolist()
        print(f"   {name:32s}{along:9.4f}{rows[:, 0].min():10.4f}{norm:19.4f}{error:17.1e}")

    passes, ks = (10, 100, 1000, 10000), (1, 2, 4, 8)
    print("\n4. Error of the mean of completions that cost P passes: bias + variance / P, over |gradient|^2; T = 4\n")
    print(f"   {'':28s}{'bias':>10s}{'variance':>10s}" + "".join(f"{f'P = {P}':>10s}" for P in passes))
    for name, (bias, variance) in passes_table().items():
        errors = "".join(f"{bias + variance / P:10.3f}" for P in passes)
        print(f"   {name:28s}{bias:10.3f}{variance:10.1f}{errors}")

    print("\n5. Variance of the gradient estimate over draws / |gradient|^2: 32 completions, T = 16\n")
    print(f"   {'proposal':12s}{'points':42s}" + "".join(f"{f'k = {k}':>9s}" for k in ks))
    for kind, points in itertools.product(KINDS, POINTS):
        figures = "".join(f"{variance_table()[kind, points, k]:9.3f}" for k in ks)
        print(f"   {kind:12s}{POINTS[points]:42s}{figures}")


# ===== 5. The command line, end to end ================================================================================

SHORT = "--pretrain_steps 2 --max_steps 4 --prompts_per_update 2 --group_size 4 --rollout_batch 8 --eval_steps 4 "
SHORT += "--eval_examples 8 --save_every 2 --show_every 2 --device cpu --output_dir"
TASKS, TINY = dict(agrpo.TASKS), agrpo.load_model
# Two steps of pretraining earn no reward, so there would be no gradient: pay for every odd character instead.
GENEROUS = replace(TASKS["sudoku"], credit=lambda _, answer: sum(ord(c) % 2 for c in answer) / 16)
PATHS = os.pathsep.join(str(Path(file).resolve().parent) for file in (agrpo.__file__, __file__))
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}


def words(*parts) -> list[str]:
    return " ".join(map(str, parts)).split()


def run(*parts, main=agrpo.main) -> str:
    """What a script prints."""
    with redirect_stdout(io.StringIO()) as printed:
        main(words(*parts))
    return printed.getvalue()


def refusal(*parts, main=agrpo.main) -> str:
    """The one sentence in which a script ends."""
    with pytest.raises(SystemExit) as stop, redirect_stderr(io.StringIO()) as printed:
        main(words(*parts))
    said = stop.value.code if isinstance(stop.value.code, str) else printed.getvalue().splitlines()[-1]  # argparse's
    assert re.match(r"(agrpo|eval)\.py: \S|\S+: error: ", said) and "\n" not in said
    return said


rows_of = lambda file: [json.loads(line) for line in file.read_text().splitlines()]
figures = lambda folder: rows_of(folder / "metrics.jsonl")


def same_run(*runs: Path) -> bool:
    """The same metrics, results and, bit for bit, weights and optimizer."""
    files = lambda run: [run / "results.json", *sorted(agrpo.checkpoints(run)[-1].glob("*.safetensors"))]
    one, other = ([figures(run), *(file.read_bytes() for file in files(run))] for run in runs)
    return one == other and len(one) == 4


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A whole run, cut short; printed.txt beside it is what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(agrpo.TASKS, "sudoku", GENEROUS)
        (folder.parent / "printed.txt").write_text(run(SHORT, folder))
        yield folder


def test_a_run_pretrains_measures_trains_and_saves(short_run):
    """It leaves all its files, prints a table and Sudokus, and is never overwritten; another seed is another run."""
    lines, results = figures(short_run), json.loads((short_run / "results.json").read_text())
    names = "update loss reward reward_std frac_reward_zero_std accuracy completion_length entropy kl "
    assert all({*words(names, "learning_rate")} <= line.keys() for line in lines) and len(lines) == 4
    assert all(0 < line["reward"] < 1 and line["grad_norm"] > 0 and line["clip_ratio"] == 0 for line in lines)
    rates = [7e-4 * (u + 1) / 20 * (1 + math.cos(math.pi * u / 4)) / 2 for u in range(4)]  # warm-up, cosine
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    for stage, sampler in itertools.product(("base", "AGRPO"), ("as trained", "greedy")):
        assert results[stage][sampler].keys() == {"4"} and 0 <= results[stage][sampler]["4"] <= 1
    assert [path.name for path in agrpo.checkpoints(short_run)] == ["checkpoint-2", "checkpoint-4"]
    printed, pretrained = (short_run.parent / "printed.txt").read_text(), short_run / "base"
    assert re.search(r"greedy.* 4\n +base +0\.\d+\n +AGRPO +0\.\d+\n\n  Greedy, AGRPO in 4 steps: 0\.\d+", printed)
    assert re.search(r"\n +[1-4.]( [1-4.]){3}   . . . .\n", printed)  # a puzzle, and what was made of it
    assert re.findall(r"^update (\d) of 4: reward \d", printed, re.MULTILINE) == [*"1234"]  # there is no terminal
    trained, base = (agrpo.load_model(str(folder))[0].parameters() for folder in (short_run, pretrained))
    assert any(not torch.equal(a, b) for a, b in zip(trained, base, strict=True))
    assert f"--resume {short_run}" in refusal(SHORT, short_run) and lines == figures(short_run)
    run(SHORT, short_run.parent / "seed1", "--seed 1 --max_steps 1")
    assert figures(short_run.parent / "seed1")[0] != lines[0]


def generous_main(*parts) -> None:
    agrpo.TASKS["sudoku"] = GENEROUS
    run(*parts)


def test_a_folder_is_one_run_s_alone(tmp_path, monkeypatch):
    """The next free name is taken; what another process holds, or holds a run, is refused; other files don't matter."""
    monkeypatch.chdir(tmp_path)
    for name in ("", "-2", "-3"):
        args = agrpo.parse_settings([])
        assert args.output_dir == f"runs/sudoku-tiny-seed0{name}"
        Path(args.output_dir).mkdir(parents=True)
    Path("mine").mkdir()
    Path("mine/sweep.yaml").write_text("seed: 0")
    load = lambda *_: Path("mine/settings.json").write_text("{}") and TINY(*_)  # another run takes it meanwhile
    monkeypatch.setattr(agrpo, "load_model", load)
    assert "File exists: 'mine/settings.json'" in refusal("--output_dir mine")
    assert "--resume mine" in refusal("--output_dir mine") and Path("mine/settings.json").read_text() == "{}"


def test_each_epoch_has_every_example_once_and_gradients_are_clipped(short_run, monkeypatch):
    """In another order each time; the norm of each gradient is at most 1."""
    created, chosen, generate = TASKS["sudoku"].create, [], agrpo.generate
    few = lambda split, seed: created(split, seed)[: 6 if split == "train" else None]

    def spy(*args, **changes):
        chosen.extend(example["puzzle"] for example in args[4][::4] if "rollout" in args[6])  # groups of 4
        return generate(*args, **changes)

    monkeypatch.setattr(agrpo, "generate", spy)
    monkeypatch.setitem(agrpo.TASKS, "sudoku", replace(GENEROUS, create=few))
    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", wraps=torch.nn.utils.clip_grad_norm_) as clip:
        run(SHORT, short_run.parent / "epochs", "--max_steps 6 --model", short_run / "base")
    epochs = [chosen[:6], chosen[6:]]
    assert len(chosen) == 12 and len({*chosen}) == 6 and {*epochs[0]} == {*epochs[1]} and epochs[0] != epochs[1]
    assert [call.args[1] for call in clip.call_args_list] == [1.0] * 6


def test_a_reward_that_is_not_finite_is_named(short_run, monkeypatch):
    monkeypatch.setitem(agrpo.TASKS, "sudoku", replace(GENEROUS, credit=lambda *_: math.nan))
    assert "the reward of sudoku is nan for {'puzzle'" in refusal(SHORT, short_run.parent / "nan")


def test_special_tokens_other_than_eos_and_padding_are_text(monkeypatch):
    """<answer> may be a token of its own: what the reward is computed on still has it. EOS or padding ends it."""
    model, tokenizer, mask_id = agrpo.load_model("tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>"]})
    for end in tokenizer.eos_token_id, tokenizer.pad_token_id:
        ids = tokenizer("<answer>42")["input_ids"] + [end, 5]
        monkeypatch.setattr(agrpo, "sample", lambda *_, ids=ids, **options: Rollout(*[torch.tensor([ids])] * 7))
        _, texts, _ = agrpo.generate(model, tokenizer, mask_id, GENEROUS, [{"puzzle": PUZZLE}], agrpo.Settings(), (0,))
        assert texts == ["<answer>42"]
    monkeypatch.undo()
    one, settings = [{"puzzle": PUZZLE}], agrpo.Settings(rollout_batch=1)
    _, texts, _ = agrpo.generate(model, tokenizer, mask_id, GENEROUS, one * 3, settings, (0,))
    assert len({*texts}) == 3  # each batch has noise of its own


def test_kill_9_at_any_moment_loses_nothing(tmp_path):
    """While it starts, pretrains, trains, writes; resumed, it ends bit for bit as the run that nobody killed."""
    context = multiprocessing.get_context("forkserver")  # its processes need not import everything again
    context.set_forkserver_preload([__name__])

    def finishes(folder: Path, updates: float, seconds: float) -> bool:
        """Whether a run ends before it has made so many updates and then had so much time; if not, it is killed."""
        made = lambda log=folder / "metrics.jsonl": len(rows_of(log)) if log.exists() else 0
        parts = ("--resume", folder) if folder.exists() else (SHORT, folder, "--max_steps 8 --save_every 3")
        process, enough = context.Process(target=generous_main, args=parts), made() + updates
        process.start()
        while process.is_alive() and made() < enough:
            time.sleep(0.005)
        process.join(seconds)
        code = process.exitcode
        process.kill()
        process.join()
        assert code in (0, None)
        return code == 0

    rng, kills, whole, *others = random.Random(0), 0, *(tmp_path / str(i) / "run" for i in range(40))
    assert finishes(whole, math.inf, 0)
    while kills < (20 if "SLOW" in os.environ else 4):
        while not finishes(others[0], updates := rng.randint(0, 3), rng.uniform(0, 0.1 if updates else 4)):
            kills += 1
        assert same_run(others.pop(0), whole)


def test_a_run_that_stops_says_how_to_go_on(short_run, monkeypatch):
    """Out of memory, Ctrl-C, no finite numbers: one sentence. What it says works, and what changes is printed."""
    folder, step_logps, errors = short_run.parent / "stopped", agrpo.step_logps, [None] * 3
    errors += [torch.OutOfMemoryError("Tried to allocate 2 GiB"), KeyboardInterrupt()]

    def stopping(*args, **options):
        if errors and (error := errors.pop(0)):
            raise error
        return step_logps(*args, **options)

    monkeypatch.setattr(agrpo, "step_logps", stopping)
    how = f"; to go on: --resume {folder}"
    said = refusal(SHORT, folder)  # in its fourth update
    assert "out of memory" in said and how in said and "--micro_batch" in said
    assert how in refusal("--resume", folder)
    printed = run("--resume", folder, "--micro_batch 2")
    assert "--micro_batch was 256, is 2 from here on\n" in printed and printed.count(" was ") == 1
    for ours, theirs in zip(figures(folder), figures(short_run), strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), 1e-3, 1e-5)
    said = refusal("--resume", folder, "--max_steps 8 --save_every 4 --learning_rate 1e30")
    assert "update 6 is not finite" in said and how in said and "--learning_rate" in said
    printed = run("--resume", folder, "--learning_rate 1e-4 --max_steps 6")
    assert "--learning_rate was 1e+30, is 0.0001 from here on" in printed and "--max_steps was 8, is 6" in printed
    assert [line["update"] for line in figures(folder)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in agrpo.checkpoints(folder)] == ["checkpoint-4", "checkpoint-6"]  # the newest two


@pytest.mark.parametrize("how", ["--method diffu_grpo", "--beta 0.1", "--report_to tensorboard --eval_every 1"])
def test_other_methods_and_options_run_to_the_end(how, short_run):
    """diffu-GRPO, a KL, tensorboard; several updates of a rollout, low confidence, top-k and top-p, the other norm."""
    if "tensorboard" in how:
        pytest.importorskip("tensorboard")
    folder = short_run.parent / re.sub(r"\W+", "", how)
    more = "--max_steps 2 --updates_per_rollout 2 --learning_rate 1e-2 --warmup_steps 0 --k 2 --steps 4 "
    if "beta" not in how:
        more += "--unmasking low_confidence --top_k 20 --top_p 0.9 --scale_by_std true "
    printed, lines = run(SHORT, folder, more, "--length_norm constant", how), figures(folder)
    assert len(lines) == 2 and all(abs(value) < 1e6 for line in lines for value in line.values())
    assert any(line["clip_ratio"] > 0 for line in lines)  # the second update of a rollout is off policy
    assert ("diffu-GRPO" in printed) == ("diffu" in how) and (lines[1]["kl"] > 0) == ("beta" in how)
    assert ("eval_accuracy" in lines[0]) == any(folder.glob("events.out.tfevents*")) == ("tensorboard" in how)


REFUSED = {
    "--block_length 5": "does not divide", "--steps 17": "17 steps must", "--eval_steps 4 0": "0 steps must",
    "--steps 3 --block_length 4": "multiple of 4 blocks", "--block_length 0": "--block_length must be above 0",
    "--group_size 1": "--group_size is at least 2", "--rollout_batch 0": "must be above 0",
    "--k 0": "--k must be above 0",
    "--temperature 0": "--temperature must be above 0", "--temperature nan": "--temperature must be",
    "--top_p 0": "--top_p must be", "--max_steps few": "invalid int",
    "--task chess": "invalid choice: 'chess'", "--task gsm8k --model tiny": "tiny knows only sudoku",
    "--data nowhere.csv": "nowhere.csv: no such file", "--model nowhere": "nowhere: no such file",
    "--model .": "no config.json", "--resume nowhere": "no settings.json there", "--no_such_option 1": "no_such_option",
    "--device abacus": "abacus", "--report_to wandb": "pip install wandb",
    "eval": "required: CHECKPOINT", "eval nowhere": "no such file", "eval tiny": "no such file",
    "eval B --steps 17": "17 steps", "eval B --steps few": "invalid int", "eval B --base nowhere": "no such file",
    "eval B --seeds 0 1": "--temperature above 0", "eval B --samples 4": "--temperature above 0",
    "eval B --task countdown": "128 positions", "eval B --device abacus": "abacus", "eval B --no_such 1": "no_such",
    "eval B --data nowhere": "no such file", "eval B --save old": "File exists", "eval B --save no/such": "No such file",
    "eval B --rollout_batch 0": "must be above 0", "eval B --temperature -1": "must be above 0",
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_mistakes_are_one_sentence_before_anything_starts(wrong, short_run, tmp_path, monkeypatch):
    """It names the setting; nothing is pretrained or written, and nothing that is there is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agrpo.importlib.util, "find_spec", lambda _: None)  # as if wandb were not installed
    monkeypatch.setattr(agrpo, "pretrain", None)
    Path("old").write_text("precious")
    script, base = curve if wrong.startswith("eval") else agrpo, f"{short_run}/base"
    assert REFUSED[wrong] in refusal(wrong.removeprefix("eval").replace("B ", base + " "), main=script.main)
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [("old", "precious")]


# ===== 6. Tasks and data ==============================================================================================

PUZZLE, GRID, CHANGED = "0310200404001043", "4312213434211243", "1234341221434321"  # CHANGED: another puzzle's grid
SIMPLE = "1234 1,234 $1,234.00 1234. \\boxed{1234} **1234** \\$1234 1234% 1{,}234 $1234$ 1234.000"
NO_SUM = "23 30+93-100+100-100 30+93-100+0 30+93-100=24 3093-100 30+93 30--93+100 30**93 30//93 1/0 "
NO_SUM += "__import__('os') 30+93-1_00 30(93)100"
ANSWERS = {  # task: example, right answers, wrong answers
    "sudoku": ({"puzzle": PUZZLE}, [GRID, GRID[:4] + "\n" + GRID[4:]], [
        CHANGED, GRID + " " * 100 + "more", "4312", GRID * 2, "\ud800" * 16, "٤٣١٢٢١٣٤٣٤٢١١٢٤٣", ""]),
    "countdown": ({"numbers": "30,100,93", "target": "23"}, [
        "30 + 93 - 100", "(93-100)\n+ 30 = 23", "93-(100-30)", "30+93\u2212100.", "So \\boxed{30+93-100}"], [
        *words(NO_SUM, "３０+93-100 -100+30+93 1e2-30-93"), "", "(" * 90, "30+93-100" * 99]),
    "gsm8k": ({"gold": "1,234"}, [
        *words(SIMPLE), "\\boxed{1,234} apples", "= 1234 km", "T-shirts: 1234", "Rs.1234", "1234 m^2", "1234 km²"], [
        "1234 1234", "1233 or 1234", "1 234", "\\boxed{1234} \\boxed{1}", "\\boxed{1234} \\boxed{5", "1234" * 99,
        "١٢٣٤", "1234²", "1234½", "",
        "x", *words("\\sqrt{1234} 1234! 1234\\pi 1234\u03c0 x*1234 1234*x 1234^n"),
        *words("-1234 - 2468 -$1,234.00 \u20131234 -(1234) 01,234 12,34 1234/1 12$34 12\\34")]),
    "math": ({"solution": "So it is $\\boxed{42}$."}, ["\\boxed{42}", "It is \\boxed{\\frac{84}{2}}"], [
        "42 \\boxed{}", "\\boxed{?} 42", "\\boxed{41}. The final answer is $42$.", "42", "\\boxed{9^{9^9}}"]),
}  # fmt: skip


def solved(puzzle: str, grid: str) -> bool:
    """Whether a 4x4 grid keeps the clues and every row, column and box has 1 to 4: written apart from agrpo's."""
    lines = [grid[i : i + 4] for i in (0, 4, 8, 12)] + [grid[i::4] for i in range(4)]
    lines += [grid[i : i + 2] + grid[i + 4 : i + 6] for i in (0, 2, 8, 10)]
    kept = len(grid) == 16 and all(clue in "0" + cell for clue, cell in zip(puzzle, grid))
    return kept and all("".join(sorted(line)) == "1234" for line in lines)


@pytest.mark.parametrize("task", ANSWERS)
def test_right_and_wrong_answers(task):
    """However it is written, right is right; anything else, too long or dangerous, is wrong and not an error."""
    if task == "math":
        pytest.importorskip("math_verify")
    (example, right, wrong), judge = ANSWERS[task], TASKS[task].is_right
    assert [a for a in right if not judge(example, a)] == [a for a in wrong if judge(example, a)] == []
    if task == "countdown":
        product = {"numbers": "[2, 3, 4]", "target": "24"}
        assert all(judge(product, f"2 {times} 3 {times} 4") for times in words("\\times × \\cdot ·"))
    if task == "math":
        with ThreadPoolExecutor(1) as other, pytest.raises(ValueError, match="thread"):
            other.submit(judge, example, right[0]).result()
    if task == "gsm8k":
        assert all(judge({"gold": "-1,234"}, minus + "$1234") for minus in ("-", "\u2013", "- "))
        assert not any(judge({"gold": "-1234"}, answer) for answer in right)


def test_rewards_count_tags_once_and_only_a_right_answer_scores_full_marks():
    """3 for the answer, 0.5 for each pair of tags; a pair written twice, or the wrong way round, is none."""
    right, example = "<reasoning>r</reasoning><answer>(1 + 2) * 3</answer>", {"numbers": "1,2,3", "target": "9"}
    graded = {right: 4, right.replace("* 3", "* 4"): 1, "<answer>(1 + 2) * 3</answer>": 3.5, "(1 + 2) * 3": 3}
    graded |= {
        "(1 + 2) * 3</answer>": 0,
        right + "<answer>9</answer>": 0.5,
        "</answer>(1 + 2) * 3<answer>": 0,
        "<answer>" * 99 + right[22:]: 0,
    }
    for completion, reward in graded.items():
        assert TASKS["countdown"].grade(example, completion) == (reward, reward >= 3), completion
    sudoku, example = TASKS["sudoku"], {"puzzle": PUZZLE}
    assert sudoku.grade(example, f"<answer>{GRID}</answer>") == (3 + 1 + 0.5, True)
    assert sudoku.grade(example, GRID) == (4, True) and sudoku.grade(example, CHANGED) == (0, False)
    assert 0 < sudoku.grade(example, GRID.replace("1243", "1143"))[0] < 1  # its share of rows, columns and boxes


def test_sudoku_and_countdown_make_examples():
    """240 grids to train on, 48 others to test on, whatever the seed; 12 to 14 blanks; Countdown has three numbers."""
    task = TASKS["sudoku"]
    train, test = (task.examples(split, agrpo.Settings(seed=5)) for split in ("train", "test"))
    seen, held_out = ({example["solution"] for example in part} for part in (train, test))
    assert (len(seen), len(held_out), len(seen | held_out)) == (240, 48, 288)
    assert test == task.examples("test", agrpo.Settings(seed=6)) and train != task.examples("train", agrpo.Settings())
    assert all(12 <= e["puzzle"].count("0") <= 14 and solved(e["puzzle"], e["solution"]) for e in train + test)
    pretraining = {example["solution"] for example in task.create("pretrain", 5)}  # of them 240 grids
    assert len(pretraining) == 528 and seen < pretraining and not held_out & pretraining
    assert all(sorted(square[i::4]) == sorted(square[:4]) == [*"1234"] for square in pretraining for i in range(4))
    for split, many in ("train", 4096), ("test", 256):
        problems = TASKS["countdown"].examples(split, agrpo.Settings(task="countdown"))
        assert [p["numbers"].count(",") == 2 and 0 < int(p["target"]) < 1000 for p in problems] == [True] * many


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet", "test.jsonl", "test-0000N-of-00002.csv"])
def test_data_are_read_from_files_and_folders(name, tmp_path):
    """Every format; a folder with a test.* or its shards. Leading zeros stay, and a line separator ends no row."""
    row = {"more": 1, "question": "q\u2028r", "answer": "so\n#### 5", "Puzzle": PUZZLE, "Solution": GRID}
    files = [tmp_path / name.replace("N", str(n)) for n in range(1 + ("N" in name))]
    for file in files:
        kind, options = file.suffix[1:].removesuffix("l"), {"lines": True} if file.suffix == ".jsonl" else {}
        getattr(datasets.Dataset.from_list([row]), f"to_{kind}")(file, **options)
    (tmp_path / "testimony.csv").write_text("nothing to do with it")
    settings = agrpo.Settings(data=str(tmp_path if name.startswith("test") else files[0]))
    assert TASKS["gsm8k"].examples("test", settings) == [{"question": "q\u2028r", "gold": "5"}] * len(files)
    assert TASKS["sudoku"].examples("test", settings) == [{"puzzle": PUZZLE, "solution": GRID}] * len(files)


def test_countdown_data_of_others_and_folders_of_both_splits(tmp_path):
    """Columns nums and target, a list of numbers; a folder with a train.* is used for both; shards must be complete."""
    task, settings = TASKS["countdown"], agrpo.Settings(data=str(tmp_path))
    for split, target in ("train", 98), ("test", 99), ("test-small", 1):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"nums": [44, 19, 35], "target": target}))
    for split, target in ("train", "98"), ("test", "99"):
        assert task.examples(split, settings) == [{"numbers": "44, 19, 35", "target": target}]
    (tmp_path / "test.jsonl").rename(tmp_path / "test-00000-of-00002.jsonl")
    with pytest.raises(agrpo.BadInput, match="not one test.csv"):
        task.examples("test", settings)


ROW = '{"question": "q", "answer": "#### 5"}\n'
BAD_DATA = {
    "no column": ("a.csv", "Question,answer\n1,2\n", "row 1: no question like .+ in {'Question': 1"),
    "empty value": ("a.csv", "question,answer\nq,#### 5\nq,\n", "row 2: no answer"),
    "no rows": ("a.csv", "question,answer\n", "no rows"), "no bytes": ("a.jsonl", "", "not readable"),
    "cut short": ("a.jsonl", ROW + ROW[:30], "not readable"), "no table": ("a.json", "[" * 1000, "not readable"),
    "no field": ("a.jsonl", ROW + '{"question": "q"}', "row 2: no answer"),
    "null": ("a.jsonl", ROW + '{"question": null, "answer": "#### 5"}', "row 2: no question"),
    "no number": ("a.jsonl", ROW.replace("5", "five"), "row 1: no answer"),
    "no parquet": ("a.parquet", "nonsense", "not readable"), "no format": ("a.txt", "q", ".parquet"),
    "latin-1": ("a.csv", "question,answer\ncaf\xe9,#### 5\n", "not readable"), "one file": ("a.jsonl", ROW, "train."),
    "lost zeros": ("a.csv", f"Puzzle,Solution\n{PUZZLE},{GRID}\n{PUZZLE[1:]},{GRID}\n", "row 2: no Puzzle"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_DATA)
def test_data_that_are_not_what_they_should_be_are_named(what, tmp_path):
    """The file, and the column or the row, in one sentence; one file is to test on."""
    (name, content, said), task = BAD_DATA[what], "sudoku" if what == "lost zeros" else "gsm8k"
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(agrpo.BadInput, match=re.escape(said)) as refused:
        TASKS[task].examples("train" if what == "one file" else "test", agrpo.Settings(data=str(tmp_path / name)))
    assert name in str(refused.value) and "\n" not in str(refused.value)


# ===== 7. Models ======================================================================================================

IDS = torch.arange(5, 23).view(2, 9)


def llada_checkpoint(folder: Path, **change) -> dict:
    """A small random checkpoint as GSAI-ML/LLaDA-8B-Instruct's is laid out: its config, its names, a chat template."""
    _, tokenizer, mask_id = agrpo.load_model("tiny")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder)
    raw = {"model_type": "llada", "architectures": ["LLaDAModelLM"], "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    raw |= {"auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}}
    raw |= {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 96, "vocab_size": 128}
    raw |= {"embedding_size": 128, "max_sequence_length": 2048, "weight_tying": False, "mask_token_id": mask_id}
    (folder / "config.json").write_text(json.dumps(raw | change))
    shapes = {"wte": (128, 32), "ln_f": (32,), "ff_out": (128, 32)}
    block = {"attn_norm": (32,), "ff_norm": (32,), "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32)}
    block |= {"attn_out": (32, 32), "ff_proj": (96, 32), "up_proj": (96, 32), "ff_out": (32, 96)}
    shapes |= {f"blocks.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    rng = torch.Generator().manual_seed(0)
    weights = {f"model.transformer.{n}.weight": 0.2 * torch.randn(s, generator=rng) for n, s in shapes.items()}
    agrpo.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def dream_checkpoint(folder: Path) -> None:
    """A small random checkpoint as Dream-org/Dream-v0-Instruct-7B's is laid out: Qwen2's names, a BPE tokenizer."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    Qwen2ForCausalLM(Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **shape)).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "Dream", "mask_token_id": 257, "auto_map": {"AutoModel": "modeling_dream.DreamModel"}}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(bytes_to_unicode().values())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {str(i): {"content": text, "special": True} for i, text in ((256, "<|endoftext|>"), (257, "<|mask|>"))}
    tokenizer = {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": added, "mask_token": "<|mask|>"}
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    tokenizer |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_llada_loads_as_a_llama_and_is_saved_under_its_own_names(tmp_path):
    """Every weight arrives; attention looks both ways; saving gives LLaDA's names and config back, and loads again."""
    weights = llada_checkpoint(tmp_path / "llada")
    model, tokenizer, mask_id = agrpo.load_model(str(tmp_path / "llada"))
    assert mask_id == tokenizer.mask_token_id and type(model).__name__ == "LlamaForCausalLM"
    layer, theirs = model.model.layers[1], lambda name: weights[f"model.transformer.blocks.1.{name}.weight"]
    for name, ours in {  # as in the published modeling code: silu(ff_proj) * up_proj
        "ff_proj": layer.mlp.gate_proj, "up_proj": layer.mlp.up_proj, "ff_out": layer.mlp.down_proj,
        "attn_norm": layer.input_layernorm, "ff_norm": layer.post_attention_layernorm, "q_proj": layer.self_attn.q_proj,
        "k_proj": layer.self_attn.k_proj, "v_proj": layer.self_attn.v_proj, "attn_out": layer.self_attn.o_proj,
    }.items():  # fmt: skip
        assert torch.equal(ours.weight, theirs(name))
    logits, changed = model(IDS).logits, IDS.clone()
    changed[:, -1] += 1
    assert not torch.allclose(logits[:, 0], model(changed).logits[:, 0])  # the first position sees the last
    agrpo.save_model(model, tokenizer, tmp_path / "saved")
    saved = agrpo.load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)
    assert torch.equal(agrpo.load_model(str(tmp_path / "saved"))[0](IDS).logits, logits)


def test_what_lies_in_a_folder_comes_first(tmp_path):
    """A Trainer's folder is the model in it, not an older checkpoint-500 beside it."""
    llada_checkpoint(tmp_path / "llada")
    llada_checkpoint(tmp_path / "llada" / "checkpoint-500", n_layers=3)
    agrpo.load_model(str(tmp_path / "llada"))


def a2d_checkpoint(folder: Path, kind: str, tied: bool, **change):
    """A small random checkpoint as dLLM's are laid out: a Qwen3, Qwen2 or Llama under another model_type, <|im_end|> as
    EOS, more rows in its vocabulary than tokens. Returns transformers' own model of it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    name = kind.capitalize()
    config, model = (getattr(transformers, name + part) for part in ("Config", "ForCausalLM"))
    causal = model(config(**shape, max_position_embeddings=2048)).eval()
    causal.save_pretrained(folder)
    stored = agrpo.load_file(folder / "model.safetensors") | {"lm_head.weight": causal.lm_head.weight.detach().clone()}
    agrpo.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text()) | {"model_type": f"a2d-{kind}", "is_causal": True} | change
    (folder / "config.json").write_text(json.dumps(raw))
    _, tokenizer, _ = agrpo.load_model("tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ enable_thinking }}"
    tokenizer.save_pretrained(folder)
    return causal, raw


@pytest.mark.parametrize(("kind", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", False)])
def test_a2d_checkpoints_are_transformers_models_that_look_both_ways(kind, tied, tmp_path):
    """The logits of transformers' model given an explicit mask of ones, padded or not; the config comes back as it was.
    It trains with LoRA from the command line, resumes and is measured."""
    causal, raw = a2d_checkpoint(tmp_path / "a2d", kind, tied)
    model, tokenizer, _ = agrpo.load_model(str(tmp_path / "a2d"))
    everywhere = torch.arange(9).expand(2, 9)
    for pad in 0, 2:
        real = torch.arange(9).expand(2, 9) >= pad
        mask = torch.where(real[:, None, None, :], 0.0, torch.finfo(torch.float32).min).expand(2, 1, 9, 9)
        places = (real.long().cumsum(1) - 1).clamp(min=0)
        expected = causal(input_ids=IDS, attention_mask=mask, position_ids=places).logits
        found = agrpo.logits_at(model, IDS, real, everywhere)
        torch.testing.assert_close(found[:, pad:], expected[:, pad:], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found[:, pad], causal(input_ids=IDS).logits[:, pad], atol=1e-3)  # it looks ahead
    agrpo.save_model(model, tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == raw
    assert torch.equal(agrpo.load_model(str(tmp_path / "saved"))[0](IDS).logits, model(IDS).logits)
    for split, answer in ("train", 505), ("test", 606):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": f"{answer}?", "answer": f"#### {answer}"}))
    where = f"--task gsm8k --model {tmp_path}/a2d --data {tmp_path} --output_dir {tmp_path}/run --answer_format boxed"
    assert "Nothing to learn from" in run(LLADA_RUN, where)
    run("--resume", tmp_path / "run", "--max_steps 3")
    run(tmp_path / "run", "--device cpu --save", tmp_path / "all", main=curve.main)
    prompt = rows_of(tmp_path / "all")[0]["prompt"]
    assert len(figures(tmp_path / "run")) == 3 and "within \\boxed{}.False" in prompt and "<answer>" not in prompt


def test_block_causal_relatives_and_windows_are_refused(tmp_path):
    for name, change in ("Qwen3-bd3lm", {}), ("a", {"use_sliding_window": True}), ("b", {"layer_types": ["sliding"]}):
        a2d_checkpoint(tmp_path / name, "qwen2", True, **change)
        with pytest.raises(agrpo.BadInput, match="here all tokens see each other"):
            agrpo.load_model(str(tmp_path / name))
    assert agrpo.parse_settings(["--task", "gsm8k", "--model", "qwen3-0.6b"]).model == agrpo.SMALL["model"]


CANNOT_SERVE = {  # what is said: what is changed in its config
    "missing.*layers.2.*unexpected": {"n_layers": 3}, "unexpected.*layers.1.*mismatched": {"n_layers": 1},
    "gpt2": {"model_type": "gpt2"}, "billions.*for a CPU": {"d_model": 4096, "n_layers": 32, "mlp_hidden_size": 12288},
}  # fmt: skip


@pytest.mark.parametrize("said", CANNOT_SERVE)
def test_a_checkpoint_that_cannot_serve_is_refused_by_name(said, tmp_path):
    """Missing or unexpected weights, another architecture, billions of parameters on a CPU."""
    llada_checkpoint(tmp_path / "llada", **CANNOT_SERVE[said])
    with pytest.raises(agrpo.BadInput, match=said):
        agrpo.load_model(str(tmp_path / "llada"))


def test_dream_reads_its_logits_one_place_to_the_left(tmp_path):
    """logits_at hands out, for position i, what Dream computes at i - 1; the tokenizer loads without remote code."""
    dream_checkpoint(tmp_path / "dream")
    model, tokenizer, mask_id = agrpo.load_model(str(tmp_path / "dream"))
    agrpo.save_model(model, tokenizer, tmp_path / "saved")
    again, tokenizer, again_id = agrpo.load_model(str(tmp_path / "saved"))
    assert mask_id == again_id == 257 and tokenizer.eos_token_id == 256 and tokenizer("ab")["input_ids"] != []
    positions = torch.tensor([[1, 5], [3, 2]])
    expected = model(IDS).logits.gather(1, (positions - 1)[..., None].expand(-1, -1, 300))
    torch.testing.assert_close(agrpo.logits_at(again, IDS, None, positions), expected)


def adapter_and_merged(folder: Path):
    """A LLaDA with random LoRA weights, saved as an adapter and merged; returns its logits."""
    llada_checkpoint(folder / "llada")
    model, tokenizer, _ = agrpo.load_model(str(folder / "llada"))
    before, _ = model(IDS).logits, agrpo.add_lora(model, r=4, alpha=8.0)
    assert torch.equal(model(IDS).logits, before)  # at first it is the model itself
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)
    torch.manual_seed(0)
    for name in trained:
        torch.nn.init.normal_(model.get_parameter(name), std=0.3)
    logits = model(IDS).logits
    agrpo.save_model(model, tokenizer, folder / "adapter")
    agrpo.save_model(agrpo.merge_lora(model), tokenizer, folder / "merged")
    return logits


def test_adapters_of_others(tmp_path):
    """Of some layers only, under LLaDA's names, as d1 has it; made by peft. What is not in safetensors is named."""
    adapter_and_merged(tmp_path)
    saved = agrpo.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = {name: tensor for name, tensor in saved.items() if re.search("[qkv]_proj", name)}
    rename = lambda name: name.replace(".layers.", ".transformer.blocks.").replace("self_attn.", "")
    for folder, change in (tmp_path / "ours", str), (tmp_path / "theirs", rename):
        shutil.copytree(tmp_path / "adapter", folder)
        agrpo.save_file({change(n): x for n, x in ours.items()}, folder / "adapter_model.safetensors")
    ours, theirs, whole = (agrpo.load_model(str(tmp_path / n))[0](IDS).logits for n in ("ours", "theirs", "adapter"))
    assert torch.equal(ours, theirs) and not torch.allclose(ours, whole)
    (tmp_path / "theirs" / "adapter_model.safetensors").rename(tmp_path / "theirs" / "adapter_model.bin")
    with pytest.raises(agrpo.BadInput, match="only plain LoRA in adapter_model.safetensors"):
        agrpo.load_model(str(tmp_path / "theirs"))
    peft, (base, _, _) = pytest.importorskip("peft"), agrpo.load_model(str(tmp_path / "llada"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "peft")
    torch.testing.assert_close(agrpo.load_model(str(tmp_path / "peft"))[0](IDS).logits, model.eval()(IDS).logits)


LLADA_RUN = "--max_steps 2 --prompts_per_update 2 --group_size 2 --rollout_batch 2 --k 2 --completion_length 12 "
LLADA_RUN += "--block_length 6 --steps 4 --eval_steps 4 --eval_examples 2 --lora_rank 2 --device cpu "


def test_lora_is_saved_loaded_merged_measured_and_read_by_peft(tmp_path):
    """The adapter's folder loads to the same logits, merged to rounding; a new adapter may go on top of it."""
    logits, folder = adapter_and_merged(tmp_path), tmp_path / "adapter"
    assert torch.equal(agrpo.load_model(str(folder))[0](IDS).logits, logits)
    merged, _, _ = agrpo.load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    printed = run(LLADA_RUN, f"--task countdown --model {folder} --output_dir {tmp_path}/run")
    assert "Nothing to learn from" in printed  # so B is still 0
    torch.testing.assert_close(agrpo.load_model(str(tmp_path / "run"))[0](IDS).logits, logits, rtol=1e-4, atol=1e-4)
    options = curve.parse_options([str(folder)])
    assert (options.steps, options.completion_length, options.block_length) == ([256, 128, 64, 32], 256, 32)
    more = f"--base {tmp_path}/merged --task countdown --examples 2 --save {tmp_path}/all --show 1 --device cpu"
    printed = run(folder, more, "--completion_length 12 --block_length 6 --steps 4 2", main=curve.main)
    written = Counter((row["steps"], row["example"], row["completion"]) for row in rows_of(tmp_path / "all"))
    assert "step 4 of 4" in printed and [*written.values()] == [2] * 4
    for change in {"r": 8}, {"use_rslora": True}:
        other = shutil.copytree(folder, tmp_path / f"{change}")
        config = json.loads((folder / "adapter_config.json").read_text()) | change
        (other / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(agrpo.BadInput, match="adapter"):
            agrpo.load_model(str(other))
    base, peft = agrpo.load_model(str(tmp_path / "llada"))[0], pytest.importorskip("peft")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, str(folder)).eval()(IDS).logits, logits)


@pytest.mark.parametrize("task", ["gsm8k", "countdown", "sudoku"])
def test_a_llada_checkpoint_trains_with_lora_on_each_task(task, tmp_path, monkeypatch):
    """Chat prompts, the release's settings cut short, data from files: an adapter that loads, a run that resumes."""
    llada_checkpoint(tmp_path / "llada")
    row = {"question": "How much is 1 + 1?", "answer": "#### 2", "input": "30,100,93", "output": "23"}
    row |= {"Puzzle": PUZZLE, "Solution": GRID}
    (tmp_path / "test.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    row |= {"question": "How much is 2 + 0?", "input": "30,101,94", "Puzzle": "0" + PUZZLE[1:].replace("1", "0")}
    with open(tmp_path / "train.jsonl", "w") as file:
        file.write(f"{json.dumps(row)}\n" * 4 + (tmp_path / "test.jsonl").read_text().partition("\n")[0])
    rewards, folder = itertools.count(), tmp_path / "run"
    monkeypatch.setattr(agrpo.Task, "grade", lambda *_: (next(rewards), False))  # what a random model writes earns 0
    where = f"--task {task} --model {tmp_path}/llada --data {tmp_path} --output_dir {folder}"
    run(LLADA_RUN, where, "--gradient_checkpointing true --beta 0.1")
    printed = run("--resume", folder, "--max_steps 3")
    assert "1 left out" in printed and "--max_steps was 2, is 3 from here on" in printed
    assert len(figures(folder)) == 3 and all(line["grad_norm"] > 0 for line in figures(folder))
    assert json.loads((folder / "settings.json").read_text())["top_k"] == 150  # the release's
    weights = agrpo.load_file(agrpo.checkpoints(folder)[-1] / "adapter_model.safetensors").values()
    assert len(weights) == 28 and all(weight.abs().sum() > 0 for weight in weights)


def test_away_from_the_hub_one_sentence_says_what_would_work(tmp_path, monkeypatch):
    """No network, nothing cached: no retries, no traceback."""
    monkeypatch.setattr(agrpo.hub, "snapshot_download", mock.Mock(side_effect=ConnectionError("no route")))
    for task, option in ("gsm8k", "--data"), ("countdown", "--model"):
        said = refusal(f"--task {task} --device cpu --output_dir {tmp_path}/run")
        assert all(words in said for words in ("(no route)", f"{option} FOLDER", "python agrpo.py"))


class Living(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the tensors alive, and the most there were. Fake ones, without contents, count as if real."""

    now = most = 0

    def add(self, size: int):
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for storage in (x.untyped_storage() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)):
            if not hasattr(storage, "counted"):
                storage.counted = finalize(storage, self.add, -storage.nbytes())
                self.add(storage.nbytes())
        return result


def peak_memory(config, args, length: int = 256, fake: bool = True) -> list[float]:
    """Peak GiB of an update, a rollout batch and one of evaluation, with all that training holds meanwhile. Its code
    runs, a step a block, on fake weights and real ids, at which `logits_at` looks; with the mask, which no fake token
    replaces, as EOS a block will do. fake=False: on real weights, and the kernel counts."""
    status, peaks, sampling = Path("/proc/self/status"), [], {name: getattr(args, name, 1) for name in PLAIN}
    resident = lambda name: int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1]) / 2**20
    before = 0 if fake else resident("VmRSS")
    one_step = mock.patch.object(agrpo, "tokens_per_step", lambda length, block, steps: [length // steps])
    numbers = mock.patch.multiple(Tensor, tolist=lambda _: [1.0] * 4, item=lambda _: 1.0, __float__=lambda _: 1.0)
    with Living() as living, one_step, numbers:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device("cpu"):
            model = transformers.AutoModelForCausalLM.from_config(config).train(args.gradient_checkpointing)
            agrpo.add_lora(model, args.lora_rank, args.lora_rank)
        args.gradient_checkpointing and model.activation_checkpointing_enable()
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)  # as on GPUs
        prompt = torch.randint(2, 99, (args.rollout_batch, length))
        mask = torch.arange(prompt.numel()).view(prompt.shape) != length  # the second prompt is padded
        roll = partial(sample, model, prompt, mask, **sampling)
        some = Rollout(*(None if x is None else x[: args.micro_batch] for x in vars(roll()).values()))
        A = torch.ones(args.micro_batch)
        learn = partial(agrpo.policy_gradient, model, some, A, k=1, mask_id=1, temperature=1.0, on_policy=True)
        measured = partial(roll, unmasking="low_confidence", temperature=0.0)
        for work in learn, adam.step, lambda: (learn(), adam.step()), roll, measured:
            living.most = living.now
            fake or status.with_name("clear_refs").write_text("5")  # the peak so far is forgotten
            work()
            peaks.append(living.most / 2**30 if fake else resident("VmHWM") - before)
    return peaks[2:]  # before, there were no gradients and states of Adam


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process")
def test_memory_estimate_is_what_a_process_grows_by(monkeypatch):
    """Within 15 %, on a CPU, with 27 million weights. A tiny model goes first, to load what stays loaded."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the kernel at once
    shape = {"intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 16384}
    tiny, big = (LlamaConfig(hidden_size=width, **shape, **agrpo.FULL) for width in (16, 512))
    less = agrpo.Settings(lora_rank=8, micro_batch=8, rollout_batch=8, gradient_checkpointing=True)
    with multiprocessing.get_context("spawn").Pool(1) as process:
        process.apply(peak_memory, (tiny, less, 64, False))
        for args in less, replace(less, gradient_checkpointing=False):
            assert process.apply(peak_memory, (big, args, 64, False)) == pytest.approx(peak_memory(big, args, 64), 0.15)


def print_memory():
    print("Peak memory in GiB, an estimate, and the smallest GPU with a tenth to spare; prompts of 256 tokens\n")
    print("   model  micro_batch  gradient_checkpointing    update   rollout  evaluation   GPU")
    llada = LlamaConfig(intermediate_size=12288, vocab_size=126464, dtype="bfloat16", **agrpo.FULL), agrpo.RELEASE
    qwen = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    qwen |= {"num_key_value_heads": 8, "tie_word_embeddings": True, "dtype": "bfloat16"} | agrpo.FULL  # else defaults
    small = transformers.Qwen3Config(**qwen), agrpo.SMALL
    for (config, settings), size, less in itertools.product((llada, small), (8, 2, 1), (False, True)):
        need = peak_memory(config, agrpo.Settings(**settings | {"micro_batch": size, "gradient_checkpointing": less}))
        gpu = min(gpu for gpu in (12, 24, 48, 80) if max(need) < 0.9 * gpu)
        print("   {:5s}{:13d}{!s:>24s}{:10.1f}{:10.1f}{:12.1f}{:6d}".format(config.model_type, size, less, *need, gpu))


# ===== 8. eval.py and the README ======================================================================================


@pytest.fixture(scope="module")
def half_known(tmp_path_factory, short_run):
    """A folder with a model that knows 8 of 24 puzzles by heart, a run of training on top of it, and the puzzles."""
    folder, examples = tmp_path_factory.mktemp("curve"), TASKS["sudoku"].examples("test", agrpo.Settings())[:24]
    known = [(example["puzzle"], example["solution"]) for example in examples]
    (folder / "puzzles.csv").write_text("\n".join(["Puzzle,Solution", *map(",".join, known)]))
    torch.manual_seed(0)
    model, tokenizer, mask_id = agrpo.load_model("tiny")
    agrpo.pretrain(model, tokenizer, mask_id, known[:8], seed=0, steps=150, batch=16)
    agrpo.save_model(model, tokenizer, folder / "base")
    more = f"--model {folder}/base --data {folder}/puzzles.csv --eval_steps 4 2 1 --eval_examples 0 --max_steps 2"
    run(SHORT, folder / "run", more, "--learning_rate 2e-3")
    return folder


RANDOM = "--unmasking random --temperature 1 "


@pytest.mark.parametrize("how", ["", RANDOM, RANDOM + "--samples 3 --seeds 0 1"])
def test_eval_gives_the_figures_of_training_and_counts_what_it_saved(how, half_known, tmp_path):
    """With the run's own settings; every figure again from the saved lines alone; --show ends in the completion."""
    files = f"--base {half_known}/base --save {tmp_path}/all --output {tmp_path}/found --show 2 --device cpu "
    files += f"--plot {tmp_path}/curve.png" if find_spec("matplotlib") else ""
    printed = run(half_known / "run", files, how, main=curve.main)
    assert (tmp_path / "curve.png").exists() == bool(find_spec("matplotlib"))
    found, lines = json.loads((tmp_path / "found").read_text())["results"], rows_of(tmp_path / "all")
    training, repeats = json.loads((half_known / "run" / "results.json").read_text()), 6 if "samples" in how else 1
    assert len(lines) == 2 * 3 * 24 * repeats and any(0 < f["accuracy"] < 1 for f in found["trained"].values())
    assert all(line["correct"] == solved(line["prompt"], line["completion"]) for line in lines)
    mean = lambda values: pytest.approx(sum(values) / len(values))
    for (model, stage), steps in itertools.product((("base", "base"), ("trained", "AGRPO")), (4, 2, 1)):
        mine, figure = [r for r in lines if (r["model"], r["steps"]) == (model, steps)], found[model][str(steps)]
        assert figure["accuracy"] == mean([r["correct"] for r in mine]) and figure["tokens/pass"] == 16 / steps
        assert all(figure[name] == mean([r[name] for r in mine]) for name in ("as released", "length"))
        assert figure["95% interval"] == pytest.approx(curve.wilson(figure["accuracy"], 24))
        if repeats == 1:
            assert figure["accuracy"] == training[stage]["as trained" if how else "greedy"][str(steps)]
            continue
        groups = [[r for r in mine if (r["seed"], r["example"]) == key] for key in itertools.product((0, 1), range(24))]
        assert figure["majority@3"] == mean([curve.vote(group, "sudoku") for group in groups])
        assert figure["pass@3"] == mean([any(r["correct"] for r in group) for group in groups])
        assert figure["by seed"] == [mean([r["correct"] for r in mine if r["seed"] == seed]) for seed in (0, 1)]
    grids = re.findall(r"step \d of 4\n((?:.+\n){4})", printed)
    frames = ["".join(line[-7::2] for line in grid.splitlines()) for grid in grids]
    for line, shown in zip(lines, (frames[:4], frames[4:]), strict=False):
        assert [frame.count("░") for frame in shown] == [12, 8, 4, 0] and shown[-1].startswith(line["completion"])
        assert all({*cells} <= {"░", cells[-1]} and list(cells) == sorted(cells, reverse=True) for cells in zip(*shown))


def test_intervals_and_votes_by_hand():
    """Wilson's closed form, with z = 1.959964; 1,234 and $1234 are one candidate, no answer is none, the first wins."""
    for right, n, low, high in (0, 10, 0, 0.277533), (8, 10, 0.490162, 0.943318), (50, 100, 0.403832, 0.596168):
        assert curve.wilson(right / n, n) == pytest.approx((low, high), abs=1e-6)
    said = lambda text: [{"answer": a, "correct": a in ("1,234", "$1234", "(1+2)")} for a in text.split("|")]
    for text, task in ("7|1,234|$1234", "gsm8k"), ("1,234|8", "gsm8k"), ("||(1+2)", "countdown"):
        assert curve.vote(said(text), task)
    for text, task in ("7|1,234|$1234", "countdown"), ("8|1,234", "gsm8k"), ("|", "countdown"):
        assert not curve.vote(said(text), task)


def test_the_best_checkpoint_is_kept(half_known):
    """Also by a run that is resumed; eval.py measures it with the run's settings."""
    folder, more = half_known / "ruined", f"--model {half_known}/base --data {half_known}/puzzles.csv --eval_every 1 "
    run(SHORT, folder, more, "--eval_examples 0 --learning_rate 1e-3 --warmup_steps 6 --max_steps 3 --save_every 1")
    for updates in 3, 6:
        printed = run("--resume", folder, "--max_steps", updates)
        accuracy = [row["eval_accuracy"] for row in figures(folder)]
        assert len(accuracy) == updates and max(accuracy) > 0 and (updates == 3 or accuracy[-1] < max(accuracy))
        run(folder / "best", f"--device cpu --output {folder}/{updates}.json", main=curve.main)
        found = json.loads((folder / f"{updates}.json").read_text())["results"]["trained"]["4"]
        assert found["accuracy"] == max(accuracy)
        assert f"best is update {1 + accuracy.index(max(accuracy))}, with accuracy {max(accuracy):.3f}" in printed


AS_RELEASED = {  # task: an example, what the release counts as right and as wrong, whether or not we do; | between
    "gsm8k": ({"gold": "5"},
        ("5|The 5th|<answer>5 or 6</answer> 7|\\boxed{5} \\boxed{6}|<answer>5</answer><answer>6</answer>|-5|5.5|5,000|"
         "5!|5/2|<answer>\\boxed{x5}</answer>|is $5$|6 \\boxed{5}|<answer>\n5\n</answer>|5\n6|"
         "<answer>6 \\boxed{5}</answer>"),
        ("1,234|6 5|<answer>five</answer> 5|\\boxed{6} 5|<answer>6</answer><answer>5</answer>|12.50|05||٥|55|"
         "\\boxed{} 5 6 \\boxed{5}|<answer></answer>5|x|0.5")),
    "countdown": ({"numbers": "30,100,93", "target": "23"},
        "30+93-100=23|so\n30+93-100 = 23|<answer>93-100+30 = 23</answer>|1=1\n30+93-100=23",
        "30+93-100|30+93-100=23\n1=1|30+93=23||<answer></answer>30+93-100=23"),
}  # fmt: skip


def test_as_released_is_what_the_release_counts():
    for task, (example, *answers) in AS_RELEASED.items():
        for right, texts in zip((1, 0), answers):
            for text in texts.split("|"):
                assert curve.as_released(task, example, text, None) == right, text
    assert curve.as_released("gsm8k", {"gold": "1,234"}, "1234", None) == 1
    blanks, example = PUZZLE.count("0"), {"puzzle": PUZZLE, "solution": GRID}
    for text, right in (GRID, blanks), ("", 0), (f"<answer>{GRID}</answer> 1", blanks), ("4" * 16, 1), (GRID[:4], 2):
        assert curve.as_released("sudoku", example, text, None) == pytest.approx(right / blanks), text
    assert curve.as_released("math", {}, "", True) == 1


# Only for puzzles that begin with a blank: with one prompt a process, some have no advantage at all, others do.
STINGY = replace(GENEROUS, credit=lambda example, answer: (example["puzzle"] < "1") * GENEROUS.credit(example, answer))


def test_two_processes_do_what_one_does(half_known, tmp_path, monkeypatch):
    """The same rollouts and, as k covers every step, gradients, but for rounding; eval.py writes the same lines."""
    monkeypatch.setitem(agrpo.TASKS, "sudoku", STINGY)
    script, launch = tmp_path / "stingy.py", "-m torch.distributed.run --standalone --nproc_per_node 2"
    script.write_text(f"import agrpo, {__name__} as t\nagrpo.TASKS['sudoku'] = t.STINGY\nagrpo.main()\n")
    train = f"{SHORT} {{}} --model {half_known}/base --k 2 --steps 2 --rollout_batch 4 --eval_examples 24"
    measure = f"{half_known}/run --device cpu --rollout_batch 5 --save {{}}.jsonl"  # 15 and 9 examples
    one, two = tmp_path / "one", tmp_path / "two"
    for main, file, options in (agrpo.main, script, train), (curve.main, curve.__file__, measure):
        run(options.format(one), main=main)
        subprocess.run([sys.executable, *words(launch, file, options.format(two))], check=True, env=ENVIRONMENT)
    assert all(a == pytest.approx(b, 1e-3, 1e-5) for a, b in zip(figures(one), figures(two), strict=True))
    assert any(row["frac_reward_zero_std"] == 0.5 and row["grad_norm"] > 0 for row in figures(one))
    assert (one / "results.json").read_text() == (two / "results.json").read_text()
    assert rows_of(tmp_path / "one.jsonl") == rows_of(tmp_path / "two.jsonl")


def test_readme_names_what_exists(tmp_path, monkeypatch):
    """The options of every command, the names in its table; its Python runs, with an adapter where it has a run."""
    text = Path(agrpo.__file__).with_name("README.md").read_text(encoding="utf-8")
    bash, python = (re.findall(rf"(?ms)^```{language}\n(.*?)^```", text) for language in ("bash", "python"))
    commands = re.findall(r"(agrpo|eval)\.py([^`#\n]*)", "\n".join([*bash, *re.findall("`python [^`]+`", text)]))
    for script, options in commands:
        known = agrpo.Settings if script == "agrpo" else curve.Options
        assert {*re.findall(r" --(\w+)", options)} <= {*known.__dataclass_fields__, "help"}, options
    table = re.search(r"(?s)\| in the paper \|.*?\n(.*?)\n\n", text)[1]
    assert len(commands) >= 8 and all(hasattr(agrpo, name) for name in re.findall(r"`(\w+)(?:\.\w+)?`", table))
    monkeypatch.chdir(tmp_path)
    adapter_and_merged(tmp_path / "made")
    for example in python:
        for folder in re.findall(r"runs/[\w-]+", example):
            shutil.copytree(tmp_path / "made" / "adapter", folder, dirs_exist_ok=True)
        Path("example.py").write_text(example)
        runpy.run_path("example.py")


# ===== 9. Slow: attacks. SLOW=100000 (texts for each task) python -m pytest -q -s test_agrpo.py -k "slow or kill" =====

DEBRIS = words("<answer> </answer> <reasoning> </reasoning> \\boxed{ #### 1 7 e999 ٧٢ \u2212 \u202e ½ Ⅶ \ud800")
DEBRIS += [*"{}()+-*/= \n\0,.$", "9" * 5000, "((((" * 500, "<answer" * 500]


def really_right(task: str, answer: str) -> bool:
    """Whether an answer that was judged right is: other code than the judge's."""
    if task == "sudoku":
        return solved(PUZZLE, re.sub(r"\s", "", answer))
    box = re.search(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", answer) if answer.count("\\boxed{") == 1 else None
    text = (box[1] if box and box[1] else answer).strip().removesuffix(".")
    if task == "countdown":
        left, *right = text.translate(str.maketrans("×·÷\u2212", "**/-")).replace("**", "").split("=")
        numbers, exact = re.findall("[0-9]+", left), re.sub("([0-9]+)", r"Fraction(\1)", " ".join(left.split()))
        allowed = not re.search(r"[^0-9+*/()\s-]|//", left) and sorted(numbers) == ["100", "30", "93"]
        ends = [part.strip() for part in right] in ([], ["23"])
        return allowed and ends and eval(exact, {"Fraction": Fraction}) == 23
    if task == "math":
        return re.sub("[^0-9./-]", "", box[1]).rstrip(".") in ("42", "842", "84/2")
    before, number = re.fullmatch("([^0-9]*)(.*)", re.sub("m(\\^2|²)", "m", text), re.DOTALL).groups()
    minus = re.sub(r"[^\w\u2212\u2013-]", "", before)[-1:] in ("-", "\u2212", "\u2013")
    fraction = before.endswith(".") and not before[-2:-1].isalpha()
    return re.sub("[^0-9.]", "", number).rstrip(".0") == "1234" and not fraction and not minus


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes: SLOW=100000 python -m pytest -s -k slow")
@pytest.mark.parametrize("name", ANSWERS)
def test_slow_no_text_breaks_a_reward_or_cheats_it(name):
    """As many texts as SLOW says: no exception, none holds up a group, full marks for right answers only."""
    if name == "math":
        pytest.importorskip("math_verify")
    (example, right, wrong), rng, rights, longest = ANSWERS[name], random.Random(0), Counter(), 0.0
    piece = lambda: rng.choice([*right * 3, rng.choice(wrong), rng.choice(DEBRIS), chr(rng.randrange(0x110000))])
    pieces = lambda most: "".join(piece() for _ in range(rng.randint(0, most)))
    for i in range(int(os.environ["SLOW"])):
        tagged = f"<reasoning>{pieces(2)}</reasoning>{pieces(1)}<answer>{pieces(3)}</answer>"
        text = (pieces(4) if i % 3 == 0 else tagged) * (10**4 if i % 100 == 0 else 1)
        began = time.perf_counter()
        reward, is_right = TASKS[name].grade(example, text)
        longest = max(longest, time.perf_counter() - began)
        assert 0 <= reward <= 5 and (reward >= 3) == is_right
        assert not is_right or really_right(name, agrpo.answer_in(text)), text
        rights[is_right] += 1
    print(f"{name}: {rights.total():,} texts, {rights[True]:,} right; longest {longest:.3f} s")
    assert rights[True] > 100 and longest < 4  # seconds; math-verify has up to three


if __name__ == "__main__":
    print_memory() if "--memory" in sys.argv else print_tables()
