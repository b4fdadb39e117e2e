"""Losses against the papers' formulas, written out in float64 NumPy loops; gradients against finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlquant.errors import InputError
from rlquant.llm.log_probabilities import token_log_probs
from rlquant.llm.losses import (
    AdaptiveKL,
    bradley_terry_loss,
    dpo_loss,
    gae,
    kl_estimate,
    masked_mean,
    penalised_rewards,
    policy_loss,
    truncated_weights,
    value_loss,
    whiten,
)
from rlquant.quant import QuantLinear

Array = np.ndarray


@st.composite
def batches(draw: Any) -> tuple[np.random.Generator, Array]:
    """A generator of numbers, and a mask of right-padded completions of at least one token."""
    rows, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(1, tokens), min_size=rows, max_size=rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng, np.array([[t < length for t in range(tokens)] for length in lengths])


def tensors(*arrays: Array, grad: bool = False) -> list[torch.Tensor]:
    made = [torch.from_numpy(np.array(array)) for array in arrays]
    return [each.requires_grad_() if grad else each for each in made]


def counted(values: Array, mask: Array) -> list[float]:
    return [float(v) for v, m in zip(values.ravel(), mask.ravel(), strict=True) if m]


def close(actual: torch.Tensor, expected: Any) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@given(batches(), st.booleans())
def test_whiten(batch: tuple[np.random.Generator, Array], shift: bool) -> None:
    rng, mask = batch
    values = rng.normal(2.0, 3.0, mask.shape)
    seen = counted(values, mask)
    mean = sum(seen) / len(seen)
    variance = sum((v - mean) ** 2 for v in seen) / len(seen)
    expected = np.zeros(mask.shape)
    for index in zip(*np.nonzero(mask), strict=True):
        expected[index] = (values[index] - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift else mean)
    hidden = np.where(mask, values, np.inf)  # what does not count may be anything
    close(whiten(*tensors(np.where(mask, values, 1e6), mask), shift_mean=shift), expected)
    close(masked_mean(*tensors(hidden, mask)), mean)


@given(batches(), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_gae_is_the_sum_of_equation_16(
    batch: tuple[np.random.Generator, Array], gamma: float, lam: float
) -> None:
    rng, mask = batch
    rewards, values = rng.normal(size=(2, *mask.shape))
    advantages = np.zeros(mask.shape)
    for row, length in enumerate(mask.sum(axis=1)):
        v = [*values[row, :length], 0.0]  # the state after the last token is terminal
        deltas = [rewards[row, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            advantages[row, t] = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
    dirty = np.where(mask, values, 99.0)
    found, returns = gae(*tensors(np.where(mask, rewards, 7.0), dirty, mask), gamma=gamma, gae_lambda=lam)
    close(found, advantages)
    close(returns, np.where(mask, advantages + values, 0.0))


def test_gae_with_lambda_one_is_the_reward_to_go() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.3, -0.2, 0.9]])
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0]]))


@given(batches(), st.floats(0.05, 0.5))
def test_policy_loss_is_equation_7(batch: tuple[np.random.Generator, Array], clip: float) -> None:
    rng, mask = batch
    new, old, advantages = rng.normal(-1.0, 0.4, (3, *mask.shape))
    surrogate, clipped = [], []
    for index in zip(*np.nonzero(mask), strict=True):
        ratio = math.exp(new[index] - old[index])
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        surrogate.append(min(ratio * advantages[index], bounded * advantages[index]))
        clipped.append(float(bounded * advantages[index] < ratio * advantages[index]))
    found = policy_loss(*tensors(np.where(mask, new, 1e4), old, advantages, mask), clip=clip)
    close(found.loss, -sum(surrogate) / len(surrogate))
    close(found.clipped, sum(clipped) / len(clipped))
    sampled = old + rng.normal(0.0, 0.5, mask.shape)
    weights = truncated_weights(*tensors(old, np.where(mask, sampled, 1e4), mask), 1.3)
    places = list(zip(*np.nonzero(mask), strict=True))
    literal = [min(math.exp(old[index] - sampled[index]), 1.3) for index in places]
    weighted = policy_loss(*tensors(new, old, advantages, mask), clip=clip, weights=weights)
    close(weighted.loss, -sum(w * s for w, s in zip(literal, surrogate, strict=True)) / len(places))
    close(found.largest, max(abs(d) for d in counted(new - old, mask)))
    inputs = tensors(new, grad=True)
    fixed = tensors(old, advantages, mask)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, *fixed, clip=clip).loss, inputs, atol=1e-4)


def test_the_gradient_of_the_policy_loss_at_the_start_is_that_of_reinforce() -> None:
    log_probs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    found = policy_loss(log_probs, log_probs.detach(), advantages, mask)
    found.loss.backward()
    torch.testing.assert_close(log_probs.grad, -advantages / 12)
    assert float(found.largest) == float(found.approx_kl) == float(found.clipped) == 0.0


@given(batches(), st.floats(0.05, 0.5))
def test_value_loss(batch: tuple[np.random.Generator, Array], clip: float) -> None:
    rng, mask = batch
    new, old, returns = rng.normal(size=(3, *mask.shape))
    losses = []
    for index in zip(*np.nonzero(mask), strict=True):
        bounded = old[index] + min(max(new[index] - old[index], -clip), clip)
        losses.append(max((new[index] - returns[index]) ** 2, (bounded - returns[index]) ** 2))
    fixed = tensors(old, returns, mask)
    close(value_loss(*tensors(new), *fixed, clip=clip), 0.5 * sum(losses) / len(losses))
    inputs = tensors(new, grad=True)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, *fixed, clip=clip), inputs, atol=1e-4)


@given(batches(), st.floats(0.0, 2.0))
def test_penalised_rewards(batch: tuple[np.random.Generator, Array], beta: float) -> None:
    rng, mask = batch
    kl, scores = rng.normal(size=mask.shape), rng.normal(size=len(mask))
    expected = np.zeros(mask.shape)
    for row, length in enumerate(mask.sum(axis=1)):
        for t in range(length):
            expected[row, t] = -beta * kl[row, t] + (scores[row] if t == length - 1 else 0.0)
    close(penalised_rewards(*tensors(scores, np.where(mask, kl, 5.0), mask), beta), expected)


def test_kl_estimators_have_the_expectations_of_the_note() -> None:
    rng = np.random.default_rng(0)
    p, q = (np.exp(x) / np.exp(x).sum() for x in rng.normal(size=(2, 9)))
    exact = float((p * np.log(p / q)).sum())
    log_p, log_q = tensors(np.log(p), np.log(q))
    mean = {
        kind: float((torch.from_numpy(p) * kl_estimate(log_p, log_q, kind)).sum())
        for kind in ("k1", "k2", "k3")
    }
    assert mean["k1"] == pytest.approx(exact)
    assert mean["k3"] == pytest.approx(exact)
    assert mean["k2"] == pytest.approx(float((p * np.log(p / q) ** 2 / 2).sum()))
    assert float(kl_estimate(log_p, log_q, "k3").min()) >= 0
    with pytest.raises(InputError, match="unknown KL estimator"):
        kl_estimate(log_p, log_q, "k4")


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 5.0), st.floats(0.0, 0.49))
def test_preference_losses(seed: int, beta: float, smoothing: float) -> None:
    c, r, rc, rr = np.random.default_rng(seed).normal(-3.0, 2.0, (4, 5))

    def minus_log_sigmoid(x: float) -> float:
        return math.log1p(math.exp(-x))

    margins = [beta * ((c[i] - rc[i]) - (r[i] - rr[i])) for i in range(5)]
    expected = [(1 - smoothing) * minus_log_sigmoid(m) + smoothing * minus_log_sigmoid(-m) for m in margins]
    loss, margin = dpo_loss(*tensors(c, r, rc, rr), beta=beta, label_smoothing=smoothing)
    close(loss, expected)
    close(margin, margins)
    close(bradley_terry_loss(*tensors(c, r), 0.3), [minus_log_sigmoid(c[i] - r[i] - 0.3) for i in range(5)])
    inputs = tensors(c, r, grad=True)
    fixed = tensors(rc, rr)
    assert torch.autograd.gradcheck(
        lambda a, b: dpo_loss(a, b, *fixed, beta=beta, label_smoothing=smoothing)[0], inputs
    )
    assert torch.autograd.gradcheck(bradley_terry_loss, inputs)


def test_the_losses_of_wrong_pairs_stay_finite() -> None:
    far = torch.tensor([-1e4], dtype=torch.float32)
    assert float(bradley_terry_loss(far, -far)) == pytest.approx(2e4)


def test_adaptive_kl() -> None:
    control = AdaptiveKL(0.2, target=6.0)
    for kl, factor in ((6.0, 1.0), (60.0, 1.02), (0.0, 0.98), (6.6, 1.01)):
        before = control.coefficient
        control.update(kl)
        assert control.coefficient == pytest.approx(before * factor)
    fixed = AdaptiveKL(0.2)
    fixed.update(1e9)
    assert fixed.coefficient == 0.2
    with pytest.raises(InputError, match="target KL"):
        AdaptiveKL(0.1, target=0.0)
    with pytest.raises(InputError, match="label smoothing"):
        dpo_loss(*[torch.zeros(1)] * 4, label_smoothing=0.5)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_log_probabilities_are_those_of_log_softmax(chunk: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 11, bias=False, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(3, 5, 6, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(0, 11, (3, 5), generator=generator)
    found, entropy = token_log_probs(hidden, head, targets, temperature=temperature, chunk=chunk)
    whole = torch.log_softmax(head(hidden) / temperature, dim=-1)
    torch.testing.assert_close(found, whole.gather(2, targets[..., None])[..., 0])
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=whole).entropy())
    assert torch.autograd.gradcheck(
        lambda x: token_log_probs(x, head, targets, temperature=temperature, chunk=chunk)[0], (hidden,)
    )
    weights = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    (ours,) = torch.autograd.grad((found * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((whole.gather(2, targets[..., None])[..., 0] * weights).sum(), hidden)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_give_float32_log_probabilities(dtype: torch.dtype) -> None:
    head = nn.Linear(16, 50, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(9, 16).to(dtype).requires_grad_()
    targets = torch.arange(9)
    found, _ = token_log_probs(hidden, head, targets, chunk=4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.log_softmax(head(hidden).float(), -1)[torch.arange(9), targets])
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype


def test_a_packed_head_and_a_trainable_one() -> None:
    from rlquant.quant import Scheme

    float_head = nn.Linear(32, 40, bias=False)
    packed = QuantLinear(float_head, Scheme.parse("int8"))
    packed.load_float(float_head)
    packed.packed.caches = False
    hidden = torch.randn(6, 32, requires_grad=True)
    targets = torch.arange(6)
    found, _ = token_log_probs(hidden, packed, targets, chunk=2)
    whole = torch.log_softmax(hidden @ packed.weight.T, -1)[targets, targets]
    torch.testing.assert_close(found, whole)
    (ours,) = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
    (theirs,) = torch.autograd.grad(whole.sum(), hidden)
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(InputError, match="freeze"):
        token_log_probs(hidden, float_head, targets)


def test_no_more_than_a_chunk_of_logits_is_ever_made() -> None:
    head = nn.Linear(8, 1000, bias=False).requires_grad_(False)
    largest: list[int] = []
    head.register_forward_hook(lambda _module, _args, out: largest.append(out.numel()))
    saved: list[int] = []
    hidden = torch.randn(300, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        found, _ = token_log_probs(hidden, head, torch.zeros(300, dtype=torch.long), chunk=32)
    found.sum().backward()
    assert max(largest) == 32 * 1000
    assert max(saved) == 300 * 8
