"""Suggestions: which name, value or command was probably meant by one that is not known."""

import difflib
import re
from collections.abc import Collection, Mapping

# Settings of TRL, of Hugging Face's Trainer, of axolotl and of DeepSpeed, and what is used here
# instead.
ELSEWHERE: Mapping[str, str] = {
    "model_name_or_path": "teacher.model or student.model",
    "model_name": "teacher.model or student.model",
    "base_model": "student.model",
    "student_model_name_or_path": "student.model",
    "teacher_model_name_or_path": "teacher.model",
    "model_revision": "teacher.revision or student.revision",
    "torch_dtype": "teacher.dtype or student.dtype",
    "bf16": "teacher.dtype and student.dtype, which are 'bfloat16' unless set",
    "fp16": "teacher.dtype, and student.dtype, which may be 'float32' or 'bfloat16'",
    "dataset_name": "corpus.dataset",
    "dataset_path": "corpus.dataset",
    "datasets": "corpus.dataset",
    "dataset_config": "corpus.subset",
    "dataset_config_name": "corpus.subset",
    "dataset_text_field": "corpus.column",
    "max_length": "corpus.sequence_length",
    "max_seq_length": "corpus.sequence_length",
    "max_seq_len": "corpus.sequence_length",
    "sequence_len": "corpus.sequence_length",
    "block_size": "corpus.sequence_length",
    "sample_packing": "corpus.packing",
    "max_train_samples": "corpus.max_documents",
    "lr": "student.learning_rate",
    "min_lr": "student.min_learning_rate",
    "warmup_ratio": "student.warmup_steps, a number of steps",
    "lr_scheduler_type": "student.schedule",
    "num_train_epochs": "student.epochs",
    "num_epochs": "student.epochs",
    "batch_size": "student.global_batch_sequences for a step, student.micro_batch_sequences or "
    "teacher.batch_sequences for a forward pass",
    "train_batch_size": "student.global_batch_sequences",
    "per_device_train_batch_size": "student.micro_batch_sequences",
    "micro_batch_size": "student.micro_batch_sequences",
    "train_micro_batch_size_per_gpu": "student.micro_batch_sequences",
    "per_device_eval_batch_size": "evaluate.batch_sequences",
    "gradient_accumulation_steps": "student.global_batch_sequences, the sequences in one step "
    "over all ranks, from which it follows",
    "max_grad_norm": "student.gradient_clip",
    "gradient_clipping": "student.gradient_clip",
    "adam_beta1": "student.betas",
    "adam_beta2": "student.betas",
    "gradient_checkpointing": "student.activation_checkpointing",
    "deepspeed": "student.zero_stage",
    "world_size": "student.num_workers",
    "save_steps": "student.checkpoint_every_steps",
    "save_total_limit": "student.keep_checkpoints",
    "dataloader_prefetch_factor": "student.prefetch_batches",
    "loss_type": "student.divergence",
    "beta": "student.mix",
    "alpha": "student.mix or student.divergence_weight",
    "top_k": "target.k",
    "report_to": "tracking.wandb",
    "wandb_project": "tracking.project",
    "wandb_entity": "tracking.entity",
    "output_dir": "the option --run-dir",
    "run_name": "the option --run-dir, whose last part names the run",
    "resume_from_checkpoint": "nothing: the same command goes on from the newest checkpoint",
    "logging_steps": "nothing: every step is journalled",
    "eval_steps": "nothing: the student is scored at the end, and by `stillhouse eval`",
    "eval_strategy": "nothing: the student is scored at the end, and by `stillhouse eval`",
    "evals_per_epoch": "nothing: the student is scored at the end, and by `stillhouse eval`",
    "load_best_model_at_end": "nothing: `stillhouse export` writes the newest checkpoint",
    "save_strategy": "student.checkpoint_every_steps",
    "saves_per_epoch": "student.checkpoint_every_steps",
    "logging_strategy": "nothing: every step is journalled",
    "logging_dir": "nothing: the journal is in the directory of --run-dir",
    "log_level": "the option --log-level, before the verb",
    "push_to_hub": "nothing: `stillhouse push` sends the student to the hub",
    "hub_model_id": "nothing: `stillhouse push` sends the student to the hub",
    "wandb_run_id": "tracking.run_id",
    "wandb_watch": "nothing: loss and gradient norm of every step are tracked",
    "wandb_mode": "tracking.wandb",
    # the optimiser and its schedule
    "optim": "student.optimiser, whose form student.fused_adamw and student.offload choose",
    "optimizer": "student.optimiser, whose form student.fused_adamw and student.offload choose",
    "offload_optimizer": "student.offload",
    "nvme_path": "student.offload_path",
    "adam_epsilon": "nothing: AdamW's epsilon is 1e-8",
    "lr_scheduler": "student.schedule",
    "lr_scheduler_kwargs": "student.min_learning_rate and student.decay_steps",
    "clip_grad": "student.gradient_clip",
    "stage": "student.zero_stage",
    "fsdp": "student.zero_stage, which at 3 divides weights, gradients and Adam's states",
    "fsdp_config": "student.zero_stage, which at 3 divides weights, gradients and Adam's states",
    "activation_checkpointing_kwargs": "student.activation_checkpointing",
    "gradient_checkpointing_kwargs": "student.activation_checkpointing",
    "ddp_timeout": "student.watchdog_s",
    "use_liger_kernel": "student.liger, the head and the loss are fused in any case",
    "attn_implementation": "nothing: the fastest attention that keeps packed documents apart",
    "flash_attention": "nothing: the fastest attention that keeps packed documents apart",
    # models and their processes
    "model_init_kwargs": "the settings of the sections teacher and student, such as student.dtype",
    "teacher_model_init_kwargs": "the settings of the section teacher, such as teacher.dtype",
    "teacher_model_revision": "teacher.revision",
    "tokenizer_name": "student.tokenizer",
    "tokenizer_name_or_path": "student.tokenizer",
    "use_cpu": "teacher.device and student.device",
    "nproc_per_node": "student.num_workers",
    "num_processes": "student.num_workers",
    # data
    "data_seed": "corpus.seed",
    "train_dataset": "corpus.dataset",
    "train_file": "corpus.dataset",
    "train_split": "corpus.split",
    "dataset_split": "corpus.split",
    "val_set_size": "corpus.heldout_sequences, a number of sequences",
    "test_split_size": "corpus.heldout_sequences, a number of sequences",
    "pad_to_sequence_len": "corpus.packing, which pads where it is false",
    "padding_free": "corpus.packing, without padding",
    "dataset_prepared_path": "nothing: tokenised corpora are kept in the cache directory",
    "train_on_inputs": "nothing: of a chat, the assistant's turns alone are targets",
    "assistant_only_loss": "nothing: of a chat, the assistant's turns alone are targets",
    # the loss of a distillation
    "kd_alpha": "student.divergence_weight",
    "kd_ce_alpha": "student.ce_weight",
    "kd_temperature": "target.temperature",
    "distill_temperature": "target.temperature",
    "logprobs": "target.k",
    # what there is not
    "do_train": "the verb, `stillhouse run` or `stillhouse train`",
    "do_eval": "the verb `stillhouse eval`",
    "dataloader_num_workers": "student.prefetch_batches, the batches that are read ahead",
    "remove_unused_columns": "nothing: corpus.column alone is read",
    "group_by_length": "nothing: documents are packed into sequences of one length",
    "label_smoothing_factor": "nothing: the teacher's distribution is the target",
    "chat_template": "corpus.chat_template",
    "lora_r": "student.lora.rank",
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "lora_target_modules": "student.lora.targets",
    "target_modules": "student.lora.targets",
    "peft_config": "student.lora",
    "use_peft": "student.lora",
    "unfrozen_parameters": "student.freeze, the names of what is not trained",
    "adapter": "student.lora",
    "load_in_4bit": "student.lora.quantise, of the weights beside adapters",
    "load_in_8bit": "teacher.dtype and student.dtype, of which none is quantised",
}

# Other names for the values of settings that allow a few values only.
_SHORT: Mapping[str, str] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "gpu": "cuda",
    "kl": "forward_kl",
    "kld": "forward_kl",
    "fkl": "forward_kl",
    "rkl": "reverse_kl",
    "js": "jsd",
    "disabled": "off",
    "none": "off",
    "messages": "chat",
}

_OTHER_VERBS: Mapping[str, str] = {
    "distil": "run",
    "distill": "run",
    "start": "run",
    "launch": "run",
    "resume": "run",
    "continue": "run",
    "validate": "check",
    "plan": "check",
    "teach": "produce",
    "generate": "produce",
    "fit": "train",
    "finetune": "train",
    "evaluate": "eval",
    "score": "eval",
    "save": "export",
    "ls": "store ls",
    "verify": "store verify",
    "sweep": "store sweep",
    "head": "node head",
    "join": "node join",
}

_MANY = 12  # names beyond which a list of all of them hides the one that is looked for
_LITERALS = {"True": "true", "False": "false"}


def setting(name: str, *, section: str, known: Mapping[str, Collection[str]]) -> str:
    """Which setting was meant by `name` in a section, in words.

    `known` has the settings of each section, and under '' the names of the sections.
    """
    if name in ELSEWHERE:
        return f"here it is {ELSEWHERE[name]}"
    homes = [f"'{other}.{name}'" for other in known if other and name in known[other]]
    if homes:
        return f"did you mean {' or '.join(homes)}?"
    here = known.get(section, ())
    near = difflib.get_close_matches(name, here, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    if len(here) <= _MANY:
        return f"known here: {', '.join(here)}"
    nearest = ", ".join(difflib.get_close_matches(name, here, n=5, cutoff=0.0))
    return f"the nearest of {len(here)} that are known here: {nearest}"


def value(found: str, allowed: Collection[str]) -> str:
    """Which of the allowed values was meant by `found`, in words behind a semicolon; '' where none
    is similar."""
    name = _SHORT.get(found.lower())
    if name not in allowed:
        near = difflib.get_close_matches(found.lower(), allowed, n=1, cutoff=0.5)
        name = near[0] if near else None
    return f"; did you mean '{name}'?" if name else ""


def verb(found: str, known: Collection[str]) -> str:
    """Which command was meant, in words."""
    other = _OTHER_VERBS.get(found)
    near = [other] if other else difflib.get_close_matches(found, known, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Known are {', '.join(known)}."


def toml(text: str, complaint: str) -> str:
    """How to make TOML of a text that is none, in words behind a semicolon; '' where that is not
    known. `complaint` is the parser's error."""
    # Another format.
    lines = text.splitlines()
    settings = (line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    first = next(settings, "")
    is_json = first.lstrip().startswith("{")
    if is_json or re.match(r"---|[\w-]+:(\s|$)", first):
        return (
            f"; this is {'JSON' if is_json else 'YAML'}: write a section as [student], and below "
            "it a setting as learning_rate = 1e-4"
        )

    # A text without quotes, at the line of which the parser complains.
    at = re.search(r"at line (\d+)", complaint)
    line = lines[int(at[1]) - 1] if at else ""
    bare = re.match(r"\s*([\w.-]+)\s*=\s*([A-Za-z/~.][^'\"#]*)", line)
    if bare is None:
        return ""
    name, word = bare[1], bare[2].strip()
    if word in _LITERALS:
        return f"; write {_LITERALS[word]} in small letters"
    return f"; quote text, as in '{name} = \"{word}\"'"
