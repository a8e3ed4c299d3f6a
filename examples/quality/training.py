"""One run: trains a model of the ladder, resumably, and returns what is recorded of it."""

from __future__ import annotations

import functools
import math
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slcompile
from examples import running
from examples.quality import recipes
from examples.quality.corpora import Corpus
from examples.quality.settings import BATCH, BETAS, BITS, CLIP, RUNGS, SEQ_LEN, VOCAB, WARMUP, Settings

CURVE_POINTS = 20
EVAL_BATCHES = 64
CHECKPOINT_SECONDS = 120.0


class Stopped(Exception):
    """A signal asked for the end of a run; its checkpoint is written."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


def make_model(settings: Settings, device: str = "cpu") -> LlamaForCausalLM:
    """The model at its start, a function of the settings alone; factorized unless the run is dense."""
    torch.manual_seed(settings.seed)
    rung = RUNGS[settings.width]
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=settings.width,
        intermediate_size=rung.intermediate,
        num_hidden_layers=rung.layers,
        num_attention_heads=rung.heads,
        initializer_range=settings.init_std,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if not settings.has_dense_weights:
        slcompile.factorize_(model, settings.sl_config())
        with torch.no_grad():
            for factors in slcompile.factors(model).values():
                factors.values.mul_(0 if settings.kind == "low rank" else settings.values_start)
        if settings.kind == "low rank":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.endswith("_sl.values"))
    return model.to(device)


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The parameters by learning rate, decay and, of GaLore, the rank of its projections, None for none."""
    relative = {"B": settings.b_rate, "A": settings.a_rate, "values": settings.values_rate}
    rank = settings.square_rank if settings.kind == "galore" else None
    groups: dict[tuple[float, float, int | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part, is_projection = name.rpartition("_sl.")[2], "_proj." in name
            rate = settings.lr * relative.get(part, 1.0) if is_projection else settings.embed_lr
            decays = is_projection and (part != "A" or settings.decay == "factors")
            decay = settings.weight_decay * settings.lr / rate if decays else 0.0  # AdamW's goes with the rate
            groups.setdefault((rate, decay, rank if is_projection else None), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "rank": rank}
        for (rate, decay, rank), parameters in groups.items()
    ]


def sizes(model: nn.Module) -> dict[str, int]:
    """How many parameters learn, and those of them that are of projections: factors, or weights that stayed dense."""
    learning = {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}
    projections = sum(size for name, size in learning.items() if "_proj." in name)
    return {"parameters": sum(learning.values()), "projections": projections}


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; with fewer than 32 bits a state, torchao's; GaLore's with its authors' scale and period."""
    groups = parameter_groups(model, settings)
    if settings.kind == "galore":
        return slcompile.optim.GaLoreAdamW(groups, betas=BETAS)
    if settings.bits == BITS[0]:
        return torch.optim.AdamW(groups, betas=BETAS, fused=True)
    try:
        from torchao import optim
    except ImportError as error:
        raise ValueError(f"bits={settings.bits} needs torchao: pip install torchao") from error
    return {8: optim.AdamW8bit, 4: optim.AdamW4bit}[settings.bits](groups, betas=BETAS)


def windows(ids: Tensor, starts: Tensor, device: str) -> Tensor:
    """The sequences that begin at ``starts``, [len(starts), SEQ_LEN]."""
    return ids[starts[:, None] + torch.arange(SEQ_LEN)].long().to(device)


def make_batch(ids: Tensor, settings: Settings, step: int, device: str) -> Tensor:
    """The sequences of a step: a function of seed and step alone, so that resuming is exact and rows see the same."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    return windows(ids, torch.randint(len(ids) - SEQ_LEN + 1, (BATCH,), generator=generator), device)


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, device: str) -> float:
    """Mean loss in nats a token, on sequences evenly spaced over a held-out part."""
    model.eval()
    starts = torch.linspace(0, len(ids) - SEQ_LEN, EVAL_BATCHES * BATCH).long()
    batches = [windows(ids, some, device) for some in starts.split(BATCH)]
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in batches]
    model.train()
    return statistics.fmean(losses)


def train(settings: Settings, corpus: Corpus, checkpoint: Path, device: str = "cpu") -> dict[str, Any]:
    """Trains one model, from ``checkpoint`` where that exists; returns the run's record.

    A loss or a gradient that is not finite, or a loss above that of guessing after the warm-up, ends the run:
    ``diverged`` then holds the step, and there are no losses.

    Raises:
        ValueError: The text is too short for the tokens, or the checkpoint is none or of a run with other settings.
        Stopped: SIGTERM or SIGINT came; the checkpoint holds the last complete step.
    """
    corpus.require(settings.tokens)
    model = make_model(settings, device)
    optimizer = make_optimizer(model, settings)
    warmup = round(WARMUP * settings.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: running.relative_lr(step, settings.steps, warmup)
    )
    state: dict[str, Any] = {"step": 0, "curve": [], "recent": [], "seconds": 0.0}
    identity = {**settings.deciding(), "text": corpus.digest}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        saved = running.load(checkpoint, ("identity", "state", *parts), device)
        require_same(checkpoint, saved["identity"], identity)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        state = saved["state"]

    def save() -> None:
        states = {name: part.state_dict() for name, part in parts.items()}
        running.save(checkpoint, {"identity": identity, "state": state, **states})

    diverged = None
    every = max(1, settings.steps // CURVE_POINTS)
    with running.Stop() as stop:
        saved_at = time.monotonic()
        while state["step"] < settings.steps:
            begin = time.process_time()
            step = state["step"] + 1
            batch = make_batch(corpus.training, settings, step, device)
            optimizer.zero_grad()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            value, norm = loss.item(), float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
            if not math.isfinite(value + norm) or (step > warmup and value > math.log(VOCAB) + 1):
                diverged = step  # before what finds singular vectors, of finite numbers only
                break
            if settings.precondition:
                recipes.precondition(model, settings.precondition)
            optimizer.step()
            schedule.step()
            if settings.restart and step % settings.restart == 0:
                recipes.restart(model, optimizer)
            state["step"] = step
            state["recent"].append(value)
            if step % every == 0:
                state["curve"].append([step, round(statistics.fmean(state["recent"]), 4)])
                state["recent"] = []
            state["seconds"] += time.process_time() - begin
            if stop.asked or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                save()
                saved_at = time.monotonic()
            if stop.asked:
                raise Stopped(stop.asked)
        record = {
            **settings.deciding(),
            "text": corpus.digest,
            "tokens": settings.tokens,
            **sizes(model),
            "diverged": diverged,
            "curve": state["curve"],
            "cpu_seconds": round(state["seconds"], 1),
            "commit": commit(),
            "torch": torch.__version__,
        }
        if diverged is None:
            record["validation"] = round(evaluate(model, corpus.validation, device), 5)
            record["test"] = round(evaluate(model, corpus.test, device), 5)
    checkpoint.unlink(missing_ok=True)
    return record


def require_same(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint is of a run with other settings."""
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"{checkpoint} is of a run with {name} {saved.get(name)!r}, this one has {now.get(name)!r}: go on with "
                "the settings it was started with, or delete it"
            )


@functools.cache
def commit() -> str:
    """The commit of the code, with a + where it was changed since; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
