"""What others do, on the same tokens: the cuts of two packages, and ReplaceMe's map.

    python benchmarks/rivals.py --own own.jsonl    # needs: pip install optipfair==0.4.2 torch-pruning==1.6.1

writes each package's choice as a plan, so that a run of `recovery.py` cuts what the package would have cut: both take
units out without changing what stays. They look at the 8 batches that our own selectors look at: optipfair's cosine
importance of layers and its hybrid importance of channels, torch-pruning's Taylor importance of channels.
"""

import argparse
import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from quality import MODEL, RESULTS
from torch import Tensor, nn

from lightprune.anatomy import anatomy_of
from lightprune.compensation.callback import upcoming
from lightprune.data import Source, TextDataModule
from lightprune.hub import load_causal_lm
from lightprune.pipeline import PruningCallback, Stage
from lightprune.plan import PruningPlan

PLANS = RESULTS / "plans" / "recovery"
KEPT, DROP, BATCHES = 1024, 8, 8


class ReplaceMe(PruningCallback):
    """ReplaceMe (arXiv 2505.02819, section 3): one map T instead of a run of layers, folded into the MLP in front.

    With M the output of that MLP and Y = the residual stream minus M, both of the dense model, and L the stream behind
    the run, T = argmin ||M T + Y - L||^2, in closed form, without a penalty: T = (M^T M)^-1 M^T (L - Y). Then
    W_down <- T^T W_down.

    Args:
        batches: training batches to read; they are not consumed.
    """

    stage = Stage.COMPENSATE

    def __init__(self, batches: int) -> None:
        self.batches = batches

    @torch.no_grad()
    def before_cut(self, plan: PruningPlan) -> None:
        """Fold the map of each run of removed layers into the layer in front of it."""
        anatomy, trainer = self.pipeline.anatomy, self.pipeline.trainer
        batches: list[Any] = list(islice(upcoming(trainer), self.batches))
        for first, last in runs(plan.dropped_layers):
            layer = anatomy.layers[first - 1]
            width = anatomy.shape.hidden
            gram, cross = torch.zeros(2, width, width, dtype=torch.float64, device=self.pipeline.lm.device)
            for batch in batches:
                seen: dict[str, Tensor] = {}

                def note(name: str, seen: dict[str, Tensor] = seen) -> Any:
                    return lambda module, args, output: seen.update(
                        {name: (output if isinstance(output, Tensor) else output[0]).flatten(0, -2).double()}
                    )

                handles = [
                    layer.mlp.register_forward_hook(note("mlp")),
                    layer.register_forward_hook(note("before")),
                    anatomy.layers[last].register_forward_hook(note("behind")),
                ]
                anatomy.decoder(batch["input_ids"].to(self.pipeline.lm.device), use_cache=False)
                for handle in handles:
                    handle.remove()
                wanted = seen["behind"] - (seen["before"] - seen["mlp"])
                gram += seen["mlp"].T @ seen["mlp"]
                cross += seen["mlp"].T @ wanted
            weight = layer.mlp.down_proj.weight
            weight.copy_((torch.linalg.lstsq(gram, cross).solution.T @ weight.double()).to(weight.dtype))


def runs(layers: Any) -> Iterator[tuple[int, int]]:
    """The first and the last of each run of indices in a row."""
    ordered = sorted(layers)
    starts = [index for index in ordered if index - 1 not in ordered]
    ends = [index for index in ordered if index + 1 not in ordered]
    yield from zip(starts, ends, strict=True)


def optipfair_depth(lm: Any, batches: list[Tensor]) -> dict[str, Any]:
    """The layers that stay by optipfair's cosine importance."""
    from optipfair.pruning.depth import analyze_layer_importance

    scores = analyze_layer_importance(lm, [{"input_ids": ids} for ids in batches], show_progress=False)
    dropped = sorted(scores, key=lambda index: scores[index])[:DROP]
    return {"layers": sorted(set(scores) - set(dropped))}


def optipfair_mlp(lm: Any, batches: list[Tensor]) -> dict[str, Any]:
    """The channels that stay by optipfair's hybrid importance."""
    from optipfair import prune_model

    before = [layer.mlp.gate_proj.weight.detach().clone() for layer in lm.model.layers]
    batches = [{"input_ids": ids} for ids in batches]  # type: ignore[misc]
    ratio = 100 * (1 - KEPT / before[0].shape[0])
    lm = prune_model(lm, pruning_percentage=ratio, dataloader=batches, show_progress=False)
    return {"channels": [same_rows(*pair) for pair in zip(before, gates(lm), strict=True)]}


def torch_pruning_mlp(lm: Any, batches: list[Tensor]) -> dict[str, Any]:
    """The channels that stay by torch-pruning's Taylor importance."""
    import torch_pruning as tp

    lm.config.use_cache = False
    before = [weight.detach().clone() for weight in gates(lm)]
    for ids in batches:
        lm(ids, labels=ids).loss.backward()
    inner = {layer.mlp.gate_proj: 1 - KEPT / len(before[0]) for layer in lm.model.layers}
    others = [m for m in lm.modules() if isinstance(m, nn.Linear) and m not in inner]
    tp.pruner.BasePruner(
        lm,
        example_inputs=torch.arange(8).unsqueeze(0),
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=inner,
        ignored_layers=[m for m in others if m.out_features == lm.config.hidden_size or m is lm.lm_head],
        output_transform=lambda out: out.logits.sum(),
    ).step()
    return {"channels": [same_rows(*pair) for pair in zip(before, gates(lm), strict=True)]}


def gates(lm: Any) -> list[Tensor]:
    """Every layer's gate projection [channels, hidden]."""
    return [layer.mlp.gate_proj.weight for layer in lm.model.layers]


def same_rows(before: Tensor, after: Tensor) -> list[int]:
    """Which rows of `before` are those of `after`."""
    apart = torch.cdist(after.detach().double(), before.double())
    kept: list[int] = apart.argmin(-1).tolist()
    assert float(apart.min(-1).values.max()) < 1e-6
    assert len(set(kept)) == len(after)
    return sorted(kept)


def main() -> None:
    """Write the plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--own", type=Path, required=True)
    arguments = parser.parse_args()
    sources = {"own": Source(files=str(arguments.own))}
    data = TextDataModule(sources, tokenizer=MODEL, block_size=256, batch_size=4, validation=48, num_workers=0)
    data.setup("fit")
    batches = [batch["input_ids"] for batch in islice(data.train_dataloader(), BATCHES)]
    PLANS.mkdir(parents=True, exist_ok=True)
    for name, cut, choose in (
        ("optipfair", "depth", optipfair_depth),
        ("optipfair", "mlp", optipfair_mlp),
        ("torch-pruning", "mlp", torch_pruning_mlp),
    ):
        lm = load_causal_lm(MODEL, dtype="float32")
        whole = copy.deepcopy(lm)
        plan = PruningPlan.of(anatomy_of(whole), **choose(lm, batches), made_by=name)
        plan.save(PLANS / f"{name}-{cut}.json")
        print(name, cut, plan.dropped_layers or "")


if __name__ == "__main__":
    main()
