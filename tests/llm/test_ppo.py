"""PPO on a tiny Qwen2 in NF4: the reward rises, the base stays, a resumed run repeats the uninterrupted one."""

from __future__ import annotations

import copy
import math
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import ValidationError

from rlquant.errors import InputError
from rlquant.llm.adapters import AdapterSettings, base_model
from rlquant.llm.engine import Completion
from rlquant.llm.experience import collect
from rlquant.llm.model import LanguageModel
from rlquant.llm.ppo import PPO, PPOSettings
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.llm.reward_model import ModelReward
from rlquant.llm.roles import Roles
from rlquant.llm.rollout import EngineGenerate, Rollout, TransformersGenerate, eos_ids, lay_out

ROWS = [{"prompt": f"{a} and {b} make ", "sum": a + b} for a in range(3, 13) for b in range(2, 9)]
FAST = PPOSettings(
    steps=6,
    batch=8,
    minibatch=4,
    epochs=2,
    learning_rate=1e-3,
    critic_learning_rate=1e-3,
    max_new_tokens=5,
    kl_coefficient=0.02,
)


def quantized(dtype: torch.dtype = torch.float32, *, eos: str | None = None) -> LanguageModel:
    """The tiny model in NF4; ``eos`` makes a letter that it often writes its end, and its padding too."""
    tokenizer = tiny.tokenizer()
    if eos is not None:
        tokenizer.eos_token = tokenizer.pad_token = eos
    lm = LanguageModel(copy.deepcopy(tiny.model()), tokenizer, "tiny", "fp32")
    lm = quantize_model_(lm, Plan.parse("nf4"))
    lm.model.generation_config.eos_token_id = tokenizer.eos_token_id
    lm.model.to(dtype)
    return lm


def roles_of(lm: LanguageModel | None = None, *, seed: int = 0, **options: Any) -> Roles:
    roles = Roles(lm or quantized(), **options)
    for role in ("policy", "critic"):
        roles.add(role, AdapterSettings(rank=8, seed=seed))
    return roles


def ones(_prompts: list[str], completions: list[str], _rows: list[dict[str, Any]]) -> list[float]:
    """Share of the letter 1."""
    return [text.count("1") / max(len(text), 1) for text in completions]


def but(settings: PPOSettings, **changes: Any) -> PPOSettings:
    return PPOSettings(**{**settings.model_dump(), **changes})


def metrics_of(ppo: PPO, **options: Any) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    ppo.run(progress=lambda _step, metrics: found.append(metrics), **options)
    return found


def weights(ppo: PPO) -> list[torch.Tensor]:
    named = [ppo.roles.parameters(role) for role in ("policy", "critic")]
    return [each.detach().clone() for part in named for each in part.values()]


@pytest.mark.parametrize(
    ("seed", "rollouts"), [(0, "transformers"), (1, "transformers"), (2, "transformers"), (1, "rlquant")]
)
def test_the_reward_at_least_doubles(seed: int, rollouts: str) -> None:
    settings = but(
        FAST,
        steps=12,
        batch=32,
        minibatch=16,
        max_new_tokens=8,
        learning_rate=1e-2,
        critic_learning_rate=1e-2,
        kl_coefficient=0.002,
        rollouts=rollouts,
        seed=seed,
    )
    roles = roles_of(seed=seed)
    before = roles.base_hash()
    found = metrics_of(PPO(roles, ROWS, ones, settings))
    assert found[0]["kl"] == 0.0  # the adapter starts as no change
    start = sum(each["reward"] for each in found[:2]) / 2
    end = sum(each["reward"] for each in found[-3:]) / 3
    assert end > 2 * start
    assert all(each["first_ratio"] == 0.0 for each in found)
    assert roles.base_hash() == before


@pytest.mark.parametrize("options", [{}, {"microbatch": 3}, {"kl_estimator": "k3", "whiten_rewards": True}])
def test_ratios_start_at_exactly_one(options: dict[str, Any]) -> None:
    roles = Roles(quantized(), checkpointing=True)
    for role in ("policy", "critic"):
        roles.add(role, AdapterSettings(rank=4, dropout=0.5))  # dropout would move them
    rows = [{"prompt": text} for text in ("3 and 4 make ", "1", "5 and 7 make 12. 8 and ", "2 and")]
    found = metrics_of(PPO(roles, rows, ones, but(FAST, steps=3, **options)))
    assert [each["first_ratio"] for each in found] == [0.0] * 3
    assert all(each["approx_kl"] > 0 for each in found)  # later minibatches are of an updated policy


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = but(FAST, kl_target=0.5, anneal=True)
    whole = PPO(roles_of(), ROWS, ones, settings)
    expected = metrics_of(whole, checkpoint=tmp_path / "whole", every=100)
    part = PPO(roles_of(), ROWS, ones, settings)
    first = [part.train_step() for _ in range(3)]
    part.save(tmp_path / "state")
    part.train_step()  # lost
    torch.manual_seed(123)  # another process has other generators
    resumed = PPO(roles_of(seed=0), ROWS, ones, settings)
    rest = metrics_of(resumed, checkpoint=tmp_path / "state", every=2)
    assert first + rest == expected
    assert len({each["kl_coefficient"] for each in expected}) == 6
    for one, other in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "state").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_run_that_is_stopped_goes_on(tmp_path: Path) -> None:
    expected = metrics_of(PPO(roles_of(), ROWS, ones, but(FAST, steps=4)))
    answers = iter([False, True])
    first = metrics_of(
        PPO(roles_of(), ROWS, ones, but(FAST, steps=4)),
        checkpoint=tmp_path / "state",
        stop=lambda: next(answers),
    )
    rest = metrics_of(PPO(roles_of(), ROWS, ones, but(FAST, steps=4)), checkpoint=tmp_path / "state")
    assert len(first) == 2
    assert first + rest == expected


class Fails:
    """A reward function that goes wrong at one call, and is then repaired."""

    def __init__(self, call: int, how: str) -> None:
        self.call, self.how, self.calls = call, how, 0

    def __call__(
        self, prompts: list[str], completions: list[str], rows: list[dict[str, Any]]
    ) -> Sequence[float]:
        if len(prompts) == 1 and rows[0]["sum"] % 2 == 0:
            raise RuntimeError("no even sums")
        self.calls += len(prompts) > 1
        scores = ones(prompts, completions, rows)
        if self.calls != self.call:
            return scores
        if self.how == "raises":
            raise RuntimeError("no even sums")
        return (
            scores[:-1]
            if self.how == "short"
            else [*scores[:-1], {"nan": float("nan"), "text": "1"}[self.how]]
        )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"raised at row \d+, for the completion .*RuntimeError: no even sums"),
        ("short", r"gave 7 scores for the 8 completions of rows \d+"),
        ("nan", r"gave nan at row \d+"),
        ("text", r"gave '1' at row \d+"),
    ],
)
def test_a_reward_that_fails_names_the_row_and_keeps_the_checkpoint(
    how: str, message: str, tmp_path: Path
) -> None:
    settings = but(FAST, steps=4)
    expected = metrics_of(PPO(roles_of(), ROWS, ones, settings))
    file = tmp_path / "runs" / "state"
    found: list[dict[str, float]] = []
    ppo = PPO(roles_of(), ROWS, Fails(3, how), settings)
    with pytest.raises(InputError, match=message):
        ppo.run(checkpoint=file, every=1, progress=lambda _step, metrics: found.append(metrics))
    assert len(found) == 2
    assert found + metrics_of(PPO(roles_of(), ROWS, ones, settings), checkpoint=file) == expected


def test_the_row_named_is_the_one_that_raises(tmp_path: Path) -> None:
    rows = [{"prompt": "3 and 4 make ", "sum": 7}, {"prompt": "3 and 5 make ", "sum": 8}]
    ppo = PPO(roles_of(), rows, Fails(1, "raises"), but(FAST, batch=2, minibatch=2))
    with pytest.raises(InputError, match="raised at row 1,"):
        ppo.run()


def gradients(microbatch: int | None) -> list[torch.Tensor]:
    settings = but(FAST, batch=4, epochs=1, microbatch=microbatch, max_grad_norm=1e9)
    ppo = PPO(roles_of(quantized(eos=".")), ROWS, ones, settings)
    for parameter in ppo.roles.parameters("policy").values():
        torch.manual_seed(parameter.numel())
        parameter.data += 0.05 * torch.randn_like(parameter)
    ppo.train_step()
    return [each.grad for role in ("policy", "critic") for each in ppo.roles.parameters(role).values()]


def test_micro_batches_change_no_gradient() -> None:
    whole = gradients(None)
    assert sum(float(each.abs().sum()) for each in whole) > 0
    for microbatch in (1, 3):
        for one, other in zip(gradients(microbatch), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sampler", [TransformersGenerate, EngineGenerate])
def test_padding_may_be_the_end_of_sequence_which_is_learnt(sampler: Any) -> None:
    roles = roles_of(quantized(eos="."))
    end = roles.lm.tokenizer.eos_token_id
    assert roles.lm.tokenizer.pad_token_id == end
    prompts = [roles.lm.tokens(row["prompt"]) for row in ROWS[:8]]
    generate = sampler(roles, max_new_tokens=6)
    completions = [each.ids for each in generate(prompts, seed=0)]
    assert any(each[-1] == end for each in completions)
    assert all(end not in each[:-1] for each in completions)
    rollout = lay_out(prompts, completions, eos_ids(roles.lm))
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert rollout.ids[row][rollout.mask[row]].tolist() == prompt + completion  # the eos counts
        assert int(rollout.completed[row].sum()) == len(completion)
        assert bool(rollout.ended[row]) == (completion[-1] == end)
    assert [each.ids for each in generate(prompts, seed=0)] == completions
    assert [each.ids for each in generate(prompts, seed=1)] != completions


@pytest.mark.parametrize("sampler", [TransformersGenerate, EngineGenerate])
def test_completions_are_samples_of_the_policy_whatever_the_model_suggests(sampler: Any) -> None:
    """Frequencies of the first token against its probabilities."""
    roles = roles_of()
    model = base_model(roles.model)
    model.generation_config.update(top_k=1, repetition_penalty=5.0, do_sample=True)
    prompt = roles.lm.tokens("3 and 4 make ")
    drawn = sampler(roles, max_new_tokens=1, temperature=1.5)([prompt] * 2000, seed=0)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
    found = torch.bincount(torch.tensor([each.ids[0] for each in drawn]), minlength=len(expected)) / 2000
    assert float((found - expected).abs().sum()) / 2 < 0.08  # total variation
    assert float(expected.max()) < 0.8
    assert model.generation_config.top_k == 1


def test_experience_of_a_rollout_by_hand() -> None:
    """Where the score, the penalties and the values come to lie."""
    roles = roles_of()
    for parameter in roles.parameters("policy").values():
        torch.manual_seed(parameter.numel())
        parameter.data += 0.05 * torch.randn_like(parameter)
    prompts, answers = [[51, 220], [52, 220, 53]], [[49, 50, 256], [50]]
    rollout: Rollout = lay_out(prompts, answers, {256})
    settings = but(FAST, batch=2, minibatch=2, gamma=1.0, gae_lambda=1.0, whiten_advantages=False)
    settings = but(settings, missing_eos_penalty=0.5)
    with torch.no_grad():
        found, metrics = collect(
            roles, rollout, torch.tensor([2.0, 3.0]), torch.tensor([1, 0]), settings, 0.1
        )
        kls = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt + answer])
            places, wanted = slice(len(prompt) - 1, -1), torch.tensor(answer)[:, None]
            log_probs = []
            for role in ("policy", "reference"):
                with roles.acting(role):
                    logits = roles.model(ids).logits[0, places]
                log_probs.append(logits.log_softmax(-1).gather(1, wanted)[:, 0])
            kls.append(log_probs[0] - log_probs[1])
    to_go = [
        [2.0 - 0.1 * float(kls[0][t:].sum()) for t in range(3)],
        [2.5 - 0.1 * float(kls[1][0]), 0.0, 0.0],
    ]
    torch.testing.assert_close(found.returns, torch.tensor(to_go))
    assert float(found.values.abs().max()) == 0.0  # the critic's head starts at zero
    assert metrics["kl"] == pytest.approx((float(kls[0].sum()) + float(kls[1].sum())) / 2, abs=1e-5)
    assert (metrics["reward"], metrics["ended"], metrics["length"]) == (2.5, 0.5, 2.0)


def test_a_full_disk_keeps_the_checkpoint_that_was_there(tmp_path: Path) -> None:
    ppo, file = PPO(roles_of(), ROWS, ones, FAST), tmp_path / "state"
    ppo.save(file)
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ppo.train_step()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # writes fail beyond half of it
    try:
        with pytest.raises(InputError, match="state cannot be written: File too large"):
            ppo.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_every_row_comes_once_before_any_comes_again() -> None:
    rows = ROWS[:12]
    seen: list[int] = []

    def reward(prompts: list[str], completions: list[str], given: list[dict[str, Any]]) -> list[float]:
        seen.extend(rows.index(row) for row in given)
        return ones(prompts, completions, given)

    PPO(roles_of(), rows, reward, but(FAST, steps=3, epochs=1)).run()
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:] != list(range(12))


def test_another_engine_may_complete_the_prompts() -> None:
    calls: list[tuple[int, int]] = []
    (one,) = tiny.tokenizer()("1")["input_ids"]

    def engine(prompts: Sequence[Sequence[int]], *, seed: int) -> list[Completion]:
        calls.append((len(prompts), seed))
        return [Completion(number, 0, [one, 256]) for number in range(len(prompts))]

    found = metrics_of(PPO(roles_of(), ROWS, ones, but(FAST, steps=2), generate=engine))
    assert [each["reward"] for each in found] == [1.0, 1.0]
    assert found[0]["ended"] == 1.0
    assert [count for count, _ in calls] == [8, 8]
    assert calls[0][1] != calls[1][1]
    silent = PPO(
        roles_of(), ROWS, ones, FAST, generate=lambda prompts, *, seed: [Completion(0, 0)] * len(prompts)
    )
    with pytest.raises(InputError, match="no completion"):
        silent.run()


def test_the_mismatch_of_what_sampled_is_measured_and_weighed() -> None:
    """The engine's is rounding. Another, always sure of what it says, is off by the policy's own numbers."""
    found = metrics_of(PPO(roles_of(), ROWS, ones, but(FAST, steps=2, rollouts="rlquant")))
    assert all(0 <= each["mismatch_mean"] <= each["mismatch"] < 1e-4 for each in found)
    assert all(0 <= each["mismatch_kl"] < 1e-8 for each in found)
    (one,) = tiny.tokenizer()("1")["input_ids"]

    def sure(prompts: Sequence[Sequence[int]], *, seed: int) -> list[Completion]:
        return [Completion(number, 0, [one], [0.0]) for number in range(len(prompts))]

    settings = but(FAST, steps=1, epochs=1, batch=4, minibatch=4, importance_cap=0.5)
    ppo = PPO(roles_of(), ROWS, ones, settings, generate=sure)
    rollout, scores = ppo._roll_out()
    order = torch.arange(4)
    with torch.no_grad():
        experience, metrics = collect(ppo.roles, rollout, scores, order, settings, 0.0)
    probability = ppo.roles.policy(rollout.ids, rollout.mask, last=1).exp()[:, 0].double()
    assert metrics["mismatch"] == pytest.approx(float(-probability.log().min()), rel=1e-5)
    assert metrics["mismatch_kl"] == pytest.approx(
        float((probability - 1 - probability.log()).mean()), rel=1e-5
    )
    assert experience.weights is not None
    assert experience.weights[:, 0].tolist() == pytest.approx(probability.clamp(max=0.5).tolist(), rel=1e-5)
    assert "mismatch" not in metrics_of(PPO(roles_of(), ROWS, ones, but(FAST, steps=1)))[0]


def test_gradients_that_are_no_numbers_end_the_run(tmp_path: Path) -> None:
    ppo = PPO(roles_of(), ROWS, ones, but(FAST, steps=3))
    one = next(iter(ppo.roles.parameters("policy").values()))
    one.register_hook(lambda gradient: gradient * (math.nan if ppo.step == 1 else 1))
    with pytest.raises(InputError, match="the gradients of step 2 are no finite numbers"):
        ppo.run(checkpoint=tmp_path / "state", every=1)
    again = PPO(roles_of(), ROWS, ones, but(FAST, steps=3))
    again.restore(tmp_path / "state")
    assert again.step == 1
    assert all(bool(each.isfinite().all()) for each in weights(again))


def test_four_roles_on_one_base_with_a_reward_model() -> None:
    roles = roles_of()
    roles.add("reward", AdapterSettings(rank=4))
    before, reward = roles.base_hash(), copy.deepcopy(list(roles.parameters("reward").values()))
    found = metrics_of(PPO(roles, ROWS, ModelReward(roles), but(FAST, steps=2)))
    assert len({each["reward"] for each in found}) == 2
    assert roles.base_hash() == before
    assert all(torch.equal(a, b) for a, b in zip(reward, roles.parameters("reward").values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_train_float32_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    ppo = PPO(roles_of(quantized(dtype)), ROWS, ones, but(FAST, steps=2))
    before = weights(ppo)
    found = metrics_of(ppo, checkpoint=tmp_path / "state")
    assert all(each["first_ratio"] == 0.0 for each in found)
    after = weights(ppo)
    assert {each.dtype for each in after} == {torch.float32}
    assert all(bool(each.isfinite().all()) for each in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (ppo._scaler.get_scale() > 1) == (dtype == torch.float16)
    again = PPO(roles_of(quantized(dtype)), ROWS, ones, but(FAST, steps=3))
    again.restore(tmp_path / "state")
    assert again.train_step() == ppo.train_step()


def test_a_changed_base_is_noticed() -> None:
    ppo = PPO(roles_of(), ROWS, ones, but(FAST, steps=1))
    base_model(ppo.roles.model).model.norm.weight.data[0] += 1e-3
    with pytest.raises(InputError, match="base was changed"):
        ppo.run()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="does not divide into minibatches of 5"):
        but(FAST, minibatch=5)
    with pytest.raises(ValidationError, match="gamma"):
        but(FAST, gamma=1.5)
    with pytest.raises(ValidationError, match="'k1', 'k2' or 'k3'"):
        but(FAST, kl_estimator="k9")
    roles = roles_of()
    with pytest.raises(InputError, match="row 1 has no text under prompt"):
        PPO(roles, [{"prompt": "a"}, {"text": "b"}], ones, FAST)
    with pytest.raises(InputError, match="row 0 has 600 tokens"):
        PPO(roles, [{"prompt": "a" * 600}], ones, FAST)
    with pytest.raises(InputError, match="no prompt"):
        PPO(roles, [], ones, FAST)
    with pytest.raises(InputError, match="vanish"):
        PPO(roles, ROWS, ones, but(FAST, learning_rate=1e-12))
    alone = Roles(quantized())
    alone.add("policy", AdapterSettings())
    with pytest.raises(InputError, match="needs a critic"):
        PPO(alone, ROWS, ones, FAST)
    ppo, file = PPO(roles, ROWS, ones, FAST), tmp_path / "state"
    ppo.save(file)
    before = weights(ppo)
    with pytest.raises(InputError, match=r"other settings: clip=0.2 \(here 0.1\)"):
        PPO(roles_of(), ROWS, ones, but(FAST, clip=0.1)).restore(file)
    with pytest.raises(InputError, match="other settings: prompts="):
        PPO(roles_of(), ROWS[::-1], ones, FAST).restore(file)
    PPO(roles_of(), ROWS, ones, but(FAST, steps=60)).restore(file)  # a longer run may go on
    other = Roles(quantized())
    other.add("policy", AdapterSettings(rank=2))
    other.add("critic", AdapterSettings(rank=2))
    with pytest.raises(InputError, match="other parameters"):
        PPO(other, ROWS, ones, FAST).restore(file)
    elsewhere = quantized()
    elsewhere.model.model.norm.weight.data[0] += 1e-3
    with pytest.raises(InputError, match="another base"):
        PPO(roles_of(elsewhere), ROWS, ones, FAST).restore(file)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        ppo.restore(file)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(ppo), strict=True))
