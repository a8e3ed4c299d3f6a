"""C4's loop on a small local copy, tiny size: rows, resuming, equal data for both models, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
import re
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.testing import example, torchrun

c4 = example("c4")
ROOT = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tokenizer, shards of training documents and one of validation."""
    place = tmp_path_factory.mktemp("c4")
    pieces = [piece for file in sorted((ROOT / "nn/modules").glob("*.py")) for piece in file.read_text().split("\n\n")]
    texts = [piece for piece in pieces if len(piece) > 40][:600]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(place / "tokenizer")
    (place / "train").mkdir()
    lines = [json.dumps({"text": text, "url": ""}) + "\n" for text in texts]
    with gzip.open(place / "train" / "c4-train.00000.json.gz", "wt") as file:
        file.writelines(lines[:250])
    (place / "train" / "c4-train.00001.json").write_text("".join(lines[250:500]))
    (place / "validation.json").write_text("".join(lines[500:]))
    return place


def command(place: Path, out: Path, *more: str, data: str | None = None) -> list[str]:
    data = data or str(place / "train")
    fixed = ["--size", "tiny", "--data", data, "--validation", str(place / "validation.json"), "--out", str(out)]
    small = (
        "--steps 8 --total-batch 16 --batch 8 --seq-len 48 --dtype float32 --eval-every 4 --eval-tokens 2000".split()
    )
    return [*fixed, "--tokenizer", str(place / "tokenizer"), *small, *more]


@pytest.mark.slow
def test_both_models_see_the_same_and_a_row_is_printed_for_each(place, tmp_path, capsys):
    assert c4.main(command(place, tmp_path)) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"\| tiny (\w+) \| (\d+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|", printed)
    assert [(row[0], row[1]) for row in rows] == [("dense", "8"), ("sltrain", "8")]
    runs = {kind: torch.load(tmp_path / f"tiny-{kind}.pt", weights_only=True)["run"] for kind in ("dense", "sltrain")}
    for (kind, _, _, perplexity, millions, _, _), run in zip(rows, runs.values(), strict=True):
        assert float(perplexity) == pytest.approx(math.exp(run["validation"]), abs=0.01), kind
        assert float(millions) == pytest.approx(run["sizes"]["parameters"] / 1e6, abs=0.05)
        assert [point[0] for point in run["curve"]] == [4, 8]
        assert run["curve"][1][2] < run["curve"][0][2] < math.log(400) + 0.5  # it learns
    assert runs["dense"]["tokens"] == runs["sltrain"]["tokens"] > 8 * 16 * 10
    assert runs["dense"]["read"] == runs["sltrain"]["read"] == 8 * 16
    assert runs["dense"]["sizes"]["parameters"] > runs["sltrain"]["sizes"]["parameters"]
    lines = [json.loads(line) for line in (tmp_path / "tiny-sltrain.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(place, tmp_path, capsys, monkeypatch):
    only = ("--only", "sltrain")
    assert c4.main(command(place, tmp_path / "whole", *only)) == 0
    log = c4.log

    def stop_in_step_3(args, kind, values):
        log(args, kind, values)
        if values["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(c4, "log", stop_in_step_3)
    assert c4.main(command(place, tmp_path / "cut", *only)) == 143
    assert "Stopped at step 3: the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(c4, "log", log)
    with pytest.raises(ValueError, match=r"was made with --lr 0.001, now 0.002: give another --out"):
        c4.main(command(place, tmp_path / "cut", *only, "--lr", "2e-3"))
    assert c4.main(command(place, tmp_path / "cut", *only)) == 0
    whole, cut = (torch.load(tmp_path / name / "tiny-sltrain.pt", weights_only=True) for name in ("whole", "cut"))
    assert cut["run"]["curve"] == whole["run"]["curve"]
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_where_one_stopped(place, tmp_path):
    """FSDP2; a step's documents, and the sums over them, are the same however many processes read them."""
    given = ("--only", "sltrain", "--clip", "0.3")  # with 8 at a time, in each of two processes 4
    assert c4.main(command(place, tmp_path / "one", *given)) == 0
    assert c4.main(command(place, tmp_path / "both", *given, "--stop-at", "3")) == 0
    printed = torchrun(c4.__file__, *command(place, tmp_path / "both", *given, "--batch", "4"))
    assert "sltrain: goes on at step 3 of 8" in printed
    one, both = (
        {line["step"]: line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line}
        for text in ((tmp_path / name / "tiny-sltrain.jsonl").read_text() for name in ("one", "both"))
    )
    assert both == pytest.approx(one, rel=1e-5)
    assert sorted(both) == list(range(1, 9))
    runs = [torch.load(tmp_path / name / "tiny-sltrain.pt", weights_only=True) for name in ("one", "both")]
    assert runs[0]["run"]["sizes"] == runs[1]["run"]["sizes"]
    (step, tokens, loss), last = (each["run"]["curve"][-1] for each in runs)
    assert last == [step, tokens, pytest.approx(loss, rel=1e-5)]
    for name, weight in runs[0]["model"].items():
        torch.testing.assert_close(runs[1]["model"][name], weight, rtol=1e-3, atol=1e-4)


def test_padding_is_neither_predicted_nor_attended_to(place):
    args = c4.parse_args(command(place, place))
    tokenizer = c4.load_tokenizer(args.tokenizer)
    model = c4.make_model("sltrain", args, len(tokenizer)).eval()
    texts = ["x = 1", "return self.weight + torch.zeros(3)"]
    ids, mask = c4.Sequences(iter(texts), tokenizer, 48).take(4)
    assert ids.shape == mask.shape == (2, 48)
    alone = []
    for row, real in zip(ids, mask, strict=True):
        one = row[real.bool()].unsqueeze(0)
        alone.append(c4.loss_sum(model, one, torch.ones_like(one), "cpu"))
    torch.testing.assert_close(c4.loss_sum(model, ids, mask, "cpu"), sum(alone))


def test_data_that_ends_too_early_is_an_error(place, tmp_path):
    with pytest.raises(ValueError, match="the data ends after 100 documents, in step 7: 8 steps of 16 need 128"):
        c4.main(command(place, tmp_path, "--only", "dense", data=str(place / "validation.json")))


def test_the_hub_is_streamed_by_datasets(place, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(c4.documents(["hub"], "validation")) == ["one", "two"]
    assert asked == [(("allenai/c4", "en"), {"split": "validation", "streaming": True})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="--data hub needs the package datasets"):
        next(c4.documents(["hub"], "train"))


@pytest.mark.slow
def test_sizes_have_the_papers_parameters():
    for size, millions in (("60m", 43.5), ("130m", 96.5), ("350m", 194.3), ("1b", 645.5)):
        args = c4.parse_args(["--size", size, "--data", "hub", "--support", "uniform", "--alpha", "paper"])
        with torch.device("meta"):
            args.device = "meta"
            model = c4.make_model("sltrain", args, 32000)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
        assert args.alpha == c4.SIZES[size].paper_alpha


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "60m", "--data", "missing.json", "--validation", "missing.json"], "--data must be .json"),
        (["--size", "60m", "--data", __file__], "--validation must name files"),
        (["--size", "60m", "--data", "hub", "--batch", "48"], "--total-batch must be a multiple of --batch 48"),
        (["--size", "60m", "--data", "hub", "--lr", "nan"], "--lr must be a finite number"),
        (["--size", "60m", "--data", "hub", "--embed-lr", "0"], "--embed-lr must be a finite number"),
        (["--size", "60m", "--data", "hub", "--stop-at", "20000"], "--stop-at must be in"),
        (["--size", "60m", "--data", "hub", "--alpha", "-1"], "alpha must be"),
        (["--size", "60m", "--data", "hub", "--rank", "513"], "rank must be at most 512"),
        (["--size", "7b", "--data", "hub"], "invalid choice: '7b'"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        c4.parse_args(flags)
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_is_named(place, tmp_path):
    (tmp_path / "tiny-dense.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"tiny-dense\.pt is no checkpoint of this program .*: give another --out"):
        c4.main(command(place, tmp_path, "--only", "dense"))


@pytest.mark.slow
def test_embeddings_and_values_have_their_own_rates(place, tmp_path):
    rates = ["--lr", "1e-3", "--embed-lr", "5e-3", "--values-rate", "2"]
    assert c4.main(command(place, tmp_path, *rates, "--only", "sltrain", "--steps", "1")) == 0
    groups = torch.load(tmp_path / "tiny-sltrain.pt", weights_only=True)["optimizer"]["param_groups"]
    peak = {name: group["initial_lr"] for group in groups for name in group["params"]}
    assert sorted(set(peak.values())) == [1e-3, 2e-3, 5e-3]
    for name, rate in peak.items():
        assert rate == (2e-3 if name.endswith("_sl.values") else 1e-3 if "_proj." in name else 5e-3), name


def test_a_line_without_a_text_and_a_tokenizer_that_is_none_are_named(place, tmp_path):
    (tmp_path / "bad.json").write_text('{"text": "fine"}\n{"url": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*bad.json is no JSON object with a text"):
        list(c4.documents([str(tmp_path / "bad.json")], "train"))
    with pytest.raises(ValueError, match=r"--tokenizer .* cannot be loaded"):
        c4.load_tokenizer(str(tmp_path))
