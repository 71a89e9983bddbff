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

# This package has a part in what they do.
WORKING = {
    "test_trainer.py::test_a_step_is_the_literal_step": "per_device_train_batch_size learning_rate "
    "gradient_accumulation_steps num_train_epochs lr_scheduler_type warmup_steps optim "
    "max_grad_norm label_smoothing_factor",
    "test_trainer.py::test_a_resumed_run_ends_as_an_uninterrupted_one": "output_dir save_strategy "
    "save_steps save_total_limit",
    "test_trainer_features.py::test_a_compiled_model_learns_the_same": "torch_compile "
    "torch_compile_backend torch_compile_mode",
    "test_trainer_features.py::test_noise_on_the_embeddings_is_of_training_alone": (
        "neftune_noise_alpha"
    ),
    "test_trainer_features.py::test_tokens_are_counted": "include_num_input_tokens_seen",
    "test_trainer_features.py::test_a_batch_that_fits_is_found": "auto_find_batch_size",
    "test_trainer_features.py::test_reporters_that_are_not_there": "report_to",
    "test_trainer_features.py::test_the_command_names_what_it_cannot_hand_on": "push_to_hub "
    "hub_model_id",
    "test_arguments.py::test_the_seed_of_the_rows": "seed data_seed",
    "test_batches.py::test_rows_of_about_one_length_share_a_batch": "train_sampling_strategy "
    "group_by_length",
    "test_arguments.py::test_arguments_that_are_set_later_are_checked_too": "dataloader_drop_last",
    "test_arguments.py::test_arguments_without_effect_are_refused": "accelerator_config "
    "parallelism_config",
    "test_arguments.py::test_the_columns_of_a_batch_are_kept": "remove_unused_columns",
    "test_runs.py::test_autocast_and_recomputation_on_a_cpu": "bf16 activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs use_cpu",
    "test_runs.py::test_a_run_ends_at_the_first_loss_that_is_not_finite": "logging_nan_inf_filter",
    "test_logs.py::test_after_a_resume": "logging_strategy logging_steps logging_first_step",
    "test_logs.py::test_of_two_processes": "average_tokens_across_devices ddp_backend local_rank",
    "test_evaluation_in_training.py::test_losses_and_metrics_are_those_of_the_logits": (
        "per_device_eval_batch_size prediction_loss_only"
    ),
    "test_evaluation_in_training.py::test_the_best_model_is_loaded_at_the_end": "eval_strategy "
    "eval_steps load_best_model_at_end metric_for_best_model greater_is_better",
    "test_stopping.py::test_a_large_set_is_looked_at_in_part_and_decided_on_whole": "max_steps",
    "../distributed/test_training.py::test_the_losses_of_one_process": "fsdp fsdp_config",
}
"""By the test that shows it."""

# `Trainer` does it whatever the loss is; that it does is looked up before a name joins.
HANDED_THROUGH = {
    "the optimizer and its schedule": "lr_scheduler_kwargs optim_args optim_target_modules "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon",
    "precision, memory and speed": "fp16 tf32 use_liger_kernel liger_kernel_config "
    "torch_empty_cache_steps skip_memory_metrics full_determinism",
    "logs": "log_on_each_node log_level log_level_replica disable_tqdm run_name project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id debug",
    "files": "save_only_model save_on_each_node enable_jit_checkpoint ignore_data_skip "
    "restore_callback_states_from_checkpoint",
    "the Hub": "hub_token hub_private_repo hub_strategy hub_always_push hub_revision",
    "how batches are read": "dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context "
    "dataloader_in_order",
    "several processes": "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_timeout deepspeed",
    "evaluation": "eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object "
    "eval_accumulation_steps include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval",
    "read by scripts alone, as Hugging Face says": "do_train do_eval do_predict "
    "resume_from_checkpoint",
}
"""By what it is about."""


def test_every_argument_works_is_handed_through_or_is_refused() -> None:
    """Each is in one list: a field that is new in transformers has to join one."""
    listed = [
        *(name for names in WORKING.values() for name in names.split()),
        *(name for names in HANDED_THROUGH.values() for name in names.split()),
        *REFUSED_ARGUMENTS,
    ]
    assert len(listed) == len(set(listed))
    installed = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert installed - set(listed) == set()


@pytest.mark.parametrize("where", WORKING)
def test_what_works_has_its_test(where: str) -> None:
    file, name = where.split("::")
    assert f"def {name}(" in (Path(__file__).parent / file).read_text()


def test_the_columns_of_a_batch_are_kept(tmp_path: Path) -> None:
    assert not arguments(tmp_path, remove_unused_columns=True).remove_unused_columns


def test_every_option_is_handed_on_or_refused() -> None:
    installed = set(inspect.signature(Trainer.__init__).parameters) - {"self", "model", "args"}
    assert installed == set(ACCEPTED_OPTIONS) | REFUSED_OPTIONS.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sampling_strategy": "sequential"}, "'random' or 'group_by_length' here, got 'seq"),
        ({"length_column_name": "n"}, "length_column_name would have no effect.*of the rows"),
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
