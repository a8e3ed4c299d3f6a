"""What a compile did to a model's graphs: explanations and graph diffs, as text, JSON and a page."""
