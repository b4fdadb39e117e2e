"""Roles on one base: each computes as a model of its own would, and a reward model comes back from its folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlquant.errors import InputError
from rlquant.llm.adapters import AdapterSettings, adapter_parameters, base_model, save_adapter
from rlquant.llm.heads import ScoreHead
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.llm.reward_model import ModelReward, load_reward_model, right_padded, save_reward_model
from rlquant.llm.roles import Roles, positions

SMALL = AdapterSettings(rank=4)


def quantized(precision: str = "nf4") -> LanguageModel:
    lm = LanguageModel(copy.deepcopy(tiny.model()), tiny.tokenizer(), "tiny", "fp32")
    return quantize_model_(lm, Plan.parse(precision))


def stirred(roles: Roles) -> Roles:
    """Adapters and heads as after training."""
    generator = torch.Generator().manual_seed(1)
    for role in roles.adapters:
        for parameter in roles.parameters(role).values():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return roles


def all_roles(**options: Any) -> Roles:
    roles = Roles(quantized(), **options)
    for role in ("policy", "reward", "critic"):
        roles.add(role, SMALL)
    return stirred(roles)


def padded(left: int, right: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A text alone, and the same between padding of tokens that mean something elsewhere."""
    text = torch.tensor(tiny.tokenizer()("7 and 5 make 12. ")["input_ids"])
    ids = torch.cat([torch.full((left,), 65), text, torch.full((right,), 66)])
    mask = torch.tensor([False] * left + [True] * len(text) + [False] * right)
    return text[None], ids[None], mask[None]


def test_padding_at_either_end_changes_nothing() -> None:
    roles = all_roles()
    text, ids, mask = padded(3, 4)
    whole = torch.ones_like(text).bool()
    with torch.no_grad():
        alone = roles.policy(text, whole, last=6)
        torch.testing.assert_close(roles.policy(ids, mask, last=10)[:, :6], alone)
        torch.testing.assert_close(roles.values(ids, mask, last=10)[:, :6], roles.values(text, whole, last=6))
        torch.testing.assert_close(roles.rewards(ids, mask), roles.rewards(text, whole))


def test_positions_count_what_is_no_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_each_role_is_what_transformers_computes_with_that_adapter() -> None:
    roles = all_roles()
    text, _, _ = padded(0, 0)
    mask = torch.ones_like(text).bool()
    with torch.no_grad():
        plain = quantized().model(text).logits.log_softmax(-1)[0, -5:-1]
        found = roles.reference(text, mask, last=4)
        torch.testing.assert_close(found[0], plain.gather(1, text[0, -4:, None])[:, 0])
        for role in ("policy", "reward", "critic"):
            with roles.acting(role):
                out = roles.model(text, output_hidden_states=True)
            torch.testing.assert_close(roles.hidden(role, text, mask), out.hidden_states[-1])
        with roles.acting("policy"):
            logits = roles.model(text).logits
        policy = (logits / 0.7).log_softmax(-1)[0, -5:-1].gather(1, text[0, -4:, None])[:, 0]
        torch.testing.assert_close(roles.policy(text, mask, last=4, temperature=0.7)[0], policy)
        assert not torch.allclose(policy, found)
        state = roles.hidden("critic", text, mask)[0, -5:-1]
        head = roles.heads["critic"]
        torch.testing.assert_close(roles.values(text, mask, last=4)[0], state @ head.weight + head.bias)


def test_there_is_no_second_copy_of_the_base() -> None:
    lm = quantized()
    codes = {id(part) for name, part in lm.model.named_buffers() if name.endswith("codes")}
    roles = Roles(lm)
    before = roles.base_hash()
    for role in ("policy", "reward", "critic"):
        roles.add(role, SMALL)
    after = {id(part) for name, part in roles.model.named_buffers() if name.endswith("codes")}
    assert after == codes
    assert roles.base_hash() == before
    assert {parameter.dtype for role in roles.adapters for parameter in roles.parameters(role).values()} == {
        torch.float32
    }


def test_checkpointing_changes_no_gradient_and_keeps_less() -> None:
    text, ids, mask = padded(2, 1)
    grads, kept = [], []
    for checkpointing in (False, True):
        roles = all_roles(checkpointing=checkpointing)
        roles.model.eval()
        numbers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, n=numbers: (n.append(t.numel()), t)[1], lambda t: t
        ):
            policy, values = roles.policy(ids, mask, last=5), roles.values(ids, mask, last=5)
        (policy.sum() + values.square().sum()).backward()
        own = {**roles.parameters("policy"), **roles.parameters("critic")}
        grads.append([parameter.grad for parameter in own.values()])
        kept.append(sum(numbers))
        assert not any(part.training for part in roles.model.modules())
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    assert kept[1] < 0.5 * kept[0]
    assert len(text) == 1


def test_a_reference_of_its_own(tmp_path: Path) -> None:
    sft = stirred(_with_policy())
    save_adapter(sft.model, "policy", tmp_path)
    roles = Roles(quantized())
    roles.load("policy", tmp_path, trainable=True)
    roles.load("reference", tmp_path)
    text, _, _ = padded(0, 0)
    mask = torch.ones_like(text).bool()
    with torch.no_grad():
        torch.testing.assert_close(
            roles.policy(text, mask, last=4), roles.reference(text, mask, last=4), rtol=0, atol=0
        )
        assert not torch.allclose(
            roles.reference(text, mask, last=4), _with_policy().reference(text, mask, last=4)
        )
    assert not any(each.requires_grad for each in adapter_parameters(roles.model, "reference").values())


def _with_policy() -> Roles:
    roles = Roles(quantized())
    roles.add("policy", SMALL)
    return roles


def test_a_reward_model_comes_back(tmp_path: Path) -> None:
    roles = all_roles()
    prompts, answers = ["7 and 5 make ", "1 and 2 make ", "3 "], ["12. ", "4. ", "and 3 make 6. "]
    reward = ModelReward(roles, batch=2)
    first = reward(prompts, answers, [{}] * 3)
    roles.heads["reward"].normalise_(torch.tensor(first))
    normalised = reward(prompts, answers, [{}] * 3)
    assert abs(sum(normalised)) < 1e-4
    assert torch.tensor(normalised).std(correction=0) == pytest.approx(1.0, abs=1e-4)
    save_reward_model(roles, tmp_path)
    again = _with_policy()
    load_reward_model(again, tmp_path)
    assert ModelReward(again)(prompts, answers, [{}] * 3) == pytest.approx(normalised, abs=1e-5)
    assert not any(each.requires_grad for each in again.parameters("reward").values())
    document = json.loads((tmp_path / "reward.json").read_text())
    assert document["base"] == {"precision": "nf4", "method": "rtn", "sha256": ""}
    with pytest.warns(UserWarning, match="another base: precision nf4"):
        load_reward_model(Roles(quantized("int8")), tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged or swapped"):
        load_reward_model(_with_policy(), tmp_path)
    (tmp_path / "reward.json").unlink()
    with pytest.raises(InputError, match="no finished reward model"):
        load_reward_model(_with_policy(), tmp_path)


def test_scores_and_hidden_states_of_half_precision() -> None:
    head = ScoreHead(64, seed=0)
    states = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(states)
    torch.testing.assert_close(found, states.float() @ head.weight)
    assert float(head.weight.detach().std()) == pytest.approx(1 / 65**0.5, rel=0.3)


def test_right_padding() -> None:
    ids, mask = right_padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]


def test_bad_roles() -> None:
    roles = _with_policy()
    with pytest.raises(InputError, match="unknown role 'judge'"):
        roles.add("judge", SMALL)
    with pytest.raises(InputError, match=r"unknown role 'critic'"), roles.acting("critic"):
        pass
    text, _, _ = padded(0, 0)
    with pytest.raises(InputError):
        roles.values(text, torch.ones_like(text), last=2)
    bent = LanguageModel(copy.deepcopy(tiny.model()), tiny.tokenizer(), "bent", "fp32")
    bent.model.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match="final_logit_softcapping"):
        Roles(bent)
    assert base_model(roles.model) is not roles.model


@pytest.mark.gpu
def test_attention_gradients_on_a_gpu_are_numbers() -> None:
    """Of 64 keys whose scores are -96, behind a mask: cuDNN's are NaN, see ``attention.py``."""
    Roles(quantized("int8"))
    query = torch.full((1, 1, 64, 64), 4.0, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key = (
        torch.full((1, 1, 64, 64), -3.0, device="cuda", dtype=torch.bfloat16)
        + torch.randn(64, 64, device="cuda") / 9
    )
    key = key.to(torch.bfloat16)
    mask = torch.ones(64, 64, dtype=torch.bool, device="cuda")
    out = torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    out.square().sum().backward()
    assert query.grad is not None
    assert bool(query.grad.isfinite().all())
    assert float(query.grad.abs().max()) > 0
