"""The GPUs that kernels are compiled for where none is, as compilers want to know them."""

import contextlib
import dataclasses
import re
from typing import Any, NamedTuple

# first: it says to jax what has to be said before that is loaded
from benchmarks.gpu_compile import H200  # isort: skip

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """What a compiler wants to know of a GPU, and what products on its tensor cores are called."""

    name: str
    capability: str
    cores: int
    shared_memory: int
    product: str

    def description(self) -> str:
        """The H200's, changed where it matters to a compiler."""
        major, minor = self.capability.split(".")
        known = {
            "core_count": self.cores,
            "shared_memory_per_block_optin": self.shared_memory,
            "shared_memory_per_core": self.shared_memory + 1024,
            "major": major,
            "minor": minor,
        }
        text = H200.replace("NVIDIA H200", self.name)
        for key, value in known.items():
            text = re.sub(rf"\b{key}: \d+", f"{key}: {value}", text)
        return text

    def sharding(self) -> Any:
        """Puts what is compiled on such a GPU."""
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=self.name,
            target_config=self.description(),
            topology="1x1x1",
        )
        return jax.sharding.SingleDeviceSharding(topology.devices[0])

    def lowering(self) -> contextlib.AbstractContextManager:
        """From jax 0.11 on kernels are lowered for a device that has a name and a capability."""
        if jax.__version_info__ < (0, 11):
            return contextlib.nullcontext()

        @dataclasses.dataclass(frozen=True)
        class Device(jax.sharding.AbstractDevice):
            compute_capability: str

        device = Device(
            device_kind=self.name,
            num_cores=self.cores,
            platform="gpu",
            compute_capability=self.capability,
        )
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        return jax.sharding.use_abstract_mesh(mesh)


A100 = Chip("NVIDIA A100", "8.0", 108, 166_912, r"\bmma\.sync")
# as little shared memory as any chip has that is not too old
L4 = Chip("NVIDIA L4", "8.9", 58, 101_376, r"\bmma\.sync")
B200 = Chip("NVIDIA B200", "10.0", 148, 232_448, r"tcgen05\.mma|\bmma\.sync")
CHIPS = (
    A100,
    L4,
    Chip("NVIDIA H200", "9.0", 132, 232_448, r"wgmma\.mma_async|\bmma\.sync"),
    B200,
)
