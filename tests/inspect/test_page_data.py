"""What the page's file holds, without a browser."""

from __future__ import annotations

import json
import re

import pytest

from slcompile.inspect.page import render
from tests.inspect.documents import HOSTILE, explanation, written


@pytest.mark.parametrize("schema", ["slcompile.explain/1", None])
def test_unknown_schemas_are_refused(schema):
    with pytest.raises(ValueError, match=r"slcompile\.explain/3, slcompile\.graph_diff/2, got"):
        render({**explanation(1), "schema": schema})


def test_numbers_without_json_are_refused():
    document = explanation(1)
    document["summary"]["flops"]["after"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        render(written(document))


def test_the_data_round_trips_through_the_page():
    document = written(explanation(2))
    document["model"] = HOSTILE
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', render(document), re.DOTALL)
    assert text is not None
    assert json.loads(text[1]) == document


def test_the_file_is_self_contained():
    outside = re.findall(r"https?://[^\s\"'`]+", render(written(explanation(1))))
    assert set(outside) <= {"http://www.w3.org/2000/svg"}  # a namespace, not an address
    assert not re.search(r"<(link|iframe|img)|\bsrc=|@import|url\(|sourceMappingURL", render(written(explanation(1))))
    assert "Copyright (c) 2012-2014 Chris Pettitt" in render(written(explanation(1)))
