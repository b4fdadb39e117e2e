"""Environment ids, wrappers and spaces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from rlquant.control import EnvSpec, make_env
from rlquant.control.environment import random_scores, resolve_env
from rlquant.control.spaces import Space
from rlquant.control.zoo_folder import find_zoo_folder
from rlquant.errors import InputError


def resolved(env_id: str, shape: tuple[int, ...], **fields: Any) -> EnvSpec:
    return resolve_env(EnvSpec(env_id, **fields), lambda env: env.observation_space.shape == shape)


@pytest.mark.parametrize(
    ("retired", "shape", "present"),
    [
        ("LunarLander-v2", (8,), "LunarLander-v3"),
        ("HalfCheetah-v2", (17,), "HalfCheetah-v5"),
        ("Humanoid-v3", (376,), "Humanoid-v4"),
        ("BipedalWalker-v3", (24,), "BipedalWalker-v3"),
    ],
)
def test_retired_ids_find_a_successor_with_the_same_observation(
    retired: str, shape: tuple[int, ...], present: str
) -> None:
    spec = resolved(retired, shape)
    assert spec.id == present
    assert spec.requested == (None if retired == present else retired)


def test_ant_v3_agents_see_zeros_where_they_always_saw_zeros() -> None:
    env = make_env(resolved("Ant-v3", (111,)))
    env.reset(seed=0)
    for _ in range(20):
        observation, *_ = env.step(np.ones(8, np.float32))
    assert not observation[27:].any()
    assert env.unwrapped._get_obs()[27:].any()  # type: ignore[attr-defined]


def test_ids_that_never_existed_are_not_mapped() -> None:
    for env_id in ("Pendulum-v2", "Pendulum"):
        with pytest.raises(InputError, match=r"unknown environment.*Did you mean 'Pendulum-v1'"):
            resolved(env_id, (3,))


def test_packages_that_are_missing_are_named() -> None:
    with pytest.raises(InputError, match="pip install panda-gym"):
        resolved("PandaReach-v1", (6,))


def test_velocities_are_hidden_under_the_zoo_ids() -> None:
    spec = resolved("CartPoleNoVel-v1", (4,))
    assert (spec.id, spec.wrappers) == ("CartPole-v1", (("MaskVelocityWrapper", {}),))
    env, plain = make_env(spec), gym.make("CartPole-v1")
    hidden, shown = env.reset(seed=3)[0], plain.reset(seed=3)[0]
    np.testing.assert_array_equal(hidden, shown * [1, 0, 1, 0])


def test_history_stacks_observations_and_actions() -> None:
    env = make_env(EnvSpec("Pendulum-v1", wrappers=(("HistoryWrapper", {"horizon": 3}),)))
    first, _ = env.reset(seed=0)
    assert first.shape == env.observation_space.shape == (12,)
    assert not first[:6].any()
    assert not first[9:].any()
    second, *_ = env.step(np.array([0.5], np.float32))
    np.testing.assert_array_equal(second[3:6], first[6:9])
    assert second[-1] == 0.5


def test_random_scores_are_seeded() -> None:
    spec = EnvSpec("CartPole-v1")
    np.testing.assert_array_equal(random_scores(spec, 5, 7), random_scores(spec, 5, 7))
    assert 10 < random_scores(spec, 50, 0).mean() < 40


def make_as_found(folder: Path) -> gym.Env:
    found = find_zoo_folder(folder)
    assert found is not None
    return make_env(EnvSpec(found.env_id, found.env_kwargs, found.wrappers))


@pytest.mark.parametrize(
    "config",
    [
        {"frame_stack": "abc"},
        {"frame_stack": -2},
        {"env_wrapper": [{}]},
        {"env_wrapper": {"sb3_contrib.common.wrappers.TimeFeatureWrapper": 7}},
        {"env_wrapper": {"sb3_contrib.common.wrappers.TimeFeatureWrapper": {"bogus": 1}}},
        {"env_wrapper": "my.own.Wrapper"},
        {"env_kwargs": [1]},
        {"env_kwargs": "dict(a=open('x'))"},
        {"vec_env_wrapper": "foo.Bar"},
        {"normalize": "dict(norm_obs=True)"},
    ],
)
def test_odd_zoo_settings_are_refused_in_a_sentence(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "CartPole-v1").mkdir()
    (tmp_path / "CartPole-v1.zip").write_bytes(b"")
    (tmp_path / "CartPole-v1/config.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError):
        make_as_found(tmp_path)


def test_python_tags_in_zoo_settings_construct_nothing(tmp_path: Path) -> None:
    (tmp_path / "CartPole-v1").mkdir()
    (tmp_path / "CartPole-v1.zip").write_bytes(b"")
    trace = tmp_path / "trace"
    text = f"!!python/object/apply:builtins.open\n- {trace}\n- w\n"
    (tmp_path / "CartPole-v1/config.yml").write_text(text)
    with pytest.raises(InputError):
        find_zoo_folder(tmp_path)
    assert not trace.exists()


_BOX = spaces.Box(np.array([-10.0, 0.5], np.float32), np.array([10.0, np.inf], np.float32))
SPACES: list[spaces.Space[Any]] = [
    spaces.Box(-1, 1, (3,)),
    _BOX,
    spaces.Box(0, 255, (36, 36, 3), np.uint8),
    spaces.Discrete(5),
    spaces.MultiDiscrete([3, 2]),
    spaces.MultiBinary(4),
    spaces.Dict({"a": _BOX, "b c": spaces.Discrete(3), "d": spaces.MultiBinary(2)}),
]


@given(st.sampled_from(SPACES))
def test_spaces_read_back_from_json(space: spaces.Space[Any]) -> None:
    plain = Space.from_gym(space)
    assert Space.from_json(plain.to_json()) == plain


def sb3_json(space: spaces.Space[Any], text: str) -> dict[str, Any]:
    return {
        ":type:": f"<class 'gym.spaces.{type(space).__name__.lower()}.{type(space).__name__}'>",
        "spaces": text,
    }


@pytest.mark.parametrize(
    "style", [str, lambda s: "OrderedDict([" + ", ".join(f"({k!r}, {v})" for k, v in s.items()) + "])"]
)
def test_dict_spaces_are_read_as_every_version_prints_them(style: Callable[[Any], str]) -> None:
    space = spaces.Dict({"goal": spaces.Box(-np.inf, np.inf, (3,)), "hand": _BOX, "gear": spaces.Discrete(3)})
    read = Space.from_sb3(sb3_json(space, style(space.spaces)))
    expected = Space.from_gym(space)
    assert {key: (part.kind, part.shape, part.sizes) for key, part in read.spaces.items()} == {
        key: (part.kind, part.shape, part.sizes) for key, part in expected.spaces.items()
    }
    np.testing.assert_allclose(read.spaces["hand"].low or (), expected.spaces["hand"].low or ())


def test_a_dict_part_that_cannot_be_read_is_not_dropped() -> None:
    nested = spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Dict({"c": spaces.Discrete(2)})})
    with pytest.raises(InputError, match="cannot be read"):
        Space.from_sb3(sb3_json(nested, str(nested.spaces)))
