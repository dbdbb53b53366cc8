"""What surrounds a model that predicts: inputs, refinement, results, files that are written."""
