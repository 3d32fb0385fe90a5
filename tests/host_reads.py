"""A mode under which reading a number from the device fails: what no training step may do on a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class NoHostReads(TorchDispatchMode):
    """Fails where the host reads from the device; what happens inside our custom ops is their own tests' matter."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        assert name not in READS, name
        return function(*args, **(kwargs or {}))
