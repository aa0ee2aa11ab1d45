"""The README's example runs as it stands there."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

README = Path(__file__).parent.parent / "README.md"


def test_attaching_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text()
    example = re.search(r"runs this example -->\n```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example.group(1), "README.md", "exec"), names)
    assert AutoModelForCausalLM.from_pretrained("pruned").config.num_hidden_layers == 4


def test_length() -> None:
    assert len(README.read_text().splitlines()) <= 250
