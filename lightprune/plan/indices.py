"""Reading and writing the parts of a pruning plan as JSON values, with errors that name the field."""

from lightprune.errors import ConfigError, is_whole

Indices = tuple[int, ...]


def indices(name: str, values: object) -> Indices:
    """Indices from a JSON list; `name` is the field, for the error.

    Raises:
        ConfigError: it is no list of whole numbers.
    """
    if not isinstance(values, list) or not all(map(is_whole, values)):
        raise ConfigError(f"The pruning plan's `{name}` must be a list of whole numbers; it is {shortened(values)}.")
    return tuple(values)


def indices_per_layer(name: str, values: object) -> tuple[Indices, ...] | None:
    """Indices for every layer from a JSON list of lists; None from null.

    Raises:
        ConfigError: it is neither.
    """
    if values is None:
        return None
    if not isinstance(values, list):
        raise ConfigError(f"The pruning plan's `{name}` must be null or a list of lists; it is {shortened(values)}.")
    return tuple(indices(f"{name}[{layer}]", entry) for layer, entry in enumerate(values))


def listed(kept: object) -> object:
    """Nested tuples as the lists that JSON has; anything else as it is."""
    return [listed(entry) for entry in kept] if isinstance(kept, tuple) else kept


def shortened(values: object) -> str:
    """Values as an error can show them, however many they are."""
    text = str(list(values) if isinstance(values, tuple) else values)
    return text if len(text) <= 80 else text[:60] + " ... " + text[-15:]
