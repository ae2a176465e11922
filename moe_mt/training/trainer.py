"""The loop: batches in, better weights out."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_mt.errors import ConfigError
from moe_mt.losses import label_smoothed_cross_entropy, load_balancing_loss, router_z_loss
from moe_mt.models import Seq2SeqTransformer, TransformerOutput
from moe_mt.training.batches import TokenBatch, plan_batches
from moe_mt.training.pairs import TokenPairs

__all__ = ["Trainer", "TrainingConfig", "TrainingProgress"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train."""

    steps: int
    """Optimizer steps in all."""

    max_batch_tokens: int = 4096
    """Most padded tokens of one side in a batch."""

    learning_rate: float = 1e-4
    """Peak learning rate."""

    warmup_steps: int = 100
    """Steps of linear warm-up to the peak, which then holds."""

    decay_fraction: float = 0.3
    """Share of all steps, the last ones, in which the rate falls linearly to zero. A constant
    rate before them keeps the length of a training open (Hägele et al., arXiv:2405.18392)."""

    label_smoothing: float = 0.1
    """Probability mass that is spread over the vocabulary."""

    weight_decay: float = 0.0
    """Decoupled weight decay."""

    clip_norm: float = 1.0
    """Largest gradient norm."""

    seed: int = 0
    """Of data order, dropout and routing noise."""

    def __post_init__(self) -> None:
        """Check the numbers that would make training meaningless."""
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")
        for name in ("steps", "max_batch_tokens", "learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("label_smoothing", "decay_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """Where training stands after a step."""

    step: int
    """Steps done."""

    loss: float
    """Label-smoothed cross entropy of the step's batch."""

    balance: float
    """Mean load-balancing loss over sparse layers; 1 is even, 0 where there are none."""

    learning_rate: float
    """Rate the step was taken with."""

    tokens: int
    """Target tokens in the batch."""


class Trainer:
    """Adam over shuffled epochs, with a state that continues exactly where it was saved.

    Exactly on one kind of device and number of threads, as sums round differently on others.
    """

    def __init__(
        self, model: Seq2SeqTransformer, pairs: TokenPairs, config: TrainingConfig
    ) -> None:
        """Prepare training of ``model``, in place, on its device.

        Raises:
            ConfigError: If there is no pair to learn from.
        """
        if len(pairs) == 0:
            raise ConfigError("there is no sentence pair to train on; the file is empty")
        self.model = model
        self.pairs = pairs
        self.config = config
        self.step = 0
        self.epoch = 0
        self.next_batch = 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
        )
        torch.manual_seed(config.seed)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continuing needs, but the training data.

        Its tensors are the live ones: save or copy them before the next step.
        """
        device = self.model.embedding.weight.device
        on_gpu = device.type == "cuda"
        return {
            "config": asdict(self.config),
            "pairs": len(self.pairs),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(device) if on_gpu else None,
            "step": self.step,
            "epoch": self.epoch,
            "next_batch": self.next_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            ConfigError: If it was saved under another configuration or other data, so that
                continuing would not be the same training.
        """
        ours = {"config": asdict(self.config), "pairs": len(self.pairs)}
        saved = {name: state[name] for name in ours}
        if saved != ours:
            raise ConfigError(
                f"the saved training state is of another training: {saved} there, {ours} here; "
                "resume with the same options and data, or start in a new folder"
            )
        self.model.load_state_dict(state["model"])
        # A copy: the optimizer would take the tensors themselves, which may be another trainer's.
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        torch.set_rng_state(state["random"])
        if state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"], self.model.embedding.weight.device)
        self.step, self.epoch, self.next_batch = state["step"], state["epoch"], state["next_batch"]

    def run(self, on_step: Callable[[TrainingProgress], None] | None = None) -> None:
        """Train until ``config.steps`` steps are done; leaves the model in evaluation mode.

        Args:
            on_step: Called after every step; may save ``state_dict()``.
        """
        self.model.train()
        batches = self._batches()
        try:
            while self.step < self.config.steps:
                progress = self._train_on(next(batches))
                if on_step is not None:
                    on_step(progress)
        finally:
            self.model.eval()

    def _batches(self) -> Iterator[TokenBatch]:
        model = self.model.config
        device = self.model.embedding.weight.device
        while True:
            plan = plan_batches(
                self.pairs, self.config.max_batch_tokens, self.config.seed + self.epoch
            )
            while self.next_batch < len(plan):
                indices = plan[self.next_batch]
                self.next_batch += 1
                batch = TokenBatch.collate(
                    self.pairs, indices, model.pad_id, model.decoder_start_id
                )
                yield batch.to(device)
            self.epoch += 1
            self.next_batch = 0

    def _train_on(self, batch: TokenBatch) -> TrainingProgress:
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        output = self.model(
            batch.source_tokens, batch.target_tokens, batch.source_mask, batch.target_mask
        )
        loss = label_smoothed_cross_entropy(
            output.logits, batch.labels, self.config.label_smoothing
        )
        balance, penalty = self._router_losses(output)
        (loss + penalty).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if not torch.isfinite(norm):
            raise ConfigError(
                f"the gradient of step {self.step + 1} is not finite (loss {loss.item()}); lower "
                "the learning rate, or train in float32 or bfloat16"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return TrainingProgress(
            step=self.step,
            loss=loss.item(),
            balance=float(balance),
            learning_rate=rate,
            tokens=int((batch.labels >= 0).sum()),
        )

    def _router_losses(self, output: TransformerOutput) -> tuple[float, Tensor | float]:
        """Return the mean balance and the weighted sum over layers that is added to the loss."""
        moe = self.model.config.moe
        routings = (*output.encoder_routings, *output.decoder_routings)
        if moe is None or not routings:
            return 0.0, 0.0
        balances = torch.stack([load_balancing_loss(routing) for routing in routings])
        penalty: Tensor = moe.aux_loss_coef * balances.sum()
        if moe.z_loss_coef > 0:
            penalty = penalty + moe.z_loss_coef * sum(router_z_loss(r) for r in routings)
        return balances.mean().item(), penalty

    def _learning_rate(self) -> float:
        config = self.config
        if self.step < config.warmup_steps:
            return config.learning_rate * (self.step + 1) / config.warmup_steps
        decay_steps = max(1.0, config.decay_fraction * config.steps)
        return config.learning_rate * min(1.0, (config.steps - self.step) / decay_steps)
