"""The bootstrap server: who serves which model, and where."""

from actors.bootstrap.actor import Bootstrap, BootstrapConfig

__all__ = ["Bootstrap", "BootstrapConfig"]
