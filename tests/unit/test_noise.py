"""TorchNoise against torch itself, and against values published elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd.sampling.noise import TorchNoise

SEEDS = st.integers(0, 2**64 - 1)
# torch's own kernels differ by 2.3e-6: AVX2 machines are within 5e-7 of us, others round their sine otherwise
TOLERANCE = 3e-6


def torch_draws(seed: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float32).numpy() for shape in shapes]


def assert_equals_torch(seed: int, shapes: list[tuple[int, ...]]) -> None:
    torch = pytest.importorskip("torch")
    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    noise = TorchNoise(seed)
    for expected in torch_draws(seed, shapes):
        actual = noise.normal(expected.shape)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 if vectorised else TOLERANCE)


@given(seed=SEEDS, sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_consecutive_draws_equal_torch_across_both_paths(seed: int, sizes: list[int]) -> None:
    assert_equals_torch(seed, [(size,) for size in sizes])


@pytest.mark.parametrize("size", range(1, 41))
def test_every_size_around_the_vector_width_equals_torch(size: int) -> None:
    assert_equals_torch(1234, [(size,), (size,)])


@pytest.mark.parametrize(
    "shape", [(1, 4, 64, 64), (2, 4, 96, 64), (3, 37), (1, 4, 13, 11), (), (2, 0, 3), (1_000_003,)]
)
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**64 - 1])
def test_shapes_of_latents_equal_torch(shape: tuple[int, ...], seed: int) -> None:
    assert_equals_torch(seed, [shape])


def test_the_spare_scalar_normal_survives_a_vectorised_draw_as_in_torch() -> None:
    assert_equals_torch(3, [(1,), (16,), (1,), (1,), (33,), (0,), (2,)])


@given(seed=st.integers(0, 2**32 - 1), high=st.integers(1, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_only_the_low_32_bits_of_the_seed_count_as_in_torch(seed: int, high: int) -> None:
    wide = seed + high * 2**32
    assert_equals_torch(wide, [(17,)])
    np.testing.assert_array_equal(TorchNoise(wide).normal((17,)), TorchNoise(seed).normal((17,)))


def test_known_values_without_torch() -> None:
    # torch 2.13: torch.manual_seed(0); torch.randn(2), also seen throughout PyTorch's documentation
    np.testing.assert_allclose(TorchNoise(0).normal((2,)), [1.5409961, -0.2934289], rtol=0, atol=1e-6)
    # torch 2.13: torch.randn(4, 5, generator=torch.Generator().manual_seed(42)), first and last (re-drawn) row
    values = TorchNoise(42).normal((4, 5))
    np.testing.assert_allclose(
        values[0], [1.9269153, 1.4872841, 0.9007172, -2.1055210, -0.7581311], rtol=0, atol=TOLERANCE
    )
    np.testing.assert_allclose(
        values[3], [0.8598585, -0.3097268, -0.3957105, 0.8034093, -0.6215954], rtol=0, atol=TOLERANCE
    )


def test_words_are_those_of_the_mt19937_standard() -> None:
    # ISO C++ [rand.predef]: the 10000th word of a default-constructed std::mt19937 (seed 5489) is 4123659995
    noise = TorchNoise(5489)
    assert int(noise._bits.random_raw(10_000)[-1]) == 4123659995


def test_values_are_standard_normal() -> None:
    values = TorchNoise(7).normal((1_000_000,)).astype(np.float64)
    assert abs(values.mean()) < 4e-3
    assert abs(values.std() - 1) < 4e-3
    assert np.isfinite(values).all()


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64])
def test_seeds_out_of_range_are_rejected(seed: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        TorchNoise(seed)


def test_a_seed_that_is_no_integer_is_rejected() -> None:
    with pytest.raises(TypeError):
        TorchNoise(1.5)  # type: ignore[arg-type]


def test_a_negative_dimension_is_rejected() -> None:
    with pytest.raises(ValueError, match="negative"):
        TorchNoise(0).normal((2, -3))
