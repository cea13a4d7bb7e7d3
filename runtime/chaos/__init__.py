"""Fault injection: kill processes of a running node at random while clients are served, and see what these notice."""
