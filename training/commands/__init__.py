"""The commands of `cspine-train`, a module each.

Everything heavy is imported inside the command that needs it, so that `--help` is quick.
"""
