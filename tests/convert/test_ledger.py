from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import nn

import slcompile
from slcompile.convert.ledger import Ledger, ModelRecord, ledger
from slcompile.factorize import factorize_model
from slcompile.passes import Decision, PassReport
from tests.testing import CONFIG


def report(replaced: str = "", left: str = "", reason: str = "too_small") -> PassReport:
    """Of these names, each a word."""
    return PassReport(
        "weights",
        [Decision(name) for name in replaced.split()],
        [Decision(name, reason) for name in left.split()],
    )


def names(decisions: list[Decision]) -> list[str]:
    return [each.name for each in decisions]


def noted(known: Ledger, model: nn.Module, found: PassReport) -> ModelRecord:
    """Notes a conversion of a model's only layer."""
    record = known.record([model])
    known.note_conversion(record, [model], [(nn.Linear(4, 4).weight, nn.Linear(2, 2))], "kaiming", found)
    return record


def test_a_record_is_kept_only_once_something_is_added():
    known, model = Ledger(), nn.Linear(4, 4)
    record = known.record([model])
    assert known.record([model]) is not record
    known.add(record, [model], report("a"))
    assert known.record([nn.Linear(4, 4), model]) is record  # a model may have several roots


def test_what_several_graphs_replace_and_leave_adds_up():
    known, model = Ledger(), nn.Linear(4, 4)
    record = known.record([model])
    known.add(record, [model], report("a", "b c"))
    known.add(record, [model], report("b", "c", reason="excluded"))
    assert names(record.report.replaced) == ["a", "b"]
    assert [(each.name, each.reason) for each in record.report.left] == [("c", "excluded")]  # as it was said last
    assert known.names_left(model) == {"c"}
    assert known.names_left(nn.Linear(4, 4)) == set()


def test_a_graph_without_anything_to_convert_is_noted_for_its_model():
    known, model = Ledger(), nn.Linear(4, 4)
    known.note_left([], report(left="a"))
    assert known.newest is None
    known.note_left([model], report(left="a"))
    assert known.names_left(model) == {"a"}
    assert names(known.newest.left) == ["a"]
    assert not known.record([model]).begun


def test_the_first_conversion_of_a_model_is_announced_as_a_warning(caplog):
    known, model = Ledger(), nn.Sequential(nn.Linear(4, 4))
    with caplog.at_level(logging.INFO, "slcompile"):
        noted(known, model, report("a", "b"))
        noted(known, model, report("b"))
        known.forget(model[0])  # a part of it was merged
        noted(known, model, report("a"))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]
    assert caplog.records[0].getMessage() == (
        "slcompile: factorized 1 weights of Sequential (1 left dense): 16 -> 6 parameters in them, init kaiming, which "
        "replaces the weights"
    )


def test_a_silent_ledger_keeps_what_it_is_told_and_says_nothing(caplog):
    known, model = Ledger(silent=True), nn.Linear(4, 4)
    with caplog.at_level(logging.DEBUG, "slcompile"):
        record = noted(known, model, report("a"))
    assert known.newest is record.report
    assert known.record([model]) is record
    assert caplog.records == []


def test_reset_forgets_everything(caplog):
    known, model = Ledger(), nn.Linear(4, 4)
    dense = nn.Parameter(torch.zeros(4, 4))
    known.note_conversion(known.record([model]), [model], [(dense, nn.Linear(2, 2))], "kaiming", report("a", "b"))
    known.note_dry_run([model], report("c"))
    known.warned.add(model)
    known.other_reads[dense] = ["sum"]
    known.remember_owners(model.weight, [(model, "weight")])
    caplog.clear()
    known.reset()
    assert known.newest is None
    assert not known.record([model]).begun
    assert known.names_left(model) == set()
    assert model not in known.warned
    assert dense not in known.other_reads
    known.warn_of_held_weights()  # of `dense`, which is alive
    assert caplog.records == []
    known.note_dry_run([model], report("d"))
    assert names(known.newest.replaced) == ["d"]
    fresh = Ledger()
    new, old = vars(fresh).keys() - {"lock", "_silent"}, vars(known).keys() - {"lock", "_silent"}
    assert new == old  # whatever is kept, `reset` makes


@pytest.mark.slow
def test_nothing_that_is_known_keeps_a_model_alive():
    known, model = Ledger(), nn.Linear(4, 4)
    noted(known, model, report("a"))
    known.note_dry_run([model], report("b"))
    known.warned.add(model)
    known.other_reads[model.weight] = ["sum"]
    known.remember_owners(model.weight, [(model, "weight")])
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(known.warned) == len(known.other_reads) == 0


def test_dry_runs_of_a_models_graphs_add_up(caplog):
    known, model = Ledger(), nn.Linear(4, 4)
    known.note_dry_run([], report("x"))
    assert known.newest is None
    with caplog.at_level(logging.INFO, "slcompile"):
        known.note_dry_run([model], report("a", "b"))
        known.note_dry_run([model], report("a c", "b"))
    assert names(known.newest.replaced) == ["a", "c"]
    assert names(known.newest.left) == ["b"]
    assert [each.getMessage().partition(".")[0] for each in caplog.records] == [
        "slcompile: dry run, nothing of Linear is changed"
    ] * 2
    assert not known.record([model]).begun


def test_weights_in_training_are_those_of_owners_of_which_none_is_in_eval():
    known, model = Ledger(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert known.in_training(model[0].weight)
    model[1].eval()
    assert not known.in_training(model[0].weight)
    model[1].weight = nn.Parameter(torch.zeros(4, 4))  # who owned it no longer does: looked up again
    assert known.in_training(model[0].weight)
    assert not known.in_training(nn.Parameter(torch.zeros(4, 4)))  # nobody does


@pytest.mark.slow
def test_the_process_has_one_and_an_estimate_has_its_own(block, batch, caplog):
    slcompile.factorize_(block, CONFIG)
    before = slcompile.last_report()
    assert before is ledger.newest
    assert names(before.replaced) == ["up.weight", "down.weight"]
    caplog.clear()
    other = type(block)()
    with caplog.at_level(logging.DEBUG, "slcompile"):
        slcompile.estimate_memory(other, (batch[0],), config=CONFIG, device="cpu")
        factorize_model(type(block)().to("meta"), CONFIG, None, None, Ledger(silent=True))
    assert slcompile.last_report() is before
    assert names(before.replaced) == ["up.weight", "down.weight"]
    assert not [record for record in caplog.records if record.name == "slcompile" and record.levelno > logging.DEBUG]
    assert not ledger.record([other]).begun
    slcompile.factorize_(other, CONFIG)
    assert slcompile.last_report() is not before


@pytest.mark.slow
def test_the_newest_report_may_be_of_a_model_that_is_left_dense(block):
    slcompile.factorize_(block, CONFIG)
    converted = slcompile.last_report()
    small = nn.Linear(4, 4)
    compiled = torch.compile(small, backend="sltrain")
    compiled(torch.randn(3, 4)).sum().backward()
    report = slcompile.last_report()
    assert {each.name: each.reason for each in report.left} == {"weight": "too_small"}
    assert not report.replaced
    other = type(block)()
    slcompile.factorize_(other, CONFIG)
    newest = slcompile.last_report()
    compiled(torch.randn(5, 4)).sum().backward()  # captured again, and no newer for that
    assert slcompile.last_report() is newest
    assert newest is not converted


def test_no_report_before_the_first_conversion():
    assert slcompile.last_report() is None  # whatever other tests converted


@pytest.mark.parametrize("merged", ["whole", "part", "container"])
def test_a_merged_model_is_converted_as_if_for_the_first_time(merged):
    layer = nn.Sequential(nn.Linear(64, 64))
    model = nn.Sequential(layer, nn.Linear(64, 64))
    slcompile.factorize_(model, CONFIG)
    container = nn.ModuleList([model])
    slcompile.merge_({"whole": model, "part": layer, "container": container}[merged])
    assert not ledger.record([model]).begun
