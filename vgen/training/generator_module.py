"""Training of a generator on token ids, given or encoded on the fly by a frozen tokenizer."""

from typing import Any, Literal, get_args

import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vgen.data.video_transforms import first_frames
from vgen.errors import UserError
from vgen.generators.transformer import Transformer
from vgen.layers.availability import why_not
from vgen.losses.tokens import (
    MASKED_FLOOR,
    linear_cross_entropy,
    masked_cross_entropy,
    mean_accuracy,
    token_accuracy,
    token_cross_entropy,
)
from vgen.random import keyed_uniform
from vgen.schedules.plan import Plan
from vgen.tokenizers.base import Tokenizer
from vgen.training.module import MakeOptimizer, TrainingModule

AttentionKind = Literal["auto", "dense", "flex"]
RESIDUALS = {"float32": None, "bfloat16": torch.bfloat16}
# Slots; at 256 the mask was 3 % faster (H200, benchmarks/RESULTS.md): blocks of 128 leave too little to skip.
FLEX_FROM = 1024
_CONDITION_STREAM, _ORDER_STREAM, _COIN_STREAM, _SHARE_STREAM, _HIDE_STREAM = 102, 103, 104, 105, 106
VISIBLE_WEIGHT = 0.1


class GeneratorModule(TrainingModule):
    """Next-token training of a generator.

    Args:
        generator: network with ``logits(ids, condition, plan, drop)``.
        tokenizer: frozen tokenizer. It is kept out of the module tree, so it is neither saved nor wrapped.
        plan: decode order the generator is trained for.
        optimizer: function of (named parameters, names of matrices).
        condition_dropout: share of samples whose condition becomes the null condition, in [0, 1]; 1 = unconditional.
        label_smoothing: of the cross entropy, in [0, 1).
        visible_weight: weight of tokens that were not hidden, for plans that hide tokens; null = 0.1.
        given_frames: the condition is the tokens of a clip's first frames, that many; None = its label.
        compile_network: compile the teacher-forced pass.
        attention: how a visibility that is not causal is trained: ``dense`` (a mask tensor), ``flex`` (FlexAttention,
            which skips what nobody sees), or ``auto``: flex on a GPU with compiled blocks and long sequences, otherwise
            dense.
        compile_group: blocks compiled as one, see :meth:`Transformer.compile_blocks`.
        residual: dtype of the residual stream between blocks in training: ``float32``, or ``bfloat16``, which moves
            half the bytes and needs bfloat16 autocast.
        fused_loss: compute the loss with the last matrix product, in chunks, without holding all logits; ``auto`` = on
            a GPU.
        fused_rotation: cut and rotate projections by one kernel, see :meth:`Transformer.fuse_rotation`; GPU only.
        shared: arguments of :class:`vgen.training.module.TrainingModule` other than the network.

    Raises:
        UserError: for a weight of visible tokens where the plan hides none.
    """

    task = "generator"

    def __init__(
        self,
        *,
        generator: Transformer,
        tokenizer: Tokenizer,
        plan: Plan,
        optimizer: MakeOptimizer,
        condition_dropout: float,
        compile_network: bool,
        attention: AttentionKind = "auto",
        compile_group: int = 1,
        residual: str = "float32",
        fused_loss: bool | Literal["auto"] = "auto",
        fused_rotation: bool = False,
        label_smoothing: float = 0.0,
        visible_weight: float | None = None,
        given_frames: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(network=generator, **shared)
        check_attention(attention, generator)
        self.attention, self.compiled = attention, compile_network
        self.plan = plan
        self.condition_dropout, self.given_frames = condition_dropout, given_frames
        if visible_weight is not None and plan.masking is None:
            raise UserError(
                f"task.visible_weight={visible_weight} has no effect: schedule '{plan.name}' hides no tokens; set it "
                "to null"
            )
        self.label_smoothing = label_smoothing
        self.visible_weight = VISIBLE_WEIGHT if visible_weight is None else visible_weight
        self._make_optimizer = optimizer
        self._matrices = self.matrices()
        self._frozen = [tokenizer.eval().requires_grad_(False)]
        if fused_loss not in ("auto", True, False):
            raise UserError(f"task.fused_loss={fused_loss} is unknown; choose auto, true or false")
        self.fused_loss = fused_loss
        if residual not in RESIDUALS:
            raise UserError(f"task.residual={residual} is unknown; choose one of {', '.join(RESIDUALS)}")
        self.residual = residual
        generator.residual_dtype = RESIDUALS[residual]
        if not isinstance(fused_rotation, bool):
            raise UserError(f"task.fused_rotation={fused_rotation} is unknown; choose true or false")
        self.fused_rotation = fused_rotation
        if fused_rotation:
            generator.fuse_rotation()
        self.compile_group = compile_group
        if compile_network:
            generator.compile_blocks(group=compile_group)
        elif compile_group != 1:
            raise UserError(f"task.compile_group={compile_group} has no effect without task.compile=true")

    @property
    def generator(self) -> Transformer:
        """The network, as a generator."""
        assert isinstance(self.network, Transformer)
        return self.network

    @property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer."""
        return self._frozen[0]

    def on_fit_start(self) -> None:
        """Move the tokenizer, which Lightning does not see."""
        super().on_fit_start()
        self.tokenizer.to(self.device)
        if self.attention == "flex" and self.device.type != "cuda":
            raise UserError("task.attention=flex trains on a GPU only; use task.attention=auto or dense")
        if self.fused_rotation and (reason := why_not(self.device)):
            raise UserError(f"task.fused_rotation=true is not available: {reason}; set it to false")
        if self.compile_group > 1 and isinstance(self.trainer.strategy, FSDPStrategy):
            raise UserError("trainer=fsdp gathers single blocks; set task.compile_group=1")
        precision = str(self.trainer.precision)
        if self.residual == "bfloat16" and precision != "bf16-mixed":
            raise UserError(f"task.residual=bfloat16 needs trainer.precision=bf16-mixed, not {precision}")

    @property
    def flex(self) -> bool:
        """Whether training steps run FlexAttention; validation, with its odd batch, keeps the mask."""
        if self.attention == "auto":
            long = self.plan.num_slots >= FLEX_FROM
            wanted = long and self.compiled and not self.generator.drops_attention
        else:
            wanted = self.attention == "flex"
        return wanted and self.device.type == "cuda" and not self.plan.on(self.device).causal

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer over the generator."""
        return self.make_optimizer(self._make_optimizer, "network.", self._matrices)

    def token_ids(self, batch: dict[str, Any]) -> Tensor:
        """The ids of a batch, int64 [B, N]; pixels are encoded in float32 without gradients."""
        if "ids" in batch:
            return batch["ids"]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.encode(batch["pixels"])

    def condition(self, batch: dict[str, Any]) -> Tensor:
        """What the samples of a batch are conditioned on: labels int64 [B], or tokens int64 [B, N] of first frames."""
        if self.given_frames is None:
            return batch["label"]
        if "condition" in batch:
            return batch["condition"]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.encode(first_frames(batch["pixels"], self.given_frames))

    def dropped(self, index: Tensor) -> Tensor | None:
        """Which samples lose their condition, bool [B], null = none; a function of (seed, epoch, image) only."""
        if self.condition_dropout == 0:
            return None
        return keyed_uniform(self.seed, _CONDITION_STREAM, self.epoch, index) < self.condition_dropout

    def orders(self, index: Tensor, *, share: float, epoch: int) -> Tensor:
        """Raster positions of every order index, int64 [B, N]: random for a share of the samples, else the plan's own.

        A function of (seed, epoch, image) only.

        Args:
            index: int64 [B], images.
            share: probability of a random order, in [0, 1].
            epoch: keys the draws; a fixed number gives the same orders every time.
        """
        places = torch.arange(self.plan.num_tokens, device=index.device)
        random = keyed_uniform(self.seed, _ORDER_STREAM, epoch, index[:, None], places).argsort(1)
        coin = keyed_uniform(self.seed, _COIN_STREAM, epoch, index) < share
        return torch.where(coin[:, None], random, self.plan.on(index.device).order)

    def training_orders(self, index: Tensor) -> Tensor | None:
        """Orders of a training batch; None where training follows the plan."""
        random = self.plan.random_order
        if random is None or (share := random.share(self.trainer.global_step)) == 0.0:
            return None
        return self.orders(index, share=share, epoch=self.epoch)

    def hidden(self, index: Tensor, *, epoch: int) -> Tensor | None:
        """Tokens hidden from the network, bool [B, N]; a function of (seed, epoch, image) only; None for plans without.

        Args:
            index: int64 [B], images.
            epoch: keys the draws; a fixed number hides the same tokens every time.
        """
        if self.plan.masking is None:
            return None
        places = torch.arange(self.plan.num_tokens, device=index.device)
        progress = keyed_uniform(self.seed, _SHARE_STREAM, epoch, index)
        return self.plan.masking.hidden(progress, keyed_uniform(self.seed, _HIDE_STREAM, epoch, index[:, None], places))

    def loss(self, logits: Tensor, ids: Tensor, hidden: Tensor | None) -> Tensor:
        """Mean cross entropy of logits [B, N, V] in nats per token."""
        if hidden is None:
            return token_cross_entropy(logits, ids, label_smoothing=self.label_smoothing)
        return masked_cross_entropy(
            logits, ids, hidden, visible_weight=self.visible_weight, label_smoothing=self.label_smoothing
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean cross-entropy in nats per token."""
        ids, order = self.token_ids(batch), self.training_orders(batch["index"])
        hidden, drop = self.hidden(batch["index"], epoch=self.epoch), self.dropped(batch["index"])
        options: dict[str, Any] = {"order": order, "drop": drop, "hidden": hidden, "flex": self.flex}
        if self.fused_loss is True or (self.fused_loss == "auto" and self.device.type == "cuda"):
            loss, right = self.fused(ids, self.condition(batch), hidden, options)
            accuracy = mean_accuracy(right, hidden)
        else:
            logits = self.generator.logits(ids, self.condition(batch), self.plan, **options)
            loss, accuracy = self.loss(logits, ids, hidden), token_accuracy(logits, ids, hidden)
        self.record(loss=loss, accuracy=accuracy)
        return loss

    def fused(
        self, ids: Tensor, condition: Tensor, hidden: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The loss of :meth:`loss` without the logits, and which tokens are right, bool [B, N]."""
        readout = self.generator.readout(ids, condition, self.plan, **options)
        return linear_cross_entropy(
            readout.features,
            readout.weight,
            readout.bias,
            ids,
            weights=None if hidden is None else torch.where(hidden, 1.0, self.visible_weight),
            floor=0.0 if hidden is None else MASKED_FLOOR,
            label_smoothing=self.label_smoothing,
            compiled=self.compiled,
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and accuracy on held-out images, conditions kept (if training keeps any), in the order of decoding.

        Where decoding draws orders or training hides tokens, every image keeps one draw, so that losses can be
        compared.
        """
        ids = self.token_ids(batch)
        drawn = self.plan.shuffled and self.plan.any_order
        order = self.orders(batch["index"], share=1.0, epoch=0) if drawn else None
        hidden = self.hidden(batch["index"], epoch=0)
        drop = torch.ones_like(batch["index"], dtype=torch.bool) if self.condition_dropout == 1 else None
        logits = self.generator.logits(ids, self.condition(batch), self.plan, order=order, drop=drop, hidden=hidden)
        loss, accuracy = self.loss(logits, ids, hidden), token_accuracy(logits, ids, hidden)
        self.sum_validation(len(ids), loss=loss, accuracy=accuracy)

    def count_tokens(self) -> int:
        """Tokens per image."""
        return self.plan.num_tokens

    def flops_per_image(self, batch: dict[str, Any]) -> float:
        """Operations of forward and backward (twice the forward) per image, counted on one real forward pass."""
        ids = self.token_ids(batch)[:1]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.generator.logits(ids, self.condition(batch)[:1], self.plan)
        return 3.0 * counter.get_total_flops()


def check_attention(attention: str, generator: Transformer) -> None:
    """Refuse a kind of attention that cannot train a network.

    Raises:
        UserError: for an unknown kind, or FlexAttention with dropout of attention weights.
    """
    if attention not in get_args(AttentionKind):
        raise UserError(f"task.attention={attention} is unknown; choose one of {', '.join(get_args(AttentionKind))}")
    if attention == "flex" and generator.drops_attention:
        raise UserError(
            "task.attention=flex cannot drop attention weights; set generator.attention_dropout=0 or "
            "task.attention=dense"
        )
