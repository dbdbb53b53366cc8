"""One set of rules for annotations, used by the mapper, the check at the start and tools/check_dataset.py."""
