"""Which kernels TensorFlow has for an operation."""

from tensorflow.python.framework import kernels


def devices_of(operation: str) -> tuple[str, ...]:
    """The types of device that an operation has kernels for: ("CPU", "GPU").

    Args:
        operation: type of the operation; one that does not exist has none.
    """
    found = kernels.get_registered_kernels_for_op(operation).kernel
    return tuple(sorted({kernel.device_type for kernel in found}))
