"""Client of KVService: sequences of keys and values on a server, and certified attention over them.

    with Client("unix:/run/kvservice.sock") as client:
        client.register_model(Model(...))
        with client.sequence("llama") as sequence:
            sequence.append(0, k, v)                              # prefill, every layer
            result = sequence.attend(0, q, k1, v1, position=n)    # one layer of one step
            result.out, result.certificates.dropped_mass_upper

Tensors are numpy arrays or torch tensors: float32, float16, or bf16, which numpy holds as uint16
(see `tensors`). With a server on the same host they travel through shared memory; see
`Client.transport`.
"""

import pkgutil
from typing import Any

# Generated messages (kvservice.v1) may lie in another folder of the path than this package.
__path__ = pkgutil.extend_path(__path__, __name__)

from kvservice.attend import AttendReply, Row  # noqa: E402
from kvservice.client import Client  # noqa: E402
from kvservice.errors import KvServiceError  # noqa: E402
from kvservice.lane import LaneOptions  # noqa: E402
from kvservice.policies import layer_override, make_policy  # noqa: E402
from kvservice.prepared import PreparedAttend  # noqa: E402
from kvservice.results import (  # noqa: E402
    Action,
    AttendResult,
    Certificates,
    GroupReports,
    Level,
    Selector,
)
from kvservice.sequence import Sequence  # noqa: E402
from kvservice.step_buffers import StepBuffers  # noqa: E402
from kvservice.tls import TlsFiles  # noqa: E402



def attach(model: Any, endpoint: str, policy: Any = "certified", **options: Any) -> Any:
    """Makes a Hugging Face model's `generate()` decode through the server; returns the model.

    See `kvservice.huggingface.attach`; needs torch and transformers.
    """
    from kvservice import huggingface

    return huggingface.attach(model, endpoint, policy, **options)


def detach(model: Any) -> Any:
    """Undoes `attach`; returns the model."""
    from kvservice import huggingface

    return huggingface.detach(model)


__all__ = [
    "Action",
    "AttendReply",
    "AttendResult",
    "Certificates",
    "Client",
    "GroupReports",
    "KvServiceError",
    "LaneOptions",
    "Level",
    "PreparedAttend",
    "Row",
    "Selector",
    "Sequence",
    "StepBuffers",
    "TlsFiles",
    "attach",
    "detach",
    "layer_override",
    "make_policy",
]
