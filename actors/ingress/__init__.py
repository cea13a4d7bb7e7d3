"""The HTTP ingress: OpenAI's and SGLang's endpoints, and the ledger that is the only truth about a request."""

from llm_runtime.actors.ingress.actor import Ingress
from llm_runtime.actors.ingress.config import IngressConfig

__all__ = ["Ingress", "IngressConfig"]
