"""What both training modules share: lr per step, keyed random numbers, EMA, clipping, averaged measurements."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor, nn

from vgen.data.loader import ResumableLoader
from vgen.errors import UserError
from vgen.random import keyed_uniform
from vgen.training.ema import EMA
from vgen.training.optim import LrSchedule

MakeOptimizer = Callable[..., torch.optim.Optimizer]
_DROPOUT_STREAM = 101


def parameter_name(name: str) -> str:
    """Name of a parameter without the prefixes that sharding adds."""
    return name.replace("_fsdp_wrapped_module.", "")


class TrainingModule(pl.LightningModule):
    """Base of the training modules.

    Every random number of a step is keyed: by (seed, epoch, batch, rank) for dropout, by (seed, epoch, image) for what
    must not depend on the number of processes. Resuming therefore needs no generator states. The epoch is the data
    loader's, which a checkpoint restores exactly, and not the trainer's counter, which also advances when a run ends
    in the middle of an epoch.

    Attributes:
        epoch: number of the epoch that the batch in hand belongs to.

    Args:
        network: the network that is trained, averaged and released.
        lr_schedule: factor of every learning rate per optimizer step.
        clip: largest gradient norm, 0 for no clipping.
        ema_decay: decay of the averaged weights, 0 for none.
        ema_warmup: see :class:`vgen.training.ema.EMA`.
        seed: seed of all training noise.
        config: resolved configuration as plain containers, stored in checkpoints.
    """

    task: str

    def __init__(
        self,
        *,
        network: nn.Module,
        lr_schedule: LrSchedule,
        clip: float,
        ema_decay: float,
        ema_warmup: bool,
        seed: int,
        config: dict,
    ) -> None:
        super().__init__()
        self.network = network
        self.lr_schedule = lr_schedule
        self.clip = clip
        self.seed = seed
        self.epoch = 0
        self.save_hyperparameters({"config": config}, logger=False)
        self.ema: EMA | None = None
        if ema_decay > 0:
            trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
            self.ema = EMA(trainable, decay=ema_decay, warmup=ema_warmup)
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        self._counts: dict[str, int] = defaultdict(int)
        self._validation: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self._validation_ema = ExitStack()
        self._base_lrs: list[float] = []

    # -- measurements -------------------------------------------------------------------------------------------------

    def record(self, **values: Tensor) -> None:
        """Add scalars of this batch to the running means of the current log interval."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.detach().float()
            self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """Means over the current log interval and all processes, without ending the interval.

        Every process must call this together.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        stacked = torch.stack([self._sums[name] / self._counts[name] for name in names])
        stacked = self.trainer.strategy.reduce(stacked, reduce_op="mean")
        return dict(zip(names, stacked.tolist(), strict=True))

    def end_interval(self) -> dict[str, float]:
        """Means as in :meth:`means`, learning rate included; starts a new interval."""
        report = self.means()
        report["lr"] = self._base_lrs[0] * self.lr_schedule.factor(max(0, self.trainer.global_step - 1))
        self._sums.clear()
        self._counts.clear()
        return report

    def count_tokens(self) -> int:
        """Tokens per image, for the throughput figure; 0 where it means nothing."""
        return 0

    def flops_per_image(self, batch: dict[str, Any]) -> float:
        """Floating-point operations of one training step per image; 0 where they are not counted."""
        return 0.0

    # -- optimizers ---------------------------------------------------------------------------------------------------

    def make_optimizer(self, make: MakeOptimizer, prefix: str, matrices: set[str]) -> torch.optim.Optimizer:
        """Build the optimizer of the parameters below ``prefix``."""
        named = [(parameter_name(name), p) for name, p in self.named_parameters()]
        optimizer = make([(name, p) for name, p in named if name.startswith(prefix)], matrices)
        self._base_lrs.append(optimizer.param_groups[0]["lr"])
        return optimizer

    def matrices(self) -> set[str]:
        """Names of the parameters with two or more dimensions; to be asked before anything is sharded."""
        return {name for name, p in self.named_parameters() if p.ndim >= 2}

    def set_learning_rates(self) -> None:
        """Set every learning rate for the step about to be made; a group may scale its own with ``lr_scale``."""
        factor = self.lr_schedule.factor(self.trainer.global_step)
        for optimizer, base in zip(self.trainer.optimizers, self._base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor * group.get("lr_scale", 1.0)

    def clip_gradients_of(self, parameters: Iterator[nn.Parameter]) -> Tensor:
        """Scale gradients so that their joint norm is at most ``clip``; returns the norm before."""
        limit = self.clip if self.clip > 0 else float("inf")
        if isinstance(self.trainer.strategy, FSDPStrategy):
            sharded: Any = self.trainer.model
            return sharded.clip_grad_norm_(limit)
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Move what Lightning does not know about; refuse what cannot work."""
        if self.ema is not None:
            if isinstance(self.trainer.strategy, FSDPStrategy):
                raise UserError("task.ema.decay cannot be used with trainer=fsdp; set task.ema.decay=0 or trainer=ddp")
            self.ema.match_device()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Set learning rates, note the epoch and key the dropout of this batch."""
        self.set_learning_rates()
        loader = self.trainer.train_dataloader
        assert isinstance(loader, ResumableLoader)
        self.epoch, number = loader.place
        key = keyed_uniform(self.seed, _DROPOUT_STREAM, self.epoch, number, self.global_rank)
        self._seed(int(key * 2**48))

    def _seed(self, seed: int) -> None:
        """Seed the generators that training draws from, as ``torch.manual_seed`` would."""
        # That one, on a machine without a GPU, remembers every call with its stack for the day there is one.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type != "cpu":
            torch.manual_seed(seed)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Under automatic optimization: clip by norm and record the norm before."""
        # Not self.parameters(), which walks over all modules, a millisecond in every step of a deep network.
        self.record(grad_norm=self.clip_gradients_of(p for group in optimizer.param_groups for p in group["params"]))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Under automatic optimization: step, then fold the new weights into the average before a callback saves."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update()

    def on_validation_epoch_start(self) -> None:
        """Validate the averaged weights, which are the ones that are released."""
        self._validation_ema.enter_context(self.averaged_weights())

    def on_validation_epoch_end(self) -> None:
        """Reduce validation sums over processes and log their means.

        The network gets its own weights back here and not later, because the next hook is the one that saves.
        """
        self._validation_ema.close()
        names = sorted(self._validation)
        sums = torch.stack([self._validation[name] for name in names]).to(self.device, torch.float32)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        total = dict(zip(names, sums.tolist(), strict=True))
        images = total.pop("images")
        self._validation.clear()
        for name, value in total.items():
            self.log(f"val/{name}", value / images, logger=False, rank_zero_only=False)

    def sum_validation(self, images: int, **means: Tensor) -> None:
        """Add the means over the images of one validation batch."""
        self._validation["images"] += images
        for name, value in means.items():
            self._validation[name] += value.detach().double().cpu() * images

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context in which the network holds its averaged weights, or its own when there is no average."""
        with ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.swapped())
            yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights under their own key."""
        checkpoint["vgen_task"] = self.task
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the averaged weights; their presence was compared before the run began."""
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])
