"""A training function as the documentation of Ray Train and of DeepSpeed shows it: synchronous
checkpoints, and the newest one loaded after a restart.

Ray Train's workers import this module and what it imports, and nothing else of ours.
"""

import os
from pathlib import Path
from time import time
from typing import Any

import ray.train


def train_as_documented(config: dict[str, Any]) -> None:
    """A rank's training function. Rank 0 writes down when it is called, when a step is done, and
    when a checkpoint is there; it ends once there is a file `stop` in the folder."""
    rank, folder = ray.train.get_context().get_world_rank(), Path(config["folder"])

    def tell(name: str) -> None:
        if rank == 0:
            with (folder / name).open("a") as file:
                file.write(f"{time()}\n")

    tell("calls")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # an engine, from the newest checkpoint where there is one
    torch.set_num_threads(config["threads"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config["model"]))
    settings = {
        "train_micro_batch_size_per_gpu": config["batch"],
        "gradient_accumulation_steps": config["accumulate"],
        "zero_optimization": {"stage": config["zero_stage"]},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=settings
    )
    latest = folder / "saved" / "latest"  # DeepSpeed writes it after all else
    if latest.exists():
        engine.load_checkpoint(str(latest.parent))

    # optimiser steps until it is stopped
    ids_BL = torch.randint(model.config.vocab_size, (config["batch"], config["length"]))
    while not (folder / "stop").exists():
        for _ in range(config["accumulate"]):
            engine.backward(engine(input_ids=ids_BL, labels=ids_BL).loss)
            engine.step()
        tell("steps")
        if engine.global_steps % config["commit_every"] == 0:
            engine.save_checkpoint(str(latest.parent))
            tell("commits")
