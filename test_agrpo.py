"""What AGRPO claims, against exact values: the appendix the paper does not have.

    pytest test_agrpo.py        every claim, asserted
    python test_agrpo.py        the same story as tables, in a minute

The mask predictor here knows four words (one is EOS, one the mask) and writes two to four tokens, in float64. It is
small enough to enumerate every trajectory there is: the order in which positions are filled, and the tokens. So
whatever training only samples (likelihood, expected reward, its gradient, the mean of an estimator over trajectories,
groups and timesteps) is computed here, by code that shares nothing with the sampler, and compared to the last digits.
"""

import itertools
import math
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import agrpo
from agrpo import Rollout, clipped_objective, draw_timesteps, group_advantages, kl_penalty, sample, step_logps

torch.set_num_threads(1)  # tensors this small lose more between threads than they gain

A, B, EOS, MASK = V = range(4)
PROMPT = (B, A)

# ======================================================================================================================
# 1. A mask predictor small enough to enumerate, and the enumerator
# ======================================================================================================================


def mask_predictor(kind: str = "bert", seed: int = 2, vocab: int = len(V), width: int = 8, dtype=torch.float64):
    """A random mask predictor whose predictions are far from uniform and depend on everything they may depend on."""
    shape = dict(vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1)
    shape |= dict(num_attention_heads=2, max_position_embeddings=32)
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(is_causal=False, num_key_value_heads=1, **shape))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(0.8 * noise if parameter.dim() == 2 else 0.2 * noise + norm)
    return model.to(dtype).eval()


SETTINGS = {
    "plain": {},
    "temperature": dict(temperature=0.6),
    "greedy": dict(temperature=0.0),
    "top-k": dict(temperature=0.7, top_k=2),
    "top-p": dict(temperature=1.2, top_p=0.8),
    "top-k, top-p": dict(temperature=1.5, top_k=2, top_p=0.7),
    "two tokens a step": dict(steps=2),
    "blocks": dict(completion_length=4, block_length=2, steps=4),
    "blocks, two a step": dict(completion_length=4, block_length=2, steps=2, temperature=0.8),
    "blocks, top-p": dict(completion_length=4, block_length=2, steps=4, temperature=1.3, top_p=0.9),
    "blocks, no EOS": dict(completion_length=4, block_length=2, steps=4, eos_id=None),
    "low confidence": dict(unmasking="low_confidence"),
    "low confidence, top-p": dict(unmasking="low_confidence", temperature=1.5, top_p=0.8, steps=2),
    "two tokens": dict(completion_length=2, block_length=2, steps=2, temperature=0.7, top_k=2),
}


def sampling_of(name: str) -> dict:
    default = dict(completion_length=3, block_length=3, steps=3, temperature=1.0, unmasking="random")
    return default | dict(mask_id=MASK, eos_id=EOS, top_k=0, top_p=1.0) | SETTINGS[name]


def states_of(sampling: dict) -> list[tuple]:
    return list(itertools.product(V, repeat=sampling["completion_length"]))


def policy_table(model, sampling: dict, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log p(token | prompt, state) under the policy, at every position of every state: (S, C, V), differentiable.

    One full forward pass, and the policy from its definition: temperature; never the mask; top-k: fewer than k tokens
    are more probable; top-p: the more probable ones make up less than top_p. Also which ids are kept, (S, C, V) bool;
    pass it to have another model's policy over the same choice.
    """
    input_ids = torch.tensor([PROMPT + state for state in states_of(sampling)])
    logits = model(input_ids=input_ids).logits[:, len(PROMPT) :] / (sampling["temperature"] or 1.0)
    if keep is None:
        keep = (torch.arange(len(V)) != MASK).expand(logits.shape)
        better = (logits[..., None, :] > logits[..., :, None]) & keep[..., None, :]  # [..., a, b]: b beats a
        most = sampling["top_k"] if sampling["temperature"] else 1
        keep = keep & (better.sum(-1) < (most or len(V)))
        p = logits.masked_fill(~keep, -math.inf).softmax(-1)
        keep = keep & ((better * p[..., None, :]).sum(-1) < sampling["top_p"])
    return logits - logits.masked_fill(~keep, -math.inf).logsumexp(-1, keepdim=True), keep


@dataclass
class Enumeration:
    """Every trajectory of one setting (N of them), as a rollout that was never sampled; and its exact probability."""

    model: torch.nn.Module
    sampling: dict
    rollout: Rollout
    log_probability: Tensor  # (N,) of the whole trajectory, choice of positions included; differentiable
    logp: Tensor  # (N, C) of each token in the state it was filled into; differentiable
    state: Tensor  # (N, C) the index of that state
    keep: Tensor  # (S, C, V) bool, the ids to choose from

    @property
    def probability(self) -> Tensor:
        return self.log_probability.detach().exp()

    @property
    def temperature(self) -> dict:
        return dict(mask_id=MASK, temperature=self.sampling["temperature"])

    @property
    def steps(self) -> int:
        return self.sampling["steps"]


def ways(unmasking: str, logp: Tensor, keep: Tensor, confidence: Tensor, masked: list[int], count: int):
    """All that one step can do in one state: pairs of what it fills in, {position: token}, and its log-probability."""
    options = {i: keep[i].nonzero().flatten().tolist() for i in masked}
    if unmasking == "random":
        subsets = list(itertools.combinations(masked, count))
        for subset in subsets:
            for tokens in itertools.product(*(options[i] for i in subset)):
                filled = dict(zip(subset, tokens))
                yield filled, sum(logp[place] for place in filled.items()) - math.log(len(subsets))
        return
    outcomes = defaultdict(list)  # low confidence: a token for every masked position, of which the surest stay
    for tokens in itertools.product(*options.values()):
        drawn = sorted(zip(masked, tokens), key=lambda place: -confidence[place])
        outcomes[tuple(sorted(drawn[:count]))].append(sum(logp[place] for place in drawn))
    for filled, several in outcomes.items():
        yield dict(filled), torch.stack(several).logsumexp(0)


@lru_cache
def enumerate_trajectories(name: str, kind: str = "bert") -> Enumeration:
    model, sampling = mask_predictor(kind), sampling_of(name)
    C, block, T, eos = (sampling[key] for key in ("completion_length", "block_length", "steps", "eos_id"))
    inside = T * block // C  # steps inside one block
    logp, keep = policy_table(model, sampling)
    confidence = policy_table(model, sampling | dict(temperature=1.0, top_k=0, top_p=1.0))[0].detach()
    index = {state: n for n, state in enumerate(states_of(sampling))}
    found = []

    def walk(t: int, history: dict, log_probability: Tensor):  # history: position -> (step, token, state before)
        start = t // inside * block
        before = {history[i][1] for i in range(start - block, start)} if t and t % inside == 0 else set()
        if t == T or before == {eos}:
            found.append((t, history, log_probability))
            return
        state = tuple(history[i][1] if i in history else MASK for i in range(C))
        masked = [i for i in range(start, start + block) if i not in history]
        count = block // inside + (t % inside < block % inside)
        n = index[state]
        for filled, step_logp in ways(sampling["unmasking"], logp[n], keep[n], confidence[n], masked, count):
            now = {i: (t, token, n) for i, token in filled.items()}
            walk(t + 1, history | now, log_probability + step_logp)

    walk(0, {}, torch.zeros((), dtype=torch.float64))
    tail = (-1, EOS, 0)
    table = torch.tensor([[history.get(i, tail) for i in range(C)] for _, history, _ in found])
    step, completion, state = table.unbind(-1)
    place = (state, torch.arange(C))
    token_logp = logp[(*place, completion)].masked_fill(step < 0, 0)
    entropy = -(logp.exp() * logp).masked_fill(~keep, 0).sum(-1)[place].masked_fill(step < 0, 0).detach()
    by_step = torch.zeros(len(found), T, dtype=torch.float64).scatter_add(1, step.clamp(min=0), entropy)
    cut = sampling["top_k"] or sampling["top_p"] < 1 or not sampling["temperature"]
    kept = torch.where(keep, torch.arange(len(V)), -1)[place] if cut else None
    prompt = torch.tensor([PROMPT] * len(found))
    rollout = Rollout(
        prompt, prompt > -1, completion, step, token_logp.detach(), by_step, torch.tensor([t for t, *_ in found]), kept
    )
    log_probability = torch.stack([log_probability for *_, log_probability in found])
    return Enumeration(model, sampling, rollout, log_probability, token_logp, state, keep)


def select(rollout: Rollout, rows) -> Rollout:
    return Rollout(*(None if value is None else value[rows] for value in vars(rollout).values()))


def rewards_of(completion: Tensor) -> Tensor:
    """An arbitrary reward for every completion there is."""
    number = (completion * len(V) ** torch.arange(completion.shape[1])).sum(1)
    return torch.rand(len(V) ** 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[number]


def gradient_of(value: Tensor, model) -> Tensor:
    """d value / d theta by autograd, as one vector."""
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def policy_gradient(model, *args, **options) -> Tensor:
    """What the update adds to .grad, as one vector, with the sign of an ascent."""
    model.zero_grad()
    agrpo.policy_gradient(model, *args, **options)
    zero = torch.zeros(())
    return -torch.cat([(zero.expand_as(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def assert_same(x: Tensor, y: Tensor, tolerance: float = 1e-10):
    assert float((x - y).norm()) <= tolerance * float(y.norm()), f"cosine {cosine(x, y)}, norms {x.norm()}, {y.norm()}"


# ======================================================================================================================
# 2. The sampler draws from the process that it says it draws from
# ======================================================================================================================


def trajectory_keys(rollout: Rollout) -> list[tuple]:
    return [tuple(row) for row in torch.cat([rollout.completion, rollout.step], 1).tolist()]


@lru_cache
def sampled(name: str, rows: int = 20_000) -> tuple[Rollout, list[int]]:
    """Rollouts of the real sampler, and which enumerated trajectory each one is."""
    e = enumerate_trajectories(name)
    prompt = torch.tensor([PROMPT] * rows)
    rollout = sample(e.model, prompt, prompt > -1, generator=torch.Generator().manual_seed(0), **e.sampling)
    number = {key: n for n, key in enumerate(trajectory_keys(e.rollout))}
    return rollout, [number[key] for key in trajectory_keys(rollout)]


def goodness_of_fit(counts: Tensor, probability: Tensor) -> float:
    """p-value of Pearson's chi-square test; rare cells are pooled so that at least 5 are expected in each."""
    expected, order = (probability * counts.sum()).sort()
    counts = counts[order]
    rare = (expected < 5) | (expected.cumsum(0) - expected < 5)
    expected = torch.cat([expected[rare].sum(0, keepdim=True), expected[~rare]])
    counts = torch.cat([counts[rare].sum(0, keepdim=True), counts[~rare]])
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), chi2 / 2))


@pytest.mark.parametrize("name", SETTINGS)
def test_trajectories_are_all_there(name):
    """The probabilities of all enumerated trajectories sum to 1, and no trajectory is listed twice."""
    e = enumerate_trajectories(name)
    assert abs(float(e.probability.sum()) - 1) < 1e-12
    assert len(set(trajectory_keys(e.rollout))) == len(e.probability)


@pytest.mark.parametrize("name", SETTINGS)
def test_sampler_draws_trajectories_with_their_probabilities(name):
    """20,000 sampled trajectories are as frequent as enumeration says (chi-square); impossible ones never occur."""
    _, number = sampled(name)
    probability = enumerate_trajectories(name).probability
    counts = torch.bincount(torch.tensor(number), minlength=len(probability)).double()
    assert goodness_of_fit(counts, probability) > 1e-3
    if name not in ("greedy", "two tokens"):  # the test has power: it notices probabilities that are off by a tenth
        bent = probability ** torch.where(torch.arange(len(probability)) % 2 == 0, 0.9, 1.0)
        assert goodness_of_fit(counts, bent / bent.sum()) < 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_sampler_records_the_exact_likelihood(name):
    """logp, summed, is the trajectory's log-likelihood up to the order's constant; entropies and kept ids are exact."""
    rollout, number = sampled(name)
    e = enumerate_trajectories(name)
    torch.testing.assert_close(rollout.logp, e.rollout.logp[number], rtol=0, atol=1e-10)
    torch.testing.assert_close(rollout.entropy, e.rollout.entropy[number], rtol=0, atol=1e-10)
    assert rollout.num_steps.equal(e.rollout.num_steps[number])
    if e.sampling["unmasking"] == "random":  # the order carries no parameters: a constant for trajectories of a length
        order = e.log_probability.detach()[number] - rollout.logp.sum(1)
        for length in rollout.num_steps.unique():
            assert float(order[rollout.num_steps == length].std(correction=0)) < 1e-10
    if e.rollout.kept is None:
        assert rollout.kept is None
    else:
        taken = rollout.step >= 0
        mine, theirs = ((kept[..., None] == torch.arange(len(V))).any(2) for kept in (rollout.kept, e.rollout.kept))
        assert mine[taken].equal(theirs[number][taken])


def ragged_prompts(rows: int) -> tuple[Tensor, Tensor]:
    """Prompts of 1 to 4 tokens, padded on the left."""
    rng = torch.Generator().manual_seed(1)
    length = torch.arange(rows) % 4 + 1
    prompt_mask = torch.arange(4) >= 4 - length[:, None]
    return torch.randint(2, (rows, 4), generator=rng) * prompt_mask, prompt_mask


@contextmanager
def rows_seen(model):
    """Counts the sequences that go through the model, and the positions that go through its head."""
    seen = Counter()
    head = model.cls if hasattr(model, "cls") else model.lm_head
    hooks = [
        model.base_model.register_forward_pre_hook(
            lambda _, __, given: seen.update(sequences=len(given["input_ids"])), with_kwargs=True
        ),
        head.register_forward_pre_hook(lambda _, given: seen.update(positions=given[0].shape[:-1].numel())),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("unmasking", ["random", "low_confidence"])
@pytest.mark.parametrize("cut", [dict(temperature=1.5), dict(temperature=1.2, top_k=3, top_p=0.9)])
def test_sampler_keeps_its_promises(unmasking, cut):
    """Each step fills in its share of its block, once; rows stop after a block of EOS; logp is what step_logps finds."""
    model, (prompt, prompt_mask), block, per_step = mask_predictor(), ragged_prompts(64), 3, [2, 1]
    setting = dict(completion_length=12, block_length=block, steps=8, unmasking=unmasking, mask_id=MASK, eos_id=EOS)
    with torch.no_grad():
        model.cls.predictions.bias += torch.tensor([0.0, 0.0, 1.0, 50.0])  # EOS is common; the mask tempts
    with rows_seen(model) as seen:
        rollout = sample(model, prompt, prompt_mask, generator=torch.Generator().manual_seed(0), **setting, **cut)
    assert seen["sequences"] == rollout.num_steps.sum()  # rows that have ended leave the batch
    lengths = rollout.num_steps.tolist()
    assert len(set(lengths)) == 4  # the case is worth testing: rows of every length
    for completion, step, logp, entropy, length in zip(
        *(x.tolist() for x in (rollout.completion, rollout.step, rollout.logp, rollout.entropy)), lengths
    ):
        ended = False
        for start in range(0, 12, block):
            first = start // block * len(per_step)
            expected = [] if ended else [t for t, count in enumerate(per_step, first) for _ in range(count)]
            assert sorted(step[start : start + block]) == (expected or [-1] * block)
            assert length > first or ended
            ended = ended or completion[start : start + block] == [EOS] * block
        assert length == max(step) + 1 and MASK not in completion
        assert all((token, p) == (EOS, 0) for token, s, p in zip(completion, step, logp) if s < 0)
        assert not any(entropy[length:]) and all(entropy[:length])
    row, t = (rollout.entropy > 0).nonzero(as_tuple=True)
    logp, revealed = step_logps(model, rollout, row, t, mask_id=MASK, temperature=cut["temperature"])
    assert revealed.equal(rollout.step[row] == t[:, None]) and not logp[~revealed].any()
    again = torch.zeros_like(rollout.logp).index_add(0, row, logp.detach())
    torch.testing.assert_close(again, rollout.logp, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_left_padding_changes_nothing(kind):
    """A prompt padded on the left is written on as if it were not padded, and its log-probabilities stay the same."""
    model, prompt = mask_predictor(kind), torch.tensor([[B, A, B]] * 32)
    setting = dict(completion_length=4, block_length=2, steps=4, temperature=1.0, unmasking="random")
    setting |= dict(mask_id=MASK, eos_id=EOS)
    bare = sample(model, prompt, prompt > -1, generator=torch.Generator().manual_seed(0), **setting)
    for padding in (A, B, MASK):
        ids = torch.cat([torch.full((32, 5), padding), prompt], 1)
        padded = sample(model, ids, torch.arange(8) > 4 + 0 * ids, generator=torch.Generator().manual_seed(0), **setting)
        assert trajectory_keys(padded) == trajectory_keys(bare)
        torch.testing.assert_close(padded.logp, bare.logp, rtol=0, atol=1e-12)
        pair = dict(rows=torch.arange(32), steps=torch.ones(32).long(), mask_id=MASK, temperature=1.0)
        torch.testing.assert_close(step_logps(model, padded, **pair), step_logps(model, bare, **pair))


def test_a_generator_makes_sampling_repeatable():
    """The same seed writes the same; another seed writes something else."""
    e, prompt = enumerate_trajectories("plain"), torch.tensor([PROMPT] * 50)
    runs = [sample(e.model, prompt, prompt > -1, generator=torch.Generator().manual_seed(s), **e.sampling) for s in (5, 5, 6)]  # fmt: skip
    first, again, other = map(trajectory_keys, runs)
    assert first == again != other


def test_settings_that_do_not_fit_are_refused():
    """Blocks must divide the completion, steps spread evenly over blocks and fill at least a token each."""
    assert agrpo.tokens_per_step(12, 12, 4) == [3, 3, 3, 3] and agrpo.tokens_per_step(10, 5, 4) == [3, 2]
    for C, block, steps in [(10, 4, 4), (12, 4, 4), (12, 4, 2), (4, 2, 6)]:
        with pytest.raises(ValueError):
            agrpo.tokens_per_step(C, block, steps)
    prompt = torch.tensor([PROMPT])
    for wrong in (dict(unmasking="sideways"), dict(steps=7)):
        with pytest.raises(ValueError):
            sample(mask_predictor(), prompt, prompt > -1, **sampling_of("plain") | wrong)


# ======================================================================================================================
# 3. Timesteps: weights that are right on average, strata that are hit once
# ======================================================================================================================


@contextmanager
def chosen_draws(order: Tensor, offset: Tensor):
    """draw_timesteps with both of its random choices made by us; it knows no others."""
    with (
        mock.patch.object(torch, "randperm", lambda n, **_: order.view(n)),
        mock.patch.object(torch, "rand", lambda *size, **_: offset.view(size)),
    ):
        yield


def pieces(proposal: Tensor, k: int, low: float = 0.0, high: float = 1.0) -> list[tuple[float, float]]:
    """The intervals of x in [low, high) on which the points u_j = (j + x) / k, j < k, stay on the same timesteps.

    On each of them a draw is constant, so that its mean over x is a finite sum. proposal (num_steps,), any scale.
    """
    cdf = (proposal.double().cumsum(0) / proposal.double().sum()).tolist()
    crossings = {k * c - j for c in cdf for j in range(k)}
    return list(itertools.pairwise(sorted({low, high} | {x for x in crossings if low < x < high})))


RAGGED = torch.tensor([5, 3, 1])


def some_proposal(kind: str) -> Tensor | None:
    """(3, 5), ragged like RAGGED; beyond a row's steps there may be anything: it must be ignored."""
    entropy = torch.tensor([[3.0, 0.02, 1.0, 0.5, 2.2], [0.7, 2.0, 0.01, 9.0, 9.0], [0.4, 9.0, 9.0, 9.0, 9.0]])
    if kind == "entropy":
        return entropy
    taken = torch.arange(5) < RAGGED[:, None]
    return agrpo.defensive_proposal(entropy * taken * (entropy > 0.1), RAGGED) if kind == "defensive" else None


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("kind", ["uniform", "entropy", "defensive"])
def test_timestep_weights_are_unbiased(kind, k):
    """Each step's weight is 1 on average over all draws, so sum_j w_j f(t_j) is sum_t f(t) on average for any f. Exactly.

    The mean is computed: over the 3! orders of the batch, and over the offsets, by pieces on which a draw is constant.
    """
    proposal = some_proposal(kind)
    density = torch.ones(3, 5) if proposal is None else proposal
    mean = torch.zeros(3, 5, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        cut = [pieces(density[i, :n], k, order[i] / 3, (order[i] + 1) / 3) for i, n in enumerate(RAGGED)]
        for piece in itertools.zip_longest(*cut, fillvalue=(0.0, 0.0)):
            low, high = torch.tensor(piece, dtype=torch.float64).T
            dense = []
            for x in (0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high):
                order_ = torch.tensor(order)
                with chosen_draws(order_, (3 * x - order_).clamp(0, 1 - 1e-12)):
                    steps, weights = draw_timesteps(RAGGED, k, proposal)
                assert ((weights > 0) <= (steps < RAGGED[:, None])).all()
                for row, weight in zip(steps, weights):  # no step twice: each costs a pass
                    assert row[weight > 0].unique().numel() == (weight > 0).sum()
                dense.append(torch.zeros(3, 5, dtype=torch.float64).scatter_add(1, steps, weights))
            wide = high - low > 1e-9
            assert dense[0][wide].equal(dense[1][wide])  # constant on the piece: the integral is exact
            mean += dense[0] * 3 * (high - low)[:, None] / math.factorial(3)
    torch.testing.assert_close(mean, (torch.arange(5) < RAGGED[:, None]).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_strata_are_hit_exactly_once(k, rows=6):
    """Each row has one point in each of its k strata, the batch one in each of its rows x k finer ones."""
    num_steps = torch.full((rows,), rows * k)  # as many steps as fine strata, all alike: the step drawn *is* the stratum
    for seed in range(50):
        steps, weights = draw_timesteps(num_steps, k, generator=torch.Generator().manual_seed(seed))
        assert steps.flatten().sort().values.tolist() == list(range(rows * k))
        assert (steps // rows == torch.arange(k)).all()
        assert (weights == rows).all()


@pytest.mark.parametrize("kind", ["uniform", "entropy", "defensive"])
def test_timesteps_are_exact_once_k_covers_them(kind):
    """A row of at most k steps gets each of them once, with weight 1, in every draw; the others draw on."""
    for seed, k in itertools.product(range(20), [3, 5, 8]):
        steps, weights = draw_timesteps(RAGGED, k, some_proposal(kind), torch.Generator().manual_seed(seed))
        dense = torch.zeros(3, 5, dtype=torch.float64).scatter_add(1, steps, weights)
        assert dense[RAGGED <= k].equal((torch.arange(5) < RAGGED[:, None]).double()[RAGGED <= k])


def test_defensive_proposal_bounds_the_weights():
    """It is a distribution over a row's own steps, never below a tenth of uniform; uniform where nothing was undecided."""
    entropy = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    expected = [[0.225 + 1 / 30, 1 / 30, 0.675 + 1 / 30], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    proposal = agrpo.defensive_proposal(entropy, torch.tensor([3, 2, 2]), 0.1)
    torch.testing.assert_close(proposal, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_impossible_proposals_are_refused():
    """A step that cannot be drawn cannot be weighted: k < 1 and proposals that are negative, infinite or 0 are refused."""
    for wrong in (-1.0, 0.0, math.nan, math.inf):
        proposal = torch.ones(3, 5)
        proposal[0, 2] = wrong
        with pytest.raises(ValueError):
            draw_timesteps(RAGGED, 2, proposal)
    with pytest.raises(ValueError):
        draw_timesteps(RAGGED, 0)


# ======================================================================================================================
# 4. The likelihood: exact for a trajectory, a bound for a text
# ======================================================================================================================


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("low")])
def test_estimate_is_the_exact_likelihood_once_k_covers_all_steps(name):
    """estimate_logp with k >= T is log pi(trajectory), in value and gradient; no bound, no noise."""
    e = enumerate_trajectories(name)
    for k in (e.steps, e.steps + 3):
        estimate = agrpo.estimate_logp(e.model, e.rollout, k, micro_batch=50, **e.temperature)
        torch.testing.assert_close(estimate, e.logp.sum(1), rtol=0, atol=1e-10)
    value = torch.arange(len(estimate)).double()
    if e.sampling["temperature"]:
        assert_same(gradient_of(estimate @ value, e.model), gradient_of(e.log_probability @ value, e.model))


def every_draw(e: Enumeration, k: int, proposal: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each trajectory with each of its possible timestep draws: row (M,), x (M,), probability of the draw (M,)."""
    density = torch.ones_like(e.rollout.entropy) if proposal is None else proposal
    drawn = [
        (row, (low + high) / 2, high - low)
        for row, length in enumerate(e.rollout.num_steps.tolist())
        for low, high in pieces(density[row, :length], k)
    ]
    row, x, width = (torch.tensor(column, dtype=torch.float64) for column in zip(*drawn))
    return row.long(), x, width


def draws_at(x: Tensor):
    """Lets row i draw at u_ij = (j + x[i]) / k. Which x a row gets is uniform (section 3), so the mean over x is exact."""
    return chosen_draws(torch.zeros(len(x), dtype=torch.long), x[:, None] * len(x))


def proposal_of(e: Enumeration, kind: str) -> Tensor | None:
    if kind == "uniform":
        return None
    return e.rollout.entropy if kind == "entropy" else agrpo.defensive_proposal(e.rollout.entropy, e.rollout.num_steps)


def estimates(e: Enumeration, k: int, kind: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, over all timestep draws, of estimate_logp for each trajectory."""
    proposal = proposal_of(e, kind)
    row, x, width = every_draw(e, k, proposal)
    proposal = None if proposal is None else proposal[row]
    with draws_at(x), torch.no_grad():
        estimate = agrpo.estimate_logp(
            e.model, select(e.rollout, row), k, proposal=proposal, micro_batch=4096, **e.temperature
        )
    mean, square = (torch.zeros(len(e.probability)).double().index_add(0, row, width * z) for z in (estimate, estimate**2))  # fmt: skip
    return mean, (square - mean**2).clamp(min=0).sqrt()


@pytest.mark.parametrize("name, kind, k", [("plain", "uniform", 1), ("plain", "entropy", 2), ("blocks", "defensive", 1)])
def test_estimate_is_unbiased_for_fewer_timesteps(name, kind, k):
    """The mean of estimate_logp over all timestep draws is log pi(trajectory), for every single trajectory."""
    e = enumerate_trajectories(name)
    mean, deviation = estimates(e, k, kind)
    torch.testing.assert_close(mean, e.rollout.logp.sum(1), rtol=0, atol=1e-10)
    assert deviation.max() > 0.1  # and each single estimate is not: there was something to average


@lru_cache
def text_likelihoods() -> dict[tuple, tuple[float, float, float]]:
    """For each completion: log p(completion | prompt) exactly, its any-order ELBO, and the mean of estimate_logp.

    The first two from the definition, over the C! orders; the last over the trajectories that lead to the completion.
    """
    e = enumerate_trajectories("plain")
    table, index = policy_table(e.model, e.sampling)[0].detach(), states_of(e.sampling)
    mean_estimate = defaultdict(list)
    for completion, estimate in zip(e.rollout.completion.tolist(), estimates(e, 1, "entropy")[0].tolist()):
        mean_estimate[tuple(completion)].append(estimate)
    figures = {}
    for completion, of_orders in mean_estimate.items():
        logps = []
        for order in itertools.permutations(range(len(completion))):
            seen = [[completion[j] if j in order[:t] else MASK for j in range(len(completion))] for t in range(len(order))]
            logps.append(sum(float(table[index.index(tuple(s)), i, completion[i]]) for s, i in zip(seen, order)))
        marginal = math.log(sum(map(math.exp, logps)) / len(logps))
        figures[completion] = marginal, sum(logps) / len(logps), sum(of_orders) / len(of_orders)
    return figures


def test_elbo_is_the_mean_over_orders_and_a_lower_bound():
    """Averaged over orders the estimate is the any-order ELBO, which lies below log p(text | prompt): hence 'ELBO-style'.

    It is this average that is a bound. The likelihood of a trajectory, which a policy gradient needs, is exact.
    """
    marginal, elbo, estimate = torch.tensor(list(text_likelihoods().values()), dtype=torch.float64).T
    assert abs(float(marginal.exp().sum()) - 1) < 1e-12
    torch.testing.assert_close(estimate, elbo, rtol=0, atol=1e-10)
    assert (elbo < marginal).all() and float((marginal.exp() * (marginal - elbo)).sum()) > 0.01


# ======================================================================================================================
# 5. The gradient: unbiased, and for what
# ======================================================================================================================


def exact_gradient(e: Enumeration, value: Tensor | None = None) -> Tensor:
    """The gradient of E[reward] (or of E[value]), by autograd through the enumerated expectation."""
    value = rewards_of(e.rollout.completion) if value is None else value
    return gradient_of(e.log_probability.exp() @ value, e.model)


def advantage_mass(e: Enumeration, group_size: int = 2, scale_by_std: bool = False) -> Tensor:
    """(N,) probability times advantage of a trajectory in 1/G of a group, added up over all N^G groups it may be in.

    The update is linear in the advantages, so one call with these is the mean over all groups.
    """
    N = len(e.probability)
    groups = torch.cartesian_prod(*[torch.arange(N)] * group_size)  # (N^G, G)
    rewards = rewards_of(e.rollout.completion)[groups].flatten()
    advantage = group_advantages(rewards, group_size, scale_by_std).view(-1, group_size)
    mass = e.probability[groups].prod(1, keepdim=True) * advantage / group_size
    return torch.zeros(N).double().index_add(0, groups.flatten(), mass.flatten())


def expected_gradient(e: Enumeration, k: int, kind: str = "uniform", mass: Tensor | None = None, **options) -> Tensor:
    """The mean of `policy_gradient` over all trajectories, groups and timestep draws: one real call on all of them."""
    mass, proposal = advantage_mass(e) if mass is None else mass, proposal_of(e, kind)
    row, x, width = every_draw(e, k, proposal)
    row, x, width = (column[mass[row] != 0] for column in (row, x, width))
    options = dict(on_policy=True, length_norm="constant", micro_batch=4096) | e.temperature | options
    proposal = None if proposal is None else proposal[row]
    with draws_at(x):  # the call divides by its number of rows
        return policy_gradient(
            e.model, select(e.rollout, row), mass[row] * width * len(row), k=k, proposal=proposal, **options
        )


@pytest.mark.parametrize("kind, k", [("uniform", 1), ("entropy", 1), ("defensive", 2)])
def test_mean_update_over_every_group_and_draw_is_the_policy_gradient(kind, k):
    """The plain thing, with no algebra: one call for each possible group of 2, batch order and timestep draw, averaged.

    The mean is (1 - 1/G) grad E[reward] / T exactly. 1/T is the objective's own mean over steps; 1 - 1/G comes from the
    baseline, the mean of the group, in which every row's own reward is 1 part in G.
    """
    e = enumerate_trajectories("two tokens")
    proposal = proposal_of(e, kind)
    density = torch.ones_like(e.rollout.entropy) if proposal is None else proposal
    rewards, total = rewards_of(e.rollout.completion), 0.0
    options = dict(k=k, on_policy=True, length_norm="constant", **e.temperature)
    for group in itertools.product(range(len(rewards)), repeat=2):
        rows = list(group)
        rollout, advantage = select(e.rollout, rows), group_advantages(rewards[rows], 2)
        mine = None if proposal is None else proposal[rows]
        for order in itertools.permutations(range(2)):
            cut = [pieces(density[row], k, place / 2, (place + 1) / 2) for row, place in zip(rows, order)]
            for (low, high), (low_, high_) in itertools.product(*cut):
                x, order_ = torch.tensor([low + high, low_ + high_], dtype=torch.float64) / 2, torch.tensor(order)
                with chosen_draws(order_, 2 * x - order_):
                    update = policy_gradient(e.model, rollout, advantage, proposal=mine, **options)
                total = total + float(e.probability[rows].prod()) * 2 * (high - low) * (high_ - low_) * update
    assert_same(total, (1 - 1 / 2) * exact_gradient(e) / e.steps)


@pytest.mark.parametrize(
    "name, kind, k, options",
    [
        ("plain", "uniform", 1, {}),
        ("plain", "entropy", 1, {}),
        ("plain", "uniform", 2, {}),
        ("plain", "entropy", 2, dict(length_norm="sequence")),
        ("plain", "defensive", 3, {}),
        ("temperature", "entropy", 1, dict(on_policy=False)),
        ("top-k", "defensive", 1, dict(on_policy=False)),
        ("top-p", "defensive", 2, {}),
        ("top-k, top-p", "defensive", 1, dict(on_policy=False, length_norm="sequence")),
        ("two tokens a step", "entropy", 1, dict(micro_batch=7)),
        ("blocks", "uniform", 1, {}),
        ("blocks", "entropy", 2, {}),
        ("blocks, two a step", "entropy", 1, dict(on_policy=False)),
        ("blocks, top-p", "defensive", 2, dict(on_policy=False)),
        ("blocks, no EOS", "uniform", 2, dict(length_norm="sequence")),
    ],
)
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_expected_update_is_the_policy_gradient(name, kind, k, options, model):
    """The mean update is (1 - 1/G) grad E[reward] / T, whatever the proposal, temperature, truncation, blocks or k.

    With rows that end early this needs length_norm="constant"; where none does, "sequence" is the same. on_policy=False
    takes the ratio to the recorded probabilities: 1, if temperature and truncation are the sampler's.
    """
    e = enumerate_trajectories(name, model)
    expected = expected_gradient(e, k, kind, **options)
    assert_same(expected, (1 - 1 / 2) * exact_gradient(e) / e.steps)


def test_baseline_factor_is_one_minus_one_over_G():
    """In groups of 3 the factor is 2/3."""
    e = enumerate_trajectories("two tokens")
    assert_same(expected_gradient(e, 1, mass=advantage_mass(e, 3)), (1 - 1 / 3) * exact_gradient(e) / e.steps)


def length_weighted(e: Enumeration) -> Tensor:
    """(N,) whose expectation is GRPO's own objective: a row's reward above the average, divided by its own steps."""
    rewards = rewards_of(e.rollout.completion)
    return (rewards - e.probability @ rewards) / e.rollout.num_steps


def test_sequence_norm_is_unbiased_for_the_length_weighted_objective():
    """Where rows end early, "sequence" is unbiased for GRPO's surrogate, grad E[(r - mean r) / T_i], and not for grad E[r].

    Good rows count for more the shorter they are, bad ones for less the longer they are.
    """
    for name, kind, k in [("blocks", "entropy", 1), ("blocks, two a step", "uniform", 1)]:
        e = enumerate_trajectories(name)
        expected = expected_gradient(e, k, kind, length_norm="sequence")
        assert_same(expected, (1 - 1 / 2) * exact_gradient(e, length_weighted(e)))
        assert cosine(expected, exact_gradient(e)) < 0.99


def test_update_at_full_k_has_no_noise_and_wastes_nothing():
    """With k >= T every draw gives the same update; rows without advantage and repeated steps cost no pass."""
    e = enumerate_trajectories("blocks")
    advantage = torch.randn(len(e.probability), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantage[::3] = 0
    learns = advantage != 0
    options = dict(on_policy=True, **e.temperature)

    def update(k, micro_batch, seed, rows=slice(None)):
        rng = torch.Generator().manual_seed(seed)
        with rows_seen(e.model) as seen:
            figures = agrpo.policy_gradient(
                e.model, select(e.rollout, rows), advantage[rows], k=k, micro_batch=micro_batch, generator=rng, **options
            )
        assert figures["passes"] == seen["sequences"]
        assert seen["positions"] == seen["sequences"]  # the head sees the token that is filled in, not the sequence
        return figures["passes"]

    full = policy_gradient(e.model, e.rollout, advantage, k=4, **options)
    for micro_batch, seed, k in [(1000, 1, 4), (9, 2, 6)]:
        e.model.zero_grad()
        assert update(k, micro_batch, seed) == e.rollout.num_steps[learns].sum()
        assert_same(-torch.cat([p.grad.flatten() for p in e.model.parameters()]), full)
    assert update(3, 64, 3) <= 3 * learns.sum()
    assert update(1, 64, 4) == learns.sum()
    assert agrpo.policy_gradient(e.model, e.rollout, 0 * advantage, k=1, **options)["passes"] == 0


# ======================================================================================================================
# 6. What is not exact, and by how much
# ======================================================================================================================


def one_step_gradient(e: Enumeration) -> Tensor:
    """diffu-GRPO (d1, arXiv 2504.12216): all tokens as if filled in at step 0, from masks only (its prompt masking aside)."""
    r = e.rollout
    at_once = replace(
        r, step=0 * r.step, num_steps=torch.ones_like(r.num_steps), entropy=r.entropy.sum(1, keepdim=True)
    )
    return expected_gradient(replace(e, rollout=at_once), k=1) / e.steps


def resampled_masks_gradient(e: Enumeration) -> Tensor:
    """The completion's ELBO in place of the trajectory: each completion as if written in every order equally often."""
    mass, (_, text) = advantage_mass(e), e.rollout.completion.unique(dim=0, return_inverse=True)
    mean = torch.zeros(text.max() + 1).double().index_reduce(0, text, mass, "mean", include_self=False)
    return expected_gradient(e, 1, mass=mean[text])


@lru_cache
def bias_table() -> dict[str, tuple[float, float]]:
    """The expected update of each estimator against (1 - 1/G) grad E[reward] / T: cosine, and norm relative to it."""
    plain, blocks, sure = map(enumerate_trajectories, ("plain", "blocks", "low confidence"))
    table = {
        "AGRPO, k=1, uniform": (plain, expected_gradient(plain, 1)),
        "AGRPO, k=1, entropy": (plain, expected_gradient(plain, 1, "entropy")),
        "AGRPO, k=2, entropy": (plain, expected_gradient(plain, 2, "entropy")),
        "AGRPO, rows end early, constant": (blocks, expected_gradient(blocks, 1)),
        "  the same, sequence": (blocks, expected_gradient(blocks, 1, length_norm="sequence")),
        "  advantages over their std": (plain, expected_gradient(plain, 1, mass=advantage_mass(plain, 2, True))),
        "  low-confidence unmasking": (sure, expected_gradient(sure, 1)),
        "  resampled random masks": (plain, resampled_masks_gradient(plain)),
        "  one step (diffu-GRPO)": (plain, one_step_gradient(plain)),
    }
    exact = {name: 0.5 * exact_gradient(e) / e.steps for name, (e, _) in table.items()}
    return {name: (cosine(g, exact[name]), float(g.norm() / exact[name].norm())) for name, (_, g) in table.items()}


def test_what_is_biased():
    """AGRPO has cosine and relative norm 1. Everything below it in the table has not, not even its direction."""
    for name, (direction, norm) in bias_table().items():
        print(name, direction, norm)


# ======================================================================================================================
# 7. The objective, off the policy that sampled
# ======================================================================================================================

