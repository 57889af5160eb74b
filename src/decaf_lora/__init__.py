"""decaf-lora: fine-tune one foundation model together, keep every data set where it is, need no server.

graph, task = graphs.ring(10), tasks.digits()
shards = partition.dirichlet(task.labels, 10, alpha=0.1, seed=0)
run = Run(task, algorithms.decaf(), graph, shards, rounds=30)
for record in run.train():
    ...
run.save_adapter("adapters/agent-3", agent=3)
"""

from typing import TYPE_CHECKING

from decaf_lora.lazy import lazy

__version__ = "0.2.0"

_LAZY = {
    "Run": "run",
    "TrainingConfig": "config",
    "Adapter": "adapters.adapter",
    "Algorithm": "algorithms",
    "Graph": "graphs",
    "Partition": "partition",
    "Record": "records",
    "Task": "tasks.base",
    "UserError": "errors",
    **dict.fromkeys(
        ("algorithms", "adapters", "config", "engines", "graphs", "lowrank", "partition", "runs", "tasks", "tune"), ""
    ),
}

if TYPE_CHECKING:
    from decaf_lora import adapters, algorithms, config, engines, graphs, lowrank, partition, runs, tasks, tune
    from decaf_lora.adapters.adapter import Adapter
    from decaf_lora.algorithms import Algorithm
    from decaf_lora.config import TrainingConfig
    from decaf_lora.errors import UserError
    from decaf_lora.graphs import Graph
    from decaf_lora.partition import Partition
    from decaf_lora.records import Record
    from decaf_lora.run import Run
    from decaf_lora.tasks.base import Task

# torch takes a second to import, peft with transformers two more; `decaf --help` needs neither.
__getattr__ = lazy(__name__, _LAZY)


__all__ = [
    "Adapter",
    "Algorithm",
    "Graph",
    "Partition",
    "Record",
    "Run",
    "Task",
    "TrainingConfig",
    "UserError",
    "adapters",
    "algorithms",
    "config",
    "engines",
    "graphs",
    "lowrank",
    "partition",
    "runs",
    "tasks",
    "tune",
]
