"""The commands of `jaxcl`: one file a command, `jaxcl NAME` calls its `command`."""
