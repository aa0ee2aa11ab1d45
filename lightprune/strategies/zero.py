"""What ZeRO keeps of each parameter on this rank, and how it is carried from one engine to the next.

Under all stages a rank holds flat tensors, one for each group of parameters (or part of a group, under stage 3): the
weights in full precision, and the optimizer's state of the same length. Of a parameter it holds a fragment of these.
The names that begin with an underscore are deepspeed's own, which is why its version is checked.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightprune.integrations.zero_params import whole_shape
from lightprune.surgery import Rows, sliced

# The weights in full precision, beside the names of the optimizer's state.
MASTER = "master"


@dataclass(frozen=True)
class Place:
    """Where this rank's fragment of a parameter lies.

    Attributes:
        flat: the flat weights that it is in.
        offset: where it begins there.
        start: where it begins in the flattened parameter.
        numel: its length without padding; 0 where this rank has nothing of the parameter.
    """

    flat: Tensor
    offset: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment of a tensor that is as long as the flat weights: a view [numel]."""
        return tensor.narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Fragments:
    """This rank's fragments of a parameter, and what is kept for all of its group.

    Attributes:
        shape: of the whole parameter.
        start: where the fragments begin in the flattened parameter.
        tensors: by name, `MASTER` and those of the optimizer's state: [n] each, the same names on every rank.
        others: the optimizer's state that is not one number for each weight, such as the count of steps.
    """

    shape: torch.Size
    start: int
    tensors: Mapping[str, Tensor]
    others: Mapping[str, object]

    def whole(self, name: str, device: torch.device) -> Tensor:
        """The whole of one tensor, from all ranks, on the device that they talk through; every rank must ask."""
        fragment = self.tensors[name]
        flat = torch.zeros(self.shape.numel(), dtype=fragment.dtype, device=device)
        flat[self.start : self.start + fragment.numel()] = fragment
        torch.distributed.all_reduce(flat)
        return flat.view(self.shape)


def groups_of(zero: Any) -> list[list[nn.Parameter]]:
    """The parameters that train, of each group of the optimizer that ZeRO wraps."""
    if not is_stage_3(zero):
        return [list(group) for group in zero.bit16_groups]
    groups: list[list[nn.Parameter]] = [[] for _ in zero.optimizer.param_groups]
    for index, parameters in enumerate(zero.fp16_groups):
        groups[zero.sub_group_to_group_id[index]] += parameters
    return groups


def places_of(zero: Any) -> dict[nn.Parameter, Place]:
    """Where this rank's fragments of all parameters that train lie."""
    return dict(_places_of_stage_3(zero) if is_stage_3(zero) else _places_of_stages_1_and_2(zero))


def is_stage_3(zero: object) -> bool:
    """Whether the parameters themselves are partitioned."""
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _places_of_stages_1_and_2(zero: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    for flats, parameters in zip(zero.optimizer.param_groups, zero.bit16_groups, strict=True):
        (flat,) = flats["params"]
        for parameter in parameters:
            mapping = parameter._hp_mapping  # deepspeed 0.19.8: `_hp_mapping` says where fragments lie
            if mapping is None:
                yield parameter, Place(flat, 0, 0, 0)
            else:
                within, address = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield parameter, Place(flat, within.start, address.start, address.numel)


def _places_of_stage_3(zero: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        offset = 0
        for parameter in parameters:
            length = parameter.partition_numel()
            # deepspeed 0.19.8: `_get_param_partition_rank`. Without it a rank would take another's rows.
            start = length * zero._get_param_partition_rank(parameter)
            numel = max(min(length, parameter.ds_numel - start), 0)
            yield parameter, Place(flat, offset, min(start, parameter.ds_numel), numel)
            offset += length


def forget_gradients(zero: Any) -> None:
    """Clear the gradients of parameters that get none in the next step.

    Stage 3 would step, and clip, with those of the step before: each is overwritten by the next, where there is one.
    """
    zero.grad_partitions_flat_buffer.zero_()
    for flat in zero.fp32_partitioned_groups_flat:
        if flat.grad is not None:  # offloaded
            flat.grad.zero_()
    getattr(zero, "norm_for_param_grads", {}).clear()


def take(
    places: Mapping[nn.Parameter, Place], optimizer: Optimizer, kept: Iterable[nn.Parameter]
) -> dict[nn.Parameter, Fragments]:
    """Copy out the fragments of the parameters that are `kept`, and forget the flat tensors that they were in.

    Each flat tensor is let go before the next is copied from, so that never more than one of them is held twice.
    """
    wanted = set(kept)
    found: dict[nn.Parameter, dict[str, Tensor]] = {parameter: {} for parameter in places if parameter in wanted}
    others: dict[Tensor, dict[str, object]] = {}
    for flat in dict.fromkeys(place.flat for place in places.values()):
        state = optimizer.state.pop(flat, {})
        long = {name: value for name, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape}
        others[flat] = {name: value for name, value in state.items() if name not in long}
        long[MASTER] = flat.detach()
        del state
        for name in list(long):
            tensor = long.pop(name)
            for parameter, tensors in found.items():
                if places[parameter].flat is flat:
                    tensors[name] = places[parameter].of(tensor).clone()
    return {
        parameter: Fragments(whole_shape(parameter), places[parameter].start, tensors, others[places[parameter].flat])
        for parameter, tensors in found.items()
    }


def give(
    zero: Any,
    fragments: dict[nn.Parameter, Fragments],
    replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Rows]],
    device: torch.device,
) -> None:
    """Write fragments into the flat tensors of another engine, and forget them one by one.

    Args:
        zero: the engine's optimizer, which has not stepped yet.
        fragments: by the parameter that they were of.
        replaced: for each parameter that is new, the one in whose place it is and the rows that it has of that.
        device: that the ranks talk through.
    """
    for parameter, place in places_of(zero).items():
        old, rows = replaced.get(parameter, (parameter, None))
        source = fragments.pop(old, None)
        if source is None:  # nothing was known of it
            continue
        state = zero.optimizer.state[place.flat]
        for name, value in source.others.items():
            state.setdefault(name, value.clone() if torch.is_tensor(value) else value)
        for name in source.tensors:
            if name != MASTER and name not in state:
                state[name] = torch.zeros_like(place.flat, requires_grad=False)
            target = place.of(place.flat.detach() if name == MASTER else state[name])
            if rows is None and is_stage_3(zero):  # its partition has not changed
                target.copy_(source.tensors[name])
            else:
                tensor = sliced(source.whole(name, device), rows or ())
                target.copy_(tensor.flatten()[place.start : place.start + place.numel])
