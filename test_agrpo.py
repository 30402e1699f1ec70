"""What AGRPO claims, against exact values: the appendix that the paper does not have.

    pytest test_agrpo.py        every claim, asserted
    python test_agrpo.py        the same story as tables, in half a minute
    python test_agrpo.py --learning 3 4 5        what k and the timesteps do to learning (three hours)

The mask predictor here knows four words (one is EOS, one the mask) and writes two to four of them, in float64: so few
that every trajectory (the order in which positions are filled in, and the tokens) can be enumerated. Whatever training
only samples is computed here, by code that shares nothing with the sampler, and compared to the last digits: the
likelihood, the expected reward, its gradient, the mean of an update over all trajectories, groups and timesteps.
"""

import itertools
import json
import math
import operator
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import agrpo
import eval as curve  # under its own name it would hide a builtin
from agrpo import Rollout, clipped_objective, draw_timesteps, group_advantages, kl_penalty, sample, step_logps

torch.set_num_threads(1)  # tensors this small lose more between threads than they gain

X, Y, EOS, MASK = WORDS = range(4)
PROMPT = (Y, X)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# ======================================================================================================================
# 1. A mask predictor small enough to enumerate, and the enumerator
# ======================================================================================================================


def mask_predictor(kind: str = "bert", seed: int = 2, vocab: int = len(WORDS), width: int = 8, spread: float = 0.8):
    """A random mask predictor whose predictions are far from uniform and depend on all that they may depend on."""
    shape = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape))
    elif kind == "llama":  # LLaDA is one
        model = LlamaForCausalLM(LlamaConfig(is_causal=False, num_key_value_heads=1, **shape))
    else:  # Dream is a Qwen2 whose logits are about the next position
        model = Qwen2ForCausalLM(Qwen2Config(is_causal=False, num_key_value_heads=1, logits_shift=1, **shape))
    rng = seeded(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(spread * noise if parameter.dim() == 2 else 0.2 * noise + norm)
    return model.double().eval()


PLAIN = {"completion_length": 3, "block_length": 3, "steps": 3, "temperature": 1.0, "unmasking": "random"}
PLAIN |= {"mask_id": MASK, "eos_id": EOS, "top_k": 0, "top_p": 1.0}
BLOCKS = PLAIN | {"completion_length": 4, "block_length": 2, "steps": 4}
SETTINGS = {
    "plain": PLAIN,
    "temperature": PLAIN | {"temperature": 0.6},
    "greedy": PLAIN | {"temperature": 0.0},
    "top-k": PLAIN | {"temperature": 0.7, "top_k": 2},
    "top-p": PLAIN | {"temperature": 1.2, "top_p": 0.8},
    "top-k, top-p": PLAIN | {"temperature": 1.5, "top_k": 2, "top_p": 0.7},
    "two a step": PLAIN | {"steps": 2},
    "blocks": BLOCKS,
    "blocks, two a step": BLOCKS | {"steps": 2, "temperature": 0.8},
    "blocks, top-p": BLOCKS | {"temperature": 1.3, "top_p": 0.9},
    "blocks, no EOS": BLOCKS | {"eos_id": None},
    "low confidence": PLAIN | {"unmasking": "low_confidence"},
    "low confidence, greedy": PLAIN | {"unmasking": "low_confidence", "temperature": 0.0},
    "low confidence, top-p": PLAIN | {"unmasking": "low_confidence", "temperature": 1.5, "top_p": 0.8, "steps": 2},
    "two tokens": PLAIN | {"completion_length": 2, "block_length": 2, "steps": 2, "temperature": 0.7, "top_k": 2},
}


def states_of(sampling: dict) -> list[tuple]:
    return list(itertools.product(WORDS, repeat=sampling["completion_length"]))


def policy_table(model, sampling: dict, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log p(token | prompt, state) under the policy, at every position of every state: (S, C, V), differentiable.

    One full forward pass, then the policy by its definition: temperature; never the mask; top-k: fewer than k tokens
    are more probable; top-p: the more probable ones make up less than top_p. Also the ids so kept, (S, C, V) bool; pass
    them to have another model's policy over the same choice.
    """
    input_ids = torch.tensor([PROMPT + state for state in states_of(sampling)])
    logits = model(input_ids=input_ids).logits[:, len(PROMPT) :] / (sampling["temperature"] or 1.0)
    if keep is None:
        keep = (torch.arange(len(WORDS)) != MASK).expand(logits.shape)
        better = (logits[..., None, :] > logits[..., :, None]) & keep[..., None, :]  # [..., a, b]: b beats a
        most = (sampling["top_k"] or len(WORDS)) if sampling["temperature"] else 1
        keep = keep & (better.sum(-1) < most)
        p = logits.masked_fill(~keep, -math.inf).softmax(-1)
        keep = keep & ((better * p[..., None, :]).sum(-1) < sampling["top_p"])
    return logits - logits.masked_fill(~keep, -math.inf).logsumexp(-1, keepdim=True), keep


def ways(unmasking: str, logp: Tensor, keep: Tensor, confidence: Tensor, masked: list[int], count: int):
    """All that one step can do in one state: pairs of what it fills in, {position: token}, and its log-probability."""
    options = [keep[i].nonzero().flatten().tolist() for i in range(len(keep))]
    if unmasking == "random":
        subsets = list(itertools.combinations(masked, count))
        for subset in subsets:
            for tokens in itertools.product(*(options[i] for i in subset)):
                filled = dict(zip(subset, tokens))
                yield filled, sum(logp[place] for place in filled.items()) - math.log(len(subsets))
        return
    outcomes = defaultdict(list)  # low confidence: a token for every masked position, of which the surest stay
    for tokens in itertools.product(*(options[i] for i in masked)):
        drawn = sorted(zip(masked, tokens), key=lambda place: -confidence[place])
        outcomes[tuple(sorted(drawn[:count]))].append(sum(logp[place] for place in drawn))
    for filled, several in outcomes.items():
        yield dict(filled), torch.stack(several).logsumexp(0)


@dataclass
class Enumeration:
    """Every trajectory of one setting, N of them: as a rollout that nobody sampled, and with its exact probability."""

    model: torch.nn.Module
    rollout: Rollout
    log_probability: Tensor  # (N,) of the whole trajectory, choice of positions included; differentiable
    logp: Tensor  # (N, C) of each token in the state it was filled into; differentiable
    state: Tensor  # (N, C) the number of that state
    keep: Tensor  # (S, C, V) bool, the ids to choose from in each state
    sampling: dict

    def __post_init__(self):
        self.probability, self.steps = self.log_probability.detach().exp(), self.sampling["steps"]
        self.policy = {"mask_id": MASK, "temperature": self.sampling["temperature"]}


@lru_cache
def enumerate_trajectories(name: str, kind: str = "bert", seed: int = 2) -> Enumeration:
    model, sampling = mask_predictor(kind, seed), SETTINGS[name]
    C, block, T, eos = (sampling[key] for key in ("completion_length", "block_length", "steps", "eos_id"))
    inside = T * block // C  # steps inside one block
    logp, keep = policy_table(model, sampling)
    confidence, _ = policy_table(model, sampling | {"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    number = {state: n for n, state in enumerate(states_of(sampling))}
    found = []

    def walk(t: int, history: dict, log_probability: Tensor):  # history: position -> (step, token, state before)
        start = t // inside * block
        last_block = {history[i][1] for i in range(start - block, start)} if t and t % inside == 0 else set()
        if t == T or last_block == {eos}:
            found.append((t, history, log_probability))
            return
        n = number[tuple(history[i][1] if i in history else MASK for i in range(C))]
        masked = [i for i in range(start, start + block) if i not in history]
        count = block // inside + (t % inside < block % inside)
        for filled, step_logp in ways(sampling["unmasking"], logp[n], keep[n], confidence[n], masked, count):
            now = {i: (t, token, n) for i, token in filled.items()}
            walk(t + 1, history | now, log_probability + step_logp)

    walk(0, {}, torch.zeros((), dtype=torch.float64))
    lengths, histories, log_probabilities = zip(*found)
    table = torch.tensor([[history.get(i, (-1, EOS, 0)) for i in range(C)] for history in histories])
    step, completion, state = table.unbind(-1)
    place = (state, torch.arange(C))
    token_logp = logp[(*place, completion)].masked_fill(step < 0, 0)
    entropy = -(logp.exp() * logp).masked_fill(~keep, 0).sum(-1)[place].masked_fill(step < 0, 0).detach()
    entropy = torch.zeros(len(found), T).double().scatter_add(1, step.clamp(min=0), entropy)
    cut = sampling["top_k"] or sampling["top_p"] < 1 or not sampling["temperature"]
    kept = torch.where(keep, torch.arange(len(WORDS)), -1)[place] if cut else None
    prompt, num_steps = torch.tensor([PROMPT] * len(found)), torch.tensor(lengths)
    rollout = Rollout(prompt, prompt > -1, completion, step, token_logp.detach(), entropy, num_steps, kept)
    return Enumeration(model, rollout, torch.stack(log_probabilities), token_logp, state, keep, sampling)


def select(rollout: Rollout, rows) -> Rollout:
    return Rollout(*(None if value is None else value[rows] for value in vars(rollout).values()))


def rewards_of(completion: Tensor) -> Tensor:
    """An arbitrary reward for every completion there is."""
    number = (completion * len(WORDS) ** torch.arange(completion.shape[1])).sum(1)
    return torch.rand(len(WORDS) ** 4, generator=seeded(0), dtype=torch.float64)[number]


def gradient_of(value: Tensor, model) -> Tensor:
    """d value / d theta by autograd, as one vector."""
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def update_of(model, *args, **options) -> Tensor:
    """What `policy_gradient` adds to .grad, as one vector, with the sign of an ascent."""
    model.zero_grad()
    agrpo.policy_gradient(model, *args, **options)
    return -torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def assert_same(x: Tensor, y: Tensor, tolerance: float = 1e-10):
    error, cos = float((x - y).norm()), cosine(x, y) if x.any() else 0
    assert error <= tolerance * float(y.norm()), f"error {error}, cosine {cos}, norms {x.norm()} and {y.norm()}"


# ======================================================================================================================
# 2. The sampler draws from the process that it says it draws from
# ======================================================================================================================


def write(model, prompt: Tensor, seed: int = 0, prompt_mask: Tensor | None = None, **sampling) -> Rollout:
    prompt_mask = torch.ones_like(prompt).bool() if prompt_mask is None else prompt_mask
    return sample(model, prompt, prompt_mask, generator=seeded(seed), **sampling)


def trajectory_keys(rollout: Rollout) -> list[tuple]:
    return [tuple(row) for row in torch.cat([rollout.completion, rollout.step], 1).tolist()]


@lru_cache
def sampled(name: str, rows: int = 20_000) -> tuple[Rollout, Tensor]:
    """Rollouts of the real sampler, and which of the enumerated trajectories each one is."""
    e = enumerate_trajectories(name)
    rollout = write(e.model, torch.tensor([PROMPT] * rows), **e.sampling)
    number = {key: n for n, key in enumerate(trajectory_keys(e.rollout))}
    return rollout, torch.tensor([number[key] for key in trajectory_keys(rollout)])


def goodness_of_fit(counts: Tensor, probability: Tensor) -> float:
    """p-value of Pearson's chi-square test; rare cells are pooled, so that at least 5 are expected in each."""
    expected, order = (probability * counts.sum()).sort()
    rare = (expected < 5) | (expected.cumsum(0) - expected < 5)
    counts, expected = (torch.cat([x[rare].sum(0, keepdim=True), x[~rare]]) for x in (counts[order], expected))
    chi2 = ((counts - expected) ** 2 / expected).sum()
    if len(expected) == 1:
        return float(chi2 == 0)
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), chi2 / 2))


@pytest.mark.parametrize("name", SETTINGS)
def test_sampler_draws_trajectories_with_their_probabilities(name):
    """The enumerated probabilities sum to 1; 20,000 samples are as frequent (chi-square); nothing else occurs."""
    e, (_, number) = enumerate_trajectories(name), sampled(name)
    assert len(set(trajectory_keys(e.rollout))) == len(e.probability)
    assert abs(float(e.probability.sum()) - 1) < 1e-12
    counts = torch.bincount(number, minlength=len(e.probability)).double()
    assert goodness_of_fit(counts, e.probability) > 1e-3
    if name != "two tokens" and "greedy" not in name:  # so many cells that probabilities a little off are noticed
        bent = e.probability ** torch.where(torch.arange(len(counts)) % 2 == 0, 0.9, 1.0)
        assert goodness_of_fit(counts, bent / bent.sum()) < 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_sampler_records_the_exact_likelihood(name):
    """logp, summed, is the trajectory's log-likelihood up to the order's constant; entropies and kept ids are exact."""
    e, (rollout, number) = enumerate_trajectories(name), sampled(name)
    torch.testing.assert_close(rollout.logp, e.rollout.logp[number], rtol=0, atol=1e-10)
    torch.testing.assert_close(rollout.entropy, e.rollout.entropy[number], rtol=0, atol=1e-10)
    assert rollout.num_steps.equal(e.rollout.num_steps[number])
    if e.sampling["unmasking"] == "random":  # the order carries no parameters: one constant for each length
        order = e.log_probability.detach()[number] - rollout.logp.sum(1)
        for length in rollout.num_steps.unique():
            assert float(order[rollout.num_steps == length].std(correction=0)) < 1e-10
    assert (rollout.kept is None) == (e.rollout.kept is None)
    if rollout.kept is not None:
        kept, exact = (torch.nn.functional.one_hot(x + 1, 5).amax(2)[..., 1:] for x in (rollout.kept, e.rollout.kept))
        taken = rollout.step >= 0
        assert kept[taken].equal(exact[number][taken])


def test_confidence_is_the_models_own_not_the_policys():
    """At temperature 10 the policy is nearly uniform; which position comes first still depends on the model's own p.

    Position 0 comes first if its token is X (p = 0.79 against at most 0.52), or if the other's is EOS (p = 0).
    """
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0], [3.0, 2.9, -9.0, 0.0]]).double()
    settings = PLAIN | {"unmasking": "low_confidence", "completion_length": 2, "block_length": 2, "steps": 2}
    with mock.patch.object(agrpo, "logits_at", lambda model, ids, mask, at, merge: logits[at - len(PROMPT)]):
        rollout = write(mask_predictor(), torch.tensor([PROMPT] * 1000), **settings | {"temperature": 10.0})
    (x, *_), (*_, eos) = (logits[:, : EOS + 1] / 10).softmax(-1).tolist()
    assert abs(float((rollout.step[:, 0] == 0).double().mean()) - (x + (1 - x) * eos)) < 0.05


@contextmanager
def passes_seen(model):
    """Counts the sequences that go through the model, and the positions that go through its head."""
    seen, head = Counter(), model.cls if hasattr(model, "cls") else model.lm_head
    body_hook = model.base_model.register_forward_pre_hook(
        lambda _, __, given: seen.update(sequences=len(given["input_ids"])), with_kwargs=True
    )
    head_hook = head.register_forward_pre_hook(lambda _, given: seen.update(positions=given[0].shape[:-1].numel()))
    yield seen
    body_hook.remove()
    head_hook.remove()


@pytest.mark.parametrize("unmasking", ["random", "low_confidence"])
@pytest.mark.parametrize("cut", [{"temperature": 1.5}, {"temperature": 1.2, "top_k": 3, "top_p": 0.9}])
def test_sampler_keeps_its_promises(unmasking, cut):
    """Each step fills in its share of its block; rows stop after a block of EOS; logp is what `step_logps` finds."""
    model, block, per_step = mask_predictor(), 3, [2, 1]
    with torch.no_grad():
        model.cls.predictions.bias += torch.tensor([0.0, 0.0, 1.0, 50.0])  # EOS is common; the mask tempts
    prompt_mask = torch.arange(4) >= torch.arange(64)[:, None] % 4  # left padding
    sampling = PLAIN | {"completion_length": 12, "block_length": block, "steps": 8, "unmasking": unmasking} | cut
    with passes_seen(model) as seen:
        rollout = write(model, torch.arange(4) % 2 * prompt_mask, prompt_mask=prompt_mask, **sampling)
    # Rows that have ended leave the batch; at step 0 only the 4 prompts differ, and rows that are alike share a pass.
    assert seen["sequences"] == rollout.num_steps.sum() - 64 + 4
    assert len(rollout.num_steps.unique()) > 2  # the case is worth testing: rows end here and there
    assert not (rollout.completion == MASK).any()
    for completion, step, length in zip(*(x.tolist() for x in (rollout.completion, rollout.step, rollout.num_steps))):
        first, ended = 0, False
        for start in range(0, 12, block):
            expected = [-1] * block if ended else [t for t, count in enumerate(per_step, first) for _ in range(count)]
            assert sorted(step[start : start + block]) == expected
            first += 0 if ended else len(per_step)
            assert not ended or set(completion[start:]) == {EOS}
            ended = ended or set(completion[start : start + block]) == {EOS}
        assert length == first
    row, t = (torch.arange(8) < rollout.num_steps[:, None]).nonzero(as_tuple=True)
    logp, revealed = step_logps(model, rollout, row, t, mask_id=MASK, temperature=cut["temperature"])
    assert revealed.equal(rollout.step[row] == t[:, None]) and not logp[~revealed].any()
    again = torch.zeros_like(rollout.logp).index_add(0, row, logp.detach())
    torch.testing.assert_close(again, rollout.logp, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_left_padding_changes_nothing(kind):
    """A prompt padded on the left is answered as if it were not; the same seed repeats it, another one does not."""
    model, prompt = mask_predictor(kind), torch.tensor([[Y, X, Y]] * 32)
    bare = write(model, prompt, **BLOCKS)
    for padding in (X, Y, MASK):
        ids = torch.cat([torch.full((32, 5), padding), prompt], 1)
        padded = write(model, ids, prompt_mask=torch.arange(8) > 4 + 0 * ids, **BLOCKS)
        assert trajectory_keys(padded) == trajectory_keys(bare)
        torch.testing.assert_close(padded.logp, bare.logp, rtol=0, atol=1e-12)
    assert trajectory_keys(write(model, prompt, seed=1, **BLOCKS)) != trajectory_keys(bare)


def test_settings_that_do_not_fit_are_refused():
    """Blocks must divide the completion; steps must spread evenly over the blocks and fill in at least a token each."""
    assert agrpo.tokens_per_step(12, 12, 4) == [3, 3, 3, 3] and agrpo.tokens_per_step(10, 5, 4) == [3, 2]
    for C, block, steps in [(10, 4, 4), (12, 4, 4), (12, 4, 2), (4, 2, 6)]:
        with pytest.raises(ValueError):
            agrpo.tokens_per_step(C, block, steps)
    for wrong in ({"unmasking": "sideways"}, {"steps": 7}):
        with pytest.raises(ValueError):
            write(mask_predictor(), torch.tensor([PROMPT]), **PLAIN | wrong)


# ======================================================================================================================
# 3. Timesteps: weights that are right on average, strata that are hit once
# ======================================================================================================================


@contextmanager
def chosen_draws(order: Tensor, offset: Tensor):
    """`draw_timesteps` with both of its random choices made by us; it makes no others."""
    with (
        mock.patch.object(torch, "randperm", lambda n, **_: order.view(n)),
        mock.patch.object(torch, "rand", lambda *size, **_: offset.view(size)),
    ):
        yield


def inclusion_of(proposal: Tensor, k: int) -> Tensor:
    """The probability of drawing each step: min(1, c p), with c found by bisection so that they add up to k."""
    p, low, high = proposal.double(), 0.0, k / float(proposal.min())
    if k >= len(p):
        return torch.ones_like(p)
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if float((c * p).clamp(max=1).sum()) < k else (low, c)
    return (c * p).clamp(max=1)


def pieces(proposal: Tensor, k: int, low: float = 0.0, high: float = 1.0) -> list[tuple[float, float]]:
    """The intervals of x in [low, high) on which the points j + x, j < k, stay on the same timesteps.

    A draw is constant on each of them, so its mean over x is a finite sum. proposal (num_steps,), of any scale.
    """
    crossings = {edge % 1 for edge in inclusion_of(proposal, k).cumsum(0).tolist()}
    return list(itertools.pairwise(sorted({low, high} | {x for x in crossings if low + 1e-12 < x < high - 1e-12})))


RAGGED = torch.tensor([5, 3, 1])
TAKEN = (torch.arange(5) < RAGGED[:, None]).double()
ENTROPY = torch.tensor([[3.0, 0.02, 1.0, 0.5, 2.2], [0.7, 2.0, 0.01, 9.0, 9.0], [0.4, 9.0, 9.0, 9.0, 9.0]])
PROPOSALS = {
    "uniform": None,
    "entropy": ENTROPY,  # beyond a row's own steps there may be anything
    "defensive": agrpo.defensive_proposal(ENTROPY * TAKEN * (ENTROPY > 0.1), RAGGED),
}


def total_weight(steps: Tensor, weights: Tensor, T: int) -> Tensor:
    return torch.zeros(len(steps), T).double().scatter_add(1, steps, weights)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("kind", PROPOSALS)
def test_timestep_weights_are_unbiased(kind, k):
    """Each step's weight is 1 on average, so sum_j w_j f(t_j) is sum_t f(t) on average, for any f. Exactly.

    The mean is computed: over the 3! orders of the batch, and over the offsets, piece by piece.
    """
    proposal = PROPOSALS[kind]
    density = TAKEN if proposal is None else proposal
    mean = torch.zeros(3, 5, dtype=torch.float64)
    for order in map(torch.tensor, itertools.permutations(range(3))):
        cut = [pieces(p[:n], k, place / 3, (place + 1) / 3) for p, n, place in zip(density, RAGGED, order.tolist())]
        for piece in itertools.zip_longest(*cut, fillvalue=(0.5, 0.5)):
            low, high = torch.tensor(piece, dtype=torch.float64).T
            at = []
            for share in (0.25, 0.75):  # two points of the piece: the draw is constant there, so the integral is exact
                with chosen_draws(order, 3 * (low + share * (high - low)) - order):
                    steps, weights = draw_timesteps(RAGGED, k, proposal)
                for row, weight in zip(steps, weights):  # no step twice: each costs a pass
                    assert len(row[weight > 0].unique()) == (weight > 0).sum()
                at.append(total_weight(steps, weights, 5) * 3 * (high - low)[:, None])
            torch.testing.assert_close(*at, rtol=0, atol=1e-9)
            mean += at[0] / math.factorial(3)
    torch.testing.assert_close(mean, TAKEN, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_strata_are_hit_exactly_once(k, rows=6):
    """Each row has one point in each unit of its k; the batch one in each of its rows x k finer strata."""
    num_steps = torch.full((rows,), rows * k)  # as many equal steps as fine strata: the step drawn is the stratum hit
    for seed in range(50):
        steps, weights = draw_timesteps(num_steps, k, generator=seeded(seed))
        assert sorted(steps.flatten().tolist()) == list(range(rows * k))
        assert (steps // rows == torch.arange(k)).all() and (weights == rows).all()


@pytest.mark.parametrize("kind", PROPOSALS)
def test_timesteps_are_exact_once_k_covers_them(kind):
    """In every single draw, a row of at most k steps gets each of them once, with weight 1."""
    for seed, k in itertools.product(range(20), [3, 5, 8]):
        weight = total_weight(*draw_timesteps(RAGGED, k, PROPOSALS[kind], seeded(seed)), 5)
        assert weight[RAGGED <= k].equal(TAKEN[RAGGED <= k])


def test_proposals_that_cannot_be_weighted_are_refused_or_mended():
    """A step that is never drawn would be a bias: refused. Defensive is never below a tenth of uniform."""
    for k, wrong in [(2, -1.0), (2, 0.0), (2, math.nan), (2, math.inf), (0, 1.0)]:
        proposal = torch.ones(3, 5)
        proposal[0, 2] = wrong
        with pytest.raises(ValueError):
            draw_timesteps(RAGGED, k, proposal)
    with pytest.raises(ValueError):  # for fewer steps than a row has taken
        draw_timesteps(RAGGED, 2, torch.ones(3, int(RAGGED.max()) - 1))
    entropy = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    expected = [[0.225 + 0.1 / 3, 0.1 / 3, 0.675 + 0.1 / 3], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    proposal = agrpo.defensive_proposal(entropy, torch.tensor([3, 2, 2]), 0.1)
    torch.testing.assert_close(proposal, torch.tensor(expected).double(), rtol=0, atol=1e-7)


# ======================================================================================================================
# 4. The likelihood: exact for a trajectory, a bound for a text
# ======================================================================================================================


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "greedy"])
def test_estimate_is_the_exact_likelihood_once_k_covers_all_steps(name):
    """`estimate_logp` with k >= T is the enumerated sum of log-probabilities, in value and gradient, with no noise."""
    e = enumerate_trajectories(name)
    for k in (e.steps, e.steps + 3):
        estimate = agrpo.estimate_logp(e.model, e.rollout, k, micro_batch=50, **e.policy)
        torch.testing.assert_close(estimate, e.logp.sum(1), rtol=0, atol=1e-10)
    rewards = rewards_of(e.rollout.completion)
    assert_same(gradient_of(estimate @ rewards, e.model), gradient_of(e.logp.sum(1) @ rewards, e.model))


def proposal_of(e: Enumeration, kind: str) -> Tensor | None:
    defensive = agrpo.defensive_proposal(e.rollout.entropy, e.rollout.num_steps)
    surprise = agrpo.defensive_proposal(agrpo.surprise(e.rollout), e.rollout.num_steps)
    return {"uniform": None, "entropy": e.rollout.entropy, "defensive": defensive, "surprise": surprise}[kind]


def every_draw(e: Enumeration, k: int, kind: str):
    """Each trajectory with each of its timestep draws, M rows in all; and a context in which they draw just that.

    A row draws at j + x. Its x is uniform (section 3), so the mean over the pieces of x is exact.
    Returns rows (M,), the probability of the draw (M,), proposal (M, T) or None, context.
    """
    proposal = proposal_of(e, kind)
    density = torch.ones_like(e.rollout.entropy) if proposal is None else proposal
    cut = [pieces(density[row, :length], k) for row, length in enumerate(e.rollout.num_steps)]
    rows = torch.tensor([row for row, piece in enumerate(cut) for _ in piece])
    low, high = torch.tensor([x for piece in cut for x in piece], dtype=torch.float64).T
    context = chosen_draws(0 * rows, len(rows) * (low + high) / 2)  # place in the batch and offset add up to M x
    return rows, high - low, None if proposal is None else proposal[rows], context


def estimates(e: Enumeration, k: int, kind: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, over all timestep draws, of `estimate_logp` for each trajectory."""
    rows, share, proposal, context = every_draw(e, k, kind)
    rollout, none = select(e.rollout, rows), torch.zeros_like(e.probability)
    with context, torch.no_grad():
        estimate = agrpo.estimate_logp(e.model, rollout, k, proposal=proposal, micro_batch=4096, **e.policy)
    mean = none.index_add(0, rows, share * estimate)
    return mean, none.index_add(0, rows, share * (estimate - mean[rows]) ** 2).sqrt()


@pytest.mark.parametrize("name, kind, k", [("plain", "uniform", 1), ("plain", "entropy", 2), ("blocks", "entropy", 1)])
def test_estimate_is_unbiased_for_fewer_timesteps(name, kind, k):
    """The mean of `estimate_logp` over all timestep draws is log pi(trajectory), for every single trajectory."""
    e = enumerate_trajectories(name)
    mean, deviation = estimates(e, k, kind)
    torch.testing.assert_close(mean, e.rollout.logp.sum(1), rtol=0, atol=1e-10)
    assert deviation.max() > 0.1  # no single estimate is: there was something to average


@lru_cache
def text_likelihoods() -> dict[tuple, tuple[float, float, float]]:
    """For each completion: log p(completion | prompt), its any-order ELBO, and the mean of `estimate_logp`.

    The first two by definition, from all C! orders; the last over the trajectories that lead to the completion.
    """
    e = enumerate_trajectories("plain")
    table, number = policy_table(e.model, e.sampling)[0].detach(), states_of(e.sampling).index
    of_text = defaultdict(list)
    for text, estimate in zip(map(tuple, e.rollout.completion.tolist()), estimates(e, 1, "entropy")[0].tolist()):
        of_text[text].append(estimate)
    figures = {}
    for text, of_orders in of_text.items():
        logps = []
        for order in itertools.permutations(range(3)):
            seen = [tuple(text[j] if j in order[:t] else MASK for j in range(3)) for t in range(3)]
            logps.append(sum(float(table[number(state), i, text[i]]) for state, i in zip(seen, order)))
        marginal = math.log(sum(map(math.exp, logps)) / len(logps))
        figures[text] = marginal, sum(logps) / len(logps), sum(of_orders) / len(of_orders)
    return figures


def test_mean_over_orders_is_the_elbo_a_lower_bound():
    """Averaged over orders the estimate is the any-order ELBO, below log p(text | prompt): hence 'ELBO-style'.

    The average is a bound. The likelihood of one trajectory is exact, and it is the one that a policy gradient needs.
    """
    marginal, elbo, estimate = torch.tensor(list(text_likelihoods().values()), dtype=torch.float64).T
    assert abs(float(marginal.exp().sum()) - 1) < 1e-12
    torch.testing.assert_close(estimate, elbo, rtol=0, atol=1e-10)
    assert (elbo < marginal).all() and float(marginal.exp() @ (marginal - elbo)) > 0.01


# ======================================================================================================================
# 5. The gradient: unbiased, and for what
# ======================================================================================================================


def policy_gradient_of(e: Enumeration, value: Tensor | None = None) -> Tensor:
    """grad E[reward] / T (or of E[value]), by autograd through the enumeration; the 1/T is the objective's own."""
    value = rewards_of(e.rollout.completion) if value is None else value
    return gradient_of(e.log_probability.exp() @ value, e.model) / e.steps


def advantage_mass(e: Enumeration, group_size: int = 2, scale_by_std: bool = False) -> Tensor:
    """(N,) probability x advantage of a trajectory, added up over all N^G groups that it may be in, and over G.

    The update is linear in the advantages, so one call with these is the mean over all groups.
    """
    groups = torch.cartesian_prod(*[torch.arange(len(e.probability))] * group_size)  # (N^G, G)
    rewards = rewards_of(e.rollout.completion)[groups].flatten()
    advantage = group_advantages(rewards, group_size, scale_by_std).view(-1, group_size)
    mass = e.probability[groups].prod(1, keepdim=True) * advantage / group_size
    return torch.zeros_like(e.probability).index_add(0, groups.flatten(), mass.flatten())


def mean_update(e: Enumeration, k: int, kind: str = "uniform", mass: Tensor | None = None, **options) -> Tensor:
    """The mean of `policy_gradient` over all trajectories, groups and timestep draws: one real call on all of them."""
    rows, share, proposal, context = every_draw(e, k, kind)
    advantage = (advantage_mass(e) if mass is None else mass)[rows] * share * len(rows)  # the call divides by its rows
    options = {"on_policy": True, "length_norm": "constant", "micro_batch": 4096} | e.policy | options
    with context:
        return update_of(e.model, select(e.rollout, rows), advantage, k=k, proposal=proposal, **options)


@pytest.mark.parametrize("kind, k", [("uniform", 1), ("entropy", 1), ("surprise", 1)])
def test_mean_update_over_every_group_and_draw_is_the_policy_gradient(kind, k):
    """Without algebra: one call for each possible group of 2, order of the batch and timestep draw; and their mean.

    It is (1 - 1/G) grad E[reward] / T, exactly. 1/T is the objective's mean over steps; 1 - 1/G comes from the
    baseline, the mean of the group, of which each row's own reward is one part in G.
    """
    e = enumerate_trajectories("two tokens")
    proposal, rewards, total = proposal_of(e, kind), rewards_of(e.rollout.completion), 0.0
    density = torch.ones_like(e.rollout.entropy) if proposal is None else proposal
    options = {"k": k, "on_policy": True, "length_norm": "constant"} | e.policy
    for group in map(list, itertools.product(range(len(rewards)), repeat=2)):
        rollout, advantage = select(e.rollout, group), group_advantages(rewards[group], 2)
        mine = None if proposal is None else proposal[group]
        for order in itertools.permutations(range(2)):
            cut = [pieces(density[row], k, place / 2, (place + 1) / 2) for row, place in zip(group, order)]
            for cell in itertools.product(*cut):
                low, high = torch.tensor(cell, dtype=torch.float64).T
                with chosen_draws(torch.tensor(order), low + high - torch.tensor(order)):  # x half way: 2 x - place
                    update = update_of(e.model, rollout, advantage, proposal=mine, **options)
                probability = e.probability[group].prod() * (2 * (high - low)).prod() / 2  # of group, offsets, order
                total = total + float(probability) * update
    assert_same(total, (1 - 1 / 2) * policy_gradient_of(e))


@pytest.mark.parametrize(
    "name, kind, k, options",
    [
        ("plain", "uniform", 1, {}),
        ("plain", "entropy", 1, {}),
        ("plain", "uniform", 2, {}),
        ("plain", "entropy", 2, {"length_norm": "sequence"}),
        ("plain", "defensive", 3, {}),
        ("plain", "surprise", 1, {}),
        ("plain", "surprise", 2, {}),
        ("temperature", "entropy", 1, {"on_policy": False}),
        ("top-k", "defensive", 1, {"on_policy": False}),
        ("top-p", "defensive", 2, {}),
        ("top-k, top-p", "defensive", 1, {"on_policy": False, "length_norm": "sequence"}),
        ("two a step", "entropy", 1, {"micro_batch": 7}),
        ("blocks", "uniform", 1, {}),
        ("blocks", "entropy", 2, {}),
        ("blocks", "surprise", 3, {}),
        ("blocks, top-p", "surprise", 2, {"on_policy": False}),
        ("blocks, two a step", "surprise", 1, {"on_policy": False}),
        ("blocks, top-p", "defensive", 2, {"on_policy": False}),
        ("blocks, no EOS", "uniform", 2, {"length_norm": "sequence"}),
    ],
)
def test_mean_update_is_the_policy_gradient(name, kind, k, options):
    """The same for every proposal, temperature, truncation, number of blocks and k: (1 - 1/G) grad E[reward] / T.

    Rows that end early need length_norm="constant"; where none does, "sequence" is the same. on_policy=False takes the
    ratio to the recorded probabilities: 1, if temperature and truncation are those of the sampler.
    """
    e = enumerate_trajectories(name)
    assert_same(mean_update(e, k, kind, **options), (1 - 1 / 2) * policy_gradient_of(e))


def test_factor_is_one_minus_one_over_G_for_any_mask_predictor():
    """Groups of 3: 2/3. A Llama that is not causal (LLaDA is one): as BERT, but its norms round to float32."""
    e, llama = enumerate_trajectories("two tokens"), enumerate_trajectories("blocks, top-p", "llama")
    assert_same(mean_update(e, 1, mass=advantage_mass(e, 3)), (1 - 1 / 3) * policy_gradient_of(e))
    assert_same(mean_update(llama, 1, "defensive", on_policy=False), (1 - 1 / 2) * policy_gradient_of(llama), 1e-6)


@pytest.mark.parametrize("name, kind, k", [("blocks", "entropy", 1), ("blocks, two a step", "uniform", 1)])
def test_sequence_norm_is_unbiased_for_the_length_weighted_objective(name, kind, k):
    """Where rows end early, "sequence" is unbiased for GRPO's surrogate, grad E[(r - mean r) / T_i], not for grad E[r].

    A good row counts for more the shorter it is; a bad one for less the longer it is.
    """
    e = enumerate_trajectories(name)
    rewards = rewards_of(e.rollout.completion)
    weighted = (rewards - e.probability @ rewards) / e.rollout.num_steps * e.steps
    update = mean_update(e, k, kind, length_norm="sequence")
    assert_same(update, (1 - 1 / 2) * policy_gradient_of(e, weighted))
    assert cosine(update, policy_gradient_of(e)) < 0.9995


def test_update_at_full_k_has_no_noise_and_nothing_is_wasted():
    """With k >= T every draw gives the same update. Rows without advantage and repeated steps cost no pass."""
    e = enumerate_trajectories("blocks")
    advantage = normal(0, len(e.probability))
    advantage[::3] = 0
    given, options = (e.model, e.rollout, advantage), {"on_policy": True} | e.policy
    exact = update_of(*given, k=4, **options)
    for k, micro_batch, seed in [(4, 1000, 1), (6, 9, 2)]:
        assert_same(update_of(*given, k=k, micro_batch=micro_batch, generator=seeded(seed), **options), exact)
    learning = advantage != 0
    for k in (1, 3, 4):
        with passes_seen(e.model) as seen:
            figures = agrpo.policy_gradient(*given, k=k, micro_batch=2000, **options)
        # The head sees the one token that each step fills in, not the sequence; and equal states share a pass.
        assert figures["passes"] == seen["positions"] == e.rollout.num_steps[learning].clamp(max=k).sum()
    assert seen["sequences"] == len(e.state[learning][e.rollout.step[learning] >= 0].unique()) < seen["positions"]
    assert agrpo.policy_gradient(e.model, e.rollout, 0 * advantage, k=1, **options)["passes"] == 0


# ======================================================================================================================
# 6. What is not exact, and by how much
# ======================================================================================================================


def one_step_update(e: Enumeration) -> Tensor:
    """diffu-GRPO (d1, arXiv 2504.12216), its prompt masking aside: all tokens at once, from nothing but masks."""
    view = agrpo.one_step_view(e.model, e.rollout, on_policy=True, prompt_masking=0.0, **e.policy)
    return mean_update(replace(e, rollout=view), k=1)


def resampled_masks_update(e: Enumeration) -> Tensor:
    """The ELBO of the completion in place of its trajectory: as if it had been written in every order equally often."""
    mass, (_, text) = advantage_mass(e), e.rollout.completion.unique(dim=0, return_inverse=True)
    same = (text[:, None] == text).double()
    return mean_update(e, k=1, mass=same @ mass / same.sum(1))


@lru_cache
def bias_table(seeds: int = 8) -> dict[str, Tensor]:
    """The mean update of each estimator beside (1 - 1/G) grad E[reward] / T, for 8 random mask predictors.

    (seeds, 3): cosine of the two; norm, relative to the exact one; relative error.
    """
    table = defaultdict(list)
    for seed in range(seeds):
        plain, blocks, sure = (enumerate_trajectories(n, seed=seed) for n in ("plain", "blocks", "low confidence"))
        for name, e, update in [
            ("AGRPO, k=1, uniform", plain, mean_update(plain, 1)),
            ("AGRPO, k=1, entropy", plain, mean_update(plain, 1, "entropy")),
            ("AGRPO, k=2, surprise", plain, mean_update(plain, 2, "surprise")),
            ("AGRPO, rows end early, constant", blocks, mean_update(blocks, 1)),
            ("  rows end early, sequence", blocks, mean_update(blocks, 1, length_norm="sequence")),
            ("  advantage / std of the group", plain, mean_update(plain, 1, mass=advantage_mass(plain, 2, True))),
            ("  low-confidence unmasking", sure, mean_update(sure, 1)),
            ("  resampled masks (ELBO)", plain, resampled_masks_update(plain)),
            ("  one step (diffu-GRPO)", plain, one_step_update(plain)),
        ]:
            exact = (1 - 1 / 2) * policy_gradient_of(e)
            lengths = [x.norm() / exact.norm() for x in (update, update - exact)]
            table[name].append([cosine(update, exact), *lengths])
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in table.items()}


@pytest.mark.parametrize("name", ["sequence", "std", "low-confidence", "resampled", "one step"])
def test_what_is_biased(name):
    """The other estimators miss the policy gradient, and not by a factor: their mean points elsewhere.

    sequence: above. std: groups that hardly differ count as much as those that do. Low confidence: the positions depend
    on the parameters, and the sum of log-probabilities leaves that out. Resampled masks: given its text, a trajectory's
    order is not uniform, unless the predictor is consistent. One step: the states looked at were never visited.
    """
    for estimator, rows in bias_table().items():
        if name in estimator:
            most = {"low-confidence": 0.998, "one step": 0.92}.get(name, 0.993)
            assert rows[:, 0].median() < most and rows[:, 2].median() > 0.05, rows
        if estimator.startswith("AGRPO"):
            torch.testing.assert_close(rows, torch.tensor([[1.0, 1.0, 0.0]] * 8).double(), rtol=0, atol=1e-10)


# ======================================================================================================================
# 7. The objective, on and off the policy that sampled
# ======================================================================================================================


def test_advantages_by_hand():
    """Reward minus the group's mean; exactly 0 in a group of equals; over the standard deviation only when asked."""
    rewards, expected = torch.tensor([1.0, 0.0, 0.0, 0.1, 0.1, 0.1]), torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    torch.testing.assert_close(group_advantages(rewards, 3), expected)
    torch.testing.assert_close(group_advantages(rewards, 3, True) * (math.sqrt(1 / 3) + 1e-4), expected)
    assert not group_advantages(rewards, 3)[3:].any() and not group_advantages(rewards, 3, True)[3:].any()
    torch.testing.assert_close(group_advantages(torch.tensor([1, 0, 0]), 3), expected[:3])  # whole numbers too
    with pytest.raises(ValueError):
        group_advantages(rewards, 4)


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.25, 1.0, 1.25, 1.25),  # inside
        (0.85, -1.0, -0.85, -0.85),
        (1.5, 1.0, 1.3, 0.0),  # good and already much likelier: enough
        (0.5, 1.0, 0.5, 0.5),  # good but less likely: go on
        (0.5, -2.0, -1.6, 0.0),  # bad and already much less likely: enough
        (1.5, -2.0, -3.0, -3.0),  # bad but likelier: go on
    ],
)
def test_clipping_by_hand(ratio, advantage, value, slope):
    """min(rho A, clip(rho, 0.8, 1.3) A) at both ends, for both signs of the advantage; slope is d / d log rho."""
    old_logp, advantage = torch.tensor([-2.0, advantage]).double()
    logp = (old_logp + math.log(ratio)).requires_grad_()
    objective = clipped_objective(logp, old_logp, advantage, eps_low=0.2, eps_high=0.3)
    assert math.isclose(objective.item(), value)
    assert math.isclose(torch.autograd.grad(objective, logp)[0].item(), slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_is_one_on_the_first_update(dtype):
    """On the policy that sampled the ratio is exactly 1 and nothing is clipped, however the sampler rounded."""
    model, sampling = mask_predictor().to(dtype), SETTINGS["blocks, top-p"]
    rollout = write(model, torch.tensor([PROMPT] * 32), **sampling)
    assert rollout.logp.dtype == rollout.entropy.dtype == torch.float32
    rollout = replace(rollout, logp=rollout.logp + 0.5 * (rollout.step >= 0))  # rounding, exaggerated
    policy = {"mask_id": MASK, "temperature": sampling["temperature"]}
    figures = agrpo.policy_gradient(model, rollout, torch.linspace(-1, 1, 32), k=2, on_policy=True, **policy)
    assert (figures["ratio"], figures["clipfrac"], figures["approx_kl"]) == (1, 0, 0)
    assert abs(figures["sampler_gap"] - 0.5) < 0.1


def shifted(model, seed: int):
    """The same model, some updates away."""
    other = mask_predictor()
    with torch.no_grad():
        for mine, its in zip(other.parameters(), model.parameters()):
            mine.copy_(its + 0.15 * normal(seed, *its.shape))
    return other


def logps_under(e: Enumeration, model) -> Tensor:
    """(N, C) log-probability of the enumerated tokens, in the states they were filled into, under another model."""
    table, _ = policy_table(model, e.sampling, e.keep)
    return table[e.state, torch.arange(e.state.shape[1]), e.rollout.completion].masked_fill(e.rollout.step < 0, 0)


@pytest.mark.parametrize("length_norm", ["sequence", "constant"])
@pytest.mark.parametrize("name", ["blocks", "top-k, top-p", "two a step"])
def test_update_is_the_gradient_of_the_objective_as_written(name, length_norm):
    """Some updates later, with clipping and KL, the update is dJ / d theta for J written out here token by token."""
    e = enumerate_trajectories(name)
    model, reference, advantage = shifted(e.model, 0), shifted(e.model, 1), normal(0, len(e.probability))
    logp, taken, A = logps_under(e, model), e.rollout.step >= 0, advantage[:, None]
    rho, d = (logp - e.rollout.logp).exp(), logps_under(e, reference).detach() - logp
    gain = torch.where(A > 0, rho.clamp(max=1.3), rho.clamp(min=0.9)) * A
    kl = rho * (d.exp() - d - 1)
    length = e.rollout.num_steps if length_norm == "sequence" else e.steps
    J = (((gain - 0.3 * kl) * taken).sum(1) / length).mean()

    options = {"eps_low": 0.1, "eps_high": 0.3, "beta": 0.3, "ref_model": reference, "length_norm": length_norm}
    options |= {"k": e.steps, "on_policy": False} | e.policy
    assert_same(update_of(model, e.rollout, advantage, **options), gradient_of(J, model))
    figures = agrpo.policy_gradient(model, e.rollout, advantage, micro_batch=10, **options)
    expected = {
        "loss": -J,
        "clipfrac": torch.where(A > 0, rho > 1.3, rho < 0.9)[taken].double().mean(),
        "approx_kl": (rho - 1 - rho.log())[taken].mean(),
        "ratio": rho[taken].mean(),
        "kl": kl[taken].mean(),
        "sampler_gap": rho.log().abs()[taken].mean(),
    }
    assert 0 < expected["clipfrac"] < 1
    for figure, value in expected.items():
        assert math.isclose(figures[figure], value.item(), rel_tol=1e-9), figure


def test_one_step_view_masks_everything_and_some_of_the_prompt():
    """diffu-GRPO: one pass a row, from masks alone; a fresh prompt mask each time; its own old logp."""
    model, sampling = mask_predictor(), SETTINGS["blocks"]
    policy = {"mask_id": MASK, "temperature": sampling["temperature"]}
    prompt = torch.full((500, 6), X)
    rollout = write(model, prompt, **sampling)
    one, two = (agrpo.one_step_view(model, rollout, on_policy=False, generator=seeded(n), **policy) for n in (0, 1))
    assert not one.prompt.equal(two.prompt) and rollout.prompt.equal(prompt)
    masked = one.prompt == MASK
    assert abs(float(masked.double().mean()) - 0.15) < 0.02 and one.prompt[~masked].eq(X).all()
    logits = model(input_ids=torch.cat([one.prompt, torch.full((500, 4), MASK)], 1)).logits[:, 6:, :MASK]
    exact = logits.log_softmax(-1).gather(-1, rollout.completion[..., None]).squeeze(-1)
    torch.testing.assert_close(one.logp, exact.masked_fill(rollout.step < 0, 0), rtol=0, atol=1e-10)
    advantage = torch.linspace(-1, 1, 500)
    figures = agrpo.policy_gradient(model, one, advantage, k=5, on_policy=False, **policy)
    assert figures["passes"] == 500 and abs(figures["ratio"] - 1) < 1e-9 and figures["clipfrac"] == 0


def test_kl_is_zero_at_the_reference_and_never_negative():
    """k3, exp(d) - d - 1 with d = log p_ref - log p, times rho; by hand at rho = 3/2, d = log 2."""
    logp = torch.linspace(-5, 0, 50).double()
    assert not kl_penalty(logp, logp.flip(0), logp).any()
    assert kl_penalty(logp[:, None], logp, logp.flip(0)).min() > -1e-15
    logp, old_logp, ref_logp = torch.tensor([0.3, 0.2, 0.6]).double().log()
    assert math.isclose(kl_penalty(logp, old_logp, ref_logp), 1.5 * (2 - math.log(2) - 1), rel_tol=1e-6)


@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_has_the_gradient_of_the_exact_kl_of_each_step(on_policy):
    """Its mean over trajectories is KL(policy || reference) of each step at the states visited, in value and gradient.

    Off policy too: that is what rho is for. How the parameters change which states are visited is left out, so it is
    not quite the gradient of the KL between the two distributions of trajectories, though its value is that KL.
    """
    e = enumerate_trajectories("two tokens")
    model, reference = e.model if on_policy else shifted(e.model, 0), shifted(e.model, 1)
    logp, ref_logp = (policy_table(m, e.sampling, e.keep)[0] for m in (model, reference))
    kl = (logp.exp() * (logp - ref_logp)).masked_fill(~e.keep, 0).sum(-1)  # (S, C)
    exact = e.probability @ kl[e.state, torch.arange(2)].sum(1)

    options = {"k": 2, "beta": 1.0, "ref_model": reference, "on_policy": on_policy} | e.policy
    update, value = 0.0, 0.0
    for row, probability in enumerate(e.probability.tolist()):
        one, nothing = select(e.rollout, [row]), torch.zeros(1)  # no advantage: only the KL is left
        update = update + probability * update_of(model, one, nothing, **options)
        value += probability * 2 * agrpo.policy_gradient(model, one, nothing, **options)["kl"]
    assert math.isclose(value, exact.item(), rel_tol=1e-10)
    assert_same(update, -gradient_of(exact, model) / e.steps)
    if on_policy:
        of_trajectories = e.log_probability.exp() @ (e.logp - logps_under(e, reference)).sum(1)
        assert math.isclose(of_trajectories.item(), exact.item(), rel_tol=1e-10)
        with pytest.raises(AssertionError):
            assert_same(update, -gradient_of(of_trajectories, model) / e.steps, 0.01)


# ======================================================================================================================
# 8. The head, on a few positions
# ======================================================================================================================


@pytest.mark.parametrize("kind", ["bert", "llama", "dream"])
def test_logits_at_are_those_of_the_full_forward_pass(kind):
    """Value and gradient, padded or not, merged or not, positions in any order; and the head sees no others."""
    model, tolerance = mask_predictor(kind), 1e-12 if kind == "bert" else 1e-5  # Llama's norms round to float32
    ids = (torch.arange(45).view(5, 9) ** 2 % 7 % 4)[[0, 1, 2, 3, 4, 0, 1]]
    positions, weight = torch.tensor([8, 4, 6]), normal(0, 3, len(WORDS))
    full = model(input_ids=ids).logits
    exact = full[:, positions - int(kind == "dream")]
    for padding, merge in itertools.product((0, 3), (False, True)):
        padded = torch.cat([torch.arange(7 * padding).view(7, padding) % 4, ids], 1)
        attention_mask = (torch.arange(9 + padding) >= padding).expand(7, -1) if padding else None
        with passes_seen(model) as seen:
            logits = agrpo.logits_at(model, padded, attention_mask, (positions + padding).expand(7, 3), merge=merge)
        assert seen == {"sequences": 5 if merge else 7, "positions": 7 * 3}
        torch.testing.assert_close(logits, exact, rtol=0, atol=tolerance)
        gradients = (gradient_of((x * weight).sum(), model) for x in (logits, exact))
        assert_same(*gradients, tolerance)
    ids[:, 8] = (ids[:, 8] + 1) % 4  # not causal: the first position sees the last
    assert ((model(input_ids=ids).logits - full)[:, 0].abs() > 1e-3).any()


# ======================================================================================================================
# 9. Variance: what the strata and the proposal buy
# ======================================================================================================================


def plain_draw(stratified: bool, num_steps: Tensor, k: int, proposal: Tensor | None, rng: torch.Generator):
    """Importance sampling of timesteps from independent points; or from points stratified over the batch alone, one in
    each of its rows x k strata, dealt out to the rows at random (the official code's low discrepancy)."""
    n = len(num_steps) * k
    if proposal is None:
        proposal = (torch.arange(int(num_steps.max())) < num_steps[:, None]).double()
    stratum = torch.randperm(n, generator=rng) if stratified else torch.randint(n, (n,), generator=rng)
    points = ((stratum + torch.rand(n, generator=rng, dtype=torch.float64)) / n).view(-1, k)
    cdf = proposal.cumsum(1) / proposal.sum(1, keepdim=True)
    steps = torch.searchsorted(cdf, points, right=True).clamp(max=cdf.shape[1] - 1)
    return steps, proposal.sum(1, keepdim=True) / (k * proposal.gather(1, steps))


SCHEMES = {"iid": partial(plain_draw, False), "batch": partial(plain_draw, True), "ours": draw_timesteps}


def refrains(C: int = 16, words: int = 4):
    """A mask predictor taught for a second to repeat four words: its early steps choose, its late ones mostly copy."""
    model, rng = mask_predictor(vocab=words + 1, width=32, spread=0.15).float(), seeded(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        text = torch.randint(words, (64, 4), generator=rng).repeat(1, C // 4)
        t = torch.rand(64, 1, generator=rng).clamp(min=0.05)
        masked = torch.rand(64, C, generator=rng) < t
        logits = model(input_ids=torch.where(masked, words, text)).logits
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), text, reduction="none")
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
        defensive = agrpo.defensive_proposal(rollout.entropy, rollout.num_steps)
        surprise = agrpo.defensive_proposal(agrpo.surprise(rollout), rollout.num_steps)
        proposals = {"uniform": torch.ones_like(defensive), "entropy": defensive, "surprise": surprise}
        for kind, scheme, k in itertools.product(proposals, SCHEMES, (1, 2, 4, 8)):
            some = (SCHEMES[scheme](rollout.num_steps, k, proposals[kind], rng) for _ in range(draws))
            error = torch.stack([total_weight(*draw, C).flatten() - 1 for draw in some])
            variance[kind, scheme, k] += float((error @ product * error).sum(1).mean())
    return {key: value / size for key, value in variance.items()}


def test_strata_and_proposal_reduce_the_variance():
    """Strata of each row do what strata of the batch alone do not; a proposal helps on top, surprise most; so does k.

    At k = T/2 all of it together leaves less than a tenth of what independent uniform timesteps have.
    """
    table = variance_table()
    proposals = ("uniform", "entropy", "surprise")
    for kind, k in itertools.product(proposals, (4, 8)):
        assert table[kind, "ours", k] < (1.1 - 0.05 * k) * min(table[kind, "iid", k], table[kind, "batch", k])
    for kind, scheme, k in itertools.product(proposals, SCHEMES, (1, 2, 4)):
        assert table[kind, scheme, 2 * k] < 0.7 * table[kind, scheme, k]
    for k in (1, 2, 4, 8):
        assert table["surprise", "ours", k] < 0.85 * table["entropy", "ours", k] < 0.85 * table["uniform", "ours", k]
    assert table["surprise", "ours", 8] < min(table["uniform", "iid", 8] / 10, table["entropy", "batch", 8] / 6)


# ======================================================================================================================
# 10. The story as tables
# ======================================================================================================================


def print_tables():
    def spell(text: list[int]) -> str:
        return " ".join("xy."[token] for token in text)

    print("1. Likelihood of a text (nats; '.' is EOS). Averaged over all orders the estimate is the ELBO: a bound\n")
    print("   text      log p exact    ELBO exact   mean estimate       gap")
    figures = sorted(text_likelihoods().items(), key=lambda item: -item[1][0])
    for text, (marginal, elbo, estimate) in figures[:4] + figures[-2:]:
        print(f"   {spell(text)}   {marginal:14.8f}{elbo:14.8f}{estimate:16.8f}{marginal - elbo:10.4f}")
    gap = sum(math.exp(marginal) * (marginal - elbo) for _, (marginal, elbo, _) in figures)
    print(f"   mean gap over texts: {gap:.4f}")

    print(
        "\n2. Likelihood of a trajectory (nats): exact. Estimate from k of its 3 steps: mean over draws +- deviation\n"
    )
    print(f"   text   filled in at {'exact':>10s}" + "".join(f"{f'k = {k}':>24s}" for k in (1, 2, 3)))
    e = enumerate_trajectories("plain")
    by_k = [estimates(e, k, "surprise") for k in (1, 2, 3)]
    for row in e.probability.argsort(descending=True)[:5].tolist():
        step = " ".join(map(str, e.rollout.step[row].tolist()))
        cells = "".join(f"{mean[row]:14.8f} +-{deviation[row]:7.4f}" for mean, deviation in by_k)
        print(f"   {spell(e.rollout.completion[row].tolist())}  {step}     {e.logp[row].sum().item():14.8f}{cells}")

    print("\n3. Mean update over all trajectories, groups and draws, beside (1 - 1/G) grad E[reward] / T; 8 models\n")
    print(f"   {'median of the 8':32s}   cosine  (lowest)   |mean| / |exact|   relative error")
    for name, rows in bias_table().items():
        along, norm, error = rows.median(0).values.tolist()
        print(f"   {name:32s}{along:9.4f}{rows[:, 0].min():10.4f}{norm:19.4f}{error:17.1e}")

    print("\n4. Variance of the gradient estimate over draws / |gradient|^2: 32 completions, T = 16\n")
    points = {"iid": "independent", "batch": "strata of the batch", "ours": "strata of each row and the batch (ours)"}
    print(f"   {'proposal':12s}{'points':42s}" + "".join(f"{f'k = {k}':>9s}" for k in (1, 2, 4, 8)))
    for kind, scheme in itertools.product(("uniform", "entropy", "surprise"), SCHEMES):
        figures = "".join(f"{variance_table()[kind, scheme, k]:9.3f}" for k in (1, 2, 4, 8))
        print(f"   {kind:12s}{points[scheme]:42s}{figures}")


# A row of T = 8 steps costs 8 forward passes to sample, and k forward and backward to learn from, each worth 3 forward.
# So these all cost the same, 60 updates of the full sum; states that rows share are not counted.
LEARNING = {
    **{f"k = {k}, surprise, ours": (k, "ours", "agrpo", "surprise") for k in (1, 2, 4, 8)},
    **{
        f"k = 2, {kind}, {scheme}": (2, scheme, "agrpo", kind)
        for scheme, kind in itertools.product(SCHEMES, ("uniform", "entropy"))
    },
    "diffu-GRPO": (1, "ours", "diffu_grpo", "uniform"),
}


def learning_runs(seeds: list[int], folder: Path):
    """Train with each estimator for the same number of passes (a run that is there already is not repeated); yields
    (name, updates, share of right completions in the last tenth of the updates, held-out accuracy as trained)."""
    for seed, (name, (k, scheme, method, proposal)) in itertools.product(seeds, LEARNING.items()):
        updates = round(60 * (8 + 3 * 8) / (8 + 3 * k))
        run = folder / f"{re.sub('[^a-zA-Z0-9]+', '-', name)}-seed{seed}"
        if not (run / "results.json").exists():
            options = {"steps": 8, "eval_steps": 8, "prompts_per_update": 16, "rollout_batch": 256, "show_every": 0}
            options |= {"k": k, "method": method, "timestep_proposal": proposal, "max_steps": updates, "seed": seed}
            words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
            with mock.patch.object(agrpo, "draw_timesteps", SCHEMES[scheme]):
                agrpo.main(["--resume", str(run)] if run.exists() else [*words, "--output_dir", str(run)])
        accuracy = [line["accuracy"] for line in figures(run)[-updates // 10 :]]
        held_out = json.loads((run / "results.json").read_text())[agrpo.METHODS[method]]["as trained"]["8"]
        yield name, updates, sum(accuracy) / len(accuracy), held_out


def print_learning(seeds: list[int], folder: Path):
    table = defaultdict(list)
    for name, *row in learning_runs(seeds, folder):
        table[name].append(row)
    print(f"\n5. Accuracy after equally many passes (T = 8; mean and range over {len(seeds)} seeds)\n")
    print(f"   {'estimator':28s}updates   training, last tenth     held out, as trained")
    for name, rows in table.items():
        updates, *both = zip(*rows)
        cells = "".join(f"{sum(x) / len(x):12.3f} ({min(x):.3f} to {max(x):.3f})" for x in both)
        print(f"   {name:28s}{updates[0]:7d}{cells}")


# ======================================================================================================================
# The command line, end to end
# ======================================================================================================================

SHORT = [
    "--pretrain_steps",
    "3",
    "--pretrain_batch",
    "8",
    "--max_steps",
    "4",
    "--prompts_per_update",
    "2",
    "--group_size",
    "4",
    "--rollout_batch",
    "8",
]
SHORT += ["--eval_steps", "4", "1", "--eval_examples", "8", "--save_every", "2", "--show_every", "2", "--device", "cpu"]


def figures(run):
    """metrics.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not re.search("second|memory", name)} for line in lines]


# Three steps of pretraining earn no reward, so there would be no gradient: pay for every odd character instead.
GENEROUS_SUDOKU = replace(agrpo.TASKS["sudoku"], credit=lambda _, answer: sum(ord(c) % 2 for c in answer) / 16)


@pytest.fixture(scope="module")
def generous_sudoku():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(agrpo.TASKS, "sudoku", GENEROUS_SUDOKU)
        yield


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, generous_sudoku):
    """A whole run, cut short: pretraining, measuring, 4 updates, measuring."""
    folder = tmp_path_factory.mktemp("runs")
    agrpo.main([*SHORT, "--output_dir", str(folder / "whole")])
    return folder / "whole"


def test_a_run_pretrains_trains_measures_and_saves(short_run):
    """One command leaves metrics, samples, results and a checkpoint that loads again; the weights have moved."""
    lines = figures(short_run)
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert {"reward", "accuracy", "clipfrac", "grad_norm", "entropy", "learning_rate", "passes"} <= lines[0].keys()
    assert all(line["ratio"] == pytest.approx(1) and line["clipfrac"] == 0 for line in lines if line["passes"])
    assert any(line["passes"] for line in lines)
    for line in lines:  # 2 prompts x 4 completions x 2 steps; at step 0 the completions of one prompt are all the same
        assert (line["rollout_passes"], line["rollout_forward_passes"]) == (16, 10)
        assert line["passes"] + line["passes_saved_no_advantage"] == 8 and line["forward_passes"] <= line["passes"]
    results = json.loads((short_run / "results.json").read_text())
    assert results["AGRPO"].keys() == {"as trained", "greedy"} and results["base"]["greedy"].keys() == {"4", "1"}
    assert [path.name for path in agrpo.checkpoints(short_run)] == ["checkpoint-2", "checkpoint-4"]
    trained, tokenizer, mask_id = agrpo.load_model(str(short_run))
    base, _, _ = agrpo.load_model(str(next(short_run.parent.glob("pretrained-*"))))
    assert tokenizer.mask_token_id == mask_id
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), base.parameters()))
    assert (short_run / "completions.jsonl").read_text().count("\n") == 2


def test_the_same_seed_gives_the_same_run(short_run, tmp_path):
    """Same seed, same figures, even in the folder of a run that was killed at its first file; another seed, others."""
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "settings.part").write_text("{")
    agrpo.main([*SHORT, "--output_dir", str(tmp_path / "again")])
    assert figures(tmp_path / "again") == figures(short_run)
    agrpo.main([*SHORT, "--seed", "1", "--max_steps", "1", "--output_dir", str(tmp_path / "other")])
    assert figures(tmp_path / "other")[0] != figures(short_run)[0]


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "killed", "killed while saving"])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(how, short_run, tmp_path, monkeypatch):
    """Stopped after the third update or killed during it, then resumed: the same metrics and, bit for bit, weights."""
    run, report, save = tmp_path / "stopped", agrpo.reporter, agrpo.save_file

    def stopping_reporter(args):
        inner = report(args)

        def reporting(metrics):
            inner(metrics)
            if metrics["update"] == 3 and how != "killed while saving":
                if how == "killed":
                    raise MemoryError("as good as a kill: nothing after this line runs")
                signal.raise_signal(getattr(signal, how))

        return reporting

    def dying_save(tensors, path, **more):
        if how == "killed while saving" and "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half of it")
            raise MemoryError("killed in the middle of writing")
        save(tensors, path, **more)

    monkeypatch.setattr(agrpo, "reporter", stopping_reporter)
    monkeypatch.setattr(agrpo, "save_file", dying_save)
    with pytest.raises((SystemExit, MemoryError)):
        agrpo.main([*SHORT, "--output_dir", str(run)])
    assert [path.name for path in agrpo.checkpoints(run)][-1] == ("checkpoint-3" if "SIG" in how else "checkpoint-2")
    monkeypatch.undo()
    agrpo.main(["--resume", str(run)])
    assert figures(run) == figures(short_run)
    assert (run / "results.json").read_text() == (short_run / "results.json").read_text()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (run / "checkpoint-4" / name).read_bytes() == (short_run / "checkpoint-4" / name).read_bytes()


@pytest.mark.parametrize(
    ("wrong", "said"),
    {
        "--block_length 5": "does not divide",
        "--steps 17": "must fill in at least one",
        "--steps 3 --block_length 4": "multiple of 4",
        "--group_size 1": "--group_size 1",
        "--task chess": "invalid choice",
        "--data no_such_file.csv": "no such file",
        "--model no_such_folder": "no such folder",
        "--resume no_such_run": "no run there",
        "--k 0": "--k must be from 1 to 1,000,000",
        "--seed -1": "--seed must be 0 or more",
        "--completion_length 1000000000": "--completion_length must be",
        "--temperature 0": "--temperature must be above 0",
        "--temperature nan": "--temperature must be above 0",
        "--top_p 1.5": "--top_p",
        "--rollout_batch 100": "multiple of --group_size",
        "--prompts_per_update 33": "multiple of 32",
        "--no_such_option 1": "no_such_option",
        "--max_steps few": "invalid int value",
        "--task gsm8k --model tiny": "knows only sudoku",
        "--device abacus": "abacus",
    }.items(),
)
def test_bad_settings_stop_at_once_with_one_sentence(wrong, said, tmp_path, monkeypatch):
    """Nothing is pretrained or written; the sentence names the setting."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        agrpo.main(wrong.split())
    assert said in stop.value.code and stop.value.code.startswith("agrpo.py: ") and "\n" not in stop.value.code
    assert not any(tmp_path.iterdir())


def test_a_run_is_never_overwritten_and_keeps_its_settings(short_run):
    """A folder with a run in it is refused as a new one's; a resumed run refuses other settings."""
    before = (short_run / "settings.json").read_text()
    for argv, said in (["--output_dir"], "not empty"), (["--seed", "3", "--resume"], "--seed is 0"):
        with pytest.raises(SystemExit, match=said):
            agrpo.main([*argv, str(short_run)])
    assert (short_run / "settings.json").read_text() == before


def test_updates_without_a_finite_gradient_are_skipped_and_then_stop_the_run(tmp_path, monkeypatch, short_run):
    """The weights stay as they were; five in a row end the run, with the last good checkpoint named."""
    whole, calls = agrpo.clipped_objective, itertools.count()
    bad = {3, 6, 7, 8, 9, 10}  # the updates, counted from 0, whose gradient is NaN
    monkeypatch.setattr(agrpo, "clipped_objective", lambda *a: whole(*a) * (math.nan if next(calls) in bad else 1.0))
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"5 updates in a row, up to update 11, .*checkpoint-6\. .*--learning_rate"):
        agrpo.main([*SHORT, *f"--max_steps 20 --save_every 2 --micro_batch 4096 --output_dir {run}".split()])
    assert [line["skipped_in_a_row"] for line in figures(run)] == [0, 0, 0, 1, 0, 0, 1, 2, 3, 4, 5]
    assert all(p.isfinite().all() for p in agrpo.load_model(str(run))[0].parameters())


def test_a_model_that_gives_nan_stops_the_run_and_keeps_its_checkpoint(tmp_path, monkeypatch, short_run):
    """All its rewards are equal, so its gradient is 0 and finite: that is no update that went well."""
    roll_out, save = agrpo.roll_out, ["--max_steps", "20", "--save_every", "1", "--output_dir", str(tmp_path / "run")]

    def breaking(model, tokenizer, mask_id, task, examples, update, args):
        if update == 3:
            next(model.parameters()).data.fill_(math.nan)
        return roll_out(model, tokenizer, mask_id, task, examples, update, args)

    monkeypatch.setattr(agrpo, "roll_out", breaking)
    with pytest.raises(SystemExit, match=r"5 updates in a row.*no finite log-probabilities.*last whole checkpoint"):
        agrpo.main([*SHORT, *save])
    assert [line["skipped_in_a_row"] for line in figures(tmp_path / "run")] == [0, 0, 0, 1, 2, 3, 4, 5]
    assert all(p.isfinite().all() for p in agrpo.load_model(str(tmp_path / "run"))[0].parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    {
        '"task": "sudoku"|"task": "chess"': "invalid choice: 'chess'",
        '"lr_schedule": "cosine"|"lr_schedule": "zz"': "invalid choice: 'zz'",
        '"k": 1|"k": 1.5': "invalid int value: '1.5'",
        '"seed": 0|"seed": 0, "more": 1': "has not the settings of this agrpo.py",
    }.items(),
)
def test_settings_that_someone_edited_are_checked_like_a_command_line(change, said, short_run, tmp_path):
    """A resumed run believes nothing that a new one would not."""
    old, new = change.split("|")
    text = (short_run / "settings.json").read_text()
    assert text.count(old + ",") == 1
    (tmp_path / "settings.json").write_text(text.replace(old + ",", new + ","))
    with pytest.raises(SystemExit, match=re.escape(said)):
        agrpo.main(["--resume", str(tmp_path)])


def test_a_run_goes_on_with_its_own_data_and_optimizer_only(short_run, tmp_path):
    """Other data, or the optimizer of another model: refused by name."""
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    (run / "base.json").write_text((run / "base.json").read_text().replace('"data": "', '"data": "other'))
    with pytest.raises(SystemExit, match="the data are not those that"):
        agrpo.main(["--resume", str(run)])
    shutil.copy(short_run / "base.json", run)
    file = run / "checkpoint-4" / "optimizer.safetensors"
    state = agrpo.load_file(file)
    agrpo.save_file(state | {"0.exp_avg": torch.zeros(3)}, file)
    with pytest.raises(SystemExit, match=r"checkpoint-4/optimizer\.safetensors is not of this model"):
        agrpo.main(["--resume", str(run)])


def test_a_full_disk_or_a_damaged_checkpoint_is_one_sentence(tmp_path, monkeypatch, short_run):
    """The last whole checkpoint stays, and the run goes on from it; a file cut short is named."""
    run, save = tmp_path / "run", agrpo.save_file

    def full(tensors, path, **options):
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device", str(path))
        save(tensors, path, **options)

    monkeypatch.setattr(agrpo, "save_file", full)
    with pytest.raises(SystemExit, match=r"No space left.*last whole checkpoint is .*checkpoint-1; .*--resume"):
        agrpo.main([*SHORT, *f"--max_steps 3 --save_every 1 --output_dir {run}".split()])
    monkeypatch.setattr(agrpo, "save_file", save)
    agrpo.main(["--resume", str(run)])
    assert [line["update"] for line in figures(run)] == [1, 2, 3] and not [*run.glob("*.part")]
    for name in ("optimizer.safetensors", "model.safetensors"):
        file = run / "checkpoint-3" / name
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(SystemExit, match=rf"{'checkpoint-3' if name[0] == 'm' else name}.*damaged"):
            agrpo.main(["--resume", str(run)])


def test_out_of_memory_is_one_sentence_and_the_resumed_run_may_have_smaller_batches(tmp_path, monkeypatch, short_run):
    """What it says works: settings that change no result can be given with --resume."""
    run, step_logps, calls = tmp_path / "run", agrpo.step_logps, itertools.count()

    def hungry(model, rollout, rows, steps, **options):
        if len(rows) > 2 and next(calls) > 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step_logps(model, rollout, rows, steps, **options)

    monkeypatch.setattr(agrpo, "step_logps", hungry)
    with pytest.raises(SystemExit, match=r"out of memory on cpu; the last whole checkpoint is .*--micro_batch"):
        agrpo.main([*SHORT, *f"--save_every 1 --output_dir {run}".split()])
    agrpo.main(["--resume", str(run), "--micro_batch", "2"])
    for ours, theirs in zip(figures(run), figures(short_run)):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


# ======================================================================================================================
# A device of one's own: what would break on a GPU, without one
# ======================================================================================================================


class Far(torch.Tensor):
    """A tensor that says it is on another device ("meta"), while its numbers lie in `here`, on the CPU."""

    @staticmethod
    def __new__(cls, here: Tensor):
        strides = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        far = torch.Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device="meta", **strides)
        far.here = here
        return far

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.here.tolist()

    def __format__(self, how: str):
        return format(self.here, how)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return far_away(func, args, kwargs or {})


class FarDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return far_away(func, args, kwargs or {})


def far_away(func, args, kwargs):
    """Run on the CPU what belongs there, as if far away; refuse what no GPU would do: to mix tensors of two devices."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far, near = [x for x in tensors if isinstance(x, Far)], [x for x in tensors if not isinstance(x, Far) and x.dim()]
    name = func._schema.name.removeprefix("aten::")
    if name in ("index", "index_put_") and isinstance(args[0], Far):  # by indices on the CPU: a GPU does that
        near = [x for x in near if name == "index_put_" and x is args[2]]
    assert not (far and near) or name in ("copy_", "_to_copy"), f"{name} of tensors on two devices"
    goes_far = bool(far)
    if kwargs.get("device") is not None:
        goes_far, kwargs = torch.device(kwargs["device"]).type == "meta", kwargs | {"device": torch.device("cpu")}
    args_here, kwargs_here = tree_map(lambda x: x.here if isinstance(x, Far) else x, (args, kwargs))
    out = func(*args_here, **kwargs_here)
    if not func._schema.returns or name.endswith("_"):
        return args[0] if func._schema.returns else None
    return tree_map(lambda x: Far(x) if isinstance(x, Tensor) and goes_far else x, out)


def send_far(model):
    for module in model.modules():
        for name, p in [*module._parameters.items()]:
            module._parameters[name] = None if p is None else torch.nn.Parameter(Far(p.detach()))
        for name, b in [*module._buffers.items()]:
            module._buffers[name] = Far(b)


@pytest.mark.parametrize("options", ["", "--method diffu_grpo", "--top_k 5 --top_p 0.9 --unmasking low_confidence"])
def test_training_on_another_device_is_training_on_the_cpu(options, tmp_path, monkeypatch, generous_sudoku):
    """Pretraining, rollouts, timesteps, both updates of a rollout, KL, metrics: nothing in them that a GPU would refuse."""
    more = "--k 2 --steps 4 --updates_per_rollout 2 --beta 0.1 --micro_batch 3 --eval_every 2 "
    more += "--learning_rate 1e-6 --pretrain_learning_rate 1e-6"
    args = agrpo.parse_settings([*SHORT, *more.split(), *options.split()])
    task, generator, lines = agrpo.TASKS["sudoku"], agrpo.seeded_generator, {}
    examples = task.examples("train", args)[:8]
    monkeypatch.setattr(agrpo, "seeded_generator", lambda device, *key: generator("cpu", *key))
    monkeypatch.setattr(agrpo, "save_training_state", lambda *_: None)
    for where in ("cpu", "meta"):
        torch.manual_seed(0)
        model, tokenizer, mask_id = agrpo.load_model("tiny")
        args.output_dir = str(tmp_path / where)
        (tmp_path / where).mkdir()
        if where == "meta":
            send_far(model)
        with FarDevice():
            assert model.device.type == where
            agrpo.pretrain(model, tokenizer, mask_id, [(e["puzzle"], e["solution"]) for e in examples], args)
            agrpo.train(model, tokenizer, mask_id, task, examples, examples, args, ref_model=model)
        lines[where] = figures(tmp_path / where)
    for here, there in zip(lines["cpu"], lines["meta"], strict=True):
        assert here == pytest.approx(there, rel=1e-2, abs=1e-4)


# ======================================================================================================================
# Tasks
# ======================================================================================================================


def test_sudoku_has_288_grids_and_tests_on_grids_never_trained_on():
    """240 grids to train on, 48 others to test on, whatever the seed; each puzzle: 10 to 14 blanks, a solution."""
    task = agrpo.TASKS["sudoku"]
    train, test = (task.examples(split, agrpo.Settings(seed=5)) for split in ("train", "test"))
    seen, held_out = ({example["solution"] for example in part} for part in (train, test))
    assert (len(seen), len(held_out), len(seen | held_out)) == (240, 48, 288)
    assert test == task.examples("test", agrpo.Settings(seed=6)) and train != task.examples("train", agrpo.Settings())
    for example in train + test:
        assert 10 <= example["puzzle"].count("0") <= 14 and agrpo.sudoku_right(example, example["solution"])


def test_a_sudoku_answer_must_be_a_grid_that_keeps_the_clues():
    """Any grid that fits is right; a grid that changes a clue earns nothing; a wrong one earns its share of units."""
    example = {"puzzle": "0310200404001043"}
    task = replace(agrpo.TASKS["sudoku"], credit=agrpo.sudoku_credit)
    assert task.reward(example, "4312213434211243", chat=False) == 2
    assert task.reward(example, "1234341221434321", chat=False) == 0
    assert 0 < task.reward(example, "4312213434211143", chat=False) < 1
    late = "4312213434211243" + " " * 100 + "and more"  # too long is wrong, not cut short
    for nonsense in ("", late, "4312", "4312213434211243" * 2, "\ud800" * 16, "٤٣١٢٢١٣٤٣٤٢١١٢٤٣"):
        assert task.reward(example, nonsense, chat=False) == 0
    asked = agrpo.sudoku_question({"puzzle": "0" * 16})  # the example in the prompt must not mislead
    puzzle, grid = re.search("For example, ([0-4 ]+) is", asked)[1].replace(" ", ""), re.search("[1-4]{16}", asked)[0]
    assert agrpo.sudoku_right({"puzzle": puzzle}, grid)


def test_sudoku_files_keep_their_leading_zeros_and_bad_rows_are_named(tmp_path):
    """A CSV read as numbers would lose the zeros; one that has lost them is refused with its row."""
    file = tmp_path / "puzzles.csv"
    file.write_text("Puzzle,Solution\n0310200404001043,4312213434211243\n1002020100030310,1432324141232314\n")
    read = agrpo.TASKS["sudoku"].examples("test", agrpo.Settings(data=str(file)))
    assert [example["puzzle"] for example in read] == ["0310200404001043", "1002020100030310"]
    file.write_text("Puzzle,Solution\n1002020100030310,1432324141232314\n310200404001043,4312213434211243\n")
    with pytest.raises(ValueError, match=r"row 2.*310200404001043"):
        agrpo.TASKS["sudoku"].examples("test", agrpo.Settings(data=str(file)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"Question,answer\n1,2\n", "row 1: no question; it has Question, answer"),
        ("a.csv", b"question,answer\nq,#### 5\nq\n", "row 2: answer is empty or not text: None"),
        ("a.csv", "question,answer\ncaf\xe9,#### 5\n".encode("latin-1"), "not readable as .csv in UTF-8"),
        ("a.csv", b'question,answer\n"q,#### 5\n', "unexpected end of data"),
        ("a.csv", b"question,answer\n", "no rows in it"),
        ("a.jsonl", b"", "no rows in it"),
        ("a.jsonl", b'{"question": "q", "answer": "#### 5"}\n{"question": "q", "answer": ', "line 2: Expecting value"),
        ("a.jsonl", b'{"question": "q", "answer": "#### 5"}\n{"question": "q"}', "row 2: no answer; it has question"),
        ("a.jsonl", b'{"question": null, "answer": "#### 5"}', "row 1: question is empty or not text: None"),
        ("a.jsonl", b'{"question": ["q"], "answer": "#### 5"}', "row 1: question is empty or not text"),
        ("a.jsonl", b'{"question": "q", "answer": "five"}', "row 1: its answer does not end in #### and a number"),
        ("a.jsonl", '{"question": "q", "answer": "#### 5"}'.encode("utf-16"), "not readable as .jsonl in UTF-8"),
        ("a.json", b'{"data": []}', "row 1: no question and no answer; it has data"),
        ("a.json", b"[" * 100_000, "not readable as .json"),
        ("a.parquet", b"nonsense", "not readable as .parquet"),
        ("a.csv", b"question,answer\nq,#### 1,234\n", "row 1: more values than columns: ['234']"),
        ("a.jsonl", b'{"question": NaN, "answer": "#### 5"}', "row 1: question is empty or not text: nan"),
        ("a.jsonl", b'{"question": "\\ud800", "answer": "#### 5"}', "row 1: question holds half a character"),
        ("a.txt", b"q", "give a .jsonl, .json, .csv or .parquet file"),
        ("testimony.jsonl", None, "should hold one test.jsonl"),
        ("test.jsonl", None, None),
        ("test-00000-of-00001.jsonl", None, None),
    ],
)
def test_data_that_are_not_what_they_should_be_are_named(name, content, said, tmp_path):
    """The file and the row, in one sentence; nothing is skipped. With content None it is a folder that is given."""
    row = b'\xef\xbb\xbf{"question": "q\xe2\x80\xa8", "answer": "#### 5"}\n\n'  # a byte order mark, a line separator
    (tmp_path / name).write_bytes(row if content is None else content)
    settings = agrpo.Settings(task="gsm8k", data=str(tmp_path if content is None else tmp_path / name))
    if said is None:
        assert agrpo.TASKS["gsm8k"].examples("test", settings)[0]["question"] == "q\u2028"
        return
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        agrpo.TASKS["gsm8k"].examples("test", settings)
    assert str(settings.data) in str(refused.value) and "\n" not in str(refused.value)


def test_one_file_is_not_both_trained_and_tested_on(tmp_path, monkeypatch):
    """gsm8k and math, where --data has both: one file serves to measure only. MATH is measured on level 5 too."""
    monkeypatch.setattr(agrpo, "math_verify", lambda: None)
    for task, row in (
        ("gsm8k", {"question": "q", "answer": "#### 5"}),
        ("math", {"problem": "p", "solution": "\\boxed{5}", "level": "Level 5"}),
    ):
        (tmp_path / "test.jsonl").write_text(json.dumps(row))
        settings = agrpo.Settings(task=task, data=str(tmp_path / "test.jsonl"))
        assert len(agrpo.TASKS[task].examples("test", settings)) == 1
        with pytest.raises(ValueError, match=r"test\.jsonl: give a folder of train"):
            agrpo.TASKS[task].examples("train", settings)


GSM8K = {"gold": "1,234"}


@pytest.mark.parametrize(
    "answer",
    [
        "1234",
        "1,234",
        "$1,234.00",
        "1234.",
        r"\boxed{1234}",
        r"\boxed{1,234} apples",
        "**1234**",
        "= 1234 km",
        r"\$1234",
        "1234%",
        "1{,}234",
        "$1234$",
        "1234.000",
        "T-shirts: 1234",
    ],
)
def test_gsm8k_answers_are_compared_as_numbers(answer):
    """However it is written, the right number is right, and its negative or its double is wrong."""
    assert agrpo.gsm8k_right(GSM8K, answer)
    if answer.lstrip("$")[0].isdigit():
        for minus in ("-", "\u2013", "- ", "-$"):  # an en dash too
            assert not agrpo.gsm8k_right(GSM8K, minus + answer.lstrip("$"))
            assert agrpo.gsm8k_right({"gold": "-1,234"}, minus + answer.lstrip("$"))
    assert not agrpo.gsm8k_right({"gold": "-1234"}, answer) and not agrpo.gsm8k_right({"gold": "2468"}, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "1234 1234",
        "1233 or 1234",
        "1 234",
        "-(1234)",
        "01,234",
        "12,34",
        "1234/1",
        r"\boxed{1234} \boxed{1}",
        "x",
        "1234" * 99,
        "١٢٣٤",
        "1234²",
        "1234½",
        "12$34",
        r"12\34",
    ],
)
def test_gsm8k_refuses_what_is_not_one_number(answer):
    """None, several, or an endless one: wrong."""
    assert not agrpo.gsm8k_right(GSM8K, answer)


def test_math_answers_count_inside_the_box_only():
    """Where math-verify is installed: what stands around \\boxed{} is no answer, and a bomb is a wrong one, soon."""
    pytest.importorskip("math_verify")
    example = {"solution": r"So it is $\boxed{42}$."}
    assert agrpo.math_right(example, r"\boxed{42}") and agrpo.math_right(example, r"It is \boxed{\frac{84}{2}}")
    for wrong in (r"42 \boxed{}", r"\boxed{?} 42", r"\boxed{41}. The final answer is $42$.", "42", r"\boxed{9^{9^9}}"):
        assert not agrpo.math_right(example, wrong), wrong


def test_countdown_expressions_are_parsed_exactly_and_never_run():
    """Each number once, four operations, exact fractions; anything else is a wrong answer, not an error."""
    example = {"numbers": [30, 100, 93], "target": 23}
    assert agrpo.countdown_right(example, "30 + 93 - 100") and agrpo.countdown_right(example, "(93-100)\n+ 30 = 23")
    assert agrpo.countdown_right({"numbers": [8, 3, 8, 3], "target": 24}, "8/(3-8/3)")
    wrong = [
        "23",
        "30+93-100+0",
        "30+93-100=24",
        "3093-100",
        "30+93",
        "30--93+100",
        "30**93",
        "30//93",
        "1/0",
        "(" * 90,
    ]
    wrong += [
        "30+93-100" * 99,
        "__import__('os')",
        "",
        "30+93-1_00",
        "３０+93-100",
        "30(93)100",
        "-100+30+93",
        "1e2-30-93",
    ]
    for answer in wrong:
        assert not agrpo.countdown_right(example, answer), answer
    assert not agrpo.countdown_right(example, "30 + 93 - 100" + " " * 200 + "or so")  # too long is wrong, not cut short
    assert agrpo.arithmetic("1/0") is None and agrpo.arithmetic("1/3") == Fraction(1, 3)
    for split in ("train", "test"):
        for problem in agrpo.TASKS["countdown"].examples(split, agrpo.Settings(task="countdown"))[:50]:
            assert len(problem["numbers"]) == 3 and 0 < problem["target"] < 1000


def test_rewards_count_tags_once_and_only_a_right_answer_scores_full_marks():
    """3 for the answer, 0.5 for each pair of tags; a pair written twice, or the wrong way round, is none."""
    task, example = agrpo.TASKS["countdown"], {"numbers": [1, 2, 3], "target": 9}
    right = "<reasoning>r</reasoning><answer>(1 + 2) * 3</answer>"
    for completion, reward in {
        right: 4.0,
        right.replace("* 3", "* 4"): 1.0,
        "<answer>(1 + 2) * 3</answer>": 3.5,
        "(1 + 2) * 3": 0.0,
        right + "<answer>9</answer>": 0.5,
        "</answer>(1 + 2) * 3<answer>": 0.0,
        "<answer>" * 1000 + "(1+2)*3" + "</answer>" * 1000: 0.0,
    }.items():
        assert task.reward(example, completion, chat=True) == reward, completion


# ======================================================================================================================
# Models
# ======================================================================================================================


def chat_tokenizer():
    tokenizer = agrpo.character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    return tokenizer


def llada_checkpoint(folder, width=32, layers=2, heads=4, kv_heads=2, vocabulary=128):
    """A small random checkpoint as GSAI-ML/LLaDA-8B-Instruct's is laid out: its config, its names, a chat template."""
    folder.mkdir(parents=True)
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder)
    raw = {"model_type": "llada", "architectures": ["LLaDAModelLM"], "block_type": "llama", "activation_type": "silu"}
    raw |= {"auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}}
    raw |= {
        "d_model": width,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "mlp_hidden_size": 3 * width,
    }
    raw |= {"vocab_size": vocabulary, "embedding_size": vocabulary, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    raw |= {"max_sequence_length": 2048, "weight_tying": False, "layer_norm_type": "rms", "rope": True, "alibi": False}
    raw |= {"include_bias": False, "mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(raw))
    narrow, top, generator = width // heads * kv_heads, "model.transformer.", torch.Generator().manual_seed(0)
    shapes = {f"{top}wte": (vocabulary, width), f"{top}ln_f": (width,), f"{top}ff_out": (vocabulary, width)}
    for i in range(layers):
        block = f"{top}blocks.{i}."
        shapes |= {block + "attn_norm": (width,), block + "ff_norm": (width,), block + "ff_out": (width, 3 * width)}
        shapes |= {block + name: (3 * width, width) for name in ("ff_proj", "up_proj")}
        shapes |= {block + "q_proj": (width, width), block + "attn_out": (width, width)}
        shapes |= {block + name: (narrow, width) for name in ("k_proj", "v_proj")}
    weights = {f"{name}.weight": 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    agrpo.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def dream_checkpoint(folder):
    """A small random checkpoint as Dream-org/Dream-v0-Instruct-7B's is laid out: Qwen2's names, a BPE tokenizer."""
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 257, "use_cache": False}
    raw |= {"auto_map": {"AutoModel": "modeling_dream.DreamModel"}}
    (folder / "config.json").write_text(json.dumps(raw))
    letters = [*bytes_to_unicode().values()]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"256": "<|endoftext|>", "257": "<|mask|>"}
    added = {i: {"content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
             for i, text in special.items()}  # fmt: skip
    tokenizer = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    }
    tokenizer |= {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_llada_loads_as_a_llama_and_is_saved_under_its_own_names(tmp_path):
    """Every weight arrives; attention looks both ways; saving gives LLaDA's names and config back, and loads again."""
    weights = llada_checkpoint(tmp_path / "llada")
    model, tokenizer, mask_id = agrpo.load_model(str(tmp_path / "llada"))
    assert mask_id == tokenizer.mask_token_id and type(model).__name__ == "LlamaForCausalLM"
    ids = torch.randint(5, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    logits, changed = model(ids).logits, ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 100
    assert not torch.allclose(logits[0, 0], model(changed).logits[0, 0])  # the first position sees the last
    agrpo.save_model(model, tokenizer, tmp_path / "saved")
    saved = agrpo.load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)
    again, _, _ = agrpo.load_model(str(tmp_path / "saved"))
    assert torch.equal(again(ids).logits, logits)


@pytest.mark.parametrize("change", ["missing", "unexpected", "model_type", "bias"])
def test_a_checkpoint_that_is_not_what_it_should_be_is_refused_by_name(change, tmp_path):
    """Missing or unexpected weights, another architecture, an option a Llama has not: an error that names it."""
    weights, folder = llada_checkpoint(tmp_path / "llada"), tmp_path / "llada"
    raw = json.loads((folder / "config.json").read_text())
    if change == "missing":
        del weights["model.transformer.blocks.1.k_proj.weight"]
    if change == "unexpected":
        weights["model.transformer.blocks.1.extra.weight"] = torch.zeros(3)
    if change == "model_type":
        raw["model_type"] = "gpt2"
    if change == "bias":
        raw["include_qkv_bias"] = True
    (folder / "config.json").write_text(json.dumps(raw))
    agrpo.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = {
        "missing": "missing keys.*k_proj",
        "unexpected": "unexpected keys.*extra",
        "model_type": "gpt2",
        "bias": "qkv_bias",
    }
    with pytest.raises(ValueError, match=said[change]):
        agrpo.load_model(str(folder))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "{", "not readable as a JSON object"),
        ("config.json", "[1]", "not readable as a JSON object"),
        ("config.json", '{"model_type": "bert", "hidden_size": -5}', "describes no model"),
        ("config.json", '{"model_type": "bert", "num_attention_heads": 0}', "describes no model"),
        ("config.json", '{"model_type": "gpt2"}', "'gpt2' model"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"x": "../../secret.safetensors"}}',
            "not .safetensors in its folder",
        ),
        ("config.json", {"n_heads": "4"}, "describes no model"),
        ("config.json", {"mask_token_id": 128}, "mask_token_id is 128"),
        ("config.json", {"mask_token_id": "x"}, "mask_token_id is 'x'"),
        ("model.safetensors", "__import__('os').system('true')", "missing or damaged"),
        ("tokenizer.json", "", "tokenizer missing or damaged"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer missing or damaged"),
        ("tokenizer_config.json", "[" * 10**5, "tokenizer missing or damaged"),
        ("tokenizer_config.json", "[1]", "tokenizer missing or damaged"),
        ("tokenizer_config.json", "{}", "names no eos_token"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../other.json"]}, "names files to read"),
        ("model.safetensors.index.json", '{"weight_map": {"x": "evil.bin"}}', "not .safetensors in its folder"),
        ("config.json", {"n_layers": 10**9}, "1000000000 layers"),
        ("adapter_config.json", '{"r": 4}', "does not give base_model_name_or_path"),
        (
            "adapter_config.json",
            '{"base_model_name_or_path": "X", "r": 4, "lora_alpha": 4, "peft_type": "LORA"}',
            "is an adapter itself",
        ),
        ("adapter_config.json", '{"base_model_name_or_path": "X", "r": -4, "lora_alpha": 4}', "does not give"),
        (
            "adapter_config.json",
            '{"base_model_name_or_path": "Y", "r": 4, "lora_alpha": 4, "peft_type": "LORA"}',
            "no such folder",
        ),
    ],
)
def test_a_checkpoint_that_was_tampered_with_is_only_refused(file, content, said, tmp_path):
    """Nothing in it is run, nothing outside its folder is read, nothing goes round in circles."""
    llada_checkpoint(tmp_path / "llada")
    if isinstance(content, dict):  # what to change
        content = json.dumps(json.loads((tmp_path / "llada" / file).read_text()) | content)
    (tmp_path / "llada" / file).write_text(content.replace("X", str(tmp_path / "llada")))
    with pytest.raises(ValueError, match=re.escape(said)):
        agrpo.load_model(str(tmp_path / "llada"))


def test_dream_reads_its_logits_one_place_to_the_left(tmp_path):
    """logits_at hands out, for position i, what Dream computes at i - 1; the tokenizer loads without remote code."""
    dream_checkpoint(tmp_path / "dream")
    model, tokenizer, mask_id = agrpo.load_model(str(tmp_path / "dream"))
    assert mask_id == 257 and tokenizer.eos_token_id == 256 and tokenizer("ab")["input_ids"] != []
    ids, positions = torch.arange(12).view(2, 6), torch.tensor([[1, 5], [3, 2]])
    expected = model(ids).logits.gather(1, (positions - 1)[..., None].expand(-1, -1, 300))
    torch.testing.assert_close(agrpo.logits_at(model, ids, None, positions), expected)
    agrpo.save_model(model, tokenizer, tmp_path / "saved")
    again, _, mask_id = agrpo.load_model(str(tmp_path / "saved"))
    assert mask_id == 257 and torch.equal(agrpo.logits_at(again, ids, None, positions), expected)


def test_lora_starts_as_the_model_itself_and_is_saved_loaded_and_merged(tmp_path):
    """New: no change. Trained: the adapter's folder loads to the same logits; merged: the same to rounding."""
    llada_checkpoint(tmp_path / "llada")
    model, tokenizer, _ = agrpo.load_model(str(tmp_path / "llada"))
    ids = torch.arange(18).view(2, 9)
    before = model(ids).logits
    agrpo.add_lora(model, r=4, alpha=8.0)
    assert torch.equal(model(ids).logits, before)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert len(agrpo.lora_layers(model)) == 2 * 7
    for layer in agrpo.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    after = model(ids).logits
    assert not torch.allclose(after, before)
    agrpo.save_model(model, tokenizer, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again, tokenizer, _ = agrpo.load_model(str(tmp_path / "adapter"))
    assert torch.equal(again(ids).logits, after)
    agrpo.save_model(agrpo.merge_lora(again), tokenizer, tmp_path / "merged")
    merged, _, _ = agrpo.load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    with pytest.raises(SystemExit, match=r"adapter is a LoRA adapter: merge it first"):  # not: LoRA on top of LoRA
        agrpo.main(["--task", "countdown", "--model", str(tmp_path / "adapter"), "--device", "cpu"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for change, said in ({"r": 8}, r"not this model's: .*lora_A.*\(4, "), ({"use_rslora": True}, "not plain LoRA"):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=said):
            agrpo.load_model(str(tmp_path / "adapter"))


LLADA_RUN = (
    "--max_steps 2 --prompts_per_update 2 --group_size 2 --rollout_batch 2 --k 2 --completion_length 12 --steps 4 "
)
LLADA_RUN += (
    "--block_length 6 --eval_steps 4 --eval_completion_length 12 --eval_block_length 6 --eval_examples 2 --lora_rank 2"
)


@pytest.mark.parametrize("task, earns", [("gsm8k", True), ("gsm8k", False), ("countdown", True), ("sudoku", True)])
def test_a_llada_checkpoint_trains_with_lora_on_each_task(task, earns, tmp_path, monkeypatch):
    """Chat prompts, release settings cut short, data from a file: to the end, and an adapter that loads.

    A random model earns nothing, so there is nothing to learn and no pass is made; or all rewards differ.
    """
    llada_checkpoint(tmp_path / "llada")
    data = {
        "gsm8k": ("train.jsonl", '{"question": "How much is 1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}\n' * 4),
        "countdown": ("test.jsonl", '{"input": "30,100,93", "output": "23"}\n' * 4),
        "sudoku": ("test.csv", "Puzzle,Solution\n0310200404001043,4312213434211243\n"),
    }[task]
    (tmp_path / data[0]).write_text(data[1])
    if task == "gsm8k":
        (tmp_path / "test.jsonl").write_text(data[1])
    where = tmp_path if task == "gsm8k" else tmp_path / data[0]
    if earns:
        rewards = iter(range(1000))
        monkeypatch.setattr(agrpo.Task, "grade", lambda *_: (next(rewards), False))
    argv = f"--task {task} --model {tmp_path / 'llada'} --data {where} --device cpu --output_dir {tmp_path / 'run'} {LLADA_RUN}"
    agrpo.main(argv.split())
    assert [line["passes"] for line in figures(tmp_path / "run")] == [8 * earns] * 2
    model, _, _ = agrpo.load_model(str(tmp_path / "run"))
    assert any(layer.lora_B.abs().sum() > 0 for layer in agrpo.lora_layers(model).values()) == earns


def test_away_from_the_hub_one_sentence_says_what_would_work(tmp_path, monkeypatch):
    """No network, nothing cached: no retries, no traceback."""

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(agrpo.HfApi, "repo_info", unreachable)
    monkeypatch.setattr(agrpo, "snapshot_download", partial(agrpo.snapshot_download, cache_dir=tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"hub cannot be reached.*--data FOLDER.*HF_HOME.*python agrpo.py"):
        agrpo.main(["--task", "gsm8k", "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"hub cannot be reached.*--model FOLDER"):
        agrpo.main(["--task", "countdown", "--device", "cpu"])
    monkeypatch.setattr(agrpo.HfApi, "repo_info", lambda *_, **__: mock.Mock(safetensors=None))
    monkeypatch.setattr(agrpo, "snapshot_download", mock.Mock(side_effect=OSError("403: access is restricted")))
    with pytest.raises(SystemExit, match=r"GSAI-ML/LLaDA-8B-Instruct: not downloaded: 403: access is restricted"):
        agrpo.main(["--task", "countdown", "--device", "cpu"])
    with pytest.raises(ValueError, match="too many for a CPU"):
        agrpo.refuse_on_cpu("GSAI-ML/LLaDA-8B-Instruct", 8_000_000_000, "cpu")


def gradient_of_a_share(rank: int, world: int, port: int, folder: str) -> None:
    """One of `world` processes: the averaged gradient of its share of one rollout, written to a file by rank 0."""
    torch.set_num_threads(1)
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.manual_seed(0)
    model, _, mask_id = agrpo.load_model("tiny")
    prompt = torch.randint(4, 90, (8, 16), generator=torch.Generator().manual_seed(1))
    sampling = {"completion_length": 8, "block_length": 8, "steps": 4, "temperature": 1.0, "unmasking": "random"}
    rng = torch.Generator().manual_seed(2)
    rollout = agrpo.sample(model, prompt, prompt > 0, mask_id=mask_id, eos_id=None, generator=rng, **sampling)
    advantage = torch.tensor(
        [1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    )  # with two processes, the second has nothing to do
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    mine = agrpo.Rollout(*(getattr(rollout, f.name)[share] for f in fields(agrpo.Rollout) if f.name != "kept"))
    agrpo.policy_gradient(model, mine, advantage[share], k=4, mask_id=mask_id, temperature=1.0, on_policy=True)
    agrpo.average_gradients(model)
    if rank == 0:
        gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        agrpo.save_file(gradient, f"{folder}/gradient-{world}.safetensors")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Each takes half of the rows, and one half has no advantage at all: the average is the gradient of the whole."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gradient_of_a_share(0, 1, port, str(tmp_path))
    torch.multiprocessing.spawn(gradient_of_a_share, args=(2, port, str(tmp_path)), nprocs=2)
    one, two = (agrpo.load_file(tmp_path / f"gradient-{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


# ======================================================================================================================
# eval.py: accuracy against sampling steps
# ======================================================================================================================

TRAINED_WITH = ["--unmasking", "random", "--temperature", "1"]


def solved(puzzle: str, grid: str) -> bool:
    """Whether a 4x4 grid keeps the clues and every row, column and box has 1 to 4: written apart from agrpo's."""
    if len(grid) != 16 or not all(clue in "0" + cell for clue, cell in zip(puzzle, grid)):
        return False
    lines = [grid[i : i + 4] for i in (0, 4, 8, 12)] + [grid[i::4] for i in range(4)]
    lines += [grid[i : i + 2] + grid[i + 4 : i + 6] for i in (0, 2, 8, 10)]
    return all("".join(sorted(line)) == "1234" for line in lines)


@pytest.fixture(scope="module")
def half_known(tmp_path_factory, generous_sudoku):
    """A folder with a model that knows 8 of 24 puzzles by heart, a run of training on top of it, and the puzzles.

    A model that has learned nothing would have accuracy 0 everywhere, and equal figures would say nothing."""
    folder = tmp_path_factory.mktemp("curve")
    examples = agrpo.TASKS["sudoku"].examples("test", agrpo.Settings())[:24]
    rows = [f"{example['puzzle']},{example['solution']}\n" for example in examples]
    (folder / "puzzles.csv").write_text("Puzzle,Solution\n" + "".join(rows))
    torch.manual_seed(0)
    model, tokenizer, mask_id = agrpo.load_model("tiny")
    known = [(example["puzzle"], example["solution"]) for example in examples[:8]]
    agrpo.pretrain(model, tokenizer, mask_id, known, agrpo.Settings(pretrain_steps=150, pretrain_batch=16))
    agrpo.save_model(model, tokenizer, folder / "base")
    argv = f"--model {folder / 'base'} --data {folder / 'puzzles.csv'} --output_dir {folder / 'run'} --device cpu "
    argv += (
        "--max_steps 2 --learning_rate 2e-3 --prompts_per_update 2 --group_size 4 --rollout_batch 8 --eval_steps 4 2 1 "
    )
    agrpo.main((argv + "--eval_batch 10").split())
    return folder


def measured(folder, into, *more, base=True):
    """eval.py on the run in half_known's folder: (what --output wrote, the lines that --save wrote)."""
    argv = [str(folder / "run"), "--data", str(folder / "puzzles.csv"), "--device", "cpu", "--batch", "10"]
    argv += ["--save", str(into / "all.jsonl"), "--output", str(into / "results.json"), "--steps", "4", "2", "1"]
    curve.main([*argv, *(["--base", str(folder / "base")] if base else []), *more])
    lines = [json.loads(line) for line in (into / "all.jsonl").read_text().splitlines()]
    return json.loads((into / "results.json").read_text()), lines


@pytest.mark.parametrize("sampler", ["greedy", "as trained"])
def test_eval_gives_the_figures_that_training_printed(sampler, half_known, tmp_path):
    """Base and trained, at every number of steps: the same numbers, not nearly the same."""
    found, _ = measured(half_known, tmp_path, *(TRAINED_WITH if sampler == "as trained" else []))
    training = json.loads((half_known / "run" / "results.json").read_text())
    shares = []
    for name, theirs in ("base", "base"), ("trained", "AGRPO"):
        ours = {steps: figures["accuracy"] for steps, figures in found["results"][name].items()}
        assert ours == training[theirs][sampler]
        shares += ours.values()
    assert any(0 < share < 1 for share in shares)
    assert found["arguments"]["steps"] == [4, 2, 1] and found["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("samples", [1, 3])
def test_eval_counts_what_it_saved(samples, half_known, tmp_path):
    """Accuracy, pass@N, majority vote, length and tokens a pass, counted again from the saved completions alone."""
    more = [*TRAINED_WITH, "--samples", "3", "--seeds", "0", "1"] if samples > 1 else []
    found, lines = measured(half_known, tmp_path, *more)
    assert len(lines) == 2 * 3 * 24 * samples * (2 if more else 1)
    assert all(line["correct"] == solved(line["prompt"], line["completion"]) for line in lines)
    for name in ("base", "trained"):
        for steps in (4, 2, 1):
            mine = [line for line in lines if (line["model"], line["steps"]) == (name, steps)]
            figures, right = found["results"][name][str(steps)], [solved(r["prompt"], r["completion"]) for r in mine]
            assert figures["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-12)
            assert figures["interval"][0] < figures["accuracy"] < figures["interval"][1] or figures["accuracy"] in (
                0,
                1,
            )
            assert figures["tokens_per_pass"] == 16 / steps
            characters = sum(len(r["completion"]) for r in mine) / len(mine)
            assert characters <= figures["length"] <= min(16, characters + 0.5)  # a special token has no characters
            if more:
                groups = {(r["seed"], r["example"]): [] for r in mine}
                for r in mine:
                    groups[r["seed"], r["example"]].append(r["completion"])
                puzzle = {r["example"]: r["prompt"] for r in mine}
                assert {len(group) for group in groups.values()} == {3} and len(groups) == 48
                any_right = [any(solved(puzzle[e], c) for c in group) for (_, e), group in groups.items()]
                elected = [solved(puzzle[e], max(group, key=group.count)) for (_, e), group in groups.items()]
                assert figures["pass@3"] == pytest.approx(sum(any_right) / 48)
                assert figures["majority@3"] == pytest.approx(sum(elected) / 48)
                of_seed = [[solved(r["prompt"], r["completion"]) for r in mine if r["seed"] == seed] for seed in (0, 1)]
                assert figures["by_seed"] == pytest.approx([sum(part) / len(part) for part in of_seed])


def test_wilson_intervals_by_hand():
    """Against the closed form worked out by hand, with z = 1.959964; never outside 0 to 1."""
    for right, n, low, high in (0, 10, 0, 0.277533), (8, 10, 0.490162, 0.943318), (50, 100, 0.403832, 0.596168):
        assert curve.wilson(right / n, n) == pytest.approx((low, high), abs=1e-6)
        assert curve.wilson(1 - right / n, n) == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_majority_votes_compare_numbers_as_numbers():
    """1,234 and $1234 are one candidate; no answer is no vote; of two that tie the earlier wins."""
    said = lambda *answers: [{"answer": answer, "correct": answer in ("1,234", "$1234", "(1+2)")} for answer in answers]
    assert curve.vote(said("7", "1,234", "$1234"), "gsm8k") and not curve.vote(said("7", "1,234", "$1234"), "countdown")
    assert curve.vote(said(None, None, "(1+2)"), "countdown") and not curve.vote(said(None, None), "countdown")
    assert curve.vote(said("1,234", "8"), "gsm8k") and not curve.vote(said("8", "1,234"), "gsm8k")
    assert not curve.vote(said("no number", "no number", "8", "1,234"), "gsm8k")


def grids(printed: str) -> list[list[str]]:
    """What --show printed: for each example the completion after each step, read off the right half of each grid."""
    shown = []
    for block in printed.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("Example"):
            shown.append([])
        if lines and lines[0].startswith("  step"):
            shown[-1].append("".join(line.rpartition("   ")[2].replace(" ", "") for line in lines[1:]))
    return shown


@pytest.mark.parametrize("how", [[], TRAINED_WITH])
def test_show_fills_in_each_position_once_and_ends_in_the_completion(how, half_known, tmp_path, capsys):
    """Masks only ever become what they are at the end, as many a step as the sampler filled in; then the verdict."""
    _, lines = measured(half_known, tmp_path, "--show", "2", *how, base=False)
    printed = capsys.readouterr().out
    shown = grids(printed)
    assert len(shown) == 2 and "\033" not in printed
    for example, frames in enumerate(shown):
        line = next(line for line in lines if line["steps"] == 4 and line["example"] == example)
        assert [frame.count("░") for frame in frames] == [12, 8, 4, 0] and frames[-1] == line["completion"]
        for i in range(16):
            seen = [frame[i] for frame in frames]
            assert seen == ["░"] * seen.count("░") + [frames[-1][i]] * (4 - seen.count("░"))
    verdicts = [solved(line["prompt"], line["completion"]) for line in lines if line["steps"] == 4][:2]
    assert [line.strip() == "right" for line in printed.splitlines() if line.strip() in ("right", "wrong")] == verdicts


def test_show_highlights_what_is_new_on_a_terminal_only(capsys, monkeypatch):
    """The same text once the highlighting is taken away; each position highlighted once; a row that ended early shows
    no mask that nothing will ever fill."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    record = {"example": 0, "prompt": "q", "passes": 2, "correct": False, "answer": None, "step": [1, 0, -1]}
    record |= {"pieces": ["ab\n", "·", "·"]}
    states = list(curve.replay(record["pieces"], record["step"]))
    assert states == [[("░", False), ("·", True)], [("ab\n", True), ("·", False)]]
    curve.show(agrpo.TASKS["gsm8k"], {}, record, chat=True, terminal=False)
    plain = capsys.readouterr().out
    curve.show(agrpo.TASKS["gsm8k"], {}, record, chat=True, terminal=True)
    coloured = capsys.readouterr().out
    assert coloured.count("\033[1;7m") == coloured.count("\033[0m") == 2 and "\033" not in plain
    assert coloured.replace("\033[1;7m", "").replace("\033[0m", "") == plain
    assert curve.visible("") == "·" and "\033" not in curve.visible("\033[2J")


def test_table_and_bars_mark_where_intervals_part(capsys, monkeypatch):
    """Hand-made figures: a mark beside the steps whose intervals do not overlap, and bars as long as the figures."""
    rest = {"tokens_per_pass": 4.0, "length": 16.0, "seconds": 1.0}
    figures = lambda p, low, high: {"accuracy": p, "interval": (low, high)} | rest
    results = {"base": {"4": figures(0.5, 0.4, 0.6), "1": figures(0.1, 0.04, 0.2)}}
    results |= {"trained": {"4": figures(0.6, 0.5, 0.7), "1": figures(0.5, 0.4, 0.6)}}
    options = curve.Options(steps=[4, 1])
    curve.print_table(results, options)
    table = capsys.readouterr().out.splitlines()
    assert [line.endswith("*") for line in table if line.strip()[:2] in ("4 ", "1 ")] == [False, True]
    curve.print_bars(results, width=50)
    bars = [line for line in capsys.readouterr().out.splitlines() if line.endswith("00")]
    assert [(bar.count("█"), bar.count("▒"), bar.count("·")) for bar in bars] == [
        (20, 10, 20), (25, 10, 15), (2, 8, 40), (20, 10, 20)
    ]  # fmt: skip
    figure = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "matplotlib", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", mock.MagicMock(Figure=figure))
    curve.plot(results, "title", "curve.png")
    drawn = figure.return_value.subplots.return_value.errorbar.call_args_list
    assert [call.args for call in drawn] == [([4, 1], [0.5, 0.1]), ([4, 1], [0.6, 0.5])]
    assert drawn[1].kwargs["yerr"] == [pytest.approx([0.1, 0.1]), pytest.approx([0.1, 0.1])]
    assert figure.return_value.savefig.call_args.args == ("curve.png",)


def test_eval_works_on_an_adapter_and_on_a_merged_checkpoint(tmp_path, capsys):
    """The paper's protocol by default; completions are those of the model that each folder holds."""
    llada_checkpoint(tmp_path / "llada")
    model, tokenizer, _ = agrpo.load_model(str(tmp_path / "llada"))
    agrpo.add_lora(model, r=4, alpha=8.0)
    torch.manual_seed(0)
    for layer in agrpo.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    agrpo.save_model(model, tokenizer, tmp_path / "adapter")
    agrpo.save_model(agrpo.merge_lora(model), tokenizer, tmp_path / "merged")
    (tmp_path / "test.jsonl").write_text('{"input": "30,100,93", "output": "23"}\n' * 2)

    options = curve.parse_options([str(tmp_path / "adapter")])
    assert options.steps == [256, 128, 64, 32] and (options.completion_length, options.block_length) == (256, 32)
    assert (options.unmasking, options.temperature, options.samples, options.bf16) == ("low_confidence", 0, 1, True)
    argv = f"{tmp_path / 'adapter'} --base {tmp_path / 'merged'} --task countdown --data {tmp_path / 'test.jsonl'} --device cpu "
    argv += "--completion_length 12 --block_length 6 --steps 4 2 --show 1 "
    curve.main((argv + f"--save {tmp_path / 'all.jsonl'}").split())
    assert "step 4 of 4" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 2
    sampling = {"completion_length": 12, "block_length": 6, "unmasking": "low_confidence", "temperature": 0.0}
    for name, folder in ("trained", "adapter"), ("base", "merged"):
        model, tokenizer, mask_id = agrpo.load_model(str(tmp_path / folder))
        for steps in (4, 2):
            mine = [line for line in lines if (line["model"], line["steps"]) == (name, steps)]
            _, texts = agrpo.complete(
                model, tokenizer, mask_id, [r["prompt"] for r in mine], None, steps=steps, **sampling
            )
            assert [r["completion"] for r in mine] == texts and "30, 100, 93" in mine[0]["prompt"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    {
        "": "which CHECKPOINT",
        "no_such_folder": "no such folder",
        "tiny": "no weights yet",
        "BASE --base no_such_folder": "no such folder",
        "BASE --steps 17": "do not fit together",
        "BASE --steps 4 2 4": "--steps has 4 twice",
        "BASE --steps few": "invalid int value",
        "BASE --seeds 0 1": "--seeds: at temperature 0",
        "BASE --samples 4": "--samples: at temperature 0",
        "BASE --samples 0": "--samples must be from 1 to 1,000,000",
        "BASE --temperature nan": "--temperature must be from 0 to 1,000,000",
        "BASE --top_p 0": "--top_p must be above 0",
        "BASE --task gsm8k": "knows only sudoku",
        "BASE --data no_such_file.csv": "no such file",
        "BASE --completion_length 256 --block_length 256": "128 positions",
        "BASE --device abacus": "abacus",
        "BASE --no_such_option 1": "no_such_option",
        "BASE --save old": "--save old is there already",
        "BASE --output old": "--output old is there already",
        "BASE --plot old": "--plot old is there already",
        "BASE --output no/such/results.json": "no such folder",
        "BASE --plot curve.docx": ".png",
        "BASE --plot curve.png": "pip install matplotlib",
    }.items(),
)
def test_eval_refuses_in_one_sentence(wrong, said, half_known, tmp_path, monkeypatch):
    """Before any work; nothing is written, and nothing that is there is touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    Path("old").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        curve.main(wrong.replace("BASE", str(half_known / "base")).split())
    assert said in stop.value.code and stop.value.code.startswith("eval.py: ") and "\n" not in stop.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and Path("old").read_text() == "precious"


def test_two_processes_share_out_the_examples_and_count_each_once(half_known, tmp_path):
    """torchrun with two processes writes, line for line, what one process writes."""
    argv = [str(half_known / "run"), "--data", str(half_known / "puzzles.csv"), "--device", "cpu", "--steps", "4", "1"]
    argv += ["--batch", "5"]  # five batches for two processes: 15 and 9 examples
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", curve.__file__]
    written = {}
    for processes in (1, 2):
        files = ["--save", str(tmp_path / f"{processes}.jsonl"), "--output", str(tmp_path / f"{processes}.json")]
        if processes == 1:
            curve.main([*argv, *files])
        else:
            subprocess.run([*launch, *argv, *files], check=True, timeout=300, capture_output=True)
        found = json.loads((tmp_path / f"{processes}.json").read_text())
        assert found["versions"]["processes"] == processes
        for figures in found["results"]["trained"].values():
            del figures["seconds"]
        written[processes] = (tmp_path / f"{processes}.jsonl").read_text(), found["results"]
    assert written[1] == written[2]
    lines = [json.loads(line) for line in written[2][0].splitlines()]
    assert [line["example"] for line in lines] == [*range(24), *range(24)]


# ======================================================================================================================
# Slow: attacks. SLOW=100000 (texts for each task) python -m pytest -q -s test_agrpo.py -k slow
# ======================================================================================================================

slow = pytest.mark.skipif(
    "SLOW" not in os.environ, reason="takes minutes: SLOW=100000 python -m pytest -s test_agrpo.py -k slow"
)

# An example of each task, texts that are right (so that the fuzzer finds its way), and what would be a cheat.
ATTACKED = {
    "sudoku": (
        {"puzzle": "1000001003000003"},
        ["1234341223414123", "1234 3412 2341 4123", "1000001003000003", "1234" * 4],
    ),
    "countdown": (
        {"numbers": [3, 7, 20], "target": 41},
        ["(20*3-7)", "3*7+20", "= 41", "41", "20+7*3 = 41", "7,3,20", "**"],
    ),
    "gsm8k": (
        {"question": "?", "gold": "72"},
        ["72", "$72.00", "\\boxed{72}", "7 2", "0 1 2 70 71 72 73", "-72", "7²"],
    ),
    "math": (
        {"problem": "?", "solution": "so \\boxed{\\frac{1}{2}}"},
        ["\\boxed{\\frac12}", "\\boxed{0.5}", "\\boxed{}", "9^{9^9}"],
    ),
}
DEBRIS = [
    "<answer>",
    "</answer>",
    "<reasoning>",
    "</reasoning>",
    "\\boxed{",
    *"{}()+-*/= \n\0,.$",
    "####",
    "1",
    "7",
    "e999",
]
DEBRIS += ["9" * 5000, "((((" * 500, "<answer" * 500, "٧٢", "\u2212", "\u202e", "½", "Ⅶ", "\ud800"]


def value_of(expression: str) -> Fraction:
    """Arithmetic by recursive descent over + - * / and parentheses: apart from agrpo's, which parses with ast."""
    words = re.findall(r"[0-9]+|[-+*/()]", expression)
    symbols = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

    def level(operators: str, below):
        value = below()
        while words and words[0] in operators:
            value = symbols[words.pop(0)](value, below())
        return value

    def atom():
        word = words.pop(0)
        if word != "(":
            return Fraction(word)
        value = level("+-", lambda: level("*/", atom))
        words.pop(0)
        return value

    return level("+-", lambda: level("*/", atom))


def really_right(task: str, example: dict, answer: str) -> bool:
    """Whether an answer that was judged right is: other code than the judge's."""
    if task == "sudoku":
        return solved(example["puzzle"], re.sub(r"\s", "", answer))
    if task == "countdown":
        left, *right = answer.replace("×", "*").replace("÷", "/").split("=")
        used = sorted(int(number) for number in re.findall("[0-9]+", left))
        return used == [3, 7, 20] and value_of(left) == 41 and [part.strip() for part in right] in ([], ["41"])
    box = re.fullmatch(r"(?s).*\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}.*", answer) if answer.count("\\boxed{") == 1 else None
    if task == "math":
        return re.sub("[^0-9./-]", "", box[1]).rstrip(".") in ("12", "0.5", ".5", "1/2")
    answer = box[1] if box and box[1] else answer
    found = re.fullmatch(r"(?s)([^0-9]*)([0-9]+(?:\.[0-9]+)?)([^0-9]*)", answer)
    if not found or found[1].endswith(".") or Fraction(found[2]) != 72:
        return False
    return re.sub(r"[^\w\u2212\u2013-]", "", found[1])[-1:] not in ("-", "\u2212", "\u2013")


@slow
@pytest.mark.parametrize("task", ATTACKED)
def test_slow_no_text_breaks_a_reward_or_cheats_it(task):
    """As many texts as SLOW says: no exception, at most a second each, full marks for right answers only."""
    hypothesis = pytest.importorskip("hypothesis")
    if task == "math":
        pytest.importorskip("math_verify")
    st, (example, hints), longest, rights = hypothesis.strategies, ATTACKED[task], [0.0], Counter()
    words = st.one_of(st.sampled_from(hints), st.sampled_from(DEBRIS), st.text(max_size=8), st.integers().map(str))
    body = st.one_of(words, st.lists(words, max_size=6).map("".join))
    wrapped = st.tuples(body, body, st.sampled_from(hints) | body).map(
        lambda x: f"<reasoning>{x[0]}</reasoning>{x[1] if len(x[1]) % 3 else ''}<answer>{x[2]}</answer>"
    )

    @hypothesis.settings(
        max_examples=int(os.environ["SLOW"]),
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.seed(0)
    @hypothesis.given(st.integers(0, 99), body, wrapped, st.booleans())
    def attack(kind, plain, tagged, chat):
        text, judge = plain if kind < 30 else tagged, agrpo.TASKS[task]
        if kind == 0:  # a megabyte of it
            text *= 10**6 // max(1, len(text))
        began = time.perf_counter()
        reward, right = judge.grade(example, text, chat)
        answer = judge.answer(text, chat)
        longest[0] = max(longest[0], time.perf_counter() - began)
        assert 0 <= reward <= 5 and (reward >= 3 or not right or not chat)
        rights[right] += 1
        assert not right or really_right(task, example, answer), (text, answer)

    attack()
    print(f"{task}: {rights[True] + rights[False]:,} texts, {rights[True]:,} right; longest {longest[0]:.3f} s")
    assert rights[True] > 100 and longest[0] < 1


@slow
def test_slow_twenty_kills_lose_nothing(tmp_path):
    """kill -9 at random moments, while starting, pretraining, training, writing: each run ends as if there were none."""
    main = "import agrpo, test_agrpo; agrpo.TASKS['sudoku'] = test_agrpo.GENEROUS_SUDOKU; agrpo.main()"

    def start(run: Path):
        new = [*SHORT, "--max_steps", "30", "--save_every", "1", "--output_dir", str(run)]
        argv = ["--resume", str(run)] if (run / "settings.json").exists() else new
        paths = {"PYTHONPATH": str(Path(agrpo.__file__).parent), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", main, *argv], env=os.environ | paths, stderr=subprocess.DEVNULL)

    began, whole = time.time(), tmp_path / "whole"
    assert start(whole).wait() == 0
    usual, rng, kills, runs = time.time() - began, random.Random(0), 0, 0
    while kills < 20:
        runs += 1
        run = tmp_path / f"run{runs}" / "run"
        while not (run / "results.json").exists():
            process = start(run)
            try:
                assert process.wait(rng.uniform(0.3, 1.0) * usual if kills < 20 else None) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        assert figures(run) == figures(whole)
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (run / "checkpoint-30" / name).read_bytes() == (whole / "checkpoint-30" / name).read_bytes()
    print(f"{kills} kills in {runs} runs of {usual:.0f} s: all ended with the same weights")


EXTREMES = {
    int: (-1, 0, 1, 2, 3, 10**6, 10**12),
    float: (-1.0, 0.0, 1e-12, 0.5, 1.0, 1e12, math.nan, math.inf),
    bool: (True, False),
}


class StillRunning(BaseException):
    """Raised by an alarm: a run that was accepted and would go on."""


@slow
def test_slow_settings_run_or_are_refused_in_one_sentence(tmp_path, monkeypatch, generous_sudoku):
    """Every setting at and beyond its bounds, alone and in 100 random pairs, in a short run of 10 seconds at most."""
    monkeypatch.chdir(tmp_path)
    values = {f.name: EXTREMES.get(type(f.default), ()) for f in fields(agrpo.Settings)}
    values |= {f.name: get_args(f.type) for f in fields(agrpo.Settings) if get_args(f.type) and f.name != "task"}
    values |= {
        "eval_steps": (0, 1, 2, 3, 16, 17),
        "device": ("cpu", "cuda", "abacus"),
        "data": ("nowhere", "."),
        "resume": (),
        "output_dir": (".", "/proc/nowhere"),
    }
    single = [((name, value),) for name, some in values.items() for value in some if value not in (str, type(None))]
    rng, outcomes = random.Random(0), Counter()
    pairs = [(*rng.choice(single), *rng.choice(single)) for _ in range(100)]

    def alarm(*_):
        raise StillRunning

    hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, alarm)
    for number, changes in enumerate(single + pairs):
        argv = [*SHORT, "--max_steps", "2", "--output_dir", str(tmp_path / f"{number}" / "run")]
        argv += [word for name, value in changes for word in (f"--{name}", str(value))]
        began, written = time.time(), {*tmp_path.iterdir()}
        resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, hard[1]))
        signal.alarm(10)
        try:
            agrpo.main(argv)
            outcome = "ran"
        except StillRunning:
            outcome = "was still running"
        except SystemExit as stop:
            outcome = "refused" if {*tmp_path.iterdir()} == written else "stopped"
            assert str(stop.code).startswith("agrpo.py: ") and "\n" not in str(stop.code), (changes, stop.code)
            assert outcome == "stopped" or time.time() - began < 5, (changes, stop.code)
        finally:
            signal.alarm(0)
            resource.setrlimit(resource.RLIMIT_AS, hard)
        outcomes[outcome] += 1
    print(f"{len(single)} single settings and {len(pairs)} pairs: {dict(outcomes)}")


# ======================================================================================================================
# The README
# ======================================================================================================================

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_readme_commands_have_the_options_they_name(tmp_path, monkeypatch):
    """Every `python agrpo.py ...`, `torchrun ... agrpo.py ...` and eval.py line: no option is unknown."""
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    lines += [" ".join(line.split()) for line in re.findall(r"`(python (?:agrpo|eval)\.py[^`]*)`", README)]
    found = [re.search(r"(agrpo|eval)\.py(.*)", line) for line in lines if "pytest" not in line]
    commands = [(match[1], match[2].split()) for match in found if match]
    assert len(commands) >= 8
    monkeypatch.chdir(tmp_path)
    for script, argv in commands:
        if {"--resume", "--help"} & {*argv}:  # the first needs a run, the second ends in itself
            continue
        argv = ["0" if word == "S" else word for word in argv]
        (agrpo.parse_settings if script == "agrpo" else curve.parse_options)(argv)


def test_readme_names_exist_and_its_table_is_complete():
    """Every name in the table from the paper to the code is there; every function of the sections 1 to 4 is in it."""
    table = README[README.index("| in the paper |") :].split("\n\n")[0].split("\n", 2)[2]  # without its head
    named = set(re.findall(r"`([a-z_A-Z]+)(?:\.[a-z_]+)?`", table))
    assert all(hasattr(agrpo, name) for name in named)
    source = Path(agrpo.__file__).read_text(encoding="utf-8").split("# 5. Training loop")[0]
    defined = set(re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", source, re.MULTILINE))
    assert defined - named == set(), "in sections 1 to 4, but not in the README's table"


def test_readme_examples_run(tmp_path, monkeypatch):
    """The Python blocks, as they stand; the one that merges an adapter finds one."""
    monkeypatch.chdir(tmp_path)
    llada_checkpoint(tmp_path / "llada")
    model, tokenizer, _ = agrpo.load_model("llada")
    agrpo.add_lora(model, 2, 4.0)
    examples = blocks("python")
    assert len(examples) == 2
    for example in examples:
        for run in re.findall(r"runs/[\w-]+", example):
            agrpo.save_model(model, tokenizer, tmp_path / run)
        paths = {"PYTHONPATH": str(Path(agrpo.__file__).parent), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=os.environ | paths, check=True)
    assert agrpo.load_model("merged")[0].num_parameters() > 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--learning"]:
        print_learning([int(seed) for seed in sys.argv[2:]], Path("runs/learning"))
    else:
        print_tables()
