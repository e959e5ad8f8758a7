"""Updates on their way (codecs), many to one (fold), how a version moves (transforms), and what lateness costs."""

from __future__ import annotations

import threading
import warnings
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.aggregation.fold import HELD, Accumulator, Weighted
from raypipe.aggregation.global_model import GlobalModel
from raypipe.aggregation.transforms import apply, server_memory, transforms
from raypipe.coordinator.staleness import staleness
from raypipe.errors import ConfigError, RunError, UpdateRejected
from raypipe.types import Layout, Role
from raypipe.update.codec import Context, chain, codecs, decode_chain, encode_chain, encoded_bytes


def layout(shared: int = 1000, statistic: int = 20, other: int = 5) -> Layout:
    tensors = [("w", (shared,), "float32", Role.SHARED), ("var", (statistic,), "float32", Role.STATISTIC)]
    rest = [("f", (other,), "float32", Role.FROZEN), ("l", (other,), "float32", Role.LOCAL)]
    return Layout.of([t for t in [*tensors, *rest, ("n", (other,), "int64", Role.FIXED)] if t[1] != (0,)])


def vectors(table: Layout, count: int, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    rng = np.random.default_rng(seed)
    made = [rng.standard_normal(table.update_size, dtype=np.float32) for _ in range(count)]
    for vector in made:
        vector.flags.writeable = False  # as they come from Ray's object store
    return made


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.clone().view(torch.int32), b.clone().view(torch.int32))


def ready(table: Layout, weights: list[float], seed: int = 0, scales: list[float] | None = None) -> list[Weighted]:
    made = vectors(table, len(weights), seed)
    return [Weighted(v, w, s) for v, w, s in zip(made, weights, scales or [1.0] * len(made), strict=True)]


def fedavg(base: torch.Tensor, updates: list[Weighted], table: Layout) -> torch.Tensor:
    """The ten-line loop. Statistics are values, so they replace instead of adding."""
    acc, total = torch.zeros(table.update_size), 0.0
    for update in updates:
        acc.add_(torch.from_numpy(update.vector.copy()), alpha=update.weight)
        total += update.weight
    new = base.clone()
    new[table.shared] += (acc / total)[table.shared]
    new[table.statistic] = (acc / total)[table.statistic]
    return new


# ---- fold


@settings(max_examples=60, deadline=None)
@given(
    shared=st.integers(1, 700),
    statistic=st.integers(0, 60),
    weights=st.lists(st.floats(0.01, 1e4), min_size=1, max_size=6),
    block=st.integers(1, 300),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_waiting_for_all_equals_the_ten_line_loop_bit_for_bit(
    shared: int, statistic: int, weights: list[float], block: int, threads: int, data: st.DataObject
) -> None:
    table = layout(shared, statistic)
    updates = ready(table, weights, seed=shared)
    base = torch.from_numpy(np.random.default_rng(1).standard_normal(table.size, dtype=np.float32))
    accumulator = Accumulator(table, block=block, threads=threads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(updates)), max_size=3)))
    for start, stop in zip([0, *cuts], [*cuts, len(updates)], strict=True):
        assert accumulator.fold(updates[start:stop]) == []
    new = base.clone()
    apply(new, accumulator.take(), table, transforms.build({"name": "sgd"}), {})
    assert same(new, fedavg(base, updates, table))


def test_large_odd_sizes_repeat_their_bits_for_every_block_grouping_and_number_of_threads() -> None:
    table = layout(1_000_003, 4099)
    updates = ready(table, [3.0, 0.1, 700.0])
    expected = fedavg(torch.zeros(table.size), updates, table)[: table.update_size]
    together, alone = [updates], [[update] for update in updates]
    some = [updates[:2], updates[2:]], [updates[:1], updates[1:]]
    ways = [(1, 1 << 18, together), (2, 1 << 18, alone), (3, 99_991, together), (2, 1 << 22, alone)]
    for threads, block, groups in [*ways, *((2, None, groups) for groups in some)]:
        accumulator = Accumulator(table, threads=threads, block=block)
        for group in groups:
            assert accumulator.fold(group) == []
        mean = accumulator.take()
        assert same(torch.cat([mean.shared, mean.statistic]), expected)


@pytest.mark.parametrize(("borrowed", "most"), [(True, HELD), (False, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_updates_that_come_alone_are_held_so_many_at_a_time(borrowed: bool, most: int, count: int) -> None:
    table = layout()
    weights = [float(n) for n in range(1, count + 1)]
    accumulator, held = Accumulator(table), list[int]()
    alive = []
    for number, weight in enumerate(weights):
        (made,) = vectors(table, 1, seed=number)
        assert accumulator.fold([Weighted(made, weight, borrowed=borrowed)]) == []
        alive.append(weakref.ref(made))
        del made
        held.append(sum(vector() is not None for vector in alive))
    mean = accumulator.take()
    assert max(held) == min(count, most)
    assert held[:5] == ([1, 2, 3, 0, 1] if borrowed else [1, 0, 1, 0, 1])[:count]
    assert all(vector() is None for vector in alive), "a version that is done holds nothing"
    updates = [Weighted(*vectors(table, 1, seed=n), weight) for n, weight in enumerate(weights)]
    expected = fedavg(torch.zeros(table.size), updates, table)[: table.update_size]
    assert same(torch.cat([mean.shared, mean.statistic]), expected)
    assert mean.norm == pytest.approx(float(mean.shared.norm()), rel=1e-5)


@pytest.mark.parametrize(("writable", "most"), [(False, HELD), (True, 1)])
def test_of_updates_that_came_in_pieces_into_this_process_one_is_held(writable: bool, most: int) -> None:
    table = layout()
    start = np.zeros(table.size, np.float32)
    model = GlobalModel(table, start, transforms.build({"name": "sgd"}), how=[], normalise="sum", threads=1)
    alive, held = [], []
    for number in range(5):
        (made,) = vectors(table, 1, seed=number)
        made.flags.writeable = writable  # the object store's and a mapped file's are not
        assert model.fold([(made, 1.0, None)]) == {}
        alive.append(weakref.ref(made))
        del made
        held.append(sum(vector() is not None for vector in alive))
    assert max(held) == most


def test_the_second_version_knows_nothing_of_the_first() -> None:
    table = layout()
    accumulator = Accumulator(table)
    for seed in range(3):
        updates = ready(table, [1.0, 2.0], seed)
        assert len(accumulator) == 0
        accumulator.fold(updates)
        assert same(accumulator.take().shared, fedavg(torch.zeros(table.size), updates, table)[table.shared])


def test_the_accumulator_is_two_updates_large_however_many_come() -> None:
    table = layout(100_000)
    accumulator = Accumulator(table)
    for seed in range(5):
        accumulator.fold(ready(table, [1.0, 1.0], seed))
    tensors = [value for value in vars(accumulator).values() if isinstance(value, torch.Tensor)]
    assert sum(t.numel() for t in tensors) <= 2 * table.update_size + 1
    assert server_memory(table, transforms.build({"name": "adam"})) == table.size + 4 * table.shared.stop + 2 * 32


def test_read_only_memory_is_folded_without_a_copy_or_a_warning() -> None:
    table = layout()
    updates = ready(table, [1.0])
    before = updates[0].vector.copy()
    torch.set_warn_always(True)  # not only at the first such array of the process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Accumulator(table).fold(updates)
    torch.set_warn_always(False)
    assert np.array_equal(updates[0].vector, before)


def test_torch_keeps_its_threads_in_the_rest_of_the_process() -> None:
    before = torch.get_num_threads()
    accumulator = Accumulator(layout(10_000), threads=3, block=1000)
    accumulator.fold(ready(layout(10_000), [1.0]))
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *seen] == [before, before]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("place", [0, 511, 999, 1010, -1])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_value_that_is_not_finite_is_refused_and_leaves_no_trace(value: float, place: int, threads: int) -> None:
    table = layout()
    updates = ready(table, [1.0, 2.0, 0.0, 3.0])
    bad = updates[2].vector.copy()
    bad[place] = value
    # A weight of 0 hides a large finite value, and rightly so, but no NaN.
    weight = 1.0 if np.isfinite(value) else 0.0
    seen = Accumulator(table, threads=threads, block=128)
    assert seen.fold(updates[:1]) == []
    assert seen.fold([updates[1], Weighted(bad, weight), updates[3], Weighted(bad[:-1], 1.0)]) == [1, 3]
    assert seen.fold([Weighted(bad, weight)]) == [0]
    never = Accumulator(table, threads=threads, block=128)
    assert never.fold([updates[0], updates[1], updates[3]]) == []
    ours, theirs = seen.take(), never.take()
    assert same(ours.shared, theirs.shared)
    assert same(ours.statistic, theirs.statistic)
    assert (ours.weight, ours.count, ours.norm, ours.steps) == (theirs.weight, theirs.count, theirs.norm, theirs.steps)


def test_infinities_of_opposite_sign_do_not_hide_each_other() -> None:
    table = layout()
    updates = [Weighted(v.copy(), 1.0) for v in vectors(table, 3)]
    updates[0].vector[7], updates[1].vector[7] = np.inf, -np.inf
    assert Accumulator(table).fold(updates) == [0, 1]


def test_a_wrong_shape_kind_or_weight_is_refused() -> None:
    table = layout()
    good = vectors(table, 1)[0]
    wrong: list[Any] = [good[:-1], good.astype(np.float64), good.reshape(1, -1), np.repeat(good, 2)[::2]]
    assert Accumulator(table).fold([Weighted(v, 1.0) for v in wrong]) == [0, 1, 2, 3]
    impossible = [(np.nan, 1.0), (-1.0, 1.0), (np.inf, 1.0), (1.0, 0.0), (1.0, np.nan), (1e20, 1e20)]
    assert Accumulator(table).fold([Weighted(good, w, s) for w, s in impossible]) == list(range(6))


def test_nothing_folded_is_nothing_to_take() -> None:
    with pytest.raises(RunError, match="no update was folded"):
        Accumulator(layout()).take()


def test_updates_without_weight_move_nothing() -> None:
    table = layout()
    accumulator = Accumulator(table)
    assert accumulator.fold(ready(table, [0.0, 0.0])) == []
    base = torch.ones(table.size)
    apply(base, accumulator.take(), table, transforms.build({"name": "sgd"}), {})
    assert bool((base == 1).all())


def test_dividing_by_k_shrinks_the_step_of_stale_work_but_not_its_statistics() -> None:
    table = layout()
    updates = ready(table, [0.5, 0.25])
    by_sum, by_k, expected = Accumulator(table), Accumulator(table), Accumulator(table)
    for accumulator in (by_sum, by_k, expected):
        accumulator.fold(updates)
    a, b, c = by_sum.take(), by_k.take(normalise="k"), expected.take(normalise="k", expected=3.0)
    torch.testing.assert_close(b.shared, a.shared * 0.75 / 2)
    torch.testing.assert_close(c.shared, a.shared * 0.75 / 3)
    assert same(a.statistic, b.statistic)


def test_the_norm_is_that_of_the_shared_step() -> None:
    table = layout(5000, 100)
    accumulator = Accumulator(table, block=512, threads=2)
    accumulator.fold(ready(table, [1.0, 2.0]))
    accumulator.fold(ready(table, [3.0], seed=5))
    mean = accumulator.take()
    assert mean.norm == pytest.approx(float(mean.shared.norm()), rel=1e-5)


def test_fednova_with_equal_steps_is_fedavg() -> None:
    table = layout()
    weights = [3.0, 1.0, 5.0]
    nova, avg = Accumulator(table), Accumulator(table)
    nova.fold(ready(table, weights, scales=[1 / 7] * 3))
    avg.fold(ready(table, weights))
    ours, theirs = nova.take(), avg.take()
    torch.testing.assert_close(ours.shared, theirs.shared)
    assert same(ours.statistic, theirs.statistic)
    assert (ours.steps, theirs.steps) == (pytest.approx(7.0), 1.0)


def test_fednova_with_unequal_steps_follows_its_formula() -> None:
    table = layout()
    weights, steps = [3.0, 1.0, 5.0], [1, 10, 4]
    accumulator = Accumulator(table)
    accumulator.fold(ready(table, weights, scales=[1 / a for a in steps]))
    p = np.array(weights) / sum(weights)
    effective = float(p @ steps)
    expected = sum(effective * q * v / a for q, v, a in zip(p, vectors(table, 3), steps, strict=True))
    np.testing.assert_allclose(accumulator.take().shared, expected[table.shared], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("by_steps", "limit"), [(True, 0.5), (False, None)])
def test_two_quadratic_stores_of_unequal_work_meet_in_the_middle_only_when_steps_are_normalised(
    by_steps: bool, limit: float | None
) -> None:
    """f_i = (x - e_i)^2 / 2 at e = 0 and 1 with 1 and 20 local steps; FedAvg's biased point in closed form."""
    lr, steps, optima = 0.01, (1, 20), (0.0, 1.0)
    table = Layout.of([("x", (1,), "float32", Role.SHARED)])
    weights, accumulator = torch.full((table.size,), 0.3), Accumulator(table)
    for _ in range(4000):
        updates = []
        for a, e in zip(steps, optima, strict=True):
            delta = np.zeros(table.size, np.float32)
            delta[0] = (e - float(weights[0])) * (1 - (1 - lr) ** a)
            updates.append(Weighted(delta, 1.0, 1 / a if by_steps else 1.0))
        accumulator.fold(updates)
        apply(weights, accumulator.take(), table, transforms.build({"name": "sgd"}), {})
    moved = [1 - (1 - lr) ** a for a in steps]
    closed_form = moved[1] / sum(moved)
    if limit is None:
        assert float(weights[0]) == pytest.approx(closed_form, abs=1e-3)
    else:
        per_step = [m / a for m, a in zip(moved, steps, strict=True)]
        assert float(weights[0]) == pytest.approx(per_step[1] / sum(per_step), abs=1e-3)
        assert abs(float(weights[0]) - limit) < 0.1 * abs(closed_form - limit)


# ---- transforms


def three_steps(name: str, size: int, threads: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    transform = transforms.build({"name": name})
    rng = torch.Generator().manual_seed(3)
    weights, state = torch.randn(size, generator=rng), transform.init(size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for _ in range(3):
        transform.update(weights, torch.randn(size, generator=rng), state)
    torch.set_num_threads(before)
    return weights, state


@pytest.mark.parametrize("name", transforms.names())
def test_every_transform_keeps_its_contract(name: str) -> None:
    transform = transforms.build({"name": name})
    shapes = ((17,), (1,))  # of the weights, or a count
    assert all(t.shape in shapes and t.dtype == torch.float32 for t in transform.init(17).values())
    size = (1 << 20) + 33333
    first, state = three_steps(name, size)
    again, state_again = three_steps(name, size, threads=1)
    assert same(first, again)
    assert all(same(state[key], state_again[key]) for key in state)
    weights = torch.randn(50)
    still, step = weights.clone(), torch.zeros(50)
    transform.update(still, step, transform.init(50))
    assert same(still, weights)
    transform.update(still, torch.ones(50), transform.init(50))
    assert bool((still > weights).all()), "the pseudo-gradient is added"


def test_sgd_with_rate_one_is_base_plus_mean_exactly() -> None:
    weights, step = torch.randn(999), torch.randn(999)
    new = weights.clone()
    transforms.build({"name": "sgd"}).update(new, step, {})
    assert same(new, weights + step)


@pytest.mark.parametrize(("dampened", "first", "second"), [(True, 0.1, 0.19), (False, 1.0, 1.9)])
def test_momentum_gathers(dampened: bool, first: float, second: float) -> None:
    transform = transforms.build({"name": "momentum", "beta": 0.9, "dampened": dampened})
    weights, state = torch.zeros(4), transform.init(4)
    transform.update(weights, torch.ones(4), state)
    assert float(weights[0]) == pytest.approx(first)
    transform.update(weights, torch.ones(4), state)
    assert float(weights[0]) == pytest.approx(first + second)


def test_adam_is_that_of_reddi_et_al_without_bias_correction() -> None:
    transform = transforms.build({"name": "adam", "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3})
    weights, state, m, v, x = torch.zeros(1), transform.init(1), 0.0, 1e-6, 0.0
    for step in (0.5, -0.2, 0.3):
        m, v = 0.9 * m + 0.1 * step, 0.99 * v + 0.01 * step**2
        x += 0.1 * m / (v**0.5 + 1e-3)
        transform.update(weights, torch.tensor([step]), state)
    assert float(weights[0]) == pytest.approx(x, rel=1e-5)


def test_only_shared_and_statistic_entries_move() -> None:
    table = layout()
    accumulator, base = Accumulator(table), torch.randn(table.size)
    accumulator.fold(ready(table, [1.0]))
    new = base.clone()
    apply(new, accumulator.take(), table, transforms.build({"name": "momentum"}), {"m": torch.zeros(table.shared.stop)})
    assert same(new[table.update_size :], base[table.update_size :])
    assert not same(new[table.shared], base[table.shared])


def test_statistics_are_mixed_as_values_and_never_pass_the_transform() -> None:
    table = layout()
    value = torch.from_numpy(vectors(table, 1)[0].copy())[table.statistic]
    for mix in (1.0, 0.25):
        accumulator, weights = Accumulator(table), torch.full((table.size,), 2.0)
        accumulator.fold(ready(table, [4.0]))
        apply(weights, accumulator.take(), table, transforms.build({"name": "sgd", "lr": 0.1}), {}, mix)
        torch.testing.assert_close(weights[table.statistic], (1 - mix) * 2.0 + mix * value)


# ---- codecs


@pytest.mark.parametrize("name", codecs.names())
def test_every_codec_keeps_its_contract(name: str) -> None:
    codec = codecs.build({"name": name})
    assert codec.name == name
    rng = np.random.default_rng(0)
    vector = (rng.standard_normal(300_001) * 10.0 ** rng.integers(-12, 4, 300_001)).astype(np.float32)
    vector[:4] = 0.0, -0.0, 1.0, 1 + 2**-8
    vector.flags.writeable = False
    kept, ctx = vector.copy(), Context(vector.size)
    encoded = codec.encode(vector, ctx)
    assert encoded.nbytes == codec.num_bytes(vector.size) == encoded_bytes([{"name": name}], vector.size)
    assert encoded.dtype == np.dtype(codec.gives)
    encoded.flags.writeable = False
    back = codec.decode(encoded, ctx)
    assert (back.dtype, back.shape) == (np.float32, vector.shape)
    allowed = codec.relative_error * np.abs(vector.astype(np.float64)) + codec.absolute_error
    assert bool((np.abs(back.astype(np.float64) - vector) <= allowed).all())
    assert np.array_equal(vector, kept)
    odd = np.array([np.nan, np.inf, -np.inf, -np.nan], np.float32)
    through = codec.decode(codec.encode(odd, Context(4)), Context(4))
    assert np.array_equal(np.isnan(through), np.isnan(odd))
    assert through[1] == np.inf
    assert through[2] == -np.inf


@pytest.mark.parametrize("name", codecs.names())
def test_a_codec_says_truthfully_whether_sums_may_be_taken_before_decoding(name: str) -> None:
    codec, ctx = codecs.build({"name": name}), Context(1000)
    a, b = (np.random.default_rng(seed).standard_normal(1000).astype(np.float32) for seed in (1, 2))
    exact = np.array_equal(codec.decode(codec.encode(a, ctx) + codec.encode(b, ctx), ctx), a + b)
    assert exact == codec.linear


def test_float32_copies_nothing_and_an_empty_chain_is_float32() -> None:
    vector = np.ones(16, np.float32)
    assert encode_chain([{"name": "float32"}], vector) is vector
    assert decode_chain([], vector, 16) is vector


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    vector = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    vector = vector[np.isfinite(vector)]
    back = decode_chain([{"name": "bfloat16"}], encode_chain([{"name": "bfloat16"}], vector), vector.size)
    assert same(torch.from_numpy(back), torch.from_numpy(vector).bfloat16().float())


def test_float16_refuses_what_it_cannot_carry() -> None:
    with pytest.raises(UpdateRejected, match="beyond 65504"):
        encode_chain([{"name": "float16"}], np.array([1e6], np.float32))


@pytest.mark.parametrize("wrong", [np.zeros(9, np.uint16), np.zeros(8, np.float32), np.zeros((8, 1), np.uint16)])
def test_an_encoded_update_of_another_shape_or_kind_is_rejected_in_one_line(wrong: Any) -> None:
    with pytest.raises(UpdateRejected, match=r"^bfloat16 expects 8 values of uint16, .* came with shape"):
        decode_chain([{"name": "bfloat16"}], wrong, 8)


def test_codecs_that_do_not_fit_on_each_other_are_a_configuration_error() -> None:
    with pytest.raises(
        ConfigError, match="float16 cannot come after bfloat16: it takes float32, bfloat16 gives uint16"
    ):
        chain([{"name": "bfloat16"}, {"name": "float16"}])
    assert len(chain([{"name": "float32"}, {"name": "bfloat16"}])) == 2


# ---- staleness


@pytest.mark.parametrize("name", staleness.names())
def test_every_staleness_weight_starts_at_one_and_never_rises(name: str) -> None:
    weigh = staleness.build({"name": name})
    weights = [weigh(tau) for tau in range(200)]
    assert weights[0] == 1.0
    assert all(0.0 < later <= earlier for earlier, later in pairwise(weights))


def test_scripted_staleness_gives_the_published_weights() -> None:
    polynomial = staleness.build({"name": "polynomial"})
    assert [polynomial(tau) for tau in (0, 1, 2)] == pytest.approx([1.0, 2**-0.5, 3**-0.5])
    hinge = staleness.build({"name": "hinge", "a": 10, "b": 4})
    assert [hinge(tau) for tau in (4, 5)] == pytest.approx([1.0, 1 / 11])
