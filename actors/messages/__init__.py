"""Every message of the runtime, one module for the edges of a pair of roles. A class of these modules that is derived
from `AnyMessage` is a message, and needs no other mention.

A request is known by (rid, attempt): the ingress that owns it raises `attempt` each time it hands the request to a
scheduler again, and whoever knows a newer attempt drops what belongs to an older one. Packed arrays are little-endian:
`i32` stands for int32, `f32` for float32. Times are seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, Union

from llm_runtime.actors.messages.base import *
from llm_runtime.actors.messages.common import *
from llm_runtime.actors.messages.encoding import *
from llm_runtime.actors.messages.registry import *
from llm_runtime.actors.messages.requests import *
from llm_runtime.actors.messages.steps import *
from llm_runtime.actors.messages.texts import *
from llm_runtime.actors.messages.tokenization import *
from llm_runtime.actors.messages.transfers import *
from llm_runtime.actors.messages.workers import *

if TYPE_CHECKING:
    Message: TypeAlias = AnyMessage
else:
    Message = Union[tuple(AnyMessage.__subclasses__())]
    """All types that may travel in an envelope."""
