"""The tasks: each module's `task` function is a Hydra `_target_` returning a `qbench.task.Task`."""
