"""Names of settings in TRL, verl, prime-rl and others, from which errors suggest ours."""

from itertools import chain
from typing import Final

_GROUP_SIZE = ("num_generations", "n", "rollout_n", "group_size", "rollouts_per_example", "n_samples_per_prompt")
"""Elsewhere all samples of a prompt are trained on. Here that is two settings of the same value."""

FIELD_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "learner.learning_rate": ("lr",),
    "learner.schedule": ("lr_scheduler_type", "scheduler", "lr_scheduler"),
    "learner.warmup_steps": ("lr_warmup_steps", "warmup_ratio", "num_warmup_steps"),
    "learner.max_grad_norm": ("grad_clip", "clip_grad", "max_norm"),
    "learner.steps": ("max_steps", "total_training_steps", "total_steps", "num_train_steps", "total_epochs"),
    "learner.groups_per_step": ("train_batch_size", "batch_size", "rollout_batch_size", "ppo_mini_batch_size"),
    "learner.tokens_per_micro_batch": (
        "per_device_train_batch_size",
        "micro_batch_size",
        "ppo_micro_batch_size",
        "ppo_micro_batch_size_per_gpu",
        "ppo_max_token_len_per_gpu",
    ),
    "learner.activation_checkpointing": ("gradient_checkpointing", "enable_gradient_checkpointing"),
    "learner.checkpoint_every": ("save_steps", "save_freq", "ckpt_interval"),
    "learner.keep_checkpoints": ("save_total_limit", "max_actor_ckpt_to_keep"),
    "learner.lora.rank": ("lora_r", "lora_rank"),
    "learner.lora.alpha": ("lora_alpha",),
    "learner.loss.kind": ("loss_type", "adv_estimator", "loss_mode", "algorithm"),
    "learner.loss.kl_weight": ("beta", "kl_coef", "kl_beta", "kl_loss_coef"),
    "learner.loss.clip_low": ("epsilon", "clip_ratio", "clip_ratio_low", "cliprange", "eps_clip"),
    "learner.loss.clip_high": ("epsilon_high", "clip_ratio_high"),
    "learner.loss.entropy_weight": ("entropy_coeff", "entropy_coef"),
    "learner.loss.aggregate": ("loss_agg_mode",),
    "learner.loss.normalise_advantage": ("scale_rewards", "norm_adv_by_std_in_grpo"),
    "learner.loss.importance_high": ("tis_imp_ratio_cap", "imp_ratio_cap", "vllm_importance_sampling_cap"),
    "learner.loss.overlong_filter": ("mask_truncated_completions",),
    "shaping.keep": _GROUP_SIZE,
    "shaping.launch": _GROUP_SIZE,
    "shaping.overcommit": ("oversampling_factor",),
    "staleness.max_staleness": (
        "max_off_policy_steps",
        "max_async_level",
        "async_level",
        "max_head_offpolicyness",
        "staleness_threshold",
        "max_policy_lag",
    ),
    "sampling.max_new_tokens": (
        "max_completion_length",
        "max_response_length",
        "max_tokens",
        "response_length",
        "max_completion_tokens",
    ),
    "prompts.max_prompt_tokens": ("max_prompt_length",),
    "prompts.path": ("train_files", "dataset_name", "dataset", "train_dataset", "data"),
    "prompts.held_out_path": ("val_files", "eval_dataset"),
    "prompts.subset": ("dataset_config", "dataset_config_name"),
    "prompts.split": ("dataset_train_split", "dataset_split"),
    "prompts.held_out_split": ("dataset_test_split",),
    "model.path": ("model_name_or_path", "model_name", "model_path"),
    "reward.function": ("reward_function", "custom_reward_function", "reward_fn"),
    "reward.functions": ("reward_funcs", "reward_weights"),
    "generator.vllm.tensor_parallel_size": ("tp", "vllm_tensor_parallel_size", "tensor_model_parallel_size"),
    "generator.vllm.gpu_memory_utilization": ("vllm_gpu_memory_utilization",),
    "telemetry.sinks": ("report_to", "logger", "loggers", "log_with", "trackers"),
    "telemetry.wandb.project": ("wandb_project", "project_name"),
    "telemetry.wandb.entity": ("wandb_entity",),
    "evaluation.every_steps": ("eval_steps", "test_freq", "eval_interval"),
    "runs_dir": ("output_dir", "default_local_dir"),
}
"""{our setting: its names elsewhere}"""

OURS: Final = {
    theirs: " and ".join(ours for ours, names in FIELD_NAMES.items() if theirs in names)
    for theirs in chain.from_iterable(FIELD_NAMES.values())
}
"""{a name elsewhere: our setting, or settings}"""
