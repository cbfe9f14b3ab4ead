"""Runs train_language_model.py once for each optimizer named first, and compares the weights of all ranks.

train_each.py muon,mud FOLDER [arguments of train_language_model.py...]
"""

import os
import runpy
import sys

import torch
import torch.distributed as dist

script = os.path.join(os.path.dirname(__file__), "train_language_model.py")
names, folder, arguments = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
for name in names:
    sys.argv = [script, "--optim", name, "--output_dir", os.path.join(folder, name), *arguments]
    trainer = runpy.run_path(script, run_name="__main__")["trainer"]
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    of_ranks = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, weights)
    equal = all(torch.equal(other, weights) for other in of_ranks)
    with open(os.path.join(folder, f"{name}.rank{dist.get_rank()}"), "w") as file:
        file.write(f"{dist.get_world_size()} {equal}")
dist.destroy_process_group()
