"""`LoRARecovery`: low-rank adapters train in place of the cut model's weights, and are merged into them at the end.

`peft` comes with an extra, so what needs it is imported where it is used.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning as L
from torch.optim import Optimizer

from lightprune.anatomy.base import module_at
from lightprune.errors import ConfigError, check_number
from lightprune.pipeline import PruningCallback, Stage
from lightprune.pipeline.module_checks import packed_in

if TYPE_CHECKING:
    from lightprune.recovery.adapters import Adapters, Groups

ALL = "all-linear"


class LoRARecovery(PruningCallback):
    """From the last cut on, only low-rank adapters of the language model train; at the end they are merged into it.

    An adapted projection gives W x + (alpha / r) B A x: W [out, in] stands still, A [r, in] begins random and
    B [out, r] at 0, so that nothing changes at first (LoRA, arXiv 2106.09685, section 4.1). When training ends, W
    becomes W + (alpha / r) B A, and what is exported is an ordinary model.

    The adapters take the places of the weights they adapt in the optimizers, in the same groups, so that weight decay,
    schedules and clipping go on; the language model's other parameters leave them, with their moments. Parameters of
    the module outside the language model train on. The learning rate stays that of the optimizer: adapters need about
    ten times that of full finetuning, which a `Recovery` beside this sets.

    A checkpoint between the cut and the end holds the adapters, and a resume goes on with them. From one that is saved
    after the end it begins new ones.

    Needs the extra `lora` (the package `peft`).

    Args:
        r: rank of the adapters.
        alpha: how strong they are: they are scaled by `alpha / r`.
        dropout: on the adapters' input.
        target_modules: names of the projections to adapt, such as `[q_proj, v_proj]`; "all-linear" is all projections
            of the layers.
        use_rslora: scale by `alpha / sqrt(r)` instead (arXiv 2312.03732).
        seed: of the initial A.
    """

    stage = Stage.RECOVER
    needs_training = True

    def __init__(
        self,
        r: int = 8,
        alpha: int = 16,
        dropout: float = 0.0,
        target_modules: list[str] | str = ALL,
        use_rslora: bool = False,
        seed: int = 0,
    ) -> None:
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.use_rslora = use_rslora
        self.seed = seed
        self._adapters: Adapters | None = None
        self._settings: dict[str, object] = {}
        self._before: Groups = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.pipeline.shadow(trainer.strategy, self.pipeline.adapter.makes_optimizers, self._make_optimizers)

    def check_settings(self) -> None:
        check_number(self, "r", self.r, whole=True, least=1)
        check_number(self, "alpha", self.alpha, whole=True, least=1)
        check_number(self, "dropout", self.dropout, least=0, below=1)
        check_number(self, "seed", self.seed, whole=True, least=0)

    def check(self) -> None:
        _require_peft()
        if self.pipeline.cut is None:
            raise ConfigError(
                "LoRARecovery begins at the cut, and there is none: add a StructuredCut to trainer.callbacks."
            )
        self._check_plain(self._targets())

    def _check_plain(self, targets: Sequence[str]) -> None:
        """Refuse adapters on packed weights, into which nothing can be merged."""
        for layer in self.pipeline.anatomy.layers:
            for path in targets:
                module = module_at(layer, path)
                packed = None if module is None else packed_in(module)
                if packed is not None:
                    raise ConfigError(
                        f"LoRARecovery.target_modules has {path}, which is quantized (it has {packed}), and adapters "
                        "cannot be merged into packed weights: load the model without quantization, or name "
                        "projections that are not quantized."
                    )

    def advance(self, step: int) -> None:
        cut = self.pipeline.cut
        if self._adapters is None and cut is not None and cut.done:
            with self.pipeline.adapter.rewrapped():
                self._adapt()
                self._enter(self.pipeline.adapter.optimizers)

    def finish(self) -> None:
        """Merge the adapters: an ordinary model is left, and optimizers that would train its weights anew."""
        if self._adapters is None:
            return
        from lightprune.recovery.adapters import restore

        self._adapters.merge()
        if self.pipeline.fitting and self.pipeline.adapter.keeps_optimizers:  # else no optimizer has them
            restore(self.pipeline.adapter.optimizers, self._before)
        self._adapters, self._before = None, []

    def detach(self) -> None:
        # What a fit leaves behind, if it is broken off, has to fit its checkpoint.
        if not self.pipeline.fitting:
            self.finish()

    def restructure(self, state: Mapping[str, Any]) -> None:
        settings = state["adapters"]
        if self._adapters is not None:  # a fit was broken off, and the module is used again
            self._adapters.remove()
            self._adapters = None
        if settings is None:
            return
        _require_peft()
        for key, own in self._resolved().items():
            if own != settings[key]:
                raise ConfigError(
                    f"LoRARecovery.{key} is {own!r}, and the checkpoint's adapters have {settings[key]!r}: set it to "
                    "that to go on with them."
                )
        self._adapt()

    def state_dict(self) -> dict[str, Any]:
        return {"adapters": None if self._adapters is None else self._settings}

    def _adapt(self) -> None:
        from lightprune.recovery.adapters import Adapters

        self._settings = self._resolved()
        self._adapters = Adapters(
            self.pipeline.anatomy,
            self._targets(),
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            use_rslora=self.use_rslora,
            seed=self.seed,
        )
        # As Lightning does to all modules of a run before it begins: half precision under `bf16-true`.
        for module in self._adapters.modules:
            self.pipeline.trainer.precision_plugin.convert_module(module)

    def _enter(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the adapters into the optimizers."""
        from lightprune.recovery.adapters import substitute

        assert self._adapters is not None
        self._before = substitute(optimizers, self._adapters.substitutes)

    def _make_optimizers(self, original: Callable[..., object], *args: object) -> object:
        """On a resume, let the module make its optimizers as at the start, for the model without adapters."""
        if self._adapters is None:
            return original(*args)
        with self._adapters.hidden():
            made = original(*args)
        self._enter(self.pipeline.adapter.made(made))
        return made

    def _resolved(self) -> dict[str, object]:
        """What decides the shapes of the adapters and what they do."""
        return {
            "r": self.r,
            "alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "target_modules": self._targets(),
        }

    def _targets(self) -> list[str]:
        """The projections to adapt, as dotted paths that start at a layer."""
        from lightprune.recovery.adapters import projections

        available = projections(self.pipeline.anatomy)
        if self.target_modules == ALL:
            return available
        names = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        if not isinstance(names, Sequence) or not names:
            found = "empty" if names == [] else repr(names)
            raise ConfigError(
                f"LoRARecovery.target_modules is {found}: name at least one of {', '.join(available)}, or set it to "
                f"{ALL}."
            )
        for name in names:
            if not any(_is_called(path, name) for path in available):
                raise ConfigError(
                    f"LoRARecovery.target_modules names {name!r}, which is no projection of a layer: choose from "
                    f"{', '.join(available)}, or set it to {ALL}."
                )
        return [path for path in available if any(_is_called(path, name) for name in names)]


def _is_called(path: str, name: str) -> bool:
    """Whether a dotted path ends in a name, which may be dotted itself."""
    return path == name or path.endswith(f".{name}")


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise ConfigError(
            "LoRARecovery needs the package peft, which is not installed: run `pip install 'lightprune[lora]'`, or "
            "leave it out of trainer.callbacks."
        )
