"""`Distillation`: the loss of the step is, in part, how far the model is from a frozen teacher."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightprune.data.tokens import cache_root
from lightprune.distillation.cache import TeachingCache
from lightprune.distillation.checks import check_cache, check_same
from lightprune.distillation.kl import Likeliest, Teaching, divergence, likeliest
from lightprune.distillation.teacher import Teacher
from lightprune.errors import ConfigError, check_number
from lightprune.hub import Dtype, load_causal_lm, torch_dtype
from lightprune.integrations.zero_params import is_partitioned
from lightprune.masks.forward_passes import attention_mask_of, call_inputs, logits_of, on_output
from lightprune.masks.gates import Handle, remove_all
from lightprune.metrics import IGNORE_INDEX
from lightprune.pipeline import PruningCallback, Stage, Status
from lightprune.pipeline.steps import Steps


class Distillation(PruningCallback):
    """Lets a frozen teacher say what the next token may be: loss = (1 - a) * loss + a * T^2 * KL(teacher || student).

    The teacher is the model itself, before anything was done to it, so a run needs no second model, and what selection,
    penalties and the cut take away is measured against what was there (Minitron, arXiv 2407.14679, section 4). The KL
    is the mean over the tokens that have a loss (Hinton et al., arXiv 1503.02531). It acts in every step from `start`
    to `stop`: while gates learn, while regularizers empty what goes, and in the recovery. A step costs one forward pass
    of the teacher more.

    With `snapshot`, the model trains that long before it becomes the teacher (the teacher correction of Minitron, arXiv
    2408.11796): an untuned teacher holds back what training on other text would reach. A checkpoint after that holds
    the teacher.

    Args:
        alpha: a, the teacher's share of the loss; 1 leaves out the module's own loss. A half is better than 1 in every
            row of `benchmarks/recovery.py` that has both.
        temperature: T; above 1, the teacher's second choices count more.
        top_k: how many of the teacher's likeliest tokens are told apart; all others are one. None tells all apart.
        hidden: strength of a penalty on hidden states: the mean over the borders of the cut, and over tokens, of
            ||X_student - X_teacher||^2 / ||X_teacher||^2, over the hidden dimensions that stay. 0 leaves it out.
        teacher: the directory or Hub id of another model with the same vocabulary; None is the model itself.
        snapshot: the optimizer step at which the model itself becomes the teacher, or a share of the run.
        start: the optimizer step from which on it teaches; None is `snapshot`.
        stop: the optimizer step at which it ends; None is the end of the run.
        dtype: of the teacher's weights; None keeps those of the model.
        cache: keep what the teacher says of the `top_k` tokens in the data cache. The next pass over the same text, in
            this run or another one, then runs no teacher. 8 bytes a token and k: 67 MB for 131k tokens and 64.

    Raises:
        ConfigError: before the first step, where the teacher cannot teach this model.
    """

    stage = Stage.RECOVER
    step_settings = ("snapshot", "start", "stop")
    needs_training = True
    snapshot: int
    start: int | None
    stop: int | None

    def __init__(
        self,
        alpha: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        hidden: float = 0.0,
        teacher: str | None = None,
        snapshot: Steps = 0,
        start: Steps | None = None,
        stop: Steps | None = None,
        dtype: Dtype | None = None,
        cache: bool = False,
    ) -> None:
        vars(self).update(snapshot=snapshot, start=start, stop=stop)  # shares until `resolve_steps`
        self.alpha = alpha
        self.temperature = temperature
        self.top_k = top_k
        self.hidden = hidden
        self.teacher = teacher
        self.dtype = dtype
        self.cache = cache
        self._cache: TeachingCache | None = None
        self._teacher: Teacher | None = None
        self._handles: list[Handle] = []
        self._labels: Tensor | None = None  # of the batch
        self._inputs: dict[str, Tensor] = {}  # of the decoder, in the pass that trains
        self._logits: Tensor | None = None  # of that pass
        self._states: dict[int, Tensor] = {}  # outputs of the student's layers at the borders of the cut
        self._last = torch.zeros(())
        self._taken = False  # whether the model has become the teacher at `snapshot`
        self._of_head = False  # whether the logits are those of the head alone

    @property
    def begins(self) -> int:
        return self.start or self.snapshot

    @property
    def _begin(self) -> int:
        return self.snapshot if self.start is None else self.start

    def check_settings(self) -> None:
        check_number(self, "alpha", self.alpha, above=0, most=1)
        check_number(self, "temperature", self.temperature, above=0)
        check_number(self, "top_k", self.top_k, whole=True, least=1, optional=True)
        check_number(self, "hidden", self.hidden, least=0)
        check_number(self, "snapshot", self.snapshot, whole=True, least=0)
        check_number(self, "start", self.start, whole=True, least=self.snapshot, optional=True)
        check_number(self, "stop", self.stop, whole=True, above=self._begin, optional=True)
        if self.dtype is not None:
            torch_dtype(self.dtype)
        if self.teacher is not None and self.snapshot:
            raise ConfigError(
                "Distillation.snapshot is the step at which the model itself becomes the teacher, and "
                f"Distillation.teacher is {self.teacher!r}: set one of the two."
            )
        check_cache(self.cache, top_k=self.top_k, hidden=self.hidden, snapshot=self.snapshot)

    def check(self) -> None:
        cut = self.pipeline.cut
        first = min((cut.at for cut in self.pipeline.cuts), default=None)
        if first is not None and self.snapshot > first:
            raise ConfigError(
                f"Distillation.snapshot is {self.snapshot}, after the cut at step {first}: the teacher is the model "
                f"before the cut, so set it to at most {first}."
            )
        if self.hidden and cut is None:
            raise ConfigError(
                "Distillation.hidden is a penalty at the borders of the cut, and there is none: set it to 0, or add a "
                "StructuredCut to trainer.callbacks."
            )
        turning = next((part for part in self.pipeline.parts if part.rotate), None)
        if self.hidden and turning is not None:
            raise ConfigError(
                f"Distillation.hidden is {self.hidden}, and {type(turning).__name__}.rotate is true: the teacher's "
                "hidden dimensions are others then. Set one of them to 0 or false."
            )
        vocabulary = int(self.pipeline.anatomy.config.vocab_size)
        if self.top_k is not None and self.top_k > vocabulary:
            raise ConfigError(
                f"Distillation.top_k is {self.top_k}, and the vocabulary has {vocabulary} tokens: lower it, or set it "
                "to null."
            )

    def built(self) -> None:
        """Copy the model while it is what the run begins with, or load the teacher."""
        if self._teacher is not None:  # a fit that goes on
            return
        if self.teacher is not None:
            lm = load_causal_lm(self.teacher, dtype=self.dtype or "float32")
            self._check_vocabulary(lm)
            self._teacher = Teacher(lm)
        else:  # it is uncut, whatever is loaded later; with `snapshot` it takes other weights then
            self._teacher = Teacher.of(self.pipeline.lm, None if self.dtype is None else torch_dtype(self.dtype))
        if self.cache:
            self._open_cache(self._teacher)

    def _open_cache(self, teacher: Teacher) -> None:
        if any(is_partitioned(parameter) for parameter in teacher.lm.parameters()):
            raise ConfigError(
                "Distillation.cache is true under ZeRO stage 3, where all ranks have to run a teacher together: set it "
                "to false, or use stage 2."
            )
        pipeline, trainer = self.pipeline, self.pipeline.trainer
        said = f"{teacher.identity()} {self.top_k} {self.temperature} {trainer.precision}"
        root = cache_root(getattr(getattr(trainer, "datamodule", None), "cache_dir", None))
        folder = root / "teachings" / hashlib.sha256(said.encode()).hexdigest()[:16]
        self._cache = TeachingCache(folder, signature(pipeline.anatomy.decoder.forward).parameters)
        rank_zero_info(f"Distillation: {len(self._cache):,} sequences are known in {folder}.")

        def expect(original: Callable[..., object], batch: object, *args: object, **kwargs: object) -> object:
            if self._cache is not None and trainer.training and isinstance(batch, Mapping):
                self._cache.expect(batch)
            return original(batch, *args, **kwargs)

        pipeline.shadow(trainer.strategy, "batch_to_device", expect)

    def _check_vocabulary(self, lm: PreTrainedModel) -> None:
        theirs, ours = int(lm.config.get_text_config().vocab_size), int(self.pipeline.anatomy.config.vocab_size)
        if theirs != ours:
            raise ConfigError(
                f"Distillation.teacher is {self.teacher!r}, whose vocabulary has {theirs} tokens, and the model's has "
                f"{ours}: choose a teacher with the same tokenizer."
            )

    # Where it acts.

    @property
    def acting(self) -> bool:
        """Whether it teaches in the step that is under way."""
        step = self.pipeline.step
        return self._teacher is not None and self._begin <= step and (self.stop is None or step < self.stop)

    @property
    def loss_share(self) -> float:  # type: ignore[override]
        taught = self.acting and self._logits is not None and self._logits.requires_grad
        return 1 - self.alpha if taught else 1.0

    @property
    def needs_backward(self) -> bool:
        return self.stop is None or self.pipeline.step < self.stop

    def advance(self, step: int) -> None:
        self._forget()
        if self.snapshot and not self._taken and step >= self.snapshot and self._teacher is not None:
            self._teacher.learn_from(self.pipeline.lm)
            self._taken = True
        if not self.acting:
            self._unwatch()
        elif not self._handles:
            self._watch()

    def _watch(self) -> None:
        anatomy, teacher = self.pipeline.anatomy, self._teacher
        assert teacher is not None

        def note_inputs(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if self.pipeline.training:
                self._forget()
                self._inputs = call_inputs(module, args, kwargs)

        def note_logits(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            logits = output if isinstance(output, Tensor) else logits_of(output)
            if self.pipeline.training and isinstance(logits, Tensor) and logits.ndim == 3:
                self._logits, self._of_head = logits, module is not self.pipeline.lm

        # The head's own output serves whoever calls decoder and head alone; the model's, if it is called, comes after.
        self._handles = [
            anatomy.decoder.register_forward_pre_hook(note_inputs, with_kwargs=True),
            anatomy.head.register_forward_hook(note_logits),
            self.pipeline.lm.register_forward_hook(note_logits),
            *(on_output(anatomy.layers[index], self._note_state(index)) for index in self._borders),
        ]

    def _note_state(self, index: int) -> Callable[[Tensor, Tensor], None]:
        def use(before: Tensor, after: Tensor) -> None:
            if self.pipeline.training:
                self._states[index] = after

        return use

    @property
    def _borders(self) -> dict[int, int]:
        """For the layers of the model as it is now that are followed by a border of the cut, those of the teacher."""
        plan = self.pipeline.executed
        if not self.hidden or plan is None or self.teacher is not None:
            return {}
        kept, end = plan.kept_layers, plan.source.layers
        return {
            place: following - 1
            for place, (layer, following) in enumerate(zip(kept, [*kept[1:], end], strict=True))
            if following > layer + 1
        } or {len(kept) - 1: end - 1}

    def _unwatch(self) -> None:
        remove_all(self._handles)
        if self._cache is not None:
            self._cache.flush()
        self._forget()

    def _forget(self) -> None:
        """Forget a pass: it has been taught, or its batch was skipped."""
        self._inputs, self._logits, self._states = {}, None, {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        self._labels = labels if isinstance(labels, Tensor) else None
        if self._cache is not None and isinstance(batch, Mapping):
            self._cache.sent(batch)

    def penalty(self) -> Tensor | None:
        """What the teacher says of the pass that has just run, as a part of the loss."""
        if not self.acting or not self._inputs:
            return None
        if self._logits is not None and not self._logits.requires_grad:  # a selector looks, and nothing learns
            self._forget()
            return None
        if self._logits is None:
            raise ConfigError(
                f"Distillation has seen no logits [B, T, V] in a step of {type(self.pipeline.module).__name__}: call "
                "the causal LM, or its decoder and its head, on all tokens of the batch, without a fused loss."
            )
        logits, weights = self._logits, self._weights(self._logits.shape[:2])
        borders = self._borders
        with self.pipeline.trainer.precision_plugin.forward_context():
            teaching, theirs = self._teaching(borders.values())
            loss = self.alpha * divergence(
                logits.flatten(0, 1), teaching, weights, temperature=self.temperature, top_k=self.top_k
            )
        if self._cache is not None:
            self._cache.keep(self._inputs)
        self._last = loss.detach() / self.alpha
        for ours, of_teacher in borders.items():
            apart = relative_distance(self._states[ours], theirs[of_teacher], self._kept_hidden())
            loss = loss + self.hidden / len(borders) * (weights * apart.flatten()).sum()
        self._forget()
        return loss

    def _teaching(self, layers: Iterable[int]) -> tuple[Teaching, dict[int, Tensor]]:
        """What the teacher says of slices of the pass's tokens, and the outputs [B, T, d] of some of its layers."""
        teacher, cache, of_head = self._teacher, self._cache, self._of_head
        assert teacher is not None
        known = None if cache is None or of_head else cache.find(self._inputs)
        if known is not None:
            return lambda chunk: Likeliest(known.tokens[chunk], known.log_probs[chunk]), {}
        teacher.to(self.pipeline.lm.device)
        hidden, theirs = teacher.hidden_states(self._inputs, layers)
        hidden = hidden.flatten(0, 1)

        def teaching(chunk: slice) -> Tensor | Likeliest:
            logits = teacher.logits(hidden[chunk], of_head=of_head)
            if cache is None or of_head or self.top_k is None:
                return logits
            return cache.note(likeliest(logits, self.temperature, self.top_k))

        return teaching, theirs

    def _weights(self, shape: torch.Size) -> Tensor:
        """What each token [B x T] counts for: the same for all that have a loss, 1 in all."""
        counted = torch.ones(shape, dtype=torch.bool, device=self.pipeline.lm.device)
        mask = attention_mask_of(self._inputs)
        if self._labels is not None and self._labels.shape == shape:
            counted[:, :-1] = self._labels[:, 1:] != IGNORE_INDEX
            counted[:, -1] = False
        elif mask is not None and mask.shape == shape:
            counted = mask != 0
        weights = counted.flatten().float()
        return weights / weights.sum().clamp(min=1)

    def _kept_hidden(self) -> list[int] | None:
        plan = self.pipeline.executed
        return None if plan is None or "hidden" not in plan.structures else list(plan.kept("hidden", 0))

    def status(self) -> Status:
        return {"divergence": float(self._last)} if self.acting else {}

    def detach(self) -> None:
        self._unwatch()

    def finish(self) -> None:
        self._unwatch()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._teacher, self._cache, self._taken = None, None, False  # a later fit has a teacher of its own

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: the teacher's weights, where training has made them, else what they can be told by."""
        if self._teacher is None:
            return {"teacher": None, "weights": None}
        return {
            "teacher": self._teacher.fingerprint(),
            "weights": self._teacher.state() if self._taken else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._teacher is None:
            return
        self._taken = state_dict["weights"] is not None
        if self._taken:
            self._teacher.load(state_dict["weights"])
        elif state_dict["teacher"] is not None and not self.snapshot:
            check_same(self._teacher.fingerprint(), state_dict["teacher"])


def relative_distance(student: Tensor, teacher: Tensor, kept: list[int] | None) -> Tensor:
    """||X_student - X_teacher||^2 / ||X_teacher||^2 of each token [B, T], over the dimensions `kept` of the teacher."""
    teacher = (teacher if kept is None else teacher[..., kept]).float()
    return (student.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
