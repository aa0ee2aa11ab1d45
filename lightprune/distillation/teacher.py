"""`Teacher`: a frozen language model that is run beside the one that trains, on the same tokens.

Shapes: B sequences, T tokens, N = B x T, d hidden dimensions, V tokens in the vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from lightprune.anatomy import anatomy_of
from lightprune.errors import ConfigError
from lightprune.integrations.zero_params import (
    gathered,
    gathered_for_reading,
    gathered_for_update,
    is_partitioned,
    partition_like,
    readable,
    twin,
)
from lightprune.masks.forward_passes import on_output
from lightprune.masks.gates import Handle, ReplacedForward, remove_all


class Teacher:
    """A frozen language model of a known family.

    Its parameters belong to no module that trains, so no optimizer, strategy or checkpoint sees them.

    Args:
        lm: the model; it is never trained, and stays in eval mode.

    Raises:
        ConfigError: its family has no declaration.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        lm.requires_grad_(False).eval()  # type: ignore[no-untyped-call]
        self.lm = lm
        self.anatomy = anatomy_of(lm)
        self._device: torch.device | None = None  # where `to` has moved it
        self._output: type[ModelOutput] = BaseModelOutputWithPast  # what the decoder gives

    @classmethod
    @torch.no_grad()
    def of(cls, lm: PreTrainedModel, dtype: torch.dtype | None) -> "Teacher":
        """A frozen copy of a model as it is now, without its hooks; partitioned as the model is, under ZeRO-3.

        Args:
            lm: the model.
            dtype: of the copy's weights; None keeps that of each.
        """
        parameters = {parameter: _copy_of(parameter, dtype) for parameter in lm.parameters()}
        copied = cast(PreTrainedModel, twin(lm, parameters))
        return cls(copied)

    def to(self, device: torch.device) -> "Teacher":
        """Move what is not partitioned to a device, unless it is there already."""
        if device == self._device:
            return self
        self._device = device
        for tensor in (*self.lm.parameters(), *self.lm.buffers()):
            if not is_partitioned(tensor):
                tensor.data = tensor.data.to(device)
        return self

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.anatomy.config.vocab_size)

    @torch.no_grad()
    def hidden_states(
        self, inputs: Mapping[str, Tensor], layers: Iterable[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """What the decoder makes of a call's inputs: its output [B, T, d], and the outputs of some of its layers.

        Raises:
            ConfigError: the decoder was given embeddings, and this one's have another width.
        """
        embeddings = inputs.get("inputs_embeds")
        if embeddings is not None and embeddings.shape[-1] != self.anatomy.shape.hidden:
            raise ConfigError(
                f"The student's decoder is called with embeddings of {embeddings.shape[-1]} dimensions, and the "
                f"teacher has {self.anatomy.shape.hidden}: call it with `input_ids`, or leave Distillation out."
            )
        seen: dict[int, Tensor] = {}

        def note(index: int) -> Callable[[Tensor, Tensor], None]:
            return lambda before, after: seen.update({index: after})

        handles: list[Handle] = [on_output(self.anatomy.layers[index], note(index)) for index in layers]
        try:
            with readable(self.anatomy.decoder):
                output = self.anatomy.decoder(**inputs, use_cache=False, return_dict=True)
        finally:
            remove_all(handles)
        self._output = type(output)
        return output.last_hidden_state, seen

    @torch.no_grad()
    def logits(self, hidden: Tensor, *, of_head: bool = False) -> Tensor:
        """The logits [n, V] of outputs of the decoder [n, d].

        Args:
            hidden: the outputs.
            of_head: whether what the head alone gives is wanted, without what the model does to it (a soft cap, say).
        """

        def give(*args: Any, **kwargs: Any) -> Any:
            return self._output(last_hidden_state=hidden.unsqueeze(0))

        replaced = ReplacedForward(self.anatomy.decoder, give)
        try:
            with gathered_for_reading([*self.anatomy.head.parameters()]):
                if of_head:
                    return cast(Tensor, self.anatomy.head(hidden))
                tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
                output: Any = self.lm(input_ids=tokens, use_cache=False)
        finally:
            replaced.remove()
        return cast(Tensor, output.logits[0])

    def fingerprint(self) -> float:
        """The sum of the absolute values of this rank's weights: another model has another."""
        return float(torch.stack([_own(p).double().abs().sum() for p in self.lm.parameters()]).sum())

    def identity(self) -> str:
        """A hash of the configuration and of all weights, whole; read it before they are sent to a device."""
        digest = hashlib.sha256(self.lm.config.to_json_string(use_diff=False).encode())
        for name, parameter in self.lm.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def learn_from(self, lm: PreTrainedModel) -> None:
        """Take the weights of the model that this is a copy of, as they are now."""
        for own, theirs in zip(self.lm.parameters(), lm.parameters(), strict=True):
            whole = gathered(theirs)
            with gathered_for_update([own]):
                own.copy_(whole)

    def state(self) -> dict[str, Tensor]:
        """The weights by name, on the CPU; partitioned ones whole. Every rank must ask."""
        return {name: gathered(p).cpu() for name, p in self.lm.named_parameters()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for name, parameter in self.lm.named_parameters():
            with gathered_for_update([parameter]):
                parameter.copy_(state[name])


def _own(parameter: nn.Parameter) -> Tensor:
    return getattr(parameter, "ds_tensor", parameter).detach()


def _copy_of(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    copied = nn.Parameter(gathered(parameter).to(kind, copy=True), requires_grad=False)
    partition_like(copied, parameter)
    return copied
