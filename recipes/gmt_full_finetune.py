"""Full fine-tuning in which, at every optimizer step, only the largest gradient entries are applied."""

import sys

import torch
from omegaconf import DictConfig
from torchtune import config

from gmt_tune.integrations.torchtune.config.public import config_to_log
from gmt_tune.integrations.torchtune.run.chunks import fill_chunks
from gmt_tune.integrations.torchtune.run.data import to_device
from gmt_tune.integrations.torchtune.run.entry import parse, run_recipe
from gmt_tune.integrations.torchtune.run.masked_recipe import MaskedRecipe
from gmt_tune.integrations.torchtune.run.validation import tokens_in_loss
from gmt_tune.models.losses import LinearCrossEntropyLoss


class GMTFullFinetuneRecipe(MaskedRecipe):
    """
    Full fine-tuning of dense transformer LLMs with a gradient mask, on one device or many.

    It extends torchtune's ``FullFinetuneRecipeDistributed``, through ``MaskedRecipe``, which has what our recipes
    share. All of torchtune's options keep their names and meaning: activation checkpointing and offloading,
    gradient accumulation, gradient clipping, optimizer in backward, compilation, packed data, chunked losses,
    learning rate schedulers, profiler, metric loggers.

        - Gradient mask (``gradient_mask``). Right before each optimizer step, all gradient entries but the
          fraction ``density`` with the largest magnitude are zeroed: after accumulation, reduction over the
          ranks, normalisation by the token count, and clipping (whose norm is that of the whole gradient).
          With optimizer in backward, each parameter is masked right before its own step. Without the section,
          or with ``density: 1.0``, losses and weights equal torchtune's recipe bit for bit.

        - Gradient accumulation (``gradient_accumulation_steps``). Micro-batches that an epoch's end leaves over are
          part of the next epoch's first step. One without a token in the loss adds nothing to its step.

        - Optimizers. ``torch.optim.AdamW``, torchao's ``AdamW8bit``, ``AdamW4bit``, ``AdamWFp8`` (also with
          ``bf16_stochastic_round: True``) or any other ``torch.optim.Optimizer``. Momentum and weight decay
          still move weights whose gradient was zeroed.

        - Selected entries alone (``optimizer: gmt_tune.CompactAdamW``). Gradients and states exist for them alone, and
          the other weights stand still. With ``refresh_every`` above 1, layers take turns to be selected from. The
          norm that is clipped, and logged, is that of selected entries and dense parameters.

        - One device or many. ``tune run gmt_full_finetune`` runs in one process, on a GPU or on the CPU;
          ``tune run --nproc_per_node 8 gmt_full_finetune`` shards with FSDP2.

        - Checkpoints (``save_every_n_steps``, ``keep_last_n_checkpoints``; with ``enable_async_checkpointing``
          written while training goes on), also at the end of each epoch and
          when the run is asked to stop (SIGTERM, SIGINT, SIGUSR1). ``resume_from_checkpoint: True`` finds the
          newest whole one in ``output_dir`` and goes on exactly, or starts if there is none yet.

        - Validation (``dataset_val``, ``run_val_every_n_steps``, ``batch_size_val``).

        - Numbers that go wrong (``on_nonfinite``). A loss or gradient that is not finite ends the run before anything
          is saved, validated or logged (``error``), on the CPU before any weight changes; or that step is left out and
          counted (``skip``), for which the host waits for the device once a step.

        - Evaluation (``evaluation``). A component made with the tokenizer is called with the model before the
          first and after the last step; what it returns is printed and logged.

    Args:
        cfg (DictConfig): OmegaConf object parsed from yaml file

    Raises:
        UserError: if the config, the data, a checkpoint or a number is wrong; the message names the remedy.
    """

    def train(self) -> None:
        """The training loop."""
        if not self._begin_training():
            return
        running_loss, num_tokens = 0, 0
        for epoch in range(self.epochs_run, self.total_epochs):  # both loops begin later in a resumed run
            for batch, completes_step in self._epoch_batches(epoch):
                batch = to_device(batch, self._device)

                # The loss is a mean over tokens: weigh it by their number, so that micro-batches of
                # different lengths add up to the mean over all tokens of the step.
                batch_tokens = tokens_in_loss(batch["labels"], self._loss_fn.ignore_index)
                num_tokens += batch_tokens
                loss = self._loss(batch) * batch_tokens
                running_loss += loss.detach()

                if self._optimizer_in_bwd:
                    # Optimizers step during backward, so the loss must be normalised before it. The world
                    # size undoes the division by it in FSDP2's gradient reduction.
                    num_tokens, running_loss = self._reduce(num_tokens, running_loss)
                    self._check_finite(running_loss, num_tokens)
                    loss = loss * (self.world_size / num_tokens)
                loss.backward()

                if completes_step:
                    grad_norm = None
                    if not self._optimizer_in_bwd:
                        num_tokens, running_loss = self._reduce(num_tokens, running_loss)
                        if self._check_finite(running_loss, num_tokens):
                            self._scale_gradients(self.world_size / num_tokens)
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

                    # PyTorch divides a number by a tensor so, as torchtune does here; nothing waits for the device
                    mean_loss = running_loss.float() * num_tokens.reciprocal()
                    self._log_step(mean_loss, num_tokens, grad_norm)
                    self._finish_step()
                    running_loss, num_tokens = 0, 0

        self._end_training()

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of one micro-batch, ``tokens`` and ``labels`` of shape [batch, sequence]."""
        chunks = getattr(self._loss_fn, "num_output_chunks", 0)
        batch = fill_chunks(batch, self._model, chunks, self._tokenizer.pad_id, self._loss_fn.ignore_index)
        labels_BS = batch.pop("labels")
        # The model's output at a position predicts the next token: shift the labels, not the logits.
        ignored_B1 = torch.full_like(labels_BS[:, :1], self._loss_fn.ignore_index)
        labels_BS = torch.hstack((labels_BS[..., 1:], ignored_B1))
        # The mean over no token is NaN, in the gradient too: take any labels where there are none, as the loss is then
        # weighed by 0.
        labels_BS = torch.where((labels_BS != self._loss_fn.ignore_index).any(), labels_BS, 0)
        if isinstance(self._loss_fn, LinearCrossEntropyLoss):  # the output layer computes it: no logits
            with self.activations_handling_ctx, self._loss_fn.of(labels_BS):
                return self._model(**batch)
        with self.activations_handling_ctx:
            logits = self._model(**batch)
        if isinstance(logits, list):  # chunked losses take the chunks as they are
            return self._loss_fn(logits, labels_BS)
        return self._loss_fn(logits.reshape(-1, logits.size(-1)), labels_BS.reshape(-1))

    def _validate(self) -> dict[str, float]:
        """The mean loss over all tokens of ``dataset_val``."""

        def sums_of(batch: dict, rows: int) -> dict[str, torch.Tensor]:
            batch = to_device(batch, self._device)
            batch["labels"][rows:] = self._loss_fn.ignore_index
            tokens = tokens_in_loss(batch["labels"], self._loss_fn.ignore_index)
            return {"val_loss": self._loss(batch).double() * tokens, "tokens": tokens}

        return self._validation.run(self._model, sums_of, self._device)


def finetune(cfg: DictConfig) -> None:
    config.log_config(recipe_name="GMTFullFinetuneRecipe", cfg=config_to_log(cfg))
    GMTFullFinetuneRecipe(cfg=cfg).run(cfg)


@parse
def recipe_main(cfg: DictConfig) -> int:
    """
    Entry point for the recipe.

    Configurable parameters are read in the following order:
        - Parameters specified in config (see available configs through ``tune ls``)
        - Overwritten by arguments from the command-line
    """
    return run_recipe(cfg, finetune)


if __name__ == "__main__":
    sys.exit(recipe_main())
