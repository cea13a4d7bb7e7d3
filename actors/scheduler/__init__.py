"""The scheduler: continuous batching over paged KV with a prefix tree, for engines of each role."""
