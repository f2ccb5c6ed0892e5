"""Policies, tensors as messages, and the enums that mirror the API."""

import numpy as np
import pytest

import kvservice
from kvservice.policies import layer_override, make_policy, round_limit
from kvservice.tensors import from_message, to_message
from kvservice.v1 import types_pb2


@pytest.mark.parametrize("limit", [0.05, 0.1, 0.01, 1 / 3, 0.5, 1.0, 1e-9])
def test_a_limit_is_never_rounded_up(limit):
    rounded = round_limit(limit)
    assert rounded <= limit
    assert float(np.nextafter(np.float32(rounded), np.float32(2))) > limit
    assert make_policy("certified", max_dropped_mass=limit).max_dropped_mass == rounded


def test_what_is_left_out_stays_absent():
    policy = make_policy("cpe")
    assert policy.selector == types_pb2.SELECTOR_CPE
    for name in ("budget", "max_dropped_mass", "dense_below_tokens", "layers"):
        assert not policy.HasField(name)


def test_what_is_given_arrives():
    policy = make_policy(
        "certified", top_k_tokens=7, guarantee="exact", on_violation="fail", shadow=True
    )
    assert policy.budget.top_k_tokens == 7 and not policy.budget.HasField("sink_tokens")
    assert policy.guarantee == types_pb2.GUARANTEE_EXACT
    assert policy.on_violation == types_pb2.ON_VIOLATION_FAIL
    assert policy.mode == types_pb2.MODE_SHADOW


def test_confidence_and_output_error_arrive():
    policy = make_policy(
        "certified", guarantee="confidence", failure_probability=1e-6, draws_max=64,
        max_output_error=1 / 3, on_violation="grow",
    )
    assert policy.guarantee == types_pb2.GUARANTEE_CONFIDENCE
    assert policy.failure_probability == 1e-6 and policy.draws_max == 64
    assert policy.max_output_error <= 1 / 3
    assert policy.on_violation == types_pb2.ON_VIOLATION_GROW


def test_calibrated_numbers_arrive():
    policy = make_policy(
        "cpe", top_k_tokens=0, max_dropped_mass_estimate=1 / 3, min_cosine=0.75,
        max_sharing_estimate=2 / 3,
        layers=[
            layer_override(0, 2, "dense"),
            layer_override(2, 30, min_cosine=0.5, kv_head_min_cosines=[0.5, 1.0],
                           hidden_share=0.25, frozen_share=0.0, top_k_tokens=9,
                           psaw_decay_scale=0.5, psaw_decay_rate=0.25, etf_logit_drift=2.0),
        ],
    )
    assert policy.budget.HasField("top_k_tokens") and policy.budget.top_k_tokens == 0
    assert 0.333 < policy.budget.max_dropped_mass_estimate <= 1 / 3
    assert 0.666 < policy.cis.max_dropped_mass_estimate <= 2 / 3
    assert policy.cis.min_cosine == 0.75 and not policy.cis.HasField("anchors_max")
    dense, numbers = policy.layers.overrides
    assert (dense.layer_end, dense.selector) == (2, types_pb2.SELECTOR_DENSE)
    assert not dense.HasField("min_cosine") and not dense.HasField("budget")
    assert numbers.selector == types_pb2.SELECTOR_UNSPECIFIED
    assert numbers.min_cosine == 0.5 and list(numbers.kv_head_min_cosines) == [0.5, 1.0]
    assert numbers.hidden_share == 0.25 and numbers.HasField("frozen_share")
    assert numbers.budget.top_k_tokens == 9
    assert (numbers.psaw_decay_scale, numbers.psaw_decay_rate) == (0.5, 0.25)
    assert numbers.etf_logit_drift == 2.0 and not dense.HasField("etf_logit_drift")
    assert make_policy("cpe", layers=[]).HasField("layers")
    assert make_policy("cpe", seed=False).cis.HasField("seed")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="SELECTOR_GUESS"):
        make_policy("guess")


@pytest.mark.parametrize("dtype,name", [
    (np.float32, types_pb2.DATA_TYPE_FLOAT32),
    (np.float16, types_pb2.DATA_TYPE_FLOAT16),
    (np.uint16, types_pb2.DATA_TYPE_BFLOAT16),
])
def test_tensor_round_trip(dtype, name):
    values = np.arange(24).astype(dtype).reshape(2, 3, 4).swapaxes(0, 1)
    message = to_message(values)
    assert message.dtype == name and list(message.shape) == [3, 2, 4]
    np.testing.assert_array_equal(from_message(message), values)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float64"):
        to_message(np.zeros(3))


@pytest.mark.parametrize("ours,theirs", [
    (kvservice.Level, types_pb2.Level),
    (kvservice.Action, types_pb2.Action),
    (kvservice.Selector, types_pb2.Selector),
])
def test_enums_mirror_the_api(ours, theirs):
    prefix = ours.__name__.upper() + "_"
    assert {prefix + member.name: member.value for member in ours} == dict(theirs.items())
