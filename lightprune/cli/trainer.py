"""`PruningTrainer`: a Trainer with the verbs `plan`, `export` and `generate`."""

from typing import Any, Literal

import lightning.pytorch as pl

from lightprune.integrations.command_line import PrecisionInput

ServedDtype = Literal["float32", "bfloat16", "float16"]
PrecisionSetting = Literal["auto"] | PrecisionInput | None


class PruningTrainer(pl.Trainer):
    """A Trainer with the verbs that need a model and no training.

    Their code is imported when they run: the command line reads this class's arguments also where it only prints help.

    Args:
        precision: as in `Trainer`, or "auto", in whose place the command line sets what is fast on the devices.
    """

    def __init__(self, *args: Any, precision: PrecisionSetting = None, **kwargs: Any) -> None:
        super().__init__(*args, precision=precision, **kwargs)  # type: ignore[arg-type]

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        output: str | None = None,
        prompt: int = 512,
        context: int = 2048,
        batch_size: int = 1,
        dtype: ServedDtype | None = None,
    ) -> None:
        """Print what a config would cut, when, the shape that results, and what it costs; trains nothing.

        Args:
            model: the module that would be trained.
            datamodule: not used.
            output: a JSON file for all that is printed.
            prompt: tokens of a prompt, for the FLOPs of reading it.
            context: tokens before one that is generated, for the KV cache.
            batch_size: sequences beside each other.
            dtype: of weights and KV cache where the model serves; null takes that of the model.
        """
        from lightprune.cli.verbs import print_plan
        from lightprune.costs import Workload

        print_plan(self, model, Workload.of("plan", prompt, context, batch_size, dtype), output)

    def export(
        self,
        model: pl.LightningModule,
        ckpt_path: str,
        output: str,
        datamodule: pl.LightningDataModule | None = None,
        overwrite: bool = False,
        weights_only: bool | None = None,
        tokenizer: str | None = None,
    ) -> None:
        """Write the model of a checkpoint as a Hugging Face directory.

        Args:
            model: the module that was trained.
            ckpt_path: a checkpoint of a run with the same config; "last" is the newest of its `ModelCheckpoint`.
            output: the directory to write, on this machine.
            datamodule: only its tokenizer is used.
            overwrite: replace `output` if it exists.
            weights_only: as in `fit`.
            tokenizer: directory or Hub id of the tokenizer to save beside the model; null takes that of the config's
                `ExportHF`, of the model or of the data.
        """
        from lightprune.cli.verbs import export

        target = export(self, model, ckpt_path, output, datamodule, overwrite, weights_only, tokenizer)
        print(f"Exported to {target}")

    def generate(
        self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None, output: str | None = None
    ) -> None:
        """Let a model write the text of the domains that are `generated`, into the cache, where a fit finds it.

        Args:
            model: the module whose model writes, unless a domain names another one.
            datamodule: a `TextDataModule` with such domains.
            output: a file for the text too: JSON Lines, one `{"domain": ..., "text": ...}` for each document.
        """
        from lightprune.cli.verbs import generate

        generate(model, datamodule, output)
