"""One rank of a training that loses rank ``DYING_RANK`` in its fifth step; ``test_engines.py`` starts two.

``python killed_rank.py engine folder``, with the environment that torchrun sets. The dying rank is gone between the
backward pass and the optimizer's step, so that the others wait for it in the exchange of matrices.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from engine_cases import SAVING
from engines import train, trainer_of
from transformers import TrainerCallback

#: For collectives, and for the ranks to find each other.
TIMEOUT_SECONDS = 15


class Death(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4 and os.environ["RANK"] == os.environ["DYING_RANK"]:
            time.sleep(0.5)  # the others are in their optimizer step by then
            (Path(args.output_dir).parent / "death").touch()
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))


if __name__ == "__main__":
    engine, folder = sys.argv[1:]
    # Trainer hands its ddp_timeout on to GPUs only.
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    train(trainer_of(engine, Path(folder), "plain", optim="muon", callbacks=[Death()], **SAVING))
