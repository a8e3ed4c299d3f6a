"""Names and versions of the documents that are written as JSON."""

EXPLANATION = "slcompile.explain/3"
GRAPH_DIFF = "slcompile.graph_diff/2"
