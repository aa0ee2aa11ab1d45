"""The weights of a module that stand still for a while."""

from torch import nn


class HeldWeights:
    """The weights of a module that stand still at present.

    Args:
        module: the user's, with all that it trains.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._held: list[nn.Parameter] = []

    @property
    def held(self) -> bool:
        """Whether any are."""
        return bool(self._held)

    def hold(self) -> None:
        """Let no weight of the module move, or cost a gradient, until `release`."""
        moving = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        self._held += moving  # several parts may hold them
        for parameter in moving:
            parameter.requires_grad_(False)

    def release(self) -> None:
        """Let the weights that `hold` stopped move again."""
        for parameter in self._held:
            parameter.requires_grad_(True)
        self._held = []
