"""Where causal LMs, tokenizers and files come from: the Hub, a directory, a GGUF file, a Python package."""

import importlib.util
import re
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import huggingface_hub
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from lightprune.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

PACKAGE_SCHEME = "pkg://"

# Families with layers of two kinds, by a period that readers of GGUF files assume; and how many layers models have.
_GGUF_LAYERS = {"gemma2": (26, 42, 46), "gemma3_text": (18, 26, 34, 48, 62), "smollm3": (36,)}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_KINDS = "a Hub id, a local directory, a .gguf file, or pkg://<package>/<file>"


def resolve_uri(uri: str | Path) -> Path | str:
    """Find what a URI of the config stands for.

    Args:
        uri: a Hub id (`org/name`), a local path (`~` is expanded), or `pkg://<package>/<file inside it>`;
            the Python package is located, not imported.

    Returns:
        An existing local path, or the Hub id as a string.

    Raises:
        ConfigError: the path, the package or the file in it does not exist, or `uri` is none of the above.
    """
    text = str(uri)
    if text.startswith(PACKAGE_SCHEME):
        path = package_path(text, wanted_by=repr(text))
        if not path.exists():
            raise ConfigError(f"There is no file or directory {str(path)!r}: correct {text!r}, or name {_KINDS}.")
        return path
    path = Path(text).expanduser()
    if path.exists():
        return path
    if text.endswith(".gguf") or not _HUB_ID.fullmatch(text):
        raise ConfigError(f"There is no file or directory {text!r}: name {_KINDS}.")
    return text


def package_path(uri: str, *, wanted_by: str) -> Path:
    """What `pkg://<package>/<path inside it>` stands for; the Python package is located, not imported.

    Args:
        uri: the path inside may be a glob, and need not exist.
        wanted_by: words for the error message that name who needs it.

    Raises:
        ConfigError: `uri` is incomplete, or there is no such package.
    """
    package, _, inside = uri.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package or not inside:
        raise ConfigError(f"{uri!r} is incomplete: write pkg://<package>/<file inside it>.")
    # Not importlib.resources: it imports the package, whose own dependencies may be absent.
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{wanted_by} needs the Python package {package!r}, which is not installed here: install it.")
    paths = [Path(folder, inside) for folder in spec.submodule_search_locations]
    return next((path for path in paths if path.exists()), paths[0])


def torch_dtype(name: str) -> torch.dtype:
    """Look up a `torch.dtype` by its name in a config.

    Raises:
        ConfigError: `name` is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise ConfigError(f"The dtype {name!r} is unknown: set `dtype` to one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_causal_lm(
    uri: str | Path,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM with all of its weights.

    A model from a GGUF file is de-quantized and can be trained and saved like any other.

    Args:
        uri: see `resolve_uri`.
        dtype: dtype of the weights, a key of `DTYPES`.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None lets transformers choose.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run model code from the Hub repository.

    Raises:
        ConfigError: nothing at `uri`, not a causal LM, or weights that are missing, left over or misshapen.
    """
    arguments = _source(uri) | {
        "dtype": torch_dtype(dtype),
        "attn_implementation": attn_implementation,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        # Wrong shapes then land in the report, with everything else that does not fit.
        "ignore_mismatched_sizes": True,
    }
    if "gguf_file" in arguments:
        rank_zero_info(f"Loading {arguments['gguf_file']}: de-quantizing takes some seconds.")
    with _readable_errors(uri, "a causal LM"), _hub_for(uri), without_progress_bars():
        loaded: object = AutoModelForCausalLM.from_pretrained(**arguments)
    lm, report = cast(tuple[PreTrainedModel, dict[str, object]], loaded)
    if problems := loading_problems(report):
        raise ConfigError(
            f"The weights at {str(uri)!r} do not fit the model that their config describes: "
            f"{', '.join(problems)}; name complete weights in `model`."
        )
    if "gguf_file" in arguments:
        check_gguf_layers(uri, lm.config.get_text_config())
    _forget_gguf(lm)
    return lm


def load_tokenizer(
    uri: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies with a model.

    Raises:
        ConfigError: nothing at `uri`, or no tokenizer there.
    """
    with _readable_errors(uri, "a tokenizer"), _hub_for(uri):
        tokenizer = AutoTokenizer.from_pretrained(
            **_source(uri), revision=revision, trust_remote_code=trust_remote_code
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def loading_problems(report: dict[str, Any]) -> list[str]:
    """The weights that transformers left random or left out with only a warning; empty if every weight found its place.

    Args:
        report: what `from_pretrained(output_loading_info=True)` returns beside the model.
    """
    return [
        f"{len(keys)} {kind.replace('_', ' ')} (such as {min(map(str, keys))})" for kind, keys in report.items() if keys
    ]


def _source(uri: str | Path) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where to load from."""
    found = resolve_uri(uri)
    if isinstance(found, str) or found.is_dir():
        return {"pretrained_model_name_or_path": str(found)}
    if found.suffix != ".gguf":
        raise ConfigError(f"{str(uri)!r} is a file, but not a .gguf file: name {_KINDS}.")
    return {"pretrained_model_name_or_path": str(found.parent), "gguf_file": found.name}


def check_gguf_layers(uri: str | Path, config: PretrainedConfig) -> None:
    """Refuse a GGUF file whose layers may be of other kinds than is assumed of their family.

    Raises:
        ConfigError: the family has layers of two kinds, which the format does not tell apart, and as many layers as no
            released model has, so some were probably cut.
    """
    released = _GGUF_LAYERS.get(config.model_type)
    if released is not None and config.num_hidden_layers not in released:
        raise ConfigError(
            f"{str(uri)!r} holds {config.num_hidden_layers} layers, and released {config.model_type} models have "
            f"{' or '.join(map(str, released))}: a GGUF file does not say which layers are of which kind, so a cut "
            "model would compute something else. Name its Hugging Face directory instead."
        )


def _forget_gguf(lm: PreTrainedModel) -> None:
    """Remove the marks of GGUF quantization, for which `save_pretrained` would refuse the plain weights."""
    for owner, name in (
        (lm, "hf_quantizer"),
        (lm, "is_quantized"),
        (lm, "quantization_method"),
        (lm.config, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)


@contextmanager
def _readable_errors(uri: str | Path, wanted: str) -> Iterator[None]:
    """Turn transformers' paragraphs about a bad source into one sentence; the original stays as the cause."""
    try:
        yield
    except ConfigError:
        raise
    except (ImportError, OSError, ValueError, SafetensorError, struct.error) as error:  # the last two: cut-off files
        reason = str(error).strip().split("\n")[0].rstrip(".:").replace(". ", "; ")
        if isinstance(error, ImportError):
            advice = "install what it needs, or choose another `attn_implementation` or `model`"
        elif "attn_implementation" in reason:
            advice = "set `attn_implementation` to one of these, or to null"
        elif "couldn't connect" in reason:
            advice = "correct the name, or the connection, or name something local"
        else:
            advice = f"name {_KINDS} that holds one"
        raise ConfigError(f"Could not load {wanted} from {str(uri)!r}: {reason}; {advice}.") from error


@contextmanager
def cache_alone_if_silent() -> Iterator[bool]:
    """Asks the Hub once whether it answers, and if it does not, works as with `HF_HUB_OFFLINE=1`: from the cache alone.

    Otherwise every file is asked for six times, half a minute each, before what is cached is used or an error comes.

    Yields:
        Whether it was asked and did not answer.
    """
    if huggingface_hub.is_offline_mode() or _answers():
        yield False
        return
    # The environment is read at import only, and no function sets this later.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield True
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = False


def _answers() -> bool:
    constants = huggingface_hub.constants
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # whatever the HTTP library in use raises
        return False
    return True


def _hub_for(uri: str | Path) -> AbstractContextManager[object]:
    """What to load from `uri` in: where it is on the Hub, `cache_alone_if_silent`."""
    return cache_alone_if_silent() if isinstance(resolve_uri(uri), str) else nullcontext()


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence transformers' own per-tensor bars, which take no time; de-quantizing keeps its bar."""
    progress_bars: Any = logging
    enabled = progress_bars.is_progress_bar_enabled()
    progress_bars.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            progress_bars.enable_progress_bar()
