"""Control policies: load a trained agent, roll it out, quantize it, show what it keeps.

>>> from rlquant.control import evaluate, load
>>> agent = load("ppo-cartpole")
>>> results = evaluate(agent, ["fp32", "int4"], episodes=20)  # doctest: +SKIP
"""

from rlquant.control.agent import Agent
from rlquant.control.artifact import load_artifact, save_artifact
from rlquant.control.collect import Inputs, collect
from rlquant.control.distill import Distillation, distill
from rlquant.control.environment import EnvSpec, make_env
from rlquant.control.evaluate import Evaluation, evaluate
from rlquant.control.head import Head
from rlquant.control.load import from_sb3, load
from rlquant.control.normaliser import Normaliser
from rlquant.control.quantize import quantize_agent
from rlquant.control.quantizer import Quantizer
from rlquant.control.rollout import EnvPool, Rollout, rollout
from rlquant.control.session import Session
from rlquant.control.settings import RealTimeSettings, Settings

__all__ = [
    "Agent",
    "Distillation",
    "EnvPool",
    "EnvSpec",
    "Evaluation",
    "Head",
    "Inputs",
    "Normaliser",
    "Quantizer",
    "RealTimeSettings",
    "Rollout",
    "Session",
    "Settings",
    "collect",
    "distill",
    "evaluate",
    "from_sb3",
    "load",
    "load_artifact",
    "make_env",
    "quantize_agent",
    "rollout",
    "save_artifact",
]
