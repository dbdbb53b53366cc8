"""Export: a trained model as a file of another format, checked against the model."""
