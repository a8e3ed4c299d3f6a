"""Pretrains a LLaMA on C4 in the format of GaLore's and SLTrain's papers, dense and factorized, with equal steps.

    python examples/c4.py --size 60m --data c4/en --validation c4/en/c4-validation.*.json.gz --device cuda
    python examples/c4.py --size 60m --data hub --device cuda          # streams allenai/c4 by the package datasets
    torchrun --nproc-per-node 8 examples/c4.py --size 1b --data c4/en --validation c4/en/c4-val* --device cuda

``--data`` is a local copy: .json or .json.gz files with a JSON object a line whose "text" is a document, or directories
of such. As in those papers a sequence is one document, cut or padded to 256 tokens, padding is not predicted, a step
has 512 of them, and perplexity is that of the first ten million tokens of the validation part.

Under torchrun FSDP2 shards the models, and each process reads its share of the documents of a step, so that any number
of processes trains alike. Ctrl-C and SIGTERM write a checkpoint, from which the same command goes on, on any number of
processes. At the end it prints a row for each model.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import running
import torch
import torch.distributed as dist
from flags import device, folder
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import slcompile
from slcompile.config import SUPPORTS

HUB = "hub"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""States of the whole model, whichever processes hold it; the first one has them."""
WARMUP = 0.1  # of the steps, before a cosine to a tenth


@dataclass(frozen=True)
class Size:
    """A LLaMA of the papers, and how they train it; ``lr`` is the usual one of full rank."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    rank: int
    paper_alpha: float
    steps: int
    lr: float


SIZES = {
    "tiny": Size(64, 172, 1, 2, 16, 16.0, 100, 1e-3),  # to try a machine and a copy of the data
    "60m": Size(512, 1376, 8, 8, 128, 32.0, 10_000, 1e-3),
    "130m": Size(768, 2048, 12, 12, 256, 16.0, 20_000, 1e-3),
    "350m": Size(1024, 2736, 24, 16, 256, 16.0, 60_000, 1e-3),
    "1b": Size(2048, 5461, 24, 32, 512, 8.0, 100_000, 5e-4),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags, and refuses bad ones before any work is done."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), required=True, help="of the model")
    parser.add_argument("--only", choices=["dense", "sltrain", "both"], default="both", help="which to train")
    parser.add_argument("--data", nargs="+", required=True, help="files or directories, or 'hub'")
    parser.add_argument("--validation", nargs="+", help="files or directories; not needed with --data hub")
    parser.add_argument("--tokenizer", default="t5-base", help="a path, or a name on the hub")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, help="of both models; the size decides by default")
    training.add_argument("--stop-at", type=int, help="end there, as Ctrl-C would; the schedule stays that of --steps")
    training.add_argument("--lr", type=float, help="peak learning rate of both models; the size decides by default")
    training.add_argument("--embed-lr", type=float, help="of embeddings, head and norms; that of --lr by default")
    training.add_argument("--total-batch", type=int, default=512, help="sequences a step")
    training.add_argument("--batch", type=int, default=64, help="sequences at a time, in each process")
    training.add_argument("--seq-len", type=int, default=256, help="tokens a sequence")
    training.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
    training.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    training.add_argument("--seed", type=int, default=0, help="of weights and supports")
    training.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of weights and optimizer"
    )
    factors = parser.add_argument_group("sparse plus low rank")
    factors.add_argument("--rank", type=int, help="the size decides by default, as in the paper")
    factors.add_argument("--density", type=float, default=0.03, help="share of non-zeros in the sparse part")
    factors.add_argument("--alpha", type=alpha, default="auto", help="'auto', 'paper' for the paper's, or a number")
    factors.add_argument("--support", choices=SUPPORTS, default=SUPPORTS[0], help="of the sparse part")
    factors.add_argument("--values-rate", type=float, default=1.0, help="learning rate of the values, relative to --lr")
    run = parser.add_argument_group("running")
    run.add_argument("--out", type=folder, default="c4-run", help="directory of checkpoints and logs")
    run.add_argument("--eval-every", type=int, default=1000, help="steps between evaluations and checkpoints")
    run.add_argument("--eval-tokens", type=int, default=10_000_000, help="of the validation part")
    run.add_argument("--device", type=device, default="cpu", help="cpu, cuda, ...")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    for name in ("steps", "lr", "rank"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(size, name))
    if args.alpha == "paper":
        args.alpha = size.paper_alpha
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def alpha(text: str) -> float | str:
    """A number where it reads as one."""
    return text if text in ("auto", "paper") else float(text)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not fit together."""
    for name in ("steps", "total_batch", "batch", "eval_every", "eval_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("lr", "embed_lr", "clip", "values_rate"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number above 0, got {value}")
    if not 0 <= args.weight_decay < math.inf:
        raise ValueError(f"--weight-decay must be a finite number of at least 0, got {args.weight_decay}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.total_batch % (world * args.batch):
        of_each = f"--batch {args.batch}" + (f" times the {world} processes" if world > 1 else "")
        raise ValueError(f"--total-batch must be a multiple of {of_each}, got {args.total_batch}")
    if args.seq_len < 2:
        raise ValueError(f"--seq-len must be at least 2, got {args.seq_len}")
    if args.stop_at is not None and not 0 < args.stop_at <= args.steps:
        raise ValueError(f"--stop-at must be in [1, {args.steps}], the steps, got {args.stop_at}")
    if args.data != [HUB]:
        args.data = find_files("--data", args.data)
        if not args.validation:
            raise ValueError("--validation must name files where --data does")
    if args.validation:
        args.validation = find_files("--validation", args.validation)
    sl_config(args)
    if args.only != "dense":
        rehearse(args)


def rehearse(args: argparse.Namespace) -> None:
    """Raises ValueError for factors that are impossible for this size; makes them on the meta device, quietly."""
    log = logging.getLogger("slcompile")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            make_model("sltrain", argparse.Namespace(**{**vars(args), "device": "meta"}), vocabulary=1)
    finally:
        log.setLevel(level)


def find_files(flag: str, places: list[str]) -> list[str]:
    """The JSON-lines files at these places, in order.

    Raises:
        ValueError: One of the places has none.
    """
    found: list[str] = []
    for place in places:
        inside = [os.path.join(place, pattern) for pattern in ("*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz")]
        files = sorted(file for pattern in inside for file in glob.glob(pattern)) if Path(place).is_dir() else [place]
        if not files or not all(Path(file).is_file() for file in files):
            raise ValueError(
                f"{flag} must be .json(.gz) files or directories of such, or 'hub' for --data, got {place!r}"
            )
        found += files
    return found


def documents(files: list[str], split: str) -> Iterator[str]:
    """The texts, one after another: of local files, or of allenai/c4 as the package datasets streams it.

    Raises:
        ValueError: A line is no JSON object with a "text".
    """
    if files == [HUB]:
        try:
            import datasets
        except ImportError as error:
            raise ValueError("--data hub needs the package datasets: pip install datasets") from error
        for row in datasets.load_dataset("allenai/c4", "en", split=split, streaming=True):
            yield row["text"]
        return
    for file in files:
        open_text = gzip.open if file.endswith(".gz") else open
        with open_text(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield document(line, file, number)


def document(line: str, file: str, number: int) -> str:
    """The text of a line. Raises ValueError where it has none."""
    try:
        text = json.loads(line)["text"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"line {number} of {file} is no JSON object with a text: {error!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"line {number} of {file} has a text that is no string: {text!r}")
    return text


def processes() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_all(values: list[float], device: str, operation: Any = dist.ReduceOp.SUM) -> list[float]:
    """The sums of these values of all processes, or their largest ones."""
    if dist.is_initialized():
        together = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(together, operation)
        values = together.tolist()
    return values


class Sequences:
    """Batches of sequences, a document each, of which every process has its share.

    Where it is in the stream is ``read``, the number of documents that all processes have read.
    """

    def __init__(self, texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, skip: int = 0) -> None:
        self.texts, self.tokenizer, self.seq_len, self.read = texts, tokenizer, seq_len, skip
        skipped = sum(1 for _ in itertools.islice(texts, skip))
        if skipped < skip:
            raise ValueError(f"the data has {skipped:,} documents, and the checkpoint has read {skip:,}: give the same")

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """The next ``count`` sequences and which of their tokens are no padding; both [at most count, seq_len]."""
        rank, world = processes()
        texts = list(itertools.islice(self.texts, count * world))
        self.read += len(texts)
        texts = texts[rank * count : (rank + 1) * count]
        if not texts:
            empty = torch.zeros(0, self.seq_len, dtype=torch.long)
            return empty, empty
        found = self.tokenizer(
            texts, max_length=self.seq_len, truncation=True, padding="max_length", return_tensors="pt"
        )
        return found["input_ids"], found["attention_mask"]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a path or a name; it must have a padding token.

    Raises:
        ValueError: It cannot be loaded, or has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {name!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"--tokenizer {name!r} has no padding token")
    return tokenizer


def sl_config(args: argparse.Namespace) -> slcompile.SLConfig:
    """The options of the conversion."""
    names = ("rank", "density", "alpha", "support", "seed")
    return slcompile.SLConfig(init="kaiming", **{name: getattr(args, name) for name in names})


def make_model(kind: str, args: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    """A model at its start."""
    size = SIZES[args.size]
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=max(1024, args.seq_len),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    if kind == "sltrain":
        slcompile.factorize_(model, sl_config(args))
    return model.to(args.device)


def loss_sum(model: Any, ids: Tensor, mask: Tensor, device: str) -> Tensor:
    """The summed loss in nats over all predicted tokens, which are all but the first and padding."""
    ids, mask = ids.to(device), mask.to(device)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean loss in nats a token over the first ``--eval-tokens`` of the validation part."""
    model.eval()
    sequences = Sequences(documents(args.validation or args.data, "validation"), tokenizer, args.seq_len)
    total = tokens = 0.0
    while tokens < args.eval_tokens:
        before = sequences.read
        ids, mask = sequences.take(args.batch)
        if sequences.read == before:
            break
        if not len(ids):  # others have some, and no layer runs without all processes: one token predicts nothing
            ids, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)
        loss = loss_sum(model, ids, mask, args.device).item()
        loss, predicted = of_all([loss, int(mask[:, 1:].sum())], args.device)
        total, tokens = total + loss, tokens + predicted
    model.train()
    if not tokens:
        raise ValueError("--validation has no document of two tokens")
    return total / tokens


def train(kind: str, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], int]:
    """Trains one model, from its checkpoint where there is one.

    Returns:
        What is known of the run, and the signal that stopped it; 0: it came to its last step.

    Raises:
        ValueError: The data ends before the steps do, the checkpoint is of other flags, or the loss is not finite.
    """
    model = make_model(kind, args, len(tokenizer))
    compiled = compiled_and_sharded(model, "sltrain" if kind == "sltrain" else "inductor")
    groups = running.parameter_groups(model, args.lr, args.embed_lr or args.lr)
    if kind == "sltrain":
        rates = {"lr": args.lr, "weight_decay": args.weight_decay, "values_rate": args.values_rate}
        groups = slcompile.optim.parameter_groups(groups, **rates)
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: running.relative_lr(step, args.steps, round(WARMUP * args.steps))
    )
    path = args.out / f"{args.size}-{kind}.pt"
    run: dict[str, Any] = {"flags": flags(kind, args), "step": 0, "read": 0, "tokens": 0, "seconds": 0.0, "curve": []}
    if path.exists():
        saved = running.load(path, ("run", "schedule", "model", "optimizer"))
        require_same(path, saved["run"]["flags"], run["flags"])
        schedule.load_state_dict(saved["schedule"])
        states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
        set_state_dict(model, optimizer, **states, options=WHOLE)
        run = saved["run"]
        say(f"{kind}: goes on at step {run['step']} of {args.steps} from {path}")
    run["sizes"] = sizes(model, optimizer)
    last = args.stop_at or args.steps
    if run["step"] >= last:
        return run, 0
    sequences = Sequences(documents(args.data, "train"), tokenizer, args.seq_len, skip=run["read"])
    _, world = processes()
    asked = 0
    with running.Stop() as stop:
        while run["step"] < last and not asked:
            begin, before = time.perf_counter(), sequences.read
            batches = [sequences.take(args.batch) for _ in range(args.total_batch // (args.batch * world))]
            if sequences.read < before + args.total_batch:
                raise ValueError(
                    f"the data ends after {sequences.read:,} documents, in step {run['step'] + 1}: {args.steps} steps "
                    f"of {args.total_batch} need {args.steps * args.total_batch:,}"
                )
            (predicted,) = of_all([sum(int(mask[:, 1:].sum()) for _, mask in batches)], args.device)
            optimizer.zero_grad()
            total = 0.0
            for ids, mask in batches:
                loss = loss_sum(compiled, ids, mask, args.device) / predicted
                (loss * world).backward()  # gradients are averaged over processes
                total += loss.item()
            (total,) = of_all([total], args.device)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            schedule.step()
            run |= {"step": run["step"] + 1, "read": sequences.read, "tokens": run["tokens"] + int(predicted)}
            run["seconds"] += time.perf_counter() - begin
            if not math.isfinite(total):
                raise ValueError(f"{kind}: the loss is {total} at step {run['step']}: --lr {args.lr} is too high")
            log(args, kind, {"step": run["step"], "tokens": run["tokens"], "loss": total})
            (asked,) = map(int, of_all([stop.asked], args.device, dist.ReduceOp.MAX))
            ended = run["step"] == last or asked
            if run["step"] % args.eval_every == 0 or run["step"] == last:
                run["validation"] = evaluate(model, args, tokenizer)
                run["curve"].append([run["step"], run["tokens"], run["validation"]])
                log(args, kind, {"step": run["step"], "validation": run["validation"]})
                say(f"{kind}: step {run['step']}, validation perplexity {math.exp(run['validation']):.2f}")
                ended = True
            if ended:
                run["sizes"] = sizes(model, optimizer)
                weights, states = get_state_dict(model, optimizer, options=WHOLE)
                save(path, {"run": run, "model": weights, "optimizer": states, "schedule": schedule.state_dict()})
    return run, asked


def compiled_and_sharded(model: LlamaForCausalLM, backend: str) -> Any:
    """What computes the model's forward: the compiled model; of several processes, its layers compiled and sharded."""
    if not dist.is_initialized():
        return torch.compile(model, backend=backend)
    for layer in model.model.layers:
        layer.compile(backend=backend)
        fully_shard(layer)
    return fully_shard(model)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line, of several processes by the first."""
    if processes()[0] == 0:
        print(text, file=file, flush=True)


def flags(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide a run's numbers."""
    without_effect = {"only", "out", "stop_at", "batch", "eval_every", "device"}
    of_factors = {"rank", "density", "alpha", "support", "values_rate"} if kind == "dense" else set()
    return {name: value for name, value in vars(args).items() if name not in without_effect | of_factors}


def require_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint was made with other flags."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{path} was made with {flag} {before.get(name)}, now {now.get(name)}: give another --out")


def sizes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Parameters, and the bytes of weights, buffers and optimizer states, which the papers' memory is of."""
    states = [each for values in optimizer.state.values() for each in values.values() if isinstance(each, Tensor)]
    parameters = list(model.parameters())
    return {
        "parameters": sum(each.numel() for each in parameters),
        "bytes": sum(each.nbytes for each in [*parameters, *model.buffers(), *states]),
    }


def log(args: argparse.Namespace, kind: str, values: dict[str, Any]) -> None:
    """Appends a line to the log of a run, of several processes by the first."""
    if processes()[0]:
        return
    with (args.out / f"{args.size}-{kind}.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint, of several processes by the first."""
    if processes()[0] == 0:
        running.save(path, state)
    if dist.is_initialized():
        dist.barrier()


def show(size: str, runs: dict[str, dict[str, Any]]) -> None:
    """Prints a row for each model."""
    say("\n| | steps | tokens (M) | validation perplexity | parameters (M) | weights + Adam (GB) | tokens/s |")
    say("|---|---|---|---|---|---|---|")
    for kind, run in runs.items():
        perplexity = f"{math.exp(run['validation']):.2f}" if "validation" in run else "-"
        rate = f"{run['tokens'] / run['seconds']:,.0f}" if run["seconds"] else "-"
        millions, gigabytes = run["sizes"]["parameters"] / 1e6, run["sizes"]["bytes"] / 1e9
        row = (f"{size} {kind}", run["step"], f"{run['tokens'] / 1e6:.1f}", perplexity)
        say(f"| {' | '.join(map(str, (*row, f'{millions:.1f}', f'{gigabytes:.3f}', rate)))} |")


def main(argv: list[str] | None = None) -> int:
    """Trains what is asked for, and prints the rows; returns the exit status."""
    args = parse_args(argv)
    if "WORLD_SIZE" in os.environ:  # torchrun's
        if args.device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    try:
        return train_all(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train_all(args: argparse.Namespace) -> int:
    """Trains one model after the other; returns the exit status."""
    tokenizer = load_tokenizer(args.tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    for kind in ["dense", "sltrain"] if args.only == "both" else [args.only]:
        runs[kind], stopped = train(kind, args, tokenizer)
        if stopped:
            say(f"Stopped at step {runs[kind]['step']}: the same command goes on.", file=sys.stderr)
            return 128 + stopped
    show(args.size, runs)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
