from __future__ import annotations

import torch
from torch import Tensor, nn

from slcompile.passes import recompute_inputs
from tests.passes.saved import Net, compiled_reports


def test_inputs_are_made_again_of_what_is_saved_anyway(monkeypatch):
    x = torch.randn(37, 48)
    saved = {save: compiled_reports(Net(), x, save, monkeypatch)[0] for save in ("all", "auto")}
    # The normalized x, and silu(gate) * up and silu(gate); gate and up are saved, and hidden matrices.
    assert saved["all"].count((37, 48)) == 1
    assert saved["auto"].count((37, 48)) == 0
    assert saved["auto"].count((37, 96)) == 2 < saved["all"].count((37, 96))
    assert saved["auto"].count((37, 4)) == saved["all"].count((37, 4)) == 3


class Relu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_an_input_is_left_where_something_as_large_would_be_saved_in_its_place(monkeypatch):
    shapes, (report,) = compiled_reports(Relu(), torch.randn(37, 48), "auto", monkeypatch, of=recompute_inputs)
    assert report.replaced == []  # relu's gradient reads what it returns
    assert [each.reason for each in report.left] == ["not_by_the_way"]
    assert shapes.count((37, 96)) == 1
