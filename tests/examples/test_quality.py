"""The ladder, with short runs of its smallest rung: what is chosen, recorded, resumed, refused and drawn."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import slcompile
from examples.quality import __main__ as quality
from examples.quality import recipes, training
from examples.quality.__main__ import console, main, parse_args, steps_of
from examples.quality.corpora import tokenize
from examples.quality.drawing import flops, memory
from examples.quality.records import Records
from examples.quality.search import EXTENSIONS, ROWS, choose
from examples.quality.settings import SEQ_LEN, VOCAB, Settings
from examples.quality.training import Stopped, make_model, make_optimizer, parameter_groups, train

FUNCTIONAL = Path(torch.nn.functional.__file__)
SHORT = Settings(kind="sl", corpus="text", width=128, steps=10, lr=1e-3, embed_lr=5e-3)


@pytest.fixture(autouse=True)
def logs_as_before():
    """The command silences the package's; its process is this one."""
    log = logging.getLogger("slcompile")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tokenize([FUNCTIONAL.read_text()], tmp_path_factory.mktemp("tokens"))


def made_up(settings: Settings) -> dict:
    """Losses of a search without runs: best at lr 2e-3, init_std 0.006, alpha 32, values_rate 4 and embed_lr 1e-2."""
    scale = abs(settings.init_std - 0.006) + abs(settings.values_rate - 4) / 1000
    scale += abs(float(settings.alpha) - 32) if settings.alpha != "auto" else 0
    loss = abs(math.log(settings.lr / 2e-3)) + scale / 100 + abs(settings.embed_lr - 1e-2) + settings.seed / 1000
    return {"validation": loss, "test": loss + 3}


class TestSearch:
    def test_every_searched_row_has_a_grid_of_the_same_size(self):
        searched = [row for row in ROWS if row.follows is None]
        assert {(len(row.lr), len(row.scale[1])) for row in searched} == {(4, 3)}
        for row in searched:
            rates = sorted(row.lr)
            assert [high / low for low, high in itertools.pairwise(rates)] == pytest.approx([2, 2, 2])

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
    def test_a_row_takes_the_best_of_its_grid_or_of_the_row_it_follows(self, row):
        chosen = choose(row, "text", 128, 10, made_up)
        assert (chosen.lr, chosen.embed_lr) == (2e-3, 1e-2)
        assert chosen.kind == row.fixed["kind"]
        best = {"alpha": 32.0, "values_rate": 4.0, "init_std": 0.006}
        if row.follows is None:
            assert getattr(chosen, row.scale[0]) == best[row.scale[0]]
        if "dense's rates" in row.name:
            assert chosen.init_std == 0.006
            assert chosen.alpha == row.fixed.get("alpha", "auto")

    def test_the_grid_of_rates_goes_on_beyond_an_edge_but_not_without_end(self):
        tried = Counter()

        def run(settings):
            tried[settings.lr] += 1
            return {"validation": -settings.lr}

        assert choose(ROWS[0], "text", 128, 10, run).lr == max(ROWS[0].lr) * 2**EXTENSIONS
        assert len(tried) == 4 + EXTENSIONS

    def test_a_search_of_fewer_axes_leaves_the_others_at_their_first_point(self):
        for row in ROWS:
            chosen = choose(row, "text", 128, 10, made_up, axes=["lr"])
            assert (chosen.lr, chosen.embed_lr) == (2e-3, 5e-3)
            assert chosen.alpha == row.fixed.get("alpha", "auto")

    def test_a_rate_that_diverges_is_not_chosen_and_a_row_of_nothing_else_is_an_error(self):
        def run(settings):
            return {"diverged": 3} if settings.lr > 1e-3 else made_up(settings)

        assert choose(ROWS[0], "text", 128, 10, run).lr == 1e-3
        with pytest.raises(ValueError, match="dense, tuned: every one of these diverged"):
            choose(ROWS[0], "text", 128, 10, lambda settings: {"diverged": 3})


def random_model() -> torch.nn.Module:
    model = make_model(SHORT)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in recipes.sl_weights(model):
            weight.B.normal_(std=0.1)
    return model


class TestRecipes:
    def test_a_restart_balances_the_factors_and_keeps_the_weights(self):
        model = random_model()
        optimizer = torch.optim.AdamW(model.parameters())
        model(input_ids=torch.zeros(1, 4).long(), labels=torch.zeros(1, 4).long()).loss.backward()
        optimizer.step()
        before = {name: (parts.B @ parts.A).clone() for name, parts in slcompile.factors(model).items()}
        recipes.restart(model, optimizer)
        for name, parts in slcompile.factors(model).items():
            torch.testing.assert_close(parts.B @ parts.A, before[name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parts.B.T @ parts.B, parts.A @ parts.A.T, rtol=1e-3, atol=1e-4)
        kept = {
            name.rpartition(".")[2] for name, p in model.named_parameters() if "_sl." in name and p in optimizer.state
        }
        assert kept == {"values"}

    def test_a_preconditioned_step_does_not_depend_on_how_the_product_is_split(self):
        moves = []
        for factor in (1.0, 3.0):
            model = random_model()
            with torch.no_grad():
                for weight in recipes.sl_weights(model):
                    weight.B.mul_(factor)
                    weight.A.div_(factor)
            ids = torch.arange(64).view(2, 32)
            model(input_ids=ids, labels=ids).loss.backward()
            recipes.precondition(model, 1e-3)
            weight = next(recipes.sl_weights(model))
            Gram = {"B": weight.A @ weight.A.T, "A": weight.B.T @ weight.B}
            # _solve leaves the mean eigenvalue in, which a plain step would divide by.
            move = weight.B.grad @ weight.A / Gram["B"].diagonal().mean()
            move = move + weight.B @ weight.A.grad / Gram["A"].diagonal().mean()
            moves.append(move.detach())
        torch.testing.assert_close(*moves, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("decay", "times"), [("product", 1), ("factors", 2)])
def test_decay_of_the_product_is_that_of_a_dense_weight_at_any_rates(decay, times):
    plain = replace(SHORT, b_rate=2, values_rate=4)
    settings = replace(plain, weight_decay=0.5, decay=decay)
    assert settings.deciding() == {**plain.deciding(), "weight_decay": 0.5, "decay": decay}
    model = random_model()
    optimizer = make_optimizer(model, settings)
    embedding = model.model.embed_tokens.weight
    before = embedding.clone()
    merged = {name: (parts.B @ parts.A, parts.values.clone()) for name, parts in slcompile.factors(model).items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = 1 - 0.5 * settings.lr
    for name, parts in slcompile.factors(model).items():
        product, values = merged[name]
        torch.testing.assert_close(parts.B @ parts.A, product * kept**times, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts.values, values * kept)
    assert torch.equal(embedding, before)


def test_states_of_few_bits_are_torchaos_and_another_run():
    torchao = pytest.importorskip("torchao.optim")
    plain = Settings(kind="sl", corpus="a", width=128, steps=10, lr=1e-3, embed_lr=1e-3)
    assert "bits" not in plain.deciding()  # as in the runs that were recorded before there was a choice
    few = replace(plain, bits=4)
    assert few.deciding() == {**plain.deciding(), "bits": 4}
    model = make_model(few)
    assert type(training.make_optimizer(model, few)) is torchao.AdamW4bit
    assert type(training.make_optimizer(model, plain)) is torch.optim.AdamW


def test_galore_projects_the_gradients_of_the_projections_alone():
    settings = replace(SHORT, kind="galore", support="vector", alpha=3.0)
    assert {"rank", "init_std"} < settings.deciding().keys()
    assert not {"alpha", "support", "vector", "restart"} & settings.deciding().keys()
    model = make_model(settings)
    assert not slcompile.factors(model)
    optimizer = training.make_optimizer(model, settings)
    ids = torch.arange(64).view(2, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        narrow = 32 if "_proj." in name else None  # a quarter of the width
        assert (narrow in optimizer.state[parameter]["exp_avg"].shape) == (narrow is not None), name


def test_weights_that_a_rank_leaves_dense_are_counted_as_they_are():
    dense, half = (training.sizes(make_model(replace(SHORT, **kind))) for kind in ({"kind": "dense"}, {"rank": 0.5}))
    square, wide = 4 * 128 * 128, 3 * 128 * 344  # of a layer; B and A of rank 64 are no smaller than a square weight
    assert dense["projections"] == 3 * (square + wide)
    assert 3 * (square + 64 * 3 * (128 + 344)) < half["projections"] < 3 * (square + 0.75 * wide)
    assert dense["parameters"] - dense["projections"] == half["parameters"] - half["projections"]


@pytest.mark.usefixtures("aten_kernels")
class TestRun:
    @pytest.mark.slow
    def test_a_record_holds_what_a_run_was_and_came_to(self, corpus, tmp_path):
        dense = train(replace(SHORT, kind="dense"), corpus, tmp_path / "unfinished.pt")
        factors = train(SHORT, corpus, tmp_path / "unfinished.pt")
        assert Settings.of(factors) == SHORT
        assert "alpha" not in dense
        assert dense["projections"] == sum(
            p.numel() for n, p in make_model(replace(SHORT, kind="dense")).named_parameters() if "_proj." in n
        )
        assert 0.4 < factors["projections"] / dense["projections"] < 0.5
        assert dense["parameters"] - dense["projections"] == factors["parameters"] - factors["projections"]
        for record in (dense, factors):
            assert record["tokens"] == 10 * 8 * 128
            assert [step for step, _ in record["curve"]] == list(range(1, 11))
            assert 4 < record["validation"] < record["curve"][0][1] < 7.5
            assert 4 < record["test"] < 7.5
            assert record["text"] == corpus.digest
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_a_stopped_run_resumes_to_the_same_losses(self, corpus, tmp_path, monkeypatch):
        whole = train(SHORT, corpus, tmp_path / "whole.pt")
        make_batch = training.make_batch

        def interrupted(ids, settings, step, device):
            if step == 4:
                signal.raise_signal(signal.SIGTERM)
            return make_batch(ids, settings, step, device)

        monkeypatch.setattr(training, "make_batch", interrupted)
        with pytest.raises(Stopped, match="SIGTERM") as stopped:
            train(SHORT, corpus, tmp_path / "cut.pt")
        assert stopped.value.exit_status == 143
        assert torch.load(tmp_path / "cut.pt", weights_only=True)["state"]["step"] == 4
        with pytest.raises(ValueError, match=r"cut.pt is of a run with lr 0.001, this one has 0.002"):
            train(replace(SHORT, lr=2e-3), corpus, tmp_path / "cut.pt")
        seen = []
        monkeypatch.setattr(training, "make_batch", lambda *args: seen.append(args[2]) or make_batch(*args))
        cut = train(SHORT, corpus, tmp_path / "cut.pt")
        assert seen == list(range(5, 11))
        assert {**cut, "cpu_seconds": 0} == {**whole, "cpu_seconds": 0}

    def test_a_rate_that_diverges_is_recorded_as_that(self, corpus, tmp_path):
        record = train(replace(SHORT, kind="dense", lr=1e4, steps=20), corpus, tmp_path / "unfinished.pt")
        assert 1 < record["diverged"] <= 20
        assert "validation" not in record

    @pytest.mark.parametrize("content", [b"junk", b"", None])
    def test_a_file_that_is_no_checkpoint_is_named(self, corpus, tmp_path, content):
        path = tmp_path / "unfinished.pt"
        torch.save({"state": {}}, path) if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=r"unfinished\.pt is no checkpoint of this program .*: give another --out"):
            train(SHORT, corpus, path)

    @pytest.mark.parametrize("recipe", [{"kind": "galore"}, {"restart": 1}, {"precondition": 0.01}])
    def test_a_gradient_that_is_no_number_is_recorded_as_that(self, corpus, tmp_path, recipe, monkeypatch):
        def exploding(*args):
            model = make_model(*args)
            model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
            return model

        monkeypatch.setattr(training, "make_model", exploding)
        assert train(replace(SHORT, **recipe), corpus, tmp_path / "unfinished.pt")["diverged"] == 1

    @pytest.mark.slow
    def test_low_rank_alone_has_no_sparse_part_and_learns(self, corpus, tmp_path):
        settings = replace(SHORT, kind="low rank", init="spectral", init_std=0.02)
        model = make_model(settings)
        assert all(not each.values.any() for each in slcompile.factors(model).values())
        trained = [p for group in parameter_groups(model, settings) for p in group["params"]]
        assert not any(name.endswith("values") for name, p in model.named_parameters() if any(p is t for t in trained))
        record = train(settings, corpus, tmp_path / "unfinished.pt")
        assert record["validation"] < record["curve"][0][1]

    def test_rates_of_the_factors_are_relative_to_those_of_the_projections(self):
        model = make_model(SHORT)
        rates = {
            id(p): group["lr"]
            for group in parameter_groups(model, replace(SHORT, b_rate=2, values_rate=4))
            for p in group["params"]
        }
        layer = "model.layers.0.mlp.up_proj.weight_sl"
        found = {
            name: rates[id(model.get_parameter(name))]
            for name in (f"{layer}.B", f"{layer}.A", f"{layer}.values", "lm_head.weight")
        }
        assert list(found.values()) == [2e-3, 1e-3, 4e-3, 5e-3]


class TestCommands:
    def one(self, tmp_path, *settings: str) -> list[str]:
        flags = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs.jsonl")]
        return [
            "one",
            "corpus=text",
            "width=128",
            "lr=0.001",
            "embed_lr=0.005",
            *settings,
            "--text",
            f"text={FUNCTIONAL}",
            *flags,
        ]

    @pytest.mark.slow
    def test_a_run_is_made_once(self, tmp_path, capsys):
        for _ in range(2):
            main(self.one(tmp_path, "kind=dense", "steps=10"))
        assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1
        assert capsys.readouterr().out.count("run: kind=dense") == 1

    @pytest.mark.slow
    def test_a_text_too_short_for_the_tokens_is_refused(self, tmp_path):
        command = [sys.executable, "-m", "examples.quality", *self.one(tmp_path, "kind=dense", "steps=100000")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        assert done.returncode == 1
        assert "error: the text is too short: 102,400,000 tokens are asked" in done.stderr

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["one", "kind=dens", "corpus=a", "width=128", "steps=10", "lr=1", "embed_lr=1"], "kind must be one of"),
            (
                ["one", "kind=sl", "corpus=a", "width=128", "steps=10", "lr=1", "embed_lr=1", "bits=5"],
                "bits must be one",
            ),
            (
                ["one", "kind=galore", "corpus=a", "width=128", "steps=10", "lr=1", "embed_lr=1", "bits=8"],
                "bits must be 32 with kind 'galore'",
            ),
            (["one", "kind=sl", "corpus=a", "width=128", "steps=10", "lr=0", "embed_lr=1"], "lr must be a finite"),
            (["one", "kind=sl", "corpus=a", "width=128", "steps=10", "lr=1"], "embed_lr"),
            (
                ["one", "kind=sl", "corpus=a", "width=128", "steps=10", "lr=1", "embed_lr=1", "weight_decay=-1"],
                "weight_decay must be a finite number of at least 0, got -1",
            ),
            (["one", "rate=3"], "settings must be NAME=VALUE with one of"),
            (["run", "--text", "prose=missing.txt"], "--text must be CORPUS=FILE with an existing file"),
            (
                ["one", "kind=sl", "corpus=a", "width=128", "steps=10.5", "lr=1", "embed_lr=1"],
                "steps must be an int, got",
            ),
            (["one", "kind=sl", "corpus=a", "width=128", "steps=10", "lr=x", "embed_lr=1"], "lr must be a finite"),
            (["run", "--corpora", "prose", "cod"], "--corpora must be of ['prose', 'code'], got 'cod'"),
            (["run", "--steps", "1"], "--steps: must be an int of at least 10, got '1'"),
            (["run", "--tokens-per-parameter", "0"], "--tokens-per-parameter: must be a finite number above 0"),
            (["run", "--out", f"{__file__}/sub"], "--out: must be a directory that can be written or made"),
            (["run", "--device", "tpu"], "--device: must be one of ['cpu'"),
            (["run", "--runs", str(Path(__file__).parent)], "--runs must be a file, got the directory"),
            (["table", "--plot", "missing/curves.png"], "--plot: must be a .png or .svg file in a directory that is"),
        ],
    )
    def test_bad_flags_are_refused(self, flags, message, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(flags)
        assert message in capsys.readouterr().err

    def test_the_steps_of_a_rung_follow_from_the_parameters_of_its_dense_model(self):
        model = make_model(replace(SHORT, kind="dense"))
        steps = steps_of(parse_args(["run", "--tokens-per-parameter", "3"]), SHORT.width)
        assert steps == round(3 * sum(p.numel() for p in model.parameters()) / (8 * 128))

    def test_the_table_has_rows_seeds_what_else_was_tried_and_a_drawing(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(console, "width", 200)  # the terminal was asked when the program was imported
        records = Records(tmp_path / "runs.jsonl")

        def run(settings):
            found = records.find(settings, "digest")
            if found is None:
                size = 600_000 if settings.kind == "dense" else 250_000
                fixed = {"text": "digest", "tokens": settings.tokens, "parameters": size + 50_000, "projections": size}
                more = {"curve": [[5, 4.0], [10, 3.5]], "diverged": None}
                found = {**settings.deciding(), **fixed, **more, **made_up(settings)}
                records.add(found)
            return found

        for row in ROWS[:-1]:
            chosen = choose(row, "prose", 128, 10, run)
            for seed in range(3):
                run(replace(chosen, seed=seed))
        run(replace(choose(ROWS[-3], "prose", 128, 10, run), values_rate=6.0))
        main(["table", "--runs", str(records.path), "--plot", str(tmp_path / "curves.png")])
        printed = capsys.readouterr().out
        # seeds 0, 1, 2 have test losses 3.0000, 3.0010 and 3.0020
        assert "prose, width 128, 10 steps: 10,240 tokens, 0.0 a parameter of the dense model" in printed
        dense = next(line for line in printed.splitlines() if "dense, tuned" in line)
        assert "3.0010 ± 0.0010 (3)" in dense
        assert f"{math.exp(3.001):.2f}" in dense
        assert "not complete: SL, tuned" in printed
        assert re.search(r"sl +│ 0.002 +│ 0.01 +│ values_rate 6.0 +│ +1 │", printed)
        assert (tmp_path / "curves.png").stat().st_size > 1000

    def test_a_row_that_diverges_at_every_rate_ends_neither_the_runs_nor_the_table(self, tmp_path, capsys, monkeypatch):
        records = Records(tmp_path / "runs.jsonl")

        def trained(settings, *_):
            size = {"tokens": settings.tokens, "parameters": 9, "projections": 5}
            ended = {"diverged": 3} if settings.kind == "galore" else {"diverged": None, **made_up(settings)}
            return {**settings.deciding(), "text": corpus.digest, **size, "curve": [], **ended}

        corpus = tokenize([FUNCTIONAL.read_text()], tmp_path)
        monkeypatch.setattr(quality, "train", trained)
        monkeypatch.setattr(console, "width", 200)
        flags = ["--corpora", "text", "--widths", "128", "--axes", "lr", "--runs", str(records.path)]
        more = ["--text", f"text={FUNCTIONAL}", "--steps", "10", "--seeds", "1", "--out", str(tmp_path)]
        main(["run", *flags, *more])
        assert "GaLore, tuned: every one of these diverged" in capsys.readouterr().out
        main(["table", *flags])
        printed = capsys.readouterr().out
        assert "not complete: GaLore, tuned (diverged at every rate)" in printed
        assert "SL, tuned" in printed

    @pytest.mark.parametrize("kind", ["dense", "sl", "galore"])
    def test_the_memory_that_is_drawn_is_what_a_step_holds(self, kind):
        settings = replace(SHORT, kind=kind, width=96)
        model = make_model(settings)
        optimizer = make_optimizer(model, settings)
        ids = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        states = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]
        parameters = list(model.parameters())
        held = sum(each.nbytes for each in [*parameters, *parameters, *states])  # gradients are as large
        assert memory(settings, training.sizes(model)) == pytest.approx(held, rel=1e-3)  # which counts steps, too
        tokens = {"tokens": 10, "projections": 100}
        assert flops(settings, tokens) == 6 * 10 * (100 + VOCAB * 96)

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            ({"kind": "dense"}, "KeyError"),
            ([1], "no JSON object"),
            (
                {**SHORT.deciding(), "text": "digest", "tokens": 1, "diverged": 3},
                "'parameters', 'projections', 'curve'",
            ),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path, line, why):
        (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match=rf"line 1 of .* is not a run: .*{why}"):
            Records(tmp_path / "runs.jsonl")

    def test_the_table_of_a_corpus_without_runs_is_refused(self):
        with pytest.raises(ValueError, match=r"--corpora must be of \['prose', 'code'\], got 'pros'"):
            main(["table", "--corpora", "prose", "pros"])
