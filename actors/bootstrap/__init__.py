"""The bootstrap server: who serves which model, and where."""

from llm_runtime.actors.bootstrap.actor import Bootstrap, BootstrapConfig

__all__ = ["Bootstrap", "BootstrapConfig"]
