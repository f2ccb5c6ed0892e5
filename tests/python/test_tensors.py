"""bf16 conversion: the rounding rule at the places where it is easily wrong."""

import numpy as np
import pytest

from kvservice.tensors import from_bf16, to_bf16

ROUNDING = [
    # float32 bits, bf16 bits, why
    (0x3F800000, 0x3F80, "exact"),
    (0x00000000, 0x0000, "zero"),
    (0x80000000, 0x8000, "minus zero"),
    (0x3F807FFF, 0x3F80, "just below the tie"),
    (0x3F808000, 0x3F80, "tie goes to the even neighbour below"),
    (0x3F818000, 0x3F82, "tie goes to the even neighbour above"),
    (0x3F808001, 0x3F81, "just above the tie"),
    (0xBF818000, 0xBF82, "ties do not look at the sign"),
    (0x3FFFFFFF, 0x4000, "carries into the exponent"),
    (0x00000001, 0x0000, "the smallest subnormal vanishes"),
    (0x00008001, 0x0001, "subnormals round too"),
    (0x007FFFFF, 0x0080, "the largest subnormal becomes normal"),
    (0x7F7F7FFF, 0x7F7F, "largest value that stays finite"),
    (0x7F7F8000, 0x7F80, "half a step beyond the largest bf16 is infinity"),
    (0x7F7FFFFF, 0x7F80, "largest float32"),
    (0x7F800000, 0x7F80, "infinity"),
    (0xFF800000, 0xFF80, "minus infinity"),
    (0x7FC00000, 0x7FC0, "quiet NaN"),
    (0x7F800001, 0x7FC0, "NaN whose payload is cut off must not become infinity"),
    (0xFFFFFFFF, 0xFFFF, "NaN that the rounding bias would wrap to zero"),
]


@pytest.mark.parametrize("bits,expected,why", ROUNDING, ids=[row[2] for row in ROUNDING])
def test_rounding(bits, expected, why):
    value = np.array([bits], np.uint32).view(np.float32)
    assert to_bf16(value)[0] == expected, why


def test_every_bf16_survives_the_round_trip():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    back = to_bf16(from_bf16(bits))
    nan = np.isnan(from_bf16(bits))
    np.testing.assert_array_equal(back[~nan], bits[~nan])
    np.testing.assert_array_equal(back[nan], bits[nan] | 0x0040)


def test_rounds_to_the_nearest_of_both_neighbours():
    values = np.random.default_rng(7).standard_normal(4096).astype(np.float32)
    rounded = to_bf16(values)
    error = np.abs(from_bf16(rounded).astype(np.float64) - values)
    for neighbour in (rounded - np.uint16(1), rounded + np.uint16(1)):
        other = np.abs(from_bf16(neighbour).astype(np.float64) - values)
        assert np.all(error <= other)


def test_shape_and_strides():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert to_bf16(values).shape == (2, 3, 4)
    np.testing.assert_array_equal(from_bf16(to_bf16(values.swapaxes(0, 2))), values.swapaxes(0, 2))
    assert to_bf16(np.float32(1.0)).shape == ()


def test_refuses_other_dtypes():
    with pytest.raises(TypeError, match="uint16"):
        from_bf16(np.zeros(3, np.float32))
