"""A plain process that trains, the peer of a trainer that the service starts. Run by path, so that it imports only what it needs.

    python -P benchmarks/plain.py CONFIG [--default-threads]

CONFIG: a TrainerConfig as JSON.  Prints the trainer's messages, one JSON object a line, until it is killed or done.
`--default-threads` takes as many threads as torch chooses, whatever the config says.
"""

from __future__ import annotations

import sys

import torch

from powergrad import trainer
from powergrad.protocol import Message, TrainerConfig, encode


def main() -> None:
    config = TrainerConfig.model_validate_json(sys.argv[1])
    if "--default-threads" in sys.argv[2:]:
        config = config.model_copy(update={"cpu_threads": torch.get_num_threads()})
    trainer.run(config, emit=_print, orders=trainer.StandingOrders())


def _print(message: Message) -> None:
    sys.stdout.buffer.write(encode(message))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
