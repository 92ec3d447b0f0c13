"""Direct preference optimization in which, at every step, only the largest gradient entries are applied."""

import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune import config, rlhf, training

from gmt_tune.integrations.torchtune.config.public import config_to_log
from gmt_tune.integrations.torchtune.run.data import to_device
from gmt_tune.integrations.torchtune.run.entry import parse, run_recipe
from gmt_tune.integrations.torchtune.run.masked_recipe import MaskedRecipe
from gmt_tune.integrations.torchtune.run.preference import OWN_KEYS, check_preference_config, check_preference_row


class PairLogProbs(NamedTuple):
    """What one model says of the pairs of a batch, each of shape [pairs], fp32."""

    chosen: Tensor  # log probability of the whole chosen answer
    rejected: Tensor
    chosen_logits: Tensor  # mean of all its logits
    rejected_logits: Tensor


class GMTFullDPORecipe(MaskedRecipe):
    """
    Full-parameter DPO of dense transformer LLMs with a gradient mask, on one device or many.

    Loss, batches and logged numbers are those of torchtune's ``FullDPORecipeDistributed``; set-up and options are
    those of ``gmt_full_finetune``: activation checkpointing and offloading, gradient accumulation, gradient clipping,
    optimizer in backward, compilation, tensor parallelism, learning rate schedulers, profiler, metric loggers.

        - Reference model (``ref_checkpointer``). The model before training, which rewards are measured against. It is
          held beside the trained one, sharded like it, without gradients; resuming does not change it.

        - Losses. ``torchtune.rlhf.loss.DPOLoss``, ``torchtune.rlhf.loss.RSOLoss``, or your own module with the same
          arguments and results.

        - Data (``dataset``). ``torchtune.datasets.preference_dataset`` and all others with its rows.

        - Gradient mask (``gradient_mask``). Right before each optimizer step, all gradient entries but the
          fraction ``density`` with the largest magnitude are zeroed: after accumulation, reduction over the
          ranks, and clipping (whose norm is that of the whole gradient). With optimizer in backward, each parameter
          is masked right before its own step. Without the section, or with ``density: 1.0``, losses and weights
          equal torchtune's recipe bit for bit.

        - Gradient accumulation. Micro-batches that an epoch's end leaves over are part of the next epoch's first step,
          as in ``gmt_full_finetune``; loss and gradient are means over what is there.

        - Optimizers, one device or many, checkpoints and resuming, numbers that go wrong, evaluation: as in
          ``gmt_full_finetune``.

        - Validation (``dataset_val``, ``run_val_every_n_steps``, ``batch_size_val``): the loss and all numbers below
          on held-out pairs, under names that begin with ``val_``.

    Logged at each step, as means over its pairs: ``rewards/chosen`` and ``rewards/rejected`` (how much likelier an
    answer has become than under the reference model, in the loss's scale), ``rewards/margins`` (their difference),
    ``rewards/accuracies`` (share of pairs where it is above zero), ``preference_accuracy`` (share of pairs whose
    chosen answer the model itself finds likelier), ``log_probs/...`` of whole answers, and ``logits/...``.

    Args:
        cfg (DictConfig): OmegaConf object parsed from yaml file

    Raises:
        UserError: if the config, the data, a checkpoint or a number is wrong; the message names the remedy.
    """

    default_collate_fn = "torchtune.data.padded_collate_dpo"

    def _check_row(self, row: Mapping, key: str) -> None:
        check_preference_row(row, key)

    def _setup_reference(self, cfg: DictConfig) -> None:
        """The model that rewards are measured against: set up like the other, but for what backward needs."""
        checkpointer = config.instantiate(cfg.ref_checkpointer, should_load_recipe_state=False)
        activations_handling_ctx = self.activations_handling_ctx  # _setup_model replaces it
        self._ref_model = self._setup_model(
            cfg_model=cfg.model,
            enable_activation_checkpointing=False,
            enable_activation_offloading=False,
            custom_sharded_layers=cfg.get("custom_sharded_layers", None),
            fsdp_cpu_offload=self.fsdp_cpu_offload,
            reshard_after_forward=cfg.get("fsdp_reshard_after_forward", True),
            model_state_dict=checkpointer.load_checkpoint()[training.MODEL_KEY],
        )
        self.activations_handling_ctx = activations_handling_ctx
        self._ref_model.requires_grad_(False).eval()
        for model in (self._model, self._ref_model):  # log probabilities must not differ by chance
            training.disable_dropout(model)

    def train(self) -> None:
        """The training loop."""
        if not self._begin_training():
            return
        running, num_tokens = 0, 0
        for epoch in range(self.epochs_run, self.total_epochs):  # both loops begin later in a resumed run
            for batch, completes_step in self._epoch_batches(epoch):
                num_tokens += torch.full((), batch[0].numel(), device=self._device)

                # Every micro-batch has as many pairs: the mean over the step is the mean of their means.
                numbers = self._numbers_of_pairs(batch)
                loss = numbers.pop("loss").mean() / self._gradient_accumulation_steps
                means = [number.mean() / self._gradient_accumulation_steps for number in numbers.values()]
                running += torch.stack([loss.detach(), *means])

                if self._optimizer_in_bwd:  # optimizers step during backward
                    num_tokens, running = self._reduce(num_tokens, running)
                    self._check_finite(running[0], num_tokens)
                loss.backward()

                if completes_step:
                    grad_norm = None
                    if not self._optimizer_in_bwd:
                        # FSDP2 has averaged the gradient over the ranks.
                        num_tokens, running = self._reduce(num_tokens, running)
                        if len(self._micro_batches) > self._gradient_accumulation_steps:
                            # With those that the epoch before has left over: divide by what is there
                            scale = self._gradient_accumulation_steps / len(self._micro_batches)
                            running = running * scale
                            self._scale_gradients(torch.full((), scale, device=self._device))
                        if self._check_finite(running[0], num_tokens):
                            grad_norm = self._clip_gradients()
                            # The gradient mask is the optimizer's step pre-hook: it acts inside this call,
                            # on the gradient as it is now.
                            self._optimizer.step()
                            if self._is_compact:  # clipped inside the step
                                grad_norm = self._optimizer.grad_norm
                        self._optimizer.zero_grad(set_to_none=True)

                    self.global_step += 1
                    if self._lr_scheduler is not None:
                        self._lr_scheduler.step()

                    mean_loss, *means = (running / self.world_size).unbind()
                    self._log_step(mean_loss, num_tokens, grad_norm, dict(zip(numbers, means, strict=True)))
                    self._finish_step()
                    running, num_tokens = 0, 0

        self._end_training()

    def _numbers_of_pairs(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The loss of each pair of a micro-batch, and what is logged of it: name -> [pairs]. Only the loss has a graph.

        Args:
            batch: tokens and labels, [2 x pairs, sequence] each: all chosen answers, then all rejected ones.
        """
        tokens_BS, labels_BS = to_device(batch, self._device)
        with self.activations_handling_ctx:
            policy = self._log_probs(self._model, tokens_BS, labels_BS)
        with torch.no_grad():
            reference = self._log_probs(self._ref_model, tokens_BS, labels_BS)
        losses, chosen_rewards, rejected_rewards = self._loss_fn(
            policy.chosen, policy.rejected, reference.chosen, reference.rejected
        )
        return {
            "loss": losses,
            "rewards/chosen": chosen_rewards.detach(),
            "rewards/rejected": rejected_rewards.detach(),
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": (chosen_rewards - rejected_rewards).detach(),
            "preference_accuracy": (policy.chosen > policy.rejected).float(),
            "log_probs/chosen": policy.chosen.detach(),
            "log_probs/rejected": policy.rejected.detach(),
            "logits/chosen": policy.chosen_logits,
            "logits/rejected": policy.rejected_logits,
        }

    @staticmethod
    def _log_probs(model: nn.Module, tokens_BS: Tensor, labels_BS: Tensor) -> PairLogProbs:
        # Padding is on the right, where causal attention does not look, so no mask is needed.
        logits_BSV = model(tokens_BS)
        chosen_BSV, rejected_BSV = logits_BSV.chunk(2)
        chosen_labels_BS, rejected_labels_BS = labels_BS.chunk(2)
        return PairLogProbs(
            rlhf.get_batch_log_probs(chosen_BSV, chosen_labels_BS),
            rlhf.get_batch_log_probs(rejected_BSV, rejected_labels_BS),
            chosen_BSV.detach().mean(dim=(1, 2)),
            rejected_BSV.detach().mean(dim=(1, 2)),
        )

    def _validate(self) -> dict[str, float]:
        """The same numbers, as means over all pairs of ``dataset_val``."""

        def sums_of(batch: tuple[Tensor, Tensor], rows: int) -> dict[str, Tensor]:
            numbers = self._numbers_of_pairs(batch)
            sums = {f"val_{name}": number[:rows].double().sum() for name, number in numbers.items()}
            return {**sums, "pairs": torch.full((), rows, device=self._device)}

        return self._validation.run(self._model, sums_of, self._device)


def dpo(cfg: DictConfig) -> None:
    check_preference_config(cfg)
    config.log_config(recipe_name="GMTFullDPORecipe", cfg=config_to_log(cfg))
    GMTFullDPORecipe(cfg=cfg).run(cfg)


@parse
def recipe_main(cfg: DictConfig) -> int:
    """
    Entry point for the recipe.

    Configurable parameters are read in the following order:
        - Parameters specified in config (see available configs through ``tune ls``)
        - Overwritten by arguments from the command-line
    """
    return run_recipe(cfg, dpo, OWN_KEYS)


if __name__ == "__main__":
    sys.exit(recipe_main())
