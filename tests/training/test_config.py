import pytest
from ml_collections import ConfigDict

from tests.training.toys import get_config
from training import config as configs
from training.errors import UserError


def test_override_replaces_a_copy():
    config = get_config()
    changed = configs.override(config, {"optimizer.learning_rate": 0.5, "seeds": (3, 4)})
    assert changed.optimizer.learning_rate == 0.5
    assert changed.seeds == (3, 4)
    assert config.optimizer.learning_rate == 0.05


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"optimizer.lerning_rate": 1.0}, "optimizer.learning_rate"),
        ({"optimiser.learning_rate": 1.0}, "optimizer.learning_rate"),
        ({"steps.x": 1}, "no key 'steps.x'"),
        ({"batch_size": "many"}, "of type int, not str"),
    ],
)
def test_a_bad_override_names_the_mend(override, message):
    with pytest.raises(UserError, match=message):
        configs.override(get_config(), override)


def test_json_round_trip():
    config = get_config()
    again = configs.from_json(configs.to_json(config))
    assert again == config
    assert configs.differences(configs.to_json(config), again) == []


def test_differences_leave_out_what_changes_no_result():
    stored = configs.to_json(get_config())
    config = configs.override(get_config(), {"wandb.mode": "offline", "batch_size": 64})
    assert configs.differences(stored, config) == ["batch_size: 32 there, 64 now"]


def test_argument_is_typed_by_its_defaults():
    options = configs.parse_argument("n=3,rate=0.5,fast=true", n=1, rate=1.0, fast=False, scale=("cpu", "gpu"))
    assert options == ConfigDict({"n": 3, "rate": 0.5, "fast": True, "scale": "cpu"})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("scal=gpu", "did you mean 'scale'"),
        ("scale=gppu", "did you mean 'gpu'"),
        ("n=three", "of type int"),
        ("fast=1", "true or false"),
        ("n", "write key=value"),
    ],
)
def test_a_bad_argument(argument, message):
    with pytest.raises(UserError, match=message):
        configs.parse_argument(argument, n=1, fast=False, scale=("cpu", "gpu"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Task", "not an import path"),
        ("training.nowhere.Task", "No module named"),
        ("training.task.Tsk", "did you mean 'Task'"),
    ],
)
def test_a_bad_import_path(path, message):
    with pytest.raises(UserError, match=message):
        configs.resolve(path)


def test_build_names_the_nearest_argument():
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        configs.build({"name": "tests.training.toys.DeviceRegression", "batchsize": 3})


def test_differences_of_a_stored_config():
    config = configs.base_config()
    stored = configs.to_json(config)
    assert configs.differences(stored, config) == []
    assert configs.differences(stored.replace('"batch_size": 256', '"batch_size": 8'), config) == [
        "batch_size: 8 there, 256 now"
    ]
    before_the_key_existed = stored.replace('"ema_decay": 0.0,', "")
    assert before_the_key_existed != stored
    assert configs.differences(before_the_key_existed, config) == []
