"""PPO on language, every role on one base.

Implementation details that matter, and where they come from. [S] Schulman et al. 2017; [Z] Ziegler et al. 2019 and its
code; [O] Ouyang et al. 2022; [N] Huang et al. 2023, "The N Implementation Details of RLHF with PPO".

- The reward of a token is ``-beta`` times the estimated KL to the reference; the score of the whole is added at the
  last token that counts, eos included, not at the last place of the batch [Z, N].
- Padding is told by the mask, never by its id: pad may be eos, and eos is learnt [N]. Positions count real tokens, so
  left padding of the prompts moves none.
- Completions are sampled from the whole distribution at the temperature that log-probabilities are taken at: no top-k,
  no top-p, no repetition penalty [N].
- Log-probabilities of the rollout are recomputed by the forward pass of training, over the same rows as the first epoch
  takes them, so ratios start at exactly 1; generation's own differ in the last bits.
- Where generation tells its own, their difference is measured at every step, and tokens may be weighed by truncated
  importance weights [Ionides 2008].
- Dropout is off in the rollout and in the update [N].
- The state after the last token is terminal, whether by eos or by the length; gamma 1 [Z]; a completion without eos
  may lose a fixed penalty [Z, N].
- Rewards may be whitened without moving their mean, advantages are whitened over all tokens of the batch, with the
  variance of the population [Z, N].
- Policy and value losses are clipped [S, Z]; means are over tokens of a minibatch, whatever its micro-batches.
- The critic has an adapter of its own and a head that starts at zero, the reward model's head starts as N(0, 1/(d+1)),
  scores of the reward model may be normalised before (ScoreHead.normalise_) [Z, N].
- Adam with eps 1e-5 and no weight decay [N]; optionally the learning rate falls linearly to zero [Z]. Gradients of
  policy and critic are clipped apart.
- beta may be steered to a target KL of whole completions [Z].
- Adapters, heads and Adam's moments are float32; a float16 base has its losses scaled.

All randomness is derived from the seed and the number of the step, so a checkpoint needs no generator states.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlquant.errors import InputError, not_finite
from rlquant.llm.adapters import adapter_parameters, tensors_hash
from rlquant.llm.experience import Experience, collect
from rlquant.llm.learning_rate import check_learning_rate
from rlquant.llm.losses import AdaptiveKL, policy_loss, value_loss
from rlquant.llm.ppo_settings import PPOSettings
from rlquant.llm.roles import Roles
from rlquant.llm.rollout import (
    Generate,
    Reward,
    Rollout,
    eos_ids,
    generate_with,
    lay_out,
    scores_of,
)
from rlquant.llm.training_state import load_state, save_state

__all__ = ["PPO", "PPOSettings"]

_TRAINED = ("policy", "critic")
_MEANS = ("policy_loss", "value_loss", "clipped", "approx_kl", "gradient_norm")


class PPO:
    """A run of PPO.

    Args:
        roles: with a policy and a critic to train. Dropout is switched off.
        rows: prompts as they are read by the policy, under ``prompt``; the reward function sees whole rows.
        reward: see :data:`~rlquant.llm.rollout.Reward`.
        settings: of the run.
        generate: completes prompts; by default what the settings name.
        optimizer: makes one of parameter groups; by default Adam. Its state is in checkpoints.

    Raises:
        InputError: a role, a prompt or a learning rate cannot be used.
    """

    def __init__(
        self,
        roles: Roles,
        rows: Sequence[dict[str, Any]],
        reward: Reward,
        settings: PPOSettings,
        *,
        generate: Generate | None = None,
        optimizer: Callable[[list[dict[str, Any]]], Any] | None = None,
    ) -> None:
        self.roles, self.rows, self.reward, self.settings = roles, rows, reward, settings
        if "critic" not in roles.heads:
            raise InputError("PPO needs a critic: roles.add('critic', ...)")
        self.prompts = _prompts(roles, rows, settings.max_new_tokens)
        self.generate: Generate = generate or generate_with(
            settings.rollouts,
            roles,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            cache=settings.kv_cache,
        )
        self.step = 0
        self.kl = AdaptiveKL(settings.kl_coefficient, settings.kl_target, settings.kl_gain)
        rates = (settings.learning_rate, settings.critic_learning_rate)
        groups: list[dict[str, Any]] = []
        for role, rate in zip(_TRAINED, rates, strict=True):
            check_learning_rate(roles.model, role, rate)
            groups.append({"params": list(roles.parameters(role).values()), "lr": rate})
        self._rates = rates
        self.optimizer = optimizer(groups) if optimizer else torch.optim.Adam(groups, eps=1e-5)
        self._base = roles.base_hash()
        half = next(
            p.dtype for p in roles.model.parameters() if not p.requires_grad and p.is_floating_point()
        )
        self._scaler = torch.amp.GradScaler(roles.lm.device.type, enabled=half == torch.float16)
        roles.model.eval()

    def run(
        self,
        *,
        checkpoint: str | Path | None = None,
        every: int = 10,
        progress: Callable[[int, dict[str, float]], None] = lambda _step, _metrics: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until the last step, from the checkpoint on if there is one.

        Args:
            checkpoint: a file; written after every so many steps and at the end. An error in between leaves it as it
                is, and the same call goes on from there with the same numbers as if nothing had happened.
            every: so many steps.
            progress: called after each step with its number, from 1, and its metrics.
            stop: asked after each step (a Ctrl-C, say); True writes the checkpoint and returns.

        Raises:
            InputError: the reward function failed, the base was changed, or the checkpoint is of another run.
        """
        path = Path(checkpoint) if checkpoint is not None else None
        if path is not None and path.exists():
            self.restore(path)
        while self.step < self.settings.steps:
            metrics = self.train_step()
            progress(self.step, metrics)
            stopping = stop()
            if path is not None and (stopping or self.step % every == 0 or self.step == self.settings.steps):
                self.save(path)
            if stopping:
                break
        if self.roles.base_hash() != self._base:
            raise InputError("the base was changed during the run, which adapters alone should do without")

    def train_step(self) -> dict[str, float]:
        """One rollout and the epochs on it; metrics by name.

        Those of :func:`~rlquant.llm.experience.collect`, and ``policy_loss``, ``value_loss``, ``clipped``,
        ``approx_kl`` and ``gradient_norm`` (of the policy, before it is clipped), means over minibatches, and
        ``first_ratio``, the largest ``|log ratio|`` of the first one: 0.

        Raises:
            InputError: the reward function failed, or a gradient is no number; adapters are of no use then.
        """
        rollout, scores = self._roll_out()
        order = self._order(0, len(scores))
        with torch.no_grad():
            experience, metrics = collect(
                self.roles, rollout, scores, order, self.settings, self.kl.coefficient
            )
        metrics |= self._update(experience)
        self.kl.update(metrics["kl"])
        self.step += 1
        return metrics

    def save(self, path: str | Path) -> None:
        """Write all that a run needs to go on exactly: adapters, heads, moments, step, coefficient.

        Raises InputError as :func:`~rlquant.llm.training_state.save_state`.
        """
        document = {
            "recipe": "ppo",
            "base": self._base,
            "settings": self._identity(),
            "step": self.step,
            "kl_coefficient": self.kl.coefficient,
            "scaler": self._scaler.state_dict(),
        }
        save_state(Path(path), self._parameters(), self.optimizer, document)

    def restore(self, path: str | Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it cannot be read, or is of another recipe, base or settings (more steps are allowed).
        """
        document = load_state(
            Path(path), self._parameters(), self.optimizer, expect=self._expected(Path(path))
        )
        self.step, self.kl.coefficient = document["step"], document["kl_coefficient"]
        if document["scaler"]:
            self._scaler.load_state_dict(document["scaler"])

    def _expected(self, path: Path) -> Callable[[dict[str, Any]], None]:
        def check(document: dict[str, Any]) -> None:
            if document.get("recipe") != "ppo":
                raise InputError(f"{path} is a checkpoint of {document.get('recipe')!r}, not of PPO")
            if document["base"] != self._base:
                raise InputError(f"{path} is a checkpoint on another base: {document['base'][:12]}…")
            here, there = self._identity(), document["settings"]
            changed = [key for key in here if here[key] != there.get(key)]
            if changed:
                known = ", ".join(f"{key}={there.get(key)!r} (here {here[key]!r})" for key in changed)
                raise InputError(f"{path} is a checkpoint of other settings: {known}")

        return check

    def _identity(self) -> dict[str, Any]:
        """What determines the numbers of a run; its length does only where the learning rate falls towards its end."""
        configs = self.roles.model.peft_config
        known = self.settings.model_dump() | {
            "prompts": hashlib.sha256(json.dumps([row["prompt"] for row in self.rows]).encode()).hexdigest(),
            "reference": tensors_hash(adapter_parameters(self.roles.model, "reference"))
            if "reference" in configs
            else "base",
        }
        for role in _TRAINED:
            config = configs[role]
            kinds = {"dora": config.use_dora, "rslora": config.use_rslora, "alpha": config.lora_alpha}
            known |= {f"{role}.{name}": value for name, value in kinds.items()}
        if not self.settings.anneal:
            del known["steps"]
        return known

    def _parameters(self) -> dict[str, Any]:
        return {
            f"{role}.{name}": parameter
            for role in _TRAINED
            for name, parameter in self.roles.parameters(role).items()
        }

    def _generator(self, what: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(what, number))

    def _seed(self, what: str, number: int) -> int:
        return zlib.crc32(f"{self.settings.seed}/{what}/{number}".encode())

    def _row_numbers(self) -> list[int]:
        """Rows of this step: every row once, in an order of its own, before any comes again."""
        count, batch = len(self.rows), self.settings.batch
        orders: dict[int, list[int]] = {}
        found = []
        for place in range(self.step * batch, (self.step + 1) * batch):
            turn, index = divmod(place, count)
            if turn not in orders:
                orders[turn] = torch.randperm(count, generator=self._generator("rows", turn)).tolist()
            found.append(orders[turn][index])
        return found

    def _roll_out(self) -> tuple[Rollout, Tensor]:
        """Completions of this step's rows, and their scores ``[batch]``."""
        numbers = self._row_numbers()
        prompts = [self.prompts[number] for number in numbers]
        completions = self.generate(prompts, seed=self._seed("sampling", self.step))
        if len(completions) != len(prompts) or not all(each.ids for each in completions):
            raise InputError(
                "the engine gave no completion for some prompt: at least one token each is needed"
            )
        rows = [self.rows[number] for number in numbers]
        ids = [each.ids for each in completions]
        texts = self.roles.lm.tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores = scores_of(self.reward, [row["prompt"] for row in rows], texts, rows, numbers)
        known = all(len(each.log_probs) == len(each.ids) for each in completions)
        sampled = [each.log_probs for each in completions] if known else None
        rollout = lay_out(prompts, ids, eos_ids(self.roles.lm), self.roles.lm.device, sampled=sampled)
        return rollout, torch.tensor(scores, device=rollout.ids.device)

    def _order(self, epoch: int, count: int) -> Tensor:
        """In which an epoch of this step takes the rows."""
        return torch.randperm(count, generator=self._generator(f"epoch {epoch}", self.step))

    def _update(self, experience: Experience) -> dict[str, float]:
        settings = self.settings
        lengths = experience.rollout.completed.sum(dim=1).cpu()
        self._set_learning_rates()
        steps = []
        for epoch in range(settings.epochs):
            for rows in torch.split(self._order(epoch, settings.batch), settings.minibatch):
                steps.append(self._optimize(experience, rows, lengths))
        means = torch.stack([found[:-1] for found in steps]).mean(dim=0).tolist()
        metrics = dict(zip(_MEANS, means, strict=True)) | {"first_ratio": float(steps[0][-1])}
        left_out = self._scaler.is_enabled()  # such steps are, by the scaler
        if not math.isfinite(metrics["gradient_norm"]) and not left_out:
            raise not_finite(self.step + 1)
        return metrics

    def _optimize(self, experience: Experience, rows: Tensor, lengths: Tensor) -> Tensor:
        """One step of the optimizer on a minibatch; its metrics, which stay on the device: nothing waits for them."""
        self.optimizer.zero_grad(set_to_none=True)
        found = []
        for part in torch.split(rows, self.settings.microbatch or len(rows)):
            share = int(lengths[part].sum()) / int(lengths[rows].sum())
            metrics = self._backward(experience, part, share)
            found.append(torch.cat([metrics[:-1] * share, metrics[-1:]]))
        self._scaler.unscale_(self.optimizer)
        norms = [
            torch.nn.utils.clip_grad_norm_(group["params"], self.settings.max_grad_norm)
            for group in self.optimizer.param_groups
        ]
        self._scaler.step(self.optimizer)
        self._scaler.update()
        every = torch.stack(found)
        return torch.cat([every[:, :-1].sum(dim=0), norms[0][None], every[:, -1:].amax(dim=0)])

    def _backward(self, experience: Experience, rows: Tensor, share: float) -> Tensor:
        """Gradients of a micro-batch, one role after the other, so that one role's activations are held at a time.

        Its metrics: those of ``_MEANS`` but the last, and the largest log ratio.
        """
        settings, rollout = self.settings, experience.rollout
        ids, mask, counts, last = (
            rollout.ids[rows],
            rollout.mask[rows],
            rollout.completed[rows],
            rollout.length,
        )
        log_probs = self.roles.policy(ids, mask, last=last, temperature=settings.temperature)
        policy = policy_loss(
            log_probs,
            experience.log_probs[rows],
            experience.advantages[rows],
            counts,
            clip=settings.clip,
            weights=None if experience.weights is None else experience.weights[rows],
        )
        torch.autograd.backward(self._scaler.scale(policy.loss * share))
        values = self.roles.values(ids, mask, last=last)
        critic = value_loss(
            values, experience.values[rows], experience.returns[rows], counts, clip=settings.value_clip
        )
        torch.autograd.backward(self._scaler.scale(critic * share))
        parts = (policy.loss, critic, policy.clipped, policy.approx_kl, policy.largest)
        return torch.stack([each.detach() for each in parts])

    def _set_learning_rates(self) -> None:
        left = 1 - self.step / self.settings.steps if self.settings.anneal else 1.0
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * left


def _prompts(roles: Roles, rows: Sequence[dict[str, Any]], new: int) -> list[list[int]]:
    """Token ids of every row's prompt. Raises InputError naming the row whose prompt is missing or too long."""
    if not rows:
        raise InputError("there is no prompt to train on")
    found = []
    for number, row in enumerate(rows):
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise InputError(f"row {number} has no text under prompt: {prompt!r}")
        ids = roles.lm.tokens(prompt)
        if len(ids) + new > roles.lm.longest:
            raise InputError(
                f"the prompt of row {number} has {len(ids)} tokens, and with {new} new ones is longer than the "
                f"{roles.lm.longest} that the model was made for"
            )
        found.append(ids)
    return found
