"""Train the shipped SAC and TQC agents: one file, on a CUDA device about as fast as its kernels can be launched.

    python agents/train_sac.py --agent sac-halfcheetah

SAC: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018. TQC: Kuznetsov et al., "Controlling
Overestimation Bias with Truncated Mixture of Continuous Distributional Quantile Critics", 2020. The two differ
in their critics alone: SAC has one atom per critic and takes the least, TQC has many and drops the largest.

A gradient step of these small networks is a few hundred kernels of a few microseconds each, so that launching
them costs more than running them. On CUDA a round of updates, sampling included, is therefore captured in one
graph and replayed; while it runs, the CPU steps the environments. Without CUDA the same code runs eagerly.
What is kept is an exponential moving average of the actor's weights, which is steadier than any single iterate.
For every evaluation the averaged weights go into a stock Stable-Baselines3 model, and that is what is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from common import KeepBest, make_env, parse
from sb3_contrib import TQC
from stable_baselines3 import SAC
from torch import Tensor, nn

LOG_STD_MIN, LOG_STD_MAX = -20, 2  # the limits of Stable-Baselines3's actor


@dataclass(frozen=True)
class Config:
    """Everything that decides a training."""

    agent: str
    """name of the agent, and of its folder"""
    env: str
    """environment card"""
    total_timesteps: int
    """environment steps, all environments together"""
    algorithm: str = "SAC"
    """SAC or TQC"""
    net_arch: tuple[int, ...] = (256, 256)
    """hidden layers of the actor"""
    critic_arch: tuple[int, ...] = (256, 256)
    """hidden layers of each critic"""
    n_critics: int = 2
    """critics"""
    n_quantiles: int = 1
    """atoms per critic: 1 is SAC"""
    drop_per_critic: int = 0
    """largest target atoms dropped, times the number of critics (TQC)"""
    seed: int = 1
    """seeds environments, weights and sampling"""
    n_envs: int = 8
    """environments stepped together"""
    updates_per_step: float = 1.0
    """gradient steps per environment step"""
    learning_starts: int = 10_000
    """environment steps with random actions before the first update"""
    buffer_size: int = 2_000_000
    """transitions kept"""
    batch_size: int = 256
    """transitions per gradient step"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """step of the target critics towards the critics"""
    learning_rate: float = 3e-4
    """of actor, critics and entropy coefficient"""
    average: float = 0.999
    """decay, per gradient step, of the actor's moving average"""
    eval_every: int = 50_000
    """environment steps between evaluations"""
    eval_episodes: int = 10
    """episodes of one evaluation"""
    threads: int = 1
    """torch threads"""
    overrides: tuple[str, ...] = ()
    """fields changed on the command line"""


AGENTS = {
    config.agent: config
    for config in (
        Config(
            "sac-pendulum",
            "Pendulum-v1",
            60_000,
            net_arch=(64, 64),
            critic_arch=(128, 128),
            n_envs=4,
            learning_starts=1_000,
            buffer_size=100_000,
            learning_rate=1e-3,
            eval_every=5_000,
            eval_episodes=30,
        ),
        Config("sac-halfcheetah", "HalfCheetah-v5", 600_000),
        Config(
            "tqc-hopper",
            "Hopper-v5",
            300_000,
            algorithm="TQC",
            n_quantiles=25,
            drop_per_critic=5,
            seed=2,
            eval_episodes=20,
        ),
    )
}


class Actor(nn.Module):
    """Gaussian policy squashed by tanh; its tensors bear the names of Stable-Baselines3's actor."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: Iterable[int]) -> None:
        super().__init__()
        sizes = [obs_dim, *hidden]
        self.latent_pi = nn.Sequential(
            *(layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU()))
        )
        self.mu = nn.Linear(sizes[-1], act_dim)
        self.log_std = nn.Linear(sizes[-1], act_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled actions in (-1, 1) [batch, act_dim] and their log probabilities [batch]."""
        latent = self.latent_pi(obs)
        mean, log_std = self.mu(latent), self.log_std(latent).clamp(LOG_STD_MIN, LOG_STD_MAX)
        noise = torch.randn_like(mean)
        raw = mean + log_std.exp() * noise
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_det = 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh(raw)^2) without cancellation
        return raw.tanh(), (gaussian - log_det).sum(-1)


class Critics(nn.Module):
    """All critics side by side, one batched product a layer."""

    def __init__(self, n_critics: int, in_dim: int, hidden: Iterable[int], n_quantiles: int) -> None:
        super().__init__()
        self.n_critics = n_critics
        sizes = [in_dim, *hidden, n_quantiles]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            bound = fan_in**-0.5  # nn.Linear's initialization
            self.weights.append(torch.empty(n_critics, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(n_critics, 1, fan_out).uniform_(-bound, bound))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Atoms of the return, [n_critics, batch, n_quantiles]."""
        x = torch.cat([obs, action], -1).expand(self.n_critics, -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x if layer == 0 else x.relu(), weight)
        return x


class Replay:
    """Transitions as rows (obs, action, next_obs, reward, terminated) of one tensor on the device."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device) -> None:
        self.split = [obs_dim, act_dim, obs_dim, 1, 1]
        self.rows = torch.zeros(capacity, sum(self.split), device=device)
        self.filled = torch.zeros(
            (), device=device
        )  # on the device: a captured graph reads its present value
        self.next = self.size = 0

    def add(self, rows: np.ndarray) -> None:
        """Append ``rows`` [n, row_dim], over the oldest once full; n divides the capacity."""
        n, capacity = len(rows), len(self.rows)
        self.rows[self.next : self.next + n] = torch.from_numpy(rows).to(self.rows.device)
        self.next = (self.next + n) % capacity
        self.size = min(self.size + n, capacity)
        self.filled.fill_(self.size)

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """Uniform with replacement: obs, action, next_obs, reward [batch, 1], terminated [batch, 1]."""
        draw = torch.rand(batch_size, device=self.rows.device, dtype=torch.float64)
        return self.rows[(draw * self.filled).long()].split(self.split, -1)


class Learner:
    """Networks, optimizers and the update of SAC and TQC."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int, device: torch.device) -> None:
        self.config = config
        self.actor = Actor(obs_dim, act_dim, config.net_arch).to(device)
        self.average = Actor(obs_dim, act_dim, config.net_arch).to(device)
        self.average.load_state_dict(self.actor.state_dict())
        shape = (config.n_critics, obs_dim + act_dim, config.critic_arch, config.n_quantiles)
        self.critics, self.targets = Critics(*shape).to(device), Critics(*shape).to(device)
        self.targets.load_state_dict(self.critics.state_dict())
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        self.target_entropy = -float(act_dim)
        levels = (torch.arange(config.n_quantiles, device=device) + 0.5) / config.n_quantiles
        self.levels = levels[:, None]  # [n_quantiles, 1], against targets in the last dimension
        self.replay = Replay(config.buffer_size, obs_dim, act_dim, device)
        capturable = device.type == "cuda"

        def adam(parameters: Iterable[Tensor]) -> torch.optim.Adam:
            return torch.optim.Adam(parameters, config.learning_rate, fused=True, capturable=capturable)

        self.actor_adam = adam(self.actor.parameters())
        self.critic_adam = adam(self.critics.parameters())
        self.alpha_adam = adam([self.log_alpha])

    def update(self) -> None:
        """One gradient step of critics, actor and entropy coefficient, and of the averages that follow them."""
        config = self.config
        obs, action, next_obs, reward, terminated = self.replay.sample(config.batch_size)
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = self.actor(next_obs)
            atoms = self._kept(self.targets(next_obs, next_action)) - alpha * next_log_prob[:, None]
            target = reward + (1 - terminated) * config.gamma * atoms  # [batch, kept atoms]
        critic_loss = self._critic_loss(self.critics(obs, action), target)
        _descend(self.critic_adam, critic_loss)

        new_action, log_prob = self.actor(obs)
        value = self.critics(obs, new_action)
        value = value.amin(0) if config.n_quantiles == 1 else value.mean(0)
        _descend(self.actor_adam, (alpha * log_prob - value.mean(-1)).mean())
        _descend(self.alpha_adam, -self.log_alpha * (log_prob.detach().mean() + self.target_entropy))

        with torch.no_grad():
            _follow(self.targets, self.critics, config.tau)
            _follow(self.average, self.actor, 1 - config.average)

    def _kept(self, atoms: Tensor) -> Tensor:
        """Of the atoms [n_critics, batch, n_quantiles], those used as targets [batch, kept]: the least, or all
        but the largest.
        """
        if self.config.n_quantiles == 1:
            return atoms.amin(0)
        pooled = atoms.transpose(0, 1).flatten(1).sort(-1).values
        return pooled[:, : pooled.shape[1] - self.config.n_critics * self.config.drop_per_critic]

    def _critic_loss(self, atoms: Tensor, target: Tensor) -> Tensor:
        """Squared error for one atom, quantile Huber loss for several."""
        if self.config.n_quantiles == 1:
            return (atoms - target).square().mean((1, 2)).sum()
        error = target[None, :, None, :] - atoms[..., None]  # [n_critics, batch, n_quantiles, kept]
        huber = torch.where(error.abs() > 1, error.abs() - 0.5, 0.5 * error.square())
        return ((self.levels - (error.detach() < 0).float()).abs() * huber).mean()


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimizer step down the gradient of ``loss`` with respect to its own parameters alone."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def _follow(follower: nn.Module, leader: nn.Module, step: float) -> None:
    """Move the parameters of ``follower`` by the fraction ``step`` towards those of ``leader``."""
    torch._foreach_lerp_(list(follower.parameters()), list(leader.parameters()), step)


def rounds(update: Callable[[], None], count: int, device: torch.device) -> Iterator[None]:
    """Each ``next`` runs ``update`` ``count`` times; on CUDA as one captured graph, launched and not waited for."""
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # capture needs optimizer states and library handles to exist
            for _ in range(3):
                update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                update()
        while True:
            graph.replay()
            yield
    while True:
        for _ in range(count):
            update()
        yield


def stock_model(config: Config) -> SAC:
    """An untrained Stable-Baselines3 model of the same actor."""
    kwargs = {"net_arch": {"pi": list(config.net_arch), "qf": [1]}, "n_critics": 1}
    env = make_env(config.env)
    if config.algorithm == "TQC":
        return TQC("MlpPolicy", env, buffer_size=1, gamma=config.gamma, policy_kwargs=kwargs, device="cpu")
    return SAC("MlpPolicy", env, buffer_size=1, gamma=config.gamma, policy_kwargs=kwargs, device="cpu")


def train(config: Config, keep_best: KeepBest) -> None:
    """Train once; ``keep_best`` writes the agent as it improves."""
    torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = stock_model(config)
    torch.manual_seed(config.seed)
    random = np.random.default_rng(config.seed)
    envs = [make_env(config.env) for _ in range(config.n_envs)]
    obs = np.stack([env.reset(seed=config.seed * 1000 + i)[0] for i, env in enumerate(envs)]).astype(
        np.float32
    )
    space = envs[0].action_space
    center, reach = (space.high + space.low) / 2, (space.high - space.low) / 2
    learner = Learner(config, obs.shape[1], len(center), device)
    replay, updates = (
        learner.replay,
        rounds(learner.update, round(config.n_envs * config.updates_per_step), device),
    )

    for step in range(0, config.total_timesteps, config.n_envs):
        if step < config.learning_starts:
            actions = random.uniform(-1, 1, (config.n_envs, len(center))).astype(np.float32)
        else:
            with torch.no_grad():
                actions = learner.actor(torch.from_numpy(obs).to(device))[0].cpu().numpy()
            next(updates)  # the device works while the environments step
        following, rewards, terminated = np.empty_like(obs), np.zeros(len(envs)), np.zeros(len(envs))
        upcoming = np.empty_like(obs)
        for i, env in enumerate(envs):
            following[i], rewards[i], terminated[i], truncated, _ = env.step(center + reach * actions[i])
            upcoming[i] = env.reset()[0] if terminated[i] or truncated else following[i]
        row = [obs, actions, following, rewards[:, None], terminated[:, None]]
        replay.add(np.concatenate(row, -1, dtype=np.float32))
        obs = upcoming
        done = step + config.n_envs
        if done % config.eval_every < config.n_envs and done > config.learning_starts:
            model.actor.load_state_dict(learner.average.state_dict())
            keep_best(model, done)


if __name__ == "__main__":
    configuration, out = parse(AGENTS)
    train(configuration, KeepBest(configuration, out))
