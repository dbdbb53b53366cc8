#!/usr/bin/env python
"""Train or evaluate DI-MaskDINO and MaskDINO: detectron2's command line; also under torchrun."""

from dimaskdino.command_line import argument_parser

if __name__ == "__main__":
    arguments = argument_parser().parse_args()  # --help and mistakes end here, before the imports that take seconds

    from dimaskdino.engine import launch, train_or_evaluate

    launch(train_or_evaluate, arguments, cpu_processes=arguments.cpu_processes)
