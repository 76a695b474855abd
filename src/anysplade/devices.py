"""Which device each of several worker processes gets."""


def assigned_device(worker: int, count: int, visible: str | None) -> str | None:
    """``CUDA_VISIBLE_DEVICES`` for a worker, so that workers take turns through the devices; None if there are none.

    Args:
        worker: its number, from 0.
        count: devices that this process sees.
        visible: ``CUDA_VISIBLE_DEVICES`` of this process: numbers, or UUIDs such as ``GPU-…`` and ``MIG-…``; None if not set.
    """
    if count < 1:
        return None
    devices = [str(i) for i in range(count)] if visible is None else [part.strip() for part in visible.split(",")][:count]
    return devices[worker % len(devices)]
