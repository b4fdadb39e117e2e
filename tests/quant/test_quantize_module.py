"""quantize_ on whole modules: what is replaced, what is left, and what is refused."""

import copy
import doctest

import pytest
import torch
from torch import nn

import rlquant.quant
from rlquant.errors import InputError
from rlquant.quant import (
    METHODS,
    InputMoments,
    QParams,
    QuantLinear,
    Rule,
    Scheme,
    prepare_empty_,
    quantizable,
    quantize_,
    sqnr_db,
)


class Policy(nn.Module):
    """Two heads on a trunk; the critic is not used in forward, as in an actor-critic policy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 16))
        self.actor = nn.Linear(16, 3)
        self.critic = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
        self.log_std = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor, offset: torch.Tensor | float = 0.0) -> torch.Tensor:
        return self.actor(self.trunk(x)) + offset


def observations(count: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def types(module: nn.Module) -> dict[str, str]:
    return {
        name: type(part).__name__ for name, part in module.named_modules() if "Linear" in type(part).__name__
    }


ALL_LAYERS = ["trunk.0", "trunk.3", "actor", "critic.0", "critic.1"]


def test_every_layer_is_replaced_in_place() -> None:
    policy = Policy()
    assert list(quantizable(policy)) == ALL_LAYERS
    assert quantize_(policy, "int8") is policy
    assert types(policy) == dict.fromkeys(ALL_LAYERS, "QuantLinear")
    assert quantizable(policy) == {}
    assert [name for name, _ in policy.named_parameters()] == ["log_std"]


def test_a_bare_layer_returns_its_replacement() -> None:
    layer = nn.Linear(3, 2)
    assert list(quantizable(layer)) == [""]
    assert isinstance(quantize_(layer, "nf4"), QuantLinear)


def test_fp32_changes_nothing() -> None:
    policy = Policy()
    before = dict(policy.named_modules())
    assert quantize_(policy, "fp32") is policy
    assert prepare_empty_(policy, "fp32") is policy
    assert dict(policy.named_modules()) == before


def test_more_bits_are_closer() -> None:
    x = observations()
    expected = Policy().eval()(x)
    ratios = []
    for name in ("w4a4", "w6a6", "w8a8", "w12a12", "w16a16"):
        ratios.append(
            sqnr_db(expected, quantize_(Policy().eval(), name, calibration=[x], skip=["critic"])(x))
        )
    assert ratios == sorted(ratios)
    assert ratios[0] > 5
    assert ratios[2] > 30
    assert ratios[4] > 75


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["actor"], ["actor"]),
        (["critic"], ["critic.0", "critic.1"]),
        (["*.0"], ["trunk.0", "critic.0"]),
        ("critic", ["critic.0", "critic.1"]),
        (["trunk.?", "critic*"], ["trunk.0", "trunk.3", "critic.0", "critic.1"]),
    ],
)
def test_skip_leaves_names_parents_and_patterns(skip: list[str], left: list[str]) -> None:
    for quantized in (quantize_(Policy(), "int8", skip=skip), prepare_empty_(Policy(), "int8", skip=skip)):
        assert [name for name, kind in types(quantized).items() if kind == "Linear"] == left


def test_a_shared_layer_is_replaced_everywhere() -> None:
    shared = nn.Linear(4, 4)
    module = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": shared, "d": shared})
    quantize_(module, "int8")
    assert isinstance(module["c"], QuantLinear)
    assert module["a"][0] is module["b"][0] is module["c"] is module["d"]


def test_subclasses_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = nn.Sequential(Doubled(3, 3), nn.Linear(3, 3))
    quantize_(module, "int8")
    assert isinstance(module[0], Doubled)


def test_forms_of_calibration_agree() -> None:
    x, zero = observations(), torch.zeros(3)
    forms = [x, [x], [x[:10], x[10:]], [(x, zero)], ((row[None],) for row in x)]
    scales = []
    for calibration in forms:
        policy = quantize_(Policy(), "w8a8", calibration=calibration, skip=["critic"])
        scales.append([float(policy.trunk[3].input_quant.scale), int(policy.actor.input_quant.zero_point)])
    for other in scales[1:]:
        assert other == pytest.approx(scales[0], rel=1e-6)  # a matrix product rounds by batch size


def test_calibration_leaves_no_trace() -> None:
    policy = Policy().train()
    policy.trunk[1].eval()
    modes = {name: part.training for name, part in policy.named_modules()}
    float_layers = quantizable(policy)
    quantize_(policy, "w8a8", calibration=observations(), skip=["critic"])
    assert {name: part.training for name, part in policy.named_modules() if name in modes} == modes
    assert all(not layer._forward_pre_hooks for layer in float_layers.values())


def test_calibration_ranges_are_those_of_evaluation_mode() -> None:
    x = observations()
    policy = quantize_(Policy().train(), "w8a8", calibration=x, skip=["critic"])
    hidden = Policy().eval().trunk[:3](x).detach()
    assert float(policy.trunk[3].input_quant.scale) == pytest.approx(float(hidden.max()) / 255)


def test_layers_called_by_keyword_are_observed() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(input=x)

    x = observations()
    module = quantize_(Keyword(), "w8a8", calibration=x)
    assert float(module.layer.input_quant.scale) == pytest.approx(float(x.max() - x.min()) / 255)


def refused(message: str, *args: object, module: nn.Module | None = None, **options: object) -> None:
    """quantize_ raises InputError with ``message`` and leaves the module as it was."""
    module = module or Policy()
    before = dict(module.named_modules())
    with pytest.raises(InputError, match=message):
        quantize_(module, *args, **options)  # type: ignore[arg-type]
    assert dict(module.named_modules()) == before
    assert all(not part._forward_pre_hooks for part in module.modules())


def test_bad_requests_are_refused_and_change_nothing() -> None:
    x = observations()
    refused("Did you mean 'int8'", "in8")
    refused(r"unknown method 'rnt'. Did you mean 'rtn'", "int8", method="rnt")
    refused(r"unknown layer in skip: 'actr'. Did you mean 'actor'\? Choices: trunk.0,", "int8", skip=["actr"])
    refused(r"no layer to quantize besides those in skip \(\*\)", "int8", skip=["*"])
    refused(r"Sequential has no layer to quantize: supported are Linear, Conv2d, LSTM, GRU", "int8",
            module=nn.Sequential(nn.ReLU()))  # fmt: skip
    refused("w8a8 needs calibration data", "w8a8")
    refused("or take w4a8-g32-asym-dynamic$", "w4a8-g32-asym-act_mse")
    refused("calibration holds no batch", "w8a8", calibration=[])
    refused("calibration never reached layer 'critic.0'.*name it in skip", "w8a8", calibration=x)
    bad = x.clone()
    bad[0, 0] = float("nan")
    refused("the calibration input of layer 'trunk.0' holds NaN", "w8a8", calibration=bad, skip=["critic"])


@pytest.mark.parametrize("scheme", ["int8", "int4-asym", "nf4", "bf16", "fp8_e4m3", "w8a8-dynamic"])
@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(scheme: str, what: str, bad: float) -> None:
    policy = Policy()
    with torch.no_grad():
        getattr(policy.critic[1], what).view(-1)[0] = bad
    refused(f"layer 'critic.1': the {what} holds NaN or Inf", scheme, module=policy)


def test_mixed_precision_is_two_calls() -> None:
    policy, x = Policy().eval(), observations()
    quantize_(policy, "int8", skip=["trunk", "critic"])
    quantize_(policy, "w4a8", skip=["critic"], calibration=x)
    assert policy.actor.scheme == Scheme.parse("int8")
    assert policy.trunk[0].scheme == Scheme.parse("w4a8")
    restored = Policy().eval()
    prepare_empty_(prepare_empty_(restored, "int8", skip=["trunk", "critic"]), "w4a8", skip=["critic"])
    restored.load_state_dict(policy.state_dict())
    assert torch.equal(restored(x), policy(x))


def test_mixed_precision_in_one_call() -> None:
    x = observations()
    schemes = {"trunk": "int8", "trunk.3": "w4a6", "critic": "fp32"}
    policy = quantize_(Policy().eval(), "w4a8", schemes=schemes, calibration=x)
    assert types(policy) == dict(zip(ALL_LAYERS, ["QuantLinear"] * 3 + ["Linear"] * 2, strict=True))
    names = [policy.trunk[0].scheme.name, policy.trunk[3].scheme.name, policy.actor.scheme.name]
    assert names == ["int8", "w4a6", "w4a8"]
    restored = prepare_empty_(Policy().eval(), "w4a8", schemes=schemes)
    restored.load_state_dict(policy.state_dict())
    assert torch.equal(restored(x), policy(x))
    refused("unknown layer in schemes: 'actr'. Did you mean 'actor'", "int8", schemes={"actr": "int4"})
    refused("Did you mean 'int4'", "int8", schemes={"actor": "itn4"})
    refused("w4a8 needs calibration data", "int8", schemes={"actor": "w4a8"})


def test_one_call_lets_later_layers_make_up_for_earlier_ones() -> None:
    x = observations(500)
    expected = Policy().eval()(x)
    schemes = {"trunk.0": "int2"}
    once = quantize_(Policy().eval(), "int4", method="gptq", calibration=x, schemes=schemes, skip=["critic"])
    twice = quantize_(Policy().eval(), "int4", method="gptq", calibration=x, skip=["trunk.0", "critic"])
    quantize_(twice, "int2", method="gptq", calibration=x, skip=["critic"])
    errors = [(each(x) - expected).square().mean() for each in (once, twice)]
    assert errors[0] < 0.6 * errors[1]


def test_an_artifact_of_another_scheme_does_not_load() -> None:
    state = quantize_(Policy(), "int8").state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        prepare_empty_(Policy(), "int4").load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        prepare_empty_(Policy(), "int8-asym").load_state_dict(state)


def test_a_new_method_is_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(
        matrix: torch.Tensor, scheme: Scheme, moments: InputMoments | None, what: str
    ) -> tuple[torch.Tensor, QParams]:
        assert moments is not None
        assert moments.rows.shape == (1, 20, matrix.shape[1])
        return torch.full(matrix.shape, moments.count % 4, dtype=torch.uint8), QParams(
            torch.ones(len(matrix), 1)
        )

    monkeypatch.setitem(METHODS, "constant", Rule(constant, sample=20))
    policy = quantize_(Policy(), "w8a8", method="constant", calibration=observations(30), skip=["critic"])
    assert torch.equal(policy.actor.weight, torch.full((3, 16), 2.0))
    assert float(policy.actor.input_quant.scale) != 1.0
    refused("method 'constant' needs calibration data", "int8", method="constant")


def test_copies_of_a_quantized_module_are_independent() -> None:
    policy = quantize_(Policy().eval(), "int8")
    x = observations()
    expected = policy(x)
    other = copy.deepcopy(policy)
    other.actor.packed.codes.zero_()
    assert torch.equal(policy(x), expected)


def test_documentation_examples_run() -> None:
    assert doctest.testmod(rlquant.quant).failed == 0
