"""What every plan promises, whatever the model and the machines."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.partition.costs import ModelCosts
from swarmd.partition.explain import MOST_NAMED
from swarmd.partition.memory_weighted import ABOUT_AS_FAST, plan
from swarmd.partition.plan import Capacity, DoesNotFit, Promise

MB = 1_000_000


def bytes_needed(costs, promise, start, end):
    """The cost of a stage, written a second time and plainly."""
    kv = costs.kv_bytes_per_token * promise.kv_tokens
    total = sum(costs.layer_bytes[start:end]) + kv * (end - start) + costs.workspace_bytes
    if start == 0:
        total += costs.embedding_bytes
    if end == costs.n_layers:
        total += costs.head_bytes
    if start == 0 and end == costs.n_layers:
        total -= costs.shared_bytes
    return total


@st.composite
def models(draw):
    embedding = draw(st.integers(0, 200 * MB))
    head = draw(st.integers(0, 200 * MB))
    return ModelCosts(
        layer_bytes=tuple(draw(st.lists(st.integers(1, 100 * MB), min_size=1, max_size=40))),
        embedding_bytes=embedding,
        head_bytes=head,
        shared_bytes=draw(st.sampled_from([0, min(embedding, head)])),
        kv_bytes_per_token=draw(st.integers(0, 4096)),
        workspace_bytes=draw(st.integers(0, 50 * MB)),
    )


@st.composite
def swarms(draw):
    """Up to seven devices on up to as many nodes."""
    devices = []
    for index in range(draw(st.integers(1, 7))):
        node = f"{draw(st.integers(0, index)):064x}"
        accelerator, bandwidth = draw(st.booleans()), draw(st.sampled_from([0.0, 10e9, 12e9, 50e9, 3000e9]))
        memory = draw(st.integers(0, 3000 * MB))
        devices.append(Capacity(node, f"cuda:{index}", memory, f"device {index}", bandwidth, accelerator))
    return devices


capacities = swarms()
promises = st.integers(1, 16384).map(lambda tokens: Promise(tokens, tokens))


@settings(max_examples=400, deadline=None)
@given(models(), promises, capacities, st.booleans(), st.randoms())
def test_every_plan_keeps_its_promises(costs, promise, devices, split, random):
    try:
        made = plan(costs, [promise], devices, split=split)
    except DoesNotFit as error:
        assert error.missing > 0
        assert all(bytes_needed(costs, promise, 0, costs.n_layers) > device.memory for device in devices)
        return
    covered = [layer for stage in made.stages for layer in range(stage.start, stage.end)]
    assert covered == list(range(costs.n_layers)), "every layer exactly once, in order"
    memory = {(device.node, device.device): device.memory for device in devices}
    assert len({(stage.node, stage.device) for stage in made.stages}) == len(made.stages)
    for stage in made.stages:
        assert stage.bytes == bytes_needed(costs, promise, stage.start, stage.end)
        assert stage.bytes <= memory[stage.node, stage.device], "never over a cap"
        assert stage.end > stage.start
    shuffled = list(devices)
    random.shuffle(shuffled)
    assert plan(costs, [promise], shuffled, split=split) == made, "the order of the members does not matter"


@settings(max_examples=200, deadline=None)
@given(models(), promises, capacities)
def test_a_model_that_fits_on_one_device_is_not_split(costs, promise, devices):
    largest = max(device.memory for device in devices)
    if bytes_needed(costs, promise, 0, costs.n_layers) <= largest:
        assert len(plan(costs, [promise], devices).stages) == 1


@settings(max_examples=200, deadline=None)
@given(models(), promises, capacities)
def test_a_model_that_fits_on_one_device_goes_to_the_fastest(costs, promise, devices):
    able = [device for device in devices if bytes_needed(costs, promise, 0, costs.n_layers) <= device.memory]
    if not able:
        return
    [stage] = plan(costs, [promise], devices).stages
    [used] = [device for device in able if (device.node, device.device) == (stage.node, stage.device)]
    assert used.accelerator == any(device.accelerator for device in able), "an accelerator before a processor"
    rivals = [device for device in able if device.accelerator == used.accelerator]
    fastest = max(device.bandwidth for device in rivals)
    assert not used.bandwidth or used.bandwidth >= ABOUT_AS_FAST * fastest
    alike = [d for d in rivals if not d.bandwidth or d.bandwidth >= ABOUT_AS_FAST * fastest]
    assert used.memory == max(device.memory for device in alike), "of devices about as fast the one with most memory"


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4096), swarms(), st.booleans())
def test_the_devices_of_a_node_stand_together_where_the_ends_cost_nothing(n_layers, kv, devices, split):
    """Layers alike and no head or embedding to place: then every order fits that any order fits."""
    costs = ModelCosts((100 * MB,) * n_layers, 0, 0, kv, 0)
    try:
        stages = plan(costs, [Promise(1024, 1024)], devices, split=split).stages
    except DoesNotFit:
        return
    nodes = [stage.node for stage in stages]
    runs = [node for node, _ in itertools.groupby(nodes)]
    assert len(runs) == len(set(nodes))


def test_the_devices_of_a_node_stand_together_or_else_where_they_fit():
    """Neither the embedding nor the head fits on the other node, so it stands in the middle."""
    costs = ModelCosts((10 * MB,) * 9, 40 * MB, 60 * MB, 0, 0)
    gpu, cpu = Capacity("a" * 64, "cuda:0", 95 * MB, "gpu"), Capacity("a" * 64, "cpu", 75 * MB, "cpu")
    other = Capacity("b" * 64, "cpu", 35 * MB, "other")
    apart = plan(costs, [Promise(1, 1)], [gpu, cpu, other]).stages
    assert [stage.node[0] for stage in apart] == ["a", "b", "a"]
    together = plan(costs, [Promise(1, 1)], [gpu, cpu, Capacity("b" * 64, "cpu", 85 * MB, "other")]).stages
    assert [stage.node[0] for stage in together] in (["a", "a", "b"], ["b", "a", "a"])


@settings(max_examples=200, deadline=None)
@given(st.integers(7, 60), st.tuples(*[st.integers(1, 8)] * 3))
def test_uniform_layers_are_split_in_proportion_to_memory(n_layers, weights):
    costs = ModelCosts((10 * MB,) * n_layers, 0, 0, 0, 0)
    unit = 10 * MB * n_layers * 2 // sum(weights)
    devices = [Capacity(f"{i:064x}", "cpu", w * unit, str(i)) for i, w in enumerate(weights)]
    made = plan(costs, [Promise(1, 1)], devices, split=True)
    got = {stage.node: stage.end - stage.start for stage in made.stages}
    ideals = [n_layers * w / sum(weights) for w in weights]
    if min(ideals) >= 1:
        for device, ideal in zip(devices, ideals, strict=True):
            assert abs(got[device.node] - ideal) <= 1


def test_two_small_devices_hold_what_neither_could():
    costs = ModelCosts((10 * MB,) * 10, 5 * MB, 5 * MB, 0, MB)
    devices = [Capacity("a" * 64, "cpu", 70 * MB, "a"), Capacity("b" * 64, "cpu", 60 * MB, "b")]
    made = plan(costs, [Promise(1, 1)], devices)
    assert [(stage.start, stage.end) for stage in made.stages] == [(0, 5), (5, 10)]


def test_a_weak_device_is_left_out_and_told_why():
    costs = ModelCosts((10 * MB,) * 10, 0, 0, 0, 0)
    devices = [Capacity(c * 64, "cpu", size * MB, c) for c, size in (("a", 70), ("b", 60), ("c", 11))]
    made = plan(costs, [Promise(1, 1)], devices)
    assert {stage.node for stage in made.stages} == {"a" * 64, "b" * 64}
    assert any(line.startswith("c is left out") for line in made.explanation)


def test_a_weak_device_is_used_when_the_others_need_it():
    costs = ModelCosts((10 * MB,) * 14, 0, 0, 0, 0)
    devices = [Capacity(c * 64, "cpu", size * MB, c) for c, size in (("a", 70), ("b", 60), ("c", 11))]
    assert len(plan(costs, [Promise(1, 1)], devices).stages) == 3


def test_the_head_goes_where_it_fits():
    costs = ModelCosts((10 * MB,) * 10, 0, 40 * MB, 0, 0)
    devices = [Capacity("a" * 64, "cpu", 110 * MB, "a"), Capacity("b" * 64, "cpu", 35 * MB, "b")]
    made = plan(costs, [Promise(1, 1)], devices)
    assert made.stages[-1].node == "a" * 64


def test_a_smaller_promise_is_kept_when_the_larger_cannot_be():
    costs = ModelCosts((10 * MB,) * 10, 0, 0, 1000, 0)
    devices = [Capacity("a" * 64, "cpu", 130 * MB, "a")]
    made = plan(costs, [Promise(8192, 8192), Promise(2048, 2048)], devices)
    assert made.promise.context == 2048
    assert any("reduced to 2048" in line for line in made.explanation)


def test_too_small_says_by_how_much():
    costs = ModelCosts((10 * MB,) * 10, 0, 0, 0, 0)
    devices = [Capacity("a" * 64, "cpu", 75 * MB, "a")]
    with pytest.raises(DoesNotFit, match=r"30\.0 MB missing") as caught:
        plan(costs, [Promise(1, 1)], devices)
    assert caught.value.missing == 30 * MB


def fits_somehow(costs, promise, devices):
    """Whether any order of any devices can hold the model, tried one by one; each takes all layers that it can."""
    n_layers = costs.n_layers
    for count in range(1, len(devices) + 1):
        for order in itertools.permutations(devices, count):
            start = 0
            for place, device in enumerate(order):
                stop = n_layers - (count - 1 - place)
                ends = range(start + 1, stop + 1)
                end = max((e for e in ends if bytes_needed(costs, promise, start, e) <= device.memory), default=None)
                if end is None:
                    break
                start = end
            if start == n_layers:
                return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=7),
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 6)),
    st.lists(st.integers(5, 50), min_size=1, max_size=4),
    st.booleans(),
)
def test_a_model_that_fits_somehow_is_never_refused(layers, other, sizes, split):
    """Layers of different sizes too, where it matters who stands where."""
    costs = ModelCosts(tuple(layers), other[0], other[1], 0, other[2])
    devices = [Capacity(f"{i:064x}", "cpu", size, str(i)) for i, size in enumerate(sizes)]
    try:
        plan(costs, [Promise(1, 1)], devices, split=split)
    except DoesNotFit:
        assert not fits_somehow(costs, Promise(1, 1), devices)
    else:
        assert fits_somehow(costs, Promise(1, 1), devices)


def test_the_order_of_the_middle_stages_is_searched_when_layers_differ_in_size():
    costs = ModelCosts((8, 2, 4, 8), 0, 0, 0, 0)
    devices = [Capacity(c * 64, "cpu", size, c) for c, size in (("a", 8), ("b", 8), ("c", 4), ("d", 2))]
    middle = plan(costs, [Promise(1, 1)], devices).stages[1:-1]
    assert [stage.node for stage in middle] == ["d" * 64, "c" * 64], "the smaller one holds the smaller layer"


@pytest.mark.parametrize("split", [False, True])
def test_of_hundreds_of_devices_without_a_part_only_some_are_named(split):
    costs = ModelCosts((10 * MB,) * 4, 0, 0, 0, 0)
    devices = [Capacity(f"{index:064x}", "cpu", (50 if index < 4 else 9) * MB, f"n{index}") for index in range(200)]
    made = plan(costs, [Promise(1, 1)], devices, split=split)
    assert len(made.explanation) <= 4 + MOST_NAMED + 1
    assert made.explanation[-1].endswith(f"{200 - len(made.stages) - MOST_NAMED} others")
