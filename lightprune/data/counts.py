"""`DomainCounts`: how much of each domain training has consumed, in the loggers."""

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightprune.data.module import TextDataModule
from lightprune.integrations.lightning import data_of, log_metrics, logs_now

MANY_EPOCHS = 4
"""So often data may be repeated at almost no loss against new data (Muennighoff et al., 2305.16264)."""


class DomainCounts(Callback):
    """Logs what training on a `TextDataModule` has consumed, on all ranks together.

    `data/tokens/<domain>` is the number of tokens, `data/epochs/<domain>` how often the domain has been passed over (0
    as long as the length of a stream is unknown). Logged every `log_every_n_steps` optimizer steps and at the end. A
    domain that has been repeated more than `MANY_EPOCHS` times is named in one warning.

    With any other data it does nothing.
    """

    def __init__(self) -> None:
        self._logged_at = 0
        self._warned: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._logged_at, self._warned = 0, set()

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if logs_now(trainer):
            self._log(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        data = data_of(trainer)
        if not isinstance(data, TextDataModule) or trainer.global_step == self._logged_at:
            return
        self._logged_at = trainer.global_step
        epochs = data.epochs_seen
        metrics = {f"data/tokens/{name}": float(tokens) for name, tokens in data.tokens_seen.items()}
        metrics |= {f"data/epochs/{name}": value for name, value in epochs.items()}
        log_metrics(trainer, metrics)
        often = {name for name, value in epochs.items() if value > MANY_EPOCHS} - self._warned
        self._warned |= often
        for name in sorted(often):
            rank_zero_warn(
                f"Training has passed over domain {name!r} more than {MANY_EPOCHS} times: it may learn that text by "
                "heart. Give data.domains more of it, or lower its weight."
            )
