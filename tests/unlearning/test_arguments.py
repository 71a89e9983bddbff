"""No argument of Hugging Face's Trainer is silently without effect."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from tests.support.tiny_models import make_model, one_thread
from tests.unlearning.tiny_trainer import arguments, make_trainer
from unilogit_kernels.unlearning.arguments import (
    ACCEPTED_OPTIONS,
    REFUSED_ARGUMENTS,
    REFUSED_OPTIONS,
)
from unilogit_kernels.unlearning.data import PairSampler

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

# What each of them does is looked up before it joins: `Trainer` does it whatever the loss is, or
# this package does it itself.
WORKING = {
    "steps and their size": "per_device_train_batch_size num_train_epochs max_steps learning_rate "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps gradient_accumulation_steps max_grad_norm "
    "average_tokens_across_devices auto_find_batch_size",
    "the optimizer": "optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon",
    "precision, memory and speed": "bf16 fp16 tf32 activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config "
    "torch_empty_cache_steps skip_memory_metrics use_cpu",
    "the model's forward": "neftune_noise_alpha",
    "logs": "logging_strategy logging_steps logging_first_step log_on_each_node "
    "logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm "
    "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id debug",
    "files": "output_dir save_only_model save_strategy save_steps save_on_each_node "
    "save_total_limit enable_jit_checkpoint ignore_data_skip "
    "restore_callback_states_from_checkpoint",
    "the Hub": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision",
    "rows": "seed data_seed full_determinism dataloader_drop_last dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order",
    "several processes": "accelerator_config parallelism_config ddp_find_unused_parameters "
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp "
    "fsdp_config deepspeed local_rank",
    "evaluation": "eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches "
    "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
    "prediction_loss_only bf16_full_eval fp16_full_eval load_best_model_at_end "
    "metric_for_best_model greater_is_better per_device_eval_batch_size",
    "of this package": "remove_unused_columns label_smoothing_factor",
    "read by scripts alone, as Hugging Face says": "do_train do_eval do_predict "
    "resume_from_checkpoint",
}


def test_every_argument_works_or_is_refused() -> None:
    working = set(" ".join(WORKING.values()).split())
    installed = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not working & REFUSED_ARGUMENTS.keys()
    assert installed - working - REFUSED_ARGUMENTS.keys() == set()


def test_every_option_is_handed_on_or_refused() -> None:
    installed = set(inspect.signature(Trainer.__init__).parameters) - {"self", "model", "args"}
    assert installed == set(ACCEPTED_OPTIONS) | REFUSED_OPTIONS.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy would.*data_seed"),
        ({"label_names": ["targets"]}, "label_names would have no effect.*`labels`"),
        ({"use_cache": True}, "use_cache would have no effect"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches must not be True"),
        ({"forget_weight": float("nan")}, "forget_weight must be a finite number, got nan"),
        ({"check_steps": 0}, "check_steps must be at least 1, got 0"),
        ({"label_smoothing_factor": 1.1}, "label_smoothing_factor must be at most 1, got 1.1"),
        ({"z_loss": -1.0}, "z_loss must be at least 0, got -1.0"),
        *(
            ({name: 0.1, "retain_loss": "kl"}, f"^{name} would have no effect with retain_loss")
            for name in ("label_smoothing_factor", "z_loss")
        ),
        *(
            ({name: value}, f"^{name} would have no effect without dual_step_size, got {value!r}")
            for name, value in (
                ("retain_loss_target", 0.5),
                ("dual_warmup_epochs", 1),
                ("dual_update", "epoch"),
            )
        ),
        ({"dual_step_size": 1.0, "dual_update": "batch"}, "one of step, epoch, got 'batch'"),
        ({"dual_step_size": -1.0}, "dual_step_size must be at least 0"),
        ({"dual_step_size": 1.0, "dual_warmup_epochs": 1}, "^dual_step_size would have no effect"),
        ({"dual_step_size": 1.0, "dual_update": "epoch"}, "after the 1 epochs of this run"),
    ],
)
def test_arguments_without_effect_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_arguments_that_are_set_later_are_checked_too(tmp_path: Path) -> None:
    for name, value, message in (
        ("label_names", ["targets"], "label_names would have no effect"),
        ("label_smoothing_factor", 2.0, "label_smoothing_factor must be at most 1, got 2.0"),
        ("dual_warmup_epochs", 3, "dual_warmup_epochs would have no effect"),
    ):
        args = arguments(tmp_path)
        setattr(args, name, value)
        with pytest.raises(ValueError, match=message):
            make_trainer(make_model(), args)
    args = arguments(tmp_path, per_device_train_batch_size=4, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="would drop all of the 3 forget rows"):
        make_trainer(make_model(), args)
    with pytest.raises(ValueError, match="fsdp would have no effect here"):
        make_trainer(make_model(), arguments(tmp_path, fsdp="full_shard", use_cpu=True))


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ("compute_loss_func", ValueError, "compute_loss_func has no place here; the loss is"),
        ("preprocess_logits_for_metrics", ValueError, "has no place here; there are no logits"),
        ("model_init", ValueError, "pass it as model"),
        ("data_collator", ValueError, "data_collator has no place here"),
        ("calbacks", TypeError, "no option 'calbacks'; it hands on callbacks, optimizers"),
    ],
)
def test_options_without_effect_are_refused(
    tmp_path: Path, option: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(make_model(), arguments(tmp_path), **{option: lambda *_: None})


def test_hugging_face_smooths_nothing(tmp_path: Path) -> None:
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    assert make_trainer(make_model(), args).label_smoother is None


def test_an_evaluation_needs_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer(make_model(), arguments(tmp_path, eval_strategy="steps"))


def test_the_seed_of_the_rows(tmp_path: Path) -> None:
    trainer = make_trainer(make_model(), arguments(tmp_path, seed=1, data_seed=7))
    sampler = trainer._get_train_sampler()
    assert list(sampler) == list(PairSampler(trainer._pairs, 1, 7))
    assert list(sampler) != list(PairSampler(trainer._pairs, 1, 1))
