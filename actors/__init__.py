"""The roles of the runtime: one package a role, each an actor in a process of its own."""
