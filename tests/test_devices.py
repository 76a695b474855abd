import pytest

from anysplade.devices import assigned_device


@pytest.mark.parametrize(
    "visible, count, expected",
    [
        (None, 0, [None, None, None]),
        (None, 1, ["0", "0", "0"]),
        (None, 2, ["0", "1", "0"]),
        ("2,3", 2, ["2", "3", "2"]),
        ("3", 1, ["3", "3", "3"]),
        ("GPU-8932f937, MIG-7f31", 2, ["GPU-8932f937", "MIG-7f31", "GPU-8932f937"]),
        ("5,-1,2", 1, ["5", "5", "5"]),  # CUDA stops reading at a number that is none
        ("", 0, [None, None, None]),
    ],
)
def test_workers_take_turns_through_the_devices_they_may_use(visible, count, expected):
    assert [assigned_device(worker, count, visible) for worker in range(3)] == expected
