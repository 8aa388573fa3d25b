"""Where the boosters are trained: nobody is believed, everything is told."""

import warnings

import numpy as np
import pytest
import xgboost

from training import train_gbm
from training.gbm_search import device_of, probe_cuda, probe_lightgbm_opencl
from training.train_gbm import AUTO_CELLS, choose_device
from utils.base import DeviceError, UsageError

LARGE = AUTO_CELLS // 50, 50
SMALL = 1_000, 50


@pytest.fixture
def probed(monkeypatch):
    """Return a chooser of the device on a machine whose probes answer so."""

    def choose(*given, probe, probe_lightgbm=never, **flags):
        monkeypatch.setattr(train_gbm, "probe_cuda", probe)
        monkeypatch.setattr(train_gbm, "probe_lightgbm_opencl", probe_lightgbm)
        return choose_device(*given, **flags)

    return choose


def there() -> None:
    return None


def missing() -> str:
    return "no CUDA device"


def never() -> str:
    raise AssertionError("nobody should have asked")


@pytest.mark.parametrize(
    ("requested", "size", "probe", "device", "words"),
    [
        ("cpu", LARGE, never, "cpu", "asked for"),
        ("auto", SMALL, never, "cpu", "20 million"),
        ("auto", LARGE, there, "cuda", "pays"),
        ("auto", LARGE, missing, "cpu", "no CUDA device"),
        ("cuda", SMALL, there, "cuda", "asked for"),
    ],
)
def test_the_choice_and_its_reason(probed, requested, size, probe, device, words):
    choice = probed(requested, *size, probe=probe)
    assert choice.device == device
    assert words in choice.reason


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_a_required_gpu_that_is_missing_is_an_error_that_names_the_remedy(probed, requested):
    with pytest.raises(DeviceError, match=r"no CUDA device.*--device cpu") as caught:
        probed(requested, *SMALL, require_gpu=True, probe=missing)
    assert caught.value.exit_code == 9


def test_cuda_falls_back_only_when_allowed(probed):
    with pytest.raises(DeviceError, match="--allow-cpu-fallback"):
        probed("cuda", *SMALL, probe=missing)
    choice = probed("cuda", *SMALL, allow_cpu_fallback=True, probe=missing)
    assert choice.device == "cpu"
    assert "no CUDA device" in choice.reason


def test_a_required_gpu_is_used_whatever_the_size(probed):
    assert probed("auto", *SMALL, require_gpu=True, probe=there).device == "cuda"


@pytest.mark.parametrize(("requested", "fallback"), [("cpu", False), ("cuda", True), ("auto", True)])
def test_contradicting_wishes_are_refused(probed, requested, fallback):
    with pytest.raises(UsageError, match="contradict") as caught:
        probed(requested, *SMALL, require_gpu=True, allow_cpu_fallback=fallback, probe=never)
    assert caught.value.exit_code == 2


def test_the_probe_believes_the_booster_and_not_the_silence(monkeypatch):
    """Planted: a library that takes ``device='cuda'`` and trains on the CPU, as XGBoost does."""
    train = xgboost.train

    def on_cpu(params, *args, **kwargs):
        return train({**params, "device": "cpu"}, *args, **kwargs)

    monkeypatch.setattr(xgboost, "train", on_cpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "XGBoost" in str(probe_cuda())


def test_the_probe_tells_an_error_of_the_library(monkeypatch):
    def fail(*args, **kwargs):
        raise xgboost.core.XGBoostError("driver too old\nstack")

    monkeypatch.setattr(xgboost, "train", fail)
    assert str(probe_cuda()).endswith("driver too old")


def test_the_probes_answer_on_this_machine_without_noise(capfd):
    for probe in (probe_cuda, probe_lightgbm_opencl):
        answer = probe()
        assert answer is None or answer
    assert "WARNING" not in capfd.readouterr().err


@pytest.mark.gpu
def test_a_booster_trained_on_the_gpu_serves_on_the_cpu():
    if (answer := probe_cuda()) is not None:
        pytest.skip(answer)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5_000, 20)).astype(np.float32)
    target = rows[:, 0] + rng.normal(size=5_000)
    params = {"device": "cuda", "tree_method": "hist", "max_depth": 4}
    booster = xgboost.train(params, xgboost.DMatrix(rows, target), num_boost_round=50)
    assert device_of(booster).startswith("cuda")
    there_ = booster.predict(xgboost.DMatrix(rows))
    booster.set_param({"device": "cpu"})
    np.testing.assert_allclose(booster.inplace_predict(rows), there_, atol=1e-5)


def test_without_xgboost_there_is_nothing_to_decide(probed):
    choice = probed("cuda", *LARGE, models=("lgb",), probe=never)
    assert (choice.device, "XGBoost" in choice.reason) == ("cpu", True)
    with pytest.raises(UsageError, match="only XGBoost"):
        probed("auto", *LARGE, models=("lgb", "cat"), require_gpu=True, probe=never)


@pytest.mark.parametrize(("answer", "words"), [("no OpenCL device", "no OpenCL device"), (None, "order")])
def test_the_reason_tells_why_lightgbm_stays_on_the_cpu(probed, answer, words):
    def lightgbm_says() -> str | None:
        return answer

    choice = probed("cuda", *SMALL, models=("xgb", "lgb"), probe=there, probe_lightgbm=lightgbm_says)
    assert "LightGBM stays on the CPU" in choice.reason
    assert words in choice.reason
