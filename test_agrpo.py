"""What AGRPO claims, against exact values: the appendix that the paper does not have.

    pytest test_agrpo.py        every claim, asserted
    python test_agrpo.py        the same story as tables, in half a minute

The mask predictor here knows four words (one is EOS, one the mask) and writes two to four of them, in float64: so few
that every trajectory (the order in which positions are unmasked, and the tokens) can be enumerated. Whatever training
only samples is computed here, by code that shares nothing with the sampler, and compared to the last digits: the
likelihood, the expected reward, its gradient, the mean of an update over all trajectories, groups and timesteps.
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

import datasets
import pytest
import torch
import transformers
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import agrpo
import eval as curve
from agrpo import Rollout, draw_timesteps, group_advantages, kl_penalty, sample, step_logps

torch.set_num_threads(1)  # tensors this small lose more between threads than they gain
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

X, Y, EOS, MASK = WORDS = range(4)
PROMPT = (Y, X)
seeded = lambda seed: torch.Generator().manual_seed(seed)
keys = lambda *parts: list(map(tuple, torch.cat(parts, 1).tolist()))  # rows as what a dict can look up


# ===== 1. A mask predictor small enough to enumerate, and the enumerator ==============================================


def mask_predictor(kind: str = "bert", seed: int = 2, vocab: int = len(WORDS), width: int = 8, spread: float = 0.8):
    """A random mask predictor whose predictions are far from uniform and depend on all that they may depend on."""
    shape = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(**shape))
    elif kind == "llama":  # LLaDA is one
        model = LlamaForCausalLM(LlamaConfig(is_causal=False, num_key_value_heads=1, **shape))
    else:  # Dream is a Qwen2 whose logits are about the next position
        model = Qwen2ForCausalLM(Qwen2Config(is_causal=False, num_key_value_heads=1, logits_shift=1, **shape))
    rng = seeded(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        norm = "norm" in name.lower() and name.endswith("weight")
        parameter.data.copy_(spread * noise if parameter.dim() == 2 else 0.2 * noise + norm)
    return model.double().eval()


PLAIN = {"completion_length": 3, "block_length": 3, "steps": 3, "temperature": 1.0, "unmasking": "random"}
PLAIN |= {"mask_id": MASK, "eos_id": EOS, "top_k": 0, "top_p": 1.0}
BLOCKS = PLAIN | {"completion_length": 4, "block_length": 2, "steps": 4}
SETTINGS = {
    "plain": PLAIN,
    "greedy": PLAIN | {"temperature": 0.0},
    "top-k, top-p": PLAIN | {"temperature": 1.5, "top_k": 2, "top_p": 0.7},
    "two a step": PLAIN | {"steps": 2},
    "blocks": BLOCKS,
    "blocks, two a step": BLOCKS | {"steps": 2, "temperature": 0.8},
    "blocks, top-p": BLOCKS | {"temperature": 1.3, "top_p": 0.9},
    "blocks, no EOS": BLOCKS | {"eos_id": None},
    "blocks, two EOS": BLOCKS | {"eos_id": [Y, EOS]},
    "low confidence": PLAIN | {"unmasking": "low_confidence"},
    "low confidence, greedy": PLAIN | {"unmasking": "low_confidence", "temperature": 0.0},
    "low confidence, top-p": PLAIN | {"unmasking": "low_confidence", "temperature": 4.0, "top_p": 0.9, "steps": 2},
    "four tokens": PLAIN | {"completion_length": 4, "block_length": 4, "steps": 4},
    "two tokens": PLAIN | {"completion_length": 2, "block_length": 2, "steps": 2, "temperature": 0.7, "top_k": 2},
}


TESTED = [name for name in SETTINGS if name not in ("greedy", "four tokens")]


def policy_table(model, sampling: dict, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log p(token | prompt, state) under the policy, at every position of every state: (S, C, V), differentiable.

    By its definition: temperature; never the mask; top-k: fewer than k tokens are more probable; top-p: the more
    probable ones make up less than top_p. Also the ids so kept, (S, C, V) bool; pass them to have another model's
    policy over the same choice.
    """
    input_ids = [PROMPT + state for state in itertools.product(WORDS, repeat=sampling["completion_length"])]
    logits = model(input_ids=torch.tensor(input_ids)).logits[:, len(PROMPT) :] / (sampling["temperature"] or 1.0)
    if keep is None:
        keep = (torch.arange(len(WORDS)) != MASK).expand(logits.shape)
        better = (logits[..., None, :] > logits[..., :, None]) & keep[..., None, :]  # [..., a, b]: b beats a
        most = (sampling["top_k"] or len(WORDS)) if sampling["temperature"] else 1
        keep = keep & (better.sum(-1) < most)
        p = logits.masked_fill(~keep, -math.inf).softmax(-1)
        keep = keep & ((better * p[..., None, :]).sum(-1) < sampling["top_p"])
    return logits - logits.masked_fill(~keep, -math.inf).logsumexp(-1, keepdim=True), keep


def ways(unmasking: str, logp: Tensor, keep: Tensor, confidence: Tensor, masked: list[int], count: int):
    """All that one step can do in one state: pairs of what it unmasks, {position: token}, and its log-probability."""
    options = [keep[i].nonzero().flatten().tolist() for i in range(len(keep))]
    if unmasking == "random":
        subsets = list(itertools.combinations(masked, count))
        for subset in subsets:
            for tokens in itertools.product(*(options[i] for i in subset)):
                yield zip(subset, tokens), sum(logp[subset, tokens]) - math.log(len(subsets))
        return
    outcomes = defaultdict(list)  # low confidence: a token for every masked position, of which the surest stay
    for tokens in itertools.product(*(options[i] for i in masked)):
        drawn = sorted(zip(masked, tokens), key=lambda place: -confidence[place])
        outcomes[tuple(sorted(drawn[:count]))].append(sum(logp[masked, tokens]))
    for unmasked, several in outcomes.items():
        yield unmasked, torch.stack(several).logsumexp(0)


@lru_cache
def enumerate_trajectories(name: str, kind: str = "bert", seed: int = 2) -> SimpleNamespace:
    """Every trajectory of one setting, N of them: as a rollout that nobody sampled, and with its exact probability.

    log_probability (N,) is of the whole trajectory, choice of positions included; logp (N, C) of each token in the
    state it was unmasked in (logp_under: under another model); all differentiable. state (N, C) is the number of that
    state; keep (S, C, V) bool the ids to choose from in each state.
    """
    model, sampling = mask_predictor(kind, seed), SETTINGS[name]
    C, block, T, ends = (sampling[key] for key in ("completion_length", "block_length", "steps", "eos_id"))
    ends = ends if isinstance(ends, list) else [ends]
    inside = T * block // C  # steps inside one block
    logp, keep = policy_table(model, sampling)
    confidence, _ = policy_table(model, sampling | {"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    number, found = {state: n for n, state in enumerate(itertools.product(WORDS, repeat=C))}, []

    def walk(t: int, history: dict, log_probability: Tensor):  # history: position -> (step, token, state before)
        start = t // inside * block
        last_block = {history[i][1] for i in range(start - block, start)} if t and t % inside == 0 else set()
        if t == T or last_block and last_block <= {*ends}:
            found.append((t, history, log_probability))
            return
        n = number[tuple(history[i][1] if i in history else MASK for i in range(C))]
        masked = [i for i in range(start, start + block) if i not in history]
        count = block // inside + (t % inside < block % inside)
        for unmasked, step_logp in ways(sampling["unmasking"], logp[n], keep[n], confidence[n], masked, count):
            walk(t + 1, history | {i: (t, token, n) for i, token in unmasked}, log_probability + step_logp)

    walk(0, {}, torch.zeros((), dtype=torch.float64))
    lengths, histories, log_probabilities = zip(*found)
    table = torch.tensor([[history.get(i, (-1, EOS, 0)) for i in range(C)] for history in histories])
    step, completion, state = table.unbind(-1)
    place = (state, torch.arange(C))
    logp_under = lambda other: policy_table(other, sampling, keep)[0][(*place, completion)].masked_fill(step < 0, 0)
    token_logp = logp_under(model)
    entropy = torch.special.entr(logp.exp().masked_fill(~keep, 0)).sum(-1)[place].masked_fill(step < 0, 0).detach()
    entropy = torch.zeros(len(found), T).double().scatter_add(1, step.clamp(min=0), entropy)
    cut = sampling["top_k"] or sampling["top_p"] < 1 or not sampling["temperature"]
    kept = torch.where(keep, torch.arange(len(WORDS)), -1)[place] if cut else None
    prompt, num_steps = torch.tensor([PROMPT] * len(found)), torch.tensor(lengths)
    e = SimpleNamespace(model=model, sampling=sampling, state=state, keep=keep, logp=token_logp, logp_under=logp_under)
    e.rollout = Rollout(prompt, prompt > -1, completion, step, token_logp.detach(), entropy, num_steps, kept)
    e.policy = {"mask_id": MASK, "temperature": sampling["temperature"]}
    e.log_probability = torch.stack(log_probabilities)
    e.probability = e.log_probability.detach().exp()
    e.rewards = torch.rand(len(number), generator=seeded(0)).double()[[number[text] for text in keys(completion)]]
    return e


def select(rollout: Rollout, rows) -> Rollout:
    return Rollout(*(None if value is None else value[rows] for value in vars(rollout).values()))


def gradient_of(value: Tensor, model) -> Tensor:
    """d value / d theta by autograd, as one vector."""
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return torch.nn.utils.parameters_to_vector(gradients)


def update_of(model, *args, **options) -> Tensor:
    """What `policy_gradient` adds to .grad, as one vector, with the sign of an ascent."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    agrpo.policy_gradient(model, *args, **options)
    return -torch.nn.utils.parameters_to_vector(p.grad for p in model.parameters())


@contextmanager
def passes_seen(model):
    """Counts the sequences that go through the model, and the positions that go through its head."""
    seen, body, head = Counter(), model.base_model, model.cls if hasattr(model, "cls") else model.lm_head
    count = lambda _, __, given: seen.update(sequences=len(given["input_ids"]))
    count_head = lambda _, given: seen.update(positions=given[0].shape[:-1].numel())
    with body.register_forward_pre_hook(count, with_kwargs=True), head.register_forward_pre_hook(count_head):
        yield seen


# ===== 2. The sampler draws from the process that it says it draws from, and looks only where it must =================


def write(model, prompt: Tensor, seed: int = 0, prompt_mask: Tensor | None = None, **sampling) -> Rollout:
    prompt_mask = prompt > -1 if prompt_mask is None else prompt_mask
    return sample(model, prompt, prompt_mask, generator=seeded(seed), **sampling)


@pytest.mark.parametrize("name", [*TESTED, "greedy"])
def test_sampler_draws_trajectories_with_their_probabilities_and_records_them(name):
    """20,000 samples are as frequent as the enumeration says, nothing else occurs, and what is recorded is exact."""
    e = enumerate_trajectories(name)
    which = {key: n for n, key in enumerate(keys(e.rollout.completion, e.rollout.step))}
    assert len(which) == len(e.probability) and abs(float(e.probability.sum()) - 1) < 1e-12
    rollout = write(e.model, torch.tensor([PROMPT] * 20_000), **e.sampling)
    number = torch.tensor([which[key] for key in keys(rollout.completion, rollout.step)])
    expected = 20_000 * e.probability
    often = expected >= 5  # Pearson's chi-square: its mean is that of so many squares of standard normals
    chi2 = ((torch.bincount(number, minlength=len(which)) - expected) ** 2 / expected)[often].sum()
    freedom = (1 - e.probability[often]).sum().clamp(min=1)
    assert chi2 < freedom + 3 * (2 * freedom).sqrt()
    exact = select(e.rollout, number)
    assert_close(rollout.logp, exact.logp)
    assert_close(rollout.entropy, exact.entropy)
    assert rollout.num_steps.equal(exact.num_steps) and (rollout.kept is None) == (exact.kept is None)
    if rollout.kept is not None:
        ids = [(r.kept[..., None] == torch.arange(4)).any(2)[r.step >= 0] for r in (rollout, exact)]
        assert ids[0].equal(ids[1])


@pytest.mark.parametrize("unmasking", ["random", "low_confidence"])
@pytest.mark.parametrize("cut", [{"temperature": 1.5}, {"temperature": 1.2, "top_k": 3, "top_p": 0.9}])
def test_sampler_keeps_its_promises(unmasking, cut):
    """Each step unmasks its share of its block; rows stop after a block of EOS; what pads a prompt changes nothing."""
    model = mask_predictor()
    model.cls.predictions.bias.data += torch.tensor([0.0, 0.0, 1.0, 50.0])  # EOS is common; the mask tempts
    prompt_mask = torch.arange(4) >= torch.arange(64)[:, None] % 4  # left padding
    prompt = torch.where(prompt_mask, torch.arange(4) % 2, MASK)
    sampling = PLAIN | {"completion_length": 12, "block_length": 3, "steps": 8, "unmasking": unmasking} | cut
    with passes_seen(model) as seen:
        rollout = write(model, prompt, prompt_mask=prompt_mask, **sampling)
    completion, step, num_steps = rollout.completion, rollout.step, rollout.num_steps
    assert not (completion == MASK).any() and (completion[step < 0] == EOS).all()
    ended = (completion.view(64, 4, 3) == EOS).all(2).cumsum(1).roll(1, 1) > 0  # (64, 4 blocks), before that block
    ended[:, 0] = False
    expected = torch.tensor([0, 0, 1]) + 2 * torch.arange(4)[:, None]  # two tokens, then one
    assert step.view(64, 4, 3).sort(2).values.equal(expected.expand(64, 4, 3).masked_fill(ended[..., None], -1))
    assert num_steps.equal(2 * (~ended).sum(1)) and len(num_steps.unique()) > 2  # rows end here and there
    # Rows that have ended leave the batch, rows that are alike share a pass, and the head sees no other positions.
    states = [torch.cat([prompt_mask, completion.where((step >= 0) & (step < t), MASK)], 1) for t in range(8)]
    assert seen["sequences"] == sum(len(state[num_steps > t].unique(dim=0)) for t, state in enumerate(states))
    assert seen["positions"] == (~ended).sum() * (2 + 1 if unmasking == "random" else 3 + 1)
    for padding in range(4):  # `step_logps` finds the sampler's logp in all rows; and then where padding is cut off
        bare = select(rollout, slice(padding, None, 4 if padding else 1))
        bare = replace(bare, prompt=bare.prompt[:, padding:], prompt_mask=bare.prompt_mask[:, padding:])
        row, t = (torch.arange(8) < bare.num_steps[:, None]).nonzero(as_tuple=True)
        logp, unmasked = step_logps(model, bare, row, t, mask_id=MASK, temperature=cut["temperature"])
        assert unmasked.equal(bare.step[row] == t[:, None]) and not logp[~unmasked].any()
        assert_close(torch.zeros_like(bare.logp).index_add(0, row, logp.detach()), bare.logp)


@pytest.mark.parametrize("kind", ["bert", "llama", "dream"])
def test_logits_at_are_those_of_the_full_forward_pass(kind):
    """Value and gradient, padded or not, in any order; equal rows share a pass, the head sees no other positions."""
    model, tolerance = mask_predictor(kind), 1e-12 if kind == "bert" else 1e-5  # Llama's norms round to float32
    ids = (torch.arange(45).view(5, 9) ** 2 % 7 % 4)[[0, 1, 2, 3, 4, 0, 1]]
    positions, weight = torch.tensor([8, 4, 6]), torch.randn(3, len(WORDS), generator=seeded(0))
    full = model(input_ids=ids).logits
    exact = full[:, positions - int(kind == "dream")]
    for padding in (0, 3):
        padded = torch.cat([torch.arange(7 * padding).view(7, padding) % 4, ids], 1)
        attention_mask = (torch.arange(9 + padding) >= padding).expand(7, -1) if padding else None
        with passes_seen(model) as seen:
            logits = agrpo.logits_at(model, padded, attention_mask, (positions + padding).expand(7, 3))
        assert seen == {"sequences": 5, "positions": 7 * 3}
        assert_close(logits, exact, atol=tolerance)
        assert_close(*(gradient_of((x * weight).sum(), model) for x in (logits, exact)), atol=tolerance)
    ids[:, 8] = (ids[:, 8] + 1) % 4  # not causal: the first position sees the last
    assert ((model(input_ids=ids).logits - full)[:, 0].abs() > 1e-3).any()


def test_what_cannot_work_is_refused():
    """Steps that do not spread evenly over the blocks, proposals that never draw a step, groups that do not fit."""
    two = torch.tensor([2])
    for call in [
        *(partial(agrpo.tokens_per_step, *wrong) for wrong in [(10, 4, 4), (12, 4, 4), (12, 4, 2), (4, 2, 6)]),
        partial(write, None, two[None], **PLAIN | {"steps": 7}),
        *(partial(draw_timesteps, two, 1, torch.tensor([[1.0, p]])) for p in (-1.0, 0.0, math.nan, math.inf)),
        partial(draw_timesteps, two, 1, torch.ones(1, 1)),  # a proposal for fewer steps than the row has taken
        partial(draw_timesteps, two, 0),
        partial(group_advantages, torch.ones(6), 4),
    ]:
        with pytest.raises(ValueError):
            call()


def test_what_would_be_silently_wrong_is_refused():
    """Padding on the right, dropout, heads and positions of another kind, a causal mask, words that nobody knows."""
    model, prompt, left = mask_predictor(), torch.tensor([[MASK, *PROMPT]]), torch.tensor([[0, 1, 1]])
    rollout = write(model, prompt, prompt_mask=left, **PLAIN)  # a mask of integers will do
    assert rollout.logp.equal(write(model, prompt, prompt_mask=left.bool(), **PLAIN).logp)
    policy = {"k": 1, "mask_id": MASK, "temperature": 1.0, "on_policy": True}
    gradient = partial(agrpo.policy_gradient, model, rollout, torch.ones(1), **policy)
    for said, wrong in {
        "padded on the left": partial(write, model, prompt.roll(-1), prompt_mask=left.roll(-1), **PLAIN),
        "unmasking is": partial(write, model, prompt, **PLAIN | {"unmasking": "left_to_right"}),
        "length_norm is": partial(gradient, length_norm="seqence"),
        "needs ref_model": partial(gradient, beta=0.1),
        "method is one of": partial(agrpo.Settings, method="grpo"),
        "validation": partial(TASKS["sudoku"].examples, "validation", agrpo.Settings()),
    }.items():
        with pytest.raises((ValueError, KeyError), match=said):
            wrong()
    with pytest.raises(ValueError, match="dropout is on"):
        write(model.train(), prompt, prompt_mask=left, **PLAIN)
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "intermediate_size": 8}
    for kind in ("Roberta", "ModernBert", "DistilBert", "Electra", "GPT2", "Llama"):
        config = getattr(transformers, f"{kind}Config")(**shape, pad_token_id=0)
        model = getattr(transformers, f"{kind}ForMaskedLM", None) or getattr(transformers, f"{kind}ForCausalLM", None)
        model = model or transformers.GPT2LMHeadModel
        with pytest.raises(ValueError, match=f"{kind}.* is neither like BERT"):
            agrpo.logits_at(model(config).eval(), prompt, None, prompt)


def test_top_p_alone_keeps_at_most_1024_ids():
    """Whole vocabularies of ids would be gigabytes. Top-p is taken among the kept ones, and they are all there is."""
    logits = torch.randn(2, 3, 5000, generator=seeded(0))
    kept = agrpo.truncate(logits, MASK, 1.0, top_p=0.999)
    assert kept.equal(agrpo.truncate(logits, MASK, 1.0, top_k=1024, top_p=0.999)) and kept.shape == (2, 3, 1024)
    assert_close(agrpo.policy_logps(logits, MASK, 1.0, kept).exp().sum(-1), torch.ones(2, 3), atol=1e-4)


# ===== 3. Timesteps: weights that are right on average, strata that are hit once ======================================


def every_draw(proposal: Tensor, num_steps: Tensor, k: int, at: float = 0.5):
    """Each row with each of its timestep draws, M in all; and a context in which M rows draw just that.

    A row draws at the points j + x, x uniform. It draws step t with probability min(1, c p_t), where c, found by
    bisection, makes them add up to k. On each of the M pieces of x between the edges no point changes its step, so the
    mean over x is a finite sum. Returns rows (M,), the probability of the draw (M,), context. at: where in the piece.
    """
    cut = []
    for p in (p[:length].double() for p, length in zip(proposal, num_steps)):
        low, high = 0.0, k / float(p.min())
        for _ in range(100):
            c = (low + high) / 2
            low, high = (c, high) if (c * p).clamp(max=1).sum() < k else (low, c)
        edges = ((high * p).clamp(max=1).cumsum(0) % 1).tolist()
        cut.append(list(itertools.pairwise(sorted({0.0, 1.0} | {x for x in edges if 1e-12 < x < 1 - 1e-12}))))
    rows = torch.tensor([row for row, pieces in enumerate(cut) for _ in pieces])
    low, high = torch.tensor([x for pieces in cut for x in pieces], dtype=torch.float64).T
    return rows, high - low, mock.patch.object(torch, "rand", lambda *_, **__: (low + at * (high - low))[:, None])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("uniform", [True, False])
def test_timestep_weights_are_unbiased(uniform, k):
    """Each step's weight is 1 on average, exactly, so that sum_j w_j f(t_j) is sum_t f(t) on average, for any f."""
    num_steps = torch.tensor([5, 3, 1])
    taken = (torch.arange(5) < num_steps[:, None]).double()
    scores = torch.tensor([[3.0, 0.02, 1.0, 0.5, 2.2], [0.7, 2.0, 0.01, 9.0, 9.0], [0.4, 9.0, 9.0, 9.0, 9.0]])
    for at in (0.01, 0.99):  # a draw is constant on a piece
        rows, share, context = every_draw(taken if uniform else scores, num_steps, k, at)
        with context:  # what a proposal says of steps that a row did not take does not matter
            steps, weights = draw_timesteps(num_steps[rows], k, None if uniform else scores[rows])
        weight, times = (torch.zeros(len(rows), 5).double().scatter_add(1, steps, x) for x in (weights, weights.sign()))
        assert times.max() == 1  # no step twice: each costs a pass
        covered = num_steps[rows] <= k
        assert_close(torch.zeros_like(taken).index_add(0, rows, share[:, None] * weight), taken)
        assert weight[covered].equal(taken[rows][covered])  # at most k steps: each once with weight 1, in every draw


@pytest.mark.parametrize("k", [1, 2, 5])
def test_strata_are_hit_exactly_once(k, rows=6):
    """Each row has one point in each unit of its k, at equal distances; rows and seeds differ."""
    draws = [draw_timesteps(torch.full((rows,), 7 * k), k, generator=seeded(seed)) for seed in range(50)]
    for steps, weights in draws:
        assert (steps // 7 == torch.arange(k)).all() and (weights == 7).all()
        assert (steps - steps[:, :1] == 7 * torch.arange(k)).all()
    assert len({tuple(steps[:, 0].tolist()) for steps, _ in draws}) == 50 > len({int(s[0, 0]) for s, _ in draws}) == 7


# ===== 4. The likelihood: exact for a trajectory, a bound for a text ==================================================


def proposal_of(rollout: Rollout, kind: str) -> Tensor:
    scores = {"uniform": 0 * rollout.entropy, "entropy": rollout.entropy, "surprise": agrpo.surprise(rollout)}
    return agrpo.defensive_proposal(scores[kind], rollout.num_steps)


def estimates(e: SimpleNamespace, k: int, kind: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, over all timestep draws, of `estimate_logp` for each trajectory; differentiable."""
    proposal, none = proposal_of(e.rollout, kind), torch.zeros_like(e.probability)
    rows, share, context = every_draw(proposal, e.rollout.num_steps, k)
    with context:
        estimate = agrpo.estimate_logp(e.model, select(e.rollout, rows), k, proposal=proposal[rows], **e.policy)
    mean = none.index_add(0, rows, share * estimate)
    return mean, none.index_add(0, rows, share * (estimate - mean[rows]).detach() ** 2).sqrt()


@pytest.mark.parametrize("name", TESTED)
def test_estimate_is_unbiased_and_exact_once_k_covers_all_steps(name):
    """Its mean over all timestep draws is the trajectory's log-likelihood; with k >= T each draw is. So its gradient.

    With random unmasking that is the gradient of the whole trajectory's: the order carries no parameters.
    """
    e = enumerate_trajectories(name)
    whole = e.logp.sum(1) if "low" in name else e.log_probability
    for kind, k in [("entropy", 1), ("surprise", 2), ("uniform", e.sampling["steps"] + 3)]:
        mean, deviation = estimates(e, k, kind)
        assert_close(mean, e.logp.sum(1))
        assert_close(gradient_of(mean @ e.rewards, e.model), gradient_of(whole @ e.rewards, e.model))
        assert (deviation[e.rollout.num_steps <= k] < 1e-7).all()


def text_likelihoods() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every text (M, C); and from the 3! trajectories that lead to it: log p(text), its ELBO, mean `estimate_logp`."""
    e = enumerate_trajectories("plain")
    texts, text = e.rollout.completion.unique(dim=0, return_inverse=True)
    total = lambda x: torch.zeros(len(texts)).double().index_add(0, text, x.detach())
    return texts, total(e.probability).log(), total(e.logp.sum(1)) / 6, total(estimates(e, 1, "entropy")[0]) / 6


def test_mean_over_orders_is_the_elbo_a_lower_bound():
    """The mean over orders is the any-order ELBO, below log p(text | prompt); one trajectory's likelihood is exact."""
    _, marginal, elbo, estimate = text_likelihoods()
    assert_close(estimate, elbo)
    assert (elbo < marginal).all() and float(marginal.exp() @ (marginal - elbo)) > 0.01


# ===== 5. The gradient: what is unbiased, and for what; and what is not, and by how much ==============================


def policy_gradient_of(e: SimpleNamespace, length: Tensor | None = None) -> Tensor:
    """grad E[(r - mean r) / length], length T if not given, by autograd through the enumeration."""
    value = (e.rewards - e.probability @ e.rewards) / (e.sampling["steps"] if length is None else length)
    return gradient_of(e.log_probability.exp() @ value, e.model)


def advantage_mass(e: SimpleNamespace, group_size: int = 2, scale_by_std: bool = False) -> Tensor:
    """(N,) probability x advantage of a trajectory, added up over all N^G groups that it may be in, and over G.

    The update is linear in the advantages, so one call with these is the mean over all groups.
    """
    groups = torch.cartesian_prod(*[torch.arange(len(e.probability))] * group_size)  # (N^G, G)
    advantage = group_advantages(e.rewards[groups].flatten(), group_size, scale_by_std).view(-1, group_size)
    mass = e.probability[groups].prod(1, keepdim=True) * advantage / group_size
    return torch.zeros_like(e.probability).index_add(0, groups.flatten(), mass.flatten())


def mean_update(e: SimpleNamespace, k: int, kind: str = "uniform", mass=None, rollout=None, **options) -> Tensor:
    """The mean of `policy_gradient` over all trajectories, groups and timestep draws: one real call on all of them, in
    which each step that may be drawn is, with its mean weight over all real draws: the update is linear in the weights.
    """
    rollout, mass = rollout or e.rollout, advantage_mass(e) if mass is None else mass

    def mean_draw(num_steps, k, proposal, generator):
        rows, share, context = every_draw(proposal, num_steps, k)
        with context:
            steps, weights = draw_timesteps(num_steps[rows], k, proposal[rows])
        mean = torch.zeros(int(num_steps)).double().index_add(0, steps.flatten(), (share[:, None] * weights).flatten())
        return torch.arange(int(num_steps))[None], mean[None]

    options = {"on_policy": True, "length_norm": "constant", "micro_batch": 4096} | e.policy | options
    with mock.patch.object(agrpo, "draw_timesteps", mean_draw):  # the call divides by its rows
        return update_of(e.model, rollout, mass * len(mass), k=k, proposal=proposal_of(rollout, kind), **options)


@pytest.mark.parametrize("name", [name for name in TESTED if "low" not in name] + ["llama"])
def test_mean_update_is_the_policy_gradient(name):
    """Its mean over all trajectories, groups and timestep draws is (1 - 1/G) grad E[reward] / T, exactly.

    1/T is the objective's mean over steps. 1 - 1/G comes from the baseline, the group's mean, of which each row's own
    reward is one part in G. Off policy the ratio is to the recorded probabilities: 1, if temperature and truncation are
    the sampler's. length_norm "sequence" is the same where no row ends early. Else it is unbiased for GRPO's surrogate,
    grad E[(r - mean r) / T_i]: a good row counts for more the shorter it is, a bad one for less the longer it is.
    """
    e = enumerate_trajectories("blocks, top-p", "llama") if name == "llama" else enumerate_trajectories(name)
    G, tolerance = 3 if name == "two tokens" else 2, 1e-6 if name == "llama" else 1e-10  # its norms round to float32
    mass = advantage_mass(e, G)
    cases = [("uniform", 1, True), ("entropy", 1, False), ("surprise", 2, False), ("surprise", 3, True)]
    for kind, k, on_policy in cases:
        update = mean_update(e, k, kind, mass, on_policy=on_policy)
        assert_close(update, (1 - 1 / G) * policy_gradient_of(e), atol=tolerance)
    update = mean_update(e, 1, "entropy", mass, length_norm="sequence")
    assert_close(update, (1 - 1 / G) * policy_gradient_of(e, e.rollout.num_steps), atol=tolerance)


def test_nothing_is_wasted():
    """Rows without advantage and repeated steps cost no pass, equal states share one; the head sees one token each."""
    e = enumerate_trajectories("blocks")
    learning = torch.arange(len(e.probability)) % 3 > 0
    for k in (0, 1, 3, 4):
        with passes_seen(e.model) as seen:
            options = {"k": k or 4, "on_policy": True, "micro_batch": 2000} | e.policy
            update_of(e.model, e.rollout, learning * min(k, 1.0), **options)
        assert seen["positions"] == min(k * int(learning.sum()), int(e.rollout.num_steps[learning].sum()))
    assert seen["sequences"] == len(e.state[learning][e.rollout.step[learning] >= 0].unique()) < seen["positions"]
    # Without them it is the same update, their proposals included.
    A, proposal, options = learning.double(), proposal_of(e.rollout, "surprise"), {"k": 1, "on_policy": True} | e.policy
    whole = update_of(e.model, e.rollout, A, proposal=proposal, generator=seeded(0), **options)
    part, A, proposal = select(e.rollout, learning), A[learning], proposal[learning]
    part = update_of(e.model, part, A, proposal=proposal, generator=seeded(0), **options)
    assert_close(whole, part * learning.double().mean())


def test_passes_go_where_there_is_most_to_learn():
    """Rows of large advantage get all of their steps, the others few; within a row the proposal decides."""
    e, rows, steps = enumerate_trajectories("blocks, no EOS"), [], []
    A = torch.where(torch.arange(len(e.probability)) < 10, 1.0, 1e-4).double()
    spy = lambda model, rollout, r, t, **more: (
        rows.append(r) or steps.append(t) or step_logps(model, rollout, r, t, **more)
    )
    proposal = torch.tensor([[1.0, 1e-3, 1, 1]]).expand(len(A), 4)
    with mock.patch.object(agrpo, "step_logps", spy):
        update_of(e.model, e.rollout, A, k=1, on_policy=True, proposal=proposal, **e.policy)
    rows, steps = torch.cat(rows), torch.cat(steps)
    assert len(rows) == len(A) and (rows < 10).sum() >= 30 and (steps[rows >= 10] == 1).sum() <= 2
    assert torch.bincount(steps[rows >= 10], minlength=4)[[0, 2, 3]].min() > len(A) / 5
    rows, steps, _ = agrpo.draw_pairs(torch.full((64,), 16), torch.ones(64), 1, generator=seeded(0))
    assert rows.tolist() == list(range(64)) and len({*steps.tolist()}) > 8  # equal rows do not all draw the same step


@lru_cache
def bias_table(seeds: int = 8) -> dict[str, Tensor]:
    """The mean update of each estimator beside (1 - 1/G) grad E[reward] / T, for 8 random mask predictors.

    (seeds, 3): cosine of the two; norm, relative to the exact one; relative error. Resampled masks: as if a text had
    been written in every order equally often. One step: all tokens from nothing but masks, the prompt left as it is.
    """
    table = defaultdict(list)
    for seed in range(seeds):
        plain, blocks, sure = (enumerate_trajectories(n, seed=seed) for n in ("plain", "blocks", "low confidence"))
        mass = advantage_mass(plain)
        same = (plain.rollout.completion[:, None] == plain.rollout.completion).all(2).double()  # (N, N), same text
        one_step = agrpo.one_step_view(plain.model, plain.rollout, **plain.policy)
        one_step.prompt = plain.rollout.prompt
        for name, e, update in [
            ("AGRPO, k=1, uniform", plain, mean_update(plain, 1, "uniform", mass)),
            ("AGRPO, k=1, entropy", plain, mean_update(plain, 1, "entropy", mass)),
            ("AGRPO, k=2, surprise", plain, mean_update(plain, 2, "surprise", mass)),
            ("AGRPO, rows end early, constant", blocks, mean_update(blocks, 1)),
            ("  rows end early, sequence", blocks, mean_update(blocks, 1, length_norm="sequence")),
            ("  advantage / std of the group", plain, mean_update(plain, 1, mass=advantage_mass(plain, 2, True))),
            ("  low-confidence unmasking", sure, mean_update(sure, 1)),
            ("  resampled masks (ELBO)", plain, mean_update(plain, 1, mass=same @ mass / same.sum(1))),
            ("  one step (diffu-GRPO)", plain, mean_update(plain, 1, mass=mass, rollout=one_step)),
        ]:
            exact = (1 - 1 / 2) * policy_gradient_of(e)
            error, norm = ((x.norm() / exact.norm()).item() for x in (update - exact, update))
            table[name].append([torch.cosine_similarity(update, exact, 0).item(), norm, error])
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in table.items()}


def test_what_is_biased():
    """The other estimators miss the policy gradient, and not by a factor: their mean points elsewhere.

    std: groups that hardly differ count as much as those that do. Low confidence: the positions depend on the
    parameters, which the sum of log-probabilities leaves out. Resampled masks: given its text, a trajectory's order is
    not uniform, unless the predictor is consistent. One step: the states looked at were never visited.
    """
    for name, rows in bias_table().items():
        if name.startswith("AGRPO"):
            assert_close(rows, torch.tensor([[1.0, 1.0, 0.0]] * 8).double())
        else:
            most = 0.998 if "low-confidence" in name else 0.92 if "one step" in name else 0.993
            assert rows[:, 0].median() < most and rows[:, 2].median() > 0.05, (name, rows)


# ===== 6. The objective, on and off the policy that sampled ===========================================================


def test_advantages_and_proposals_by_hand():
    """Reward minus the group's mean, 0 in a group of equals. Defensive: a tenth is uniform over the steps taken."""
    rewards, expected = torch.tensor([1.0, 0.0, 0.0, 0.1, 0.1, 0.1]), torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    for scale_by_std, scale in [(False, 1.0), (True, math.sqrt(1 / 3) + 1e-4)]:
        advantage = group_advantages(rewards, 3, scale_by_std)
        torch.testing.assert_close(advantage * scale, expected)
        assert not advantage[3:].any()
    torch.testing.assert_close(group_advantages([1, 0, 0], 3), expected[:3])  # a list, of whole numbers, too
    assert not group_advantages(torch.full((7,), 0.7), 7).any()  # although their mean rounds to another number
    proposal = agrpo.defensive_proposal(torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]]), torch.tensor([3, 2]))
    assert_close(proposal, torch.tensor([[49, 4, 139], [4, 4, 0]]).double() / 200, atol=1e-7)
    assert_close(
        agrpo.defensive_proposal(torch.zeros(1, 4), torch.tensor([2])), torch.tensor([[1, 1, 0, 0]]).double() / 2
    )
    e = enumerate_trajectories("blocks, top-p")  # surprise: 1 - p of the tokens of each step
    doubt = [((1 - e.logp.detach().exp()) * (e.rollout.step == t)).sum(1) for t in range(4)]
    assert_close(agrpo.surprise(e.rollout), torch.stack(doubt, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_is_one_on_the_first_update(dtype):
    """On the policy that sampled the ratio is exactly 1 and nothing is clipped, however the sampler rounded."""
    model, sampling = mask_predictor().to(dtype), SETTINGS["blocks, top-p"]
    rollout = write(model, torch.tensor([PROMPT] * 32), **sampling)
    rollout = replace(rollout, logp=rollout.logp + 0.5 * (rollout.step >= 0))  # rounding, exaggerated
    policy = {"mask_id": MASK, "temperature": sampling["temperature"]}
    run = partial(agrpo.policy_gradient, model, rollout, torch.linspace(-1, 1, 32), k=2, **policy)
    first, later = run(on_policy=True), run(on_policy=False)
    assert (first["clip_ratio"], first["approx_kl"], first["kl"]) == (0, 0, 0)
    assert later["clip_ratio"] > 0.1 and abs(later["approx_kl"] - (math.exp(-0.5) - 1 + 0.5)) < 0.02
    logp, _ = step_logps(model, rollout, torch.arange(32), 0 * torch.arange(32), **policy)
    assert rollout.logp.dtype == rollout.entropy.dtype == logp.dtype == torch.float32  # bfloat16 would be too coarse


@pytest.mark.parametrize("length_norm", ["sequence", "constant"])
@pytest.mark.parametrize("name", ["blocks", "top-k, top-p", "two a step"])
def test_update_is_the_gradient_of_the_objective_as_written(name, length_norm):
    """Under another model than sampled, with clipping and KL: dJ / d theta, J written token by token; k covers all."""
    e, model, reference = enumerate_trajectories(name), mask_predictor(seed=3), mask_predictor(seed=4)
    A = torch.randn(len(e.probability), 1, generator=seeded(0)).double()
    A[::3] = 0  # the KL counts there too
    logp, taken = e.logp_under(model), e.rollout.step >= 0
    rho, d = (logp - e.rollout.logp).exp(), e.logp_under(reference).detach() - logp
    gain = torch.where(A > 0, rho.clamp(max=1.3), rho.clamp(min=0.9)) * A
    kl = rho * (d.exp() - d - 1)
    length = e.rollout.num_steps if length_norm == "sequence" else e.sampling["steps"]
    J = (((gain - 0.3 * kl) * taken).sum(1) / length).mean()
    options = {"eps_low": 0.1, "eps_high": 0.3, "beta": 0.3, "ref_model": reference, "length_norm": length_norm}
    options |= {"k": e.sampling["steps"] + 1, "on_policy": False} | e.policy
    assert_close(update_of(model, e.rollout, A[:, 0], micro_batch=10, **options), gradient_of(J, model))
    figures = agrpo.policy_gradient(model, e.rollout, A[:, 0], micro_batch=1000, **options)
    clipped = ((A > 0) & (rho > 1.3) | (A < 0) & (rho < 0.9)).double()
    means = {"clip_ratio": clipped, "approx_kl": rho - 1 - rho.log(), "kl": kl}
    expected = {"loss": -J} | {name: value[taken].mean() for name, value in means.items()}
    assert figures == {name: pytest.approx(value.item(), 1e-9) for name, value in expected.items()}


@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_has_the_gradient_of_the_exact_kl_of_each_step(on_policy):
    """Its mean over trajectories is KL(policy || reference) of each step at the states visited, in value and gradient.

    How the parameters change which states are visited is left out: so its gradient is not quite that of the KL between
    the two distributions of trajectories, though its value is that KL. rho makes it hold off policy too.
    """
    e = enumerate_trajectories("two tokens")
    model, reference = e.model if on_policy else mask_predictor(seed=3), mask_predictor(seed=4)
    logp, ref_logp = (policy_table(m, e.sampling, e.keep)[0] for m in (model, reference))
    kl = (logp.exp() * (logp - ref_logp)).masked_fill(~e.keep, 0).sum(-1)  # (S, C)
    exact = e.probability @ kl[e.state, torch.arange(2)].sum(1)
    ref_logp = e.logp_under(reference).detach()
    penalty = kl_penalty(e.logp_under(model), e.rollout.logp, ref_logp)
    mean = e.probability @ penalty.sum(1)
    assert (penalty >= 0).all()
    assert_close(mean, exact)
    assert_close(gradient_of(mean, model), gradient_of(exact, model))
    if on_policy:
        of_trajectories = e.log_probability.exp() @ (e.logp - ref_logp).sum(1)
        assert_close(of_trajectories, exact)
        assert torch.cosine_similarity(gradient_of(of_trajectories, model), gradient_of(exact, model), 0) < 0.999


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


# ===== 7. Variance: what the strata and the proposal buy; and the story as tables =====================================


def plain_draw(stratified: bool, k: int, proposal: Tensor, _, rng: torch.Generator) -> Tensor:
    """Importance sampling at independent points; or one in each of rows x k strata, dealt out at random (official)."""
    p = proposal / proposal.sum(1, keepdim=True)
    n = len(p) * k
    stratum = torch.randperm(n, generator=rng) if stratified else torch.randint(n, (n,), generator=rng)
    points = ((stratum + torch.rand(n, generator=rng, dtype=torch.float64)) / n).view(-1, k)
    steps = torch.searchsorted(p.cumsum(1), points, right=True).clamp(max=p.shape[1] - 1)
    return torch.zeros_like(p).scatter_add(1, steps, 1 / (k * p.gather(1, steps)))


def systematic_draw(whole: bool, k: int, proposal: Tensor, advantage: Tensor, rng: torch.Generator) -> Tensor:
    """Our draws: k in each row; or, as in `policy_gradient`, from all rows as if they were one, times |A|."""
    lengths, drawn = torch.full((len(proposal),), proposal.shape[1]), torch.zeros_like(proposal)
    if whole:
        rows, steps, weights = agrpo.draw_pairs(lengths, advantage.abs(), k, proposal, rng)
        return drawn.index_put((rows, steps), weights)
    return drawn.scatter_add(1, *draw_timesteps(lengths, k, proposal, rng))


SCHEMES = {"iid": partial(plain_draw, False), "batch": partial(plain_draw, True)}
SCHEMES |= {"row": partial(systematic_draw, False), "whole": partial(systematic_draw, True)}
KINDS = ("uniform", "entropy", "surprise")


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
    """E |estimate - full gradient|^2 / |full gradient|^2 over timestep draws, rollouts given: by (proposal, scheme, k).

    Every estimate is a weighted sum of the same gradients, one for each (row, step): these are taken once.
    """
    model, rng, policy = refrains(), seeded(0), {"mask_id": 4, "temperature": 1.0}
    sampling = PLAIN | {"completion_length": C, "block_length": C, "steps": C, "eos_id": None} | policy
    variance, size = Counter(), 0.0
    for seed in range(rollouts):
        rollout = write(model, torch.zeros(rows, 1).long(), seed, **sampling)
        advantage = group_advantages((rollout.completion[:, 4:] == rollout.completion[:, :-4]).double().mean(1), 16)
        gradients = []
        for row, step in itertools.product(range(rows), range(C)):
            logp, _ = step_logps(model, rollout, torch.tensor([row]), torch.tensor([step]), **policy)
            gradients.append(gradient_of(logp.sum() * advantage[row], model))
        product = torch.stack(gradients) @ torch.stack(gradients).T  # (rows x T, rows x T)
        size += float(product.sum())
        for kind, scheme, k in itertools.product(KINDS, SCHEMES, (1, 2, 4, 8)):
            draw = partial(SCHEMES[scheme], k, proposal_of(rollout, kind), advantage, rng)
            error = torch.stack([(draw() - 1).flatten() for _ in range(draws)])  # of the weights
            variance[kind, scheme, k] += float((error @ product * error).sum(1).mean())
    return {key: value / size for key, value in variance.items()}


def test_strata_and_proposal_reduce_the_variance():
    """Strata of each row do what strata of the batch do not; a proposal helps, surprise most; so do k, and drawing more
    where the advantage is large. At k = T/2 all of it leaves a fiftieth of what independent uniform timesteps have."""
    table = variance_table()
    for kind, (k, most) in itertools.product(KINDS, ((4, 0.95), (8, 0.7))):
        assert table[kind, "row", k] < most * min(table[kind, "iid", k], table[kind, "batch", k])
    for kind, scheme, k in itertools.product(KINDS, SCHEMES, (1, 2, 4)):
        assert table[kind, scheme, 2 * k] < 0.7 * table[kind, scheme, k]
    for k in (1, 2, 4, 8):
        assert table["surprise", "row", k] < 0.85 * table["entropy", "row", k] < 0.85 * table["uniform", "row", k]
        assert table["surprise", "whole", k] < 0.7 * table["surprise", "row", k]
    assert table["surprise", "whole", 8] < table["uniform", "iid", 8] / 50


@lru_cache
def passes_table(seed: int = 2, T: int = 4) -> dict[str, tuple[float, float]]:
    """(Squared bias, variance times passes) of one completion's estimate of grad E[reward], over the squared gradient.

    The mean of completions that cost P passes in all has the error bias + variance / P. The advantage is r - E[r]. An
    estimator whose mean points elsewhere is first scaled to come as near as it can. Random masks: L of the T tokens are
    masked, L uniform, and scored in one pass, times T / L: the usual estimate of the ELBO.
    """
    e = enumerate_trajectories("four tokens", seed=seed)
    table, number = policy_table(e.model, e.sampling)[0], list(itertools.product(WORDS, repeat=T))
    score = lru_cache(None)(lambda state, i, token: gradient_of(table[state, i, token], e.model))
    texts, A = keys(e.rollout.completion), e.rewards - e.probability @ e.rewards
    of_step = lambda n, t: next(i for i in range(T) if e.rollout.step[n, i] == t)
    scores = [
        [score(int(e.state[n, i]), i, o[i]) for i in (of_step(n, t) for t in range(T))] for n, o in enumerate(texts)
    ]
    scores = torch.stack([torch.stack(row) for row in scores])  # (N, T, parameters)
    exact, found = (e.probability * A) @ scores.sum(1), {}

    def error(name: str, passes: int, share: Tensor, estimate: Tensor):
        mean = share @ estimate
        scale = mean @ exact / (mean @ mean)
        variance = share @ (estimate**2).sum(1) - mean @ mean
        found[name] = tuple(
            (x / (exact @ exact)).item() for x in (((scale * mean - exact) ** 2).sum(), passes * scale**2 * variance)
        )

    for k in (1, 2, 4):
        rows, share, context = every_draw(proposal_of(e.rollout, "surprise"), e.rollout.num_steps, k)
        with context:
            steps, weights = draw_timesteps(e.rollout.num_steps[rows], k, proposal_of(e.rollout, "surprise")[rows])
        weights = torch.zeros(len(rows), T).double().scatter_add(1, steps, weights)
        estimate = A[rows, None] * torch.einsum("nt,ntp->np", weights, scores[rows])
        error(f"AGRPO, k = {k}" + " = T" * (k == T), k, share * e.probability[rows], estimate)
    hidden = [m for m in itertools.product((0, 1), repeat=T) if any(m)]
    under = lambda o, m: sum(
        score(number.index(tuple(MASK if b else w for b, w in zip(m, o))), i, o[i]) for i in range(T) if m[i]
    )
    for name, masks in ("random masks (ELBO)", hidden), ("one step (diffu-GRPO)", [(1,) * T]):
        odds = torch.tensor([1 / (T * math.comb(T, sum(m))) if len(masks) > 1 else 1.0 for m in masks]).double()
        cache = {(o, m): under(o, m) * T / sum(m) for o in set(texts) for m in masks}
        estimate = torch.stack([A[n] * cache[o, m] for n, o in enumerate(texts) for m in masks])
        error(name, 1, (e.probability[:, None] * odds).flatten(), estimate)
    return found


def test_bias_is_what_passes_cannot_buy_off():
    """AGRPO's error falls to nothing with the passes; that of one step, or of random masks, stays."""
    table = passes_table()
    for name, (bias, variance) in table.items():
        assert variance > 0 and (bias < 1e-20 if "AGRPO" in name else bias > 0.005), (name, bias)
    assert table["one step (diffu-GRPO)"][1] < table["AGRPO, k = 1"][1]


def print_tables():
    spell = lambda text: " ".join("xy."[token] for token in text)
    print("1. Likelihood of a text (nats; '.' is EOS). Averaged over all orders the estimate is the ELBO: a bound\n")
    print("   text      log p exact    ELBO exact   mean estimate       gap")
    texts, marginal, elbo, estimate = text_likelihoods()
    for n in marginal.argsort(descending=True)[[0, 1, 2, 3, -2, -1]]:
        gap = marginal[n] - elbo[n]
        print(f"   {spell(texts[n])}   {marginal[n]:14.8f}{elbo[n]:14.8f}{estimate[n]:16.8f}{gap:10.4f}")
    print(f"   mean gap over texts: {marginal.exp() @ (marginal - elbo):.4f}")

    print("\n2. Likelihood of a trajectory (nats). Estimate from k of its 3 steps: mean over draws +- deviation\n")
    print(f"   text   unmasked at  {'exact':>10s}" + "".join(f"{f'k = {k}':>24s}" for k in (1, 2, 3)))
    e = enumerate_trajectories("plain")
    by_k = [estimates(e, k, "surprise") for k in (1, 2, 3)]
    for row in e.probability.argsort(descending=True)[:5]:
        text, at = spell(e.rollout.completion[row]), " ".join(map(str, e.rollout.step[row].tolist()))
        cells = "".join(f"{mean[row]:14.8f} +-{deviation[row]:7.4f}" for mean, deviation in by_k)
        print(f"   {text}  {at}     {e.logp[row].sum():14.8f}{cells}")

    print("\n3. Mean update over all trajectories, groups and draws, beside (1 - 1/G) grad E[reward] / T; 8 models\n")
    print(f"   {'median of the 8':32s}   cosine  (lowest)   |mean| / |exact|   relative error")
    for name, rows in bias_table().items():
        along, norm, error = rows.median(0).values.tolist()
        print(f"   {name:32s}{along:9.4f}{rows[:, 0].min():10.4f}{norm:19.4f}{error:17.1e}")

    print("\n4. Error of the mean of completions that cost P passes: bias + variance / P, over |gradient|^2; T = 4\n")
    print(f"   {'':28s}{'bias':>10s}{'variance':>10s}" + "".join(f"{f'P = {P}':>10s}" for P in (10, 100, 1000, 10000)))
    for name, (bias, variance) in passes_table().items():
        errors = "".join(f"{bias + variance / P:10.3f}" for P in (10, 100, 1000, 10000))
        print(f"   {name:28s}{bias:10.3f}{variance:10.1f}{errors}")

    print("\n5. Variance of the gradient estimate over draws / |gradient|^2: 32 completions, T = 16\n")
    points = {"iid": "independent", "batch": "strata of the batch", "row": "systematic in each row"}
    points |= {"whole": "systematic in the batch, times |A| (ours)"}
    print(f"   {'proposal':12s}{'points':42s}" + "".join(f"{f'k = {k}':>9s}" for k in (1, 2, 4, 8)))
    for kind, scheme in itertools.product(KINDS, SCHEMES):
        figures = "".join(f"{variance_table()[kind, scheme, k]:9.3f}" for k in (1, 2, 4, 8))
        print(f"   {kind:12s}{points[scheme]:42s}{figures}")


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


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def figures(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine's speed."""
    return [{n: value for n, value in row.items() if "seconds" not in n} for row in rows_of(folder / "metrics.jsonl")]


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
    names = "update loss reward reward_std frac_reward_zero_std accuracy completion_length entropy approx_kl kl "
    assert all({*words(names, "learning_rate")} <= line.keys() for line in lines) and len(lines) == 4
    assert all(0 < line["reward"] < 1 and line["grad_norm"] > 0 and line["clip_ratio"] == 0 for line in lines)
    rates = [7e-4 * (u + 1) / 20 * (1 + math.cos(math.pi * u / 4)) / 2 for u in range(4)]  # warm-up, cosine
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    for stage, sampler in itertools.product(("base", "AGRPO"), ("as trained", "greedy")):
        assert results[stage][sampler].keys() == {"4"} and 0 <= results[stage][sampler]["4"] <= 1
    assert [path.name for path in agrpo.checkpoints(short_run)] == ["checkpoint-2", "checkpoint-4"]
    printed, pretrained = (short_run.parent / "printed.txt").read_text(), short_run / "base"
    assert re.search(
        r"greedy.* 4\n +base +0\.\d{3}\n +AGRPO +0\.\d{3}\n\n  Greedy, AGRPO in 4 steps: 0\.\d{3}", printed
    )
    assert (
        len(re.findall(r"^ +[1-4.]( [1-4.]){3}   . . . .$", printed, re.MULTILINE)) >= 4
    )  # a random model may write anything
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
    assert all(line["approx_kl"] > 0 for line in lines)  # the second update of a rollout is off policy
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
    "eval": "required: CHECKPOINT", "eval nowhere": "no such file", "eval tiny": "no weights yet",
    "eval B --steps 17": "17 steps", "eval B --steps few": "invalid int", "eval B --base nowhere": "no such file",
    "eval B --seeds 0 1": "--temperature above 0", "eval B --samples 4": "--temperature above 0",
    "eval B --task gsm8k": "know no gsm8k", "eval B --device abacus": "abacus", "eval B --no_such 1": "no_such",
    "eval B --data nowhere": "no such file", "eval B --save old": "is there", "eval B --save no/such": "no such folder",
    "eval B --completion_length 256 --block_length 256 --steps 1": "128 positions",
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
    graded = {
        right: 4,
        right.replace("* 3", "* 4"): 1,
        "<answer>(1 + 2) * 3</answer>": 3.5,
        "(1 + 2) * 3": 3,
        "(1 + 2) * 3</answer>": 0,
    }
    graded |= {right + "<answer>9</answer>": 0.5, "</answer>(1 + 2) * 3<answer>": 0, "<answer>" * 99 + right[22:]: 0}
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
    pretraining = {
        example["solution"] for example in task.create("pretrain", 5)
    }  # 528 Latin squares, 240 of them grids
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
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ enable_thinking }}"
    )
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
        assert not torch.allclose(
            found[:, pad], causal(input_ids=IDS).logits[:, pad], atol=1e-3
        )  # it sees what follows
    agrpo.save_model(model, tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == raw
    assert torch.equal(agrpo.load_model(str(tmp_path / "saved"))[0](IDS).logits, model(IDS).logits)
    for split, answer in ("train", 5), ("test", 6):
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
    "missing weights.*layers.2": {"n_layers": 3}, "unexpected weights.*(layers|blocks).1": {"n_layers": 1},
    "gpt2": {"model_type": "gpt2"}, "billion.*for a CPU": {"d_model": 4096, "n_layers": 32, "mlp_hidden_size": 12288},
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
        assert figure["length"] == mean([r["length"] for r in mine])
        assert figure["95% interval"] == pytest.approx(curve.wilson(figure["accuracy"], 24))
        if repeats == 1:
            assert figure["accuracy"] == training[stage]["as trained" if how else "greedy"][str(steps)]
            continue
        groups = [[r for r in mine if (r["seed"], r["example"]) == key] for key in itertools.product((0, 1), range(24))]
        votes = [Counter((r["answer"], r["correct"]) for r in group if r["answer"]).most_common(1) for group in groups]
        assert figure["majority@3"] == mean([bool(vote) and vote[0][0][1] for vote in votes])
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
    said = lambda *answers: [{"answer": answer, "correct": answer in ("1,234", "$1234", "(1+2)")} for answer in answers]
    assert curve.vote(said("7", "1,234", "$1234"), "gsm8k") and not curve.vote(said("7", "1,234", "$1234"), "countdown")
    assert curve.vote(said(None, None, "(1+2)"), "countdown") and not curve.vote(said(None, None), "countdown")
    assert curve.vote(said("1,234", "8"), "gsm8k") and not curve.vote(said("8", "1,234"), "gsm8k")


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
    print_tables()
