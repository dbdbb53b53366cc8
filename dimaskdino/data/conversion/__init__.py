"""Label files of other programs, as COCO files; and predictions as label files."""
