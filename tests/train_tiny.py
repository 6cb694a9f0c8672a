"""Trains the tiny pipeline; run by itself, or by torchrun on several processes. Arguments: folder, sections as JSON."""

import json
import sys

import torch
from tiny import redness, tiny_config, tiny_pipeline

from crd import CRDTrainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, sections = sys.argv[1], json.loads(sys.argv[2])
    trainer = CRDTrainer(model=tiny_pipeline(), reward_funcs=[redness], config=tiny_config(folder, **sections))
    trainer.train()
    if trainer.accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()
