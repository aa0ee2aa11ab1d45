"""Runs every method on a GPU in every precision: select, transfer, cut, recover, export, reload.

    python benchmarks/gpu.py            # some minutes on one GPU; writes benchmarks/results/gpu.jsonl

The model is a random Llama of 8 layers with SmolLM2-135M's other counts. Each run checks that its loss is finite, and
`ExportHF` that the exported directory computes what the model in memory does. A line of JSON for each.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import quiet
import torch
from lightning.pytorch.callbacks import Callback
from overhead import BLOCK, VOCABULARY, Module
from torch.utils.data import DataLoader

import lightprune as lp

LAYERS, STEPS, BATCH = 8, 24, 4
RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")

METHODS: dict[str, Callable[[], list[Callback]]] = {
    "TRSP": lambda: [lp.LayerGateSelector(drop=2, stop="25%"), lp.DifferencePenalty()],
    "TRSP, annealed": lambda: [lp.LayerGateSelector(drop=2, stop="25%"), lp.GateAnnealing()],
    "ShortGPT": lambda: [lp.BlockInfluenceSelector(drop=2, stop=4)],
    "SLEB": lambda: [lp.GreedyPerplexitySelector(drop=2, stop=4)],
    "DReSS, activations": lambda: [
        lp.ActivationUnitSelector(kv_groups=2, channels=1024, hidden=384, stop=4),
        lp.GroupNormPenalty(),
    ],
    "DReSS, annealed": lambda: [lp.ActivationUnitSelector(channels=1024, hidden=384, stop=4), lp.GateAnnealing()],
    "Taylor, proximal": lambda: [lp.TaylorUnitSelector(channels=1024, stop=4), lp.ProximalGroupLasso()],
    "DRPruning's masks": lambda: [lp.HardConcreteSelector(stop="50%", layers=6, channels=1024, hidden=384)],
}


class Losses(Callback):
    """Keeps the last loss, and the seconds from the fifth step to the end."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: object, *_: object) -> None:
        if trainer.global_step == 4:
            torch.cuda.synchronize()
            self.start = time.perf_counter()
        self.last = outputs["loss"] if isinstance(outputs, dict) else outputs


def run(method: str, precision: str) -> dict[str, object]:
    """One fit, from selection to the verified export."""
    module, losses, cut = Module(LAYERS), Losses(), lp.StructuredCut(at="50%")
    before = sum(parameter.numel() for parameter in module.parameters())
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            **quiet.TRAINER | {"accelerator": "gpu"},
            precision=precision,
            max_steps=STEPS,
            default_root_dir=folder,
            callbacks=[*METHODS[method](), cut, lp.Recovery(lr=1e-4), losses, lp.ExportHF(f"{folder}/pruned")],
        )
        tokens = torch.randint(0, VOCABULARY, (STEPS * BATCH, BLOCK), generator=torch.Generator().manual_seed(0))
        trainer.fit(module, DataLoader(tokens, batch_size=BATCH))
        torch.cuda.synchronize()
        assert Path(folder, "pruned", "model.safetensors").exists()
    assert torch.isfinite(losses.last)
    return {
        "parameters": [before, sum(parameter.numel() for parameter in module.parameters())],
        "loss": round(losses.last.item(), 4),
        "seconds after step 4": round(time.perf_counter() - losses.start, 2),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main() -> None:
    """Run all, and write down each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet.be_quiet()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "python": platform.python_version(),
    }
    with arguments.output.open("w") as lines:
        for method in METHODS:
            for precision in PRECISIONS:
                try:
                    found: dict[str, object] = run(method, precision)
                except Exception as error:
                    found = {"failed": f"{type(error).__name__}: {error}"}
                line = json.dumps({"method": method, "precision": precision, **found, **machine})
                print(line, flush=True)
                lines.write(line + "\n")
                lines.flush()


if __name__ == "__main__":
    main()
