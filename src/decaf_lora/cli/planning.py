"""`decaf plan`: what a run would cost."""

from __future__ import annotations

import json

from rich.console import Console

from decaf_lora.cli.options import Planning, configured
from decaf_lora.config import RunConfig
from decaf_lora.errors import UserError


def plan_command(args: list[str]) -> int:
    config, options, name = configured(RunConfig, "plan", args, Planning)
    if options.measure and options.tflops is not None:
        raise UserError("measure: it finds the throughput that --tflops states; give one.")
    from decaf_lora import plan

    sizes = plan.DataSizes(options.sequence_length, options.num_classes, options.num_train, options.num_test)
    made = plan.estimate(config, sizes, processes=options.processes, tflops=options.tflops)
    if options.measure:
        made = plan.measured(made, config)
    if options.json:
        print(json.dumps({"name": name, **made.as_dict()}, indent=2))
        return 0
    console = Console(highlight=False)
    for part in plan.shown(made, name):
        console.print(part)
    return 0
