"""What `Distillation` refuses."""

from lightprune.errors import ConfigError


def check_cache(cache: bool, *, top_k: int | None, hidden: float, snapshot: int) -> None:
    """Refuse to keep what cannot be kept.

    Raises:
        ConfigError: the cache does not go with another setting.
    """
    if not isinstance(cache, bool):
        raise ConfigError(f"Distillation.cache is {cache!r}: it must be true or false.")
    if cache and top_k is None:
        raise ConfigError(
            "Distillation.cache is true, and `top_k` is null: a cache keeps what the teacher says of its likeliest "
            "tokens, so set `top_k`, say to 64."
        )
    if cache and (hidden or snapshot):
        name, value = ("hidden", hidden) if hidden else ("snapshot", snapshot)
        why = "hidden states are not kept" if hidden else "the teacher is another one in every run"
        raise ConfigError(
            f"Distillation.cache is true, and `{name}` is {value}: {why}, so set one of them to its default."
        )


def check_same(ours: float, of_checkpoint: float) -> None:
    """Refuse a teacher that is not the one of the run that is resumed.

    Raises:
        ConfigError: the sums over their weights differ by more than rounding.
    """
    if abs(ours - of_checkpoint) > 1e-3 * abs(of_checkpoint):
        raise ConfigError(
            "Distillation's teacher has other weights than that of the checkpoint: build the module with the weights "
            "that the run began with, or name the same model in Distillation.teacher."
        )
