"""The share of held-out pairs whose better answer a model finds likelier: a recipe's ``evaluation`` section."""

from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchtune.data import padded_collate_dpo
from torchtune.modules.transforms.tokenizers import ModelTokenizer
from torchtune.rlhf import get_batch_log_probs

from gmt_tune.data.exact_match import evaluating
from gmt_tune.data.loading import load_dataset
from gmt_tune.data.quickstart import quickstart_preference_dataset
from gmt_tune.data.village import Split
from gmt_tune.errors import UserError


class PreferenceAccuracy:
    """Compares the log probabilities of both answers of each pair, and returns ``{"preference_accuracy": ...}``.

    No reference model takes part, so it can judge a model before training too: one that does not know what makes an
    answer better is right about half of the time.

    Without ``data_files`` it takes the quickstart's pairs. Under several processes each must make the same call.

    Args:
        tokenizer (ModelTokenizer): the recipe's tokenizer.
        split (str): of the quickstart's pairs, ``held_out`` or ``train``; not used with ``data_files``.
        data_files (str | None): path of a JSON Lines file with two conversations in each line, ``chosen`` and
            ``rejected``, as ``torchtune.datasets.preference_dataset`` reads them; default None, the quickstart's.
        size (int | None): only the first so many pairs; default None, all.
        batch_size (int): pairs in one forward pass. Memory grows with it, by
            2 x batch_size x tokens x vocabulary x 4 bytes for the outputs alone.

    Raises:
        UserError: if the data cannot be read, or a number is below 1.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        split: Split = "held_out",
        data_files: str | None = None,
        size: int | None = None,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"evaluation.batch_size must be a whole number from 1 on, got {batch_size}")
        dataset: Dataset
        if data_files is None:
            dataset = quickstart_preference_dataset(tokenizer, split=split, size=size)
        elif not Path(data_files).is_file():
            raise UserError(f"evaluation.data_files {data_files} does not exist: name a JSON Lines file")
        else:
            section = {
                "_component_": "torchtune.datasets.preference_dataset",
                "source": "json",
                "data_files": data_files,
                "split": "train" if size is None else f"train[:{size}]",
            }
            dataset = load_dataset(OmegaConf.create(section), tokenizer, "evaluation.data_files")
        collate = partial(padded_collate_dpo, padding_idx=tokenizer.pad_id)
        # Its own generator: a loader draws a number at each start, which must not be one of the training's.
        self._batches = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, generator=torch.Generator())

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Compare all pairs; the model's training mode and the state of all random generators stay as they are."""
        device = next(model.parameters()).device
        right = []
        with evaluating(model):
            for tokens_BS, labels_BS in self._batches:
                log_probs_B = get_batch_log_probs(model(tokens_BS.to(device)), labels_BS.to(device))
                chosen_B, rejected_B = log_probs_B.chunk(2)
                right.append(chosen_B > rejected_B)
        return {"preference_accuracy": torch.cat(right).double().mean().item()}
