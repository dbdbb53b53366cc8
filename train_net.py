#!/usr/bin/env python
"""Train or evaluate DI-MaskDINO and MaskDINO: detectron2's command line; also under torchrun."""

import argparse

from dimaskdino.command_line import argument_parser

if __name__ == "__main__":
    argument_parser().parse_args()  # --help and mistakes end here, before the imports that take seconds

from dimaskdino.engine import Trainer, evaluate, launch, setup


def main(args: argparse.Namespace) -> None:
    """What every process of the job does."""
    cfg = setup(args)
    if args.eval_only:
        evaluate(cfg, resume=args.resume)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    launch(main, arguments, cpu_processes=arguments.cpu_processes)
