"""What AGRPO claims, against exact values: the appendix that the paper does not have.

    pytest test_agrpo.py        every claim, asserted
    python test_agrpo.py        the same story as tables, in half a minute; --memory: what fits which GPU, on paper
    python test_agrpo.py --diffu_grpo ...   a run of agrpo.py, with its options, but by diffu-GRPO

The mask predictor here knows four words (one is EOS, one the mask) and writes three or four, in float64: every order
and every text can be enumerated, by code that shares nothing with the sampler, and compared to the last digits.
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
import transformers as hf
from torch import Tensor
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
    model = hf.BertForMaskedLM(hf.BertConfig(**shape))
    if dream:  # a Qwen2 whose logits are about the next position
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(is_causal=False, num_key_value_heads=1, logits_shift=1, **shape))
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
    "plain": PLAIN, "top-k, top-p": PLAIN | {"temperature": 1.5, "top_k": 2, "top_p": 0.7, "steps": 2},
    "blocks": BLOCKS, "blocks, top-p": BLOCKS | {"temperature": 1.3, "top_p": 0.9},
    "blocks, no EOS": BLOCKS | {"eos_id": None},
    "blocks, two EOS": BLOCKS | {"eos_id": [Y, EOS], "steps": 2, "temperature": 0.8, "top_k": 4},
    "low confidence": LOW, "low confidence, greedy": LOW | {"temperature": 0.0},
    "low confidence, top-p": LOW | {"temperature": 4.0, "top_p": 0.9, "steps": 2},
    "four tokens": BLOCKS | {"block_length": 4},
}  # fmt: skip


def policy_table(model, sampling: dict, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The policy by its definition: log p(token | prompt, state), (S, C, V); and the ids left to it, or those given.
    Never the mask; top-k: fewer than k tokens are more probable; top-p: these make up less than top_p."""
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
    logp_under(model) (N, C) of each token, in the state that is number `state` (N, C); all differentiable."""
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


def gradient_of(value: Tensor, model) -> Tensor:  # d value / d theta by autograd, as one vector
    return flat(torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True))


def update_of(model, *args, **options) -> tuple[Tensor, dict]:  # what is added to .grad, as an ascent, and returned
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    figures = agrpo.policy_gradient(model, *args, **options)
    return -flat(p.grad for p in model.parameters()), figures


@contextmanager
def passes_seen(model):  # counts the sequences that go through it, and the positions through its head
    seen, body, head = Counter(), model.base_model, model.get_output_embeddings()
    count = lambda _, __, given: seen.update(sequences=len(given["input_ids"]))
    count_head = lambda _, given: seen.update(positions=given[0].shape[:-1].numel())
    with body.register_forward_pre_hook(count, with_kwargs=True), head.register_forward_pre_hook(count_head):
        yield seen


# ===== 2. The sampler draws from the process that it says it draws from, and looks only where it must =================


def write(model, prompt: Tensor, seed: int = 0, **sampling) -> Rollout:
    return sample(model, prompt, generator=seeded(seed), **{"prompt_mask": prompt > -1} | sampling)


@pytest.mark.parametrize("name", [*SETTINGS][:-1])
def test_sampler_draws_from_its_process_and_records_it(name):
    """20,000 samples are as frequent as enumerated, what is recorded is exact; `estimate_logp` finds it again."""
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
        assert gradient_of(logp.sum(), model).isfinite().all() and not rollout.logp.requires_grad


@pytest.mark.parametrize("dream", [False, True])
def test_logits_at_are_those_of_the_full_forward_pass(dream):
    """Padded or not, in any order; equal rows share a pass, the head sees no other positions."""
    model = mask_predictor(dream=dream)
    ids, positions = (torch.arange(45).view(5, 9) ** 2 % 7 % 4)[[0, 1, 2, 3, 4, 0, 1]], torch.tensor([8, 4, 6])
    exact = model(input_ids=ids).logits[:, positions - int(dream)]
    for padding in (0, 3):
        padded = torch.cat([torch.arange(7 * padding).view(7, padding) % 4, ids], 1)
        attention_mask = (torch.arange(9 + padding) >= padding).expand(7, -1) if padding else None
        for places in (positions + padding, positions - 9):  # from the left or from the end
            with passes_seen(model) as seen:
                logits = agrpo.logits_at(model, padded, attention_mask, places.expand(7, 3))
            assert seen == {"sequences": 5, "positions": 7 * 3}
            assert_close(logits, exact, atol=1e-5 if dream else 1e-12)  # Qwen's norms round to float32


def test_what_would_be_wrong_is_refused():
    """Steps that do not fit, proposals without a step, padding on the right, dropout, unknown words."""
    model, two, prompt = mask_predictor(), torch.tensor([2]), torch.tensor([[*PROMPT, MASK]])
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = hf.RobertaForMaskedLM(hf.RobertaConfig(**shape, is_causal=False))
    stablelm = hf.StableLmForCausalLM(hf.StableLmConfig(**shape, is_causal=False))
    causal, decoder, dropout = (mask_predictor(dream=dream) for dream in (True, False, False))
    del causal.config.is_causal
    decoder.config.is_decoder = True
    llama = mask_predictor(dream=True).train()
    llama.model.layers[0].self_attn.attention_dropout = 0.1
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
        *(("not split", partial(group_advantages, torch.ones(shape), G)) for shape, G in ((6, 4), ((4, 2), 4), (4, 1))),
        *(("padded on the left", partial(write, model, x, prompt_mask=x != MASK, **PLAIN)) for x in (prompt, wide)),
        *(("is neither a", partial(write, m, prompt, **PLAIN)) for m in (roberta, stablelm, causal, decoder)),
        *(("dropout is on", partial(write, m, prompt, **PLAIN)) for m in (dropout.train(), llama)),
        ("unmasking is", partial(write, model, prompt, **PLAIN | {"unmasking": "left_to_right"})),
        ("not be negative", partial(write, model, prompt, **PLAIN | {"temperature": -1.0})),
        ("True on at least a token", partial(write, model, prompt, prompt_mask=prompt < 0, **PLAIN)),
        ("length_norm is", partial(gradient, length_norm="seqence")),
        *(("needs ref_model", partial(gradient, beta=0.1, ref_model=ref)) for ref in (None, model)),
        *(("1 finite numbers", partial(agrpo.policy_gradient, model, rollout, A, **one)) for A in ([math.nan], [1, 2])),
        ("validation", partial(TASKS["sudoku"].examples, "validation", agrpo.Settings())),
    ]:
        with pytest.raises((ValueError, KeyError), match=said):
            wrong()


# ===== 3. Timesteps: weights that are right on average, strata that are hit once ======================================


def proposal_of(rollout: Rollout, kind: str) -> Tensor:  # nine tenths by entropy or surprise, a tenth uniform
    taken = (torch.arange(rollout.entropy.shape[1]) < rollout.num_steps[:, None]).double()
    doubt = [((1 - rollout.logp.exp()) * (rollout.step == t)).sum(1) for t in range(taken.shape[1])]
    score = {"uniform": taken, "entropy": rollout.entropy, "surprise": torch.stack(doubt, 1)}[kind].double()
    return 0.9 * score / score.sum().clamp(min=1e-9) + 0.1 * taken / taken.sum()


def every_draw(proposal: Tensor, num_steps: Tensor, k: int, at: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Each row with each of its timestep draws: rows (M,), probabilities (M,), what each step then weighs (M, T).

    A row draws at the points j + x, x uniform. It draws step t with probability min(1, c p_t), where c, found by
    bisection, makes them add up to k. Between two edges of x the draw is the same. at: where in this piece."""
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
    """Each step's weight is 1 on average, exactly. A row has a point in each unit of its k; rows and seeds differ."""
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
    draws = torch.stack([draw_timesteps(torch.full((6,), 7 * k), k, generator=seeded(n))[0] for n in range(50)])
    assert (draws // 7 == torch.arange(k)).all() and (draws - draws[..., :1] == 7 * torch.arange(k)).all()
    assert len(draws[..., 0].unique(dim=0)) == 50 and len(draws[:, 0, 0].unique()) == 7


# ===== 4. The gradient: what is unbiased, for what, and at what variance; and the story as tables =====================

KINDS, POINTS = ("uniform", "entropy", "surprise"), {"iid": "independent", "batch": "strata of the batch"}
POINTS |= {"row": "systematic in each row", "whole": "systematic in the batch, times |A| (ours)"}


def policy_gradient_of(e, length: Tensor | None = None) -> Tensor:  # grad E[(r - mean r) / length], T if not given
    value = (e.rewards - e.probability @ e.rewards) / (e.sampling["steps"] if length is None else length)
    return gradient_of(e.log_probability.exp() @ value, e.model)


def advantage_mass(e, group_size: int = 2, scale_by_std: bool = False) -> Tensor:
    """(N,) probability x advantage of a trajectory, added up over all N^G groups that it may be in, and over G."""
    groups = torch.cartesian_prod(*[torch.arange(len(e.probability))] * group_size)  # (N^G, G)
    advantage = group_advantages(e.rewards[groups].flatten(), group_size, scale_by_std).view(-1, group_size)
    mass = e.probability[groups].prod(1, keepdim=True) * advantage / group_size
    return torch.zeros_like(e.probability).index_add(0, groups.flatten(), mass.flatten())


def mean_update(e, k: int = 1, kind: str = "uniform", mass=None, rollout=None, **options) -> Tensor:
    """The mean of `policy_gradient` over all trajectories, groups and draws, by one call: it is linear in weights."""
    rollout, mass = rollout or e.rollout, advantage_mass(e) if mass is None else mass

    def mean_draw(num_steps, k, proposal, generator):
        _, share, weights = every_draw(proposal, num_steps, k)
        return torch.arange(int(num_steps))[None], (share @ weights)[None]

    options = {"on_policy": True, "length_norm": "constant", "micro_batch": 4096} | e.policy | options
    with mock.patch.object(agrpo, "draw_timesteps", mean_draw):  # the call divides by its rows
        return update_of(e.model, rollout, mass * len(mass), k=k, proposal=proposal_of(rollout, kind), **options)[0]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "four tokens" and "low" not in name])
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


def one_step_view(rollout: Rollout, mask_id: int, hide: float = 0.15, generator=None) -> Rollout:
    """A rollout as if one step had unmasked it all, part of the prompt masked. `policy_gradient` of it, length_norm
    "constant", is that of diffu-GRPO (d1, arXiv 2504.12216), a mean over C tokens. Biased; for on-policy steps only."""
    hidden = (torch.rand(rollout.prompt.shape, generator=generator) < hide).to(rollout.prompt.device)
    prompt, steps = rollout.prompt.masked_fill(hidden & rollout.prompt_mask, mask_id), rollout.num_steps.clamp(max=1)
    view = replace(rollout, prompt=prompt, step=rollout.step.clamp(max=0), num_steps=steps, kept=None)
    return replace(view, entropy=torch.zeros_like(rollout.logp))  # whose width is T for `policy_gradient`: here C


def diffu_grpo(model, rollout: Rollout, advantage: Tensor, *, gradient=agrpo.policy_gradient, **options) -> dict:
    """In place of `agrpo.policy_gradient`, this makes a run one of diffu-GRPO."""
    view = one_step_view(rollout, options["mask_id"], generator=options["generator"])
    options |= {"length_norm": "constant", "proposal": None, "on_policy": True}
    return gradient(model, view, advantage, **options)


@lru_cache
def bias_table(seeds: int = 8) -> dict[str, Tensor]:
    """Each estimator's mean update beside (1 - 1/G) grad E[reward] / T: cosine, relative norm and error. Resampled
    masks: as if a text had been written in every order equally often. One step: with the prompt unmasked."""
    table = defaultdict(list)
    for seed in range(seeds):
        plain, blocks, sure = (enumerated(n, seed=seed) for n in ("plain", "blocks", "low confidence"))
        mass, completion = advantage_mass(plain), plain.rollout.completion
        same = (completion[:, None] == completion).all(2).double()  # (N, N), same text
        for name, e, *how, options in [
            ("AGRPO, k=1, uniform", plain, {}),
            ("AGRPO, k=1, entropy", plain, 1, "entropy", {}),
            ("AGRPO, k=2, surprise", plain, 2, "surprise", {}),
            ("AGRPO, rows end early, constant", blocks, {}),
            ("  rows end early, sequence", blocks, {"length_norm": "sequence"}),
            ("  advantage / std of the group", plain, {"mass": advantage_mass(plain, 2, True)}),
            ("  low-confidence unmasking", sure, {}),
            ("  resampled masks (ELBO)", plain, {"mass": same @ mass / same.sum(1)}),
            ("  one step (diffu-GRPO)", plain, {"rollout": one_step_view(plain.rollout, MASK, 0.0)}),
        ]:
            update, exact = mean_update(e, *how, **options), (1 - 1 / 2) * policy_gradient_of(e)
            error, norm = ((x.norm() / exact.norm()).item() for x in (update - exact, update))
            table[name].append([torch.cosine_similarity(update, exact, 0).item(), norm, error])
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in table.items()}


@lru_cache
def passes_table(T: int = 4) -> dict:
    """(Squared bias, variance times passes) of one completion's estimate of grad E[reward], over the squared gradient.
    A bias is scaled away as far as it goes. Random masks: of L tokens, L uniform, scored in one pass, times T / L."""
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
    assert_close(agrpo.defensive_proposal(replace(rollout, logp=0 * rollout.logp)), proposal_of(rollout, "uniform"))
    logits = torch.randn(2, 5000, generator=seeded(0))  # top-p alone is taken among 1,024 ids
    kept = agrpo.truncate(logits, MASK, 1.0, top_p=0.999)
    assert kept.equal(agrpo.truncate(logits, MASK, 1.0, top_k=1024, top_p=0.999)) and kept.shape == (2, 1024)
    assert (agrpo.truncate(logits, MASK, 1.0, top_p=0.0) >= 0).sum() == 2  # at least one
    half, exact = (agrpo.truncate(x, MASK, 1.0, top_p=0.9) for x in (logits.bfloat16(), logits.bfloat16().float()))
    assert (half >= 0).sum(1).equal((exact >= 0).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_is_one_on_the_first_update(dtype):
    """On the policy that sampled the ratio is exactly 1, however the sampler rounded."""
    model, sampling = mask_predictor().to(dtype), SETTINGS["blocks, top-p"]
    rollout = write(model, torch.tensor([PROMPT] * 32), **sampling)
    assert rollout.logp.dtype == rollout.entropy.dtype == torch.float32  # bfloat16 would be too coarse
    write(model, torch.tensor([PROMPT]), **BLOCKS)  # all ids, too
    rollout = replace(rollout, logp=rollout.logp + 0.5 * (rollout.step >= 0))  # rounding, exaggerated
    run = partial(agrpo.policy_gradient, rollout=rollout, k=2, mask_id=MASK, temperature=sampling["temperature"])
    A = torch.linspace(-1, 1, 32)
    first, later = (run(model, advantage=A, on_policy=on_policy) for on_policy in (True, False))
    assert (first["clip_ratio"], first["kl"]) == (0, 0) and later["clip_ratio"] > 0.1
    assert run(None, advantage=0 * A, on_policy=True)["loss"] == 0  # nothing to learn, no pass


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
    passed = mock.patch.object(agrpo, "step_logps", wraps=agrpo.step_logps)
    with mock.patch.object(agrpo, "draw_pairs", wraps=agrpo.draw_pairs) as draw, passed as passes:
        update, figures = update_of(model, e.rollout, A[:, 0], micro_batch=10, proposal=proposal, **options)
    assert_close(update, gradient_of(J, model))
    assert max(len(x.args[2]) for x in passes.call_args_list) == 10
    assert draw.call_args.args[3] is proposal and draw.call_args.args[1].equal((A[:, 0].abs() + 0.3) / length)
    clipped = ((A > 0) & (rho > 1.3) | (A < 0) & (rho < 0.9)).double()
    expected = {"loss": -J, "clip_ratio": clipped[taken].mean(), "kl": kl[taken].mean()}
    assert figures == {name: pytest.approx(value.item(), 1e-9) for name, value in expected.items()}


def test_diffu_grpo_masks_everything_and_some_of_the_prompt(monkeypatch):
    """One step a row, from masks alone; a fresh prompt mask each time; the mean over C tokens."""
    model, prompt, A = mask_predictor(), torch.full((500, 6), X), torch.randn(500, generator=seeded(0)).double()
    rollout = write(model, prompt, **BLOCKS)
    one, two = (one_step_view(rollout, MASK, generator=seeded(n)) for n in (0, 1))
    assert not one.prompt.equal(two.prompt) and rollout.prompt.equal(prompt)
    assert one.prompt.unique().tolist() == [X, MASK] and abs((one.prompt == MASK).double().mean() - 0.15) < 0.02
    assert one.num_steps.eq(1).all() and one.step.equal(torch.where(rollout.step < 0, -1, 0))
    logits = model(input_ids=torch.cat([one.prompt, torch.full((500, 4), MASK)], 1)).logits[:, 6:, :MASK]
    logp = logits.log_softmax(-1).gather(-1, rollout.completion[..., None]).squeeze(-1)
    J = (A[:, None] * logp.masked_fill(rollout.step < 0, 0)).mean()
    monkeypatch.setattr(agrpo, "policy_gradient", diffu_grpo)
    options = {"k": 1, "mask_id": MASK, "temperature": 1.0, "on_policy": True, "generator": seeded(0)}
    assert_close(update_of(model, rollout, A, **options)[0], gradient_of(J, model))


def draw(points: str, k: int, proposal: Tensor, advantage: Tensor, rng) -> Tensor:
    """One draw's weights (B, T): ours, by row or batch; or importance sampling, iid or in B x k strata (official)."""
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


def refrains(C: int = 16, words: int = 4):  # taught for a second to repeat four words, so that late steps copy
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
    """E |estimate - full gradient|^2 / |full gradient|^2 over timestep draws, for (proposal, points, k)."""
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


def by_text():  # the texts (M, C), and what adds up values of the 3! trajectories that lead to each
    texts, text = enumerated("plain").rollout.completion.unique(dim=0, return_inverse=True)
    return texts, lambda x: torch.zeros(len(texts)).double().index_add(0, text, x)


def test_what_the_tables_show():
    """The ELBO is a bound; other estimators point elsewhere, whatever the passes; strata, surprise and |A| help."""
    e, (_, total) = enumerated("plain"), by_text()
    exact, elbo = total(e.probability).log(), total(e.rollout.logp.sum(1)) / 6
    assert (elbo < exact + 1e-12).all() and (exact - elbo).max() > 0.01
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
    e, (texts, total) = enumerated("plain"), by_text()
    exact, none = e.by_step.detach(), torch.zeros_like(e.probability)

    def estimates(k: int):  # mean and standard deviation over all timestep draws
        rows, share, weights = every_draw(proposal_of(e.rollout, "surprise"), e.rollout.num_steps, k)
        moment = lambda p: none.index_add(0, rows, share * (weights * exact[rows]).sum(1) ** p)
        return moment(1), (moment(2) - moment(1) ** 2).clamp(min=0).sqrt()

    marginal, elbo, estimate = total(e.probability).log(), total(exact.sum(1)) / 6, total(estimates(1)[0]) / 6
    for n in marginal.argsort(descending=True)[[0, 1, 2, 3, -2, -1]]:
        cells = f"{marginal[n]:14.8f}{elbo[n]:14.8f}{estimate[n]:16.8f}{marginal[n] - elbo[n]:10.4f}"
        print(f"   {spell(texts[n])}   {cells}")
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
SHORT += "--optimizer_steps 1 --eval_examples 8 --save_every 2 --show_every 2 --device cpu --output_dir"
REFUSED = {
    "--block_length 5": "does not divide", "--steps 17": "17 steps must", "--eval_steps 4 0": "0 steps must",
    "--steps 3 --block_length 4": "multiple of 4 blocks", "--block_length 0": "--block_length 0 is too small",
    "--group_size 1": "--group_size 1 is too small", "--rollout_batch 0": "too small", "--optimizer_steps 0": "too",
    "--save_every 0": "small", "--max_steps 0": "small", "--prompts_per_update 0": "small", "--micro_batch 0": "small",
    "--k 0": "--k 0 is too small", "--top_p 0": "--top_p 0.0 is", "--max_steps few": "invalid int",
    "--temperature 0": "--temperature 0.0 is too small", "--temperature nan": "--temperature nan is too small",
    "--task chess": "invalid choice: 'chess'", "--task gsm8k --model tiny": "tiny knows only sudoku",
    "--data nowhere.csv": "nowhere.csv: no such file", "--model nowhere": "nowhere: no such file",
    "--model .": "config.json", "--resume nowhere": "no settings.json there", "--no_such_option 1": "no_such_option",
    "--device abacus": "abacus", "--report_to wandb": "pip install wandb", "--task math": "pip install math_verify",
    "--task gsm8k": "give --data FOLDER, or run plain `python agrpo.py`: no route",
    "--task countdown": "give --model FOLDER, or run plain `python agrpo.py`: no route",
    "--task countdown --model qwen3-0.6b": agrpo.SMALL["model"],
    "eval": "required: CHECKPOINT", "eval nowhere": "no such file", "eval tiny": "no such file",
    "eval B --steps 17": "17 steps", "eval B --steps few": "invalid int", "eval B --base nowhere": "no such file",
    "eval B --seeds 0 1": "--temperature above 0", "eval B --samples 4": "--temperature above 0",
    "eval B --device abacus": "abacus", "eval B --no_such 1": "no_such",
    "eval B --data nowhere": "no such file", "eval B --save old": "File exists", "eval B --save a/b": "No such file",
    "eval B --rollout_batch 0": "too small", "eval B --temperature -1": "too small",
}  # fmt: skip
TASKS, TINY = dict(agrpo.TASKS), agrpo.load_model
words = lambda *parts: " ".join(map(str, parts)).split()
rows_of = lambda file: [json.loads(line) for line in file.read_text().splitlines()]
figures = lambda folder: rows_of(folder / "metrics.jsonl")
# Two steps of pretraining earn nothing. So odd characters pay, if the puzzle begins with a blank.
pay = lambda example, answer: (example["puzzle"] < "1") * sum(ord(c) % 2 for c in answer) / 16
GENEROUS = replace(TASKS["sudoku"], credit=pay)
PATHS = os.pathsep.join(str(Path(file).resolve().parent) for file in (agrpo.__file__, __file__))
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}


def run(*parts, main=agrpo.main) -> str:  # what it prints
    with redirect_stdout(io.StringIO()) as printed:
        main(words(*parts))
    return printed.getvalue()


def refusal(*parts, main=agrpo.main) -> str:  # the sentence in which it ends
    with pytest.raises(SystemExit) as stop, redirect_stderr(io.StringIO()) as printed:
        main(words(*parts))
    said = stop.value.code if isinstance(stop.value.code, str) else printed.getvalue().splitlines()[-1]  # argparse's
    assert re.match(r"(agrpo|eval)\.py: \S|\S+: error: ", said) and "\n" not in said
    return said


def same_run(*runs: Path) -> bool:  # the same metrics, results and, bit for bit, weights and optimizer
    files = lambda run: [run / "results.json", *sorted(agrpo.checkpoints(run)[-1].glob("*.safetensors"))]
    one, other = ([figures(run), *(file.read_bytes() for file in files(run))] for run in runs)
    return one == other and len(one) == 4


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):  # a whole run, cut short; printed.txt beside it is what it printed
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(agrpo.TASKS, "sudoku", GENEROUS)
        (folder.parent / "printed.txt").write_text(run(SHORT, folder))
        yield folder


def test_a_run_pretrains_measures_trains_and_saves(short_run):
    """It prints a table and Sudokus. Nothing is overwritten; another seed is another run."""
    lines = figures(short_run)
    names = "update loss reward reward_std frac_reward_zero_std accuracy completion_length entropy kl "
    assert all({*words(names, "learning_rate")} <= line.keys() for line in lines) and len(lines) == 4
    assert all(0 < line["reward"] < 1 and line["grad_norm"] > 0 and line["clip_ratio"] == 0 for line in lines)
    rates = [7e-4 * (u + 1) / 20 * (1 + math.cos(math.pi * u / 4)) / 2 for u in range(4)]  # warm-up, cosine
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    assert all(line["accuracy"] < line["reward"] and 0 < line["entropy"] < 5 for line in lines)
    printed = (short_run.parent / "printed.txt").read_text()
    assert re.search(r"greedy.* 4\n +base +0\.\d+\n +AGRPO +0\.\d+\n", printed)
    assert re.search(r"\n +[1-4.]( [1-4.]){3}   . . . .\n", printed)  # a puzzle, and what was made of it
    assert re.findall(r"^update (\d): reward \d", printed, re.MULTILINE) == [*"1234"]  # there is no terminal
    torch.manual_seed(0)
    models = (agrpo.load_model(str(name))[0] for name in ("tiny", short_run / "base", short_run))
    before, base, trained = (flat(model.parameters()) for model in models)
    assert not torch.equal(before, base) and not torch.equal(base, trained)
    assert f"--resume {short_run}" in refusal(SHORT, short_run) and lines == figures(short_run)
    run(SHORT, short_run.parent / "seed1", "--seed 1 --max_steps 1")
    assert figures(short_run.parent / "seed1")[0] != lines[0]


def test_a_folder_is_one_run_s_alone(tmp_path, monkeypatch):
    """A folder with a run, or one that is just beginning, is refused."""
    monkeypatch.chdir(tmp_path)
    assert agrpo.parse_settings([]).output_dir == "runs/sudoku-tiny-seed0"
    assert agrpo.parse_settings(words("--task gsm8k --model qwen3-0.6b")).completion_length == 256
    with mock.patch.object(agrpo, "world_size", lambda: 3):
        assert "multiple of the 3 processes" in refusal("--output_dir other")
    Path("mine").mkdir()
    Path("mine/sweep.yaml").write_text("seed: 0")
    assert agrpo.parse_settings(["--data", "mine"]).data == str(tmp_path / "mine")  # wherever it goes on from
    another = lambda *_: Path("mine/settings.json").write_text("{}") and TINY(*_)
    monkeypatch.setattr(agrpo, "load_model", another)
    assert "exists: 'mine/settings.json'" in refusal("--output_dir mine")
    assert "--resume mine" in refusal("--output_dir mine") and Path("mine/settings.json").read_text() == "{}"


def test_only_eos_and_padding_end_a_text():
    """Other special tokens, as <answer> may be one, are text. Each batch has noise of its own."""
    torch.manual_seed(0)
    model, tokenizer, mask_id = agrpo.load_model("tiny")
    settings, rows = agrpo.Settings(rollout_batch=1), [{"puzzle": PUZZLE}] * 8
    for end in tokenizer.eos_token_id, tokenizer.pad_token_id:
        model.cls.predictions.bias.data.zero_()[[tokenizer.unk_token_id, end]] = 50  # nothing else is written
        _, texts, rollout = agrpo.generate(model, tokenizer, mask_id, rows, settings, (0,))
        lengths = (rollout.completion == end).int().argmax(1).tolist()
        assert texts == ["[UNK]" * n for n in lengths] and len({*lengths}) > 1


def generous_main(*parts) -> None:
    agrpo.TASKS["sudoku"] = GENEROUS
    run(*parts)


def test_kill_9_at_any_moment_loses_nothing(tmp_path):
    """While it starts, trains or writes; resumed, it ends bit for bit as the run that nobody killed."""
    context = multiprocessing.get_context("forkserver")  # its processes need not import everything again
    context.set_forkserver_preload([__name__])

    def finishes(folder: Path, updates: float, seconds: float) -> bool:  # or is killed after these
        made = lambda: len(figures(folder)) if (folder / "metrics.jsonl").exists() else 0
        parts = ("--resume", folder) if folder.exists() else (SHORT, folder, "--max_steps 8 --save_every 3")
        process, enough = context.Process(target=generous_main, args=parts), made() + updates
        process.start()
        while process.is_alive() and made() < enough:
            time.sleep(0.005)
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        return process.exitcode == 0

    rng, kills, whole, *others = random.Random(0), 0, *(tmp_path / str(i) / "run" for i in range(40))
    assert finishes(whole, math.inf, 0)
    while kills < (20 if "SLOW" in os.environ else 4):
        while not finishes(others[0], updates := rng.randint(0, 3), rng.uniform(0, 0.1 if updates else 4)):
            kills += 1
        assert same_run(others.pop(0), whole)


def test_a_run_that_stops_says_how_to_go_on(short_run, monkeypatch):
    """Out of memory, Ctrl-C, no finite numbers: one sentence, which works. What changes is printed."""
    folder = short_run.parent / "stopped"
    errors = torch.OutOfMemoryError("Tried to allocate 2 GiB"), KeyboardInterrupt()
    turns = itertools.chain([mock.DEFAULT] * 3, errors, itertools.repeat(mock.DEFAULT))
    monkeypatch.setattr(agrpo, "step_logps", mock.Mock(wraps=agrpo.step_logps, side_effect=turns))
    how = f"; to go on: --resume {folder}"
    said = refusal(SHORT, folder)  # in its fourth update
    assert "out of memory: lower --micro_batch" in said and how in said
    assert how in refusal("--resume", folder)  # and settings that another version had are left out
    (file := folder / "settings.json").write_text('{"method": "x",' + file.read_text()[1:])
    said = re.findall("changed.*|; at .*-2", run("--resume", folder, "--micro_batch 2"))
    assert said == ["changed from here on: {'micro_batch': 2}", f"; at {folder}/checkpoint-2"]
    said = refusal("--resume", folder, "--max_steps 8 --save_every 4 --learning_rate 1e30")
    assert "update 6 is not finite; lower --learning_rate" in said and how in said
    printed = run("--resume", folder, "--learning_rate 1e-4 --max_steps 6")
    assert "changed from here on: {'max_steps': 6, 'learning_rate': 0.0001}" in printed
    assert [line["update"] for line in figures(folder)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in agrpo.checkpoints(folder)] == ["checkpoint-4", "checkpoint-6"]  # the newest two
    with mock.patch.object(agrpo, "clipped_objective", lambda logp, *_: logp * math.inf):
        assert "update 7 is not finite" in refusal("--resume", folder, "--max_steps 7")


@pytest.mark.parametrize("how", ["--scale_by_std true --seed 1", "--beta 0.1 --report_to tensorboard"])
def test_other_options_run_to_the_end(how, short_run, monkeypatch):
    """Also: each epoch has each example once, in another order; gradients are clipped; updates differ in noise."""
    "tensorboard" in how and pytest.importorskip("tensorboard")
    few = lambda split, seed: TASKS["sudoku"].source(split, seed)[: 3 if split == "train" else 8]
    monkeypatch.setitem(agrpo.TASKS, "sudoku", replace(GENEROUS, source=few, picture=lambda e, _: f"<{e['puzzle']}>"))
    for name in "group_advantages", "generate", "policy_gradient":
        monkeypatch.setattr(agrpo, name, mock.Mock(wraps=getattr(agrpo, name)))
    monkeypatch.setattr(torch.optim, "AdamW", adam := mock.Mock(wraps=torch.optim.AdamW))
    folder = short_run.parent / re.sub(r"\W+", "", how)
    how += f" --model {short_run}/base --max_steps 6 --prompts_per_update 1 --rollout_batch 4 --show_every 1 --k 2 "
    how += "--optimizer_steps 2 --unmasking low_confidence --top_k 20 --top_p 0.9 --length_norm constant "
    how += "--eps_high 0.3 --temperature 0.9 --micro_batch 5 "
    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", wraps=torch.nn.utils.clip_grad_norm_) as clip:
        printed = run(SHORT, folder, how, "--learning_rate 1e-2 --warmup_steps 0 --eval_every 2 --eval_steps 4 2")
    lines, puzzles = figures(folder), re.findall("<([0-4]{16})>", printed)
    assert any(line["clip_ratio"] > 0 for line in lines)  # the second step is off policy
    assert len(lines) == 6 and (lines[1]["kl"] > 0) == ("beta" in how)
    assert any(folder.glob("events.out.tfevents*")) == ("tensorboard" in how)
    assert sorted(puzzles[:3]) == sorted(puzzles[3:]) and len({*puzzles}) == 3 and puzzles[:3] != puzzles[3:]
    assert [x.args[1] for x in clip.call_args_list] == [1.0] * 12
    assert adam.call_args.kwargs == {"betas": (0.9, 0.99), "weight_decay": 0.01}
    assert agrpo.group_advantages.call_args.args[2] == ("scale" in how)
    seed = int("seed" in how)
    assert {(seed, "rollout", update) for update in range(6)} < {x.args[5] for x in agrpo.generate.call_args_list}
    assert ["eval_accuracy" in line for line in lines] == [False, True] * 3
    settings, given = json.loads((folder / "settings.json").read_text()), agrpo.policy_gradient.call_args_list
    assert all(x.kwargs[name] == settings[name] for x in given for name in x.kwargs.keys() & settings.keys())
    assert [(x.kwargs["on_policy"], x.kwargs["proposal"] is None) for x in given] == [(True, False), (False, False)] * 6
    assert len({x.kwargs["generator"].initial_seed() for x in given}) == 6 and given[0].args[1].kept.shape[-1] == 20
    rates = [(1 + math.cos(math.pi * update / 6)) / 200 for update in range(6)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    assert Counter(x.kwargs.get("steps") for x in agrpo.generate.call_args_list)[4] == 7  # 4 of eval_steps is first
    shutil.rmtree(folder / "checkpoint-6")
    run("--resume", folder)
    assert figures(folder) == lines


@pytest.mark.parametrize("wrong", REFUSED)
def test_mistakes_are_one_sentence_before_anything_starts(wrong, short_run, tmp_path, monkeypatch):
    """It names the setting, or what works without a hub; nothing is written or touched."""
    monkeypatch.setattr(agrpo.hub, "snapshot_download", mock.Mock(side_effect=ConnectionError("no route")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agrpo.importlib.util, "find_spec", lambda _: None)  # as if wandb were not installed
    monkeypatch.setattr(agrpo, "pretrain", None)
    Path("old").write_text("precious")
    script, base = curve if wrong.startswith("eval") else agrpo, f"{short_run}/base"
    assert REFUSED[wrong] in refusal(wrong.removeprefix("eval").replace("B ", base + " "), main=script.main)
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [("old", "precious")]


# ===== 6. Tasks and data ==============================================================================================

PUZZLE, GRID, CHANGED = "0310200404001043", "4312213434211243", "1234341221434321"  # CHANGED: another's
SUM, FILLED = {"numbers": "30,100,93", "target": "23"}, {"puzzle": PUZZLE, "solution": GRID}
SIMPLE = "1234 1,234 $1,234.00 1234. \\boxed{1234} **1234** \\$1234 1234% 1{,}234 $1234$ 1234.000"
NO_SUM = "23 30+93-100+100-100 30+93-100+0 30+93-100=24 3093-100 30+93 30--93+100 30**93 30//93 1/0 "
NO_SUM += "__import__('os') 30+93-1_00 30(93)100"
ANSWERS = {  # task: example, right answers, wrong answers
    "sudoku": (FILLED, [GRID, GRID[:4] + "\n" + GRID[4:]], [
        CHANGED, GRID + " " * 100 + "more", "4312", GRID * 2, "\ud800" * 16, "٤٣١٢٢١٣٤٣٤٢١١٢٤٣", ""]),
    "countdown": (SUM, [
        "30 + 93 - 100", "(93-100)\n+ 30 = 23", "93-(100-30)", "30+93\u2212100.", "So \\boxed{30+93-100}"], [
        *words(NO_SUM, "３０+93-100 -100+30+93 1e2-30-93"), "", "(" * 90, "30+93-100" * 99]),
    "gsm8k": ({"gold": "1,234"}, [
        *words(SIMPLE), "\\boxed{1,234} apples", "= 1234 km", "T-shirts: 1234", "Rs.1234", "1234 m^2", "1234 km²",
        "\\(1234\\)", "1234 cm^{2}", "1234\\,\\text{cm}", *words("$1234/day 1234; [1234] +1234 (1234) 1234?")], [
        "1234 1234", "1233 or 1234", "1 234", "\\boxed{1234} \\boxed{1}", "\\boxed{1234} \\boxed{5", "1234" * 99,
        "١٢٣٤", "1234²", "1234½", "", "x", *words("\\sqrt{1234} 1234! 1234\\pi 1234\u03c0 x*1234 1234*x 1234^n"),
        *words("sqrt(1234) -1234 - 2468 -$1,234.00 \u20131234 -(1234) 01,234 12,34 1234/1 12$34 12\\34")]),
    "math": ({"solution": "So it is $\\boxed{42}$."}, ["\\boxed{42}", "It is \\boxed{\\frac{84}{2}}"], [
        "42 \\boxed{}", "\\boxed{?} 42", "\\boxed{41}. The final answer is $42$.", "42", "\\boxed{9^{9^9}}"]),
}  # fmt: skip
ROW = '{"question": "q", "answer": "#### 5"}\n'
BAD_DATA = {
    "no column": ("a.csv", "Question,answer\n1,2\n", "no question like (?P<question>.+) in row 1"),
    "no rows": ("a.csv", "question,answer\n", "no rows"), "no bytes": ("a.jsonl", "", "not readable"),
    "cut short": ("a.jsonl", ROW + ROW[:30], "not readable"), "no format": ("a.txt", "q", ".parquet"),
    "null": ("a.jsonl", ROW + '{"question": null, "answer": "#### 5"}', "no question like (?P<question>.+) in row 2"),
    "no parquet": ("a.parquet", "nonsense", "not readable"),
    "latin-1": ("a.csv", "question,answer\ncaf\xe9,#### 5\n", "not readable"),
    "lost zeros": ("a.csv", f"Puzzle,Solution\n{PUZZLE},{GRID}\n{PUZZLE[1:]},{GRID}\n",
                   "no Puzzle like (?P<puzzle>[0-4]{16}) in row 2"),
}  # fmt: skip
DEBRIS = words("<answer> </answer> <reasoning> </reasoning> \\boxed{ #### 1 7 e999 ٧٢ \u2212 \u202e ½ Ⅶ \ud800")
DEBRIS += [*"{}()+-*/= \n\0,.$", "9" * 5000, "((((" * 500, "<answer" * 500]


def solved(puzzle: str, grid: str) -> bool:  # whether it keeps the clues and each unit has 1 to 4; not by agrpo
    lines = [grid[i : i + 4] for i in (0, 4, 8, 12)] + [grid[i::4] for i in range(4)]
    lines += [grid[i : i + 2] + grid[i + 4 : i + 6] for i in (0, 2, 8, 10)]
    kept = len(grid) == 16 and all(clue in "0" + cell for clue, cell in zip(puzzle, grid))
    return kept and all("".join(sorted(line)) == "1234" for line in lines)


def really_right(task: str, answer: str) -> bool:  # whether an answer judged right is: other code than the judge's
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
    before, number = re.fullmatch("([^0-9]*)(.*)", re.sub("m\\}?(\\^2|\\^\\{2\\}|²)", "m", text), re.DOTALL).groups()
    minus = re.sub(r"[^\w\u2212\u2013-]", "", before)[-1:] in ("-", "\u2212", "\u2013")
    fraction = before.endswith(".") and not before[-2:-1].isalpha()
    return re.sub("[^0-9.]", "", number).rstrip(".0") == "1234" and not fraction and not minus


@pytest.mark.parametrize("task", ANSWERS)
def test_answers_and_slow_attacks(task):
    """However it is written, right is right; all else is wrong. SLOW=100000 pytest -s -k slow: so many texts."""
    task == "math" and pytest.importorskip("math_verify")
    (example, right, wrong), judge, texts = ANSWERS[task], TASKS[task].is_right, int(os.environ.get("SLOW", "100"))
    assert [a for a in right if not judge(example, a)] == [a for a in wrong if judge(example, a)] == []
    if task == "countdown":
        assert not judge({"numbers": "7,3", "target": "2"}, "7/3")
        assert all(judge({"numbers": "[2, 3]", "target": "6"}, f"2 {x} 3") for x in words("\\times × \\cdot ·"))
    if task == "math":  # which cannot be checked in another thread, and says so
        with multiprocessing.pool.ThreadPool(1) as other, pytest.raises(ValueError, match="thread"):
            other.apply(judge, (example, right[0]))
    if task == "gsm8k":
        assert all(judge({"gold": "-1,234"}, minus + "$1234") for minus in ("-", "\u2013", "- "))
        assert not any(judge({"gold": "-1234"}, answer) for answer in right)
    rng, rights = random.Random(0), 0
    piece = lambda: rng.choice([*right * 3, rng.choice(wrong), rng.choice(DEBRIS), chr(rng.randrange(0x110000))])
    pieces = lambda most: "".join(piece() for _ in range(rng.randint(0, most)))
    for i in range(texts):
        tagged = f"<reasoning>{pieces(2)}</reasoning>{pieces(1)}<answer>{pieces(3)}</answer>"
        text = (pieces(4) if i % 3 == 0 else tagged) * (10**4 if i % 100 == 0 else 1)
        reward, is_right = TASKS[task].grade(example, text)
        assert 0 <= reward <= 5 and (reward >= 3) == is_right
        assert not is_right or really_right(task, agrpo.answer_in(text)), text
        rights += is_right
    print(f"{task}: {rights:,} of {texts:,} right")
    assert rights > texts / 100


def test_rewards_by_hand():
    """3 for the answer, 0.5 for each pair of tags; one written twice, or the wrong way round, is none."""
    right = "<reasoning>r</reasoning><answer>(1 + 2) * 3</answer>"
    graded = {right: 4, right.replace("* 3", "* 4"): 1, right[24:]: 3.5, "(1 + 2) * 3": 3, right[32:]: 0}
    graded |= {right + "<answer>9</answer>": 0.5, "</answer>(1 + 2) * 3<answer>": 0, "<answer>" * 99 + right[24:]: 0}
    for completion, reward in graded.items():
        assert TASKS["countdown"].grade({"numbers": "1,2,3", "target": "9"}, completion) == (reward, reward >= 3)
    for completion, reward in (f"<answer>{GRID}</answer>", 4.5), (CHANGED, 0), (GRID.replace("1243", "1143"), 9 / 12):
        assert TASKS["sudoku"].grade(FILLED, completion) == (reward, reward >= 3)


def test_sudoku_and_countdown_make_examples():
    """240 grids to train on, 48 others to test on, whatever the seed; 12 to 14 blanks; three numbers."""
    create = TASKS["sudoku"].source
    train, test, pretrain = (create(split, 5) for split in ("train", "test", "pretrain"))
    seen, held_out, pretraining = ({e["solution"] for e in part} for part in (train, test, pretrain))
    assert (len(seen), len(held_out), len(seen | held_out)) == (240, 48, 288)
    assert test == create("test", 6) and train != create("train", 6)
    assert all(12 <= e["puzzle"].count("0") <= 14 and solved(e["puzzle"], e["solution"]) for e in train + test)
    assert len(pretraining) == 528 and seen < pretraining and not held_out & pretraining
    for split, many in ("train", 4096), ("test", 256):
        problems = TASKS["countdown"].source(split, 0)
        assert (problems == TASKS["countdown"].source(split, 1)) == (split == "test")
        assert [p["numbers"].count(",") == 2 and 0 < int(p["target"]) < 1000 for p in problems] == [True] * many


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet", "test.jsonl", "test-0000N-of-00002.csv"])
def test_data_are_read_from_files_and_folders(name, tmp_path):
    """Every format; a folder with a test.* or all its shards. Leading zeros and line separators stay."""
    row = {"question": "q\u2028r", "answer": "so\n#### $-5.0 ", "nums": [44, 19, 35], "target": 98, "more": 1}
    row |= {"Puzzle": PUZZLE, "Solution": GRID}
    files = [tmp_path / name.replace("N", str(n)) for n in range(1 + ("N" in name))]
    for file in files:
        kind, lines = file.suffix[1:].removesuffix("l"), {"lines": name[-1] == "l"} if ".json" in name else {}
        getattr(datasets.Dataset.from_list([row]), f"to_{kind}")(file, **lines)
    (tmp_path / "test-small.csv").write_text("nothing to do with it")
    settings = agrpo.Settings(data=str(tmp_path if name.startswith("test") else files[0]))
    read = lambda task: TASKS[task].examples("test", settings)
    assert read("gsm8k") == [{"question": "q\u2028r", "gold": "-5.0"}] * len(files)
    assert read("sudoku") == [FILLED] * len(files)
    assert [re.findall("[0-9]+", str(e)) for e in read("countdown")] == [words("44 19 35 98")] * len(files)
    for shard in files[1:]:
        shard.unlink()
        with pytest.raises(agrpo.BadInput, match="not one test.csv"):
            read("gsm8k")


def test_data_from_the_hub_and_beside_a_file(tmp_path, monkeypatch):
    """A file is to test on, or a folder without train.*: training is on the task's own, here all shards on the hub."""
    names = words("main/train-00000-of-00002-1f main/train-00001-of-00002-2e main/train-small data/test-00000-of-00001")
    for n, file in enumerate(tmp_path / f"{name}.jsonl" for name in names):
        file.parent.mkdir(exist_ok=True)
        file.write_text(ROW.replace("5", str(n)))
    (tmp_path / "a-of-2.jsonl").write_text(ROW)
    monkeypatch.setattr(agrpo.hub, "snapshot_download", download := mock.Mock(return_value=str(tmp_path)))
    examples = lambda split, name: TASKS["gsm8k"].examples(split, agrpo.Settings(data=str(tmp_path / name)))
    read = lambda *how: [example["gold"] for example in examples(*how)]
    assert read("train", "a-of-2.jsonl") == read("train", "data") == ["0", "1"]
    assert read("test", "a-of-2.jsonl") == ["5"]  # no shard, whatever its name
    assert read("train", "") == ["0", "1"]  # from folders in it
    assert download.call_args.args == ("openai/gsm8k",) and download.call_count == 2
    assert "MATH-500" in TASKS["math"].source("test", 0) != TASKS["math"].source("train", 0)
    asked = download.call_args.kwargs
    assert asked["repo_type"] == "dataset" and "data/train.*" in asked["allow_patterns"]
    assert TASKS["gsm8k"].examples("test", agrpo.Settings())[0]["gold"] == "3"


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_are_named(what, tmp_path):
    """The file, the column and the row, in one sentence."""
    (name, content, said), task = BAD_DATA[what], "sudoku" if what == "lost zeros" else "gsm8k"
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(agrpo.BadInput, match=re.escape(said)) as refused:
        TASKS[task].examples("test", agrpo.Settings(data=str(tmp_path / name)))
    assert name in str(refused.value) and "\n" not in str(refused.value)


# ===== 7. Models ======================================================================================================

IDS = torch.arange(5, 23).view(2, 9)
logits_of = lambda folder: agrpo.load_model(str(folder))[0](IDS).logits
LLADA_RUN = "--prompts_per_update 2 --group_size 2 --rollout_batch 2 --k 2 --completion_length 12 --block_length 6 "
LLADA_RUN += "--steps 4 --eval_steps 4 --eval_examples 2 --lora_rank 2 --device cpu "
CANNOT_SERVE = [  # what is said, the folder's name, what is changed in its config
    ("missing.*layers.2.*unexpected", "llada", {"n_layers": 3}), ("gpt2", "llada", {"model_type": "gpt2"}),
    *(("tokens see each other", f"Qwen3-{name}", {}) for name in ("tide", "OPDLM")),
    ("unexpected.*layers.1.*mismatched", "llada", {"n_layers": 1}),
    ("too large for a CPU", "llada", {"d_model": 4096, "n_layers": 32, "mlp_hidden_size": 12288}),
    ("no mask_token_id", "llada", {"mask_token_id": None}), ("tokens see each other", "Qwen3-bd3lm", {}),
    ("tokens see each other", "a2d-qwen2", {"use_sliding_window": True}),
    ("tokens see each other", "a2d-qwen2", {"layer_types": ["sliding_attention"]}),
]  # fmt: skip
LLADA_NAMES = {  # what to replace in Llama's names, one after another; in LLaDA's code: silu(ff_proj) * up_proj
    "lm_head": "model.ff_out", "model.": "model.transformer.", "layers": "blocks", "embed_tokens": "wte",
    "transformer.norm": "transformer.ln_f", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.down_proj": "ff_out", "mlp.": "", "self_attn.": "",
}  # fmt: skip


def checkpoint(folder: Path, kind: str = "llada", **change):  # a small random one in LLaDA's, Dream's or dLLM's layout
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    shape |= {"tie_word_embeddings": kind == "a2d-qwen3", "max_position_embeddings": 2048}
    name = {"llada": "Llama", "Dream": "Qwen2"}.get(kind, kind[4:].capitalize())
    config = getattr(hf, name + "Config")(**shape)
    model, rng = getattr(hf, name + "ForCausalLM")(config).eval(), seeded(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=rng)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # a tied head too
    raw = json.loads(config.to_json_string()) | {"model_type": kind, "pad_token_id": 0}
    _, tokenizer, mask_id = agrpo.load_model("tiny")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer.chat_template += "{{ add_generation_prompt }}{{ enable_thinking }}"
    tokenizer.save_pretrained(folder)
    if kind == "llada":
        raw = {"model_type": kind, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "mask_token_id": mask_id}
        raw |= {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 96}
        raw |= {"embedding_size": 300, "max_sequence_length": 2048, "weight_tying": False, "vocab_size": 299}
        for ours, theirs in LLADA_NAMES.items():
            weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    if kind == "Dream":  # whose BPE tokenizer has a class of its own
        raw |= {"mask_token_id": 257, "rope_theta": raw.pop("rope_parameters")["rope_theta"]}
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(bytes_to_unicode().values())}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        added = {i: {"content": text, "special": True} for i, text in ((256, "<end>"), (257, "<mask>"))}
        bpe = {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}, "mask_token": "<mask>"}
        bpe |= {"tokenizer_class": "DreamTokenizer", "eos_token": "<end>", "pad_token": "<end>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(bpe | {"added_tokens_decoder": added}))
    agrpo.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw | change))
    return model, weights, raw


@pytest.mark.parametrize("kind", ["llada", "Dream", "a2d-qwen3", "a2d-qwen2", "a2d-llama"])
def test_checkpoints_load_exactly_and_are_saved_as_they_came(kind, tmp_path):
    """The logits of transformers' model, given a mask of ones; Dream's are one place on. All is saved as it was."""
    folder, saved = tmp_path / "it", tmp_path / "saved"
    (folder / "checkpoint-500").mkdir(parents=True)
    theirs, weights, raw = checkpoint(folder, kind)
    model, tokenizer, mask_id = agrpo.load_model(str(folder))
    assert model.get_input_embeddings().padding_idx is None and not model.config.use_cache  # the former is not trained
    found = mask_id, tokenizer.eos_token_id, len(tokenizer("ab")["input_ids"])
    assert found == ((257, 256, 2) if kind == "Dream" else (3, 2, 2))
    for pad in 0, 2:
        real = torch.arange(9).expand(2, 9) >= pad
        mask = torch.where(real[:, None, None, :], 0.0, torch.finfo(torch.float32).min).expand(2, 1, 9, 9)
        places = (real.long().cumsum(1) - 1).clamp(min=0)
        expected = theirs(input_ids=IDS, attention_mask=mask, position_ids=places).logits[:, pad:8]
        found = agrpo.logits_at(model, IDS, real, torch.arange(pad, 8).expand(2, -1) + (kind == "Dream"))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    agrpo.save_model(model, tokenizer, saved)
    assert torch.equal(logits_of(saved), model(IDS).logits)
    assert json.loads((saved / "config.json").read_text()) == raw
    again = agrpo.load_file(saved / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in again)
    assert weights.keys() - again.keys() == ({"lm_head.weight"} if kind == "a2d-qwen3" else set())  # tied


@pytest.mark.parametrize(("said", "name", "change"), CANNOT_SERVE)
def test_what_cannot_serve_is_refused_by_name(said, name, change, tmp_path):
    """Weights that do not fit, another architecture, attention in windows, too many weights."""
    checkpoint(tmp_path / name, "a2d-qwen3" if "Qwen3" in name else name, **change)
    with pytest.raises(agrpo.BadInput, match=f"{name}.*{said}"):
        agrpo.load_model(str(tmp_path / name))


def test_lora_is_saved_loaded_merged_and_shared(tmp_path):
    """An adapter loads as it was, or merged; a new one goes on top. peft's and d1's are read too."""
    checkpoint(tmp_path / "llada")
    base, (model, tokenizer, _) = (agrpo.load_model(str(tmp_path / "llada")) for _ in range(2))
    agrpo.add_lora(model, r=4)
    assert torch.equal(model(IDS).logits, base[0](IDS).logits)  # at first
    torch.manual_seed(0)
    for layer in [layer for layer in model.modules() if isinstance(layer, agrpo.LoRALinear)]:
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    logits, adapter = model(IDS).logits, tmp_path / "adapter"
    agrpo.save_model(model, tokenizer, adapter)
    agrpo.save_model(base[0], tokenizer, tmp_path / "merged")
    agrpo.save_model(agrpo.merge_lora(model), tokenizer, f"{tmp_path}/merged/")  # in its place
    assert torch.equal(logits_of(adapter), logits) and all(p.requires_grad for p in model.parameters())
    half = agrpo.load_model(str(adapter), dtype=torch.bfloat16)[0].named_parameters()
    kinds = {(".lora_" in name, p.requires_grad, p.dtype) for name, p in half}
    assert kinds == {(True, True, torch.float32), (False, False, torch.bfloat16)}
    where = f"--max_steps 6 --task countdown --model {adapter} --output_dir {tmp_path}/run"
    assert run(LLADA_RUN, where).count("Nothing to learn from") == 2  # after 5 and in the end; the new B is still 0
    for folder in "merged", "run":
        torch.testing.assert_close(logits_of(tmp_path / folder), logits, rtol=1e-4, atol=1e-4)
    assert curve.parse_options([str(adapter)]).steps == [256, 128, 64, 32]  # the paper's
    more = f"--base {tmp_path}/merged --task countdown --examples 2 --save {tmp_path}/all --show 1 --device cpu"
    assert "step 4 of 4" in run(adapter, more, "--completion_length 12 --block_length 6 --steps 4 2", main=curve.main)
    assert (texts := [row["completion"] for row in rows_of(tmp_path / "all")])[:4] == texts[4:] and len(texts) == 8
    whole = agrpo.load_file(file := adapter / "adapter_model.safetensors")
    some = {name: tensor for name, tensor in whole.items() if re.search("[qkv]_proj", name)}
    rename = lambda name: name.replace(".layers.", ".transformer.blocks.").replace("self_attn.", "")
    theirs = shutil.copytree(adapter, tmp_path / "d1")
    agrpo.save_file({rename(name): some[name] for name in some}, theirs / "adapter_model.safetensors")
    read = agrpo.load_model(str(theirs))[0].state_dict()
    read = {"base_model.model." + name: tensor for name, tensor in read.items() if "lora_" in name}
    assert read.keys() == some.keys() and all(torch.equal(read[name], some[name]) for name in some)
    agrpo.save_file(dict([*whole.items()][1:]), shutil.copytree(adapter, tmp_path / "part") / file.name)
    with pytest.raises(agrpo.BadInput, match="part is an adapter for another model"):
        agrpo.load_model(str(tmp_path / "part"))
    config = json.loads((file := theirs / "adapter_config.json").read_text())
    for change in {"r": 8}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 1}}, {}:
        file.write_text(json.dumps(config | change))
        change or (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model.bin")
        with pytest.raises(agrpo.BadInput, match=f"d1.*{'another model' if 'r' in change else 'only plain LoRA'}"):
            agrpo.load_model(str(theirs))
    peft = pytest.importorskip("peft")
    read = peft.PeftModel.from_pretrained(agrpo.load_model(str(tmp_path / "llada"))[0], str(adapter))
    torch.testing.assert_close(read.eval()(IDS).logits, logits)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    made = peft.get_peft_model(base[0], peft.LoraConfig(**config))
    made.save_pretrained(tmp_path / "peft")
    torch.testing.assert_close(logits_of(tmp_path / "peft"), made.eval()(IDS).logits)


@pytest.mark.parametrize(("kind", "task"), [("llada", t) for t in TASKS] + [("Dream", "gsm8k"), ("a2d-qwen3", "gsm8k")])
def test_a_checkpoint_trains_with_lora_on_each_task(kind, task, tmp_path, monkeypatch):
    """Chat prompts, data from files, the release's settings; a run that resumes bit for bit."""
    task == "math" and pytest.importorskip("math_verify")
    checkpoint(tmp_path / "it", kind)
    asked = {"question": "What is 1 + 1?", "problem": "1 + 1", "input": "30,100,93", "Puzzle": PUZZLE}
    known = {"answer": "#### 2", "solution": "\\boxed{2}", "output": "23", "Solution": GRID}
    one, other = known | asked, known | {name: text.replace("1", "0") for name, text in asked.items()}
    for split, rows in ("test", [one] * 4), ("train", [other] * 4 + [one]):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reward = lambda _, example, text: (sum(map(ord, text)), False)  # what a random model writes earns 0
    monkeypatch.setattr(agrpo.Task, "grade", reward)
    monkeypatch.setattr(agrpo, "policy_gradient", learn := mock.Mock(wraps=agrpo.policy_gradient))
    monkeypatch.chdir(tmp_path)
    where = f"--task {task} --model it --data {tmp_path} --answer_format boxed --output_dir"
    one, two = (tmp_path / name for name in ("one", "two"))
    more = "--max_steps 3 --save_every 2 --gradient_checkpointing true --beta 0.1 --learning_rate 1e-3"
    assert "4 examples to train on, 2 to test on; 1 were both" in run(LLADA_RUN, where, one, more)
    model, ref = learn.call_args.args[0], learn.call_args.kwargs["ref_model"]
    assert model.training and model.base_model.gradient_checkpointing and ref.lm_head.weight is model.lm_head.weight
    assert json.loads((one / "settings.json").read_text())["model"] == f"{tmp_path}/it"
    shutil.copytree(one, two, ignore=shutil.ignore_patterns("checkpoint-3"))
    shutil.copytree(two / "checkpoint-2", two / "checkpoint-3-mine")  # which is not the run's
    run("--resume", two)
    for other in "--lora_rank 3", f"--output_dir {one}":
        assert "--lora_rank and --output_dir of a run cannot be changed" in refusal("--resume", two, other)
    assert same_run(one, two) and all(line["grad_norm"] > 0 < line["kl"] for line in figures(one)[1:])
    assert json.loads((one / "settings.json").read_text())["top_k"] == 150  # the release's
    assert len(agrpo.load_file(one / "checkpoint-3" / "adapter_model.safetensors")) == 2 * 2 * 7
    run(one, f"--device cpu --save {tmp_path}/all", main=curve.main)
    prompt = rows_of(tmp_path / "all")[0]["prompt"]
    assert prompt.startswith("<user>") and prompt.endswith("TrueFalse")
    assert ("within \\boxed{}." in prompt and "<answer>" not in prompt) == (task in ("gsm8k", "math"))


class Living(torch.utils._python_dispatch.TorchDispatchMode):  # the bytes of tensors alive, fake ones too; their most
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
    """Peak GiB of an update, a rollout batch and one of evaluation, with all that training holds. Its code runs on fake
    weights and real ids, a step a block; with the mask as EOS a block will do. fake=False: really, by the kernel."""
    status, peaks, sampling = Path("/proc/self/status"), [], {name: getattr(args, name, 1) for name in PLAIN}
    resident = lambda name: int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1]) / 2**20
    before = 0 if fake else resident("VmRSS")
    one_step = mock.patch.object(agrpo, "tokens_per_step", lambda length, block, steps: [length // steps])
    numbers = mock.patch.multiple(Tensor, tolist=lambda _: [1.0] * 4, item=lambda _: 1.0, __float__=lambda _: 1.0)
    with Living() as living, one_step, numbers:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device("cpu"):
            model = hf.AutoModelForCausalLM.from_config(config).train(args.gradient_checkpointing)
            agrpo.add_lora(model, args.lora_rank)
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
    """Within 15 %, with 27 million weights. A tiny model goes first, to load what stays loaded."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the kernel at once
    shape = {"intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 16384}
    tiny, big = (hf.LlamaConfig(hidden_size=width, **shape, **agrpo.FULL) for width in (16, 512))
    less = agrpo.Settings(lora_rank=8, micro_batch=8, rollout_batch=8, gradient_checkpointing=True)
    with multiprocessing.get_context("spawn").Pool(1) as process:
        process.apply(peak_memory, (tiny, less, 64, False))
        for args in less, replace(less, gradient_checkpointing=False):
            assert process.apply(peak_memory, (big, args, 64, False)) == pytest.approx(peak_memory(big, args, 64), 0.15)


def print_memory():
    print("Peak memory in GiB, an estimate; the smallest GPU with a tenth to spare. Prompts of 256 tokens")
    print("\n   model  micro_batch  gradient_checkpointing    update   rollout  evaluation   GPU")
    llada = hf.LlamaConfig(intermediate_size=12288, vocab_size=126464, dtype="bfloat16", **agrpo.FULL), agrpo.RELEASE
    qwen = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    qwen |= {"num_key_value_heads": 8, "tie_word_embeddings": True, "dtype": "bfloat16"} | agrpo.FULL  # else defaults
    small = hf.Qwen3Config(**qwen), agrpo.SMALL
    for (config, settings), size, less in itertools.product((llada, small), (8, 2, 1), (False, True)):
        need = peak_memory(config, agrpo.Settings(**settings | {"micro_batch": size, "gradient_checkpointing": less}))
        gpu = min(gpu for gpu in (12, 24, 48, 80) if max(need) < 0.9 * gpu)
        print("   {:5s}{:13d}{!s:>24s}{:10.1f}{:10.1f}{:12.1f}{:6d}".format(config.model_type, size, less, *need, gpu))


# ===== 8. eval.py and the README ======================================================================================

AS_RELEASED = [  # what the release counts, whether or not we do; | is between texts
    ("gsm8k", {"gold": "5"}, 1, (
        "5|The 5th|<answer>5 or 6</answer> 7|\\boxed{5} \\boxed{6}|<answer>5</answer><answer>6</answer>|-5|5.5|5,000|"
        "5!|5/2|<answer>\\boxed{x5}</answer>|is $5$|6 \\boxed{5}|<answer>\n5\n</answer>|5\n6|"
        "<answer>6 \\boxed{5}</answer>")),
    ("gsm8k", {"gold": "5"}, 0, (
        "1,234|6 5|<answer>five</answer> 5|\\boxed{6} 5|<answer>6</answer><answer>5</answer>|12.50|05||٥|55|x|0.5|"
        "\\boxed{} 5 6 \\boxed{5}|<answer></answer>5")),
    ("gsm8k", {"gold": "1,234"}, 1, "1234"), ("math", {}, 1, "whatever it is"),
    ("countdown", SUM, 1, "30+93-100=23|so\n30+93-100 = 23|<answer>93-100+30 = 23</answer>|1=1\n30+93-100=23"),
    ("countdown", SUM, 0, "30+93-100|30+93-100=23\n1=1|30+93=23||<answer></answer>30+93-100=23"),
    ("sudoku", FILLED, 1, f"{GRID}|<answer>{GRID}</answer> 1"),
    ("sudoku", FILLED, 1 / 8, "4" * 16), ("sudoku", FILLED, 0, ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def half_known(tmp_path_factory, short_run):  # 24 puzzles, a model that knows 8 by heart, a run that goes on from it
    folder = tmp_path_factory.mktemp("curve")
    known = [tuple(example.values()) for example in TASKS["sudoku"].source("test", 0)[:24]]
    (folder / "puzzles.csv").write_text("\n".join(["Puzzle,Solution", *map(",".join, known)]))
    torch.manual_seed(0)
    model, tokenizer, mask_id = agrpo.load_model("tiny")
    agrpo.pretrain(model, tokenizer, mask_id, known[:8], seed=0, steps=150, batch=16)
    agrpo.save_model(model, tokenizer, folder / "base")
    more = f"--model {folder}/base --data {folder}/puzzles.csv --eval_steps 4 2 1 --eval_examples 0 --max_steps 2"
    run(SHORT, folder / "run", more, "--learning_rate 2e-3")
    return folder


@pytest.mark.parametrize("how", ["", "--unmasking random --temperature 1 --samples 3 --seeds 0 1"])
def test_eval_gives_the_figures_of_training(how, half_known, tmp_path):
    """Every figure again from the saved lines alone; what --show unmasks ends in the completion."""
    files = f"--base {half_known}/base --save {tmp_path}/all --output {tmp_path}/found --show 2 --device cpu "
    plots = bool(find_spec("matplotlib"))
    printed = run(half_known / "run", files, how, f"--plot {tmp_path}/curve.png" * plots, main=curve.main)
    assert (tmp_path / "curve.png").exists() == plots
    found, lines = json.loads((tmp_path / "found").read_text())["results"], rows_of(tmp_path / "all")
    training = json.loads((half_known / "run" / "results.json").read_text())
    assert {(r["correct"], solved(r["prompt"], r["completion"])) for r in lines} == {(True, True), (False, False)}
    mean = lambda values: pytest.approx(sum(values) / len(values))
    right = lambda records: mean([r["correct"] for r in records])
    for (model, stage), steps in itertools.product((("base", "base"), ("trained", "AGRPO")), (4, 2, 1)):
        mine = [r for r in lines if (r["model"], r["steps"]) == (model, steps)]  # by seed, sample, example
        figure = found[model][str(steps)]
        assert len(mine) == 24 * (6 if how else 1) and figure["tokens/pass"] == 16 / steps
        assert training[stage]["as trained" if how else "greedy"][str(steps)] == right(mine[:24])
        assert figure["accuracy"] == right(mine)
        assert all(figure[name] == mean([r[name] for r in mine]) for name in ("as released", "length"))
        assert figure["95% interval"] == pytest.approx(curve.wilson(figure["accuracy"], 24))
        if how:
            assert figure["by seed"] == [right(mine[:72]), right(mine[72:])]
            groups = [mine[seed + i : seed + 72 : 24] for seed in (0, 72) for i in range(24)]
            assert figure["majority@3"] == mean([curve.vote(group, "sudoku") for group in groups])
            assert figure["pass@3"] == mean([any(r["correct"] for r in group) for group in groups])
            assert len({r["completion"] for r in mine[-1::-24]}) > 2 or model == "trained"  # each draws anew
    grids = re.findall(r"step \d of 4\n((?:.+\n){4})", printed)
    frames = ["".join(line[-7::2] for line in grid.splitlines()) for grid in grids]
    for line, shown in zip(lines, (frames[:4], frames[4:]), strict=False):
        assert [frame.count("░") for frame in shown] == [12, 8, 4, 0] and shown[-1].startswith(line["completion"])


def test_the_best_checkpoint_is_kept(half_known):
    """Also by a run that is resumed; eval.py measures it with the run's settings."""
    folder, more = half_known / "ruined", "--learning_rate 1e-3 --warmup_steps 6 --max_steps 3 --save_every 1"
    more += f" --model {half_known}/base --data {half_known}/puzzles.csv --eval_examples 0 --eval_every 1"
    printed = run(SHORT, folder, more) + run("--resume", folder, "--max_steps 6")
    best = max(accuracy := [row["eval_accuracy"] for row in figures(folder)])
    said = f"update 6: accuracy {accuracy[5]:.3f} in evaluation; before, at best {best:.3f}"
    assert accuracy.index(best) < 3 and said in printed
    run(folder / "best", f"--device cpu --output {folder}/best.json", main=curve.main)
    assert json.loads((folder / "best.json").read_text())["results"]["trained"]["4"]["accuracy"] == best > 0


def released(task: str, text: str) -> float:  # what the release counts, written again
    _, found, rest = text.partition("<answer>")
    text = rest.split("</answer>")[0] if found and "</answer>" in rest else text
    box, lines = re.search(r"\\boxed\{([^}\n]*)\}", text), [line for line in text.splitlines() if "=" in line]
    cells, blanks = [c for c in text if c in "1234"] + [""] * 16, [i for i, clue in enumerate(PUZZLE) if clue == "0"]
    digits = re.search("[0-9]+", box[1] if box else text)
    share = sum(cells[i] == GRID[i] for i in blanks) / len(blanks)
    counted = {"gsm8k": digits and digits[0] == "1234", "sudoku": share, "math": True}
    return float((counted | {"countdown": lines and really_right("countdown", lines[-1])})[task] or 0)


def test_eval_s_figures_by_hand():
    """Wilson's interval, with z = 1.959964; 1,234 and $1234 are one vote, the first of equals wins."""
    for task, (example, right, wrong) in ANSWERS.items():  # over 80 answers a task
        answers = [*right, *wrong, *DEBRIS, *(f"{a} = 23" for a in right), "\\boxed{5} 1234", "5 \\boxed{1234}"]
        for text in [*answers, *(f"5 <answer>{answer}</answer> <answer>5</answer>" for answer in answers)]:
            assert curve.as_released(task, example, text, True) == pytest.approx(released(task, text)), (task, text)
    for task, example, share, texts in AS_RELEASED:
        for text in texts.split("|"):
            assert curve.as_released(task, example, text, True) == pytest.approx(share), text
    for right, n, low, high in (0, 10, 0, 0.277533), (8, 10, 0.490162, 0.943318), (50, 100, 0.403832, 0.596168):
        assert curve.wilson(right / n, n) == pytest.approx((low, high), abs=1e-6)
    said = lambda text: [{"answer": a, "correct": a in ("1,234", "$1234", "(1+2)")} for a in text.split("|")]
    for won, lost, task in ("7|1,234|$1234", "8|1,234", "gsm8k"), ("||(1+2)", "7|1,234|$1234", "countdown"):
        assert curve.vote(said(won), task) and not curve.vote(said(lost), task)
    assert curve.vote(said("1,234|8"), "gsm8k") and not curve.vote(said("|"), "countdown")


def test_two_processes_do_what_one_does(half_known, tmp_path, monkeypatch):
    """The same rollouts and, as k covers every step, gradients; the same lines of eval.py."""
    monkeypatch.setitem(agrpo.TASKS, "sudoku", GENEROUS)
    script, launch = tmp_path / "generous.py", "-m torch.distributed.run --standalone --nproc_per_node 2"
    script.write_text(f"import sys, {__name__}\n{__name__}.generous_main(*sys.argv[1:])\n")
    train = f"{SHORT} {{}} --model {half_known}/base --k 2 --steps 2 --eval_examples 23 --rollout_batch 4"
    measure = f"{half_known}/run --device cpu --rollout_batch 5 --examples 23 --save {{}}.jsonl"  # 5, 5, 2 and 5, 5, 1
    one, two = tmp_path / "one", tmp_path / "two"
    for main, file, options in (agrpo.main, script, train), (curve.main, curve.__file__, measure):
        run(options.format(one), main=main)
        subprocess.run([sys.executable, *words(launch, file, options.format(two))], check=True, env=ENVIRONMENT)
    assert all(a == pytest.approx(b, 1e-3, 1e-5) for a, b in zip(figures(one), figures(two), strict=True))
    assert any(row["frac_reward_zero_std"] == 0.5 and row["grad_norm"] > 0 for row in figures(one))
    assert (one / "results.json").read_text() == (two / "results.json").read_text()
    assert rows_of(tmp_path / "one.jsonl") == rows_of(tmp_path / "two.jsonl")


def test_readme_names_what_exists(tmp_path):
    """The options of its commands, the names in its table; its Python runs."""
    text = Path(agrpo.__file__).with_name("README.md").read_text(encoding="utf-8")
    bash, python = (re.findall(rf"(?ms)^```{language}\n(.*?)^```", text) for language in ("bash", "python"))
    commands = re.findall(r"\b(agrpo|eval)\.py([^`#\n]*)", "\n".join([*bash, *re.findall("`python [^`]+`", text)]))
    for script, options in commands:
        known = agrpo.Settings if script == "agrpo" else curve.Options
        assert {*re.findall(r" --(\w+)", options)} <= {*known.__dataclass_fields__, "help"}, options
    table = re.search(r"(?s)\| in the paper \|.*?\n(.*?)\n\n", text)[1]
    assert python and len(commands) >= 8
    assert all(hasattr(agrpo, name) for name in re.findall(r"`(\w+)(?:\.\w+)?`", table))
    for example in python:
        (tmp_path / "example.py").write_text(example)
        runpy.run_path(tmp_path / "example.py")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--diffu_grpo"]:
        agrpo.policy_gradient = diffu_grpo
        agrpo.main([*sys.argv[2:], "--optimizer_steps", "1"])
    else:
        print_memory() if "--memory" in sys.argv else print_tables()
