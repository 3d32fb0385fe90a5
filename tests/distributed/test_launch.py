"""What is checked before training starts, and the configuration that DeepSpeed gets."""

import json
import os

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.utils import z3_leaf_module
from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config

from distributed.tiny import tiny_model
from tilestack.distributed import DistributedConfig, LaunchError, OptimizerConfig, SettingsError, World, launch
from tilestack.distributed.deepspeed_settings import OLD_NAMES, UPDATED_TOGETHER, deepspeed_settings
from tilestack.distributed.expert_parallel import ExpertGroup, split_experts
from tilestack.distributed.world import current_world, take_up_slurm

CPU = torch.device("cpu")


def test_missing_deepspeed_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="pip install 'tilestack"):
        launch.check_deepspeed()


def test_deepspeed_compiles_nothing_when_a_process_joins():
    launch.start(DistributedConfig(engine="deepspeed"))
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


def test_one_process_needs_neither_deepspeed_nor_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert launch.start(DistributedConfig()).world_size == 1


def test_several_processes_of_the_local_engine_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="one process, but 2 were started"):
        launch.start(DistributedConfig(engine="local"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DistributedConfig(zero=4), r"distributed\.zero must be 0, 1, 2 or 3, got 4"),
        (
            lambda: DistributedConfig(timeout=0),
            r"distributed\.timeout must be a finite number of seconds above 0, got 0",
        ),
        (lambda: DistributedConfig(engine="fsdp"), r"distributed\.engine must be .*, got 'fsdp'"),
        (lambda: OptimizerConfig(lr=-1.0), r"optimizer\.lr must be a finite number of at least 0, got -1\.0"),
        (lambda: OptimizerConfig(eps=float("nan")), r"optimizer\.eps must be a finite number"),
        (lambda: OptimizerConfig(beta2=1.0), r"optimizer\.beta2 must be in \[0, 1\), got 1\.0"),
        (lambda: OptimizerConfig(non_finite="ignore"), r"optimizer\.non_finite must be 'stop' or 'skip'"),
    ],
)
def test_wrong_configuration_is_refused_with_its_key(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_our_moe_blocks_are_marked_as_leaves_which_deepspeed_would_not_know():
    from tilestack.distributed.deepspeed_engine import mark_leaf_modules

    model = tiny_model()
    blocks = {layer.mlp for layer in model.model.layers}
    apply_zero_leaf_module_config(model, DeepSpeedZeroLeafModuleConfig())  # DeepSpeed's own list
    assert not any(z3_leaf_module(block) for block in blocks)
    mark_leaf_modules(model)
    assert all(z3_leaf_module(block) for block in blocks)


@pytest.mark.parametrize(
    ("distributed", "said"),
    [
        (DistributedConfig(engine="deepspeed", zero=2, expert_parallel=3), "must divide the number of processes, 8"),
        (DistributedConfig(engine="deepspeed", zero=3, expert_parallel=2), "ZeRO 1 or 2, got distributed.zero = 3"),
        (DistributedConfig(engine="deepspeed", sequence_parallel=3), "processes, 8; --distributed.sequence_parallel 1"),
        (DistributedConfig(engine="deepspeed", expert_parallel=8), "8 must divide the model's 12 experts"),
        (DistributedConfig(engine="deepspeed", sequence_parallel=8), "8 must divide the model's 4 query heads"),
    ],
    ids=["experts", "stage", "rows", "experts of the model", "heads"],
)
def test_a_split_that_cannot_be_is_refused_before_deepspeed_starts(distributed, said):
    from tilestack.distributed.deepspeed_engine import DeepSpeedEngine

    with pytest.raises(SettingsError, match=said):
        DeepSpeedEngine(tiny_model(num_experts=12), OptimizerConfig(), distributed, 1, World(0, 8, CPU))


def test_experts_that_do_not_run_on_our_op_are_not_split():
    model = tiny_model()
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(SettingsError, match="grouped_mm"):
        split_experts(model, ExpertGroup(None, 0, 2, "experts"), chunks=1)


class TestTheDeepSpeedConfiguration:
    @pytest.fixture
    def own(self, tmp_path):
        def write(text):
            path = tmp_path / "own.json"
            path.write_text(text if isinstance(text, str) else json.dumps(text))
            return DistributedConfig(deepspeed_config=str(path))

        return write

    def settings(self, distributed, dtype=torch.float32):
        return deepspeed_settings(distributed, OptimizerConfig(max_grad_norm=0.5), 4, dtype, 2)

    def test_ours_states_what_deepspeed_changed_the_default_of(self):
        settings = self.settings(DistributedConfig(zero=3), torch.bfloat16)
        assert settings["zero_optimization"]["stage"] == 3
        assert settings["gradient_clipping"] == 0.5
        assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True}
        assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
        assert settings["train_batch_size"] == 8

    def test_clipping_that_is_off_is_off_in_deepspeed_too(self):
        optimizer = OptimizerConfig(max_grad_norm=0)
        assert deepspeed_settings(DistributedConfig(), optimizer, 1, torch.float32, 1)["gradient_clipping"] == 0

    def test_auto_in_the_users_file_is_filled_in(self, own):
        written = {
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": False},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        }
        settings = self.settings(own(written))
        assert settings["gradient_accumulation_steps"] == 4
        zero = settings["zero_optimization"]
        assert zero == {"stage": 1, "overlap_comm": False, "sub_group_size": UPDATED_TOGETHER}
        assert settings["optimizer"]["params"] == {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}

    @pytest.mark.parametrize(
        "written, message",
        [
            ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2, tilestack's has 4"),
            ({"gradient_clipping": 1.0}, r"gradient_clipping=1\.0, tilestack's has 0\.5"),
            ({"bf16": {"enabled": True}}, r"bf16\.enabled=True, tilestack's has False"),
            ({"optimizer": {"params": {"lr": 1.0}}}, r"optimizer\.params\.lr=1\.0, tilestack's has 0\.0003"),
            ({"scheduler": {"type": "WarmupLR"}}, "remove 'scheduler'"),
            ({"fp16": {"enabled": True}}, "remove 'fp16'"),
            ([], "must hold a JSON object, got list"),
            ("{", "is not JSON"),
            ({"zero_optimization": True}, r"zero_optimization must be an object, .* got True"),
            ({"zero_optimization": {"offload_optimizer": "cpu"}}, r"offload_optimizer must be an object, .* got 'cpu'"),
            ({"optimizer": "AdamW"}, r"optimizer must be an object, .* got 'AdamW'"),
            ({"bfloat16": {"enabled": True}}, 'bfloat16 is an old name of DeepSpeed\'s; write "bf16"'),
            (
                {"zero_optimization": {"stage": 2, "cpu_offload": True}},
                r'zero_optimization\.cpu_offload is an old name .*; write "offload_optimizer": {"device": "cpu"}',
            ),
        ],
    )
    def test_a_file_that_contradicts_is_refused(self, own, written, message):
        with pytest.raises(ValueError, match=message):
            self.settings(own(written))

    def test_names_that_deepspeed_has_given_up_are_known(self):
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        fields = DeepSpeedZeroConfig.model_fields.items()
        old = {name for name, field in fields if (field.json_schema_extra or {}).get("deprecated")}
        assert {key[1] for key in OLD_NAMES if len(key) > 1} == old

    @pytest.mark.parametrize("change", [{"moments": "8bit"}, {"moments": "bfloat16"}, {"master_weights": False}])
    def test_a_file_that_offloads_is_refused_with_states_that_are_not_updated_on_the_host(self, own, change):
        def settings(device, **change):
            distributed = own({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": device}}})
            return deepspeed_settings(distributed, OptimizerConfig(**change), 1, torch.bfloat16, 2)

        ((key, value),) = change.items()
        with pytest.raises(
            SettingsError, match=rf"device='cpu'.* needs float32 moments.* optimizer\.{key} = '?{value}"
        ):
            settings("cpu", **change)
        assert settings("none", **change)["zero_optimization"]["stage"] == 2
        assert settings("cpu")["zero_force_ds_cpu_optimizer"] is False

    def test_a_stage_that_contradicts_the_file_is_refused(self, own):
        path = own({"zero_optimization": {"stage": 1}}).deepspeed_config
        with pytest.raises(ValueError, match=r"zero_optimization\.stage=1, tilestack's has 3"):
            self.settings(DistributedConfig(zero=3, deepspeed_config=path))

    def test_a_missing_file_is_named(self):
        with pytest.raises(ValueError, match="cannot be read: No such file"):
            self.settings(DistributedConfig(deepspeed_config="no/such.json"))


class TestTasksOfSlurm:
    @pytest.fixture
    def task(self, monkeypatch):
        """Variables of task 5 of 8; what a test changes in the environment is undone."""
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")  # so that it is as before afterwards
            monkeypatch.delenv(name)
        values = {"STEP_NUM_TASKS": 8, "PROCID": 5, "LOCALID": 1, "STEP_NODELIST": "a", "JOB_ID": 70003, "STEP_ID": 2}
        values["STEP_TASKS_PER_NODE"] = "4(x2)"
        for name, value in values.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        return monkeypatch

    @pytest.mark.parametrize(
        ("nodes", "first"),
        [
            ("gpu[003-006,009],big1", "gpu003"),
            ("node-a,node-b", "node-a"),
            ("node-7", "node-7"),
            ("n[2,4]-ib", "n2-ib"),
            ("a[1-2],b[3-4]", "a1"),
        ],
    )
    def test_they_meet_on_the_first_node(self, task, nodes, first):
        task.setenv("SLURM_STEP_NODELIST", nodes)
        take_up_slurm()
        assert os.environ["MASTER_ADDR"] == first
        assert current_world() == World(5, 8, CPU)
        assert (os.environ["LOCAL_RANK"], os.environ["MASTER_PORT"]) == ("1", "20005")
        assert os.environ["LOCAL_WORLD_SIZE"] == "4"

    def test_a_list_that_cannot_be_read_is_said_with_what_to_set(self, task):
        task.setenv("SLURM_STEP_NODELIST", "rack[1-2]n[1-4]")
        with pytest.raises(LaunchError, match="export MASTER_ADDR="):
            take_up_slurm()

    def test_where_to_meet_may_be_given(self, task):
        task.setenv("SLURM_STEP_NODELIST", "rack[1-2]n[1-4]")
        task.setenv("MASTER_ADDR", "head")
        take_up_slurm()
        assert os.environ["MASTER_ADDR"] == "head" and current_world().rank == 5

    def test_torchrun_inside_a_task_has_the_say(self, task):
        task.setenv("RANK", "0")
        take_up_slurm()
        assert "WORLD_SIZE" not in os.environ

    def test_a_batch_script_without_srun_is_one_process(self, task):
        task.delenv("SLURM_STEP_NUM_TASKS")
        task.setenv("SLURM_NTASKS", "8")
        take_up_slurm()
        assert current_world().world_size == 1
