"""Label files of other programs, as COCO files; and predictions as label files.

A reader takes a folder or file of labels, its images, the class names that there may be (none means those that occur or
that the format lists), and a list for what is wrong. It gives the labeled images and the class names.
"""
