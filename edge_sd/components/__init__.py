"""A network as the pipeline calls it, its wrappers, and the edits of its weights and graph."""
